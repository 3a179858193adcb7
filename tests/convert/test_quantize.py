import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from nnx_cli import models
from nnx_cli.convert import quantize as quantizer
from nnx_cli.convert.sensitivity import rank_layers
from nnx_cli.data.loader import windows_at
from nnx_cli.errors import CheckpointError, QualityError, UsageError
from nnx_cli.evaluation.losses import Masked, evaluate, window_starts
from nnx_cli.kernels.quantized_matmul import KERNELS
from nnx_cli.layers import quantized
from nnx_cli.layers.loss import token_losses
from nnx_cli.layers.quantized import Quantization, quantize_layers, widen
from nnx_cli.planning import flops as cost
from nnx_cli.runs.load import ModelRef, fill_model, load_model, model_from_config
from nnx_cli.runs.manifest import write_model_folder

CPU = torch.device("cpu")
INT8 = Quantization(bits=8, group_size=None, kept=[])
INT4 = Quantization(bits=4, group_size=32, kept=[])


def requantized(model, how):
    """A model of the same kind with the tensors of `model`, quantized."""
    name = type(model).__module__.rpartition(".")[2]
    twin = model_from_config({"model": {"name": name, **models.config_dict(model.config)}}, Path())
    quantize_layers(twin, how)
    return fill_model(twin, widen(quantizer.quantized_state(model, how)), Path(), CPU, "fp32")


