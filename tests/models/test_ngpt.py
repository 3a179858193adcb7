"""nGPT against numbers recorded from the original code, and what holds on the sphere."""

import json

import pytest
import torch
import torch.nn.functional as F

from nnx_cli import models
from nnx_cli.errors import CheckpointError, UsageError
from nnx_cli.layers.lora import adapted_layers, add_adapters, merge_adapters
from nnx_cli.layers.loss import LossModule
from nnx_cli.layers.quantized import quantizable
from nnx_cli.layers.unit_norm import unit
from nnx_cli.models.ngpt import Interpolate

from .reference_cases import load_case

CASES = ["tied_qknorm", "tied_no_qknorm", "untied_plain_values_manual"]
MODES = pytest.mark.parametrize("normalize_on_use", [False, True], ids=["after_steps", "on_use"])


def loss_of(model, ids):
    loss, count = LossModule(model)(ids[:, :-1], ids[:, 1:])
    return loss / count


def draw_ids(*shape, vocab_size=64):
    return torch.randint(vocab_size, shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("variant", ["seed", "sound"])
def test_equals_original(case, variant):
    entry, weights, grads, data = load_case("ngpt", case)
    model = models.load_reference("ngpt", entry["config"], weights, variant=variant)
    assert sum(p.numel() for p in model.parameters()) == entry["param_count"]
    assert (model(data["input_ids"]) - data["logits"]).abs().max() < 1e-5
    loss = loss_of(model, data["input_ids"])
    assert abs(loss - data["loss"].item()) < 1e-5
    loss.backward()
    ours = models.reference_tensors(model, grads=True)
    assert ours.keys() == grads.keys()
    for name, grad in grads.items():
        assert (ours[name] - grad).abs().max() <= 1e-5 + 1e-3 * grad.abs().max(), name
    again = models.reference_tensors(model)
    assert weights.keys() - again.keys() == {"rotary_embed.freqs"}
    assert all(torch.equal(tensor, weights[name]) for name, tensor in again.items())


@torch.no_grad()
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("prefill", [1, 6])
def test_cached_decoding_equals_the_fixture(case, prefill):
    entry, weights, _, data = load_case("ngpt", case)
    model, ids = models.load_reference("ngpt", entry["config"], weights), data["input_ids"]
    cache = model.make_cache(len(ids), ids.shape[1])
    logits = [model(ids[:, :prefill], cache=cache)]
    logits += [model(ids[:, t : t + 1], cache=cache) for t in range(prefill, ids.shape[1])]
    assert (torch.cat(logits, dim=1) - data["logits"]).abs().max() < 1e-5


def test_scales_may_differ_between_layers():
    entry, weights, _, data = load_case("ngpt", CASES[0])
    given = dict(alpha_attn_init=(0.3, 0.7), alpha_attn_scale=(0.1, 0.2), s_ff_gate_scale=2.0, s_logit_init=3.0)
    changed = dict(weights)
    for name, factor, usual in (
        ("layers.0.0.branch_scale.scale", 0.3 / 0.1, 0.5 * 32**0.5),
        ("layers.1.0.branch_scale.scale", 0.7 / 0.2, 0.5 * 32**0.5),
        ("layers.0.1.fn.gate_scale.scale", 1 / 2.0, 1.0),
        ("layers.1.1.fn.gate_scale.scale", 1 / 2.0, 1.0),
        ("logit_scale.scale", 3.0 * 32**0.5, 32**0.5),
    ):
        changed[name] = weights[name] * usual / factor
    model = models.load_reference("ngpt", entry["config"] | given, changed)
    assert (model(data["input_ids"]) - data["logits"]).abs().max() < 1e-5
    described = json.loads(json.dumps(models.config_dict(model.config)))
    assert models.make_config("ngpt", **described) == model.config


@pytest.mark.parametrize(
    "bad",
    [{"s_qk_init": 0.0}, {"alpha_attn_scale": -1.0}, {"alpha_mlp_init": (0.1, 0.2, 0.3)}, {"ffn_dim": 0}],
    ids=str,
)
def test_bad_values_are_refused(bad):
    with pytest.raises(UsageError, match=next(iter(bad)).replace("_", "-")):
        models.make_config("ngpt", n_layers=2, **bad)


@pytest.mark.parametrize("case", CASES)
def test_arguments_read_off_the_weights(case):
    entry, weights, _, _ = load_case("ngpt", case)
    found, given = models.infer_reference("ngpt", weights), entry["config"]
    unseen = {"attn_norm_qk", "add_value_residual"}  # they leave no trace in the weights
    assert all(found.get(key, False) == given[key] for key in given.keys() - unseen)
    assert not unseen & found.keys()
    assert models.load_reference("ngpt", found, weights).config.ffn_dim == 85


def test_other_weights_are_refused():
    with pytest.raises(CheckpointError, match="no checkpoint of ngpt"):
        models.infer_reference("ngpt", {"wte.weight": torch.zeros(3, 3)})


@pytest.mark.parametrize(
    "shape, published",
    [
        (dict(n_layers=8), 25_327_184),
        (dict(n_layers=8, tie_embeddings=False), 25_458_256),
        (dict(n_layers=4, tie_embeddings=False), 12_860_328),
    ],
)
def test_published_parameter_counts(shape, published):
    with torch.device("meta"):
        model = models.build("ngpt", vocab_size=256, dim=512, n_heads=8, **shape)
    assert sum(p.numel() for p in model.parameters()) == published


@MODES
def test_matrices_return_to_the_sphere_after_a_step(tiny, normalize_on_use):
    model = tiny("ngpt", normalize_on_use=normalize_on_use, tie_embeddings=False)
    axes = dict(model.unit_axes())
    assert axes.keys() == {name for name, p in model.named_parameters() if p.dim() == 2} and len(axes) == 2 + 4 * 2
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(3):
        loss_of(model, draw_ids(2, 17)).backward()
        optimizer.step()
        model.post_optim_step()
    for name, axis in axes.items():
        matrix = model.get_parameter(name)
        assert matrix.shape[axis] == 32
        assert torch.allclose(matrix.norm(dim=axis), torch.ones(()), atol=1e-6), name


def test_normalising_on_use_ignores_lengths_and_projects_gradients(tiny):
    ids = draw_ids(2, 17)
    plain, raw = tiny("ngpt"), tiny("ngpt", normalize_on_use=True)
    lengths = {}
    with torch.no_grad():
        for name, axis in raw.unit_axes():
            matrix = raw.get_parameter(name)
            lengths[name] = torch.empty_like(matrix.sum(axis, keepdim=True)).uniform_(0.5, 1.5)
            matrix.mul_(lengths[name])
    assert torch.allclose(raw(ids), plain(ids), atol=1e-5)
    loss_of(plain, ids).backward()
    loss_of(raw, ids).backward()
    for name, axis in plain.unit_axes():
        w, g = plain.get_parameter(name), plain.get_parameter(name).grad
        wanted = (g - w * (w * g).sum(axis, keepdim=True)) / lengths[name]
        assert torch.allclose(raw.get_parameter(name).grad, wanted, atol=1e-6), name


def test_own_gradients_are_those_of_the_formulas():
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(2, 5, 8, generator=generator).requires_grad_() for _ in range(2))
    alpha = torch.randn(8, generator=generator).requires_grad_()
    weight = torch.randn(2, 5, 8, generator=generator)

    def plain(x, y, alpha):
        return F.normalize(x + alpha * (F.normalize(y, dim=-1) - x), dim=-1)

    for ours, formula, inputs in (
        (Interpolate.apply, plain, (x, y, alpha)),
        (unit, lambda x: F.normalize(x, dim=-1), (x,)),
        (lambda x: unit(x, 1), lambda x: F.normalize(x, dim=1), (x,)),
    ):
        assert torch.allclose(ours(*inputs), formula(*inputs), atol=1e-6)
        grads = torch.autograd.grad((ours(*inputs) * weight).sum(), inputs)
        wanted = torch.autograd.grad((formula(*inputs) * weight).sum(), inputs)
        assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(grads, wanted, strict=True))


