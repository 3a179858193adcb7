"""Models whose heads and gates leave a packed projection in one kernel on a GPU: the same way taken here, by the
operators' plain side, beside the usual one."""

import itertools

import pytest
import torch

from nnx_cli import models
from nnx_cli.kernels import qkv_swiglu
from nnx_cli.layers.blocks import checkpoint_blocks
from nnx_cli.layers.lora import add_adapters
from nnx_cli.layers.loss import LossModule
from nnx_cli.layers.quantized import Quantization, quantize_layers

SHAPE = dict(vocab_size=40, dim=24, n_layers=2, n_heads=3, seq_len=12)
CASES = {
    "llama": ("llama", {}),
    "llama, one key head": ("llama", dict(n_kv_heads=1)),
    "nyx": ("nyx", {}),
    "nyx, normalised": ("nyx", dict(qk_norm=True)),
    "nyx, narrow": ("nyx", dict(head_dim=6, ffn_dim=7)),
}


@pytest.fixture
def calls(monkeypatch):
    """How often the operators ran, once `takes` says yes."""
    monkeypatch.setattr(qkv_swiglu, "takes", lambda x: True)
    counted = []
    for name in ("qkv_rope_swiglu_op", "swiglu_op"):
        operator = getattr(qkv_swiglu, name)
        monkeypatch.setattr(qkv_swiglu, name, lambda *a, operator=operator: counted.append(1) or operator(*a))
    return counted


def build(case, **changes):
    name, fields = CASES[case]
    torch.manual_seed(0)
    return models.build(name, **(SHAPE | fields | changes)).train()


def loss_and_gradients(model):
    ids = torch.randint(SHAPE["vocab_size"], (2, 13), generator=torch.Generator().manual_seed(1))
    loss, _ = LossModule(model)(ids[:, :-1].contiguous(), ids[:, 1:].contiguous())
    parameters = [p for p in model.parameters() if p.requires_grad]
    return [loss, *torch.autograd.grad(loss, parameters)]


@pytest.mark.parametrize(
    ("case", "how"),
    [*itertools.product(CASES, ["plain", "checkpointed", "adapters"]), ("llama", "compiled"), ("nyx", "compiled")],
)
def test_loss_and_gradients_stay_the_same(case, how, calls, monkeypatch):
    model = build(case)
    if how == "adapters":
        add_adapters(model, 2)
        for name, parameter in model.named_parameters():
            if name.endswith("lora_b"):
                torch.nn.init.normal_(parameter)
    with monkeypatch.context() as patch:
        patch.setattr(qkv_swiglu, "takes", lambda x: False)
        wanted = loss_and_gradients(model)
    assert not calls
    if how == "checkpointed":
        checkpoint_blocks(model, "on")
    elif how == "compiled":
        for block in model.blocks:
            block.compile(backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(loss_and_gradients(model), wanted)
    if how in ("plain", "checkpointed"):
        assert bool(calls) == (case != "nyx, normalised")


@pytest.mark.parametrize("case", CASES)
def test_quantized_layers_keep_their_own_way(case, calls):
    model = build(case).eval()
    quantize_layers(model, Quantization(bits=8, group_size=None, kept=[]))
    ids = torch.randint(SHAPE["vocab_size"], (2, 5))
    with torch.no_grad():
        whole = model(ids)
        cached = model(ids, cache=model.make_cache(2, 12))
    assert not calls
    torch.testing.assert_close(cached, whole)
