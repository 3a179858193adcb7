"""The linear layer, and its weight in another type."""

import pytest
import torch

from nnx_cli import models
from nnx_cli.layers.linear import Linear, PackedLinear, weights_cast
from nnx_cli.layers.lora import add_adapters


@pytest.mark.parametrize("name", models.names())
@torch.no_grad()
def test_cast_weights_compute_what_weights_do(tiny, name):
    model, ids = tiny(name).eval(), torch.arange(12)[None]
    model.compute_dtype = torch.bfloat16
    whole = model(ids)
    with weights_cast(model, torch.bfloat16):
        layers = [module for module in model.modules() if isinstance(module, Linear)]
        assert all(layer.matrix(torch.bfloat16) is layer.cast for layer in layers)
        assert all(layer.matrix(torch.float32) is layer.weight for layer in layers)
        assert torch.equal(model(ids), whole)
    assert all(layer.cast is None for layer in layers)


def test_tied_weights_are_cast_once_and_nothing_where_there_is_nothing_to_cast(tiny):
    first, second = Linear(4, 3), Linear(4, 3)
    second.weight = first.weight
    model = torch.nn.ModuleList([first, second])
    with weights_cast(model, torch.float16):
        assert first.cast is second.cast and first.cast.dtype == torch.float16
    with weights_cast(model, torch.float32):
        assert first.cast is None


@torch.no_grad()
@pytest.mark.parametrize("adapted", [False, True])
def test_packed_projections_are_those_side_by_side(tiny, adapted):
    torch.manual_seed(0)
    layer, x = PackedLinear(8, (4, 2, 6)), torch.randn(2, 3, 8)
    if adapted:
        layer.add_adapter(2, (0, 2))
        torch.nn.init.normal_(layer.lora_b)
    assert torch.equal(layer.packed(x), torch.cat(layer(x), dim=-1))


def test_an_adapter_is_cast_beside_the_weight(tiny):
    model = tiny("llama").eval()
    add_adapters(model, 2)
    model.compute_dtype = torch.bfloat16
    with torch.no_grad():
        whole = model(torch.arange(5)[None])
        with weights_cast(model, torch.bfloat16):
            assert torch.equal(model(torch.arange(5)[None]), whole)
