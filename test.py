"""The evaluator: in a run, a process that plays the shared agent all the time; by itself, it plays a saved agent.

python test.py runs/Pong-v0-1 --episodes 10 --record pong.mp4        (The unit tests are in tests/, not here.)
"""

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

from checkpoint import EpisodeLog, RunState, load_agent
from drawing import Scalars, Video, draw_curves
from envs import create_atari_env
from model import ActorCritic
from train import worker_seed
from workers import FINISH, STOP, CoreTurn, attempt, say


@torch.no_grad()
def play_episode(
    env: gym.Env,
    model: ActorCritic,
    rng: random.Random,
    video: Video,
    max_length: int | None = None,
    greedy: bool = False,
    turn: AbstractContextManager = nullcontext(),  # noqa: B008 - it has no state
    stopped: Callable[[], bool] = lambda: False,
) -> tuple[float, int] | None:
    """Play one episode, sampling from the policy or, if `greedy`, taking the likeliest action.

    Returns the reward, unclipped, and the length in steps; None if the run was `stopped` meanwhile.
    """
    observation, _ = env.reset(seed=rng.randrange(2**31))
    state, actions = model.initial_state(), range(env.action_space.n)
    total_reward, length, done = 0.0, 0, False
    with video:
        while not done:
            if stopped():
                return None
            with turn:
                value, logits, state = model(torch.from_numpy(observation).unsqueeze(0), state)
                policy = logits.softmax(dim=1)[0].tolist()
                video.add_frame(observation, total_reward, value.item(), policy)
                action = max(actions, key=policy.__getitem__) if greedy else rng.choices(actions, policy)[0]
                observation, reward, terminated, truncated, _ = env.step(action)
                total_reward += reward
                length += 1
                done = terminated or truncated or length == max_length
        video.add_frame(observation, total_reward, value.item(), policy)
    return total_reward, length


def clock(seconds: float) -> str:
    """Return hours and minutes."""
    return f"{int(seconds) // 3600:02d}h {int(seconds) // 60 % 60:02d}m"


def progress(args: argparse.Namespace, elapsed: float, before: float, num_steps: int) -> str:
    """Return how much of the run is done and how long the rest will take, where its end is known."""
    sitting, ends = elapsed - before, []  # seconds left, fraction done
    if args.max_steps:
        ends.append(((args.max_steps - num_steps) * elapsed / max(num_steps, 1), num_steps / args.max_steps))
    if args.max_time:
        ends.append((3600 * args.max_time - sitting, sitting / (3600 * args.max_time)))
    return "".join(f", {min(done, 1.0):.0%}, {clock(max(left, 0.0))} left" for left, done in sorted(ends)[:1])


def evaluate(args: argparse.Namespace, shared: RunState, start_time: float, run_folder: Path, life: int) -> None:
    """Play test episodes until the run ends; for each a console line, a row of episodes.csv, perhaps a best.pt."""
    torch.set_num_threads(1)
    rng = random.Random(worker_seed(args.seed, args.num_processes, life))
    env = create_atari_env(args.env_name, render_mode="rgb_array")
    env.mean, env.std, env.num_frames = shared.observation_statistics.tolist()
    model = ActorCritic(env.observation_space.shape[0], env.action_space.n)
    turn = CoreTurn(run_folder, args.num_processes, times=40)  # steps: as many as a training process makes by default
    log, curve = EpisodeLog(run_folder, int(shared.episodes)), run_folder / "learning_curve.png"
    scalars = Scalars(run_folder / "tensorboard" / "evaluator" if args.tensorboard else None)
    shared.ready[args.num_processes] = True

    finished, drawn = False, time.time()
    while not finished:
        model.load_state_dict(shared.model.state_dict())
        episode = int(shared.episodes)
        record = args.record_every and episode % args.record_every == 0
        path = run_folder / "videos" / f"rl-video-episode-{episode}.mp4" if record else None
        video = Video(path, env, args.annotate)
        stopped = lambda: shared.stop[0] >= STOP  # noqa: E731
        outcome = play_episode(env, model, rng, video, args.max_episode_length, turn=turn, stopped=stopped)
        if outcome is None:
            break
        reward, length = outcome
        elapsed, num_steps = time.time() - start_time, int(shared.steps.sum())
        fps = num_steps / elapsed
        scalars.add(num_steps, reward=reward, length=length, steps_per_second=fps)
        log.append(episode, f"{elapsed:.1f}", num_steps, f"{fps:.0f}", reward, length)
        shared.count_episode(reward, (env.mean, env.std, env.num_frames))
        shared.save_if_best(run_folder, args, model)
        if shared.target_reached(args.target_reward):
            shared.stop.clamp_(min=FINISH)
        finished = shared.stop[0] >= FINISH or (args.max_steps is not None and num_steps >= args.max_steps)
        say(
            f"Time {clock(elapsed)} {int(elapsed) % 60:02d}s, num steps {num_steps}, FPS {fps:.0f}, "
            f"episode reward {reward:.1f}, episode length {length}, "
            f"mean100 {shared.mean_reward()[1]:.1f}{progress(args, elapsed, shared.elapsed, num_steps)}"
        )
        if finished or time.time() - drawn > 60:
            drawn = time.time()
            attempt(curve, draw_curves, [run_folder], curve)


