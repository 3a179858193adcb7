import importlib.util
import json
import random
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from nnx_cli.commands import train
from nnx_cli.config import TrainConfig
from nnx_cli.console.output import Output
from nnx_cli.console.run_screen import RunFacts
from nnx_cli.data.aligned_windows import AlignedWindows
from nnx_cli.data.conversations import template_of
from nnx_cli.data.token_folder import open_token_folder
from nnx_cli.layers.loss import LossModule
from nnx_cli.planning.recipe import table
from nnx_cli.runs import checkpoint as ckpt
from nnx_cli.runs.find import find_model
from nnx_cli.runs.run import Run
from nnx_cli.trackers._process import Tracking
from nnx_cli.training import session

SMALL = [
    "--dim",
    32,
    "--n-layers",
    2,
    "--n-heads",
    2,
    "--seq-len",
    32,
    "--batch-size",
    2,
    "--grad-accum",
    1,
    "--threads",
    1,
    "--compile",
    "off",
]
FIRST = [*SMALL, "--max-steps", 3, "--sample-every", 0]
DOCUMENTED = [
    "--vocab_size",
    256,
    "--model_dim",
    32,
    "--layer_depth",
    2,
    "--num_attention_heads",
    4,
    "--num_batches",
    2,
    "--batch_size",
    2,
    "--gradient_accumulate_every",
    2,
    "--learning_rate",
    "1e-4",
    "--validate_every",
    1,
    "--prime_length",
    8,
    "--generate_every",
    2,
    "--generate_length",
    6,
    "--seq_len",
    32,
]


@pytest.fixture
def data(token_path, workspace):
    shutil.copytree(token_path, workspace / "data" / "words")
    return workspace / "data" / "words"


# what it does


def test_json_is_run_json_and_where_it_is(nnx, text_file, workspace):
    result = nnx("train", "--filepath", text_file, *FIRST, "--json")
    assert result.exit_code == 0, result.stderr
    product = json.loads(result.stdout)
    run = Run(workspace / "weights" / "nyx-words")
    assert product.pop("out") == str((workspace / "weights" / "nyx-words").relative_to(workspace))
    assert product.pop("parameters") == run.config["parameters"] > 0
    assert product == run.status()
    assert product["status"] == "finished" and product["step"] == 3 and product["tokens"] == 3 * 64
    assert {"command", "best_val_loss", "best_val_bits_per_byte", "train_loss", "val_loss", "best_step"} <= set(product)
    assert product["train_loss"] > 0
    assert run.config["training"]["max_steps"] == 3


def test_words_for_people(nnx, data):
    result = nnx("train", "--data", data, *FIRST)
    assert result.exit_code == 0
    assert "weights/nyx-words: nyx with" in result.stdout.replace("\\", "/") and "nnx sample" in result.stdout
    first, *rows = result.stdout.splitlines()
    table = {row.split()[0]: row for row in rows[: rows.index("next:")]}
    assert first.endswith("parameters") and {"best", "trained", "speed", "memory", "verdict"} <= table.keys()
    assert "bits per byte, validation loss" in table["best"] and "  3 steps, 192 tokens  " in table["trained"]


@pytest.mark.parametrize(("bits", "words"), [(20.0, "fewer bits"), (0.5, "more bits"), (None, "takes as many bits")])
def test_the_end_says_how_an_n_gram_model_does(nnx, data, bits, words):
    bits = (
        bits
        or json.loads(nnx("train", "--data", data, *FIRST, "--out", "a", "--json").stdout)["best_val_bits_per_byte"]
    )
    meta = json.loads((data / "meta.json").read_text())
    copy = Path(shutil.copytree(data, "seen"))
    (copy / "meta.json").write_text(json.dumps(meta | {"xray": {"ngram_bits_per_byte": bits}}))
    result = nnx("train", "--data", copy, *FIRST)
    (row,) = [line for line in result.stdout.splitlines() if line.startswith("n-gram model")]
    assert row.split("  ")[1].strip() == f"{bits:.3f} bits per byte" and row.endswith(words), result.stderr


@pytest.mark.parametrize("xray", [None, [], "x", {}, {"ngram_bits_per_byte": None}, {"ngram_bits_per_byte": "2"}])
def test_an_xray_that_says_nothing_is_left_alone(nnx, data, xray):
    meta = json.loads((data / "meta.json").read_text())
    copy = Path(shutil.copytree(data, "seen"))
    (copy / "meta.json").write_text(json.dumps(meta | {"xray": xray}))
    result = nnx("train", "--data", copy, *FIRST)
    assert result.exit_code == 0 and "n-gram" not in result.stdout


def test_quiet_is_quiet(nnx, data):
    result = nnx("train", "--data", data, *FIRST)
    assert "learning rate" in result.stderr and "\x1b" not in result.stdout + result.stderr
    quiet = nnx("train", "--data", data, *FIRST, "--quiet")
    assert quiet.exit_code == 0 and quiet.stderr == "" and "nyx-words-2" in quiet.stdout


@pytest.mark.parametrize("spelling", ["--n-layers", "--n_layers"])
def test_options_with_dashes_or_underscores(nnx, data, spelling):
    result = nnx("train", "--data", data, "--dry-run", "--json", spelling, 3, "--dim", 32, "--n_heads", 2)
    assert result.exit_code == 0
    assert {row["setting"]: row["value"] for row in json.loads(result.stdout)}["n_layers"] == 3


def test_text_is_prepared_once(nnx, text_file, workspace):
    for _ in range(2):
        assert nnx("train", "--filepath", text_file, *FIRST).exit_code == 0
    (folder,) = (workspace / "data").iterdir()
    assert folder.name.startswith("words-") and len(folder.name) == len("words-") + 8
    assert sorted(path.name for path in (workspace / "weights").iterdir()) == ["nyx-words", "nyx-words-2"]


def test_dry_run_says_where_every_value_comes_from(nnx, data, workspace):
    (workspace / "my.toml").write_text("lr = 0.01\nseed = 7\n[model]\nn-layers = 3\n")
    result = nnx(
        "train", "--data", data, "--config", "my.toml", "--dry-run", "--json", "--dim", 64, "--n-heads", 4, "--seed", 9
    )
    assert result.exit_code == 0, result.stderr
    rows = {row["setting"]: (row["value"], row["source"]) for row in json.loads(result.stdout)}
    assert rows["dim"] == (64, "command line") and rows["seed"] == (9, "command line")
    assert rows["lr"] == (0.01, "file: my.toml") and rows["n_layers"] == (3, "file: my.toml")
    assert rows["vocab_size"] == (256, "derived: tokenizer") and rows["grad_clip"][1] == "default"
    assert rows["batch_size"][1].startswith("derived")
    assert rows["model"] == ("nyx", "default") and rows["data"][1] == "command line"
    assert not (workspace / "weights").exists()
    table = nnx("train", "--data", data, "--dry-run")
    assert table.exit_code == 0 and "learning" not in table.stderr
    assert table.stdout.index("learning rate") < table.stdout.index("warmup_steps")


PLANNED = ["size", "tokenizer", "optimizer", "learning rate", "dropout", "weight decay", "length", "will read"]


def plan_of(shown):
    """The lines of the plan in what is on the screen."""
    lines = shown.splitlines()
    start = next(number for number, line in enumerate(lines) if line.startswith("size  "))
    end = next(number for number, line in enumerate(lines) if "setting" in line or "step 1" in line)
    return [line for line in lines[start:end] if line.strip()]


def names_in(plan):
    """What stands in the first column."""
    known = [*PLANNED, "first sample", "run folder"]
    return [name for line in plan for name in known if line == name or line.startswith(f"{name}  ")]


