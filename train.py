"""A training worker: copy the weights, act, bootstrap, update (Mnih et al. 2016, algorithm S3)."""

import random
from argparse import Namespace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from envs import create_atari_env
from harness.checkpoint import valid_statistics
from harness.fit import create_rollout
from harness.shared import SharedState
from harness.workers import CoreTurn
from model import ActorCritic
from my_optim import SharedAdam

WARM_UP = 2000  # updates: 2 / (1 - beta_2), with Adam's beta_2 of 0.999 (Ma and Yarats 2021)


def returns_and_advantages(
    rewards: list[float], values: list[float], bootstrap: float, gamma: float, gae_lambda: float
) -> tuple[list[float], list[float]]:
    """Return R_t and A_t for the rewards r_t and values V_t of a rollout, T of each.

    R_t = r_t + gamma R_{t+1}, with R_T = bootstrap, the value of the observation after the last
    action. A_t is the generalized advantage estimate (Schulman et al. 2016, equation 16):
    delta_t = r_t + gamma V_{t+1} - V_t, with V_T = bootstrap, and A_t = delta_t + gamma lambda
    A_{t+1}. With lambda 1 that is R_t - V_t, with lambda 0 delta_t.
    """
    returns, advantages = [], []
    R, gae, next_value = bootstrap, 0.0, bootstrap
    for reward, value in zip(reversed(rewards), reversed(values), strict=True):
        R = reward + gamma * R
        delta = reward + gamma * next_value - value
        gae = delta + gamma * gae_lambda * gae
        next_value = value
        returns.append(R)
        advantages.append(gae)
    return returns[::-1], advantages[::-1]


def a3c_losses(
    values: Tensor,
    logits: Tensor,
    actions: list[int],
    rewards: list[float],
    bootstrap: float,
    args: Namespace,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return policy loss, value loss and entropy of a rollout, each summed over its T steps.

    Args:
        values: (T,).
        logits: (T, num_actions).
        actions, rewards: T of each.
        bootstrap: the value of the observation after the last action, a constant.
        args: gamma and gae_lambda are read.

    No gradient flows from the policy loss into the values: the advantages are weights there.
    """
    returns, advantages = returns_and_advantages(
        rewards, values.tolist(), bootstrap, args.gamma, args.gae_lambda
    )
    log_probs = F.log_softmax(logits, dim=1)
    chosen = log_probs.gather(1, torch.tensor(actions).unsqueeze(1)).squeeze(1)
    policy_loss = -(chosen * torch.tensor(advantages)).sum()
    value_loss = 0.5 * (torch.tensor(returns) - values).pow(2).sum()
    entropy = -(log_probs.exp() * log_probs).sum()
    return policy_loss, value_loss, entropy


def learning_rate_and_beta(
    args: Namespace, shared: SharedState, optimizer: SharedAdam
) -> tuple[float, float]:
    """Return the present learning rate and weight of the entropy; "linear" ends at zero.

    An agent that a run starts from is not to jump while Adam's moments are those of a few updates:
    the rate rises over the first WARM_UP.
    """
    left = shared.fraction_left(args.max_steps)
    lr = args.lr * (left if args.lr_schedule == "linear" else 1.0)
    if args.init is not None:
        lr *= min(1.0, optimizer.num_updates() / WARM_UP)
    beta = args.entropy_coef * (left if args.entropy_schedule == "linear" else 1.0)
    return lr, beta


def copy_weights(source: ActorCritic, target: ActorCritic) -> None:
    """Copy all weights in place, as `Rollout` keeps views of them."""
    with torch.no_grad():
        torch._foreach_copy_(list(target.parameters()), list(source.parameters()))


def hand_over_gradients(model: ActorCritic, shared_model: ActorCritic) -> None:
    """Make the local gradients those that this process's optimiser finds at the shared weights.

    The weights lie in shared memory. Their `grad` does not: it is an attribute that each process
    has for itself. It is set at every update, as `backward` makes new gradients each time.
    """
    pairs = zip(model.parameters(), shared_model.parameters(), strict=True)
    for parameter, shared_parameter in pairs:
        shared_parameter.grad = parameter.grad


def train(rank: int, args: Namespace, shared: SharedState, run_folder: Path, restarts: int) -> None:
    """Be training worker `rank` until the run ends.

    `shared` is what the paper calls global and shared (harness/shared.py).
    """
    torch.set_num_threads(1)
    rng = random.Random(f"{args.seed}, {rank}, {restarts}")  # no two workers draw the same
    env = create_atari_env(args.env_name, max_episode_length=args.max_episode_length)
    env.unwrapped.statistics = valid_statistics(shared.statistics)
    model = ActorCritic(env.observation_space.shape[0], env.action_space.n)
    optimizer = shared.optimizer(rank)
    rollout = create_rollout(model, env.observation_space.shape, args.num_steps)
    turn = CoreTurn(run_folder, rank)  # waits until a core is this worker's, for two rollouts
    observation, _ = env.reset(seed=rng.randrange(2**31))
    state = model.initial_state()
    shared.ready[rank] = True
    while not shared.is_over(args.max_steps):
        with turn:
            # 1. Copy the shared weights.
            copy_weights(shared.model, model)

            # 2. Act for one rollout, at most to the episode's end; rollout.py asks the network.
            rollout.start(observation, state)
            for _ in range(args.num_steps):
                observation, reward, terminated, truncated, info = env.step(rollout.act(rng))
                rollout.add(max(-1.0, min(reward, 1.0)), observation)  # a clipped reward
                if terminated or truncated:
                    break
            state = rollout.state
            rollout_length = len(rollout.rewards)

            # 3. Bootstrap: zero if the episode ended, as nothing comes after it. If it goes on, or
            # was only truncated by a time limit, the value of what the last action led to.
            values, logits = rollout.values_and_logits()
            bootstrap = 0.0 if terminated else values[-1].item()

            # Compute the local gradients.
            lr, beta = learning_rate_and_beta(args, shared, optimizer)
            policy_loss, value_loss, entropy = a3c_losses(
                values[:-1], logits[:-1], rollout.actions, rollout.rewards, bootstrap, args
            )
            loss = policy_loss + args.value_loss_coef * value_loss - beta * entropy
            model.zero_grad()
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), args.max_grad_norm)

            # 4. Hand them over, and update the shared weights without a lock.
            optimizer.param_groups[0]["lr"] = lr
            if loss.isfinite() and norm.isfinite():
                hand_over_gradients(model, shared.model)
                optimizer.step()
                shared.add_figures(rank, rollout_length, policy_loss, value_loss, entropy, norm, lr)
            else:
                shared.dropped[rank] += 1
            shared.steps[rank] += rollout_length

            if terminated or truncated:
                shared.add_episode(rank, info["episode"]["r"], info["episode"]["l"])
                observation, _ = env.reset()
                state = model.initial_state()
