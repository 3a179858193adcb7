"""A window of a cache: attention reaches the newest positions alone."""

import pytest
import torch

V, T = 64, 40


def ids_of(n_rows):
    return torch.randint(V, (n_rows, T), generator=torch.Generator().manual_seed(1))


def read(model, ids, pieces, window):
    """Logits of a text that is read in pieces."""
    cache = model.make_cache(len(ids), T)
    cache.window = window
    return torch.cat([model(piece, cache=cache) for piece in ids.split(pieces, dim=1)], dim=1)


@torch.no_grad()
@pytest.mark.parametrize("name", ["nyx", "llama", "ngpt"])
def test_a_position_sees_what_a_text_of_that_length_would_show_it(tiny, name):
    """In a single layer, whose keys and values are of one token each; wherever it stands, for positions are rotary."""
    model, ids = tiny(name, n_layers=1).eval(), ids_of(2)
    found = read(model, ids, 1, 7)
    for t in range(T):
        wanted = model(ids[:, max(0, t - 6) : t + 1])[:, -1]
        assert torch.allclose(found[:, t], wanted, atol=1e-4), t
    assert not torch.allclose(found, model(ids), atol=1e-3)


@torch.no_grad()
@pytest.mark.parametrize("name", ["nyx", "llama", "ngpt", "tape"])
@pytest.mark.parametrize("pieces", [3, 7, [7, 1, 1, 5, 26]])
def test_pieces_see_what_single_tokens_see(tiny, name, pieces):
    model, ids = tiny(name).eval(), ids_of(2)
    assert torch.allclose(read(model, ids, pieces, 7), read(model, ids, 1, 7), atol=1e-4)


@torch.no_grad()
def test_rows_of_different_length_have_the_window_behind_each(tiny):
    model, ids, lengths = tiny().eval(), ids_of(2), [20, 9]
    cache = model.make_cache(2, T)
    cache.window = 7
    for piece in ids[:, :20].split(5, dim=1):
        model(piece, cache=cache)
    cache.truncate(torch.tensor(lengths))
    new = torch.stack([row[length : length + 3] for row, length in zip(ids, lengths, strict=True)])
    for token in (new[:, :1], new[:, 1:]):
        found = model(token, cache=cache)
    wanted = read(model, ids, 1, 7)
    for row, length in enumerate(lengths):
        assert torch.allclose(found[row], wanted[row, length + 1 : length + 3], atol=1e-4), row
