"""Llama against numbers recorded from another implementation (see llama.parity.json for how they were made)."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from nnx_cli import models
from nnx_cli.errors import UsageError
from nnx_cli.layers.loss import LossModule

FOLDER = Path(__file__).parent
CASES = json.loads((FOLDER / "llama.parity.json").read_text())["cases"]
TENSORS = load_file(FOLDER / "llama.parity.safetensors")


def cut(prefix):
    return {key.removeprefix(prefix): value for key, value in TENSORS.items() if key.startswith(prefix)}


def packed(theirs, n_layers):
    """Tensors under our names, query, key and value in one matrix, gate and up in another."""
    ours = {"embedding.weight": theirs["model.embed_tokens.weight"], "norm.weight": theirs["model.norm.weight"]}
    if "lm_head.weight" in theirs:
        ours["head.weight"] = theirs["lm_head.weight"]
    for i in range(n_layers):
        block, layer = f"blocks.{i}.", f"model.layers.{i}."
        attention, mlp = layer + "self_attn.", layer + "mlp."
        ours[block + "attention_norm.weight"] = theirs[layer + "input_layernorm.weight"]
        ours[block + "mlp_norm.weight"] = theirs[layer + "post_attention_layernorm.weight"]
        ours[block + "attention.qkv.weight"] = torch.cat([theirs[f"{attention}{x}_proj.weight"] for x in "qkv"])
        ours[block + "attention.out.weight"] = theirs[attention + "o_proj.weight"]
        ours[block + "mlp.gate_up.weight"] = torch.cat([theirs[f"{mlp}{x}_proj.weight"] for x in ("gate", "up")])
        ours[block + "mlp.down.weight"] = theirs[mlp + "down_proj.weight"]
    return ours


def build(case):
    config = CASES[case]["config"]
    assert config["rms_norm_eps"] == 1e-5
    model = models.build(
        "llama",
        vocab_size=config["vocab_size"],
        dim=config["hidden_size"],
        n_layers=config["num_hidden_layers"],
        n_heads=config["num_attention_heads"],
        n_kv_heads=config["num_key_value_heads"],
        ffn_dim=config["intermediate_size"],
        rope_theta=config["rope_theta"],
        tie_embeddings=config["tie_word_embeddings"],
        seq_len=config["max_position_embeddings"],
    )
    weights = packed(cut(f"{case}.weights."), model.config.n_layers)
    own = model.state_without_ties()
    assert own.keys() == weights.keys()
    for name, tensor in own.items():
        tensor.copy_(weights[name])
    return model


@pytest.mark.parametrize("case", CASES)
def test_equals_the_other_implementation(case):
    model = build(case)
    ids = TENSORS[f"{case}.input_ids"]
    assert (model(ids) - TENSORS[f"{case}.logits"]).abs().max() < 1e-5
    loss, count = LossModule(model)(ids[:, :-1], ids[:, 1:])
    loss = loss / count
    assert loss.item() == pytest.approx(CASES[case]["loss"], abs=1e-5)
    loss.backward()
    grads = packed(cut(f"{case}.grads."), model.config.n_layers)
    for name, parameter in model.named_parameters():
        wanted = grads[name]
        assert (parameter.grad - wanted).abs().max() <= 1e-5 + 1e-3 * wanted.abs().max(), name


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_cached_decoding_equals_the_other_implementation(case):
    model = build(case)
    ids = TENSORS[f"{case}.input_ids"]
    cache = model.make_cache(len(ids), ids.shape[1])
    logits = [model(ids[:, :4], cache=cache)] + [model(ids[:, t, None], cache=cache) for t in range(4, ids.shape[1])]
    assert (torch.cat(logits, dim=1) - TENSORS[f"{case}.logits"]).abs().max() < 1e-5


def test_tied_weights_are_one_tensor():
    tied, untied = build("tied"), build("untied")
    assert tied.head.weight is tied.embedding.weight and "head.weight" not in tied.state_without_ties()
    assert untied.head.weight is not untied.embedding.weight and "head.weight" in untied.state_without_ties()


def test_key_value_heads_follow_from_the_heads():
    assert models.make_config("llama", n_heads=8, dim=256).n_kv_heads == 4
    assert models.make_config("llama", n_heads=3, dim=48).n_kv_heads == 3
    assert models.make_config("llama", dim=96, n_heads=2).ffn_dim == 288


@pytest.mark.parametrize(
    "bad",
    [{"n_kv_heads": 3}, {"n_kv_heads": 0}, {"n_kv_heads": 16}, {"ffn_dim": 0}, {"rope_theta": 0.0}, {"dim": 100}],
    ids=str,
)
def test_shapes_that_do_not_fit_are_refused(bad):
    with pytest.raises(UsageError, match=next(iter(bad)).replace("_", "-")):
        models.make_config("llama", **({"dim": 128, "n_heads": 8} | bad))
