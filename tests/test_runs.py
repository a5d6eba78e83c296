"""Whole runs, with real processes: how they end, go on, and survive."""

import csv
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from multiprocessing import resource_tracker
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT
from imageio_ffmpeg import count_frames_and_secs
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import workers
from checkpoint import read

linux_only = pytest.mark.skipif(sys.platform != "linux", reason="needs prlimit and /proc")


def rows(folder):
    with open(folder / "episodes.csv") as file:
        return list(csv.DictReader(file))


def gone(pids, within=5.0):
    """Whether none of these processes is there any more, or will be in `within` seconds."""
    deadline = time.monotonic() + within
    while time.monotonic() < deadline:
        table = subprocess.run(["ps", "-o", "stat=", "-p", ",".join(map(str, pids))], capture_output=True, text=True)
        if all("Z" in state for state in table.stdout.split()):
            return True
        time.sleep(0.1)
    return False


def freeze(pids):
    """Stop processes where they are, and return once they have stopped."""
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    command = ["ps", "-o", "stat=", "-p", ",".join(map(str, pids))]
    while any(s[0] != "T" for s in subprocess.run(command, capture_output=True, text=True).stdout.split()):
        time.sleep(0.05)


def goes_on_with(folder):
    return f"the run lies in {folder}, and goes on with: {sys.executable} {ROOT / 'main.py'} --resume {folder}"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_during_a_recording_ends_the_run_in_good_order(start_main, number):
    run = start_main("--num-processes", "2")
    video = run.folder / "videos" / "rl-video-episode-0.mp4"
    run.wait_for(lambda: video.exists() and video.stat().st_size > 2000)
    children = run.children()
    assert len(children[0]) >= 2
    assert children[1]  # ffmpeg among them
    status, seconds = run.stop(number)
    assert status == 128 + number
    assert seconds < 5
    assert gone([*children[0], *children[1]], within=5 - seconds)
    assert run.err == ""
    last = run.out.splitlines()[-1]
    assert last.startswith(f"Stopped by {number.name} after ")
    assert last.endswith(goes_on_with(run.folder))
    assert count_frames_and_secs(video)[0] > 20
    assert read(run.folder / "checkpoint.pt")["steps"] == int(last.split()[4])


@pytest.mark.parametrize("moment", ["main.py imports", "the first workers import"])
def test_a_signal_before_the_first_step_ends_the_run_in_good_order(start_main, moment):
    run = start_main("--num-processes", "3")
    if moment == "main.py imports":
        time.sleep(0.5)
    else:
        run.wait_for(lambda: run.children()[0])
    status, seconds = run.stop(signal.SIGINT)
    assert status == 130
    assert seconds < 5
    assert run.err == ""
    assert goes_on_with(run.folder) in run.out
    assert not run.children()[0]


def test_a_second_ctrl_c_ends_the_run_at_once(start_main):
    run = start_main("--num-processes", "1", "--record-every", "0")
    run.wait_for(run.lines)
    stuck = run.children()[0]
    freeze(stuck)  # none of them can stop in good order
    os.kill(run.process.pid, signal.SIGINT)
    time.sleep(0.5)
    assert run.process.poll() is None
    status, seconds = run.stop(signal.SIGINT, to_all=False)
    assert status == 130
    assert seconds < 1.5
    assert gone(stuck, within=0.5)
    assert read(run.folder / "checkpoint.pt")["steps"] > 0


def test_processes_that_do_not_stop_are_killed(start_main):
    run = start_main("--num-processes", "1", "--record-every", "0")
    run.wait_for(run.lines)
    stuck = run.children()[0]
    freeze(stuck)
    status, seconds = run.stop(signal.SIGTERM)
    assert status == 143
    assert workers.GRACE < seconds < 5
    assert gone(stuck, within=0.5)


@pytest.mark.parametrize("moment", ["all have started", "the first workers import"])
def test_no_orphan_outlives_a_killed_main_process(start_main, moment):
    run = start_main("--num-processes", "3")
    run.wait_for(run.lines if moment == "all have started" else lambda: run.children()[0])
    workers_, others = run.children()
    run.stop(signal.SIGKILL, to_all=False)
    assert gone([*workers_, *others], within=5)


