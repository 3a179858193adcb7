"""Dropout with 16 random bits an element: as likely as asked, drawn anew, the same after the same seed."""

import pytest
import torch
import torch.nn.functional as F

from nnx_cli.kernels import dropout
from nnx_cli.layers import attention


@pytest.mark.parametrize("p", [0.1, 0.5, 0.999])
def test_elements_are_dropped_as_often_as_asked(p):
    torch.manual_seed(0)
    x = torch.ones(1001, 997)
    y = dropout.dropout(x, p, training=True)
    share = (y == 0).double().mean().item()
    assert abs(share - p) < 5 * (p * (1 - p) / x.numel()) ** 0.5 + 2**-16
    torch.testing.assert_close(y.double().mean(), torch.tensor(1.0).double(), rtol=0, atol=0.05)
    assert len(y.unique()) == 2, "zero, and one divided by 1 - p"


def test_neighbours_are_dropped_independently():
    torch.manual_seed(0)
    kept = (dropout.dropout(torch.ones(2**20), 0.5, training=True) > 0).double() - 0.5
    for distance in range(1, 9):
        assert abs((kept[distance:] * kept[:-distance]).mean()) < 5 * 0.25 / 2**10, distance


def test_a_mask_follows_from_the_seed_alone():
    x = torch.randn(3, 5, 7)
    masks = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        masks.append(dropout.dropout(x, 0.5, training=True))
    assert masks[0].equal(masks[1]) and not masks[0].equal(masks[2])
    assert not dropout.dropout(x, 0.5, training=True).equal(masks[2])


def test_outside_of_training_nothing_is_dropped():
    x = torch.randn(4)
    assert dropout.dropout(x, 0.5, training=False).equal(x) and dropout.dropout(x, 0.0, training=True).equal(x)


def test_gradients_reach_what_was_kept():
    x = torch.randn(50, 50, requires_grad=True)
    y = dropout.dropout(x, 0.25, training=True)
    y.sum().backward()
    torch.testing.assert_close(x.grad, (y != 0) / 0.75)


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_attention_with_dropout_is_attention_whose_shares_are_dropped(monkeypatch, groups, dtype):
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, n, 10, 6, dtype=dtype, requires_grad=True) for n in (4, groups, groups))
    wanted = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.3, enable_gqa=True)
    wanted = wanted.transpose(1, 2).reshape(2, 10, 24)
    monkeypatch.setattr(attention.dropping, "dropout", lambda x, p, training: x)
    got = attention.causal_attention(q, k, v, None, 0, scale=0.3, dropout=0.5)
    tolerance = {torch.float64: 1e-9, torch.bfloat16: 3e-2}[dtype]
    torch.testing.assert_close(got, wanted, rtol=0, atol=tolerance)
    grad = torch.randn_like(got)
    for a, b in zip(*(torch.autograd.grad(y, (q, k, v), grad, retain_graph=True) for y in (got, wanted)), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=4 * tolerance)
    monkeypatch.undo()
    dropped = attention.causal_attention(q, k, v, None, 0, scale=0.3, dropout=0.5)
    assert not torch.allclose(dropped, wanted, atol=0.1)


def test_operator_is_one():
    torch.library.opcheck(dropout.noise, (torch.randn(3, 5), 0.5), test_utils=("test_schema", "test_faketensor"))
