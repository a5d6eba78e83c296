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

import numpy as np
import pytest
from conftest import ROOT, environment, gone, states
from imageio_ffmpeg import count_frames_and_secs
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from harness import workers
from harness.checkpoint import read
from harness.episodes import EpisodeLog
from harness.supervisor import START_AGAIN_AFTER

linux_only = pytest.mark.skipif(sys.platform != "linux", reason="needs prlimit")
ALL_ARE_UP = re.compile(r"^All \d+ are up after \d+ s\.$", re.M)
PLAIN = "--num-processes", "1", "--record-every", "0"


def rows(folder):
    with open(folder / "episodes.csv") as file:
        return list(csv.DictReader(file))


def freeze(pids):
    """Stop processes where they are, and return once they have stopped."""
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    while any(state[0] != "T" for state in states(pids)):
        time.sleep(0.05)


def all_are_up(run):
    return ALL_ARE_UP.search(run.out)


def goes_on_with(folder):
    command = f"{sys.executable} {ROOT / 'main.py'} --resume {folder}"
    return f"the run lies in {folder}, and goes on with: {command}"


def own_program(tmp_path, setup="", start=""):
    """Return a program that calls main.main: `setup` runs in each process, `start` in the first."""
    path = tmp_path / "program.py"
    start = start.replace("\n", "\n    ")
    path.write_text(f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
import main
{setup}
if __name__ == "__main__":
    {start}
    sys.exit(main.main(sys.argv[1:]))
""")
    return path


def test_a_signal_during_a_recording_ends_the_run_in_good_order(start_main):
    number = signal.SIGINT
    run = start_main("--num-processes", "2")
    video = run.folder / "videos" / "rl-video-episode-0.mp4"
    run.wait_for(lambda: video.exists() and video.stat().st_size > 2000)
    workers_, others = run.children()
    assert len(workers_) >= 2
    assert others  # ffmpeg among them
    status, seconds = run.stop(number)
    assert status == 128 + number
    assert seconds < 5
    assert gone([*workers_, *others], within=5 - seconds)
    assert run.err == ""
    last = run.out.splitlines()[-1]
    assert last.startswith(f"Stopped by {number.name} after ")
    assert last.endswith(goes_on_with(run.folder))
    assert count_frames_and_secs(video)[0] > 20
    assert read(run.folder / "checkpoint.pt")["steps"] == int(last.split()[4])


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_while_the_workers_start_up_ends_the_run_in_good_order(start_main, number):
    run = start_main("--num-processes", "3")
    first = run.wait_for(lambda: run.children()[0])
    status, seconds = run.stop(number)
    assert status == 128 + number
    assert seconds < 5
    assert gone(first, within=0.5)
    assert not run.children()[0]
    assert run.err == ""
    assert f"Stopped by {number.name} after 0 steps; {goes_on_with(run.folder)}" in run.out
    assert not all_are_up(run)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_while_libraries_load_ends_the_program_at_once(start_main, tmp_path, number):
    loads = tmp_path / "loads"
    slow = f"import pathlib, time; pathlib.Path({str(loads)!r}).touch(); time.sleep(30)"
    run = start_main(env=environment(tmp_path / "slow", torch=slow))
    run.wait_for(loads.exists)
    status, seconds = run.stop(number)
    assert status == 128 + number
    assert seconds < 1
    assert (run.out, run.err) == ("", "")
    assert not run.folder.exists()


def test_workers_that_do_not_stop_are_killed_and_a_second_signal_changes_nothing(start_main):
    number, second = signal.SIGTERM, signal.SIGINT
    run = start_main(*PLAIN)
    run.wait_for(lambda: run.lines() and run.lines()[-1][0] > 0)  # a training worker has begun
    stuck = run.children()[0]
    freeze(stuck)
    os.kill(run.process.pid, number)
    start = time.monotonic()
    time.sleep(0.5)
    assert run.process.poll() is None
    assert run.stop(second)[0] == 128 + number
    assert workers.GRACE < time.monotonic() - start < 5
    assert gone(stuck, within=0.5)
    assert run.err == ""
    assert f"\nStopped by {number.name} after " in run.out
    assert read(run.folder / "checkpoint.pt")["steps"] > 0


def test_no_worker_outlives_a_main_process_that_is_killed_while_they_import(start_main):
    run = start_main("--num-processes", "2")
    run.wait_for(lambda: run.children()[0])
    workers_, others = run.children()
    run.stop(signal.SIGKILL, to_all=False)
    assert gone([*workers_, *others], within=5)


def test_a_program_of_ones_own_ends_as_main_does_and_draws_the_curve_once_more(
    start_main, tmp_path
):
    number = signal.SIGINT
    setup = "import test\ntest.DRAW_EVERY = 0.0"  # so matplotlib is loaded
    argv = *PLAIN, "--max-episode-length", "1000"
    run = start_main(*argv, program=own_program(tmp_path, setup))
    curve = run.folder / "learning_curve.png"
    run.wait_for(curve.exists)
    workers_, others = run.children()
    drawn = curve.stat().st_mtime_ns
    status, seconds = run.stop(number)
    assert len(run.lines()) == len(rows(run.folder)) == 1
    assert curve.stat().st_mtime_ns > drawn
    assert status == 128 + number
    assert seconds < 5
    assert gone([*workers_, *others], within=5 - seconds)
    assert run.err == ""
    last = run.out.splitlines()[-1]
    assert last.startswith(f"Stopped by {number.name} after ")
    assert last.endswith(goes_on_with(run.folder))


def test_no_worker_outlives_a_killed_program_of_ones_own(start_main, tmp_path):
    run = start_main(*PLAIN, program=own_program(tmp_path))
    run.wait_for(lambda: all_are_up(run))
    workers_, others = run.children()
    run.stop(signal.SIGKILL, to_all=False)
    assert gone([*workers_, *others], within=5)


def test_an_exception_in_the_main_process_ends_the_run_with_a_checkpoint(start_main, tmp_path):
    start = """
from harness.shared import SharedState
save = SharedState.save
def fail_once(*args):
    SharedState.save = save
    raise ZeroDivisionError("a bug\\nin two lines")
SharedState.save = fail_once"""
    argv = *PLAIN, "--checkpoint-interval", "2"
    run = start_main(*argv, program=own_program(tmp_path, start=start))
    children = run.wait_for(lambda: run.children()[0])
    assert run.process.wait(timeout=30) == 1
    assert gone(children, within=0.5)
    assert not run.children()[0]
    assert run.err == "error: a bug\n"
    assert "ZeroDivisionError" in (run.folder / "traceback-main.txt").read_text()
    last = run.out.splitlines()[-1]
    assert last.startswith("Gave up after ")
    assert last.endswith(goes_on_with(run.folder))
    assert read(run.folder / "checkpoint.pt")["steps"] == int(last.split()[3])


def test_killed_workers_are_started_again_until_one_has_died_four_times(start_main):
    run = start_main(
        *("--num-processes", "2", "--record-every", "0", "--max-episode-length", "100")
    )
    run.wait_for(lambda: all_are_up(run))
    first, test_worker, other = sorted(run.children()[0])  # in the order of their start
    reports = []

    def kill(worker, name):
        os.kill(worker, signal.SIGKILL)
        killed = time.monotonic()
        reports.append(f"{name} died: signal 9, SIGKILL; it is started again")
        run.wait_for(lambda: run.err.count("\n") == len(reports))
        assert time.monotonic() - killed < 2

    def wait_for_lines(n):
        before = len(run.lines())
        run.wait_for(lambda: len(run.lines()) >= before + n)

    kill(first, "training worker 0")
    first_again = run.wait_for(lambda: set(run.children()[0]) - {test_worker, other}).pop()
    wait_for_lines(2)
    for _ in range(3):
        kill(test_worker, "test worker")
        test_worker = run.wait_for(lambda: set(run.children()[0]) - {first_again, other}).pop()
        if len(reports) == 2:
            wait_for_lines(3)
    assert run.err.splitlines() == reports
    os.kill(test_worker, signal.SIGKILL)
    assert run.process.wait(timeout=10) == 1
    often = "that was 4 times in 10 minutes, so the run ends"
    assert run.err.splitlines()[4:] == [f"error: test worker died: signal 9, SIGKILL; {often}"]
    assert not run.children()[0]
    last = run.out.splitlines()[-1]
    assert last.startswith("Gave up after ")
    assert len(ALL_ARE_UP.findall(run.out)) == 1
    table, contents = rows(run.folder), read(run.folder / "checkpoint.pt")
    assert [int(row["episode"]) for row in table] == list(range(len(table)))
    steps = [int(row["num_steps"]) for row in table]
    assert steps == sorted(steps)  # games may end while no worker trains yet
    assert len(table) == len(run.lines())
    assert contents["steps"] == int(last.split()[3]) >= steps[-1]
    assert contents["restarts"] == 5
    assert contents["observation_statistics"][2] >= 101 * len(table)  # of all its test workers


@linux_only
def test_a_worker_that_cannot_be_started_again_is_tried_until_it_can(start_main):
    import resource

    run = start_main(*PLAIN, "--max-episode-length", "100")
    run.wait_for(lambda: all_are_up(run))
    limit = resource.prlimit(run.process.pid, resource.RLIMIT_NOFILE)
    resource.prlimit(run.process.pid, resource.RLIMIT_NOFILE, (3, limit[1]))
    worker = min(run.children()[0])
    os.kill(worker, signal.SIGKILL)
    run.wait_for(lambda: run.err.count("\n") == 2)
    failed = time.monotonic()
    run.wait_for(lambda: run.err.count("\n") == 3)
    assert time.monotonic() - failed > START_AGAIN_AFTER - 0.5
    too_many = "Too many open files: allow more, as with ulimit -n 1024"
    assert run.err.splitlines() == [
        "training worker 0 died: signal 9, SIGKILL; it is started again",
        *[f"training worker 0 could not be started: {too_many}; it is started again"] * 2,
    ]
    resource.prlimit(run.process.pid, resource.RLIMIT_NOFILE, limit)
    run.wait_for(run.lines)
    steps = run.lines()[-1][0]
    run.wait_for(lambda: run.lines()[-1][0] > steps + 20)  # it trains again
    assert run.stop(signal.SIGINT)[0] == 130
    assert run.err.count("\n") == 3
    assert len(ALL_ARE_UP.findall(run.out)) == 1
    assert read(run.folder / "checkpoint.pt")["restarts"] == 3


@pytest.mark.skipif(sys.platform != "linux", reason="shared memory costs no files there")
def test_too_few_files_to_start_with_cost_one_line(start_main):
    run = start_main("--num-processes", "2", before="ulimit -n 30")
    assert run.process.wait(timeout=30) in (1, 2)
    assert run.err.startswith("error: ")
    assert "Too many open files: allow more, as with ulimit -n 1024" in run.err
    assert run.err.count("\n") == 1
    assert not run.children()[0]


def may_mount():
    command = ["unshare", "-m", "mount", "-t", "tmpfs", "none", "/dev/shm"]
    try:
        return subprocess.run(command, capture_output=True).returncode == 0
    except OSError:
        return False


@pytest.mark.skipif(not may_mount(), reason="needs a /dev/shm of its own")
def test_too_little_shared_memory_costs_one_line_that_says_how_much_is_needed(start_main):
    inside = 'mount -t tmpfs -o size=4m none /dev/shm && exec "$@"'
    argv = "--num-processes", "16", "--no-shared"
    run = start_main(*argv, before=f"exec unshare -m sh -c '{inside}' sh \"$@\" # ")
    assert run.process.wait(timeout=30) == 2
    assert re.fullmatch(r"error: .*84 MiB of shared memory are needed .*--no-shared\)\n", run.err)
    assert run.out == ""
    assert not run.folder.exists()


def test_a_run_trains_where_the_file_system_has_no_locks_and_says_so_once(start_main, tmp_path):
    site = """
import errno, fcntl, os
def lockf(*_):
    raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))
