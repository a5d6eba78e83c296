import json

import pytest
from test_curves import write_run
from test_utils import files_end_at

from harness.settings import options_until, read_setting, write_options

RAY = {"ray": "127.0.0.1:6379"}
LINEAR = {"lr_schedule": "linear", "max_steps": 1_000_000}


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ({}, {"seed": 2}, True),
        ({}, {"tensorboard": True}, True),
        ({}, {"checkpoint_interval": 5.0}, True),
        ({}, {"record_every": 0, "annotate": True}, True),
        ({}, {"max_steps": 5_000_000, "max_time": 2.0, "target_reward": 3.0}, True),
        ({}, {"save_dir": "other", "an_option_to_come": 3}, True),
        (LINEAR, LINEAR | {"seed": 2}, True),
        (LINEAR, LINEAR | {"max_steps": 2_000_000}, False),
        ({}, LINEAR, False),
        ({}, {"ray_interval": 5.0}, True),  # no other machine trains
        (RAY, RAY | {"ray_interval": 5.0}, False),
        *[
            ({}, {name: value}, False)
            for name, value in {
                "env_name": "Breakout-v0",
                "num_processes": 5,
                "max_episode_length": 1000,
                "lr": 0.5,
                "gamma": 0.9,
                "gae_lambda": 0.0,
                "entropy_coef": 0.0,
                "entropy_schedule": "linear",
                "value_loss_coef": 1.0,
                "max_grad_norm": 40.0,
                "num_steps": 5,
                "no_shared": True,
                "init": "results/Pong-v0.pt",
                "ray": "127.0.0.1:6379",
            }.items()
        ],
    ],
)
def test_runs_that_learn_alike_are_seeds_of_one_setting(one, other, same, tmp_path):
    runs = [write_run(tmp_path / str(n), episodes=1, **c) for n, c in enumerate((one, other))]
    assert (read_setting(runs[0]) == read_setting(runs[1])) is same
    assert read_setting(runs[0] / "episodes.csv") == read_setting(runs[0])


def test_a_run_of_a_version_without_a_schedule_of_the_entropy_had_a_constant_one(tmp_path):
    runs = [write_run(tmp_path / str(n), episodes=1) for n in range(2)]
    path = runs[0] / "options.json"
    options = json.loads(path.read_text())
    del options["entropy_schedule"]
    path.write_text(json.dumps(options))
    assert read_setting(runs[0]) == read_setting(runs[1])


def test_a_run_that_was_resumed_with_other_options_is_no_seed_of_those_that_always_had_them(
    tmp_path,
):
    runs = [write_run(tmp_path / str(n), episodes=1, lr=0.5, max_steps=n) for n in range(2)]
    path = runs[0] / "options.json"
    same, other, linear = (
        json.loads(path.read_text()) | changes
        for changes in ({"max_steps": 9}, {"lr": 0.25}, {"lr_schedule": "linear", "max_steps": 9})
    )
    assert options_until(runs[0], same, 100) == {}
    until = {"100": {"lr": 0.5}}
    assert options_until(runs[0], other, 100) == until
    then = {"lr_schedule": "constant", "max_steps": None}
    assert options_until(runs[0], linear, 100) == {"100": then}

    path.write_text(json.dumps(other | {"until": until}))
    assert options_until(runs[0], other, 200) == until
    assert options_until(runs[0], same, 200) == until | {"200": {"lr": 0.25}}
    assert options_until(runs[0], same, 100) == {}  # with 0.25 no step was made
    assert options_until(runs[0], other | {"lr": 0.125}, 100) == until  # as here
    path.write_text(json.dumps(same | {"until": until | {"200": {"lr": 0.25}}}))
    assert read_setting(runs[0]) != read_setting(runs[1])

    for foreign in 3, {"100": 3}:
        path.write_text(json.dumps(same | {"until": foreign}))
        assert options_until(runs[0], same, 100) == {}
    path.write_text("[]")
    assert options_until(runs[0], other, 100) == {}
    path.unlink()
    assert options_until(runs[0], other, 100) == {}


def test_a_table_of_training_episodes_is_no_seed_of_the_test_episodes(tmp_path):
    run = write_run(tmp_path / "run", episodes=1)
    assert read_setting(run / "training.csv") != read_setting(run)


def test_runs_without_known_options_are_settings_of_their_own(tmp_path):
    runs = [tmp_path / "one", tmp_path / "two"]
    assert read_setting(runs[0]) != read_setting(runs[1])


@pytest.mark.parametrize(
    "text", ["[1, 2]", "null", '"lr"', "3", '{"lr": 0.5', "", "[" * 100_000, b"\xff"]
)
def test_options_that_are_none_are_refused_in_one_line(text, tmp_path):
    run = write_run(tmp_path / "run", episodes=1)
    (run / "options.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(
        ValueError, match=r"options.json (does not hold a run's|is not a text)"
    ) as e:
        read_setting(run)
    assert "\n" not in str(e.value)


def test_a_full_disk_leaves_the_options_as_they_were_and_is_one_line(tmp_path):
    write_options({"lr": 0.5}, tmp_path, 0)
    before = (tmp_path / "options.json").read_text()
    with (
        files_end_at(5),
        pytest.raises(OSError, match=r"write .*/options\.json: File too") as e,
    ):
        write_options({"lr": 0.25}, tmp_path, 0)
    assert "\n" not in str(e.value)
    assert (tmp_path / "options.json").read_text() == before
