"""Keys and values of the positions seen so far, for incremental decoding."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, Self

import torch
from torch import Tensor


class Cache(Protocol):
    """What sampling asks of a model's cache, or recurrent state; the methods mean what they do in KVCache."""

    static: bool  # replayed as a CUDA graph

    @property
    def n_bytes(self) -> int:
        """Bytes it holds."""

    def note_advance(self, n_new: int) -> None:
        """Count positions that a CUDA graph has stored."""

    def snapshot(self) -> Callable[[], None]:
        """A function that restores the present state."""

    def truncate(self, lengths: Tensor | int) -> Self:
        """Forget what lies beyond `lengths`."""

    def repeat(self, n: int) -> Self:
        """Make `n` copies of every row."""

    def reset(self) -> Self:
        """Forget everything."""


class KVCache:
    """Preallocated keys and values, (L, B, G, S, K) each; sequences may have different numbers of positions.

    One forward pass of T new positions: `positions(T)`, then `update` once in every layer, then `advance(T)`. Once
    `static`, a pass of one position does the same operations on the same memory whatever was stored before, so that it
    can be captured as a CUDA graph: attention covers all S positions, with a mask. Whoever replays it calls
    `note_advance`.
    """

    def __init__(self, shape: tuple[int, int, int, int, int], device: torch.device, dtype: torch.dtype) -> None:
        """`shape` is (L, B, G, S, K): layers, sequences, key-value heads, positions at most, width of a head."""
        _, batch_size, _, max_seq_len, _ = shape
        self.keys = torch.zeros(shape, device=device, dtype=dtype)
        self.values = torch.zeros(shape, device=device, dtype=dtype)
        self.lengths = torch.zeros(batch_size, dtype=torch.int64, device=device)
        self.max_seq_len = max_seq_len
        self.static = False
        self._longest = 0  # the largest of `lengths`, kept on the host so that no step has to ask the device
        self._even = True  # whether all sequences have that length

    def positions(self, n_new: int) -> Tensor:
        """Positions (B, T) of the next `n_new` tokens of every sequence."""
        assert self._longest + n_new <= self.max_seq_len, (self._longest, n_new, self.max_seq_len)
        return self.lengths[:, None] + torch.arange(n_new, device=self.lengths.device)

    def is_static(self, n_new: int) -> bool:
        """Whether a pass of T new positions must do the same operations whatever was stored before."""
        return self.static and n_new == 1

    def _end(self, n_new: int) -> int:
        return self.max_seq_len if self.is_static(n_new) else self._longest + n_new

    def mask(self, n_new: int) -> Tensor | None:
        """What each new position may see, (B, 1, T, S), or None where plain causal attention says the same."""
        if self._even and (self._longest == 0 or n_new == 1) and not self.is_static(n_new):
            return None
        seen = torch.arange(self._end(n_new), device=self.lengths.device)
        return (seen <= self.positions(n_new)[..., None])[:, None]

    def is_causal(self, n_new: int) -> bool:
        """Whether attention over T new positions needs a causal mask of its own (the first fill does)."""
        return self._longest == 0 and n_new > 1

    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store k, v (B, G, T, K) of the new positions; return all up to the longest sequence, (B, G, S, K) each."""
        n_new = k.shape[2]
        end = self._end(n_new)
        for store, new in ((self.keys[layer], k), (self.values[layer], v)):
            if self._even and not self.is_static(n_new):
                store[:, :, self._longest : end] = new
            else:
                index = self.positions(n_new)[:, None, :, None].expand_as(new)
                store.scatter_(2, index, new.to(store.dtype))
        return self.keys[layer, :, :, :end], self.values[layer, :, :, :end]

    def advance(self, n_new: int) -> None:
        """Count `n_new` more positions in every sequence."""
        self.lengths += n_new
        self.note_advance(n_new)

    def note_advance(self, n_new: int) -> None:
        """Count `n_new` more positions on the host alone, after a CUDA graph has counted them in `lengths`."""
        self._longest += n_new

    def snapshot(self) -> Callable[[], None]:
        """A function that restores the present state, exactly."""
        lengths, longest, even = self.lengths.clone(), self._longest, self._even

        def restore() -> None:
            self.lengths.copy_(lengths)
            self._longest, self._even = longest, even

        return restore

    def truncate(self, lengths: Tensor | int) -> Self:
        """Forget what lies beyond `lengths`, (B,) or one number for all sequences."""
        self.lengths.copy_(torch.minimum(self.lengths, torch.as_tensor(lengths, device=self.lengths.device)))
        self._longest = int(self.lengths.max())
        self._even = bool((self.lengths == self._longest).all())
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
        self._longest, self._even = 0, True
        return self

    @property
    def n_bytes(self) -> int:
        """Bytes held by keys and values."""
        return 2 * self.keys.numel() * self.keys.element_size()
