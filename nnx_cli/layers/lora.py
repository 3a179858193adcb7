"""Low-rank adapters of a whole model: add, merge, remove. Hu et al. 2021, https://arxiv.org/abs/2106.09685."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

import torch
from torch import nn

from nnx_cli.errors import UsageError
from nnx_cli.layers.linear import Linear


class Adaptable(Protocol):
    """A model that says which of its layers take an adapter."""

    def adapter_layers(self) -> Iterator[tuple[Linear, dict[str, Any]]]:
        """The layers, with the options of their `add_adapter`."""

    def requires_grad_(self, requires_grad: bool) -> Any:
        """Freeze or train all parameters."""


def check_rank(model: Adaptable, rank: int) -> None:
    """Raise UsageError where no matrix that an adapter goes to has a rank above `rank`."""
    shapes = [shape for layer, options in model.adapter_layers() for shape in layer.adapted_shapes(**options)]
    if rank >= max(min(shape) for shape in shapes):
        most = max(rows * columns // (rows + columns) for rows, columns in shapes)
        raise UsageError(
            f"--lora-rank {rank} is no low rank: no matrix of this model has a higher one",
            fix=f"take --lora-rank {most} or less: beyond it adapters are larger than their matrices",
        )


def add_adapters(model: Adaptable, rank: int) -> None:
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
