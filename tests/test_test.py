import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import options
from test_curves import write_run
from test_episodes import text_of
from test_video import frames_of

import test as evaluator
from envs import atari_games, create_atari_env
from harness.checkpoint import BestAgent, load_agent
from harness.episodes import TRAINING, Episode, EpisodeLog, progress
from harness.shared import SharedState
from harness.video import Video
from harness.workers import FINISH, STOP
from model import ActorCritic

STATISTICS = (0.4, 0.2, 1000)


def save_agent(folder, env_id, num_actions):
    """Write best.pt and checkpoint.pt of an agent that has learnt nothing."""
    args = options(env_name=env_id)
    torch.manual_seed(0)
    shared = SharedState(args, 1, num_actions)
    shared.statistics[:] = torch.tensor(STATISTICS, dtype=torch.float64)
    shared.save(folder, args, 0.0)
    BestAgent(folder).offer((1, 1.0), env_id, shared.model, STATISTICS, 0)
    return folder


@pytest.fixture(scope="module")
def agent(tmp_path_factory):
    """A run folder of an agent that wins or loses points quickly."""
    return save_agent(tmp_path_factory.mktemp("agent"), "ALE/Boxing-v5", 18)


@pytest.fixture
def shorten(monkeypatch):
    """Let each episode end after so many steps."""

    def shorten(steps):
        short = partial(create_atari_env, max_episode_length=steps)
        monkeypatch.setattr("harness.checkpoint.create_atari_env", short)

    return shorten


# Playing one episode.


class Recorder:
    """A video that keeps what it is given."""

    is_on = True

    def __init__(self):
        self.frames = []

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def add_frame(self, observation, score, value, policy):
        self.frames.append((observation.copy(), score, value, policy))


def opinionated(num_actions):
    """A network whose value and policy differ clearly from one observation to the next."""
    torch.manual_seed(0)
    model = ActorCritic(1, num_actions)
    with torch.no_grad():
        model.actor_linear.weight.mul_(300)
        model.critic_linear.weight.mul_(3)
    return model


def test_an_episode_is_scored_with_rewards_unclipped():
    env = create_atari_env("ALE/BeamRider-v5", max_episode_length=400)
    torch.manual_seed(0)
    reward, length = evaluator.play_episode(
        env, ActorCritic(1, 9), random.Random(0), Video(None, env), seed=0
    )
    assert reward >= 44  # a beam rider's sector pays 44 points an enemy
    assert reward % 44 == 0
    assert length == 400


@torch.no_grad()
def test_each_picture_of_a_video_has_the_value_and_policy_of_its_own_observation():
    model, recorder = opinionated(6), Recorder()
    env = create_atari_env("PongDeterministic-v4", max_episode_length=20)
    evaluator.play_episode(env, model, random.Random(0), recorder, seed=0)
    assert len(recorder.frames) == 21
    state = model.initial_state()
    for observation, _, value, policy in recorder.frames:
        own_value, logits, state = model(torch.from_numpy(observation).unsqueeze(0), state)
        assert value == pytest.approx(own_value.item(), abs=1e-6)
        assert policy == pytest.approx(logits.softmax(dim=1)[0].tolist(), abs=1e-6)
    before, last = recorder.frames[-2:]
    assert (before[0] != last[0]).any()
    assert before[2] != pytest.approx(last[2], abs=1e-4)
    assert before[3] != pytest.approx(last[3], abs=1e-4)


def test_the_pictures_of_a_video_show_the_score_so_far():
    env, recorder = create_atari_env("ALE/Boxing-v5", max_episode_length=300), Recorder()
    agent, rng = opinionated(18), random.Random(0)
    reward, length = evaluator.play_episode(env, agent, rng, recorder, seed=0)
    scores = [score for _, score, *_ in recorder.frames]
    assert len(scores) == length + 1
    assert (scores[0], scores[-1]) == (0.0, reward)
    assert len(set(scores)) > 1


def test_an_episode_is_the_same_recorded_or_not():
    outcomes = []
    for recorder in Recorder(), Video(None, None):
        env, rng = create_atari_env("ALE/Boxing-v5", max_episode_length=200), random.Random(0)
        outcome = evaluator.play_episode(env, opinionated(18), rng, recorder, seed=0)
        outcomes.append((outcome, env.unwrapped.statistics, rng.random()))
    assert outcomes[0] == outcomes[1]


