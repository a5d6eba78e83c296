import os
import re
import sys
import threading

import pytest
import torch
import torch.multiprocessing as mp
from conftest import options, refused

from harness.checkpoint import (
    BestAgent,
    dump,
    load_agent,
    make_run_folder,
    read,
    read_checkpoint,
)
from harness.episodes import WINDOW, Episode, EpisodeLog
from harness.shared import SharedState
from harness.utils import write
from harness.workers import FINISH, STOP
from model import ActorCritic

STATISTICS = (0.4, 0.2, 1234)


def float64(*numbers):
    return torch.tensor(numbers, dtype=torch.float64)


def learn(shared, seed, rank=0):
    """Update the shared weights, as a worker does, but from gradients drawn at random."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in shared.model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    shared.optimizer(rank).step()


def bits(shared):
    moments = [tensor for s in shared.optimizer(0).state.values() for tensor in s.values()]
    return [t.detach().clone() for t in (*shared.model.parameters(), *moments)]


@pytest.fixture
def saved(tmp_path):
    """A folder with a checkpoint of 60 steps, and the state that was saved in it."""
    torch.manual_seed(0)
    shared = SharedState(options(), 1, 6)
    for seed in range(3):
        learn(shared, seed)
    shared.steps[0], shared.restarts[0] = 60, 2
    shared.statistics[:] = float64(*STATISTICS)
    shared.save(tmp_path, options(), elapsed=12.5)
    return tmp_path, shared


def change(folder, **contents):
    """Write the folder's checkpoint again, with some of its contents changed."""
    path = folder / "checkpoint.pt"
    write(dump(read(path) | contents), path)


# The run folder.


