"""The device, the arithmetic it can really do, its memory, and the random numbers."""

from __future__ import annotations

import gc
import os

import torch

from nnx_cli.config import check_choice, check_device
from nnx_cli.errors import DoesNotFit, MissingFeature, counted
from nnx_cli.system.machine import cpu_model, machine_memory_bytes, peak_rss_bytes, reset_peak_rss
from nnx_cli.system.text import size

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
RANK_STRIDE = 2**61 - 1  # a prime: no two ranks come upon one number in the steps of a run
RESERVE_BYTES = int(0.75 * 2**30)  # of a GPU: context and desktop, left outside the allocator
KEPT_FREE_BYTES = 2**30  # of --vram: those, and what the allocator loses to gaps


def pick_device(name: str) -> torch.device:
    """The device of that name; "auto" is the first of CUDA, MPS and CPU that is there.

    On a GPU, attention is kept from cuDNN, which torch prefers on an H100: it makes a plan of a tenth of a second or
    more for every new shape, is no faster, and where processes shared the GPU they died beside it
    (tests/bench/against_nanogpt.md).

    Raises UsageError for a name that means nothing, MissingFeature for a device that is not there.
    """
    check_device(name)
    if name == "auto" and torch.cuda.is_available():
        name = f"cuda:{torch.cuda.current_device()}"
    elif name == "auto":
        name = "mps" if torch.backends.mps.is_available() else "cpu"
    kind, _, index = name.partition(":")
    if kind == "cuda" and (not torch.cuda.is_available() or int(index or 0) >= torch.cuda.device_count()):
        raise MissingFeature(
            f"there is no device {name} here",
            fix="see what is there: nnx doctor; what fits on a GPU that is not: nnx summarize --vram 8GB",
        )
    if kind == "cuda":
        torch.backends.cuda.enable_cudnn_sdp(False)
        if index:  # streams, graphs and what waits for them are those of the current device
            torch.cuda.set_device(int(index))
    if kind == "mps" and not torch.backends.mps.is_available():
        raise MissingFeature("there is no Apple GPU here", fix="see what is there: nnx doctor")
    return (
        torch.device(name if index else f"cuda:{torch.cuda.current_device()}") if kind == "cuda" else torch.device(kind)
    )


def pick_precision(name: str, device: torch.device) -> str:
    """The type that mixed precision computes in: what was asked for, or the best that the device does in hardware.

    CUDA: bf16 from compute capability 8.0, fp16 from 7.0 except on GTX 16 GPUs (slow or broken there), else fp32. CPU
    and MPS: fp32. Raises UsageError for another name, MissingFeature for low precision on a CPU, where it is emulated,
    or bf16 on a GPU without it.
    """
    check_choice("precision", name, ("auto", *DTYPES))
    if device.type == "cpu":
        if name in ("bf16", "fp16"):
            raise MissingFeature(
                f"--precision {name} needs a GPU: a CPU computes fastest in fp32", fix="take --precision fp32"
            )
        return "fp32"
    if device.type == "mps":
        return "fp32" if name == "auto" else name
    capability = torch.cuda.get_device_capability(device)
    if name == "bf16" and capability < (8, 0):
        raise MissingFeature("this GPU has no bf16 units", fix="take --precision fp16")
    if name != "auto":
        return name
    if capability >= (8, 0):
        return "bf16"
    return "fp16" if capability >= (7, 0) and "GTX 16" not in torch.cuda.get_device_name(device) else "fp32"


def set_seed(seed: int, step: int = 0, rank: int = 0) -> None:
    """Make every random draw that follows a function of (seed, step, rank)."""
    torch.manual_seed((seed * 1_000_003 + step + rank * RANK_STRIDE) % 2**63)


def set_threads(threads: int | None) -> None:
    """Use that many CPU threads; None leaves torch's choice, the physical cores."""
    if threads is not None:
        torch.set_num_threads(threads)


def set_deterministic() -> None:
    """Make CUDA give the same bits every time, for a price in speed; a CPU does anyway."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    # nothing here reads memory before it is written
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # the module is an object


def limit_memory(device: torch.device, vram_bytes: int | None) -> None:
    """Keep this process within `vram_bytes` of a GPU, less what lies outside the allocator. A CPU has no such
    limit. Raises DoesNotFit for a cap of which nothing is left."""
    check_cap(vram_bytes)
    if vram_bytes is None or device.type != "cuda":
        return
    total = torch.cuda.get_device_properties(device).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, (vram_bytes - RESERVE_BYTES) / total), device)


def check_cap(vram_bytes: int | None) -> None:
    """Raise DoesNotFit for a --vram of which nothing is left to plan for."""
    if vram_bytes is not None and vram_bytes <= KEPT_FREE_BYTES:
        raise DoesNotFit(
            f"--vram is {size(vram_bytes)}, of which 1 GiB is kept for the driver and the screen: "
            "nothing is left to train in",
            fix="name more than that, such as --vram 2GB",
        )


def budget_words(budget: int, vram_bytes: int | None) -> str:
    """Bytes to plan for in words, with what a cap leaves free."""
    of_cap = "" if vram_bytes is None else f" (--vram {size(vram_bytes)} less 1 GiB for the driver and the screen)"
    return f"{budget / 2**30:.2f} GiB{of_cap}"


def memory_budget(device: torch.device, vram_bytes: int | None) -> int:
    """Bytes to plan for: `--vram` less 1 GiB, or what is free on the GPU, or half of the machine's memory."""
    if vram_bytes is not None:
        return max(0, vram_bytes - KEPT_FREE_BYTES)
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0] * 0.95)
    return machine_memory_bytes() // 2


def peak_memory_bytes(device: torch.device) -> int | None:
    """Most memory used so far: of the GPU's allocator, or of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if device.type == "mps":
        return torch.mps.driver_allocated_memory()
    return peak_rss_bytes()


def release_memory() -> None:
    """Give back what objects that nobody uses still hold, recorded CUDA graphs and their pools among them."""
    gc.collect()
    empty_cache()


def empty_cache() -> None:
    """Give memory that nobody uses back to the current GPU, once all that was launched is done.

    Before PyTorch unmaps an expandable segment it waits for the stream that this was made on alone (`unmapHandles` in
    its allocator). A CUDA graph has segments of the stream that it was recorded on, and may be running on another.
    """
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
        torch.cuda.empty_cache()


def reset_peak_memory(device: torch.device) -> bool:
    """Release memory and let `peak_memory_bytes` begin anew; returns whether that can be."""
    release_memory()
    if device.type == "cuda":
        torch.cuda.init()  # without which there are no statistics
        torch.cuda.reset_peak_memory_stats(device)
    return device.type == "cuda" or device.type == "cpu" and reset_peak_rss()


def synchronize(device: torch.device) -> None:
    """Wait until the device has done all it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def describe(device: torch.device) -> str:
    """The device in words: "NVIDIA GeForce RTX 3060 (12 GiB)", "CPU, 2 threads"."""
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        return f"{properties.name} ({properties.total_memory / 2**30:.0f} GiB)"
    if device.type == "mps":
        return "Apple GPU"
    return f"CPU ({cpu_model()}, {counted(torch.get_num_threads(), 'thread')})"
