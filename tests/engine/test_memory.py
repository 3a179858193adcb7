import pytest
import torch
from torch.utils._pytree import tree_map

from nnx_cli import models
from nnx_cli.engine import memory
from nnx_cli.engine.cost import meta_model
from nnx_cli.engine.memory import CPU, Storages, Target, simulate

SHAPE = dict(vocab_size=96, dim=64, n_layers=3, n_heads=4, seq_len=40)
FURTHER = [
    ("neon", dict(decoder="function", function_balance=0.01)), ("neon", dict(decoder="memory", diff_mlp=True)),
    ("neon", dict(normalized=True, n_kv_heads=2)), ("n4", dict(window=16, bias=True, dyt_alpha=True, n_kv_heads=2)),
    ("ngpt", dict(normalize_on_use=True)), ("nyx", dict(qk_norm=True)), ("tape", dict(entropy_weight=0.1)),
    ("llama", dict(n_kv_heads=4, dropout=0.1)),
]  # fmt: skip


def kept_for_real(block, args, kwargs):
    """What autograd keeps of a pass: shape, type and bytes of every storage, parameters left out."""
    parameters = {x.untyped_storage().data_ptr() for x in (*block.parameters(), *block.buffers())}
    kept = {}

    def pack(tensor):
        if tensor.untyped_storage().data_ptr() not in parameters:
            kept.setdefault(tensor.untyped_storage().data_ptr(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        block(*args, **kwargs)
    return [(tuple(x.shape), x.dtype, x.untyped_storage().nbytes()) for x in kept.values()]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("name", "fields"), [*((name, {}) for name in models.names()), *FURTHER])
def test_what_blocks_keep_is_known_to_the_byte(name, fields, dtype):
    config = models.make_config(name, **(SHAPE | fields))
    model, on_meta = models.from_config(name, config), meta_model(name, config)
    model.compute_dtype = dtype
    calls = []
    for block in model.blocks:
        block.register_forward_pre_hook(lambda b, args, kwargs: calls.append((b, args, kwargs)), with_kwargs=True)
    model.trunk(torch.randint(config.vocab_size, (2, config.seq_len)))
    to_meta = {id(module): twin for module, twin in zip(model.modules(), on_meta.modules(), strict=True)}

    def meta(x):
        return (
            x.detach().to("meta").requires_grad_(x.requires_grad)
            if isinstance(x, torch.Tensor)
            else to_meta.get(id(x), x)
        )

    assert len(calls) == len(model.blocks)
    for block, args, kwargs in tuple(calls):
        real = kept_for_real(block, args, kwargs)
        told = memory.saved_tensors(to_meta[id(block)], *tree_map(meta, args), **tree_map(meta, kwargs))
        assert told == real, block