def test_run_folders_are_numbered(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert [str(make_run_folder(None, "ALE/Pong-v5")) for _ in range(2)] == [
        "runs/ALE-Pong-v5-1",
        "runs/ALE-Pong-v5-2",
    ]


@pytest.mark.parametrize(
    ("name", "way_on"),
    [
        ("options.json", ""),
        ("episodes.csv", ""),
        ("training.csv", ""),
        ("best.pt", ""),
        ("learning_curve.png", ""),
        ("videos", ""),
        ("checkpoint.pt", ", or --resume it"),
    ],
)
def test_a_folder_that_holds_any_of_a_run_s_files_is_refused(name, way_on, tmp_path):
    (tmp_path / name).symlink_to("nowhere")
    with pytest.raises(ValueError, match=f"already holds a run: name another folder{way_on}$"):
        make_run_folder(tmp_path, "Pong-v0")


# Saving and resuming.


def test_a_checkpoint_is_whole_though_workers_go_on_learning(saved):
    folder, shared = saved
    stop = threading.Event()

    def learn_on():
        while not stop.is_set():
            for tensor in shared.optimizer(0).state.values():
                tensor["exp_avg"].add_(1)

    workers = [threading.Thread(target=learn_on) for _ in range(2)]
    for worker in workers:
        worker.start()
    try:
        for _ in range(20):
            shared.save(folder, options(), elapsed=12.5)
            read(folder / "checkpoint.pt")
    finally:
        stop.set()
        for worker in workers:
            worker.join()


def test_a_restored_run_learns_on_to_the_same_bits(saved):
    folder, shared = saved
    restored = SharedState(options(), 1, 6)
    assert not torch.equal(bits(shared)[0], bits(restored)[0])
    restored.restore(read_checkpoint(folder))
    assert all(p.is_shared() for p in restored.model.parameters())
    assert all(t.is_shared() for s in restored.optimizer(0).state.values() for t in s.values())
    for seed in range(3, 6):
        for a, b in zip(bits(shared), bits(restored), strict=True):
            assert torch.equal(a, b)
        learn(shared, seed)
        learn(restored, seed)


def test_a_checkpoint_holds_what_a_run_needs(saved):
    folder, _ = saved
    restored = SharedState(options(num_processes=3), 1, 6)
    restored.restore(read_checkpoint(folder))
    assert restored.total_steps() == 60
    assert restored.elapsed == 12.5
    assert restored.statistics.tolist() == list(STATISTICS)
    assert restored.restarts == 3  # other seeds than in the session before
    contents = read_checkpoint(folder)
    assert contents["options"]["gamma"] == 0.99
    assert contents["versions"]["torch"] == str(torch.__version__)


def test_with_no_shared_every_worker_has_its_own_adam_again(tmp_path):
    args = options(num_processes=2, no_shared=True)
    shared = SharedState(args, 1, 6)
    assert shared.optimizer(0) is not shared.optimizer(1)
    learn(shared, 0)  # by worker 0
    shared.save(tmp_path, args, 0.0)
    restored = SharedState(options(num_processes=3, no_shared=True), 1, 6)
    restored.restore(read_checkpoint(tmp_path))
    counts = [
        next(iter(optimizer.state.values()))["step"].item() for optimizer in restored.optimizers
    ]
    assert counts == [1.0, 0.0, 1.0]


def test_a_process_changes_the_weights_and_the_moments_that_all_share():
    args = options(num_processes=2, no_shared=True)
    torch.manual_seed(0)
    shared = SharedState(args, 1, 6)
    torch.manual_seed(0)
    twin = SharedState(args, 1, 6)
    process = mp.get_context("spawn").Process(target=learn, args=(shared, 7, 1))
    process.start()
    process.join()
    learn(twin, 7, 1)
    assert [optimizer.num_updates() for optimizer in shared.optimizers] == [0, 1]
    assert all(map(torch.equal, shared.model.parameters(), twin.model.parameters()))
    for state, expected in zip(
        shared.optimizer(1).state.values(), twin.optimizer(1).state.values(), strict=True
    ):
        assert all(torch.equal(state[name], expected[name]) for name in expected)


def test_a_checkpoint_that_cannot_be_written_costs_a_line(saved, capsys):
    folder, shared = saved
    (folder / "checkpoint.pt.new").mkdir()  # in the way
    shared.steps[0] = 80
    shared.save(folder, options(), elapsed=13.5)
    err = capsys.readouterr().err
    assert err.startswith(f"{folder}/checkpoint.pt not written: ")
    assert err.count("\n") == 1
    assert read_checkpoint(folder)["steps"] == 60


@pytest.mark.parametrize("spoil", ["model", "moments"])
def test_what_could_not_be_resumed_takes_no_checkpoint_s_place(saved, spoil, capsys):
    folder, shared = saved
    before = (folder / "checkpoint.pt").read_bytes()
    optimizer = shared.optimizers[0].state[shared.model.critic_linear.bias]
    tensor = shared.model.critic_linear.bias if spoil == "model" else optimizer["exp_avg_sq"]
    with torch.no_grad():
        tensor[0] = float("inf")
    shared.save(folder, options(), 60.0)
    assert (folder / "checkpoint.pt").read_bytes() == before
    assert "not written: weights or Adam's moments are not finite\n" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("platform", "message"),
    [
        ("linux", "no room: 9 MiB of shared memory are needed (/dev/shm; in a container, --shm-"),
        ("darwin", "no shared memory: no room"),
    ],
)
def test_where_there_is_no_shared_memory_the_message_fits_the_system(
    platform, message, monkeypatch
):
    def fail(*_):
        raise RuntimeError("no room\nand more")

    monkeypatch.setattr(sys, "platform", platform)
    monkeypatch.setattr(torch.Tensor, "share_memory_", fail)
    with pytest.raises(OSError, match=f"^{re.escape(message)}"):
        SharedState(options(), 1, 6)


