"""Private names of torch that two rooms need: each stands here once, as None where torch lacks it."""

from __future__ import annotations

import sys
from dataclasses import fields
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

aten: Any = torch.ops.aten
FLASH_CPU: Any = getattr(aten, "_scaled_dot_product_flash_attention_for_cpu", None)
FLASH_CPU_BACKWARD: Any = getattr(aten, "_scaled_dot_product_flash_attention_for_cpu_backward", None)
FLASH: Any = getattr(aten, "_scaled_dot_product_flash_attention", None)
FLASH_BACKWARD: Any = getattr(aten, "_scaled_dot_product_flash_attention_backward", None)
EFFICIENT: Any = getattr(aten, "_scaled_dot_product_efficient_attention", None)
EFFICIENT_BACKWARD: Any = getattr(aten, "_scaled_dot_product_efficient_attention_backward", None)
HAS_ATTENTION = None not in (FLASH_CPU, FLASH_CPU_BACKWARD, FLASH, FLASH_BACKWARD, EFFICIENT, EFFICIENT_BACKWARD)

ONEDNN_LINEAR: Any = getattr(torch.ops.mkldnn, "_linear_pointwise", None)


class DispatchMode(TorchDispatchMode):
    """A `TorchDispatchMode` for code that is not compiled: torch need not hide it from the compiler at every call,
    which takes as long as the rest of it."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False


def storage_key(storage: torch.UntypedStorage) -> int:
    """What tells a storage from the others that exist."""
    return getattr(storage, "_cdata", id(storage))


def compiler_is_loaded() -> bool:
    """Whether this process has paid for the compiler's import, which takes seconds."""
    return "torch._dynamo" in sys.modules


def seconds_to_leave(seconds: int) -> dict[str, Any]:
    """Arguments of a LaunchConfig whose processes have so long to leave when they are asked to stop. Where torch has
    none for it, it has a default, and that is changed."""
    from torch.distributed.elastic.multiprocessing.api import PContext
    from torch.distributed.launcher.api import LaunchConfig

    if any(field.name == "shutdown_timeout" for field in fields(LaunchConfig)):
        return {"shutdown_timeout": seconds}
    PContext.close.__defaults__ = (None, seconds)
    return {}
