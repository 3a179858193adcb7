"""Tape against numbers recorded from the original code, and what is its own."""

import math

import pytest
import torch

from nnx_cli import models
from nnx_cli.errors import CheckpointError, UsageError
from nnx_cli.kernels import soft_xor as soft_xor_module
from nnx_cli.kernels.soft_xor import Activation, Recurrence, activation_and_slope, soft_xor
from nnx_cli.layers import segment_attention as segments
from nnx_cli.layers.loss import LossModule, head_loss
from nnx_cli.models import tape
from nnx_cli.planning.flops import count_parameters, flops_per_token, meta_model

from .reference_cases import load_case


def load(case):
    entry, weights, grads, data = load_case("tape", case)
    return models.load_reference("tape", entry["config"], weights, variant=case), entry, weights, grads, data


@pytest.mark.parametrize("case", ["seed", "sound", "tape"])
def test_equals_original(case):
    model, entry, weights, grads, data = load(case)
    assert (model(data["input_ids"]) - data["logits"]).abs().max() < 1e-5
    loss, count = LossModule(model)(data["input_ids"], data["target_ids"])
    assert abs(loss / count - data["loss"].item()) < 1e-5
    (loss / count).backward()
    ours = models.reference_tensors(model, grads=True)
    assert ours.keys() == grads.keys()
    for name, grad in grads.items():
        assert (ours[name] - grad).abs().max() <= 1e-5 + 1e-3 * grad.abs().max(), name
    unused = sum(weights[name].numel() for name in models.original("tape").Tensors(model).unused)
    assert sum(p.numel() for p in model.parameters()) + unused == entry["param_count"]
    assert models.original("tape").Tensors(model).unused == {*entry["grads_none"], *entry["grads_all_zero"]}


@pytest.mark.parametrize("case", ["seed", "sound", "tape"])
def test_weights_return_under_the_names_of_the_original(case):
    model, _, weights, _, _ = load(case)
    back = models.reference_tensors(model)
    assert back.keys() == weights.keys() - models.original("tape").Tensors(model).unused
    assert all(torch.equal(back[name], weights[name]) for name in back)


@torch.no_grad()
@pytest.mark.parametrize("case", ["sound", "tape"])
@pytest.mark.parametrize("prefill", [1, 5, 16])
def test_cached_decoding_equals_the_fixture(case, prefill):
    model, _, _, _, data = load(case)
    ids = data["input_ids"]
    cache = model.make_cache(len(ids), ids.shape[1])
    logits = [model(ids[:, :prefill], cache=cache)]
    logits += [model(ids[:, t : t + 1], cache=cache) for t in range(prefill, ids.shape[1])]
    assert (torch.cat(logits, dim=1) - data["logits"]).abs().max() < 1e-5


def test_shapes_tell_the_original_s_arguments():
    _, entry, weights, _, _ = load("tape")
    found = models.infer_reference("tape", weights)
    assert found == {**entry["config"], "seq_len": 128}  # the length of the context leaves no trace
    for foreign in ({}, {"holistic_embed.weight": torch.zeros(3, 4)}):
        with pytest.raises(CheckpointError, match="no checkpoint of tape"):
            models.infer_reference("tape", foreign)


def test_published_parameter_counts():
    def total(**fields):
        return count_parameters(meta_model("tape", models.make_config("tape", vocab_size=65, **fields)))["total"]

    assert total(dim=256, n_critics=4) == 49_337_088
    assert total(dim=256, n_critics=4, variant="sound") == 15_811_072
    assert total(dim=128, n_critics=2) == 7_104_896
    assert total(dim=128, n_critics=2, variant="sound") == 3_973_376


def test_products_are_counted_as_they_are_run():
    config = models.make_config("tape", vocab_size=256, dim=128, n_critics=2, seq_len=64)
    D, T, levels = 128, 64, 10
    blocks = 2 * levels * (48 * D**2 + 3 * 2 * D * T)  # three keys a position
    saved = 2 * (8 * D**2 + 2 * 2 * D * T)  # the first level has one segment
    saved += 2 * (levels - 3) * (4 * D**2 + 2 * D * T)  # what occurs twice is projected and attended to once
    expected = blocks - saved + 60 * D**2 + 2 * 256 * D
    assert flops_per_token(meta_model("tape", config))["forward"] == pytest.approx(expected, rel=1e-3)


