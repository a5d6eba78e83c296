"""Videos of the game, plain or with what the agent sees and thinks beside it."""

import math
import re
import subprocess
from collections import deque
from collections.abc import Generator
from pathlib import Path
from typing import Self

import cv2
import gym
import numpy as np
from imageio_ffmpeg import get_ffmpeg_exe, write_frames

from harness.utils import report_write_errors, set_aside

WHITE, GREY, GREEN, BLUE = (235, 235, 235), (120, 120, 120), (110, 220, 110), (110, 170, 255)


def video_path(run_folder: Path, episode: int, record_every: int) -> Path | None:
    """Return where this test episode is to be recorded, None if it is not.

    A video that is there, of an episode after the checkpoint that the run goes on from, is set
    aside.
    """
    if not record_every or episode % record_every:
        return None
    path = run_folder / "videos" / f"rl-video-episode-{episode}.mp4"
    if path.exists():
        set_aside(path)
    return path


class Video:
    """A context manager that streams the game to ffmpeg, at twice its size; no path, no video.

    Memory stays constant however long the episode. H.264 with yuv420p plays everywhere. A name that
    ends in .gif makes a GIF, for short episodes: ffmpeg keeps all of its frames until the last one
    (with `annotate` a megabyte each), to find one palette for them. If this process dies, ffmpeg
    sees the end of its input and closes the file properly. If the video cannot be written, the game
    goes on. With `annotate`, a panel stands beside the game (see `draw_panel`).
    """

    def __init__(self, path: Path | None, env: gym.Env, annotate: bool = False) -> None:
        self._env, self._path, self._annotate = env, path, annotate
        self._writer, self._num_frames = None, 0  # until the first frame
        self.is_on = path is not None  # whether frames are wanted
        self._fps = env.unwrapped.metadata["render_fps"] if self.is_on else 0
        self._values: deque[float] = deque(maxlen=int(5 * self._fps))

    def _start_ffmpeg(self, height: int, width: int) -> Generator[None, np.ndarray, None]:
        self._path.parent.mkdir(exist_ok=True)
        self._path.touch()  # tells the reason where ffmpeg would only break its pipe
        palette = "split[a][b];[a]palettegen=max_colors=64[p];[b][p]paletteuse=dither=none"
        gif = {"codec": "gif", "pix_fmt_out": "pal8", "output_params": ["-filter_complex", palette]}
        # One thread: the cores are the workers'.
        mp4 = {"quality": 7, "output_params": ["-preset", "veryfast", "-threads", "1"]}
        writer = write_frames(
            _url(self._path),
            (width, height),
            fps=self._fps,
            macro_block_size=2,
            ffmpeg_log_level="fatal",  # a stop may cut the last frame in two, which is no news
            **(gif if self._path.suffix == ".gif" else mp4),
        )
        writer.send(None)
        return writer

    def _send(self, frame: np.ndarray) -> None:
        writer, self._writer, self.is_on = self._writer, None, False
        with report_write_errors(self._path):
            writer = writer or self._start_ffmpeg(*frame.shape[:2])
            writer.send(frame)
            self._writer, self.is_on = writer, True
            self._num_frames += 1

    def add_frame(
        self, observation: np.ndarray, score: float, value: float, policy: list[float]
    ) -> None:
        """Append the screen, its pixels kept sharp; value and policy are of the `observation`."""
        if not self.is_on:
            return
        frame = cv2.resize(self._env.render(), None, fx=2, fy=2, interpolation=cv2.INTER_NEAREST)
        if self._annotate:
            self._values.append(value)
            names = self._env.unwrapped.action_names
            probabilities = dict(zip(names, policy, strict=True))
            panel = draw_panel(frame.shape, observation, score, self._values, probabilities)
            frame = np.concatenate([frame, panel], axis=1)
        self._send(np.ascontiguousarray(frame))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._writer:
            self._writer.close()
            with report_write_errors(self._path):  # which ffmpeg keeps to itself
                read_back(self._path, self._num_frames)


