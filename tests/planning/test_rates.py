from types import SimpleNamespace

import pytest
import torch

from nnx_cli import models
from nnx_cli.planning.flops import flops_per_token, meta_model
from nnx_cli.planning.rates import (
    GPUS,
    cpu_core_flops,
    expected_speed,
    gpu_flops,
    known_flops,
    nominal_flops,
    pace_note,
)


@pytest.mark.parametrize(
    ("name", "n_sms", "capability", "like"),
    [
        ("NVIDIA GeForce RTX 3060", 28, (8, 6), "RTX 3060"),
        ("NVIDIA GeForce RTX 4070 Ti SUPER", 66, (8, 9), "RTX 4070"),
        ("NVIDIA GeForce RTX 3080 Laptop GPU", 48, (8, 6), "RTX 3080"),
        ("Tesla T4", 40, (7, 5), "T4"),
        ("Tesla V100-SXM2-16GB", 80, (7, 0), "V100"),
        ("NVIDIA A100-SXM4-40GB", 108, (8, 0), "A100"),
        ("NVIDIA A10", 72, (8, 6), "A10"),
        ("NVIDIA L4", 58, (8, 9), "L4"),
        ("NVIDIA L40S", 142, (8, 9), "L40S"),
        ("NVIDIA H100 80GB HBM3", 132, (9, 0), "H100"),
        ("NVIDIA RTX A6000", 84, (8, 6), "RTX 3070"),
        ("NVIDIA B200", 148, (10, 0), "RTX 5070"),
        ("NVIDIA GeForce GTX 1080", 20, (6, 1), "T4"),
    ],
)
def test_a_gpu_is_known_by_its_name_or_its_kind(name, n_sms, capability, like):
    gpu = GPUS[like]
    most = 0.75e12 * gpu.half * n_sms / gpu.n_sms
    assert 0.6 * most < gpu_flops(name, n_sms, capability, "bf16") <= most
    assert gpu_flops(name, n_sms, capability, "fp32") < gpu_flops(name, n_sms, capability, "bf16")


@pytest.mark.parametrize(
    ("name", "size", "vocab_size", "step_tokens", "measured"),
    [  # on an H200: tests/bench/rates.md
        ("nyx", "tiny", 256, 8192, 2.09e6),
        ("llama", "tiny", 256, 8192, 1.73e6),
        ("n4", "tiny", 256, 8192, 1.20e6),
        ("neon", "tiny", 256, 8192, 0.69e6),
        ("ngpt", "tiny", 256, 8192, 0.69e6),
        ("tape", "tiny", 256, 8192, 0.27e6),
        ("nyx", "small", 8192, 16_384, 1.22e6),
        ("nyx", "base", 50_304, 15_360, 0.51e6),
    ],
)
def test_a_gpu_is_expected_to_be_as_fast_as_it_was(name, size, vocab_size, step_tokens, measured):
    model = meta_model(name, models.make_config(name, size=size, vocab_size=vocab_size))
    speed = expected_speed(
        torch.device("cuda"),
        model.config.dim,
        models.recipe(name).gpu_half_width,
        gpu_flops("NVIDIA H200", 132, (9, 0), "bf16"),
        flops_per_token(model)["train"],
        step_tokens,
    )
    assert 0.7 < speed / measured < 1.4


def test_half_of_a_gpu_has_half_its_rate():
    whole, half = (gpu_flops("NVIDIA A100-SXM4-40GB", n, (8, 0), "bf16") for n in (108, 54))
    assert half == whole / 2


def test_wider_instructions_are_faster():
    assert cpu_core_flops("AVX512") > cpu_core_flops("AVX2") > cpu_core_flops("DEFAULT") > 0


@pytest.mark.parametrize(("seen", "words"), [(100, None), (51, None), (199, None), (49, "2.0 times as slow")])
def test_only_a_pace_far_from_the_plan_is_noted(seen, words):
    note = pace_note(100, seen)
    assert (words is None and note is None) or words in note
    assert "3.0 times as fast" in pace_note(100, 300) and pace_note(0, 5) is None and pace_note(5, 0) is None


def test_a_rate_is_known_where_a_data_sheet_says_it(monkeypatch):
    cpu = torch.device("cpu")
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    assert known_flops(cpu, "fp32") == nominal_flops(cpu, "fp32")
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "ZVECTOR")
    assert known_flops(cpu, "fp32") is None and known_flops(torch.device("mps"), "fp32") is None
    for name, is_known in (("NVIDIA H200", True), ("NVIDIA A100-SXM4-40GB", True), ("Some Other GPU", False)):
        properties = SimpleNamespace(name=name, multi_processor_count=132, major=9, minor=0)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device, name=name: name)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device, found=properties: found)
        rate = known_flops(torch.device("cuda"), "bf16")
        assert (rate is not None) == is_known and (rate is None or rate > 1e14)
