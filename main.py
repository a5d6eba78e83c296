"""A3C on Atari: training processes and one test process around a shared actor-critic and a shared Adam."""

import argparse
import contextlib
import importlib.util
import itertools
import json
import math
import os
import shlex
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import workers

if __name__ == "__main__":  # before the imports that take seconds, so that these two hold during them, too
    workers.hold_signals()
elif __name__ == "__mp_main__":  # a spawned process
    workers.watch_main_process()

import torch

from checkpoint import RunState, read, write
from envs import create_atari_env, find_game
from test import evaluate
from train import train


def fail(message: str) -> NoReturn:
    """Say in one line what is wrong with the input, and exit with status 2."""
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)


def number(kind: type, low: float = -math.inf, high: float = math.inf) -> Callable[[str], int | float]:
    """Return an argparse type for a finite int or float in [low, high]."""
    limits = f" from {low} to {high}" if high < math.inf else f" of at least {low}" if low > -math.inf else ""

    def parse(text: str) -> int | float:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not low <= value <= high or math.isinf(value):
            raise argparse.ArgumentTypeError(f"must be a {'whole ' * (kind is int)}number{limits}, not '{text}'")
        return value

    return parse


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line (or `argv`); exit with status 2 and one line if something is wrong with it."""
    parser = argparse.ArgumentParser("main.py", description=__doc__)
    parser.formatter_class, parser.error = argparse.ArgumentDefaultsHelpFormatter, fail  # one line, without the usage
    run = parser.add_argument_group("the run")
    run.add_argument("--env-name", default="Pong-v0", help="Atari game, as in Pong-v0 or ALE/Pong-v5")
    run.add_argument("--num-processes", type=number(int, 1), default=4, help="training processes")
    run.add_argument("--max-steps", type=number(int, 1), help="training steps over all processes; None: run on")
    run.add_argument("--max-time", type=number(float, 0), help="hours of this sitting; None: run on")
    run.add_argument("--target-reward", type=number(float), help="to stop at: mean of the last 100 test episodes")
    run.add_argument("--max-episode-length", type=number(int, 1), default=1_000_000, help="steps that cut an episode")
    run.add_argument("--seed", type=number(int, 0), default=1, help="of weights, games and sampling")
    run.add_argument("--save-dir", type=Path, help="run folder; None: runs/<env-name>-<k>, the next free k")
    run.add_argument("--resume", type=Path, metavar="RUN", help="go on with this folder's run, with its options")
    run.add_argument("--checkpoint-interval", type=number(float, 1), default=60.0, help="seconds between checkpoints")
    run.add_argument("--record-every", type=number(int, 0), default=100, help="record every n-th test episode; 0: none")
    run.add_argument("--annotate", action="store_true", help="show in the videos what the agent sees and thinks")
    run.add_argument("--tensorboard", action="store_true", help="write event files, too; needs pip install tensorboard")
    learn = parser.add_argument_group("learning")
    learn.add_argument("--lr", type=number(float, 0), default=1e-4, help="Adam's learning rate")
    learn.add_argument("--lr-schedule", choices=("constant", "linear"), default="constant", help="linear ends at zero")
    learn.add_argument("--gamma", type=number(float, 0, 1), default=0.99, help="discount of a reward one step later")
    learn.add_argument("--gae-lambda", type=number(float, 0, 1), default=1.0, help="lambda of the advantage estimates")
    learn.add_argument("--entropy-coef", type=number(float, 0), default=0.01, help="weight of the entropy bonus")
    learn.add_argument("--value-loss-coef", type=number(float, 0), default=0.5, help="weight of the value loss")
    learn.add_argument("--max-grad-norm", type=number(float, 0), default=50.0, help="norm to clip gradients to")
    learn.add_argument("--num-steps", type=number(int, 1), default=20, help="steps of a rollout")
    learn.add_argument("--no-shared", action="store_true", help="give each process an Adam of its own")
    args = parser.parse_args(argv)
    try:
        find_game(args.env_name)
    except ValueError as error:
        fail(str(error))
    if args.resume and args.save_dir:
        fail("argument --save-dir: a run that is resumed stays in its folder")
    if args.tensorboard and importlib.util.find_spec("tensorboard") is None:
        fail("argument --tensorboard: the package is missing: pip install tensorboard")
    if args.lr_schedule == "linear" and args.max_steps is None:
        fail("argument --lr-schedule: linear needs --max-steps, where the learning rate reaches zero")
    return args


def load_run(args: argparse.Namespace, argv: list[str]) -> tuple[argparse.Namespace, dict]:
    """Return the options and the checkpoint of the run to resume; raise `OSError` or `ValueError` if it cannot be."""
    path = args.resume / "checkpoint.pt"
    if not path.is_file():
        raise ValueError(f"{args.resume} is no run's folder: there is no {path}")
    checkpoint = read(path)
    if not isinstance(checkpoint.get("options"), dict):
        raise ValueError(f"{path} is not a checkpoint")
    # The run's own options come first, as if they had been typed, so that those typed now win.
    own = {f"--{name}".replace("_", "-"): v for name, v in checkpoint["options"].items() if v not in (None, False)}
    args = parse_args([*(name if v is True else f"{name}={v}" for name, v in own.items()), *argv])
    if args.env_name != own.get("--env-name"):
        raise ValueError(f"the run in {args.resume} plays {own.get('--env-name')}, not {args.env_name}")
    return args, checkpoint


def make_run_folder(args: argparse.Namespace) -> Path:
    """Make the folder that a new run writes to; raise `OSError`, or `ValueError` if it is another run's."""
    if args.save_dir is None:
        for k in itertools.count(1):
            folder = Path("runs", f"{args.env_name.replace('/', '-')}-{k}")
            with contextlib.suppress(FileExistsError):
                folder.mkdir(parents=True)
                return folder
    args.save_dir.mkdir(parents=True, exist_ok=True)
    if any((args.save_dir / name).exists() for name in ("options.json", "episodes.csv", "checkpoint.pt", "videos")):
        raise ValueError(f"{args.save_dir} already holds a run: name another folder, or --resume it")
    return args.save_dir


