"""What a run is: in shared memory while it goes on, in checkpoint.pt between its sittings, in best.pt for everybody."""

import argparse
import copy
import io
import os
import zipfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from model import ActorCritic
from my_optim import SharedAdam
from workers import attempt

WINDOW = 100  # test episodes that the mean reward is taken over
KEPT = ("life", "episodes", "rewards", "observation_statistics", "best")  # see RunState; saved as they are

VERSIONS = {name: version(name) for name in ("torch", "gym", "ale-py", "numpy")}


class RunState:
    """All that outlives a process, in shared memory: a process that is started anew finds it as the last one left it.

    Attributes:
        model, optimizers: the shared weights, and an Adam for each worker (the same one, but for --no-shared).
        steps, dropped: (num_processes,) int64, training steps and dropped rollouts; a slot a worker, so no lock.
        ready: (num_processes + 1,) int64, the processes that have started up, the evaluator last.
        stop, life, episodes: (1,) int64, see workers.py; the number of test episodes played.
        rewards: (WINDOW,) float64, those of the last test episodes, episode n at n % WINDOW.
        observation_statistics: (3,) float64, the evaluator's mean, std and num_frames (envs.NormalizedObservation).
        best: (2,) float64, episodes in the mean and the mean itself of best.pt.
        elapsed: seconds of all sittings before this one.
    """

    def __init__(self, args: argparse.Namespace, num_inputs: int, num_actions: int) -> None:
        n = args.num_processes
        self.model = ActorCritic(num_inputs, num_actions).share_memory()
        self.optimizers = [SharedAdam(self.model.parameters(), lr=args.lr) for _ in range(n if args.no_shared else 1)]
        integers = torch.zeros(3 * n + 4, dtype=torch.int64).share_memory_().split([n, n, n + 1, 1, 1, 1])
        self.steps, self.dropped, self.ready, self.stop, self.life, self.episodes = integers
        floats = torch.zeros(WINDOW + 5, dtype=torch.float64).share_memory_()
        self.rewards, self.observation_statistics, self.best = floats.split([WINDOW, 3, 2])
        self.elapsed = 0.0

    def optimizer(self, rank: int) -> SharedAdam:
        """Return the optimiser of worker `rank`."""
        return self.optimizers[rank % len(self.optimizers)]

    def mean_reward(self) -> tuple[int, float]:
        """Return the number of last test episodes, at most WINDOW, and their mean reward (NaN for none)."""
        num = min(int(self.episodes), WINDOW)
        return num, self.rewards[:num].mean().item()

    def target_reached(self, target: float | None) -> bool:
        """Return whether WINDOW test episodes have a mean reward of at least `target`."""
        num, mean = self.mean_reward()
        return target is not None and num == WINDOW and mean >= target

    def count_episode(self, reward: float, observation_statistics: tuple[float, float, int]) -> None:
        """Take in a test episode's reward, and the statistics at its end."""
        self.rewards[int(self.episodes) % WINDOW] = reward
        self.observation_statistics[:] = torch.tensor(observation_statistics, dtype=torch.float64)
        self.episodes += 1

    def save(self, run_folder: Path, args: argparse.Namespace, elapsed: float) -> None:
        """Write checkpoint.pt; if that fails, say so, the previous one being whole."""
        contents = {
            "model": self.model.state_dict(),
            "moments": [list(optimizer.state.values()) for optimizer in self.optimizers],
            "steps": int(self.steps.sum()),
            "elapsed": elapsed,
            **{name: getattr(self, name) for name in KEPT},
            "options": {name: v for name, v in vars(args).items() if name not in ("resume", "save_dir")},
            "versions": VERSIONS,
        }
        path = run_folder / "checkpoint.pt"
        attempt(path, write, dump(contents), path)

    def restore(self, contents: dict[str, Any]) -> None:
        """Go on from a checkpoint's contents; raise `ValueError` if they do not fit."""
        try:
            self.model.load_state_dict(contents["model"])
            for i, optimizer in enumerate(self.optimizers):
                moments = contents["moments"][i % len(contents["moments"])]
                for saved, state in zip(moments, optimizer.state.values(), strict=True):
                    for name in state:
                        copy_exactly(saved[name], state[name])
            for name in KEPT:
                copy_exactly(contents[name], getattr(self, name))
            self.life += 1  # nobody is to draw again what was drawn before
            self.steps[0], self.elapsed = contents["steps"], float(contents["elapsed"])
        except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError, ZeroDivisionError) as error:
            raise ValueError(f"not a checkpoint of this network ({type(error).__name__})") from error

    def refuse_if_over(self, args: argparse.Namespace) -> None:
        """Raise `ValueError` if the run has reached its end."""
        if args.max_steps is not None and self.steps.sum() >= args.max_steps:
            raise ValueError(f"the run has made its {args.max_steps} steps: name a higher --max-steps")
        if self.target_reached(args.target_reward):
            raise ValueError(f"the run has reached its {args.target_reward}: name a higher --target-reward")

    def save_if_best(self, run_folder: Path, args: argparse.Namespace, model: ActorCritic) -> None:
        """Write best.pt if `model`, whose episode was the last one, has the best mean reward.

        A mean over more episodes beats one over fewer: until WINDOW have been played, the latest is the best.
        """
        num, mean = self.mean_reward()
        if (num, mean) <= tuple(self.best.tolist()):
            return
        contents = {
            "model": model.state_dict(),
            "env_name": args.env_name,
            "observation_statistics": self.observation_statistics,
            "steps": int(self.steps.sum()),
            "mean_reward": mean,
            "episodes": num,
            "versions": VERSIONS,
        }
        if attempt(run_folder / "best.pt", write, dump(contents), run_folder / "best.pt"):
            self.best[:] = torch.tensor([num, mean])


