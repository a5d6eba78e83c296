from pathlib import Path

import numpy as np
import pytest

import envs
from envs import AtariEnv, NormalizedObservation, ProcessedScreen, create_atari_env, process_screen

GREYS = np.arange(256, dtype=np.float32) / 255
FRAME = Path(__file__).parent / "data" / "pong_frame.npy"


def play(env, num_steps, seed=None):
    """Return observations, rewards and frame numbers of `num_steps` steps with a fixed sequence of
    actions.
    """
    observation, info = env.reset(seed=seed)
    trace = [(observation, 0.0, info["episode_frame_number"])]
    actions = np.random.default_rng(0).integers(env.action_space.n, size=num_steps).tolist()
    for action in actions:
        observation, reward, terminated, truncated, info = env.step(action)
        trace.append((observation, reward, info["episode_frame_number"]))
        if terminated or truncated:
            observation, info = env.reset()
    return [np.array(column) for column in zip(*trace, strict=True)]


@pytest.mark.parametrize(
    ("env_id", "frame_skips", "repeat_action_probability", "render_fps"),
    [
        ("Pong-v0", {2, 3, 4}, 0.25, 20),
        ("Pong-v4", {2, 3, 4}, 0.0, 20),
        ("PongDeterministic-v0", {4}, 0.25, 15),
        ("PongDeterministic-v4", {4}, 0.0, 15),
        ("PongNoFrameskip-v0", {1}, 0.25, 60),
        ("PongNoFrameskip-v4", {1}, 0.0, 60),
        ("ALE/Pong-v5", {4}, 0.25, 15),
        ("BreakoutDeterministic-v4", {4}, 0.0, 15),
        ("SpaceInvadersDeterministic-v4", {3}, 0.0, 20),
        ("SpaceInvaders-v0", {2, 3, 4}, 0.25, 20),
    ],
)
def test_an_id_means_its_frame_skip_and_stickiness(
    env_id, frame_skips, repeat_action_probability, render_fps
):
    env = AtariEnv(env_id)
    _, _, frames = play(env, 100, seed=3)
    skips = np.diff(frames)
    assert set(skips[skips > 0].tolist()) == frame_skips
    assert env.ale.getFloat("repeat_action_probability") == repeat_action_probability
    assert env.metadata["render_fps"] == render_fps


def test_frame_skips_are_drawn_evenly():
    _, _, frames = play(AtariEnv("Pong-v0"), 600, seed=0)
    counts = np.bincount(np.diff(frames))[2:5]
    assert counts.min() > 150


def test_every_game_plays_and_its_grey_is_the_channel_mean():
    games = {game.rom: env_id for env_id, game in envs.atari_games().items()}
    assert len(games) >= 100
    assert len(envs.atari_games()) == 7 * len(games)
    for env_id in games.values():
        env = create_atari_env(env_id, render_mode="rgb_array")
        env.reset()
        for step in range(6):
            observation, *_ = env.step(step % env.action_space.n)
            field = env.render()[34:194].mean(axis=2, dtype=np.float32) / 255
            np.testing.assert_array_equal(
                env.env.greys[env.unwrapped.ale.getScreen()[34:194]], field
            )
        assert observation.shape == (1, 42, 42)
        assert np.isfinite(observation).all()


def test_an_unknown_id_names_close_ones():
    with pytest.raises(ValueError, match=r"unknown environment 'pong-v0': did you mean Pong-v0"):
        AtariEnv("pong-v0")
    with pytest.raises(ValueError, match="unknown environment 'Combat-v0'"):
        AtariEnv("Combat-v0")
    with pytest.raises(ValueError, match="unknown render mode 'ansi'"):
        AtariEnv("Pong-v0", render_mode="ansi")


def test_the_same_seed_gives_the_same_game():
    first, again = AtariEnv("Pong-v0"), AtariEnv("Pong-v0")
    play(again, 7)  # what was played before does not matter
    for a, b in zip(play(first, 100, seed=5), play(again, 100, seed=5), strict=True):
        np.testing.assert_array_equal(a, b)


