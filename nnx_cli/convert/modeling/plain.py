"""What a modelling file has in place of parts that come in fast versions only: under their names, by operations of
torch, for any device. `write` copies what a model uses.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nnx_cli.kernels.precision import widened
from nnx_cli.kernels.soft_xor import soft_xor
from nnx_cli.layers.segment_attention import repeat_segments

Make = Callable[[Tensor], Sequence[Tensor]]


class Linear(nn.Linear):
    """x @ weight.T, in the type of x."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in) to (..., out)."""
        return F.linear(x, self.weight.to(x.dtype))


class PackedLinear(Linear):
    """Several projections of one input, of widths `splits`, whose matrices are stacked."""

    def __init__(self, in_features: int, splits: Sequence[int]) -> None:
        super().__init__(in_features, sum(splits))
        self.splits = tuple(splits)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]  # more results than its base
        """x (..., in) to one tensor for each projection."""
        return super().forward(x).split(self.splits, dim=-1)


class KVCache:
    """Keys and values of the positions so far, side by side: (B, 2G, S, K) for each layer."""

    def __init__(self, shape: tuple[int, int, int, int, int], device: torch.device, dtype: torch.dtype) -> None:
        n_layers, batch_size, n_heads, _, width = shape
        empty = torch.zeros(batch_size, 2 * n_heads, 0, width, device=device, dtype=dtype)
        self.layers = [empty] * n_layers
        self.length = 0

    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        """Append k, v (B, G, T, K) of new positions; returns those of all positions."""
        self.layers[layer] = torch.cat((self.layers[layer], torch.cat((k, v), dim=1)), dim=2)
        return self.layers[layer].chunk(2, dim=1)

    def lookup(self, make: Make, n_new: int) -> Sequence[Tensor]:
        """What `make` says of the positions of the next `n_new` tokens."""
        return make(torch.arange(self.length, self.length + n_new, device=self.layers[0].device))

    def advance(self, n_new: int) -> None:
        """Count new positions, after all layers have stored theirs."""
        self.length += n_new

    def get_seq_length(self) -> int:
        """Positions so far."""
        return self.length

    def reorder_cache(self, rows: Tensor) -> None:
        """Take other rows of the batch, as beam search asks for."""
        self.layers = [stored[rows] for stored in self.layers]


class AveragedKeyCache(KVCache):
    """Averaged keys and values, and the running sums (L, B, G, K), float32, that they go on from."""

    def __init__(self, config: Any, batch_size: int, max_seq_len: int, device: torch.device, dtype: torch.dtype):
        head_dim = config.dim // config.n_heads
        super().__init__((config.n_layers, batch_size, config.n_kv_heads, max_seq_len, head_dim), device, dtype)
        self.sums = torch.zeros(config.n_layers, batch_size, config.n_kv_heads, head_dim, device=device)

    def reorder_cache(self, rows: Tensor) -> None:
        """As in KVCache, with the sums."""
        super().reorder_cache(rows)
        self.sums = self.sums[:, rows]


class TapeCache:
    """Keys and values of the first level, of all others with their segments side by side, and the prophet's states."""

    def __init__(self, first: KVCache, others: KVCache, prophet: KVCache) -> None:
        self.first, self.others, self.prophet = self.stores = first, others, prophet

    def prophet_states(self) -> Tensor:
        """The states of both layers after the last position, (2, B, P); zero where there is none."""
        states = F.pad(self.prophet.layers[0], (0, 0, 1, 0))  # (B, 2, 1 + S, P)
        return states[:, :, -1].transpose(0, 1)

    def advance(self, n_new: int) -> None:
        """As in KVCache."""
        for store in self.stores:
            store.advance(n_new)

    def get_seq_length(self) -> int:
        """As in KVCache."""
        return self.first.length

    def reorder_cache(self, rows: Tensor) -> None:
        """As in KVCache."""
        for store in self.stores:
            store.reorder_cache(rows)


def unit(x: Tensor, axis: int = -1) -> Tensor:
    """x over its L2 norm along an axis, float32."""
    return F.normalize(x.float(), dim=axis)


def tables_of(make: Make, input_ids: Tensor, cache: KVCache | None) -> Sequence[Tensor]:
    """What `make` says of the positions of tokens (B, T)."""
    T = input_ids.shape[1]
    return make(torch.arange(T, device=input_ids.device)) if cache is None else cache.lookup(make, T)


