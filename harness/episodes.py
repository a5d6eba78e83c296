"""A run's test episodes: a row of episodes.csv each, read, averaged, drawn; TensorBoard."""

import io
import json
import os
import tempfile
import textwrap
import warnings
from pathlib import Path
from typing import NamedTuple

import numpy as np

from harness.utils import read_text, report_write_errors, write

TRAINING = "training.csv"  # the other table of a run; see `Episode`
WINDOW = 100  # test episodes that the mean reward is taken over
RECENT = 20  # the mean over WINDOW lags by half an hour when sixteen workers train on two cores
MOST_POINTS = 2000  # of a curve: a run of weeks is drawn as fast as one of an hour
# The options that a run's curve depends on. Runs that have them in common are seeds of one setting.
LEARNS_BY = (
    "env_name",
    "num_processes",
    "max_episode_length",
    "lr",
    "lr_schedule",
    "gamma",
    "gae_lambda",
    "entropy_coef",
    "entropy_schedule",
    "value_loss_coef",
    "max_grad_norm",
    "num_steps",
    "no_shared",
    "init",
)


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


class EpisodeLog:
    """A run's table of episodes: rows are appended one by one, and all are kept in memory.

    Args:
        run_folder: where it lies.
        num_steps: the run's training steps so far. Rows of later ones are from after the checkpoint
            that the run goes on from. They move to a .bak beside it, as does what is no row: a
            crash may have cut the last one short.
        name: the file's, episodes.csv or TRAINING.

    Raises `OSError` or `ValueError` if the file cannot be read.
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
        with report_write_errors(backup):
            if others:
                earlier = read_text(backup) if backup.exists() else ""
                write((earlier + "\n".join([*others, ""])).encode(), backup)
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
    if not path.exists():
        raise ValueError(
            f"{run} holds no test episodes yet: name run folders, or their episodes.csv"
        )
    text = read_text(path)
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


def read_setting(run: Path) -> str:
    """Return the options that a run learns by, as text to compare; its path if they are not known.

    Raises `OSError` or `ValueError`.
    """
    path = (run if run.is_dir() else run.parent) / "options.json"
    if not path.exists():
        return str(run)
    try:
        options = json.loads(read_text(path))
    except (json.JSONDecodeError, RecursionError):
        options = None
    if not isinstance(options, dict):
        raise ValueError(f"{path} does not hold a run's options")
    names = list(LEARNS_BY)
    if "linear" in (options.get("lr_schedule"), options.get("entropy_schedule")):
        names.append("max_steps")  # where it ends at zero
    if options.get("ray"):  # other machines train, too; without, these say nothing
        names += ["ray", "ray_interval"]
    options = {"entropy_schedule": "constant", **options}  # older runs do not name it
    return json.dumps({name: options.get(name) for name in names})


def _matplotlib_figure() -> object:
    """Return a new figure; matplotlib is imported here, as only one process draws."""
    if not os.access(
        os.path.expanduser("~"), os.W_OK
    ):  # where it would keep its list of fonts, and complain
        cache = Path(tempfile.gettempdir(), f"a3c-matplotlib-{os.getuid()}")
        cache.mkdir(mode=0o700, exist_ok=True)
        os.environ.setdefault("MPLCONFIGDIR", str(cache))
    import logging

    logging.getLogger("matplotlib").setLevel(logging.ERROR)  # it tells that it builds that list
    from matplotlib.figure import Figure

    return Figure(figsize=(9, 6.5), dpi=110, layout="constrained")


def _labels(runs: list[Path]) -> list[str]:
    """Return names that tell the runs apart, as matplotlib is to be given them."""
    names = [run.name or str(run) for run in runs]
    if len(set(names)) < len(names):
        names = [str(run) for run in runs]
    names = [os.fsencode(name).decode(errors="replace") for name in names]
    return [f" {name}".replace("$", r"\$") for name in names]  # it hides those that start with "_"


def _thinned(*columns: np.ndarray) -> list[np.ndarray]:
    """Return MOST_POINTS rows at most, evenly spaced, the last among them."""
    n = len(columns[0])
    rows = np.linspace(0, n - 1, min(n, MOST_POINTS)).round().astype(int)
    return [column[rows] for column in columns]


def draw_curve(episodes: np.ndarray, path: Path) -> None:
    """Draw one run's test episodes, their reward and length over training steps, to a PNG file.

    A thin line for each episode and moving means over RECENT and over WINDOW episodes; hours on a
    second axis. Raises `OSError` or `ValueError`.
    """
    figure = _matplotlib_figure()
    axes = figure.subplots(2, 1, sharex=True, height_ratios=(2, 1))
    million_steps = episodes["num_steps"] / 1e6
    for axis, column in zip(axes, ("reward", "length"), strict=True):
        values = episodes[column]
        means = [moving_mean(values, window) for window in (RECENT, WINDOW)]
        steps, values, recent, slow = _thinned(million_steps, values, *means)
        marker = "." if len(steps) == 1 else None
        axis.plot(steps, values, "C0", alpha=0.35, linewidth=0.7, label="one test episode")
        axis.plot(steps, slow, "black", linestyle=":", label=f"mean of the last {WINDOW}")
        axis.plot(
            steps, recent, "C0", label=f"mean of the last {RECENT}", linewidth=1.8, marker=marker
        )
    if million_steps[-1] > 0 and episodes["time_s"][-1] > 0:
        _add_hours(axes[0], *_thinned(million_steps, episodes["time_s"] / 3600))
    _finish(figure, axes, path)


def _add_hours(axis: object, steps: np.ndarray, hours: np.ndarray) -> None:
    axis.set_xlim(0, steps[-1])
    # From zero to far beyond the end, so that ticks outside stay outside.
    steps, hours = (np.concatenate([[0.0], e, 2 * e[-1:]]) for e in (steps, hours))
    there = lambda x: np.interp(x, steps, hours)  # noqa: E731
    back = lambda h: np.interp(h, hours, steps)  # noqa: E731
    axis.secondary_xaxis("top", functions=(there, back)).set_xlabel("hours")


def draw_comparison(runs: list[Path], path: Path) -> None:
    """Draw several runs' moving means over RECENT test episodes to a PNG file.

    Runs that have all that they learn by in common, but for the seed, become one line: their mean,
    with a band of one standard deviation. Raises `OSError` or `ValueError`.
    """
    settings: dict[str, list] = {}
    for run, label in zip(runs, _labels(runs), strict=True):
        settings.setdefault(read_setting(run), []).append((label, read_episodes(run)))
    figure = _matplotlib_figure()
    axes = figure.subplots(2, 1, sharex=True, height_ratios=(2, 1))
    for number, seeds in enumerate(settings.values()):
        style = {"color": f"C{number}", "linewidth": 1.8}
        for axis, column in zip(axes, ("reward", "length"), strict=True):
            curves = [
                _thinned(table["num_steps"] / 1e6, moving_mean(table[column], RECENT))
                for _, table in seeds
            ]
            if len(seeds) == 1:
                label, (steps, mean) = seeds[0][0], curves[0]
            else:
                label = textwrap.fill("mean of" + ",".join(label for label, _ in seeds), 60)
                start, end = max(s[0] for s, _ in curves), min(s[-1] for s, _ in curves)
                steps = np.linspace(start, end, 500)
                means = np.array([np.interp(steps, s, m) for s, m in curves])
                mean, spread = means.mean(axis=0), means.std(axis=0)
                band = {"color": f"C{number}", "alpha": 0.2, "linewidth": 0}
                axis.fill_between(steps, mean - spread, mean + spread, **band)
            axis.plot(steps, mean, label=label, marker="." if len(steps) == 1 else None, **style)
    _finish(figure, axes, path)


def _finish(figure: object, axes: np.ndarray, path: Path) -> None:
    axes[0].set_ylabel("reward of an episode")
    axes[1].set_ylabel("length in steps")
    axes[1].set_xlabel("training steps in millions")
    axes[0].legend(loc="best")
    for axis in axes:
        axis.grid(alpha=0.3)
    buffer = io.BytesIO()
    with warnings.catch_warnings(action="ignore"):  # of letters in a run's name that no font has
        figure.savefig(buffer, format="png")
    write(buffer.getvalue(), path)


class Scalars:
    """TensorBoard's event files in `folder`."""

    def __init__(self, folder: Path) -> None:
        from torch.utils.tensorboard import SummaryWriter  # here, as the package is optional

        self._folder, self._writer = folder, SummaryWriter(folder)

    def add(self, num_steps: int, **scalars: float) -> None:
        """Write each by its name, at `num_steps` training steps."""
        with report_write_errors(self._folder):
            for name, scalar in scalars.items():
                self._writer.add_scalar(name, scalar, num_steps)
            self._writer.flush()
