import errno
import os
import re
import resource
import threading
from pathlib import Path

import numpy as np
import pytest
from test_utils import files_end_at

from harness.episodes import (
    HEADER,
    WINDOW,
    Episode,
    EpisodeLog,
    Scalars,
    console_line,
    moving_mean,
    read_episodes,
)
from harness.utils import write


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


@pytest.mark.parametrize("name", ["episodes.csv", "episodes.csv.bak"])
def test_where_rows_after_the_checkpoint_cannot_move_nothing_does(log, name, tmp_path, monkeypatch):
    log.append(episode(3))
    before = (tmp_path / "episodes.csv").read_text()

    def write_unless_full(data, path):
        if path.name == name:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(data, path)

    monkeypatch.setattr("harness.episodes.write", write_unless_full)
    with pytest.raises(OSError, match=rf"^cannot write .*/{name}: No space left on device$"):
        EpisodeLog(tmp_path, 150)
    assert (tmp_path / "episodes.csv").read_text() == before


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


def test_a_first_row_for_which_no_file_can_be_opened_costs_a_line_with_the_reason(tmp_path, capsys):
    log = EpisodeLog(tmp_path, 0)
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, limits[1]))
    try:
        log.append(episode(0))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert capsys.readouterr().err.endswith("episodes.csv not written: Too many open files\n")


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
        log.append(episode(n, 0.0))
    assert not log.has_reached(-100.0)
    log.append(episode(WINDOW - 1, 0.0))
    assert log.has_reached(0.0)
    assert not log.has_reached(0.1)
    assert not log.has_reached(None)


def test_a_line_of_the_console_has_hours_minutes_and_seconds():
    row = Episode(245, 8015.9, 13_893_506, 1733, 21.0, 2641)
    line = "Time 02h 13m 35s, num steps 13893506, FPS 1733, episode reward 21.0, "
    line += "episode length 2641, mean100 18.5, FPS now 1828"
    assert console_line(row, 18.5, "", 1828.0) == line


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


def test_tensorboard_finds_each_figure_at_its_step(tmp_path, monkeypatch):
    monkeypatch.setattr(threading, "excepthook", threading.excepthook)  # to have it back
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    scalars = Scalars(tmp_path, 0)
    scalars.add(100, reward=-21.0, entropy=1.5)
    scalars.add(200, reward=-20.0)
    events = accumulator.EventAccumulator(str(tmp_path)).Reload()
    assert [(e.step, e.value) for e in events.Scalars("reward")] == [(100, -21.0), (200, -20.0)]
    assert [(e.step, e.value) for e in events.Scalars("entropy")] == [(100, 1.5)]


def test_tensorboard_leaves_out_what_came_after_the_checkpoint(tmp_path, monkeypatch):
    monkeypatch.setattr(threading, "excepthook", threading.excepthook)  # to have it back
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    before_the_kill = Scalars(tmp_path, 0)
    for num_steps in 100, 200, 300, 400:
        before_the_kill.add(num_steps, reward=-21.0)
    resumed = Scalars(tmp_path, 200)
    for num_steps in 250, 350:
        resumed.add(num_steps, reward=5.0)
    events = accumulator.EventAccumulator(str(tmp_path)).Reload().Scalars("reward")
    assert [e.step for e in events] == [100, 200, 250, 350]


def test_tensorboard_goes_on_when_a_full_disk_has_space_again(tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(threading, "excepthook", threading.excepthook)  # to have it back
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    scalars = Scalars(tmp_path, 0)
    scalars.add(100, reward=-21.0)
    (events,) = tmp_path.iterdir()
    with files_end_at(events.stat().st_size + 3):
        scalars.add(200, reward=-20.0)
    scalars.add(300, reward=-19.0)
    scalars.add(400, reward=-18.0)
    errors = capfd.readouterr().err
    assert errors == f"{tmp_path} not written: File too large\n"
    events = accumulator.EventAccumulator(str(tmp_path)).Reload()
    assert {100, 300, 400} <= {e.step for e in events.Scalars("reward")}
