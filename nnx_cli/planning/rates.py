"""Nominal speed of devices, from tables and never from a clock: a busy and a quiet machine plan alike."""

from __future__ import annotations

from dataclasses import dataclass

import torch

CPU_CORE = {"AVX512": 240e9, "AVX2": 160e9}  # FLOPs a second of float32 matmuls, by instruction set; else:
CPU_CORE_BASELINE = 30e9
MPS = 5e12
SUSTAINED = 0.75  # of a GPU's nominal rate, in large matmuls
FLOPS_PER_BYTE = 300  # at most, of memory traffic in training
CPU_MFU, CPU_HALF_WIDTH = 0.78, 430  # see `expected_mfu`
MPS_MFU = 0.1  # never measured
GPU_STEP_SECONDS = 2e-3  # of an optimizer step, whatever its size: tests/bench/rates.md


@dataclass(frozen=True)
class Gpu:
    """A GPU as its data sheet has it: multiprocessors, TFLOPs a second in fp32 and in 16-bit types (dense, sums in
    fp32), GB a second of memory."""

    n_sms: int
    fp32: float
    half: float
    bandwidth: float


GPUS = {  # by a part of the name, the longest counts; variants (Ti, SUPER, Laptop) by their number of multiprocessors
    "RTX 3060": Gpu(28, 12.7, 25.5, 360),
    "RTX 3070": Gpu(46, 20.3, 40.6, 448),
    "RTX 3080": Gpu(68, 29.8, 59.5, 760),
    "RTX 3090": Gpu(82, 35.6, 71.2, 936),
    "RTX 4060": Gpu(24, 15.1, 30.2, 272),
    "RTX 4070": Gpu(46, 29.1, 58.3, 504),
    "RTX 4080": Gpu(76, 48.7, 97.5, 717),
    "RTX 4090": Gpu(128, 82.6, 165.2, 1008),
    "RTX 5060": Gpu(30, 19.2, 38.4, 448),
    "RTX 5070": Gpu(48, 30.9, 61.7, 672),
    "RTX 5080": Gpu(84, 56.3, 112.6, 960),
    "RTX 5090": Gpu(170, 104.8, 209.5, 1792),
    "T4": Gpu(40, 8.1, 65, 320),
    "V100": Gpu(80, 15.7, 125, 900),
    "A10": Gpu(72, 31.2, 125, 600),
    "A100": Gpu(108, 19.5, 312, 1555),
    "L4": Gpu(58, 30.3, 121, 300),
    "L40S": Gpu(142, 91.6, 362, 864),
    "H100": Gpu(132, 67, 989, 3350),
    "H200": Gpu(132, 67, 989, 4800),
}
LIKE = {(7, 0): "V100", (7, 5): "T4", (8, 0): "A100", (8, 6): "RTX 3070", (8, 9): "RTX 4070", (9, 0): "H100"}
NEWEST, OLDEST = "RTX 5070", "T4"  # stand for other compute capabilities, above and below 9.0


def nominal_flops(device: torch.device, precision: str) -> float:
    """FLOPs a second that large matmuls reach on a device, by its name or what kind it is; on a CPU with the threads
    that torch uses."""
    if device.type == "cpu":
        return torch.get_num_threads() * cpu_core_flops(torch.backends.cpu.get_cpu_capability())
    if device.type != "cuda":
        return MPS
    properties = torch.cuda.get_device_properties(device)
    return gpu_flops(properties.name, properties.multi_processor_count, (properties.major, properties.minor), precision)


def known_flops(device: torch.device, precision: str) -> float | None:
    """As `nominal_flops`; None where no data sheet says the rate."""
    if device.type == "cpu":
        is_known = torch.backends.cpu.get_cpu_capability() in CPU_CORE
    else:
        is_known = device.type == "cuda" and bool(_named_in(torch.cuda.get_device_name(device)))
    return nominal_flops(device, precision) if is_known else None


def cpu_core_flops(capability: str) -> float:
    """FLOPs a second of a core with an instruction set, as torch calls it."""
    return CPU_CORE.get(capability, CPU_CORE_BASELINE)


def gpu_flops(name: str, n_sms: int, capability: tuple[int, int], precision: str) -> float:
    """FLOPs a second of a GPU: of the one in the table that its name or else its compute capability is like, by the
    number of multiprocessors, and no more than the memory feeds."""
    known = _named_in(name) or [LIKE.get(capability, NEWEST if capability > (9, 0) else OLDEST)]
    gpu = GPUS[max(known, key=len)]
    nominal = (gpu.fp32 if precision == "fp32" else gpu.half) * 1e12
    return SUSTAINED * min(nominal, FLOPS_PER_BYTE * gpu.bandwidth * 1e9) * n_sms / gpu.n_sms


def _named_in(name: str) -> list[str]:
    """The GPUs of the table whose names are a part of this one."""
    words = name.replace("-", " ").split()
    return [key for key in GPUS if any(words[n : n + len(key.split())] == key.split() for n in range(len(words)))]


def expected_mfu(device: torch.device, dim: int, gpu_half_width: int = 0) -> float:
    """Of the rate of large matmuls, what training reaches at a width, about: matmuls grow with its square, all else
    with the width itself. On a GPU an architecture spends as long on either at a width of its own."""
    if device.type == "cpu":
        return CPU_MFU * dim / (dim + CPU_HALF_WIDTH)
    return dim / (dim + gpu_half_width) if device.type == "cuda" else MPS_MFU


def expected_speed(device: torch.device, dim: int, gpu_half_width: int, rate: float, flops: int, tokens: int) -> float:
    """Tokens a second of optimizer steps of so many `tokens`, which cost `flops` each, on a device whose large matmuls
    reach `rate` FLOPs a second."""
    seconds = tokens * flops / (rate * expected_mfu(device, dim, gpu_half_width))
    return tokens / (seconds + (GPU_STEP_SECONDS if device.type == "cuda" else 0.0))


def speeds_by_data_sheet(dim: int, gpu_half_width: int, flops: int, tokens: int, precision: str) -> dict[str, float]:
    """As `expected_speed`, on each GPU of the table."""
    cuda = torch.device("cuda")
    rates = {name: gpu_flops(name, gpu.n_sms, (0, 0), precision) for name, gpu in GPUS.items()}
    return {name: expected_speed(cuda, dim, gpu_half_width, rate, flops, tokens) for name, rate in rates.items()}


def pace_note(planned: float, seen: float) -> str | None:
    """A line where a run is more than twice as fast or slow, in tokens a second, as it was planned to be."""
    if not planned > 0 or not seen > 0 or planned / 2 <= seen <= 2 * planned:
        return None
    how = f"{seen / planned:.1f} times as fast" if seen > planned else f"{planned / seen:.1f} times as slow"
    return f"training is {how} as planned ({seen:,.0f} instead of {planned:,.0f} tokens a second)"