def test_another_seed_gives_other_frame_skips_and_other_sticky_actions():
    env = AtariEnv("Pong-v0")
    assert (play(env, 100, seed=5)[2] != play(env, 100, seed=6)[2]).any()
    sticky = AtariEnv("PongNoFrameskip-v0")
    assert (play(sticky, 200, seed=5)[0] != play(sticky, 200, seed=6)[0]).any()


def test_without_a_seed_the_next_episode_is_another_one():
    env = AtariEnv("PongNoFrameskip-v0")
    assert (play(env, 200, seed=5)[0] != play(env, 200)[0]).any()


def test_a_seed_changes_nothing_where_nothing_is_random():
    env = AtariEnv("PongDeterministic-v4")
    for a, b in zip(play(env, 100, seed=5), play(env, 100, seed=6), strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_ball_is_visible_wherever_it_is():
    empty = process_screen(np.zeros((210, 160), np.uint8), GREYS)
    for top in range(34, 34 + 160 - 4 + 1):
        for left in range(160 - 2 + 1):
            screen = np.zeros((210, 160), np.uint8)
            screen[top : top + 4, left : left + 2] = 236
            assert (process_screen(screen, GREYS) - empty).max() > 0.02, (
                f"a ball at row {top}, column {left} is lost"
            )


def test_only_the_playing_field_is_seen():
    screen = np.zeros((210, 160), np.uint8)
    screen[:34] = screen[194:] = 255
    assert not process_screen(screen, GREYS).any()
    np.testing.assert_allclose(
        process_screen(np.full((250, 160), 51, np.uint8), GREYS), 0.2, rtol=1e-6
    )


def test_a_frame_of_pong_looks_as_it_did():
    # Step 60 of a game without chance: guards the emulator's picture, the crop, the grey and the
    # two resizes.
    env = ProcessedScreen(AtariEnv("PongDeterministic-v4"))
    observations, _, _ = play(env, 60, seed=0)
    np.testing.assert_allclose(observations[-1], np.load(FRAME), atol=1e-5)


def test_observations_lie_in_the_declared_spaces():
    env = create_atari_env("Pong-v0")
    while True:
        for observation in play(env, 20, seed=1)[0]:
            assert env.observation_space.contains(observation), env
        if not isinstance(env, NormalizedObservation | ProcessedScreen):
            break
        env = env.env


def test_normalization_is_the_bias_corrected_running_mean_and_std():
    pictures = play(ProcessedScreen(AtariEnv("PongDeterministic-v4")), 30, seed=0)[0].astype(
        np.float64
    )
    observations = play(create_atari_env("PongDeterministic-v4"), 30, seed=0)[0]
    assert observations.dtype == np.float32
    mean = std = 0.0
    for n, (picture, observation) in enumerate(zip(pictures, observations, strict=True), start=1):
        mean = 0.9999 * mean + 0.0001 * picture.mean()
        std = 0.9999 * std + 0.0001 * picture.std()
        correction = 1 - 0.9999**n
        expected = (picture - mean / correction) / (std / correction + 1e-8)
        np.testing.assert_allclose(observation, expected, atol=1e-3)


def test_an_episode_is_truncated_at_the_emulators_frame_limit(monkeypatch):
    assert AtariEnv("Pong-v0").ale.getInt("max_num_frames_per_episode") == 108_000
    monkeypatch.setattr(envs, "MAX_FRAMES_PER_EPISODE", 200)
    env = AtariEnv("BreakoutDeterministic-v4")
    env.reset(seed=0)
    ends = [
        env.step(0)[2:4] for _ in range(50)
    ]  # without FIRE the ball is never served, and nothing ends
    assert ends[:-1] == [(False, False)] * 49
    assert ends[-1] == (False, True)
    env.reset()
    assert env.step(0)[2:4] == (False, False)


def test_a_reward_is_the_sum_over_the_skipped_frames_and_not_clipped():
    rewards = play(AtariEnv("Pong-v0"), 900, seed=0)[1]
    assert set(rewards.tolist()) <= {-1.0, 0.0, 1.0}
    assert -1.0 in rewards
    assert play(AtariEnv("ALE/BeamRider-v5"), 400, seed=0)[1].max() > 1.0