def test_the_plan_stands_above_a_run_and_above_all_settings(nnx, data):
    words = ["train", "--data", data, *FIRST, "--lr", 0.02]
    plan = plan_of(nnx(*words, "--dry-run").stdout)
    assert plan_of(nnx(*words).stderr) == plan and names_in(plan) == [*PLANNED, "run folder"]
    lines = dict(zip(names_in(plan), plan, strict=True))
    assert "0.02, linear" in lines["learning rate"] and lines["learning rate"].endswith("command line")
    assert "256 ids" in lines["tokenizer"] and lines["tokenizer"].endswith("token folder")
    sampling = plan_of(nnx(*words, "--sample-every", 1, "--dry-run").stdout)
    assert names_in(sampling) == [*PLANNED, "first sample", "run folder"]


def test_a_busy_machine_plans_as_a_quiet_one_does(nnx, data):
    words = ["train", "--data", data, "--dry-run", "--json", "--device", "cpu"]
    quiet = nnx(*words).stdout
    spinning = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(4)]
    try:
        busy = nnx(*words).stdout
    finally:
        for process in spinning:
            process.kill()
            process.wait()
    assert json.loads(busy) == json.loads(quiet)


def test_the_plan_says_where_sequences_are_short(nnx, data):
    words = ["train", "--data", data, *FIRST, "--seq-len", 16, "--dry-run"]
    assert "\nsequences" not in nnx(*words).stdout
    shown = " ".join(nnx(*words, "--short-sequences", 0.25).stdout.split())
    assert "sequences of 8 tokens in the first 25 % of the run, then of 16 command line" in shown
    refused = nnx(*words[:-3], "--seq-len", 15, "--short-sequences", 0.25)
    assert refused.exit_code == 2 and "--short-sequences needs an even context" in refused.stderr


def test_a_quiet_run_shows_no_plan_and_a_quiet_dry_run_nothing_else(nnx, data):
    assert nnx("train", "--data", data, *FIRST, "--quiet").stderr == ""
    shown = nnx("train", "--data", data, *FIRST, "--quiet", "--dry-run")
    assert shown.stderr == "" and names_in(plan_of(shown.stdout)) == [*PLANNED, "run folder"]


def test_the_plan_as_json_stands_behind_the_settings(nnx, data):
    rows = json.loads(nnx("train", "--data", data, *FIRST, "--sample-every", 1, "--dry-run", "--json").stdout)
    expected = {row["setting"]: row["value"] for row in rows if row["source"] == "outlook"}
    settings = {row["setting"]: row["value"] for row in rows if row["source"] != "outlook"}
    assert expected["expected_tokens"] == settings["max_steps"] * settings["tokens_per_step"]
    assert expected["parameters"] > 0 and expected["run_folder_bytes"] > 12 * expected["parameters"]
    assert expected["first_sample_s"] > 0 and expected["such_runs_bits_per_byte"] is None


@pytest.mark.parametrize(
    ("size", "epochs", "best"),
    [("nano", 8, "1.59"), ("tiny", 12, "1.52")],
)
def test_the_plan_says_what_such_runs_reached(nnx, workspace, size, epochs, best):
    from nnx_cli.data.sources import builtin_corpus

    (workspace / "docs.txt").write_text(builtin_corpus(), encoding="utf-8")
    words = ["--size", size, "--epochs", epochs, "--device", "cpu", "--dry-run"]
    planned = nnx("train", "--filepath", "docs.txt", *words).stdout
    line = next(line for line in plan_of(planned) if line.startswith("reached"))
    assert f"{best} to 2." in line and " bits per byte by such runs  " in line
    assert line.endswith("  documentation to plays")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--size", "tiny", "--max-steps", 2], "leave out --size"),
        (["--size", "base", "--epochs", 1], "leave out --size"),
        (["--size", "small", "--max-time", "1s"], "leave out --size"),
        (["--size", "nano", "--max-steps", 2], None),
        (["--size", "tiny", "--max-steps", 20_000], None),
        ([*FIRST], None),
    ],
    ids=str,
)
def test_the_plan_warns_of_a_model_that_reads_too_little(nnx, data, words, said):
    planned = nnx("train", "--data", data, *words, "--dry-run", "--device", "cpu", "--quiet")
    assert planned.exit_code == 0
    assert ("is large for so short a run" in planned.stderr) is (said is not None) and (said or "") in planned.stderr


@pytest.mark.parametrize("vram", ["8GB", "12GiB", "2048MB"])
def test_a_plan_for_a_cpu_says_what_plans_for_a_gpu(nnx, data, vram):
    words = ["train", "--data", data, *FIRST, "--dry-run", "--device", "cpu"]
    assert f"on a GPU of {vram}: nnx summarize --vram {vram}" in nnx(*words, "--vram", vram).stderr
    assert "nnx summarize" not in nnx(*words).stderr


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        ([], "text below 2 MB"),
        (["--tokenizer", "char"], "command line"),
        (["--num_batches", 3], "recipe: NYX"),
        (["--config", "my.toml"], "file: my.toml"),
    ],
)
def test_the_plan_says_why_that_tokenizer(nnx, text_file, workspace, words, reason):
    (workspace / "my.toml").write_text('tokenizer = "char"\n')
    plan = plan_of(nnx("train", "--filepath", text_file, "--seq-len", 16, *words, "--dry-run").stdout)
    assert plan[1].startswith("tokenizer") and plan[1].endswith(reason)


@pytest.mark.parametrize("columns", [24, 33, 40, 60, 80, 200])
def test_the_plan_on_screens_of_any_width(nnx, data, monkeypatch, columns):
    monkeypatch.setenv("COLUMNS", str(columns))
    plan = plan_of(nnx("train", "--data", data, *FIRST, "--dry-run").stdout)
    assert max(map(len, plan)) <= columns and names_in(plan) == [*PLANNED, "run folder"]
    whole = " ".join(" ".join(plan).split())
    assert "256 ids" in whole and "optimizer, width, model, length" in whole and "the best weights" in whole


def test_dry_run_says_who_named_model_and_size(nnx, run, workspace):
    def rows(*words):
        result = nnx("train", "--dry-run", "--json", *words)
        assert result.exit_code == 0, result.stderr
        return {row["setting"]: (row["value"], row["source"]) for row in json.loads(result.stdout)}

    (workspace / "my.toml").write_text('model = "llama"\nsize = "nano"\n')
    on_words = ["--data", "data/words"]
    assert rows(*on_words, "--size", "nano")["size"] == ("nano", "command line")
    filed = rows(*on_words, "--config", "my.toml")
    assert filed["model"] == ("llama", "file: my.toml") and filed["size"] == ("nano", "file: my.toml")
    both = rows(*on_words, "--config", "my.toml", "--model", "nyx", "--size", "tiny")
    assert both["model"] == ("nyx", "command line") and both["size"] == ("tiny", "command line")
    begun = rows(*on_words, "--init-from", "words", "--seq-len", 16)
    assert begun["dim"][1] == begun["model"][1] == "model: words" and begun["seq_len"] == (16, "command line")
    assert rows("--resume", "words", "--max-steps", 90)["model"][0] == "nyx"


def test_dry_run_of_text_leaves_nothing(nnx, text_file, workspace):
    assert nnx("train", "--filepath", text_file, "--dry-run").exit_code == 0
    assert list(workspace.iterdir()) == []


def test_the_command_is_recorded(nnx, data, workspace, monkeypatch):
    monkeypatch.setattr("sys.argv", ["nnx", "train", "--data", "my data"])
    assert nnx("train", "--data", data, *FIRST, "--out", "run").exit_code == 0
    assert Run(workspace / "run").status()["command"] == "nnx train --data 'my data'"