def test_the_figures_of_learning_are_means_since_they_were_asked_for():
    shared = SharedState(options(num_processes=2), 1, 6)
    assert shared.mean_figures(shared.figures.sum(dim=0))[0] == {}
    shared.add_figures(0, 20, torch.tensor(8.0), torch.tensor(2.0), torch.tensor(30.0), 1.5, 0.1)
    shared.add_episode(0, 21.0, 1000)
    _, num_episodes, before = shared.mean_figures(torch.zeros(10, dtype=torch.float64))
    assert num_episodes == 1
    shared.add_figures(0, 20, torch.tensor(4.0), torch.tensor(3.0), torch.tensor(10.0), 2.0, 0.3)
    shared.add_figures(1, 5, torch.tensor(1.0), torch.tensor(2.0), torch.tensor(5.0), 4.0, 0.1)
    shared.add_episode(0, -21.0, 900)
    shared.add_episode(1, -18.0, 1300)
    figures, num_episodes, _ = shared.mean_figures(before)
    assert num_episodes == 2
    expected = {
        "policy_loss": 5 / 25,
        "value_loss": 5 / 25,
        "entropy": 15 / 25,
        "gradient_norm": 3.0,
        "learning_rate": 0.2,
        "training_reward": -19.5,
        "training_length": 1100,
    }
    assert figures == pytest.approx(expected)


# Checkpoints that cannot be gone on from.


class Hostile:
    def __init__(self, command):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


def spoil(folder, how):
    path = folder / "checkpoint.pt"
    data, contents = path.read_bytes(), read(path)
    middle = len(data) // 2
    if how == "cut short":
        path.write_bytes(data[:middle])
    elif how == "a flipped byte":
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
        change(folder, model=ActorCritic(1, 4).state_dict())
    elif how.startswith("a weight of "):
        contents["model"]["critic_linear.bias"][0] = float(how.removeprefix("a weight of "))
        write(dump(contents), path)
    elif how == "stretched moments":
        contents["moments"][0][0]["exp_avg"] = torch.zeros(1)
        write(dump(contents), path)
    elif how == "infinite moments":
        contents["moments"][0][0]["exp_avg"][0] = torch.inf
        write(dump(contents), path)
    elif how == "-1 frames":
        change(folder, observation_statistics=float64(0.4, 0.2, -1.0))
    elif how == "-1 steps":
        change(folder, steps=-1)
    elif how == "-3 processes":
        change(folder, options=contents["options"] | {"num_processes": -3})
    else:
        assert how in contents
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
        ("another network", "size mismatch for actor_linear.weight: copying"),
        ("a weight of nan", "this version of the program cannot go on from the checkpoint ("),
        ("a weight of inf", "(weights that are not finite)"),
        ("stretched moments", "this version of the program cannot go on from the checkpoint ("),
        ("infinite moments", "this version of the program cannot go on from the checkpoint ("),
        ("-1 frames", "this version of the program cannot go on from the checkpoint ("),
        ("-1 steps", "this version of the program cannot go on from the checkpoint ("),
        (
            "-3 processes",
            "argument --num-processes: must be a whole number of at least 1, not '-3'",
        ),
        ("options", "checkpoint.pt is not a checkpoint"),
        ("restarts", "this version of the program cannot go on from the checkpoint ("),
    ],
)
def test_a_spoilt_checkpoint_is_one_line_and_untouched(saved, how, message, capsys):
    folder, _ = saved
    spoil(folder, how)
    data = (folder / "checkpoint.pt").read_bytes()
    assert message in refused(["--resume", str(folder), "--max-steps", "1000"], capsys)
    assert (folder / "checkpoint.pt").read_bytes() == data
    assert not (folder / "harm").exists()
    assert not (folder / "options.json").exists()


@pytest.mark.parametrize("name", ["colour", "help", "resume", "save_dir", "ray"])
def test_an_option_that_this_version_lacks_is_named_with_the_versions(saved, name, capsys):
    folder, _ = saved
    change(folder, options=read_checkpoint(folder)["options"] | {name: "red"})
    message = refused(["--resume", str(folder)], capsys)
    assert "the run was made by another version of this program (with torch 2." in message
    assert message.endswith(f"this one has no option {name}\n")


def test_a_checkpoint_that_cannot_be_read_says_so(tmp_path, capsys):
    (tmp_path / "checkpoint.pt").mkdir()
    message = refused(["--resume", str(tmp_path)], capsys)
    assert message == f"cannot read {tmp_path}/checkpoint.pt: Is a directory\n"


def test_a_checkpoint_that_is_a_link_to_nothing_says_so(tmp_path, capsys):
    (tmp_path / "checkpoint.pt").symlink_to("missing")
    message = refused(["--resume", str(tmp_path)], capsys)
    assert message == f"cannot read {tmp_path}/checkpoint.pt: No such file or directory\n"


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
    assert message in refused(["--resume", str(folder), *argv.split()], capsys)