def copy_exactly(source: Tensor, target: Tensor) -> None:
    """Copy `source` into `target`; raise `ValueError` where copy_ would stretch, or let through what is not finite."""
    if source.shape != target.shape or not source.isfinite().all():
        raise ValueError("tensors do not fit")
    target.copy_(source)


def dump(contents: dict[str, Any]) -> bytes:
    """Return what torch.save writes: into memory, as on a full disk it would raise RuntimeError.

    A copy is written: while it is, workers go on changing what is shared, and the checksums would not fit.
    """
    buffer = io.BytesIO()
    torch.save(copy.deepcopy(contents), buffer)
    return buffer.getvalue()


def write(data: bytes, path: Path) -> None:
    """Write beside `path` and rename, so that at any moment a whole file is there; raise `OSError`."""
    beside = path.with_name(path.name + ".new")
    try:
        with open(beside, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
    except OSError:
        beside.unlink(missing_ok=True)
        raise


def read(path: Path) -> dict[str, Any]:
    """Load a file that `write` wrote; raise `ValueError` or `OSError`. No code in the file is run."""
    try:
        intact = zipfile.ZipFile(path).testzip() is None  # torch.load does not look at the checksums
        contents = torch.load(path, weights_only=True) if intact else None
    except OSError:
        raise
    except Exception:  # there is no end to what a damaged or hostile file may raise
        contents = None
    if not isinstance(contents, dict):
        raise ValueError(f"{path} is damaged, or not one of this program's files")
    return contents


def load_agent(path: Path) -> tuple[str, ActorCritic, list[float]]:
    """Return environment id, model and observation statistics of a run folder's best agent, or of the file `path`.

    Raises `ValueError` or `OSError`.
    """
    if path.is_dir():  # there is no best.pt before the first test game has ended
        path = next((path / name for name in ("best.pt", "checkpoint.pt") if (path / name).exists()), path)
    if not path.is_file():
        raise ValueError(f"there is no agent in {path}: name a run folder, a best.pt or a checkpoint.pt")
    contents = read(path)
    try:
        env_name = contents["env_name"] if "env_name" in contents else contents["options"]["env_name"]
        weights, statistics = contents["model"], contents["observation_statistics"].tolist()
        model = ActorCritic(weights["conv1.weight"].shape[1], weights["actor_linear.bias"].shape[0])
        model.load_state_dict(weights)
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError) as error:
        raise ValueError(f"{path} holds no agent of this network ({type(error).__name__})") from error
    return env_name, model, statistics


class EpisodeLog:
    """episodes.csv, a row for each test episode; written anew for each, so that it is whole at any moment."""

    HEADER = "episode,time_s,num_steps,fps,reward,length"

    def __init__(self, run_folder: Path, num_episodes: int) -> None:
        """Go on after `num_episodes`; later rows, from after the checkpoint, move to episodes.csv.bak."""
        self.path = run_folder / "episodes.csv"
        rows = self.path.read_text().splitlines()[1:] if self.path.exists() else []
        self.rows, later = rows[:num_episodes], rows[num_episodes:]
        if later:
            backup = run_folder / "episodes.csv.bak"
            earlier = backup.read_text() if backup.exists() else ""
            attempt(backup, write, (earlier + "\n".join([*later, ""])).encode(), backup)

    def append(self, *fields: object) -> None:
        """Add a row; if it cannot be written, say so: it will be with the next one."""
        self.rows.append(",".join(map(str, fields)))
        attempt(self.path, write, "\n".join([self.HEADER, *self.rows, ""]).encode(), self.path)
