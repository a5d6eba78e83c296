import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import cv2
import numpy as np
import pytest
from matplotlib.figure import Figure
from test_episodes import episode
from test_utils import files_end_at

import main
import test as evaluator
from harness.curves import draw_comparison, draw_curve
from harness.episodes import HEADER, WINDOW, Episode, as_table, moving_mean, read_episodes


def write_run(folder, seed=1, slope=42.0, episodes=300, **changes):
    """A run folder whose reward rises from -21 by `slope`, with some of the options changed."""
    folder.mkdir(parents=True)
    rng = random.Random(seed)
    rows = [
        Episode(n, n * 36.0, n * 10_000, 277, -21 + slope * n / 300 + rng.uniform(-1, 1), 1000 + n)
        for n in range(episodes)
    ]
    lines = [HEADER, *map(str, rows)]
    (folder / "episodes.csv").write_text("".join(f"{line}\n" for line in lines))
    options = vars(main.parse_args([])) | {"seed": seed} | changes
    (folder / "options.json").write_text(json.dumps(options))
    return folder


@pytest.fixture
def drawn(monkeypatch):
    """The matplotlib figures that have been written."""
    figures, savefig = [], Figure.savefig

    def keep(figure, *args, **kwargs):
        savefig(figure, *args, **kwargs)
        figures.append(figure)

    monkeypatch.setattr(Figure, "savefig", keep)
    return figures


def lines_of(axis):
    return {line.get_label().strip(): np.array(line.get_data()) for line in axis.lines}


def names_of(figure):
    """What its legend says, as it is seen."""
    legend = figure.axes[0].get_legend()
    return [text.get_text().replace(r"\$", "$").strip() for text in legend.get_texts()]


def is_picture(path):
    picture = cv2.imread(str(path))
    return picture.shape == (715, 990, 3) and picture.std() > 10


def test_the_learning_curve_shows_each_episode_and_its_moving_means(tmp_path, drawn):
    run = write_run(tmp_path / "run")
    table = read_episodes(run)
    draw_curve(table, tmp_path / "curve.png")
    assert is_picture(tmp_path / "curve.png")
    reward, length = drawn[0].axes
    for axis, column in (reward, "reward"), (length, "length"):
        lines = lines_of(axis)
        assert list(lines) == ["one test episode", "mean of the last 100", "mean of the last 20"]
        for steps, _ in lines.values():
            np.testing.assert_allclose(steps, np.arange(300) * 0.01)
        np.testing.assert_array_equal(lines["one test episode"][1], table[column])
        for window in 20, 100:
            mean = lines[f"mean of the last {window}"][1]
            assert mean[5] == pytest.approx(table[column][:6].mean())
            assert mean[250] == pytest.approx(table[column][251 - window : 251].mean())
    assert reward.get_ylabel() == "reward of an episode"
    assert length.get_ylabel() == "length in steps"
    assert length.get_xlabel() == "training steps in millions"


def test_the_hours_of_a_curve_stand_above_the_steps_that_were_made_in_them(tmp_path, drawn):
    episodes = [Episode(n, 3600.0 * n, 1_000_000 * n * n, 277, 0.0, 100) for n in range(5)]
    draw_curve(as_table(episodes), tmp_path / "curve.png")
    (hours,) = drawn[0].axes[0].child_axes
    assert hours.get_xlabel() == "hours"
    for n in range(1, 5):  # the place of n^2 million steps
        (x, _), (same_x, _) = (
            axis.transData.transform((value, 0))
            for axis, value in ((hours, n), (drawn[0].axes[0], n * n))
        )
        assert x == pytest.approx(same_x, abs=1)


@pytest.mark.parametrize("num", [1, 2])
def test_a_curve_of_the_first_episodes_is_drawn_too(num, tmp_path, drawn):
    draw_curve(
        as_table([Episode(n, 0.0, 0, 0, -21.0, 900) for n in range(num)]), tmp_path / "a.png"
    )
    assert is_picture(tmp_path / "a.png")


def test_a_curve_of_weeks_is_drawn_about_as_fast_as_one_of_hours(tmp_path, drawn):
    table = as_table([episode(n, reward=n % 41 - 20.0) for n in range(80_000)])

    def seconds(num):
        start = time.process_time()
        draw_curve(table[:num], tmp_path / "curve.png")
        return time.process_time() - start

    seconds(2)  # imports and fonts
    assert seconds(80_000) < 3 * seconds(2_000)
    line = lines_of(drawn[1].axes[0])["mean of the last 100"]
    assert line[0][-1] == table["num_steps"][-1] / 1e6  # the last episode is always there
    assert line[1][-1] == pytest.approx(table["reward"][-WINDOW:].mean())


