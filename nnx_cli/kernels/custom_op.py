"""Operators of our own: what autograd and the compiler take as one operation, without looking inside."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

library = torch.library.Library("nnx", "FRAGMENT")


def operator(
    name: str,
    function: Callable[..., Any],
    shapes: Callable[..., Any],
    *,
    keep: Callable[..., None] | None = None,
    gradients: Callable[..., Any] | None = None,
    device: str | None = None,
    tags: tuple[torch.Tag, ...] = (),
) -> Any:
    """`function` as the operator nnx::`name`, on one kind of `device` or on all. Its signature is annotated; it changes
    none of its arguments, and returns none of them, nor views of them. `tags` tell the compiler more.

    `shapes` takes the same arguments and returns empty results. `keep` puts what the backward pass needs into its first
    argument, the context of an autograd.Function, and `gradients` is that pass; without it there is none. Unlike
    `torch.library.custom_op` this does not import the compiler, which takes seconds, when the operator is called.
    """
    library.define(name + torch.library.infer_schema(function, mutates_args=()), tags=tags)
    library.impl(name, function, "CompositeExplicitAutograd" if device is None else device.upper())
    torch.library.register_fake(f"nnx::{name}", shapes, lib=library)
    gradients = gradients or partial(_no_gradients, name)
    torch.library.register_autograd(f"nnx::{name}", gradients, setup_context=keep, lib=library)
    return getattr(torch.ops.nnx, name).default


def keep_inputs(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    """Keep all arguments, tensors, for the backward pass: a `keep` of `operator`."""
    ctx.save_for_backward(*inputs)


def _no_gradients(name: str, *_: Any) -> None:
    raise RuntimeError(f"nnx::{name} has no gradients")