fcntl.lockf = lockf
"""
    run = start_main(
        *("--num-processes", "2", "--max-steps", "300", "--max-episode-length", "50"),
        env=environment(tmp_path / "site", sitecustomize=site),
    )
    assert run.process.wait(timeout=180) == 0
    cause = os.strerror(37) if sys.platform == "linux" else ""
    assert run.err.startswith(f"no locks in {run.folder} ({cause}")
    assert run.err.count("\n") == 1
    assert run.lines()
    assert read(run.folder / "checkpoint.pt")["steps"] >= 300


def test_a_clock_that_is_set_back_changes_no_duration(start_main, tmp_path):
    run_folder = tmp_path / "run0"
    site = f"""
import os, time
now = time.time
time.time = lambda: now() - 3600 * os.path.exists({str(run_folder / "options.json")!r})
"""
    limit = 10  # on a slow machine two processes are up after 7 s
    run = start_main(
        *(*PLAIN, "--max-episode-length", "50", "--checkpoint-interval", "1"),
        *("--max-time", str(limit / 3600)),
        folder=run_folder,
        env=environment(tmp_path / "site", sitecustomize=site),
    )
    run.wait_for((run_folder / "checkpoint.pt").exists)
    assert run.process.wait(timeout=180) == 0
    assert run.err == ""
    assert run.out.splitlines()[-1].startswith("Done after ")
    assert run.out.count("\nTime ") == len(run.lines()) > 0  # not one of them with a minus
    times = [float(row["time_s"]) for row in rows(run_folder)]
    assert times[0] > 0
    assert times == sorted(times)
    elapsed = read(run_folder / "checkpoint.pt")["elapsed"]
    assert max(limit, times[-1]) <= elapsed < 60


@pytest.mark.soak
def test_sixteen_workers_of_which_ten_are_killed_at_random(start_main):
    seconds, rng = 60 * float(os.environ.get("SOAK_MINUTES", "3")), random.Random()
    start = time.monotonic()
    run = start_main(
        "--env-name", "Pong-v0", "--num-processes", "16", "--max-time", str(seconds / 3600)
    )
    for reports, moment in enumerate(sorted(rng.uniform(60, seconds - 10) for _ in range(10))):
        time.sleep(max(0.0, start + moment - time.monotonic()))
        os.kill(rng.choice(run.children()[0]), signal.SIGKILL)
        killed = time.monotonic()
        run.wait_for(lambda reports=reports: run.err.count("\n") > reports)
        assert time.monotonic() - killed < 2
    assert run.process.wait(timeout=seconds) == 0
    report = "died: signal 9, SIGKILL; it is started again"
    assert run.err.count(report) == run.err.count("\n") == 10
    table, contents = rows(run.folder), read(run.folder / "checkpoint.pt")
    assert [int(row["episode"]) for row in table] == list(range(len(table)))
    steps = [int(row["num_steps"]) for row in table]
    assert steps == sorted(steps)
    assert contents["steps"] >= steps[-1] > 500 * (seconds - 60)
    assert contents["restarts"] == 10


def test_a_run_starts_from_an_agent_and_is_resumed_where_it_stopped(start_main, tmp_path):
    agent = tmp_path / "agent.pt"
    shutil.copy(ROOT / "results/Pong-v0.pt", agent)
    argv = ["--num-processes", "2", "--max-episode-length", "100", "--record-every", "3"]
    first = start_main(*argv, "--max-steps", "1500", "--lr", "0.001", "--init", str(agent))
    assert first.process.wait(timeout=180) == 0
    assert len(ALL_ARE_UP.findall(first.out)) == 1
    table, checkpoint = rows(first.folder), read(first.folder / "checkpoint.pt")
    weights, started_from = checkpoint["model"], read(agent)
    agent.unlink()  # it is needed no more
    assert all((weights[k] - w).abs().max() < 0.005 for k, w in started_from["model"].items())
    assert any((weights[k] - w).abs().max() > 0 for k, w in started_from["model"].items())
    statistics = [c["observation_statistics"][2] for c in (started_from, checkpoint)]
    assert statistics[1] == statistics[0] + 101 * len(table)
    trained = EpisodeLog(first.folder, 1600, "training.csv").episodes
    assert trained[-1].length == 100
    assert len(trained) <= trained[-1].episode + 1 <= 15  # of 1,500 steps
    later = f"{len(table)},99.0,9999,100,0.0,100\n"
    with open(first.folder / "episodes.csv", "a") as file:
        file.write(later)  # as if it had been killed long after the checkpoint
    with open(first.folder / "training.csv", "a") as file:
        file.write(later)

    argv = ["--resume", str(first.folder), "--max-steps", "3000", "--num-processes", "1"]
    second = start_main(*argv, folder=first.folder)
    second.wait_for(second.lines)
    intruder = start_main("--resume", str(first.folder), folder=first.folder.with_name("intruder"))
    assert intruder.process.wait(timeout=30) == 2
    assert intruder.err == f"error: {first.folder} is in use by a run that goes on\n"
    assert second.process.wait(timeout=180) == 0
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
    for name in "episodes", "training":
        assert (first.folder / f"{name}.csv.bak").read_text() == later
    trained_on = EpisodeLog(first.folder, 3020, "training.csv").episodes
    assert trained_on[: len(trained)] == trained
    assert len(trained_on) > len(trained)


def test_tensorboard_gets_the_test_episodes_and_the_means_over_all_training_workers(start_main):
    run = start_main(
        *("--num-processes", "2", "--max-episode-length", "100", "--max-steps", "1000"),
        *("--tensorboard", "--annotate"),
    )
    assert run.process.wait(timeout=180) == 0
    assert run.err == ""
    folder = run.folder / "tensorboard"
    assert all(path.is_file() for path in folder.iterdir())
    events = EventAccumulator(str(folder)).Reload()
    scalars = {tag: events.Scalars(tag) for tag in events.Tags()["scalars"]}
    learning = {"policy_loss", "value_loss", "entropy", "gradient_norm", "learning_rate"}
    training = {"training_reward", "training_length"}
    assert scalars.keys() == {"reward", "length", "steps_per_second"} | learning | training
    table = rows(run.folder)
    assert [event.value for event in scalars["length"]] == [100.0] * len(table)
    assert [event.step for event in scalars["reward"]] == [int(row["num_steps"]) for row in table]
    assert scalars["steps_per_second"][-1].value > 0
    assert scalars["learning_rate"][-1].value == pytest.approx(1e-4)
    assert 0 < scalars["entropy"][-1].value <= np.log(6) + 1e-3  # nats a step
    assert scalars["gradient_norm"][-1].value > 0


@linux_only
def test_a_full_disk_costs_a_line_each_and_not_the_run(start_main):
    import resource

    run = start_main(
        *("--num-processes", "1", "--max-episode-length", "100", "--record-every", "5"),
        *("--checkpoint-interval", "1"),
    )
    run.wait_for(lambda: len(run.lines()) > 3 and (run.folder / "checkpoint.pt").exists())
    processes = [run.process.pid, *run.children()[0]]
    freeze(processes)
    size = (run.folder / "episodes.csv").stat().st_size
    for pid in processes:
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (size + 10, resource.RLIM_INFINITY))
    for pid in processes:
        os.kill(pid, signal.SIGCONT)

    run.wait_for(lambda: "checkpoint.pt not written" in run.err)
    checkpoint = (run.folder / "checkpoint.pt").read_bytes()
    before = len(run.lines())
    run.wait_for(lambda: len(run.lines()) > before + 7)
    complaints = run.err
    cause = "(File too large|No space left on device)"
    for name in "checkpoint.pt", "best.pt", "episodes.csv":
        assert re.search(rf"\S+/{name} not written: {cause}\n", complaints), name
    assert re.search(r"\S+/rl-video-episode-\d+.mp4 not written: ", complaints)
    assert all(" not written: " in line for line in complaints.splitlines())
    assert (run.folder / "checkpoint.pt").read_bytes() == checkpoint
    assert not list(run.folder.glob("*.new"))
    whole = rows(run.folder)
    assert all(row["length"] == "100" for row in whole)

    for pid in processes:
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
    after = len(run.lines())
    run.wait_for(lambda: len(run.lines()) > after + 1)
    table = rows(run.folder)
    assert len(table) > after  # what had to wait was written
    assert [int(row["episode"]) for row in table] == list(range(len(table)))
    assert run.stop(signal.SIGINT)[0] == 130
    assert read(run.folder / "checkpoint.pt")["steps"] >= int(table[-1]["num_steps"])
