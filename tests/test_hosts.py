import argparse
import importlib.util
import io
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch
from conftest import gone, options

from harness import workers
from harness.checkpoint import dump
from harness.hosts import Host, Report, add_to, own_sums, weights_of
from harness.link import LEFT_ALONE, Link, _Machine, cause_of, cluster_address, find_cluster
from harness.shared import SharedState

ray_is_here = pytest.mark.skipif(
    importlib.util.find_spec("ray") is None, reason="needs pip install ray"
)


@pytest.fixture(autouse=True)
def undone(monkeypatch):
    """A host changes the environment, and what spawned processes import; here, not for good."""
    for name, value in workers.ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setitem(sys.modules, "__main__", sys.modules["__main__"])


class IdleHost(Host):
    """A host whose workers are the test."""

    def _start(self, train, args):
        self.seed = args.seed


class LinkOfHere(Link):
    """A link to hosts in this process; the test lets them learn, and exchange."""

    def __init__(self, shared, out):
        super().__init__(None, options(ray_interval=0.0, seed=7), shared, out)
        self.machines = []

    def join(self, name):
        checkpoint = dump(self._shared.contents(self._args, elapsed=0.0))
        host = IdleHost(None, checkpoint, f"7, {name}")
        host.weights = weights_of(self._shared.model).numpy()
        host.take(host.weights, self._shared.total_steps())
        self.machines.append(_Machine(name, name, host))
        return host

    def exchange_with(self, machine, meanwhile=lambda where: None):
        """Let a host report and take new weights; its workers learn on `meanwhile`."""
        report = machine.host.report(machine.host.weights)
        meanwhile(machine.host._shared)
        self._add(machine, report)
        machine.host.weights = weights_of(self._shared.model).numpy()
        meanwhile(machine.host._shared)
        machine.host.take(machine.host.weights, self._shared.total_steps())


@pytest.fixture
def shared():
    torch.manual_seed(0)
    return SharedState(options(), 1, 6)


def update(shared, rng):
    """Change a machine's weights and counts as a training worker would; return the change."""
    torch.manual_seed(rng.randrange(2**31))
    change = torch.randn_like(weights_of(shared.model)) * 1e-3
    add_to(shared.model, change)
    shared.steps[0] += 20
    shared.add_figures(0, 20, *torch.ones(3), 1.0, 1e-4)
    shared.add_episode(0, -20.0, 20)
    return change


def test_every_update_of_every_machine_reaches_the_run_exactly_once(shared):
    rng, out = random.Random(0), io.StringIO()
    link = LinkOfHere(shared, out)
    start = weights_of(shared.model)
    shared.steps[0] = 1000
    machines = [link.join(name) for name in ("a", "b", "c")]
    updates = []
    learn = lambda where: updates.append(update(where, rng))  # noqa: E731
    for _ in range(50):
        for where in rng.choices([shared, *(host._shared for host in machines)], k=3):
            learn(where)
        link.exchange_with(rng.choice(link.machines), meanwhile=learn)
    total, num_updates = sum(updates), len(updates)
    for machine in link.machines:
        link.exchange_with(machine)
    torch.testing.assert_close(weights_of(shared.model), start + total, rtol=0, atol=2e-6)
    assert shared.total_steps() == 1000 + 20 * num_updates
    means, num_episodes, _ = shared.mean_figures(since=torch.zeros(()))
    assert num_episodes == num_updates
    assert means["training_reward"] == -20.0
    for machine in link.machines:  # what the others have learnt reaches each
        link.exchange_with(machine)
        there = machine.host._shared
        torch.testing.assert_close(
            weights_of(there.model), weights_of(shared.model), rtol=0, atol=2e-6
        )
        assert there.total_steps() == shared.total_steps()  # schedules and --max-steps go by it


def test_a_host_takes_the_run_s_weights_before_it_learns(shared):
    host = LinkOfHere(shared, io.StringIO()).join("a")
    update(shared, random.Random(0))
    report = host.learn(weights_of(shared.model).numpy(), shared.total_steps(), 0.0)
    torch.testing.assert_close(weights_of(host._shared.model), weights_of(shared.model))
    assert abs(report.change).max() < 1e-6
    assert host._shared.total_steps() == 20


