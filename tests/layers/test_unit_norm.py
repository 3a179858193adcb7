"""Weights that are put back onto the sphere."""

import pytest
import torch

from nnx_cli.layers.unit_norm import normalize_matrices, normalize_stacked


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("axis", [0, 1])
def test_matrices_are_normalised_alike_side_by_side_and_one_by_one(axis, dtype):
    torch.manual_seed(0)
    matrices = [torch.nn.Parameter(torch.randn(5, 8).to(dtype)) for _ in range(3)]
    with torch.no_grad():
        matrices[1][:] = 0
        wanted = [m.float() / m.float().norm(dim=axis, keepdim=True).clamp(min=1e-12) for m in matrices]
        alone = [m.clone() for m in matrices]
        normalize_stacked(matrices, axis)
    normalize_matrices((m, axis) for m in alone)
    for together, single, exact in zip(matrices, alone, wanted, strict=True):
        assert torch.equal(together, single)
        torch.testing.assert_close(together.float(), exact, atol=1e-7 if dtype == torch.float32 else 4e-3, rtol=0)
