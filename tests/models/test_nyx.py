"""NYX against numbers recorded from the original code."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from nnx_cli import models
from nnx_cli.errors import UsageError
from nnx_cli.layers.lora import merge_adapters, remove_adapters
from nnx_cli.layers.loss import LossModule
from nnx_cli.layers.rope import rotary_tables
from nnx_cli.models.nyx import xpos_tables

FOLDER = Path(__file__).parent
CASES = json.loads((FOLDER / "nyx.parity.json").read_text())["cases"]


def load_case(case):
    entry, tensors = CASES[case], load_file(FOLDER / CASES[case]["file"])

    def cut(prefix):
        return {key[len(prefix) :]: value for key, value in tensors.items() if key.startswith(prefix)}

    data = {name: tensors[key] for name, key in entry["tensors"].items()}
    return entry, cut(entry["weights_prefix"]), cut(entry["grads_prefix"]) if "grads_prefix" in entry else None, data


@pytest.mark.parametrize(
    "case", ["causal_seed", "causal_sound", "qk_rmsnorm_seed", "qk_rmsnorm_sound", "lora_adapter", "lora_merged"]
)
def test_equals_original(case):
    entry, weights, grads, data = load_case(case)
    model = models.load_reference("nyx", entry["config"], weights, variant=entry["variant"]).requires_grad_(True)
    assert sum(p.numel() for p in model.parameters()) == entry["param_count"]
    logits = model(data["input_ids"])
    assert (logits - data["logits"]).abs().max() < 1e-5
    if "loss" in data:
        loss, count = LossModule(model)(data["input_ids"][:, :-1], data["input_ids"][:, 1:])
        assert abs(loss / count - data["loss"].item()) < 1e-5
        if grads:
            (loss / count).backward()
            ours = models.reference_tensors(model, grads=True)
            assert ours.keys() == grads.keys()
            for name, grad in grads.items():
                assert (ours[name] - grad).abs().max() <= 1e-5 + 1e-3 * grad.abs().max(), name


def test_cached_decoding_equals_the_fixture():
    entry, weights, _, data = load_case("qk_rmsnorm_sound")
    model = models.load_reference("nyx", entry["config"], weights)
    ids = data["input_ids"]
    cache = model.make_cache(len(ids), ids.shape[1])
    with torch.no_grad():
        logits = [model(ids[:, :5], cache=cache)]
        logits += [model(ids[:, t : t + 1], cache=cache) for t in range(5, ids.shape[1])]
    assert (torch.cat(logits, dim=1) - data["logits"]).abs().max() < 1e-5


def test_published_parameter_count():
    model = models.build("nyx", vocab_size=256, size="small")
    assert sum(p.numel() for p in model.parameters()) == 30_020_096


def test_adapters_merge_into_the_recorded_weights():
    entry, weights, _, data = load_case("lora_adapter")
    model = models.load_reference("nyx", entry["config"], weights)
    assert {name.rpartition(".")[2] for name, p in model.named_parameters() if p.requires_grad} == {"lora_a", "lora_b"}
    merge_adapters(model)
    merged = load_case("lora_merged")[1]
    for name, weight in models.reference_tensors(model).items():
        assert (weight - merged[name]).abs().max() < 1e-6, name
    model = models.load_reference("nyx", entry["config"], weights)
    remove_adapters(model)
    assert (model(data["input_ids"]) - data["logits_without_adapter"]).abs().max() < 1e-5


def test_position_factors_stay_within_sixteen_bits():
    tables = xpos_tables(torch.arange(8192), 64, 512.0, 4096)
    assert all(table.abs().max() < torch.finfo(torch.float16).max for table in tables)
    assert all(table.half().isfinite().all() for table in tables)


def test_without_xpos_positions_are_plain_rotary(tiny):
    ids = torch.arange(32)[None]
    plain, slow, decaying = (
        tiny(**fields)(ids) for fields in (dict(xpos=False), dict(xpos_scale_base=1e30), dict(xpos_scale_base=8.0))
    )
    assert torch.equal(plain, slow) and not torch.allclose(plain, decaying, atol=1e-3)
    positions = torch.arange(8)
    found, wanted = tiny(xpos=False).rotary_tables(positions), 2 * rotary_tables(positions, 16)
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


@pytest.mark.parametrize(("base", "seq_len"), [(0.0, 32), (-1.0, 32), (0.2, 32), (7.9, 1024), (63.9, 8192)])
def test_a_decay_that_no_number_holds_is_refused(base, seq_len):
    with pytest.raises(UsageError, match="xpos-scale-base"):
        models.make_config("nyx", xpos_scale_base=base, seq_len=seq_len)


@pytest.mark.parametrize("seq_len", [32, 1024, 8192])
def test_the_steepest_decay_is_finite(seq_len):
    config = models.make_config("nyx", xpos_scale_base=seq_len / 128, seq_len=seq_len)
    tables = xpos_tables(torch.arange(seq_len), 64, config.xpos_scale_base, seq_len // 2)
    assert all(table.isfinite().all() for table in tables) and min(tables[0].abs().amax(1)) > 0
