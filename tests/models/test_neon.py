"""Neon against numbers recorded from the original code, and its options against their formulas written out."""

import json
import math

import pytest
import torch
import torch.nn.functional as F

from nnx_cli import models
from nnx_cli.errors import CheckpointError, UsageError
from nnx_cli.layers.differential_attention import Lambda, differential_attention
from nnx_cli.layers.function_bank import FunctionBank, StraightThrough
from nnx_cli.layers.loss import LossModule
from nnx_cli.planning.flops import count_parameters, meta_model
from nnx_cli.runs.tensors import load_weights, read_tensors, write_tensors
from tests.models.reference_cases import FOLDER, load_case

CASES = json.loads((FOLDER / "neon.parity.json").read_text())["cases"]
BANK = dict(decoder="function", n_global_functions=3, n_layer_functions=2)
OPTIONS = {
    "expressive": {},
    "grouped": dict(n_heads=4, n_kv_heads=2),
    "constrained": dict(diff_attention="constrained"),
    "off": dict(diff_attention="off", n_heads=4, n_kv_heads=1),
    "diff_mlp": dict(diff_mlp=True),
    "function": BANK,
    "balanced": BANK | dict(function_balance=0.1, function_anneal_steps=50),
    "own_functions": dict(decoder="function", n_global_functions=0, n_layer_functions=3),
    "memory": dict(decoder="memory", n_global_memories=5, n_layer_memories=3),
    "shared_memory": dict(decoder="memory", n_layer_memories=0),
    "linear_control": dict(decoder="linear-control"),
    "untied": dict(tie_embeddings=False, paper_lambda=True),
    "normalized": dict(normalized=True),
    "normalized_off": dict(normalized=True, diff_attention="off", tie_embeddings=False),
    "normalized_function": BANK | dict(normalized=True, n_heads=4, n_kv_heads=2),
    "normalized_memory": dict(decoder="memory", normalized=True, diff_mlp=True),
    "normalized_linear": dict(decoder="linear-control", normalized=True, diff_attention="constrained"),
}


def close(a, b, tolerance=2e-5):
    assert a.shape == b.shape
    return (a - b).abs().max().item() <= tolerance * max(1.0, b.abs().max().item())


