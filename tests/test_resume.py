import sys

import pytest

import main
from harness import resume
from harness.episodes import Episode, EpisodeLog
from harness.shared import SharedState


@pytest.mark.parametrize(
    ("argv", "way_on"),
    [
        ("", "goes on with: PYTHON --resume RUN"),
        ("--ray", "goes on with: PYTHON --resume RUN --ray 127.0.0.1:6379"),
        ("--max-steps 500", "goes on with: PYTHON --resume RUN"),
        ("--max-steps 100", "goes on with: PYTHON --resume RUN --max-steps 200"),
        ("--max-steps 40", "goes on with: PYTHON --resume RUN --max-steps 200"),  # it made 100
        ("--max-steps 500 --lr-schedule linear", "goes on with: PYTHON --resume RUN"),
        *[
            (
                f"--max-steps 100 --{schedule}-schedule linear",
                "a new run starts from its agent with: PYTHON --env-name Pong-v0 --init RUN",
            )
            for schedule in ("lr", "entropy")  # where more steps would begin with a high one again
        ],
    ],
)
def test_a_run_s_end_says_how_to_go_on(argv, way_on, tmp_path):
    args = main.parse_args(argv.split())
    shared = SharedState(args, 1, 6)
    shared.steps[0] = 100
    command = f"{sys.executable} main.py"
    expected = way_on.replace("PYTHON", command).replace("RUN", str(tmp_path))
    assert resume.way_on(args, shared, tmp_path, "main.py") == expected


@pytest.mark.parametrize(
    ("mean", "way_on"), [(-1000.0, "-999"), (1050.25, "1051"), (3e6, "3000001")]
)
def test_a_run_that_is_over_by_its_target_goes_on_to_a_higher_one(mean, way_on, tmp_path):
    args = main.parse_args(["--target-reward", str(mean - 50)])
    log = EpisodeLog(tmp_path, 0)
    for n in range(100):
        log.append(Episode(n, n, 0, 9, mean, 900))
    said = resume.way_on(args, SharedState(args, 1, 6), tmp_path, "main.py")
    assert said.endswith(f"--resume {tmp_path} --target-reward {way_on}")
