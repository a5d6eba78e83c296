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
