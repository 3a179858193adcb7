import pytest
import torch

from nnx_cli import models
from nnx_cli.layers.blocks import checkpoint_blocks, direct_calls
from nnx_cli.layers.loss import LossModule

FURTHER = [
    ("neon", dict(decoder="function", function_balance=0.01)),
    ("tape", dict(entropy_weight=0.1)),
    ("nyx", dict(dropout=0.2)),
    ("ngpt", dict(dropout=0.2)),
]


def loss_and_gradients(model, ids):
    model.zero_grad(set_to_none=True)
    torch.manual_seed(7)
    loss, n_targets = LossModule(model)(ids, ids.roll(-1, 1))
    (loss / n_targets).backward()
    return [loss.detach()] + [p.grad for p in model.parameters()]


def blocks_run(model, ids):
    """How often each block's inside runs in one training step."""
    runs = [0] * len(model.blocks)

    def count(number):
        def hook(*_):
            runs[number] += 1

        return hook

    handles = [block.register_forward_pre_hook(count(number)) for number, block in enumerate(model.blocks)]
    loss_and_gradients(model, ids)
    for handle in handles:
        handle.remove()
    return runs


@pytest.mark.parametrize(("name", "fields"), [*((name, {}) for name in models.names()), *FURTHER])
def test_loss_and_gradients_stay_the_same(tiny, name, fields):
    model = tiny(name, **fields)
    ids = torch.randint(64, (2, 32))
    names = list(model.state_dict())
    plain = loss_and_gradients(model, ids)
    for mode in ("on", "half", "off"):
        checkpoint_blocks(model, mode)
        for ours, theirs in zip(loss_and_gradients(model, ids), plain, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
        assert list(model.state_dict()) == names


def test_which_blocks_run_again(tiny):
    model, ids = tiny("llama", n_layers=5), torch.randint(64, (1, 8))
    assert blocks_run(model, ids) == [1, 1, 1, 1, 1]
    checkpoint_blocks(model, "half")
    assert blocks_run(model, ids) == [2, 1, 2, 1, 2]
    checkpoint_blocks(model, "on")
    checkpoint_blocks(model, "on")
    assert blocks_run(model, ids) == [2, 2, 2, 2, 2]
    checkpoint_blocks(model, "off")
    assert blocks_run(model, ids) == [1, 1, 1, 1, 1]


@pytest.mark.parametrize("name", models.names())
def test_a_cache_is_filled_once(tiny, name):
    model, ids = tiny(name), torch.randint(64, (1, 12))
    checkpoint_blocks(model, "on")
    with torch.no_grad():
        whole = model.eval()(ids)
        cache = model.make_cache(1, 16)
        pieces = torch.cat((model.train()(ids[:, :7], cache=cache), model(ids[:, 7:], cache=cache)), 1)
    assert cache.lengths.tolist() == [12]
    torch.testing.assert_close(pieces, whole)
    cache = model.make_cache(1, 16)
    model(ids[:, :7], cache=cache)  # with gradients
    assert cache.lengths.tolist() == [7]


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("llama", {}),
        ("neon", {}),
        ("tape", dict(coda_layers=1)),
    ],
)
def test_checkpointed_blocks_compile(tiny, name, fields):
    """A block of tensors alone, one that adds to the loss, one with several results."""
    model, ids = tiny(name, n_layers=1, **fields), torch.randint(64, (2, 32))
    plain = loss_and_gradients(model, ids)
    checkpoint_blocks(model, "half")  # the first, third, ...
    for block in model.blocks:
        block.compile(backend="aot_eager", dynamic=False)
    for ours, theirs in zip(loss_and_gradients(model, ids), plain, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    torch.compiler.reset()


def test_direct_calls_leave_no_trace(tiny):
    """Of hooks, compiled code, and attributes; meanwhile the same is computed, without what stands in between."""
    model, ids = tiny("llama").eval(), torch.arange(9)[None]
    called = []
    hook = model.blocks[0].register_forward_hook(lambda *args: called.append(args))
    model.blocks[1].compile(backend="aot_eager")
    attributes = [list(vars(module)) for module in model.modules()]
    compiled = model.blocks[1]._compiled_call_impl
    with torch.no_grad():
        whole = model(ids)
        with direct_calls(model, torch.float32):
            assert vars(model.norm)["weight"] is model.norm.weight
            assert model.blocks[1]._compiled_call_impl == model.blocks[1].forward
            assert torch.equal(model(ids), whole) and len(called) == 2
    assert [list(vars(module)) for module in model.modules()] == attributes
    assert model.blocks[1]._compiled_call_impl is compiled
    with pytest.raises(ZeroDivisionError), direct_calls(model, torch.float32):
        raise ZeroDivisionError
    assert "weight" not in vars(model.norm)
    hook.remove()
    torch.compiler.reset()


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("name", "options"), [("ngpt", {}), ("neon", {}), ("neon", dict(diff_mlp=True))])
def test_what_depends_on_parameters_alone_is_computed_once(tiny, name, options, precision, monkeypatch):
    """So many multiplications fewer, and the same numbers."""
    model, ids = tiny(name, **options).eval(), torch.arange(9)[None]
    model.compute_dtype = precision
    multiplications = []
    multiply = torch.Tensor.__mul__
    monkeypatch.setattr(torch.Tensor, "__mul__", lambda *factors: multiplications.append(1) or multiply(*factors))
    with torch.inference_mode():
        whole = model(ids)
        before = len(multiplications)
        with direct_calls(model, precision):
            multiplications.clear()
            assert torch.equal(model(ids), whole)
    constant = {"ngpt": 5 * 2 + 1, "neon": 2 * 2 * (1 + len(options))}[name]
    assert before - len(multiplications) >= constant
