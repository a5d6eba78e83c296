"""The test worker, which plays the shared agent all the time; by itself, it plays a saved agent.

python test.py runs/Pong-v0-1 --episodes 10 --record pong.mp4

The unit tests are not here but in tests/.
"""

from harness import workers  # first: harness/__init__.py exits where the rest cannot run

if __name__ == "__main__":
    workers.open_standard_files()
    workers.end_at_once_on_signals()  # Ctrl-C is no traceback, also while libraries load

import argparse
import json
import os
import random
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import gym
import numpy as np
import torch

from envs import atari_games, create_atari_env
from harness import utils
from harness.checkpoint import BestAgent, load_agent, valid_statistics
from harness.curves import TEST_EPISODE, draw_comparison, draw_curve
from harness.episodes import (
    TRAINING,
    Episode,
    EpisodeLog,
    Scalars,
    as_table,
    console_line,
    progress,
    read_episodes,
    training_row,
)
from harness.shared import SharedState
from harness.utils import fail, number, report_write_errors, say
from harness.video import Video, video_path
from harness.workers import FINISH, STOP, CoreTurn
from model import ActorCritic, State

DRAW_EVERY = 60.0  # seconds, the learning curve


@torch.no_grad()
def play_episode(
    env: gym.Env,
    model: ActorCritic,
    rng: random.Random,
    video: Video,
    greedy: bool = False,
    turn: AbstractContextManager = nullcontext(),  # noqa: B008 - it has no state
    stopped: Callable[[], bool] = lambda: False,
    seed: int | None = None,
) -> tuple[float, int] | None:
    """Play one episode, sampling from the policy or, if `greedy`, taking the likeliest action.

    `env` is one of `create_atari_env`, which counts the episode's steps and may cut it. A `seed`
    reseeds it, for which the emulator loads its ROM again: a tenth of a second.
    Returns the reward, unclipped, and the length in steps; None if the run was `stopped` meanwhile.
    """

    def look(state: State) -> tuple[list[float], State]:
        """Return the policy and the next recurrent state; the video gets the picture."""
        value, logits, state = model(torch.from_numpy(observation).unsqueeze(0), state)
        policy = logits.softmax(dim=1)[0].tolist()
        video.add_frame(observation, total_reward, value.item(), policy)
        return policy, state

    observation, _ = env.reset(seed=seed)
    state, actions = model.initial_state(), range(env.action_space.n)
    total_reward, done = 0.0, False
    with video:
        while not done:
            if stopped():
                return None
            with turn:
                policy, state = look(state)
                if greedy:
                    action = max(actions, key=policy.__getitem__)
                else:
                    action = rng.choices(actions, policy)[0]
                observation, reward, terminated, truncated, info = env.step(action)
            total_reward += reward
            done = terminated or truncated
        if video.is_on:  # the picture that the last action led to
            look(state)
    return total_reward, int(info["episode"]["l"])


def evaluate(
    args: argparse.Namespace, shared: SharedState, started: float, run_folder: Path, restarts: int
) -> None:
    """Be the test worker: play episodes until the run ends.

    Each gives a console line, a row of episodes.csv, perhaps a best.pt. `started` is the monotonic
    clock's time when this session began.
    """
    torch.set_num_threads(1)
    rng = random.Random(f"{args.seed}, {args.num_processes}, {restarts}")
    env = create_atari_env(args.env_name, "rgb_array", args.max_episode_length)
    env.unwrapped.statistics = valid_statistics(shared.statistics)
    env.unwrapped.reset(seed=rng.randrange(2**31))  # inside, where the normaliser does not see it
    model = ActorCritic(env.observation_space.shape[0], env.action_space.n)
    # It enters for each step; a turn is to last as long as a training worker's, two rollouts.
    turn = CoreTurn(run_folder, args.num_processes, times=2 * args.num_steps)
    log = EpisodeLog(run_folder, shared.total_steps())
    training_log = EpisodeLog(run_folder, shared.total_steps(), TRAINING)
    best = BestAgent(run_folder)
    folder = run_folder / "tensorboard"
    scalars = Scalars(folder, shared.total_steps()) if args.tensorboard else None
    shared.ready[args.num_processes] = True

    finished, last_drawn = False, time.monotonic()
    last_time, last_steps, last_sums = last_drawn, shared.total_steps(), shared.figures.sum(dim=0)
    while not finished:
        model.load_state_dict(shared.model.state_dict())
        episode = log.next_episode
        path = video_path(run_folder, episode, args.record_every)
        video = Video(path, env, args.annotate)
        stopped = lambda: shared.stop >= STOP  # noqa: E731
        outcome = play_episode(env, model, rng, video, turn=turn, stopped=stopped)
        turn.end()
        if outcome is None:
            break
        reward, length = outcome
        now, num_steps = time.monotonic(), shared.total_steps()
        elapsed = shared.elapsed + now - started
        fps = round(num_steps / max(elapsed, 1e-3))
        fps_now = (num_steps - last_steps) / max(now - last_time, 1e-3)
        last_time, last_steps = now, num_steps
        row = Episode(episode, elapsed, num_steps, fps, reward, length)
        log.append(row)
        shared.statistics[:] = torch.tensor(env.unwrapped.statistics, dtype=torch.float64)
        best.offer(log.mean_reward(), args.env_name, model, env.unwrapped.statistics, num_steps)
        figures, num_trained, last_sums = shared.mean_figures(since=last_sums)
        if num_trained:
            training_log.append(training_row(row, training_log, num_trained, figures))
        if scalars:
            figures |= {"reward": reward, "length": length, "steps_per_second": fps_now}
            scalars.add(num_steps, **figures)
        if log.has_reached(args.target_reward):
            shared.request_stop(FINISH)
        left = progress(args, now - started, num_steps, fps_now)
        say(console_line(row, log.mean_reward()[1], left, fps_now))
        if now - last_drawn > DRAW_EVERY:
            last_drawn = now
            draw(log, run_folder)
        finished = shared.is_over(args.max_steps)
    draw(log, run_folder)


