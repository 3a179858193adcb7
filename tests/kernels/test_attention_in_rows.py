import pytest
import torch
import torch.nn.functional as F

from nnx_cli.kernels import attention_in_rows
from nnx_cli.layers.attention import causal_attention


@pytest.mark.parametrize(("T", "G"), [(400, 4), (513, 2), (768, 1)])
def test_attention_and_gradients_are_those_of_torch(T, G):
    leaves = [torch.randn(2, T, heads, 8, requires_grad=True) for heads in (4, G, G)]
    q, k, v = (x.transpose(1, 2) for x in leaves)
    assert attention_in_rows.pays(q, k, v)
    plain = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.3, enable_gqa=True)
    wanted = plain.transpose(1, 2).flatten(2)
    y = causal_attention(q, k, v, None, 0, scale=0.3)
    weight = torch.randn_like(y)
    torch.testing.assert_close(y, wanted)
    torch.testing.assert_close(
        torch.autograd.grad((y * weight).sum(), leaves),
        torch.autograd.grad((wanted * weight).sum(), leaves),
        atol=1e-5,
        rtol=1e-4,
    )


def test_the_operator_keeps_what_torch_asks_of_one(monkeypatch):
    monkeypatch.setattr(attention_in_rows, "ROWS", 3)
    q, k, v = (torch.randn(2, heads, 7, 4, dtype=torch.float64, requires_grad=True) for heads in (4, 2, 2))
    assert torch.autograd.gradcheck(lambda *qkv: attention_in_rows.attention_in_rows(*qkv, 0.5)[0], (q, k, v))
    torch.library.opcheck(attention_in_rows.attention_in_rows, (q, k, v, 0.5))