def test_starting_from_another_run(nnx, run):
    result = nnx(
        "train",
        "--data",
        "data/words",
        "--init-from",
        "words",
        "--out",
        "next",
        "--max-steps",
        1,
        "--batch-size",
        2,
        "--grad-accum",
        1,
        "--threads",
        1,
    )
    assert result.exit_code == 0, result.stderr
    before, after = find_model("words").weights()[1], find_model("next@0").weights()[1]
    assert all(torch.equal(before[key], after[key]) for key in before)


# the documented commands of the original


def test_the_originals_training_command(nnx, text_file, workspace):
    result = nnx("train", "--filepath", text_file, *DOCUMENTED)
    assert result.exit_code == 0, result.stderr
    run = Run(workspace / "weights" / "nyx-words")
    model, training = run.config["model"], run.config["training"]
    assert (model["name"], model["dim"], model["n_layers"], model["n_heads"], model["seq_len"]) == ("nyx", 32, 2, 4, 32)
    assert (training["max_steps"], training["batch_size"], training["grad_accum"]) == (2, 2, 2)
    assert (training["optimizer"], training["lr"], training["schedule"]) == ("lion", 1e-4, "constant")
    assert (training["grad_clip"], training["weight_decay"], training["val_every"]) == (0.5, 0.0, 1)
    (sample,) = [json.loads(line) for line in (run.folder / "samples.jsonl").read_text().splitlines()]
    assert sample["step"] == 2 and len(sample["prompt"].encode()) >= 8
    assert len(run.config["sampling"]["prompt_ids"]) == 8 and run.config["sampling"]["max_new_tokens"] == 6

    result = nnx(
        "sample",
        "--sample_prompt",
        "AI is a power!",
        "--vocab_size",
        256,
        "--model_dim",
        32,
        "--layer_depth",
        2,
        "--num_attention_heads",
        4,
        "--generate_length",
        8,
    )
    assert result.exit_code == 0 and result.stdout.startswith("AI is a power!")

    result = nnx("train", "--filepath", text_file, "--checkpoint_path", "weights/nyx-words", "--num_batches", 3)
    assert result.exit_code == 0, result.stderr
    assert run.status()["step"] == 3


def test_a_spelling_of_the_original_that_brings_its_recipe_says_so(nnx, data):
    words = ["train", "--data", data, "--dry-run", "--num_batches", 3]
    result = nnx(*words)
    (line,) = [line for line in result.stderr.splitlines() if "recipe" in line]
    assert line.startswith("--num_batches is the original NYX's spelling") and "optimizer lion" in line
    assert "--model nyx" in line and "recipe" not in nnx(*words, "--model", "nyx").stderr
    assert "recipe" not in nnx("train", "--data", data, "--dry-run", "--max-steps", 3).stderr


def test_an_alias_beside_the_name_is_refused(refused, data):
    refused(2, "twice", "train", "--data", data, "--dim", 32, "--model_dim", 64)


@pytest.mark.parametrize(
    ("words", "ids"),
    [
        ([], 300),
        (["--vocab_size", 256], 256),
        (["--num_batches", 1], 256),
        (["--model_dim", 64, "--vocab_size", 256], 256),
        (["--num_batches", 1, "--tokenizer", "auto"], 300),
        (["--tokenizer", "byte"], 256),
        (["--vocab-size", 280], 280),
        (["--tokenizer", "bpe", "--vocab-size", 280], 280),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, list) else "",
)
def test_the_text_decides_its_tokens_but_what_is_asked_for_holds(nnx, text_file, workspace, monkeypatch, words, ids):
    monkeypatch.setattr(table, "BPE_FROM_BYTES_SMALL", 5_000)
    monkeypatch.setattr(table, "IDS_BY_BYTES", ((0, 300),))
    result = nnx("train", "--filepath", text_file, "--seq-len", 16, "--size", "nano", *words, "--dry-run", "--json")
    assert result.exit_code == 0, result.stderr
    rows = {row["setting"]: row["value"] for row in json.loads(result.stdout)}
    assert rows["vocab_size"] == ids
    assert not (workspace / "data").exists()


def test_a_vocabulary_that_disagrees_is_refused(refused, data):
    refused(2, "--vocab-size 50257 is not the tokenizer's 256", "train", "--data", data, "--vocab_size", 50257)


# what it refuses


@pytest.fixture
def bad_files(workspace):
    files = {
        "empty.txt": b"",
        "blank.txt": b" \n\n \t\n",
        "short.txt": b"one two\n" * 4,
        "binary.txt": b"\x7fELF\x00\x01" * 99,
        "image.png": b"\x89PNG\r\n\x1a\n" + bytes(range(256)) * 9,
    }
    for name, content in files.items():
        (workspace / name).write_bytes(content)
    (workspace / "nothing").mkdir()
    (workspace / "images").mkdir()
    (workspace / "images" / "a.png").write_bytes(files["image.png"])
    return workspace


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("nowhere.txt", "nowhere.txt"),
        ("empty.txt", "empty.txt"),
        ("blank.txt", "blank.txt"),
        ("binary.txt", "binary.txt"),
        ("nothing", "nothing"),
        ("images", "images"),
        ("*.rst", "*.rst"),
        ("short.txt", "one sequence needs"),
    ],
)
def test_text_that_is_none_is_refused(refused, bad_files, path, message):
    refused(3, message, "train", "--filepath", path, *FIRST)


def test_invalid_bytes_under_strict_are_refused(refused, bad_files):
    (bad_files / "broken.txt").write_bytes(
        "good 小猫\n".encode() * 99 + b"\xe5\xb0 bad\n" + "good 小猫\n".encode() * 99
    )
    refused(3, "broken.txt", "train", "--filepath", "broken.txt", "--errors", "strict", *FIRST)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--model", "nix"], "there is no model 'nix'; did you mean nyx?"),
        (["--model", "lama"], "did you mean llama?"),
        (["--size", "huge"], "no size 'huge'"),
        (["--dim", 100, "--n-heads", 8], "--dim 100 cannot be divided among --n-heads 8"),
        (["--dim", 0], "--dim"),
        (["--n-kv-heads", 2], "nyx has no option --n-kv-heads; it belongs to llama"),
        (["--lr", "nan"], "--lr is nan"),
        (["--lr", "inf"], "--lr is inf"),
        (["--lr", 0], "--lr is 0"),
        (["--lr", "fast"], "--lr"),
        (["--xpos-scale-base", "inf"], "--xpos-scale-base is inf"),
        (["--batch-size", 0], "--batch-size is 0"),
        (["--batch-size", -1], "--batch-size is -1"),
        (["--max-steps", 0], "--max-steps is 0"),
        (["--max-steps", 5, "--epochs", 1], "two lengths: --max-steps and --epochs"),
        (["--num_batches", 5, "--max-time", "1m"], "two lengths"),
        (["--max-steps", 5, "--warmup-steps", 9], "--warmup-steps 9 is more than --max-steps 5"),
        (["--max-time", "soon"], "'soon' is no length of time"),
        (["--vram", "8 bananas"], "'8 bananas' is no amount of memory"),
        (["--vram", "8XB"], "'8XB' is no amount of memory"),
        (["--dropout", 1.0], "--dropout is 1"),
        (["--optimizer", "adam"], "did you mean adamw?"),
        (["--device", "gpu"], "'gpu'"),
        (["--learnin-rate", 1], "--learning-rate"),
        (["--lrr", 1], "--lr?"),
        (["--seed", -1], "--seed"),
        (["--threads", 0], "--threads"),
        (["--variant", "best"], "--variant"),
        (["--batch-size", 2, "--grad-accum", 2, "--tokens-per-step", 7], "--tokens-per-step"),
        (["--optimizer-in-backward", "--precision", "fp16"], "no loss scale, which fp16 needs"),
        (["--optimizer-in-backward", "--grad-accum", 2], "not --grad-accum 2"),
        (["--optimizer-in-backward", "--seq-len", 32, "--batch-size", 2, "--tokens-per-step", 128], "is 64, not"),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, list) else "",
)
def test_settings_that_cannot_be_are_refused(refused, data, words, message):
    refused(2, message, "train", "--data", data, *words)


