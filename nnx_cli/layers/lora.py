"""Low-rank adapters of a whole model: add, merge, remove. Hu et al. 2021, https://arxiv.org/abs/2106.09685."""

from __future__ import annotations

import torch
from torch import nn

from nnx_cli.layers.linear import Linear


def add_adapters(model: nn.Module, rank: int) -> None:
    """Freeze all parameters and give the layers that `model.adapter_layers()` names an adapter each."""
    model.requires_grad_(False)
    for layer, options in model.adapter_layers():
        layer.add_adapter(rank, **options)


def adapted_layers(model: nn.Module) -> list[Linear]:
    """The layers that carry an adapter."""
    return [m for m in model.modules() if isinstance(m, Linear) and m.lora_a is not None]


@torch.no_grad()
def merge_adapters(model: nn.Module) -> None:
    """Add every adapter to its weight and remove it."""
    for layer in adapted_layers(model):
        layer.weight += layer.adapter_delta().to(layer.weight.dtype)
    remove_adapters(model)


def remove_adapters(model: nn.Module) -> None:
    """Be the base model again, trainable as a whole."""
    for layer in adapted_layers(model):
        layer.remove_adapter()
    model.requires_grad_(True)
