"""The optimizer of a run, found by its name: the files of this folder without a leading underscore."""

from __future__ import annotations

import importlib

from torch import nn

from nnx_cli.config import TrainConfig, module_names
from nnx_cli.optim._base import BETAS, Defaults, DeviceOptimizer, OptimizerConfig


def names() -> tuple[str, ...]:
    """Optimizers, in alphabetical order."""
    return module_names("optim")


def defaults(name: str) -> Defaults:
    """What an optimizer learns best with."""
    return getattr(importlib.import_module(f"nnx_cli.optim.{name}"), "DEFAULTS", Defaults())


def build_optimizer(model: nn.Module, config: TrainConfig) -> DeviceOptimizer:
    """The optimizer that `config`, in which nothing is left on auto, names, for the parameters that are trained."""
    assert config.lr is not None and config.weight_decay is not None
    betas = BETAS[0], config.beta2 or BETAS[1]
    settings = OptimizerConfig(lr=config.lr, weight_decay=config.weight_decay, betas=betas, seed=config.seed)
    return importlib.import_module(f"nnx_cli.optim.{config.optimizer}").build(model, settings)
