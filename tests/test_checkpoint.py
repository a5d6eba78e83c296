import math
import os
import random
import threading
from pathlib import Path

import pytest
import torch
from test_train import options

import main
from checkpoint import WINDOW, EpisodeLog, RunState, dump, read, write
from model import ActorCritic
from train import a3c_loss, hand_over_gradients


def learn(state, seed):
    """Update the shared weights from a stored rollout, as a worker does."""
    torch.manual_seed(seed)
    pictures = state.model.new_pictures(5)
    pictures[0].normal_()
    state.model.convolve(pictures)
    values, logits = state.model.unroll(pictures, state.model.initial_state())
    loss, _ = a3c_loss(logits, values, [0, 5, 2, 1, 1], [1.0, 0.0, -1.0, 0.0, 1.0], 0.3, options())
    parameters = list(state.model.parameters())
    hand_over_gradients(torch.autograd.grad(loss, parameters), parameters)
    state.optimizers[0].step()


def bits(state):
    moments = [tensor for s in state.optimizers[0].state.values() for tensor in s.values()]
    return [t.detach().clone() for t in (*state.model.parameters(), *moments)]


@pytest.fixture
def saved(tmp_path):
    """A folder with a checkpoint, and the state that was saved in it."""
    torch.manual_seed(0)
    state = RunState(options(), 1, 6)
    for seed in range(3):
        learn(state, seed)
    state.steps[0] = 60
    for reward in -21.0, -19.0:
        state.count_episode(reward, (0.4, 0.2, 1234))
    state.save(tmp_path, options(), elapsed=12.5)
    return tmp_path, state


def test_a_checkpoint_is_whole_though_workers_go_on_learning(saved):
    folder, state = saved
    stop = threading.Event()

    def learn_on():
        while not stop.is_set():
            for tensor in state.optimizers[0].state.values():
                tensor["exp_avg"].add_(1)

    workers = [threading.Thread(target=learn_on) for _ in range(2)]
    for worker in workers:
        worker.start()
    try:
        for _ in range(20):
            state.save(folder, options(), elapsed=12.5)
            read(folder / "checkpoint.pt")
    finally:
        stop.set()
        for worker in workers:
            worker.join()


def test_a_restored_run_learns_on_to_the_same_bits(saved):
    folder, state = saved
    restored = RunState(options(), 1, 6)
    restored.restore(read(folder / "checkpoint.pt"))
    assert all(p.is_shared() for p in restored.model.parameters())
    assert all(t.is_shared() for s in restored.optimizers[0].state.values() for t in s.values())
    for seed in range(3, 6):
        for a, b in zip(bits(state), bits(restored), strict=True):
            assert torch.equal(a, b)
        learn(state, seed)
        learn(restored, seed)
    assert not torch.equal(bits(state)[0], bits(RunState(options(), 1, 6))[0])


def test_a_checkpoint_holds_what_a_run_needs(saved):
    folder, _ = saved
    restored = RunState(options(num_processes=3), 1, 6)
    restored.restore(read(folder / "checkpoint.pt"))
    assert restored.steps.sum() == 60
    assert restored.elapsed == 12.5
    assert restored.episodes == 2
    assert restored.mean_reward() == (2, -20.0)
    assert restored.observation_statistics.tolist() == [0.4, 0.2, 1234.0]
    assert restored.life == 1  # other seeds than in the sitting before
    contents = read(folder / "checkpoint.pt")
    assert contents["options"]["gamma"] == 0.99
    assert contents["versions"]["torch"] == str(torch.__version__)


def test_with_no_shared_every_worker_has_its_own_adam_again(tmp_path):
    args = options(num_processes=2, no_shared=True)
    state = RunState(args, 1, 6)
    assert state.optimizer(0) is not state.optimizer(1)
    learn(state, 0)  # by worker 0
    state.save(tmp_path, args, 0.0)
    restored = RunState(options(num_processes=3, no_shared=True), 1, 6)
    restored.restore(read(tmp_path / "checkpoint.pt"))
    counts = [next(iter(optimizer.state.values()))["step"].item() for optimizer in restored.optimizers]
    assert counts == [1.0, 0.0, 1.0]


