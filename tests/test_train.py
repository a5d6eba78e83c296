import itertools
from types import SimpleNamespace

import gym
import numpy as np
import pytest
import torch
from gym import spaces

import main
import train
from checkpoint import RunState
from model import ActorCritic
from my_optim import SharedAdam
from train import a3c_loss, discounted_returns, generalized_advantages


def options(**changes):
    args = main.parse_args(["--env-name", "PongDeterministic-v4", "--num-processes", "1", "--max-steps", "60"])
    return SimpleNamespace(**vars(args) | changes)


def test_returns_are_discounted_and_end_in_the_bootstrap():
    assert discounted_returns([1.0, 0.0, 2.0], 4.0, 0.5) == [1 + 0.5 * 2.0, 0.5 * 4.0, 2 + 0.5 * 4.0]
    assert discounted_returns([1.0], 0.0, 0.99) == [1.0]


# rewards 1, 0, 2; values 0.5, 1, -1 and the bootstrap 4; gamma 0.5
# delta: 1 + 0.5 - 0.5 = 1;  0 - 0.5 - 1 = -1.5;  2 + 2 + 1 = 5
@pytest.mark.parametrize(
    ("gae_lambda", "expected"),
    [
        (1.0, [1 - 0.75 + 1.25, -1.5 + 2.5, 5.0]),  # the returns 2, 2, 4 less the values
        (0.5, [1 + 0.25 * (-1.5 + 0.25 * 5), -1.5 + 0.25 * 5, 5.0]),
        (0.0, [1.0, -1.5, 5.0]),
    ],
)
def test_generalized_advantages(gae_lambda, expected):
    advantages = generalized_advantages([1.0, 0.0, 2.0], [0.5, 1.0, -1.0], 4.0, 0.5, gae_lambda)
    assert advantages == pytest.approx(expected)


def test_loss_of_a_rollout_worked_by_hand():
    # Two steps, two actions; the policy is uniform, then 3:1. gamma 0.5, lambda 1, bootstrap 2.
    logits = torch.tensor([[0.0, 0.0], [np.log(3.0), 0.0]])
    values = torch.tensor([0.5, 1.0])
    # Rewards 1 and 0: returns 1 + 0.5 x 1 = 1.5 and 0 + 0.5 x 2 = 1, advantages 1.5 - 0.5 = 1 and 1 - 1 = 0.
    log_half, log_three_quarters = np.log(0.5), np.log(0.75)
    entropy = [-log_half, -(0.75 * log_three_quarters + 0.25 * np.log(0.25))]
    policy_loss = -(log_half * 1.0 + log_three_quarters * 0.0) - 0.1 * sum(entropy)
    value_loss = 0.5 * 1.0**2 + 0.5 * 0.0**2
    args = options(gamma=0.5, entropy_coef=0.1, value_loss_coef=0.3)
    loss, parts = a3c_loss(logits, values, [1, 0], [1.0, 0.0], 2.0, args)
    assert parts["entropy"].item() == pytest.approx(sum(entropy))
    assert parts["policy_loss"].item() == pytest.approx(-log_half)
    assert parts["value_loss"].item() == pytest.approx(0.5)
    assert loss.item() == pytest.approx(policy_loss + 0.3 * value_loss)


def test_gradients_flow_where_they_should_and_nowhere_else():
    logits = torch.randn(3, 6, requires_grad=True)
    values = torch.tensor([0.3, -0.2, 0.1], requires_grad=True)
    actions, rewards = [0, 5, 2], [1.0, 0.0, -1.0]
    args = options(gamma=0.9, gae_lambda=0.5, entropy_coef=0.0)
    a3c_loss(logits, values, actions, rewards, 0.7, args)[0].backward()
    returns = torch.tensor(discounted_returns(rewards, 0.7, 0.9))
    # Into the values: the value loss's gradient alone.
    torch.testing.assert_close(values.grad, 0.5 * (values.detach() - returns))
    # Into the logits: advantage x (policy - chosen action).
    advantages = torch.tensor(generalized_advantages(rewards, values.tolist(), 0.7, 0.9, 0.5))
    expected = (logits.detach().softmax(1) - torch.eye(6)[actions]) * advantages.unsqueeze(1)
    torch.testing.assert_close(logits.grad, expected)


class ShortGame(gym.Env):
    """Noise to look at; the episode ends, or is truncated, at its third step."""

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
        return self.observe(), 5.0, at_end and self.ends[0], at_end and self.ends[1], {}

    def observe(self):
        return np.random.default_rng(self.num_steps).standard_normal((1, 42, 42), dtype=np.float32)


def train_here(args, run_folder, shared=None):
    """Train in this process, as worker 0 of one; return the run's state."""
    torch.manual_seed(0)
    shared = shared or RunState(args, 1, 6)
    train.train(0, args, shared, run_folder, 0)
    assert shared.ready[0]
    return shared


