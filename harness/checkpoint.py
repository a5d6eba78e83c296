"""What the processes of a run share, and its files: checkpoint.pt to resume, best.pt to play."""

import argparse
import copy
import io
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
from harness.utils import reason, report_write_errors, write
from model import ActorCritic
from my_optim import SharedAdam

VERSIONS = {name: version(name) for name in ("torch", "gym", "ale-py", "numpy")}
# What each training worker adds up for TensorBoard: its steps, sums over them, sums over its
# updates, and the number of those.
PER_STEP = ("policy_loss", "value_loss", "entropy")
PER_UPDATE = ("gradient_norm", "learning_rate")
FIGURES = ("steps", *PER_STEP, *PER_UPDATE, "updates")


class SharedState:
    """What the paper calls global and shared, and all else that outlives a process.

    It lies in shared memory: a worker that starts again finds it as the last one left it.

    Attributes:
        model: the shared weights.
        optimizers: the shared Adam; with --no-shared, one for each training worker.
        steps: (num_processes,) int64, training steps. A slot a worker, so there is no lock; the
            paper's T is their sum.
        dropped: (num_processes,) int64, rollouts whose loss or gradient was not finite.
        figures: (num_processes, len(FIGURES)) float64, sums over each worker's updates.
        ready: (num_processes + 1,) int64, the workers that have started up, the test worker last.
        stop: (1,) int64, see workers.GO_ON.
        restarts: (1,) int64, deaths and resumes so far. It is part of each worker's seed, so that
            nobody draws again what was drawn before.
        statistics: (3,) float64, those of the test worker's normaliser (see envs.py). A training
            worker's normaliser starts anew with the worker.
        elapsed: seconds of all sessions before this one.

    Raises `OSError` if there is too little shared memory or if too few files may be open.
    """

    def __init__(self, args: argparse.Namespace, num_inputs: int, num_actions: int) -> None:
        n = args.num_processes
        try:
            self.model = ActorCritic(num_inputs, num_actions).share_memory()
            self.optimizers = [
                SharedAdam(self.model.parameters(), lr=args.lr)
                for _ in range(n if args.no_shared else 1)
            ]
            integers = torch.zeros(3 * n + 3, dtype=torch.int64).share_memory_()
            floats = torch.zeros(n * len(FIGURES) + 3, dtype=torch.float64).share_memory_()
        except RuntimeError as error:
            raise _no_shared_memory(error, n if args.no_shared else 1) from error
        parts = integers.split([n, n, n + 1, 1, 1])
        self.steps, self.dropped, self.ready, self.stop, self.restarts = parts
        self.figures, self.statistics = floats[:-3].view(n, len(FIGURES)), floats[-3:]
        self.elapsed = 0.0

    def optimizer(self, rank: int) -> SharedAdam:
        """Return the optimiser of worker `rank`."""
        return self.optimizers[rank % len(self.optimizers)]

    def total_steps(self) -> int:
        """Return the training steps of all workers."""
        return int(self.steps.sum())

    def request_stop(self, how: int) -> None:
        """Ask all processes to stop, workers.FINISH or STOP; a stronger request stays."""
        self.stop.clamp_(min=how)

    def has_made(self, max_steps: int | None) -> bool:
        """Return whether the run has made all its steps."""
        return max_steps is not None and self.total_steps() >= max_steps

    def fraction_left(self, max_steps: int | None) -> float:
        """Return how much of the run is left, 1 for one without an end."""
        return 1.0 if max_steps is None else max(0.0, 1 - self.total_steps() / max_steps)

    def add_figures(self, rank: int, *figures: Tensor | float) -> None:
        """Add an update's FIGURES, but for the last, to those of training worker `rank`."""
        numbers = [torch.as_tensor(figure).item() for figure in figures]
        self.figures[rank] += torch.tensor([*numbers, 1.0], dtype=torch.float64)

    def mean_figures(self, since: Tensor) -> tuple[dict[str, float], Tensor]:
        """Return the means of PER_STEP and PER_UPDATE since `since`, and the sums so far.

        `since` are the sums as this returned them before. Losses and entropy (nats) are per step.
        """
        so_far = self.figures.sum(dim=0)
        sums = dict(zip(FIGURES, (so_far - since).tolist(), strict=True))
        if not sums["updates"]:
            return {}, so_far
        means = {name: sums[name] / sums["steps"] for name in PER_STEP}
        return means | {name: sums[name] / sums["updates"] for name in PER_UPDATE}, so_far

    def save(self, run_folder: Path, args: argparse.Namespace, elapsed: float) -> None:
        """Write checkpoint.pt; if that fails, say so, the previous one being whole."""
        contents = {
            "model": self.model.state_dict(),
            "moments": [list(optimizer.state.values()) for optimizer in self.optimizers],
            "steps": self.total_steps(),
            "elapsed": elapsed,
            "restarts": self.restarts,
            "observation_statistics": self.statistics,
            "options": {k: v for k, v in vars(args).items() if k not in ("resume", "save_dir")},
            "versions": VERSIONS,
        }
        path = run_folder / "checkpoint.pt"
        with report_write_errors(path):
            write(dump(contents), path)

    def restore(self, contents: dict[str, Any]) -> None:
        """Go on from a checkpoint's contents; raise `ValueError` if they do not fit."""
        try:
            load_weights(self.model, contents["model"])
            for i, optimizer in enumerate(self.optimizers):
                moments = contents["moments"][i % len(contents["moments"])]
                for saved, state in zip(moments, optimizer.state.values(), strict=True):
                    for name in state:
                        copy_exactly(saved[name], state[name])
            copy_exactly(contents["restarts"], self.restarts)
            copy_exactly(contents["observation_statistics"], self.statistics)
            valid_statistics(self.statistics)
            self.restarts += 1
            self.steps[0] = contents["steps"]  # only the sum matters
            self.elapsed = float(contents["elapsed"])
            if self.steps[0] < 0 or not 0 <= self.elapsed < math.inf:
                raise ValueError("a negative count")
        except Exception as error:  # there is no end to what a foreign file may hold
            made_by = f", but was made with {describe_versions(contents)}"
            raise ValueError(
                f"not a checkpoint of this version{made_by} ({reason(error)})"
            ) from error


