import importlib.util
import math
import os
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from nnx_cli import models
from nnx_cli.kernels import gemm
from nnx_cli.kernels.cross_entropy import plain_cross_entropy_rows
from nnx_cli.kernels.student_t import StudentT
from nnx_cli.layers import loss as loss_module
from nnx_cli.layers.head import as_linear_head
from nnx_cli.layers.linear import Linear
from nnx_cli.layers.loss import ChunkedCrossEntropy, LossModule, chunk_rows, head_loss, head_vocab_size, token_losses
from nnx_cli.layers.unit_norm import ScaledHead
from nnx_cli.models import n4, ngpt, tape
from nnx_cli.system import hardware

D, V = 6, 11
HEADS = {
    "linear": lambda: Linear(D, V),
    "biased": lambda: n4.Biased(Linear(D, V)),
    "scaled": lambda: ScaledHead(D, V),
    "ngpt": lambda: ngpt.Head(ngpt.Config(dim=D, vocab_size=V, n_heads=1)),
    "ngpt, normalised on use": lambda: ngpt.Head(ngpt.Config(dim=D, vocab_size=V, n_heads=1, normalize_on_use=True)),
    "student-t": lambda: tape.StudentT(tape.Config(dim=D, vocab_size=V, n_heads=1)),
    "normal": lambda: tape.StudentT(tape.Config(dim=D, vocab_size=V, n_heads=1, tails="normal")),
}
KERNEL_DEVICE = "cuda" if torch.cuda.is_available() else "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else None


@pytest.fixture(params=[1, 7, 16, 50, 4096], ids=lambda rows: f"chunks of {rows}")
def chunks(request, monkeypatch):
    monkeypatch.setattr(loss_module, "chunk_rows", lambda n_rows, *_, **__: min(n_rows, request.param))
    return request.param


@pytest.fixture(params=HEADS)
def head(request):
    """A linear head of every kind, its parameters random."""
    head = HEADS[request.param]()
    torch.manual_seed(3)
    for parameter in head.parameters():
        nn.init.uniform_(parameter, 0.1, 1.0) if parameter.dim() == 1 else nn.init.normal_(parameter)
    return head


def rows_of(n_rows, dtype=torch.float64):
    """x and targets, every fifth of them to be ignored."""
    torch.manual_seed(4)
    x, targets = torch.randn(n_rows, D, dtype=dtype), torch.randint(V, (n_rows,))
    targets[::5] = -100
    return x.requires_grad_(), targets


def head_of(tied):
    torch.manual_seed(3)
    head = nn.Linear(D, V, bias=False, dtype=torch.float64)
    if tied:
        embedding = nn.Embedding(V, D, dtype=torch.float64)
        head.weight = embedding.weight
        return head, embedding
    return head, None


def test_rows_of_a_chunk():
    assert chunk_rows(100, 256) == 100
    assert chunk_rows(16384, 256) == 4096
    assert chunk_rows(10_000, 256) == 3334, "evened out"
    assert chunk_rows(16384, 50_000) == 256
    assert chunk_rows(16384, 10**7) == 256, "never tiny"
    for n_rows, V in ((1, 2), (4097, 256), (5000, 8192), (123_457, 50_257)):
        rows = chunk_rows(n_rows, V)
        assert 1 <= rows <= 4096 and rows * math.ceil(n_rows / rows) >= n_rows
        assert rows <= 256 or rows * V * 10 <= loss_module.CHUNK_BYTES


def test_a_gpu_takes_more_rows_at_once():
    assert chunk_rows(65_536, 256, 2, "cuda") == 65_536
    assert chunk_rows(4096, 32_000, 2, "cuda") == 4096
    assert chunk_rows(16_384, 50_304, 2, "cuda") == 2048
    assert chunk_rows(100, 10**7, 2, "cuda") == 100


def test_a_small_budget_makes_more_chunks(monkeypatch):
    monkeypatch.setattr(loss_module, "CHUNK_BYTES", 10 * 256 * 512)
    assert chunk_rows(1024, 256) == 512


def test_the_widest_matrix_of_a_head_has_the_vocabulary():
    assert head_vocab_size(nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 33))) == 33


