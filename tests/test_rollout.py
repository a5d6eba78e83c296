"""Both rollouts against the textbook's network, on the kernels of several machines."""

import contextlib
import functools
import random
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import textbook
import torch
from conftest import options

from envs import create_atari_env
from model import ActorCritic
from my_optim import SharedAdam
from rollout import PlainRollout, Rollout
from train import a3c_losses


@functools.cache
def stored_rollout(length, terminated, seed=0):
    """A rollout of the real game, random actions, with a recurrent state in mid-episode."""
    env = create_atari_env("Pong-v0")
    rng = np.random.default_rng(seed)
    observations = [env.reset(seed=seed)[0]]
    actions = rng.integers(6, size=length).tolist()
    observations += [env.step(action)[0] for action in actions]
    torch.manual_seed(seed)
    return SimpleNamespace(
        observations=torch.from_numpy(np.stack(observations)),
        state=(torch.randn(1, 256).tanh(), torch.randn(1, 256)),
        actions=actions,
        rewards=rng.choice([-1.0, 0.0, 1.0], size=length).tolist(),
        terminated=terminated,
    )


def create_model(seed=1):
    """A network with biases whose policy is far from uniform, as one that has learnt."""
    torch.manual_seed(seed)
    model = ActorCritic(1, 6)
    with torch.no_grad():
        model.actor_linear.weight.mul_(500)
        for name, parameter in model.named_parameters():
            if "bias" in name:
                parameter.normal_(std=0.3)
    return model


kinds = pytest.mark.parametrize("kind", [PlainRollout, Rollout])


def act(model, stored, kind=Rollout):
    """Return a rollout of the model, which met the observations and rewards of a stored one."""
    rollout, rng = kind(model, 20), random.Random(0)
    rollout.start(stored.observations[0].numpy(), stored.state)
    for reward, observation in zip(stored.rewards, stored.observations[1:], strict=True):
        rollout.act(rng)
        rollout.add(reward, observation.numpy())
    return rollout


# A torch without oneDNN, as the one for macOS, takes other kernels, whose gradients lie in memory
# in another order.
backends = pytest.mark.parametrize(
    ("onednn", "nnpack"), [(True, True), (True, False), (False, True), (False, False)]
)


@contextlib.contextmanager
def backend(onednn, nnpack):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "TF32 acceleration")  # of graphics cards
        onednn_flags = torch.backends.mkldnn.flags(enabled=onednn)
        with onednn_flags, torch.backends.nnpack.flags(enabled=nnpack):
            yield


def gradients_of(model, stored, args, kind=Rollout):
    """Return the gradients that the worker computes, and those of its twin in textbook.py."""
    rollout = act(model, stored, kind)
    values, logits = rollout.values_and_logits()
    bootstrap = 0.0 if stored.terminated else values[-1].item()
    policy_loss, value_loss, entropy = a3c_losses(
        values[:-1], logits[:-1], stored.actions, stored.rewards, bootstrap, args
    )
    loss = policy_loss + args.value_loss_coef * value_loss - args.entropy_coef * entropy
    model.zero_grad()
    loss.backward()
    twin = textbook.create_model(1, 6)
    twin.load_state_dict(model.state_dict())
    expected = textbook.rollout_gradient(twin, **vars(stored), args=args)
    return [p.grad for p in model.parameters()], expected


@kinds
@backends
@pytest.mark.parametrize(
    ("length", "terminated"),
    [(20, False), (20, True), (16, False), (15, False), (7, True), (1, False), (1, True)],
)
def test_the_gradient_is_that_of_the_graph_that_grew_step_by_step(
    length, terminated, onednn, nnpack, kind
):
    model, stored = create_model(), stored_rollout(length, terminated)
    with backend(onednn, nnpack):
        gradients, expected = gradients_of(model, stored, options(gae_lambda=0.9), kind)
    names = [name for name, _ in model.named_parameters()]
    for name, gradient, its_twin in zip(names, gradients, expected, strict=True):
        assert its_twin.norm() > 0, name
        assert (gradient - its_twin).norm() <= 1e-4 * its_twin.norm(), name


@backends
@pytest.mark.parametrize("length", [1, 15, 16])
def test_three_updates_move_the_weights_as_adam_does(length, onednn, nnpack):
    model, twin = create_model(), textbook.create_model(1, 6)
    twin.load_state_dict(model.state_dict())
    before = [p.detach().clone() for p in model.parameters()]
    optimizer = SharedAdam(model.parameters())
    twin_optimizer = torch.optim.Adam(twin.parameters(), lr=1e-4)
    for seed in range(3):
        with backend(onednn, nnpack):
            gradients, _ = gradients_of(model, stored_rollout(length, False, seed), options())
        for its_twin, gradient in zip(twin.parameters(), gradients, strict=True):
            its_twin.grad = torch.empty_like(its_twin).copy_(gradient)
        optimizer.step()
        twin_optimizer.step()
    names = [name for name, _ in model.named_parameters()]
    weights = zip(names, model.parameters(), twin.parameters(), before, strict=True)
    for name, parameter, its_twin, start in weights:
        change, expected = (parameter - start).flatten(), (its_twin - start).flatten()
        assert torch.cosine_similarity(change, expected, dim=0) > 0.999, name


@kinds
@backends
@pytest.mark.parametrize("length", [1, 16, 20])
def test_acting_and_learning_see_the_same_policy(length, onednn, nnpack, kind):
    model, stored = create_model(), stored_rollout(length, False)
    with backend(onednn, nnpack):
        rollout = act(model, stored, kind)
        values, logits = rollout.values_and_logits()
        assert values.shape == (length + 1,)
        assert logits.shape == (length + 1, 6)
        state = stored.state
        for t, observation in enumerate(stored.observations):
            if t == length:  # the state of the rollout is the one before its last observation
                torch.testing.assert_close(rollout.state, state)
            value, step_logits, state = model(observation.unsqueeze(0), state)
            torch.testing.assert_close(values[t], value[0, 0], atol=1e-5, rtol=1e-4)
            torch.testing.assert_close(logits[t], step_logits[0], atol=1e-5, rtol=1e-4)


@kinds
def test_actions_are_sampled_from_the_policy(kind):
    model, rng = create_model(), random.Random(0)
    stored = stored_rollout(1, False)
    rollout, actions = kind(model, 1), []
    for _ in range(2000):
        rollout.start(stored.observations[0].numpy(), stored.state)
        actions.append(rollout.act(rng))
    actions = torch.tensor(actions)
    _, logits, _ = model(stored.observations[:1], stored.state)
    frequencies = torch.bincount(actions, minlength=6) / len(actions)
    probabilities = logits.softmax(dim=1)[0]
    assert probabilities.max() > 0.3
    torch.testing.assert_close(frequencies, probabilities, atol=0.04, rtol=0)


def test_a_rollout_goes_on_with_the_weights_that_are_copied_into_its_model():
    model, stored = create_model(), stored_rollout(5, False)
    rollout = act(model, stored)
    before = rollout.values_and_logits()[0].detach().clone()
    with torch.no_grad():
        for parameter, other in zip(model.parameters(), create_model(2).parameters(), strict=True):
            parameter.copy_(other)
    rollout.start(stored.observations[0].numpy(), stored.state)
    for observation in stored.observations[1:]:
        rollout.act(random.Random(0))
        rollout.add(0.0, observation.numpy())
    values = rollout.values_and_logits()[0]
    assert (values - before).abs().max() > 1e-3
    torch.testing.assert_close(values, act(create_model(2), stored).values_and_logits()[0])
