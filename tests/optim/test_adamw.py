import pytest
import torch
from torch import nn
from torch.optim.adamw import adamw

from nnx_cli.kernels import optimizer_step
from nnx_cli.optim.adamw import AdamW
from nnx_cli.optim.adamw8bit import AdamW8bit

OPTIONS = dict(lr=1e-2, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)


def pair(shape=(3, 700), n=5):
    """The same parameter twice, and gradients for `n` steps of very different sizes."""
    torch.manual_seed(0)
    value = torch.randn(shape)
    gradients = [torch.randn(shape) * torch.logspace(-3, 1, shape[-1]) for _ in range(n)]
    return nn.Parameter(value.clone()), nn.Parameter(value.clone()), gradients


def test_equals_torch_bit_for_bit():
    ours, theirs, gradients = pair()
    a, b = AdamW([ours], **OPTIONS), torch.optim.AdamW([theirs], **OPTIONS, fused=True)
    for g in gradients:
        ours.grad, theirs.grad = g.clone(), g.clone()
        a.step()
        b.step()
    assert torch.equal(ours, theirs)
    assert a.state[ours].keys() == b.state[theirs].keys()
    assert all(torch.equal(a.state[ours][field], b.state[theirs][field]) for field in a.state[ours])


def test_fifty_clipped_and_skipped_steps_equal_the_fused_kernel_bit_for_bit():
    """The kernel, called as the function that torch has for it, with a divisor, is what old runs were made by."""
    ours, theirs, gradients = pair(n=50)
    optimizer = AdamW([ours], **OPTIONS)
    step, m, v = torch.zeros(()), torch.zeros_like(theirs), torch.zeros_like(theirs)
    for i, g in enumerate(gradients):
        if i % 7 == 3:
            g[0, 0] = float("nan")
        ours.grad = g.clone()
        norm = g.norm()
        optimizer.clip(norm, 30.0)
        optimizer.found_inf = 1 - norm.isfinite().float()
        optimizer.step()
        if norm.isfinite():
            with torch.no_grad():
                adamw(
                    *([theirs], [g.clone()], [m], [v], [], [step]),
                    fused=True,
                    grad_scale=((norm + 1e-6) / 30.0).clamp(min=1.0),
                    amsgrad=False,
                    beta1=0.9,
                    beta2=0.95,
                    lr=1e-2,
                    weight_decay=0.1,
                    eps=1e-8,
                    maximize=False,
                )
    state = optimizer.state[ours]
    assert step == state["step"] == 43 and torch.equal(ours, theirs)
    assert torch.equal(state["exp_avg"], m) and torch.equal(state["exp_avg_sq"], v)


@pytest.mark.parametrize("limit", [1e-2, 1e9])
@pytest.mark.parametrize("eight_bit", [False, True])
def test_a_clipped_step_is_the_step_of_a_clipped_gradient(limit, eight_bit):
    ours, theirs, gradients = pair()
    a, b = ((AdamW8bit if eight_bit else AdamW)([p], **OPTIONS) for p in (ours, theirs))
    for g in gradients:
        ours.grad, theirs.grad = g.clone(), g.clone()
        a.clip(g.norm(), limit)
        torch.nn.utils.clip_grad_norm_([theirs], limit)
        a.step()
        b.step()
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)
    ours.grad = gradients[0].clone()
    theirs.grad = gradients[0].clone()
    a.step()  # a limit holds for one step
    b.step()
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)


def test_the_rule_written_out_equals_torch():
    """What bfloat16 weights and 8-bit states go through, with neither."""
    ours, theirs, gradients = pair()
    a, b = AdamW([ours], **OPTIONS), torch.optim.AdamW([theirs], **OPTIONS)
    for i, g in enumerate(gradients):
        ours.grad, theirs.grad = g.clone(), g.clone()
        if i == 0:
            a.step()
        else:
            with torch.no_grad():
                optimizer_step.adamw(ours, a.state[ours], a.param_groups[0], None, a.keys[ours])
                a.count_step([ours], None)
        b.step()
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)
    assert a.state[ours]["step"] == b.state[theirs]["step"] == 5


@pytest.mark.parametrize("n", [1, 2, 20])
def test_eight_bits_stay_near_to_32(n):
    """After the first step nothing was rounded yet; later an update differs by a part of its size, not in its mean."""
    ours, theirs, gradients = pair((16, 1024), n)
    start = ours.detach().clone()
    a, b = AdamW8bit([ours], **OPTIONS), AdamW([theirs], **OPTIONS)
    for g in gradients:
        ours.grad, theirs.grad = g.clone(), g.clone()
        a.step()
        b.step()
    assert a.state[ours]["exp_avg"].dtype == a.state[ours]["exp_avg_sq"].dtype == torch.uint8
    error, moved = (ours - theirs).detach(), (theirs - start).detach()
    if n == 1:
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)
    assert error.square().mean().sqrt() < 0.05 * moved.square().mean().sqrt()
    assert error.mean().abs() < 5 * error.std() / error.numel() ** 0.5 + 1e-7


def test_bfloat16_weights_follow_float32_ones():
    """The error of stochastic rounding grows with the root of the number of steps only."""
    ours, theirs, gradients = pair((16, 1024), 40)
    ours = nn.Parameter(ours.detach().bfloat16())
    theirs = nn.Parameter(ours.detach().float())
    options = OPTIONS | dict(lr=1e-4, weight_decay=0.0)  # every update is below half the distance of most neighbours
    a, b = AdamW([ours], **options), AdamW([theirs], **options)
    start = theirs.detach().clone()
    for g in gradients:
        ours.grad, theirs.grad = g.bfloat16(), g.bfloat16().float()
        a.step()
        b.step()
    error, moved = (ours.float() - theirs).detach(), (theirs - start).detach()
    along = (error * moved).mean() / moved.square().mean()
    assert abs(along) < 0.2, "updates arrive on average; -1: none does"
