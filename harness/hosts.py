"""Other machines, by Ray: each learns for a second, then adds what its weights have moved by.

To a run, another machine is one big worker of A3C. It has a `Host`, with training workers, shared
weights and a shared Adam of its own. The run's own machine, the head, has a `link`, a process that
sends each host the run's weights and adds the answer to them, in place and without a lock, as the
workers do. tests/README.md says what that costs.
"""

import argparse
import contextlib
import importlib.util
import io
import os
import re
import shutil
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import numpy as np
import torch
import torch.multiprocessing as mp

from harness import workers
from harness.checkpoint import dump
from harness.shared import SharedState
from harness.utils import reason, report_write_errors, say
from model import ActorCritic

DEFAULT_ADDRESS = "127.0.0.1:6379"  # where `ray start --head` listens
INSTALL = "pip install ray==2.60.0"  # all machines of a cluster need the same
CONNECT_WITHIN = 3.0  # seconds; Ray itself would try for minutes
LOOK_EVERY = 5.0  # seconds, for machines that have joined
SAY_AGAIN = 300.0  # seconds until a trouble that lasts is said again
END_WITHIN = 2.0  # seconds after the run's end until the link has ended; less than workers.GRACE
LEFT_ALONE = 30.0  # seconds that a machine gets no host after one has failed there
# Where Ray's own message does not say what to do.
CAUSES = {
    "ersion mismatch": "Ray or Python is another version here than on the cluster's head",
    "No node info": "this machine is not in the cluster: ray start --address=HOST:PORT",
}


def cluster_address(text: str) -> str:
    """Return an argparse argument that is HOST:PORT."""
    host, _, port = text.rpartition(":")
    is_host = bool(host.strip()) and (":" not in host or re.fullmatch(r"\[.+\]", host))
    if not is_host or not port.isdecimal() or not 0 < int(port) < 2**16:
        raise argparse.ArgumentTypeError(f"must be HOST:PORT, as {DEFAULT_ADDRESS}, not '{text}'")
    return text


def find_cluster(address: str) -> None:
    """Raise `ValueError` if Ray is not installed or if nothing listens at the address."""
    if importlib.util.find_spec("ray") is None:
        raise ValueError(f"Ray is not installed: {INSTALL}")
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), CONNECT_WITHIN).close()
    except OSError as error:
        what = f"no Ray cluster at {address} ({reason(error)})"
        raise ValueError(f"{what}; start one with: ray start --head") from None


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
            workers.Job(f"training worker {rank}", rank, train, (rank, args, self._shared, folder))
            for rank in range(args.num_processes)
        ]
        threading.Thread(target=self._supervise, args=(jobs, folder), daemon=True).start()

    def _supervise(self, jobs: list[workers.Job], folder: Path) -> None:
        shared, spawn = self._shared, mp.get_context("spawn")
        try:
            with workers.Supervisor(
                *(spawn, jobs, shared.ready, shared.stop, shared.restarts, folder),
                report=self._messages.append,
            ) as supervisor:
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


# The head's side.


def _end_with_the_run(args: argparse.Namespace, shared: SharedState) -> None:
    """End this process soon after the run, also while a call of Ray waits for what is gone.

    Ray ends the hosts with it.
    """
    while not shared.is_over(args.max_steps):
        time.sleep(0.1)
    time.sleep(END_WITHIN)
    os._exit(0)


@contextlib.contextmanager
def _connected(address: str) -> Iterator[None]:
    """Be connected to the cluster, whose other machines get the program's files from here."""
    import ray

    try:
        with tempfile.TemporaryDirectory() as copy:
            _copy_program(Path(copy))
            ray.init(address, runtime_env={"working_dir": copy}, log_to_driver=False)
        yield
    finally:
        ray.shutdown()  # also after half a connection, or the next one would be refused


def _copy_program(folder: Path) -> None:
    root = Path(__file__).parents[1]
    for path in [*root.glob("*.py"), *root.glob("harness/*.py")]:
        target = folder / path.relative_to(root)
        target.parent.mkdir(exist_ok=True)
        shutil.copy(path, target)


@dataclass
class _Machine:
    """One that has a host."""

    name: str
    node_id: str
    host: Any
    has_joined: bool = False  # its first change has arrived


