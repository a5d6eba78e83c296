import contextlib
import itertools
import random
from types import SimpleNamespace

import gym
import numpy as np
import pytest
import torch
from conftest import options
from gym import spaces
from gym.wrappers import RecordEpisodeStatistics, TimeLimit
from test_rollout import backend, backends

import train
from harness.shared import SharedState
from harness.workers import STOP
from model import ActorCritic
from my_optim import SharedAdam
from rollout import PlainRollout, Rollout
from train import a3c_losses, returns_and_advantages

# Rewards 1, 0, 2; values 0.5, 1, -1 and the bootstrap 4; gamma 0.5.
# R:     1 + 0.5 x 2 = 2;  0 + 0.5 x 4 = 2;  2 + 0.5 x 4 = 4
# delta: 1 + 0.5 - 0.5 = 1;  0 - 0.5 - 1 = -1.5;  2 + 2 + 1 = 5


@pytest.mark.parametrize(
    ("gae_lambda", "expected"),
    [
        (1.0, [2 - 0.5, 2 - 1.0, 4 + 1.0]),  # the returns less the values
        (0.5, [1 + 0.25 * (-1.5 + 0.25 * 5), -1.5 + 0.25 * 5, 5.0]),
        (0.0, [1.0, -1.5, 5.0]),
    ],
)
def test_returns_and_generalized_advantages_worked_by_hand(gae_lambda, expected):
    returns, advantages = returns_and_advantages(
        [1.0, 0.0, 2.0], [0.5, 1.0, -1.0], 4.0, 0.5, gae_lambda
    )
    assert returns == [2.0, 2.0, 4.0]
    assert advantages == pytest.approx(expected)


def test_losses_of_a_rollout_worked_by_hand():
    # Two steps, two actions; the policy is uniform, then 3:1. gamma 0.5, lambda 1, bootstrap 2.
    logits = torch.tensor([[0.0, 0.0], [np.log(3.0), 0.0]])
    values = torch.tensor([0.5, 1.0])
    # Rewards 1 and 0: returns 1 + 0.5 x 1 = 1.5 and 0 + 0.5 x 2 = 1, so advantages 1 and 0.
    args = options(gamma=0.5)
    policy_loss, value_loss, entropy = a3c_losses(values, logits, [1, 0], [1.0, 0.0], 2.0, args)
    log_half, log_three_quarters = np.log(0.5), np.log(0.75)
    assert policy_loss.item() == pytest.approx(-(log_half * 1.0 + log_three_quarters * 0.0))
    assert value_loss.item() == pytest.approx(0.5 * 1.0**2 + 0.5 * 0.0**2)
    entropies = [-log_half, -(0.75 * log_three_quarters + 0.25 * np.log(0.25))]
    assert entropy.item() == pytest.approx(sum(entropies))


def test_gradients_flow_where_they_should_and_nowhere_else():
    logits = torch.randn(3, 6, requires_grad=True)
    values = torch.tensor([0.3, -0.2, 0.1], requires_grad=True)
    actions, rewards = [0, 5, 2], [1.0, 0.0, -1.0]
    args = options(gamma=0.9, gae_lambda=0.5)
    policy_loss, value_loss, _ = a3c_losses(values, logits, actions, rewards, 0.7, args)
    (policy_loss + value_loss).backward()
    returns, advantages = returns_and_advantages(rewards, values.tolist(), 0.7, 0.9, 0.5)
    # Into the values: the value loss's gradient alone.
    torch.testing.assert_close(values.grad, values.detach() - torch.tensor(returns))
    # Into the logits: advantage x (policy - chosen action).
    expected = logits.detach().softmax(1) - torch.eye(6)[actions]
    torch.testing.assert_close(logits.grad, expected * torch.tensor(advantages).unsqueeze(1))


def recorded_env(world, max_episode_length):
    """What `envs.create_atari_env` puts around a game."""
    return RecordEpisodeStatistics(TimeLimit(world, max_episode_length))


class ShortGame(gym.Env):
    """Noise to look at, points lost and won; the episode ends, or is cut, at its third step."""

    def __init__(self, terminates, truncates):
        self.ends = terminates, truncates
        self.observation_space = spaces.Box(-np.inf, np.inf, (1, 42, 42), np.float32)
        self.action_space = spaces.Discrete(6)

    def reset(self, seed=None, options=None):
        self.num_steps = 0
        return self.observe(), {}

    def step(self, action):
        self.num_steps += 1
        at_end = self.num_steps == 3
        reward = 5.0 * (-1) ** self.num_steps
        return self.observe(), reward, at_end and self.ends[0], at_end and self.ends[1], {}

    def observe(self):
        rng = np.random.default_rng(self.num_steps)
        return rng.standard_normal((1, 42, 42), dtype=np.float32)


