import math

import pytest
import torch
from torch import nn

from nnx_cli.config import TrainConfig
from nnx_cli.layers.loss import LossModule
from nnx_cli.optim._build import build_optimizer
from nnx_cli.optim._state import load_optimizer_state, optimizer_state
from nnx_cli.optim.wolf import Wolf


def plain_step(p, g, state, lr):
    """As the specification writes it."""
    keep = 1 - 1 / math.e
    u = state * keep + g / math.e
    return torch.where(torch.sign(u) == torch.sign(g), p - lr * u, p), state * keep + u / math.e


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equals_a_step_written_out(dtype):
    torch.manual_seed(0)
    parameters = [nn.Parameter(torch.randn(shape).to(dtype)) for shape in ((3, 5), (7,))]
    optimizer = Wolf(parameters, lr=0.3)
    states = [torch.zeros_like(p, dtype=torch.float32) for p in parameters]
    disagreed = 0
    for _ in range(6):
        wanted = []
        for i, p in enumerate(parameters):
            p.grad = torch.randn_like(p)
            old = p.detach().float()
            new, states[i] = plain_step(old, p.grad.float(), states[i], 0.3)
            disagreed += int((new == old).sum())
            wanted.append(new)
        optimizer.step()
        for p, new, state in zip(parameters, wanted, states, strict=True):
            torch.testing.assert_close(optimizer.state[p]["momentum"], state)
            rtol = 1e-6 if dtype == torch.float32 else 2**-7  # of bfloat16: one of two neighbours
            torch.testing.assert_close(p.detach().float(), new, rtol=rtol, atol=1e-6)
    assert disagreed > 10, "some gradients must have opposed the momentum"


def test_tiny_numbers_keep_their_sign():
    p = nn.Parameter(torch.zeros(2))
    p.grad = torch.tensor([1e-30, -1e-30])
    Wolf([p], lr=1.0).step()
    assert p[0] < 0 < p[1]


def test_weight_decay_shrinks_and_parameters_without_gradient_stay():
    p, idle = nn.Parameter(torch.ones(2, 2)), nn.Parameter(torch.ones(2))
    p.grad = torch.zeros(2, 2)
    Wolf([p, idle], lr=0.5, weight_decay=0.1).step()
    torch.testing.assert_close(p.detach(), torch.full((2, 2), 0.95))
    assert torch.equal(idle.detach(), torch.ones(2))


def take_steps(model, optimizer, n, seed=0):
    torch.manual_seed(seed)
    for _ in range(n):
        ids = torch.randint(64, (2, 9))
        loss, count = LossModule(model)(ids[:, :-1], ids[:, 1:])
        optimizer.zero_grad()
        (loss / count).backward()
        optimizer.step()


def test_state_survives_a_round_trip(tiny):
    config = TrainConfig(optimizer="wolf", lr=0.1, weight_decay=0.0)
    model, twin = tiny("llama"), tiny("llama")
    optimizer = build_optimizer(model, config)
    take_steps(model, optimizer, 3)
    state = {key: value.clone() for key, value in optimizer_state(optimizer, model).items()}
    assert state.keys() == {f"{name}.momentum" for name, _ in model.named_parameters()}
    twin.load_state_dict(model.state_dict())
    other = build_optimizer(twin, config)
    load_optimizer_state(other, twin, state)
    take_steps(model, optimizer, 3, seed=1)
    take_steps(twin, other, 3, seed=1)
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(a, b)


def test_learns(tiny):
    model = tiny("tape")
    optimizer = build_optimizer(model, TrainConfig(optimizer="wolf", lr=0.3678, weight_decay=0.0))
    ids = torch.randint(64, (2, 17), generator=torch.Generator().manual_seed(0))
    losses = []
    for _ in range(60):
        loss, count = LossModule(model)(ids[:, :-1], ids[:, 1:])
        optimizer.zero_grad()
        (loss / count).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append((loss / count).item())
    assert losses[-1] < 0.5 * losses[0]
