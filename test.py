"""The evaluator, a process of its own that plays the shared agent all the time (not the unit tests: those are tests/).

The weights are copied at an episode's start only, so that one score belongs to one set of weights.
"""

import argparse
import random
import time
from collections.abc import Generator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import cv2
import gym
import numpy as np
import torch
from imageio_ffmpeg import write_frames
from torch import Tensor

from envs import create_atari_env
from model import ActorCritic
from train import worker_seed
from workers import CoreTurn

STEPS_A_TURN = 20  # as many as a training worker's turn has by default


def open_video(path: Path, env: gym.Env) -> Generator[None, np.ndarray, None]:
    """Start ffmpeg on `path`; `send` it frames of twice the game's size, and `close` it.

    Frames are streamed, one a step, so memory stays constant however long the episode. H.264 with yuv420p plays
    everywhere. If this process dies, ffmpeg sees the end of its input and closes the file properly.
    """
    path.parent.mkdir(exist_ok=True)
    height, width = env.unwrapped.observation_space.shape
    video = write_frames(
        path,
        (2 * width, 2 * height),
        fps=env.unwrapped.metadata["render_fps"],
        macro_block_size=2,
        quality=7,
        ffmpeg_log_level="fatal",  # a stop may cut the last frame in two, which is no news
        output_params=["-preset", "veryfast", "-threads", "1"],  # the cores belong to the workers
    )
    video.send(None)
    return video


def enlarged_screen(env: gym.Env) -> np.ndarray:
    """Return the screen at twice its size, (2 height, 2 width, 3) uint8, its pixels kept sharp."""
    return cv2.resize(env.render(), None, fx=2, fy=2, interpolation=cv2.INTER_NEAREST)


def play_episode(
    env: gym.Env,
    model: ActorCritic,
    rng: random.Random,
    max_length: int,
    video: Path | None = None,
    turn: AbstractContextManager = nullcontext(),  # noqa: B008 - it has no state
) -> tuple[float, int]:
    """Play one episode, sampling from the policy; return the reward, unclipped, and the length in steps."""
    observation, _ = env.reset()
    state, pictures = model.initial_state(), model.new_pictures(1)
    total_reward, length, done = 0.0, 0, False
    writer = open_video(video, env) if video else None
    while not done:
        with turn:
            for _ in range(STEPS_A_TURN):
                if writer:
                    writer.send(enlarged_screen(env))
                pictures[0][0] = torch.from_numpy(observation)
                action, state = model.act(pictures, state, rng)
                observation, reward, terminated, truncated, _ = env.step(action)
                total_reward += reward
                length += 1
                done = terminated or truncated or length >= max_length
                if done:
                    break
    if writer:
        writer.send(enlarged_screen(env))
        writer.close()
    return total_reward, length


def evaluate(
    args: argparse.Namespace,
    shared_model: ActorCritic,
    steps: Tensor,
    ready: Tensor,
    start_time: float,
    run_folder: Path,
) -> None:
    """Play test episodes until the training steps are made; a console line and a row of episodes.csv for each."""
    torch.set_num_threads(1)
    seed = worker_seed(args.seed, args.num_processes)
    rng = random.Random(seed)
    env = create_atari_env(args.env_name, render_mode="rgb_array")
    model = ActorCritic(env.observation_space.shape[0], env.action_space.n)
    env.reset(seed=seed)
    turn = CoreTurn(run_folder, args.num_processes)
    ready[-1] = True
    with open(run_folder / "episodes.csv", "w") as file:
        file.write("episode,time_s,num_steps,fps,reward,length\n")

    episode, finished = 0, False
    while not finished:
        model.load_state_dict(shared_model.state_dict())
        record = args.record_every and episode % args.record_every == 0
        video = run_folder / "videos" / f"rl-video-episode-{episode}.mp4" if record else None
        reward, length = play_episode(env, model, rng, args.max_episode_length, video, turn)
        elapsed, num_steps = time.time() - start_time, steps.sum().item()
        fps = num_steps / elapsed
        minutes, seconds = divmod(int(elapsed), 60)
        print(
            f"Time {minutes // 60:02d}h {minutes % 60:02d}m {seconds:02d}s, num steps {num_steps}, FPS {fps:.0f}, "
            f"episode reward {reward:.1f}, episode length {length}",
            flush=True,
        )
        with open(run_folder / "episodes.csv", "a") as file:
            file.write(f"{episode},{elapsed:.1f},{num_steps},{fps:.0f},{reward},{length}\n")
        finished = args.max_steps is not None and num_steps >= args.max_steps
        episode += 1