def test_a_machine_starts_with_all_that_a_checkpoint_holds(shared):
    update(shared, random.Random(0))
    for p in shared.model.parameters():
        p.grad = torch.ones_like(p)
    shared.optimizers[0].step()
    shared.statistics[:] = torch.tensor([0.5, 0.25, 1000.0])
    host = LinkOfHere(shared, io.StringIO()).join("a")
    torch.testing.assert_close(weights_of(host._shared.model), weights_of(shared.model))
    pairs = zip(
        shared.optimizers[0].state.values(), host._shared.optimizers[0].state.values(), strict=True
    )
    for here, there in pairs:
        for name in here:
            torch.testing.assert_close(here[name], there[name])
    assert host._shared.statistics.tolist() == [0.5, 0.25, 1000.0]
    assert host.seed == "7, a"  # another than the run's, or all would play the same games
    assert own_sums(host._shared).sum() == 0
    assert host._shared.total_steps() == shared.total_steps() == 20  # schedules go by it


@pytest.mark.parametrize("what", ["change", "sums"])
def test_a_report_that_is_not_finite_changes_nothing(what, shared):
    link = LinkOfHere(shared, io.StringIO())
    link.join("a")
    before = weights_of(shared.model)
    good = Report(torch.ones_like(before).numpy(), own_sums(shared).numpy(), [])
    getattr(good, what)[-1] = float("nan")
    with pytest.raises(ValueError, match="not finite"):
        link._add(link.machines[0], good)
    assert (weights_of(shared.model) == before).all()
    assert shared.total_steps() == 0


def test_what_a_machine_has_to_say_is_said_with_its_name(shared):
    out = io.StringIO()
    link = LinkOfHere(shared, out)
    host = link.join("10.0.0.2")
    update(host._shared, random.Random(0))
    host._messages.append("training worker 3 died: signal 9, SIGKILL; it is started again")
    link.exchange_with(link.machines[0])
    link.exchange_with(link.machines[0])
    assert out.getvalue() == (
        "machine 10.0.0.2: training worker 3 died: signal 9, SIGKILL; it is started again\n"
        "machine 10.0.0.2 joins; machines that train now: 2\n"
    )


def test_why_a_machine_does_not_join_is_said_once_and_that_it_is_gone_each_time(
    shared, monkeypatch
):
    killed, out = [], io.StringIO()
    monkeypatch.setitem(sys.modules, "ray", SimpleNamespace(kill=killed.append))
    link = LinkOfHere(shared, out)
    host = link.join("10.0.0.2")
    machine = link.machines[0]
    for _ in range(3):
        link._lose(machine, RuntimeError("task failed\nImportError: No module named 'gym'\n"))
    update(host._shared, random.Random(0))
    link.exchange_with(machine)
    link._lose(machine, RuntimeError("The node has died. Some common causes are: ..."))
    assert out.getvalue() == (
        "machine 10.0.0.2 does not join: ImportError: No module named 'gym'; "
        "there: pip install -r requirements.txt\n"
        "machine 10.0.0.2 joins; machines that train now: 2\n"
        "machine 10.0.0.2 is gone: The node has died; machines that train now: 1\n"
    )
    assert killed == [host] * 4
    assert link._not_before["10.0.0.2"] > time.monotonic() + LEFT_ALONE - 5


