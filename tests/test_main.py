import argparse
import contextlib
import csv
import errno
import itertools
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import cv2
import pytest
import torch
from conftest import options, refused, size_as_sent

import main
from harness import workers
from harness.checkpoint import dump, read
from harness.episodes import HEADER, Episode
from harness.shared import SharedState
from harness.utils import write
from harness.workers import FINISH, GO_ON

ROOT = Path(main.__file__).parent
AGENT = ROOT / "results/Pong-v0.pt"
LINE = re.compile(
    r"Time \d\dh \d\dm \d\ds, num steps (\d+), FPS \d+, episode reward (-?\d+\.\d), "
    r"episode length (\d+), mean100 (-?\d+\.\d)(?:, (\d+)%, \d\dh \d\dm left)?, FPS now \d+\n"
)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("--env-name Pog-v0", "unknown environment 'Pog-v0': did you mean Pong-v0"),
        ("--env-name CartPole-v1", "unknown environment 'CartPole-v1': ids look like Pong-v0"),
        (
            "--num-processes 0",
            "argument --num-processes: must be a whole number of at least 1, not '0'",
        ),
        ("--num-steps 0", "argument --num-steps: must be a whole number of at least 1, not '0'"),
        (
            "--num-steps 2.5",
            "argument --num-steps: must be a whole number of at least 1, not '2.5'",
        ),
        ("--max-steps -1", "argument --max-steps: must be a whole number of at least 1, not '-1'"),
        ("--max-episode-length 0", "argument --max-episode-length: must be"),
        ("--record-every -1", "argument --record-every: must be a whole number of at least 0"),
        ("--seed -1", "argument --seed: must be a whole number of at least 0"),
        ("--gamma 1.01", "argument --gamma: must be a number from 0 to 1, not '1.01'"),
        ("--gamma nan", "argument --gamma: must be a number from 0 to 1, not 'nan'"),
        ("--gae-lambda -0.1", "argument --gae-lambda: must be a number from 0 to 1, not '-0.1'"),
        ("--lr 1e38", "argument --lr: must be a number from 0 to 1, not '1e38'"),
        ("--lr fast", "argument --lr: must be a number from 0 to 1, not 'fast'"),
        ("--max-grad-norm inf", "argument --max-grad-norm: must be a number of at least 0, not"),
        ("--target-reward nan", "argument --target-reward: must be a number, not 'nan'"),
        (
            "--checkpoint-interval 0",
            "argument --checkpoint-interval: must be a number of at least 1, not '0'",
        ),
        ("--lr-schedule cosine", "argument --lr-schedule: invalid choice: 'cosine'"),
        ("--lr-schedule linear", "argument --lr-schedule: linear needs --max-steps"),
        (
            "--resume RUN --save-dir other",
            "argument --save-dir: a run that is resumed stays in its folder",
        ),
        ("--resume RUN", "RUN is no run's folder: there is no RUN/checkpoint.pt"),
        ("--resume missing", "missing is no run's folder"),
        ("--resume KILLED", "the run in KILLED has no checkpoint yet; if it has ended, start it"),
        ("--save-dir KILLED", "KILLED already holds a run: name another folder\n"),
        ("--resume RUN --init RUN", "argument --init: a run that is resumed goes on with its own"),
        ("--init missing", "there is no agent in missing: name a run folder"),
        ("--init FILE", "FILE is damaged, or not one of this program's files"),
        ("--init=", "argument --init: must not be empty"),
        (f"--env-name Breakout-v0 --init {AGENT}", "plays Pong-v0 with 6 actions, but Breakout-v0"),
        ("--ray there", "argument --ray: must be HOST:PORT, as 127.0.0.1:6379, not 'there'"),
        ("--ray 127.0.0.1:1", "no Ray cluster at 127.0.0.1:1 (Connection refused); start one"),
        ("--ray-interval -1", "argument --ray-interval: must be a number from 0 to 3600"),
        ("--no-shared False", "unrecognized arguments: False"),
        ("--save-dir FILE", "cannot write the run"),
        ("--save-dir FILE/below", "cannot write the run"),
        ("--save-dir RUN", "RUN already holds a run"),
        ("--save-dir=", "argument --save-dir: must not be empty"),
        ("--resume=", "argument --resume: must not be empty"),
        ("--entropy-schedule linear", "argument --entropy-schedule: linear needs --max-steps"),
        (f"--num-processes {10**12}", "must be a whole number from 1 to 1024, not '1000000000000'"),
        (f"--num-processes {'9' * 400}", "argument --num-processes: must be a whole number from 1"),
        (
            f"--max-steps {10**30}",
            "argument --max-steps: must be a whole number from 1 to 92233720",
        ),
        (
            f"--seed {10**30}",
            "argument --seed: must be a whole number from 0 to 9223372036854775807",
        ),
        (f"--num-steps {10**30}", "argument --num-steps: must be a whole number from 1 to 10000"),
        ("--max-time 1e300", "argument --max-time: must be a number from 0 to 1000000.0"),
    ],
)
def test_bad_input_is_one_line_and_status_2(argv, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("FILE").touch()
    Path("RUN").mkdir()
    Path("RUN", "episodes.csv").write_text("kept")
    Path("KILLED").mkdir()
    Path("KILLED", "options.json").write_text("{}")
    before = sorted(tmp_path.rglob("*"))
    assert message in refused(argv.split(), capsys)
    assert sorted(tmp_path.rglob("*")) == before
    assert Path("RUN", "episodes.csv").read_text() == "kept"


@pytest.mark.parametrize("what", ["a link to nothing", "a file"])
def test_runs_that_is_no_folder_is_one_line(what, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    if what == "a file":
        Path("runs").touch()
    else:
        Path("runs").symlink_to("nowhere")
    assert refused([], capsys).startswith("cannot write the run: ")


ZEROS = "--record-every 0 --seed 0 --entropy-coef 0 --gae-lambda 0 --target-reward 0 --max-time 0"
SWITCHES = "--annotate --tensorboard --no-shared --lr-schedule linear --max-steps 1000"


def resumed(folder, argv, *typed):
    """The options of a run that was started with `argv` and is resumed with those typed now."""
    args = main.parse_args(argv.split())
    SharedState(args, 1, 6).save(folder, args, 0.0)
    typed = ["--resume", str(folder), *typed]
    args_now, _ = main.find_run(main.parse_args(typed), typed)
    return vars(args), vars(args_now)


@pytest.mark.parametrize("argv", ["", ZEROS, SWITCHES, "--env-name ALE/Pong-v5 --lr 3e-05"])
def test_a_resumed_run_has_its_own_options_whatever_their_value(argv, tmp_path):
    args, args_now = resumed(tmp_path, argv)
    assert args_now == args | {"resume": tmp_path}


@pytest.mark.parametrize(
    ("argv", "typed", "changes"),
    [
        ("", "--lr 0.5 --num-processes 7", {"lr": 0.5, "num_processes": 7}),
        (ZEROS, "--entropy-coef 0.01 --seed 1", {"entropy_coef": 0.01, "seed": 1}),
        (SWITCHES, "--no-annotate --no-tensorboard", {"annotate": False, "tensorboard": False}),
        (
            SWITCHES,
            "--shared --lr-schedule constant",
            {"no_shared": False, "lr_schedule": "constant"},
        ),
        ("", "--no-shared --annotate", {"no_shared": True, "annotate": True}),
    ],
)
def test_options_that_are_named_again_win(argv, typed, changes, tmp_path):
    args, args_now = resumed(tmp_path, argv, *typed.split())
    assert args_now == args | {"resume": tmp_path} | changes


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("num_processes", -3, "argument --num-processes: must be a whole number of at least 1"),
        ("num_processes", None, "the run's option num_processes cannot be None"),
        ("num_processes", True, "the run's option num_processes cannot be True"),
        ("annotate", 1, "the run's option annotate cannot be 1"),
        ("lr", [0.1], "argument --lr: must be a number"),
        ("lr_schedule", "cosine", "argument --lr-schedule: invalid choice: 'cosine'"),
        ("lr_schedule", "linear", "argument --lr-schedule: linear needs --max-steps"),
        ("env_name", {}, "unknown environment '{}'"),
        (3, True, "this one has no option 3"),
    ],
)
def test_a_run_whose_options_cannot_be_is_refused(option, value, message, tmp_path, capsys):
    args = main.parse_args([])
    SharedState(args, 1, 6).save(tmp_path, args, 0.0)
    contents = read(tmp_path / "checkpoint.pt")
    contents["options"][option] = value
    write(dump(contents), tmp_path / "checkpoint.pt")
    assert message in refused(["--resume", str(tmp_path)], capsys)


