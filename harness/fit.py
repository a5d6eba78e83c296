"""Does `Rollout`, the fast one, fit the network of model.py? Where not, `PlainRollout` serves."""

import copy
import random
import warnings

import torch
from torch import Tensor

from harness.utils import complain, reason
from model import ActorCritic
from rollout import PlainRollout, Rollout


def create_rollout(
    model: ActorCritic, shape: tuple[int, ...], max_length: int
) -> Rollout | PlainRollout:
    """Return a `Rollout`, or a `PlainRollout` where that computes another network than `model`.

    Each worker asks for itself: another machine's torch may have other kernels.
    """
    kind = PlainRollout if difference(model, shape) else Rollout
    return kind(model, max_length)


def tell_if_slow(model: ActorCritic, shape: tuple[int, ...]) -> None:
    """Say so in a line if workers will use a `PlainRollout`."""
    what = difference(model, shape)
    if what:
        slow = "workers use autograd, at half the speed"
        complain(f"rollout.py does not know the network of model.py ({what}): {slow}")


def difference(model: ActorCritic, shape: tuple[int, ...], T: int = 3) -> str | None:
    """Return what `Rollout` computes otherwise than `model` does, None if nothing.

    They are compared on T made-up steps and a bootstrap.
    """
    draw = torch.Generator().manual_seed(0)
    observations = torch.randn(T + 1, *shape, generator=draw)
    model = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():  # all that a fresh network computes is nearly linear
            parameter += 0.1 * torch.randn(parameter.shape, generator=draw)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # more would wait for each other where other runs keep the cores busy
    try:
        theirs = _play(PlainRollout(model, T), model, observations)
        try:
            with warnings.catch_warnings(action="ignore"):  # of maps that have another size
                ours = _play(Rollout(model, T), model, observations)
            return _compare(theirs, ours, model)
        except Exception as error:  # something has another shape, or another name
            return reason(error)
    finally:
        torch.set_num_threads(threads)


def _play(rollout: Rollout | PlainRollout, model: ActorCritic, observations: Tensor) -> Tensor:
    """Return values and logits of the observations, (T + 1, 1 + num_actions)."""
    rollout.start(observations[0].numpy(), model.initial_state())
    for observation in observations[1:]:
        rollout.act(random.Random(0))
        rollout.add(0.0, observation.numpy())
    values, logits = rollout.values_and_logits()
    return torch.cat([values.unsqueeze(1), logits], dim=1)


def _compare(theirs: Tensor, ours: Tensor, model: ActorCritic) -> str | None:
    if not torch.allclose(theirs, ours, rtol=1e-3, atol=1e-5):
        return "values or logits differ"
    names, parameters = zip(*model.named_parameters(), strict=True)
    gradients = [torch.autograd.grad(x[:-1].sum(), parameters) for x in (theirs, ours)]
    for name, a, b in zip(names, *gradients, strict=True):
        if not torch.allclose(a, b, rtol=1e-3, atol=1e-4):
            return f"the gradient of {name} differs"
    return None
