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

    def reset(self) -> Self:
        """Forget everything."""

    def put(self, rows: Tensor, other: Self) -> Self:
        """Replace rows by those of another cache."""


class KVCache:
    """Preallocated keys and values, (L, B, G, S, K) each; sequences may have different numbers of positions.

    One forward pass of T new positions: `positions(T)`, then `update` once in every layer, then `advance(T)`. With a
    `span` a pass of one position does the same operations on the same memory whatever was stored before, so that it can
    be captured as a CUDA graph: attention covers the first `span` positions, with a mask, and the host's count is left
    to the caller, who calls `note_advance` after every such pass, replayed or not.
    """

    def __init__(self, shape: tuple[int, int, int, int, int], device: torch.device, dtype: torch.dtype) -> None:
        """`shape` is (L, B, G, S, K): layers, sequences, key-value heads, positions at most, width of a head."""
        _, batch_size, _, max_seq_len, _ = shape
        self.keys = torch.zeros(shape, device=device, dtype=dtype)
        self.values = torch.zeros(shape, device=device, dtype=dtype)
        self.lengths = torch.zeros(batch_size, dtype=torch.int64, device=device)
        self.max_seq_len = max_seq_len
        self.span: int | None = None
        self._longest = 0  # the largest of `lengths`, kept on the host so that no step has to ask the device
        self._even = True  # whether all sequences have that length
        self._mask: Tensor | None = None  # of the present pass, which all layers share
        self._tables: dict[Callable[[Tensor], Sequence[Tensor]], list[Tensor]] = {}

    def positions(self, n_new: int) -> Tensor:
        """Positions (B, T) of the next `n_new` tokens of every sequence."""
        assert self._longest + n_new <= self.max_seq_len, (self._longest, n_new, self.max_seq_len)
        first = self.lengths[:, None]
        return first if n_new == 1 else first + torch.arange(n_new, device=self.lengths.device)

    def lookup(self, make: Callable[[Tensor], Sequence[Tensor]], n_new: int) -> list[Tensor]:
        """What `make` says of the positions of the next `n_new` tokens: (T, ...) where all sequences have the same,
        else (B, T, ...). It is asked once, for all positions (S,), and returns tensors (S, ...)."""
        if make not in self._tables:
            self._tables[make] = list(make(torch.arange(self.max_seq_len, device=self.lengths.device)))
        assert self._longest + n_new <= self.max_seq_len, (self._longest, n_new, self.max_seq_len)
        if self._even and not self.has_span(n_new):
            return [table[self._longest : self._longest + n_new] for table in self._tables[make]]
        positions = self.positions(n_new)
        return [table[positions] for table in self._tables[make]]

    def has_span(self, n_new: int) -> bool:
        """Whether a pass of T new positions does the same operations whatever was stored before."""
        return self.span is not None and n_new == 1

    def _end(self, n_new: int) -> int:
        return self.span if self.span is not None and n_new == 1 else self._longest + n_new

    def mask(self, n_new: int) -> Tensor | None:
        """What each new position may see, (B, 1, T, S), or None where plain causal attention says the same."""
        if self._even and (self._longest == 0 or n_new == 1) and not self.has_span(n_new):
            return None
        if self._mask is None:
            seen = torch.arange(self._end(n_new), device=self.lengths.device)
            self._mask = (seen <= self.positions(n_new)[..., None])[:, None]
        return self._mask

    def is_causal(self, n_new: int) -> bool:
        """Whether attention over T new positions needs a causal mask of its own (the first fill does)."""
        return self._longest == 0 and n_new > 1

    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store k, v (B, G, T, K) of the new positions; return all that attention covers, (B, G, S, K) each."""
        n_new = k.shape[2]
        end = self._end(n_new)
        keys, values = self.keys[layer], self.values[layer]
        if self._even and not self.has_span(n_new):
            keys.narrow(2, self._longest, n_new).copy_(k)
            values.narrow(2, self._longest, n_new).copy_(v)
        else:
            index = self.positions(n_new)[:, None, :, None]
            for store, new in ((keys, k), (values, v)):
                store.scatter_(2, index.expand_as(new), new.to(store.dtype))
        return keys.narrow(2, 0, end), values.narrow(2, 0, end)

    def advance(self, n_new: int) -> None:
        """Count `n_new` more positions in every sequence."""
        self.lengths += n_new
        self._mask = None
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
        self._mask = None
        return self

    def repeat(self, n: int) -> Self:
        """Make `n` copies of every sequence, side by side: b becomes b·n … b·n + n − 1."""
        self.keys = self.keys.repeat_interleave(n, dim=1)
        self.values = self.values.repeat_interleave(n, dim=1)
        self.lengths = self.lengths.repeat_interleave(n)
        return self

    def reset(self) -> Self:
        """Forget everything."""
        self.lengths.zero_()
        self._longest, self._even, self._mask = 0, True, None
        return self

    def put(self, rows: Tensor, other: Self) -> Self:
        """Replace sequences `rows` (n,) by the n of another cache, which may have room for fewer positions."""
        self.keys[:, rows, :, : other.max_seq_len] = other.keys
        self.values[:, rows, :, : other.max_seq_len] = other.values
        self.lengths[rows] = other.lengths
        return self._count()

    @property
    def n_bytes(self) -> int:
        """Bytes held by keys and values."""
        return 2 * self.keys.numel() * self.keys.element_size()
