"""Heads and gates taken out of a packed projection in one kernel, beside plain operations: on a CPU in C, on a GPU, or
under TRITON_INTERPRET=1, in Triton."""

import importlib.util
import os

import pytest
import torch
import torch.nn.functional as F

from nnx_cli.kernels import qkv_swiglu as layer
from nnx_cli.kernels import qkv_swiglu_c
from nnx_cli.layers.rope import rotary_tables
from nnx_cli.system.hardware import Hardware

KERNEL_DEVICE = "cuda" if torch.cuda.is_available() else "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else None
SHAPES = [{}, dict(H=12, G=1, K=64, n_hidden=1100), dict(H=3, G=3, K=24, n_hidden=0), dict(B=1, T=1, K=2)]


def case(B=2, T=5, H=6, G=2, K=16, n_hidden=40, dtype=torch.float32, device="cpu"):
    """A packed projection, and tables with a decay of their own for keys, as xPos has."""
    torch.manual_seed(0)
    packed = torch.randn(B, T, (H + 2 * G) * K + 2 * n_hidden, dtype=dtype, device=device).requires_grad_()
    tables = rotary_tables(torch.arange(T, device=device), K)
    return packed, (*tables, *(table * 1.1 for table in tables)), H, G


def plainly(packed, tables, H, G):
    return layer.plain_qkv_rope_swiglu(packed, *tables, H, G)


def device_for(kernel, monkeypatch):
    if kernel == "triton" and (KERNEL_DEVICE is None or importlib.util.find_spec("triton") is None):
        pytest.skip("needs Triton and a GPU, or TRITON_INTERPRET=1")
    if kernel == "c" and not qkv_swiglu_c.is_available():
        pytest.skip("no C compiler, or no x86 CPU with AVX2")
    if kernel != "c":
        monkeypatch.setattr(layer, "of", lambda x: Hardware("cuda", triton=kernel == "triton"))
        monkeypatch.setattr(qkv_swiglu_c, "takes", lambda x: False)
    return KERNEL_DEVICE if kernel == "triton" else "cpu"


def compare(found, wanted, dtype):
    for one, other in zip(found, wanted, strict=True):
        rtol, atol = (1e-5, 1e-5) if dtype == torch.float32 else (1.6e-2, 1e-2)
        torch.testing.assert_close(one, other, rtol=rtol, atol=atol)


@pytest.mark.parametrize("kernel", ["plain", "c", "triton"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_unpacking_equals_plain_operations(monkeypatch, shape, dtype, kernel):
    packed, tables, H, G = case(**shape, dtype=dtype, device=device_for(kernel, monkeypatch))
    wanted, found = plainly(packed, tables, H, G), layer.qkv_rope_swiglu(packed, *tables, H, G)
    compare(found, wanted, dtype)
    grads = [torch.randn_like(y) for y in wanted]
    compare(torch.autograd.grad(found, packed, grads), torch.autograd.grad(wanted, packed, grads), dtype)


@pytest.mark.parametrize("kernel", ["plain", "c", "triton"])
@pytest.mark.parametrize("width", [3, 1100])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_gate_equals_plain_operations(monkeypatch, width, dtype, kernel):
    torch.manual_seed(0)
    packed = torch.randn(3, 4, 2 * width, dtype=dtype, device=device_for(kernel, monkeypatch)).requires_grad_()
    gate, up = packed.chunk(2, dim=-1)
    wanted, found = F.silu(gate) * up, layer.swiglu(packed)
    compare([found], [wanted], dtype)
    grad = torch.randn_like(wanted)
    compare(torch.autograd.grad(found, packed, grad), torch.autograd.grad(wanted, packed, grad), dtype)


def test_operators_are_described_rightly():
    packed, tables, H, G = case()
    torch.library.opcheck(layer.qkv_rope_swiglu_op, (packed, *tables, H, G))
    torch.library.opcheck(layer.swiglu_op, (packed,))
