"""A run's episodes: its tables, written, read and averaged; its console lines; TensorBoard."""

import argparse
import contextlib
import os
import threading
from pathlib import Path
from typing import NamedTuple

import numpy as np

from harness.utils import name_in_write_errors, read_text, report_write_errors, write

TRAINING = "training.csv"  # the other table of a run; see `Episode`
WINDOW = 100  # test episodes that the mean reward is taken over
RECENT = 20  # the mean over WINDOW lags by half an hour when sixteen workers train on two cores


class Episode(NamedTuple):
    """A row of episodes.csv, a test episode; or of training.csv, a mean over training episodes.

    `time_s` and `num_steps` are the run's at the episode's end, all sessions together; `fps` is
    num_steps / time_s, start-up included. `reward` is not clipped. In training.csv, reward and
    length are means over the training episodes that ended during a test episode, some as many as
    there are training workers, and `episode` is the number of the last of them.
    """

    episode: int
    time_s: float
    num_steps: int
    fps: int
    reward: float
    length: int

    def __str__(self) -> str:
        fields = self.episode, f"{self.time_s:.1f}", *self[2:]
        return ",".join(map(str, fields))


HEADER = ",".join(Episode._fields)


def parse_episode(row: str) -> Episode:
    """Return what a row says; raise `ValueError` if it is none."""
    numbers = [float(field) for field in row.split(",")]
    if len(numbers) != len(Episode._fields) or not np.isfinite(numbers).all():
        raise ValueError(f"'{row}' is not {len(Episode._fields)} numbers")
    n, time_s, num_steps, fps, reward, length = numbers
    return Episode(int(n), time_s, int(num_steps), int(fps), reward, int(length))


def clock(seconds: float) -> str:
    """Return hours and minutes."""
    return f"{int(seconds) // 3600:02d}h {int(seconds) // 60 % 60:02d}m"


def console_line(row: Episode, mean: float, left: str, fps_now: float) -> str:
    """Return what the console says of a test episode; FPS is the mean since the run's start."""
    return (
        f"Time {clock(row.time_s)} {int(row.time_s) % 60:02d}s, num steps {row.num_steps}, "
        f"FPS {row.fps}, episode reward {row.reward:.1f}, episode length {row.length}, "
        f"mean100 {mean:.1f}{left}, FPS now {fps_now:.0f}"
    )


def progress(
    args: argparse.Namespace, session: float, num_steps: int, steps_per_second: float
) -> str:
    """Return how much of the run is done and how long the rest will take, where its end is known.

    `session` is the seconds of this session, `steps_per_second` the present rate.
    """
    ends = []  # seconds left, fraction done
    if args.max_steps:
        steps_left = max(args.max_steps - num_steps, 0)
        if steps_per_second or not steps_left:  # while workers start up there is no rate yet
            ends.append((steps_left / max(steps_per_second, 1e-3), num_steps / args.max_steps))
    if args.max_time:
        limit = 3600 * args.max_time
        ends.append((max(limit - session, 0.0), session / limit))
    if not ends:
        return ""
    left, done = min(ends)
    return f", {min(done, 1.0):.0%}, {clock(left)} left"


