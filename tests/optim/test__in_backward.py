import pytest
import torch

from nnx_cli.config import TrainConfig
from nnx_cli.errors import UsageError
from nnx_cli.layers.loss import LossModule
from nnx_cli.optim._build import build_optimizer
from nnx_cli.optim._groups import cast_matrices
from nnx_cli.optim._in_backward import InBackward


def built(model, kind, stored="fp32"):
    cast_matrices(model, stored)
    return build_optimizer(model, TrainConfig(optimizer=kind, lr=1e-3, weight_decay=0.1))


def backward(model, seed):
    ids = torch.randint(64, (2, 9), generator=torch.Generator().manual_seed(seed))
    loss, count = LossModule(model)(ids[:, :-1], ids[:, 1:])
    (loss / count).backward()


@pytest.mark.parametrize("name", ["llama", "nyx", "neon"])  # nyx and neon tie their embedding
@pytest.mark.parametrize("kind", ["adamw", "adamw8bit", "lion", "muon", "wolf"])
def test_equals_the_plain_step_without_clipping(tiny, name, kind):
    plain, model = tiny(name, dim=64), tiny(name, dim=64)
    optimizer, inside = built(plain, kind), built(model, kind)
    handle = InBackward(model, inside, grad_clip=0.0)
    for step in range(3):
        optimizer.zero_grad()
        backward(plain, step)
        wanted = torch.nn.utils.get_total_norm([p.grad for p in plain.parameters()])
        optimizer.step()
        handle.begin()
        backward(model, step)
        norm, bad = handle.finish()
        assert norm == pytest.approx(wanted.item(), rel=1e-5) and bad == 0
    exact = kind != "muon"  # where it multiplies matrices one by one, sums have another order
    for a, b in zip(plain.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0 if exact else 1e-6)


def test_gradients_are_gone_and_only_one_lives_at_a_time(tiny):
    model = tiny("llama")
    handle = InBackward(model, built(model, "adamw"), 1.0)
    alive = []
    for p in model.parameters():
        p.register_post_accumulate_grad_hook(
            lambda _: alive.append(sum(q.grad is not None for q in model.parameters()))
        )
    handle.begin()
    backward(model, 0)
    assert alive == [0] * len(alive) and len(alive) == len(list(model.parameters()))


def test_each_parameter_is_clipped_by_its_own_norm(tiny):
    plain, model = tiny("llama"), tiny("llama")
    optimizer, inside = built(plain, "wolf"), built(model, "wolf")
    handle = InBackward(model, inside, grad_clip=1e-3)
    backward(plain, 0)
    for p in plain.parameters():
        torch.nn.utils.clip_grad_norm_([p], 1e-3)
    optimizer.step()
    handle.begin()
    backward(model, 0)
    for a, b in zip(plain.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("stored", ["fp32", "bf16"])
def test_what_is_not_finite_moves_nothing(tiny, stored):
    model = tiny("llama")
    optimizer = built(model, "adamw", stored)
    handle = InBackward(model, optimizer, 1.0)
    handle.begin()
    backward(model, 0)
    before = [p.detach().clone() for p in model.parameters()]
    spoiled = next(p for p in model.parameters() if p.dim() == 2)
    hook = spoiled.register_hook(lambda g: g * float("nan"))
    handle.begin()
    backward(model, 1)
    norm, bad = handle.finish()
    assert bad == 1 and not norm.isfinite()
    changed = [not torch.equal(old, p) for old, p in zip(before, model.parameters(), strict=True)]
    assert changed == [p is not spoiled for p in model.parameters()]
    hook.remove()
    handle.begin()
    backward(model, 1)
    assert handle.finish()[1] == 0


def test_frozen_and_gradients_that_no_hook_saw(tiny):
    model = tiny("llama")
    optimizer = built(model, "adamw")
    handle = InBackward(model, optimizer, 1.0)
    before = [p.detach().clone() for p in model.parameters()]
    handle.frozen.fill_(1.0)
    handle.begin()
    backward(model, 0)
    handle.finish()
    assert all(torch.equal(old, p) and p.grad is None for old, p in zip(before, model.parameters(), strict=True))
    assert all(fields["step"] == 0 for fields in optimizer.state.values())
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    handle.frozen.zero_()
    handle.finish()
    assert all(p.grad is None for p in model.parameters()), "gradients that no hook saw are taken at the end"
    assert not any(torch.equal(old, p) for old, p in zip(before, model.parameters(), strict=True))


def test_accumulation_is_refused():
    with pytest.raises(UsageError, match="--optimizer-in-backward.*--grad-accum 2"):
        TrainConfig(optimizer_in_backward=True, grad_accum=2)
    TrainConfig(optimizer_in_backward=True, grad_accum=1)


def test_a_loss_scale_is_refused():
    with pytest.raises(UsageError, match="--optimizer-in-backward.*fp16"):
        TrainConfig(optimizer_in_backward=True, precision="fp16")
