"""Pictures of runs: one run's learning curve, or several runs compared."""

import io
import os
import tempfile
import textwrap
import warnings
from pathlib import Path

import numpy as np

from harness.episodes import RECENT, WINDOW, moving_mean, read_episodes
from harness.settings import read_setting
from harness.utils import write

TEST_EPISODE = "one test episode"
MOST_POINTS = 2000  # of a curve: a run of weeks is drawn as fast as one of an hour


def _matplotlib_figure() -> object:
    """Return a new figure; matplotlib is imported here, as only one process draws.

    Its own font is enough. To list the system's takes ten seconds on a Mac, longer than a stopped
    run may last. So the list lies in a folder of ours, which may also be written where a home may
    not.
    """
    cache = Path(tempfile.gettempdir(), f"a3c-matplotlib-{os.getuid()}")
    cache.mkdir(mode=0o700, exist_ok=True)
    os.environ |= {"MPL_IGNORE_SYSTEM_FONTS": "1", "MPLCONFIGDIR": str(cache)}
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
    names = [name.replace("$", r"\$") for name in names]
    return [f" {name}" if name.startswith("_") else name for name in names]  # it hides those


def _thinned(*columns: np.ndarray) -> list[np.ndarray]:
    """Return MOST_POINTS rows at most, evenly spaced, the last among them."""
    n = len(columns[0])
    rows = np.linspace(0, n - 1, min(n, MOST_POINTS)).round().astype(int)
    return [column[rows] for column in columns]


def draw_curve(episodes: np.ndarray, path: Path, what: str = TEST_EPISODE) -> None:
    """Draw one run's test episodes, their reward and length over training steps, to a PNG file.

    A thin line through all episodes, and moving means over RECENT and over WINDOW of them; hours on
    a second axis. `what` is the legend's word for one. Raises `OSError` or `ValueError`.
    """
    figure = _matplotlib_figure()
    axes = figure.subplots(2, 1, sharex=True, height_ratios=(2, 1))
    million_steps = episodes["num_steps"] / 1e6
    for axis, column in zip(axes, ("reward", "length"), strict=True):
        values = episodes[column]
        means = [moving_mean(values, window) for window in (RECENT, WINDOW)]
        steps, values, recent, slow = _thinned(million_steps, values, *means)
        marker = "." if len(steps) == 1 else None
        axis.plot(steps, values, "C0", alpha=0.35, linewidth=0.7, label=what)
        axis.plot(steps, slow, "black", linestyle=":", label=f"mean of the last {WINDOW}")
        axis.plot(
            steps, recent, "C0", label=f"mean of the last {RECENT}", linewidth=1.8, marker=marker
        )
    if million_steps[-1] > 0 and episodes["time_s"][-1] > 0:
        _add_hours(axes[0], *_thinned(million_steps, episodes["time_s"] / 3600))
    _finish(figure, axes, path)


def _add_hours(axis: object, steps: np.ndarray, hours: np.ndarray) -> None:
    from matplotlib.ticker import MaxNLocator

    axis.set_xlim(0, steps[-1])
    # From zero to far beyond the end, so that ticks outside stay outside.
    steps, hours = (np.concatenate([[0.0], e, 2 * e[-1:]]) for e in (steps, hours))
    there = lambda x: np.interp(x, steps, hours)  # noqa: E731
    back = lambda h: np.interp(h, hours, steps)  # noqa: E731
    top = axis.secondary_xaxis("top", functions=(there, back))
    top.set_xlabel("hours")
    top.xaxis.set_major_locator(MaxNLocator(6))  # more would touch: 0.0025, 0.005 ...


def draw_comparison(runs: list[Path], path: Path) -> None:
    """Draw several runs' moving means over RECENT test episodes to a PNG file.

    Runs that have all that they learn by in common, but for the seed, become one line: their mean,
    with a band of one standard deviation. Raises `OSError` or `ValueError`.
    """
    settings: dict[str, list] = {}
    for run, label in zip(runs, _labels(runs), strict=True):
        settings.setdefault(read_setting(run), []).append((label, read_episodes(run)))
    lines = []
    for seeds in settings.values():
        start = max(table["num_steps"][0] for _, table in seeds)
        end = min(table["num_steps"][-1] for _, table in seeds)
        lines += [seeds] if start < end else [[seed] for seed in seeds]  # no steps in common
    figure = _matplotlib_figure()
    axes = figure.subplots(2, 1, sharex=True, height_ratios=(2, 1))
    for number, seeds in enumerate(lines):
        style = {"color": f"C{number}", "linewidth": 1.8}
        for axis, column in zip(axes, ("reward", "length"), strict=True):
            curves = [
                _thinned(table["num_steps"] / 1e6, moving_mean(table[column], RECENT))
                for _, table in seeds
            ]
            if len(seeds) == 1:
                label, (steps, mean) = seeds[0][0], curves[0]
            else:
                label = textwrap.fill("mean of " + ", ".join(label for label, _ in seeds), 60)
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