def test_a_greedy_episode_takes_the_likeliest_actions():
    env, taken = create_atari_env("PongDeterministic-v4", max_episode_length=50), []
    recorder = Recorder()
    step = env.step
    env.step = lambda action: taken.append(action) or step(action)
    evaluator.play_episode(env, opinionated(6), None, recorder, greedy=True, seed=0)
    assert taken == [int(np.argmax(policy)) for *_, policy in recorder.frames[:-1]]
    assert len(set(taken)) > 1


def test_an_episode_ends_at_once_when_the_run_is_stopped():
    env, recorder, answers = create_atari_env("PongDeterministic-v4"), Recorder(), iter([0, 0, 1])
    outcome = evaluator.play_episode(
        env, ActorCritic(1, 6), random.Random(0), recorder, stopped=lambda: next(answers)
    )
    assert outcome is None
    assert len(recorder.frames) == 2


# The console line.


@pytest.mark.parametrize(
    ("limits", "session", "steps", "rate", "expected"),
    [
        ({}, 100, 1000, 10.0, ""),
        ({"max_steps": 4000}, 100, 1000, 0.25, ", 25%, 03h 20m left"),
        ({"max_steps": 4000}, 100, 4010, 0.25, ", 100%, 00h 00m left"),
        ({"max_steps": 4000}, 100, 1000, 0.0, ""),
        ({"max_steps": 4000}, 100, 4010, 0.0, ", 100%, 00h 00m left"),
        ({"max_time": 2.0}, 1800, 1000, 10.0, ", 25%, 01h 30m left"),
        ({"max_time": 2.0}, 7300, 1000, 10.0, ", 100%, 00h 00m left"),
        ({"max_time": 2.0, "max_steps": 2000}, 1800, 1500, 0.5, ", 75%, 00h 16m left"),
        ({"max_time": 2.0, "max_steps": 2000}, 5400, 1500, 0.1, ", 75%, 00h 30m left"),
    ],
)
def test_the_progress_is_that_towards_the_end_which_comes_first(
    limits, session, steps, rate, expected
):
    args = options(**({"max_steps": None, "max_time": None} | limits))
    assert progress(args, session, steps, rate) == expected


# The test worker.


def test_the_run_is_to_finish_when_a_hundred_test_episodes_have_reached_the_target(tmp_path):
    args = options(target_reward=-0.98, max_episode_length=5, record_every=0, max_steps=None)
    shared = SharedState(args, 1, 6)
    log = EpisodeLog(tmp_path, 0)
    for n in range(98):  # the two that follow are too short to lose a point
        log.append(Episode(n, 1.0, 0, 0, -1.0, 5))
    limit = threading.Timer(60, shared.request_stop, [STOP])  # or a fault would hang it
    limit.daemon = True
    limit.start()
    evaluator.evaluate(args, shared, time.monotonic(), tmp_path, 0)
    limit.cancel()
    assert shared.stop == FINISH
    assert [e.episode for e in EpisodeLog(tmp_path, 0).episodes] == list(range(100))


def test_the_seed_decides_what_the_test_worker_plays(tmp_path):
    def pictures_seen(run, seed, restarts=0):
        limits = {"max_episode_length": 100, "max_steps": 1}
        args = options(env_name="Pong-v0", seed=seed, record_every=0, **limits)
        torch.manual_seed(0)
        shared = SharedState(args, 1, 6)
        shared.steps[0] = 1  # so that it ends after one episode
        evaluator.evaluate(args, shared, time.monotonic(), tmp_path / run, restarts)
        return shared.statistics.tolist()

    for run in "abcd":
        (tmp_path / run).mkdir()
    seen = pictures_seen("a", 1)
    assert pictures_seen("b", 1) == seen
    assert pictures_seen("c", 2) != seen
    assert pictures_seen("d", 1, restarts=1) != seen


def test_each_test_episode_is_played_by_the_weights_shared_at_its_start(tmp_path, monkeypatch):
    args = options(record_every=0, max_steps=None)
    shared, played = SharedState(args, 1, 6), []

    def play_episode(_, model, *__, **___):
        played.append(model.critic_linear.bias.item())
        with torch.no_grad():
            shared.model.critic_linear.bias.add_(1.0)  # workers learn on
        return None if len(played) == 3 else (21.0, 5)

    monkeypatch.setattr(evaluator, "play_episode", play_episode)
    evaluator.evaluate(args, shared, time.monotonic(), tmp_path, 0)
    assert played == [0.0, 1.0, 2.0]
    assert load_agent(tmp_path)[1].critic_linear.bias == 1.0  # best.pt has those that played


