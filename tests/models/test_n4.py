"""N4 against numbers recorded from the original code, and its options against attention written out."""

import json
from pathlib import Path

import pytest
import torch

from nnx_cli import models
from nnx_cli.convert.quantize import quantized_state
from nnx_cli.errors import CheckpointError, UsageError
from nnx_cli.layers.linear import PackedLinear
from nnx_cli.layers.lora import add_adapters
from nnx_cli.layers.loss import LossModule
from nnx_cli.layers.quantized import Quantization, quantize_layers, widen
from nnx_cli.models.n4 import grouped_projections, windowed_attention
from nnx_cli.models.originals.n4 import reference_config
from nnx_cli.planning.flops import count_parameters, meta_model
from nnx_cli.runs.load import fill_model
from tests.models.reference_cases import FOLDER, load_case

CASES = json.loads((FOLDER / "n4.parity.json").read_text())["cases"]
OPTIONS = {
    "plain": {},
    "grouped": dict(n_kv_heads=1),
    "bias": dict(bias=True),
    "alpha": dict(dyt_alpha=True),
    "head_scale": dict(head_scale=True),
    "window": dict(window=5),
    "latent": dict(kv_latent_dim=12),
    "all": dict(n_kv_heads=2, n_heads=4, bias=True, dyt_alpha=True, head_scale=True, window=3),
    "all and latent": dict(
        n_kv_heads=2, n_heads=4, kv_latent_dim=7, bias=True, dyt_alpha=True, head_scale=True, window=3
    ),
}


def close(a, b, tolerance=2e-5):
    assert a.shape == b.shape
    return (a - b).abs().max().item() <= tolerance * max(1.0, b.abs().max().item())


@pytest.fixture(params=OPTIONS)
def model(request, tiny):
    """A model with each option, its weights large enough and its vectors uneven enough to show mistakes."""
    model = tiny("n4", **OPTIONS[request.param]).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter)) if parameter.dim() < 2 else parameter.mul_(3.0)
    return model


@pytest.mark.parametrize("variant", ["seed", "sound"])
@pytest.mark.parametrize("case", CASES)
def test_equals_original(case, variant):
    entry, weights, grads, data = load_case("n4", case)
    model = models.load_reference("n4", entry["config"], weights, variant=variant)
    unused = sum(weights[name].numel() for name in entry["grads_none"])
    assert sum(p.numel() for p in model.parameters()) == entry["param_count"] - unused
    assert models.original("n4").Tensors(model).unused == set(entry["grads_none"])
    ids = data["input_ids"]
    assert (model(ids) - data["logits"]).abs().max() < 1e-5
    loss, count = LossModule(model)(ids[:, :-1], ids[:, 1:])
    assert abs(loss / count - data["loss"].item()) < 1e-5
    (loss / count).backward()
    ours = models.reference_tensors(model, grads=True)
    assert ours.keys() == grads.keys()
    for name, grad in grads.items():
        assert (ours[name] - grad).abs().max() <= 1e-5 + 1e-3 * grad.abs().max(), name
    back = models.reference_tensors(model)
    assert back.keys() == weights.keys() - models.original("n4").Tensors(model).unused
    assert all(torch.equal(back[name], weights[name]) for name in back)


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_cached_decoding_equals_the_fixture(case):
    entry, weights, _, data = load_case("n4", case)
    model = models.load_reference("n4", entry["config"], weights)
    ids = data["input_ids"]
    cache = model.make_cache(len(ids), ids.shape[1])
    logits = [model(ids[:, :5], cache=cache)]
    averaged = data["averaged_keys_block0"]
    assert close(cache.keys[0, :, :, :5], averaged[:, :, :5])
    logits += [model(ids[:, t : t + 1], cache=cache) for t in range(5, ids.shape[1])]
    assert (torch.cat(logits, dim=1) - data["logits"]).abs().max() < 1e-5
    assert close(cache.keys[0], averaged)


@pytest.mark.parametrize("case", CASES)
def test_the_original_is_recognised_by_its_weights(case):
    entry, weights, _, _ = load_case("n4", case)
    assert models.infer_reference("n4", weights) == {"bias": False} | entry["config"]
    with pytest.raises(CheckpointError):
        models.infer_reference("n4", {"embedding.weight": torch.zeros(2, 2)})


