import pytest
import torch

from nnx_cli import models
from nnx_cli.training.vocabulary import extend_rows

SHAPE = dict(dim=32, n_layers=2, n_heads=2, seq_len=16)
UNTIED = {name: {"tie_embeddings": False} for name in ("llama", "neon", "ngpt")}
CASES = [(name, {}) for name in models.names()] + [*UNTIED.items()]


@pytest.mark.parametrize(("name", "fields"), CASES)
def test_old_ids_keep_their_scores_and_new_ones_begin_at_the_mean(name, fields):
    torch.manual_seed(0)
    old = models.build(name, vocab_size=64, **SHAPE, **fields).eval()
    new = models.build(name, vocab_size=69, **SHAPE, **fields).eval()
    state = extend_rows(old.state_without_ties(), new, 64, 69)
    new.load_state_dict(state, strict=False)
    ids = torch.randint(64, (2, 16))
    with torch.no_grad():
        before, after = old(ids), new(ids)[..., :64]
    gap = (after - before) - (after - before).mean(-1, keepdim=True)  # of log-probabilities all shift by the same
    assert gap.abs().max() < 1e-4
    grown = [key for key, value in state.items() if len(value) == 69]
    assert len(grown) == len([key for key in old.state_without_ties() if len(state[key]) == 69]) > 0
    for key in grown:
        rows, mean = state[key][:64], state[key][:64].mean(0)
        assert all(torch.equal(row, state[key][64]) for row in state[key][65:])
        if name == "ngpt" and rows.dim() == 2:
            assert state[key][64].norm() == pytest.approx(1, abs=1e-5), "on the sphere, like all others"
            mean = mean / mean.norm()
        assert torch.allclose(state[key][64], mean, atol=1e-6)


def test_nothing_else_grows():
    old, new = (models.build("llama", vocab_size=n, **SHAPE) for n in (64, 69))
    state = old.state_without_ties()
    same = extend_rows(state, old, 64, 64)
    assert all(same[key] is state[key] for key in state)
    assert {key for key, value in extend_rows(state, new, 64, 69).items() if value is not state[key]} == {
        "embedding.weight"
    }