class Watch:
    """What the main process does while the others work: it looks at signals and clocks, and saves."""

    def __init__(self, args: argparse.Namespace, state: RunState, run_folder: Path) -> None:
        self.args, self.state, self.run_folder = args, state, run_folder
        self.started = self.saved = self.told = time.time()
        self.signal, self.dropped = None, 0

    def save(self) -> None:
        """Write the checkpoint."""
        self.saved = time.time()
        self.state.save(self.run_folder, self.args, self.state.elapsed + self.saved - self.started)

    def tick(self) -> None:
        """Do what is due."""
        for number in workers.signals_held():
            self.state.stop[0] = workers.STOP_AT_ONCE if self.signal == number == signal.SIGINT else workers.STOP
            self.signal = self.signal or number
        now = time.time()
        if self.args.max_time is not None and now - self.started > 3600 * self.args.max_time:
            self.state.stop.clamp_(min=workers.FINISH)
        if now - self.saved > self.args.checkpoint_interval:
            self.save()
        if now - self.told > 60 and self.state.dropped.sum() > self.dropped:
            self.told, self.dropped = now, int(self.state.dropped.sum())
            workers.complain(f"{self.dropped} rollouts so far dropped, as loss or gradient was not finite")


def main(argv: list[str] | None = None) -> int:
    """Start the processes, watch over them, and return the exit status."""
    args, checkpoint = parse_args(argv), None
    try:
        if args.resume:
            args, checkpoint = load_run(args, sys.argv[1:] if argv is None else argv)
        run_folder = args.resume or make_run_folder(args)
        workers.lock(run_folder)
        os.environ |= workers.ENVIRONMENT | {workers.MAIN_PROCESS: str(os.getpid())}
        torch.manual_seed(args.seed)
        env = create_atari_env(args.env_name)
        state = RunState(args, env.observation_space.shape[0], env.action_space.n)
        if checkpoint:
            state.restore(checkpoint)
            state.refuse_if_over(args)
        (run_folder / "videos").mkdir(exist_ok=True)
        write(json.dumps(vars(args), indent=2, default=str).encode(), run_folder / "options.json")
    except OSError as error:
        fail(f"cannot write the run: {error}")
    except ValueError as error:
        fail(str(error))

    workers.say(
        f"A3C on {args.env_name}: {args.num_processes} training processes and one test process.\n"
        f"All of it lies in {run_folder}: table, curve, videos, checkpoint, best agent. Ctrl-C stops the run."
    )
    watch = Watch(args, state, run_folder)
    n, job, start_time = args.num_processes, workers.Job, watch.started - state.elapsed
    jobs = [job(f"training process {rank}", rank, train, (rank, args, state, run_folder)) for rank in range(n)]
    jobs.insert(1, job("test process", n, evaluate, (args, state, start_time, run_folder)))
    try:
        well = workers.supervise(jobs, state.ready, state.stop, state.life, run_folder, watch.tick)
    finally:
        watch.save()
    how = f"Stopped by {signal.Signals(watch.signal).name}" if watch.signal else "Done" if well else "Gave up"
    resume = shlex.join([sys.orig_argv[0], sys.argv[0], "--resume", str(run_folder)])
    if args.max_steps is not None and state.steps.sum() >= args.max_steps:
        resume += f" --max-steps {2 * args.max_steps}"
    workers.say(f"{how} after {state.steps.sum()} steps; the run lies in {run_folder}, and goes on with: {resume}")
    return 128 + watch.signal if watch.signal else 0 if well else 1


if __name__ == "__main__":
    sys.exit(main())