def play(agent: Path, args: argparse.Namespace) -> None:
    """Play a saved agent's episodes; a line for each, and a summary. Raises `ValueError` or `OSError`."""
    torch.set_num_threads(1)  # with more, they mostly wait for each other, the longer the busier the machine
    env_name, model, statistics = load_agent(agent)
    env = create_atari_env(env_name, render_mode=args.render or "rgb_array")
    game = env.unwrapped.game
    if args.greedy and game.repeat_action_probability == 0 and game.frame_skip[1] - game.frame_skip[0] == 1:
        say(f"Nothing is random in a greedy game of {env_name}: all episodes are the same one.")
    rewards = []
    for episode in range(args.episodes):
        rng = random.Random(worker_seed(args.seed, episode, 0))
        env.mean, env.std, env.num_frames = statistics  # the same for all, so that each depends on its seed alone
        video = Video(args.record if episode == 0 else None, env, args.annotate)
        reward, length = play_episode(env, model, rng, video, greedy=args.greedy)
        rewards.append(reward)
        say(f"episode {episode}, episode reward {reward:.1f}, episode length {length}")
    summary = {"mean": np.mean(rewards), "std": np.std(rewards), "min": min(rewards), "max": max(rewards)}
    say(f"{args.episodes} episodes: " + ", ".join(f"{name} {value:.2f}" for name, value in summary.items()))
    if args.json:
        say(json.dumps({"episodes": args.episodes, **summary, "rewards": rewards}))


def main(argv: list[str] | None = None) -> None:
    """Play a saved agent, or draw learning curves; exit with status 2 and one line if something is wrong."""
    from main import fail, number  # here, as main.py imports this file

    parser = argparse.ArgumentParser("test.py", description="Play a saved agent, or draw learning curves.")
    parser.error = fail
    parser.add_argument("agent", type=Path, nargs="?", help="run folder, best.pt or checkpoint.pt")
    parser.add_argument("--plot", type=Path, nargs="+", metavar="RUN", help="draw these runs into comparison.png")
    parser.add_argument("--episodes", type=number(int, 1), default=10, help="to play (default: 10)")
    parser.add_argument("--greedy", action="store_true", help="take the likeliest action instead of sampling")
    parser.add_argument("--seed", type=number(int, 0), default=1, help="of games and sampling (default: 1)")
    parser.add_argument("--record", type=Path, metavar="FILE", help="video of the first episode, .mp4 or .gif")
    parser.add_argument("--annotate", action="store_true", help="the agent's mind beside the recorded game")
    parser.add_argument("--render", choices=("human",), help="show the game on the screen")
    parser.add_argument("--json", action="store_true", help="summary as JSON in the last line")
    args = parser.parse_args(argv)
    if (args.agent is None) == (args.plot is None):
        fail("name an agent to play (a run folder, best.pt), or --plot runs")
    if args.record and (args.record.suffix not in (".mp4", ".gif") or args.render or not args.record.parent.is_dir()):
        fail("argument --record: must be an .mp4 or .gif file in a folder that is there, without --render")
    if args.render and sys.platform == "linux" and not {"DISPLAY", "WAYLAND_DISPLAY"} & os.environ.keys():
        fail("argument --render: there is no display here; try --record")
    try:
        if args.plot:
            draw_curves(args.plot, Path("comparison.png"))
            say("comparison.png drawn")
        else:
            play(args.agent, args)
    except (OSError, ValueError) as error:
        fail(str(error))


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
