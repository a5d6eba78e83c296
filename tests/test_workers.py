import itertools
import time

import pytest
import torch.multiprocessing as mp

import workers
from workers import CoreTurn

spawn = mp.get_context("spawn")


def take_a_turn(folder, rank, has_it, give_it_back):
    with CoreTurn(folder, rank):
        has_it.set()
        give_it_back.wait()


@pytest.fixture
def start(tmp_path):
    """Start a process that takes a turn and keeps it until told; return it with its two events."""
    started = []

    def start(rank):
        has_it, give_it_back = spawn.Event(), spawn.Event()
        process = spawn.Process(target=take_a_turn, args=(tmp_path, rank, has_it, give_it_back))
        process.start()
        started.append((process, has_it, give_it_back))  # an event that nobody refers to any more is gone
        return started[-1]

    yield start
    for process, *_ in started:
        process.kill()
        process.join()


def test_a_core_gives_one_turn_at_a_time_and_other_cores_theirs(start):
    cores = workers.num_cores()
    _, has_it, give_it_back = start(0)
    assert has_it.wait(20)
    _, other_core_has_it, _ = start(1)
    _, next_has_it, _ = start(cores)
    if cores > 1:
        assert other_core_has_it.wait(20)
    time.sleep(3)  # long enough to start up
    assert not next_has_it.is_set()
    give_it_back.set()
    assert next_has_it.wait(20)


@pytest.mark.parametrize("victim", ["the holder", "the next in line"])
def test_a_killed_worker_stalls_nobody(start, victim):
    cores = workers.num_cores()
    holder, has_it, give_it_back = start(0)
    assert has_it.wait(20)
    next_in_line, *_ = start(cores)
    time.sleep(3)
    _, last_has_it, _ = start(2 * cores)
    if victim == "the holder":
        next_in_line.kill()
        holder.kill()
    else:
        next_in_line.kill()
        give_it_back.set()
    assert last_has_it.wait(20)


def take_turns(folder, rank, all_here, order):
    turn = CoreTurn(folder, rank)
    all_here.wait()
    for _ in range(10):
        with turn:
            time.sleep(0.01)
            order.put(rank)


def test_a_turn_lasts_two_rollouts_and_then_is_somebody_elses(tmp_path):
    ranks = [n * workers.num_cores() for n in range(3)]
    all_here, order = spawn.Barrier(3), spawn.SimpleQueue()
    processes = [spawn.Process(target=take_turns, args=(tmp_path, rank, all_here, order)) for rank in ranks]
    for process in processes:
        process.start()
    rollouts = [order.get() for _ in range(30)]
    for process in processes:
        process.join()
    turns = rollouts[::2]
    assert turns == rollouts[1::2]
    last_with_company = max(n for n in range(15) if len(set(turns[n:])) > 1)
    assert all(a != b for a, b in itertools.pairwise(turns[1 : last_with_company + 1]))  # all stand in line by then