class Hostile:
    def __init__(self, command):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


def spoil(folder, how):
    path = folder / "checkpoint.pt"
    data, contents = path.read_bytes(), read(path)
    if how == "cut short":
        path.write_bytes(data[: len(data) // 2])
    elif how == "a flipped byte":
        middle = len(data) // 2
        path.write_bytes(data[:middle] + bytes([data[middle] ^ 255]) + data[middle + 1 :])
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "text":
        path.write_text("no checkpoint at all")
    elif how == "hostile":
        torch.save(contents | {"steps": Hostile(f"touch {folder / 'harm'}")}, path)
    elif how == "a number":
        write(dump(3), path)
    elif how == "another network":
        write(dump(contents | {"model": ActorCritic(1, 4).state_dict()}), path)
    elif how == "stretched moments":
        contents["moments"][0][0]["exp_avg"] = torch.zeros(1)
        write(dump(contents), path)
    elif how == "bad options":
        write(dump(contents | {"options": contents["options"] | {"num_processes": -3}}), path)
    elif how == "unknown options":
        write(dump(contents | {"options": contents["options"] | {"colour": "red"}}), path)
    else:
        write(dump({name: value for name, value in contents.items() if name != how}), path)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("cut short", "checkpoint.pt is damaged, or not one of this program's files"),
        ("a flipped byte", "checkpoint.pt is damaged"),
        ("empty", "checkpoint.pt is damaged"),
        ("text", "checkpoint.pt is damaged"),
        ("hostile", "checkpoint.pt is damaged, or not one of this program's files"),
        ("a number", "checkpoint.pt is damaged, or not one of this program's files"),
        ("another network", "not a checkpoint of this network"),
        ("stretched moments", "not a checkpoint of this network"),
        ("bad options", "argument --num-processes: must be a whole number of at least 1, not '-3'"),
        ("unknown options", "unrecognized arguments: --colour=red"),
        ("options", "checkpoint.pt is not a checkpoint"),
        ("rewards", "not a checkpoint of this network"),
    ],
)
def test_a_spoilt_checkpoint_is_one_line_and_untouched(saved, how, message, capsys):
    folder, _ = saved
    spoil(folder, how)
    data = (folder / "checkpoint.pt").read_bytes()
    with pytest.raises(SystemExit) as stop:
        main.main(["--resume", str(folder), "--max-steps", "1000"])
    assert stop.value.code == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert message in err
    assert (folder / "checkpoint.pt").read_bytes() == data
    assert not (folder / "harm").exists()
    assert not (folder / "options.json").exists()


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("--env-name Breakout-v4", "plays PongDeterministic-v4, not Breakout-v4"),
        ("", "the run has made its 60 steps: name a higher --max-steps"),
        ("--max-steps 50", "the run has made its 50 steps: name a higher --max-steps"),
        ("--lr fast", "argument --lr: must be a number"),
    ],
)
def test_a_run_that_cannot_go_on_says_why(saved, argv, message, capsys):
    folder, _ = saved
    with pytest.raises(SystemExit) as stop:
        main.main(["--resume", str(folder), *argv.split()])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_a_run_that_has_reached_its_target_says_so(saved, capsys):
    folder, state = saved
    for _ in range(WINDOW):
        state.count_episode(3.0, (0.4, 0.2, 1234))
    state.save(folder, options(target_reward=-5.0), 0.0)
    with pytest.raises(SystemExit):
        main.main(["--resume", str(folder), "--max-steps", "1000"])
    assert "the run has reached its -5.0: name a higher --target-reward" in capsys.readouterr().err


