import torch

from model import ActorCritic

LISTING = """\
ActorCritic(
  (conv1): Conv2d(1, 32, kernel_size=(3, 3), stride=(2, 2), padding=(1, 1))
  (conv2): Conv2d(32, 32, kernel_size=(3, 3), stride=(2, 2), padding=(1, 1))
  (conv3): Conv2d(32, 32, kernel_size=(3, 3), stride=(2, 2), padding=(1, 1))
  (conv4): Conv2d(32, 32, kernel_size=(3, 3), stride=(2, 2), padding=(1, 1))
  (lstm): LSTMCell(288, 256)
  (critic_linear): Linear(in_features=256, out_features=1, bias=True)
  (actor_linear): Linear(in_features=256, out_features=6, bias=True)
)"""


def test_the_listing_and_the_state_dict_names_are_the_published_ones():
    model = ActorCritic(1, 6)
    assert str(model) == LISTING
    names = ["conv1", "conv2", "conv3", "conv4", "lstm", "critic_linear", "actor_linear"]
    assert list(dict.fromkeys(name.split(".")[0] for name in model.state_dict())) == names
    assert sum(p.numel() for p in model.parameters()) == 588_967


def test_shapes():
    model = ActorCritic(3, 4)
    value, logits, (hx, cx) = model(torch.randn(5, 3, 42, 42), model.initial_state(5))
    assert value.shape == (5, 1)
    assert logits.shape == (5, 4)
    assert hx.shape == cx.shape == (5, 256)


def test_initialization():
    torch.manual_seed(0)
    model = ActorCritic(1, 6)
    torch.testing.assert_close(model.actor_linear.weight.norm(dim=1), torch.full((6,), 0.01))
    torch.testing.assert_close(model.critic_linear.weight.norm(dim=1), torch.ones(1))
    for name, parameter in model.named_parameters():
        assert ("bias" not in name) or not parameter.any(), name
    # Xavier-uniform: uniform within sqrt(6 / (fan_in + fan_out)).
    for conv, fan_in in (model.conv1, 9), (model.conv2, 288):
        limit = (6 / (fan_in + 288)) ** 0.5
        assert 0.95 * limit < conv.weight.abs().max() <= limit
    assert 0.95 / 16 < model.lstm.weight_ih.abs().max() <= 1 / 16  # PyTorch's own


def test_the_same_seed_gives_the_same_weights():
    def weights(seed):
        torch.manual_seed(seed)
        return torch.cat([p.flatten() for p in ActorCritic(1, 6).parameters()])

    assert torch.equal(weights(1), weights(1))
    assert not torch.equal(weights(1), weights(2))


def test_the_first_policy_is_almost_uniform_and_the_state_matters():
    torch.manual_seed(0)
    model = ActorCritic(1, 6)
    observation = torch.randn(1, 1, 42, 42)
    value, logits, state = model(observation, model.initial_state())
    assert (logits.softmax(1) - 1 / 6).abs().max() < 0.01
    assert model(observation, state)[0] != value
