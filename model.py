"""The network: four small convolutions, an LSTM cell, a critic and an actor on top."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

State = tuple[Tensor, Tensor]  # (hx, cx) of the LSTM, each (batch, 256)

HIDDEN_SIZE = 256


class ActorCritic(nn.Module):
    """Policy and value of an observation (num_inputs, 42, 42), with one recurrent trunk."""

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
        self.to(memory_format=torch.channels_last)  # the order that convolutions are fastest in

    @torch.no_grad()
    def _initialize(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        nn.init.zeros_(self.lstm.bias_ih)
        nn.init.zeros_(self.lstm.bias_hh)
        # Tiny logits make the first policy almost uniform: no action is favoured before anything
        # was learnt.
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
