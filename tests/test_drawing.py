import json
import random
import signal
import subprocess
import sys
from collections import deque

import cv2
import numpy as np
import pytest
import torch
from imageio_ffmpeg import count_frames_and_secs, read_frames
from test_train import options

import main
import test as evaluator
from checkpoint import EpisodeLog, RunState
from drawing import BLUE, GREEN, Video, draw_curves, draw_mind, moving_mean, read_episodes
from envs import create_atari_env
from model import ActorCritic


def frames_of(path):
    video = read_frames(str(path))
    details = next(video)
    video.close()
    capture, frames = cv2.VideoCapture(str(path)), []
    while (frame := capture.read()[1]) is not None:
        frames.append(frame[..., ::-1])
    return details, frames


def record(path, annotate=False, env_id="PongDeterministic-v4", steps=70):
    env = create_atari_env(env_id, render_mode="rgb_array")
    torch.manual_seed(0)
    model = ActorCritic(1, env.action_space.n)
    _, length = evaluator.play_episode(env, model, random.Random(0), Video(path, env, annotate), steps)
    assert length == steps
    return frames_of(path)


def test_a_video_has_a_picture_for_every_step_and_the_games_speed(tmp_path):
    details, frames = record(tmp_path / "game.mp4")
    assert len(frames) == 71
    assert count_frames_and_secs(tmp_path / "game.mp4")[1] == pytest.approx(71 / 15, abs=0.05)
    assert details["codec"] == "h264"
    assert details["pix_fmt"].startswith("yuv420p")
    assert details["size"] == (320, 420)
    assert details["fps"] == 15


def test_an_annotated_video_shows_the_same_game_and_the_mind_beside_it(tmp_path):
    _, plain = record(tmp_path / "plain.mp4")
    details, frames = record(tmp_path / "annotated.mp4", annotate=True)
    assert details["size"] == (640, 420)
    assert len(frames) == len(plain)
    difference = np.abs(frames[40][:, :320].astype(int) - plain[40])
    assert difference.mean() < 3  # but for the compression
    assert (np.abs(frames[40][:, 320:].astype(int) - BLUE).max(axis=2) < 60).sum() > 500  # bars


def test_a_gif_plays(tmp_path):
    details, frames = record(tmp_path / "game.gif", annotate=True)
    assert details["codec"].startswith("gif")
    assert details["size"] == (640, 420)
    assert len(frames) == pytest.approx(71, abs=2)


def is_colour(panel, colour):
    return (panel == np.array(colour, np.uint8)).all(axis=2)


@pytest.mark.parametrize("num_actions", [3, 6, 9, 18])
def test_the_bars_of_the_policy_are_as_long_as_its_probabilities_and_apart(num_actions):
    policy = {f"DOWNRIGHTFIRE{n}"[-13:]: (n + 1) / 200 if n else 0.5 for n in range(num_actions)}
    panel = draw_mind((420, 320, 3), np.random.rand(1, 42, 42), 3.0, deque([0.5], maxlen=75), policy)
    bars = is_colour(panel, BLUE)
    num, _, boxes, _ = cv2.connectedComponentsWithStats(bars.astype(np.uint8))
    assert num == num_actions + 1  # the first is the background
    lengths = sorted(boxes[1:, cv2.CC_STAT_WIDTH])
    expected = sorted(policy.values())
    assert lengths == pytest.approx([p / 0.5 * lengths[-1] for p in expected], abs=1.5)
    heights = boxes[1:, cv2.CC_STAT_HEIGHT]
    assert heights.min() >= 6
    text = panel[290:].max(axis=2) > 100
    assert not text[-2:].any()  # nothing runs over the edge


def test_the_value_is_a_curve_that_ends_on_the_right_at_its_height():
    curve = []
    for last in 1.0, -1.0:
        values = deque(np.linspace(0, last, 75), maxlen=75)
        panel = draw_mind((420, 320, 3), np.zeros((1, 42, 42)), 0.0, values, {"NOOP": 0.0})
        green = np.abs(panel.astype(int) - GREEN).max(axis=2) < 40
        rows, columns = np.nonzero(green[210:290])
        assert columns.max() == pytest.approx(308, abs=2)
        curve.append(rows[columns >= columns.max() - 2].mean())
    assert curve[0] < 20 < 50 < curve[1]


