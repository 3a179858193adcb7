"""The optimizer of a run, found by its name: the files of this folder without a leading underscore."""

from __future__ import annotations

import importlib

from torch import nn

from nnx_cli.config import TrainConfig, module_names
from nnx_cli.optim._base import DeviceOptimizer


def names() -> tuple[str, ...]:
    """Optimizers, in alphabetical order."""
    return module_names("optim")


def build_optimizer(model: nn.Module, config: TrainConfig) -> DeviceOptimizer:
    """The optimizer that `config` names, for the parameters of a model that are trained."""
    return importlib.import_module(f"nnx_cli.optim.{config.optimizer}").build(model, config)
