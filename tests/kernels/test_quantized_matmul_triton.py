"""Matmuls with int8 weights as kernels: on a GPU, or anywhere under Triton's interpreter (TRITON_INTERPRET=1)."""

import os

import pytest
import torch
import torch.nn.functional as F

from nnx_cli.kernels import quantized_matmul as kernels

pytest.importorskip("triton")
DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"
pytestmark = pytest.mark.skipif(DEVICE == "cuda" and not torch.cuda.is_available(), reason="needs a GPU")
TYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(("N", "K"), [(33, 100), (1, 1), (20, 1100)])
@pytest.mark.parametrize("shape", [(1, 1), (3,), (1, 5), (70,)])
def test_gpu_int8_matmul(dtype, N, K, shape):
    if DEVICE == "cpu" and dtype == torch.bfloat16 and torch.Size(shape).numel() > 4:
        pytest.skip("the interpreter has no matmul of bfloat16")
    torch.manual_seed(0)
    codes = torch.randint(-127, 128, (N, K), dtype=torch.int8, device=DEVICE)
    scale, x = torch.rand(N, device=DEVICE) / 100, torch.randn(*shape, K, device=DEVICE).to(dtype)
    y = kernels.gpu_int8_matmul(codes, scale)(x)
    wanted = F.linear(x.double(), codes.double() * scale.double()[:, None])
    assert y.shape == wanted.shape and y.dtype == dtype
    eps = torch.finfo(dtype).eps
    assert (y.double() - wanted).abs().max() <= (2 * eps + 1e-6) * wanted.abs().max()


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
@pytest.mark.parametrize(
    ("bits", "group_size", "least", "n_sequences", "stays"),
    [(8, None, 0, 1, True), (8, None, 0, 2, False), (8, None, 10**9, 1, False), (4, 32, 0, 1, False)],
)
def test_a_gpu_keeps_int8_where_that_is_faster(
    tiny, tmp_path, monkeypatch, bits, group_size, least, n_sequences, stays
):
    from nnx_cli.convert.quantize import quantized_state
    from nnx_cli.inference.generate import ready_to_decode
    from nnx_cli.layers import quantized
    from nnx_cli.layers.quantized import Quantization, QuantizedLinear, quantize_layers, widen
    from nnx_cli.runs.load import fill_model

    monkeypatch.setattr(quantized, "SMALL_MATRIX", 0)
    monkeypatch.setattr(quantized, "LARGE_MODEL", least)
    model, how = tiny("nyx"), Quantization(bits=bits, group_size=group_size, kept=[])
    state = widen(quantized_state(tiny("nyx"), how))
    quantize_layers(model, how)
    fill_model(model, state, tmp_path, torch.device(DEVICE), "bf16")
    with ready_to_decode(model, n_sequences):
        assert isinstance(model.blocks[0].attn_out, QuantizedLinear) is stays
    assert model(torch.arange(20, device=DEVICE)[None]).isfinite().all()
