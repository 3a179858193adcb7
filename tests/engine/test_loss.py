import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from nnx_cli.engine import loss as loss_module
from nnx_cli.engine.loss import ChunkedHeadLoss, TrainStep, chunk_rows, head_vocab_size, token_losses


@pytest.fixture(params=[1, 7, 16, 50, 4096], ids=lambda rows: f"chunks of {rows}")
def chunks(request, monkeypatch):
    monkeypatch.setattr(loss_module, "chunk_rows", lambda n_rows, vocab_size: min(n_rows, request.param))
    return request.param


def head_of(tied, D=6, V=11):
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
        return ChunkedHeadLoss.apply(inputs, targets, head, -100, weight)

    assert torch.autograd.gradcheck(function, (x, head.weight), atol=1e-7)


@pytest.mark.parametrize("name", ["llama", "nyx"])
def test_train_step_equals_plain_cross_entropy(tiny, chunks, name):
    model = tiny(name)
    ids = torch.randint(64, (3, 17))
    input_ids, targets = ids[:, :-1], ids[:, 1:].clone()
    targets[1, 3:9] = model.ignore_index
    loss, count = TrainStep(model)(input_ids, targets)
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
    loss, _ = TrainStep(model)(ids[:, :-1], ids[:, 1:])
    loss.backward()
    assert model.head.weight.grad is None
    assert model.embedding.weight.grad.abs().max() > 0


def test_only_ignored_targets_give_zero(tiny):
    model = tiny()
    ids = torch.randint(64, (2, 8))
    loss, count = TrainStep(model)(ids, torch.full_like(ids, model.ignore_index))
    assert loss == 0 and count == 0


def test_low_precision_takes_statistics_in_float32(tiny):
    model = tiny()
    model.compute_dtype = torch.bfloat16
    ids = torch.randint(64, (2, 9))
    loss, count = TrainStep(model)(ids[:, :-1], ids[:, 1:])
    assert loss.dtype == torch.float32
    assert (loss / count).item() == pytest.approx(math.log(64), rel=0.1)
    loss.backward()
    assert all(p.grad.dtype == torch.float32 for p in model.parameters())


def test_a_loss_of_the_architectures_own_counts_once_per_target(tiny):
    model = tiny()
    ids = torch.randint(64, (2, 9))
    plain, count = TrainStep(model)(ids[:, :-1], ids[:, 1:])
    model.aux_loss = lambda: torch.tensor(0.5)
    loss, _ = TrainStep(model)(ids[:, :-1], ids[:, 1:])
    assert (loss - plain).item() == pytest.approx(0.5 * count.item(), rel=1e-4)


def test_token_losses_are_those_of_the_full_logits(tiny, chunks):
    model = tiny("llama").eval()
    ids = torch.randint(64, (3, 12))
    losses = token_losses(model, ids[:, :-1], ids[:, 1:])
    with torch.no_grad():
        wanted = F.cross_entropy(model(ids[:, :-1]).transpose(1, 2), ids[:, 1:], reduction="none")
    assert losses.shape == (3, 11) and losses.dtype == torch.float32 and not losses.requires_grad
    torch.testing.assert_close(losses, wanted)
