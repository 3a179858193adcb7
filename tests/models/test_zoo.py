"""What every architecture promises, whichever there are."""

import dataclasses
import math

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from nnx_cli import models
from nnx_cli.errors import UsageError
from nnx_cli.layers.loss import LossModule
from nnx_cli.planning.flops import count_parameters, meta_model
from nnx_cli.runs.tensors import load_weights, read_tensors, write_tensors

NAMES = models.names()
SIZES = {"nano": 0.8e6, "tiny": 10.7e6, "small": 30e6, "base": 124e6, "large": 350e6, "xl": 1.0e9}
TOLERANCE = {"tape": 0.10}  # the least adjustable one
V = 64

OTHERS = [("n4", dict(kv_latent_dim=12)), ("nyx", dict(xpos=False))]  # models of another make, which promise as much
FURTHER = [("tape", dict(prophet=False, moderator=False, tails="learned"))]  # the same, with --long


def pytest_generate_tests(metafunc):
    """Every test is run on all architectures, and on OTHERS and FURTHER where it does not build its model by name
    alone."""
    if "fields" in metafunc.fixturenames:
        made = [(name, {}) for name in NAMES] + OTHERS + FURTHER
        ids = [" ".join([name, *fields]) for name, fields in made]
        marks = [pytest.mark.long if each in FURTHER else () for each in made]
        params = [pytest.param(*each, marks=mark) for each, mark in zip(made, marks, strict=True)]
        metafunc.parametrize(("name", "fields"), params, ids=ids)
    else:
        metafunc.parametrize("name", NAMES)


@pytest.fixture
def model(tiny, name, fields):
    """A model whose logits differ clearly from token to token: small weights hide mistakes."""
    model = tiny(name, vocab_size=V, **fields).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() >= 2:
                parameter.mul_(2.0)
    model.post_optim_step()
    return model


def draw_ids(*shape, seed=1):
    return torch.randint(V, shape, generator=torch.Generator().manual_seed(seed))


def same(a, b, tolerance=2e-5):
    assert a.shape == b.shape
    return (a - b).abs().max().item() <= tolerance * max(1.0, b.abs().max().item())


def test_logits_shape(model, name):
    logits = model(draw_ids(3, 17))
    assert logits.shape == (3, 17, V) and logits.dtype == torch.float32
    assert logits.isfinite().all()


@torch.no_grad()
def test_a_later_token_changes_no_earlier_logit(model, name):
    ids = draw_ids(2, 20)
    changed = ids.clone()
    changed[:, 12:] = (changed[:, 12:] + 1) % V
    before, after = model(ids), model(changed)
    assert torch.equal(before[:, :12], after[:, :12])
    assert not same(before[:, 12:], after[:, 12:])


@torch.no_grad()
def test_an_earlier_token_changes_later_logits(model, name):
    ids = draw_ids(1, 12)
    changed = ids.clone()
    changed[:, 5] = (changed[:, 5] + 1) % V
    difference = (model(ids) - model(changed)).abs().amax(dim=2)[0]
    assert (difference[:5] == 0).all() and (difference[5:] > 0).all()


@torch.no_grad()
@pytest.mark.parametrize("prefill", [1, 7, 20])
def test_cached_decoding_equals_the_full_pass(model, name, prefill):
    length = max(16, prefill + 6)
    ids = draw_ids(2, length)
    cache = model.make_cache(2, length)
    logits = [model(ids[:, :prefill], cache=cache)]
    logits += [model(ids[:, t : t + 1], cache=cache) for t in range(prefill, length - 2)]
    assert same(torch.cat(logits, dim=1), model(ids[:, :-2]))
    assert cache.lengths.tolist() == [length - 2] * 2 and cache.lengths.dtype == torch.int64
    assert same(model(ids[:, -2:], cache=cache), model(ids)[:, -2:]), "two tokens at once, to the last place"


@torch.no_grad()
def test_rows_of_different_length_share_a_cache(model, name):
    ids, lengths = draw_ids(3, 24), [5, 16, 1]
    cache = model.make_cache(3, 32)
    padded = ids[:, :16].clone()
    for row, length in enumerate(lengths):
        padded[row, length:] = 0
    model(padded, cache=cache)
    cache.truncate(torch.tensor(lengths))
    assert cache.lengths.tolist() == lengths
    for step in range(4):
        new = torch.stack([ids[row, length + step : length + step + 1] for row, length in enumerate(lengths)])
        logits = model(new, cache=cache)
        for row, length in enumerate(lengths):
            assert same(logits[row, -1], model(ids[row : row + 1, : length + step + 1])[0, -1]), (row, step)