def _url(path: Path) -> str:
    """Return a path for ffmpeg, which would take a name with a colon for a protocol."""
    return f"file:{path.absolute()}"


def read_back(path: Path, num_frames: int) -> None:
    """Raise `RuntimeError` if a video does not play to its end; it is read, but not decoded.

    ffmpeg must not find a terminal as its input: it would change its mode, for which the terminal
    stops a program in the background, all processes of it.
    """
    command = [get_ffmpeg_exe(), "-v", "error", "-i", _url(path), "-c", "copy", "-f", "null"]
    command += ["-progress", "pipe:1", "/dev/null"]
    result = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True)
    if result.returncode:
        raise RuntimeError(result.stderr.decode(errors="replace").strip().rpartition("\n")[2])
    found = max(map(int, re.findall(rb"^frame=(\d+)", result.stdout, re.MULTILINE)), default=0)
    if found < num_frames - 2:  # a GIF may have one or two less
        raise RuntimeError(f"it ends after {found} of {num_frames} frames")


def draw_panel(
    shape: tuple[int, ...],
    observation: np.ndarray,
    score: float,
    values: deque[float],
    policy: dict[str, float],
) -> np.ndarray:
    """Return a panel, `shape` uint8: score, what the network sees, its value and its policy.

    The value is a curve over the last steps. The policy is bars, and its entropy in nats beside the
    highest that it could have.
    """
    panel = np.full(shape, 24, np.uint8)
    height, width = shape[:2]

    def text(
        words: str, x: int, y: int, colour: tuple[int, int, int] = WHITE, size: float = 0.42
    ) -> None:
        cv2.putText(panel, words, (x, y), cv2.FONT_HERSHEY_SIMPLEX, size, colour, 1, cv2.LINE_AA)

    text(f"score {score:g}", 12, 22)
    text("what the network sees", 12, 44, GREY)
    low, high = observation.min(), observation.max()
    seen = ((observation[0] - low) / max(high - low, 1e-6) * 255).astype(np.uint8)
    panel[52:178, 12:138] = cv2.resize(seen, (126, 126), interpolation=cv2.INTER_NEAREST)[
        ..., np.newaxis
    ]

    text(f"value {values[-1]:+.2f}, the last 5 s", 12, 204, GREEN)
    top, bottom, left, right = 214, 274, 12, width - 12
    limit = max(1.0, *map(abs, values))
    middle = (top + bottom) // 2
    cv2.line(panel, (left, middle), (right, middle), GREY, 1)
    text(f"{-limit:.1f} to {limit:.1f}", right - 80, 204, GREY)
    x = right - np.arange(len(values))[::-1] * (right - left) / values.maxlen
    points = np.stack([x, middle - np.array(values) / limit * (bottom - top) / 2], axis=1)
    cv2.polylines(panel, [points.round().astype(np.int32)], False, GREEN, 1, cv2.LINE_AA)

    entropy = sum(-p * math.log(p) for p in policy.values() if p > 0)
    text(f"policy, entropy {entropy:.2f} of {math.log(len(policy)):.2f}", 12, 287, BLUE)
    columns = 1 if len(policy) <= 6 else 2  # up to 18 actions
    name_size, name_width = (0.42, 118) if columns == 1 else (0.31, 88)
    rows, cell = -(-len(policy) // columns), (width - 12) // columns
    row = min(22, (height - 294) // rows)
    for n, (name, probability) in enumerate(policy.items()):
        x, y = 12 + n // rows * cell, 294 + n % rows * row
        text(name, x, y + 10, size=name_size)
        bar = int(probability * (cell - name_width - 48))
        cv2.rectangle(panel, (x + name_width, y + 1), (x + name_width + bar, y + row - 4), BLUE, -1)
        text(f"{100 * probability:.0f}%", x + cell - 42, y + 10, GREY, name_size)
    return panel
