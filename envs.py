"""The game as the network sees it: Atari through ale-py, 42x42 grey pictures, normalised.

gym 0.26 has no plug-in for today's ale-py, which brings every ROM along but registers with
Gymnasium alone. `AtariEnv` is that plug-in: a `gym.Env` straight over the emulator.
"""

import difflib
from collections.abc import Iterator
from functools import cache
from typing import Any, ClassVar, NamedTuple

import ale_py
import cv2
import gym
import numpy as np
from ale_py import roms
from gym import spaces
from gym.wrappers import RecordEpisodeStatistics, TimeLimit

cv2.setNumThreads(1)  # a 42x42 picture gives a pool of threads nothing to do
ale_py.ALEInterface.setLoggerMode(
    ale_py.LoggerMode.Error
)  # before the first emulator, or it prints a banner

FRAMES_PER_SECOND = 60  # of the console, when played by a person
MAX_FRAMES_PER_EPISODE = 108_000  # 30 minutes of play
MULTIPLAYER_ONLY = {"combat", "joust", "maze_craze", "warlords"}


class AtariGame(NamedTuple):
    """What an environment id stands for (Machado et al. 2018, section 5, has the reasons)."""

    rom: str
    frame_skip: tuple[int, int]  # frames per step, drawn uniformly; the upper bound is exclusive
    repeat_action_probability: float  # "sticky actions": the emulator keeps the previous action


@cache
def atari_games() -> dict[str, AtariGame]:
    """Return every environment id with the game it stands for."""
    games = {}
    for rom in sorted(set(roms.get_all_rom_ids()) - MULTIPLAYER_ONLY):
        name = rom.title().replace("_", "")
        # At every fourth frame the invaders' shots are invisible (Mnih et al. 2013, section 5).
        fixed = (3, 4) if rom == "space_invaders" else (4, 5)
        for variant, frame_skip in ("", (2, 5)), ("Deterministic", fixed), ("NoFrameskip", (1, 2)):
            games[f"{name}{variant}-v0"] = AtariGame(rom, frame_skip, 0.25)
            games[f"{name}{variant}-v4"] = AtariGame(rom, frame_skip, 0.0)
        games[f"ALE/{name}-v5"] = AtariGame(rom, (4, 5), 0.25)
    return games


def find_game(env_id: str) -> AtariGame:
    """Return the game of an id; raise `ValueError`, with the closest ids, if there is none."""
    games = atari_games()
    if env_id not in games:
        spelling = {known.lower(): known for known in games}
        close = [
            spelling[c] for c in difflib.get_close_matches(env_id.lower(), spelling, cutoff=0.7)
        ]
        hint = (
            f"did you mean {' or '.join(close)}?"
            if close
            else "ids look like Pong-v0 or ALE/Pong-v5"
        )
        raise ValueError(f"unknown environment '{env_id}': {hint}")
    return games[env_id]


