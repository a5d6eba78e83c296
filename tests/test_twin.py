"""The fast worker against the textbook one (textbook.py)."""

import random
from types import SimpleNamespace

import numpy as np
import pytest
import textbook
import torch
from test_train import options

from envs import create_atari_env
from model import ActorCritic
from my_optim import SharedAdam
from train import a3c_loss


def stored_rollout(length, terminated, seed=0):
    """A rollout of the real game, random actions, with a recurrent state in mid-episode."""
    env = create_atari_env("Pong-v0")
    rng = np.random.default_rng(seed)
    observations = [env.reset(seed=seed)[0]]
    actions = rng.integers(6, size=length).tolist()
    observations += [env.step(action)[0] for action in actions]
    torch.manual_seed(seed)
    state = torch.randn(1, 256).tanh(), torch.randn(1, 256)
    rewards = rng.choice([-1.0, 0.0, 1.0], size=length).tolist()
    observations = torch.from_numpy(np.stack(observations))
    return SimpleNamespace(
        observations=observations, state=state, actions=actions, rewards=rewards, terminated=terminated
    )


def act_and_unroll(model, rollout):
    """Return the values (T,), the logits (T, 6) and the bootstrap."""
    pictures, state = model.new_pictures(len(rollout.observations)), rollout.state
    pictures[0].copy_(rollout.observations)
    for t in range(len(rollout.actions)):
        _, state = model.act([x[t : t + 1] for x in pictures], state, random.Random(0))
    bootstrap = 0.0 if rollout.terminated else model.value([x[-1:] for x in pictures], state)
    return *model.unroll([x[:-1] for x in pictures], rollout.state), bootstrap


@pytest.mark.parametrize(("length", "terminated"), [(20, False), (20, True), (7, True), (1, False)])
def test_one_batch_gives_the_gradient_of_the_graph_that_grew_step_by_step(length, terminated):
    rollout, args = stored_rollout(length, terminated), options(gae_lambda=0.9)
    torch.manual_seed(1)
    model = ActorCritic(1, 6)
    values, logits, bootstrap = act_and_unroll(model, rollout)
    loss, _ = a3c_loss(logits, values, rollout.actions, rollout.rewards, bootstrap, args)
    gradients = torch.autograd.grad(loss, list(model.parameters()))
    twin = textbook.create_model(1, 6)
    twin.load_state_dict(model.state_dict())
    expected = textbook.rollout_gradient(twin, **vars(rollout), args=args)
    for (name, parameter), gradient, its_twin in zip(model.named_parameters(), gradients, expected, strict=True):
        assert gradient.stride() == parameter.stride(), name  # the fused Adam runs through memory
        assert its_twin.norm() > 0, name
        assert (gradient - its_twin).norm() <= 1e-4 * its_twin.norm(), name


def test_acting_and_learning_see_the_same_policy():
    rollout = stored_rollout(20, False)
    torch.manual_seed(1)
    model = ActorCritic(1, 6)
    values, logits, bootstrap = act_and_unroll(model, rollout)
    values, state = torch.cat([values, torch.tensor([bootstrap])]), rollout.state
    for t, observation in enumerate(rollout.observations):
        value, step_logits, state = model(observation.unsqueeze(0), state)
        torch.testing.assert_close(values[t], value[0, 0], atol=1e-5, rtol=1e-4)
        if t < len(logits):
            torch.testing.assert_close(logits[t], step_logits[0], atol=1e-6, rtol=1e-4)


def test_one_gradient_moves_the_weights_to_the_same_bits():
    torch.manual_seed(1)
    model, twin = ActorCritic(1, 6), textbook.create_model(1, 6)
    twin.load_state_dict(model.state_dict())
    optimizer, twin_optimizer = SharedAdam(model.parameters()), torch.optim.Adam(twin.parameters(), lr=1e-4, fused=True)
    for _ in range(3):
        for parameter, its_twin in zip(model.parameters(), twin.parameters(), strict=True):
            parameter.grad = torch.randn_like(parameter)
            its_twin.grad = torch.empty_like(its_twin).copy_(parameter.grad)
        optimizer.step()
        twin_optimizer.step()
    for parameter, its_twin in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(parameter, its_twin)
