"""The head's link to other machines, through Ray: a `Host` (harness/hosts.py) on each of them."""

import argparse
import contextlib
import importlib.util
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
from typing import Any, TextIO

import torch

from harness.checkpoint import dump
from harness.hosts import Host, Report, add_to, weights_of
from harness.shared import SharedState
from harness.utils import reason, report_write_errors, say

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
    except (OSError, UnicodeError) as error:  # the second: no name that a host can have
        what = f"no Ray cluster at {address} ({reason(error)})"
        raise ValueError(f"{what}; start one with: ray start --head") from None


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
