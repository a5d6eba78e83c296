"""Being a process of a run: what it inherits, signals, locks, turns on the cores, its end."""

import contextlib
import fcntl
import os
import signal
import threading
import time
from collections.abc import Iterator
from multiprocessing import current_process, resource_tracker
from pathlib import Path
from types import FrameType
from typing import Self

from harness.utils import complain, reason

# Read by the C libraries when a process starts, so it must be in the environment that the children
# inherit.
ENVIRONMENT = {
    # More threads would only fight for the cores, which the processes fill. PyTorch reads the first
    # two, NumPy the third; on macOS both read the last.
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "VECLIB_MAXIMUM_THREADS": "1",
    # glibc gives a freed tensor's pages back to the kernel, and faults them in again for the next
    # one: 2,000 faults a rollout. Other C libraries ignore these names.
    "MALLOC_MMAP_THRESHOLD_": str(32 * 2**20),  # the largest value that glibc takes
    "MALLOC_TRIM_THRESHOLD_": str(2**30),
    "MALLOC_TOP_PAD_": str(16 * 2**20),
    # Or imageio starts ffmpeg by a fork that runs Python code, and may hang where there are threads
    # (imageio-ffmpeg issue 58). It is for Ctrl-C, which a worker's children inherit as blocked.
    "IMAGEIO_FFMPEG_NO_PREVENT_SIGINT": "1",
}
# Those that the parent ignores stay ignored: nohup and a shell's "&" rely on it.
SIGNALS = [
    number
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    if signal.getsignal(number) != signal.SIG_IGN
]
# The shared stop flag. GO_ON: train. FINISH: training workers stop after their rollout, the test
# worker after its episode. STOP: the test worker drops its episode, too, and whoever still runs
# GRACE seconds later is killed.
GO_ON, FINISH, STOP = range(3)
GRACE = 3.0
LOCK_FILE = ".locks"  # in the run folder: byte 0 is the whole run's, two more are each slot's


# Signals.


def open_standard_files() -> None:
    """Open the null device where standard input, output or error was closed before Python started.

    Otherwise its number is that of the next file, such as shared memory, in which what is printed
    by a child process would end up.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest number that is free, this one
            os.set_inheritable(number, True)


def end_at_once_on_signals() -> None:
    """Let Ctrl-C, SIGTERM and SIGHUP end this process without a word: nothing has started yet."""

    def end(number: int, _: FrameType | None) -> None:
        os._exit(128 + number)

    for number in SIGNALS:
        signal.signal(number, end)


_signals_taken: list[int] = []


@contextlib.contextmanager
def signals_held() -> Iterator[None]:
    """Let Ctrl-C, SIGTERM and SIGHUP wait until `next_signal` asks for them.

    Processes that are started meanwhile inherit that, and never ask. So a signal to the whole
    process group, as a terminal sends it, is the main process's business alone.
    """
    try:
        resource_tracker.ensure_running()  # first, as its start unblocks signals
    except OSError as error:
        raise OSError(f"no process can be started: {reason(error)}") from error
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    # The handler's, and not `signal.sigwait`: only this thread blocks the signals, and one that
    # libraries have started may take them before a wait for them does, which then never ends.
    keep = lambda number, _: _signals_taken.append(number)  # noqa: E731
    handlers = {number: signal.signal(number, keep) for number in SIGNALS}
    try:
        yield
    finally:
        while next_signal():
            pass
        for number, handler in handlers.items():
            signal.signal(number, handler or signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def next_signal() -> int | None:
    """Return the number of a signal that has come since the last call, or None."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)  # the handler takes those that wait
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    return _signals_taken.pop(0) if _signals_taken else None


# Locks: the kernel frees them when their holder dies, however it dies.


def _lock(file: int, byte: int, flags: int = 0) -> None:
    fcntl.lockf(file, fcntl.LOCK_EX | flags, 1, byte)


def _unlock(file: int, byte: int) -> None:
    fcntl.lockf(file, fcntl.LOCK_UN, 1, byte)


def _open_lock_file(run_folder: Path) -> int:
    return os.open(run_folder / LOCK_FILE, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)


@contextlib.contextmanager
def run_folder_locked(run_folder: Path) -> Iterator[None]:
    """Claim the folder.

    Raises `ValueError` if another process has it, `OSError` if it cannot be written.
    """
    file = _open_lock_file(run_folder)
    try:
        try:
            _lock(file, 0, fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            raise ValueError(f"{run_folder} is in use by a run that goes on") from None
        except OSError as error:
            complain(
                f"no locks in {run_folder} ({reason(error)}): the workers take no turns on the "
                "cores, which is slower, and nothing keeps a second run out of the folder"
            )
        yield
    finally:
        os.close(file)


def num_cores() -> int:
    """Return the number of cores that this process may run on.

    A container's share of the processor time (docker --cpus) does not count, its cpuset does.
    """
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


class CoreTurn:
    """A context manager that lets as many rollouts run at a time as there are cores.

    Worker `rank` queues for slot `rank % cores`; no process is bound to a core. The fewer rollouts
    are under way, the fresher the weights that each was acted with, and the fewer weights and
    gradients compete for the caches. A worker enters `times` times before its turn is over, as each
    change of process finds cold caches. tests/README.md says what both are worth.

    Whoever is next in line holds the slot's first lock while it waits for the second, so that a
    worker that comes straight back cannot overtake it. Where the file system has no locks,
    everybody runs at any time.
    """

    def __init__(self, run_folder: Path, rank: int, times: int = 2) -> None:
        self._queue_byte = 1 + 2 * (rank % num_cores())
        self._slot_byte = self._queue_byte + 1
        self._lock_file = _open_lock_file(run_folder)
        self._times, self._entered = times, 0

    def __enter__(self) -> Self:
        if self._entered == 0:
            with contextlib.suppress(OSError):
                _lock(self._lock_file, self._queue_byte)
                try:
                    _lock(self._lock_file, self._slot_byte)
                finally:
                    _unlock(self._lock_file, self._queue_byte)
        return self

    def __exit__(self, *_: object) -> None:
        self._entered += 1
        if self._entered == self._times:
            self.end()

    def end(self) -> None:
        """End the turn early, before work that needs no core of its own."""
        if self._entered:
            self._entered = 0
            with contextlib.suppress(OSError):
                _unlock(self._lock_file, self._slot_byte)


# A spawned process imports this module first, and what it imports next takes seconds. Its
# `multiprocessing.parent_process()` is not set by then, but its name is, and tells the parent.
CHILD_OF = " child of "


def _end_with_parent(parent: int) -> None:
    """Let this process end when its parent does, however that ends."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


if CHILD_OF in current_process().name:
    _end_with_parent(int(current_process().name.rpartition(CHILD_OF)[2]))