def test_rows_after_the_checkpoint_are_set_aside_before_any_worker_counts_on(tmp_path):
    args = main.parse_args([])
    shared = SharedState(args, 1, 6)
    shared.steps[0] = 100
    shared.save(tmp_path, args, 0.0)
    rows = [Episode(n, 1.0, num_steps, 100, -21.0, 900) for n, num_steps in enumerate([100, 101])]
    for name in "episodes.csv", "training.csv":
        (tmp_path / name).write_text("".join(f"{line}\n" for line in (HEADER, *rows)))
    with contextlib.ExitStack() as until_the_end:
        main.prepare(["--resume", str(tmp_path)], until_the_end)
    for name in "episodes.csv", "training.csv":
        assert (tmp_path / name).read_text() == f"{HEADER}\n{rows[0]}\n"
        assert (tmp_path / f"{name}.bak").read_text() == f"{rows[1]}\n"


def test_the_seed_decides_the_first_weights(tmp_path):
    def weights(run, seed):
        argv = ["--save-dir", str(tmp_path / run), "--seed", seed]
        with contextlib.ExitStack() as until_the_end:
            _, shared, _ = main.prepare(argv, until_the_end)
        return shared.model.conv1.weight.tolist()

    assert weights("a", "1") == weights("b", "1")
    assert weights("c", "1") != weights("d", "2")


