"""A3C on Atari: training workers and a test worker around a shared network and a shared Adam.

python main.py --env-name Pong-v0 --num-processes 16
"""

from harness import workers  # first: harness/__init__.py exits where the rest cannot run

if __name__ == "__main__":
    workers.open_standard_files()
    workers.end_at_once_on_signals()  # nothing has started, and what follows takes seconds

import argparse
import contextlib
import importlib.util
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as mp

from envs import create_atari_env, find_game
from harness import link, utils
from harness.checkpoint import checkpoint_of, load_agent, make_run_folder, read_checkpoint
from harness.fit import tell_if_slow
from harness.resume import go_on, options_of, way_on
from harness.settings import write_options
from harness.shared import SharedState
from harness.supervisor import DiedTooOftenError, Job, Supervisor
from harness.utils import complain, fail, number, one_of, reason, say
from test import evaluate
from train import train


def add_run_options(add: Callable[..., Any]) -> None:
    """Add the options that say what is run, how long, and what is written."""
    count, path, switch = number(int, 1), utils.nonempty_path, argparse.BooleanOptionalAction
    add("--env-name", default="Pong-v0", help="Atari game, or that of --init; see test.py --games")
    add("--num-processes", type=number(int, 1, 1024), default=4, help="training workers, a machine")
    add("--max-steps", type=count, help="training steps of all workers; None: run on")
    add("--max-time", type=number(float, 0, 1e6), help="hours of this session; None: run on")
    add("--target-reward", type=number(float), help="mean of 100 test episodes to stop at")
    add("--max-episode-length", type=count, default=1_000_000, help="steps that cut an episode")
    add("--seed", type=number(int, 0), default=1, help="of weights, games and sampling")
    add("--save-dir", type=path, help="run folder; None: runs/<env-name>-<k>, the next free k")
    agent, run = utils.nonempty_text, utils.run_folder
    add("--init", type=agent, metavar="AGENT", help="start from it: run folder or best.pt")
    add("--resume", type=run, metavar="RUN", help="go on with this run, with its options")
    seconds = number(float, 1)
    add("--checkpoint-interval", type=seconds, default=60.0, help="seconds between checkpoints")
    add("--record-every", type=number(int, 0), default=100, help="test episodes a video; 0: none")
    add("--annotate", action=switch, default=False, help="videos show what the agent sees, thinks")
    needs = "write event files; needs pip install tensorboard"
    add("--tensorboard", action=switch, default=False, help=needs)
    ray = {"type": link.cluster_address, "nargs": "?", "const": link.DEFAULT_ADDRESS}
    add("--ray", **ray, metavar="HOST:PORT", help="train on all machines of this Ray cluster, too")
    exchange = "seconds that another machine learns between two exchanges"
    add("--ray-interval", type=number(float, 0, 3600), default=1.0, help=exchange)


