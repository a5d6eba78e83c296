"""What is published must stay true: drift of game, preprocessing or network would show here."""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from results_table import first_at

import main
import test as evaluator
from harness.curves import draw_curve
from harness.episodes import read_episodes

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "results"
RUNS = sorted(path.parent for path in RESULTS.glob("*/episodes.csv"))


@pytest.mark.parametrize(
    ("agent", "at_least"),
    [
        ("Pong-v0", 1),
        ("BreakoutDeterministic-v4", 15),
        ("SeaquestDeterministic-v4", 1000),
        ("SpaceInvadersDeterministic-v4", 200),
    ],
)
def test_a_published_agent_plays_well(agent, at_least, capsys):
    evaluator.main([str(RESULTS / f"{agent}.pt"), "--episodes", "1", "--seed", "5", "--json"])
    summary = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert summary["min"] >= at_least


def test_the_readme_s_lines_of_python_play_it_and_win(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    readme = (RESULTS / "README.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"^```python\n(.+?)^```", readme, re.MULTILINE | re.DOTALL)
    torch.manual_seed(0)
    exec(example, {})
    assert float(capsys.readouterr().out) > 0


def test_the_readme_s_table_of_hyper_parameters_holds_the_defaults():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    defaults = vars(main.parse_args([]))
    rows = re.findall(r"^\|[^|]+\| (`--[^|]+) \| ([^|]+) \|", readme, re.MULTILINE)
    assert len(rows) == 7
    for names, values in rows:
        for name, value in zip(re.findall(r"--([\w-]+)", names), values.split(", "), strict=True):
            default = defaults[name.replace("-", "_")]
            assert type(default)(value) == default, name


@pytest.mark.parametrize("run", RUNS, ids=lambda run: run.name)
def test_a_published_run_is_whole_and_can_be_drawn_again(run, tmp_path):
    episodes = read_episodes(run)
    assert list(episodes["episode"]) == list(range(len(episodes)))
    for column in "num_steps", "time_s":
        assert all(episodes[column][1:] > episodes[column][:-1])
    draw_curve(episodes, tmp_path / "curve.png")
    assert (tmp_path / "curve.png").stat().st_size > 20_000


def test_a_run_of_pong_is_published():
    assert RESULTS / "Pong-v0" in RUNS


def test_a_level_is_reached_when_the_mean_of_the_last_twenty_first_is_there():
    episodes = np.zeros(60, dtype=[("reward", float), ("num_steps", float), ("time_s", float)])
    episodes["reward"][0] = 20  # the first game alone is no mean of twenty
    episodes["reward"][30:] = 20
    episodes["num_steps"] = np.arange(60) * 1e6
    episodes["time_s"] = np.arange(60) * 60
    assert list(first_at(episodes, 18)) == [47, 47]  # games 28 to 47: two of 0, eighteen of 20
    assert np.isnan(first_at(episodes, 20.5)).all()


def test_the_tables_are_those_that_the_runs_give():
    readme = (RESULTS / "README.md").read_text(encoding="utf-8")
    commands = re.findall(r"^    python (tests/results_table\.py .+)$", readme, re.MULTILINE)
    assert len(commands) >= 2
    for command in commands:
        table = subprocess.run(
            f"{sys.executable} {command}", shell=True, cwd=ROOT, capture_output=True, text=True
        )
        assert table.returncode == 0, table.stderr
        assert table.stdout.count("|") > 30
        for line in table.stdout.splitlines():
            assert line in readme