def test_a_killed_process_is_reported_and_started_anew_and_the_run_goes_on(start_main):
    run = start_main("--num-processes", "2", "--record-every", "0", "--max-episode-length", "200")
    run.wait_for(lambda: len(run.lines()) > 2 and len(run.children()[0]) == 3)
    time.sleep(3)  # the last one imports
    victims = run.children()[0][:2]  # in the order of their start
    for reports, victim in enumerate(victims):
        os.kill(victim, signal.SIGKILL)
        killed = time.monotonic()
        run.wait_for(lambda reports=reports: run.err.count("\n") > reports)
        assert time.monotonic() - killed < 2
        run.wait_for(lambda: len(run.children()[0]) == 3)
        before = len(run.lines())
        run.wait_for(lambda before=before: len(run.lines()) > before + 2)
    assert run.stop(signal.SIGINT)[0] == 130
    assert run.err.splitlines() == [
        "training process 0 died: signal 9, Killed; is started anew",
        "test process died: signal 9, Killed; is started anew",
    ]
    table, contents = rows(run.folder), read(run.folder / "checkpoint.pt")
    assert [int(row["episode"]) for row in table] == list(range(len(table)))
    steps = [int(row["num_steps"]) for row in table]
    assert steps == sorted(set(steps))
    assert len(table) == len(run.lines()) == contents["episodes"]
    assert contents["steps"] >= steps[-1]
    assert contents["life"] == 2
    assert contents["observation_statistics"][2] >= 201 * len(table)  # frames of both lives of the test process


def test_a_fourth_death_ends_the_run_with_a_checkpoint(start_main):
    run = start_main("--num-processes", "1", "--record-every", "0", "--max-episode-length", "50")
    run.wait_for(run.lines)
    worker = run.children()[0][0]
    for n in range(4):
        os.kill(run.wait_for(lambda: [pid for pid in run.children()[0] if pid != worker])[0], signal.SIGKILL)
        while run.err.count("\n") == n:
            time.sleep(0.02)
    assert run.process.wait(timeout=10) == 1
    assert "that was 4 times in ten minutes, so the run ends" in run.err
    last = run.out.splitlines()[-1]
    assert last.startswith("Gave up after ")
    assert read(run.folder / "checkpoint.pt")["steps"] == int(last.split()[3])


@pytest.mark.soak
def test_sixteen_processes_of_which_ten_are_killed_at_random(start_main):
    seconds, rng = 60 * float(os.environ.get("SOAK_MINUTES", "3")), random.Random()
    start = time.monotonic()
    run = start_main("--env-name", "Pong-v0", "--num-processes", "16", "--max-time", str(seconds / 3600))
    for reports, moment in enumerate(sorted(rng.uniform(60, seconds - 10) for _ in range(10))):
        time.sleep(max(0.0, start + moment - time.monotonic()))
        os.kill(rng.choice(run.children()[0]), signal.SIGKILL)
        killed = time.monotonic()
        run.wait_for(lambda reports=reports: run.err.count("\n") > reports)
        assert time.monotonic() - killed < 2
    assert run.process.wait(timeout=seconds) == 0
    assert run.err.count("died: signal 9, Killed; is started anew") == run.err.count("\n") == 10
    table, contents = rows(run.folder), read(run.folder / "checkpoint.pt")
    assert [int(row["episode"]) for row in table] == list(range(len(table)))
    steps = [int(row["num_steps"]) for row in table]
    assert steps == sorted(set(steps))
    assert contents["steps"] >= steps[-1] > 500 * (seconds - 60)
    assert contents["life"] == 10