@pytest.mark.parametrize(
    "published, unused, shape",
    [
        (177_874_176, 18 * 128, dict(vocab_size=32768, hidden_size=768, inter_size=1536, heads=6, layers=18)),
        (120_076_032, 6 * 128, dict(vocab_size=32064, hidden_size=768, inter_size=3072, heads=6, layers=6)),
    ],
)
def test_published_parameter_counts(published, unused, shape):
    config = models.make_config("n4", **reference_config(**shape), seq_len=1024)
    assert count_parameters(meta_model("n4", config))["total"] == published - unused
    assert (config == models.make_config("n4", size="base", vocab_size=32768)) == (published == 177_874_176)


def written_out(model, ids):
    """Logits of `model` in float64, with loops and whole score matrices."""
    config = model.config
    state = {name.replace(".linear.", "."): x.double() for name, x in model.state_dict().items()}

    def linear(name, x):
        return x @ state[name + ".weight"].T + state.get(name + ".bias", 0)

    def squash(name, x):
        return state[name + ".weight"] * torch.tanh(state.get(name + ".alpha", 1) * x) + state.get(name + ".bias", 0)

    H, G, D, T = config.n_heads, config.n_kv_heads, config.dim, ids.shape[1]
    K = D // H
    x = state["embedding.weight"][ids]
    for i in range(config.n_layers):
        name = f"blocks.{i}."
        squashed = squash(name + "attention_norm", x)
        if R := config.kv_latent_dim:
            q, c, gate = linear(name + "attention.qcg", squashed).split([D, R, G], dim=-1)
            k, v = linear(name + "attention.rise", c).chunk(2, dim=-1)
        else:
            q, k, v, gate = linear(name + "attention.qkvg", squashed).split([D, G * K, G * K, G], dim=-1)
        heads = []
        for h in range(H):
            g = h // (H // G)
            k_h, v_h, q_h = k[..., g * K : (g + 1) * K], v[..., g * K : (g + 1) * K], q[..., h * K : (h + 1) * K]
            average = torch.stack(
                [
                    sum((m + 1) * torch.tanh(gate[:, m, g, None]) * k_h[:, m] for m in range(j + 1)) / (j + 1) ** 2
                    for j in range(T)
                ],
                dim=1,
            )
            scores = q_h @ average.transpose(1, 2) / (K if config.head_scale else D) ** 0.5
            age = torch.arange(T)[:, None] - torch.arange(T)
            hidden = (age < 0) | (age >= (config.window or T))
            heads.append(scores.masked_fill(hidden, -torch.inf).softmax(-1) @ v_h)
        x = x + squash(name + "attention_out_norm", linear(name + "attention.out", torch.cat(heads, dim=-1)))
        a, c, value = linear(name + "mlp.up", squash(name + "mlp_norm", x)).chunk(3, dim=-1)
        inner = a.sigmoid() * torch.nn.functional.gelu(c) * value
        x = x + squash(name + "mlp_out_norm", linear(name + "mlp.down", inner))
    return linear("head", x)


@torch.no_grad()
def test_options_equal_the_function_written_out(model):
    ids = torch.randint(64, (2, 23), generator=torch.Generator().manual_seed(1))
    wanted = written_out(model, ids)
    assert close(model(ids).double(), wanted)
    if model.config.window:
        plain = models.from_config("n4", models.make_config("n4", **vars(model.config) | {"window": None}))
        plain.load_state_dict(model.state_dict())
        reach, difference = model.config.window, (plain(ids) - model(ids)).abs().amax((0, 2))
        assert difference[:reach].max() < 1e-5 and difference[reach:].min() > 1e-4


@torch.no_grad()
def test_cached_decoding_with_options_equals_the_full_pass(model):
    ids = torch.randint(64, (3, 30), generator=torch.Generator().manual_seed(2))
    whole = model(ids)
    for cuts in ([1] * 30, [2, 1, 9, 1, 1, 2, 14], [13] + [1] * 17, [30]):
        cache, logits = model.make_cache(3, 30), []
        for part in ids.split(cuts, dim=1):
            logits.append(model(part, cache=cache))
        assert close(torch.cat(logits, dim=1), whole), cuts


