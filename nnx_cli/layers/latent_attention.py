"""Attention to averaged keys that rise from latents, as N4 decodes with: neither keys nor values are ever written.

Multi-head latent attention (DeepSeek-V2, https://arxiv.org/abs/2405.04434) keeps one latent c of R elements of each
position, from which the keys W_k c and the values W_v c of all heads rise. A score q · W_k c is (W_kᵀ q) · c, and a
weighted sum of values is W_v of that of the latents: the matrices are absorbed by the few new queries and outputs. N4
attends to averages K_j = 1/j² · Σ_{m≤j} m · r_m · k_m, with a gate r for each key head. All of this is linear, so that
scores are the same running averages of scores of keys, q · K_j = 1/j² · Σ_{m≤j} m · r_m · (W_kᵀ q) · c_m: sums go over
scores, a number each, and all that is kept are a position's latent and its gates.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nnx_cli.layers.kv_cache import KVCache

QUERIES_AT_ONCE = 128  # whose scores, in float32, are written out together


class LatentCache(KVCache):
    """A position's latent and gates side by side, (L, B, 1, S, R + G)."""

    n_parts = 1

    def __init__(
        self,
        shape: tuple[int, int, int, int],
        device: torch.device,
        dtype: torch.dtype,
        window: int | None = None,
    ) -> None:
        """`shape` is (L, B, S, R + G)."""
        n_layers, batch_size, max_seq_len, width = shape
        super().__init__((n_layers, batch_size, 1, max_seq_len, width), device, dtype)
        self.window = window

    def _first(self, n_new: int) -> int:
        """As in KVCache, but averages go back to the first position, so that none is left out."""
        return 0


def latent_attention(
    q: Tensor, stored: Tensor, k_rise: Tensor, v_rise: Tensor, k_bias: Tensor, mask: Tensor | None, scale: float
) -> Tensor:
    """Attention of q (B, H, T, K) to the averages of all positions `stored`, (B, 1, S, R + G), whose keys and values
    are `k_rise`, `v_rise` (G, K, R) times their latents, keys with `k_bias` (G, K); returns (B, T, H·K)."""
    (B, H, T, K), (G, _, R) = q.shape, k_rise.shape
    c, gates = stored[:, 0].split((R, G), dim=-1)  # (B, S, R), (B, S, G)
    counts = torch.arange(c.shape[1], device=q.device).float() + 1  # (S,), float32 as gates, sums and softmax are
    share = (counts * gates.float().transpose(1, 2))[:, :, None]  # (B, G, 1, S)
    outputs = []
    for n, part in enumerate(q.unflatten(1, (G, -1)).split(QUERIES_AT_ONCE, dim=3)):  # (B, G, H / G, T', K)
        rows = part.flatten(2, 3)  # (B, G, H / G · T', K)
        scores = (rows @ k_rise).flatten(1, 2) @ c.transpose(1, 2)  # (B, H · T', S)
        scores = scores.view(B, G, -1, c.shape[1]).float() + (rows @ k_bias[:, :, None]).float()
        scores = ((scores * share).cumsum(-1) * (scale / counts.square())).view(B, H, -1, c.shape[1])
        if mask is not None:
            scores = scores + mask[:, :, n * QUERIES_AT_ONCE :][:, :, : part.shape[3]]
        y = scores.softmax(-1).to(c.dtype).flatten(1, 2) @ c  # (B, H · T', R)
        outputs.append((y.view(B, G, -1, R) @ v_rise.transpose(1, 2)).view(B, H, -1, K))
    return torch.cat(outputs, dim=2).transpose(1, 2).reshape(B, T, H * K)
