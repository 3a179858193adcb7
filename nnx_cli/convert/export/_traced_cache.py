"""A model's cache as tensors that go into a graph and come out of it, longer by the new positions."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from nnx_cli.layers.kv_cache import KVCache

KEPT_ELSEWHERE = ("stored", "keys", "values", "lengths", "_mask")  # tensors of a store that are no state of their own


class TracedCache(KVCache):
    """Mixed into the class of a store: all sequences have S positions, as many as the tensors that it is given, and
    nothing is written into those."""

    def begin(self, stored: Tensor) -> None:
        """Hold the keys and values (L, B, 2G, S, K) of earlier positions."""
        self._past, self._before = stored.shape[3], stored.unbind()
        self._after: dict[int, Tensor] = {}
        parts = F.pad(stored, (0, 0, 0, 1)).chunk(self.n_parts, dim=2)  # S may be 0: a position of zeros follows
        self.keys, self.values = parts[0], parts[-1]
        self.lengths = torch.full((stored.shape[1],), self._past, device=stored.device)

    def end(self) -> Tensor:
        """Keys and values (L, B, 2G, S + T, K) with those of the new positions."""
        return torch.stack([self._after[layer] for layer in sorted(self._after)])

    def positions(self, n_new: int) -> Tensor:
        """As in KVCache."""
        return self._new(n_new).expand(self.lengths.shape[0], -1)

    def lookup(self, make: Callable[[Tensor], Sequence[Tensor]], n_new: int) -> list[Tensor]:
        """As in KVCache."""
        return list(make(self._new(n_new)))

    def _new(self, n_new: int) -> Tensor:
        """Positions (T,) of the next `n_new` tokens."""
        return self._past + torch.arange(n_new, device=self.lengths.device)

    def has_span(self, n_new: int) -> bool:
        """As in KVCache."""
        return False

    def is_causal(self, n_new: int) -> bool:
        """As in KVCache."""
        return False

    def mask(self, n_new: int) -> Tensor:
        """As in KVCache, (1, 1, T, S + T)."""
        keys, queries = torch.arange(self._past + n_new, device=self.lengths.device), self._new(n_new)[:, None]
        hidden = keys > queries
        if self.window is not None:
            hidden = hidden | (keys <= queries - self.window)
        return torch.zeros_like(hidden, dtype=self.keys.dtype).masked_fill(hidden, -torch.inf)[None, None]

    def extend(self, layer: int, kv: Tensor) -> tuple[Tensor, ...]:
        """As in KVCache."""
        self._after[layer] = torch.cat((self._before[layer], kv), dim=2)
        return self._after[layer].chunk(self.n_parts, dim=1)

    def advance(self, n_new: int) -> None:
        """Nothing: positions are counted by what `end` returns."""


class GraphState:
    """A model's cache, and the tensors that it is made of, by name: of every store the keys and values
    (L, B, 2G, S, K), and what else it keeps of sequences (L, B, …)."""

    def __init__(self, cache: Any) -> None:
        """`cache` is a fresh one of one sequence, and a part of this from now on."""
        self.cache, self.empty = cache, {}
        self._stores: dict[str, TracedCache] = {}
        for name, store in _stores(cache):
            if store.stored.numel():
                self.empty[name] = store.stored[:, :, :, :0]
                self.empty |= {f"{name}.{key}": tensor for key, tensor in _more(store)}
            kind = type(store)
            store.__class__ = type(f"Traced{kind.__name__}", (TracedCache, kind), {})
            self._stores[name] = store

    def begin(self, state: Sequence[Tensor]) -> None:
        """Hold these tensors, in the order of `empty`."""
        for name, tensor in zip(self.empty, state, strict=True):
            store, _, attribute = name.partition(".")
            if attribute:
                setattr(self._stores[store], attribute, tensor.clone())  # which layers write into
            else:
                self._stores[store].begin(tensor)

    def end(self) -> list[Tensor]:
        """The tensors as the pass left them."""
        parts = (name.partition(".") for name in self.empty)
        return [getattr(self._stores[name], key) if key else self._stores[name].end() for name, _, key in parts]


def _stores(cache: Any) -> Iterator[tuple[str, Any]]:
    """The stores of a cache, which is one or has them as attributes."""
    found = {"cache": cache} if isinstance(cache, KVCache) else vars(cache)
    return ((name, store) for name, store in found.items() if isinstance(store, KVCache))


def _more(store: KVCache) -> list[tuple[str, Tensor]]:
    """Tensors that a store keeps of its sequences beside keys and values."""
    return [(key, x) for key, x in vars(store).items() if isinstance(x, Tensor) and key not in KEPT_ELSEWHERE]