@torch.no_grad()
def test_rows_of_different_length_with_options(model):
    ids = torch.randint(64, (3, 30), generator=torch.Generator().manual_seed(3))
    lengths = torch.tensor([4, 0, 17])
    cache = model.make_cache(3, 30)
    model(ids[:, :20], cache=cache)
    cache.truncate(lengths).repeat(2)
    lengths, ids = lengths.repeat_interleave(2), ids.repeat_interleave(2, dim=0)
    whole = model(ids)
    for n_new in (1, 3, 1, 7):
        index = lengths[:, None] + torch.arange(n_new)
        logits = model(ids.gather(1, index), cache=cache)
        assert close(logits, whole.gather(1, index[..., None].expand_as(logits)))
        lengths = lengths + n_new
    assert cache.lengths.tolist() == lengths.tolist()
    cache.truncate(2)
    assert close(model(ids[:, 2:], cache=cache), whole[:, 2:])


@torch.no_grad()
def test_truncating_again_and_again_keeps_the_sums(tiny):
    model = tiny("n4").eval()
    ids = torch.randint(64, (2, 40), generator=torch.Generator().manual_seed(4))
    whole, cache = model(ids), model.make_cache(2, 48)
    for t in range(40):
        guess = (ids[:, t : t + 4] + torch.tensor([0, 1, 1, 1])[: ids[:, t : t + 4].shape[1]]) % 64
        logits = model(guess, cache=cache)  # one token that is kept and some that are not
        assert close(logits[:, 0], whole[:, t])
        cache.truncate(t + 1)
    assert cache.n_bytes == 4 * (2 * 2 * 32 * 48 * 2 + 2 * 2 * 32)


@torch.no_grad()
def test_half_precision_counts_and_sums_in_float32(tiny):
    model = tiny("n4", dim=64, seq_len=1024).eval()
    ids = torch.randint(64, (1, 1024), generator=torch.Generator().manual_seed(5))
    cache, wanted = model.make_cache(1, 1024), model.make_cache(1, 1024)
    model(ids, cache=wanted)
    for dtype, rounding in ((torch.bfloat16, 2**-7), (torch.float16, 2**-9)):
        model.compute_dtype = dtype
        cache = model.make_cache(1, 1024)
        assert model(ids, cache=cache).isfinite().all() and cache.sums.dtype == torch.float32
        error = (cache.keys[0].float() - wanted.keys[0]).norm() / wanted.keys[0].norm()
        assert error < rounding
        late, late_wanted = cache.keys[0, :, :, 900:].float(), wanted.keys[0, :, :, 900:]
        assert (late - late_wanted).norm() < rounding * late_wanted.norm()


@pytest.mark.parametrize("bits", [None, 8, 4])
@pytest.mark.parametrize("options", [{}, OPTIONS["all and latent"]], ids=["plain", "all"])
@torch.no_grad()
def test_what_rises_from_latents_is_absorbed_with_adapters_and_codes(tiny, options, bits):
    model = tiny("n4", **(dict(kv_latent_dim=12) | options)).eval()
    ids = torch.randint(64, (2, 20), generator=torch.Generator().manual_seed(5))
    plain = model(ids)
    if bits is None:
        add_adapters(model, 2)
        for name, parameter in model.named_parameters():
            if name.endswith("lora_b"):
                parameter.normal_()
    else:
        quantization = Quantization(bits=bits, group_size=None if bits == 8 else 4, kept=[])
        state = quantized_state(model, quantization)
        quantize_layers(model, quantization)
        fill_model(model, widen(state), Path(), torch.device("cpu"), "fp32")
    whole, cache = model(ids), model.make_cache(2, 20)
    assert not close(whole, plain, 1e-3)
    logits = [model(part, cache=cache) for part in ids.split([6, 1, 1, 5, 7], dim=1)]
    assert close(torch.cat(logits, dim=1), whole)