class Link:
    """Keeps a host on each other machine of the cluster, and exchanges weights with all of them."""

    def __init__(
        self,
        train: Callable[..., None],
        args: argparse.Namespace,
        shared: SharedState,
        out: TextIO | None,
    ) -> None:
        self._train, self._args, self._shared, self._out = train, args, shared, out
        self._under_way: dict[Any, _Machine] = {}  # by the call of `learn`, one a machine
        self._not_before: dict[str, float] = {}  # by node, when it may get a host
        self._said: dict[str, str] = {}  # by node, why it did not join
        self._last_look = -LOOK_EVERY
        self.has_joined = False  # some machine

    def exchange(self) -> None:
        """Exchange weights with all hosts until the run ends; raises what Ray raises."""
        import ray

        while not self._shared.is_over(self._args.max_steps):
            if time.monotonic() - self._last_look > LOOK_EVERY:
                self._last_look = time.monotonic()
                self._look_for_machines()
            if not self._under_way:
                time.sleep(0.2)
                continue
            for call in ray.wait(list(self._under_way), timeout=0.2)[0]:
                machine = self._under_way.pop(call)
                try:
                    self._add(machine, ray.get(call))
                except (ray.exceptions.RayError, ValueError) as error:
                    self._lose(machine, error)
                else:
                    self._ask(machine)
        for machine in self._under_way.values():
            ray.kill(machine.host)

    def _look_for_machines(self) -> None:
        import ray

        own = ray.get_runtime_context().get_node_id()
        have = {own, *(machine.node_id for machine in self._under_way.values())}
        for node in ray.nodes():
            node_id = node["NodeID"]
            due = time.monotonic() >= self._not_before.get(node_id, 0.0)
            if node["Alive"] and node_id not in have and due:
                machine = _Machine(node["NodeManagerAddress"], node_id, self._start_host(node_id))
                self._ask(machine)

    def _start_host(self, node_id: str) -> Any:
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        there = NodeAffinitySchedulingStrategy(node_id, soft=False)
        host = ray.remote(Host).options(num_cpus=0, scheduling_strategy=there)
        checkpoint = dump(self._shared.contents(self._args, elapsed=0.0))
        # Also a host that follows another on the same machine is to draw otherwise.
        return host.remote(self._train, checkpoint, f"{self._args.seed}, {node_id}, {time.time()}")

    def _ask(self, machine: _Machine) -> None:
        weights = weights_of(self._shared.model).numpy()
        num_steps, seconds = self._shared.total_steps(), self._args.ray_interval
        self._under_way[machine.host.learn.remote(weights, num_steps, seconds)] = machine

    def _add(self, machine: _Machine, report: Report) -> None:
        change, sums = torch.tensor(report.change), torch.tensor(report.sums)
        if not (change.isfinite().all() and sums.isfinite().all()):
            raise ValueError("what it has learnt is not finite")
        add_to(self._shared.model, change)
        num_steps, num_dropped = sums[:2].long()
        self._shared.steps[-1] += num_steps
        self._shared.dropped[-1] += num_dropped
        self._shared.figures[-1] += sums[2:]
        for message in report.messages:
            say(f"machine {machine.name}: {message}", self._out)
        if not machine.has_joined and num_steps > 0:
            machine.has_joined = self.has_joined = True
            self._say_how_many(f"machine {machine.name} joins", machine)

    def _lose(self, machine: _Machine, error: Exception) -> None:
        import ray

        ray.kill(machine.host)
        self._not_before[machine.node_id] = time.monotonic() + LEFT_ALONE
        cause = cause_of(error)
        if machine.has_joined:
            self._say_how_many(f"machine {machine.name} is gone: {cause}")
        elif self._said.get(machine.node_id) != cause:  # else it is tried every half minute
            self._said[machine.node_id] = cause
            say(f"machine {machine.name} does not join: {cause}", self._out)

    def _say_how_many(self, what: str, *more: _Machine) -> None:
        num = 1 + sum(m.has_joined for m in [*self._under_way.values(), *more])
        say(f"{what}; machines that train now: {num}", self._out)


def cause_of(error: Exception) -> str:
    """Return what to do, or the cause: the first sentence of the last line of what Ray says."""
    for sign, cause in CAUSES.items():
        if sign in str(error):
            return cause
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    cause = lines[-1].partition(". ")[0] if lines else type(error).__name__
    hint = "; there: pip install -r requirements.txt" if "No module named" in cause else ""
    return cause + hint


def link(
    train: Callable[..., None],
    args: argparse.Namespace,
    shared: SharedState,
    run_folder: Path,
    restarts: int,
) -> None:
    """Be the process that links the run with other machines, until the run ends.

    A process of its own, as Ray ends the one that is connected when the cluster's head is gone.
    What Ray prints goes to ray.log in the run folder.
    """
    shared.ready[-1] = True  # before it connects, which may take long: others wait to start up
    torch.set_num_threads(1)
    threading.Thread(target=_end_with_the_run, args=(args, shared), daemon=True).start()
    out = None if sys.stdout is None else os.fdopen(os.dup(1), "w")  # None: was closed
    path, log = run_folder / "ray.log", os.open(os.devnull, os.O_WRONLY)
    with report_write_errors(path):
        log = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    os.dup2(log, 1)
    os.dup2(log, 2)
    said, said_at = None, 0.0
    while not shared.is_over(args.max_steps):
        attempt = Link(train, args, shared, out)
        try:
            find_cluster(args.ray)
            with _connected(args.ray):
                attempt.exchange()
        except Exception as error:
            cause = cause_of(error)
            said = None if attempt.has_joined else said
            if cause != said or time.monotonic() - said_at > SAY_AGAIN:
                said, said_at = cause, time.monotonic()
                say(f"no other machines for now: {cause}", out)
            time.sleep(LOOK_EVERY)