@pytest.mark.parametrize("tied", [False, True])
def test_gradients_are_those_of_finite_differences(chunks, tied):
    head, embedding = head_of(tied)
    ids, targets = torch.randint(11, (9,)), torch.randint(11, (9,))
    targets[4] = -100
    x = torch.randn(9, 6, dtype=torch.float64, requires_grad=True)

    def function(x, weight):
        # the same parameter object must be in the head, as it is in a model
        assert weight is head.weight
        inputs = x if embedding is None else x + embedding(ids)
        return ChunkedCrossEntropy.apply(inputs, targets, head, -100, weight)

    assert torch.autograd.gradcheck(function, (x, head.weight), atol=1e-7)


def test_gradients_of_linear_heads_are_those_of_finite_differences(monkeypatch, head):
    if isinstance(getattr(head, "proj", None), ngpt.UnitLinear):
        pytest.skip("norms are float32; it is the kind before")
    head.double()
    monkeypatch.setattr(loss_module, "chunk_rows", lambda n_rows, *_, **__: 4)
    x, targets = rows_of(9)
    assert as_linear_head(head) is not None
    parameters = tuple(head.parameters())
    assert torch.autograd.gradcheck(lambda x, *_: head_loss(head, x, targets, -100), (x, *parameters), atol=1e-7)


@pytest.mark.parametrize("dtype, rtol", [(torch.float32, 1e-6), (torch.bfloat16, 2e-2), (torch.float16, 3e-3)])
def test_the_fused_loss_equals_the_plain_one(chunks, head, dtype, rtol):
    x, targets = rows_of(23, dtype)
    inputs = [x, *head.parameters()]
    loss = head_loss(head, x, targets, -100)
    wanted = loss_module.summed_loss(head, x.float(), targets, -100)
    grads = torch.autograd.grad(loss * 0.25, inputs)
    plain = torch.autograd.grad(wanted * 0.25, inputs)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, wanted, rtol=rtol, atol=0)
    for grad, expected, tensor in zip(grads, plain, inputs, strict=True):
        assert grad.dtype == tensor.dtype
        assert (grad - expected).norm() <= 2 * rtol * expected.norm()


@pytest.mark.parametrize("name", models.names())
def test_every_architecture_has_a_linear_head_of_its_own_logits(tiny, name):
    model = tiny(name)
    x, targets = torch.randn(5, 32), torch.randint(64, (5,))
    assert as_linear_head(model.head) is not None
    wanted = F.cross_entropy(model.head(x), targets, reduction="sum")
    torch.testing.assert_close(head_loss(model.head, x, targets, -100), wanted)


def test_a_head_that_computes_something_else_is_not_linear():
    class SoftCapped(Linear):
        def forward(self, x):
            return 5 * torch.tanh(super().forward(x) / 5)

    adapted, capped, scaled = Linear(D, V), SoftCapped(D, V), ScaledHead(D, V)
    adapted.add_adapter(2)
    scaled.linear = SoftCapped(D, V)
    nn.init.normal_(adapted.lora_b)
    x, targets = rows_of(7, torch.float32)
    for head in (adapted, capped, scaled, nn.Linear(D, V)):
        assert as_linear_head(head) is None
        torch.testing.assert_close(head_loss(head, x, targets, -100), loss_module.summed_loss(head, x, targets, -100))


def test_distances_are_float32_whatever_the_kernel():
    for tails in ("fixed", "learned", "normal"):
        head = tape.StudentT(tape.Config(dim=D, vocab_size=V, n_heads=1, tails=tails))
        nn.init.normal_(head.weight, std=10.0)
        if head.log_df is not None:
            nn.init.zeros_(head.log_df)
        x, targets = rows_of(7, torch.bfloat16)
        exact = loss_module.summed_loss(head.double(), x.double(), targets, -100)
        loss = head_loss(head.float(), x, targets, -100)
        torch.testing.assert_close(loss.double(), exact, rtol=1e-5, atol=0)
        config = SimpleNamespace(vocab_size=V)
        model = SimpleNamespace(config=config, head=head, ignore_index=-100, trunk=lambda states: states)
        losses = token_losses(model, x.detach()[None], targets[None])
        torch.testing.assert_close(losses.sum().double(), exact.detach(), rtol=1e-5, atol=0)


