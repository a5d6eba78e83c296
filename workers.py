"""The processes themselves: what they inherit, how they share the cores, are started, watched and started anew."""

import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from multiprocessing import get_context, resource_tracker
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any, NamedTuple, Self

try:
    import fcntl
except ImportError:  # not a POSIX system: every process runs when it likes
    fcntl = None

# Read by the C libraries when a process starts, so it must be in the environment that the children inherit.
ENVIRONMENT = {
    # More threads would only fight for the cores, which the processes fill.
    "OMP_NUM_THREADS": "1",
    # glibc gives a freed tensor's pages back to the kernel, and faults them in anew for the next one: 2,000 faults a
    # rollout. Keeping them makes 5 % more steps/s with 16 processes; other C libraries ignore these names.
    "MALLOC_MMAP_THRESHOLD_": str(32 * 2**20),  # the largest value that glibc takes
    "MALLOC_TRIM_THRESHOLD_": str(2**30),
    "MALLOC_TOP_PAD_": str(16 * 2**20),
}
MAIN_PROCESS = "A3C_MAIN_PROCESS"  # an environment variable with its process id
SIGNALS = [s for s in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP) if signal.getsignal(s) != signal.SIG_IGN]
GO_ON, FINISH, STOP, STOP_AT_ONCE = range(4)  # what the shared stop flag says; FINISH: after the episode
GRACE = 3.0  # seconds that processes have to stop by themselves
MAX_DEATHS, DEATHS_WITHIN = 3, 600.0  # of one process, within so many seconds; one more ends the run


def say(message: str, file: Any = None) -> None:
    """Print one line at once; a terminal or pipe that has gone away is no reason to die."""
    try:
        print(message, file=file or sys.stdout, flush=True)
    except OSError:
        sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115 - for the rest of this process's life


def complain(message: object) -> None:
    """Say in one line on stderr what went wrong, where the run goes on."""
    say(" ".join(str(message).split()), sys.stderr)


def attempt(path: Path, write: Callable[..., Any], *args: object) -> bool:
    """Call what writes to `path`; if that fails, as on a full disk, say so, return False and go on."""
    try:
        write(*args)
    except (OSError, RuntimeError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error).partition("\n")[0]
        complain(f"{path} not written: {reason}")
        return False
    return True


def hold_signals() -> None:
    """Let Ctrl-C, SIGTERM and SIGHUP wait until `signals_held` asks; children inherit that, and never ask.

    So a signal to the whole process group, as a terminal sends it, is the main process's business alone, at any moment.
    """
    resource_tracker.ensure_running()  # first, as its start unblocks signals
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)


def signals_held() -> list[int]:
    """Return the numbers of the signals that have come since the last call."""
    return [signal.sigwait([number]) for number in SIGNALS if number in signal.sigpending()]


def watch_main_process() -> None:
    """Let this process end within a second of the main process, however that ends."""
    main_process = int(os.environ.get(MAIN_PROCESS, os.getppid()))

    def watch() -> None:
        while os.getppid() == main_process:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def lock(run_folder: Path) -> None:
    """Claim the folder for the rest of this process's life; raise `ValueError` if another process has it."""
    file = os.open(run_folder / ".turns", os.O_RDWR | os.O_CREAT, 0o666)
    if fcntl:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, 0)
        except OSError:
            raise ValueError(f"{run_folder} is in use by a run that goes on") from None


