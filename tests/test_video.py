import math
import subprocess
import sys
from collections import deque
from pathlib import Path

import cv2
import numpy as np
import pytest
from imageio_ffmpeg import count_frames_and_secs, read_frames

from envs import create_atari_env
from harness import video
from harness.video import BLUE, Video, draw_panel, read_back, video_path

ROOT = Path(video.__file__).parent.parent


def frames_of(path):
    path = Path(path).absolute()  # or a colon in its name would stand behind a protocol
    reader = read_frames(f"file:{path}")
    details = next(reader)
    reader.close()
    capture, frames = cv2.VideoCapture(str(path)), []
    while (frame := capture.read()[1]) is not None:
        frames.append(frame[..., ::-1])
    return details, frames


def record(path, annotate=False, env_id="PongDeterministic-v4", frames=71):
    """Record a game that is the same each time; return its screens."""
    env = create_atari_env(env_id, render_mode="rgb_array")
    observation, _ = env.reset(seed=0)
    actions = np.random.default_rng(0)
    n = env.action_space.n
    screens = []
    with Video(path, env, annotate) as recorder:
        for frame in range(frames):
            screens.append(env.render())
            recorder.add_frame(observation, frame, math.sin(frame / 9), [1 / n] * n)
            observation, *_ = env.step(int(actions.integers(n)))
    return screens


def mean_difference(one, other):
    return np.abs(one.astype(int) - other).mean()


def test_a_video_has_a_picture_for_every_step_and_the_games_speed(tmp_path):
    screens = record(tmp_path / "game.mp4")
    details, frames = frames_of(tmp_path / "game.mp4")
    assert len(frames) == 71
    assert count_frames_and_secs(tmp_path / "game.mp4")[1] == pytest.approx(71 / 15, abs=0.05)
    assert details["codec"] == "h264"
    assert details["pix_fmt"].startswith("yuv420p")
    assert details["size"] == (320, 420)
    assert details["fps"] == 15
    for n in 0, 40, 70:  # the first and the last are not lost
        twice = screens[n].repeat(2, axis=0).repeat(2, axis=1)
        assert mean_difference(frames[n], twice) < 3  # but for the compression


def test_an_annotated_video_shows_the_same_game_and_the_panel_beside_it(tmp_path, monkeypatch):
    panels = []

    def keep(*args):
        panels.append(draw_panel(*args))
        return panels[-1]

    monkeypatch.setattr(video, "draw_panel", keep)
    screens = record(tmp_path / "game.mp4", annotate=True, frames=21)
    details, frames = frames_of(tmp_path / "game.mp4")
    assert details["size"] == (640, 420)
    assert len(frames) == len(screens) == 21
    for n in 0, 10, 20:
        twice = screens[n].repeat(2, axis=0).repeat(2, axis=1)
        assert mean_difference(frames[n][:, :320], twice) < 3  # but for the compression
        differences = [mean_difference(frames[n][:, 320:], panel) for panel in panels]
        assert np.argmin(differences) == n
        assert differences[n] < 3


def test_a_video_of_before_is_set_aside_where_its_episode_is_played_again(tmp_path):
    (tmp_path / "videos").mkdir()
    path = video_path(tmp_path, 6, record_every=3)
    assert path == tmp_path / "videos/rl-video-episode-6.mp4"
    path.write_bytes(b"game")
    assert video_path(tmp_path, 6, record_every=3) == path
    assert not path.exists()
    assert path.with_name(f"{path.name}.bak").read_bytes() == b"game"
    assert video_path(tmp_path, 7, record_every=3) is None
    assert video_path(tmp_path, 0, record_every=0) is None


def test_a_gif_plays(tmp_path):
    record(tmp_path / "game.gif", annotate=True)
    details, frames = frames_of(tmp_path / "game.gif")
    assert details["codec"].startswith("gif")
    assert details["size"] == (640, 420)
    assert len(frames) == pytest.approx(71, abs=2)