@pytest.fixture
def run_here(tmp_path, monkeypatch):
    """main.run, but no process starts: `happens` goes on between its looks, 40 s apart."""

    def run_here(args, shared, happens):
        class Watched(contextlib.nullcontext):
            watch, all_ready = staticmethod(lambda: happens), staticmethod(lambda: False)

        seconds = itertools.count(step=40)
        monkeypatch.setattr(main, "Supervisor", lambda *_: Watched(Watched()))
        monkeypatch.setattr(main, "time", SimpleNamespace(monotonic=lambda: next(seconds)))
        monkeypatch.setattr(main.workers, "ENVIRONMENT", {})
        with main.workers.signals_held():
            return main.run(args, shared, tmp_path)

    return run_here


def test_after_the_last_step_no_more_workers_start_once_the_test_worker_has(run_here):
    args = main.parse_args(["--max-steps", "100"])
    shared, stops = SharedState(args, 1, 6), []

    def happens():
        for steps, is_ready in (99, True), (100, False), (100, True):
            shared.steps[0], shared.ready[args.num_processes] = steps, is_ready
            yield
            stops.append(int(shared.stop))

    assert run_here(args, shared, happens()) == 0
    assert stops == [GO_ON, GO_ON, FINISH]


def test_dropped_rollouts_are_told_at_most_once_a_minute_and_at_the_end(run_here, capsys):
    args = main.parse_args([])
    shared = SharedState(args, 1, 6)

    def happens():
        for num_dropped in 0, 2, 2, 2, 3, 5, 5:
            shared.dropped[0] = num_dropped
            yield

    assert run_here(args, shared, happens()) == 0
    out, err = capsys.readouterr()
    why = "rollouts dropped so far: loss or gradient not finite"
    assert err == f"2 {why}\n3 {why}\n5 {why}\n"
    assert "Done after 0 steps, 5 rollouts dropped; the run lies in " in out


