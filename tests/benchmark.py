"""Steps per second of the game alone, of the textbook worker (textbook.py) and of ours, evaluator included.

python tests/benchmark.py --seconds 20 --rounds 5

All workers of all cells are started once and stopped by signal; then every round lets each cell run in turn, so that
the machine's moods fall on all of them alike. At the end our worker runs once more, its parts timed.
"""

import argparse
import os
import platform
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import redirect_stdout
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import textbook
import torch
import torch.multiprocessing as mp

import envs
import main
import test
import train
from checkpoint import RunState
from envs import create_atari_env
from model import ActorCritic
from my_optim import SharedAdam
from workers import ENVIRONMENT, num_cores


def play_game(rank, args, shared, run_folder, life):
    """The game alone: emulator and preprocessing, random actions, no network."""
    env, rng = create_atari_env(args.env_name), random.Random(rank)
    env.reset(seed=rank)
    shared.ready[rank] = True
    while True:
        for _ in range(20):
            _, _, terminated, truncated, _ = env.step(rng.randrange(env.action_space.n))
            if terminated or truncated:
                env.reset()
        shared.steps[rank] += 20


PHASES = ("emulator", "preprocessing", "acting", "learning", "update", "waiting")


def train_timed(rank, args, shared, run_folder, life, times):
    """Our worker, its parts timed: adds up the seconds of each of PHASES in `times`, (num_processes, len(PHASES))."""
    seconds = times[rank].numpy()

    def time_calls(owner, name, phase, part_of=None):
        function = getattr(owner, name)

        def timed(*args, **kwargs):
            start = time.perf_counter()
            result = function(*args, **kwargs)
            elapsed = time.perf_counter() - start
            seconds[PHASES.index(phase)] += elapsed
            if part_of:
                seconds[PHASES.index(part_of)] -= elapsed
            return result

        setattr(owner, name, timed)

    class Emulator(envs.ale_py.ALEInterface):  # only a class of Python's can be patched
        def act(self, action):
            return super().act(action)

    envs.ale_py.ALEInterface = Emulator
    time_calls(Emulator, "act", "emulator", part_of="preprocessing")
    time_calls(envs.NormalizedObservation, "step", "preprocessing")
    time_calls(envs.NormalizedObservation, "reset", "preprocessing")
    time_calls(ActorCritic, "act", "acting")
    time_calls(ActorCritic, "value", "learning")
    time_calls(ActorCritic, "unroll", "learning")
    time_calls(train, "a3c_loss", "learning")
    time_calls(torch.autograd, "grad", "learning")
    time_calls(torch.nn.utils, "get_total_norm", "learning")
    time_calls(SharedAdam, "step", "update")
    time_calls(torch, "_foreach_copy_", "update")
    time_calls(train.CoreTurn, "__enter__", "waiting")
    time_calls(train.CoreTurn, "__exit__", "waiting")
    train.train(rank, args, shared, run_folder, life)


