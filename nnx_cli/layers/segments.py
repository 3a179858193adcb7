"""Attention over positions that hold several keys and values each, their segments, without a mask of its own."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from nnx_cli.layers.kv_cache import KVCache

ENTROPY_ROWS = 128  # queries whose attention weights exist at once where their entropy is asked for


def attend(
    q: Tensor, k: Tensor, v: Tensor, store: KVCache | None, layer: int, *, causal: bool, dropout: float
) -> Tensor:
    """Attention of q (B, T, H, K) over k, v (B, T, G, H, K), the G segments of a position; returns (B, T, H, K).

    A position sees all segments of the positions up to its own. With segments side by side in every position that is
    plain causal attention of G queries a position, of which the last one counts: no mask, which no fused kernel takes.
    """
    B, T, G, H, K = k.shape
    q, k, v = q.transpose(1, 2), k.permute(0, 3, 1, 2, 4), v.permute(0, 3, 1, 2, 4)  # (B, H, T, K), (B, H, T, G, K)
    mask = None
    if store is not None:
        mask, causal = store.mask(T), store.is_causal(T)
        k, v = (x.unflatten(-1, (G, K)) for x in store.update(layer, k.flatten(3), v.flatten(3)))  # (B, H, S, G, K)
    k, v = k.flatten(2, 3), v.flatten(2, 3)  # (B, H, S·G, K)
    if causal:
        q = q.repeat_interleave(G, dim=2)  # (B, H, T·G, K)
    elif mask is not None:
        mask = mask.repeat_interleave(G, dim=3)  # (B, 1, T, S·G)
    y = F.scaled_dot_product_attention(q, k, v, mask, dropout, causal, scale=K**-0.5)
    return (y[:, :, G - 1 :: G] if causal else y).transpose(1, 2)


def attention_entropy(q: Tensor, k: Tensor, causal: bool) -> Tensor:
    """Mean entropy in nats, float32, of the attention of q (B, T, H, K) over k (B, T, G, H, K).

    Weights exist for ENTROPY_ROWS queries at a time and are computed again in the backward pass.
    """
    T, G = k.shape[1:3]
    k = k.flatten(1, 2)  # (B, T·G, H, K)

    def summed(q: Tensor, k: Tensor, start: int) -> Tensor:
        scores = torch.einsum("bthk,bshk->bhts", q, k).float() * q.shape[-1] ** -0.5
        queries = torch.arange(start, start + q.shape[1], device=q.device)
        keys = torch.arange(k.shape[1], device=q.device) // G
        hidden = (keys > queries[:, None]) & causal
        logs = scores.masked_fill(hidden, -torch.inf).log_softmax(-1)
        return -(logs.exp() * logs.masked_fill(hidden, 0.0)).sum()

    total = torch.zeros((), device=q.device)
    for start in range(0, T, ENTROPY_ROWS):
        end = min(start + ENTROPY_ROWS, T)
        seen = k[:, : end * G] if causal else k
        total = total + checkpoint(
            summed, q[:, start:end], seen, start, use_reentrant=False, preserve_rng_state=False
        )  # fmt: skip
    return total / (q.shape[0] * T * q.shape[2])