def test_a_run_that_is_over_keeps_the_rows_after_its_checkpoint(saved, capsys):
    folder, _ = saved
    EpisodeLog(folder, 0).append(Episode(0, 0.1, 80, 10, 3.0, 1000))
    table = (folder / "episodes.csv").read_text()
    message = refused(["--resume", str(folder)], capsys)
    assert message == "the run has made its 60 steps: name a higher --max-steps\n"
    assert (folder / "episodes.csv").read_text() == table
    assert not (folder / "episodes.csv.bak").exists()


def test_a_run_that_has_reached_its_target_says_so(saved, capsys):
    folder, shared = saved
    log = EpisodeLog(folder, 0)
    for n in range(WINDOW):
        log.append(Episode(n, 0.1 * n, 60, 10, 3.0, 1000))
    shared.save(folder, options(target_reward=-5.0), 0.0)
    message = refused(["--resume", str(folder), "--max-steps", "1000"], capsys)
    assert message == "the run has reached its -5.0: name a higher --target-reward\n"


def test_a_wish_to_finish_does_not_take_back_one_to_stop():
    shared = SharedState(options(), 1, 6)
    for how in FINISH, STOP, FINISH:
        shared.request_stop(how)
    assert shared.stop == STOP


# The best agent.


def offer_all(folder, best, scores, first_step=0):
    """Offer an agent for each score; return the steps of the one that the file then held."""
    torch.manual_seed(0)
    model, kept = ActorCritic(1, 6), []
    for num_steps, score in enumerate(scores, start=first_step):
        best.offer(score, "PongDeterministic-v4", model, STATISTICS, num_steps)
        kept.append(read(folder / "best.pt")["steps"])
    return kept


def test_the_best_agent_is_the_latest_until_the_window_is_full_and_then_the_highest_mean(tmp_path):
    scores = [(1, 5.0), (2, -20.0), (WINDOW - 1, -20.5), (WINDOW, -21.0)]
    scores += [(WINDOW, mean) for mean in (-20.0, -20.7, -20.0, -19.9, -21.0)]
    assert offer_all(tmp_path, BestAgent(tmp_path), scores) == [0, 1, 2, 3, 4, 4, 4, 7, 7]
    best = read(tmp_path / "best.pt")
    assert (best["episodes"], best["mean_reward"]) == (WINDOW, -19.9)
    assert best["env_name"] == "PongDeterministic-v4"
    assert best["observation_statistics"].tolist() == list(STATISTICS)
    assert (tmp_path / "best.pt").stat().st_size < 2.5e6  # no moments in it


def test_the_best_agent_of_the_sessions_before_is_only_replaced_by_a_better_one(tmp_path):
    offer_all(tmp_path, BestAgent(tmp_path), [(WINDOW, -19.0)])
    later = [(WINDOW, -19.5), (WINDOW, -18.5)]
    assert offer_all(tmp_path, BestAgent(tmp_path), later, first_step=1) == [0, 2]


@pytest.mark.parametrize("contents", [b"", dump({"steps": 3}), dump({"episodes": "many"})])
def test_a_best_agent_that_cannot_be_read_is_set_aside(contents, tmp_path, capsys):
    for n in range(2):
        (tmp_path / "best.pt").write_bytes(contents + bytes(n))
        assert offer_all(tmp_path, BestAgent(tmp_path), [(1, -21.0)], first_step=9) == [9]
    assert (tmp_path / "best.pt.bak").read_bytes() == contents
    assert (tmp_path / "best.pt.2.bak").read_bytes() == contents + bytes(1)
    names = "best.pt.bak", "best.pt.2.bak"
    assert capsys.readouterr().err == "".join(f"{tmp_path}/best.pt is now {n}\n" for n in names)