@pytest.mark.parametrize(
    "name",
    [
        "2026-11-25T10:30:00.mp4",
        "a:b.mp4",
        "a:b.gif",
        "-x.mp4",
        "./-x.mp4",
        "http://x.mp4",
        "file:x.mp4",
        "100%d.mp4",
        "a b'c$.mp4",
        "2026-11-25T10:30:00/videos/rl-video-episode-0.mp4",
        "-save dir-/videos/rl-video-episode-0.mp4",
    ],
)
def test_a_video_is_written_whatever_its_name_and_its_folders(name, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    Path(name).parent.parent.mkdir(parents=True, exist_ok=True)  # of a run; "videos" is not there
    record(Path(name), frames=5)
    assert capfd.readouterr() == ("", "")
    assert len(frames_of(name)[1]) == pytest.approx(5, abs=1 if name.endswith("gif") else 0)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [tmp_path / name]


# imageio_ffmpeg leaves the broken pipe to the garbage collector.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_video_that_cannot_be_written_costs_a_line_and_the_game_goes_on(tmp_path, capfd):
    path = tmp_path / "missing" / "videos" / "game.mp4"
    assert len(record(path)) == 71
    out, err = capfd.readouterr()
    assert out == ""
    assert err.count("not written") == 1
    assert err.splitlines()[-1].startswith(f"{path} not written: ")  # ffmpeg's reason is above it


def test_without_a_path_nothing_is_recorded(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    env = create_atari_env("PongDeterministic-v4")
    with Video(None, env) as recorder:
        assert not recorder.is_on
        recorder.add_frame(None, 0.0, 0.0, [])
    assert not list(tmp_path.iterdir())


# The panel.


def is_colour(panel, colour):
    return (panel == np.array(colour, np.uint8)).all(axis=2)


@pytest.mark.parametrize("num_actions", [3, 6, 9, 18])
def test_the_bars_of_the_policy_are_as_long_as_its_probabilities_and_apart(num_actions):
    policy = {f"DOWNRIGHTFIRE{n}"[-13:]: (n + 1) / 200 if n else 0.5 for n in range(num_actions)}
    observation = np.random.default_rng(0).random((1, 42, 42))
    panel = draw_panel((420, 320, 3), observation, 3.0, deque([0.5], maxlen=75), policy)
    bars = is_colour(panel, BLUE)
    bars[:290] = False  # the heading is blue, too
    num, _, boxes, _ = cv2.connectedComponentsWithStats(bars.astype(np.uint8))
    assert num == num_actions + 1  # the first is the background
    lengths = sorted(boxes[1:, cv2.CC_STAT_WIDTH])
    expected = sorted(policy.values())
    assert lengths == pytest.approx([p / 0.5 * lengths[-1] for p in expected], abs=1.5)
    assert boxes[1:, cv2.CC_STAT_HEIGHT].min() >= 6
    text = panel[290:].max(axis=2) > 100
    assert not text[-2:].any()  # nothing runs over the edge


def curve_in(panel):
    """Rows and columns of the value's curve, whose edges are smoothed: all that is rather green."""
    area = panel[208:280].astype(int)
    rows, columns = np.nonzero(area[..., 1] - area[..., [0, 2]].max(axis=2) > 30)
    return rows + 208, columns


@pytest.mark.parametrize(("last", "row"), [(1.0, 214), (0.5, 229), (-1.0, 274)])
def test_the_value_is_a_curve_that_ends_on_the_right_at_its_height(last, row):
    values = deque(np.linspace(0, last, 75), maxlen=75)
    panel = draw_panel((420, 320, 3), np.zeros((1, 42, 42)), 0.0, values, {"NOOP": 0.0})
    rows, columns = curve_in(panel)
    assert columns.max() == pytest.approx(308, abs=2)
    assert rows[columns >= columns.max() - 2].mean() == pytest.approx(row, abs=2)
    assert rows[columns <= columns.min() + 2].mean() == pytest.approx(244, abs=2)  # of zero


def test_a_value_beyond_one_is_drawn_within_the_panel():
    values = deque([5.0, -20.0], maxlen=75)
    panel = draw_panel((420, 320, 3), np.zeros((1, 42, 42)), 0.0, values, {"NOOP": 1.0})
    rows, _ = curve_in(panel)
    assert rows.min() == pytest.approx(244 - 30 * 5 / 20, abs=2)
    assert rows.max() == pytest.approx(274, abs=2)


def test_the_panel_shows_what_the_network_sees():
    observation = np.linspace(-3, 3, 42 * 42).reshape(1, 42, 42)
    panel = draw_panel((420, 320, 3), observation, 0.0, deque([0.0], maxlen=75), {"NOOP": 1.0})
    shown = panel[52:178, 12:138]
    assert (shown[..., 0] == shown[..., 1]).all()
    small = shown[1::3, 1::3, 0]  # three times its size
    np.testing.assert_allclose(small, (observation[0] + 3) / 6 * 255, atol=1)


# A terminal of its own, and in it a job in the background, as a shell's & makes one.
IN_THE_BACKGROUND = """
import os, pty, signal, sys

leader, terminal = pty.fork()
if leader:
    sys.exit(os.waitstatus_to_exitcode(os.waitpid(leader, 0)[1]))
job = os.fork()
if not job:
    os.setpgid(0, 0)
    sys.path[:0] = ["tests", "."]
    import pathlib, test_video
    test_video.record(pathlib.Path(sys.argv[1]), frames=5)
    os._exit(7)
_, status = os.waitpid(job, os.WUNTRACED)
if os.WIFSTOPPED(status):
    os.killpg(job, signal.SIGKILL)
    os._exit(1)
os._exit(os.waitstatus_to_exitcode(status))
"""


def test_a_job_in_the_background_of_a_terminal_is_not_stopped_by_its_video(tmp_path):
    command = [sys.executable, "-c", IN_THE_BACKGROUND, tmp_path / "game.mp4"]
    assert subprocess.run(command, cwd=ROOT, timeout=100).returncode == 7
    assert len(frames_of(tmp_path / "game.mp4")[1]) == 5


def test_a_video_without_a_frame_leaves_nothing(tmp_path, capfd):
    record(tmp_path / "game.mp4", frames=0)
    assert capfd.readouterr() == ("", "")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "part", "message"),
    [
        ("game.mp4", 0.9, "it ends after 0 of 30 frames"),
        ("game.mp4", 0.5, "Error opening input"),
        ("game.gif", 0.5, "it ends after .. of 30 frames"),
        ("game.gif", 0.001, "it ends after . of 30 frames"),
    ],
)
def test_a_video_that_does_not_play_to_its_end_is_told(name, part, message, tmp_path, capfd):
    path = tmp_path / name
    record(path, frames=30)
    read_back(path, 30)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(part * len(whole))])
    with pytest.raises(RuntimeError, match=message):
        read_back(path, 30)
    assert capfd.readouterr() == ("", "")