def _no_shared_memory(error: RuntimeError, num_optimizers: int) -> OSError:
    if "Too many open files" in str(error):
        return OSError(f"{reason(error)}: allow more, as with ulimit -n 1024")
    mebibytes = 4 + 5 * num_optimizers  # weights and counts, and each Adam's moments
    return OSError(
        f"{reason(error)}: {mebibytes} MiB of shared memory are needed (/dev/shm; in a container, "
        f"--shm-size={mebibytes + 16}m, and less without --no-shared)"
    )


def copy_exactly(source: Tensor, target: Tensor) -> None:
    """Copy; raise `ValueError` where copy_ would stretch, or pass what is not finite."""
    if source.shape != target.shape or not source.isfinite().all():
        raise ValueError("tensors do not fit")
    target.copy_(source)


def load_weights(model: ActorCritic, weights: dict[str, Tensor]) -> None:
    """Load a state dict; raise `ValueError` or `RuntimeError` if it does not fit."""
    if not all(tensor.isfinite().all() for tensor in weights.values()):
        raise ValueError("weights that are not finite")
    model.load_state_dict(weights)


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
            contents = read(self._path)
            self._score = int(contents["episodes"]), float(contents["mean_reward"])
        except (OSError, ValueError, KeyError, TypeError):
            pass  # none yet, or none that can be read: the next one takes its place

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
        env_name = (
            contents["env_name"] if "env_name" in contents else contents["options"]["env_name"]
        )
        weights = contents["model"]
        num_actions = weights["actor_linear.bias"].shape[0]
        env = create_atari_env(env_name, render_mode)
        model = ActorCritic(env.observation_space.shape[0], num_actions)
        load_weights(model, weights)
        env.statistics = valid_statistics(contents["observation_statistics"])
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


def checkpoint_of(run_folder: Path) -> Path:
    """Return the path of a run folder's checkpoint; raise `ValueError` if there is none."""
    path = run_folder / "checkpoint.pt"
    if not os.path.lexists(path):
        raise ValueError(f"{run_folder} is no run's folder: there is no {path}")
    return path


def read_checkpoint(run_folder: Path) -> dict[str, Any]:
    """Return the contents of a run folder's checkpoint; raise `ValueError` or `OSError`."""
    path = checkpoint_of(run_folder)
    contents = read(path)
    if not isinstance(contents.get("options"), dict):
        raise ValueError(f"{path} is not a checkpoint")
    return contents
