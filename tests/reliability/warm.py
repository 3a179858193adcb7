"""Imports, once, all that a command may: processes are forked from one that has imported this."""

import importlib
import pkgutil

import numpy.ma  # noqa: F401
import rich.console  # noqa: F401
import rich.progress  # noqa: F401
import rich.table  # noqa: F401
import torch._dynamo
import torch.profiler  # noqa: F401
import typer._adapters  # noqa: F401  # and pydantic with it, once an option is converted

import nnx_cli

for module in pkgutil.walk_packages(nnx_cli.__path__, "nnx_cli."):
    if not module.name.endswith(("_triton", "__main__")):
        importlib.import_module(module.name)
