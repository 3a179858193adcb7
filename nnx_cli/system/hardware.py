"""Whether the project's own kernels can run."""

from __future__ import annotations

import importlib.util
import subprocess
from functools import cache

import torch


@cache
def has_triton(device: torch.device) -> bool:
    """Whether Triton is there and really runs on a device, tried once: it also needs a C compiler, and a card from 2017
    on."""
    if device.type != "cuda" or importlib.util.find_spec("triton") is None:
        return False
    if torch.version.hip is None and torch.cuda.get_device_capability(device) < (7, 0):
        return False
    from triton.errors import TritonError

    try:
        launch(device)
    except (TritonError, RuntimeError, OSError, subprocess.SubprocessError):
        return False
    return True


def launch(device: torch.device) -> None:
    """Run the smallest of the kernels."""
    from nnx_cli.kernels import soft_xor_triton as soft_xor_kernel

    sums = torch.zeros(1, 2, device=device)
    with torch.cuda.device(device):
        soft_xor_kernel.cell(sums, torch.empty_like(sums[:, :1]))
