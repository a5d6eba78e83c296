"""A rollout: what a worker has played, and the network's values and logits of it.

`PlainRollout` says what is computed. `Rollout` computes the same at twice the speed: acting needs
no graph, and keeps what the layers put out; as the weights do not change inside a rollout,
learning needs no forward pass of its own, only the backward one, written out below. It fits the
network as model.py has it, whatever the layers' sizes; where it does not (harness/fit.py), as one
has changed model.py, workers use `PlainRollout`. To understand A3C, read that one alone.
"""

import random
from typing import Any

import numpy as np
import torch
from torch import Tensor

from model import HIDDEN_SIZE, ActorCritic, State

MAP_SIZES = (42, 21, 11, 6, 3)  # sides of the observation and of the convolutions' outputs
# The LSTM's gates are i, f, g, o: g = tanh(z), the others sigmoid(z) = (1 + tanh(z / 2)) / 2.
SCALES = np.array([[0.5], [0.5], [1.0], [0.5]], np.float32)
SHIFTS = np.array([[0.5], [0.5], [0.0], [0.5]], np.float32)


class PlainRollout:
    """Consecutive steps of one episode, T of them so far, by way of autograd.

    Attributes:
        actions, rewards: T of each.
        state: the recurrent state before the last observation.
    """

    def __init__(self, model: ActorCritic, max_length: int) -> None:
        self._model = model

    def start(self, observation: np.ndarray, state: State) -> None:
        """Begin with an observation (num_inputs, 42, 42) and the recurrent state before it.

        No gradient flows into that state: backpropagation through time ends where a rollout starts.
        """
        self.actions, self.rewards = [], []
        self._values, self._logits = [], []
        self._observation = observation
        self.state = tuple(part.detach() for part in state)

    def _look(self) -> State:
        """Compute the network for the last observation; return the next recurrent state."""
        observation = torch.from_numpy(self._observation).unsqueeze(0)
        value, logits, state = self._model(observation, self.state)
        self._values.append(value.squeeze(1))
        self._logits.append(logits)
        return state

    def act(self, rng: random.Random) -> int:
        """Sample an action from the policy for the last observation."""
        self.state = self._look()
        policy = self._logits[-1].detach()[0].softmax(dim=0).tolist()
        action = rng.choices(range(len(policy)), policy)[0]
        self.actions.append(action)
        return action

    def add(self, reward: float, observation: np.ndarray) -> None:
        """Append what the last action led to."""
        self.rewards.append(reward)
        self._observation = observation

    def values_and_logits(self) -> tuple[Tensor, Tensor]:
        """Return values (T + 1,) and logits (T + 1, num_actions) of all observations, as a graph.

        The last ones are of the observation after the last action. They are a bootstrap, to be used
        as constants.
        """
        self._look()
        return torch.cat(self._values), torch.cat(self._logits)