# the three parts of the input


@torch.no_grad()
def test_critics_and_prophet_take_part(tiny):
    model, ids = tiny("tape", n_layers=2, n_critics=3).eval(), torch.arange(12)[None]
    before = model(ids)
    parts = [*model.prophet.parameters(), *model.blocks[2].parameters(), *model.blocks[4].parameters()]
    for parameter in parts:
        kept = parameter.clone()
        parameter.normal_()
        assert not torch.allclose(model(ids), before, atol=1e-4)
        parameter.copy_(kept)


def plain_attention(q, kv, times):
    """Attention of q (B, T, H, K) over all segments, one after the other, under a tiled mask; with its weights."""
    T, K = q.shape[1], q.shape[-1]
    keys, values = torch.cat([x for x, n in zip(kv, times, strict=True) for _ in range(n)], dim=1).unbind(2)
    scores = torch.einsum("bthk,bshk->bhts", q, keys) * K**-0.5
    later = torch.ones(T, T, dtype=torch.bool).triu(1).repeat(1, sum(times))
    weights = scores.masked_fill(later, -torch.inf).softmax(-1)
    return torch.einsum("bhts,bshk->bthk", weights, values), weights


@pytest.mark.parametrize("merged", [True, False])
@pytest.mark.parametrize("times", [(1, 1, 1), (2, 1), (1,)])
def test_attention_over_segments_is_that_under_a_tiled_mask(times, merged, monkeypatch):
    torch.manual_seed(0)
    if not merged:
        monkeypatch.setattr(segments, "has_lse_kernel", lambda q: False)
    q, kv = torch.randn(2, 37, 3, 8).double(), torch.randn(len(times), 2, 37, 2, 3, 8).double()
    leaves, factor = [q.requires_grad_(), kv.requires_grad_()], torch.randn(2, 37, 3, 8)
    y = segments.attend(q, kv, times, None, 0, causal=True, dropout=0.0)
    wanted, weights = plain_attention(q, kv, times)
    torch.testing.assert_close(y, wanted)
    found = torch.autograd.grad((y * factor).sum(), leaves)
    torch.testing.assert_close(found, torch.autograd.grad((wanted * factor).sum(), leaves, retain_graph=True))
    entropy = torch.special.entr(weights).sum(-1).mean()
    torch.testing.assert_close(segments.attention_entropy(q, kv, times, causal=True), entropy.float())


@pytest.mark.parametrize("fields", [{}, {"variant": "sound"}, {"entropy_weight": 1.0}], ids=str)
def test_nothing_kept_is_quadratic_in_the_length(tiny, fields):
    def largest(T):
        sizes, ids = [], torch.zeros(1, T, dtype=torch.int64)
        with torch.autograd.graph.saved_tensors_hooks(lambda x: sizes.append(x.numel()) or x, lambda x: x):
            LossModule(tiny("tape", **fields).train())(ids, ids)
        return max(sizes)

    assert largest(512) <= 2 * largest(256)


def test_entropy_is_rewarded_on_request(tiny, monkeypatch):
    ids = torch.arange(24).view(2, 12)
    plain = tiny("tape").train()
    plain(ids)
    assert plain.aux_loss() is None
    model = tiny("tape", n_layers=2, entropy_weight=0.5).train()
    losses, gradients = [], []
    for rows in (128, 5):  # in one piece, and in pieces
        monkeypatch.setattr(segments, "ENTROPY_ROWS", rows)
        model.zero_grad()
        model(ids)
        loss = model.aux_loss()
        loss.backward()
        losses.append(loss.item())
        gradients.append(model.blocks[1].q.linear.weight.grad.clone())
    uniform = sum(math.log(n * t) for t in range(1, 13) for n in (1, *[3] * 5)) / 12 / 6
    assert -0.5 * uniform < losses[0] < -0.4 * uniform  # near that of equal weights when fresh, and never above it
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    torch.testing.assert_close(*gradients)
    with torch.no_grad():
        model.eval()(ids)
    assert model.aux_loss() is None, "not while evaluating"


