import warnings
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from nnx_cli.convert.quantize import quantized_state
from nnx_cli.errors import CheckpointError
from nnx_cli.layers import quantized
from nnx_cli.layers.linear import Linear
from nnx_cli.layers.quantized import (
    KERNELS,
    Quantization,
    QuantizedEmbedding,
    QuantizedLinear,
    dequantize,
    int8_matmul,
    is_right,
    quantizable,
    quantize,
    quantize_layers,
    widen,
)
from nnx_cli.runs.tensors import load_weights
from nnx_cli.system import hardware

INT8 = Quantization(bits=8, group_size=None, kept=[])
INT4 = Quantization(bits=4, group_size=32, kept=[])


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def restored(weight, how):
    codes, scale = quantize(weight, how)
    return dequantize(codes, scale, weight.shape[1], how.group_size)


def layer(kind, weight, how):
    """A quantized layer that holds `weight`."""
    made = kind(*weight.shape, how, weight.device)
    made.weight, made.scale = quantize(weight, how)
    return made


def test_int8_is_off_by_half_a_step_at_most():
    weight = draw(7, 50) * torch.tensor([1, 10, 1e-3, 1e-5, 0, 1e4, 1]).unsqueeze(1)
    codes, scale = quantize(weight, INT8)
    assert (codes.dtype, codes.shape, scale.dtype, scale.shape) == (torch.int8, (7, 50), torch.float16, (7,))
    assert codes.min() >= -127
    steps = scale.float()[:, None]
    error = (restored(weight, INT8) - weight).abs()
    assert (error <= 0.5 * steps * (1 + 1e-3) + 0.06 * 127 * 2**-24).all()  # 127.06 steps fit in where fp16 rounds down
    assert not restored(weight, INT8)[4].any()


@pytest.mark.parametrize("how", [INT8, INT4], ids=["int8", "int4"])
def test_extreme_weights_give_finite_numbers(how):
    weight = torch.stack((torch.full((32,), 3e38), torch.full((32,), 1e-38), torch.zeros(32), torch.full((32,), -1e7)))
    _, scale = quantize(weight, how)
    assert scale.isfinite().all() and scale.all()
    assert restored(weight, how).isfinite().all()


def test_int4_layout():
    """Low nibble first, code + 8, code 0 beside the last of an odd number of columns, a scale for every two columns."""
    how = Quantization(bits=4, group_size=2, kept=[])
    weight = torch.tensor([[-8.0, 3.0, 0.0, -4.0, 2.0]])
    codes, scale = quantize(weight, how)
    assert (codes.dtype, codes.shape, scale.shape) == (torch.uint8, (1, 3), (1, 3))
    assert scale.tolist() == [[1.0, 0.5, -0.25]]
    assert codes.tolist() == [[0 | 11 << 4, 8 | 0 << 4, 0 | 8 << 4]]
    assert torch.equal(restored(weight, how), weight)


@pytest.mark.parametrize("columns", [1, 2, 31, 33, 63, 64, 100])
@pytest.mark.parametrize("group_size", [2, 3, 32, 4096])
def test_int4_is_better_than_plain_rounding(columns, group_size):
    how = Quantization(bits=4, group_size=group_size, kept=[])
    weight = draw(6, columns)
    found = (restored(weight, how) - weight).square().sum()
    groups = F.pad(weight, (0, -columns % group_size)).view(6, -1, group_size)
    scale = (groups.abs().amax(2, keepdim=True) / 7).half().float()
    plain = ((groups / scale).nan_to_num().round() * scale - groups).square().sum()
    assert found <= plain * 1.001


@pytest.mark.parametrize("how", [INT8, INT4], ids=["int8", "int4"])
def test_embedding_looks_rows_up(how):
    weight, ids = draw(20, 37), torch.tensor([[3, 0], [19, 3]])
    found = layer(QuantizedEmbedding, weight, how)(ids)
    assert torch.equal(found, restored(weight, how)[ids])


