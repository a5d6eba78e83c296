"""The supervision, with processes that do what they are told."""

import errno
import itertools
import multiprocessing
import os
import signal
import time
from multiprocessing import resource_tracker
from types import SimpleNamespace

import numpy as np
import pytest

from harness import supervisor
from harness.supervisor import DiedTooOftenError, Job, Supervisor
from harness.workers import FINISH

spawn = multiprocessing.get_context("spawn")


class Supervised:
    """Jobs of one target in a folder, and what became of them."""

    def __init__(self, folder, target, num_jobs=1, context=spawn, **job):
        resource_tracker.ensure_running()
        # Here only the supervisor reads them; in a run they are tensors in shared memory.
        self.ready = np.zeros(num_jobs, np.int64)
        self.stop, self.restarts = np.zeros(1, np.int64), np.zeros(1, np.int64)
        jobs = [Job(f"worker {n}", n, target, (folder, n), **job) for n in range(num_jobs)]
        shared = self.ready, self.stop, self.restarts
        self.supervisor = Supervisor(context, jobs, *shared, folder)

    def watch(self, look=lambda: None, seconds=30):
        """Watch until the jobs are done, looking each time."""
        deadline = time.monotonic() + seconds
        with self.supervisor:
            for _ in self.supervisor.watch():
                assert time.monotonic() < deadline
                look()


def raise_always(folder, rank, restarts):
    raise ValueError(f"nothing to do\nwith {restarts} restarts")


def test_a_worker_that_raises_again_and_again_ends_the_run(tmp_path, capsys):
    with pytest.raises(DiedTooOftenError) as raised:
        Supervised(tmp_path, raise_always).watch()
    files = [tmp_path / f"traceback-worker-0-{n}.txt" for n in range(4)]
    reports = [
        f"worker 0 died: with {n} restarts (whole traceback: {file})"
        for n, file in enumerate(files)
    ]
    again = "".join(f"{report}; it is started again\n" for report in reports[:3])
    assert capsys.readouterr().err == again
    often = "that was 4 times in 10 minutes, so the run ends"
    assert str(raised.value) == f"{reports[3]}; {often}"
    assert "ValueError: nothing to do" in files[0].read_text()


def die_at_once(folder, rank, restarts):
    os.kill(os.getpid(), signal.SIGKILL)


def test_deaths_while_starting_up_count_too(tmp_path, capsys):
    with pytest.raises(DiedTooOftenError, match="that was 4 times in 10 minutes"):
        Supervised(tmp_path, die_at_once).watch()
    report = "worker 0 died: signal 9, SIGKILL; it is started again\n"
    assert capsys.readouterr().err == 3 * report


def exit_until_restarted_five_times(folder, rank, restarts):
    os._exit(7 if restarts < 5 else 0)