def causal_attention(q: Tensor, k: Tensor, v: Tensor, cache: KVCache | None, layer: int, *, scale: float) -> Tensor:
    """Causal attention of q (B, H, T, K) over k, v (B, G, T, K) and what is cached; returns (B, T, H·K)."""
    if cache is not None:
        k, v = cache.update(layer, k, v)
    (B, H, T, K), S = q.shape, k.shape[2]
    seen = torch.ones(T, S, dtype=torch.bool, device=q.device).tril(S - T)
    y = F.scaled_dot_product_attention(q, k, v, seen, scale=scale, enable_gqa=k.shape[1] != H)
    return y.transpose(1, 2).reshape(B, T, H * K)


def recent_attention(
    q: Tensor, k: Tensor, v: Tensor, cache: KVCache | None, layer: int, window: int | None, *, scale: float
) -> Tensor:
    """Causal attention of q (B, H, T, K) to the newest `window` positions, or all, of k, v (B, G, T, K) and what is
    cached; returns (B, T, H·K)."""
    if cache is not None:
        k, v = cache.update(layer, k, v)
    (B, H, T, K), S = q.shape, k.shape[2]
    seen = torch.ones(T, S, dtype=torch.bool, device=q.device).tril(S - T)
    if window is not None:
        seen = seen.triu(S - T + 1 - window)
    y = F.scaled_dot_product_attention(q, k, v, seen, scale=scale, enable_gqa=k.shape[1] != H)
    return y.transpose(1, 2).reshape(B, T, H * K)


def attend(q: Tensor, kv: Tensor, repeats: Sequence[int], store: KVCache | None, layer: int, *, causal: bool) -> Tensor:
    """Attention of q (B, T, H, K) over kv (G, B, T, 2, H, K), the keys and values of G segments of a position, each of
    which occurs as often as `repeats` says; returns (B, T, H, K)."""
    beside = repeat_segments(kv, repeats)  # (B, T, N, 2, H, K)
    T, n, K = q.shape[1], beside.shape[2], q.shape[-1]
    k, v = (x.permute(0, 3, 1, 2, 4).flatten(3) for x in beside.unbind(3))  # (B, H, T, N·K)
    if store is not None:
        k, v = store.update(layer, k, v)
    S = k.shape[2]
    k, v = (x.unflatten(-1, (n, K)).flatten(2, 3) for x in (k, v))  # (B, H, S·N, K)
    seen = torch.ones(T, S, dtype=torch.bool, device=q.device)
    if causal or store is not None:
        seen = seen.tril(S - T)
    seen = seen.repeat_interleave(n, dim=1)
    return F.scaled_dot_product_attention(q.transpose(1, 2), k, v, seen, scale=K**-0.5).transpose(1, 2)


def activation(x: Tensor, repeats: int = 1) -> Tensor:
    """The odd, saturating activation, slope 1 at 0 and limits ±0.2014, or its `repeats`-fold composition.

    With s = 2 tanh(x/2), l = ±ln(1 + |s|), p = l / sqrt(1 + 24 l²) it is 2 atanh(p/2). Applied again, s is the p of
    before. Operations are those that the model was trained with, for its head makes much of their rounding.
    """
    below = torch.expm1(-widened(x).abs())  # exp(-|x|) - 1
    s = -2 * below / (2 + below)
    for _ in range(repeats):
        log = torch.log1p(s)
        s = log * torch.rsqrt(1 + 24 * log * log)
    square = s * s
    series = 1 + square * (1 / 12 + square * (1 / 80 + square / 448))  # 2 atanh(s/2) / s up to 1.3e-9: |s| < 0.205
    return (s * series).copysign(x).to(x.dtype)


def recurrence(inputs: Tensor, weight: Tensor, state: Tensor) -> Tensor:
    """States (T, B, P) from inputs (T, B, 2 P), weight (2 P, P) and the first state (B, P)."""
    states = []
    for x in inputs:
        left, right = activation(torch.addmm(x, state, weight.t()), repeats=2).chunk(2, dim=-1)
        state = soft_xor(left, right)
        states.append(state)
    return torch.stack(states)
