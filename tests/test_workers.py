"""Signals, locks and turns, with processes that do what they are told."""

import errno
import itertools
import multiprocessing
import subprocess
import sys
import time
from pathlib import Path

import pytest

from harness import workers
from harness.workers import CoreTurn, run_folder_locked

spawn = multiprocessing.get_context("spawn")
ROOT = Path(__file__).parents[1]


def python(source):
    """Run a program of few imports, and return what it did."""
    command = [sys.executable, "-c", source]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)


# Signals.


@pytest.mark.parametrize("taken_by", ["nobody yet", "another thread"])
def test_a_held_signal_waits_until_it_is_asked_for(taken_by):
    thread = taken_by == "another thread"  # such as a library's, which does not block signals
    done = python(f"""
import os, signal, threading, time
from harness.workers import next_signal, signals_held

if {thread}:
    threading.Thread(target=time.sleep, args=(30,), daemon=True).start()
with signals_held():
    assert next_signal() is None
    for number in signal.SIGTERM, signal.SIGTERM, signal.SIGHUP:
        os.kill(os.getpid(), number)
        time.sleep(0.05)
    came = []
    while number := next_signal():
        came.append(int(number))
    assert sorted(set(came)) == [signal.SIGHUP, signal.SIGTERM], came
    os.kill(os.getpid(), signal.SIGTERM)  # is dropped
try:
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(1)
except KeyboardInterrupt:
    os._exit(7)
""")
    assert (done.returncode, done.stderr) == (7, "")


def test_nobody_waits_for_a_signal_that_another_thread_is_about_to_take():
    done = python("""
import os, signal, threading, time
from harness.workers import next_signal, signals_held

threading.Thread(target=time.sleep, args=(60,), daemon=True).start()
with signals_held():
    for _ in range(3000):
        os.kill(os.getpid(), signal.SIGTERM)
        while not next_signal():
            pass
os._exit(7)
""")
    assert (done.returncode, done.stderr) == (7, "")


def test_before_the_run_a_signal_ends_the_process_at_once():
    done = python("""
import os, signal
from harness.workers import end_at_once_on_signals

end_at_once_on_signals()
os.kill(os.getpid(), signal.SIGTERM)
raise AssertionError("it went on")
""")
    assert (done.returncode, done.stderr) == (143, "")


def test_a_signal_that_the_parent_ignores_stays_ignored():
    done = python("""
import os, signal
signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
from harness.workers import end_at_once_on_signals, next_signal, signals_held

end_at_once_on_signals()
os.kill(os.getpid(), signal.SIGHUP)
with signals_held():
    os.kill(os.getpid(), signal.SIGHUP)
    assert next_signal() is None
os.kill(os.getpid(), signal.SIGHUP)
os._exit(7)
""")
    assert (done.returncode, done.stderr) == (7, "")


@pytest.mark.parametrize("closed", [(0,), (1,), (2,), (0, 1, 2)])
def test_the_numbers_of_closed_standard_files_are_no_other_file_s(closed, tmp_path):
    source = f"""
import os
from harness.workers import open_standard_files

for number in {closed}:
    os.close(number)
open_standard_files()
first = os.open({str(tmp_path / "first")!r}, os.O_CREAT)
inherited = all(os.get_inheritable(n) for n in range(3))  # or a worker's would be closed again
os._exit(7 if first > 2 and inherited else 1)
"""
    assert python(source).returncode == 7


# Locks and turns.


def no_locks(*_):
    raise OSError(errno.ENOLCK, "No locks available")


def claim(folder):
    return python(f"""
from pathlib import Path
from harness.workers import run_folder_locked

with run_folder_locked(Path({str(folder)!r})):
    print("it is mine")
""")


def test_a_run_folder_belongs_to_one_process_at_a_time(tmp_path, capsys):
    with run_folder_locked(tmp_path):
        refused = claim(tmp_path)
    assert f"ValueError: {tmp_path} is in use by a run that goes on" in refused.stderr
    assert claim(tmp_path).stdout == "it is mine\n"
    assert capsys.readouterr().err == ""


