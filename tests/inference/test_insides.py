"""Insides: maps that are those of the forward pass, and what each architecture adds to them."""

import pytest
import torch
from torch import nn

from nnx_cli import models
from nnx_cli.data.tokenizers.byte import ByteTokenizer
from nnx_cli.inference.insides import look_inside, spelled_out
from nnx_cli.layers.insides import AttentionRecorder, each_query_head, watched
from nnx_cli.layers.lora import add_adapters
from nnx_cli.models.insides.tape import segment_weights

CASES = [
    ("llama", {}),
    ("nyx", {}),
    ("nyx", {"qk_norm": True, "head_dim": 8}),
    ("ngpt", {}),
    ("ngpt", {"normalize_on_use": True}),
    ("n4", {}),
    ("n4", {"window": 5, "n_kv_heads": 1, "bias": True}),
    ("n4", {"window": 5, "n_kv_heads": 1, "bias": True, "kv_latent_dim": 12}),
    ("neon", {}),
    ("neon", {"n_kv_heads": 1, "variant": "original", "decoder": "function"}),
    ("neon", {"diff_attention": "off", "decoder": "memory", "normalized": True}),
    ("tape", {}),
    ("tape", {"variant": "sound"}),
    ("tape", {"variant": "original"}),
    ("tape", {"n_critics": 0}),
]
IDS = [5, 9, 2, 2, 60, 17, 33, 5, 9, 1, 0, 44, 8]


@pytest.fixture(params=CASES, ids=lambda case: "-".join([case[0], *map(str, case[1].values())]))
def model(request, tiny):
    name, fields = request.param
    model = tiny(name, **fields)
    for parameter in model.parameters():  # attention that is not nearly even
        if parameter.dim() == 2 and name != "ngpt":
            parameter.data.mul_(3)
    if fields.get("decoder") == "function":  # the original draws noise in evaluation, too
        sizes = model.bank_sizes().items()
        model.set_noise({f"{layer}/{kind}": torch.randn(1, 13, n) for layer in range(2) for kind, n in sizes})
    return model.eval()


def panel(found, title):
    (only,) = [each for each in found.panels if each.title == title]
    return only


def inputs_of(modules, model, ids):
    """The first two inputs of every pass of these modules."""
    with torch.no_grad(), watched(modules, lambda inputs, _: inputs[:2]) as kept:
        model(torch.tensor([ids]))
    return kept


def test_maps_times_values_are_what_attention_read(model):
    """Attention as the output projection of every layer gets it, from values and the map alone."""
    if model.architecture == "tape":
        pytest.skip("it has values for every segment: the next test")
    found = look_inside(model, IDS)
    layers = [getattr(block, "attention", block) for block in model.blocks]
    ends = [layer.norm if hasattr(layer, "lambda_") and layer.lambda_ is not None else None for layer in layers]
    ends = [end or getattr(layer, "attn_out", None) or layer.out for end, layer in zip(ends, layers, strict=True)]
    read = inputs_of(ends, model, IDS)
    with torch.no_grad(), AttentionRecorder(model.blocks) as recorder:
        model(torch.tensor([IDS]))
    if model.architecture == "n4":  # in a window, calls see pieces of them
        given = inputs_of(layers, model, IDS)
        packed = [
            layer.rise(layer.qcg(x)[1])[1] if hasattr(layer, "rise") else layer.qkvg(x)[2]
            for layer, (x, *_) in zip(layers, given, strict=True)
        ]
        values = [v.unflatten(-1, (-1, model.blocks[0].attention.head_dim)).transpose(1, 2) for v in packed]
    else:
        values = [calls[0].v for calls in recorder.passes]
    assert len(found.attention) == len(found.layers) == len(values) == len(model.blocks)
    for weights, (y, *_), v in zip(found.attention, read, values, strict=True):
        each = each_query_head(v, len(weights))[0]
        torch.testing.assert_close(torch.einsum("hts,hsk->thk", weights, each).flatten(1), y[0].flatten(1))


@pytest.mark.parametrize("variant", ["tape", "sound", "original"])
def test_tapes_maps_are_those_of_all_segments(tiny, variant):
    model = tiny("tape", variant=variant, n_critics=3).eval()
    n_heads, levels = 2 * model.config.n_heads, list(model.blocks)
    found = look_inside(model, IDS)
    attended = inputs_of([level.left for level in levels], model, IDS)
    outputs = {}
    for kind in ("q", "kv"):
        with torch.no_grad(), watched([getattr(level, kind) for level in levels], lambda _, y: y) as outputs[kind]:
            model(torch.tensor([IDS]))
    assert len(found.attention) == len(levels)
    for whole, q, kv, (_, left) in zip(found.attention, outputs["q"], outputs["kv"], attended, strict=True):
        weights = segment_weights(q, kv, n_heads, variant != "original")  # (2 H, T, T, G)
        values = kv.unflatten(-1, (2, n_heads, -1))[:, 0, :, 1]  # (G, T, 2 H, K)
        read = torch.einsum("htsg,gshk->thk", weights, values)
        torch.testing.assert_close(read.flatten(1)[:, : model.config.dim], left[0])
        torch.testing.assert_close(weights.sum(-1), whole)


