"""The base of all optimizers here: torch's, with steps that need not ask the device, and state of known shapes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nnx_cli.kernels.stochastic_rounding import random_key
from nnx_cli.system.ranks import ALONE, Ranks

StateSpec = dict[str, tuple[torch.Size, torch.dtype]]  # shape and type of every tensor of a parameter's state
Group = Mapping[str, Any]
BETAS = (0.9, 0.99)  # decay of the first and second moments, in AdamW and Lion


@dataclass(frozen=True, kw_only=True)
class Defaults:
    """What an optimizer learns best with: `DEFAULTS` of its file, or these, AdamW's."""

    lr_share: float = 1.0  # of the learning rate that the width suggests
    lr: float | None = None  # a learning rate for every width instead
    weight_decay: bool = True
    beta2: bool = True  # whether it averages squared gradients


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """Settings that every optimizer is built with."""

    lr: float
    weight_decay: float  # of matrices
    betas: tuple[float, float] = BETAS
    seed: int = 0  # of stochastic rounding


class DeviceOptimizer(torch.optim.Optimizer):
    """A `torch.optim.Optimizer` that can leave a step out, and knows its state before there is any.

    `found_inf`, float32 () on the parameters' device, 0 or 1, is set from outside: where it is 1, `step` leaves weights
    and state as they are, to the bit, whatever the gradients hold. A parameter's state begins as zeros at its first
    step. A step of a `capturable` class may be part of a CUDA graph, and on CUDA the `lr` of its groups is a tensor, so
    that it can change between replays; other classes read `found_inf` on the host and take `lr` as a number.
    """

    found_inf: Tensor | None = None
    capturable = True  # whether a step asks the device nothing, so that a CUDA graph can hold it
    ranks: Ranks = ALONE  # that have the same parameters and gradients, and may divide the work

    def __init__(self, params: Iterable[Any], defaults: dict[str, Any], seed: int = 0) -> None:
        self.seed = seed
        self.keys: dict[Tensor, int] = {}  # of the random bits that round a parameter
        self.owners: dict[Tensor, int] = {}  # the rank that alone moves a parameter, where not all do
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, as `torch.optim.Optimizer` does."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        for p in group["params"]:
            self.keys[p] = random_key(self.seed, len(self.keys))
        device = group["params"][0].device
        if self.capturable and device.type == "cuda" and not isinstance(group["lr"], Tensor):
            group["lr"] = torch.tensor(float(group["lr"]), device=device)

    def move(self, local: Mapping[Tensor, Tensor], rank: int, owners: Mapping[Tensor, int]) -> None:
        """Move other tensors in place of the parameters that it was built with: the rows of each that a rank has.
        What is rounded at random is so with bits of the rank's own. Of parameters that have an owner only that rank has
        the state, and tells the others what becomes of them. There must be no state yet."""
        for group in self.param_groups:
            group["params"] = [local[p] for p in group["params"]]
        self.keys = {local[p]: key + rank * (local[p] is not p) for p, key in self.keys.items()}
        self.owners = dict(owners)

    def is_mine(self, p: Tensor) -> bool:
        """Whether this rank moves a parameter, or its part of it."""
        return self.owners.get(p, self.ranks.rank) == self.ranks.rank

    @property
    def may_be_captured(self) -> bool:
        """Whether a CUDA graph can hold a step, with the ranks that there are."""
        return self.capturable

    def rounding_spec(self, p: Tensor) -> StateSpec:
        """State that stochastic rounding of a bfloat16 parameter needs: its steps are counted."""
        return {"step": (torch.Size(()), torch.float32)} if p.dtype == torch.bfloat16 else {}

    def state_spec(self, p: Tensor, group: Group) -> StateSpec:
        """Shape and type of every tensor of a parameter's state."""
        raise NotImplementedError

    def state_specs(self) -> dict[Tensor, StateSpec]:
        """The spec of every parameter's state, whether or not it exists yet."""
        return {p: self.state_spec(p, group) for group in self.param_groups for p in group["params"]}

    def update(self, parameters: list[Tensor], group: Group, found_inf: Tensor | None) -> None:
        """Move parameters of a group, whose state exists, by their gradients."""
        raise NotImplementedError

    def clip(self, norm: Tensor, limit: float) -> None:
        """Scale all gradients, whose norm is `norm`, down to one of `limit` where that is less."""
        gradients = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        torch.nn.utils.clip_grads_with_norm_(gradients, limit, norm, foreach=True)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Move all parameters that have a gradient; returns what `closure`, called first, returns."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        found_inf = self._readable(self.found_inf)
        for group in self.param_groups:
            self.step_on([p for p in group["params"] if p.grad is not None and self.is_mine(p)], group, found_inf)
        for p, owner in self.owners.items():
            self.ranks.spread([p], owner)
        return loss

    def step_on(self, parameters: list[Tensor], group: Group, found_inf: Tensor | None) -> None:
        """The step of some parameters of a group, all with gradients."""
        for p in parameters:
            if not self.state[p]:
                for field, (shape, dtype) in self.state_spec(p, group).items():
                    self.state[p][field] = torch.zeros(shape, dtype=dtype, device=p.device)
        found_inf = self._readable(found_inf)
        if found_inf is not None:
            found_inf = found_inf.reshape(())
            if found_inf.device.type == "cpu":  # reading it synchronizes nothing
                if found_inf != 0:
                    return
                found_inf = None
        if parameters:
            self.update(parameters, group, found_inf)

    def count_step(self, parameters: list[Tensor], found_inf: Tensor | None) -> None:
        """Add a step to the parameters that count theirs, unless it was left out."""
        steps = [self.state[p]["step"] for p in parameters if "step" in self.state[p]]
        if steps and found_inf is None:
            torch._foreach_add_(steps, 1.0)
        elif steps and found_inf is not None:  # a list, for a single tensor would be read on the host
            torch._foreach_add_(steps, [1.0 - (found_inf != 0).float()] * len(steps))

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Undo `state_dict`. Torch would cast moments to the type of their weights; they keep their own."""
        super().load_state_dict(state_dict)
        saved = [i for group in state_dict["param_groups"] for i in group["params"]]
        parameters = [p for group in self.param_groups for p in group["params"]]
        for i, p in zip(saved, parameters, strict=True):
            for field, value in state_dict["state"].get(i, {}).items():
                self.state[p][field] = value.detach().to(p.device, copy=True)

    def _readable(self, found_inf: Tensor | None) -> Tensor | None:
        return found_inf if self.capturable or found_inf is None else found_inf.cpu()


def set_lr(optimizer: DeviceOptimizer, lr: float) -> None:
    """Give every parameter group the same learning rate; where it is a tensor, in place, for graphs that read it."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(lr)
        else:
            group["lr"] = lr