def test_tailedness_is_an_option(tiny):
    ids = torch.arange(12)[None]
    logits = [tiny("tape", student_df=df).eval()(ids) for df in (1.0, 2.718281828459, 100.0)]
    for log_probabilities in logits:
        torch.testing.assert_close(log_probabilities.logsumexp(-1), torch.zeros(1, 12), atol=1e-5, rtol=0)
    assert not torch.allclose(logits[0], logits[1]) and not torch.allclose(logits[1], logits[2])


@torch.no_grad()
def test_the_normal_kernel_is_the_limit_of_the_others(tiny):
    ids, loss = torch.arange(24).view(2, 12), {}
    for fields in ({"tails": "normal"}, {"student_df": 1e9}, {"student_df": 3.0}):
        model = tiny("tape", **fields).double().eval()
        loss[str(fields)] = LossModule(model)(ids, ids)[0].item()
    normal, near, far = loss.values()
    assert normal == pytest.approx(near, rel=1e-6) and normal != pytest.approx(far, rel=1e-3)


def test_degrees_of_freedom_are_learned(tiny):
    ids = torch.arange(24).view(2, 12)
    learned, fixed = (tiny("tape", student_df=3.0, tails=tails).double() for tails in ("learned", "fixed"))
    assert learned.head.log_df.exp().item() == pytest.approx(3.0)
    losses = [LossModule(model)(ids, ids)[0] for model in (learned, fixed)]
    torch.testing.assert_close(*losses)
    head = tape.StudentT(tape.Config(dim=4, vocab_size=5, n_heads=1, tails="learned")).double()
    torch.nn.init.ones_(head.log_df), torch.nn.init.normal_(head.weight)
    x, targets = torch.randn(3, 4, dtype=torch.float64, requires_grad=True), torch.arange(3)
    parameters = (head.weight, head.log_df)
    assert torch.autograd.gradcheck(lambda x, *_: head_loss(head, x, targets, -100), (x, *parameters))


@torch.no_grad()
def test_without_a_moderator_critics_hear_the_coda_alone(tiny):
    ids = torch.arange(12)[None]
    models_of = {n: tiny("tape", n_layers=2, n_critics=n, moderator=False).eval() for n in (1, 2)}
    whole, said = models_of[2], []
    for first in (2, 4):  # levels of the coda stand before those of two critics
        alone = models_of[1]
        alone.load_state_dict(whole.state_dict(), strict=False)
        for number in (0, 1):
            alone.blocks[2 + number].load_state_dict(whole.blocks[first + number].state_dict())
        said.append(alone.trunk(ids))
    torch.testing.assert_close(whole.trunk(ids), sum(said) / 2)
    heard = tiny("tape", n_layers=2, n_critics=2).eval()
    heard.load_state_dict(whole.state_dict())
    assert not torch.allclose(heard.trunk(ids), whole.trunk(ids), atol=1e-3)


@pytest.mark.parametrize(
    "fields",
    [{"n_critics": 0, "tails": "normal"}, {"n_critics": 1, "prophet": False}, {"moderator": False, "tails": "learned"}],
    ids=str,
)
def test_without_some_parts_it_promises_as_much(tiny, fields):
    model, ids = tiny("tape", **fields), torch.arange(40).view(2, 20)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2.0 if parameter.dim() > 1 else 1.0)
    loss, _ = LossModule(model)(ids[:, :-1], ids[:, 1:])
    loss.backward()
    assert all(parameter.grad.abs().max() > 0 for parameter in model.parameters())
    with torch.no_grad():
        logits, changed = model.eval()(ids), ids.clone()
        changed[:, 12:] += 1
        assert torch.equal(model(changed)[:, :12], logits[:, :12])
        cache = model.make_cache(2, 20)
        steps = [model(ids[:, :7], cache=cache)] + [model(ids[:, i : i + 1], cache=cache) for i in range(7, 20)]
        torch.testing.assert_close(torch.cat(steps, dim=1), logits, rtol=1e-4, atol=1e-4)