def test_workers_that_die_too_often_end_a_host_and_not_the_run(shared, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    checkpoint = dump(shared.contents(options(), elapsed=0.0))
    weights = weights_of(shared.model).numpy()
    host = Host(fail_at_once, checkpoint, "1")
    start = time.monotonic()
    with pytest.raises(RuntimeError, match=r"training worker 0 died: ValueError: a bug .*4 times"):
        host.learn(weights, 0, 100.0)
    assert time.monotonic() - start < 90  # it does not wait for the interval's end


def fail_at_once(*_):
    raise ValueError("a bug")


@pytest.mark.parametrize(
    "text", ["", "there", ":6379", "there:", "there:0", "there:65536", "a:b", "::1:80"]
)
def test_an_address_is_host_and_port(text):
    with pytest.raises(
        argparse.ArgumentTypeError, match=r"must be HOST:PORT, as 127\.0\.0\.1:6379"
    ):
        cluster_address(text)


def test_ray_that_is_missing_and_a_cluster_that_is_not_there_are_told(monkeypatch):
    with socket.socket() as listener:  # bound, but not listening
        listener.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{listener.getsockname()[1]}"
        with pytest.raises(ValueError, match=rf"no Ray cluster at {address} .*: ray start --head"):
            find_cluster(address)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="Ray is not installed: pip install ray=="):
        find_cluster("127.0.0.1:6379")


@pytest.fixture
def cluster(monkeypatch):
    """A cluster of Ray with only a head, on this machine; it can `join` and `remove_node`."""
    from ray.cluster_utils import Cluster

    monkeypatch.setenv("RAY_worker_niceness", "0")  # 15 starves on a full machine

    lean = {"num_cpus": 0, "object_store_memory": 100_000_000, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args=lean)
    cluster.join = lambda: cluster.add_node(num_cpus=0, object_store_memory=100_000_000)
    yield cluster
    cluster.shutdown()


@pytest.mark.parametrize(
    ("said", "cause"),
    [
        ("", "RuntimeError"),
        ("task failed\n  in learn\nValueError: a bug. And more.\n\n", "ValueError: a bug"),
        ("Version mismatch: Ray: 2.60.0\n Python: 3.12.1", "Ray or Python is another version"),
        ("No node info found matching", "this machine is not in the cluster: ray start --address="),
        ("\nModuleNotFoundError: No module named 'gym'", "'gym'; there: pip install -r requirem"),
    ],
)
def test_a_cause_is_one_line_that_says_what_to_do(said, cause):
    line = cause_of(RuntimeError(said))
    assert cause in line
    assert "\n" not in line


def workers_of_hosts():
    """Return the process ids of the hosts that this test has made and of their workers."""
    table = subprocess.run(["ps", "-Aww", "-o", "pid=,ppid=,args="], capture_output=True, text=True)
    rows = [row.split(maxsplit=2) for row in table.stdout.splitlines()]
    parent_of = {pid: parent for pid, parent, _ in rows}

    def is_ours(pid):
        return pid == str(os.getpid()) or (pid in parent_of and is_ours(parent_of[pid]))

    found = {pid for pid, _, command in rows if command.startswith("ray::Host") and is_ours(pid)}
    return [int(pid) for pid, parent, _ in rows if pid in found or parent in found]


@ray_is_here
def test_machines_join_go_and_join_again_while_the_head_trains(cluster, start_main, tmp_path):
    run = start_main(
        *("--num-processes", "1", "--record-every", "0", "--max-episode-length", "100"),
        *("--ray", cluster.address, "--ray-interval", "0.2"),
    )
    says = lambda what: run.wait_for(lambda: re.search(what, run.out + run.err, re.M))  # noqa: E731
    says("^Time ")
    node = cluster.join()
    says(r"^machine \S+ joins; machines that train now: 2$")
    cluster.remove_node(node, allow_graceful=False)  # as if its power went
    says(r"^machine \S+ is gone: .*; machines that train now: 1$")
    os.kill(max(run.children()[0]), signal.SIGKILL)  # the link, which was started last
    says("^link died: signal 9, SIGKILL; it is started again$")
    cluster.join()
    run.wait_for(lambda: run.out.count("joins; machines that train now: 2") == 2)
    there = run.wait_for(workers_of_hosts)
    status, seconds = run.stop(signal.SIGINT)
    assert gone(there, within=5 - seconds)
    assert (status, seconds < 5) == (130, True)
    assert run.out.splitlines()[-1].endswith(f"--resume {run.folder} --ray {cluster.address}")
    assert not run.children()[0]
    assert "Connected to Ray cluster" in (run.folder / "ray.log").read_text()
