import json
import math

import pytest


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
    ]
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