def test_the_runs_own_options_hold_and_those_named_again_win(saved):
    folder, state = saved
    own = options(gamma=0.5, no_shared=True, target_reward=-3.5, max_steps=10**6)
    state.save(folder, own, 0.0)
    argv = ["--resume", str(folder), "--lr", "0.5", "--num-processes", "7"]
    args, _ = main.load_run(main.parse_args(argv), argv)
    expected = vars(own) | {"lr": 0.5, "num_processes": 7, "resume": folder}
    assert vars(args) == expected


def test_the_best_model_is_the_latest_until_the_window_is_full_and_then_the_highest_mean(tmp_path):
    args = options()
    state, rng = RunState(args, 1, 6), random.Random(0)
    rewards = [rng.uniform(-21, -18) for _ in range(WINDOW)] + [0.0] * 5 + [-21.0] * 5 + [1.0] * 6
    kept = []
    for n, reward in enumerate(rewards):
        state.count_episode(reward, (0.4, 0.2, n))
        state.steps[0] = n
        state.save_if_best(tmp_path, args, state.model)
        kept.append(read(tmp_path / "best.pt")["steps"])
    assert kept[:WINDOW] == list(range(WINDOW))
    means = [sum(rewards[n + 1 - WINDOW : n + 1]) / WINDOW for n in range(WINDOW - 1, len(rewards))]
    highest = [max(range(n + 1), key=means.__getitem__) for n in range(len(means))]
    assert kept[WINDOW - 1 :] == [WINDOW - 1 + n for n in highest]
    assert 0 < highest[-6] < highest[-1]  # the means rose, fell and rose again
    best = read(tmp_path / "best.pt")
    assert best["mean_reward"] == pytest.approx(sum(rewards[-WINDOW:]) / WINDOW)
    assert best["env_name"] == "PongDeterministic-v4"
    assert best["observation_statistics"].tolist() == [0.4, 0.2, len(rewards) - 1]
    assert set(best["model"]) == set(state.model.state_dict())
    assert (tmp_path / "best.pt").stat().st_size < 2.5e6


def test_a_best_model_that_could_not_be_written_is_not_taken_for_written(tmp_path, capsys):
    state = RunState(options(), 1, 6)
    state.count_episode(1.0, (0.4, 0.2, 1))
    (tmp_path / "best.pt.new").mkdir()  # in the way
    state.save_if_best(tmp_path, options(), state.model)
    assert "best.pt not written: " in capsys.readouterr().err
    assert not state.best.any()
    (tmp_path / "best.pt.new").rmdir()
    state.save_if_best(tmp_path, options(), state.model)
    assert state.best.tolist() == [1.0, 1.0]
    assert (tmp_path / "best.pt").exists()


def test_the_mean_of_no_episode_reaches_no_target():
    state = RunState(options(), 1, 6)
    assert math.isnan(state.mean_reward()[1])
    assert not state.target_reached(-100.0)
    for _ in range(WINDOW - 1):
        state.count_episode(5.0, (0.4, 0.2, 1))
    assert not state.target_reached(-100.0)
    state.count_episode(5.0, (0.4, 0.2, 1))
    assert state.target_reached(5.0)
    assert not state.target_reached(5.1)
    assert not state.target_reached(None)


def test_rows_after_the_checkpoint_move_to_the_backup(tmp_path):
    log = EpisodeLog(tmp_path, 0)
    for n in range(4):
        log.append(n, 1.5, 100 * n)
    EpisodeLog(tmp_path, 2).append(2, 7.5, 250)
    assert Path(tmp_path, "episodes.csv").read_text() == EpisodeLog.HEADER + "\n0,1.5,0\n1,1.5,100\n2,7.5,250\n"
    assert Path(tmp_path, "episodes.csv.bak").read_text() == "2,1.5,200\n3,1.5,300\n"
    EpisodeLog(tmp_path, 3)
    assert Path(tmp_path, "episodes.csv.bak").read_text().count("\n") == 2