class AtariEnv(gym.Env):
    """One Atari game.

    An observation is the screen, (height, width) uint8, as indices into the game's palette. Raises
    `ValueError` for an unknown id or render mode.
    """

    metadata: ClassVar = {"render_modes": ["rgb_array", "human"]}

    def __init__(self, env_id: str, render_mode: str | None = None) -> None:
        if render_mode not in (None, *self.metadata["render_modes"]):
            raise ValueError(f"unknown render mode {render_mode!r}: use 'rgb_array' or 'human'")
        self.env_id, self.game = env_id, find_game(env_id)
        self.render_mode = render_mode
        mean_frame_skip = (self.game.frame_skip[0] + self.game.frame_skip[1] - 1) / 2
        self.metadata = AtariEnv.metadata | {"render_fps": FRAMES_PER_SECOND / mean_frame_skip}
        self.ale = ale_py.ALEInterface()
        self.ale.setFloat("repeat_action_probability", self.game.repeat_action_probability)
        self.ale.setInt("max_num_frames_per_episode", MAX_FRAMES_PER_EPISODE)
        if render_mode == "human":
            self.ale.setBool("display_screen", True)
            self.ale.setBool("sound", True)
        self._frame_skips: Iterator[int] = iter(())
        self._load_seeded_rom()
        self._actions = self.ale.getMinimalActionSet()
        self.action_names = [action.name for action in self._actions]
        self.action_space = spaces.Discrete(len(self._actions))
        self.observation_space = spaces.Box(0, 255, self.ale.getScreenDims(), np.uint8)
        # All that NormalizedObservation knows: its two averages before their correction, and the
        # number of frames in them. Here they are found whatever wraps the game.
        self.statistics: tuple[float, float, int] = (0.0, 0.0, 0)

    def _load_seeded_rom(self) -> None:
        # The emulator reads its settings, the seed among them, only while it loads a ROM.
        self.ale.setInt("random_seed", int(self.np_random.integers(2**31)))
        self.ale.loadROM(roms.get_rom_path(self.game.rom))

    def reset(
        self, *, seed: int | None = None, options: dict | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Start an episode; a `seed` reseeds the emulator and the frame skip."""
        super().reset(seed=seed, options=options)
        if seed is not None:
            self._load_seeded_rom()
            self._frame_skips = iter(())
        self.ale.reset_game()
        return self.ale.getScreen(), self._info()

    def step(self, action: int) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        """Hold `action` for the game's frame skip; return the last frame and the summed reward."""
        ale_action = self._actions[action]
        reward = sum(self.ale.act(ale_action) for _ in range(self._draw_frame_skip()))
        terminated, truncated = self.ale.game_over(with_truncation=False), self.ale.game_truncated()
        return self.ale.getScreen(), float(reward), terminated, truncated, self._info()

    def _draw_frame_skip(self) -> int:
        frames = next(self._frame_skips, None)
        if frames is None:  # a thousand at a time: one alone would take as long as half a frame
            self._frame_skips = iter(
                self.np_random.integers(*self.game.frame_skip, size=1000).tolist()
            )
            frames = next(self._frame_skips)
        return frames

    def render(self) -> np.ndarray | None:
        """Return the screen, (height, width, 3) uint8; None with "human": the emulator draws."""
        return self.ale.getScreenRGB() if self.render_mode == "rgb_array" else None

    def _info(self) -> dict[str, Any]:
        return {"lives": self.ale.lives(), "episode_frame_number": self.ale.getEpisodeFrameNumber()}


def process_screen(screen: np.ndarray, greys: np.ndarray) -> np.ndarray:
    """Return the network's picture, (1, 42, 42) float32, of a screen, (height, width) uint8.

    `greys`, (256,) float32, is the grey of each of the screen's palette indices. Rows 34 to 193
    hold the playing field. Going by way of 80x80 keeps every pixel of it in the picture: bilinear
    interpolation reads four neighbours only, and from 160 straight to 42 it would step over a ball
    of 2x4 pixels.
    """
    field = cv2.LUT(screen[34:194], greys)
    # For one half, INTER_AREA gives bilinear's numbers in half the time.
    field = cv2.resize(field, (80, 80), interpolation=cv2.INTER_AREA)
    return cv2.resize(field, (42, 42))[np.newaxis]


class ProcessedScreen(gym.ObservationWrapper):
    """The picture of `process_screen` as the observation; grey is the mean of three channels.

    Looking the palette's indices up is a quarter of the cost of reading three channels and
    averaging them. The emulator does not tell its palettes (there are several), so a colour is
    learnt when it first appears.
    """

    def __init__(self, env: gym.Env) -> None:
        super().__init__(env)
        self.observation_space = spaces.Box(0.0, 1.0, (1, 42, 42), np.float32)
        self.greys = np.full(256, np.nan, dtype=np.float32)  # NaN: not seen yet

    def observation(self, observation: np.ndarray) -> np.ndarray:
        """Process one screen."""
        picture = process_screen(observation, self.greys)
        if np.isnan(picture.max()):
            self.greys[observation] = (
                self.unwrapped.ale.getScreenRGB().mean(axis=2, dtype=np.float32) / 255
            )
            picture = process_screen(observation, self.greys)
        return picture


class NormalizedObservation(gym.ObservationWrapper):
    """(frame - mean) / (std + 1e-8), with running averages of the frames' own mean and std.

    Both averages are scalars over the whole picture, exponential averages with decay 0.9999 since
    the environment was made (across episodes), divided by 1 - 0.9999^n as they start from zero,
    like Adam's moments (Kingma and Ba 2015, section 3).
    """

    DECAY = 0.9999

    def __init__(self, env: gym.Env) -> None:
        super().__init__(env)
        self.observation_space = spaces.Box(
            -np.inf, np.inf, env.observation_space.shape, np.float32
        )
        self._game = self.unwrapped

    def observation(self, observation: np.ndarray) -> np.ndarray:
        """Take one frame into the averages and normalise it with them."""
        mean, std, num_frames = self._game.statistics
        frame_mean, frame_std = cv2.meanStdDev(observation[0])
        mean += (1 - self.DECAY) * (frame_mean.item() - mean)
        std += (1 - self.DECAY) * (frame_std.item() - std)
        num_frames += 1
        self._game.statistics = mean, std, num_frames
        correction = 1 - self.DECAY**num_frames
        return (observation - mean / correction) / (std / correction + 1e-8)


def create_atari_env(
    env_id: str, render_mode: str | None = None, max_episode_length: int | None = None
) -> gym.Env:
    """Return the game of an id, with observations (1, 42, 42) float32, normalised.

    Rewards are not clipped. An episode is truncated after `max_episode_length` steps; at its end
    `info["episode"]` holds its reward "r" and its length "l". What the normaliser has learnt is in
    `env.unwrapped.statistics`. Raises `ValueError` for an unknown id or render mode ("rgb_array",
    "human" or None).
    """
    env = AtariEnv(env_id, render_mode)
    if max_episode_length is not None:
        env = TimeLimit(env, max_episode_length)
    return NormalizedObservation(ProcessedScreen(RecordEpisodeStatistics(env)))