def draw(log: EpisodeLog, run_folder: Path) -> None:
    """Draw the run's learning curve, if there is anything to draw."""
    path = run_folder / "learning_curve.png"
    if log.episodes:
        with report_write_errors(path):
            draw_curve(as_table(log.episodes), path)


def play(args: argparse.Namespace) -> None:
    """Play a saved agent's episodes; a line for each, and a summary.

    Raises `ValueError` or `OSError`.
    """
    torch.set_num_threads(1)  # more would mostly wait for each other on a busy machine
    env, model = load_agent(args.agent, args.render or "rgb_array")
    game, statistics = env.unwrapped.game, env.unwrapped.statistics
    low, high = game.frame_skip
    if args.greedy and game.repeat_action_probability == 0 and high - low == 1:
        env_id = env.unwrapped.env_id
        say(f"Nothing is random in a greedy game of {env_id}: all episodes are the same one.")
    rewards = []
    for episode in range(args.episodes):
        rng = random.Random(f"{args.seed}, {episode}")
        env.unwrapped.statistics = statistics  # so that each depends on its seed alone
        video = Video(args.record if episode == 0 else None, env, args.annotate)
        seed = rng.randrange(2**31)
        reward, length = play_episode(env, model, rng, video, greedy=args.greedy, seed=seed)
        rewards.append(reward)
        say(f"episode {episode}, episode reward {reward:.1f}, episode length {length}")
    summary = {name: getattr(np, name)(rewards) for name in ("mean", "std", "min", "max")}
    figures = ", ".join(f"{name} {value:.2f}" for name, value in summary.items())
    say(f"{args.episodes} episodes: {figures}")
    if args.json:
        say(json.dumps({"episodes": args.episodes, **summary, "rewards": rewards}))


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line (or `argv`); bad input is one line and exit status 2."""
    parser = argparse.ArgumentParser("test.py", description="Play a saved agent, or draw runs.")
    parser.error = fail
    add, path, switch = parser.add_argument, utils.nonempty_path, "store_true"
    add("agent", type=path, nargs="?", help="run folder, best.pt or checkpoint.pt")
    plot = "draw into comparison.png, those with equal options as their mean"
    add("--plot", type=path, nargs="+", metavar="RUN", help=plot)
    add("--games", action=switch, help="list the games")
    add("--episodes", type=number(int, 1), default=10, help="to play (default: 10)")
    add("--greedy", action=switch, help="likeliest action instead of sampling")
    add("--seed", type=number(int, 0), default=1, help="of games and sampling (default: 1)")
    record = "first episode as .mp4; if short, as .gif"
    add("--record", type=path, metavar="FILE", help=record)
    add("--annotate", action=switch, help="what the agent sees and thinks beside it")
    add("--render", choices=("human",), help="show the game on the screen")
    add("--json", action=switch, help="summary as JSON in the last line")
    args = parser.parse_args(argv)
    if sum([args.agent is not None, args.plot is not None, args.games]) != 1:
        fail("name an agent to play (a run folder, best.pt), or --plot runs, or --games")
    typed = [name for name, value in vars(args).items() if value != parser.get_default(name)]
    unused = [name for name in typed if name not in ("agent", "plot", "games")]
    if unused and args.agent is None:
        fail(f"argument --{unused[0]}: needs an agent to play")
    record = args.record
    if args.annotate and not record:
        fail("argument --annotate: needs --record, as it is the video that shows it")
    if record and (record.suffix not in (".mp4", ".gif") or os.path.isdir(record) or args.render):
        fail("argument --record: must be an .mp4 or .gif file, without --render")
    if record and not utils.is_writable(record):
        fail(f"argument --record: cannot write {record}: name a file in a folder of yours")
    has_display = sys.platform != "linux" or {"DISPLAY", "WAYLAND_DISPLAY"} & os.environ.keys()
    if args.render and not has_display:
        fail("argument --render: there is no display here; try --record")
    return args


def main(argv: list[str] | None = None) -> None:
    """Play a saved agent, draw learning curves, or list the games."""
    args = parse_args(argv)
    try:
        if args.games:
            say("\n".join(atari_games()))
        elif args.plot:
            path = Path("comparison.png")
            if len(args.plot) == 1:
                what = f"one row of {TRAINING}" if args.plot[0].name == TRAINING else TEST_EPISODE
                draw_curve(read_episodes(args.plot[0]), path, what)
            else:
                draw_comparison(args.plot, path)
            say(f"{path} drawn")
        else:
            play(args)
    except (OSError, ValueError) as error:
        fail(error)


if __name__ == "__main__":
    main()
