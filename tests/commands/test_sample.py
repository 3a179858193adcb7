import json
import os
import select
import shutil
from pathlib import Path

import pytest

from nnx_cli.system import files

KEYS = ["model", "prompt", "samples", "prefill_tokens_per_s", "decode_tokens_per_s", "peak_memory_bytes"]


def test_json_has_the_promised_keys(nnx, run):
    result = nnx("sample", "words", "--prompt", "the cat", "--max-new-tokens", 7, "--num-samples", 2, "--json")
    assert result.exit_code == 0, result.stderr
    product = json.loads(result.stdout)
    assert list(product) == KEYS
    assert product["model"].endswith("words") and product["prompt"] == "the cat"
    assert [list(sample) for sample in product["samples"]] == [["text", "tokens", "stop_reason"]] * 2
    assert [sample["tokens"] for sample in product["samples"]] == [7, 7]
    assert {sample["stop_reason"] for sample in product["samples"]} == {"length"}
    assert product["decode_tokens_per_s"] > 0 and product["prefill_tokens_per_s"] > 0
    assert result.stderr == ""


def test_text_goes_to_stdout_and_talk_to_stderr(nnx, run):
    result = nnx("sample", "--prompt", "the cat", "--max-new-tokens", 20, "--greedy")
    assert result.exit_code == 0 and result.stdout.startswith("the cat") and result.stdout.endswith("\n")
    assert "tokens/s" in result.stderr
    product = json.loads(nnx("sample", "--prompt", "the cat", "--max-new-tokens", 20, "--greedy", "--json").stdout)
    assert result.stdout == "the cat" + product["samples"][0]["text"] + "\n"
    assert nnx("sample", "--quiet", "--max-new-tokens", 2).stderr == ""


def test_cache_or_not_the_text_is_the_same(nnx, run):
    words = ["sample", "words", "--prompt", "a dog", "--max-new-tokens", 70, "--seed", 3]
    assert nnx(*words).stdout == nnx(*words, "--no-cache").stdout != nnx(*words[:-1], 4).stdout


def test_several_samples_are_told_apart(nnx, run):
    result = nnx("sample", "--prompt", "a dog", "--max-new-tokens", 5, "--num-samples", 3, "--temperature", 2)
    parts = result.stdout.split("\n---\n")
    assert len(parts) == 3 and all(part.startswith("a dog") for part in parts)


def test_the_prompt_from_a_file_and_from_standard_input(nnx, run, workspace):
    (workspace / "prompt.txt").write_text("über 小猫", encoding="utf-8")
    options = ["--max-new-tokens", 9, "--json"]
    wanted = json.loads(nnx("sample", "--prompt", "über 小猫", *options).stdout)
    from_file = json.loads(nnx("sample", "--prompt-file", "prompt.txt", *options).stdout)
    from_input = json.loads(nnx("sample", "--prompt", "-", *options, input="über 小猫".encode()).stdout)
    for product in (from_file, from_input):
        assert product["samples"] == wanted["samples"] and product["prompt"] == "über 小猫"


@pytest.mark.parametrize(
    ("prompt", "encoding", "options"),
    [
        ("The river", "utf-8-sig", []),
        ("The river", "utf-16", []),
        ("Река и мост", "utf-16-le", []),
        ("café résumé", "latin-1", []),
        ("Жила-была кошка", "cp1251", []),
        ("猫は水の中にいる", "shift_jis", []),
        ("naïve", "cp037", ["--encoding", "cp037"]),
        ("Größe", "mac-roman", ["--encoding", "macroman"]),
    ],
)
def test_a_prompt_is_read_like_training_text(nnx, run, workspace, prompt, encoding, options):
    data = prompt.encode(encoding)
    (workspace / "prompt.txt").write_bytes(data)
    words = ["--max-new-tokens", 1, "--json", *options]
    for result in (
        nnx("sample", "--prompt-file", "prompt.txt", *words),
        nnx("sample", "--prompt", "-", *words, input=data),
    ):
        assert result.exit_code == 0, result.stderr
        assert json.loads(result.stdout)["prompt"] == prompt


