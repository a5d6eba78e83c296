"""One training worker: copy the shared weights, act, bootstrap, update (Mnih et al. 2016, algorithm S3)."""

import argparse
import random
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from envs import create_atari_env
from model import ActorCritic, State
from my_optim import SharedAdam
from workers import CoreTurn


def worker_seed(seed: int, rank: int) -> int:
    """Return a seed for process `rank` that no other rank, under this or another `--seed`, is likely to have."""
    return int(np.random.SeedSequence((seed, rank)).generate_state(1)[0])


def discounted_returns(rewards: list[float], bootstrap: float, gamma: float) -> list[float]:
    """R_t = r_t + gamma R_{t+1} for the T rewards of a rollout, with R_T = `bootstrap`, the value of its last state."""
    returns, R = [], bootstrap
    for reward in reversed(rewards):
        R = reward + gamma * R
        returns.append(R)
    return returns[::-1]


def generalized_advantages(rewards: list[float], values: list[float], gamma: float, gae_lambda: float) -> list[float]:
    """Generalized advantage estimation, GAE(lambda) (Schulman et al. 2016, equation 16), T of them.

    `values` has one entry more than `rewards`: the bootstrap. delta_t = r_t + gamma V_{t+1} - V_t, and
    gae_t = delta_t + gamma lambda gae_{t+1}; with lambda 1 this is R_t - V_t, with lambda 0 it is delta_t.
    """
    advantages, gae = [], 0.0
    for t in reversed(range(len(rewards))):
        delta = rewards[t] + gamma * values[t + 1] - values[t]
        gae = delta + gamma * gae_lambda * gae
        advantages.append(gae)
    return advantages[::-1]


def a3c_loss(logits: Tensor, values: Tensor, actions: Tensor, rewards: list[float], args: argparse.Namespace) -> Tensor:
    """Loss of one rollout, summed over its T steps: policy gradient, entropy bonus and squared value error.

    Args:
        logits: (T, num_actions). values: (T + 1,), the last one the bootstrap. actions: (T,) int64. rewards: T.
        args: gamma, gae_lambda, entropy_coef and value_loss_coef are read.

    No gradient flows from the policy term into the values (the advantages are weights there), nor into the bootstrap.
    """
    estimates = values.detach().tolist()
    returns = torch.tensor(discounted_returns(rewards, estimates[-1], args.gamma))
    advantages = torch.tensor(generalized_advantages(rewards, estimates, args.gamma, args.gae_lambda))
    log_probs = F.log_softmax(logits, dim=1)
    entropy = -(log_probs.exp() * log_probs).sum(dim=1)
    chosen = log_probs.gather(1, actions.unsqueeze(1)).squeeze(1)
    policy_loss = -(chosen * advantages + args.entropy_coef * entropy).sum()
    value_loss = 0.5 * (returns - values[:-1]).pow(2).sum()
    return policy_loss + args.value_loss_coef * value_loss


def rollout_loss(
    model: ActorCritic,
    pictures: list[Tensor],
    state: State,
    actions: list[int],
    rewards: list[float],
    terminated: bool,
    args: argparse.Namespace,
) -> Tensor:
    """Loss of a rollout that was acted from `state` without a graph: the graph is made here, in one batch.

    The weights do not change inside a rollout, so this is what a graph that grew while acting would give, sooner.
    `pictures` holds T + 1 steps, the last one what the last action led to (its observation only): its value is the
    bootstrap, but zero where the episode ended, as nothing comes after it. An episode that was merely cut, by the
    rollout's length or a time limit, would have gone on.
    """
    model.convolve([x[-1:] for x in pictures])
    values, logits = model.unroll(pictures, state)
    if terminated:
        values = torch.cat([values[:-1], torch.zeros(1)])
    return a3c_loss(logits[:-1], values, torch.tensor(actions), rewards, args)


def hand_over_gradients(parameters: list[Tensor], shared_parameters: list[Tensor]) -> None:
    """Make the local gradients this process's gradients of the shared parameters.

    The shared *parameters* live in shared memory; their `grad` does not, it is an attribute that each process has for
    itself. It must be set at every update: since PyTorch 2.0 `zero_grad` sets gradients to None, so a reference kept
    from the first update would go on pointing at that update's gradient.
    """
    for parameter, shared_parameter in zip(parameters, shared_parameters, strict=True):
        shared_parameter.grad = parameter.grad


def train(
    rank: int,
    args: argparse.Namespace,
    shared_model: ActorCritic,
    optimizer: SharedAdam,
    steps: Tensor,
    ready: Tensor,
    run_folder: Path,
) -> None:
    """Train until all workers together have made `args.max_steps` steps; `steps` (int64) has one slot a worker."""
    torch.set_num_threads(1)
    assert all(p.is_shared() for p in shared_model.parameters()), "the weights must lie in shared memory"
    seed = worker_seed(args.seed, rank)
    rng = random.Random(seed)
    env = create_atari_env(args.env_name)
    model = ActorCritic(env.observation_space.shape[0], env.action_space.n)
    parameters, shared_parameters = list(model.parameters()), list(shared_model.parameters())
    pictures = model.new_pictures(args.num_steps + 1)
    pictures_of_step = [[x[t : t + 1] for x in pictures] for t in range(args.num_steps)]
    observations = pictures[0].numpy()  # the same memory
    observation, _ = env.reset(seed=seed)
    state, episode_length = model.initial_state(), 0
    turn = CoreTurn(run_folder, rank)
    ready[rank] = True

    while args.max_steps is None or steps.sum() < args.max_steps:
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

            # Update the shared weights, without a lock.
            model.zero_grad()
            T = len(rewards)
            pictures_of_rollout = [x[: T + 1] for x in pictures]
            rollout_loss(model, pictures_of_rollout, first_state, actions, rewards, terminated, args).backward()
            norm = torch.nn.utils.get_total_norm([p.grad for p in parameters])
            if norm > args.max_grad_norm:
                torch.nn.utils.clip_grads_with_norm_(parameters, args.max_grad_norm, norm)
            hand_over_gradients(parameters, shared_parameters)
            optimizer.step()
            steps[rank] += T

            if terminated or truncated:
                observation, _ = env.reset()
                state, episode_length = model.initial_state(), 0
