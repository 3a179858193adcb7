"""A model that is divided among ranks: each keeps rows of every parameter, and has whole ones for a moment (FSDP)."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.nn.utils import get_total_norm

from nnx_cli.models._base import LanguageModel
from nnx_cli.runs.tensors import load_weights
from nnx_cli.system.ranks import Ranks


class Shards:
    """Divides a model of the meta device among ranks by `fully_shard`: blocks one by one, and all else together.

    The optimizer moves `local`: of every parameter the rows of this rank, as a plain tensor. Parameters that cannot be
    divided so that a rank's part has a multiple of `unit` elements stay whole on all ranks, and so do vectors beside
    matrices of another type, for FSDP gathers one type at a time. Weights are zeros until `fill`.
    """

    def __init__(self, model: LanguageModel, ranks: Ranks, device: torch.device, unit: int = 1) -> None:
        warnings.filterwarnings("ignore", message="FSDP2-wrapped module")  # of blocks that return a view, which is kept
        self.model = model
        self.ranks = ranks
        self.blank = copy.deepcopy(model)
        odd = {p for p in model.parameters() if p.dim() > 1 and -(-len(p) // ranks.count) * p[0].numel() % unit}
        if len({p.dtype for p in model.parameters()}) > 1:
            odd |= {p for p in model.parameters() if p.dim() < 2}
        mesh = init_device_mesh(device.type, (ranks.count,))
        for block in model.blocks:
            fully_shard(block, mesh=mesh, ignored_params=odd)
        fully_shard(model, mesh=mesh, ignored_params=odd)
        register_fsdp_forward_method(model, "trunk")
        model.to_empty(device=device)
        self.local: dict[Tensor, Tensor] = {p: _local(p) for p in model.parameters()}

    def parts(self) -> dict[str, Tensor]:
        """This rank's part of every tensor of the model, by its name; all of one that is not divided."""
        return {name: _part(tensor) for name, tensor in self.model.state_without_ties().items()}

    def divided(self) -> set[str]:
        """The names of the tensors that are divided."""
        return {name for name, tensor in self.model.state_without_ties().items() if _is_divided(tensor)}

    def take_gradients(self) -> None:
        """Give what the optimizer moves the gradients of the model's parameters, of which FSDP takes the mean."""
        for p, mine in self.local.items():
            if mine is not p and p.grad is not None:
                mine.grad, p.grad = _part(p.grad), None

    def undivided_gradients(self) -> list[Tensor]:
        """Gradients of parameters that are whole on all ranks: they are left to be added up."""
        return [p.grad for p, mine in self.local.items() if mine is p and p.grad is not None]

    def norm(self) -> Tensor:
        """The norm of all gradients."""
        mine = [part.grad for p, part in self.local.items() if part is not p and part.grad is not None]
        square = get_total_norm(mine, foreach=True).square().to(self.model.device)
        self.ranks.add_up([square])
        if undivided := self.undivided_gradients():
            square += get_total_norm(undivided, foreach=True).square()
        return square.sqrt()

    def whole(self, parts: Mapping[str, Tensor], is_divided: Callable[[str], bool]) -> dict[str, Tensor]:
        """Tensors of which each rank has a part, whole in the memory of the first one's host; nothing on the others.
        On its device one of them is whole at a time."""
        found = {}
        for name, part in parts.items():
            tensor = self.ranks.join(part) if is_divided(name) else part
            if self.ranks.is_first:
                found[name] = tensor.detach().to("cpu", copy=True)
        return found

    def whole_weights(self) -> dict[str, Tensor]:
        """The model's tensors, as `whole` gives them."""
        return self.whole(self.parts(), self.divided().__contains__)

    @torch.no_grad()
    def fill(
        self, parts: Mapping[str, Tensor], is_divided: Callable[[str], bool], whole: Mapping[str, Tensor] | None
    ) -> None:
        """Fill parts with what the first rank has whole."""
        for name, part in parts.items():
            if whole is not None and not is_divided(name):
                part.copy_(whole[name])
            if is_divided(name):
                self.ranks.divide(None if whole is None else whole[name], part)
            else:
                self.ranks.spread([part])

    def fill_weights(self, whole: Mapping[str, Tensor] | None) -> None:
        """Give every rank its part of the first one's weights."""
        self.fill(self.parts(), self.divided().__contains__, whole)
        self.model.reshard()  # type: ignore[operator]  # of the class that `fully_shard` made of it

    def copied(self) -> LanguageModel | None:
        """The model as it is, whole in the memory of the first rank's host; None on the others."""
        weights = self.whole_weights()
        if not self.ranks.is_first:
            return None
        model = copy.deepcopy(self.blank)
        load_weights(model, weights, Path(), torch.device("cpu"))
        model.compute_dtype = torch.float32
        return model


def _is_divided(tensor: Tensor) -> bool:
    return hasattr(tensor, "to_local")


def _part(tensor: Tensor) -> Tensor:
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def _local(p: Tensor) -> Tensor:
    """What an optimizer moves for a parameter."""
    return nn.Parameter(_part(p).detach(), requires_grad=p.requires_grad) if _is_divided(p) else p