def add_learning_options(add: Callable[..., Any]) -> None:
    """Add the hyper-parameters; each also has its place in harness/settings.LEARNS_BY."""
    weight, fraction = number(float, 0), number(float, 0, 1)
    schedule = {"type": one_of("constant", "linear"), "metavar": "{constant,linear}"}
    linear = "linear: to zero at --max-steps"
    add("--lr", type=fraction, default=1e-4, help="Adam's learning rate")
    add("--lr-schedule", **schedule, default="constant", help=linear)
    add("--gamma", type=fraction, default=0.99, help="discount of a reward one step later")
    add("--gae-lambda", type=fraction, default=1.0, help="lambda of the advantage estimates")
    add("--entropy-coef", type=weight, default=0.01, help="weight of the entropy bonus")
    add("--entropy-schedule", **schedule, default="constant", help=linear)
    add("--value-loss-coef", type=weight, default=0.5, help="weight of the value loss")
    add("--max-grad-norm", type=weight, default=50.0, help="norm to clip gradients to")
    add("--num-steps", type=number(int, 1, 10_000), default=20, help="steps of a rollout")
    add("--no-shared", action="store_true", help="give each training worker an Adam of its own")
    add("--shared", action="store_false", dest="no_shared", help=argparse.SUPPRESS)  # undoes it


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of all options."""
    parser = argparse.ArgumentParser("main.py", description=__doc__.splitlines()[0])
    parser.formatter_class = argparse.ArgumentDefaultsHelpFormatter
    parser.error = fail  # one line, without the usage
    add_run_options(parser.add_argument_group("the run").add_argument)
    add_learning_options(parser.add_argument_group("learning").add_argument)
    return parser


def parse_args(argv: list[str] | None = None, **defaults: Any) -> argparse.Namespace:
    """Parse the command line (or `argv`); bad input is one line and exit status 2.

    `defaults` take the place of the options' own. A text among them is converted and checked as if
    it had been typed, as argparse does. To resume a run, `prepare` parses twice: first to find the
    run, then with the run's options as defaults.
    """
    parser = make_parser()
    parser.set_defaults(**defaults)
    args = parser.parse_args(argv)
    try:
        find_game(args.env_name)
    except ValueError as error:
        fail(error)
    if args.resume and args.save_dir:
        fail("argument --save-dir: a run that is resumed stays in its folder")
    if args.resume and args.init and not defaults:
        fail("argument --init: a run that is resumed goes on with its own weights")
    if args.tensorboard and importlib.util.find_spec("tensorboard") is None:
        fail("argument --tensorboard: the package is missing: pip install tensorboard")
    options_are_known = defaults or not args.resume  # at the first of two parses they are not
    for name in "lr", "entropy":
        linear = vars(args)[f"{name}_schedule"] == "linear"
        if linear and args.max_steps is None and options_are_known:
            fail(f"argument --{name}-schedule: linear needs --max-steps, where it reaches zero")
    return args


def find_run(
    args: argparse.Namespace, argv: list[str] | None
) -> tuple[argparse.Namespace, dict[str, Any]]:
    """Return the options and the checkpoint of the run to resume.

    Raises `OSError` or `ValueError` if it cannot be resumed.
    """
    checkpoint = read_checkpoint(args.resume)
    own = options_of(checkpoint, known=vars(make_parser().parse_args([])))  # those typed now win
    args = parse_args(argv, **own)
    if args.env_name != own.get("env_name", args.env_name):
        raise ValueError(f"the run in {args.resume} plays {own['env_name']}, not {args.env_name}")
    return args, checkpoint


def prepare(
    argv: list[str] | None, until_the_end: contextlib.ExitStack
) -> tuple[argparse.Namespace, SharedState, Path]:
    """Make or find the run that is asked for; return its options, its shared state, its folder.

    Signals are held `until_the_end`, and so is the folder's lock. Exits with status 2 and one line
    if there cannot be such a run; no worker has started by then.
    """
    args, checkpoint, agent = parse_args(argv), None, None
    try:
        until_the_end.enter_context(workers.signals_held())
        if args.ray:
            link.find_cluster(args.ray)
        if args.resume:
            checkpoint_of(args.resume)  # before the lock makes a file in a folder that is no run's
            until_the_end.enter_context(workers.run_folder_locked(args.resume))
            args, checkpoint = find_run(args, argv)
        elif args.init is not None:  # its game is the default
            agent = load_agent(args.init)
            args = parse_args(argv, env_name=agent[0].unwrapped.env_id)
        torch.manual_seed(args.seed)
        env = create_atari_env(args.env_name)
        shape = env.observation_space.shape
        shared = SharedState(args, shape[0], env.action_space.n)
        tell_if_slow(shared.model, shape)  # before anything is written, as a new network may fail
        if checkpoint:
            run_folder = args.resume
            go_on(args, shared, checkpoint, run_folder)
        else:
            if agent:
                shared.start_from(*agent, args.env_name)
            run_folder = make_run_folder(args.save_dir, args.env_name)
            until_the_end.enter_context(workers.run_folder_locked(run_folder))
        write_options(vars(args), run_folder, shared.total_steps())
    except (OSError, ValueError) as error:
        fail(error)
    return args, shared, run_folder


def main(argv: list[str] | None = None) -> int:
    """Start the processes, watch over them, and return the exit status."""
    with contextlib.ExitStack() as until_the_end:
        args, shared, run_folder = prepare(argv, until_the_end)
        start = f" from {args.init}" if args.init and not args.resume else ""
        who = f"{args.num_processes} training workers and one test worker"
        say(f"A3C on {args.env_name}{start}: {who}.")
        say(f"All of it lies in {run_folder}: table, curve, videos, checkpoint, best agent.")
        say("A line follows for each test episode; Ctrl-C stops the run.")
        return run(args, shared, run_folder)


def create_jobs(
    args: argparse.Namespace, shared: SharedState, run_folder: Path, started: float
) -> list[Job]:
    """Return what each worker does; the test worker is among the first to start."""
    n = args.num_processes
    jobs = [
        Job(f"training worker {rank}", rank, train, (rank, args, shared, run_folder))
        for rank in range(n)
    ]
    jobs.insert(1, Job("test worker", n, evaluate, (args, shared, started, run_folder)))
    if args.ray:
        to_link = train, args, shared, run_folder
        jobs.insert(2, Job("link", n + 1, link.link, to_link, is_vital=False))
    return jobs


def run(args: argparse.Namespace, shared: SharedState, run_folder: Path) -> int:
    """Start the workers, look at signals and clocks until they have ended, and save.

    Returns the exit status.
    """
    os.environ |= workers.ENVIRONMENT
    started = last_save = last_report = time.monotonic()
    jobs = create_jobs(args, shared, run_folder, started)
    # A forked child of a program with threads may hang, on macOS above all.
    spawn = mp.get_context("spawn")
    supervisor = Supervisor(spawn, jobs, shared.ready, shared.stop, shared.restarts, run_folder)
    ended_by, gave_up, all_up, dropped = None, False, False, 0
    try:
        with supervisor:
            for _ in supervisor.watch():
                now = time.monotonic()
                ended_by = ended_by or workers.next_signal()
                if ended_by:
                    shared.request_stop(workers.STOP)
                # Or the workers that are still to start would, for nothing. The test worker is to
                # play one episode, however few steps there are.
                if shared.has_made(args.max_steps) and shared.ready[args.num_processes]:
                    shared.request_stop(workers.FINISH)
                if args.max_time is not None and now - started > 3600 * args.max_time:
                    shared.request_stop(workers.FINISH)
                if now - last_save > args.checkpoint_interval:
                    last_save = now
                    shared.save(run_folder, args, shared.elapsed + now - started)
                if not all_up and shared.stop == workers.GO_ON and supervisor.all_ready():
                    all_up = True
                    say(f"All {args.num_processes + 1} are up after {now - started:.0f} s.")
                if now - last_report > 60 and shared.dropped.sum() > dropped:
                    last_report, dropped = now, int(shared.dropped.sum())
                    complain(f"{dropped} rollouts dropped so far: loss or gradient not finite")
    except Exception as error:  # whatever it is, no worker may go on training for nobody
        gave_up = True
        complain(f"error: {reason(error)}")
        if not isinstance(error, DiedTooOftenError):
            utils.write_traceback(run_folder / "traceback-main.txt")
    shared.save(run_folder, args, shared.elapsed + time.monotonic() - started)
    if ended_by:
        outcome, status = f"Stopped by {signal.Signals(ended_by).name}", 128 + ended_by
    else:
        outcome, status = ("Gave up", 1) if gave_up else ("Done", 0)
    dropped = int(shared.dropped.sum())
    script = sys.argv[0] if __name__ == "__main__" else __file__
    say(
        f"{outcome} after {shared.total_steps()} steps"
        f"{f', {dropped} rollouts dropped' if dropped else ''}; the run lies in {run_folder}, "
        f"and {way_on(args, shared, run_folder, script)}"
    )
    return status


if __name__ == "__main__":
    os._exit(main())  # all is said and saved; taking an interpreter with torch down costs a second
