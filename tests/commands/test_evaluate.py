import json
import math
import random
from pathlib import Path

import pytest

from nnx_cli import models
from nnx_cli.commands import _depth
from nnx_cli.evaluation import memorised


def test_json_over_the_whole_validation_split(nnx, run, tokens):
    product = json.loads(nnx("eval", "words", "--json").stdout)
    assert list(product) == [
        "model",
        "loss",
        "perplexity",
        "bits_per_byte",
        "bits_per_byte_stderr",
        "tokens",
        "text_bytes",
        "tokens_per_s",
        "top1_accuracy",
        "top5_accuracy",
        "stderr_over",
    ]
    assert 0 < product["top1_accuracy"] < product["top5_accuracy"] < 1 and product["stderr_over"] == "windows"
    assert product["tokens"] == product["text_bytes"] == len(tokens.val) - 1
    assert product["bits_per_byte"] == pytest.approx(product["loss"] / math.log(2))
    assert product["perplexity"] == pytest.approx(math.exp(product["loss"]))
    assert 0 < product["bits_per_byte_stderr"] < product["bits_per_byte"]


def test_a_file_is_read_with_the_tokenizer_of_the_run(nnx, run, workspace):
    (workspace / "other.txt").write_text("über 小猫\n" * 30, encoding="utf-8")
    product = json.loads(nnx("eval", "--filepath", "other.txt", "--json").stdout)
    assert product["text_bytes"] == len("über 小猫\n".encode()) * 30 - 1
    assert "bits per byte" in nnx("eval", "--filepath", "other.txt").stdout


def test_text_in_any_encoding_and_said(nnx, run, workspace):
    text = "Жила-была кошка, и жила она у реки.\n"
    wanted = len(text.encode()) * 30 - 1
    for encoding, options in (("cp1251", []), ("utf-16", []), ("koi8-r", []), ("cp500", ["--encoding", "cp500"])):
        text = text if encoding != "cp500" else "Une rivière, là-bas.\n"
        (workspace / "other.txt").write_bytes((text * 30).encode(encoding))
        result = nnx("eval", "--filepath", "other.txt", *options)
        assert result.exit_code == 0 and ("read as" in result.stderr) is (encoding in ("cp1251", "koi8-r"))
        tokens = json.loads(nnx("eval", "--filepath", "other.txt", *options, "--json").stdout)["tokens"]
        assert tokens == (wanted if encoding != "cp500" else len(text.encode()) * 30 - 1)


@pytest.mark.parametrize("words", [[], ["--filepath", "other.txt"]], ids=str)
def test_it_says_beforehand_what_it_does_and_how_long(nnx, run, workspace, words):
    (workspace / "other.txt").write_text("a cat and a dog\n" * 30)
    shown = nnx("eval", *words)
    tokens = json.loads(nnx("eval", *words, "--json").stdout)["tokens"]
    source = "other.txt" if words else "the validation split"
    assert f"measuring {tokens:,} tokens of {source}: about 1 s" in shown.stderr
    assert nnx("eval", *words, "--quiet").stderr == ""


def test_batches_do_not_matter(nnx, run):
    losses = [json.loads(nnx("eval", "--batch-size", n, "--json").stdout)["loss"] for n in (1, 7)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-6)


def test_what_cannot_be_evaluated(refused, run, workspace):
    refused(5, "there is no run or model 'nobody'", "eval", "nobody")
    refused(3, "there is no nothing.txt", "eval", "--filepath", "nothing.txt")
    (workspace / "empty.txt").touch()
    refused(3, "no text in empty.txt", "eval", "--filepath", "empty.txt")
    refused(2, "--batch-size is 0", "eval", "--batch-size", 0)
    (workspace / "data" / "words").rename(workspace / "data" / "moved")
    refused(3, "is gone", "eval")


