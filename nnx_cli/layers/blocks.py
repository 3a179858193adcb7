"""How a model's blocks run: with activation checkpointing, and compiled.

Checkpointed blocks (Chen et al. 2016, https://arxiv.org/abs/1604.06174) keep their inputs alone and run again in the
backward pass: values and gradients stay the same. Both are put around blocks from outside, checkpointing around the
compiled code, so that models know nothing of it and names in the state dict stay.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache, partial
from itertools import chain
from typing import Any, Protocol

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from nnx_cli.kernels.c_kernels import ask_for_c
from nnx_cli.system import hardware


class HasBlocks(Protocol):
    """A model whose blocks are modules of one kind, one after the other."""

    blocks: nn.ModuleList
    config: Any


class Checkpointed(nn.Module):
    """Mixed into a block's class: in training its calls are checkpointed.

    A block that is given a cache would change it twice, so it runs plainly.
    """

    draws_noise: bool  # dropout must drop the same elements again

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the block, checkpointed in training unless it is given a cache."""
        cached = any(hasattr(x, "truncate") for x in (*args, *kwargs.values()))
        if cached or not self.training or not torch.is_grad_enabled():
            return super().__call__(*args, **kwargs)
        return checkpoint(super().__call__, *args, use_reentrant=False, preserve_rng_state=self.draws_noise, **kwargs)


@cache
def checkpointed(kind: type[nn.Module]) -> type[nn.Module]:
    """The class of blocks like `kind` whose calls are checkpointed."""
    return type(kind.__name__, (Checkpointed, kind), {"__module__": kind.__module__})


def checkpoint_blocks(model: HasBlocks, mode: str) -> None:
    """Checkpoint no block, every second one, or all of them, in place of what was chosen before."""
    for number, block in enumerate(model.blocks):
        kind = type(block)
        plain = kind.__mro__[2] if issubclass(kind, Checkpointed) else kind
        chosen = mode == "on" or (mode == "half" and number % 2 == 0)
        block.draws_noise = model.config.dropout > 0
        block.__class__ = checkpointed(plain) if chosen else plain


def compile_blocks(model: HasBlocks, without_hooks: bool = False) -> None:
    """Compile every block in place; blocks of one shape share the code, and names in the state dict stay. With
    `without_hooks` what hooks do before and after a block is left as it is.

    Raises RuntimeError where it could not be undone.
    """
    if not hasattr(nn.Module, "_compiled_call_impl"):
        raise RuntimeError("this version of torch keeps a module's compiled code elsewhere")
    if hardware.of(next(model.blocks.parameters())).kind == "cpu":  # asked here: the compiler cannot look into tests
        ask_for_c()
    for block in model.blocks:
        if without_hooks:
            block.forward = torch.compile(block.forward, dynamic=False)
        else:
            block.compile(dynamic=False)


def eagerly(compiled: bool) -> AbstractContextManager:
    """Run compiled blocks eagerly for a while: other shapes, or passes without gradients, would be compiled anew."""
    return torch.compiler.set_stance("force_eager") if compiled else nullcontext()


def undo_compile(model: HasBlocks) -> None:
    """Run every block eagerly again."""
    for block in model.blocks:
        block._compiled_call_impl = None
        vars(block).pop("forward", None)


@contextmanager
def direct_calls(model: nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """Call `forward` of modules at once meanwhile, also of compiled ones, or what some have in its place: what depends
    on parameters alone is computed once, and more where a CPU computes in float32, `dtype`. And have their parameters
    and parts as plain attributes: what nn.Module does in between is a third of a pass over one token of a small model.

    Modules with hooks keep to the long way; no parameter or part may be replaced.
    """
    modules = [m for m in model.modules() if not _has_hooks(m)] if hasattr(nn.Module, "_compiled_call_impl") else []
    is_plain = dtype == torch.float32 and all(parameter.is_cpu for parameter in model.parameters())
    direct, before = [], []
    for module in modules:
        parts = (module.named_parameters(recurse=False), module.named_buffers(recurse=False), module.named_children())
        found = dict(chain(*parts)) | _direct_attributes(module, is_plain)
        direct.append(found | {"_compiled_call_impl": found.get("forward", module.forward)})
        before.append({name: vars(module)[name] for name in direct[-1] if name in vars(module)})
    for module, attributes in zip(modules, direct, strict=True):
        vars(module).update(attributes)
    try:
        yield
    finally:
        for module, attributes, old in zip(modules, direct, before, strict=True):
            for name in attributes:
                del vars(module)[name]
            vars(module).update(old)


def _direct_attributes(module: nn.Module, is_plain: bool) -> dict[str, Any]:
    """What a module has in place of methods, for fewer calls and operations; `is_plain`: a CPU computes in float32."""
    if "forward" in vars(module):  # somebody's own
        return {}
    if is_plain and type(module) is nn.Embedding and module.max_norm is None:
        return {"forward": partial(torch.embedding, module.weight)}
    found: dict[str, Any] = getattr(module, "constant_attributes", dict)()
    return found | getattr(module, "direct_attributes", dict)() if is_plain else found


def _has_hooks(module: nn.Module) -> bool:
    """Whether a call of the module does more than `forward`, or might."""
    return bool(getattr(module, "_forward_hooks", True) or getattr(module, "_forward_pre_hooks", True))
