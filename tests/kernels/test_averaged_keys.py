"""Averaged keys: the definition, and one kernel in its place, on a GPU or under TRITON_INTERPRET=1."""

import importlib.util
import os

import pytest
import torch

from nnx_cli.kernels import averaged_keys as layer
from nnx_cli.system.hardware import Hardware

KERNEL_DEVICE = "cuda" if torch.cuda.is_available() else "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else None


def case(B=2, T=130, G=3, K=40, dtype=torch.float32, device="cpu"):
    """Keys as a part of a packed projection, shares of positions, and the positions."""
    torch.manual_seed(0)
    packed = torch.randn(B, T, 3 * G * K + 8, dtype=dtype, device=device)
    counts = torch.arange(1, T + 1, device=device).float().unsqueeze(-1)
    share = counts * torch.rand(B, T, G, device=device)
    return packed[..., G * K : 2 * G * K].view(B, T, G, K).requires_grad_(), share.requires_grad_(), counts


def test_is_a_mean_in_which_position_m_counts_m_times():
    k, _, counts = case(T=7)
    share = counts.expand(2, 7, 3)
    averages = layer.averaged_keys(k, share, counts)
    for j in range(7):
        want = sum((m + 1) * k[:, m] for m in range(j + 1)) / (j + 1) ** 2
        torch.testing.assert_close(averages[:, j], want)


@pytest.mark.parametrize("kernel", ["plain", "triton"])
@pytest.mark.parametrize("shape", [{}, dict(T=1, K=32), dict(B=1, T=64, G=1, K=128)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_operator_equals_plain_operations(monkeypatch, shape, dtype, kernel):
    if kernel == "triton" and (KERNEL_DEVICE is None or importlib.util.find_spec("triton") is None):
        pytest.skip("needs Triton and a GPU, or TRITON_INTERPRET=1")
    monkeypatch.setattr(layer, "of", lambda x: Hardware("cuda", triton=kernel == "triton"))
    k, share, counts = case(**shape, dtype=dtype, device=KERNEL_DEVICE if kernel == "triton" else "cpu")
    plain = layer.plain_averaged_keys(k, share, counts)
    grad = torch.randn_like(plain.transpose(1, 2)).transpose(1, 2)  # as attention returns it
    wanted = torch.autograd.grad(plain, (k, share), grad)
    averaged = layer.averaged_keys_op(k, share, counts)
    found = torch.autograd.grad(averaged, (k, share), grad)
    rtol = dict(rtol=2e-5 if dtype == torch.float32 else 1.6e-2)
    torch.testing.assert_close(averaged, plain, **rtol, atol=1e-6)
    torch.testing.assert_close(found[0], wanted[0], **rtol, atol=1e-5)
    torch.testing.assert_close(found[1], wanted[1], rtol=1e-4, atol=1e-4)


def test_the_operator_is_described_rightly():
    k, share, counts = case(B=1, T=3, G=2, K=8)
    torch.library.opcheck(layer.averaged_keys_op, (k, share, counts))