def test_errors_are_taken_over_documents_where_there_are_ten(nnx, run, workspace):
    rows = [json.dumps({"text": f"the cat sees dog {n} and a tree " * (1 + n % 7)}) for n in range(30)]
    (workspace / "rows.jsonl").write_text("\n".join(rows), encoding="utf-8")
    product = json.loads(nnx("eval", "--filepath", "rows.jsonl", "--json").stdout)
    (workspace / "text.txt").write_text("\n".join(json.loads(row)["text"] for row in rows), encoding="utf-8")
    whole = json.loads(nnx("eval", "--filepath", "text.txt", "--json").stdout)
    assert (product["stderr_over"], whole["stderr_over"]) == ("documents", "windows")
    assert product["bits_per_byte"] == whole["bits_per_byte"]
    assert product["bits_per_byte_stderr"] != whole["bits_per_byte_stderr"]
    assert "error over 30 documents" in nnx("eval", "--filepath", "rows.jsonl").stdout


def test_loss_by_position(nnx, run, tokens):
    product = json.loads(nnx("eval", "--by-position", "--json").stdout)
    assert [position for position, _ in product["by_position"]] == list(range(1, 33))
    assert product["context_used"] is None
    shown = nnx("eval", "--by-position").stdout
    assert "17 to 32" in shown and "a context of 32 tokens has no positions far beyond 64" in shown
    plain = json.loads(nnx("eval", "--json").stdout)
    assert {key: product[key] for key in plain if key != "tokens_per_s"} == {
        key: plain[key] for key in plain if key != "tokens_per_s"
    }


def test_a_context_that_a_run_does_not_use_is_told_with_a_command(nnx, workspace):
    """Independent draws: nothing that stands before a letter says anything of it."""
    (workspace / "dice.txt").write_text("".join(random.Random(0).choices("abcdef", k=60_000)))
    shape = ["--dim", 32, "--n-layers", 1, "--n-heads", 2, "--seq-len", 128, "--compile", "off"]
    length = ["--max-steps", 60, "--sample-every", 0, "--out", "weights/dice"]
    assert nnx("train", "--filepath", "dice.txt", *shape, *length).exit_code == 0
    shown = nnx("eval", "weights/dice", "--by-position").stdout
    assert "context beyond position 64 brings it nothing: loss 1." in shown
    assert "\n  nnx " in shown and "--seq-len 64" in shown


def test_loss_beyond_the_trained_length(nnx, run):
    product = json.loads(nnx("eval", "--context", "4x,1.5x", "--json").stdout)
    assert list(product["context"]) == ["1x", "4x", "1.5x"] and all(product["context"].values())
    assert list(product["context_from_1x"]) == ["4x", "1.5x"]
    again = json.loads(nnx("eval", "--context", "4X", "--json").stdout)
    assert again["context"] == {name: product["context"][name] for name in ("1x", "4x")}, "the same targets"
    assert "from 1x" in nnx("eval", "--context", "2").stdout


PLACES = "        self.places = nn.Embedding(config.seq_len, config.dim)\n        self.blocks ="
LEARNED = {  # three ways to have a position for every token of the trained length, and none beyond it
    "IndexError": "x = x + self.places(torch.arange(first, first + x.shape[1], device=x.device))",
    "RuntimeError": "x = x + self.places.weight[first : first + x.shape[1]]",
    "AssertionError": "assert first + x.shape[1] <= config.seq_len, 'too long'",
}


