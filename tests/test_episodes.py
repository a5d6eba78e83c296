import json
import os
import random
import re
import subprocess
import sys
import time
from pathlib import Path

import cv2
import numpy as np
import pytest
from matplotlib.figure import Figure
from test_utils import files_end_at

import main
import test as evaluator
from harness.episodes import (
    HEADER,
    WINDOW,
    Episode,
    EpisodeLog,
    Scalars,
    as_table,
    draw_comparison,
    draw_curve,
    moving_mean,
    read_episodes,
    read_setting,
)


def episode(n, reward=1.5):
    """The n-th episode of a run that makes 100 steps in each."""
    return Episode(n, 12.25 * n, 100 * n, 8, reward, 900 + n)


def text_of(*numbers):
    """What episodes.csv holds after these episodes."""
    return "".join(f"{line}\n" for line in (HEADER, *map(episode, numbers)))


@pytest.fixture
def log(tmp_path):
    """The log of a run, with three rows in its file."""
    log = EpisodeLog(tmp_path, 0)
    for n in range(3):
        log.append(episode(n))
    return log


# Writing episodes.csv.


def test_a_row_holds_an_episode_under_its_names(log, tmp_path):
    lines = (tmp_path / "episodes.csv").read_text().splitlines()
    assert lines[0] == "episode,time_s,num_steps,fps,reward,length"
    assert lines[2] == "1,12.2,100,8,1.5,901"
    table = read_episodes(tmp_path)
    assert table["num_steps"].tolist() == [0, 100, 200]
    assert table["length"].tolist() == [900, 901, 902]


def test_a_log_goes_on_from_its_file(log, tmp_path):
    again = EpisodeLog(tmp_path, 200)
    assert [row.episode for row in again.episodes] == [0, 1, 2]
    assert again.mean_reward() == log.mean_reward() == (3, 1.5)
    again.append(episode(3))
    assert (tmp_path / "episodes.csv").read_text() == text_of(0, 1, 2, 3)
    assert not (tmp_path / "episodes.csv.bak").exists()


def test_a_row_is_appended_to_a_long_file_which_is_not_written_again(tmp_path):
    path, n = tmp_path / "episodes.csv", 80_000
    path.write_text(text_of(*range(n)))
    before = path.stat()
    log = EpisodeLog(tmp_path, 100 * n)
    assert len(log.episodes) == n
    assert path.stat().st_mtime_ns == before.st_mtime_ns  # opening it writes nothing
    log.append(episode(n))
    after = path.stat()
    assert after.st_ino == before.st_ino
    assert after.st_size - before.st_size == len(f"{episode(n)}\n")
    with open(path, "rb") as file:
        file.seek(before.st_size)
        assert file.read().decode() == f"{episode(n)}\n"


def test_rows_after_the_checkpoint_move_to_the_backup(log, tmp_path):
    log.append(episode(3))
    again = EpisodeLog(tmp_path, 150)
    assert len(again.episodes) == 2
    again.append(episode(2))
    assert (tmp_path / "episodes.csv").read_text() == text_of(0, 1, 2)
    backup = tmp_path / "episodes.csv.bak"
    assert backup.read_text() == f"{episode(2)}\n{episode(3)}\n"
    EpisodeLog(tmp_path, 300)
    assert backup.read_text().count("\n") == 2
    EpisodeLog(tmp_path, 0)
    assert backup.read_text().splitlines() == [str(episode(n)) for n in (2, 3, 1, 2)]


@pytest.mark.parametrize("cut", range(len(str(episode(2))) + 1))
def test_a_torn_last_row_moves_to_the_backup_wherever_it_was_cut(log, tmp_path, cut):
    path = tmp_path / "episodes.csv"
    torn = str(episode(2))[:cut]
    path.write_text(text_of(0, 1) + torn)
    again = EpisodeLog(tmp_path, 1000)
    assert len(again.episodes) == 2
    again.append(episode(2))
    assert path.read_text() == text_of(0, 1, 2)
    if torn:
        assert (tmp_path / "episodes.csv.bak").read_text() == torn + "\n"


@pytest.mark.parametrize("text", ["", HEADER[:9], HEADER, HEADER + "\n"])
def test_a_file_without_rows_is_begun_anew(text, tmp_path):
    (tmp_path / "episodes.csv").write_text(text)
    EpisodeLog(tmp_path, 0).append(episode(0))
    assert (tmp_path / "episodes.csv").read_text() == text_of(0)


