"""The network: four convolutions, one LSTM cell, a critic and an actor on top (Mnih et al. 2016, section 5.1)."""

import random
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

State = tuple[Tensor, Tensor]  # (hx, cx) of the LSTM, each (batch, 256)

HIDDEN_SIZE = 256


class StoredConvolutions(torch.autograd.Function):
    """The convolutions of a rollout, as part of a graph: acting has kept their outputs, so only `backward` has work.

    With 16 processes on 2 cores this makes 6 % more steps/s.
    """

    @staticmethod
    def forward(ctx: Any, pictures: list[Tensor], *parameters: Tensor) -> Tensor:
        """Return the features (T, 288); `pictures` is filled in (see `ActorCritic.convolve`)."""
        ctx.pictures, ctx.weights = pictures, parameters[::2]
        return pictures[-1].flatten(1)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of weight and bias of each convolution, by PyTorch's own kernels."""
        gradients, gradient = [], gradient.view_as(ctx.pictures[-1])
        for i in reversed(range(len(ctx.weights))):
            x, y = ctx.pictures[i : i + 2]
            gradient = torch.ops.aten.elu_backward(gradient, 1, 1, 1, True, y)
            gradient, *of_parameters = torch.ops.aten.convolution_backward(
                gradient, x, ctx.weights[i], [y.shape[1]], [2, 2], [1, 1], [1, 1], False, [0, 0], 1, [i > 0, True, True]
            )
            gradients = of_parameters + gradients
        return None, *gradients


class ActorCritic(nn.Module):
    """Policy and value of an observation (num_inputs, 42, 42), with one recurrent trunk for both."""

    def __init__(self, num_inputs: int, num_actions: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(num_inputs, 32, 3, stride=2, padding=1)  # 42 -> 21
        self.conv2 = nn.Conv2d(32, 32, 3, stride=2, padding=1)  # 21 -> 11
        self.conv3 = nn.Conv2d(32, 32, 3, stride=2, padding=1)  # 11 -> 6
        self.conv4 = nn.Conv2d(32, 32, 3, stride=2, padding=1)  # 6 -> 3
        self.lstm = nn.LSTMCell(32 * 3 * 3, HIDDEN_SIZE)
        self.critic_linear = nn.Linear(HIDDEN_SIZE, 1)
        self.actor_linear = nn.Linear(HIDDEN_SIZE, num_actions)
        self._initialize()
        self.to(memory_format=torch.channels_last)  # features of one observation: 98 instead of 155 us
        # Acting makes ten tiny calls a step: calling a layer as a module would add 15 % to the kernels' time.
        self._convs = [(conv.weight, conv.bias) for conv in (self.conv1, self.conv2, self.conv3, self.conv4)]
        self._lstm = list(self.lstm.parameters())
        self._critic = self.critic_linear.weight, self.critic_linear.bias
        self._actor = self.actor_linear.weight, self.actor_linear.bias

    @torch.no_grad()
    def _initialize(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        nn.init.zeros_(self.lstm.bias_ih)
        nn.init.zeros_(self.lstm.bias_hh)
        # Tiny logits make the first policy almost uniform: no action is favoured before anything was learnt.
        for head, norm in (self.actor_linear, 0.01), (self.critic_linear, 1.0):
            head.weight.mul_(norm / head.weight.norm(dim=1, keepdim=True))

    def initial_state(self, batch_size: int = 1) -> State:
        """Return the recurrent state at an episode's start: zeros."""
        return torch.zeros(batch_size, HIDDEN_SIZE), torch.zeros(batch_size, HIDDEN_SIZE)

    def forward(self, observation: Tensor, state: State) -> tuple[Tensor, Tensor, State]:
        """Look at one step's observations, (batch, num_inputs, 42, 42).

        Returns the values (batch, 1), the logits (batch, num_actions) and the next recurrent state.
        """
        x = F.elu(self.conv1(observation))
        x = F.elu(self.conv2(x))
        x = F.elu(self.conv3(x))
        x = F.elu(self.conv4(x))
        hx, cx = self.lstm(x.flatten(1), state)
        return self.critic_linear(hx), self.actor_linear(hx), (hx, cx)

    # What follows is `forward` again, in two halves, for the training loop: acting needs no graph, and learning sees a
    # whole rollout at once.

    def new_pictures(self, num_steps: int) -> list[Tensor]:
        """Return memory for (num_steps, num_inputs, 42, 42) observations and for the convolutions' outputs."""
        sizes = (self.conv1.in_channels, 42), (32, 21), (32, 11), (32, 6), (32, 3)
        return [torch.empty(num_steps, c, side, side, memory_format=torch.channels_last) for c, side in sizes]

    @torch.no_grad()
    def convolve(self, pictures: list[Tensor]) -> Tensor:
        """Fill in pictures[1:] with what the convolutions make of the observations pictures[0]; return (batch, 288)."""
        for (weight, bias), x, y in zip(self._convs, pictures, pictures[1:], strict=False):
            torch._C._nn.elu(torch.conv2d(x, weight, bias, stride=2, padding=1), out=y)
        return pictures[-1].flatten(1)

    @torch.no_grad()
    def act(self, pictures: list[Tensor], state: State, rng: random.Random) -> tuple[int, State]:
        """Sample an action from the policy for one observation, pictures[0]; return it and the next state."""
        hx, cx = torch.lstm_cell(self.convolve(pictures), state, *self._lstm)
        probabilities = torch.softmax(F.linear(hx, *self._actor), dim=1)[0].tolist()
        return rng.choices(range(len(probabilities)), probabilities)[0], (hx, cx)

    @torch.no_grad()
    def value(self, pictures: list[Tensor], state: State) -> float:
        """Return the critic's value of one observation, pictures[0]."""
        hx, _ = torch.lstm_cell(self.convolve(pictures), state, *self._lstm)
        return F.linear(hx, *self._critic).item()

    def unroll(self, pictures: list[Tensor], state: State) -> tuple[Tensor, Tensor]:
        """Look at T consecutive observations of one episode, starting from `state`; all `pictures` are filled in.

        Returns the values (T,) and the logits (T, num_actions): what T calls of `forward` give, but faster: the
        convolutions see a batch and the LSTM one sequence.
        """
        hx, cx = (s.unsqueeze(0) for s in state)
        parameters = (parameter for conv in self._convs for parameter in conv)
        sequence = StoredConvolutions.apply(pictures, *parameters).unsqueeze(1)  # (T, batch of 1, 288)
        hidden, _, _ = torch.lstm(sequence, (hx, cx), self._lstm, True, 1, 0.0, self.training, False, False)
        hidden = hidden.squeeze(1)
        return F.linear(hidden, *self._critic).squeeze(1), F.linear(hidden, *self._actor)