def test_a_best_agent_that_could_not_be_written_is_not_taken_for_written(tmp_path, capsys):
    best, model = BestAgent(tmp_path), ActorCritic(1, 6)
    (tmp_path / "best.pt.new").mkdir()  # in the way
    best.offer((WINDOW, 1.0), "PongDeterministic-v4", model, STATISTICS, 10)
    assert "best.pt not written: " in capsys.readouterr().err
    (tmp_path / "best.pt.new").rmdir()
    assert offer_all(tmp_path, best, [(WINDOW, 0.5)], first_step=20) == [20]


# Loading an agent.


def test_an_agent_is_loaded_by_a_path_or_a_text_and_ready_to_play(saved):
    folder, shared = saved
    for path in folder, str(folder), folder / "checkpoint.pt", str(folder / "checkpoint.pt"):
        env, model = load_agent(path)
        assert env.unwrapped.env_id == "PongDeterministic-v4"
        assert env.unwrapped.statistics == STATISTICS
        for a, b in zip(model.parameters(), shared.model.parameters(), strict=True):
            assert torch.equal(a, b)
            assert not a.requires_grad


def test_the_agent_of_a_run_folder_is_its_best_where_there_is_one(saved):
    folder, _ = saved
    assert load_agent(folder)[0].unwrapped.statistics == STATISTICS
    best = BestAgent(folder)
    best.offer((1, 1.0), "Breakout-v4", ActorCritic(1, 4), (0.5, 0.1, 7), 10)
    env, _ = load_agent(folder)
    assert (env.unwrapped.env_id, env.unwrapped.statistics) == ("Breakout-v4", (0.5, 0.1, 7))


def test_the_game_of_a_loaded_agent_draws_what_it_is_asked_to(saved):
    folder, _ = saved
    env, _ = load_agent(folder, "rgb_array")
    env.reset(seed=0)
    assert env.render().shape == (210, 160, 3)


@pytest.mark.parametrize(
    "changes",
    [
        {"env_name": 3},
        {"env_name": ["Pong-v0"]},
        {"env_name": None},
        {"env_name": "Pog-v0"},
        {"observation_statistics": float64(0.4, 0.2)},
        {"observation_statistics": float64(0.4, 0.2, 1.0, 1.0)},
        {"observation_statistics": float64(0.4, 0.2, 1.0).view(1, 3)},
        {"observation_statistics": float64(0.4)},
        {"observation_statistics": float64(0.4, 0.2, -1.0)},
        {"observation_statistics": float64(0.4, -0.2, 1.0)},
        {"observation_statistics": float64(torch.nan, 0.2, 1.0)},
        {"observation_statistics": float64(0.4, torch.inf, 1.0)},
        {"observation_statistics": float64(0.4, 0.2, torch.inf)},
        {"observation_statistics": "0.4, 0.2, 1"},
        {"model": ActorCritic(4, 6).state_dict()},
        {"model": torch.nn.Linear(2, 2).state_dict()},
        {"model": {}},
        {"model": None},
        {"model": {k: v + torch.nan for k, v in ActorCritic(1, 6).state_dict().items()}},
    ],
    # Weights are random: a name with them would differ between pytest's processes.
    ids=lambda changes: "-".join(
        f"{name}={list(value) if isinstance(value, dict) else value}"[:40]
        for name, value in changes.items()
    ),
)
def test_a_file_without_an_agent_of_this_network_says_so_in_one_line(saved, changes):
    folder, _ = saved
    change(folder, **({"env_name": "PongDeterministic-v4"} | changes))
    with pytest.raises(ValueError, match="holds no agent of this network") as refused:
        load_agent(folder)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("num_actions", [4, 18])
def test_an_agent_with_other_actions_than_its_game_says_so(saved, num_actions):
    folder, _ = saved
    change(folder, model=ActorCritic(1, num_actions).state_dict())
    message = f"holds an agent with {num_actions} actions, but PongDeterministic-v4 has 6"
    with pytest.raises(ValueError, match=message):
        load_agent(folder)


def test_where_no_agent_is_a_message_says_what_to_name(tmp_path):
    message = "there is no agent in .*: name a run folder, a best.pt or a checkpoint.pt"
    for path in tmp_path, tmp_path / "missing", str(tmp_path / "missing"):
        with pytest.raises(ValueError, match=message):
            load_agent(path)