def test_a_row_that_no_disk_takes_costs_a_line_and_is_written_with_the_next(log, tmp_path, capsys):
    path = tmp_path / "episodes.csv"
    for n in 3, 4:
        with files_end_at(path.stat().st_size + 7):  # there is room for a part of the row
            log.append(episode(n))
        assert capsys.readouterr().err == f"{path} not written: File too large\n"
        assert path.read_text() == text_of(0, 1, 2)
    assert len(log.episodes) == 5
    log.append(episode(5))
    assert path.read_text() == text_of(*range(6))


def test_the_first_row_may_fail_too(tmp_path, capsys):
    path, log = tmp_path / "episodes.csv", EpisodeLog(tmp_path, 0)
    with files_end_at(len(HEADER) + 4):
        log.append(episode(0))
    assert path.read_text() == ""
    path.unlink()
    path.mkdir()  # in the way
    log.append(episode(1))
    assert capsys.readouterr().err.count("not written: ") == 2
    path.rmdir()
    log.append(episode(2))
    assert path.read_text() == text_of(0, 1, 2)


def test_the_mean_reward_is_that_of_the_last_hundred_episodes(tmp_path):
    log = EpisodeLog(tmp_path, 0)
    for n, reward in enumerate([100.0, 100.0, *range(WINDOW)]):
        log.append(episode(n, reward))
    assert log.mean_reward() == (WINDOW, 49.5)


def test_the_mean_of_less_than_a_hundred_episodes_reaches_no_target(tmp_path):
    log = EpisodeLog(tmp_path, 0)
    assert np.isnan(log.mean_reward()[1])
    assert not log.has_reached(-100.0)
    for n in range(WINDOW - 1):
        log.append(episode(n, 5.0))
    assert not log.has_reached(-100.0)
    log.append(episode(WINDOW - 1, 5.0))
    assert log.has_reached(5.0)
    assert not log.has_reached(5.1)
    assert not log.has_reached(None)


def test_a_target_of_zero_is_a_target(tmp_path):
    log = EpisodeLog(tmp_path, 0)
    for n in range(WINDOW):
        log.append(episode(n, 0.0))
    assert log.has_reached(0.0)


# Reading.


def test_the_moving_mean_is_of_all_so_far_and_then_of_a_hundred():
    values = np.arange(250.0)
    means = moving_mean(values, 100)
    assert means[0] == 0
    assert means[9] == 4.5
    assert means[99] == 49.5
    assert means[249] == np.arange(150, 250).mean()


def test_a_row_that_is_being_written_is_not_read_yet(log, tmp_path):
    with open(tmp_path / "episodes.csv", "a") as file:
        file.write("3,36.7,3")
    assert len(read_episodes(tmp_path)) == 3


NONE_YET = "holds no test episodes yet: name run folders, or their episodes.csv"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", NONE_YET),
        (HEADER, NONE_YET),
        (HEADER + "\n", NONE_YET),
        (text_of(0, 1) + "2,lost\n" + f"{episode(3)}\n", "episodes.csv, line 4: '2,lost' is not "),
        (text_of(0) + "\n" + f"{episode(1)}\n", "episodes.csv, line 3: '' is not '" + HEADER),
        (text_of(0) + "1,12.2,100,8,nan,901\n", "line 3: '1,12.2,100,8,nan,901' is not "),
        (text_of(0) + "1,12.2,100,8,1.5,901,7\n", "line 3: '1,12.2,100,8,1.5,901,7' is not "),
        (text_of(0).replace("reward", "score"), f"fps,score,length', not '{HEADER}'"),
        ("episode,reward\n0,-21\n", f"has the columns 'episode,reward', not '{HEADER}'"),
        ("time;price\n1;2\n", f"has the columns 'time;price', not '{HEADER}'"),
        ("no table at all", f"has the columns 'no table at all', not '{HEADER}'"),
        (b"\xff\xd8\xff\xe0 a picture\n", "episodes.csv is not a text file"),
    ],
)
@pytest.mark.parametrize("named", ["folder", "file"])
def test_what_is_wrong_with_a_table_is_said_with_its_place(named, text, message, tmp_path):
    path = tmp_path / "episodes.csv"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match=re.escape(message)) as refused:
        read_episodes(tmp_path if named == "folder" else path)
    assert "\n" not in str(refused.value)


def test_a_long_row_of_another_table_is_not_said_whole(tmp_path):
    (tmp_path / "episodes.csv").write_text("price," * 10_000 + "\n")
    with pytest.raises(ValueError, match="has the columns") as refused:
        read_episodes(tmp_path)
    assert len(str(refused.value)) < 300


