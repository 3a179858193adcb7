import json
import re

import pytest
import torch

from nnx_cli import models
from nnx_cli.commands import summarize
from nnx_cli.planning.rates import GPUS

KEYS = {
    "model",
    "size",
    "parameters",
    "flops_per_token",
    "memory",
    "cache_bytes_per_token",
    "file_bytes",
    "fits",
    "tokens_per_s_by_data_sheet",
    "trains_in_gb",
}


def test_json_has_the_promised_keys(nnx):
    facts = json.loads(nnx("summarize", "--model", "nyx", "--size", "small", "--vram", "8GB", "--json").stdout)
    assert facts.keys() >= KEYS
    assert facts["parameters"].keys() == {"total", "trainable", "embedding", "active"}
    assert facts["parameters"]["total"] == 30_020_096 and facts["parameters"]["embedding"] == 256 * 512
    assert facts["flops_per_token"]["train"] == 3 * facts["flops_per_token"]["forward"]
    assert {"weights_bytes", "gradients_bytes", "optimizer_bytes", "activations_bytes", "peak_bytes"} <= facts[
        "memory"
    ].keys()
    assert facts["memory"]["weights_bytes"] == 4 * 30_020_096
    assert facts["file_bytes"].keys() == {"fp32", "bf16", "int8", "int4"}
    assert facts["fits"].keys() >= {
        "budget_bytes",
        "fits",
        "batch_size",
        "grad_accum",
        "activation_checkpointing",
        "predicted_peak_bytes",
    }
    assert facts["fits"]["budget_bytes"] == 7 * 2**30 and facts["fits"]["fits"] is True
    assert list(facts["trains_in_gb"]) == ["4", "6", "8", "12", "16", "24"]
    assert facts["cache_bytes_per_token"] == 8 * 2 * 64 * 4


@pytest.mark.parametrize(("size", "more"), [("tiny", []), ("base", ["--model", "llama"]), ("nano", ["--seq-len", 512])])
def test_it_says_how_far_an_hour_gets(nnx, size, more):
    words = ["summarize", "--size", size, *(more or ["--model", "nyx"])]
    speeds = json.loads(nnx(*words, "--json").stdout)["tokens_per_s_by_data_sheet"]
    assert speeds["RTX 3060"] < speeds["RTX 4090"] < speeds["H100"] and speeds.keys() == GPUS.keys()
    line = next(
        line for line in nnx(*words).stdout.splitlines() if line.startswith("million tokens that one GPU reads")
    )
    assert "measured on H100 and H200 alone" in line
    for gpu in summarize.SHOWN_GPUS:
        told = re.search(rf"{gpu} ([\d,.]+\d)", line)[1]
        assert float(told.replace(",", "")) == pytest.approx(3600 * speeds[gpu] / 1e6, rel=0.05)


def test_a_latent_is_all_that_is_cached_of_it(nnx):
    words = ["summarize", "--model", "n4", "--size", "nano", "--json"]
    plain, latent = (json.loads(nnx(*words, *more).stdout) for more in ([], ["--kv-latent-dim", 32]))
    assert latent["cache_bytes_per_token"] == 4 * (32 + 4) * 4 < plain["cache_bytes_per_token"]  # 4 gates beside it
    fewer = 4 * (2 * 128 * 128 - 32 * 128 - 2 * 32 * 128)  # keys and values of 4 layers, through 32 elements
    assert plain["parameters"]["total"] - latent["parameters"]["total"] == fewer


def test_the_zoo_stands_side_by_side(nnx):
    zoo = json.loads(nnx("summarize", "--all", "--size", "nano", "--vram", "1.2GB", "--json").stdout)
    assert [facts["model"] for facts in zoo] == models.names()
    shown = nnx("summarize", "--size", "nano")
    assert shown.exit_code == 0 and all(name in shown.stdout for name in models.names())


def test_a_run_has_its_own_shape(nnx, run):
    facts = json.loads(nnx("summarize", "words", "--json").stdout)
    assert facts["parameters"]["total"] == run.config["parameters"] and facts["seq_len"] == 32


def test_layers_with_tied_weights_counted_once(nnx):
    shown = nnx("summarize", "--model", "llama", "--size", "nano").stdout
    assert "820,352" in shown and "tied" in shown and "0 … 3" in shown


def test_it_says_when_training_does_not_fit(nnx):
    result = nnx("summarize", "--model", "llama", "--size", "xl", "--vram", "6GB")
    assert result.exit_code == 4 and "does not fit" in result.stderr and "--optimizer-in-backward" in result.stderr
    result = nnx("summarize", "--model", "llama", "--size", "xl", "--vram", "4GB")
    assert result.exit_code == 4 and "not even one sequence" in result.stderr and "smaller --size" in result.stderr
    result = nnx("summarize", "--model", "nyx", "--size", "base", "--vram", "8GB", "--batch-size", 640)
    assert result.exit_code == 4 and "take --batch-size" in result.stderr
    result = nnx("summarize", "--model", "llama", "--size", "xl", "--vram", "8GB", "--weight-precision", "fp32")
    assert result.exit_code == 4 and "leave out --weight-precision" in result.stderr