def test_training_episodes_have_a_table_of_their_own_beside_the_test_episodes(
    tmp_path, monkeypatch
):
    args = options(record_every=0, max_steps=None)
    shared = SharedState(args, 1, 6)
    EpisodeLog(tmp_path, 0, TRAINING).append(Episode(6, 1.0, 0, 0, -21.0, 900))  # a session before
    meanwhile = iter([[], [(-21.0, 900), (-20.0, 1001)], [(4.0, 7)]])

    def play_episode(*_, **__):
        trained = next(meanwhile, None)
        for reward, length in trained or []:
            shared.add_episode(0, reward, length)
            shared.steps[0] += length
        return None if trained is None else (21.0, 5)

    monkeypatch.setattr(evaluator, "play_episode", play_episode)
    evaluator.evaluate(args, shared, time.monotonic(), tmp_path, 0)
    assert len(EpisodeLog(tmp_path, 10_000).episodes) == 3
    rows = EpisodeLog(tmp_path, 10_000, TRAINING).episodes
    assert [row.episode for row in rows] == [6, 8, 9]
    assert [(row.reward, row.length) for row in rows[1:]] == [(-20.5, 950), (4.0, 7)]
    assert [row.num_steps for row in rows[1:]] == [1901, 1908]


# Playing saved agents.


def play(capsys, *argv):
    torch.set_num_threads(2)
    evaluator.main(list(map(str, argv)))
    assert torch.get_num_threads() == 1  # two took minutes on a busy machine for one's seconds
    return capsys.readouterr().out.splitlines()


def test_an_evaluation_is_repeatable_and_its_episodes_differ(agent, shorten, capsys):
    shorten(150)
    argv = "--episodes", 2, "--json"
    lines = play(capsys, agent, *argv)
    assert lines[0].startswith("episode 0, episode reward ")
    assert lines[2].startswith("2 episodes: mean ")
    summary = json.loads(lines[-1])
    assert set(summary) == {"episodes", "mean", "std", "min", "max", "rewards"}
    for name in "mean", "std", "min", "max":
        assert summary[name] == pytest.approx(getattr(np, name)(summary["rewards"]))
    assert len(set(summary["rewards"])) > 1
    assert play(capsys, agent / "best.pt", *argv) == lines
    assert play(capsys, agent / "checkpoint.pt", *argv) == lines
    assert play(capsys, agent, *argv, "--seed", 2) != lines


def test_a_saved_agent_can_be_played_in_a_loop_of_ones_own(agent, shorten):
    env, model = load_agent(str(agent))
    observation, _ = env.reset(seed=7)
    state, total_reward = model.initial_state(), 0.0
    for _ in range(300):
        value, logits, state = model(torch.from_numpy(observation).unsqueeze(0), state)
        observation, reward, *_ = env.step(logits.argmax().item())
        total_reward += reward
    assert not value.requires_grad

    shorten(300)
    same, model = load_agent(agent)
    played = evaluator.play_episode(same, model, None, Video(None, same), greedy=True, seed=7)
    assert played == (total_reward, 300)
    statistics = env.unwrapped.statistics  # of all pictures that were seen
    assert statistics == same.unwrapped.statistics
    assert statistics[2] == STATISTICS[2] + 301


