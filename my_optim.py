"""Adam whose state all processes share: PyTorch would make it lazily, in each process its own."""

import inspect
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn


class SharedAdam(torch.optim.Adam):
    """`torch.optim.Adam` with moments and step counts made at once, in shared memory.

    `block` is that memory, (state_size(params),), zeros at first; if None, it is made.

    Workers step it without a lock (Hogwild, Recht et al. 2011), so now and then an increment of
    the step count is lost: a few in 100,000, which moves Adam's bias correction and the warm-up of
    --init by less than can be measured.
    """

    def __init__(
        self, params: Iterable[nn.Parameter], lr: float = 1e-4, block: Tensor | None = None
    ) -> None:
        super().__init__(params, lr=lr, fused=True)
        params = self.param_groups[0]["params"]
        if block is None:  # one for all: each costs every process a file descriptor
            block = torch.zeros(state_size(params)).share_memory_()
        parts = iter(block.split([size for p in params for size in (1, p.numel(), p.numel())]))
        for p in params:
            # The fused kernel runs through memory: moments must have the parameter's strides, not
            # only its shape.
            self.state[p] = {
                "step": next(parts).view(()),
                "exp_avg": next(parts).as_strided(p.shape, p.stride()),
                "exp_avg_sq": next(parts).as_strided(p.shape, p.stride()),
            }

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add it, as Adam does when it is made, without importing PyTorch's compiler.

        That is 800 modules and 1.1 s in each process, only to keep the compiler from doing harm.
        """
        inspect.unwrap(torch.optim.Adam.add_param_group)(self, param_group)

    def num_updates(self) -> int:
        """Return how many updates the moments have seen."""
        return int(next(iter(self.state.values()))["step"])

    @torch.no_grad()
    def step(self) -> None:
        """Update the parameters from their gradients, by the kernel of `Adam(fused=True)`.

        The public way to it, `torch.optim.Adam.step`, takes as long again as the kernel, and
        imports the compiler, too.
        """
        group = self.param_groups[0]
        params, states = group["params"], self.state.values()
        steps = [state["step"] for state in states]
        exp_avgs = [state["exp_avg"] for state in states]
        exp_avg_sqs = [state["exp_avg_sq"] for state in states]
        gradients = [_laid_out_like(p, p.grad) for p in params]
        beta1, beta2 = group["betas"]
        torch._foreach_add_(steps, 1)
        torch._fused_adam_(
            *(params, gradients, exp_avgs, exp_avg_sqs, [], steps),
            lr=group["lr"],
            beta1=beta1,
            beta2=beta2,
            eps=group["eps"],
            weight_decay=0.0,
            amsgrad=False,
            maximize=False,
        )


def state_size(params: Iterable[nn.Parameter]) -> int:
    """Return how many numbers `SharedAdam` keeps: a step count and two moments a parameter."""
    return sum(1 + 2 * p.numel() for p in params)


def _laid_out_like(parameter: Tensor, gradient: Tensor) -> Tensor:
    """Return `gradient` with the parameter's strides, copied if it has others.

    The fused kernel runs through memory and asks nothing: another layout would give each weight
    another's gradient.
    """
    if gradient.stride() == parameter.stride():
        return gradient
    return torch.empty_like(parameter).copy_(gradient)
