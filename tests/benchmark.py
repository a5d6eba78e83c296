"""Steps per second of the game alone, of the textbook worker (textbook.py) and of ours, evaluator
included; or of this program and of another checkout of it.

python tests/benchmark.py --seconds 20 --rounds 5
python tests/benchmark.py --seconds 10 --rounds 5 --against ../another-checkout

All workers of all cells are started once and stopped by signal; then every round lets each cell run
in turn, so that the machine's moods fall on all of them alike. At the end of the first, our worker
runs once more, its parts timed.
"""

import argparse
import os
import platform
import random
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
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
from envs import create_atari_env
from harness.shared import SharedState
from harness.workers import CHILD_OF, ENVIRONMENT, num_cores
from my_optim import SharedAdam
from rollout import Rollout


def play_game(rank, args, shared, run_folder, restarts):
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


def train_timed(rank, args, shared, run_folder, restarts, times):
    """Our worker, its parts timed: adds up the seconds of each of PHASES in `times`,
    (num_processes, len(PHASES)).
    """
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
    time_calls(Rollout, "act", "acting")
    time_calls(Rollout, "values_and_logits", "learning")
    time_calls(train, "a3c_losses", "learning")
    time_calls(torch.Tensor, "backward", "learning")
    time_calls(torch.nn.utils, "clip_grad_norm_", "learning")
    time_calls(SharedAdam, "step", "update")
    time_calls(torch, "_foreach_copy_", "update")
    time_calls(train.CoreTurn, "__enter__", "waiting")
    time_calls(train.CoreTurn, "__exit__", "waiting")
    train.train(rank, args, shared, run_folder, restarts)


class Cell:
    """One program at one number of processes; running or stopped."""

    def __init__(self, program: str, num_processes: int, env_name: str) -> None:
        self.program, self.num_processes, self.rates = program, num_processes, []
        self.folder = Path(tempfile.mkdtemp())
        args = main.parse_args(
            ["--env-name", env_name, "--num-processes", str(num_processes), "--record-every", "0"]
        )
        num_actions = create_atari_env(env_name).action_space.n
        self.shared = SharedState(args, 1, num_actions)
        if program == "textbook":
            self.shared.model = textbook.create_model(1, num_actions).share_memory()
        self.times = torch.zeros(num_processes, len(PHASES), dtype=torch.float64).share_memory_()
        worker = {
            "game": play_game,
            "textbook": textbook.train,
            "ours": train.train,
            "timed": train_timed,
        }[program]
        worker_args = [args, self.shared, self.folder, 0]
        if program == "timed":
            worker_args.append(self.times)
        name = f"benchmark{CHILD_OF}{os.getpid()}"  # they end with this process, however it ends
        self.processes = [
            mp.Process(target=worker, name=name, args=(rank, *worker_args))
            for rank in range(num_processes)
        ]
        if program != "game":
            evaluator_args = (args, self.shared, time.monotonic(), self.folder, 0)
            self.processes.append(
                mp.Process(target=silent_evaluator, name=name, args=evaluator_args)
            )

    def start(self) -> None:
        for name in ENVIRONMENT:
            os.environ.pop(name, None)
        os.environ |= {"OMP_NUM_THREADS": "1"} if self.program == "textbook" else ENVIRONMENT
        for process in self.processes:
            process.start()
        while not self.shared.steps[:-1].all():  # the first rollout imports and allocates
            self.sleep(0.1)
        self.signal(signal.SIGSTOP)

    def sleep(self, seconds: float) -> None:
        time.sleep(seconds)
        if not all(process.is_alive() for process in self.processes):
            raise RuntimeError(f"a process of {self.program} has died")

    def signal(self, number: int) -> None:
        for process in self.processes:
            os.kill(process.pid, number)

    def measure(self, seconds: float) -> None:
        self.signal(signal.SIGCONT)
        time.sleep(min(2.0, seconds / 5))  # caches, first rollouts
        before, times_before = self.shared.steps.sum().item(), self.times.sum(dim=0)
        start, steps = time.perf_counter(), 0
        while steps == 0:  # on a machine that is busy with something else the first may be late
            self.sleep(seconds)
            steps = self.shared.steps.sum().item() - before
        elapsed = time.perf_counter() - start
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
    cpuinfo = Path("/proc/cpuinfo")  # Linux has it
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(":")[1].strip() for line in lines if "model name" in line]
    model = names[0] if names else platform.processor()
    versions = f"Python {platform.python_version()}, torch {torch.__version__}"
    return f"{num_cores()} cores of {model}, {platform.system()}, {versions}"


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=15, help="of each cell in each round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2, 16])
    parser.add_argument("--env-name", default="Pong-v0")
    parser.add_argument("--against", type=Path, help="another checkout of this program")
    return parser.parse_args()