class RecordedAdam(SharedAdam):
    """Keeps the gradients and learning rates that it is given."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.gradients, self.rates = [], []

    def step(self):
        self.gradients.append([p.grad.clone() for p in self.param_groups[0]["params"]])
        self.rates.append(self.param_groups[0]["lr"])
        super().step()


def create_shared(args):
    torch.manual_seed(0)
    shared = SharedState(args, 1, 6)
    shared.optimizers = [RecordedAdam(shared.model.parameters(), lr=args.lr)]
    return shared


def train_here(args, run_folder, shared=None):
    """Train in this process, as worker 0 of one; return the run's state."""
    shared = shared or create_shared(args)
    train.train(0, args, shared, run_folder, 0)
    assert shared.ready[0]
    return shared


@pytest.fixture
def losses_of(monkeypatch):
    """What each rollout's losses were computed from."""
    calls = []

    def recorded(values, logits, actions, rewards, bootstrap, args):
        calls.append(SimpleNamespace(values=values, rewards=rewards, bootstrap=bootstrap))
        return a3c_losses(values, logits, actions, rewards, bootstrap, args)

    monkeypatch.setattr(train, "a3c_losses", recorded)
    return calls


@pytest.mark.parametrize(
    ("terminates", "truncates", "max_episode_length", "num_steps", "length", "cut"),
    [
        (True, False, 100, 20, 3, False),
        (True, True, 100, 20, 3, False),  # the game ended, whatever else happened at that step
        (False, True, 100, 20, 3, True),
        (False, False, 2, 20, 2, True),
        (False, False, 100, 4, 4, True),
    ],
)
def test_the_bootstrap_is_zero_after_an_end_and_the_critics_value_after_a_cut(
    losses_of,
    monkeypatch,
    tmp_path,
    terminates,
    truncates,
    max_episode_length,
    num_steps,
    length,
    cut,
):
    game = ShortGame(terminates, truncates)
    monkeypatch.setattr(train, "create_atari_env", lambda _, **limit: recorded_env(game, **limit))
    args = options(max_episode_length=max_episode_length, num_steps=num_steps, max_steps=1)
    shared = create_shared(args)
    model = ActorCritic(1, 6)
    model.load_state_dict(shared.model.state_dict())
    train_here(args, tmp_path, shared)
    (rollout,) = losses_of
    assert rollout.rewards == [-1.0, 1.0, -1.0, 1.0][:length]  # clipped
    assert rollout.values.shape == (length,)
    assert shared.total_steps() == length
    played = 5.0 * sum(rollout.rewards), length, 1.0
    episode = list(played) if length < num_steps else [0.0, 0.0, 0.0]
    assert shared.figures[0, -3:].tolist() == episode  # its reward is not clipped
    state = model.initial_state()
    for game.num_steps in range(length + 1):
        value, _, state = model(torch.from_numpy(game.observe()).unsqueeze(0), state)
    assert rollout.bootstrap == pytest.approx(value.item() if cut else 0.0, abs=1e-5)
    assert value.abs() > 1e-3


@pytest.mark.parametrize("kind", [Rollout, PlainRollout])
def test_the_recurrent_state_goes_on_in_the_next_rollout_and_is_zero_in_the_next_episode(
    kind, losses_of, monkeypatch, tmp_path
):
    monkeypatch.setattr(train, "create_rollout", lambda model, _, length: kind(model, length))
    game = ShortGame(True, False)
    monkeypatch.setattr(train, "create_atari_env", lambda _, **limit: recorded_env(game, **limit))
    args = options(lr=0.0, num_steps=2, max_steps=6)
    model = train_here(args, tmp_path).model
    assert [len(rollout.rewards) for rollout in losses_of] == [2, 1, 2, 1]
    state, expected = model.initial_state(), []
    for game.num_steps in range(3):
        value, _, state = model(torch.from_numpy(game.observe()).unsqueeze(0), state)
        expected.append(value.item())
    values = torch.cat([rollout.values for rollout in losses_of])
    assert values.tolist() == pytest.approx(2 * expected, abs=1e-5)
    value, _, _ = model(torch.from_numpy(game.observe()).unsqueeze(0), model.initial_state())
    assert abs(value.item() - expected[2]) > 1e-3  # it matters