@torch.no_grad()
def test_the_stream_has_length_one(tiny):
    model = tiny("ngpt")
    x = model.trunk(draw_ids(2, 17))
    assert torch.allclose(x.norm(dim=-1), torch.ones(()), atol=1e-6)
    cosines = model.head(x) / model.head.s_logit()
    assert cosines.abs().max() <= 1 + 1e-6


def test_bfloat16_stays_near_float32(tiny):
    model, ids = tiny("ngpt", n_layers=6), draw_ids(2, 33)
    logits = model(ids)
    model.compute_dtype = torch.bfloat16
    assert model.trunk(ids).dtype == torch.bfloat16 and model(ids).dtype == torch.float32
    assert (model(ids) - logits).norm() < 0.02 * logits.norm()


@pytest.mark.parametrize(("normalize_on_use", "dtype"), [(False, torch.bfloat16), (True, torch.float32)])
def test_blocks_compile_whole(tiny, normalize_on_use, dtype):
    torch._dynamo.reset()
    model, ids = tiny("ngpt", normalize_on_use=normalize_on_use, n_layers=1), draw_ids(2, 17)
    model.compute_dtype = dtype
    eager = loss_of(model, ids)
    grads = torch.autograd.grad(eager, list(model.parameters()))
    for block in model.blocks:
        block.compile(backend="aot_eager", fullgraph=True, dynamic=False)
    compiled = loss_of(model, ids)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    assert abs(compiled - eager) < tolerance
    for a, b in zip(torch.autograd.grad(compiled, list(model.parameters())), grads, strict=True):
        assert (a - b).norm() <= tolerance * b.norm()


@MODES
@torch.no_grad()
def test_adapters_merge_and_leave_the_sphere_alone(tiny, normalize_on_use):
    model, ids = tiny("ngpt", normalize_on_use=normalize_on_use), draw_ids(2, 17)
    before = model(ids)
    add_adapters(model, 2)
    assert torch.equal(model(ids), before)
    for layer in adapted_layers(model):
        layer.lora_b.normal_(std=0.1)
    state = {name: tensor.clone() for name, tensor in model.state_without_ties().items()}
    model.post_optim_step()
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_without_ties().items())
    adapted = model(ids)
    assert (adapted - before).abs().max() > 1e-3
    merge_adapters(model)
    assert torch.allclose(model(ids), adapted, atol=1e-5)


def test_all_matrices_can_be_quantized(tiny):
    model = tiny("ngpt")
    names = {f"{name}.weight" for name in quantizable(model)}
    assert names == {name for name, p in model.named_parameters(remove_duplicate=False) if p.dim() == 2}