def write_run(folder, seed=1, slope=42.0, episodes=300, **changes):
    folder.mkdir()
    log, rng = EpisodeLog(folder, 0), random.Random(seed)
    for n in range(episodes):
        log.rows.append(f"{n},{n * 36.0},{n * 10_000},277,{-21 + slope * n / episodes + rng.uniform(-1, 1)},{1000 + n}")
    log.append(episodes, episodes * 36.0, episodes * 10_000, 277, -21 + slope, 1000 + episodes)
    (folder / "options.json").write_text(json.dumps(vars(main.parse_args([])) | {"seed": seed} | changes))
    return folder


def line_in(picture, colour, rows):
    """The height of a line of this colour (BGR) in each column that it crosses, within `rows` of the picture."""
    close = np.abs(picture[rows].astype(int) - colour).max(axis=2) < 12
    columns = np.nonzero(close.any(axis=0))[0]
    return columns, np.array([np.nonzero(close[:, c])[0].mean() for c in columns])


FIRST, SECOND = (180, 119, 31), (14, 127, 255)  # matplotlib's C0 and C1 in BGR


def test_the_learning_curve_of_a_run(tmp_path):
    run = write_run(tmp_path / "run")
    draw_curves([run], tmp_path / "curve.png")
    picture = cv2.imread(str(tmp_path / "curve.png"))
    height, width = picture.shape[:2]
    assert width > 900
    columns, heights = line_in(picture, FIRST, slice(110, int(0.62 * height)))
    assert columns.min() < 0.2 * width
    assert columns.max() > 0.9 * width
    left, right = heights[columns < 0.3 * width].mean(), heights[columns > 0.8 * width].mean()
    assert left - right > 0.2 * height  # it rises
    middle = (columns > 0.5 * width) & (columns < 0.8 * width)
    below = [picture[int(y) + 118 : int(y) + 170, x].max(axis=1).min() for x, y in zip(columns, heights, strict=True)]
    assert (np.array(below)[middle] < 90).any()  # the mean over 100 lags behind the one over 20
    dark = picture.max(axis=2) < 90
    assert dark[: int(0.04 * height)].any()  # hours, above
    assert dark[int(0.97 * height) :].any()  # training steps, below
    assert dark[:, : int(0.03 * width)].any()  # reward and length, at the left


def test_several_runs_in_one_picture_through_the_command_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    runs = [write_run(tmp_path / f"seed{n}", seed=n) for n in range(3)]
    other = write_run(tmp_path / "flat", slope=5.0, lr=0.5)
    evaluator.main(["--plot", *map(str, runs), str(other)])
    assert capsys.readouterr().out == "comparison.png drawn\n"
    picture = cv2.imread("comparison.png")
    upper = slice(20, int(0.6 * picture.shape[0]))
    heights = [line_in(picture, colour, upper)[1][-50:].mean() for colour in (FIRST, SECOND)]
    assert heights[0] < heights[1]  # the three end higher than the flat one
    band = np.abs(picture[upper].astype(int) - (235, 226, 210)).max(axis=2) < 14
    assert band.sum() > 500


def test_runs_that_learn_alike_are_seeds_of_one_setting(tmp_path):
    linear = {"lr_schedule": "linear"}
    same = {"seed": 2, "max_steps": 5_000_000, "record_every": 0}
    changes = [{}, same, {"lr": 0.5}, linear | {"max_steps": 1_000_000}, linear | {"max_steps": 2_000_000}]
    runs = [write_run(tmp_path / str(n), episodes=1, **more) for n, more in enumerate(changes)]
    settings = [read_episodes(run)[0] for run in runs]
    assert settings[0] == settings[1]
    assert len(set(settings)) == 4


def test_the_moving_mean_is_of_all_so_far_and_then_of_a_hundred():
    values = np.arange(250.0)
    means = moving_mean(values, 100)
    assert means[0] == 0
    assert means[9] == 4.5
    assert means[99] == 49.5
    assert means[249] == np.arange(150, 250).mean()


@pytest.fixture(scope="module")
def agent(tmp_path_factory):
    """A run folder with the best.pt of an agent that has learnt nothing, and wins or loses quickly."""
    folder, args = tmp_path_factory.mktemp("agent"), options(env_name="ALE/Boxing-v5")
    torch.manual_seed(0)
    state = RunState(args, 1, 18)
    state.count_episode(1.0, (0.4, 0.2, 1000))
    state.save_if_best(folder, args, state.model)
    state.save(folder, args, 0.0)
    return folder


def play(capsys, *argv):
    torch.set_num_threads(2)
    evaluator.main(list(map(str, argv)))
    assert torch.get_num_threads() == 1  # on a busy machine two took minutes for what one does in seconds
    return capsys.readouterr().out.splitlines()