def test_usage_is_checked_before_data(refused, workspace):
    refused(2, "--lr is nan", "train", "--filepath", "nowhere.txt", "--lr", "nan")
    refused(2, "no model", "train", "--filepath", "nowhere.txt", "--model", "nix")
    refused(5, "no run or model", "train", "--filepath", "nowhere.txt", "--init-from", "nobody")


def test_text_and_tokens_are_one_too_many(refused, data, text_file):
    refused(2, "give one", "train", "--filepath", text_file, "--data", data)


def test_a_device_that_is_not_there(refused, data, text_file, monkeypatch):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    refused(7, "no device cuda", "train", "--data", data, "--device", "cuda")
    said = refused(7, "no device cuda:1", "train", "--data", data, "--device", "cuda:1").stderr
    assert "nnx summarize --vram 8GB" in said
    for name in ("prepare_tokens", "open_and_plan", "model_vocabularies"):
        monkeypatch.setattr(f"nnx_cli.training.inputs.{name}", lambda *_, **__: pytest.fail("slow work first"))
    refused(7, "no device cuda", "train", "--filepath", text_file, "--device", "cuda")


def test_what_does_not_fit_is_refused(refused, data, text_file):
    refused(4, "not even one sequence fits", "train", "--data", data, *FIRST, "--vram", "1.0001GB")
    refused(4, "not even one sequence fits", "train", "--filepath", text_file, *FIRST, "--vram", "1.0001GB")


@pytest.mark.parametrize("content", [None, "lr = ", "speed = 3", 'lr = "x"'])
def test_a_bad_settings_file_is_refused(refused, data, workspace, content):
    if content is not None:
        (workspace / "my.toml").write_text(content)
    refused(3 if content is None else 2, "my.toml", "train", "--data", data, "--config", "my.toml")


def test_a_folder_that_exists_is_left_alone(refused, data, workspace):
    (workspace / "mine").mkdir()
    (workspace / "file").write_text("x")
    refused(8, "exists already", "train", "--data", data, *FIRST, "--out", "mine")
    refused(8, "file", "train", "--data", data, *FIRST, "--out", "file/run")


@pytest.mark.parametrize("damage", ["missing", "no file", "cut", "altered", "tokenizer", "newer", "odd"])
def test_a_damaged_token_folder_is_refused(refused, data, damage):
    meta, train = data / "meta.json", data / "train.bin"
    if damage == "missing":
        shutil.rmtree(data)
    elif damage == "no file":
        train.unlink()
    elif damage == "cut":
        train.write_bytes(train.read_bytes()[:-1])
    elif damage == "altered":
        train.write_bytes(b"?" + train.read_bytes()[1:])
    elif damage == "tokenizer":
        meta.write_text(json.dumps(json.loads(meta.read_text()) | {"tokenizer": {"fingerprint": "0"}}))
    elif damage == "newer":
        meta.write_text(json.dumps(json.loads(meta.read_text()) | {"format": 3}))
    elif damage == "odd":
        meta.write_text("[]")
    refused(3, "data", "train", "--data", "data/words", *FIRST)


def test_tokens_of_another_tokenizer_are_refused(refused, nnx, run, text_file):
    assert nnx("prepare", text_file, "--tokenizer", "char", "--out", "data/chars").exit_code == 0
    refused(3, "another tokenizer", "train", "--data", "data/chars", "--init-from", "words")


def test_a_run_that_diverges_says_so(nnx, data, workspace, monkeypatch):
    forward = LossModule.forward

    def diverge(self, ids, targets):
        loss, count = forward(self, ids, targets)
        return loss * float("nan"), count

    monkeypatch.setattr(LossModule, "forward", diverge)
    result = nnx("train", "--data", data, *SMALL, "--max-steps", 20, "--out", "run")
    assert result.exit_code == 6 and "diverged" in result.stderr and "Traceback" not in result.stderr
    assert Run(workspace / "run").status()["status"] == "diverged"


@pytest.fixture
def wild(nnx, data, monkeypatch):
    """A run whose learning rate is far too high, and what its command said."""
    words = [
        "train",
        "--data",
        str(data),
        *map(str, SMALL),
        "--max-steps",
        "20",
        "--lr",
        "30",
        "--out",
        "weights/a run",
    ]
    monkeypatch.setattr("sys.argv", ["nnx", *words])
    return nnx(*words, "--json")


def test_a_loss_worse_than_guessing_is_divergence(nnx, refused, wild, workspace):
    assert wild.exit_code == 6 and "the likely cause is its learning rate, 30" in wild.stderr
    status = json.loads(wild.stdout)
    assert status["status"] == "diverged" and status["out"] == "weights/a run" and status["val_loss"] > 5.6
    command = wild.stderr.splitlines()[-1].split()
    assert command[:2] == ["nnx", "train"] and command[-3:] == ["--out", "'weights/a", "run-2'"]
    result = nnx(*shlex.split(wild.stderr.splitlines()[-1])[1:], "--json")
    assert result.exit_code == 0 and json.loads(result.stdout)["out"] == "weights/a run-2", result.stderr
    assert nnx("sample", "a run", "--max-new-tokens", 3).exit_code == 0, "its best weights are a model"


def test_a_diverged_run_is_not_gone_on_with_unasked(nnx, refused, wild):
    refused(5, "a run diverged", "train", "--resume", "last")
    again = nnx("train", "--resume", "a run", "--json")
    assert again.exit_code == 6 and json.loads(again.stdout)["step"] == 20, "it ends as it did, without a step"
    assert Run(Path("weights", "a run")).status()["status"] == "diverged"


def test_a_loss_that_came_back_is_told(nnx, data):
    result = nnx("train", "--data", data, *SMALL, "--max-steps", 100, "--lr", 1.0, "--sample-every", 0)
    assert result.exit_code == 0 and "on the way; a lower learning rate learns more" in result.stdout, result.stderr


def test_a_command_is_told_once(nnx, data):
    shown = nnx("train", "--data", data, *SMALL, "--max-steps", 3, "--sample-every", 0, "--out", "weights/short").stdout
    assert "it is worse than a byte 5-gram, " in shown and shown.count("nnx train --resume weights/short") == 1


def test_overfitting_is_told_as_such(nnx, workspace):
    draw = random.Random(0)
    (workspace / "noise.txt").write_text("".join(draw.choices("abcdefghijklmnop", k=700)))
    shape = ["--dim", 64, "--n-layers", 2, "--n-heads", 2, "--seq-len", 16, "--dropout", 0, "--compile", "off"]
    length = ["--batch-size", 16, "--grad-accum", 1, "--max-steps", 150, "--lr", 1e-2, "--weight-decay", 0]
    rest = ["--optimizer", "adamw", "--val-fraction", 0.2, "--sample-every", 0]
    result = nnx("train", "--filepath", "noise.txt", *shape, *length, *rest)
    assert result.exit_code == 0, result.stderr
    assert "it learns its text by heart: training loss 1." in result.stdout and "--dropout 0.1" in result.stdout


# resuming


