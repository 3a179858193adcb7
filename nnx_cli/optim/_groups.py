"""Parameter groups: which parameters of a model have weight decay, and which an optimizer treats in another way."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from nnx_cli.layers.linear import Linear
from nnx_cli.layers.outside_functions import OutsideFunction


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Matrices with weight decay, vectors (gains, scales) without."""
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.dim() < 2], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def hidden_matrices(model: nn.Module) -> dict[Tensor, tuple[int, ...]]:
    """The weights of the blocks' linear layers, each with the rows of the projections packed in it."""
    layers = [module for module in cast(nn.Module, model.blocks).modules() if isinstance(module, Linear)]
    return {layer.weight: getattr(layer, "splits", (layer.out_features,)) for layer in layers}


def embedding_and_head(model: nn.Module) -> set[Tensor]:
    """The parameters between token ids and the residual stream."""
    return {p for part in (model.embedding, model.head) for p in cast(nn.Module, part).parameters()}


def split_group(groups: list[dict[str, Any]], special: set[Tensor], **options: bool) -> list[dict[str, Any]]:
    """Split groups so that `special` parameters are in groups with `options`."""
    split = []
    for group in groups:
        inside = [p for p in group["params"] if p in special]
        outside = [p for p in group["params"] if p not in special]
        split += [group | {"params": outside}] if outside else []
        split += [group | {"params": inside} | options] if inside else []
    return split


def cast_matrices(model: nn.Module, precision: str) -> None:
    """Keep a model's matrices in float32 ("fp32") or bfloat16 ("bf16"); vectors and functions of the user's stay in
    float32. In place: tied parameters stay tied, and there must be no optimizer yet."""
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    apart = {p for m in model.modules() if isinstance(m, OutsideFunction) for p in m.parameters()}
    for p in model.parameters():
        if p.dim() >= 2 and p not in apart:
            p.data = p.data.to(dtype)
