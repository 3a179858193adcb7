"""The recurrence's step as one kernel: on a GPU, or anywhere under Triton's interpreter (TRITON_INTERPRET=1)."""

import os

import pytest
import torch

from nnx_cli.kernels import soft_xor

pytest.importorskip("triton")
DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"
pytestmark = pytest.mark.skipif(DEVICE == "cuda" and not torch.cuda.is_available(), reason="needs a GPU")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_equals_plain_operations(dtype):
    from nnx_cli.kernels import soft_xor_triton as soft_xor_kernel

    torch.manual_seed(0)
    sums = (3 * torch.randn(5, 2 * 77, device=DEVICE)).to(dtype)
    sums[0, :5] = torch.tensor([0.0, 1e-6, -1e-3, 100.0, -100.0])
    states, fused = sums.new_empty(2, 5, 77), sums.clone()
    soft_xor.cell(sums, states[0])
    soft_xor_kernel.cell(fused, states[1])
    tolerance = dict(rtol=torch.finfo(dtype).eps, atol=1e-6)
    torch.testing.assert_close(*states, **tolerance)
    torch.testing.assert_close(fused, sums, **tolerance)