@pytest.mark.parametrize(
    "prompt", ["", "\x1b]52;c;x\x07", "[/bold]", "<|endoftext|>", "\u202egnp.exe", "\ud800", "👩‍🚀"]
)
def test_any_prompt_will_do_and_drives_no_terminal(nnx, run, prompt):
    result = nnx("sample", "--prompt", prompt, "--max-new-tokens", 30, "--temperature", 5)
    assert result.exit_code == 0, result.stderr
    assert not [char for char in result.stdout if char < " " and char != "\n" and char != "\t"]
    assert not set("\x7f\x9b\u202e") & set(result.stdout)


def test_a_prompt_longer_than_the_context_keeps_its_end(nnx, run):
    result = nnx("sample", "--prompt", "the cat sees " * 20, "--max-new-tokens", 3)
    assert result.exit_code == 0
    assert "the prompt has 260 tokens; the model sees the last" in result.stderr


def test_a_prompt_of_ten_megabytes(nnx, run, workspace):
    (workspace / "long.txt").write_text("the cat sees " * 800_000)
    result = nnx("sample", "--prompt-file", "long.txt", "--max-new-tokens", 3)
    assert result.exit_code == 0 and len(result.stdout) > 10_400_000
    assert "the prompt has 10,400,000 tokens; the model sees the last" in result.stderr


def test_a_stop_string_ends_the_text(nnx, run):
    result = nnx("sample", "--max-new-tokens", 300, "--stop", " ", "--json")
    (sample,) = json.loads(result.stdout)["samples"]
    assert sample["stop_reason"] == "stop" and " " not in sample["text"]


@pytest.mark.parametrize(("typed", "meant"), [(r"\n", "\n"), (r"\n\n", "\n\n"), (r"e\n", "e\n"), ("\n", "\n")])
def test_a_stop_string_may_be_a_line_break(nnx, run, typed, meant):
    words = ["sample", "--max-new-tokens", 300, "--seed", 2, "--prompt", "the cat", "--temperature", 1.5, "--json"]
    (free,) = json.loads(nnx(*words).stdout)["samples"]
    (sample,) = json.loads(nnx(*words, "--stop", typed).stdout)["samples"]
    assert sample["text"] == free["text"].partition(meant)[0]
    assert sample["stop_reason"] == ("stop" if meant in free["text"] else "length")


def test_checkpoints_are_models(nnx, run):
    texts = {
        spec: json.loads(nnx("sample", f"words@{spec}", "--greedy", "--max-new-tokens", 20, "--json").stdout)
        for spec in ("best", "last", "20", "40")
    }
    assert texts["last"]["samples"] == texts["40"]["samples"]
    assert texts["last"]["model"].endswith("words@last") and texts["best"]["model"].endswith("words")


def test_a_model_without_a_tokenizer_reads_and_writes_ids(nnx, refused, run):
    manifest = files.read_json(run.folder / "manifest.json")
    del manifest["files"]["tokenizer.json"]
    (run.folder / "manifest.json").write_bytes(files.to_json(manifest))
    (run.folder / "tokenizer.json").unlink()
    result = nnx("sample", "--prompt", "5 6 7", "--max-new-tokens", 4)
    assert result.exit_code == 0 and result.stdout.startswith("5 6 7 ")
    assert len(result.stdout.split()) == 7 and all(word.isdecimal() for word in result.stdout.split())
    refused(2, "has no tokenizer", "sample", "--prompt", "the cat")
    refused(2, "ids below 256", "sample", "--prompt", "256")


def test_the_newest_run_of_a_shape(nnx, refused, run, workspace):
    shutil.copytree(run.folder, workspace / "weights" / "damaged")
    (workspace / "weights" / "damaged" / "config.json").write_text("{}")
    shape = ["--vocab_size", 256, "--model_dim", 32, "--layer_depth", 2, "--num_attention_heads", 2]
    result = nnx("sample", *shape, "--generate_length", 4, "--json")
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout)["samples"][0]["tokens"] == 4
    refused(5, "no run has dim 64; there is words (dim 32)", "sample", "--model_dim", 64)


