"""AdamW with its moments in 8 bits."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from nnx_cli.kernels.log8 import n_blocks
from nnx_cli.optim._base import Group, OptimizerConfig, StateSpec
from nnx_cli.optim._groups import embedding_and_head, parameter_groups, split_group
from nnx_cli.optim.adamw import AdamW

MIN_ELEMENTS = 4096  # of a matrix; smaller ones are not worth 8 bits


class AdamW8bit(AdamW):
    """AdamW whose groups with `eight_bit` keep both moments in 8 bits: 2.03 bytes an element instead of 8.

    After Dettmers et al. 2021, https://arxiv.org/abs/2110.02861, with another code: `kernels.log8`.
    """

    def __init__(self, params: Iterable[Any], lr: float, *args: Any, eight_bit: bool = True, **options: Any) -> None:
        super().__init__(params, lr, *args, eight_bit=eight_bit, **options)

    def is_fused(self, p: Tensor, group: Group) -> bool:
        """Whether torch's kernel takes a parameter of a group."""
        return super().is_fused(p, group) and not group["eight_bit"]

    def state_spec(self, p: Tensor, group: Group) -> StateSpec:
        """A count of steps, and both moments, as codes and a scale for each block where they have 8 bits."""
        spec = super().state_spec(p, group)
        if not group["eight_bit"]:
            return spec
        scales = torch.Size((n_blocks(p.numel()),)), torch.float32
        for moment in ("exp_avg", "exp_avg_sq"):
            spec |= {moment: (p.shape, torch.uint8), f"{moment}_scale": scales}
        return spec


def eight_bit_matrices(model: nn.Module) -> set[Tensor]:
    """Parameters with moments in 8 bits: large matrices that are trained, except embedding and head."""
    wide = embedding_and_head(model)
    trained = (p for p in model.parameters() if p.requires_grad and p not in wide)
    return {p for p in trained if p.dim() >= 2 and p.numel() >= MIN_ELEMENTS}


def build(model: nn.Module, config: OptimizerConfig) -> AdamW8bit:
    """AdamW with 8-bit moments for large matrices, except embedding and head."""
    groups = split_group(parameter_groups(model, config.weight_decay), eight_bit_matrices(model), eight_bit=True)
    return AdamW8bit(groups, config.lr, config.betas, eight_bit=False, seed=config.seed)