class Rollout:
    """`PlainRollout`, but fast.

    Attributes:
        actions, rewards: T of each.
        maps: observations and outputs of the convolutions, (max_length + 1, channels, side, side).
        features: the last of the maps, flattened.
        gates: (max_length + 1, 4, 256), the LSTM's after their nonlinearities.
        hx, cx: (max_length + 2, 256), the recurrent state before observation t.
    """

    def __init__(self, model: ActorCritic, max_length: int) -> None:
        self._model = model
        convs = model.conv1, model.conv2, model.conv3, model.conv4
        self._parameters = [p for layer in (*convs, model.lstm) for p in layer.parameters()]
        # These share memory with the model's parameters, which are to be changed in place only.
        self._convs = [(conv.weight.detach(), conv.bias.detach()) for conv in convs]
        self._w_ih, self._w_hh, self._b_ih, self._b_hh = _as_arrays(model.lstm)
        self._w_actor, self._b_actor = _as_arrays(model.actor_linear)
        n = max_length + 1
        channels = (model.conv1.in_channels, *(conv.out_channels for conv in convs))
        shapes = [(n, c, side, side) for c, side in zip(channels, MAP_SIZES, strict=True)]
        self.maps = [torch.empty(s, memory_format=torch.channels_last) for s in shapes[:-1]]
        self.maps.append(torch.empty(shapes[-1]))  # in the order in which it is flattened below
        self.features = self.maps[-1].flatten(1).numpy()
        self._maps_of_step = [[x[t : t + 1] for x in self.maps] for t in range(n)]
        self._observations = self.maps[0].numpy()
        self.gates = np.empty((n, 4, HIDDEN_SIZE), np.float32)
        self.hx = np.zeros((n + 1, HIDDEN_SIZE), np.float32)
        self.cx = np.zeros((n + 1, HIDDEN_SIZE), np.float32)
        self.actions: list[int] = []
        self.rewards: list[float] = []

    @property
    def state(self) -> State:
        """The recurrent state before the last observation, (hx, cx), each (1, 256)."""
        now = slice(len(self.rewards), len(self.rewards) + 1)
        return torch.from_numpy(self.hx[now].copy()), torch.from_numpy(self.cx[now].copy())

    def start(self, observation: np.ndarray, state: State) -> None:
        """Begin with an observation and the recurrent state before it."""
        self.actions, self.rewards = [], []
        self._observations[0] = observation
        self.hx[0], self.cx[0] = state[0][0], state[1][0]
        self._bias = self._b_ih + self._b_hh

    def _look(self, t: int) -> np.ndarray:
        """Compute and keep what the layers put out for observation t; return hx (256,)."""
        maps = self._maps_of_step[t]
        for (weight, bias), x, y in zip(self._convs, maps[:-1], maps[1:], strict=True):
            # F.elu(conv(x)), into memory that is there.
            torch._C._nn.elu(torch.conv2d(x, weight, bias, stride=2, padding=1), out=y)
        # nn.LSTMCell, by NumPy, as its matrix-vector products are faster than PyTorch's.
        z = self._w_ih.dot(self.features[t])
        z += self._w_hh.dot(self.hx[t])
        z += self._bias
        gates = self.gates[t]
        np.multiply(z.reshape(4, HIDDEN_SIZE), SCALES, out=gates)
        np.tanh(gates, out=gates)
        gates *= SCALES
        gates += SHIFTS
        i, f, g, o = gates
        hx, cx = self.hx[t + 1], self.cx[t + 1]
        np.multiply(f, self.cx[t], out=cx)
        cx += i * g
        np.multiply(o, np.tanh(cx), out=hx)
        return hx

    def act(self, rng: random.Random) -> int:
        """Sample an action from the policy for the last observation."""
        hx = self._look(len(self.rewards))
        logits = self._w_actor.dot(hx) + self._b_actor
        weights = np.exp(logits - logits.max())  # softmax but for the sum, by which choices divides
        action = rng.choices(range(len(logits)), weights.tolist())[0]
        self.actions.append(action)
        return action

    def add(self, reward: float, observation: np.ndarray) -> None:
        """Append what the last action led to."""
        self.rewards.append(reward)
        self._observations[len(self.rewards)] = observation

    def values_and_logits(self) -> tuple[Tensor, Tensor]:
        """Return those of all observations; the gradient of the last ones ends at the two heads."""
        T = len(self.rewards)
        last = torch.from_numpy(self._look(T)[np.newaxis])
        hidden = torch.cat([StoredTrunk.apply(self, T, *self._parameters), last])
        return self._model.critic_linear(hidden).squeeze(1), self._model.actor_linear(hidden)


def _as_arrays(layer: torch.nn.Module) -> list[np.ndarray]:
    return [parameter.detach().numpy() for parameter in layer.parameters()]