@pytest.mark.parametrize("name", models.names())
@pytest.mark.parametrize("how, share", [(INT8, 0.05), (INT4, 0.35)], ids=["int8", "int4"])
def test_every_architecture(tiny, name, how, share, monkeypatch):
    monkeypatch.setattr(quantized, "SMALL_MATRIX", 0)  # such small ones would be multiplied in floating point
    model = tiny(name).eval()
    twin = requantized(model, how)
    ids = torch.randint(64, (2, 12), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        wanted, found = (m(ids).log_softmax(2) for m in (model, twin))
        cache = twin.make_cache(2, 12)
        steps = torch.cat(
            [twin(ids[:, :8], cache=cache), *(twin(ids[:, i : i + 1], cache=cache) for i in range(8, 12))], 1
        )
    spread = (wanted - wanted.mean()).norm()
    assert (found - wanted).norm() < share * spread
    assert (steps.log_softmax(2) - found).norm() < 0.05 * spread
    assert all(not parameter.requires_grad for parameter in twin.parameters())


@pytest.mark.parametrize("name", models.names())
@pytest.mark.parametrize("bits, how", [("int8", INT8), ("int4", INT4)])
def test_files_are_as_large_as_summarize_says(tiny, name, bits, how, tmp_path):
    model = tiny(name, dim=36, n_heads=2)
    write_model_folder(tmp_path, {}, None, quantizer.quantized_state(model, how))
    n_bytes = sum(tensor.nbytes for tensor in load_file(tmp_path / "model.safetensors").values())
    assert n_bytes == cost.file_bytes(model)[bits]


def test_a_recurrent_matrix_is_stored_in_8_bits_and_computes_in_float(tiny, tmp_path):
    model = tiny("tape").eval()
    wanted = model.prophet.first.weight.detach()
    state = quantizer.quantized_state(model, INT8)
    assert state["prophet.first.weight"].dtype == torch.int8 and state["prophet.first.scale"].dtype == torch.float16
    found = requantized(model, INT8).prophet.first.weight
    assert found.dtype == torch.float32 and 0 < (found - wanted).norm() < 0.01 * wanted.norm()
    for how in (INT4, replace(INT8, kept=["prophet"]), replace(INT8, kept=["prophet.first"])):
        assert quantizer.quantized_state(model, how)["prophet.first.weight"].dtype == torch.float16
    twin = model_from_config({"model": {"name": "tape", **models.config_dict(model.config)}}, tmp_path)
    quantize_layers(twin, INT8)
    for broken in ({"prophet.first.scale": torch.ones(3)}, {"prophet.first.scale": None}, {"prophet.x.scale": wanted}):
        damaged = {name: tensor for name, tensor in (widen(state) | broken).items() if tensor is not None}
        with pytest.raises(CheckpointError, match="belongs to another model"):
            fill_model(twin, damaged, tmp_path, CPU, "fp32")


def test_other_tensors_are_stored_in_the_closer_of_two_types():
    plain, wide, counts = torch.randn(20), torch.tensor([1e5, 1.0]), torch.arange(3)
    assert quantizer.narrow(plain).dtype == torch.float16
    assert quantizer.narrow(wide).dtype == torch.bfloat16
    assert quantizer.narrow(counts) is counts


def test_comparison_measures_what_evaluation_does(tiny, monkeypatch):
    monkeypatch.setattr(quantizer, "TOKENS_PER_BATCH", 100)
    model, other = tiny("nyx").eval(), tiny("llama").eval()
    tokens = np.random.default_rng(0).integers(0, 64, 32 * 9 + 1).astype(np.uint8)
    token_bytes = np.arange(64, dtype=np.int32) % 3
    found = quantizer.compare(model, other, tokens, token_bytes)
    for loss, each in ((found.loss_before, model), (found.loss_after, other)):
        wanted = evaluate(each, tokens, seq_len=32, batch_size=4, token_bytes=token_bytes)
        assert found.n_tokens == wanted.tokens
        assert loss == pytest.approx(wanted.loss, rel=1e-5)
        assert found.bits_per_byte(loss) == pytest.approx(wanted.bits_per_byte, rel=1e-5)
    assert found.kl_divergence > 0 and found.same_top_token < 1
    same = quantizer.compare(model, model, tokens, None)
    assert (same.kl_divergence, same.same_top_token, same.bits_per_byte(1.0)) == (0.0, 1.0, None)


def test_comparison_looks_at_what_counts(tiny):
    model, other = tiny("nyx").eval(), tiny("llama").eval()
    draw = np.random.default_rng(0)
    tokens, documents = draw.integers(0, 64, 600).astype(np.uint8), np.arange(0, 600, 40)
    counts = draw.random(600) < 0.3
    masked = Masked(np.packbits(counts, bitorder="little"), documents)
    found = quantizer.compare(model, other, tokens, None, masked=masked)
    starts = window_starts(600, 32, None, masked)
    ids, targets = windows_at(tokens, starts, 32)
    kept = torch.from_numpy(counts[starts[:, None] + np.arange(1, 33)])
    assert starts[:3].tolist() == [0, 32, 39] and found.n_tokens == kept.sum()
    for loss, each in ((found.loss_before, model), (found.loss_after, other)):
        assert loss == pytest.approx(token_losses(each, ids, targets)[kept].mean().item(), rel=1e-5)


@pytest.mark.parametrize("n", [2, 20, 33])
def test_short_texts_are_measured_whole(tiny, n):
    model = tiny().eval()
    assert quantizer.compare(model, model, np.zeros(n, np.uint8), None).n_tokens == min(n - 1, 32)


@pytest.mark.parametrize("after, max_drop", [(1.02, None), (1.05, 0.01), (math.nan, 1.0), (math.inf, 1.0)])
def test_too_large_a_drop(after, max_drop):
    assert quantizer.Comparison(100, 100, 1.0, after, 0.0, 1.0).excess(max_drop) > 0


@pytest.mark.parametrize("after, max_drop", [(1.009, None), (1.005, 0.01), (0.5, 0.0)])
def test_a_drop_that_may_be(after, max_drop):
    assert quantizer.Comparison(100, 100, 1.0, after, 0.0, 1.0).excess(max_drop) <= 0


def make_sensitive(folder, *names):
    """Give layers of a run one huge column each, beside which the steps of their codes leave nothing of the others."""
    ref = ModelRef(folder)
    state = ref.weights()[1]
    for name in names:
        state[f"{name}.weight"][:, 0] = 300 * state[f"{name}.weight"].abs().max()
    made = folder.with_name("sensitive")
    made.mkdir()
    write_model_folder(made, ref.config, ref.tokenizer, state)
    return ModelRef(made)


@pytest.mark.parametrize("how", [INT8, INT4], ids=["int8", "int4"])
def test_sensitive_layers_are_kept(run, how):
    layers = ["blocks.1.attn_out", "blocks.0.ffn_out"]
    ref, out = make_sensitive(run.folder, *layers), Path("weights/small")
    ranked = rank_layers(load_model(ref, CPU), how, np.arange(500) % 256)
    assert set(ranked[:2]) == set(layers) and len(ranked) == 7  # three of each block, and one of embedding and head
    worse = quantizer.quantize_model(ref, Path("weights/all"), how, max_drop=50.0, device=CPU)[0]
    drop = worse["after"]["bits_per_byte"] - worse["before"]["bits_per_byte"]
    receipt, notes = quantizer.quantize_model(ref, out, how, max_drop=drop / 4, device=CPU)
    assert worse["kept"] == [] and set(receipt["kept"]) <= set(layers) and receipt["kept"]
    assert receipt["after"]["bits_per_byte"] - receipt["before"]["bits_per_byte"] <= drop / 4
    assert any("kept in 16 bits" in note and receipt["kept"][0] in note for note in notes)
    assert ModelRef(out).config["quantization"]["kept"] == receipt["kept"]
    assert ModelRef(out).weights()[1][f"{receipt['kept'][0]}.weight"].dtype in (torch.float16, torch.bfloat16)


def test_what_the_user_keeps_comes_first(run):
    ref = make_sensitive(run.folder, "blocks.1.attn_out")
    how = replace(INT4, kept=["blocks.0"])
    receipt, _ = quantizer.quantize_model(ref, Path("weights/small"), how, max_drop=0.05, device=CPU)
    assert receipt["kept"] == ["blocks.0", "blocks.1.attn_out"]


def test_where_nothing_is_left_to_quantize_nothing_is_written(refused, run):
    keep = [word for part in ("blocks", "embedding", "head") for word in ("--keep", part)]
    refused(2, "--keep leaves nothing of", "quantize", run.folder, *keep)


def test_layers_of_torch_are_named(tiny):
    model = tiny("llama")
    assert quantizer._check_any(model, INT8, "mine") == []
    model.blocks[0].mlp.down = nn.Linear(3, 2)
    model.norm = nn.Bilinear(2, 2, 2)
    (note,) = quantizer._check_any(model, INT8, "mine")
    assert note.endswith("torch's own Linear: blocks.0.mlp.down")
    model.head = nn.Linear(32, 64, bias=False)
    model.head.weight, model.blocks = model.embedding.weight, nn.ModuleList([nn.GRU(2, 2), nn.Conv1d(2, 2, 2)])
    with pytest.raises(UsageError, match="none of the layers of mine can be quantized: head is torch's own Linear"):
        quantizer._check_any(model, INT4, "mine")
    assert quantized.kernels_in_words(model, 0, torch.float32) == "none is quantized"


def test_where_keeping_layers_does_not_suffice_nothing_is_written(run, monkeypatch):
    monkeypatch.setattr(quantizer, "KEPT_SHARE", 0.1)
    ref = make_sensitive(run.folder, "blocks.1.attn_out", "blocks.0.ffn_out")
    with pytest.raises(QualityError, match=r"worse, and --max-drop is 0.0000; 5.\d+ with blocks.* in 16 bits"):
        quantizer.quantize_model(ref, Path("weights/deep/small"), INT4, max_drop=0.0, device=CPU)
    assert not Path("weights/deep").exists()


@pytest.mark.parametrize("how", [INT8, INT4], ids=["int8", "int4"])
def test_written_model_equals_the_one_in_memory(run, how):
    out = Path("elsewhere") / "deep" / "small"
    ref = ModelRef(run.folder)
    receipt, notes = quantizer.quantize_model(ref, out, how, max_drop=1.0, device=CPU)
    ids = torch.arange(20)[None]
    with torch.no_grad():
        wanted = requantized(load_model(ref, CPU), how)(ids)
        assert torch.equal(load_model(ModelRef(out), CPU)(ids), wanted)
    config = ModelRef(out).config
    assert config["quantization"] == {"format": 1, "bits": how.bits, "group_size": how.group_size, "kept": []}
    assert (out / config["data"]["folder"]).resolve() == Path("data/words").resolve()
    assert config["quantized_from"] == "weights/words" and config["model"] == ref.config["model"]
    assert json.loads((out / "receipt.json").read_text()) == receipt
    assert (out / "tokenizer.json").read_bytes() == (run.folder / "tokenizer.json").read_bytes()
    assert "measured on" in notes[0] and notes[1].endswith(KERNELS[0])


def test_a_model_without_a_tokenizer_has_no_bits_per_byte(run):
    ref = ModelRef(run.folder)
    folder = Path("weights") / "ids"
    folder.mkdir()
    write_model_folder(folder, ref.config, None, ref.weights()[1])
    receipt, _ = quantizer.quantize_model(ModelRef(folder), Path("weights/ids-int8"), INT8, device=CPU)
    assert receipt["before"]["bits_per_byte"] is None and receipt["after"]["bits_per_byte"] is None
    assert receipt["kl_divergence"] < 0.01
