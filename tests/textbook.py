"""A3C's worker written the textbook way, plain and obviously right: the fast worker's twin, and its
yardstick.

A graph that grows step by step, losses summed up scalar by scalar, one small kernel after another
in Adam, the screen read in three colours; no batching, no turns, no tricks.
"""

import cv2
import gym
import numpy as np
import torch
import torch.nn.functional as F
from gym import spaces

from envs import AtariEnv, NormalizedObservation
from model import ActorCritic


class ColourScreen(gym.ObservationWrapper):
    """42x42 grey from three colours, resized one by one."""

    def __init__(self, env):
        super().__init__(env)
        self.observation_space = spaces.Box(0.0, 1.0, (1, 42, 42), np.float32)

    def observation(self, observation):
        screen = self.unwrapped.ale.getScreenRGB()
        frame = cv2.resize(cv2.resize(screen[34:194, :160], (80, 80)), (42, 42))
        return frame.mean(axis=2, dtype=np.float32)[np.newaxis] / 255


class Normalized(NormalizedObservation):
    """The same normaliser in numpy."""

    def observation(self, observation):
        mean, std, n = self.unwrapped.statistics
        mean = mean * self.DECAY + observation.mean() * (1 - self.DECAY)
        std = std * self.DECAY + observation.std() * (1 - self.DECAY)
        n += 1
        self.unwrapped.statistics = mean, std, n
        return (observation - mean / (1 - self.DECAY**n)) / (std / (1 - self.DECAY**n) + 1e-8)


def create_env(env_id):
    return Normalized(ColourScreen(AtariEnv(env_id)))


def create_model(num_inputs, num_actions):
    return ActorCritic(num_inputs, num_actions).to(memory_format=torch.contiguous_format)


def loss_of(values, log_probs, entropies, rewards, bootstrap, args):
    """Sum up the losses of a rollout, from lists of (1, 1) tensors, from its last step on."""
    policy_loss, value_loss = 0, 0
    R, gae, next_value = bootstrap, torch.zeros(1, 1), bootstrap
    for value, log_prob, entropy, reward in list(
        zip(values, log_probs, entropies, rewards, strict=True)
    )[::-1]:
        R = reward + args.gamma * R
        value_loss = value_loss + 0.5 * (R - value).pow(2)
        delta = reward + args.gamma * next_value - value.detach()
        gae = delta + args.gamma * args.gae_lambda * gae
        policy_loss = policy_loss - log_prob * gae - args.entropy_coef * entropy
        next_value = value.detach()
    return (policy_loss + args.value_loss_coef * value_loss).sum()


def evaluate_policy(model, observation, state):
    value, logits, state = model(observation.unsqueeze(0), state)
    log_probs = F.log_softmax(logits, dim=1)
    entropy = -(log_probs * log_probs.exp()).sum(dim=1, keepdim=True)
    return value, log_probs, entropy, state


def rollout_gradient(model, observations, state, actions, rewards, terminated, args):
    """Return the gradient of a stored rollout, which has T + 1 observations, as tensors."""
    values, chosen, entropies = [], [], []
    for observation, action in zip(observations[:-1], actions, strict=True):
        value, log_probs, entropy, state = evaluate_policy(model, observation, state)
        values.append(value)
        chosen.append(log_probs[:, action : action + 1])
        entropies.append(entropy)
    bootstrap = torch.zeros(1, 1)
    if not terminated:
        bootstrap = model(observations[-1].unsqueeze(0), state)[0].detach()
    loss = loss_of(values, chosen, entropies, rewards, bootstrap, args)
    return torch.autograd.grad(loss, list(model.parameters()))


def train(rank, args, shared, run_folder, restarts):
    torch.set_num_threads(1)
    seed = args.seed + rank
    optimizer = shared.optimizer(rank)
    optimizer.param_groups[0].update(fused=False, foreach=False)  # one tensor after another
    torch.manual_seed(seed)
    env = create_env(args.env_name)
    model = create_model(env.observation_space.shape[0], env.action_space.n)
    observation, _ = env.reset(seed=seed)
    state, episode_length = model.initial_state(), 0
    shared.ready[rank] = True

    while True:
        model.load_state_dict(shared.model.state_dict())
        state = tuple(s.detach() for s in state)
        values, chosen, entropies, rewards = [], [], [], []
        for _ in range(args.num_steps):
            value, log_probs, entropy, state = evaluate_policy(
                model, torch.from_numpy(observation), state
            )
            action = log_probs.detach().exp().multinomial(1)
            observation, reward, terminated, truncated, _ = env.step(action.item())
            episode_length += 1
            truncated = truncated or episode_length >= args.max_episode_length
            values.append(value)
            chosen.append(log_probs.gather(1, action))
            entropies.append(entropy)
            rewards.append(max(min(reward, 1), -1))
            if terminated or truncated:
                break

        bootstrap = torch.zeros(1, 1)
        if not terminated:
            bootstrap = model(torch.from_numpy(observation).unsqueeze(0), state)[0].detach()
        model.zero_grad()
        loss_of(values, chosen, entropies, rewards, bootstrap, args).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), args.max_grad_norm)
        for parameter, shared_parameter in zip(
            model.parameters(), shared.model.parameters(), strict=True
        ):
            shared_parameter.grad = parameter.grad
        torch.optim.Adam.step(optimizer)  # PyTorch's own
        shared.steps[rank] += len(rewards)

        if terminated or truncated:
            observation, _ = env.reset()
            state, episode_length = model.initial_state(), 0