def test_a_run_ends_when_its_text_has_given_what_it_has(nnx, workspace):
    """Whatever time is left; with its schedule at its end, and no advice to train longer."""
    (workspace / "short.txt").write_text("the quick brown fox jumps over the lazy dog. " * 20)
    words = ["train", "--filepath", "short.txt", *SMALL, "--sample-every", 0, "--max-time", "2h", "--seed", 1]
    shown = nnx(*words, "--size", "nano", "--out", "a").stdout
    assert "more text would use the 1 h 59 min left" in " ".join(shown.split()) and "--resume" not in shown
    status = json.loads((workspace / "a/run.json").read_text())
    assert status["ended"] == "data" and 28 < status["tokens"] / (0.9 * 900) < 33
    assert json.loads((workspace / "a/metrics.jsonl").read_text().splitlines()[-1])["lr"] < 0.001
    by_length = json.loads(nnx("train", "--data", next(Path("data").iterdir()), *FIRST, "--json").stdout)
    assert by_length["ended"] == "length"


def test_a_finished_run_is_left_as_it_is(nnx, run):
    before = (run.folder / "run.json").read_bytes()
    result = nnx("train", "--resume", "words")
    assert result.exit_code == 0 and "is finished" in result.stdout and len(result.stdout.splitlines()) == 1
    assert json.loads(nnx("train", "--resume", "words", "--json").stdout)["status"] == "finished"
    assert (run.folder / "run.json").read_bytes() == before


def test_a_finished_run_is_trained_longer(nnx, run):
    result = nnx("train", "--resume", "words", "--max-steps", 43)
    assert result.exit_code == 0 and "at step 40" in result.stderr
    assert run.status()["step"] == 43 and run.status()["status"] == "finished"


@pytest.mark.parametrize(
    "length", [("--max-steps", 40), ("--max-steps", 7), ("--max-time", "0.001s"), ("--epochs", 0.01)]
)
def test_a_length_that_is_reached_is_no_error(nnx, run, length):
    before = {path: path.read_bytes() for path in run.folder.rglob("*") if path.is_file() and path.name != "lock"}
    for words in ([], ["--dry-run"]):
        result = nnx("train", "--resume", "words", *length, *words)
        (line,) = result.stdout.splitlines()
        assert result.exit_code == 0 and f"{length[0]} {length[1]} is reached, counted from its beginning" in line
        assert "step 40" in line
    again = json.loads(nnx("train", "--resume", "words", *length, "--json").stdout)
    assert again["step"] == 40 and again["status"] == "finished" and again["out"] == "weights/words"
    assert {path: path.read_bytes() for path in before} == before


def test_what_followed_from_the_length_follows_from_the_new_one(nnx, run, workspace):
    """The run's own warm-up of 400 steps for 20,000 is not blamed on whoever ends it sooner."""
    config = run.config
    config["training"] |= {"max_steps": 20_000, "warmup_steps": 400, "weight_decay": 0.9}
    config["automatic"] |= {"warmup_steps": "derived: length", "weight_decay": "derived: lr, width, epochs"}
    with run.lock():
        run.set_config(config)
        run.set_status(status="interrupted", max_steps=20_000)
    result = nnx("train", "--resume", "words", "--max-steps", 46, "--dry-run", "--json")
    rows = {row["setting"]: (row["value"], row["source"]) for row in json.loads(result.stdout)}
    assert rows["warmup_steps"] == (40, "derived: length"), "it covers what was taken of it"
    assert rows["weight_decay"] == (1.4, "derived: lr, width, epochs") and rows["max_steps"] == (46, "command line")
    assert rows["lr"][1].startswith("run")
    assert nnx("train", "--resume", "last", "--max-steps", 46).exit_code == 0
    assert run.status()["step"] == 46
    after = Run(run.folder).config
    assert after["training"]["warmup_steps"] == 40 and after["automatic"]["warmup_steps"] == "derived: length"
    assert nnx("train", "--resume", "words", "--max-time", "1m", "--dry-run").exit_code == 0
    longer = nnx("train", "--resume", "words", "--epochs", 900, "--dry-run", "--json")
    rows = {row["setting"]: (row["value"], row["source"]) for row in json.loads(longer.stdout)}
    assert rows["max_steps"][1] == "derived: epochs" and rows["max_steps"][0] > 20_000 // 2
    assert rows["warmup_steps"][0] == 40, "a warm-up that is over does not begin again"


def test_the_same_length_once_more_changes_nothing(nnx, run):
    with run.lock():
        training = run.config["training"] | {"max_steps": 50, "warmup_steps": 45, "weight_decay": 0.7}
        run.set_config(run.config | {"training": training})
        run.set_status(status="interrupted")
    words = ["train", "--resume", "words", "--max-steps", 50, "--dry-run", "--json"]
    rows = {row["setting"]: row["value"] for row in json.loads(nnx(*words).stdout)}
    assert rows | training == rows
    rows = {row["setting"]: row["value"] for row in json.loads(nnx(*words, "--warmup-steps", 44).stdout)}
    assert rows["warmup_steps"] == 44 and rows["weight_decay"] == 0.7


def test_a_warm_up_of_the_users_own_is_blamed_with_what_mends_it(nnx, refused, data):
    first = ["--max-steps", 500, "--warmup-steps", 400, "--out", "my run", "--val-every", 4]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("nnx_cli.training.state.TrainState.is_out_of_patience", lambda self, config: self.step == 4)
        assert nnx("train", "--data", data, *SMALL, *first, "--sample-every", 0).exit_code == 0
    message = "my run has --warmup-steps 400, more than --max-steps 9"
    result = refused(2, message, "train", "--resume", "my run", "--max-steps", 9)
    mends = result.stderr.splitlines()[-1].strip()
    assert mends == "nnx train --resume 'my run' --max-steps 9 --warmup-steps 4"
    assert nnx(*shlex.split(mends)[1:]).exit_code == 0
    training = Run(Path("my run")).config["training"]
    assert training["max_steps"] == 9 and training["warmup_steps"] == 4
    refused(2, "--warmup-steps does nothing on --resume", "train", "--resume", "my run", "--warmup-steps", 3)


def test_a_moved_run_is_told_where_its_data_is(nnx, refused, run, workspace):
    run.folder.rename(workspace / "moved")
    longer = ["train", "--resume", "moved", "--max-steps", 41]
    result = refused(3, "the token folder of moved is gone", *longer)
    assert "--data FOLDER" in result.stderr
    assert nnx(*longer, "--data", "data/words").exit_code == 0
    assert nnx("train", "--resume", "moved", "--max-steps", 42).exit_code == 0  # it knows now


def test_dry_run_of_resuming_changes_nothing(nnx, run):
    before = {path: path.read_bytes() for path in run.folder.rglob("*") if path.is_file()}
    result = nnx("train", "--resume", "words", "--max-steps", 90, "--dry-run", "--json")
    assert result.exit_code == 0, result.stderr
    rows = {row["setting"]: (row["value"], row["source"]) for row in json.loads(result.stdout)}
    assert rows["max_steps"] == (90, "command line") and rows["seed"][1].startswith("run")
    assert {path: path.read_bytes() for path in run.folder.rglob("*") if path.is_file()} == before


def test_nothing_to_resume(refused, workspace):
    refused(5, "nothing to resume", "train", "--resume", "last")
    refused(5, "no run or model 'nobody'", "train", "--resume", "nobody")
    refused(5, "no run or model", "train", "--resume", workspace)


def test_last_is_never_a_finished_run(nnx, refused, run):
    result = refused(5, "nothing to resume: weights/words is finished", "train", "--resume", "last")
    command = result.stderr.splitlines()[-1].partition("longer: ")[2]
    assert command == "nnx train --resume weights/words --max-time 1m"
    assert nnx("train", "--resume", "words").stdout.strip().endswith(command)
    with run.lock():
        run.set_status(time_s=300.0)
    assert "--max-time 10m" in refused(5, "is finished", "train", "--resume", "last").stderr