@torch.no_grad()
def test_rows_of_different_length_take_several_tokens_at_once(model, name):
    ids, lengths = draw_ids(2, 24), [4, 11]
    cache = model.make_cache(2, 32)
    model(ids[:, :11], cache=cache)
    cache.truncate(torch.tensor(lengths))
    new = torch.stack([ids[row, length : length + 3] for row, length in enumerate(lengths)])
    logits = model(new, cache=cache)
    for row, length in enumerate(lengths):
        assert same(logits[row], model(ids[row : row + 1, : length + 3])[0, -3:]), row


@torch.no_grad()
def test_cache_truncates_all_rows_to_one_length(model, name):
    ids = draw_ids(2, 16)
    cache = model.make_cache(2, 32)
    model((ids + 1) % V, cache=cache)
    cache.truncate(0)
    model(ids, cache=cache)
    cache.truncate(10)
    assert same(model(ids[:, 10:], cache=cache), model(ids)[:, 10:])


@torch.no_grad()
def test_cache_repeats_and_resets(model, name):
    ids = draw_ids(2, 9)
    cache = model.make_cache(2, 32)
    model(ids, cache=cache)
    cache.truncate(torch.tensor([6, 9])).repeat(3)
    assert cache.lengths.tolist() == [6, 6, 6, 9, 9, 9]
    new = draw_ids(6, 1, seed=2)
    logits = model(new, cache=cache)
    for row in range(6):
        known = ids[row // 3, : [6, 9][row // 3]]
        assert same(logits[row, -1], model(torch.cat((known, new[row]))[None])[0, -1]), row
    cache.reset()
    assert cache.lengths.tolist() == [0] * 6
    fresh = draw_ids(6, 5, seed=3)
    assert same(model(fresh, cache=cache), model(fresh))


@torch.no_grad()
def test_rows_of_a_cache_come_and_go(model, name):
    """As sequences that are decoded together do."""
    ids = draw_ids(3, 12)
    cache = model.make_cache(3, 32)
    model(ids[:, :11], cache=cache)
    cache.truncate(torch.tensor([5, 11, 8])).take(torch.tensor([2, 0]))
    assert cache.lengths.tolist() == [8, 5]
    larger, new = model.make_cache(4, 32), draw_ids(1, 7, seed=2)
    larger.put(torch.tensor([0, 1]), cache)
    part = model.make_cache(1, 7)
    model(new, cache=part)
    larger.put(torch.tensor([3]), part)
    assert larger.lengths.tolist() == [8, 5, 0, 7]
    logits = model(ids[[2, 0, 1, 1], [8, 5, 0, 7]][:, None], cache=larger)
    for row, known in ((0, ids[2, :9]), (1, ids[0, :6]), (2, ids[1, :1]), (3, torch.cat((new[0], ids[1, 7:8])))):
        assert same(logits[row, -1], model(known[None])[0, -1]), row


class Operations(TorchDispatchMode):
    """Notes every operation with the shapes it is given."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.append((func, [x.shape if isinstance(x, torch.Tensor) else x for x in tree_leaves((args, kwargs))]))
        return func(*args, **(kwargs or {}))


def addresses(cache):
    stores = getattr(cache, "stores", (cache,))
    return [x.data_ptr() for store in stores for x in vars(store).values() if isinstance(x, torch.Tensor)]


@torch.no_grad()
@pytest.mark.parametrize("lengths", [(9, 9), (4, 9)])
def test_a_cache_with_a_span_takes_one_token_by_the_same_operations_whatever_it_holds(model, name, lengths):
    ids, seen = draw_ids(2, 24), []
    cache = model.make_cache(2, 32)
    model(ids[:, :9], cache=cache)
    cache.truncate(torch.tensor(lengths))
    cache.span = 24
    before = addresses(cache)
    for step in range(4):
        new = torch.stack([ids[row, length + step : length + step + 1] for row, length in enumerate(lengths)])
        with Operations() as operations:
            logits = model(new, cache=cache)
        cache.note_advance(1)
        seen.append(operations.seen)
        for row, length in enumerate(lengths):
            assert same(logits[row, -1], model(ids[row : row + 1, : length + step + 1])[0, -1]), (row, step)
    assert seen[0] == seen[1] == seen[2] == seen[3]
    assert not [f for f, _ in seen[0] if "_local_scalar_dense" in str(f)], "a number that the host waits for"
    cache.reset()
    assert same(model(ids, cache=cache), model(ids)), "several tokens at once, as ever"
    cache.truncate(torch.tensor(lengths))
    assert addresses(cache) == before, "where a graph reads and writes"


@torch.no_grad()
def test_rows_of_a_cache_are_replaced(model, name):
    ids, others = draw_ids(3, 12), draw_ids(2, 6, seed=2)
    cache, part = model.make_cache(3, 32), model.make_cache(2, 5)
    model(ids[:, :9], cache=cache)
    model(others[:, :5], cache=part)
    part.truncate(torch.tensor([5, 3]))
    cache.put(torch.tensor([2, 0]), part)
    assert cache.lengths.tolist() == [3, 9, 5]
    logits = model(torch.stack((others[1, 3], ids[1, 9], others[0, 5]))[:, None], cache=cache)
    for row, known in enumerate((others[1, :4], ids[1, :10], others[0, :6])):
        assert same(logits[row, -1], model(known[None])[0, -1]), row


def test_initial_loss_is_near_that_of_guessing(tiny, name, fields):
    ids = draw_ids(4, 33)
    loss, count = LossModule(tiny(name, vocab_size=V, **fields))(ids[:, :-1], ids[:, 1:])
    assert count == 4 * 32
    assert (loss / count).item() == pytest.approx(math.log(V), rel=0.1)


def test_every_parameter_receives_gradient(model, name):
    model.train()
    ids = draw_ids(4, 33)
    loss, count = LossModule(model)(ids[:, :-1], ids[:, 1:])
    (loss / count).backward()
    without = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.abs().max() > 0]
    assert without == []
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_overfits_one_batch(tiny, name, fields):
    model = tiny(name, vocab_size=V, **fields)
    step = LossModule(model)
    ids = draw_ids(2, 17)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    for _ in range(100):
        loss, count = step(ids[:, :-1], ids[:, 1:])
        optimizer.zero_grad()
        (loss / count).backward()
        optimizer.step()
        model.post_optim_step()
    assert (loss / count).item() < 0.3


@torch.no_grad()
def test_saved_and_loaded_gives_the_same_logits(model, name, tmp_path):
    digest = write_tensors(tmp_path / "model.safetensors", model.state_without_ties())
    state = read_tensors(tmp_path / "model.safetensors", digest)
    loaded = meta_model(name, model.config)
    load_weights(loaded, state, tmp_path, torch.device("cpu"))
    ids = draw_ids(2, 15)
    assert torch.equal(loaded.eval()(ids), model(ids))
    assert ties(loaded) == ties(model)
    assert [p.requires_grad for p in loaded.parameters()] == [p.requires_grad for p in model.parameters()]


def ties(model):
    """Names of parameters that are one tensor."""
    names = {}
    for key, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(key)
    return sorted(group for group in names.values() if len(group) > 1)


def test_state_dict_reads_alike(model, name):
    modules = dict(model.named_children())
    assert {"embedding", "blocks", "norm", "head"} <= modules.keys()
    assert model.device == torch.device("cpu")


def test_named_sizes(name):
    found = {}
    for size in models.sizes(name):
        config = models.make_config(name, size=size)
        total = count_parameters(meta_model(name, config))["total"]
        found[size] = total
        width = getattr(config, "head_dim", None) or config.dim // config.n_heads
        assert width % 16 == 0, (size, width)
    assert found.keys() >= SIZES.keys()
    for size, wanted in SIZES.items():
        assert found[size] == pytest.approx(wanted, rel=TOLERANCE.get(name, 0.05)), size
    assert sorted(found.values()) == list(found.values()), "smallest first"


@pytest.mark.long  # compiled blocks are compared in test_inductor.py too
def test_blocks_are_captured_whole_and_equal_eager(model, name):
    torch._dynamo.reset()
    model.train()
    ids = draw_ids(2, 17)

    def gradients():
        model.zero_grad()
        loss, count = LossModule(model)(ids[:, :-1], ids[:, 1:])
        (loss / count).backward()
        return (loss / count).item(), [p.grad.clone() for p in model.parameters()]

    eager_loss, eager = gradients()
    for block in model.blocks:
        block.compile(backend="aot_eager", fullgraph=True, dynamic=False)
    loss, compiled = gradients()
    assert loss == pytest.approx(eager_loss, abs=1e-5)
    assert all(same(a, b) for a, b in zip(compiled, eager, strict=True))


@pytest.mark.parametrize(
    "bad",
    [
        {"dim": 0},
        {"dim": -32},
        {"n_layers": 0},
        {"n_heads": 0},
        {"n_heads": -1},
        {"seq_len": 0},
        {"vocab_size": 0},
        {"dim": 10**12},
        {"n_layers": 10**6},
        {"vocab_size": 2**63},
        {"seq_len": 10**9},
        {"dropout": 1.0},
        {"dropout": -0.1},
        {"dropout": math.nan},
        {"dropout": math.inf},
        {"variant": "better"},
    ],
    ids=str,
)
def test_bad_values_are_refused(name, bad):
    with pytest.raises(UsageError) as error:
        models.make_config(name, **bad)
    assert next(iter(bad)).replace("_", "-") in str(error.value)


def test_numbers_that_are_not_finite_are_refused(name):
    for field in models.config_fields(name):
        if field.type == "float":
            for value in (math.nan, math.inf, -math.inf):
                with pytest.raises(UsageError, match=field.option):
                    models.make_config(name, **{field.name: value})


def test_fields_read_from_the_source_are_those_of_the_dataclass(name):
    config = type(models.make_config(name))
    read = {field.name: field for field in models.config_fields(name)}
    real = {field.name: field for field in dataclasses.fields(config)}
    assert list(read) == list(real)
    for key, field in read.items():
        assert field.default == real[key].default and type(field.default) is type(real[key].default), key
        assert real[key].type in (field.type, f"{field.type} | None"), key
        assert field.help, f"{key} has no comment"
        assert field.option == "--" + key.replace("_", "-")


def test_sizes_read_from_the_source_are_those_of_the_module(name):
    config = models.make_config(name, size="nano")
    assert models.config_dict(config)["vocab_size"] == 256
    assert tuple(__import__(f"nnx_cli.models.{name}", fromlist=["SIZES"]).SIZES) == models.sizes(name)


def test_another_width_drops_the_shapes_of_the_size(name):
    derived = [field.name for field in models.config_fields(name) if field.default is None]
    shape = {field: getattr(models.make_config(name, size="nano"), field) for field in ("n_layers", "seq_len")}
    own = models.make_config(name, dim=256, n_heads=4, **shape)
    sized = models.make_config(name, size="nano", dim=256, n_heads=4)
    assert {field: getattr(sized, field) for field in derived} == {field: getattr(own, field) for field in derived}
    assert {field: getattr(sized, field) for field in shape} == shape


def test_an_unknown_size_is_refused(name):
    with pytest.raises(UsageError, match="enormous") as error:
        models.make_config(name, size="enormous")
    assert "nano" in error.value.fix


def test_a_field_of_another_architecture_names_its_owner(name):
    mine = {field.name for field in models.config_fields(name)}
    for other in NAMES:
        for field in models.config_fields(other):
            if field.name not in mine:
                with pytest.raises(UsageError, match=f"{field.option}.*{other}"):
                    models.make_config(name, **{field.name: field.default})


def test_plain_safetensors_hold_every_tensor_once(model, name, tmp_path):
    state = {key: tensor.contiguous() for key, tensor in model.state_without_ties().items()}
    save_file(state, tmp_path / "model.safetensors")  # refuses tensors that share memory
    assert load_file(tmp_path / "model.safetensors").keys() == state.keys()


def test_reference_needs_an_original(tiny, name):
    if (models.FOLDER / "originals" / f"{name}.py").is_file():
        assert models.original(name).Tensors(tiny(name)).names()
    else:
        with pytest.raises(UsageError, match="no original"):
            models.load_reference(name, {}, {})


def test_blocks_share_their_compiled_code(tiny, name, fields):
    graphs = []

    def count(graph, example_inputs):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    model = tiny(name, n_layers=6, **fields)
    for block in model.blocks:
        block.compile(backend=count, dynamic=False)
    model.trunk(torch.zeros(2, 16, dtype=torch.int64))
    assert len(graphs) <= 4 < len(model.blocks)
    torch._dynamo.reset()