def lstm_backward(
    rollout: Rollout, grad_hx: np.ndarray, w_ih: Tensor, w_hh: Tensor
) -> tuple[Tensor, list[Tensor]]:
    """Go back through time from the gradient of the hidden states, (T, 256).

    Returns the gradient of the features, (T, 288), and those of w_ih, w_hh, b_ih and b_hh.
    """
    T = len(grad_hx)
    i, f, g, o = rollout.gates[:T].swapaxes(0, 1)
    tanh_c = np.tanh(rollout.cx[1 : T + 1])
    # With z what goes into the gates, before tanh and sigmoid, and c and h the new state:
    dc_dz = np.stack([g * i * (1 - i), rollout.cx[:T] * f * (1 - f), i * (1 - g * g)], axis=1)
    dh_dz_o = tanh_c * o * (1 - o)
    dh_dc = o * (1 - tanh_c * tanh_c)
    w = w_hh.detach().numpy()
    grad_z = np.empty((T, 4, HIDDEN_SIZE), np.float32)
    grad_c, grad_h = np.float32(0.0), np.float32(0.0)  # what comes from the step after
    for t in reversed(range(T)):
        grad_h = grad_h + grad_hx[t]
        grad_c = grad_c + grad_h * dh_dc[t]
        np.multiply(dc_dz[t], grad_c, out=grad_z[t, :3])
        np.multiply(dh_dz_o[t], grad_h, out=grad_z[t, 3])
        grad_c = grad_c * f[t]
        grad_h = grad_z[t].reshape(-1).dot(w)
    grad_z = torch.from_numpy(grad_z.reshape(T, -1))
    x, hx = torch.from_numpy(rollout.features[:T]), torch.from_numpy(rollout.hx[:T])
    grad_bias = grad_z.sum(dim=0)
    return grad_z @ w_ih.detach(), [grad_z.T @ x, grad_z.T @ hx, grad_bias, grad_bias.clone()]


def convolutions_backward(maps: list[Tensor], grad: Tensor, weights: list[Tensor]) -> list[Tensor]:
    """Go back through F.elu(conv(x)) four times, by the kernels that PyTorch's own graph calls.

    Args:
        maps: the observations (T, num_inputs, 42, 42) and what each convolution made of them.
        grad: the gradient of the last of the maps.
        weights: of the convolutions.

    Returns the gradients of weight and bias of each.
    """
    grads = []
    for n in reversed(range(len(weights))):
        x, y = maps[n], maps[n + 1]
        # alpha, scale and input scale are 1; y is the output
        grad = torch.ops.aten.elu_backward(grad, 1, 1, 1, True, y)
        # bias size, stride, padding, dilation, transposed, output padding, groups, and which
        # gradients are wanted: of x, of the weight, of the bias
        details = [y.shape[1]], [2, 2], [1, 1], [1, 1], False, [0, 0], 1, [n > 0, True, True]
        grad, grad_weight, grad_bias = torch.ops.aten.convolution_backward(
            grad, x, weights[n], *details
        )
        grads = [grad_weight, grad_bias, *grads]
    return grads


class StoredTrunk(torch.autograd.Function):
    """Convolutions and LSTM of a rollout as one node of a graph; acting was its forward pass."""

    @staticmethod
    def forward(ctx: Any, rollout: Rollout, T: int, *parameters: Tensor) -> Tensor:
        """Return the hidden states (T, 256)."""
        ctx.rollout, ctx.parameters = rollout, parameters
        return torch.from_numpy(rollout.hx[1 : T + 1].copy())

    @staticmethod
    def backward(ctx: Any, grad_hx: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of weights and biases, in the order of the parameters."""
        *conv_parameters, w_ih, w_hh, _, _ = ctx.parameters
        grad_features, of_lstm = lstm_backward(ctx.rollout, grad_hx.numpy(), w_ih, w_hh)
        maps = [x[: len(grad_hx)] for x in ctx.rollout.maps]
        weights = conv_parameters[::2]
        of_convs = convolutions_backward(maps, grad_features.view_as(maps[-1]), weights)
        return None, None, *of_convs, *of_lstm
