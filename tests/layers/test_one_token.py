"""A step of decoding on a CPU: the same numbers in fewer operations."""

import pytest
import torch
from torch.autograd.profiler import profile

from nnx_cli import models
from nnx_cli.layers.blocks import direct_calls
from nnx_cli.layers.lora import add_adapters
from nnx_cli.layers.quantized import Quantization, quantize_layers


def decoded(model, n_sequences, ends):
    """Logits of two steps after a prompt, of which sequences keep as many tokens as `ends` says; operations of one."""
    ids = torch.arange(8 * n_sequences).view(n_sequences, 8) % 64
    cache = model.make_cache(n_sequences, 12)
    model(ids[:, :6], cache=cache)
    cache.truncate(torch.tensor(ends))
    first = model(ids[:, 6:7], cache=cache)
    with profile() as profiled:
        second = model(ids[:, 7:], cache=cache)
    return torch.cat((first, second), dim=1), len(profiled.function_events)


@pytest.mark.parametrize("ends", [[6], [6, 6, 6], [2, 6, 1]], ids=str)
@pytest.mark.parametrize("case", [("llama", {}), ("llama", dict(n_heads=4, n_kv_heads=1)), ("nyx", {"qk_norm": True})])
@torch.inference_mode()
def test_steps_are_the_same_in_fewer_operations(tiny, case, ends):
    name, fields = case
    model = tiny(name, **fields).eval()
    wanted, plainly = decoded(model, len(ends), ends)
    with direct_calls(model, torch.float32):
        found, n = decoded(model, len(ends), ends)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)
    assert n < 0.9 * plainly if len(ends) == 1 else n <= plainly


@pytest.mark.parametrize("name", models.names())
@torch.inference_mode()
def test_steps_of_every_architecture_are_the_same(tiny, name):
    """Also with biases and gains that are not those of the start."""
    model = tiny(name).eval()
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.add_(torch.rand_like(parameter))
    wanted, _ = decoded(model, 1, [6])
    with direct_calls(model, torch.float32):
        found, _ = decoded(model, 1, [6])
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("change", ["adapter", "int8", "bf16"])
@torch.inference_mode()
def test_what_is_no_plain_layer_keeps_to_its_way(tiny, change):
    model = tiny("llama", dim=64).eval()
    if change == "adapter":
        with torch.inference_mode(False):
            add_adapters(model, 2)
        for name, parameter in model.named_parameters():
            if name.endswith("lora_b"):
                torch.nn.init.normal_(parameter)
    elif change == "int8":
        quantize_layers(model, Quantization(bits=8, group_size=None, kept=[]))
        for name, codes in model.named_buffers():
            codes.copy_(torch.randint(1, 9, codes.shape) if name.endswith("weight") else torch.full_like(codes, 0.01))
    else:
        model.compute_dtype = torch.bfloat16
    wanted, _ = decoded(model, 1, [6])
    with direct_calls(model, model.compute_dtype):
        found, _ = decoded(model, 1, [6])
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)