def test_a_run_without_some_parts_goes_the_whole_way(nnx, text_file):
    small = "--dim 32 --n-layers 1 --n-heads 2 --seq-len 32 --batch-size 2 --grad-accum 1 --threads 1".split()
    given = ["--model", "tape", "--no-prophet", "--no-moderator", "--tails", "learned", *small]
    text = ["--filepath", text_file, "--tokenizer", "byte", "--max-steps", 2]
    for words in (
        ("train", *text, *given, "--out", "weights/whole"),
        ("train", "--resume", "whole", "--max-steps", 3),
        ("train", *text, "--init-from", "whole", "--lora-rank", 2, "--out", "weights/adapter"),
        ("merge", "adapter", "--out", "weights/merged"),
        ("quantize", "merged", "--bits", 8, "--max-drop", 9, "--out", "weights/eight"),
        ("sample", "eight", "--prompt", "the", "--max-new-tokens", 3),
    ):
        result = nnx(*words)
        assert result.exit_code == 0, result.output
    refused = nnx("train", *text, *given, "--n-critics", 1)
    assert refused.exit_code == 2 and "--moderator does nothing without --n-critics 2 or more" in refused.stderr


@torch.no_grad()
def test_what_is_left_out_is_not_there(tiny):
    whole, ids = tiny("tape").eval(), torch.arange(12)[None]
    coda = tiny("tape", n_critics=0).eval()
    assert coda.prophet is None and len(coda.blocks) == 2
    coda.load_state_dict(whole.state_dict(), strict=False)
    found = []
    whole.blocks[1].register_forward_hook(lambda _, inputs, output: found.append(output[0]))
    whole(ids)
    torch.testing.assert_close(coda.trunk(ids), found[0])
    assert tiny("tape", prophet=False).prophet is None


def test_head_stays_in_float32(tiny):
    model = tiny("tape", dim=256, n_heads=4).eval()
    x = model.trunk(torch.arange(12)[None])
    exact, rounded = model.double().head(x.double()), model.float().head(x.bfloat16())
    assert rounded.dtype == torch.float32
    x = x.bfloat16()
    assert (model.head(x) - model.double().head(x.double())).abs().max() < 1e-3
    assert (rounded - exact).abs().max() < 0.5


@pytest.mark.parametrize("variant", ["tape", "sound", "original"])
def test_a_head_may_be_of_odd_width(tiny, variant):
    model, ids = tiny("tape", dim=30, n_heads=2, variant=variant).train(), torch.arange(12)[None] % 7
    loss, n_targets = LossModule(model)(ids, ids)
    loss.backward()
    assert n_targets == 12 and all(p.grad.isfinite().all() for p in model.parameters())
    model.eval()
    with torch.no_grad():
        cache = model.make_cache(1, 12)
        steps = [model(ids[:, :5], cache=cache)] + [model(ids[:, i : i + 1], cache=cache) for i in range(5, 12)]
        if variant != "original":  # it sees later tokens without a cache
            torch.testing.assert_close(torch.cat(steps, dim=1), model(ids), rtol=1e-4, atol=1e-4)
    with pytest.raises(UsageError, match="--dim"):
        models.make_config("tape", dim=15, n_heads=1)


@torch.no_grad()
def test_cache_counts_what_it_holds(tiny):
    model = tiny("tape", n_layers=2, n_critics=2, seq_len=16)
    cache = model.make_cache(3, 16)
    D, levels = 32, 6
    assert cache.n_bytes == 4 * 3 * 16 * (4 * D + 12 * D * (levels - 1) + 4 * D)
    assert tiny("tape", n_layers=2, variant="sound").make_cache(3, 16).n_bytes == 4 * 3 * 16 * 4 * D * 4


@pytest.mark.parametrize(
    "fields",
    [
        {"student_df": 0.0},
        {"tails": "heavy"},
        {"entropy_weight": -1.0},
        {"ffn_dim": -1},
        {"n_critics": -1},
        {"n_critics": 1000, "n_layers": 1000},
    ],
    ids=str,
)
def test_bad_values_are_refused(fields):
    with pytest.raises(UsageError, match=next(iter(fields)).replace("_", "-")):
        models.make_config("tape", **fields)


# the activation and the recurrence


def plain_activation(x):
    """As the original writes it."""
    s = 2 * torch.tanh(x / 2)
    log = torch.sign(s) * torch.log(1 + s.abs())
    return 2 * torch.atanh(log / torch.sqrt(1 + 24 * log**2) / 2)


