import itertools
import math

import pytest
import torch
from torch import nn

from nnx_cli.optim import muon
from nnx_cli.optim.adamw import AdamW
from nnx_cli.optim.muon import STACK_BYTES, Muon, orthogonalize, step_type
from nnx_cli.system import hardware

JORDAN = ((3.4445, -4.7750, 2.0315),) * 5  # what torch.optim.Muon takes at every step


@pytest.mark.parametrize("shape", [(32, 32), (24, 100), (100, 24)])
def test_singular_values_become_one(shape):
    """Those above a thousandth of the norm; singular vectors stay."""
    torch.manual_seed(0)
    small = min(shape)
    u, v = (torch.linalg.qr(torch.randn(3, n, small, dtype=torch.float64))[0] for n in shape)
    matrices = ((u * torch.logspace(0, -2.5, small, dtype=torch.float64)) @ v.mT).float() * 37.0
    got = orthogonalize(matrices, torch.float32)
    values = (u.mT.float() @ got @ v.float()).diagonal(dim1=1, dim2=2)
    assert values.min() > 0.85 and values.max() < 1.15
    torch.testing.assert_close(u.float() * values[:, None, :] @ v.mT.float(), got, rtol=0, atol=2e-3)
    roughly = orthogonalize(matrices, torch.bfloat16).float()
    assert (roughly - got).norm() < 0.1 * got.norm()
    assert torch.isfinite(orthogonalize(torch.zeros(1, *shape), torch.bfloat16)).all()


@pytest.mark.parametrize("shape", [(32, 32), (24, 100), (100, 24)])
def test_matrices_one_by_one_are_as_in_a_stack(monkeypatch, shape):
    torch.manual_seed(0)
    matrices = torch.randn(3, *shape)
    stacked = orthogonalize(matrices, torch.float32)
    seen = []
    monkeypatch.setattr(muon, "LEAST_APART", 1)
    monkeypatch.setattr(muon, "prefers_onednn", lambda x, weight: True)
    monkeypatch.setattr(hardware, "has_onednn", lambda: True)
    monkeypatch.setattr(muon, "onednn_linear", lambda x, weight: seen.append(x) or x @ weight.t())
    torch.testing.assert_close(orthogonalize(matrices, torch.float32), stacked, rtol=1e-4, atol=1e-5)
    of_one = 3 * 5 if shape == (32, 32) else 2 + 5 + 3 * 4  # GEMMs: with x, squares, and between steps
    assert len(seen) == 3 * of_one


@pytest.mark.parametrize("rank", [4, 24])
@pytest.mark.parametrize("shape", [(24, 100), (100, 24), (24, 48), (24, 47)])
def test_wide_matrices_come_out_as_by_the_iteration_in_float64(shape, rank):
    """By their small side or not; also where most singular values are as good as zero."""
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(3, *size, generator=generator) for size in ((shape[0], rank), (rank, shape[1])))
    matrices = left @ right + 1e-5 * torch.randn(3, *shape, generator=generator)
    wanted = orthogonalize(matrices.double(), torch.float64)
    assert (orthogonalize(matrices, torch.float32) - wanted).norm() < 1e-3 * wanted.norm()


@pytest.mark.parametrize("wrong", [3.0, 1e30, float("nan")])
@pytest.mark.parametrize(("dtype", "rows", "name"), [(torch.bfloat16, 32, "baddbmm"), (torch.float32, 16, "bmm")])
def test_a_matrix_whose_product_came_out_wrong_is_left_out(dtype, rows, name, wrong, monkeypatch):
    """A factor of three early on: from there the iteration diverges. Also where it is by the small side alone."""
    matrices, product, calls = torch.randn(3, rows, 48), getattr(torch, name), itertools.count()
    right = orthogonalize(matrices, dtype)

    def once_wrong(*args, **kwargs):
        out = product(*args, **kwargs)
        if next(calls) == 3:
            out[1] *= wrong
        return out

    monkeypatch.setattr(torch, name, once_wrong)
    got = orthogonalize(matrices, dtype)
    assert got[[0, 2]].equal(right[[0, 2]]) and right[1].any() and not got[1].any()


def test_a_weight_whose_update_came_out_wrong_decays_alone(monkeypatch):
    weight = torch.nn.Parameter(torch.randn(16, 16))
    optimizer = Muon([{"params": [weight], "orthogonal": True}], 0.01, weight_decay=0.5)
    monkeypatch.setattr(muon, "SHORTER", ((3.0, 0.0, 0.0),) * 5)
    weight.grad, before = torch.randn(16, 16), weight.detach().clone()
    optimizer.step()
    torch.testing.assert_close(weight.detach(), before * (1 - 0.01 * 0.5))


