import ast
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_ruff_has_nothing_to_say():
    for command in ["check"], ["format", "--check"]:
        result = subprocess.run([sys.executable, "-m", "ruff", *command, ROOT], capture_output=True, text=True)
        assert result.returncode == 0, result.stdout


def lines_of_code(path):
    """Number of lines that are neither blank, nor a comment, nor part of a docstring."""
    source = path.read_text()
    lines = {n for n, line in enumerate(source.splitlines(), 1) if line.strip() and not line.strip().startswith("#")}
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node):
            lines -= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    return len(lines)


def test_there_are_about_a_thousand_lines_of_code_to_read():
    assert sum(map(lines_of_code, ROOT.glob("*.py"))) <= 1060
    assert all(len(path.read_text().splitlines()) < 220 for path in ROOT.glob("*.py"))


def test_the_benchmark_runs():
    command = [sys.executable, ROOT / "tests" / "benchmark.py", "--seconds", "0.5", "--rounds", "1", "--processes", "1"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert result.returncode == 0, result.stderr
    row = re.search(r"\| 1 \| (\d+) \| (\d+) \| (\d+) \| \*\*(.+)\*\*", result.stdout)
    game, textbook, ours = map(int, row.groups()[:3])
    assert game > ours > textbook > 0