def test_a_resumed_run_keeps_what_it_learned_by_before(tmp_path):
    options = tmp_path / "options.json"
    args = main.parse_args([])
    shared = SharedState(args, 1, 6)
    shared.steps[0] = 100
    shared.save(tmp_path, args, 0.0)
    options.write_text(json.dumps(vars(args)))
    for argv, until in ([], None), (["--lr", "0.5"], {"100": {"lr": 1e-4}}):
        with contextlib.ExitStack() as until_the_end:
            main.prepare(["--resume", str(tmp_path), *argv], until_the_end)
        assert json.loads(options.read_text()).get("until") == until


def test_only_a_new_run_is_said_to_start_from_an_agent(tmp_path, monkeypatch, capsys):
    def save(args, shared, run_folder):
        shared.save(run_folder, args, 0.0)
        return 0

    monkeypatch.setattr(main, "run", save)
    run, agent = str(tmp_path / "run"), str(ROOT / "results" / "BreakoutDeterministic-v4.pt")
    assert main.main(["--init", agent, "--save-dir", run]) == 0  # in its game
    assert f"A3C on BreakoutDeterministic-v4 from {agent}: 4 t" in capsys.readouterr().out
    for name in run, f"{run}/checkpoint.pt":
        assert main.main(["--resume", name]) == 0
        assert "A3C on BreakoutDeterministic-v4: 4 training" in capsys.readouterr().out


def test_every_option_has_a_name_for_learning_or_is_known_not_to_matter():
    from harness.settings import LEARNS_BY

    parser = argparse.ArgumentParser()
    main.add_learning_options(parser.add_argument)
    learning = vars(parser.parse_args([])).keys()
    assert learning <= set(LEARNS_BY)
    assert set(LEARNS_BY) <= vars(main.parse_args([])).keys()


def run_main(*argv, cwd):
    command = [sys.executable, ROOT / "main.py", *argv]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=100)


def test_a_run_trains_and_ends_cleanly_also_with_an_adam_for_each_worker(tmp_path):
    argv = ["--env-name", "PongDeterministic-v4", "--num-processes", "2", "--max-steps", "200"]
    argv += ["--max-episode-length", "60", "--record-every", "2", "--no-shared"]
    result = run_main(*argv, cwd=tmp_path)
    assert result.stderr == ""
    assert result.returncode == 0
    folder = tmp_path / "runs" / "PongDeterministic-v4-1"
    with open(folder / "episodes.csv") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["episode", "time_s", "num_steps", "fps", "reward", "length"]
    assert [int(row["episode"]) for row in rows] == list(range(len(rows)))
    assert 200 <= int(rows[-1]["num_steps"]) < 200 + 2 * 20
    lines = LINE.findall(result.stdout)
    assert [line[0] for line in lines] == [row["num_steps"] for row in rows]
    assert all(row["length"] == line[2] == "60" for row, line in zip(rows, lines, strict=True))
    assert float(lines[-1][3]) == pytest.approx(
        sum(float(row["reward"]) for row in rows) / len(rows), abs=0.05
    )
    assert lines[-1][4] == "100"
    assert cv2.imread(str(folder / "learning_curve.png")) is not None
    videos = {path.name for path in (folder / "videos").iterdir()}
    assert videos == {f"rl-video-episode-{n}.mp4" for n in range(0, len(rows), 2)}
    options = (folder / "options.json").read_text()
    assert json.loads(options)["num_processes"] == 2
    assert options.endswith("}\n")


