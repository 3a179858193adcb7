"""Functions of a bank in a file of the user's: every class in it that is a torch.nn.Module is one, but for those whose
names begin with an underscore."""

from __future__ import annotations

import ast
import inspect
from typing import Any

import torch
from torch import nn

from nnx_cli.errors import FunctionError, UsageError
from nnx_cli.layers.outside_functions import OutsideFunction
from nnx_cli.models._file import read_source, run_file

OPTION = "--bank-file"


def check_bank_file(path: str) -> None:
    """Raise UsageError unless a file is Python and has a class, which is read without running it."""
    try:
        body = ast.parse(read_source(path, OPTION)).body
    except (SyntaxError, ValueError, RecursionError) as error:
        raise UsageError(f"{OPTION} {path} is no Python: {error}") from error
    if not any(isinstance(node, ast.ClassDef) and not node.name.startswith("_") for node in body):
        raise UsageError(f"{OPTION} {path} has no class that is a torch.nn.Module")


def load_functions(path: str, **sizes: int) -> nn.ModuleList:
    """Run a file and make its functions, in order, with those of `sizes` (dim and others) that their constructors ask
    for. Raises UsageError where that fails, or one does not turn (N, dim) into (N, dim)."""
    module = run_file(path, OPTION)
    classes = [value for value in vars(module).values() if isinstance(value, type) and issubclass(value, nn.Module)]
    own = [kind for kind in classes if kind.__module__ == module.__name__ and not kind.__name__.startswith("_")]
    if not own:
        raise UsageError(f"{OPTION} {path} has no class that is a torch.nn.Module")
    with torch.device("cpu"):  # what a function reads has to be there, also where a model is only planned
        return nn.ModuleList(_made(path, kind, sizes) for kind in dict.fromkeys(own))


def _made(path: str, kind: type[nn.Module], sizes: dict[str, Any]) -> OutsideFunction:
    """A function, tried on three tokens."""
    asked = inspect.signature(kind).parameters
    try:
        try:
            made = kind(**{name: size for name, size in sizes.items() if name in asked})
        except Exception as error:
            raise FunctionError(f"{kind.__name__} cannot be made: {type(error).__name__}: {error}") from error
        function = OutsideFunction(kind.__name__, made)
        function.check(sizes["dim"])
    except FunctionError as error:
        raise UsageError(f"{OPTION} {path}: {error}", fix="see where: --debug") from error
    return function