def test_fp16_keeps_the_gradients_of_unlikely_tokens():
    head = Linear(D, D)
    nn.init.eye_(head.weight)
    x = (14 * torch.eye(D)).half().requires_grad_()  # a token that is not the target has a probability of 8e-7
    (grad,) = torch.autograd.grad(head_loss(head, x, torch.arange(D), -100) * 2.0**16, x)
    unlikely = math.exp(-14) / (1 + (D - 1) * math.exp(-14))
    torch.testing.assert_close(grad[0, 1:].float(), torch.full((D - 1,), unlikely * 2.0**16), rtol=1e-3, atol=0)


@pytest.mark.skipif(KERNEL_DEVICE is None, reason="needs a CUDA GPU, or TRITON_INTERPRET=1")
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")
@pytest.mark.parametrize("n_tokens", [11, 256, 5003])
@pytest.mark.parametrize("kind", ["float32", "bfloat16", "float16", "student-t"])
def test_the_kernel_equals_the_plain_rows(n_tokens, kind):
    from nnx_cli.kernels import cross_entropy_triton

    torch.manual_seed(0)
    dtype = torch.float32 if kind == "student-t" else getattr(torch, kind)
    x, weight = torch.randn(6, 32, device=KERNEL_DEVICE), torch.randn(n_tokens, 32, device=KERNEL_DEVICE)
    targets = torch.randint(n_tokens, (6,), device=KERNEL_DEVICE)
    targets[2] = -100
    logits = torch.empty(6, n_tokens + 5, dtype=dtype, device=KERNEL_DEVICE)[:, :n_tokens].copy_(x @ weight.t())
    student_t = StudentT(2.7, 32, x.square().sum(1), weight.square().sum(1)) if kind == "student-t" else None
    losses, gradient = plain_cross_entropy_rows(logits.clone(), targets, -100, student_t, 1.5, True)
    alone, _ = cross_entropy_triton.cross_entropy_rows(logits.clone(), targets, -100, student_t, 1.5, False)
    fused, in_place = cross_entropy_triton.cross_entropy_rows(logits, targets, -100, student_t, 1.5, True)
    assert in_place is logits
    torch.testing.assert_close(fused, alone, rtol=1e-6, atol=1e-6)  # rows of other widths are summed in another order
    torch.testing.assert_close(fused, losses, rtol=2e-6, atol=1e-5)
    rtol = {torch.float32: 5e-5, torch.bfloat16: 8e-3, torch.float16: 1e-3}[dtype]
    torch.testing.assert_close(in_place, gradient, rtol=rtol, atol=1e-6)
    assert fused[2] == 0 and not in_place[2].any()


@pytest.mark.parametrize("name", ["llama", "nyx"])
def test_train_step_equals_plain_cross_entropy(tiny, chunks, name):
    model = tiny(name)
    ids = torch.randint(64, (3, 17))
    input_ids, targets = ids[:, :-1], ids[:, 1:].clone()
    targets[1, 3:9] = model.ignore_index
    loss, count = LossModule(model)(input_ids, targets)
    (loss * 0.25).backward()
    ours = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    plain = F.cross_entropy(model(input_ids).flatten(0, 1), targets.flatten(), reduction="sum")
    (plain * 0.25).backward()
    assert count == 3 * 16 - 6
    assert loss.item() == pytest.approx(plain.item(), rel=1e-6)
    for grad, parameter in zip(ours, model.parameters(), strict=True):
        torch.testing.assert_close(grad, parameter.grad, rtol=1e-4, atol=1e-5)


def test_a_frozen_head_still_passes_gradients_on(tiny, chunks):
    model = tiny("llama", tie_embeddings=False)
    model.head.weight.requires_grad_(False)
    ids = torch.randint(64, (2, 9))
    loss, _ = LossModule(model)(ids[:, :-1], ids[:, 1:])
    loss.backward()
    assert model.head.weight.grad is None
    assert model.embedding.weight.grad.abs().max() > 0


def test_only_ignored_targets_give_zero(tiny):
    model = tiny()
    ids = torch.randint(64, (2, 8))
    loss, count = LossModule(model)(ids, torch.full_like(ids, model.ignore_index))
    assert loss == 0 and count == 0