def losses_of(monkeypatch, args, run_folder):
    """Train in this process and return what each rollout's loss was computed from."""
    calls = []

    def recorded(logits, values, actions, rewards, bootstrap, args):
        calls.append(SimpleNamespace(values=values, rewards=rewards, bootstrap=bootstrap))
        return a3c_loss(logits, values, actions, rewards, bootstrap, args)

    monkeypatch.setattr(train, "a3c_loss", recorded)
    shared = train_here(args, run_folder)
    assert shared.steps.item() == sum(len(call.rewards) for call in calls)
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
    monkeypatch, tmp_path, terminates, truncates, max_episode_length, num_steps, length, cut
):
    monkeypatch.setattr(train, "create_atari_env", lambda env_name: ShortGame(terminates, truncates))
    args = options(max_episode_length=max_episode_length, num_steps=num_steps, max_steps=1)
    (rollout,) = losses_of(monkeypatch, args, tmp_path)
    assert rollout.rewards == [1.0] * length  # clipped
    assert rollout.values.shape == (length,)
    torch.manual_seed(0)
    model = ActorCritic(1, 6)
    state, game = model.initial_state(), ShortGame(False, False)
    for game.num_steps in range(length + 1):
        value, _, state = model(torch.from_numpy(game.observe()).unsqueeze(0), state)
    assert rollout.bootstrap == pytest.approx(value.item() if cut else 0.0, abs=1e-6)
    assert value.abs() > 1e-3


def test_three_updates_hand_over_three_gradients_of_their_own(monkeypatch, tmp_path):
    models, expected, received = [], [], []

    def recorded_model(*sizes):
        models.append(ActorCritic(*sizes))
        return models[-1]

    def recorded_loss(*inputs):
        loss, parts = a3c_loss(*inputs)
        expected.append(torch.autograd.grad(loss, list(models[-1].parameters()), retain_graph=True))
        return loss, parts

    class RecordedAdam(SharedAdam):
        def step(self):
            received.append([p.grad.clone() for p in self.param_groups[0]["params"]])
            super().step()

    monkeypatch.setattr(train, "ActorCritic", recorded_model)
    monkeypatch.setattr(train, "a3c_loss", recorded_loss)
    shared = RunState(options(), 1, 6)
    before = [p.clone() for p in shared.model.parameters()]
    shared.optimizers = [RecordedAdam(shared.model.parameters())]
    train_here(options(), tmp_path, shared)
    assert len(received) == len(expected) == 3
    for gradients, expected_gradients in zip(received, expected, strict=True):
        torch.testing.assert_close(gradients, list(expected_gradients))
    assert not torch.equal(received[0][0], received[1][0])
    assert all((p != q).any() for p, q in zip(shared.model.parameters(), before, strict=True))


def test_gradients_are_clipped_to_the_norm(tmp_path):
    norms = []

    class RecordedAdam(SharedAdam):
        def step(self):
            norms.append(torch.cat([p.grad.flatten() for p in self.param_groups[0]["params"]]).norm().item())

    args = options(max_grad_norm=1e-4)
    shared = RunState(args, 1, 6)
    shared.optimizers = [RecordedAdam(shared.model.parameters())]
    train_here(args, tmp_path, shared)
    assert norms == pytest.approx([1e-4] * 3, rel=0.02)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_rollout_whose_loss_is_not_finite_is_dropped_and_counted(bad, monkeypatch, tmp_path):
    losses = itertools.cycle([1.0, bad])
    monkeypatch.setattr(train, "a3c_loss", lambda *inputs: (next(losses) * a3c_loss(*inputs)[0], {}))
    shared = train_here(options(max_steps=200), tmp_path)
    assert shared.dropped.item() == 5
    assert shared.steps.item() == 200
    assert shared.optimizers[0].state[next(shared.model.parameters())]["step"] == 5
    assert all(p.isfinite().all() for p in shared.model.parameters())


def steep(logits):
    return (logits - logits.detach()).abs().sqrt().sum()  # zero; its slope is infinite


def endless(logits):
    return torch.tensor(float("inf"))  # with no slope at all


@pytest.mark.parametrize("term", [steep, endless])
def test_a_rollout_of_which_only_loss_or_gradient_is_finite_is_dropped(term, monkeypatch, tmp_path):
    def bad_loss(logits, *inputs):
        loss, parts = a3c_loss(logits, *inputs)
        return loss + term(logits), parts

    monkeypatch.setattr(train, "a3c_loss", bad_loss)
    shared = train_here(options(), tmp_path)
    assert shared.dropped.item() == 3
    assert shared.optimizers[0].state[next(shared.model.parameters())]["step"] == 0


@pytest.mark.parametrize(("schedule", "expected"), [("constant", [1.0] * 5), ("linear", [1.0, 0.8, 0.6, 0.4, 0.2])])
def test_the_learning_rate_follows_its_schedule(schedule, expected, tmp_path):
    rates = []

    class RecordedAdam(SharedAdam):
        def step(self):
            rates.append(self.param_groups[0]["lr"])

    args = options(max_steps=100, lr=0.01, lr_schedule=schedule)
    shared = RunState(args, 1, 6)
    shared.optimizers = [RecordedAdam(shared.model.parameters(), lr=args.lr)]
    train_here(args, tmp_path, shared)
    assert rates == pytest.approx([0.01 * factor for factor in expected])


def test_every_process_draws_from_a_seed_of_its_own():
    seeds = {train.worker_seed(*numbers) for numbers in itertools.product(range(20), range(17), range(3))}
    assert len(seeds) == 20 * 17 * 3
