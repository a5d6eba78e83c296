"""The processes themselves: what they inherit, how they share the cores, how they are started and watched."""

import os
import signal
import sys
from multiprocessing import resource_tracker
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess as Process
from pathlib import Path
from typing import Self

from torch import Tensor

try:
    import fcntl
except ImportError:  # not a POSIX system: every process runs when it likes
    fcntl = None

# Read by the C libraries when a process starts, so it must be in the environment that the children inherit.
ENVIRONMENT = {
    # More threads would only fight for the cores, which the processes fill.
    "OMP_NUM_THREADS": "1",
    # glibc gives a freed tensor's pages back to the kernel, and faults them in anew for the next one: 2,000 faults a
    # rollout. Keeping them makes the learning pass a quarter faster; other C libraries ignore these names.
    "MALLOC_MMAP_THRESHOLD_": str(32 * 2**20),  # the largest value that glibc takes
    "MALLOC_TRIM_THRESHOLD_": str(2**30),
    "MALLOC_TOP_PAD_": str(16 * 2**20),
}


def num_cores() -> int:
    """Return the number of cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


class CoreTurn:
    """A context manager that lets one rollout per core run at a time; worker `rank` belongs to core `rank % cores`.

    The fewer rollouts are under way, the fresher the weights that each was acted with, and the fewer weights and
    gradients compete for the caches. The two locks of a core are bytes of a
    file, which the kernel frees when their holder dies, however it dies. Whoever is next in line holds the first lock
    while it waits for the second, so that a worker that comes straight back cannot overtake it.
    """

    def __init__(self, run_folder: Path, rank: int) -> None:
        self._next_in_line = 2 * (rank % num_cores())
        self._running = self._next_in_line + 1
        self._file = os.open(run_folder / ".turns", os.O_RDWR | os.O_CREAT)

    def __enter__(self) -> Self:
        if fcntl:
            fcntl.lockf(self._file, fcntl.LOCK_EX, 1, self._next_in_line)
            fcntl.lockf(self._file, fcntl.LOCK_EX, 1, self._running)
            fcntl.lockf(self._file, fcntl.LOCK_UN, 1, self._next_in_line)
        return self

    def __exit__(self, *_: object) -> None:
        if fcntl:
            fcntl.lockf(self._file, fcntl.LOCK_UN, 1, self._running)


def run_processes(processes: list[Process], ready: Tensor) -> int:
    """Start `processes`, wait until all have ended by themselves, and return the run's exit status.

    `ready` (bool) counts those that have started up. Only as many as there are cores start up at a time: all at once,
    the first would have to wait until the last has imported its libraries. If one fails, or at Ctrl-C, the others are
    stopped.
    """
    resource_tracker.ensure_running()  # here, as its start unblocks SIGINT
    to_start, running, status = list(processes), {}, 0
    try:
        while (to_start or running) and status == 0:
            starting_up = len(processes) - len(to_start) - int(ready.sum())
            if to_start and starting_up < num_cores():
                process = to_start.pop(0)
                # Children inherit the mask: Ctrl-C is the main process's business alone, and here it waits, unlost.
                signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
                process.start()
                signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
                running[process.sentinel] = process
                continue
            for sentinel in wait(list(running), timeout=0.05 if to_start else None):
                process = running.pop(sentinel)
                process.join()
                if process.exitcode != 0:
                    print(f"main.py: {process.name} died (exit code {process.exitcode})", file=sys.stderr)
                    status = 1
    except KeyboardInterrupt:
        status = 130
    for process in running.values():
        process.terminate()
    for process in running.values():
        process.join()
    return status
