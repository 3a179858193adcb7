"""A model that is divided among ranks: each keeps rows of every parameter, and has whole ones for a moment (FSDP)."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Container, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.nn.utils import get_total_norm

from nnx_cli.kernels.log8 import BLOCK
from nnx_cli.models._base import LanguageModel
from nnx_cli.runs.tensors import load_weights
from nnx_cli.system.ranks import Ranks


@dataclass(frozen=True)
class Part:
    """What a rank has of a tensor: its rows, or all of it as `source` has, the rank whose elements count. Where that is
    another one, room for them."""

    name: str
    tensor: Tensor
    source: int | None


class Shards:
    """Divides a model of the meta device among ranks by `fully_shard`: blocks one by one, and all else together.

    The optimizer moves `local`: of every parameter the rows of this rank, as a plain tensor. Those `in_blocks`, whose
    moments share scales by the block, stay whole on all ranks where the rows of one are no whole blocks; each of them
    has an owner, the one rank that keeps its moments. What is in float32 beside matrices in bfloat16 stays whole
    too, moments and all, for FSDP gathers one type at a time. Weights are zeros until `fill`.
    """

    def __init__(
        self, model: LanguageModel, ranks: Ranks, device: torch.device, in_blocks: Container[Tensor] = ()
    ) -> None:
        warnings.filterwarnings("ignore", message="FSDP2-wrapped module")  # of blocks that return a view, which is kept
        self.model = model
        self.ranks = ranks
        self.blank = copy.deepcopy(model)
        eight_bit = [p for p in model.parameters() if p in in_blocks]
        odd = {p for p in eight_bit if -(-len(p) // ranks.count) * p[0].numel() % BLOCK}
        owned = [name for name, p in model.named_parameters() if p in odd]
        if len({p.dtype for p in model.parameters()}) > 1:
            odd |= {p for p in model.parameters() if p.dtype == torch.float32}
        mesh = init_device_mesh(device.type, (ranks.count,))
        for block in model.blocks:
            fully_shard(block, mesh=mesh, ignored_params=odd)
        fully_shard(model, mesh=mesh, ignored_params=odd)
        register_fsdp_forward_method(model, "trunk")
        model.to_empty(device=device)
        self.local: dict[Tensor, Tensor] = {p: _local(p) for p in model.parameters()}
        self.owners = _shared_out(map(model.get_parameter, owned), ranks.count)

    def parts(self) -> Iterator[Part]:
        """This rank's part of every tensor of the model; all of one that is not divided."""
        for name, tensor in self.model.state_without_ties().items():
            yield Part(name, _part(tensor), None if _is_divided(tensor) else 0)

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

    def whole(self, parts: Iterable[Part]) -> dict[str, Tensor]:
        """Tensors of which each rank has a part, or one has all, in the memory of the first one's host; nothing on the
        others. On its device one of them is whole at a time."""
        found = {}
        for part in parts:
            tensor = part.tensor
            if part.source is None:
                tensor = self.ranks.join(tensor)
            elif part.source:
                self.ranks.spread([tensor], part.source)
            if self.ranks.is_first:
                found[part.name] = tensor.detach().to("cpu", copy=True)
        return found

    def whole_weights(self) -> dict[str, Tensor]:
        """The model's tensors, as `whole` gives them."""
        return self.whole(self.parts())

    @torch.no_grad()
    def fill(self, parts: Iterable[Part], whole: Mapping[str, Tensor] | None) -> None:
        """Fill parts with what the first rank has whole."""
        for part in parts:
            if part.source is None:
                self.ranks.divide(None if whole is None else whole[part.name], part.tensor)
                continue
            if whole is not None:
                part.tensor.copy_(whole[part.name])
            self.ranks.spread([part.tensor])

    def fill_weights(self, whole: Mapping[str, Tensor] | None) -> None:
        """Give every rank its part of the first one's weights."""
        self.fill(self.parts(), whole)
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


def _shared_out(parameters: Iterable[Tensor], n_ranks: int) -> dict[Tensor, int]:
    """A rank for each parameter, so that each has about as many elements of them."""
    loads, owners = [0] * n_ranks, {}
    for p in sorted(parameters, key=Tensor.numel, reverse=True):
        owners[p] = loads.index(min(loads))
        loads[owners[p]] += p.numel()
    return owners


def _is_divided(tensor: Tensor) -> bool:
    return hasattr(tensor, "to_local")


def _part(tensor: Tensor) -> Tensor:
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def _local(p: Tensor) -> Tensor:
    """What an optimizer moves for a parameter."""
    return nn.Parameter(_part(p).detach(), requires_grad=p.requires_grad) if _is_divided(p) else p
