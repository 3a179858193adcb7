"""NYX: how agreement of a query with a key fades with their distance."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nnx_cli.layers.insides import AttentionRecorder, Insides, Panel, by_layer, each_query_head, maps_of

DECAY = (
    "The xPos decay: what is left of the agreement of a query with a key so many tokens back, of each head. The decay "
    "of a pair of features is fixed; a head's is their mean, weighted by how much of queries and keys lies in each. "
    "Normal: 1 at no distance, then slowly down; a head that falls faster puts more into quickly turning pairs."
)


def insides(model: Any, input_ids: Tensor) -> Insides:
    """Attention, and the decay of every head with distance, if there is one."""
    with AttentionRecorder(model.blocks) as recorder:
        model(input_ids)
    maps, names = maps_of(recorder.passes, input_ids.shape[1])
    if not model.config.xpos:
        return Insides(maps, names)
    K, base = model.config.head_dim, model.config.xpos_scale_base
    pair = torch.arange(0, K, 2, device=input_ids.device)
    zeta = (pair + 0.4 * K) / (1.4 * K)
    longest = max(1, model.config.seq_len - 1)
    distances = sorted({0, *(2**power for power in range(longest.bit_length()) if 2**power <= longest), longest})
    left = zeta ** (torch.tensor(distances, device=zeta.device)[:, None] / base)  # (distances, K/2)
    rows = []
    for (call,) in recorder.passes:
        k = each_query_head(call.k, call.q.shape[1])
        q_length, k_length = (x.unflatten(-1, (2, -1)).square().sum(-2).sqrt()[0] for x in (call.q, k))
        weight = (q_length * k_length).mean(1)  # (H, K/2), free of decay: that of a key is the inverse of its query's
        rows.append((weight / weight.sum(-1, keepdim=True)) @ left.T)
    decay = Panel(
        "xPos decay",
        DECAY,
        torch.cat(rows).cpu(),
        by_layer(names, len(rows[0]), "head"),
        columns=[f"{distance:,}" for distance in distances],
    )
    return Insides(maps, names, [decay])
