"""One training worker: copy the shared weights, act, bootstrap, update (Mnih et al. 2016, algorithm S3)."""

import argparse
import random
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from checkpoint import RunState
from drawing import Scalars
from envs import create_atari_env
from model import ActorCritic
from workers import GO_ON, CoreTurn


def worker_seed(seed: int, rank: int, life: int) -> int:
    """Return a seed that no other rank or life, under this or another `--seed`, is likely to have."""
    return int(np.random.SeedSequence((seed, rank, life)).generate_state(1)[0])


def discounted_returns(rewards: list[float], bootstrap: float, gamma: float) -> list[float]:
    """R_t = r_t + gamma R_{t+1} for the T rewards of a rollout, with R_T = `bootstrap`, the value of its last state."""
    returns, R = [], bootstrap
    for reward in reversed(rewards):
        R = reward + gamma * R
        returns.append(R)
    return returns[::-1]


def generalized_advantages(
    rewards: list[float], values: list[float], bootstrap: float, gamma: float, gae_lambda: float
) -> list[float]:
    """Generalized advantage estimation, GAE(lambda) (Schulman et al. 2016, equation 16), T of them.

    delta_t = r_t + gamma V_{t+1} - V_t, where V_T is `bootstrap`, and gae_t = delta_t + gamma lambda gae_{t+1}; with
    lambda 1 this is R_t - V_t, with lambda 0 it is delta_t.
    """
    advantages, gae, next_value = [], 0.0, bootstrap
    for reward, value in zip(reversed(rewards), reversed(values), strict=True):
        delta = reward + gamma * next_value - value
        gae = delta + gamma * gae_lambda * gae
        advantages.append(gae)
        next_value = value
    return advantages[::-1]


def a3c_loss(
    logits: Tensor, values: Tensor, actions: list[int], rewards: list[float], bootstrap: float, args: argparse.Namespace
) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss of one rollout, summed over its T steps: policy gradient, entropy bonus and squared value error.

    Args:
        logits: (T, num_actions). values: (T,). actions, rewards: T of each. bootstrap: the value of what came next.
        args: gamma, gae_lambda, entropy_coef and value_loss_coef are read.

    Returns the loss and, by name, its parts. No gradient flows from the policy term into the values: the advantages are
    weights there.
    """
    returns = torch.tensor(discounted_returns(rewards, bootstrap, args.gamma))
    gae = generalized_advantages(rewards, values.tolist(), bootstrap, args.gamma, args.gae_lambda)
    log_probs = F.log_softmax(logits, dim=1)
    chosen = log_probs.gather(1, torch.tensor(actions).unsqueeze(1)).squeeze(1)
    policy_loss = -(chosen * torch.tensor(gae)).sum()
    entropy = -(log_probs.exp() * log_probs).sum()
    value_loss = 0.5 * (returns - values).pow(2).sum()
    loss = policy_loss - args.entropy_coef * entropy + args.value_loss_coef * value_loss
    return loss, {"policy_loss": policy_loss, "entropy": entropy, "value_loss": value_loss}


def hand_over_gradients(gradients: Iterable[Tensor], shared_parameters: list[Tensor]) -> None:
    """Make the gradients just computed this process's gradients of the shared parameters.

    The shared *parameters* live in shared memory; their `grad` does not, it is an attribute that each process has for
    itself. It is set at every update: a reference kept from the first one would go on pointing at that one's gradient.
    """
    for gradient, shared_parameter in zip(gradients, shared_parameters, strict=True):
        shared_parameter.grad = gradient


def train(rank: int, args: argparse.Namespace, shared: RunState, run_folder: Path, life: int) -> None:
    """Train until all workers together have made `args.max_steps` steps, or the run is stopped."""
    torch.set_num_threads(1)
    assert all(p.is_shared() for p in shared.model.parameters()), "the weights must lie in shared memory"
    seed = worker_seed(args.seed, rank, life)
    rng = random.Random(seed)
    env = create_atari_env(args.env_name)
    model = ActorCritic(env.observation_space.shape[0], env.action_space.n)
    parameters, shared_parameters = list(model.parameters()), list(shared.model.parameters())
    optimizer = shared.optimizer(rank)
    pictures = model.new_pictures(args.num_steps + 1)
    pictures_of_step = [[x[t : t + 1] for x in pictures] for t in range(args.num_steps + 1)]
    observations = pictures[0].numpy()  # the same memory
    observation, _ = env.reset(seed=seed)
    state, episode_length = model.initial_state(), 0
    turn = CoreTurn(run_folder, rank)
    scalars = Scalars(run_folder / "tensorboard" / "worker" if args.tensorboard and rank == 0 else None, every=10.0)
    steps, stop = shared.steps.numpy(), shared.stop.numpy()  # the same memory, sooner read
    shared.ready[rank] = True

    while stop[0] == GO_ON and (args.max_steps is None or steps.sum() < args.max_steps):
        with turn:
            # Copy the shared weights.
            with torch.no_grad():
                torch._foreach_copy_(parameters, shared_parameters)

            # Act for one rollout, at most to the episode's end.
            first_state, actions, rewards = state, [], []
            observations[0] = observation
            for t in range(args.num_steps):
                action, state = model.act(pictures_of_step[t], state, rng)
                observation, reward, terminated, truncated, _ = env.step(action)
                observations[t + 1] = observation
                actions.append(action)
                rewards.append(max(min(reward, 1.0), -1.0))
                episode_length += 1
                truncated = truncated or episode_length >= args.max_episode_length
                if terminated or truncated:
                    break

            # The value of what the last action led to: zero where the episode ended, as nothing comes after it. One
            # that was merely cut, by the rollout's length or a time limit, would have gone on.
            T = len(rewards)
            bootstrap = 0.0 if terminated else model.value(pictures_of_step[T], state)

            # Learn: the weights have not changed since acting, so a graph made now, of the whole rollout in one batch,
            # gives the gradient that one grown while acting would give, but sooner.
            values, logits = model.unroll([x[:T] for x in pictures], first_state)
            loss, parts = a3c_loss(logits, values, actions, rewards, bootstrap, args)
            # backward() lays each gradient out as its parameter lies in memory, whatever the backend prefers.
            model.zero_grad()
            loss.backward()
            gradients = [parameter.grad for parameter in parameters]

            # Update the shared weights, without a lock.
            norm = torch.nn.utils.get_total_norm(gradients)
            if (loss + norm).isfinite():
                hand_over_gradients(gradients, shared_parameters)
                if norm > args.max_grad_norm:
                    torch.nn.utils.clip_grads_with_norm_(shared_parameters, args.max_grad_norm, norm)
                if args.lr_schedule == "linear":
                    optimizer.param_groups[0]["lr"] = args.lr * max(0.0, 1 - steps.sum() / args.max_steps)
                optimizer.step()
            else:
                shared.dropped[rank] += 1
            steps[rank] += T
            if scalars.due():
                rate = optimizer.param_groups[0]["lr"]
                scalars.add(steps.sum(), **parts, gradient_norm=norm, value=values.mean(), learning_rate=rate)

            if terminated or truncated:
                observation, _ = env.reset()
                state, episode_length = model.initial_state(), 0