def draw_ids(*shape, seed=1):
    return torch.randint(64, shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def large(tiny):
    """Builds a model whose weights are large enough and whose vectors are uneven enough to show mistakes."""

    def build(**fields):
        model = tiny("neon", **fields)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(3.0) if parameter.dim() > 1 else parameter.mul_(1 + 0.2 * torch.randn_like(parameter))
        model.post_optim_step()
        return model

    return build


@pytest.fixture(params=OPTIONS)
def model(request, large):
    return large(**OPTIONS[request.param])


def load_model(case):
    entry, weights, grads, data = load_case("neon", case)
    noise = {name.removeprefix("gumbel/"): tensor for name, tensor in data.items() if name.startswith("gumbel/")}
    model = models.load_reference("neon", entry["config"], weights, variant=entry["variant"], noise=noise or None)
    return model.train(entry["mode"] == "train"), entry, weights, grads, data


@pytest.mark.parametrize("case", CASES)
def test_equals_original(case):
    model, entry, weights, grads, data = load_model(case)
    assert sum(p.numel() for p in model.parameters()) == entry["param_count"]
    ids = data["input_ids"]
    assert (model(ids) - data["logits"]).abs().max() < 1e-5
    loss, count = LossModule(model)(ids[:, :-1], ids[:, 1:])
    assert abs(loss / count - data["loss"].item()) < 1e-5
    back = models.reference_tensors(model)
    assert back.keys() == weights.keys() and all(torch.equal(back[name], weights[name]) for name in back)
    if grads is not None:
        (loss / count).backward()
        ours = models.reference_tensors(model, grads=True)
        assert ours.keys() == grads.keys()
        for name, grad in grads.items():
            assert (ours[name] - grad).abs().max() <= 1e-5 + 1e-3 * grad.abs().max(), name


@pytest.mark.parametrize("case", [name for name, entry in CASES.items() if entry["variant"] == "sound"])
@torch.no_grad()
def test_cached_decoding_equals_the_fixture(case):
    model, *_, data = load_model(case)
    ids = data["input_ids"]
    cache = model.make_cache(len(ids), ids.shape[1])
    logits = [model(ids[:, :5], cache=cache)]
    logits += [model(ids[:, t : t + 1], cache=cache) for t in range(5, ids.shape[1])]
    assert (torch.cat(logits, dim=1) - data["logits"]).abs().max() < 1e-5


@pytest.mark.parametrize("case", CASES)
def test_arguments_are_read_off_a_checkpoint(case):
    entry, weights, _, _ = load_case("neon", case)
    found = models.infer_reference("neon", weights)
    assert {key: found[key] for key in entry["config"] if key in found} == {
        key: value for key, value in entry["config"].items() if key in found
    }
    tied = weights | {"lm_head.weight": weights["model.embed_tokens.weight"].clone()}
    assert models.load_reference("neon", models.infer_reference("neon", tied), tied).config.tie_embeddings
    loose = weights | {"lm_head.weight": torch.randn_like(tied["lm_head.weight"])}
    model = models.load_reference("neon", models.infer_reference("neon", loose), loose)
    assert torch.equal(model.head.weight, loose["lm_head.weight"])


def test_foreign_checkpoints_are_refused():
    entry, weights, _, _ = load_case("neon", "expressive_sound")
    key = "model.layers.1.self_attn.k_proj.weight"
    for broken in ({"x": weights[key]}, weights | {"model.layers.0.self_attn.lambda_q1": torch.zeros(7)}):
        with pytest.raises(CheckpointError):
            models.infer_reference("neon", broken)
    with pytest.raises(CheckpointError, match="k_proj"):
        models.load_reference("neon", entry["config"], weights | {key: torch.zeros(60, 32)})
    with pytest.raises(CheckpointError, match="layers.0"):
        models.load_reference("neon", entry["config"] | {"diff_mlp": True}, weights)


def test_unknown_keys_of_a_config_are_ignored_with_a_note():
    entry, weights, _, _ = load_case("neon", "expressive_sound")
    config = entry["config"] | {"use_cache": False, "diff_attention_mode": "none", "num_global_functions": 4}
    with pytest.warns(UserWarning, match="use_cache"):
        model = models.load_reference("neon", config, weights)
    assert model.config.diff_attention == "expressive" and model.config.n_global_functions == 0


def test_noise_needs_a_place():
    entry, weights, _, data = load_case("neon", "function_train")
    with pytest.raises(UsageError, match="1/layer"):
        models.load_reference("neon", entry["config"], weights, noise={"0/global": data["gumbel/0/global"]})
    plain, weights, _, _ = load_case("neon", "expressive_sound")
    with pytest.raises(UsageError, match="neon draws no noise"):
        models.load_reference("neon", plain["config"], weights, noise={"0/global": data["gumbel/0/global"]})
    with pytest.raises(UsageError, match="llama draws no noise"):
        models.build("llama", size="nano").set_noise({})


PUBLISHED = [
    ("test", {}, 12_381_952),
    ("spark", {}, 49_887_744),
    ("glow", {}, 166_157_568),
    ("beam", {}, 368_352_256),
    ("test", dict(diff_attention="constrained"), 11_332_608),
    ("spark", dict(diff_attention="constrained"), 41_496_064),
    ("glow", dict(diff_attention="constrained"), 137_843_712),
    ("beam", dict(diff_attention="constrained"), 301_240_320),
    ("test", dict(decoder="function"), 13_701_888),
    ("test", dict(diff_mlp=True), 13_787_520),
    ("test", dict(decoder="function", n_global_functions=64, n_layer_functions=64), 33_485_568),
    ("test", dict(decoder="linear-control"), 12_907_264),
    ("arc", {}, 1_181_698_560),
    ("nova", {}, 2_750_035_968),  # heads that divide the width: the original's cannot run
]


@pytest.mark.parametrize(("size", "fields", "parameters"), PUBLISHED)
def test_published_parameter_counts(size, fields, parameters):
    config = models.make_config("neon", size=size, vocab_size=32_000, **fields)
    assert count_parameters(meta_model("neon", config))["total"] == parameters


@pytest.mark.parametrize("n_kv_heads", [4, 2, 1])
def test_differential_attention_equals_two_maps(n_kv_heads):
    torch.manual_seed(0)
    B, H, G, T, K = 2, 4, n_kv_heads, 9, 8
    q, k, v = torch.randn(B, H, T, 2, K), torch.randn(B, G, T, 2, K), torch.randn(B, G, T, 2 * K)
    y = differential_attention(q, k, v, torch.tensor(0.7), None, 0, scale=0.3)
    future = torch.ones(T, T).triu(1).bool()
    for h in range(H):
        g = h // (H // G)
        maps = [(q[:, h, :, m] @ k[:, g, :, m].mT * 0.3).masked_fill(future, -torch.inf).softmax(-1) for m in (0, 1)]
        assert close(y[:, :, h], (maps[0] - 0.7 * maps[1]) @ v[:, g])


def test_training_keeps_no_scores(tiny):
    model, sizes, T = tiny("neon", n_heads=4, n_kv_heads=2), [], 512
    with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
        model.trunk(draw_ids(1, T))
    assert max(sizes) < T * T


def test_lambda_starts_like_the_original_or_the_paper():
    config = models.make_config("neon")
    starts = config.lambda_init(torch.device("cpu"))
    assert [round(start, 4) for start in starts[:3].tolist()] == [0.3555, 0.4707, 0.5561]
    paper = models.make_config("neon", paper_lambda=True).lambda_init(torch.device("cpu"))
    assert paper[0].item() == pytest.approx(0.2)


def test_lambda_of_a_wide_feed_forward_stays_near_its_start(tiny):
    model = tiny("neon", diff_mlp=True, ffn_dim=8192, n_layers=6)
    start = torch.tensor(0.5)
    values = [m(start) for m in model.modules() if isinstance(m, Lambda)]
    assert len(values) == 12 and all(abs(value - start) < 0.6 for value in values)
    assert all(m.q1.dtype == torch.float32 for m in model.modules() if isinstance(m, Lambda))
    assert all(value.dtype == torch.float32 for value in values)


@torch.no_grad()
def test_cached_decoding_equals_the_full_pass(model):
    model.eval()
    ids, cache = draw_ids(2, 20), model.make_cache(2, 20)
    full = model(ids)
    logits = [model(ids[:, :7], cache=cache), model(ids[:, 7:10], cache=cache)]
    logits += [model(ids[:, t : t + 1], cache=cache) for t in range(10, 20)]
    assert close(torch.cat(logits, dim=1), full)
    cache.truncate(torch.tensor([4, 11])).repeat(2)
    for t in range(3):
        new = torch.stack([ids[row // 2, [4, 11][row // 2] + t] for row in range(4)])[:, None]
        logits = model(new, cache=cache)
        assert all(close(logits[row, 0], full[row // 2, [4, 11][row // 2] + t]) for row in range(4))


def test_decoding_state_has_the_specified_size(tiny):
    for fields, n_kv_heads, head_dim in (({}, 2, 16), (dict(n_heads=4, n_kv_heads=1), 1, 8)):
        cache = tiny("neon", **fields).make_cache(3, 10)
        assert cache.n_bytes == 4 * (4 * n_kv_heads * head_dim * 2) * 3 * 10


def test_every_parameter_receives_gradient(model):
    ids = draw_ids(4, 33)
    loss, count = LossModule(model.train())(ids[:, :-1], ids[:, 1:])
    (loss / count).backward()
    assert [n for n, p in model.named_parameters() if p.grad is None or not p.grad.abs().max() > 0] == []


@pytest.mark.parametrize(
    ("name", "dtype", "training"),
    [
        ("balanced", torch.float32, False),
        ("balanced", torch.bfloat16, True),
        ("grouped", torch.bfloat16, True),
        ("normalized_memory", torch.float32, True),
        ("normalized_function", torch.bfloat16, True),
    ],
)
def test_blocks_are_captured_whole_and_equal_eager(name, dtype, training, large):
    torch._dynamo.reset()
    model = large(**OPTIONS[name], n_layers=1).train(training)
    model.compute_dtype = dtype
    ids = draw_ids(2, 17)

    def run():
        torch.manual_seed(3)
        model.zero_grad()
        loss, count = LossModule(model)(ids[:, :-1], ids[:, 1:])
        if training:
            (loss / count).backward()
        return (loss / count).item(), [p.grad.clone() for p in model.parameters() if training]

    eager_loss, eager = run()
    counts = model.selection_counts()
    for block in model.blocks:
        block.compile(backend="aot_eager", fullgraph=True, dynamic=False)
    loss, compiled = run()
    exact = dtype == torch.float32
    assert loss == pytest.approx(eager_loss, abs=1e-5 if exact else 5e-3)
    assert all(close(a, b, 2e-5 if exact else 2e-2) for a, b in zip(compiled, eager, strict=True))
    assert all(torch.equal(count, model.selection_counts()[kind]) for kind, count in counts.items())


def test_straight_through_equals_masked_outputs_of_all_functions():
    torch.manual_seed(0)
    h, scores = torch.randn(30, 8, requires_grad=True), torch.randn(30, 4, requires_grad=True)
    weights = [torch.randn(8, 8, requires_grad=True) for _ in range(4)]
    p = scores.softmax(-1)
    choice = scores.argmax(-1)
    hard = F.one_hot(choice, 4) - p.detach() + p
    dense = sum(hard[:, j, None] * F.linear(h, weight) for j, weight in enumerate(weights))
    y = StraightThrough.apply(h, scores.softmax(-1), choice, *weights)
    assert close(y, dense)
    dy, inputs = torch.randn_like(y), (h, scores, *weights)
    for ours, wanted in zip(torch.autograd.grad(y, inputs, dy), torch.autograd.grad(dense, inputs, dy), strict=True):
        assert close(ours, wanted)


@torch.no_grad()
def test_evaluation_computes_only_the_chosen_functions():
    torch.manual_seed(0)
    bank, shared, seen = FunctionBank(8, 3, 6, balanced=False).eval(), torch.nn.ModuleList(), {}
    shared.extend(torch.nn.Linear(8, 8, bias=False) for _ in range(3))
    for j, function in enumerate(bank.functions):
        function.register_forward_hook(lambda _, args, y, j=j: seen.update({j: len(args[0])}))
    h = torch.randn(2, 3, 8)
    y = bank(h, shared, None, 1.0)
    assert seen == {j: n for j, n in enumerate(bank.counts["layer"].tolist()) if n}
    assert sum(seen.values()) == 6 and bank.counts["global"].sum() == 6
    first, second = (scores.argmax(-1) for scores in bank.scorer(h))
    for b in range(2):
        for t in range(3):
            wanted = shared[first[b, t]].weight @ h[b, t] + bank.functions[second[b, t]].weight @ h[b, t]
            assert close(y[b, t], wanted)


@torch.no_grad()
def test_choices_are_random_in_training_only(large):
    model, ids = large(**BANK), draw_ids(2, 30)

    def logits(seed):
        torch.manual_seed(seed)
        return model(ids)

    assert torch.equal(logits(1), logits(1)) and not close(logits(1), logits(2))
    model.eval()
    assert torch.equal(logits(1), logits(2))
    original = large(**BANK, variant="original").eval()
    assert not torch.equal(original(ids), original(ids))


@torch.no_grad()
def test_a_low_temperature_chooses_as_evaluation_does(large):
    model, ids = large(**BANK, function_temperature=1e-5), draw_ids(2, 30)
    drawn = model(ids), model.selection_counts()
    assert close(drawn[0], model.eval()(ids))
    assert all(torch.equal(count, drawn[1][name]) for name, count in model.selection_counts().items())
    assert drawn[1].keys() == {"0/global", "0/layer", "1/global", "1/layer"}
    assert [len(count) for count in drawn[1].values()] == [3, 2, 3, 2]


def test_annealing_follows_the_steps_and_survives_saving(tiny, tmp_path):
    model = tiny("neon", **BANK, function_anneal_steps=4, function_min_temperature=0.01)
    found = []
    for _ in range(6):
        found.append(float(model.noise.temperature()))
        model.post_optim_step()
    assert found == pytest.approx([1.0, 10**-0.5, 0.1, 10**-1.5, 0.01, 0.01])
    state = read_tensors(tmp_path / "x", write_tensors(tmp_path / "x", model.state_without_ties()))
    loaded = meta_model("neon", model.config)
    load_weights(loaded, state, tmp_path, torch.device("cpu"))
    assert loaded.noise.steps == 6


def test_balance_loss_is_added_to_training(tiny):
    model, ids = tiny("neon", **BANK, function_balance=0.5), draw_ids(4, 33)
    sizes = {f"{layer}/{kind}": n for layer in "01" for kind, n in model.bank_sizes().items()}
    model.set_noise({name: torch.zeros(4, 33, n) for name, n in sizes.items()})
    loss, count = LossModule(model)(ids[:, :-1], ids[:, 1:])
    expected = []
    for block in model.blocks:
        bank, seen = block.bank, []
        hook = block.bank_norm.register_forward_hook(lambda _, args, y, seen=seen: seen.append(y))
        model(ids[:, :-1])
        hook.remove()
        for scores in bank.scorer(seen[0]):
            n = scores.shape[-1]
            shares = F.one_hot(scores.argmax(-1), n).float().mean((0, 1))
            expected.append(n * (shares * scores.softmax(-1).mean((0, 1))).sum())
    aux = model.aux_loss()
    assert close(aux, 0.5 * torch.stack(expected).mean())
    plain = F.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten(), reduction="sum")
    assert (loss - plain).item() == pytest.approx(aux.item() * int(count), rel=1e-3)
    aux.backward()
    assert all(block.bank.scorer.weight.grad.abs().max() > 0 for block in model.blocks)
    model.eval()(ids)
    assert model.aux_loss() is None and tiny("neon", **BANK).aux_loss() is None


@pytest.mark.parametrize("name", [name for name in OPTIONS if name.startswith("normalized")])
def test_normalized_weights_and_stream_have_length_one(name, tiny):
    model, ids = tiny("neon", **OPTIONS[name]), draw_ids(4, 33)
    lengths = []

    def measure(_, args, y):
        lengths.extend([args[0].norm(dim=-1), y.norm(dim=-1)])

    for block in model.blocks:
        block.register_forward_hook(measure)
    optimizer, step, losses = torch.optim.AdamW(model.parameters(), lr=1e-2), LossModule(model), []
    for _ in range(20):
        loss, count = step(ids[:, :-1], ids[:, 1:])
        losses.append((loss / count).item())
        optimizer.zero_grad()
        (loss / count).backward()
        optimizer.step()
        model.post_optim_step()
    assert losses[0] == pytest.approx(math.log(64), rel=0.02) and losses[-1] < losses[0] - 0.5
    assert all(close(length, torch.ones_like(length)) for length in lengths)
    D = model.config.dim
    for key, matrix in model.named_parameters():
        if matrix.dim() == 2:
            writes = any(part in f".{key}" for part in (".out.", ".down.", ".functions.", ".bank.0.", ".bank.1."))
            axis = 0 if writes else 1
            assert matrix.shape[axis] == D, key
            assert close(matrix.norm(dim=axis), torch.ones(matrix.shape[1 - axis])), key


@pytest.mark.parametrize(
    "bad",
    [
        dict(diff_attention="none"),
        dict(decoder="flaming"),
        dict(n_kv_heads=3),
        dict(ffn_dim=0),
        dict(n_global_functions=2),
        dict(n_layer_memories=2, decoder="function"),
        dict(norm_eps=0.0),
        dict(n_layer_functions=-1, decoder="function"),
        dict(function_temperature=0.0),
        dict(function_balance=-1.0),
        dict(function_anneal_steps=0),
        dict(rope_theta=0.0),
        dict(n_heads=20, dim=1536),
    ],
    ids=str,
)
def test_options_that_do_not_fit_are_refused(bad):
    with pytest.raises(UsageError, match=next(iter(bad)).replace("_", "-")):
        models.make_config("neon", **bad)


def test_shapes_that_do_not_fit_are_refused():
    with pytest.raises(UsageError, match="--diff-attention constrained"):
        models.make_config("neon", diff_attention="constrained", dim=40, n_heads=4)
    with pytest.raises(UsageError, match="needs functions"):
        models.make_config("neon", decoder="function", n_global_functions=0, n_layer_functions=0)