def test_a_resumed_run_goes_on_where_it_stopped(start_main):
    argv = ["--num-processes", "2", "--max-episode-length", "100", "--record-every", "3"]
    first = start_main(*argv, "--max-steps", "1500", "--lr", "0.001")
    assert first.process.wait(timeout=60) == 0
    table, checkpoint = rows(first.folder), read(first.folder / "checkpoint.pt")
    with open(first.folder / "episodes.csv", "a") as file:
        file.write(f"{len(table)},99.0,9999,100,0.0,100\n")  # as if it had been killed long after the checkpoint

    second = start_main(
        "--resume", str(first.folder), "--max-steps", "3000", "--num-processes", "1", folder=first.folder
    )
    second.wait_for(second.lines)
    intruder = start_main("--resume", str(first.folder), folder=first.folder.with_name("intruder"))
    assert intruder.process.wait(timeout=30) == 2
    assert "is in use by a run that goes on" in intruder.err
    assert second.process.wait(timeout=60) == 0
    assert second.err == ""

    resumed, contents = rows(first.folder), read(first.folder / "checkpoint.pt")
    assert resumed[: len(table)] == table
    assert [int(row["episode"]) for row in resumed] == list(range(len(resumed)))
    assert len(resumed) > len(table)
    assert int(resumed[len(table)]["num_steps"]) >= int(table[-1]["num_steps"])
    assert float(resumed[len(table)]["time_s"]) > float(table[-1]["time_s"])
    assert 3000 <= contents["steps"] < 3020
    assert contents["elapsed"] > checkpoint["elapsed"]
    assert contents["options"]["lr"] == 0.001
    assert contents["options"]["num_processes"] == 1
    counts = [c["moments"][0][0]["step"].item() for c in (checkpoint, contents)]
    assert 0 < counts[0] < counts[1]
    videos = {path.name for path in (first.folder / "videos").iterdir()}
    assert videos == {f"rl-video-episode-{n}.mp4" for n in range(0, len(resumed), 3)}
    assert Path(first.folder, "episodes.csv.bak").read_text().startswith(f"{len(table)},99.0,9999")


def test_tensorboard_gets_the_scalars_of_evaluator_and_first_worker(start_main):
    run = start_main(
        *("--num-processes", "2", "--max-episode-length", "100", "--max-steps", "1000", "--tensorboard", "--annotate")
    )
    assert run.process.wait(timeout=60) == 0
    assert run.err == ""
    scalars = {}
    for name in "evaluator", "worker":
        events = EventAccumulator(str(run.folder / "tensorboard" / name))
        events.Reload()
        scalars |= {tag: events.Scalars(tag) for tag in events.Tags()["scalars"]}
    table = rows(run.folder)
    assert [event.value for event in scalars["length"]] == [100.0] * len(table)
    assert [event.step for event in scalars["reward"]] == [int(row["num_steps"]) for row in table]
    assert scalars["steps_per_second"][-1].value > 0
    assert scalars["learning_rate"][0].value == pytest.approx(1e-4)
    assert 0 < scalars["entropy"][0].value <= 20 * np.log(6) + 1e-3
    assert scalars["gradient_norm"][0].value > 0
    assert {"policy_loss", "value_loss", "value"} < scalars.keys()


def test_max_time_ends_a_run(start_main):
    run = start_main("--num-processes", "1", "--max-episode-length", "50", "--max-time", str(8 / 3600))
    start = time.monotonic()
    assert run.process.wait(timeout=60) == 0
    assert 8 < time.monotonic() - start < 16
    assert run.out.splitlines()[-1].startswith("Done after ")


def test_target_reward_ends_a_run(start_main):
    run = start_main(
        *("--num-processes", "1", "--max-episode-length", "5", "--target-reward", "-21", "--record-every", "0")
    )
    assert run.process.wait(timeout=60) == 0
    assert len(rows(run.folder)) == 100


