import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from nnx_cli.evaluation.by_position import ByPosition, Verdict, doubling_bands
from nnx_cli.evaluation.losses import evaluate
from nnx_cli.layers.loss import token_losses

V = 16


class Copier(nn.Module):
    """Predicts with much confidence the token that followed the one `lag` positions back; else nothing."""

    ignore_index = -100

    def __init__(self, lag, seq_len):
        super().__init__()
        self.lag, self.device, self.head = lag, torch.device("cpu"), nn.Identity()
        self.config = SimpleNamespace(vocab_size=V, seq_len=seq_len)

    def trunk(self, input_ids):
        logits = torch.zeros(*input_ids.shape, V)
        known = max(0, input_ids.shape[1] - self.lag + 1)
        logits[:, self.lag - 1 :] = 8.0 * nn.functional.one_hot(input_ids[:, :known], V)
        return logits


def measured(model, tokens):
    T = model.config.seq_len
    positions = ByPosition(T)
    evaluate(model, tokens, seq_len=T, batch_size=3, token_bytes=None, watchers=[positions.add])
    return positions


def periodic(lag, n):
    return np.resize(np.random.default_rng(0).integers(0, V, lag), n).astype(np.uint8)


def test_positions_are_means_over_the_windows_that_have_them(tiny):
    model, T = tiny(), 32
    tokens = np.random.default_rng(1).integers(0, 64, 3 * T + 11).astype(np.uint8)
    positions = measured(model, tokens)
    ids = torch.from_numpy(tokens.astype(np.int64))
    full = torch.stack(
        [token_losses(model, ids[None, i : i + T], ids[None, i + 1 : i + T + 1])[0] for i in (0, 32, 64)]
    )
    tail = token_losses(model, ids[None, 96:-1], ids[None, 97:])[0]
    found = dict(positions.losses())
    assert sorted(found) == list(range(1, T + 1))
    assert found[1] == pytest.approx((full[:, 0].sum() + tail[0]).item() / 4, rel=1e-5)
    assert found[T] == pytest.approx(full[:, -1].mean().item(), rel=1e-5)
    bands = {band: (loss, stderr) for band, loss, stderr in positions.rows()}
    assert bands[17, 32][0] == pytest.approx(full[:, 16:].mean().item(), rel=1e-5)
    assert bands[17, 32][1] == pytest.approx(full[:, 16:].mean(1).std().item() / math.sqrt(3), rel=1e-4)


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 64, 100, 1000])
def test_bands_cover_every_position_once(n):
    bands = doubling_bands(n)
    assert [p for first, last in bands for p in range(first, last + 1)] == list(range(1, n + 1))


def test_a_model_that_looks_far_back_is_seen_to(tiny):
    model, tokens = Copier(100, 256), periodic(100, 256 * 6 + 1)
    verdict = measured(model, tokens).verdict(model, tokens, 1000)
    assert verdict.positions == (193, 256) and verdict.used is True
    assert verdict.early == pytest.approx(math.log(V)), "what is 100 tokens back is not there at position 64"
    assert verdict.late == pytest.approx(math.log(math.exp(8) + V - 1) - 8, abs=1e-4)
    assert "lowers the loss" in str(verdict)


def test_a_model_that_is_misled_by_what_is_far_back():
    model, tokens = Copier(100, 256), periodic(99, 256 * 6 + 1)
    verdict = measured(model, tokens).verdict(model, tokens, 1000)
    assert verdict.used is False and "raises the loss" in str(verdict)


def test_a_model_that_looks_at_what_is_near():
    model, tokens = Copier(10, 256), periodic(10, 256 * 6 + 1)
    verdict = measured(model, tokens).verdict(model, tokens, 1000)
    assert verdict.used is None and "no difference" in str(verdict)
    assert verdict.early == verdict.late < 0.01


def test_the_same_tokens_are_read_with_less_before_them(tiny):
    model = tiny(seq_len=128)
    tokens = np.random.default_rng(2).integers(0, 64, 128 * 2 + 40).astype(np.uint8)
    verdict = measured(model, tokens).verdict(model, tokens, 300)
    ids, by_hand = torch.from_numpy(tokens.astype(np.int64)), []
    for start in (0, 128):
        for target in range(start + 97, start + 129):
            begin = start + 97 + (target - start - 97) // 16 * 16 - 57  # sixteen neighbours share a beginning
            assert 57 <= target - begin <= 72
            losses = token_losses(model, ids[None, begin:target], ids[None, begin + 1 : target + 1])
            by_hand.append(losses[0, -1].item())
    assert verdict.early == pytest.approx(np.mean(by_hand), rel=1e-5)


@pytest.mark.parametrize(("seq_len", "n", "words"), [(127, 5000, "no positions far"), (128, 256, "takes two windows")])
def test_what_cannot_be_said(seq_len, n, words):
    model = Copier(5, seq_len)
    assert words in measured(model, periodic(5, n)).verdict(model, periodic(5, n), 1000)


@pytest.mark.parametrize(("difference", "used"), [(-0.2, True), (0.2, False), (-0.19, None), (0.0, None)])
def test_a_difference_counts_from_two_standard_errors_on(difference, used):
    assert Verdict((193, 256), 1.0, 1.2, difference, 0.1).used is used
