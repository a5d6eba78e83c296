"""Another machine's part in a run: it learns for a second, then adds what its weights moved by.

To a run, another machine is one big worker of A3C. It has a `Host`, with training workers, shared
weights and a shared Adam of its own. The run's own machine, the head, has a process that sends each
host the run's weights and adds the answer to them, in place and without a lock, as the workers do
(harness/link.py). tests/README.md says what that costs.
"""

import argparse
import io
import os
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.multiprocessing as mp

from harness import workers
from harness.shared import SharedState
from harness.supervisor import Job, Supervisor
from harness.utils import reason
from model import ActorCritic

# The weights as one vector, and sums.


def weights_of(model: ActorCritic) -> torch.Tensor:
    """Return a copy of all weights, (number of weights,)."""
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def add_to(model: ActorCritic, change: torch.Tensor) -> None:
    """Add a change of all weights, (number of weights,), in place: workers go on updating them."""
    with torch.no_grad():
        parts = change.split([p.numel() for p in model.parameters()])
        for parameter, part in zip(model.parameters(), parts, strict=True):
            parameter.add_(part.view_as(parameter))


def own_sums(shared: SharedState) -> torch.Tensor:
    """Return this machine's steps, dropped rollouts, and the sums of `shared.figures`, float64."""
    counts = torch.stack([shared.steps[:-1].sum(), shared.dropped[:-1].sum()])
    return torch.cat([counts.double(), shared.figures[:-1].sum(dim=0)])


class Report(NamedTuple):
    """What a host answers.

    Attributes:
        change: (number of weights,) float32, what its workers have moved the weights by.
        sums: what `own_sums` has grown by.
        messages: what to say at the head.
    """

    change: np.ndarray
    sums: np.ndarray
    messages: list[str]


class Host:
    """Another machine's part in a run; an actor of Ray.

    With G the run's weights, w this machine's, and c what w was at its last report:

        take(G):   w += G - c           what the workers have done since the report stays in w
        report:    c = w, answer c - G  the head adds the answer to the run's weights

    Args:
        train: what a training worker does, `train.train`.
        checkpoint: the contents of a checkpoint.pt, made now, to start from as a resumed run does.
        seed: text that no other host has.
    """

    def __init__(self, train: Callable[..., None], checkpoint: bytes, seed: str) -> None:
        torch.set_num_threads(1)
        os.environ |= workers.ENVIRONMENT
        # A spawned process imports `__main__` first: it is to import this file, not Ray's worker.
        sys.modules["__main__"] = sys.modules[__name__]
        contents = torch.load(io.BytesIO(checkpoint), weights_only=True)
        args = argparse.Namespace(**contents["options"] | {"seed": seed})
        num_inputs = contents["model"]["conv1.weight"].shape[1]
        num_actions = contents["model"]["actor_linear.bias"].shape[0]
        self._shared = SharedState(args, num_inputs, num_actions)
        self._shared.restore(contents)
        self._shared.steps[:-1] = 0  # its own; the last slot has those of all others
        self._shared.steps[-1] = contents["steps"]
        self._at_report = weights_of(self._shared.model), own_sums(self._shared)
        self._messages: list[str] = []
        self._failure: str | None = None
        self._ended = threading.Event()
        self._start(train, args)

    def _start(self, train: Callable[..., None], args: argparse.Namespace) -> None:
        folder = Path(tempfile.mkdtemp(dir=Path.cwd()))  # in Ray's own, which it removes
        jobs = [
            Job(f"training worker {rank}", rank, train, (rank, args, self._shared, folder))
            for rank in range(args.num_processes)
        ]
        threading.Thread(target=self._supervise, args=(jobs, folder), daemon=True).start()

    def _supervise(self, jobs: list[Job], folder: Path) -> None:
        shared, spawn = self._shared, mp.get_context("spawn")
        try:
            flags = shared.ready, shared.stop, shared.restarts
            supervisor = Supervisor(spawn, jobs, *flags, folder, self._messages.append)
            with supervisor:
                for _ in supervisor.watch():
                    pass
        except Exception as error:
            self._failure = reason(error)
            self._ended.set()

    def learn(self, weights: np.ndarray, num_steps: int, seconds: float) -> Report:
        """Take the run's weights and steps, learn on for `seconds`, report what was learnt."""
        self.take(weights, num_steps)
        self._ended.wait(seconds)
        if self._failure:
            raise RuntimeError(self._failure)
        return self.report(weights)

    def take(self, weights: np.ndarray, num_steps: int) -> None:
        """Bring the weights up to the run's; what was learnt since the last report stays in."""
        weights_then, sums_then = self._at_report
        add_to(self._shared.model, torch.tensor(weights) - weights_then)
        self._shared.steps[-1] = num_steps - int(sums_then[0])

    def report(self, weights: np.ndarray) -> Report:
        """Return by how much this machine is ahead of `weights`, those that it took last."""
        sums_before = self._at_report[1]
        self._at_report = weights_of(self._shared.model), own_sums(self._shared)
        change = self._at_report[0] - torch.tensor(weights)
        messages = self._messages.copy()
        del self._messages[: len(messages)]
        return Report(change.numpy(), (self._at_report[1] - sums_before).numpy(), messages)
