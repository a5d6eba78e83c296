"""What the processes of a run share: weights, moments, counts, requests to stop."""

import argparse
import functools
import itertools
import math
import sys
from pathlib import Path
from typing import Any

import gym
import torch
from torch import Tensor

from harness.checkpoint import (
    VERSIONS,
    describe_versions,
    dump,
    load_weights,
    valid_statistics,
)
from harness.utils import ALLOW_MORE_FILES, reason, report_write_errors, write
from harness.workers import GO_ON
from model import ActorCritic
from my_optim import SharedAdam, state_size

OF_A_SESSION = ("resume", "save_dir", "ray")  # options that a resumed run does not inherit
# What each training worker adds up for TensorBoard and training.csv: its steps, sums over them,
# sums over its updates, the number of those, sums over its episodes, and the number of those.
PER_STEP = ("policy_loss", "value_loss", "entropy")
PER_UPDATE = ("gradient_norm", "learning_rate")
PER_EPISODE = ("training_reward", "training_length")
OF_UPDATES = ("steps", *PER_STEP, *PER_UPDATE, "updates")
FIGURES = (*OF_UPDATES, *PER_EPISODE, "training_episodes")


class SharedState:
    """What the paper calls global and shared, and all else that outlives a process.

    It lies in shared memory: a worker that starts again finds it as the last one left it.

    Attributes:
        model: the shared weights.
        steps: (num_processes + 1,) int64, training steps. A slot a worker, so there is no lock, and
            one for all other machines (harness/hosts.py; on one of those, all but itself); the
            paper's T is their sum.
        dropped: (num_processes + 1,) int64, rollouts whose loss or gradient was not finite.
        figures: (num_processes + 1, len(FIGURES)) float64, sums over each worker's updates and
            episodes.
        ready: (num_processes + 2,) int64, the workers that have started up; the test worker and
            the link to other machines last.
        stop: (1,) int64, see workers.GO_ON.
        restarts: (1,) int64, deaths and resumes so far. It is part of each worker's seed, so that
            nobody draws again what the weights have learnt from.
        statistics: (3,) float64, those of the test worker's normaliser (see envs.py). A worker's
            normaliser starts from them.
        elapsed: seconds of all sessions before this one.

    Raises `OSError` if there is too little shared memory or if too few files may be open.
    """

    def __init__(self, args: argparse.Namespace, num_inputs: int, num_actions: int) -> None:
        n = args.num_processes
        try:
            self.model = ActorCritic(num_inputs, num_actions).share_memory()
            size = n if args.no_shared else 1, state_size(self.model.parameters())
            self._moments = torch.zeros(size).share_memory_()
            integers = torch.zeros(3 * n + 6, dtype=torch.int64).share_memory_()
            floats = torch.zeros((n + 1) * len(FIGURES) + 3, dtype=torch.float64).share_memory_()
        except RuntimeError as error:
            raise _no_shared_memory(error, n if args.no_shared else 1) from error
        parts = integers.split([n + 1, n + 1, n + 2, 1, 1])
        self.steps, self.dropped, self.ready, self.stop, self.restarts = parts
        self.figures, self.statistics = floats[:-3].view(n + 1, len(FIGURES)), floats[-3:]
        self.elapsed = 0.0
        self._lr = args.lr

    @functools.cached_property
    def optimizers(self) -> list[SharedAdam]:
        """Return the shared Adam; with --no-shared, one for each training worker.

        Each process makes them for itself, around the moments that all share.
        """
        params = list(self.model.parameters())
        return [SharedAdam(params, self._lr, block) for block in self._moments]

    def __getstate__(self) -> dict[str, Any]:
        """Return what a process is sent through a pipe when it is started: no optimisers.

        Many would not fit in: the start would wait until the process reads, and for ever if it died
        before that.
        """
        return {name: value for name, value in vars(self).items() if name != "optimizers"}

    def optimizer(self, rank: int) -> SharedAdam:
        """Return the optimiser of worker `rank`."""
        return self.optimizers[rank % len(self.optimizers)]

    def total_steps(self) -> int:
        """Return the training steps of all workers."""
        return int(self.steps.sum())

    def request_stop(self, how: int) -> None:
        """Ask all processes to stop, workers.FINISH or STOP.

        The main process asks again at each look, as another's weaker request may come between.
        """
        self.stop.clamp_(min=how)

    def has_made(self, max_steps: int | None) -> bool:
        """Return whether the run has made all its steps."""
        return max_steps is not None and self.total_steps() >= max_steps

    def is_over(self, max_steps: int | None) -> bool:
        """Return whether nobody is to begin anything new: a stop is wanted, or all steps made."""
        return bool(self.stop != GO_ON) or self.has_made(max_steps)

    def fraction_left(self, max_steps: int | None) -> float:
        """Return how much of the run is left, 1 for one without an end."""
        return 1.0 if max_steps is None else max(0.0, 1 - self.total_steps() / max_steps)

    def add_figures(self, rank: int, *figures: Tensor | float) -> None:
        """Add an update's OF_UPDATES, but for the last, to those of training worker `rank`."""
        numbers = [torch.as_tensor(figure).item() for figure in figures]
        of_updates = self.figures[rank, : len(OF_UPDATES)]
        of_updates += torch.tensor([*numbers, 1.0], dtype=torch.float64)

    def add_episode(self, rank: int, reward: float, length: int) -> None:
        """Add an episode that training worker `rank` has played to its end."""
        of_episodes = self.figures[rank, len(OF_UPDATES) :]
        of_episodes += torch.tensor([reward, length, 1.0], dtype=torch.float64)

    def mean_figures(self, since: Tensor) -> tuple[dict[str, float], int, Tensor]:
        """Return means since `since`, the number of training episodes since, and the sums so far.

        `since` are the sums as this returned them before. Losses and entropy (nats) are per step. A
        figure of which there was nothing is missing.
        """
        so_far = self.figures.sum(dim=0)
        sums = dict(zip(FIGURES, (so_far - since).tolist(), strict=True))
        means = {}
        for names, of in (
            (PER_STEP, "steps"),
            (PER_UPDATE, "updates"),
            (PER_EPISODE, "training_episodes"),
        ):
            if sums[of]:
                means |= {name: sums[name] / sums[of] for name in names}
        return means, int(sums["training_episodes"]), so_far

    def contents(self, args: argparse.Namespace, elapsed: float) -> dict[str, Any]:
        """Return the contents of a checkpoint, the tensors being those in use."""
        return {
            "model": self.model.state_dict(),
            "moments": [list(optimizer.state.values()) for optimizer in self.optimizers],
            "steps": self.total_steps(),
            "elapsed": elapsed,
            "restarts": self.restarts,
            "observation_statistics": self.statistics,
            "options": {k: v for k, v in vars(args).items() if k not in OF_A_SESSION},
            "versions": VERSIONS,
        }

    def save(self, run_folder: Path, args: argparse.Namespace, elapsed: float) -> None:
        """Write checkpoint.pt; if that fails, say so, and the previous one stays."""
        path = run_folder / "checkpoint.pt"
        with report_write_errors(path):
            if not self._is_finite():
                raise ValueError("weights or Adam's moments are not finite")
            write(dump(self.contents(args, elapsed)), path)

    def _is_finite(self) -> bool:
        moments = [t for optimizer in self.optimizers for t in optimizer.state.values()]
        tensors = itertools.chain(self.model.parameters(), *(state.values() for state in moments))
        return all(tensor.isfinite().all() for tensor in tensors)

    def start_from(self, env: gym.Env, model: ActorCritic, env_name: str) -> None:
        """Take the weights and the normaliser of `load_agent`, for a new run on `env_name`.

        Raises `ValueError` if that game has another number of actions.
        """
        plays, size = env.unwrapped.env_id, env.action_space.n
        if size != self.model.actor_linear.out_features:
            other = self.model.actor_linear.out_features
            raise ValueError(
                f"the agent plays {plays} with {size} actions, but {env_name} has {other}"
            )
        self.model.load_state_dict(model.state_dict())
        self.statistics.copy_(torch.tensor(env.unwrapped.statistics, dtype=torch.float64))

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
            raise ValueError(
                f"this version of the program cannot go on from the checkpoint ({reason(error)}), "
                f"made with {describe_versions(contents)}"
            ) from error


def _no_shared_memory(error: RuntimeError, num_optimizers: int) -> OSError:
    if "Too many open files" in str(error):
        return OSError(f"{reason(error)}{ALLOW_MORE_FILES}")
    if sys.platform != "linux":
        return OSError(f"no shared memory: {reason(error)}")
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
