"""A run's folder, and its files to go on from: checkpoint.pt to resume, best.pt to play."""

import contextlib
import copy
import io
import itertools
import math
import os
import zipfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import gym
import torch
from torch import Tensor

from envs import create_atari_env
from harness.utils import reason, report_write_errors, set_aside, write
from model import ActorCritic

VERSIONS = {name: version(name) for name in ("torch", "gym", "ale-py", "numpy")}
# By any of these in a folder, a run is known to be there.
FILES = (
    "options.json",
    "episodes.csv",
    "training.csv",
    "checkpoint.pt",
    "best.pt",
    "learning_curve.png",
    "videos",
)


def load_weights(model: ActorCritic, weights: dict[str, Tensor]) -> None:
    """Load a state dict; raise `ValueError` if it does not fit."""
    if not all(tensor.isfinite().all() for tensor in weights.values()):
        raise ValueError("weights that are not finite")
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:  # a title, and then a line for each thing that does not fit
        title, *lines = str(error).splitlines()
        raise ValueError(lines[0].strip() if lines else title) from error


def describe_versions(contents: dict[str, Any]) -> str:
    """Return the versions of the packages that a file was made with, in one line."""
    versions = contents.get("versions")
    if not isinstance(versions, dict):
        return "unknown versions"
    return ", ".join(f"{name} {number}" for name, number in versions.items())


class BestAgent:
    """best.pt: the agent with the best mean reward so far.

    A mean over more episodes beats one over fewer: until WINDOW of them (see episodes.py) have been
    played, the latest is the best.
    """

    def __init__(self, run_folder: Path) -> None:
        self._path = run_folder / "best.pt"
        self._score = (0, 0.0)
        try:
            if os.path.lexists(self._path):
                contents = read(self._path)
                self._score = int(contents["episodes"]), float(contents["mean_reward"])
        except (OSError, ValueError, KeyError, TypeError):
            set_aside(self._path)  # as the next one will take its place

    def offer(
        self,
        score: tuple[int, float],
        env_name: str,
        model: ActorCritic,
        statistics: tuple[float, float, int],
        num_steps: int,
    ) -> None:
        """Write the agent if its score, test episodes and their mean, beats that of the file."""
        if score <= self._score:
            return
        contents = {
            "model": model.state_dict(),
            "env_name": env_name,
            "observation_statistics": torch.tensor(statistics, dtype=torch.float64),
            "steps": num_steps,
            "mean_reward": score[1],
            "episodes": score[0],
            "versions": VERSIONS,
        }
        with report_write_errors(self._path):
            write(dump(contents), self._path)
            self._score = score


def load_agent(path: str | Path, render_mode: str | None = None) -> tuple[gym.Env, ActorCritic]:
    """Return the game and the network of a saved agent, ready to play.

    Args:
        path: a run folder (its best.pt or, before the first test episode, its checkpoint.pt), or
            such a file.
        render_mode: of the game, see `envs.create_atari_env`.

    The game's normaliser goes on from where the agent's stood; the network takes no gradients.
    Raises `ValueError` or `OSError`.
    """
    path = Path(path)
    if path.is_dir():
        files = [path / "best.pt", path / "checkpoint.pt"]
        path = next((file for file in files if file.exists()), path)
    if not path.is_file():
        known = "name a run folder, a best.pt or a checkpoint.pt"
        raise ValueError(f"there is no agent in {path}: {known}")
    contents = read(path)
    try:
        named_in = contents if "env_name" in contents else contents["options"]
        env_name = named_in["env_name"]
        weights = contents["model"]
        num_actions = weights["actor_linear.bias"].shape[0]
        env = create_atari_env(env_name, render_mode)
        model = ActorCritic(env.observation_space.shape[0], num_actions)
        load_weights(model, weights)
        env.unwrapped.statistics = valid_statistics(contents["observation_statistics"])
    except Exception as error:  # there is no end to what a foreign file may hold
        raise ValueError(f"{path} holds no agent of this network ({reason(error)})") from error
    if num_actions != env.action_space.n:
        has = f"{env_name} has {env.action_space.n}"
        raise ValueError(f"{path} holds an agent with {num_actions} actions, but {has}")
    return env, model.requires_grad_(False)


def valid_statistics(statistics: Tensor) -> tuple[float, float, int]:
    """Return mean, std and number of frames (see envs.py); raise `ValueError` if it is not that."""
    mean, std, num_frames = statistics.tolist()
    if not (math.isfinite(mean) and 0 <= std < math.inf and 0 <= num_frames < math.inf):
        raise ValueError(f"statistics {mean}, {std}, {num_frames}")
    return mean, std, int(num_frames)


def dump(contents: dict[str, Any]) -> bytes:
    """Return what torch.save writes: into memory, as on a full disk it would raise RuntimeError.

    A copy is written: while it is, workers go on changing what is shared, and the checksums would
    not fit.
    """
    buffer = io.BytesIO()
    torch.save(copy.deepcopy(contents), buffer)
    return buffer.getvalue()


def read(path: Path) -> dict[str, Any]:
    """Load a file of `dump`, as data only, never as code; raise `ValueError` or `OSError`."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise OSError(f"cannot read {path}: {reason(error)}") from error
    try:
        intact = zipfile.ZipFile(io.BytesIO(data)).testzip() is None  # torch.load ignores checksums
        contents = torch.load(io.BytesIO(data), weights_only=True) if intact else None
    except Exception:  # there is no end to what a damaged or hostile file may raise
        contents = None
    if not isinstance(contents, dict):
        raise ValueError(f"{path} is damaged, or not one of this program's files")
    return contents


def make_run_folder(path: Path | None, env_name: str) -> Path:
    """Make the folder that a new run writes to: `path` or, if None, the next free one in runs/.

    Raises `OSError` if it cannot be written, `ValueError` if it is another run's.
    """
    try:
        if path is None:
            Path("runs").mkdir(exist_ok=True)
            for k in itertools.count(1):
                folder = Path("runs", f"{env_name.replace('/', '-')}-{k}")
                with contextlib.suppress(FileExistsError):
                    folder.mkdir()
                    return folder
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(f"cannot write the run: {error}") from error
    held = [name for name in FILES if os.path.lexists(path / name)]
    if held:
        or_resume = ", or --resume it" if "checkpoint.pt" in held else ""
        raise ValueError(f"{path} already holds a run: name another folder{or_resume}")
    return path


def checkpoint_of(run_folder: Path) -> Path:
    """Return the path of a run folder's checkpoint; raise `ValueError` if there is none."""
    path = run_folder / "checkpoint.pt"
    if not os.path.lexists(path):
        if (run_folder / "options.json").exists():
            ended = "if it has ended, start it again in another folder"
            raise ValueError(f"the run in {run_folder} has no checkpoint yet; {ended}")
        raise ValueError(f"{run_folder} is no run's folder: there is no {path}")
    return path


def read_checkpoint(run_folder: Path) -> dict[str, Any]:
    """Return the contents of a run folder's checkpoint; raise `ValueError` or `OSError`."""
    path = checkpoint_of(run_folder)
    contents = read(path)
    if not isinstance(contents.get("options"), dict):
        raise ValueError(f"{path} is not a checkpoint")
    return contents