@backends
def test_three_updates_hand_over_three_gradients_as_adam_would_take_them(
    onednn, nnpack, monkeypatch, tmp_path
):
    models, expected = [], []

    def recorded_model(*sizes):
        models.append(ActorCritic(*sizes))
        return models[-1]

    def recorded_losses(*inputs):
        losses = a3c_losses(*inputs)
        policy_loss, value_loss, entropy = losses
        loss = policy_loss + 0.25 * value_loss - 2.0 * entropy
        parameters = list(models[-1].parameters())
        expected.append(torch.autograd.grad(loss, parameters, retain_graph=True))
        return losses

    monkeypatch.setattr(train, "ActorCritic", recorded_model)
    monkeypatch.setattr(train, "a3c_losses", recorded_losses)
    args = options(value_loss_coef=0.25, entropy_coef=2.0)
    shared = create_shared(args)
    before = [p.detach().clone() for p in shared.model.parameters()]
    twin = [p.clone().contiguous().requires_grad_() for p in before]
    with backend(onednn, nnpack):
        train_here(args, tmp_path, shared)
    received = shared.optimizers[0].gradients
    assert len(received) == len(expected) == 3
    twin_optimizer = torch.optim.Adam(twin, lr=1e-4)
    for gradients, expected_gradients in zip(received, expected, strict=True):
        torch.testing.assert_close(gradients, list(expected_gradients))
        for its_twin, gradient in zip(twin, gradients, strict=True):
            its_twin.grad = gradient.contiguous()
        twin_optimizer.step()
    assert not torch.equal(received[0][0], received[1][0])
    for parameter, its_twin, start in zip(shared.model.parameters(), twin, before, strict=True):
        change, expected_change = (parameter - start).flatten(), (its_twin - start).flatten()
        assert torch.cosine_similarity(change, expected_change, dim=0) > 0.999


@pytest.mark.parametrize(("limit", "norm"), [(1e-4, 1e-4), (0.0, 0.0)])
def test_gradients_are_clipped_to_the_norm(limit, norm, tmp_path):
    shared = train_here(options(max_grad_norm=limit), tmp_path)
    norms = [torch.nn.utils.get_total_norm(g).item() for g in shared.optimizers[0].gradients]
    assert norms == pytest.approx([norm] * 3, rel=0.02)


def steep(logits):
    return (logits - logits.detach()).abs().sqrt().sum()  # zero; its slope is infinite


def endless(logits):
    return torch.tensor(float("inf"))  # with no slope at all


def missing(logits):
    return (logits * float("nan")).sum()


@pytest.mark.parametrize("term", [steep, endless, missing])
def test_a_rollout_whose_loss_or_gradient_is_not_finite_is_dropped_and_counted(
    term, monkeypatch, tmp_path
):
    turns = itertools.cycle([False, True])

    def sometimes_bad(values, logits, *rest):
        policy_loss, value_loss, entropy = a3c_losses(values, logits, *rest)
        return policy_loss + (term(logits) if next(turns) else 0.0), value_loss, entropy

    monkeypatch.setattr(train, "a3c_losses", sometimes_bad)
    shared = train_here(options(max_steps=200), tmp_path)
    assert shared.dropped.sum() == 5
    assert shared.total_steps() == 200
    assert len(shared.optimizers[0].gradients) == 5
    assert all(p.isfinite().all() for p in shared.model.parameters())
    assert shared.figures.isfinite().all()


@pytest.mark.parametrize(
    ("schedule", "expected"), [("constant", [1.0] * 5), ("linear", [1.0, 0.8, 0.6, 0.4, 0.2])]
)
def test_the_learning_rate_follows_its_schedule(schedule, expected, tmp_path):
    args = options(max_steps=100, lr=0.01, lr_schedule=schedule)
    shared = train_here(args, tmp_path)
    assert shared.optimizers[0].rates == pytest.approx([0.01 * factor for factor in expected])


def test_the_weight_of_the_entropy_has_a_schedule_of_its_own():
    args = options(max_steps=100, entropy_schedule="linear")
    shared = create_shared(args)
    shared.steps[0] = 75
    rates = train.learning_rate_and_beta(args, shared, shared.optimizers[0])
    assert rates == pytest.approx((1e-4, 0.01 / 4))


def test_an_agent_to_start_from_is_not_moved_by_full_steps_at_once(monkeypatch, tmp_path):
    monkeypatch.setattr(train, "WARM_UP", 4)
    args = options(max_steps=200, lr=0.01, init="runs/before")
    rates = train_here(args, tmp_path).optimizers[0].rates
    rising = [0.0, 0.25, 0.5, 0.75]
    assert rates == pytest.approx([0.01 * f for f in rising + [1.0] * (len(rates) - 4)])
    assert len(rates) > 5


