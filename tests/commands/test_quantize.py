import json
import shutil
from pathlib import Path

import pytest

from nnx_cli.runs.load import ModelRef

SIDE = {"file_bytes", "bits_per_byte", "decode_tokens_per_s"}


@pytest.mark.parametrize("bits", [8, 4])
def test_receipt_and_model(run, nnx, bits):
    result = nnx("quantize", "words", "--bits", bits, "--max-drop", "0.5", "--json")
    assert result.exit_code == 0, result.stderr
    receipt = json.loads(result.stdout)
    out = Path("weights") / f"words-int{bits}"
    assert receipt.keys() == {"bits", "out", "before", "after", "kl_divergence", "same_top_token", "kept", "kernel"}
    assert receipt["before"].keys() == receipt["after"].keys() == SIDE
    assert (receipt["bits"], receipt["out"], receipt["kept"]) == (bits, str(out), [])
    assert receipt["after"]["file_bytes"] == (out / "model.safetensors").stat().st_size
    assert receipt["after"]["file_bytes"] < receipt["before"]["file_bytes"] / 2
    assert receipt["after"]["bits_per_byte"] == pytest.approx(receipt["before"]["bits_per_byte"], rel=0.05)
    assert 0 <= receipt["kl_divergence"] < 0.1 and 0.8 < receipt["same_top_token"] <= 1
    assert receipt["before"]["decode_tokens_per_s"] > 0 and receipt["after"]["decode_tokens_per_s"] > 0

    sampled = nnx("sample", out, "--prompt", "the cat", "--max-new-tokens", 8)
    assert sampled.exit_code == 0 and sampled.stdout.startswith("the cat")
    evaluated = nnx("eval", out.name, "--json")
    assert evaluated.exit_code == 0, evaluated.stderr
    assert json.loads(evaluated.stdout)["bits_per_byte"] == pytest.approx(receipt["after"]["bits_per_byte"], rel=0.05)


def test_newest_run_and_words(run, nnx):
    result = nnx("quantize")
    assert result.exit_code == 0, result.stderr
    assert "bits per byte" in result.stdout and "nnx sample weights/words-int8" in result.stdout.replace("\\", "/")
    assert "measured on" in result.stderr and "matmuls on this machine" in result.stderr


def test_keep_and_group_size(run, nnx):
    words = (
        "quantize",
        "words",
        "--bits",
        4,
        "--group-size",
        8,
        "--keep",
        "head",
        "--keep",
        "blocks.0",
        "--out",
        "small",
    )
    result = nnx(*words, "--max-drop", 1, "--json")
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout)["kept"] == ["head", "blocks.0"]
    ref = ModelRef(Path("small"))
    assert ref.config["quantization"] == {"format": 1, "bits": 4, "group_size": 8, "kept": ["head", "blocks.0"]}
    state = ref.weights()[1]
    assert "embedding.scale" not in state and "blocks.0.in_proj.scale" not in state
    assert state["blocks.1.in_proj.scale"].shape[1] == 32 // 8


def test_text_of_ones_own(run, nnx, text_file):
    shutil.rmtree("data")
    result = nnx("quantize", "words", "--filepath", text_file, "--json")
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout)["after"]["bits_per_byte"] > 0


def test_text_of_ones_own_in_another_encoding(run, nnx, workspace):
    (workspace / "ru.txt").write_bytes(("Жила-была кошка у реки.\n" * 40).encode("cp1251"))
    result = nnx("quantize", "words", "--filepath", "ru.txt", "--max-drop", 9)
    assert result.exit_code == 0 and "ru.txt: read as cp1251" in result.stderr
    (workspace / "e.txt").write_bytes(("Une rivière.\n" * 40).encode("cp037"))
    result = nnx("quantize", "words", "--filepath", "e.txt", "--encoding", "cp037", "--max-drop", 9, "--out", "b")
    assert result.exit_code == 0, result.stderr


def test_data_that_is_gone(run, refused):
    shutil.rmtree("data")
    result = refused(3, "is gone", "quantize", "words")
    assert "--filepath" in result.stderr


@pytest.mark.parametrize(
    "message, options",
    [
        ("--bits", ["--bits", 5]),
        ("--group-size", ["--bits", 4, "--group-size", 0]),
        ("--max-drop", ["--max-drop", "nan"]),
        ("--max-drop", ["--max-drop", -1]),
        ("--keep nowhere", ["--keep", "nowhere"]),
    ],
)
def test_usage(run, refused, message, options):
    refused(2, message, "quantize", "words", *options)


def test_unknown_layer_names_some(run, refused):
    result = refused(2, "did you mean blocks.0.ffn_out?", "quantize", "words", "--keep", "blocks.0.ffn")
    assert "embedding, blocks.0.in_proj" in result.stderr


def test_quantized_twice(run, nnx, refused):
    assert nnx("quantize", "words").exit_code == 0
    refused(2, "is quantized already", "quantize", "words-int8")
    refused(8, "exists already", "quantize", "words")


def test_no_such_model(refused):
    refused(5, "no run or model", "quantize", "nobody")


def test_worse_than_allowed_leaves_nothing(run, refused):
    words = ("--bits", 4, "--group-size", 4096, "--max-drop", 0, "--out", "new/deep/small")
    refused(6, "bits per byte", "quantize", "words", *words)