@pytest.mark.parametrize(
    ("code", "message", "words"),
    [
        (5, "no run or model 'nobody'", ["nobody"]),
        (5, "no checkpoint 7", ["words@7"]),
        (2, "after @ comes", ["words@soon"]),
        (2, "--temperature is nan", ["--temperature", "nan"]),
        (2, "--temperature is -1", ["--temperature", -1]),
        (2, "--top-k is 0", ["--top-k", 0]),
        (2, "--top-p is 1.1", ["--top-p", 1.1]),
        (2, "--max-new-tokens is 0", ["--max-new-tokens", 0]),
        (2, "--seed", ["--seed", 2**64]),
        (2, "give one", ["--prompt", "a", "--prompt-file", "b"]),
        (3, "cannot read --prompt-file", ["--prompt-file", "nowhere.txt"]),
        (3, "cannot read --prompt-file", ["--prompt-file", "."]),
        (2, "no encoding of text", ["--prompt", "-", "--encoding", "rot13"]),
        (2, "--encoding does nothing", ["--prompt", "a", "--encoding", "utf-8"]),
        (3, "--prompt-file noise.txt is not UTF-8, and its encoding cannot be told", ["--prompt-file", "noise.txt"]),
        (2, "'gpu'", ["--device", "gpu"]),
        (7, "needs a GPU", ["--device", "cpu", "--precision", "bf16"]),
        (2, "--temperature", ["--temprature", 1]),
        (2, "", ["words", "more"]),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, list) else "",
)
def test_what_it_refuses(refused, run, workspace, code, message, words):
    (workspace / "noise.txt").write_bytes(bytes(range(160, 255)))
    refused(code, message, "sample", *words)


@pytest.mark.skipif(os.name != "posix", reason="pipes are those of POSIX")
def test_a_reader_who_leaves_is_no_error(run):
    from tests.reliability.processes import Command, Setting

    os.mkfifo("pipe")
    reader = os.open("pipe", os.O_RDONLY | os.O_NONBLOCK)
    words = ("sample", "words", "--max-new-tokens", "20000")
    command = Command(Path.cwd(), *words, setting=Setting(stdout="pipe"))
    select.select([reader], [], [], 60)
    assert os.read(reader, 5)
    os.close(reader)
    assert command.wait() == 0 and command.output == ""


def test_no_run_yet(refused, workspace):
    refused(5, "there is no run in weights/ yet", "sample")


def test_the_model_is_looked_for_after_usage_and_before_the_prompt(refused, workspace):
    refused(2, "--temperature", "sample", "nobody", "--temperature", "nan", "--prompt-file", "nowhere.txt")
    refused(5, "nobody", "sample", "nobody", "--prompt-file", "nowhere.txt")


@pytest.mark.parametrize("damage", ["cut", "altered", "missing", "link", "folder", "pickle", "huge header"])
def test_damaged_weights_are_refused(refused, run, damage):
    path = run.folder / "model.safetensors"
    data = path.read_bytes()
    path.unlink()
    if damage == "cut":
        path.write_bytes(data[:-7])
    elif damage == "altered":
        path.write_bytes(data[:-7] + b"\x7f" + data[-6:])
    elif damage == "link":
        if os.name != "posix":
            pytest.skip("making symbolic links needs a privilege elsewhere")
        (run.folder / "other").write_bytes(data)
        path.symlink_to("other")
    elif damage == "folder":
        path.mkdir()
    elif damage == "pickle":
        path.write_bytes(b"\x80\x04cos\nsystem\n.")
    elif damage == "huge header":
        path.write_bytes((2**62).to_bytes(8, "little") + data[8:])
    refused(5, "model.safetensors ", "sample", "words")


def test_a_config_of_impossible_size_allocates_nothing(refused, run):
    config = files.read_json(run.folder / "config.json")
    config["model"] |= {"dim": 2**20, "n_heads": 2**10, "head_dim": 2**10, "ffn_dim": 2**24, "n_layers": 4}
    (run.folder / "config.json").write_bytes(files.to_json(config))
    manifest = files.read_json(run.folder / "manifest.json")
    manifest["files"]["config.json"] = files.sha256_file(run.folder / "config.json")
    (run.folder / "manifest.json").write_bytes(files.to_json(manifest))
    refused(5, "belongs to another model", "sample", "words")