def test_a_device_or_a_missing_folder_holds_no_episodes(tmp_path):
    for path in Path("/dev/null"), tmp_path, tmp_path / "missing":
        with pytest.raises(ValueError, match=NONE_YET):
            read_episodes(path)


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


LINEAR = {"lr_schedule": "linear", "max_steps": 1_000_000}


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ({}, {"seed": 2}, True),
        ({}, {"tensorboard": True}, True),
        ({}, {"checkpoint_interval": 5.0}, True),
        ({}, {"record_every": 0, "annotate": True}, True),
        ({}, {"max_steps": 5_000_000, "max_time": 2.0, "target_reward": 3.0}, True),
        ({}, {"save_dir": "other", "an_option_to_come": 3}, True),
        (LINEAR, LINEAR | {"seed": 2}, True),
        (LINEAR, LINEAR | {"max_steps": 2_000_000}, False),
        ({}, LINEAR, False),
        *[
            ({}, {name: value}, False)
            for name, value in {
                "env_name": "Breakout-v0",
                "num_processes": 5,
                "max_episode_length": 1000,
                "lr": 0.5,
                "gamma": 0.9,
                "gae_lambda": 0.0,
                "entropy_coef": 0.0,
                "entropy_schedule": "linear",
                "value_loss_coef": 1.0,
                "max_grad_norm": 40.0,
                "num_steps": 5,
                "no_shared": True,
            }.items()
        ],
    ],
)
def test_runs_that_learn_alike_are_seeds_of_one_setting(one, other, same, tmp_path):
    runs = [write_run(tmp_path / str(n), episodes=1, **c) for n, c in enumerate((one, other))]
    assert (read_setting(runs[0]) == read_setting(runs[1])) is same
    assert read_setting(runs[0] / "episodes.csv") == read_setting(runs[0])


def test_a_run_of_a_version_without_a_schedule_of_the_entropy_had_a_constant_one(tmp_path):
    runs = [write_run(tmp_path / str(n), episodes=1) for n in range(2)]
    path = runs[0] / "options.json"
    options = json.loads(path.read_text())
    del options["entropy_schedule"]
    path.write_text(json.dumps(options))
    assert read_setting(runs[0]) == read_setting(runs[1])


def test_runs_without_known_options_are_settings_of_their_own(tmp_path):
    runs = [tmp_path / "one", tmp_path / "two"]
    assert read_setting(runs[0]) != read_setting(runs[1])


@pytest.mark.parametrize(
    "text", ["[1, 2]", "null", '"lr"', "3", '{"lr": 0.5', "", "[" * 100_000, b"\xff"]
)
def test_options_that_are_none_are_refused_in_one_line(text, tmp_path):
    run = write_run(tmp_path / "run", episodes=1)
    (run / "options.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(
        ValueError, match=r"options.json (does not hold a run's|is not a text)"
    ) as e:
        read_setting(run)
    assert "\n" not in str(e.value)


# Drawing.


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


@pytest.mark.parametrize(
    ("runs", "names"),
    [
        (("runs/Pong-v0-1", "results/Breakout"), ["Pong-v0-1", "Breakout"]),
        (("runs/Pong-v0-1", "results/Pong-v0-1"), ["runs/Pong-v0-1", "results/Pong-v0-1"]),
        (("$x_{$", "$y$"), ["$x_{$", "$y$"]),
        (("_hidden", "_too"), ["_hidden", "_too"]),
        (("走る", "tab\tand\\"), ["走る", "tab\tand\\"]),
        ((os.fsdecode(b"byte\xff"), "b"), ["byte\N{REPLACEMENT CHARACTER}", "b"]),
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


def test_files_of_one_name_are_told_apart_by_their_folders(tmp_path, monkeypatch, drawn):
    monkeypatch.chdir(tmp_path)
    folders = [write_run(Path(f"run{n}"), lr=0.1 * n, episodes=30) for n in range(2)]
    draw_comparison([folder / "episodes.csv" for folder in folders], Path("comparison.png"))
    assert names_of(drawn[0]) == ["run0/episodes.csv", "run1/episodes.csv"]


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


def test_tensorboard_finds_each_figure_at_its_step(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    scalars = Scalars(tmp_path)
    scalars.add(100, reward=-21.0, entropy=1.5)
    scalars.add(200, reward=-20.0)
    events = accumulator.EventAccumulator(str(tmp_path)).Reload()
    assert [(e.step, e.value) for e in events.Scalars("reward")] == [(100, -21.0), (200, -20.0)]
    assert [(e.step, e.value) for e in events.Scalars("entropy")] == [(100, 1.5)]