def test_what_the_workers_learn_by_is_added_up(losses_of, tmp_path):
    shared = train_here(options(max_steps=100), tmp_path)
    means, _, sums = shared.mean_figures(since=torch.zeros(()))
    assert means["entropy"] == pytest.approx(np.log(6), abs=0.01)  # nats a step
    assert means["value_loss"] > 0
    assert means["learning_rate"] == pytest.approx(1e-4)
    assert means["gradient_norm"] > 0
    assert sums[0] == sum(len(call.rewards) for call in losses_of) == 100
    assert shared.mean_figures(since=sums)[0] == {}


def test_no_two_workers_and_no_two_sessions_draw_the_same(monkeypatch, tmp_path):
    def drawn(rank, restarts, seed):
        game, drawn = ShortGame(True, False), []
        reset, step = game.reset, game.step
        game.reset = lambda seed=None, options=None: drawn.append(seed) or reset()
        game.step = lambda action: drawn.append(action) or step(action)
        make = lambda _, **limit: recorded_env(game, **limit)  # noqa: E731
        monkeypatch.setattr(train, "create_atari_env", make)
        args = options(num_processes=2, seed=seed)
        train.train(rank, args, create_shared(args), tmp_path, restarts)
        return tuple(drawn)

    games = [drawn(*worker) for worker in [(0, 0, 1), (1, 0, 1), (0, 1, 1), (0, 0, 2)]]
    assert len({game[0] for game in games}) == len({game[1:] for game in games}) == 4
    assert drawn(0, 0, 1) == games[0]


def test_a_worker_has_counts_an_adam_and_a_turn_of_its_own(monkeypatch, tmp_path):
    turns = []
    turn = lambda _, rank: turns.append(rank) or contextlib.nullcontext()  # noqa: E731
    monkeypatch.setattr(train, "CoreTurn", turn)
    args = options(num_processes=2, no_shared=True)
    shared = SharedState(args, 1, 6)
    train.train(1, args, shared, tmp_path, 0)
    assert turns == [1]
    assert [optimizer.num_updates() for optimizer in shared.optimizers] == [0, 3]
    assert shared.ready.tolist() == [0, 1, 0, 0]
    assert shared.steps.tolist() == [0, 60, 0]
    assert shared.figures.any(dim=1).tolist() == [False, True, False]


def test_a_worker_s_normaliser_starts_from_the_run_s_and_is_its_own(monkeypatch, tmp_path):
    envs, create = [], train.create_atari_env
    wrapped = lambda *a, **k: envs.append(gym.Wrapper(create(*a, **k))) or envs[-1]  # noqa: E731
    monkeypatch.setattr(train, "create_atari_env", wrapped)
    shared = create_shared(options())
    shared.statistics[:] = torch.tensor([0.5, 0.25, 1000.0])
    train_here(options(), tmp_path, shared)
    assert envs[0].unwrapped.statistics[2] == 1000 + 61  # the first picture, and one a step
    assert shared.statistics.tolist() == [0.5, 0.25, 1000.0]


def test_a_worker_ends_when_the_run_is_stopped(tmp_path):
    shared = create_shared(options())
    shared.stop[0] = STOP
    assert train_here(options(), tmp_path, shared).total_steps() == 0


class Catch(gym.Env):
    """A toy world: which half of the picture is bright tells which of two actions is right."""

    def __init__(self):
        self.observation_space = spaces.Box(-np.inf, np.inf, (1, 42, 42), np.float32)
        self.action_space = spaces.Discrete(2)
        self.rng, self.rewards = random.Random(0), []

    def reset(self, seed=None, options=None):
        self.num_steps = 0
        return self.observe(), {}

    def observe(self):
        self.side = self.rng.randrange(2)
        picture = np.full((1, 42, 42), -1.0, np.float32)
        picture[..., 21 * self.side : 21 * (self.side + 1)] = 1.0
        return picture

    def step(self, action):
        reward = 1.0 if action == self.side else -1.0
        self.rewards.append(reward)
        self.num_steps += 1
        return self.observe(), reward, self.num_steps == 10, False, {}


def test_training_learns_a_toy_world(monkeypatch, tmp_path):
    world = Catch()
    monkeypatch.setattr(train, "create_atari_env", lambda _, **limit: recorded_env(world, **limit))
    args = options(max_steps=3000, lr=1e-3)
    torch.manual_seed(0)
    train_here(args, tmp_path, SharedState(args, 1, 2))
    assert abs(np.mean(world.rewards[:100])) < 0.5  # chance is 0
    assert np.mean(world.rewards[-300:]) > 0.9  # the best is 1
