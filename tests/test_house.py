"""The code base as such: its layers, its style, and the benchmark that others measure it by."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = sorted([*ROOT.glob("*.py"), *ROOT.glob("harness/*.py")])

# Who may import whom: only what lies below.
HARNESS = {"harness", *(f"harness.{name}" for name in ("utils", "workers", "checkpoint", "shared"))}
MAY_IMPORT = {
    "model": set(),
    "envs": set(),
    "my_optim": set(),
    "rollout": {"model"},
    "harness": set(),
    "harness.utils": set(),
    "harness.workers": {"harness.utils"},
    "harness.supervisor": {"harness.utils", "harness.workers"},
    "harness.episodes": {"harness.utils"},
    "harness.settings": {"harness.utils"},
    "harness.resume": {"harness.checkpoint", "harness.episodes", "harness.shared"},
    "harness.curves": {"harness.utils", "harness.episodes", "harness.settings"},
    "harness.video": {"harness.utils"},
    "harness.checkpoint": {"harness.utils", "model", "envs"},
    "harness.shared": {
        "harness.utils",
        "harness.workers",
        "harness.checkpoint",
        "model",
        "my_optim",
    },
    "harness.fit": {"harness.utils", "model", "rollout"},
    "train": {"harness.fit", "model", "envs", "my_optim", *HARNESS},
    "test": {"model", "envs", "harness.episodes", "harness.curves", "harness.video", *HARNESS},
    "harness.hosts": {"model", "harness.supervisor", *HARNESS},
    "harness.link": {"harness.hosts", *HARNESS},
    "main": {
        "train",
        "test",
        "envs",
        "harness.fit",
        "harness.episodes",
        "harness.settings",
        "harness.resume",
        "harness.supervisor",
        "harness.link",
        *HARNESS,
    },
}


def module_name(path):
    name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
    return name.removesuffix(".__init__")


def imported_by(path):
    """The project's own modules that a file imports anywhere in it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            inside = {f"{node.module}.{alias.name}" for alias in node.names}
            modules = inside & MAY_IMPORT.keys()
            names |= modules or {node.module}
    return names & MAY_IMPORT.keys()


@pytest.mark.parametrize("path", SOURCES, ids=module_name)
def test_a_file_imports_only_what_lies_below_it(path):
    assert imported_by(path) <= MAY_IMPORT[module_name(path)]


def test_the_layers_have_no_circle():
    left = dict(MAY_IMPORT)
    while left:
        ground = [name for name, below in left.items() if not below & left.keys()]
        assert ground, f"a circle among {sorted(left)}"
        for name in ground:
            del left[name]


@pytest.mark.parametrize("path", SOURCES, ids=module_name)
def test_no_function_is_longer_than_a_screen(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno < 60, node.name


@pytest.mark.parametrize("command", [["check"], ["format", "--check"]], ids=" ".join)
def test_ruff_has_nothing_to_say(command):
    ruff = [sys.executable, "-m", "ruff", *command, ROOT]
    result = subprocess.run(ruff, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout


def test_the_benchmark_runs():
    arguments = ["--seconds", "0.5", "--rounds", "1", "--processes", "1"]
    command = [sys.executable, ROOT / "tests" / "benchmark.py", *arguments]
    result = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert result.returncode == 0, result.stderr
    row = re.search(r"\| 1 \| (\d+) \| (\d+) \| (\d+) \| \*\*(.+)\*\*", result.stdout)
    game, textbook, ours = map(int, row.groups()[:3])
    assert min(game, ours, textbook) > 0
