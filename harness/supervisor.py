"""Processes under supervision: they are started, watched, started again, and ended."""

import contextlib
import errno
import os
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from multiprocessing.connection import wait
from multiprocessing.context import SpawnContext
from pathlib import Path
from typing import Any, NamedTuple, Self

from harness.utils import ALLOW_MORE_FILES, complain, reason, write_traceback
from harness.workers import CHILD_OF, FINISH, GRACE, STOP, num_cores

MAX_DEATHS, DEATHS_WITHIN = 3, 600.0  # of one worker, within so many seconds; one more ends the run
START_AGAIN_AFTER = 5.0  # seconds, where a process could not be started


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
        write_traceback(traceback_file)
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
            if worker.process or time.monotonic() < worker.not_before:
                continue
            starting_up = sum(not self._ready[w.job.rank] for w in self._running())
            if starting_up >= num_cores() or self._stop >= STOP:
                return
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
            hint = ALLOW_MORE_FILES if getattr(error, "errno", None) == errno.EMFILE else ""
            what = f"could not be started: {reason(error)}{hint}"
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
