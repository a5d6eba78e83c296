import contextlib
import io
import os
import re
import signal
import subprocess
import sys
import threading
import time
from multiprocessing import popen_spawn_posix, reduction
from multiprocessing.context import set_spawning_popen
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import main

ROOT = Path(__file__).parents[1]
torch.set_num_threads(1)


def options(**changes):
    """Options of a short run with one training worker, as the workers are given them."""
    argv = "--env-name PongDeterministic-v4 --num-processes 1 --max-steps 60"
    return SimpleNamespace(**vars(main.parse_args(argv.split())) | changes)


def refused(argv, capsys):
    """Return the one line in which main.py refuses these options, before any process starts."""
    with contextlib.ExitStack() as until_the_end, pytest.raises(SystemExit) as stop:
        main.prepare(argv, until_the_end)
    assert stop.value.code == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert err.startswith("error: ")
    return err.removeprefix("error: ")


def environment(folder, **modules):
    """Return an environment in which Python finds these modules, name=source, before any other."""
    folder.mkdir()
    for name, source in modules.items():
        (folder / f"{name}.py").write_text(source)
    return os.environ | {"PYTHONPATH": str(folder)}


def size_as_sent(arguments):
    """Return how many bytes a process that is started with these arguments is sent."""

    class Popen(popen_spawn_posix.Popen):
        def __init__(self):
            """Start nothing."""

        def duplicate_for_child(self, file):
            return file

    buffer = io.BytesIO()
    set_spawning_popen(Popen())
    try:
        reduction.dump(arguments, buffer)
    finally:
        set_spawning_popen(None)
    return len(buffer.getvalue())


def states(pids):
    command = ["ps", "-o", "stat=", "-p", ",".join(map(str, pids))]
    return subprocess.run(command, capture_output=True, text=True).stdout.split()


def gone(pids, within=5.0):
    """Whether none of these processes is there any more, or will be in `within` seconds."""
    deadline = time.monotonic() + within
    while any("Z" not in state for state in states(pids)):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True


class Run:
    """main.py, or a program of one's own, in a process group of its own, and what it says.

    `before` is a shell command that runs first, such as a limit of what the run may use.
    """

    def __init__(self, folder, argv, program=ROOT / "main.py", env=None, before=None):
        self.folder = folder
        shell = ["sh", "-c", f'{before} && exec "$@"', "sh"] if before else []
        command = [*shell, sys.executable, program, *argv]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        self.process = subprocess.Popen(command, start_new_session=True, env=env, **pipes)
        self._said = {pipe: [] for pipe in (self.process.stdout, self.process.stderr)}
        self._readers = [
            threading.Thread(target=lines.extend, args=(iter(pipe),))
            for pipe, lines in self._said.items()
        ]
        for reader in self._readers:
            reader.start()

    def _all_said(self, pipe):
        if self.process.poll() is not None:
            for reader in self._readers:
                reader.join(timeout=5)
        return "".join(self._said[pipe])

    @property
    def out(self):
        return self._all_said(self.process.stdout)

    @property
    def err(self):
        return self._all_said(self.process.stderr)

    def close(self):
        """End all of it, however it stands."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        for reader in self._readers:
            reader.join()
        self.process.stdout.close()
        self.process.stderr.close()

    def lines(self):
        """Return steps, reward and length of each test episode so far, as the console says."""
        pattern = (
            r"Time \d\dh \d\dm \d\ds, num steps (\d+), FPS \d+, "
            r"episode reward (-?\d+\.\d), episode length (\d+), "
            r"mean100 -?\d+\.\d(?:, \d+%, \d\dh \d\dm left)?, FPS now \d+\n"
        )
        return [(int(s), float(r), int(n)) for s, r, n in re.findall(pattern, self.out)]

    def wait_for(self, condition, seconds=120):
        """Wait until `condition` returns something true, and return it."""
        deadline = time.monotonic() + seconds
        while not (result := condition()):
            assert self.process.poll() is None, f"the run ended: {self.err}"
            assert time.monotonic() < deadline, "it did not happen"
            time.sleep(0.02)
        return result

    def children(self):
        """Return the process ids of training and test workers, and of other children such as
        ffmpeg, in two lists.
        """
        table = subprocess.run(
            ["ps", "-Aww", "-o", "pid=,pgid=,stat=,args="], capture_output=True, text=True
        ).stdout
        rows = [row.split(maxsplit=3) for row in table.splitlines()]
        rows = [
            row
            for row in rows
            if int(row[1]) == self.process.pid != int(row[0]) and "Z" not in row[2]
        ]
        workers = [int(pid) for pid, _, _, command in rows if "spawn_main" in command]
        return workers, [int(pid) for pid, *_ in rows if int(pid) not in workers]

    def stop(self, number, to_all=True):
        """Send a signal, as a terminal does to the whole group; return the exit status and the
        seconds it took.
        """
        start = time.monotonic()
        (os.killpg if to_all else os.kill)(self.process.pid, number)
        status = self.process.wait(timeout=30)
        return status, time.monotonic() - start


@pytest.fixture
def start_main(tmp_path):
    """Start main.py, writing to a folder below tmp_path; nothing of it outlives the test, also
    where that fails.
    """
    runs = []

    def start(*argv, folder=None, **how):
        folder = folder or tmp_path / f"run{len(runs)}"
        if "--resume" not in argv:
            argv = ["--env-name", "PongDeterministic-v4", *argv, "--save-dir", str(folder)]
        runs.append(Run(folder, argv, **how))
        return runs[-1]

    yield start
    for run in runs:
        run.close()