def test_seeds_of_one_setting_become_one_line_with_a_band(tmp_path, drawn):
    runs = [write_run(tmp_path / f"seed{n}", seed=n) for n in range(3)]
    other = write_run(tmp_path / "flat", slope=5.0, lr=0.5)
    draw_comparison([*runs, other], tmp_path / "comparison.png")
    assert is_picture(tmp_path / "comparison.png")
    reward, length = drawn[0].axes
    assert names_of(drawn[0]) == ["mean of seed0, seed1, seed2", "flat"]
    steps, mean = lines_of(reward)["mean of seed0, seed1, seed2"]
    of_seeds = [moving_mean(read_episodes(run)["reward"], 20) for run in runs]
    there = np.interp(steps, np.arange(300) * 0.01, np.mean(of_seeds, axis=0))
    np.testing.assert_allclose(mean, there, atol=1e-9)
    (band,) = reward.collections
    x, y = band.get_paths()[0].vertices.T
    spread = np.interp(steps[300], np.arange(300) * 0.01, np.std(of_seeds, axis=0))
    assert np.ptp(y[x == steps[300]]) == pytest.approx(2 * spread, rel=0.01)  # one to either side
    flat = lines_of(reward)["flat"][1]
    np.testing.assert_allclose(flat, moving_mean(read_episodes(other)["reward"], 20))
    assert len(length.lines) == 2


def test_seeds_that_have_no_steps_in_common_are_lines_of_their_own(tmp_path, drawn):
    runs = [write_run(tmp_path / f"seed{n}", seed=n, episodes=3) for n in range(2)]
    table = (runs[1] / "episodes.csv").read_text().splitlines()
    rows = [Episode(n, 99.0, 30_000 + n, 277, 1.0, 9) for n in range(3)]
    (runs[1] / "episodes.csv").write_text("\n".join([table[0], *map(str, rows), ""]))
    draw_comparison(runs, tmp_path / "comparison.png")
    assert names_of(drawn[0]) == ["seed0", "seed1"]
    assert not drawn[0].axes[0].collections


@pytest.mark.parametrize(
    ("runs", "names"),
    [
        (("runs/Pong-v0-1", "results/Breakout"), ["Pong-v0-1", "Breakout"]),
        (("runs/Pong-v0-1", "results/Pong-v0-1"), ["runs/Pong-v0-1", "results/Pong-v0-1"]),
        (("$x_{$", "$y$"), ["$x_{$", "$y$"]),
        (("_hidden", "_too"), ["_hidden", "_too"]),
        (("走る", "tab\tand\\"), ["走る", "tab\tand\\"]),
        pytest.param(
            *((os.fsdecode(b"byte\xff"), "b"), ["byte\N{REPLACEMENT CHARACTER}", "b"]),
            marks=pytest.mark.skipif(sys.platform == "darwin", reason="macOS has no such names"),
        ),
    ],
)
def test_runs_are_compared_under_names_that_tell_them_apart(
    runs, names, tmp_path, monkeypatch, drawn, recwarn
):
    monkeypatch.chdir(tmp_path)
    folders = [write_run(Path(run), lr=0.1 * n, episodes=30) for n, run in enumerate(runs, start=1)]
    draw_comparison(folders, Path("comparison.png"))
    assert is_picture("comparison.png")
    assert names_of(drawn[0]) == names
    assert not recwarn.list


def test_a_home_that_cannot_be_written_is_no_news(tmp_path):
    run = write_run(tmp_path / "Löffel", episodes=30)
    home = {"HOME": "/dev/null/home", "TMPDIR": str(tmp_path)}
    terminal = {"PYTHONIOENCODING": "ascii", "LANG": "C"}
    elsewhere = "MPLCONFIGDIR", "XDG_CACHE_HOME", "XDG_CONFIG_HOME"
    environment = {k: v for k, v in os.environ.items() if k not in elsewhere} | home | terminal
    result = subprocess.run(
        [sys.executable, evaluator.__file__, "--plot", run],
        **{"cwd": tmp_path, "env": environment, "capture_output": True, "timeout": 100},
    )
    assert (result.returncode, result.stderr) == (0, b"")
    assert result.stdout == b"comparison.png drawn\n"
    assert is_picture(tmp_path / "comparison.png")


def test_a_curve_that_cannot_be_written_leaves_the_one_before(tmp_path):
    path = tmp_path / "curve.png"
    draw_curve(as_table([episode(0), episode(1)]), path)
    before = path.read_bytes()
    with files_end_at(1000), pytest.raises(OSError, match="File too large"):
        draw_curve(as_table([episode(n) for n in range(9)]), path)
    assert path.read_bytes() == before