def test_a_named_batch_counts_in_every_line(nnx):
    words = ["summarize", "--model", "llama", "--size", "xl", "--batch-size"]
    many, one = (nnx(*words, n, "--vram", "8GB", "--seq-len", 2048) for n in (16, 1))
    assert "take a smaller" not in many.stderr and "take --batch-size" in many.stderr
    assert "16 sequences at once" in many.stdout and "1 sequence at once" in one.stdout
    assert gpus_of(many) < gpus_of(one)
    refused = nnx(*words, 16, "--vram", "7GB", "--seq-len", 4096)
    assert refused.exit_code == 4 and "not even one sequence does, which takes 6." in refused.stderr
    assert "take --batch-size 3 and add --optimizer-in-backward" in refused.stderr


def gpus_of(result):
    found = re.search(r"trains on GPUs with (.*) GB", result.stdout)
    return set(found[1].split(", ")) if found else set()


@pytest.mark.parametrize("size", ["nano", "small", "xl"])
def test_the_parts_of_memory_add_up(nnx, size):
    shown = nnx("summarize", "--model", "llama", "--size", size, "--batch-size", 4).stdout
    line = next(line for line in shown.splitlines() if line.startswith("training with"))
    amounts = [float(n) * UNITS[unit] for n, unit in re.findall(r"([\d.]+) ([KMG]iB)", line)]
    *parts, peak, _ = amounts
    assert len(parts) == 5 and sum(parts) == pytest.approx(peak, rel=0.02)


UNITS = {"KiB": 1 / 2**20, "MiB": 1 / 2**10, "GiB": 1}


def test_a_cap_within_what_is_kept_free_is_refused_as_such(nnx, refused, text_file):
    words = "1 GiB is kept for the driver and the screen"
    for vram in ("500MB", "1GB", "900KB", "0.75GiB"):
        refused(4, words, "summarize", "--model", "llama", "--size", "nano", "--vram", vram)
    for vram in ("1GB", "900KB"):
        refused(4, words, "train", "--filepath", text_file, "--size", "nano", "--max-steps", 1, "--vram", vram)
    assert nnx("summarize", "--all", "--size", "nano", "--vram", "500MB").exit_code == 0


def test_what_is_kept_free_is_said(nnx, refused, text_file):
    shown = nnx("summarize", "--model", "llama", "--size", "nano", "--vram", "8GB").stdout
    assert "fits in 7.00 GiB (--vram 8.00 GiB less 1 GiB for the driver and the screen)" in shown
    refused(
        4, "less 1 GiB for", "train", "--filepath", text_file, "--size", "nano", "--max-steps", 1, "--vram", "1.001GB"
    )
    assert "--vram" not in nnx("summarize", "--model", "llama", "--size", "nano").stdout


def test_trained_parameters_of_adapters_are_said(nnx):
    words = ["summarize", "--model", "llama", "--size", "nano", "--lora-rank", 8]
    trained = json.loads(nnx(*words, "--json").stdout)["parameters"]["trainable"]
    assert f"; {trained:,} of them are trained" in nnx(*words).stdout


def fits(nnx, *words):
    return json.loads(nnx("summarize", "--model", "llama", *words, "--json").stdout)


def test_what_is_given_up_is_said(nnx):
    shown = nnx("summarize", "--model", "llama", "--size", "xl", "--vram", "8GB")
    assert shown.exit_code == 0 and "all blocks run again" in shown.stdout and "in bf16" in shown.stdout
    found = fits(nnx, "--size", "xl", "--vram", "8GB")["fits"]
    assert found["activation_checkpointing"] == "on" and found["optimizer"] == "adamw8bit" and found["fits"]
    assert found["weight_precision"] == "bf16" and len(found["gives_up"]) == 3
    roomy = fits(nnx, "--size", "xl", "--vram", "80GB")["fits"]
    assert roomy["activation_checkpointing"] == "off" and not roomy["gives_up"]


