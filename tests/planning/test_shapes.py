import pytest
import torch
from torch import Tensor

from nnx_cli import models
from nnx_cli.planning import memory
from nnx_cli.planning.flops import meta_model
from nnx_cli.planning.memory import ANY_GPU, CPU, StorageTracker, simulate
from nnx_cli.planning.shapes import ShapeCache
from nnx_cli.system.torch_private import storage_key

SHAPE = dict(vocab_size=96, dim=64, n_layers=3, n_heads=4, seq_len=40)
aten = torch.ops.aten


def empty(*shape, **options):
    return torch.empty(*shape, device="meta", **options)


def facts(out):
    """What there is to say of a result: its tensors' shapes, strides, types and memory."""
    if isinstance(out, (list, tuple)):
        return [facts(x) for x in out]
    if not isinstance(out, Tensor):
        return out
    return out.shape, out.stride(), out.dtype, out.device, out.storage_offset(), out.untyped_storage().nbytes()


class Uncached(StorageTracker):
    """Asks torch every time."""

    def run(self, func, args, kwargs):
        return func(*args, **kwargs)


class Checked(StorageTracker):
    """Asks torch as well."""

    def run(self, func, args, kwargs):
        out = super().run(func, args, kwargs)
        assert facts(out) == facts(func(*args, **kwargs)), func
        return out


@pytest.mark.parametrize("hardware", [CPU, ANY_GPU], ids=["cpu", "card"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", models.names())
def test_a_step_is_answered_as_torch_does(name, dtype, hardware, monkeypatch):
    model = meta_model(name, models.make_config(name, **SHAPE))
    model.compute_dtype = dtype
    told = simulate(model, 2, 40, hardware=hardware, checkpointing="half")
    for tracker in (Uncached, Checked):
        monkeypatch.setattr(memory, "StorageTracker", tracker)
        assert simulate(model, 2, 40, hardware=hardware, checkpointing="half") == told


def calls(func, *arguments, **kwargs):
    """How often an operator runs, when it is asked with arguments one after the other, and its results."""
    n = 0

    def counted(*args, **kwargs):
        nonlocal n
        n += 1
        return func(*args, **kwargs)

    shapes = ShapeCache()
    return [shapes.run(counted, args, kwargs) for args in arguments], n


def test_what_was_asked_before_is_not_computed_again():
    results, n = calls(aten.add.Tensor, (empty(2, 3), empty(3)), (empty(2, 3), empty(3)), (empty(2, 3), empty(3)))
    assert n == 1 and len({id(x) for x in results}) == 3 and {facts(x) for x in results} == {facts(empty(2, 3))}


@pytest.mark.parametrize(
    "second",
    [
        (empty(4, 3), 1),
        (empty(3, 2).t(), 1),
        (empty(2, 3, dtype=torch.bfloat16), 1),
        (empty(2, 3), 1.0),
        (empty(2, 3), True),
        (empty(2, 3), empty(3)),
        (torch.zeros(2, 3), 1),
    ],
)
def test_what_differs_is_computed(second):
    results, n = calls(aten.mul.Tensor, (empty(2, 3, dtype=torch.int64), 1), (empty(2, 3), 1), second)
    assert n == 3 and facts(results[-1]) == facts(aten.mul.Tensor(*second))


def test_in_place_is_the_tensor_that_is_given():
    x, y = empty(2, 3), empty(2, 3)
    results, n = calls(aten.add_.Tensor, (x, 1), (y, 1))
    assert n == 1 and results[0] is x and results[1] is y


def test_views_share_memory():
    x, y = empty(2, 3), empty(2, 3)
    results, n = calls(aten.t.default, (x,), (y,))
    assert n == 2 and storage_key(results[1].untyped_storage()) == storage_key(y.untyped_storage())


@pytest.mark.parametrize(
    ("func", "args", "options"),
    [
        (aten.resize_.default, lambda: (empty(2), [5, 7]), dict),
        (aten.transpose_.default, lambda: (empty(2, 3), 0, 1), dict),
        (aten.add.out, lambda: (empty(4, 3), 1), lambda: {"out": empty(0)}),
    ],
)
def test_arguments_are_reshaped_every_time(func, args, options):
    shapes = ShapeCache()
    for _ in range(3):
        given, wanted = args(), args()
        kwargs, wanted_kwargs = options(), options()
        assert facts(shapes.run(func, given, kwargs)) == facts(func(*wanted, **wanted_kwargs))
        assert facts([*given, *kwargs.values()]) == facts([*wanted, *wanted_kwargs.values()])


def test_elements_are_computed_every_time():
    with ShapeCache():
        a, b = (torch.full((2,), n) + 1 for n in (3, 3))
        a += 1
    assert (a.tolist(), b.tolist()) == ([5, 5], [4, 4])


def test_lists_of_results():
    with ShapeCache():
        for _ in range(2):
            x, y = torch._foreach_add([empty(2), empty(3, 4)], 1.0)
            assert (x.shape, y.shape) == ((2,), (3, 4))
            weights = [empty(2), empty(3, 4)]
            torch._foreach_mul_(weights, 2.0)
            values, indices = torch.topk(empty(5, 9), 3)
            assert values.shape == indices.shape == (5, 3) and indices.dtype == torch.int64