def test_ctrl_c_while_playing_is_no_traceback(agent):
    command = [sys.executable, evaluator.__file__, agent, "--episodes", "100"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(list(map(str, command)), **pipes) as process:
        try:
            assert process.stdout.readline().startswith("episode 0, ")
            process.send_signal(signal.SIGINT)
            assert process.communicate(timeout=20)[1] == ""
        finally:
            process.kill()
    assert process.returncode == 130


def test_a_greedy_game_without_chance_says_so_and_is_recorded(tmp_path, shorten, capsys):
    save_agent(tmp_path, "BoxingDeterministic-v4", 18)
    shorten(50)
    argv = "--greedy", "--episodes", 2, "--record", tmp_path / "game.gif", "--annotate"
    lines = play(capsys, tmp_path, *argv)
    assert lines[0].startswith("Nothing is random in a greedy game of BoxingDeterministic-v4: ")
    assert lines[1].split(",")[1:] == lines[2].split(",")[1:]
    assert frames_of(tmp_path / "game.gif")[0]["size"] == (640, 420)


@pytest.mark.parametrize(
    ("argv", "name"),
    [
        (["--record", "2026-11-25T10:30:00.mp4"], "2026-11-25T10:30:00.mp4"),
        (["--record", "./-x.mp4"], "-x.mp4"),
        (["--record=-x.mp4"], "-x.mp4"),
    ],
)
def test_an_episode_is_recorded_under_any_name(
    argv, name, agent, tmp_path, monkeypatch, shorten, capfd
):
    monkeypatch.chdir(tmp_path)
    shorten(5)
    evaluator.main([str(agent), "--episodes", "2", *argv])
    assert capfd.readouterr().err == ""
    assert os.listdir() == [name]
    assert len(frames_of(name)[1]) == 6


def test_all_games_are_listed(capsys):
    evaluator.main(["--games"])
    assert capsys.readouterr().out.split() == list(atari_games())


def test_runs_are_drawn_into_a_picture_here(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    runs = [write_run(tmp_path / name, episodes=30) for name in ("one", "two")]
    for named in runs[:1], runs, [runs[0] / "episodes.csv"]:
        evaluator.main(["--plot", *map(str, named)])
        assert capsys.readouterr().out == "comparison.png drawn\n"
        Path("comparison.png").unlink()  # it is there


@pytest.mark.parametrize(
    ("table", "what"),
    [("episodes.csv", "one test episode"), ("training.csv", "one row of training.csv")],
)
def test_a_curve_says_what_its_points_are(table, what, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_run(Path("RUN"), episodes=3)
    Path("RUN/training.csv").write_text(Path("RUN/episodes.csv").read_text())
    drawn = []
    monkeypatch.setattr(evaluator, "draw_curve", lambda *args: drawn.append(args[2]))
    evaluator.main(["--plot", f"RUN/{table}"])
    assert drawn == [what]


NAME_AN_AGENT = "name an agent to play (a run folder, best.pt), or --plot runs"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("", NAME_AN_AGENT),
        ("AGENT --plot AGENT", NAME_AN_AGENT),
        ("AGENT --games", NAME_AN_AGENT),
        ("missing", "there is no agent in missing: name a run folder"),
        ("TEXT", "is damaged, or not one of this program's files"),
        ("OTHER", "OTHER/best.pt holds an agent with 18 actions, but Breakout-v0 has 4"),
        ("OTHER --greedy", "OTHER/best.pt holds an agent with 18 actions, but Breakout-v0 has 4"),
        ("AGENT --episodes 0", "argument --episodes: must be a whole number of at least 1"),
        ("AGENT --seed " + "9" * 30, "argument --seed: must be a whole number from 0 to "),
        ("AGENT --record game.avi", "argument --record: must be an .mp4 or .gif file"),
        ("AGENT --record missing/game.mp4", "argument --record: cannot write missing/game.mp4"),
        ("AGENT --record TEXT/game.mp4", "argument --record: cannot write TEXT/game.mp4"),
        (f"AGENT --record {'x' * 300}.mp4", "argument --record: cannot write xxx"),
        ("AGENT --record FOLDER.mp4", "argument --record: must be an .mp4 or .gif file"),
        ("AGENT --render human", "argument --render: there is no display here; try --record"),
        ("--plot RUN --record x.mp4", "argument --record: needs an agent to play"),
        ("--games --greedy", "argument --greedy: needs an agent to play"),
        ("AGENT --annotate", "argument --annotate: needs --record"),
        ("--plot AGENT", "holds no test episodes yet: name run folders"),
        ("--plot missing", "holds no test episodes"),
        ("--plot TEXT", "TEXT has the columns 'no agent', not 'episode,time_s,"),
        ("--plot EMPTY", "EMPTY holds no test episodes"),
        ("--plot /dev/null", "/dev/null holds no test episodes"),
        ("--plot RUN EMPTY", "EMPTY holds no test episodes"),
        ("--plot BAD", "BAD, line 3: 'what' is not 'episode,time_s,"),
        ("--plot RUN LIST", "LIST/options.json does not hold a run's options"),
        ("--plot ''", "argument --plot: must not be empty"),
    ],
)
def test_bad_input_is_one_line_and_status_2(argv, message, agent, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DISPLAY", raising=False)
    monkeypatch.delenv("WAYLAND_DISPLAY", raising=False)
    monkeypatch.setattr(evaluator.sys, "platform", "linux")
    Path("TEXT").write_text("no agent\n1,2\n")
    Path("EMPTY").touch()
    Path("BAD").write_text(text_of(0) + "what\n")
    write_run(Path("RUN"), episodes=3)
    write_run(Path("LIST"), episodes=3)
    Path("LIST", "options.json").write_text("[]")
    Path("FOLDER.mp4").mkdir()
    if "OTHER" in argv:
        Path("OTHER").mkdir()
        save_agent(Path("OTHER"), "Breakout-v0", 18)
    words = ["" if word == "''" else word.replace("AGENT", str(agent)) for word in argv.split()]
    with pytest.raises(SystemExit) as stop:
        evaluator.main(words)
    assert stop.value.code == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert message in err
    assert not Path("comparison.png").exists()
