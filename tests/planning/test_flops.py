import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from nnx_cli import models
from nnx_cli.planning import flops
from nnx_cli.planning.flops import (
    FlopCounter,
    count_flops,
    count_parameters,
    file_bytes,
    flops_per_token,
    meta_model,
    over_blocks,
    sampling_bytes,
)

SHAPES = [
    dict(vocab_size=256, dim=512, n_layers=8, n_heads=8, head_dim=64, ffn_dim=2048, seq_len=1024),
    dict(vocab_size=50257, dim=512, n_layers=8, n_heads=8, head_dim=64, ffn_dim=2048, seq_len=256),
    dict(vocab_size=1000, dim=128, n_layers=2, n_heads=4, head_dim=32, ffn_dim=256, seq_len=64),
    dict(vocab_size=97, dim=64, n_layers=3, n_heads=5, head_dim=16, ffn_dim=96, seq_len=32, qk_norm=True),
]


def nyx(shape):
    return meta_model("nyx", models.make_config("nyx", **shape))


@pytest.mark.parametrize("shape", SHAPES)
def test_parameters_of_nyx_follow_the_formula(shape):
    V, D, L, H, dh, F = (shape[k] for k in ("vocab_size", "dim", "n_layers", "n_heads", "head_dim", "ffn_dim"))
    norms = 2 * dh * L if shape.get("qk_norm") else 0
    total = V * D + D + L * (D + D * (H * dh + 2 * dh + 2 * F) + H * dh * D + F * D) + norms
    assert count_parameters(nyx(shape)) == {"total": total, "trainable": total, "embedding": V * D, "active": total}


@pytest.mark.parametrize(("shape", "published"), [*zip(SHAPES[:3], (30_020_096, 55_620_608, 406_912), strict=True)])
def test_parameters_of_nyx_as_measured_in_the_original(shape, published):
    assert count_parameters(nyx(shape))["total"] == published


@pytest.mark.parametrize("shape", SHAPES)
def test_operations_of_nyx_follow_the_formula(shape):
    V, D, L, H, dh, F = (shape[k] for k in ("vocab_size", "dim", "n_layers", "n_heads", "head_dim", "ffn_dim"))
    T = shape["seq_len"]
    matrices = L * (D * (H * dh + 2 * dh + 2 * F) + H * dh * D + F * D) + V * D
    forward = 2 * matrices + 4 * L * H * dh * (T / 2)
    assert flops_per_token(nyx(shape)) == {"forward": forward, "train": 3 * forward}


def test_operations_of_llama():
    shape = dict(vocab_size=256, dim=128, n_layers=2, n_heads=8, n_kv_heads=2, ffn_dim=320, seq_len=64)
    model = meta_model("llama", models.make_config("llama", **shape))
    matrices = 2 * (128 * (128 + 2 * 32) + 128 * 128 + 3 * 128 * 320) + 256 * 128
    assert flops_per_token(model)["forward"] == 2 * matrices + 4 * 2 * 128 * 32
    assert flops_per_token(model, seq_len=16)["forward"] == 2 * matrices + 4 * 2 * 128 * 8


def test_a_shape_is_counted_once(monkeypatch):
    config = models.make_config("llama", dim=48, n_layers=1, n_heads=2, seq_len=16)
    counted = flops_per_token(meta_model("llama", config))["train"]
    assert flops.training_flops("llama", config) == counted
    monkeypatch.setattr(flops, "meta_model", None)
    assert flops.training_flops("llama", replace(config)) == counted


def test_tied_and_frozen_parameters():
    tied, untied = (
        meta_model("llama", models.make_config("llama", dim=64, n_layers=1, n_heads=2, tie_embeddings=tie))
        for tie in (True, False)
    )
    assert count_parameters(untied)["total"] - count_parameters(tied)["total"] == 256 * 64
    tied.embedding.weight.requires_grad_(False)
    counted = count_parameters(tied)
    assert counted["total"] - counted["trainable"] == 256 * 64


FORWARD = {  # FLOPs a token of sizes nano, small and xl
    "llama": (1_900_544, 67_174_400, 2_098_200_576),
    "n4": (1_773_568, 67_251_200, 2_099_511_296),
    "neon": (2_375_680, 89_260_032, 2_320_760_832),
    "ngpt": (1_884_160, 67_665_920, 2_092_957_696),
    "nyx": (1_835_008, 68_419_584, 2_086_666_240),
    "tape": (2_342_912, 82_165_760, 2_398_224_384),
}


