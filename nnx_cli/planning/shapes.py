"""Operators on the meta device, each worked out once.

torch works out in Python what most of them return there, in 0.1 ms; a model asks the same in every block.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from nnx_cli.system.torch_private import TorchDispatchMode, storage_key

VALUES = int, float, complex, str, type(None), torch.dtype, torch.device, torch.layout, torch.memory_format
IN_PLACE = object()  # the answer of an operator that returns what it writes to


class ShapeCache(TorchDispatchMode):
    """Answers operators on meta tensors as it answered them for arguments just like these before.

    Without elements, an answer depends on shapes, strides and types, and on the arguments that are no tensors.
    Operators that return views are run every time, as are those that take or return anything but tensors and VALUES.
    """

    def __init__(self) -> None:
        super().__init__()
        self._answers: dict[Any, Any] = {}
        self._always_run: set[Any] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self.run(func, args, kwargs or {})

    def run(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """`func(*args, **kwargs)`."""
        if func in self._always_run:
            return func(*args, **kwargs)
        key = func, _described(args), *kwargs, _described(kwargs.values())
        if key in self._answers:
            answer = self._answers[key]
            return _written(args, kwargs) if answer is IN_PLACE else _made(answer)
        out = func(*args, **kwargs)
        if key == (func, _described(args), *kwargs, _described(kwargs.values())):  # else it reshaped an argument
            self._remember(key, out, args, kwargs)
        return out

    def _remember(self, key: tuple[Any, ...], out: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given, returned = [*_leaves((args, kwargs.values()))], [*_leaves((out,))]
        if not all(isinstance(x, (Tensor, *VALUES)) for x in (*given, *returned)):
            self._always_run.add(key[0])
        elif any(isinstance(x, Tensor) and not x.is_meta for x in (*given, *returned)):
            return
        elif isinstance(out, Tensor) and out is _written(args, kwargs):
            self._answers[key] = IN_PLACE
        elif _own_their_memory(returned, given):
            self._answers[key] = _recipe(out)
        else:
            self._always_run.add(key[0])


def _own_their_memory(returned: list[Any], given: list[Any]) -> bool:
    """Whether all tensors that were returned have storages of their own, no larger than they."""
    tensors = [x for x in returned if isinstance(x, Tensor)]
    storages = {storage_key(x.untyped_storage()) for x in (*tensors, *given) if isinstance(x, Tensor)}
    before = {storage_key(x.untyped_storage()) for x in given if isinstance(x, Tensor)}
    return len(storages) == len(tensors) + len(before) and all(
        x.untyped_storage().nbytes() == _made(_recipe(x)).untyped_storage().nbytes() for x in tensors
    )


def _described(values: Iterable[Any]) -> tuple[Any, ...]:
    """What an answer depends on."""
    return tuple(
        [
            (x.shape, x.stride(), x.dtype, x.device)
            if isinstance(x, Tensor)
            else _described(x)
            if isinstance(x, (list, tuple))
            else (type(x), x)
            for x in values
        ]
    )


def _leaves(values: Iterable[Any]) -> Iterator[Any]:
    """Values, and those in lists among them."""
    for x in values:
        if isinstance(x, Iterable) and not isinstance(x, (Tensor, str)):
            yield from _leaves(x)
        else:
            yield x


def _written(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The argument that an operator writes to and returns, if it does."""
    return kwargs["out"] if "out" in kwargs else args[0] if args else None


def _recipe(out: Any) -> Any:
    """A result, with functions that make empty tensors like its own in their place."""
    if isinstance(out, Tensor):
        return partial(torch.empty_strided, out.shape, out.stride(), dtype=out.dtype, device=out.device)
    return [_recipe(x) for x in out] if isinstance(out, (list, tuple)) else out


def _made(recipe: Any) -> Any:
    if isinstance(recipe, partial):
        return recipe()
    return [_made(x) for x in recipe] if isinstance(recipe, list) else recipe