def test_rows_sum_to_one_and_no_map_sees_the_future(model):
    differences = model.architecture == "neon" and model.config.n_maps == 2
    lambdas = (
        panel(look_inside(model, IDS), "Lambda").values[:, 1] if differences else torch.zeros(len(model.blocks) * 9)
    )
    for weights, subtracted in zip(look_inside(model, IDS).attention, lambdas, strict=False):
        assert weights.shape[1:] == (len(IDS), len(IDS)) and weights.dtype == torch.float32
        torch.testing.assert_close(weights.sum(-1), (1 - subtracted).expand(weights.shape[:2]))
        if model.config.variant != "original" or model.architecture != "tape":
            assert weights.triu(1).abs().max() == 0


def test_a_window_is_seen_in_the_maps(tiny):
    for weights in look_inside(tiny("n4", window=5), IDS).attention:
        assert (weights.tril(-5) == 0).all() and (weights.diagonal(-4, -2, -1) > 0).all()


def test_a_model_is_left_as_it_was(model):
    ids = torch.tensor([IDS])
    model.train()
    before = model.eval()(ids).detach()
    model.train()
    look_inside(model, IDS)
    assert model.training and torch.equal(model.eval()(ids), before)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("name", models.names())
def test_one_token_is_enough(tiny, name):
    found = look_inside(tiny(name), IDS[:1])
    for weights in found.attention:
        assert weights.shape[1:] == (1, 1)
    assert all(each.values.shape == (len(each.rows), len(each.columns or [0])) for each in found.panels)


@pytest.mark.parametrize("name", models.names())
def test_adapters_are_seen(tiny, name):
    model = tiny(name, dim=64)
    plain = look_inside(model, IDS)
    add_adapters(model, 2)
    for name_of, parameter in model.named_parameters():
        if name_of.endswith("lora_b"):
            parameter.data.normal_()
    adapted = look_inside(model, IDS)
    assert any((a - b).abs().max() > 1e-3 for a, b in zip(plain.attention, adapted.attention, strict=True))


def test_nothing_is_drawn_from_the_random_numbers_of_others(tiny):
    model = tiny("neon", decoder="function", variant="original")
    torch.manual_seed(7)
    look_inside(model, IDS)
    drawn = torch.rand(3)
    torch.manual_seed(7)
    assert torch.equal(torch.rand(3), drawn)


def test_a_bank_shows_the_functions_it_chose(tiny):
    for variant in ("sound", "original"):
        model = tiny("neon", decoder="function", n_global_functions=3, n_layer_functions=2, variant=variant).eval()
        chosen = panel(look_inside(model, IDS), "Functions chosen")
        counts = [counts for layer in range(2) for _, counts in sorted(model.banks())[layer][1].counts.items()]
        assert chosen.rows == ["layer 1, shared", "layer 1, own", "layer 2, shared", "layer 2, own"]
        for row, expected in zip(chosen.values, counts, strict=True):
            assert torch.equal(row.bincount(minlength=len(expected) + 1)[1:], expected)


def test_memories_are_those_that_are_read(tiny):
    model = tiny("neon", decoder="memory", n_global_memories=6, n_layer_memories=4)
    model.blocks[1].bank.query.weight.data[6 + 2] *= 0
    found = look_inside(model, IDS)
    assert torch.equal(panel(found, "Memories, shared").values, model.memories.detach())
    assert torch.equal(panel(found, "Memories, layer 2").values, model.blocks[1].bank.slots.detach())
    shares, slots = panel(found, "Memory read"), panel(found, "Slot read most")
    assert (shares.values >= torch.tensor([[1 / 6], [1 / 4]] * 2)).all() and (shares.values <= 1).all()
    assert slots.values[0::2].max() <= 6 and slots.values[1::2].max() <= 4 and slots.values.min() >= 1


