"""The fast worker against the textbook one (textbook.py)."""

import contextlib
import random
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import textbook
import torch
from test_train import options

from envs import create_atari_env
from model import ActorCritic
from my_optim import SharedAdam
from train import a3c_loss, hand_over_gradients


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


# A torch without oneDNN, as the one for macOS, takes other kernels, whose gradients lie in memory in another order.
backends = pytest.mark.parametrize(("onednn", "nnpack"), [(True, True), (False, True), (False, False)])


@contextlib.contextmanager
def backend(onednn, nnpack):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "TF32 acceleration")  # for graphics cards, says who asks for the flags
        with torch.backends.mkldnn.flags(enabled=onednn), torch.backends.nnpack.flags(enabled=nnpack):
            yield


def gradients_of(model, rollout, args):
    """Return the gradients that the worker computes and those of its twin."""
    values, logits, bootstrap = act_and_unroll(model, rollout)
    loss, _ = a3c_loss(logits, values, rollout.actions, rollout.rewards, bootstrap, args)
    model.zero_grad()
    loss.backward()
    twin = textbook.create_model(1, 6)
    twin.load_state_dict(model.state_dict())
    return [p.grad for p in model.parameters()], textbook.rollout_gradient(twin, **vars(rollout), args=args)


@backends
@pytest.mark.parametrize(
    ("length", "terminated"), [(20, False), (20, True), (16, False), (15, False), (7, True), (1, False)]
)
def test_one_batch_gives_the_gradient_of_the_graph_that_grew_step_by_step(length, terminated, onednn, nnpack):
    rollout, args = stored_rollout(length, terminated), options(gae_lambda=0.9)
    torch.manual_seed(1)
    model = ActorCritic(1, 6)
    with backend(onednn, nnpack):
        gradients, expected = gradients_of(model, rollout, args)
    for (name, parameter), gradient, its_twin in zip(model.named_parameters(), gradients, expected, strict=True):
        assert gradient.stride() == parameter.stride(), name  # the fused Adam runs through memory
        assert its_twin.norm() > 0, name
        assert (gradient - its_twin).norm() <= 1e-4 * its_twin.norm(), name


@backends
@pytest.mark.parametrize("length", [1, 15, 16, 20])
def test_three_updates_move_the_weights_as_the_twins_gradients_through_adam_do(length, onednn, nnpack):
    torch.manual_seed(1)
    model, twin = ActorCritic(1, 6), textbook.create_model(1, 6)
    twin.load_state_dict(model.state_dict())
    before = [p.detach().clone() for p in model.parameters()]
    optimizer, twin_optimizer = SharedAdam(model.parameters()), torch.optim.Adam(twin.parameters(), lr=1e-4)
    for seed in range(3):
        with backend(onednn, nnpack):
            gradients, _ = gradients_of(model, stored_rollout(length, False, seed), options())
        hand_over_gradients(gradients, list(model.parameters()))
        for its_twin, gradient in zip(twin.parameters(), gradients, strict=True):
            its_twin.grad = torch.empty_like(its_twin).copy_(gradient)
        optimizer.step()
        twin_optimizer.step()
    for (name, p), its_twin, start in zip(model.named_parameters(), twin.parameters(), before, strict=True):
        change, expected = (p - start).flatten(), (its_twin - start).flatten()
        assert torch.cosine_similarity(change, expected, dim=0) > 0.999, name


def test_adam_reads_a_gradient_in_another_memory_order_right():
    torch.manual_seed(1)
    model, twin = ActorCritic(1, 6), textbook.create_model(1, 6)
    twin.load_state_dict(model.state_dict())
    optimizer, twin_optimizer = SharedAdam(model.parameters()), torch.optim.Adam(twin.parameters(), lr=1e-4)
    for parameter, its_twin in zip(model.parameters(), twin.parameters(), strict=True):
        parameter.grad = its_twin.grad = torch.randn(parameter.shape)  # contiguous; the weights are channels_last
    assert model.conv2.weight.grad.stride() != model.conv2.weight.stride()
    optimizer.step()
    twin_optimizer.step()
    for parameter, its_twin in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(parameter.detach().contiguous(), its_twin.detach())


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