@pytest.mark.parametrize("name", FORWARD)
def test_operations_are_those_recorded(name):
    sizes = [meta_model(name, models.make_config(name, size=size)) for size in ("nano", "small", "xl")]
    assert tuple(flops_per_token(model)["forward"] for model in sizes) == FORWARD[name]


@pytest.mark.parametrize("name", models.names())
def test_blocks_that_are_alike_are_counted_once(name, tiny):
    model = tiny(name, n_layers=5).to("meta")

    def measure():
        with FlopCounter() as counter:
            model(torch.zeros(1, 32, dtype=torch.int64, device="meta"))
        return counter.flops

    assert over_blocks(model, measure) == measure() == count_flops(model)


def test_matmuls_are_counted_and_attention_by_half():
    q, kv = torch.empty(2, 8, 5, 16, device="meta"), torch.empty(2, 2, 5, 16, device="meta")
    with FlopCounter() as counter, torch.no_grad():
        nn.Linear(8, 5, bias=False, device="meta")(torch.empty(3, 8, device="meta"))
        nn.Linear(8, 7, device="meta")(torch.empty(3, 8, device="meta"))
        torch.bmm(torch.empty(2, 3, 4), torch.zeros(2, 4, 6))
        matmuls = counter.flops
        F.scaled_dot_product_attention(q, kv, kv, enable_gqa=True)
    assert matmuls == 2 * 3 * 8 * (5 + 7) + 2 * 2 * 3 * 4 * 6
    assert counter.flops - matmuls == 2 * 2 * 8 * 5 * 5 * (16 + 16) // 2


def test_operators_of_ours_count_as_what_they_compute():
    x, weight = torch.empty(32, 512, device="meta"), torch.empty(256, 512, device="meta")
    q = torch.empty(2, 40, 4, 16, device="meta")
    with FlopCounter() as counter:
        torch.ops.nnx.linear(x, weight)
        linear = counter.flops
        torch.ops.nnx.attention_with_lse(q, q, q)
    assert linear == 2 * 32 * 512 * 256
    assert counter.flops - linear == 2 * 4 * 40 * 40 * (16 + 16)


def test_a_token_uses_one_function_of_a_bank():
    config = models.make_config("neon", size="nano", decoder="function", n_global_functions=7, n_layer_functions=3)
    counted = count_parameters(meta_model("neon", config))
    idle = config.n_layers * (3 - 1) + (7 - config.n_layers)
    assert counted["total"] - counted["active"] == idle * config.dim**2
    regular = count_parameters(meta_model("neon", models.make_config("neon", size="nano")))
    assert regular["active"] == regular["total"]


def test_cache_of_nyx_is_two_heads_a_layer():
    weights, per_token = sampling_bytes(nyx(SHAPES[0]), "bf16")
    assert per_token == 2 * 64 * 8 * 2
    assert weights == 4 * 30_020_096
    assert sampling_bytes(nyx(SHAPES[0]), "fp32")[1] == 2 * per_token


@pytest.mark.parametrize("name", models.names())
@torch.no_grad()
def test_bytes_of_a_cache_are_those_of_a_real_one(tiny, name):
    per_token = sampling_bytes(tiny(name).to("meta"))[1]
    assert tiny(name).make_cache(3, 20).n_bytes == pytest.approx(60 * per_token, rel=0.5)


def test_files():
    sizes = file_bytes(nyx(SHAPES[2]))
    assert sizes["fp32"] == 4 * 406_912 and sizes["bf16"] == 2 * 406_912
    rows = 1000 + 2 * ((4 * 32 + 2 * 32 + 2 * 256) + 128 + 128)
    matrices = 406_912 - 3 * 128
    assert sizes["int8"] == 2 * 3 * 128 + matrices + 2 * rows
    assert sizes["int4"] == 2 * 3 * 128 + matrices // 2 + matrices // 32 * 2


def test_weights_that_are_nowhere_are_not_drawn_and_others_are():
    """While a model is made without memory, a function of a user's bank is made with it."""
    state = torch.get_rng_state()
    with torch.device("meta"), flops._Undrawn():
        nn.Linear(3, 4)
        assert torch.equal(torch.get_rng_state(), state)
        for make in (lambda: nn.Embedding(9, 5), lambda: nn.Linear(3, 5, bias=False)):
            with torch.device("cpu"):
                drawn = make().weight
            assert drawn.isfinite().all() and 0 < drawn.std() < 2
        weight = torch.full((64,), math.nan, device="cpu")
        assert nn.init.normal_(weight).isfinite().all() and weight.uniform_().max() <= 1
