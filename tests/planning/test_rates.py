import pytest

from nnx_cli.planning.rates import GPUS, cpu_core_flops, gpu_flops, pace_note


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
