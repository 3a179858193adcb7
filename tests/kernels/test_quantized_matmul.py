import warnings
from functools import partial

import pytest
import torch
import torch.nn.functional as F

from nnx_cli.kernels import quantized_matmul as kernels
from nnx_cli.kernels.quantized_matmul import KERNELS, few_or_many, int4_matmul, int8_matmul, is_right, takes_int4
from nnx_cli.system import hardware


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("bits", [8, 7])
def test_a_row_does_not_depend_on_its_neighbours(bits):
    make = partial(int8_matmul, activation_bits=bits)
    if not is_right(make):
        pytest.skip("this machine has no such matmul")
    codes = torch.randint(-127, 128, (40, 64), generator=torch.Generator().manual_seed(0))
    matmul = make(codes * 0.01, torch.full((40,), 0.01))
    quiet = draw(1, 64)
    alone, beside = matmul(quiet), matmul(torch.cat((quiet, 1000 * draw(1, 64, seed=1), torch.zeros(1, 64))))
    assert (alone - beside[:1]).norm() <= 0.04 * alone.norm()
    assert not beside[2].any() or beside[2].abs().max() < 1e-6


def test_the_deprecation_of_torch_is_not_the_users_concern():
    kernels.activation_bits.cache_clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert kernels.activation_bits() in KERNELS


def missing(weight, scale, activation_bits):
    return torch.ops.quantized.no_such_operator(weight)


def refusing(weight, scale, activation_bits):
    raise NotImplementedError("could not run on this backend")


def saturating(weight, scale, activation_bits):
    return lambda x: F.linear(x, weight).clamp(-32767, 32767)


@pytest.mark.parametrize("broken", [missing, refusing, saturating])
def test_matmuls_that_do_not_work_are_passed_over(broken, monkeypatch):
    monkeypatch.setattr(kernels, "cpu_int8_activation_bits", lambda: 8)
    monkeypatch.setattr(kernels, "int8_matmul", broken)
    assert kernels.activation_bits.__wrapped__() == 0


@pytest.mark.parametrize(
    ("machine", "capability", "vnni", "bits"),
    [
        ("x86_64", "AVX512", True, 8),
        ("x86_64", "AVX512", False, 7),
        ("AMD64", "AVX2", False, 7),
        ("x86_64", "DEFAULT", False, 0),
        ("arm64", "DEFAULT", False, 8),
    ],
)
def test_the_instruction_set_decides_which_kernel_is_taken(machine, capability, vnni, bits, monkeypatch):
    monkeypatch.setattr(hardware.platform, "machine", lambda: machine)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: vnni, raising=False)
    monkeypatch.setattr(kernels, "is_right", lambda make: True)
    assert kernels.activation_bits.__wrapped__() == bits


@pytest.mark.parametrize("group_size", kernels.INT4_GROUPS)
@pytest.mark.parametrize("rows", [1, 2, 7])
def test_int4_matmul(group_size, rows):
    if not kernels.has_int4_matmul():
        pytest.skip("this machine has no such matmul")
    codes = torch.randint(0, 16, (48, 512), generator=torch.Generator().manual_seed(0), dtype=torch.int32)
    scale, x = draw(48, 512 // group_size), draw(rows, 1, 512, seed=1)
    weight = (codes - 8) * scale.repeat_interleave(group_size, 1)
    y, wanted = int4_matmul(codes, scale)(x), F.linear(x, weight)
    assert y.shape == wanted.shape and y.dtype == torch.float32
    assert (y - wanted).norm() <= 0.005 * wanted.norm()


@pytest.mark.parametrize("name", ["INT4_PACK", "INT4_MATMUL"])
def test_a_torch_without_the_int4_matmul_does_without(name, monkeypatch):
    monkeypatch.setattr(kernels, name, None)
    monkeypatch.setattr(kernels, "cpu_int4_kernel", lambda: True)
    assert not kernels.has_int4_matmul.__wrapped__()


def test_an_int4_matmul_that_is_wrong_is_passed_over(monkeypatch):
    monkeypatch.setattr(kernels, "INT4_PACK", lambda codes, tiles: codes)
    monkeypatch.setattr(kernels, "INT4_MATMUL", lambda x, packed, group_size, scales: x @ packed.T.to(x.dtype))
    monkeypatch.setattr(kernels, "cpu_int4_kernel", lambda: True)
    assert not kernels.has_int4_matmul.__wrapped__()


@pytest.mark.parametrize(("capability", "pays"), [("AVX512", True), ("AVX2", False), ("DEFAULT", False)])
def test_int4_pays_with_avx512(capability, pays, monkeypatch):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    assert hardware.cpu_int4_kernel() is pays


@pytest.mark.parametrize(
    ("shape", "group_size", "takes"),
    [
        ((16, 64), 32, True),
        ((17, 64), 32, False),
        ((16, 80), 32, False),
        ((16, 96), 48, False),
        ((16, 64), None, False),
    ],
)
def test_what_int4_takes(shape, group_size, takes, monkeypatch):
    monkeypatch.setattr(kernels, "has_int4_matmul", lambda: True)
    assert takes_int4(*shape, group_size) is takes


def test_many_rows_go_another_way_that_is_made_once():
    made = []
    matmul = few_or_many(lambda x: "few", 2, lambda: made.append(1) or (lambda x: "many"))
    assert [matmul(torch.zeros(*shape, 5)) for shape in ((1,), (2, 1), (3,), (1, 4))] == ["few", "few", "many", "many"]
    assert made == [1]