@pytest.mark.parametrize(("error", "line"), LEARNED.items())
def test_a_model_with_learned_positions_says_so(nnx, workspace, text_file, error, line):
    source = (
        (models.FOLDER / "llama.py")
        .read_text(encoding="utf-8")
        .replace("from torch import", "import torch\nfrom torch import")
    )
    source = source.replace("        self.blocks =", PLACES, 1)
    first = "        first = 0 if cache is None else int(cache.lengths[0])\n"
    loop = "        for block in self.blocks:\n"
    source = source.replace(loop, f"{first}        {line}\n{loop}", 1)
    Path("mine.py").write_text(source, encoding="utf-8")
    shape = ["--dim", 32, "--n-layers", 1, "--n-heads", 2, "--seq-len", 32, "--max-steps", 1, "--batch-size", 2]
    assert nnx("train", "--model", "mine.py", "--filepath", text_file, *shape, "--out", "weights/m").exit_code == 0
    done = nnx("eval", "m", "--model", "mine.py", "--context", "2x,4x", "--json")
    assert done.exit_code == 0
    product = json.loads(done.stdout)
    assert product["context"] == {"1x": pytest.approx(product["loss"], rel=0.2), "2x": None, "4x": None}
    said = nnx("eval", "m", "--model", "mine.py", "--context", "2x,4x").stderr
    assert f"mine cannot read 2x its context of 32 tokens: {error}" in said


def test_copies_of_the_training_text(nnx, run, tokens, monkeypatch):
    monkeypatch.setattr(_depth, "N_SAMPLES", 2)
    monkeypatch.setattr(_depth, "SAMPLE_TOKENS", 60)
    found = json.loads(nnx("eval", "--memorised", "--json").stdout)["memorised"]
    assert found["sample_tokens"] == 120 and found["searched_tokens"] == found["training_tokens"] == len(tokens.train)
    assert 1 <= found["longest_tokens"] < 60 and 0 <= found["share_50_grams"] <= 1
    assert found["longest_text"].encode() in bytes(tokens.train) or "\ufffd" in found["longest_text"]
    monkeypatch.setattr(memorised, "SEARCHED_BYTES", 1000)
    shown = nnx("eval", "--memorised").stdout
    assert f"the first 1,000 of {len(tokens.train):,} training tokens" in shown and "longest copy: '" in shown


def test_in_depth_on_a_model_that_was_made_of_the_run(nnx, run):
    assert nnx("quantize", "--max-drop", 5, "--out", "weights/small").exit_code == 0
    product = json.loads(nnx("eval", "small", "--by-position", "--context", "2x", "--json").stdout)
    assert product["context"]["2x"] > 0 and len(product["by_position"]) == 32


@pytest.mark.parametrize(
    "value", ["0.5x", "1x", "-2x", "nanx", "infx", "1e9x", "2x,", ",", "", "x", "2y", "2x 4x", "1025x", "2x,\x1b[2J"]
)
def test_factors_that_are_none(refused, run, value):
    result = refused(2, "it must be factors above 1", "eval", "--context", value)
    assert "\x1b" not in result.stderr


def test_what_in_depth_lacks(refused, run, workspace, monkeypatch):
    refused(3, "one window of the longest context has 3,169", "eval", "--context", "99x")
    (workspace / "short.txt").write_text("the cat sees a dog\n", encoding="utf-8")
    refused(3, "one window of the longest context has 65", "eval", "--context", "2x", "--filepath", "short.txt")
    monkeypatch.setattr("nnx_cli.system.device.memory_budget", lambda device, vram: 1000)
    refused(4, "a context of 2x, 64 tokens, takes about", "eval", "--context", "2x")
    refused(5, "there is no run", "eval", "nobody", "--memorised")
    (workspace / "data" / "words").rename(workspace / "data" / "moved")
    (workspace / "text.txt").write_text("the cat sees a dog\n" * 9, encoding="utf-8")
    refused(3, "is gone", "eval", "--memorised", "--filepath", "text.txt")


def test_tasks_need_the_harness(refused, run, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    result = refused(7, "--tasks needs lm-evaluation-harness", "eval", "--tasks", "lambada_openai")
    assert "pip install 'nnx-cli[eval]'" in result.stderr
    for value in ("", ",", "a,,b", "a,", " "):
        refused(2, "it must be names with commas", "eval", "--tasks", value)
    refused(2, "it must be factors", "eval", "--tasks", "lambada_openai", "--context", "0.5x")