@pytest.mark.parametrize("how", [INT8, INT4], ids=["int8", "int4"])
@pytest.mark.parametrize("bits", KERNELS)
@pytest.mark.parametrize("shape", [(1, 1), (2, 5), (1,)])
def test_linear_multiplies_with_the_stored_weights(how, bits, shape, monkeypatch):
    if bits and not is_right(partial(int8_matmul, activation_bits=bits)):
        pytest.skip("this machine has no such matmul")
    monkeypatch.setattr(quantized, "SMALL_MATRIX", 0)
    monkeypatch.setattr(quantized, "activation_bits", lambda: bits)
    weight, x = draw(48, 80), draw(*shape, 80, seed=1)
    y, wanted = layer(QuantizedLinear, weight, how)(x), F.linear(x, restored(weight, how))
    assert y.shape == wanted.shape and y.dtype == torch.float32
    assert (y - wanted).norm() <= (0.04 if bits else 1e-6) * wanted.norm()


def test_linear_follows_new_tensors_and_types():
    made = layer(QuantizedLinear, draw(8, 16), INT8)
    x = draw(3, 16, seed=1)
    first = made(x)
    made.weight, made.scale = quantize(draw(8, 16, seed=2), INT8)
    assert not torch.allclose(made(x), first)
    assert made(x.bfloat16()).dtype == torch.bfloat16


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
    quantized.activation_bits.cache_clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert quantized.activation_bits() in KERNELS


def missing(weight, scale, activation_bits):
    return torch.ops.quantized.no_such_operator(weight)


def refusing(weight, scale, activation_bits):
    raise NotImplementedError("could not run on this backend")


def saturating(weight, scale, activation_bits):
    return lambda x: F.linear(x, weight).clamp(-32767, 32767)


@pytest.mark.parametrize("broken", [missing, refusing, saturating])
def test_matmuls_that_do_not_work_are_passed_over(broken, monkeypatch):
    monkeypatch.setattr(quantized, "cpu_int8_activation_bits", lambda: 8)
    monkeypatch.setattr(quantized, "int8_matmul", broken)
    assert quantized.activation_bits.__wrapped__() == 0


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
    monkeypatch.setattr(quantized, "is_right", lambda make: True)
    assert quantized.activation_bits.__wrapped__() == bits


@pytest.mark.parametrize("how", [INT8, INT4], ids=["int8", "int4"])
def test_tied_matrices_stay_tied(tiny, tmp_path, how):
    model, float_model = tiny("nyx"), tiny("nyx")
    quantize_layers(model, how)
    state = quantized_state(float_model, how)
    assert {"embedding.weight", "embedding.scale"} <= state.keys() and "head.weight" not in state
    load_weights(model, widen(state), tmp_path, torch.device("cpu"))
    assert model.head.weight is model.embedding.weight and model.head.scale is model.embedding.scale
    assert torch.equal(model.embedding.weight, state["embedding.weight"])


@pytest.mark.parametrize(
    "kept, staying",
    [
        (["blocks.1"], ["blocks.1.in_proj", "blocks.1.attn_out", "blocks.1.ffn_out"]),
        (["blocks.0.ffn_out"], ["blocks.0.ffn_out"]),
        (["head"], ["head", "embedding"]),  # one matrix under two names
        (["block"], []),
    ],
)
def test_kept_layers(tiny, kept, staying):
    model = tiny("nyx")
    assert quantizable(model).keys() - quantizable(model, kept).keys() == set(staying)
    quantize_layers(model, Quantization(bits=8, group_size=None, kept=kept))
    assert all(not isinstance(model.get_submodule(name), QuantizedLinear | QuantizedEmbedding) for name in staying)


def test_a_matrix_that_another_module_holds_too_stays():
    model = nn.Module()
    model.linear, model.free, model.foreign = Linear(4, 4), Linear(4, 4), nn.LayerNorm(4)
    model.foreign.matrix = model.linear.weight
    assert list(quantizable(model)) == ["free"]


@pytest.mark.parametrize("described", [{}, {"format": 2, "bits": 8}, {"format": 1, "bits": 3, "group_size": None}])
def test_unknown_schemes_are_refused(described):
    with pytest.raises(CheckpointError, match="does not know this quantization"):
        Quantization.read(described)