def test_arithmetic_on_a_processor_is_float32():
    assert step_type(torch.zeros(1)) == torch.float32


def test_follows_torch_muon(monkeypatch):
    """With its coefficients and scale. Torch computes in bfloat16, so the updates differ by parts of a hundred."""
    monkeypatch.setattr(muon, "SHORTER", JORDAN)
    monkeypatch.setattr(muon, "MARGIN", 1.0)
    torch.manual_seed(0)
    ours = [nn.Parameter(torch.randn(shape)) for shape in ((48, 32), (48, 32), (32, 48), (16, 16))]
    theirs = [nn.Parameter(p.detach().clone()) for p in ours]
    options = dict(lr=1e-2, weight_decay=0.1)
    a = Muon([{"params": ours, "orthogonal": True}], **options, momentum=0.95)
    b = torch.optim.Muon(theirs, **options, momentum=0.95, adjust_lr_fn="match_rms_adamw")
    start = [p.detach().clone() for p in ours]
    for _ in range(4):
        for p, q in zip(ours, theirs, strict=True):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        a.step()
        b.step()
    for p, q, old in zip(ours, theirs, start, strict=True):
        torch.testing.assert_close(a.state[p]["momentum"], b.state[q]["momentum_buffer"], rtol=1e-5, atol=1e-6)
        assert (p - q).norm() < 0.02 * (p - old).norm()


def test_an_update_has_the_size_of_adams():
    """Its root mean square is 0.2 of the learning rate, for any shape."""
    torch.manual_seed(0)
    for shape in ((64, 64), (16, 256), (256, 16)):
        p = nn.Parameter(torch.zeros(shape))
        p.grad = torch.randn(shape) * 1e-4
        Muon([{"params": [p], "orthogonal": True}], lr=1.0).step()
        assert p.detach().square().mean().sqrt() == pytest.approx(0.2, rel=0.1)


def test_packed_projections_are_taken_apart():
    torch.manual_seed(0)
    packed = nn.Parameter(torch.randn(40, 16))
    parts = [nn.Parameter(part.detach().clone()) for part in packed.split((24, 8, 8))]
    packed.grad = torch.randn(40, 16)
    for part, g in zip(parts, packed.grad.split((24, 8, 8)), strict=True):
        part.grad = g.clone()
    whole = nn.Parameter(packed.detach().clone())
    whole.grad = packed.grad.clone()
    Muon([{"params": [packed], "orthogonal": True}], lr=0.1, splits={packed: (24, 8, 8)}).step()
    Muon([{"params": parts, "orthogonal": True}], lr=0.1).step()
    Muon([{"params": [whole], "orthogonal": True}], lr=0.1).step()
    torch.testing.assert_close(packed, torch.cat([part.detach() for part in parts]), rtol=1e-5, atol=1e-6)
    assert (packed - whole).abs().max() > 1e-3


def test_stacks_hold_one_shape_and_bounded_bytes():
    with torch.device("meta"):
        parameters = [nn.Parameter(torch.empty(768, 768)) for _ in range(40)]
        parameters += [nn.Parameter(torch.empty(4096, 4096)) for _ in range(2)] + [nn.Parameter(torch.empty(2, 768))]
    optimizer = Muon([{"params": parameters, "orthogonal": True}], lr=1.0, splits={parameters[0]: (256, 512)})
    stacks = list(optimizer.stacks(parameters))
    rows = [(matrix.p, row) for stack in stacks for matrix in stack for row in (matrix.first, matrix.last - 1)]
    assert len(rows) == len(set(rows)) == 2 * (39 + 2 + 2 + 1)
    for stack in stacks:
        (shape,) = {matrix.shape for matrix in stack}
        assert len(stack) == 1 or 4 * len(stack) * math.prod(shape) <= STACK_BYTES
    assert max(map(len, stacks)) > 10


def test_all_else_goes_to_adamw():
    torch.manual_seed(0)
    ours, theirs = nn.Parameter(torch.randn(9, 5)), None
    theirs = nn.Parameter(ours.detach().clone())
    options = dict(lr=1e-2, betas=(0.9, 0.95), weight_decay=0.1)
    a, b = Muon([ours], **options), AdamW([theirs], **options)
    for _ in range(3):
        ours.grad = torch.randn(9, 5)
        theirs.grad = ours.grad.clone()
        a.step()
        b.step()
    assert torch.equal(ours, theirs)
