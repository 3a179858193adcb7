"""An operator without a backward pass says so: autograd would look inside and keep what it finds there."""

import pytest
import torch

from nnx_cli.layers.segment_attention import attention_with_lse


def test_no_gradients_where_none_were_given():
    q = torch.randn(1, 4, 2, 8, requires_grad=True)
    y, _ = attention_with_lse(q, q, q)
    with pytest.raises(RuntimeError, match="attention_with_lse has no gradients"):
        y.sum().backward()
