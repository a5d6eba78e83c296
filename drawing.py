"""Pictures: videos of the game, plain or with the agent's mind beside it, and the learning curve."""

import io
import json
import logging
import time
from collections import deque
from pathlib import Path
from typing import Self

import cv2
import gym
import numpy as np
import torch
from imageio_ffmpeg import count_frames_and_secs, write_frames
from torch import Tensor

from checkpoint import WINDOW, write
from workers import attempt

NO_SETTING = ("seed", "save_dir", "resume", "max_time", "target_reward", "record_every", "annotate")
RECENT = 20  # test episodes; the mean over WINDOW of them lags an hour behind when sixteen processes train
WHITE, GREY, GREEN, BLUE = (235, 235, 235), (120, 120, 120), (110, 220, 110), (110, 170, 255)


def moving_mean(values: np.ndarray, window: int) -> np.ndarray:
    """Return the mean of the last `window` values at each, of all so far while they are fewer."""
    sums = np.cumsum(np.insert(values, 0, 0.0))
    first = np.maximum(np.arange(len(values)) + 1 - window, 0)
    return (sums[1:] - sums[first]) / (np.arange(len(values)) + 1 - first)


def read_episodes(run: Path) -> tuple[str, np.ndarray]:
    """Return what the run learns by, but for the seed, and its episodes, (n,) with the CSV's columns as fields.

    `run` is a run folder or a CSV file. Raises `ValueError` if there is no episode in it.
    """
    folder, csv = (run, run / "episodes.csv") if run.is_dir() else (run.parent, run)
    try:
        rows = csv.read_text().splitlines()
        episodes = np.atleast_1d(np.genfromtxt(rows, delimiter=",", names=True))
        numbers = [episodes[name] for name in ("num_steps", "time_s", "reward", "length")]
    except (OSError, ValueError):
        numbers = []
    if not np.size(numbers) or not np.isfinite(numbers).all():
        raise ValueError(f"{run} holds no test episodes yet: name run folders that do, or their episodes.csv")
    options = folder / "options.json"
    setting = json.loads(options.read_text()) if options.exists() else {"run": str(run)}
    if setting.get("lr_schedule") != "linear":  # there, the run's end sets the learning rate
        setting.pop("max_steps", None)
    return json.dumps({name: value for name, value in setting.items() if name not in NO_SETTING}), episodes


def draw_curves(runs: list[Path], path: Path) -> None:
    """Draw the test episodes' reward and length over training steps to a PNG file.

    One run: a thin line for each episode and its moving means, over RECENT and over WINDOW episodes, with hours on a
    second axis. Several: the means over RECENT, and where runs have all options but the seed in common, the mean over
    them with a band of one standard deviation.
    Raises `OSError` or `ValueError`.
    """
    logging.getLogger("matplotlib.font_manager").setLevel(logging.ERROR)  # it tells that it builds a cache
    from matplotlib.figure import Figure  # here, as every process imports this module and only one draws

    groups: dict[str, list] = {}
    for run in runs:
        setting, episodes = read_episodes(run)
        groups.setdefault(setting, []).append((run, episodes))
    figure = Figure(figsize=(9, 6.5), dpi=110, layout="constrained")
    axes = figure.subplots(2, 1, sharex=True, height_ratios=(2, 1))
    for number, group in enumerate(groups.values()):
        colour, (run, episodes) = f"C{number}", group[0]
        for axis, column in zip(axes, ("reward", "length"), strict=True):
            curves = [(e["num_steps"] / 1e6, moving_mean(e[column], RECENT)) for _, e in group]
            if len(group) == 1:
                (steps, mean), label = curves[0], run.name if len(groups) > 1 else f"mean of the last {RECENT}"
                if len(groups) == 1:
                    axis.plot(steps, episodes[column], colour, alpha=0.35, linewidth=0.7, label="one test episode")
                    slow = moving_mean(episodes[column], WINDOW)
                    axis.plot(steps, slow, "black", linestyle=":", label=f"mean of the last {WINDOW}")
            else:
                steps = np.linspace(max(s[0] for s, _ in curves), min(s[-1] for s, _ in curves), 500)
                several = np.array([np.interp(steps, s, m) for s, m in curves])
                mean, spread = several.mean(axis=0), several.std(axis=0)
                label = "mean of " + ", ".join(run.name for run, _ in group)
                axis.fill_between(steps, mean - spread, mean + spread, color=colour, alpha=0.2, linewidth=0)
            axis.plot(steps, mean, colour, linewidth=1.8, label=label, marker="." if len(steps) == 1 else None)
    axes[0].set_ylabel("reward of a test episode")
    axes[1].set_ylabel("length in steps")
    axes[1].set_xlabel("training steps in millions")
    axes[0].legend(loc="best")
    for axis in axes:
        axis.grid(alpha=0.3)
    if len(runs) == 1 and episodes["num_steps"][-1] > 0:
        axes[0].set_xlim(0, episodes["num_steps"][-1] / 1e6)
        # From zero to far beyond the end, so that ticks outside stay outside.
        ends = [np.concatenate([[0.0], e, 2 * e[-1:]]) for e in (episodes["num_steps"], episodes["time_s"])]
        steps, hours = ends[0] / 1e6, ends[1] / 3600
        functions = (lambda x: np.interp(x, steps, hours), lambda h: np.interp(h, hours, steps))
        axes[0].secondary_xaxis("top", functions=functions).set_xlabel("hours")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    write(buffer.getvalue(), path)