def test_last_is_no_run_that_is_being_trained(refused, run):
    shutil.copytree(run.folder, run.folder.with_name("later"))
    with run.lock():
        run.set_status(status="running")
        again = Run(run.folder.with_name("later"))
        again.set_status(status="finished")
        result = refused(5, "weights/words is being trained now", "train", "--resume", "last")
        assert "how far it is: nnx list" in result.stderr
        again.set_status(status="diverged")
        refused(5, "weights/words is being trained now", "train", "--resume", "last")
    assert session.find_unfinished() == Path("weights", "words"), "killed, it is gone on with"


@pytest.mark.parametrize(
    "words",
    [
        ["--lr", 0.1],
        ["--seed", 4],
        ["--dim", 64],
        ["--model", "nyx"],
        ["--size", "nano"],
        ["--out", "other"],
        ["--optimizer", "lion"],
        ["--init-from", "words"],
        ["--filepath", "x"],
        ["--filepath", "x", "--model", "nyx"],
        ["--max-steps", 50, "--epochs", 1],
        ["--max-steps", 0],
        ["--batch-size", 3, "--max-steps", 50],
        ["--tokenizer", "char"],
        ["--model_dim", 64],
        ["--config", "x.toml"],
    ],
    ids=lambda words: " ".join(map(str, words)),
)
def test_what_cannot_change_on_resuming_is_refused(refused, run, words):
    refused(2, "", "train", "--resume", "words", *words)


def test_a_damaged_run_is_refused(refused, run):
    for step in ckpt.steps_in(run.checkpoints):
        path = run.checkpoints / f"step-{step:08d}" / "model.safetensors"
        path.write_bytes(path.read_bytes()[:-100])
    refused(5, "no intact checkpoint", "train", "--resume", "words", "--max-steps", 50)
    (run.folder / "config.json").write_text("{}")
    refused(5, "config.json is damaged", "train", "--resume", "words", "--max-steps", 50)


@pytest.mark.parametrize("damage", ["", "{", "gone"])
def test_a_run_whose_numbers_are_lost_gets_them_back(nnx, run, damage):
    path = run.folder / "run.json"
    known = json.loads(path.read_text())
    path.unlink() if damage == "gone" else path.write_text(damage)
    result = nnx("train", "--resume", "words", "--max-steps", 42)
    assert result.exit_code == 0 and "its numbers come from the checkpoint" in result.stderr
    found = Run(run.folder).status()
    assert (found["status"], found["step"], found["ended"]) == ("finished", 42, "length")
    assert found["best_val_loss"] <= known["best_val_loss"] and found["tokens"] == 42 * 256


def test_a_damaged_checkpoint_is_passed_over_with_a_warning(nnx, run):
    path = run.checkpoints / "step-00000040" / "optimizer.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    result = nnx("train", "--resume", "words", "--max-steps", 42)
    assert result.exit_code == 0
    assert "warning: " in result.stderr and "going back" in result.stderr and "at step 20" in result.stderr


def test_a_run_in_use_is_refused(refused, run):
    with run.lock():
        refused(8, "is in use by process", "train", "--resume", "words", "--max-steps", 50)


def test_text_and_names_cannot_drive_the_terminal(nnx, workspace):
    name = "\x1b]0;mine\x07[bold]:smile:.txt"
    (workspace / name).write_text("\x1b[2J\x07" * 30)
    for words in (["--filepath", name, *FIRST], ["--filepath", name + "x"], ["--model", name], ["--resume", name]):
        result = nnx("train", *words)
        assert not set("\x1b\x07\x9b") & set(result.stdout + result.stderr), words
        assert "[bold]:smile:" in result.stderr or result.exit_code == 0, words


def test_a_run_is_named_after_its_text(nnx, text_file, workspace):
    for path, name in ((text_file, "nyx-words"), (text_file.parent / "*.txt", "nyx-text")):
        assert nnx("train", "--filepath", path, *FIRST).exit_code == 0
        assert (workspace / "weights" / name).is_dir()


def test_a_foreign_token_folder_is_read_with_the_tokenizer_that_was_named(nnx, workspace):
    folder = workspace / "tokens"
    folder.mkdir()
    for name in ("train", "val"):
        torch.randint(32, 127, (600,), dtype=torch.int16).numpy().tofile(folder / f"{name}.bin")
    bits = []
    for words in ([], ["--tokenizer", "byte"]):
        product = json.loads(nnx("train", "--data", "tokens", *FIRST, *words, "--json").stdout)
        bits.append(product["best_val_bits_per_byte"])
    assert bits[0] is None and bits[1] > 0


def test_a_folder_with_an_at_sign_is_found(run):
    renamed = run.folder.rename(run.folder.parent / "my@last")
    assert find_model("my@last").folder == renamed and find_model("my@last").which == "best"
    assert find_model("my@last@40").which == "40"


def test_inputs_that_train_cannot_take(refused, text_file):
    refused(2, "train cannot read standard input", "train", "--filepath", "-")
    refused(2, "'8' is no amount of memory", "train", "--filepath", text_file, "--vram", 8)


def test_a_length_on_the_command_line_replaces_one_of_the_file(nnx, data, workspace):
    (workspace / "run.toml").write_text("max_steps = 100\n")
    words = ["--data", data, *SMALL, "--config", "run.toml", "--max-time", "5s", "--stop-early", "off"]
    words += ["--dry-run", "--json"]
    rows = {row["setting"]: row["value"] for row in json.loads(nnx("train", *words).stdout)}
    assert rows["max_time"] == "5s" and rows["max_steps"] is None


def test_a_model_to_start_from_has_its_own_name_and_size(refused, nnx, run):
    begin = ["train", "--init-from", "words", "--data", "data/words"]
    refused(2, "is a nyx of its own size", *begin, "--model", "llama")
    refused(2, "is a nyx of its own size", *begin, "--size", "tiny")
    assert nnx(*begin, "--model", "nyx", "--max-steps", 2, "--threads", 1, "--sample-every", 0).exit_code == 0


def test_a_model_to_start_from_may_be_of_the_older_name_of_its_variant(nnx, data):
    short = ["--data", data, "--max-steps", 1, "--batch-size", 2, "--grad-accum", 1, "--sample-every", 0]
    first = nnx("train", *SMALL, *short, "--variant", "original", "--out", "first")
    assert first.exit_code == 0, first.stderr
    again = nnx("train", "--init-from", "first", *short, "--variant", "seed", "--out", "again")
    assert again.exit_code == 0, again.stderr


def test_a_dry_run_leaves_what_others_prepared(nnx, text_file, workspace):
    (workspace / "data").mkdir()
    (workspace / "data" / "precious").mkdir()
    assert nnx("train", "--filepath", text_file, *SMALL, "--dry-run").exit_code == 0
    assert [path.name for path in (workspace / "data").iterdir()] == ["precious"]


def test_usage_is_checked_before_the_text(refused):
    refused(
        2,
        "is no multiple of --seq-len 32",
        "train",
        "--filepath",
        "nothing.txt",
        "--seq-len",
        32,
        "--tokens-per-step",
        77,
    )


def losses_with(nnx, data, out, bits):
    """Training losses of a run on `data` whose mask has these bits; None: without a mask."""
    (data / "train.mask").unlink(missing_ok=True)
    if bits is not None:
        np.packbits(bits, bitorder="little").tofile(data / "train.mask")
    done = nnx("train", "--data", "data/words", *FIRST, "--out", out)
    assert done.exit_code == 0, done.stderr
    return [json.loads(line)["train_loss"] for line in Path(out, "metrics.jsonl").read_text().splitlines()]


