"""The state of an optimizer under the parameters' names, as checkpoints hold it."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from nnx_cli.errors import CheckpointError
from nnx_cli.optim._base import DeviceOptimizer


def optimizer_state(
    optimizer: DeviceOptimizer, model: nn.Module, local: Mapping[Tensor, Tensor] | None = None
) -> dict[str, Tensor]:
    """Every tensor of the optimizer's state as "PARAMETER.FIELD"; `local` are tensors that it moves in place of the
    model's."""
    names = _names(model, local)
    return {
        f"{names[parameter]}.{field}": value
        for parameter, fields in optimizer.state.items()
        for field, value in fields.items()
    }


def named_specs(
    optimizer: DeviceOptimizer, model: nn.Module, local: Mapping[Tensor, Tensor] | None = None
) -> dict[str, tuple[Tensor, str, torch.Size, torch.dtype]]:
    """Parameter, field, shape and type of every tensor that `optimizer_state` may have, whether or not it exists."""
    names = _names(model, local)
    return {
        f"{names[p]}.{field}": (p, field, shape, dtype)
        for p, spec in optimizer.state_specs().items()
        for field, (shape, dtype) in spec.items()
    }


def _names(model: nn.Module, local: Mapping[Tensor, Tensor] | None) -> dict[Tensor, str]:
    names: dict[Tensor, str] = {parameter: name for name, parameter in model.named_parameters()}
    return names | {mine: names[p] for p, mine in (local or {}).items()}


def load_optimizer_state(optimizer: DeviceOptimizer, model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Undo `optimizer_state`; a state of no tensor is that before the first step.

    Raises CheckpointError where names, shapes or types are not those of this model and optimizer.
    """
    expected = named_specs(optimizer, model)
    for key, value in state.items():
        if key not in expected or (value.shape, value.dtype) != expected[key][2:]:
            raise CheckpointError(f"the optimizer's state has {key}, which does not belong to this model")
    if state and len(state) < len(expected):
        raise CheckpointError("the optimizer's state does not cover this model")
    for key, value in state.items():
        parameter, field, *_ = expected[key]
        optimizer.state[parameter][field] = value.to(parameter.device)
