import json

import pytest

from nnx_cli import models

KEYS = {"model", "size", "parameters", "flops_per_token", "memory", "cache_bytes_per_token", "file_bytes", "fits",
        "trains_in_gb"}  # fmt: skip


def test_json_has_the_promised_keys(nnx):
    facts = json.loads(nnx("summarize", "--model", "nyx", "--size", "small", "--vram", "8GB", "--json").stdout)
    assert KEYS <= facts.keys()
    assert facts["parameters"].keys() == {"total", "trainable", "embedding", "active"}
    assert facts["parameters"]["total"] == 30_020_096 and facts["parameters"]["embedding"] == 256 * 512
    assert facts["flops_per_token"]["train"] == 3 * facts["flops_per_token"]["forward"]
    assert {"weights_bytes", "gradients_bytes", "optimizer_bytes", "activations_bytes", "peak_bytes"} <= facts[
        "memory"
    ].keys()
    assert facts["memory"]["weights_bytes"] == 4 * 30_020_096
    assert facts["file_bytes"].keys() == {"fp32", "bf16", "int8", "int4"}
    assert facts["fits"].keys() >= {
        "budget_bytes", "fits", "batch_size", "grad_accum", "activation_checkpointing", "predicted_peak_bytes",
    }  # fmt: skip
    assert facts["fits"]["budget_bytes"] == 7 * 2**30 and facts["fits"]["fits"] is True
    assert list(facts["trains_in_gb"]) == ["4", "6", "8", "12", "16", "24"]
    assert facts["cache_bytes_per_token"] == 8 * 2 * 64 * 4


def test_the_zoo_stands_side_by_side(nnx):
    zoo = json.loads(nnx("summarize", "--size", "nano", "--json").stdout)
    assert [facts["model"] for facts in zoo] == models.names()
    assert json.loads(nnx("summarize", "--all", "--size", "nano", "--vram", "1.2GB", "--json").stdout)
    shown = nnx("summarize")
    assert shown.exit_code == 0 and all(name in shown.stdout for name in models.names())


def test_a_run_has_its_own_shape(nnx, run):
    facts = json.loads(nnx("summarize", "words", "--json").stdout)
    assert facts["parameters"]["total"] == run.config["parameters"] and facts["seq_len"] == 32


def test_layers_with_tied_weights_counted_once(nnx):
    shown = nnx("summarize", "--model", "llama", "--size", "nano").stdout
    assert "820,352" in shown and "tied" in shown and "0 … 3" in shown


def test_it_says_when_training_does_not_fit(nnx):
    result = nnx("summarize", "--model", "llama", "--size", "xl", "--vram", "8GB")
    assert result.exit_code == 4 and "does not fit" in result.stderr
    result = nnx("summarize", "--model", "nyx", "--size", "base", "--vram", "8GB", "--batch-size", 64)
    assert result.exit_code == 4 and "--batch-size" in result.stderr


@pytest.mark.parametrize(
    ("code", "message", "words"),
    [
        (2, "did you mean llama?", ["--model", "lama"]),
        (2, "nyx has no option --rope-theta; it belongs to", ["--model", "nyx", "--rope-theta", 5]),
        (2, "no amount of memory", ["--vram", "8 apples"]),
        (2, "no size 'enormous'", ["--model", "nyx", "--size", "enormous"]),
        (2, "--precision has no choice", ["--precision", "fp12"]),
        (5, "there is no run or model", ["nobody"]),
    ],
)
def test_what_cannot_be_summarized(refused, code, message, words):
    refused(code, message, "summarize", *words)
