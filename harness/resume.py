"""Going on with a run: by its own options, unless it is over, and the command that does it."""

import contextlib
import math
import shlex
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

from harness.checkpoint import describe_versions
from harness.episodes import TRAINING, EpisodeLog
from harness.shared import OF_A_SESSION, SharedState


def options_of(checkpoint: dict[str, Any], known: dict[str, Any]) -> dict[str, Any]:
    """Return a run's own options, as defaults for the parser of main.py.

    `known` are this version's options with their defaults. Raises `ValueError` if one of the run's
    is not among them, or cannot have its value.
    """
    options = checkpoint["options"]
    unknown = [str(name) for name in options if name not in known or name in OF_A_SESSION]
    if unknown:
        made_with = describe_versions(checkpoint)
        raise ValueError(
            f"the run was made by another version of this program (with {made_with}): "
            f"this one has no option {', '.join(unknown)}"
        )
    for name, value in options.items():
        is_switch = isinstance(known[name], bool)
        if isinstance(value, bool) != is_switch or (value is None and known[name] is not None):
            raise ValueError(f"the run's option {name} cannot be {value!r}")
    return {k: v if isinstance(v, bool | None) else str(v) for k, v in options.items()}


def go_on(
    args: Namespace, shared: SharedState, checkpoint: dict[str, Any], run_folder: Path
) -> None:
    """Take up a run where its checkpoint left it; its tables' later rows are set aside.

    Raises `OSError` or `ValueError`, also if the run is over.
    """
    shared.restore(checkpoint)
    if shared.has_made(args.max_steps):
        raise ValueError(f"the run has made its {args.max_steps} steps: name a higher --max-steps")
    EpisodeLog(run_folder, shared.total_steps(), TRAINING)
    log = EpisodeLog(run_folder, shared.total_steps())
    if log.has_reached(args.target_reward):
        reached = f"the run has reached its {args.target_reward}"
        raise ValueError(f"{reached}: name a higher --target-reward")


def way_on(args: Namespace, shared: SharedState, run_folder: Path, script: str) -> str:
    """Return how to go on from the run, with a command: `script` by this Python."""
    folder = f"./{run_folder}" if str(run_folder).startswith("-") else str(run_folder)
    command = [sys.executable, script]
    is_over = shared.has_made(args.max_steps)
    if is_over and "linear" in (args.lr_schedule, args.entropy_schedule):
        # To resume it with more steps would undo what the end of the schedule has refined.
        command += ["--env-name", args.env_name, "--init", folder]
        return f"a new run starts from its agent with: {shlex.join(command)}"
    command += ["--resume", folder]
    if is_over:
        command += ["--max-steps", str(2 * shared.total_steps())]
    with contextlib.suppress(OSError, ValueError):
        log = EpisodeLog(run_folder, shared.total_steps())
        if log.has_reached(args.target_reward):
            command += ["--target-reward", str(math.floor(log.mean_reward()[1]) + 1)]
    if args.ray:
        command += ["--ray", args.ray]
    return f"goes on with: {shlex.join(command)}"