def num_cores() -> int:
    """Return the number of cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


class CoreTurn:
    """A context manager that lets one rollout per core run at a time; worker `rank` belongs to core `rank % cores`.

    The fewer rollouts are under way, the fresher the weights that each was acted with, and the fewer weights and
    gradients compete for the caches: 12 % more steps/s with 16 processes on 2 cores. A worker enters `times` times
    before its turn is over, as each change of process finds cold caches: with two, another 6 %.

    The two locks of a core are bytes of a file, which the kernel frees when their holder dies, however it dies. Whoever
    is next in line holds the first lock while it waits for the second, so that a worker that comes straight back
    cannot overtake it.
    """

    def __init__(self, run_folder: Path, rank: int, times: int = 2) -> None:
        self._next_in_line = 1 + 2 * (rank % num_cores())  # byte 0 is the whole run's
        self._running = self._next_in_line + 1
        self._file = os.open(run_folder / ".turns", os.O_RDWR | os.O_CREAT, 0o666)
        self._times, self._done = times, 0

    def __enter__(self) -> Self:
        if fcntl and self._done == 0:
            fcntl.lockf(self._file, fcntl.LOCK_EX, 1, self._next_in_line)
            fcntl.lockf(self._file, fcntl.LOCK_EX, 1, self._running)
            fcntl.lockf(self._file, fcntl.LOCK_UN, 1, self._next_in_line)
        return self

    def __exit__(self, *_: object) -> None:
        self._done = (self._done + 1) % self._times
        if fcntl and self._done == 0:
            fcntl.lockf(self._file, fcntl.LOCK_UN, 1, self._running)


class Job(NamedTuple):
    """What a process does: target(*args, life), where `life` is another one after a death; `rank` is unique."""

    name: str
    rank: int
    target: Callable[..., None]
    args: tuple


def run_job(job: Job, life: int, traceback_file: Path) -> None:
    """Do a job and end the process; if the job raises, leave the traceback in a file and end with status 1."""
    status = 0
    try:
        job.target(*job.args, life)
    except Exception:
        status = 1
        attempt(traceback_file, traceback_file.write_text, traceback.format_exc())
    os._exit(status)  # taking an interpreter with torch down in good order costs a second of a busy core


def cause_of_death(exit_code: int, traceback_file: Path) -> str:
    """Return in a few words why a process died."""
    if exit_code < 0:
        return f"signal {-exit_code}, {signal.strsignal(-exit_code)}"
    if traceback_file.exists():
        return f"{traceback_file.read_text().splitlines()[-1]} (whole traceback: {traceback_file})"
    return f"exit status {exit_code}"


def supervise(jobs: list[Job], ready: Any, stop: Any, life: Any, run_folder: Path, tick: Callable[[], None]) -> bool:
    """Start the jobs' processes, start those that die anew, and return when all have ended; True if all went well.

    Args:
        ready: bool in shared memory, set at its rank by each process once it has started up. Only as many as there are
            cores start up at a time: all at once, the first would wait until the last has imported its libraries.
        stop: (1,) int64 in shared memory, GO_ON until somebody wants the run to end.
        life: (1,) int64, the number that the processes started next are given; deaths raise it.
        tick: called ten times a second.

    If one job's process dies more than MAX_DEATHS times within DEATHS_WITHIN seconds, the run is stopped.
    """
    context, to_start, running, well = get_context("spawn"), list(jobs), {}, True
    deaths, stopped_at = {job.rank: [] for job in jobs}, None
    while to_start or running:
        tick()
        if stop[0] >= FINISH:  # whoever has died is still started anew, to finish
            to_start = [job for job in to_start if deaths[job.rank] and stop[0] < STOP]
        if stop[0] >= STOP:
            stopped_at = stopped_at or time.monotonic()
            out_of_time = stop[0] == STOP_AT_ONCE or time.monotonic() - stopped_at > GRACE
            for job, process, _ in running.values():
                if out_of_time or not ready[job.rank]:
                    process.kill()
        while to_start and sum(not ready[job.rank] for job, *_ in running.values()) < num_cores():
            job = to_start.pop(0)
            traceback_file = run_folder / f"traceback-{job.name.replace(' ', '-')}-{life.item()}.txt"
            process = context.Process(target=run_job, args=(job, life.item(), traceback_file))
            ready[job.rank] = False
            process.start()
            running[process.sentinel] = job, process, traceback_file
        for sentinel in wait(list(running), timeout=0.1):
            job, process, traceback_file = running.pop(sentinel)
            process.join()
            if process.exitcode == 0 or stop[0] >= STOP:
                continue
            now = time.monotonic()
            deaths[job.rank] = [at for at in deaths[job.rank] if now - at < DEATHS_WITHIN] + [now]
            well = len(deaths[job.rank]) <= MAX_DEATHS
            what = "is started anew" if well else f"that was {MAX_DEATHS + 1} times in ten minutes, so the run ends"
            complain(f"{job.name} died: {cause_of_death(process.exitcode, traceback_file)}; {what}")
            if not well:
                stop[0] = STOP
            life += 1
            to_start.append(job)
    return well
