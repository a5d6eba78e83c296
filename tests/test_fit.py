from types import MethodType

import pytest
import torch
import torch.nn.functional as F
from test_rollout import backend, backends

from harness.fit import create_rollout, difference
from model import ActorCritic
from rollout import PlainRollout, Rollout


def forward_of(activation=F.elu, before_critic=None, before_actor=None, value=None, logits=None):
    """Return what model.py's `forward` is after an edit."""
    same = torch.nn.Identity()

    def forward(self, x, state):
        for conv in list(self.children())[:-3]:  # all layers but the LSTM and the two heads
            x = activation(conv(x))
        hx, cx = self.lstm(x.flatten(1), state)
        values = (value or same)(self.critic_linear((before_critic or same)(hx)))
        return values, (logits or same)(self.actor_linear((before_actor or same)(hx))), (hx, cx)

    def change(model):
        model.forward = MethodType(forward, model)

    return change


def three_convolutions(model):
    del model.conv4
    model.lstm = torch.nn.LSTMCell(32 * 6 * 6, 256)
    forward_of()(model)


def wider_kernels(model):
    for conv in model.conv1, model.conv2:
        conv.weight = torch.nn.Parameter(torch.randn(*conv.weight.shape[:2], 5, 5))
        conv.padding = 2, 2


OTHER_NUMBERS = "values or logits differ"
CHANGES = {
    "relu": (forward_of(F.relu), OTHER_NUMBERS),
    "bounded logits": (forward_of(logits=torch.tanh), OTHER_NUMBERS),
    "capped logits": (forward_of(logits=lambda x: 10 * torch.tanh(x / 10)), OTHER_NUMBERS),
    "bounded value": (forward_of(value=torch.tanh), OTHER_NUMBERS),
    "a layer before the actor": (forward_of(before_actor=torch.tanh), OTHER_NUMBERS),
    "a critic that does not teach the trunk": (
        forward_of(before_critic=torch.Tensor.detach),
        "the gradient of conv1.weight differs",  # all numbers are the same
    ),
    "three convolutions": (three_convolutions, "no attribute 'conv4'"),
    "wider kernels": (wider_kernels, ""),
}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("changed", CHANGES)
@pytest.mark.parametrize("seed", range(3))
def test_a_network_that_rollout_does_not_know_is_learnt_by_the_plain_one(changed, seed):
    change, message = CHANGES[changed]
    torch.manual_seed(seed)
    model, shape = ActorCritic(1, 6), (1, 42, 42)
    assert difference(model, shape) is None
    assert isinstance(create_rollout(model, shape, 20), Rollout)
    change(model)
    assert message in difference(model, shape)
    rollout = create_rollout(model, shape, 20)
    assert isinstance(rollout, PlainRollout)


def wider_convolutions(model):
    model.conv2 = torch.nn.Conv2d(32, 64, 3, stride=2, padding=1)
    model.conv3 = torch.nn.Conv2d(64, 32, 3, stride=2, padding=1)


@pytest.mark.parametrize("num_inputs", [1, 4])
def test_rollout_knows_layers_of_any_size_and_pictures_that_are_stacked(num_inputs):
    model = ActorCritic(num_inputs, 6)
    wider_convolutions(model)
    assert difference(model, (num_inputs, 42, 42)) is None


def test_larger_pictures_are_learnt_by_the_plain_one():
    model = ActorCritic(1, 6)
    with pytest.raises(RuntimeError, match="288"):  # the network's own error
        difference(model, (1, 84, 84))
    model.lstm = torch.nn.LSTMCell(32 * 6 * 6, 256)
    assert isinstance(create_rollout(model, (1, 84, 84), 20), PlainRollout)


@backends
@pytest.mark.parametrize("num_actions", [3, 18])
def test_a_fresh_network_is_known_whatever_its_seed(num_actions, onednn, nnpack):
    for seed in range(10):
        torch.manual_seed(seed)
        with backend(onednn, nnpack):
            assert difference(ActorCritic(1, num_actions), (1, 42, 42)) is None
