"""nGPT: how far each layer moves along the sphere, and whether all lie on it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nnx_cli.layers.insides import AttentionRecorder, Insides, Panel, maps_of, watched

STEPS = (
    "How each layer moves on the sphere: the learned step towards the output of attention and of the feed-forward (its "
    "mean size over the features: 0 stays, 1 goes all the way), and how far, in degrees, the text's tokens were turned "
    "by both together. Normal: steps well below 1; no layer that turns nothing."
)
NORMS = (
    "Lengths that nGPT holds at 1: the shortest and longest vector of each layer's matrices, and of its states for the "
    "text; beside them the learned scales, as means. Normal: 1.000 throughout, but for rounding, quantization and "
    "adapters; scales from a few tenths to about ten."
)


def insides(model: Any, input_ids: Tensor) -> Insides:
    """Attention, step sizes, norms and scales."""
    with (
        AttentionRecorder(model.blocks) as recorder,
        watched(model.blocks, lambda inputs, output: (inputs[0].float(), output[0].float())) as streams,
    ):
        model(input_ids)
    maps, names = maps_of(recorder.passes, input_ids.shape[1])
    steps, norms = [], []
    for block, (before, after) in zip(model.blocks, streams, strict=True):
        cosine = torch.cosine_similarity(before, after, dim=-1).clamp(-1, 1)
        sizes = [_mean_size(block.alpha_attn()), _mean_size(block.alpha_mlp())]
        steps.append([*sizes, float(torch.rad2deg(cosine.acos()).mean())])
        scales = (block.attention.s_qk, block.mlp.s_hidden, block.mlp.s_gate)
        norms.append([*_range(_matrices(block)), *_range([after]), *(_mean_size(scale()) for scale in scales)])
    columns = ("weights, shortest", "longest", "states, shortest", "longest", "s_qk", "s_hidden", "s_gate")
    panels = [
        Panel(
            "Steps", STEPS, torch.tensor(steps), names, "number", ("to attention", "to feed-forward", "turn (degrees)")
        ),
        Panel("Norms and scales", NORMS, torch.tensor(norms), names, "number", columns),
    ]
    return Insides(maps, names, panels)


def _mean_size(vector: Tensor) -> float:
    return float(vector.float().abs().mean())


def _matrices(block: Any) -> list[Tensor]:
    """The matrices of a block with the vectors of the width of the stream last, as they are used."""
    attention, mlp = block.attention, block.mlp
    eye = torch.eye(attention.qkv.in_features, device=attention.s_qk.weight.device)
    reads = [torch.cat(layer(eye), dim=-1).T for layer in (attention.qkv, mlp.hidden_gate)]
    writes = [layer(torch.eye(layer.in_features, device=eye.device)) for layer in (attention.out, mlp.down)]
    return reads + writes


def _range(vectors: list[Tensor]) -> tuple[float, float]:
    """The shortest and the longest length along the last axis."""
    lengths = torch.cat([each.float().norm(dim=-1).flatten() for each in vectors])
    return float(lengths.min()), float(lengths.max())