def test_low_precision_takes_statistics_in_float32(tiny):
    model = tiny()
    model.compute_dtype = torch.bfloat16
    ids = torch.randint(64, (2, 9))
    loss, count = LossModule(model)(ids[:, :-1], ids[:, 1:])
    assert loss.dtype == torch.float32
    assert (loss / count).item() == pytest.approx(math.log(64), rel=0.1)
    loss.backward()
    assert all(p.grad.dtype == torch.float32 for p in model.parameters())


def test_a_loss_of_the_architectures_own_counts_once_per_target(tiny):
    model = tiny()
    ids = torch.randint(64, (2, 9))
    plain, count = LossModule(model)(ids[:, :-1], ids[:, 1:])
    model.aux_loss = lambda: torch.tensor(0.5)
    loss, _ = LossModule(model)(ids[:, :-1], ids[:, 1:])
    assert (loss - plain).item() == pytest.approx(0.5 * count.item(), rel=1e-4)


@pytest.mark.parametrize("name", ["llama", "tape"])
def test_token_losses_are_those_of_the_full_logits(tiny, chunks, name):
    model = tiny(name).eval()
    ids = torch.randint(64, (3, 12))
    losses = token_losses(model, ids[:, :-1], ids[:, 1:])
    with torch.no_grad():
        wanted = F.cross_entropy(model(ids[:, :-1]).transpose(1, 2), ids[:, 1:], reduction="none")
    assert losses.shape == (3, 11) and losses.dtype == torch.float32 and not losses.requires_grad
    torch.testing.assert_close(losses, wanted)


def test_gradients_of_a_bfloat16_head_are_summed_in_float32(monkeypatch):
    """A thousand equal parts of a sum: in bfloat16 it would stop growing at 256 of them."""
    monkeypatch.setattr(loss_module, "chunk_rows", lambda *_, **__: 1)
    torch.manual_seed(0)
    head = nn.Linear(D, V, bias=False, dtype=torch.bfloat16)
    x, targets = torch.randn(1, D, dtype=torch.bfloat16), torch.tensor([2])

    def gradient(n):
        head.zero_grad()
        ChunkedCrossEntropy.apply(
            x.repeat(n, 1).requires_grad_(), targets.repeat(n), head, -100, head.weight
        ).backward()
        return head.weight.grad.float()

    torch.testing.assert_close(gradient(1000), 1000 * gradient(1), rtol=2**-7, atol=0)


def test_gradients_taken_in_place_are_the_same_and_taken_once():
    head, x = Linear(16, 50), torch.randn(20, 16)
    targets, grads = torch.randint(50, (20,)), []
    for once in (False, True):
        given = x.clone().requires_grad_()
        loss = head_loss(head, given * 1.0, targets, -100, once=once)
        (loss / 20).backward(retain_graph=True)
        grads.append((given.grad.clone(), head.weight.grad.clone()))
        head.weight.grad = None
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(*grads, strict=True))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("shape", [(64, 200), (200, 64)])  # D, V
@pytest.mark.parametrize("known", [True, False])
def test_the_gradient_of_a_large_head_is_that_of_autograd(shape, known, monkeypatch):
    """Where GEMMs are oneDNN's it is summed transposed, chunk by chunk."""
    known = known and torch.backends.mkldnn.is_available()
    monkeypatch.setattr(hardware, "has_onednn", lambda: known)
    monkeypatch.setattr(gemm, "MIN_ROWS", 1)
    monkeypatch.setattr(gemm, "MIN_MULTIPLICATIONS", 1)
    monkeypatch.setattr(loss_module, "chunk_rows", lambda *_, **__: 12)
    width, n_tokens = shape
    torch.manual_seed(5)
    head = Linear(width, n_tokens)
    x, targets = torch.randn(30, width, requires_grad=True), torch.randint(n_tokens, (30,))
    leaves = (x, head.weight)
    wanted = torch.autograd.grad(F.cross_entropy(head(x), targets, reduction="sum"), leaves)
    found = torch.autograd.grad(head_loss(head, x, targets, -100), leaves)
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)
    assert found[1].is_contiguous()
