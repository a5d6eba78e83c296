import subprocess
import sys

import pytest
import torch
import torch.multiprocessing as mp
from conftest import ROOT

from model import ActorCritic
from my_optim import SharedAdam, state_size


def set_gradients(model, seed):
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.grad = torch.empty_like(parameter).copy_(
            torch.randn(parameter.shape, generator=generator)
        )


@pytest.mark.parametrize("lr", [1e-4, 1e-2])
def test_shared_adam_is_adam(lr):
    torch.manual_seed(0)
    model, twin = ActorCritic(1, 6), ActorCritic(1, 6)
    twin.load_state_dict(model.state_dict())
    optimizer = SharedAdam(model.parameters(), lr=lr)
    twin_optimizer = torch.optim.Adam(twin.parameters(), lr=lr, fused=True)
    for seed in range(200):
        set_gradients(model, seed)
        set_gradients(twin, seed)
        optimizer.step()
        twin_optimizer.step()
    for parameter, expected in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(parameter, expected)
        for name in "step", "exp_avg", "exp_avg_sq":
            assert torch.equal(
                optimizer.state[parameter][name], twin_optimizer.state[expected][name]
            )


def step_once(model, block, seed):
    set_gradients(model, seed)
    SharedAdam(model.parameters(), block=block).step()


def test_to_make_and_step_an_adam_does_not_import_the_compiler():
    program = """if True:
        import sys, torch
        from my_optim import SharedAdam
        weight = torch.nn.Parameter(torch.zeros(3))
        weight.grad = torch.ones(3)
        SharedAdam([weight]).step()
        assert "torch._dynamo" not in sys.modules and weight.sum() < 0
    """
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True)


def test_processes_advance_one_adam():
    torch.manual_seed(0)
    model, twin = ActorCritic(1, 6).share_memory(), ActorCritic(1, 6)
    twin.load_state_dict(model.state_dict())
    block = torch.zeros(state_size(model.parameters())).share_memory_()
    optimizer = SharedAdam(model.parameters(), block=block)
    twin_optimizer = SharedAdam(twin.parameters())
    for seed in range(2):
        process = mp.get_context("spawn").Process(target=step_once, args=(model, block, seed))
        process.start()
        process.join()
        assert process.exitcode == 0
        set_gradients(twin, seed)
        twin_optimizer.step()
    for parameter, expected in zip(model.parameters(), twin.parameters(), strict=True):
        state, expected_state = optimizer.state[parameter], twin_optimizer.state[expected]
        assert state["step"] == 2
        assert torch.equal(parameter, expected)
        assert torch.equal(state["exp_avg"], expected_state["exp_avg"])
        assert torch.equal(state["exp_avg_sq"], expected_state["exp_avg_sq"])


def test_a_gradient_in_another_memory_order_is_read_right():
    torch.manual_seed(1)
    model, twin = ActorCritic(1, 6), ActorCritic(1, 6).to(memory_format=torch.contiguous_format)
    twin.load_state_dict(model.state_dict())
    optimizer = SharedAdam(model.parameters())
    twin_optimizer = torch.optim.Adam(twin.parameters(), lr=1e-4)
    for parameter, its_twin in zip(model.parameters(), twin.parameters(), strict=True):
        parameter.grad = its_twin.grad = torch.randn(parameter.shape)  # not in channels_last order
    assert model.conv2.weight.grad.stride() != model.conv2.weight.stride()
    optimizer.step()
    twin_optimizer.step()
    for parameter, its_twin in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(parameter.detach().contiguous(), its_twin.detach())
