"""What all optimizers here share: steps that never ask the device anything, and state whose shapes are known."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from nnx_cli.kernels.stochastic_rounding import random_key

Layout = dict[str, tuple[torch.Size, torch.dtype]]
Group = Mapping[str, Any]


class DeviceOptimizer:
    """An optimizer whose step may be captured as a CUDA graph. It has the groups and the state of torch's, but not its
    class, which imports the compiler, 1 s, when an object is made of it.

    `found_inf`, a float32 tensor of one number on the parameters' device, 0 or 1, is set from outside: where it is 1,
    `step` leaves weights and state as they are, to the bit, whatever the gradients hold. On CUDA a group's `lr` is a
    tensor, so that it can change between replays. A parameter's state begins as zeros at its first step.
    """

    found_inf: Tensor | None = None
    capturable = True  # whether a step asks the device nothing, so that a CUDA graph can hold it

    def __init__(self, params: Iterable[Any], defaults: dict[str, Any], seed: int = 0) -> None:
        given = list(params)
        groups = given if isinstance(given[0], dict) else [{"params": given}]
        self.param_groups = [defaults | group | {"params": list(group["params"])} for group in groups]
        self.state: dict[Tensor, dict[str, Tensor]] = defaultdict(dict)
        for group in self.param_groups:
            if group["params"][0].is_cuda and not isinstance(group["lr"], Tensor):
                group["lr"] = torch.tensor(float(group["lr"]), device=group["params"][0].device)
        parameters = [p for group in self.param_groups for p in group["params"]]
        self.keys = {p: random_key(seed, i) for i, p in enumerate(parameters)}  # of the bits that round it

    def rounded(self, p: Tensor) -> Layout:
        """What rounding a bfloat16 parameter needs: its steps are counted."""
        if p.dtype != torch.bfloat16:
            return {}
        return {"step": (torch.Size(()), torch.float32)}

    def layout(self, p: Tensor, group: Group) -> Layout:
        """Shape and type of every tensor of a parameter's state."""
        raise NotImplementedError

    def update(self, parameters: list[Tensor], group: Group, found_inf: Tensor | None) -> None:
        """Move parameters of a group, whose state exists, by their gradients."""
        raise NotImplementedError

    def clip(self, norm: Tensor, limit: float) -> None:
        """Scale all gradients, whose norm is `norm`, down to one of `limit` where that is less."""
        gradients = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        torch.nn.utils.clip_grads_with_norm_(gradients, limit, norm, foreach=True)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Free all gradients, or make them zeros."""
        for p in (p for group in self.param_groups for p in group["params"]):
            if set_to_none:
                p.grad = None
            elif p.grad is not None:
                p.grad = torch.zeros_like(p.grad)

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            self.step_on([p for p in group["params"] if p.grad is not None], group, self.found_inf)

    def step_on(self, parameters: list[Tensor], group: Group, found_inf: Tensor | None) -> None:
        """The step of some parameters of a group, all with gradients."""
        for p in parameters:
            if not self.state[p]:
                for field, (shape, dtype) in self.layout(p, group).items():
                    self.state[p][field] = torch.zeros(shape, dtype=dtype, device=p.device)
        if found_inf is not None:
            found_inf = found_inf.reshape(())
            if found_inf.device.type == "cpu":  # nothing to wait for
                if found_inf != 0:
                    return
                found_inf = None
        if parameters:
            self.update(parameters, group, found_inf)

    def layouts(self) -> dict[Tensor, Layout]:
        """The layout of every parameter's state, whether or not it exists yet."""
        return {p: self.layout(p, group) for group in self.param_groups for p in group["params"]}

    def state_bytes(self) -> int:
        """Bytes of all state."""
        return sum(
            shape.numel() * dtype.itemsize for layout in self.layouts().values() for shape, dtype in layout.values()
        )

    def count_step(self, parameters: list[Tensor], found_inf: Tensor | None) -> None:
        """Add a step to the parameters that count theirs, unless it was left out."""
        steps = [self.state[p]["step"] for p in parameters if "step" in self.state[p]]
        if steps and found_inf is None:
            torch._foreach_add_(steps, 1.0)
        elif steps:  # a list, for a single tensor would be read on the host
            torch._foreach_add_(steps, [1.0 - (found_inf != 0).float()] * len(steps))