def test_what_a_worker_is_started_with_fits_into_a_pipe_however_many_there_are(tmp_path):
    """If it did not, its start would wait until it reads, and for ever if it died before that."""
    args = options(num_processes=8, no_shared=True, ray="127.0.0.1:6379")
    jobs = main.create_jobs(args, SharedState(args, 1, 6), tmp_path, 0.0)
    assert len(jobs) == 10
    assert max(size_as_sent(job) for job in jobs) < 12_000  # a pipe of macOS has 16 KiB at first


def test_where_no_process_can_be_started_a_line_says_so(monkeypatch, capsys):
    def refuse():
        raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))

    monkeypatch.setattr(workers.resource_tracker, "ensure_running", refuse)
    assert refused([], capsys) == f"no process can be started: {os.strerror(errno.EAGAIN)}\n"


def test_a_run_that_a_full_disk_did_not_let_begin_can_be_started_again(
    tmp_path, monkeypatch, capsys
):
    def full(data, path):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    argv = ["--save-dir", str(tmp_path / "run")]
    with monkeypatch.context() as disk:
        disk.setattr("harness.settings.write", full)
        assert os.strerror(errno.ENOSPC) in refused(argv, capsys)
    with contextlib.ExitStack() as until_the_end:
        _, _, run_folder = main.prepare(argv, until_the_end)
    names = {path.name for path in run_folder.iterdir()}
    assert names == {".locks", "options.json"}


def test_that_a_changed_network_is_slower_is_told_in_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("model.F.elu", torch.relu)
    with contextlib.ExitStack() as until_the_end:
        main.prepare(["--save-dir", str(tmp_path / "run")], until_the_end)
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert err.startswith("rollout.py does not know the network of model.py (values or logits diff")


def test_a_missing_tensorboard_says_how_to_get_it(monkeypatch, capsys):
    monkeypatch.setattr(main.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit) as stop:
        main.parse_args(["--tensorboard"])
    assert stop.value.code == 2
    assert (
        capsys.readouterr().err
        == "error: argument --tensorboard: the package is missing: pip install tensorboard\n"
    )


@pytest.mark.parametrize("script", ["main.py", "test.py"])
@pytest.mark.parametrize("python", ["3.7", "3.8", "3.9", "3.10"])
def test_a_python_that_is_too_old_is_one_line(python, script, tmp_path):
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"), "versions")
    found = sorted(pyenv.glob(f"{python}.*/bin/python"))
    if not found:
        pytest.skip(f"no Python {python} here")
    result = subprocess.run([found[0], ROOT / script], cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 2
    assert result.stderr == f"error: Python 3.11 or newer is needed, and this is {python}\n"


@pytest.mark.parametrize("script", ["main.py", "test.py"])
@pytest.mark.parametrize(
    ("pretence", "message"),
    [
        (
            "sys.platform = 'win32'",
            "this program needs Linux or macOS; on Windows, run it inside WSL",
        ),
        ("sys.path[:] = [p for p in sys.path if 'site-packages' not in p]", "not installed for "),
    ],
)
def test_a_system_that_it_cannot_run_on_is_one_line(pretence, message, script):
    program = f"import runpy, sys; {pretence}; sys.path.insert(0, {str(ROOT)!r})\n"
    program += f"runpy.run_path({str(ROOT / script)!r}, run_name='__main__')"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert result.returncode == 2
    assert result.stderr.startswith(f"error: {message}")
    assert result.stderr.count("\n") == 1


def test_a_machine_of_a_cluster_that_lacks_a_package_tells_it_as_an_exception():
    program = "import sys, types; sys.modules['ray'] = types.ModuleType('ray'); "
    program += "sys.path[:] = [p for p in sys.path if 'site-packages' not in p]; import harness"
    command = [sys.executable, "-c", program]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.stderr.splitlines()[-1].startswith("ImportError: not installed for ")
