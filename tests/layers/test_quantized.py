from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from nnx_cli.convert.quantize import quantized_state
from nnx_cli.errors import CheckpointError
from nnx_cli.kernels import quantized_matmul as kernels
from nnx_cli.kernels.quantized_matmul import KERNELS
from nnx_cli.layers import quantized
from nnx_cli.layers.linear import Linear, PackedLinear
from nnx_cli.layers.quantized import (
    Quantization,
    QuantizedEmbedding,
    QuantizedLinear,
    dequantize,
    kernels_in_words,
    quantizable,
    quantize,
    quantize_layers,
    unpack_slow_layers,
    widen,
)
from nnx_cli.runs.tensors import load_weights

INT8 = Quantization(bits=8, group_size=None, kept=[])
INT4 = Quantization(bits=4, group_size=32, kept=[])


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def has_kernel(bits):
    """Whether this machine multiplies with activations of so many bits."""
    if bits == 16:
        return kernels.has_c_matmul()
    return bits in (0, 4) or kernels.is_right(partial(kernels.int8_matmul, activation_bits=bits))


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
@pytest.mark.parametrize("bits", [16, 8, 7, 4, 0])
@pytest.mark.parametrize("unit_axis", [None, 0, 1])
@pytest.mark.parametrize("shape", [(1, 1), (2, 5), (1,)])
def test_linear_multiplies_with_the_stored_weights(how, bits, unit_axis, shape, monkeypatch):
    if bits == 4 and not (how is INT4 and kernels.has_int4_matmul()) or not has_kernel(bits):
        pytest.skip("this machine has no such matmul")
    monkeypatch.setattr(quantized, "SMALL_MATRIX", 0)
    monkeypatch.setattr(kernels, "activation_bits", lambda: 8 if bits in (16, 4) else bits)
    monkeypatch.setattr(kernels, "has_c_matmul", lambda: bits == 16)
    monkeypatch.setattr(kernels, "has_int4_matmul", lambda: bits == 4)
    weight, x = draw(48, 96), draw(*shape, 96, seed=1)
    made = layer(QuantizedLinear, weight, how)
    made.unit_axis = unit_axis
    stored = restored(weight, how)
    y, wanted = made(x), F.linear(x, stored if unit_axis is None else F.normalize(stored, dim=unit_axis))
    assert made.kernel(torch.float32) == bits
    assert y.shape == wanted.shape and y.dtype == torch.float32
    few_in_int4 = bits == 4 and shape != (2, 5)
    in_c = bits == 16 and shape != (2, 5)
    error = 1e-6 if not bits else 0.005 if few_in_int4 else 0.04 if not in_c else 1e-4 if how is INT8 else 0.01
    assert (y - wanted).norm() <= error * wanted.norm()


@pytest.mark.parametrize("how", [INT8, INT4], ids=["int8", "int4"])
@pytest.mark.parametrize("columns, group_size", [(95, 32), (96, 24), (96, 32), (100, 32)])
def test_odd_shapes_have_a_matmul_too(how, columns, group_size, monkeypatch):
    monkeypatch.setattr(quantized, "SMALL_MATRIX", 0)
    how = replace(how, group_size=how.group_size and group_size)
    weight, x = draw(33, columns), draw(1, columns, seed=1)
    y, wanted = layer(QuantizedLinear, weight, how)(x), F.linear(x, restored(weight, how))
    assert (y - wanted).norm() <= 0.04 * wanted.norm()