def test_gates_of_n4_follow_their_weights(tiny):
    model = tiny("n4", n_kv_heads=1)
    model.blocks[0].attention.qkvg.weight.data[-1] = 0  # a gate that is shut
    gates = panel(look_inside(model, IDS), "Copying gate")
    assert gates.rows == ["layer 1, key head 1", "layer 2, key head 1"]
    assert (gates.values[0] == 0).all() and gates.values[1].abs().min() > 0 and gates.values.abs().max() <= 1
    average = panel(look_inside(model, IDS), "Average key of the last token").values[1]
    expected = [gate * (at + 1) / len(IDS) ** 2 for at, gate in enumerate(gates.values[1].tolist())]
    assert average.tolist() == pytest.approx(expected)


def test_decay_of_nyx_lies_between_those_of_its_pairs(tiny):
    found = panel(look_inside(tiny("nyx", xpos_scale_base=8.0), IDS), "xPos decay")
    distances = torch.tensor([float(column) for column in found.columns])
    slowest, fastest = ((2 * j + 0.4 * 16) / (1.4 * 16) for j in (7, 0))
    assert found.columns == ["0", "1", "2", "4", "8", "16", "31"] and torch.allclose(found.values[:, 0], torch.ones(4))
    assert (found.values <= slowest ** (distances / 8) + 1e-6).all()
    assert (found.values >= fastest ** (distances / 8) - 1e-6).all() and (found.values.diff(dim=-1) < 0).all()
    assert [each.title for each in look_inside(tiny("nyx", xpos=False), IDS).panels] == ["Heads"]


def test_a_step_of_ngpt_is_what_it_began_with(tiny):
    found = look_inside(tiny("ngpt", alpha_attn_init=0.25), IDS)
    steps, norms = panel(found, "Steps").values, panel(found, "Norms and scales").values
    assert steps[:, 0].tolist() == pytest.approx([0.25] * 2) and steps[:, 1].tolist() == pytest.approx([0.5] * 2)
    assert (steps[:, 2] > 1).all() and (steps[:, 2] < 90).all()
    assert norms[:, :4].flatten().tolist() == pytest.approx([1.0] * 8, abs=1e-5)
    assert norms[:, 4:].flatten().tolist() == pytest.approx([1.0] * 6)


def test_a_silent_prophet_contributes_nothing(tiny):
    model = tiny("tape", n_critics=3)
    found = panel(look_inside(model, IDS), "Contribution to the prediction")
    assert found.rows == ["prophet", "critic 1", "critic 2", "moderator"]
    assert (found.values[1:] > 0).all() and (found.values <= 1).all()
    for affine in (model.prophet.out.linear.weight, model.prophet.out.bias):
        affine.data.zero_()
    found = panel(look_inside(model, IDS), "Contribution to the prediction").values
    assert found[0].max() == 0 and found[3].min() > 0


@torch.no_grad()
def test_what_each_part_of_tape_predicts_is_told(tiny):
    title, ids = "What is, what could be, what can be", torch.tensor([IDS])
    model = tiny("tape", n_critics=3, vocab_size=128)
    found = panel(look_inside(model, IDS), title)
    assert found.rows == ["coda", "critic 1", "critic 2", "moderator"] and model.eval()
    likelihood, best = model(ids)[0].max(-1)
    assert found.tokens[-1] == best.tolist() and found.values[-1].tolist() == pytest.approx(likelihood.exp().tolist())
    coda = tiny("tape", n_critics=0, vocab_size=128).eval()
    coda.load_state_dict(model.state_dict(), strict=False)
    assert found.tokens[0] == coda(ids)[0].argmax(-1).tolist() != found.tokens[-1]
    assert panel(look_inside(coda, IDS), title).rows == ["coda"]
    model = tiny("tape", moderator=False).eval()
    found = panel(look_inside(model, IDS), title)
    assert found.rows == ["coda", "critic 1", "critic 2", "their mean"]
    assert found.tokens[-1] == model(ids)[0].argmax(-1).tolist()
    spelled = panel(spelled_out(look_inside(model, IDS), ByteTokenizer()), title)
    assert spelled.tokens[-1] == [repr(chr(token)) for token in found.tokens[-1]]


def test_heads_are_described(tiny):
    model = tiny("llama")
    for block in model.blocks:
        block.attention.qkv.weight.data.zero_()  # attention is even
    heads = panel(look_inside(model, IDS), "Heads")
    even = sum(1 / n for n in range(2, 14)) / 12
    assert heads.rows[-1] == "layer 2, head 2" and len(heads.rows) == 4
    assert heads.values[0].tolist() == pytest.approx([even, even, even, sum((n - 1) / 2 for n in range(2, 14)) / 12])


def test_a_model_without_attention_shows_none(tiny):
    model = tiny("llama")
    for block in model.blocks:
        block.attention = Still()
    assert look_inside(model, IDS).attention == [] and look_inside(model, IDS).panels == ()


class Still(nn.Module):
    """No attention."""

    def forward(self, x, tables, cache):
        return x
