"""The tables of results, made from the runs' own: python tests/results_table.py results/Pong-v0

A row for each run, and mean and standard deviation of runs that differ in nothing but the seed: how
far it came, and when the mean of the last 20 test episodes first reached each of `--levels`. Then
the mean reward and the mean length of the test episodes that ended in each stretch of training
steps, `--every` so many million. With `--training` only these two, of all training episodes.
"""

import argparse
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

from harness.episodes import RECENT, TRAINING, WINDOW, moving_mean, read_episodes
from harness.settings import read_setting


def row(*cells):
    return f"| {' | '.join(cells)} |"


def first_at(episodes, level):
    """Training steps in millions and minutes when the mean of the last RECENT episodes first was
    `level`; NaN if never.
    """
    reached = moving_mean(episodes["reward"], RECENT) >= level
    reached[: RECENT - 1] = False
    if not reached.any():
        return [np.nan, np.nan]
    at = reached.argmax()
    return [episodes["num_steps"][at] / 1e6, episodes["time_s"][at] / 60]


def summary(episodes, levels):
    """The figures of one run, in the order of the table's columns."""
    reward, last = episodes["reward"], episodes[-1]
    ends = [moving_mean(reward, window)[-1] for window in (RECENT, WINDOW)]
    so_far = [last["num_steps"] / 1e6, last["time_s"] / 60, len(episodes), *ends]
    return np.array(
        [*so_far, *(figure for level in levels for figure in first_at(episodes, level))]
    )


def print_summaries(runs, tables, levels):
    figures = np.array([summary(episodes, levels) for episodes in tables])
    columns = ["run", "M steps", "minutes", "test episodes", f"last {RECENT}", f"last {WINDOW}"]
    for level in levels:
        columns += [f"{level:g} after M steps", "minutes"]
    digits = [2, 0, 0, 1, 1] + [2, 0] * len(levels)
    print(row(*columns))
    print(row(*["---"] * len(columns)))
    for run, numbers in zip(runs, figures, strict=True):
        cells = (
            "never" if np.isnan(x) else f"{x:.{d}f}" for x, d in zip(numbers, digits, strict=True)
        )
        print(row(run.name, *cells))
    if len(runs) > 1 and len({read_setting(run) for run in runs}) == 1:
        means, spreads = figures.mean(axis=0), figures.std(axis=0)
        cells = (
            "" if np.isnan(m) else f"{m:.{d}f} ± {s:.{d}f}"
            for m, s, d in zip(means, spreads, digits, strict=True)
        )
        print(row("mean ± std", *cells))
    print()


def print_stretches(runs, tables, weights, every):
    """The mean reward and length in each stretch of steps, a row for each run.

    `weights` says how many episodes each row of the tables stands for.
    """
    end = max(episodes["num_steps"][-1] for episodes in tables) / 1e6
    width = every or 1 + int(end // 12)  # of a column, so that there are at most 12
    starts = np.arange(0, end + 1e-9, width)
    for title, field, digits in (
        ("score after M steps", "reward", 1),
        ("length in steps", "length", 0),
    ):
        print(row(title, *(f"{start:g}-{start + width:g}" for start in starts)))
        print(row(*["---"] * (len(starts) + 1)))
        for run, episodes, weight in zip(runs, tables, weights, strict=True):
            column = (episodes["num_steps"] / 1e6 // width).astype(int)
            chosen = [column == n for n in range(len(starts))]
            cells = (
                f"{np.average(episodes[field][c], weights=weight[c]):.{digits}f}" if any(c) else ""
                for c in chosen
            )
            print(row(run.name, *cells))
        print()


def print_tables(args):
    if args.training:
        tables = [read_episodes(run / TRAINING) for run in args.runs]
        weights = [np.diff(episodes["episode"], prepend=-1) for episodes in tables]
    else:
        tables = [read_episodes(run) for run in args.runs]
        weights = [np.ones(len(episodes)) for episodes in tables]
        print_summaries(args.runs, tables, args.levels)
    print_stretches(args.runs, tables, weights, args.every)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", type=Path, nargs="+", help="run folders")
    parser.add_argument("--levels", type=float, nargs="*", default=[18.0, 20.0])
    parser.add_argument("--every", type=float, help="million training steps, a column's width")
    parser.add_argument("--training", action="store_true", help="all training episodes instead")
    print_tables(parser.parse_args())
