import numpy as np
import pytest
import torch

from nnx_cli import models
from nnx_cli.errors import DataError
from nnx_cli.evaluation.context import losses_by_context, refusal
from nnx_cli.layers.loss import token_losses

T = 32


def stream(n):
    return np.random.default_rng(3).integers(0, 64, n).astype(np.uint8)


@pytest.mark.parametrize("lengths", [(2 * T, 4 * T), (4 * T, 2 * T), (T + 1,), (3 * T,)])
def test_all_contexts_end_with_the_same_targets(tiny, lengths):
    model, tokens = tiny(), stream(300)
    found = losses_by_context(model, tokens, lengths, batch_tokens=100)
    assert [each.n_tokens for each in found] == [T, *lengths]
    ids, longest = torch.from_numpy(tokens.astype(np.int64)), max(lengths)
    windows = {}
    for length in (T, *lengths):
        begins = [end - length for end in range(longest, 300, longest)]
        losses = [token_losses(model, ids[None, b : b + length], ids[None, b + 1 : b + length + 1]) for b in begins]
        windows[length] = torch.stack([each[0, -T:].double().mean() for each in losses])
    for each in found:
        assert each.loss == pytest.approx(windows[each.n_tokens].mean().item(), rel=1e-6)
    difference = windows[lengths[0]] - windows[T]
    assert found[0].difference is None
    assert found[1].difference == pytest.approx(difference.mean().item(), abs=1e-9)
    assert found[1].stderr == pytest.approx(difference.std().item() / len(difference) ** 0.5, rel=1e-6)


@pytest.mark.parametrize("name", models.names())
def test_every_architecture_reads_four_times_its_context(tiny, name):
    model = tiny(name).train()
    assert refusal(model, 4 * T) is None
    own, longer = losses_by_context(model, stream(4 * T + 1), [4 * T], batch_tokens=64)
    assert own.loss > 0 and longer.loss > 0 and longer.stderr is None, "a single window"
    assert model.training


def test_a_text_shorter_than_the_longest_context(tiny):
    with pytest.raises(DataError, match="one window of the longest context has 129") as refused:
        losses_by_context(tiny(), stream(128), [2 * T, 4 * T], batch_tokens=64)
    assert "--context 3.9x" in refused.value.fix
    with pytest.raises(DataError) as refused:
        losses_by_context(tiny(), stream(20), [2 * T], batch_tokens=64)
    assert "--context" not in refused.value.fix


def test_a_loss_that_is_not_finite_is_none(tiny):
    model = tiny(xpos_scale_base=0.5)  # xPos decays beyond float32 within a few hundred positions
    own, longer = losses_by_context(model, stream(20 * T + 1), [20 * T], batch_tokens=64)
    assert own.loss > 0 and longer.loss is None and longer.difference is None
