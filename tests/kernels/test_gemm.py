import pytest
import torch
import torch.nn.functional as F

from nnx_cli.kernels import gemm
from nnx_cli.kernels.gemm import linear
from nnx_cli.system import hardware


@pytest.fixture
def always(monkeypatch):
    """Every GEMM goes to the operator, however small."""
    monkeypatch.setattr(gemm, "MIN_ROWS", 1)
    monkeypatch.setattr(gemm, "MIN_MULTIPLICATIONS", 1)


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("shape", [(7, 5, 3), (2, 7, 3, 5), (2, 40, 9, 4)])  # rows, K, M
def test_products_and_gradients_are_those_of_linear(shape, known, always, monkeypatch):
    monkeypatch.setattr(hardware, "has_onednn", lambda: known and torch.backends.mkldnn.is_available())
    *rows, K, M = shape
    x, weight = torch.randn(*rows, K, requires_grad=True), torch.randn(M, K, requires_grad=True)
    results = []
    for function in (linear, F.linear):
        y = function(x.transpose(0, -2), weight)  # of rows that do not lie side by side
        (y.square().sum() + y.sum()).backward()
        results.append((y.detach(), x.grad, weight.grad))
        assert y.is_contiguous() and weight.grad.is_contiguous()
        x.grad = weight.grad = None
    torch.testing.assert_close(*results, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("shape", [(7, 5, 3), (7, 3, 5)])
def test_the_gradient_of_a_weight_lies_as_the_weight_does(shape, monkeypatch):
    monkeypatch.setattr(hardware, "has_onednn", torch.backends.mkldnn.is_available)
    rows, M, K = shape
    a, b = torch.randn(rows, M), torch.randn(rows, K)
    found = gemm.transposed_matmul(a, b)
    torch.testing.assert_close(found, a.t() @ b)
    assert found.is_contiguous()


def test_sums_have_gradients_too(always):
    x, weight = torch.randn(6, 5, requires_grad=True), torch.randn(4, 5)
    linear(x, weight).sum().backward()  # of a gradient that is one number, expanded
    torch.testing.assert_close(x.grad, weight.sum(0).expand(6, 5))


def test_the_operator_keeps_what_torch_asks_of_one(always):
    x, weight = torch.randn(3, 6, 5, requires_grad=True), torch.randn(4, 5, requires_grad=True)
    torch.library.opcheck(gemm.onednn_linear, (x, weight))


def test_other_types_and_small_products_are_torchs(monkeypatch):
    monkeypatch.setattr(gemm, "onednn_linear", lambda *_: pytest.fail("not for this"))
    linear(torch.randn(8, 2048), torch.randn(2048, 2048))
    linear(torch.randn(512, 16), torch.randn(16, 16))
    linear(torch.randn(512, 512).bfloat16(), torch.randn(512, 512).bfloat16())
    linear(torch.empty(512, 512, device="meta"), torch.empty(512, 512, device="meta"))