def where_time_goes(args: argparse.Namespace) -> None:
    print("\nour worker's time in microseconds a step of that worker (waiting: for its turn)")
    print("| processes |", " | ".join((*PHASES, "the rest")), "| steps/s |")
    print("| --- " * (len(PHASES) + 3) + "|")
    for n in args.processes:
        cell = Cell("timed", n, args.env_name)
        try:
            cell.start()
            cell.measure(args.seconds)
        finally:
            cell.stop()
        print(
            f"| {n} |",
            " | ".join(f"{t:.0f}" for t in cell.microseconds),
            f"| {cell.rates[0]:.0f} |",
        )


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
            rates = (
                f"{program} at {n}: {cell.rates[-1]:.0f}" for (program, n), cell in cells.items()
            )
            print(f"round {number + 1}, steps/s: {', '.join(rates)}", file=sys.stderr)
    finally:
        for cell in cells.values():
            cell.stop()
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True
    ).stdout.strip()
    print(
        f"{args.env_name}, {time.strftime('%Y-%m-%d')}, commit {commit or 'unknown'}; {machine()};"
    )
    windows = f"{args.rounds} rounds of {args.seconds:g} s"
    print(f"training steps/s, medians of {windows}; an evaluator runs beside the workers")
    print("| processes | game alone | textbook worker | our worker | ours / textbook (min - max) |")
    print("| --- | --- | --- | --- | --- |")
    for n in args.processes:
        game, base, ours = (cells[program, n] for program in ("game", "textbook", "ours"))
        pairs = ratios(ours, base)
        rates = " | ".join(f"{statistics.median(cell.rates):.0f}" for cell in (game, base, ours))
        spread = f"({min(pairs):.2f} - {max(pairs):.2f})"
        print(f"| {n} | {rates} | **{statistics.median(pairs):.2f}** {spread} |")


class Program:
    """main.py of a checkout as it is started by a user; running or stopped.

    Its steps are read from its console, with short episodes, so that a line comes often.
    """

    def __init__(self, checkout: Path, num_processes: int, env_name: str) -> None:
        self.folder, self.lines, self.rates = Path(tempfile.mkdtemp()), [], []
        arguments = ["--env-name", env_name, "--num-processes", str(num_processes)]
        arguments += ["--record-every", "0", "--max-episode-length", "200"]
        self.process = subprocess.Popen(
            [sys.executable, checkout / "main.py", *arguments, "--save-dir", self.folder / "run"],
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        self.reader = threading.Thread(target=self.read)
        self.reader.start()

    def read(self) -> None:
        for line in self.process.stdout:
            if match := re.search(r"num steps (\d+)", line):
                self.lines.append((time.perf_counter(), int(match[1])))

    def next_line(self) -> tuple[float, int]:
        known = len(self.lines)
        while len(self.lines) == known:
            assert self.process.poll() is None, "the program has ended"
            time.sleep(0.005)
        return self.lines[-1]

    def signal(self, number: int) -> None:
        os.killpg(self.process.pid, number)

    def start(self, num_processes: int) -> None:
        while not self.lines:
            time.sleep(0.1)
        time.sleep(10 + 2 * num_processes)  # until all have started up
        self.signal(signal.SIGSTOP)

    def measure(self, seconds: float) -> None:
        self.signal(signal.SIGCONT)
        time.sleep(min(2.0, seconds / 5))  # caches, first rollouts
        start, steps = self.next_line()
        while (line := self.next_line())[0] - start < seconds:
            pass
        self.rates.append((line[1] - steps) / (line[0] - start))
        self.signal(signal.SIGSTOP)

    def stop(self) -> None:
        self.signal(signal.SIGKILL)
        self.process.wait()
        self.reader.join()
        self.process.stdout.close()
        shutil.rmtree(self.folder)


def compare(args: argparse.Namespace) -> None:
    """Print the steps per second of this program and of the other checkout, and their ratio."""
    print("| processes | this | the other | this / the other (min - max) |")
    print("| --- | --- | --- | --- |")
    for n in args.processes:
        programs = []
        try:
            for checkout in Path(__file__).parents[1], args.against:
                programs.append(Program(checkout, n, args.env_name))
                programs[-1].start(n)
            for _ in range(args.rounds):
                for program in programs:
                    program.measure(args.seconds)
        finally:
            for program in programs:
                program.stop()
        pairs = ratios(*programs)
        rates = " | ".join(f"{statistics.median(program.rates):.0f}" for program in programs)
        spread = f"({min(pairs):.2f} - {max(pairs):.2f})"
        print(f"| {n} | {rates} | **{statistics.median(pairs):.2f}** {spread} |", flush=True)


if __name__ == "__main__":
    options = parse_args()
    if options.against:
        compare(options)
    else:
        run(options)
        where_time_goes(options)