def test_where_there_are_no_locks_a_run_folder_is_claimed_with_a_line(
    tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(workers.fcntl, "lockf", no_locks)
    with run_folder_locked(tmp_path):
        pass
    said = capsys.readouterr().err
    assert said.startswith(f"no locks in {tmp_path} (No locks available): ")
    assert said.count("\n") == 1


def test_where_there_are_no_locks_everybody_runs_at_any_time(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(workers.fcntl, "lockf", no_locks)
    first, second = CoreTurn(tmp_path, 0), CoreTurn(tmp_path, workers.num_cores())
    for _ in range(3):
        with first, second:
            pass
    assert capsys.readouterr().err == ""


def take_a_turn(folder, rank, comes, has_it, give_it_back):
    turn = CoreTurn(folder, rank)
    comes.set()
    with turn:
        has_it.set()
        give_it_back.wait()


def stands_in_line(process):
    """Whether this process waits for a lock, as Linux tells."""
    with open("/proc/locks") as file:
        return any("->" in line and str(process.pid) in line.split() for line in file)


@pytest.fixture
def start(tmp_path):
    """Start a process that takes a turn and keeps it until told; return it with its two events."""
    started = []

    def start(rank, waits=False):
        comes, has_it, give_it_back = (spawn.Event() for _ in range(3))
        args = tmp_path, rank, comes, has_it, give_it_back
        process = spawn.Process(target=take_a_turn, args=args)
        process.start()
        started.append((process, has_it, give_it_back, comes))  # or the events would be gone
        assert comes.wait(20)
        if waits and Path("/proc/locks").exists():
            deadline = time.monotonic() + 20
            while not stands_in_line(process):
                assert time.monotonic() < deadline, "it does not wait"
                time.sleep(0.02)
        elif waits:
            time.sleep(1)
        return process, has_it, give_it_back

    yield start
    for process, *_ in started:
        process.kill()
        process.join()


def test_a_core_gives_one_turn_at_a_time_and_other_cores_theirs(start):
    cores = workers.num_cores()
    _, has_it, give_it_back = start(0)
    assert has_it.wait(20)
    _, next_has_it, _ = start(cores, waits=True)
    if cores > 1:
        _, other_core_has_it, _ = start(1)
        assert other_core_has_it.wait(20)
    assert not next_has_it.is_set()
    give_it_back.set()
    assert next_has_it.wait(20)


@pytest.mark.parametrize("victim", ["the holder", "the next in line"])
def test_a_killed_worker_stalls_nobody(start, victim):
    cores = workers.num_cores()
    holder, has_it, give_it_back = start(0)
    assert has_it.wait(20)
    next_in_line, next_has_it, next_gives_it_back = start(cores, waits=True)
    _, last_has_it, _ = start(2 * cores, waits=True)
    if victim == "the holder":
        holder.kill()
        assert next_has_it.wait(20)
        assert not last_has_it.is_set()
        next_gives_it_back.set()
    else:
        next_in_line.kill()
        give_it_back.set()
    assert last_has_it.wait(20)


def take_turns(folder, rank, all_here, order):
    turn = CoreTurn(folder, rank)
    all_here.wait()
    for _ in range(10):
        with turn:
            time.sleep(0.01)
            order.put(rank)


def test_a_turn_lasts_two_rollouts_and_then_is_somebody_elses(tmp_path):
    ranks = [n * workers.num_cores() for n in range(3)]
    all_here, order = spawn.Barrier(3, timeout=60), spawn.SimpleQueue()
    processes = [
        spawn.Process(target=take_turns, args=(tmp_path, rank, all_here, order)) for rank in ranks
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(100)
        assert process.exitcode == 0
    rollouts = [order.get() for _ in range(30)]  # they lie in the pipe
    turns = rollouts[::2]
    assert turns == rollouts[1::2]
    last_with_company = max(n for n in range(15) if len(set(turns[n:])) > 1)
    # All stand in line once the first turn is over.
    assert all(a != b for a, b in itertools.pairwise(turns[1 : last_with_company + 1]))


def test_a_turn_that_is_ended_early_is_somebody_elses(start, tmp_path):
    turn = CoreTurn(tmp_path, 0, times=40)
    with turn:
        pass
    _, next_has_it, _ = start(workers.num_cores(), waits=True)
    assert not next_has_it.is_set()
    turn.end()
    assert next_has_it.wait(20)
    turn.end()  # there is none to end, and nobody's is
