"""Optimizers over a model's parameters, and their state under the parameters' names."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from nnx_cli.config import TrainConfig
from nnx_cli.engine.wolf import Wolf
from nnx_cli.errors import CheckpointError

BETAS = {"adamw": (0.9, 0.99), "lion": (0.9, 0.99)}


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Matrices with weight decay, vectors (gains, scales) without."""
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.dim() < 2], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def build_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """The optimizer that `config` names: fused AdamW (Loshchilov and Hutter 2019, https://arxiv.org/abs/1711.05101),
    Lion (Chen et al. 2023, https://arxiv.org/abs/2302.06675) or Wolf, which has no betas."""
    groups = parameter_groups(model, config.weight_decay)
    if config.optimizer == "wolf":
        return Wolf(groups, lr=config.lr, weight_decay=config.weight_decay)
    betas = BETAS[config.optimizer]
    if config.optimizer == "lion":
        from lion_pytorch.foreach import Lion

        return Lion(groups, lr=config.lr, betas=betas, weight_decay=config.weight_decay)
    return torch.optim.AdamW(groups, lr=config.lr, betas=betas, eps=1e-10, fused=True)


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Give every parameter group the same learning rate."""
    for group in optimizer.param_groups:
        group["lr"] = lr


def optimizer_state(optimizer: torch.optim.Optimizer, model: nn.Module) -> dict[str, Tensor]:
    """Every tensor of the optimizer's state as "PARAMETER.FIELD"."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    return {
        f"{names[parameter]}.{field}": torch.as_tensor(value)
        for parameter, fields in optimizer.state.items()
        for field, value in fields.items()
    }


def load_optimizer_state(optimizer: torch.optim.Optimizer, model: nn.Module, state: dict[str, Tensor]) -> None:
    """Undo `optimizer_state`. Raises CheckpointError where names or shapes belong to another model."""
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    for key, value in state.items():
        name, _, field = key.rpartition(".")
        parameter = parameters.get(name)
        if parameter is None or value.dim() and value.shape != parameter.shape:
            raise CheckpointError(f"the optimizer's state has {key}, which does not belong to this model")
        optimizer.state[parameter][field] = value.to(parameter.device)
    fields = {frozenset(fields) for fields in optimizer.state.values()}
    if state and (len(optimizer.state) != len(parameters) or len(fields) > 1):
        raise CheckpointError("the optimizer's state does not cover this model")
