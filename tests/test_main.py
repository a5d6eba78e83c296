import csv
import json
import random
import re
import subprocess
import sys
from pathlib import Path

import cv2
import pytest
import torch

import main
import test as evaluator
from drawing import Video
from envs import create_atari_env
from model import ActorCritic

ROOT = Path(main.__file__).parent
LINE = re.compile(
    r"Time \d\dh \d\dm \d\ds, num steps (\d+), FPS \d+, episode reward (-?\d+\.\d), episode length (\d+), "
    r"mean100 (-?\d+\.\d), (\d+)%, \d\dh \d\dm left\n"
)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("--env-name Pog-v0", "unknown environment 'Pog-v0': did you mean Pong-v0"),
        ("--env-name CartPole-v1", "unknown environment 'CartPole-v1': ids look like Pong-v0"),
        ("--num-processes 0", "argument --num-processes: must be a whole number of at least 1, not '0'"),
        ("--num-steps 0", "argument --num-steps: must be a whole number of at least 1, not '0'"),
        ("--num-steps 2.5", "argument --num-steps: must be a whole number of at least 1, not '2.5'"),
        ("--max-steps -1", "argument --max-steps: must be a whole number of at least 1, not '-1'"),
        ("--max-episode-length 0", "argument --max-episode-length: must be"),
        ("--record-every -1", "argument --record-every: must be a whole number of at least 0"),
        ("--seed -1", "argument --seed: must be a whole number of at least 0"),
        ("--gamma 1.01", "argument --gamma: must be a number from 0 to 1, not '1.01'"),
        ("--gamma nan", "argument --gamma: must be a number from 0 to 1, not 'nan'"),
        ("--gae-lambda -0.1", "argument --gae-lambda: must be a number from 0 to 1, not '-0.1'"),
        ("--lr inf", "argument --lr: must be a number of at least 0, not 'inf'"),
        ("--lr fast", "argument --lr: must be a number of at least 0, not 'fast'"),
        ("--target-reward nan", "argument --target-reward: must be a number, not 'nan'"),
        ("--checkpoint-interval 0", "argument --checkpoint-interval: must be a number of at least 1, not '0'"),
        ("--lr-schedule cosine", "argument --lr-schedule: invalid choice: 'cosine'"),
        ("--lr-schedule linear", "argument --lr-schedule: linear needs --max-steps"),
        ("--resume RUN --save-dir other", "argument --save-dir: a run that is resumed stays in its folder"),
        ("--resume RUN", "RUN is no run's folder: there is no RUN/checkpoint.pt"),
        ("--resume missing", "missing is no run's folder"),
        ("--no-shared False", "unrecognized arguments: False"),
        ("--save-dir FILE", "cannot write the run"),
        ("--save-dir FILE/below", "cannot write the run"),
        ("--save-dir RUN", "RUN already holds a run"),
    ],
)
def test_bad_input_is_one_line_and_status_2(argv, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("FILE").touch()
    Path("RUN").mkdir()
    Path("RUN", "episodes.csv").write_text("kept")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(SystemExit) as stop:
        main.main(argv.split())
    assert stop.value.code == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert err.startswith("error: ")
    assert message in err
    assert sorted(tmp_path.rglob("*")) == before
    assert Path("RUN", "episodes.csv").read_text() == "kept"


def test_defaults():
    assert vars(main.parse_args([])) == {
        "env_name": "Pong-v0",
        "num_processes": 4,
        "max_steps": None,
        "max_time": None,
        "target_reward": None,
        "max_episode_length": 1_000_000,
        "seed": 1,
        "save_dir": None,
        "resume": None,
        "checkpoint_interval": 60.0,
        "record_every": 100,
        "annotate": False,
        "tensorboard": False,
        "lr": 1e-4,
        "lr_schedule": "constant",
        "gamma": 0.99,
        "gae_lambda": 1.0,
        "entropy_coef": 0.01,
        "value_loss_coef": 0.5,
        "max_grad_norm": 50.0,
        "num_steps": 20,
        "no_shared": False,
    }


def test_every_option_is_read():
    source = "".join(path.read_text() for path in ROOT.glob("*.py"))
    for option in vars(main.parse_args([])):
        assert re.search(rf"\bargs\.{option}\b", source), option


def test_run_folders_are_numbered(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    args = main.parse_args(["--env-name", "ALE/Pong-v5"])
    assert [str(main.make_run_folder(args)) for _ in range(2)] == ["runs/ALE-Pong-v5-1", "runs/ALE-Pong-v5-2"]


def run_main(*argv, cwd):
    command = [sys.executable, ROOT / "main.py", *argv]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=100)


@pytest.mark.parametrize("extra", [[], ["--no-shared"]])
def test_a_run_trains_and_ends_cleanly(extra, tmp_path):
    argv = ["--env-name", "PongDeterministic-v4", "--num-processes", "2", "--max-steps", "200"]
    result = run_main(*argv, "--max-episode-length", "60", "--record-every", "2", *extra, cwd=tmp_path)
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
    assert float(lines[-1][3]) == pytest.approx(sum(float(row["reward"]) for row in rows) / len(rows), abs=0.05)
    assert lines[-1][4] == "100"
    assert cv2.imread(str(folder / "learning_curve.png")) is not None
    videos = {path.name for path in (folder / "videos").iterdir()}
    assert videos == {f"rl-video-episode-{n}.mp4" for n in range(0, len(rows), 2)}
    assert json.loads((folder / "options.json").read_text())["num_processes"] == 2


def test_an_episode_is_scored_with_rewards_unclipped():
    env = create_atari_env("ALE/BeamRider-v5")
    torch.manual_seed(0)
    reward, length = evaluator.play_episode(env, ActorCritic(1, 9), random.Random(0), Video(None, env), 400)
    assert reward >= 44  # a beam rider's sector pays 44 points an enemy
    assert reward % 44 == 0
    assert length == 400


def test_a_missing_tensorboard_says_how_to_get_it(monkeypatch, capsys):
    monkeypatch.setattr(main.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit) as stop:
        main.parse_args(["--tensorboard"])
    assert stop.value.code == 2
    assert capsys.readouterr().err == "error: argument --tensorboard: the package is missing: pip install tensorboard\n"