class EpisodeLog:
    """A run's table of episodes: rows are appended one by one, and all are kept in memory.

    Args:
        run_folder: where it lies.
        num_steps: the run's training steps so far. Rows of later ones are from after the checkpoint
            that the run goes on from. They move to a .bak beside it, as does what is no row: a
            crash may have cut the last one short.
        name: the file's, episodes.csv or TRAINING.

    Raises `OSError` or `ValueError` if the file cannot be read, or those rows cannot be moved.
    """

    def __init__(self, run_folder: Path, num_steps: int, name: str = "episodes.csv") -> None:
        self._path, backup = run_folder / name, run_folder / f"{name}.bak"
        self._unwritten: list[Episode] = []
        self.episodes: list[Episode] = []
        text = read_text(self._path) if self._path.exists() else ""
        lines = text.splitlines()
        # Even if it looks whole: its last number may be cut short.
        torn = [lines.pop()] if lines and not text.endswith("\n") else []
        if lines[:1] == [HEADER]:
            del lines[0]
        others = []
        for line in lines:
            try:
                episode = parse_episode(line)
                belongs = episode.episode >= self.next_episode and episode.num_steps <= num_steps
            except ValueError:
                belongs = False
            if belongs:
                self.episodes.append(episode)
            else:
                others.append(line)
        others += torn
        if others:  # left where they are, they would pass for the run's once it has got that far
            with name_in_write_errors(backup):
                earlier = read_text(backup) if backup.exists() else ""
                write((earlier + "\n".join([*others, ""])).encode(), backup)
            with name_in_write_errors(self._path):
                rows = map(str, self.episodes)
                write("\n".join([HEADER, *rows, ""]).encode(), self._path)

    @property
    def next_episode(self) -> int:
        """The number of the test episode that comes next."""
        return self.episodes[-1].episode + 1 if self.episodes else 0

    def append(self, episode: Episode) -> None:
        """Add a row; if it cannot be written, say so: it will be with the next one."""
        self.episodes.append(episode)
        self._unwritten.append(episode)
        with report_write_errors(self._path):
            size = self._path.stat().st_size if self._path.exists() else 0
            lines = [str(row) for row in self._unwritten]
            try:
                with open(self._path, "a", encoding="utf-8") as file:
                    file.write("\n".join([*([] if size else [HEADER]), *lines, ""]))
            except OSError:
                with contextlib.suppress(OSError):  # perhaps there is no file
                    os.truncate(self._path, size)  # half a row would spoil the next one
                raise
            self._unwritten.clear()

    def mean_reward(self) -> tuple[int, float]:
        """Return the number of last test episodes, WINDOW at most, and their mean reward or NaN."""
        last = [episode.reward for episode in self.episodes[-WINDOW:]]
        return len(last), sum(last) / len(last) if last else np.nan

    def has_reached(self, target: float | None) -> bool:
        """Return whether the last WINDOW test episodes have a mean reward of at least `target`."""
        num, mean = self.mean_reward()
        return target is not None and num == WINDOW and mean >= target


def training_row(
    row: Episode, log: EpisodeLog, num_trained: int, figures: dict[str, float]
) -> Episode:
    """Return training.csv's row for the time since the last test episode; `row` is this one's.

    `log` is training.csv, `num_trained` the number of training episodes in that time, `figures`
    their means, see `SharedState.mean_figures`.
    """
    reward, length = figures["training_reward"], figures["training_length"]
    last = log.next_episode + num_trained - 1
    return row._replace(episode=last, reward=round(reward, 2), length=round(length))


def moving_mean(values: np.ndarray, window: int) -> np.ndarray:
    """Return the mean of the last `window` values at each, of all so far while they are fewer."""
    sums = np.cumsum(np.insert(values, 0, 0.0))
    first = np.maximum(np.arange(len(values)) + 1 - window, 0)
    return (sums[1:] - sums[first]) / (np.arange(len(values)) + 1 - first)


def read_episodes(run: Path) -> np.ndarray:
    """Return the episodes of a run folder or a CSV file, (n,) with the CSV's columns as fields.

    Raises `OSError`, or `ValueError` if it holds none or something else.
    """
    path = run / "episodes.csv" if run.is_dir() else run
    text = read_text(path) if path.exists() else ""
    lines = text.splitlines()
    if len(lines) > 1 and not text.endswith("\n"):
        lines.pop()  # is being written
    if lines and lines[0] != HEADER:
        raise ValueError(f"{path} has the columns '{lines[0][:80]}', not '{HEADER}'")
    episodes = []
    for number, line in enumerate(lines[1:], start=2):
        try:
            episodes.append(parse_episode(line))
        except ValueError:
            message = f"{path}, line {number}: '{line[:80]}' is not '{HEADER}' in numbers"
            raise ValueError(message) from None
    if not episodes:
        raise ValueError(
            f"{run} holds no test episodes yet: name run folders, or their episodes.csv"
        )
    return as_table(episodes)


def as_table(episodes: list[Episode]) -> np.ndarray:
    """Return episodes as a structured array, (n,) with the CSV's columns as fields."""
    return np.array(episodes, dtype=[(name, float) for name in Episode._fields])


class Scalars:
    """TensorBoard's event files in `folder`, for a run that goes on from `num_steps` steps.

    TensorBoard then leaves out what earlier files hold of later steps.
    """

    def __init__(self, folder: Path, num_steps: int) -> None:
        self._folder, self._writer, self._purge_step = folder, None, num_steps + 1
        threading.excepthook = lambda _: None  # `add` tells what goes wrong in the writer's thread

    def add(self, num_steps: int, **scalars: float) -> None:
        """Write each by its name, at `num_steps` training steps."""
        from torch.utils.tensorboard import SummaryWriter  # here, as the package is optional

        writer, self._writer = self._writer, None  # after an error, the next one opens a new file
        with report_write_errors(self._folder):
            writer = writer or SummaryWriter(self._folder, purge_step=self._purge_step)
            for name, scalar in scalars.items():
                writer.add_scalar(name, scalar, num_steps)
            writer.flush()
            self._writer, self._purge_step = writer, None
