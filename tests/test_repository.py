import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_ruff_has_nothing_to_say():
    for command in ["check"], ["format", "--check"]:
        result = subprocess.run([sys.executable, "-m", "ruff", *command, ROOT], capture_output=True, text=True)
        assert result.returncode == 0, result.stdout


def test_there_are_at_most_a_thousand_lines_to_read():
    assert sum(len(path.read_text().splitlines()) for path in ROOT.glob("*.py")) <= 1000


def test_the_benchmark_runs():
    command = [sys.executable, ROOT / "tests" / "benchmark.py", "--seconds", "0.5", "--rounds", "1", "--processes", "1"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert result.returncode == 0, result.stderr
    row = re.search(r"\| 1 \| (\d+) \| (\d+) \| (\d+) \| \*\*(.+)\*\*", result.stdout)
    game, textbook, ours = map(int, row.groups()[:3])
    assert game > ours > textbook > 0
