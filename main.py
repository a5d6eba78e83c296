"""A3C on Atari: training processes and one test process around a shared actor-critic and a shared Adam.

python main.py --env-name Pong-v0 --num-processes 16
"""

import argparse
import itertools
import json
import math
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import torch
import torch.multiprocessing as mp

from envs import create_atari_env, find_game
from model import ActorCritic
from my_optim import SharedAdam
from test import evaluate
from train import train
from workers import ENVIRONMENT, run_processes


def fail(message: str) -> NoReturn:
    """Say in one line what is wrong with the input, and exit with status 2."""
    print(f"main.py: error: {message}", file=sys.stderr)
    sys.exit(2)


class Parser(argparse.ArgumentParser):
    """An argument parser that says what is wrong in one line, without the usage."""

    def error(self, message: str) -> NoReturn:
        """Print `message` and exit."""
        fail(message)


def number(kind: type, low: float, high: float = math.inf) -> Callable[[str], int | float]:
    """Return an argparse type for a finite int or float in [low, high]."""

    def parse(text: str) -> int | float:
        limits = f"of at least {low}" if high == math.inf else f"from {low} to {high}"
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not low <= value <= high or value == math.inf:
            name = "whole number" if kind is int else "number"
            raise argparse.ArgumentTypeError(f"must be a {name} {limits}, not '{text}'")
        return value

    return parse


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line (or `argv`); exit with status 2 and one line if something is wrong with it."""
    parser = Parser(
        prog="main.py", description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    run = parser.add_argument_group("the run")
    run.add_argument("--env-name", default="Pong-v0", help="Atari game, as in Pong-v0 or ALE/Pong-v5")
    run.add_argument("--num-processes", type=number(int, 1), default=4, help="training processes")
    run.add_argument("--max-steps", type=number(int, 1), help="training steps over all processes; None: run on")
    run.add_argument(
        "--max-episode-length", type=number(int, 1), default=1_000_000, help="steps until an episode is cut"
    )
    run.add_argument("--seed", type=number(int, 0), default=1, help="of weights, games and sampling")
    run.add_argument("--save-dir", type=Path, help="run folder; None: runs/<env-name>-<k>, the next free k")
    run.add_argument(
        "--record-every", type=number(int, 0), default=100, help="test episodes from video to video; 0: never"
    )
    learn = parser.add_argument_group("learning")
    learn.add_argument("--lr", type=number(float, 0), default=1e-4, help="Adam's learning rate")
    learn.add_argument("--gamma", type=number(float, 0, 1), default=0.99, help="discount of a reward one step later")
    learn.add_argument("--gae-lambda", type=number(float, 0, 1), default=1.0, help="lambda of the advantage estimates")
    learn.add_argument("--entropy-coef", type=number(float, 0), default=0.01, help="weight of the entropy bonus")
    learn.add_argument("--value-loss-coef", type=number(float, 0), default=0.5, help="weight of the value loss")
    learn.add_argument(
        "--max-grad-norm", type=number(float, 0), default=50.0, help="norm that gradients are clipped to"
    )
    learn.add_argument("--num-steps", type=number(int, 1), default=20, help="steps of a rollout")
    learn.add_argument("--no-shared", action="store_true", help="give each process an Adam of its own")
    args = parser.parse_args(argv)
    try:
        find_game(args.env_name)
    except ValueError as error:
        fail(str(error))
    return args


def make_run_folder(args: argparse.Namespace) -> Path:
    """Make the folder that this run writes to, with options.json in it; raise `OSError` if that cannot be done."""
    folder = args.save_dir
    if folder is None:
        for k in itertools.count(1):
            folder = Path("runs", f"{args.env_name.replace('/', '-')}-{k}")
            try:
                folder.mkdir(parents=True)
                break
            except FileExistsError:
                continue
    folder.mkdir(parents=True, exist_ok=True)
    if any((folder / name).exists() for name in ("options.json", "episodes.csv", "videos")):
        raise FileExistsError(f"{folder} already holds a run: name another folder")
    with open(folder / "options.json", "x") as file:  # "x": of two runs that name one folder, one fails
        json.dump(vars(args), file, indent=2, default=str)
    return folder


def main(argv: list[str] | None = None) -> int:
    """Start the processes, watch over them, and return the exit status."""
    args = parse_args(argv)
    try:
        run_folder = make_run_folder(args)
    except OSError as error:
        fail(f"cannot write the run: {error}")

    os.environ |= ENVIRONMENT
    mp.set_start_method("spawn")  # everywhere: a fork copies the locks of running threads, and macOS does not bear it
    torch.manual_seed(args.seed)
    env = create_atari_env(args.env_name)
    shared_model = ActorCritic(env.observation_space.shape[0], env.action_space.n).share_memory()
    optimizers = [SharedAdam(shared_model.parameters(), lr=args.lr)] * args.num_processes
    if args.no_shared:
        optimizers = [SharedAdam(shared_model.parameters(), lr=args.lr) for _ in range(args.num_processes)]
    steps = torch.zeros(args.num_processes, dtype=torch.int64).share_memory_()
    ready = torch.zeros(args.num_processes + 1, dtype=torch.bool).share_memory_()

    until = f"for {args.max_steps} steps" if args.max_steps else "until stopped"
    print(
        f"A3C on {args.env_name}: {args.num_processes} training processes and one test process, {until}.\n"
        f"Writing to {run_folder}{os.sep}: episodes.csv, videos. Ctrl-C stops the run.",
        flush=True,
    )
    processes = []
    for rank, optimizer in enumerate(optimizers):
        worker_args = (rank, args, shared_model, optimizer, steps, ready, run_folder)
        processes.append(mp.Process(target=train, args=worker_args, name=f"training process {rank}"))
    test_args = (args, shared_model, steps, ready, time.time(), run_folder)
    processes.insert(1, mp.Process(target=evaluate, args=test_args, name="test process"))
    status = run_processes(processes, ready)
    print(f"{'Done' if status == 0 else 'Stopped'}; the run lies in {run_folder}", flush=True)
    return status


if __name__ == "__main__":
    sys.exit(main())
