"""What the device of a tensor can do, for everything that chooses between implementations."""

from __future__ import annotations

import importlib.util
import platform
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from nnx_cli.system.torch_private import ONEDNN_LINEAR


@dataclass(frozen=True)
class Hardware:
    """A device, by what implementations depend on.

    `kind` is the type of a torch.device; "meta" stands for a device of no kind, which has torch's own operations alone.
    """

    kind: str
    capability: tuple[int, int] = (0, 0)  # compute capability of a GPU
    flash: bool = False  # a GPU's flash attention, for 16-bit types
    triton: bool = False  # Triton kernels run
    hip: bool = False  # an AMD GPU

    @property
    def bf16_matmul(self) -> bool:
        """Whether matrix units of a GPU take bfloat16."""
        return self.kind == "cuda" and self.capability >= (8, 0)

    @property
    def onednn(self) -> bool:
        """Whether oneDNN is the faster library for GEMMs in float32."""
        return self.kind == "cpu" and has_onednn()


_PLAIN = {kind: Hardware(kind) for kind in ("cpu", "mps", "meta")}
_GPUS: dict[int, Hardware] = {}  # by index; no cache decorator, which the compiler would look through
_planned: ContextVar[Hardware] = ContextVar("planned", default=_PLAIN["meta"])


def of(x: Tensor) -> Hardware:
    """The hardware of a tensor's device; of a meta tensor, that of the plan it belongs to."""
    device = x.device
    return _planned.get() if device.type == "meta" else of_device(device)


def takes_triton(x: Tensor) -> bool:
    """Whether Triton kernels take a tensor: they compute in float32 at most."""
    return x.dtype != torch.float64 and of(x).triton


def of_device(device: torch.device) -> Hardware:
    """The hardware of a real device. The first question about a GPU takes the time of compiling a Triton kernel."""
    if device.type != "cuda":
        return _PLAIN[device.type]
    index = torch.cuda.current_device() if device.index is None else device.index
    if index not in _GPUS:
        _GPUS[index] = _gpu(torch.device("cuda", index))
    return _GPUS[index]


@contextmanager
def planned(hardware: Hardware) -> Iterator[None]:
    """Have meta tensors stand for tensors on `hardware`, in this context alone."""
    token = _planned.set(hardware)
    try:
        yield
    finally:
        _planned.reset(token)


def _gpu(device: torch.device) -> Hardware:
    capability = torch.cuda.get_device_capability(device)
    hip = torch.version.hip is not None
    return Hardware(
        "cuda",
        capability,
        flash=capability >= (8, 0) and torch.backends.cuda.is_flash_attention_available(),
        triton=(hip or capability >= (7, 0)) and _runs_triton(device),
        hip=hip,
    )


def _runs_triton(device: torch.device) -> bool:
    """Whether Triton is installed and a kernel runs; it also needs a C compiler."""
    if importlib.util.find_spec("triton") is None:
        return False
    from triton.errors import TritonError

    from nnx_cli.system import triton_probe

    try:
        triton_probe.launch(device)
    except (TritonError, RuntimeError, OSError, subprocess.SubprocessError):
        return False
    return True


@cache
def has_onednn() -> bool:
    """Whether oneDNN is there and is the faster one: on AMD CPUs with AVX-512.

    The choice depends on nothing that could change from run to run.
    """
    if not torch.backends.mkldnn.is_available() or ONEDNN_LINEAR is None:
        return False
    return cpu_vendor() == "AuthenticAMD" and torch.backends.cpu.get_cpu_capability() == "AVX512"


def cpu_vendor() -> str:
    """Who made the CPU, as x86 CPUs name it ("AuthenticAMD", "GenuineIntel"); empty where that is not known."""
    info = Path("/proc/cpuinfo")
    text = info.read_text(errors="replace") if info.exists() else platform.processor()
    return next((name for name in ("AuthenticAMD", "GenuineIntel") if name in text), "")


def cpu_int8_activation_bits() -> int:
    """Bits of activations in this CPU's matmuls with int8 weights, 0 where there are none worth a call.

    8 with VNNI and on ARM; 7 on other x86 CPUs, which add pairs in 16 bits, where 8 would saturate.
    """
    if platform.machine().lower() in ("arm64", "aarch64"):
        return 8
    if torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"):
        return 0
    return 8 if _has_vnni() else 7


def cpu_flags() -> tuple[str, ...]:
    """What a C compiler calls the vector instructions of this CPU that torch uses; nothing on others than x86."""
    capability = torch.backends.cpu.get_cpu_capability()
    if capability == "AVX2":
        return "-mavx2", "-mfma"
    wide = "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"
    return (*wide, *(["-mavx512vnni"] if _has_vnni() else [])) if capability == "AVX512" else ()


def _has_vnni() -> bool:
    found: Callable[[], bool] = getattr(torch.cpu, "_is_vnni_supported", lambda: False)
    return found()


def cpu_int4_kernel() -> bool:
    """Whether torch has a matmul with 4-bit weights that pays on this CPU: with AVX-512, where it is a third faster
    than that with int8 weights."""
    return torch.backends.cpu.get_cpu_capability() == "AVX512"