def test_activation_and_its_slope():
    x = torch.linspace(-30, 30, 2002, dtype=torch.float64, requires_grad=True)
    once, twice = plain_activation(x), plain_activation(plain_activation(x))
    torch.testing.assert_close(activation_and_slope(x)[0], once)
    torch.testing.assert_close(activation_and_slope(x, repeats=2)[0], twice)
    (wanted,) = torch.autograd.grad(once.sum(), x, retain_graph=True)
    torch.testing.assert_close(activation_and_slope(x.detach())[1], wanted)
    (found,) = torch.autograd.grad(Activation.apply(x).sum(), x)
    torch.testing.assert_close(found, wanted)
    (wanted,) = torch.autograd.grad(twice.sum(), x)
    torch.testing.assert_close(activation_and_slope(x.detach(), repeats=2)[1], wanted)
    assert once.abs().max().item() == pytest.approx(0.2014, abs=1e-4)
    (at_zero, at_half) = activation_and_slope(torch.tensor([0.0, 0.5]))[1].tolist()
    assert at_zero == 1 and at_half == pytest.approx(0.06, abs=0.005)
    tiny = torch.tensor([1e-6, -3e-4])
    found, wanted = activation_and_slope(tiny)[0], activation_and_slope(tiny.double())[0]
    torch.testing.assert_close(found, wanted.float(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("compiling", [False, True])
def test_activation_of_many_numbers_in_pieces(compiling, monkeypatch):
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: compiling)
    monkeypatch.setattr(soft_xor_module, "CACHED", 1000)
    x = torch.randn(45, 100, dtype=torch.float64).t().requires_grad_()
    (wanted,) = torch.autograd.grad(plain_activation(x).square().sum(), x)
    y = Activation.apply(x)
    torch.testing.assert_close(y, plain_activation(x))
    torch.testing.assert_close(torch.autograd.grad(y.square().sum(), x), (wanted,))


def test_recurrence_equals_steps_written_out():
    torch.manual_seed(0)
    inputs, weight, state = torch.randn(6, 2, 8), torch.randn(8, 4), torch.rand(2, 4)
    leaves = [x.double().requires_grad_() for x in (inputs, weight, state)]
    states, s = [], leaves[2]
    for x in leaves[0]:
        s = soft_xor(*plain_activation(plain_activation(x + s @ leaves[1].t())).chunk(2, dim=-1))
        states.append(s)
    factor = torch.randn(6, 2, 4, dtype=torch.float64)
    wanted = torch.autograd.grad((torch.stack(states) * factor).sum(), leaves)
    found = Recurrence.apply(*leaves)
    torch.testing.assert_close(found, torch.stack(states))
    for a, b in zip(torch.autograd.grad((found * factor).sum(), leaves), wanted, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_levels_are_captured_whole(tiny, dtype):
    """By the part of the compiler that captures; what the rest makes of tape, the zoo's tests see."""
    torch._dynamo.reset()
    model = tiny("tape", n_layers=2, n_critics=1, entropy_weight=0.1).train()  # a level of each kind
    ids = torch.arange(26).view(2, 13)
    model.compute_dtype = dtype

    def run():
        model.zero_grad()
        loss, count = LossModule(model)(ids[:, :-1], ids[:, 1:])
        (loss / count).backward()
        return (loss / count).item(), model.blocks[2].kv.linear.weight.grad.clone()

    eager = run()
    for block in model.blocks:
        block.compile(backend="eager", fullgraph=True, dynamic=False)
    compiled = run()
    assert compiled[0] == pytest.approx(eager[0], abs=1e-5)
    torch.testing.assert_close(compiled[1], eager[1], rtol=1e-3, atol=1e-5)


@torch.no_grad()
def test_log_probabilities_are_as_exact_as_their_type(tiny):
    """Their factor, half the width, must not multiply what float32 rounds off distances and logarithms."""
    head = tiny("tape", dim=512, n_heads=4).head
    x = torch.layer_norm(torch.randn(16, 512, generator=torch.Generator().manual_seed(1)), (512,))
    found = head(x)
    assert (found - head.double()(x.double())).abs().max() < 1e-5