def test_an_evaluation_is_repeatable_and_its_episodes_differ(agent, capsys):
    argv = "--episodes", 2, "--json"
    lines = play(capsys, agent, *argv)
    assert lines[0].startswith("episode 0, episode reward ")
    assert lines[2].startswith("2 episodes: mean ")
    summary = json.loads(lines[-1])
    assert set(summary) == {"episodes", "mean", "std", "min", "max", "rewards"}
    assert summary["mean"] == pytest.approx(np.mean(summary["rewards"]))
    assert play(capsys, agent / "best.pt", *argv) == lines
    assert play(capsys, agent / "checkpoint.pt", *argv) == lines
    assert play(capsys, agent, *argv, "--seed", 2) != lines


def test_a_run_stopped_before_its_first_test_game_can_be_played(agent, tmp_path, capsys):
    (tmp_path / "checkpoint.pt").write_bytes((agent / "checkpoint.pt").read_bytes())
    assert play(capsys, tmp_path, "--episodes", 1)[1].startswith("1 episodes: mean ")


def test_ctrl_c_while_playing_is_no_traceback(agent):
    command = [sys.executable, evaluator.__file__, agent, "--episodes", "100"]
    process = subprocess.Popen(list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout.readline().startswith("episode 0, ")
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=20)[1] == ""
    assert process.returncode == 130


def test_a_greedy_game_without_chance_says_so_and_is_recorded(tmp_path, monkeypatch, capsys):
    args = options(env_name="BoxingDeterministic-v4")
    torch.manual_seed(0)
    state = RunState(args, 1, 18)
    state.save(tmp_path, args, 0.0)
    real = evaluator.play_episode
    monkeypatch.setattr(evaluator, "play_episode", lambda *a, **k: real(*a, max_length=50, **k))
    path = tmp_path / "game.gif"
    lines = play(capsys, tmp_path / "checkpoint.pt", "--greedy", "--episodes", 2, "--record", path, "--annotate")
    assert lines[0] == "Nothing is random in a greedy game of BoxingDeterministic-v4: all episodes are the same one."
    assert lines[1].split(",")[1:] == lines[2].split(",")[1:]
    assert frames_of(path)[0]["size"] == (640, 420)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("", "name an agent to play (a run folder, best.pt), or --plot runs"),
        ("AGENT --plot AGENT", "name an agent to play (a run folder, best.pt), or --plot runs"),
        ("missing", "there is no agent in missing: name a run folder"),
        ("TEXT", "is damaged, or not one of this program's files"),
        ("AGENT --episodes 0", "argument --episodes: must be a whole number of at least 1"),
        ("AGENT --record game.avi", "argument --record: must be an .mp4 or .gif file"),
        (
            "AGENT --record missing/game.mp4",
            "argument --record: must be an .mp4 or .gif file in a folder that is there",
        ),
        ("AGENT --render human", "argument --render: there is no display here; try --record"),
        ("--plot AGENT", "holds no test episodes yet: name run folders that do"),
        ("--plot missing", "holds no test episodes"),
        ("--plot TEXT", "holds no test episodes"),
        ("--plot EMPTY", "holds no test episodes"),
    ],
)
def test_bad_input_is_one_line_and_status_2(argv, message, agent, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DISPLAY", raising=False)
    monkeypatch.delenv("WAYLAND_DISPLAY", raising=False)
    monkeypatch.setattr(evaluator.sys, "platform", "linux")
    (tmp_path / "TEXT").write_text("no agent\n1,2\n")
    (tmp_path / "EMPTY").write_text(EpisodeLog.HEADER + "\n")
    with pytest.raises(SystemExit) as stop:
        evaluator.main(argv.replace("AGENT", str(agent)).split())
    assert stop.value.code == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert message in err


@pytest.mark.parametrize(
    ("limits", "elapsed", "before", "steps", "expected"),
    [
        ({}, 100, 0, 1000, ""),
        ({"max_steps": 4000}, 3600, 0, 1000, ", 25%, 03h 00m left"),
        ({"max_steps": 4000}, 3600, 0, 4010, ", 100%, 00h 00m left"),
        ({"max_time": 2.0}, 5400, 3600, 1000, ", 25%, 01h 30m left"),
        ({"max_time": 2.0, "max_steps": 2000}, 3600, 0, 1500, ", 75%, 00h 20m left"),
    ],
)
def test_the_progress_of_a_run(limits, elapsed, before, steps, expected):
    args = options(**({"max_steps": None} | limits))
    assert evaluator.progress(args, elapsed, before, steps) == expected