def test_memory_follows_the_settings(nnx):
    plain = fits(nnx, "--size", "nano", "--batch-size", 8)["memory"]
    assert plain["peak_bytes"] == max(plain["phases"].values())

    def memory(*words):
        return fits(nnx, "--size", "nano", "--batch-size", 8, *words)["memory"]

    assert memory("--activation-checkpointing", "on")["activations_bytes"] < plain["activations_bytes"] / 3
    assert memory("--precision", "fp32")["activations_bytes"] > plain["activations_bytes"]
    assert memory("--seq-len", 512)["activations_bytes"] > 1.8 * plain["activations_bytes"]
    assert memory("--weight-precision", "bf16")["weights_bytes"] < 0.55 * plain["weights_bytes"]
    adamw = memory("--optimizer", "adamw")["optimizer_bytes"]
    assert memory("--optimizer", "lion")["optimizer_bytes"] < 0.55 * adamw
    assert memory("--optimizer-in-backward")["gradients_bytes"] == 0
    assert memory("--lora-rank", 4)["optimizer_bytes"] < 0.2 * plain["optimizer_bytes"]


def test_auto_is_the_optimizer_that_training_would_take(nnx):
    def optimizer(*words):
        return fits(nnx, "--size", "nano", "--vram", "8GB", *words)["fits"]["optimizer"]

    assert optimizer() == models.recipe("llama").optimizer
    assert optimizer("--lora-rank", 4) == "adamw"
    assert optimizer("--optimizer", "wolf") == "wolf"


@pytest.mark.parametrize(
    ("code", "message", "words"),
    [
        (2, "did you mean llama?", ["--model", "lama"]),
        (2, "nyx has no option --rope-theta; it belongs to", ["--model", "nyx", "--rope-theta", 5]),
        (2, "no amount of memory", ["--vram", "8 apples"]),
        (2, "no size 'enormous'", ["--model", "nyx", "--size", "enormous"]),
        (2, "--precision has no choice", ["--precision", "fp12"]),
        (2, "--optimizer has no choice", ["--optimizer", "sgd"]),
        (2, "--activation-checkpointing has no choice", ["--activation-checkpointing", "most"]),
        (2, "--lora-rank is 0", ["--lora-rank", 0]),
        (2, "--lora-rank 9999 is no low rank", ["--model", "nyx", "--size", "nano", "--lora-rank", 9999]),
        (5, "there is no run or model", ["nobody"]),
    ],
)
def test_what_cannot_be_summarized(refused, code, message, words):
    refused(code, message, "summarize", *words)


def test_memory_of_each_of_several_gpus(nnx):
    words = ("summarize", "--model", "llama", "--size", "base", "--vram", "24GB", "--gpus", 4)
    both = json.loads(nnx(*words, "--json").stdout)
    assert (both["gpus"], both["parallel"]) == (4, "ddp") and list(both["per_gpu"]) == ["ddp", "fsdp"]
    ddp, fsdp = (both["per_gpu"][kind]["memory"] for kind in ("ddp", "fsdp"))
    assert both["memory"].items() >= ddp.items() and both["fits"] == both["per_gpu"]["ddp"]["fits"]
    assert fsdp["weights_bytes"] == pytest.approx(ddp["weights_bytes"] / 4, rel=0.01)
    assert ddp["gathered_bytes"] == 0 < fsdp["gathered_bytes"] and ddp["buckets_bytes"] > 0
    assert both["fits"]["batch_size"] == 8, "a fourth of the rows of a step"
    shown = nnx(*words).stdout
    assert "ddp, on each GPU with 8 x 1024" in shown and "gathered blocks" in shown and "auto is ddp" in shown
    one = json.loads(nnx(*words, "--parallel", "fsdp", "--json").stdout)
    assert one["parallel"] == "fsdp" and list(one["per_gpu"]) == ["fsdp"] and one["memory"].items() >= fsdp.items()


def test_all_gpus_are_those_that_are_here(nnx, refused, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    refused(7, "--gpus all: there is no GPU here", "summarize", "--gpus", "all")
    monkeypatch.setattr(summarize, "how_many", lambda gpus, device: 3)
    shown = nnx("summarize", "--model", "llama", "--size", "nano", "--gpus", "all", "--json").stdout
    assert json.loads(shown)["gpus"] == 3


def test_a_model_too_large_for_a_gpu_is_divided(nnx, refused):
    words = ("summarize", "--model", "llama", "--size", "xl", "--vram", "8GB", "--gpus", 8)
    found = json.loads(nnx(*words, "--json").stdout)
    assert found["parallel"] == "fsdp" and found["fits"]["optimizer"] == "muon" and not found["fits"]["gives_up"]
    assert json.loads(nnx("summarize", "--gpus", 2, "--size", "nano", "--all", "--json").stdout)[0]["gpus"] == 2
    refused(2, "--parallel does nothing on one GPU", "summarize", "--parallel", "ddp")
    refused(2, "--gpus is 0", "summarize", "--gpus", 0)
    refused(2, "--gpus is 'many'; it must be a number of GPUs, or all", "summarize", "--gpus", "many")
    refused(2, "--parallel has no choice 'dpp'; did you mean ddp?", "summarize", "--gpus", 2, "--parallel", "dpp")
