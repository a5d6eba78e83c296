"""options.json of a run: what it learns by, now and before it was resumed with other options."""

import json
from pathlib import Path
from typing import Any

from harness.utils import name_in_write_errors, read_text, write

# The options that a run's curve depends on. Runs that have them in common are seeds of one setting.
LEARNS_BY = (
    "env_name",
    "num_processes",
    "max_episode_length",
    "lr",
    "lr_schedule",
    "gamma",
    "gae_lambda",
    "entropy_coef",
    "entropy_schedule",
    "value_loss_coef",
    "max_grad_norm",
    "num_steps",
    "no_shared",
    "init",
)


def _learned_by(options: dict[str, Any]) -> dict[str, Any]:
    """Return those options that a run's curve depends on."""
    names = list(LEARNS_BY)
    if "linear" in (options.get("lr_schedule"), options.get("entropy_schedule")):
        names.append("max_steps")  # where it ends at zero
    if options.get("ray"):  # other machines train, too; without, these say nothing
        names += ["ray", "ray_interval"]
    options = {"entropy_schedule": "constant", **options}  # older runs do not name it
    return {name: options.get(name) for name in names}


def _read_options(run_folder: Path) -> dict[str, Any] | None:
    path = run_folder / "options.json"
    if not path.exists():
        return None
    try:
        options = json.loads(read_text(path))
    except (json.JSONDecodeError, RecursionError):
        options = None
    if not isinstance(options, dict):
        raise ValueError(f"{path} does not hold a run's options")
    return options


def write_options(options: dict[str, Any], run_folder: Path, num_steps: int) -> None:
    """Write options.json of a run that has made so many steps; raise `OSError` if that fails."""
    until = options_until(run_folder, options, num_steps)
    text = json.dumps(options | ({"until": until} if until else {}), indent=2, default=str) + "\n"
    path = run_folder / "options.json"
    with name_in_write_errors(path):
        write(text.encode(), path)


def read_setting(run: Path) -> str:
    """Return the options that a run learns by, as text to compare; its path if they are not known.

    Raises `OSError` or `ValueError`.
    """
    options = _read_options(run if run.is_dir() else run.parent)
    if options is None:
        return str(run)
    other_table = "" if run.is_dir() or run.name == "episodes.csv" else run.name
    return json.dumps([_learned_by(options), options.get("until"), other_table])


def options_until(run_folder: Path, options: dict[str, Any], num_steps: int) -> dict[str, Any]:
    """Return what a run that goes on with these options learned by before, where that differs.

    It is {training steps: {option: value until then}}, and options.json keeps it as "until".
    """
    try:
        before = _read_options(run_folder)
    except (OSError, ValueError):
        before = None
    if before is None:
        return {}
    until = before.get("until")
    if not (isinstance(until, dict) and all(isinstance(e, dict) for e in until.values())):
        until = {}
    then, now = _learned_by(before), _learned_by(options)
    changed = {name: then.get(name) for name in then | now if then.get(name) != now.get(name)}
    # An earlier session that made no step, or no checkpoint, leaves what was there before it.
    changed |= until.pop(str(num_steps), {})
    changed = {name: value for name, value in changed.items() if value != now.get(name)}
    return until | ({str(num_steps): changed} if changed else {})