def test_linear_follows_new_tensors_and_types():
    made = layer(QuantizedLinear, draw(8, 16), INT8)
    x = draw(3, 16, seed=1)
    first = made(x)
    made.weight, made.scale = quantize(draw(8, 16, seed=2), INT8)
    assert not torch.allclose(made(x), first)
    assert made(x.bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize("how", [INT8, INT4], ids=["int8", "int4"])
def test_tied_matrices_stay_tied(tiny, tmp_path, how):
    model, float_model = tiny("nyx"), tiny("nyx")
    quantize_layers(model, how)
    state = quantized_state(float_model, how)
    assert {"embedding.weight", "embedding.scale"} <= state.keys() and "head.weight" not in state
    load_weights(model, widen(state), tmp_path, torch.device("cpu"))
    assert model.head.weight is model.embedding.weight and model.head.scale is model.embedding.scale
    assert torch.equal(model.embedding.weight, state["embedding.weight"])


def loaded(tiny, tmp_path, name, how):
    """A model of the zoo, and the same quantized as it is when it has been loaded."""
    float_model, model = tiny(name).eval(), tiny(name).eval()
    quantize_layers(model, how)
    load_weights(model, widen(quantized_state(float_model, how)), tmp_path, torch.device("cpu"))
    return float_model, model


@pytest.mark.parametrize("name", ["llama", "ngpt", "nyx"])
def test_layers_that_gain_nothing_are_unpacked_once(tiny, tmp_path, name):
    """They are those of the float model again, tied where it is; they compute what the quantized ones do."""
    float_model, model = loaded(tiny, tmp_path, name, INT4)
    ids = torch.arange(20)[None]
    wanted = model(ids)
    unpack_slow_layers(model, torch.float32)
    assert not [m for m in model.modules() if isinstance(m, QuantizedLinear | QuantizedEmbedding)]
    assert torch.allclose(model(ids), wanted, atol=1e-5)
    assert {n: type(m) for n, m in model.named_modules()} == {n: type(m) for n, m in float_model.named_modules()}
    assert model.state_without_ties().keys() == float_model.state_without_ties().keys()
    assert not any(p.requires_grad for p in model.parameters())
    assert kernels_in_words(model, 9, torch.float32) == KERNELS[0]


def test_layers_that_gain_stay_as_they_are(tiny, tmp_path, monkeypatch):
    if not kernels.activation_bits():
        pytest.skip("this machine has no such matmul")
    _, model = loaded(tiny, tmp_path, "nyx", INT8)
    monkeypatch.setattr(quantized, "SMALL_MATRIX", model.blocks[0].attn_out.weight.numel())
    layers = [m for m in model.modules() if isinstance(m, QuantizedLinear)]
    large = sum(m.weight.numel() > quantized.SMALL_MATRIX for m in layers)
    unpack_slow_layers(model, torch.float32)
    assert type(model.blocks[0].attn_out) is Linear and 0 < large < len(layers)
    name = KERNELS[16 if kernels.has_c_matmul() else kernels.activation_bits()]
    words = kernels_in_words(model, len(layers), torch.float32)
    assert f"{name} ({large} of {len(layers)} layers)" in words and KERNELS[0] in words


def test_packed_layers_are_unpacked_with_their_splits(tiny, tmp_path):
    _, model = loaded(tiny, tmp_path, "nyx", INT8)
    unpack_slow_layers(model, torch.bfloat16)
    layer = model.blocks[0].in_proj
    assert type(layer) is PackedLinear and layer.weight.dtype == torch.bfloat16
    assert [y.shape[-1] for y in layer(torch.zeros(1, layer.in_features).bfloat16())] == list(layer.splits)


@pytest.mark.parametrize("how", [INT8, INT4], ids=["int8", "int4"])
def test_unit_vectors_are_unit_vectors_again(tiny, tmp_path, how):
    _, model = loaded(tiny, tmp_path, "ngpt", how)
    axes = dict(tiny("ngpt").unit_axes()) | {"head.proj.weight": 1}  # tied to the embedding
    found = {f"{name}.weight": m for name, m in model.named_modules() if isinstance(m, quantized.QuantizedMatrix)}
    assert found.keys() == axes.keys() and len(found) > 5
    for name, module in found.items():
        norms = module.matrix().norm(dim=axes[name])
        assert torch.allclose(norms, torch.ones_like(norms), atol=1e-6)
        raw = dequantize(module.weight, module.scale, module.n_columns, module.group_size).norm(dim=axes[name])
        assert (raw - 1).abs().max() > 1e-6
    rows = model.embedding(torch.arange(10)).norm(dim=-1)
    assert torch.allclose(rows, torch.ones_like(rows), atol=1e-6)


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


SOUND = {"format": 1, "bits": 4, "group_size": 32, "kept": ["head"]}


@pytest.mark.parametrize(
    "described",
    [
        None,
        [],
        "int8",
        SOUND | {"group_size": 1},
        SOUND | {"group_size": True},
        SOUND | {"group_size": None},
        SOUND | {"bits": 8},
        SOUND | {"kept": [1]},
        SOUND | {"kept": "head"},
        SOUND | {"more": 1},
        {name: value for name, value in SOUND.items() if name != "kept"},
    ],
)
def test_what_is_no_quantization_is_told_from_an_unknown_one(described):
    assert Quantization.read(SOUND).kept == ["head"]
    with pytest.raises((TypeError, ValueError)):
        Quantization.read(described)