@torch.no_grad()
def test_a_cache_of_latents_holds_no_keys(tiny):
    grouped, latent = (tiny("n4", **fields).eval() for fields in (dict(n_kv_heads=1), dict(kv_latent_dim=12)))
    assert latent.make_cache(2, 40).n_bytes == 4 * 2 * 2 * 40 * (12 + 2) < grouped.make_cache(2, 40).n_bytes
    many = torch.randint(64, (1, 300), generator=torch.Generator().manual_seed(6))
    cache = latent.make_cache(1, 300)
    latent(many[:, :40], cache=cache)
    assert close(latent(many[:, 40:], cache=cache), latent(many)[:, 40:]), "more queries than are taken at once"
    for dtype, rounding in ((torch.bfloat16, 2**-6), (torch.float16, 2**-9)):
        latent.compute_dtype = dtype
        cache, whole = latent.make_cache(1, 300), latent(many).float()
        late = [latent(part, cache=cache) for part in many.split([290, *[1] * 10], dim=1)][1:]
        assert close(torch.cat(late, dim=1).float(), whole[:, 290:], rounding)


@pytest.mark.parametrize("T, window", [(8, 3), (9, 3), (10, 7), (32, 4), (5, 1)])
def test_windowed_attention_equals_a_masked_one_and_so_do_its_gradients(T, window):
    draw = torch.Generator().manual_seed(T)
    q, k, v = (torch.randn(2, heads, T, 4, generator=draw, requires_grad=True) for heads in (4, 2, 2))
    age = torch.arange(T)[:, None] - torch.arange(T)
    mask = (age >= 0) & (age < window)
    attend = torch.nn.functional.scaled_dot_product_attention
    wanted = attend(q, k, v, mask, scale=0.3, enable_gqa=True).transpose(1, 2).reshape(2, T, 16)
    found = windowed_attention(q, k, v, window, scale=0.3, dropout=0.0)
    assert close(found, wanted)
    seed = torch.randn(wanted.shape, generator=draw)
    grads = [torch.autograd.grad(y, (q, k, v), seed) for y in (found, wanted)]
    assert all(close(a, b) for a, b in zip(*grads, strict=True))


def test_every_parameter_receives_gradient_with_options(model):
    ids = torch.randint(64, (4, 33), generator=torch.Generator().manual_seed(6))
    loss, count = LossModule(model.train())(ids[:, :-1], ids[:, 1:])
    (loss / count).backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().max() > 0] == []


@pytest.mark.parametrize("model", ["all"], indirect=True)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_blocks_with_options_are_captured_whole(model, dtype):
    torch._dynamo.reset()
    block = model.blocks[0]
    counts = torch.arange(1.0, 18.0)[:, None]
    x = torch.randn(2, 17, 32, generator=torch.Generator().manual_seed(7)).to(dtype)
    compiled = torch.compile(block, backend="aot_eager", fullgraph=True)
    assert compiled(x, counts, None).dtype == dtype
    tolerance = 1e-5 if dtype == torch.float32 else 0.02
    assert close(compiled(x, counts, None).float(), block(x, counts, None).float(), tolerance)


def test_dropout_acts_in_training_alone(tiny):
    model = tiny("n4", dropout=0.3)
    ids = torch.randint(64, (2, 17))
    assert not torch.equal(model(ids), model(ids))
    assert torch.equal(model.eval()(ids), model(ids))


@pytest.mark.parametrize(
    "bad",
    [
        {"dim": 32, "n_heads": 3},
        {"n_kv_heads": 3},
        {"n_kv_heads": 0},
        {"ffn_dim": 0},
        {"window": 0},
        {"kv_latent_dim": 0},
        {"kv_latent_dim": 513},
    ],
    ids=str,
)
def test_shapes_that_do_not_fit_are_refused(bad):
    with pytest.raises(UsageError, match=next(iter(bad)).replace("_", "-")):
        models.make_config("n4", **bad)


def test_options_that_the_original_lacks_have_no_names_there(tiny):
    for options in (dict(n_kv_heads=1), dict(dyt_alpha=True)):
        with pytest.raises(UsageError, match="original"):
            models.reference_tensors(tiny("n4", **options))


@pytest.mark.parametrize("counts", [(3, 1), (1, 1, 2), (4,)])
def test_products_of_parts_equal_the_packed_one(counts):
    torch.manual_seed(0)
    layer, x = PackedLinear(16, (8, 4, 4, 3)), torch.randn(2, 5, 16)
    for part, wanted in zip(grouped_projections(layer, x, *counts), layer(x), strict=True):
        torch.testing.assert_close(part, wanted)
    layer.add_adapter(2)
    torch.nn.init.normal_(layer.lora_b)
    for part, wanted in zip(grouped_projections(layer, x, *counts), layer(x), strict=True):
        assert torch.equal(part, wanted)
