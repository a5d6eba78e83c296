"""The processes: what they inherit, their turns on the cores, how they start, end, start again."""

import contextlib
import fcntl
import os
import signal
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from multiprocessing import current_process, resource_tracker
from multiprocessing.connection import wait
from multiprocessing.context import SpawnContext
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple, Self

from harness.utils import complain, reason, report_write_errors

# Read by the C libraries when a process starts, so it must be in the environment that the children
# inherit.
ENVIRONMENT = {
    # More threads would only fight for the cores, which the processes fill. PyTorch reads the first
    # two, NumPy the third or, on macOS, the last.
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "VECLIB_MAXIMUM_THREADS": "1",
    # glibc gives a freed tensor's pages back to the kernel, and faults them in again for the next
    # one: 2,000 faults a rollout. Other C libraries ignore these names.
    "MALLOC_MMAP_THRESHOLD_": str(32 * 2**20),  # the largest value that glibc takes
    "MALLOC_TRIM_THRESHOLD_": str(2**30),
    "MALLOC_TOP_PAD_": str(16 * 2**20),
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
MAX_DEATHS, DEATHS_WITHIN = 3, 600.0  # of one worker, within so many seconds; one more ends the run
START_AGAIN_AFTER = 5.0  # seconds, where a process could not be started
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
    resource_tracker.ensure_running()  # first, as its start unblocks signals
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


# Starting, watching, starting again.


class DiedTooOftenError(Exception):
    """A worker has died more than MAX_DEATHS times in DEATHS_WITHIN seconds, or never started."""


class Job(NamedTuple):
    """What a worker does: target(*args, restarts), `restarts` growing with each death."""

    name: str
    rank: int
    target: Callable[..., None]
    args: tuple
    is_vital: bool = True  # if not, it is started again for ever, and nobody waits for its end


@dataclass
class _Worker:
    """A job and its process, if one runs."""

    job: Job
    process: Any = None
    traceback_file: Path | None = None
    not_before: float = 0.0  # by the monotonic clock, when it may be started
    deaths: list[float] = field(default_factory=list)


def _run_job(job: Job, restarts: int, traceback_file: Path) -> None:
    """Do a job and end the process: with status 1 and a file with the traceback if it raises."""
    status = 0
    try:
        job.target(*job.args, restarts)
    except Exception:
        status = 1
        with report_write_errors(traceback_file):
            traceback_file.write_text(traceback.format_exc(), encoding="utf-8", errors="replace")
    os._exit(status)  # taking an interpreter with torch down costs a second of a busy core


def _cause_of_death(exit_code: int, traceback_file: Path) -> str:
    if exit_code < 0:
        names = {number.value: f", {number.name}" for number in signal.Signals}
        return f"signal {-exit_code}{names.get(-exit_code, '')}"
    with contextlib.suppress(OSError, IndexError):
        last_line = traceback_file.read_text(encoding="utf-8", errors="replace").splitlines()[-1]
        return f"{last_line} (whole traceback: {traceback_file})"
    return f"exit status {exit_code}"


class Supervisor:
    """Starts the jobs' processes, and starts those that die again, while one iterates over `watch`.

    Leaving it as a context manager ends whatever still runs.

    Args:
        context: of multiprocessing, by which processes are started.
        jobs: what the workers do.
        ready: int64 in shared memory, set at its rank by each worker once it has started up. Only
            as many as there are cores start up at a time: if all did at once, the first would wait
            until the last has imported its libraries.
        stop: (1,) int64 in shared memory, GO_ON until somebody wants the run to end.
        restarts: (1,) int64, the number that the workers started next are given; grows with deaths.
        run_folder: for tracebacks.
        report: called with a line about each death.
    """

    def __init__(
        self,
        context: SpawnContext,
        jobs: list[Job],
        ready: Any,
        stop: Any,
        restarts: Any,
        run_folder: Path,
        report: Callable[[str], None] = complain,
    ) -> None:
        self._context, self._run_folder, self._report = context, run_folder, report
        self._ready, self._stop, self._restarts = ready, stop, restarts
        self._workers = [_Worker(job) for job in jobs]
        self._num_jobs = len(jobs)
        self._stopped_at = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for worker in self._running():
            worker.process.kill()
        for worker in self._running():
            worker.process.join()

    def _running(self) -> list[_Worker]:
        return [worker for worker in self._workers if worker.process]

    def watch(self) -> Iterator[None]:
        """Yield ten times a second until all vital jobs are done; raise `DiedTooOftenError`."""
        while any(worker.job.is_vital for worker in self._workers):
            self._start_what_is_due()
            sentinels = {worker.process.sentinel: worker for worker in self._running()}
            for sentinel in wait(list(sentinels), timeout=0.1):
                self._take_leave_of(sentinels[sentinel])
            if self._stop >= FINISH:
                # Jobs that never started are dropped. What has died starts once more, so that the
                # test worker still ends an episode.
                self._workers = [w for w in self._workers if w.process or w.deaths]
            if self._stop >= STOP:
                self._kill_the_late()
            yield

    def all_ready(self) -> bool:
        """Return whether every job's process runs and has started up."""
        up = [w for w in self._workers if w.process and self._ready[w.job.rank]]
        return len(up) == self._num_jobs

    def _start_what_is_due(self) -> None:
        for worker in self._workers:
            starting_up = sum(not self._ready[w.job.rank] for w in self._running())
            if starting_up >= num_cores() or self._stop >= STOP:
                return
            if not worker.process and time.monotonic() >= worker.not_before:
                self._start(worker)

    def _start(self, worker: _Worker) -> None:
        job, restarts = worker.job, int(self._restarts[0])
        file = f"traceback-{job.name.replace(' ', '-')}-{restarts}.txt"
        is_first_start = worker.traceback_file is None
        worker.traceback_file = self._run_folder / file
        self._ready[job.rank] = False
        args = job, restarts, worker.traceback_file
        name = f"{job.name},{CHILD_OF}{os.getpid()}"
        process = self._context.Process(target=_run_job, name=name, args=args)
        try:
            process.start()
        except (OSError, RuntimeError) as error:  # too many processes or open files, no memory
            what = f"could not be started: {reason(error)}"
            if is_first_start and job.is_vital:  # waiting would not help: too many for this machine
                raise DiedTooOftenError(f"{job.name} {what}") from None
            worker.not_before = time.monotonic() + START_AGAIN_AFTER
            self._count_death(worker, what)
        else:
            worker.process = process

    def _take_leave_of(self, worker: _Worker) -> None:
        process, worker.process = worker.process, None
        process.join()
        if process.exitcode == 0 or self._stop >= STOP:
            self._workers.remove(worker)
        else:
            cause = _cause_of_death(process.exitcode, worker.traceback_file)
            self._count_death(worker, f"died: {cause}")

    def _count_death(self, worker: _Worker, what: str) -> None:
        now = time.monotonic()
        worker.deaths = [at for at in worker.deaths if now - at < DEATHS_WITHIN] + [now]
        self._restarts += 1
        if not worker.job.is_vital:
            worker.not_before = now + START_AGAIN_AFTER
        elif len(worker.deaths) > MAX_DEATHS:
            often = f"{len(worker.deaths)} times in {DEATHS_WITHIN / 60:g} minutes"
            raise DiedTooOftenError(f"{worker.job.name} {what}; that was {often}, so the run ends")
        self._report(f"{worker.job.name} {what}; it is started again")

    def _kill_the_late(self) -> None:
        self._stopped_at = self._stopped_at or time.monotonic()
        out_of_time = time.monotonic() - self._stopped_at > GRACE
        self._workers = self._running()
        for worker in self._workers:
            if out_of_time or not self._ready[worker.job.rank]:
                worker.process.kill()


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