@linux_only
def test_a_full_disk_costs_a_line_each_and_not_the_run(start_main):
    import resource

    run = start_main(
        *("--num-processes", "1", "--max-episode-length", "100", "--record-every", "5", "--checkpoint-interval", "1")
    )
    run.wait_for(lambda: len(run.lines()) > 3 and (run.folder / "checkpoint.pt").exists())
    checkpoint = (run.folder / "checkpoint.pt").read_bytes()
    size = (run.folder / "episodes.csv").stat().st_size
    os.kill(run.process.pid, signal.SIGSTOP)
    for pid in [run.process.pid, *run.children()[0]]:
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (size + 10, resource.RLIM_INFINITY))
    checkpoint = (run.folder / "checkpoint.pt").read_bytes()
    os.kill(run.process.pid, signal.SIGCONT)

    before = len(run.lines())
    run.wait_for(lambda: len(run.lines()) > before + 7)
    complaints = run.err
    for name in "checkpoint.pt", "best.pt", "episodes.csv":
        assert re.search(rf"\S+/{name} not written: (File too large|No space left on device)\n", complaints), name
    assert re.search(r"\S+/rl-video-episode-\d+.mp4 not written: ", complaints)
    assert all(" not written: " in line for line in complaints.splitlines())
    assert (run.folder / "checkpoint.pt").read_bytes() == checkpoint
    assert not list(run.folder.glob("*.new"))
    whole = rows(run.folder)
    assert all(row["length"] == "100" for row in whole)

    for pid in [run.process.pid, *run.children()[0]]:
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    after = len(run.lines())
    run.wait_for(lambda: len(run.lines()) > after + 1)
    table = rows(run.folder)
    assert [int(row["episode"]) for row in table] == list(range(len(table)))  # what had to wait was written
    status, _ = run.stop(signal.SIGINT)
    assert status == 130
    assert read(run.folder / "checkpoint.pt")["episodes"] > len(whole)


# What follows looks at the supervision alone, with processes that do what they are told.


def fail(ready, life):
    ready[0] = True
    raise ValueError(f"nothing to do\nin life {life}")


def fail_once(ready, life):
    ready[0] = True
    if life == 0:
        os._exit(7)


def die_while_starting(ready, life):
    os.kill(os.getpid(), signal.SIGKILL)


def supervised(tmp_path, target):
    resource_tracker.ensure_running()
    ready = torch.zeros(1, dtype=torch.int64).share_memory_()
    stop, life = torch.zeros(1, dtype=torch.int64).share_memory_(), torch.zeros(1, dtype=torch.int64)
    job = workers.Job("training process 0", 0, target, (ready,))

    def end_a_run_without_end():
        if life > 2 * workers.MAX_DEATHS:
            stop[0] = workers.STOP_AT_ONCE

    well = workers.supervise([job], ready, stop, life, tmp_path, end_a_run_without_end)
    return well, life.item()


def test_a_process_that_dies_again_and_again_ends_the_run(tmp_path, capsys):
    well, life = supervised(tmp_path, fail)
    assert (well, life) == (False, 4)
    reports = capsys.readouterr().err.splitlines()
    file = tmp_path / "traceback-training-process-0-0.txt"
    assert reports[0] == f"training process 0 died: in life 0 (whole traceback: {file}); is started anew"
    assert "ValueError: nothing to do" in file.read_text()
    assert len(reports) == 4
    assert reports[3].endswith("that was 4 times in ten minutes, so the run ends")


def finish(started, ready, stop, life):
    started += 1
    stop[0] = workers.FINISH
    ready[0] = True


def test_processes_not_yet_started_are_not_when_the_end_has_come(tmp_path, monkeypatch):
    monkeypatch.setattr(workers, "num_cores", lambda: 1)
    resource_tracker.ensure_running()
    started, stop = (torch.zeros(1, dtype=torch.int64).share_memory_() for _ in range(2))
    ready = torch.zeros(3, dtype=torch.int64).share_memory_()
    jobs = [workers.Job(f"process {n}", n, finish, (started, ready, stop)) for n in range(3)]
    assert workers.supervise(jobs, ready, stop, torch.zeros(1, dtype=torch.int64), tmp_path, lambda: None)
    assert started.item() == 1


def test_deaths_while_starting_count_too(tmp_path):
    assert supervised(tmp_path, die_while_starting)[0] is False


def test_a_process_may_die_three_times(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(workers, "DEATHS_WITHIN", 0.0)  # as if the deaths lay far apart
    monkeypatch.setattr(workers, "complain", lambda message: None)
    assert supervised(tmp_path, fail_once) == (True, 1)
    shutil.rmtree(tmp_path)
