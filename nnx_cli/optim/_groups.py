"""The optimizer of a run, its parameter groups, and its state under the parameters' names."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from nnx_cli.config import TrainConfig
from nnx_cli.errors import CheckpointError
from nnx_cli.layers.linear import Linear
from nnx_cli.optim._base import DeviceOptimizer

BETAS = (0.9, 0.99)  # of AdamW and Lion
LEAST_IN_EIGHT_BITS = 4096  # numbers of a matrix; smaller ones are not worth it


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Matrices with weight decay, vectors (gains, scales) without."""
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.dim() < 2], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def hidden_matrices(model: nn.Module) -> dict[Tensor, tuple[int, ...]]:
    """The weights of the blocks' linear layers, each with the rows of the projections packed in it."""
    layers = [module for module in model.blocks.modules() if isinstance(module, Linear)]
    return {layer.weight: getattr(layer, "splits", (layer.out_features,)) for layer in layers}


def outer_parameters(model: nn.Module) -> set[Tensor]:
    """Embedding and head: between token ids and the residual stream."""
    return {*model.embedding.parameters(), *model.head.parameters()}


def set_apart(groups: list[dict], special: set[Tensor], **options: bool) -> list[dict]:
    """Split groups so that `special` parameters are in groups with `options`."""
    split = []
    for group in groups:
        inside = [p for p in group["params"] if p in special]
        outside = [p for p in group["params"] if p not in special]
        split += [group | {"params": outside}] if outside else []
        split += [group | {"params": inside} | options] if inside else []
    return split


def build_optimizer(model: nn.Module, config: TrainConfig) -> DeviceOptimizer:
    """The optimizer that `config` names, for the parameters of a model that are trained."""
    groups = parameter_groups(model, config.weight_decay)
    lr, seed = config.lr, config.seed
    if config.optimizer == "wolf":
        from nnx_cli.optim.wolf import Wolf

        return Wolf(groups, lr, seed=seed)
    if config.optimizer == "lion":
        from nnx_cli.optim.lion import Lion

        return Lion(groups, lr, BETAS, seed=seed)
    betas = (BETAS[0], config.beta2 or BETAS[1])
    if config.optimizer == "muon":
        from nnx_cli.optim.muon import Muon

        splits = hidden_matrices(model)
        return Muon(set_apart(groups, set(splits), orthogonal=True), lr, betas, splits=splits, seed=seed)
    from nnx_cli.optim.adamw import AdamW

    if config.optimizer == "adamw8bit":
        outer = outer_parameters(model)
        large = {p for p in model.parameters() if p.dim() >= 2 and p.numel() >= LEAST_IN_EIGHT_BITS and p not in outer}
        groups = set_apart(groups, large, eight_bit=True)
    return AdamW(groups, lr, betas, seed=seed)


def set_lr(optimizer: DeviceOptimizer, lr: float) -> None:
    """Give every parameter group the same learning rate; where it is a tensor, in place, for graphs that read it."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(lr)
        else:
            group["lr"] = lr


def store_weights(model: nn.Module, precision: str) -> None:
    """Keep a model's matrices in float32 ("fp32") or bfloat16 ("bf16"); vectors stay in float32. In place: tied
    parameters stay tied, and there must be no optimizer yet."""
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    for p in model.parameters():
        if p.dim() >= 2:
            p.data = p.data.to(dtype)


def optimizer_state(optimizer: DeviceOptimizer, model: nn.Module) -> dict[str, Tensor]:
    """Every tensor of the optimizer's state as "PARAMETER.FIELD"."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    return {
        f"{names[parameter]}.{field}": value
        for parameter, fields in optimizer.state.items()
        for field, value in fields.items()
    }


def load_optimizer_state(optimizer: DeviceOptimizer, model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Undo `optimizer_state`; a state of no tensor is that before the first step.

    Raises CheckpointError where names, shapes or types are not those of this model and optimizer.
    """
    names = {parameter: name for name, parameter in model.named_parameters()}
    expected = {
        f"{names[p]}.{field}": (p, field, *what)
        for p, fields in optimizer.layouts().items()
        for field, what in fields.items()
    }
    for key, value in state.items():
        if key not in expected or (value.shape, value.dtype) != expected[key][2:]:
            raise CheckpointError(f"the optimizer's state has {key}, which does not belong to this model")
    if state and len(state) < len(expected):
        raise CheckpointError("the optimizer's state does not cover this model")
    for key, value in state.items():
        parameter, field, *_ = expected[key]
        optimizer.state[parameter][field] = value.to(parameter.device)