class Scalars:
    """TensorBoard's event files in `folder`, or nothing; a set of scalars is due `every` so many seconds."""

    def __init__(self, folder: Path | None, every: float = 0.0) -> None:
        self._folder, self._every, self._next, self._writer = folder, every, 0.0, None
        if folder:
            from torch.utils.tensorboard import SummaryWriter  # here, as the package is optional

            self._writer = SummaryWriter(folder)

    def due(self) -> bool:
        """Return whether it is time for the next set."""
        return self._writer is not None and time.monotonic() >= self._next

    def add(self, step: int, **scalars: Tensor | float) -> None:
        """Write each by its name."""
        if self._writer:
            self._next = time.monotonic() + self._every
            for name, scalar in scalars.items():
                attempt(self._folder, self._writer.add_scalar, name, torch.as_tensor(scalar).item(), int(step))
            attempt(self._folder, self._writer.flush)


class Video:
    """A context manager that streams the game to ffmpeg, at twice its size; with path None, it does nothing.

    Memory stays constant however long the episode. H.264 with yuv420p plays everywhere; a name that ends in .gif makes
    a GIF. If this process dies, ffmpeg sees the end of its input and closes the file properly. If the video cannot be
    written, the game goes on. With `annotate`, the agent's mind stands beside the game (see `annotated`).
    """

    def __init__(self, path: Path | None, env: gym.Env, annotate: bool = False) -> None:
        self._env, self._path, self._writer, self._annotate = env, path, None, annotate
        if path is None:
            return
        self._values: deque[float] = deque(maxlen=int(5 * env.unwrapped.metadata["render_fps"]))
        height, width = env.unwrapped.observation_space.shape
        palette = "split[a][b];[a]palettegen=max_colors=64[p];[b][p]paletteuse=dither=none"
        gif = {"codec": "gif", "pix_fmt_out": "pal8", "output_params": ["-filter_complex", palette]}
        mp4 = {"quality": 7, "output_params": ["-preset", "veryfast", "-threads", "1"]}  # the cores are the workers'
        self._writer = write_frames(
            path,
            (2 * width * (2 if annotate else 1), 2 * height),
            fps=env.unwrapped.metadata["render_fps"],
            macro_block_size=2,
            ffmpeg_log_level="fatal",  # a stop may cut the last frame in two, which is no news
            **(gif if path.suffix == ".gif" else mp4),
        )
        self._send(None)

    def _send(self, frame: np.ndarray | None) -> None:
        if not attempt(self._path, self._writer.send, frame):
            self._writer = None

    def add_frame(self, observation: np.ndarray, score: float, value: float, probabilities: list[float]) -> None:
        """Append the screen, its pixels kept sharp; value and probabilities are the agent's, of the `observation`."""
        if self._writer is None:
            return
        frame = cv2.resize(self._env.render(), None, fx=2, fy=2, interpolation=cv2.INTER_NEAREST)
        if self._annotate:
            self._values.append(value)
            policy = dict(zip(self._env.unwrapped.action_names, probabilities, strict=True))
            panel = draw_mind(frame.shape, observation, score, self._values, policy)
            frame = np.concatenate([frame, panel], axis=1)
        self._send(np.ascontiguousarray(frame))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._writer:
            self._writer.close()
            attempt(self._path, count_frames_and_secs, self._path)  # ffmpeg keeps it to itself if it cannot write


def draw_mind(
    shape: tuple[int, ...], observation: np.ndarray, score: float, values: deque[float], policy: dict[str, float]
) -> np.ndarray:
    """Return a panel, `shape` uint8: score, what the network sees, its value of the last steps, its policy as bars."""
    panel = np.full(shape, 24, np.uint8)
    height, width = shape[:2]

    def text(words: str, x: int, y: int, colour: tuple[int, int, int] = WHITE, size: float = 0.42) -> None:
        cv2.putText(panel, words, (x, y), cv2.FONT_HERSHEY_SIMPLEX, size, colour, 1, cv2.LINE_AA)

    text(f"score {score:g}", 12, 22)
    text("what the network sees", 12, 44, GREY)
    low, high = observation.min(), observation.max()
    seen = ((observation[0] - low) / max(high - low, 1e-6) * 255).astype(np.uint8)
    panel[52:178, 12:138] = cv2.resize(seen, (126, 126), interpolation=cv2.INTER_NEAREST)[..., np.newaxis]

    text(f"value {values[-1]:+.2f}, the last 5 s", 12, 204, GREEN)
    top, bottom, left, right = 214, 274, 12, width - 12
    limit = max(1.0, *map(abs, values))
    middle = (top + bottom) // 2
    cv2.line(panel, (left, middle), (right, middle), GREY, 1)
    text(f"{-limit:.1f} to {limit:.1f}", right - 80, 204, GREY)
    x = right - np.arange(len(values))[::-1] * (right - left) / values.maxlen
    points = np.stack([x, middle - np.array(values) / limit * (bottom - top) / 2], axis=1)
    cv2.polylines(panel, [points.round().astype(np.int32)], False, GREEN, 1, cv2.LINE_AA)

    columns = 1 if len(policy) <= 6 else 2  # up to 18 actions
    rows, cell, names = -(-len(policy) // columns), (width - 12) // columns, (118, 88)[columns - 1]
    row = min(22, (height - 290) // rows)
    for n, (name, probability) in enumerate(policy.items()):
        x, y = 12 + n // rows * cell, 292 + n % rows * row
        text(name, x, y + 10, size=0.42 if columns == 1 else 0.31)
        bar = int(probability * (cell - names - 48))
        cv2.rectangle(panel, (x + names, y + 1), (x + names + bar, y + row - 4), BLUE, -1)
        text(f"{100 * probability:.0f}%", x + cell - 42, y + 10, GREY, size=0.42 if columns == 1 else 0.31)
    return panel
