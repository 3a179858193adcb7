"""Keys and values of the positions seen so far, for incremental decoding."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol, Self

import torch
from torch import Tensor


class Cache(Protocol):
    """What sampling asks of a model's cache, or recurrent state; the methods mean what they do in KVCache."""

    span: int | None  # positions that a pass of one token covers, whatever is stored

    @property
    def n_bytes(self) -> int:
        """Bytes it holds."""

    def note_advance(self, n_new: int) -> None:
        """Count positions on the host."""

    def truncate(self, lengths: Tensor | int) -> Self:
        """Forget what lies beyond `lengths`."""

    def repeat(self, n: int) -> Self:
        """Make `n` copies of every row."""

    def take(self, rows: Tensor) -> Self:
        """Keep these rows, in this order."""

    def reset(self) -> Self:
        """Forget everything."""

    def put(self, rows: Tensor, other: Self) -> Self:
        """Replace rows by those of another cache."""


class KVCache:
    """Preallocated keys and values, (L, B, G, S, K) each, parts of one tensor; sequences may have different numbers of
    positions.

    One forward pass of T new positions: `positions(T)`, then `update` once in every layer, then `advance(T)`. With a
    `span` a pass of one position does the same operations on the same memory whatever was stored before, so that it can
    be captured as a CUDA graph: attention covers the first `span` positions, with a mask, and the host's count is left
    to the caller, who calls `note_advance` after every such pass, replayed or not.

    With a `window` attention reaches so many of the newest positions, its own included. All positions stay, so that any
    length can be returned to. A first pass over more than that must limit itself.
    """

    window: int | None = None  # None: attention reaches all positions
    n_parts = 2  # of what is kept of a head: its keys and its values
    _mask: Tensor | None  # of the present pass, which all layers share; None also where it has none

    def __init__(self, shape: tuple[int, int, int, int, int], device: torch.device, dtype: torch.dtype) -> None:
        """`shape` is (L, B, G, S, K): layers, sequences, key-value heads, positions at most, width of a head."""
        n_layers, batch_size, n_heads, max_seq_len, width = shape
        n_rows = self.n_parts * n_heads
        self._hold(torch.zeros(n_layers, batch_size, n_rows, max_seq_len, width, device=device, dtype=dtype))
        self.lengths = torch.zeros(batch_size, dtype=torch.int64, device=device)
        self.max_seq_len = max_seq_len
        self.span: int | None = None
        self._longest = 0  # the largest of `lengths`, kept on the host so that no step has to ask the device
        self._even = True  # whether all sequences have that length
        self._tables: dict[Callable[[Tensor], Sequence[Tensor]], list[Tensor]] = {}

    def _hold(self, stored: Tensor) -> None:
        """Keep keys and values (L, B, 2G, S, K) from now on."""
        self.stored, self._layers = stored, stored.unbind()
        parts = stored.chunk(self.n_parts, dim=2)
        self.keys, self.values = parts[0], parts[-1]
        self._end_pass()

    def _end_pass(self) -> None:
        """Forget what the layers of a pass share."""
        self._has_mask, self._mask = False, None
        self._views: list[tuple[Tensor | None, tuple[Tensor, ...]]] | None = None

    def positions(self, n_new: int) -> Tensor:
        """Positions (B, T) of the next `n_new` tokens of every sequence."""
        assert self._longest + n_new <= self.max_seq_len, (self._longest, n_new, self.max_seq_len)
        first = self.lengths[:, None]
        return first if n_new == 1 else first + torch.arange(n_new, device=self.lengths.device)

    def lookup(self, make: Callable[[Tensor], Sequence[Tensor]], n_new: int) -> list[Tensor]:
        """What `make` says of the positions of the next `n_new` tokens: (T, ...) where all sequences have the same,
        else (B, T, ...). It is asked once, for all positions (S,), and returns tensors (S, ...)."""
        tables = self._tables.get(make)
        if tables is None:
            tables = self._tables[make] = list(make(torch.arange(self.max_seq_len, device=self.lengths.device)))
        assert self._longest + n_new <= self.max_seq_len, (self._longest, n_new, self.max_seq_len)
        if self._in_step(n_new):
            return [table[self._longest : self._longest + n_new] for table in tables]
        positions = self.positions(n_new)
        return [table[positions] for table in tables]

    def has_span(self, n_new: int) -> bool:
        """Whether a pass of T new positions does the same operations whatever was stored before."""
        return self.span is not None and n_new == 1

    def _end(self, n_new: int) -> int:
        return self.span if self.span is not None and n_new == 1 else self._longest + n_new

    def mask(self, n_new: int) -> Tensor | None:
        """What is added to scores, (B, 1, T, S): 0 where a new position may look, else minus infinity; None where plain
        causal attention says the same."""
        if not self._has_mask and not self._sees_all(n_new):
            hidden = ~self._seen(n_new)
            self._mask = torch.zeros_like(hidden, dtype=self.keys.dtype).masked_fill_(hidden, -torch.inf)[:, None]
        self._has_mask = True
        return self._mask

    def _in_step(self, n_new: int) -> bool:
        """Whether the new positions are the same ones in all sequences, and known to the host."""
        return self._even and not self.has_span(n_new)

    def _sees_all(self, n_new: int) -> bool:
        """Whether each new position may look at all before it that `update` returns."""
        reached = self._longest + n_new - self._first(n_new)
        is_within = self.window is None or self._longest == 0 or reached <= self.window
        return is_within and self._in_step(n_new) and (self._longest == 0 or n_new == 1)

    def _seen(self, n_new: int) -> Tensor:
        """Where each new position may look, (B, T, S), among what `update` returns."""
        newest = self.positions(n_new)[..., None]
        stored = torch.arange(self._first(n_new), self._end(n_new), device=self.lengths.device)
        seen = stored <= newest
        return seen if self.window is None else seen & (stored > newest - self.window)

    def _first(self, n_new: int) -> int:
        """The first position that `update` returns: what lies before the window of all sequences is left out where
        they are equally long."""
        if self.window is None or not self._even or self.has_span(n_new):
            return 0
        return max(0, self._longest + 1 - self.window)

    def is_causal(self, n_new: int) -> bool:
        """Whether attention over T new positions needs a causal mask of its own (the first fill does)."""
        return self._longest == 0 and n_new > 1

    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        """Store k, v (B, G, T, K) of the new positions; return all that attention covers, (B, G, S, K) each."""
        return self.extend(layer, torch.cat((k, v), dim=1))

    def layer(self, layer: int) -> Tensor:
        """Keys and values (B, 2G, S, K) of a layer."""
        return self._layers[layer]

    def extend(self, layer: int, kv: Tensor) -> tuple[Tensor, ...]:
        """`update` of keys and values side by side, (B, 2G, T, K)."""
        kv = kv.detach() if kv.requires_grad else kv  # a cache has no gradients
        if self._views is None:
            self._views = self._views_of_pass(kv.shape[2])
        new, seen = self._views[layer]
        if new is not None:
            new.copy_(kv)
        else:
            index = self.positions(kv.shape[2])[:, None, :, None]
            self._layers[layer].scatter_(2, index.expand_as(kv), kv.to(self.stored.dtype))
        return seen

    def _views_of_pass(self, n_new: int) -> list[tuple[Tensor | None, tuple[Tensor, ...]]]:
        """Of every layer the place of the new positions, (B, 2G, T, K), None where sequences have different ones, and
        what attention covers, (B, G, S, K) each."""
        first = self._first(n_new)
        parts = self.stored.narrow(3, first, self._end(n_new) - first).chunk(self.n_parts, dim=2)
        seen = list(zip(*(part.unbind() for part in parts), strict=True))
        if not self._in_step(n_new):
            return [(None, each) for each in seen]
        return list(zip(self.stored.narrow(3, self._longest, n_new).unbind(), seen, strict=True))

    def advance(self, n_new: int) -> None:
        """Count `n_new` more positions in every sequence."""
        self.lengths += n_new
        self._end_pass()
        if not self.has_span(n_new):
            self.note_advance(n_new)

    def note_advance(self, n_new: int) -> None:
        """Count `n_new` more positions on the host alone, after a pass with a span has counted them in `lengths`."""
        self._longest += n_new

    def truncate(self, lengths: Tensor | int) -> Self:
        """Forget what lies beyond `lengths`, (B,) or one number for all sequences."""
        self.lengths.copy_(torch.minimum(self.lengths, torch.as_tensor(lengths, device=self.lengths.device)))
        return self._count()

    def _count(self) -> Self:
        """Count on the host what `lengths` says."""
        self._longest = int(self.lengths.max())
        self._even = bool((self.lengths == self._longest).all())
        self._end_pass()
        return self

    def repeat(self, n: int) -> Self:
        """Make `n` copies of every sequence, side by side: b becomes b·n … b·n + n − 1."""
        self._hold(self.stored.repeat_interleave(n, dim=1))
        self.lengths = self.lengths.repeat_interleave(n)
        return self

    def take(self, rows: Tensor) -> Self:
        """Keep sequences `rows` (n,), in that order."""
        self._hold(self.stored[:, rows])
        self.lengths = self.lengths[rows]
        return self._count()

    def reset(self) -> Self:
        """Forget everything."""
        self.lengths.zero_()
        self._longest, self._even = 0, True
        self._end_pass()
        return self

    def put(self, rows: Tensor, other: Self) -> Self:
        """Replace sequences `rows` (n,) by the n of another cache, which may have room for fewer positions."""
        self.stored[:, rows, :, : other.max_seq_len] = other.stored
        self.lengths[rows] = other.lengths
        return self._count()

    @property
    def n_bytes(self) -> int:
        """Bytes held by keys and values."""
        return self.stored.nbytes
