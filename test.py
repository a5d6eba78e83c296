"""The evaluator, a process of its own that plays the shared agent all the time (not the unit tests: those are tests/).

The weights are copied at an episode's start only, so that one score belongs to one set of weights.
"""

import argparse
import random
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Self

import cv2
import gym
import torch
from imageio_ffmpeg import count_frames_and_secs, write_frames

from checkpoint import EpisodeLog, RunState
from envs import create_atari_env
from model import ActorCritic
from train import worker_seed
from workers import FINISH, STOP, CoreTurn, complain, say

STEPS_A_TURN = 20  # as many as a training worker's turn has by default


class Video:
    """A context manager that streams the game to ffmpeg, at twice its size; with path None, it does nothing.

    Memory stays constant however long the episode. H.264 with yuv420p plays everywhere. If this process dies, ffmpeg
    sees the end of its input and closes the file properly. If the video cannot be written, the game goes on.
    """

    def __init__(self, path: Path | None, env: gym.Env) -> None:
        self._env, self._writer = env, None
        if path is None:
            return
        height, width = env.unwrapped.observation_space.shape
        self._writer = write_frames(
            path,
            (2 * width, 2 * height),
            fps=env.unwrapped.metadata["render_fps"],
            macro_block_size=2,
            quality=7,
            ffmpeg_log_level="fatal",  # a stop may cut the last frame in two, which is no news
            output_params=["-preset", "veryfast", "-threads", "1"],  # the cores belong to the workers
        )
        self._path = path
        self._try(self._writer.send, None)

    def _try(self, function: Callable, *args: object) -> None:
        try:
            function(*args)
        except (OSError, RuntimeError) as error:
            complain(f"{self._path} not written: {str(error).splitlines()[0]}")
            self._writer = None

    def add_frame(self) -> None:
        """Append the screen, its pixels kept sharp."""
        if self._writer:
            screen = cv2.resize(self._env.render(), None, fx=2, fy=2, interpolation=cv2.INTER_NEAREST)
            self._try(self._writer.send, screen)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._writer:
            self._writer.close()
            self._try(count_frames_and_secs, self._path)  # ffmpeg keeps it to itself if it cannot write


def play_episode(
    env: gym.Env,
    model: ActorCritic,
    rng: random.Random,
    max_length: int,
    video: Path | None = None,
    turn: AbstractContextManager = nullcontext(),  # noqa: B008 - it has no state
    stopped: Callable[[], bool] = lambda: False,
) -> tuple[float, int] | None:
    """Play one episode, sampling from the policy; return the reward, unclipped, and the length in steps.

    Returns None if the run was `stopped` meanwhile.
    """
    observation, _ = env.reset()
    state, pictures = model.initial_state(), model.new_pictures(1)
    total_reward, length, done = 0.0, 0, False
    with Video(video, env) as video:
        while not done:
            if stopped():
                return None
            with turn:
                for _ in range(STEPS_A_TURN):
                    video.add_frame()
                    pictures[0][0] = torch.from_numpy(observation)
                    action, state = model.act(pictures, state, rng)
                    observation, reward, terminated, truncated, _ = env.step(action)
                    total_reward += reward
                    length += 1
                    done = terminated or truncated or length >= max_length
                    if done:
                        video.add_frame()
                        break
    return total_reward, length


def evaluate(args: argparse.Namespace, shared: RunState, start_time: float, run_folder: Path, life: int) -> None:
    """Play test episodes until the run ends; for each a console line, a row of episodes.csv, perhaps a best.pt."""
    torch.set_num_threads(1)
    seed = worker_seed(args.seed, args.num_processes, life)
    rng = random.Random(seed)
    env = create_atari_env(args.env_name, render_mode="rgb_array")
    env.mean, env.std, env.num_frames = shared.observation_statistics.tolist()
    env.reset(seed=seed)
    model = ActorCritic(env.observation_space.shape[0], env.action_space.n)
    turn = CoreTurn(run_folder, args.num_processes)
    log = EpisodeLog(run_folder, int(shared.episodes))
    shared.ready[args.num_processes] = True

    finished = False
    while not finished:
        model.load_state_dict(shared.model.state_dict())
        episode = int(shared.episodes)
        record = args.record_every and episode % args.record_every == 0
        video = run_folder / "videos" / f"rl-video-episode-{episode}.mp4" if record else None
        outcome = play_episode(
            env, model, rng, args.max_episode_length, video, turn, stopped=lambda: shared.stop[0] >= STOP
        )
        if outcome is None:
            return
        reward, length = outcome
        elapsed, num_steps = time.time() - start_time, int(shared.steps.sum())
        fps = num_steps / elapsed
        minutes, seconds = divmod(int(elapsed), 60)
        say(
            f"Time {minutes // 60:02d}h {minutes % 60:02d}m {seconds:02d}s, num steps {num_steps}, FPS {fps:.0f}, "
            f"episode reward {reward:.1f}, episode length {length}"
        )
        log.append(episode, f"{elapsed:.1f}", num_steps, f"{fps:.0f}", reward, length)
        shared.count_episode(reward, (env.mean, env.std, env.num_frames))
        shared.save_if_best(run_folder, args, model)
        if shared.target_reached(args.target_reward):
            shared.stop.clamp_(min=FINISH)
        finished = shared.stop[0] >= FINISH or (args.max_steps is not None and num_steps >= args.max_steps)