class Cell:
    """One program at one number of processes; running or stopped."""

    def __init__(self, program: str, num_processes: int, env_name: str) -> None:
        self.program, self.num_processes, self.rates = program, num_processes, []
        self.folder = Path(tempfile.mkdtemp())
        args = main.parse_args(["--env-name", env_name, "--num-processes", str(num_processes), "--record-every", "0"])
        num_actions = create_atari_env(env_name).action_space.n
        self.shared = RunState(args, 1, num_actions)
        if program == "textbook":
            self.shared.model = textbook.create_model(1, num_actions).share_memory()
            self.shared.optimizers = [textbook.PlainAdam(self.shared.model.parameters(), args.lr)]
        self.times = torch.zeros(num_processes, len(PHASES), dtype=torch.float64).share_memory_()
        worker = {"game": play_game, "textbook": textbook.train, "ours": train.train, "timed": train_timed}[program]
        worker_args = [args, self.shared, self.folder, 0]
        if program == "timed":
            worker_args.append(self.times)
        self.processes = [mp.Process(target=worker, args=(rank, *worker_args)) for rank in range(num_processes)]
        if program != "game":
            evaluator_args = (args, self.shared, time.time(), self.folder, 0)
            self.processes.append(mp.Process(target=silent_evaluator, args=evaluator_args))

    def start(self) -> None:
        for name in ENVIRONMENT:
            os.environ.pop(name, None)
        os.environ |= {"OMP_NUM_THREADS": "1"} if self.program == "textbook" else ENVIRONMENT
        for process in self.processes:
            process.start()
        while not self.shared.steps.all():  # the first rollout imports and allocates
            time.sleep(0.1)
        self.signal(signal.SIGSTOP)

    def signal(self, number: int) -> None:
        for process in self.processes:
            os.kill(process.pid, number)

    def measure(self, seconds: float) -> None:
        self.signal(signal.SIGCONT)
        time.sleep(min(2.0, seconds / 5))  # caches, first rollouts
        before, times_before, start = self.shared.steps.sum().item(), self.times.sum(dim=0), time.perf_counter()
        time.sleep(seconds)
        steps, elapsed = self.shared.steps.sum().item() - before, time.perf_counter() - start
        self.rates.append(steps / elapsed)
        times = (self.times.sum(dim=0) - times_before).tolist()
        rest = self.num_processes * elapsed - sum(times)
        self.microseconds = [1e6 * t / steps for t in (*times, rest)]
        self.signal(signal.SIGSTOP)

    def stop(self) -> None:
        self.signal(signal.SIGKILL)
        for process in self.processes:
            process.join()
        shutil.rmtree(self.folder)


def silent_evaluator(*args) -> None:
    with open(os.devnull, "w") as devnull, redirect_stdout(devnull):
        test.evaluate(*args)


def ratios(cell: Cell, base: Cell) -> list[float]:
    return [a / b for a, b in zip(cell.rates, base.rates, strict=True)]


def machine() -> str:
    model = next(
        (line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line),
        platform.processor(),
    )
    versions = f"Python {platform.python_version()}, torch {torch.__version__}"
    return f"{num_cores()} cores of {model}, {platform.system()}, {versions}"


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=15, help="of each cell in each round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2, 16])
    parser.add_argument("--env-name", default="Pong-v0")
    return parser.parse_args()


def where_time_goes(args: argparse.Namespace) -> None:
    print("\nour worker's time in microseconds a step of that worker (waiting: for its turn on a core)")
    print("| processes |", " | ".join((*PHASES, "the rest")), "| steps/s |")
    print("| --- " * (len(PHASES) + 3) + "|")
    for n in args.processes:
        cell = Cell("timed", n, args.env_name)
        try:
            cell.start()
            cell.measure(args.seconds)
        finally:
            cell.stop()
        print(f"| {n} |", " | ".join(f"{t:.0f}" for t in cell.microseconds), f"| {cell.rates[0]:.0f} |")


def run(args: argparse.Namespace) -> None:
    mp.set_start_method("spawn")
    cells = {
        (program, n): Cell(program, n, args.env_name)
        for n in args.processes
        for program in ("game", "textbook", "ours")
    }
    try:
        for cell in cells.values():
            cell.start()
        for number in range(args.rounds):
            for cell in cells.values():
                cell.measure(args.seconds)
            rates = (f"{program} at {n}: {cell.rates[-1]:.0f}" for (program, n), cell in cells.items())
            print(f"round {number + 1}, steps/s: {', '.join(rates)}", file=sys.stderr)
    finally:
        for cell in cells.values():
            cell.stop()
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    print(f"{args.env_name}, {time.strftime('%Y-%m-%d')}, commit {commit or 'unknown'}; {machine()};")
    print(
        f"training steps/s, medians of {args.rounds} rounds of {args.seconds:g} s; an evaluator runs beside the workers"
    )
    print("| processes | game alone | textbook worker | our worker | ours / textbook (min - max) |")
    print("| --- | --- | --- | --- | --- |")
    for n in args.processes:
        game, base, ours = (cells[program, n] for program in ("game", "textbook", "ours"))
        pairs = ratios(ours, base)
        rates = " | ".join(f"{statistics.median(cell.rates):.0f}" for cell in (game, base, ours))
        print(f"| {n} | {rates} | **{statistics.median(pairs):.2f}** ({min(pairs):.2f} - {max(pairs):.2f}) |")


if __name__ == "__main__":
    options = parse_args()
    run(options)
    where_time_goes(options)