def test_a_mask_of_ones_changes_no_loss(nnx, data):
    n_tokens = (data / "train.bin").stat().st_size
    plain = losses_with(nnx, data, "weights/plain", None)
    assert losses_with(nnx, data, "weights/ones", np.ones(n_tokens, bool)) == plain
    assert losses_with(nnx, data, "weights/half", np.arange(n_tokens) % 2 == 0) != plain
    resumed = nnx("train", "--resume", "plain", "--max-steps", 4)
    assert resumed.exit_code == 3 and "holds other tokens than" in resumed.stderr, "the mask is part of the data"


@pytest.mark.parametrize(
    ("rate", "said"), [(1e3, "times as fast as planned"), (1e15, "times as slow as planned"), (None, "")]
)
def test_a_run_says_once_that_it_is_not_as_fast_as_planned(nnx, workspace, text_file, monkeypatch, rate, said):
    monkeypatch.setattr("nnx_cli.commands.train.PACE_SECONDS", 0)
    if rate is not None:
        monkeypatch.setattr("nnx_cli.planning.plan.nominal_flops", lambda device, precision: rate)
    words = f"train --filepath {text_file} --size nano --n-layers 1 --dim 32 --n-heads 2 --seq-len 32 --batch-size 4"
    length = "--max-time 1s" if rate is not None else "--max-steps 3"
    done = nnx(*words.split(), *f"--grad-accum 1 --device cpu --threads 1 --compile off --out run {length}".split())
    assert done.exit_code == 0, done.stderr
    assert done.stderr.count("as planned") == (1 if said else 0) and said in done.stderr


class PacedFor:
    """A view of a run that is planned for 100 steps of 50 tokens in 90 s, and what it notes at a speed."""

    def __init__(self, monkeypatch, command, max_steps=None, size="derived: device", reached=None, out=None):
        monkeypatch.setattr(train, "_command_line", lambda: command)
        settings = TrainConfig(max_time="90s", max_steps=max_steps, tokens_per_step=50)
        plan = SimpleNamespace(train=settings, tokens_per_s=5000 / 90, size="nano", sources={"size": size})
        shown = SimpleNamespace(plan=plan, outlook=SimpleNamespace(tokens=5000, reached=reached))
        self.view = train._PacedView(Output(), shown, RunFacts("nyx"), out)

    def noted(self, steps_per_s):
        """What is said 20 s after the start, at that speed; "" for nothing."""
        said = []
        self.view.note = said.append
        rest = dict(train_loss=1.0, val_loss=None, lr=1.0, tokens_per_s=1.0, peak_memory_bytes=None, skipped_steps=0)
        for seconds in (4.0, 20.0):
            step = round(seconds * steps_per_s)
            self.view.step({"step": step, "tokens": 50 * step, "time_s": seconds, **rest}, seconds / 90)
        return said[0] if said else ""


def test_a_slow_run_is_told_how_far_it_gets_and_what_plans_for_that(workspace, monkeypatch):
    (workspace / "r").mkdir()
    command = "nnx train --filepath 'my book.txt' --max-time 90s --stop-early auto"
    note = PacedFor(monkeypatch, command, reached=(1, 2)).noted(0.25)
    first, last = note.splitlines()
    assert first.endswith(
        "22 steps in 90s, not 100; the bits per byte of the plan are for 100; to plan for 22, stop this run and start:"
    )
    assert last == "  nnx train --filepath 'my book.txt' --max-steps 22 --size nano"
    named = PacedFor(monkeypatch, "nnx train --size nano --data d --out r", size="command line", out=Path("r"))
    note = named.noted(5.0)
    assert "as fast as planned" in note and "of the plan" not in note
    assert note.endswith("\n  nnx train --size nano --data d --max-steps 450 --out r-2")
    assert PacedFor(monkeypatch, "python my.py").noted(0.25).endswith("about 22 steps in 90s, not 100")


def test_a_run_whose_length_is_as_planned_is_told_its_pace_alone(monkeypatch):
    note = PacedFor(monkeypatch, "nnx train", max_steps=100).noted(10.0)
    assert note.endswith("tokens a second)") and "times as fast" in note
    assert PacedFor(monkeypatch, "nnx train").noted(1.0) == ""


@pytest.mark.parametrize(
    ("words", "fix"),
    [
        (["train", "--data", "data/words", *FIRST], "take a smaller --size or --seq-len"),
        (["train", "--data", "data/words", *FIRST, "--vram", "1.001GB"], "take a smaller --size or --seq-len"),
        (["train", "--init-from", "words", "--data", "data/words", "--max-steps", 3], "a smaller --seq-len, or start"),
        (
            ["train", "--init-from", "words", "--data", "data/words", "--vram", "1.001GB"],
            "a smaller --seq-len, or start",
        ),
        (["train", "--resume", "words", "--max-steps", 60], "nnx train --resume weights/words --device cpu"),
        (["summarize", "words", "--vram", "1.001GB"], "nnx summarize --all --vram 1.001GB"),
    ],
    ids=str,
)
def test_what_does_not_fit_names_only_options_that_the_command_takes(run, nnx, monkeypatch, words, fix):
    def run_out(*_):
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr("nnx_cli.training.stepper.Stepper.run", run_out)
    result = nnx(*words)
    assert result.exit_code == 4 and fix in result.stderr.splitlines()[-1], result.stderr


@pytest.mark.parametrize("report", ["--report", "--no-report"])
def test_the_coach_speaks_once_while_a_run_goes_on_and_at_its_end(nnx, data, monkeypatch, report):
    from nnx_cli.reporting import coach, live_coach

    def always(run):
        return coach.Finding("tired", f"it is tired at step {run.steps:.0f}", "nnx sleep")

    monkeypatch.setattr(coach, "RULES", (always,))
    monkeypatch.setattr(live_coach, "SHARE", 1e9)
    words = ["train", "--data", data, *SMALL, "--max-steps", 25, "--sample-every", 0, "--out", "r", report]
    done = nnx(*words)
    assert done.exit_code == 0, done.stderr
    assert done.stderr.count("coach: it is tired at step 1; try:\n  nnx sleep") == done.stderr.count("coach:") == 1
    assert done.stdout.count("  it can be better:\nit is tired at step 25; try:\n  nnx sleep") == 1
    longer = nnx("train", "--resume", "r", "--max-steps", 40)
    assert longer.stderr.count("coach: it is tired at step 28; try:") == longer.stderr.count("coach:") == 1
    assert nnx(*words[:-2], "s", "--quiet").stderr == ""


def test_the_curves_of_a_resumed_run_begin_where_it_began(run, nnx, monkeypatch):
    seen = []
    monkeypatch.setattr("nnx_cli.console.run_view.RunScreen.remember", lambda screen, records: seen.extend(records))
    assert nnx("train", "--resume", "words", "--max-steps", 42).exit_code == 0
    assert [line["step"] for line in seen] == [1, 10, 20, 30, 40]


# conversations


