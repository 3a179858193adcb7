import pytest
import torch

from nnx_cli import models
from nnx_cli.convert.export._traced_cache import GraphState
from nnx_cli.layers.kv_cache import KVCache

OTHERS = [("n4", dict(window=4)), ("n4", dict(kv_latent_dim=12)), ("tape", dict(variant="sound"))]
CASES = [(name, {}) for name in models.names()] + OTHERS


@pytest.mark.parametrize(("name", "fields"), CASES)
@torch.inference_mode()
def test_a_text_in_parts_gives_the_logits_of_the_whole_and_writes_into_nothing(tiny, name, fields):
    model = tiny(name, **fields).eval()
    state, ids = GraphState(model.make_cache(1, 1)), torch.randint(64, (3, 11))
    held = [x.expand(-1, 3, *x.shape[2:]) for x in state.empty.values()]
    found = []
    for piece in ids.split((4, 1, 6), dim=1):
        before = [x.clone() for x in held]
        state.begin(held)
        found.append(model(piece, cache=state.cache))
        assert all(torch.equal(x, y) for x, y in zip(held, before, strict=True))
        held = state.end()
        assert [x.shape[1] for x in held] == [3] * len(held)
    torch.testing.assert_close(torch.cat(found, dim=1), model(ids), atol=1e-4, rtol=0)
    assert {x.shape[3] for x in held if x.dim() == 5} == {11}


def test_the_state_is_all_that_a_cache_keeps(tiny):
    state = GraphState(tiny("n4").make_cache(1, 1))
    assert list(state.empty) == ["cache", "cache.sums"]
    assert list(GraphState(tiny("tape").make_cache(1, 1)).empty) == ["first", "others", "prophet"]
    assert isinstance(state.cache, KVCache) and state.empty["cache"].shape[3] == 0