def test_deaths_that_lie_far_apart_do_not_end_the_run(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(supervisor, "DEATHS_WITHIN", 0.0)
    run = Supervised(tmp_path, exit_until_restarted_five_times)
    run.watch()
    assert run.restarts == 5
    report = "worker 0 died: exit status 7; it is started again\n"
    assert capsys.readouterr().err == 5 * report


def wait_until_told(folder, rank, restarts):
    while not (folder / "end").exists():
        time.sleep(0.05)
    os._exit(0)


def test_a_job_that_is_not_vital_is_started_again_for_ever_and_nobody_waits_for_it(
    tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(supervisor, "START_AGAIN_AFTER", 0.2)
    run = Supervised(tmp_path, wait_until_told)
    job = Job("worker 1", 0, die_at_once, (tmp_path, 1), is_vital=False)
    run.supervisor._workers.append(supervisor._Worker(job))

    def look():
        run.ready[0] = True
        if run.restarts == 6:
            (tmp_path / "end").touch()

    run.watch(look)
    report = "worker 1 died: signal 9, SIGKILL; it is started again\n"
    assert capsys.readouterr().err.count(report) >= 6
    assert not run.supervisor._running()


def leave_a_mark(folder, rank, restarts):
    (folder / f"worker-{rank}").touch()


def test_workers_not_yet_started_are_not_when_the_end_has_come(tmp_path, monkeypatch):
    monkeypatch.setattr(supervisor, "num_cores", lambda: 1)
    run = Supervised(tmp_path, leave_a_mark, num_jobs=3)
    run.watch(look=lambda: run.stop.fill(FINISH))
    assert [path.name for path in tmp_path.glob("worker-*")] == ["worker-0"]
    assert not run.supervisor.all_ready()  # all have ended


def sleep(folder, rank, restarts):
    leave_a_mark(folder, rank, restarts)
    time.sleep(30)


def test_an_exception_of_whoever_watches_leaves_no_process(tmp_path):
    def give_up_once_it_runs():
        if (tmp_path / "worker-0").exists():
            assert len(multiprocessing.active_children()) == 1
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        Supervised(tmp_path, sleep).watch(look=give_up_once_it_runs)
    assert multiprocessing.active_children() == []


def test_all_are_ready_once_each_has_started_up_and_not_while_one_starts_again(tmp_path, capsys):
    run = Supervised(tmp_path, sleep, num_jobs=2)
    watch = run.supervisor.watch()

    def watch_until(condition):
        deadline = time.monotonic() + 30
        while not condition():
            assert time.monotonic() < deadline
            next(watch)

    with run.supervisor:
        watch_until(lambda: len(list(tmp_path.glob("worker-*"))) == 2)
        assert not run.supervisor.all_ready()
        run.ready[:] = 1
        assert run.supervisor.all_ready()
        multiprocessing.active_children()[0].kill()
        watch_until(lambda: run.restarts == 1)
        assert not run.supervisor.all_ready()
        next(watch)
        assert len(multiprocessing.active_children()) == 2
        assert not run.supervisor.all_ready()


class CannotStart:
    """multiprocessing's context where the starts in `refused` find no process to be had."""

    def __init__(self, refused):
        self._refused, self._starts, self.times = refused, itertools.count(), []

    def Process(self, **job):  # noqa: N802 - its name there
        self.times.append(time.monotonic())
        refused = next(self._starts) in self._refused
        return SimpleNamespace(start=find_no_process) if refused else spawn.Process(**job)


def find_no_process():
    raise BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable")


def exit_once(folder, rank, restarts):
    os._exit(0 if restarts else 7)


COULD_NOT = "worker 0 could not be started: Resource temporarily unavailable"


def test_a_worker_that_cannot_be_started_again_is_tried_again_later(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(supervisor, "START_AGAIN_AFTER", 0.5)
    context = CannotStart(refused=[1, 2])
    run = Supervised(tmp_path, exit_once, context=context)
    run.watch()
    assert run.restarts == 3
    died = "worker 0 died: exit status 7; it is started again\n"
    assert capsys.readouterr().err == died + 2 * f"{COULD_NOT}; it is started again\n"
    assert all(b - a >= 0.5 for a, b in itertools.pairwise(context.times[1:]))


def test_starts_that_fail_count_as_deaths(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(supervisor, "START_AGAIN_AFTER", 0.0)
    with pytest.raises(DiedTooOftenError, match=f"^{COULD_NOT}; that was 4 times in 10 "):
        Supervised(tmp_path, exit_once, context=CannotStart(refused=range(1, 9))).watch()
    assert capsys.readouterr().err.count("\n") == 3


def test_a_worker_that_cannot_be_started_at_all_ends_the_run_at_once(tmp_path, capsys):
    context = CannotStart(refused=[0])
    with pytest.raises(DiedTooOftenError, match=f"^{COULD_NOT}$"):
        Supervised(tmp_path, exit_once, context=context).watch()
    assert len(context.times) == 1
    assert capsys.readouterr().err == ""


def test_what_dies_when_the_end_has_come_is_started_once_more(tmp_path, capsys):
    context = CannotStart(refused=[])
    run = Supervised(tmp_path, exit_once, context=context)
    run.watch(look=lambda: run.stop.fill(FINISH))
    assert len(context.times) == 2  # the test worker is to end an episode