@pytest.fixture
def chats(workspace):
    """Rows of messages: a number and the one behind it."""
    rows = [
        {"messages": [{"role": "user", "content": f"behind {n}?"}, {"role": "assistant", "content": f"{n + 1}"}]}
        for n in range(120)
    ]
    (workspace / "chats.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    return workspace / "chats.jsonl"


TALK = ["--max-steps", 3, "--batch-size", 2, "--grad-accum", 2, "--val-every", 1, "--device", "cpu", "--compile", "off"]


def test_a_model_learns_conversations_from_where_it_is(nnx, run, chats):
    done = nnx("train", "--init-from", "words", "--filepath", "chats.jsonl", *TALK, "--out", "weights/talk", "--json")
    assert done.exit_code == 0, done.stderr
    base, talk = find_model("words"), find_model("talk")
    assert talk.tokenizer.vocab_size == base.tokenizer.vocab_size + 5 == talk.config["model"]["vocab_size"]
    assert template_of(talk.tokenizer) is not None and talk.config["init_from"] == "weights/words"
    assert talk.weights()[1]["embedding.weight"].shape == (261, 32)
    again = nnx("train", "--init-from", "talk", "--filepath", "chats.jsonl", *TALK, "--lora-rank", 2, "--json")
    assert again.exit_code == 0, again.stderr
    measured = json.loads(nnx("eval", "talk", "--filepath", "chats.jsonl", "--json").stdout)
    answers = [f"{n + 1}" for n in range(120)]
    assert measured["tokens"] == sum(map(len, answers)) + len(answers) and measured["text_bytes"] == sum(
        map(len, answers)
    )


def test_what_conversations_refuse(nnx, refused, run, chats):
    words = ["train", "--init-from", "words", "--filepath", "chats.jsonl", *TALK]
    refused(2, "adapters do not learn them", *words, "--lora-rank", 4)
    assert nnx("quantize", "words", "--out", "weights/small", "--max-drop", 9).exit_code == 0
    refused(5, "small is quantized", "train", "--init-from", "small", "--filepath", "chats.jsonl", *TALK)
    refused(3, "for which this model has no template", "eval", "words", "--filepath", "chats.jsonl")
    refused(2, "--prompt-key and --answer-key belong together", "prepare", "chats.jsonl", "--prompt-key", "a")
    (run.folder.parent.parent / "words.txt").write_text("words\n")
    refused(2, "with plain text: it names a field", "prepare", "words.txt", "--prompt-key", "a", "--answer-key", "b")
    (run.folder.parent.parent / "none.jsonl").write_text('{"messages": [{"role": "user", "content": "hi"}]}\n')
    refused(3, "it has no answer", *words[:3], "--filepath", "none.jsonl", *TALK)


def test_a_run_of_conversations_resumes_to_the_same_bits(nnx, workspace, chats):
    assert nnx("prepare", "chats.jsonl", "--out", "data/chats").exit_code == 0
    words = ["train", "--data", "data/chats", "--size", "nano", "--n-layers", 1, "--dim", 32, "--n-heads", 2]
    words += ["--seq-len", 32, "--max-steps", 40, "--batch-size", 2, "--grad-accum", 2, "--compile", "off"]
    words += ["--device", "cpu", "--save-every", 15, "--keep", 9]  # over several epochs, whose windows differ
    for out in ("whole", "parts"):
        assert nnx(*words, "--out", f"weights/{out}").exit_code == 0
    for step in (30, 40):
        shutil.rmtree(f"weights/parts/checkpoints/step-{step:08}")
    Run(workspace / "weights" / "parts").set_status(status="interrupted")
    assert nnx("train", "--resume", "parts").exit_code == 0
    one, other = (find_model(f"{name}@last").weights()[1] for name in ("whole", "parts"))
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert nnx("eval", "whole", "--by-position").exit_code == 2


def test_an_epoch_of_conversations_reads_every_one(nnx, workspace, chats):
    words = ["train", "--filepath", "chats.jsonl", "--size", "nano", "--n-layers", 1, "--dim", 32, "--n-heads", 2]
    words += ["--seq-len", 24, "--batch-size", 2, "--grad-accum", 1, "--compile", "off", "--device", "cpu"]
    done = nnx(*words, "--epochs", 2, "--sample-every", 0, "--out", "weights/talk", "--json")
    assert done.exit_code == 0, done.stderr
    assert "of the conversations are longer" not in done.stderr
    data = open_token_folder(next(Path("data").iterdir()))
    windows = AlignedWindows(data.documents["train"], len(data.train), 24, TrainConfig.seed)
    steps = json.loads(done.stdout)["max_steps"]
    assert steps == round(2 * windows.n / 2) > 1.1 * 2 * len(data.train) / 48, "windows overlap"
    longer = nnx("train", "--resume", "talk", "--epochs", 3, "--json")
    assert json.loads(longer.stdout)["max_steps"] == round(3 * windows.n / 2)
    short = nnx(*words, "--seq-len", 12, "--max-steps", 1, "--out", "weights/short")
    assert "of the conversations are longer than --seq-len 12" in short.stderr


# trackers


@pytest.mark.parametrize(
    ("code", "message", "words"),
    [
        (2, "--log-to has no choice 'tensorbord'; did you mean tensorboard?", ["--log-to", "tensorbord"]),
        (2, "--log-to none goes with no other", ["--log-to", "none", "--log_to=trackio"]),
        (7, "--log-to wandb needs wandb", ["--log-to", "wandb"]),
    ],
)
def test_a_tracker_that_is_not_there(refused, text_file, monkeypatch, code, message, words):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    Path("wandb").mkdir()  # as the library leaves one behind
    result = refused(code, message, "train", "--filepath", text_file, *FIRST, *words)
    assert code != 7 or "pip install 'nnx-cli[wandb]'" in result.stderr


def test_a_mere_folder_is_no_library(refused, data, monkeypatch, workspace):
    monkeypatch.syspath_prepend(workspace)
    Path("no_such_tracker").mkdir()
    monkeypatch.setattr("nnx_cli.config.module_names", lambda package: ("no_such_tracker", "muon"))
    refused(7, "needs no_such_tracker", "train", "--data", data, *FIRST, "--log-to", "no_such_tracker")


def test_trackers_of_a_run_stay_until_others_are_named(nnx, data, monkeypatch):
    taken = []
    words = "--log-to", "wandb", "--log_to=trackio"

    def note(self):
        taken.append((self.modules, self.begin))
        return self

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: sys.__spec__)
    monkeypatch.setattr(Tracking, "__enter__", note)
    shown = nnx("train", "--data", data, *FIRST, *words, "--dry-run").stdout
    assert re.search(r"log_to +wandb, trackio +command line", shown)
    Path("file.toml").write_text('log_to = "wandb"\n')
    assert nnx("train", "--data", data, *FIRST, "--config", "file.toml").exit_code == 0
    for more, words in enumerate(([], ["--log-to", "trackio", "--log-to", "trackio"], ["--log-to", "none"]), start=4):
        assert nnx("train", "--resume", "nyx-words", "--max-steps", more, *words).exit_code == 0
    run = Run(Path("weights/nyx-words"))
    wandb, trackio = ["nnx_cli.trackers.wandb"], ["nnx_cli.trackers.trackio"]
    assert taken == [(wandb, 0), (wandb, 3), (trackio, 4)] and run.config["training"]["log_to"] == ["none"]
    page = (run.folder / "report.html").read_text(encoding="utf-8")
    assert "<th scope=row>log_to</th><td class=said>none</td>" in page


def test_a_plan_for_several_processes(nnx, text_file):
    words = ("train", "--filepath", text_file, "--size", "nano", "--max-steps", 3, "--device", "cpu", "--dry-run")
    alone, two, three = (
        {row["setting"]: row["value"] for row in json.loads(nnx(*words, "--gpus", n, "--json").stdout)}
        for n in (1, 2, 3)
    )
    assert alone["tokens_per_step"] == two["tokens_per_step"] == three["tokens_per_step"]
    assert alone["batch_size"] == 2 * two["batch_size"] and two["grad_accum"] == 2, "each takes as many sequences"
    assert "on 2 x CPU" in nnx(*words, "--gpus", 2).stdout
