"""What all commands share."""

import pytest
import torch

from nnx_cli import __version__
from nnx_cli.cli import COMMANDS


def test_version(nnx):
    assert nnx("--version").stdout.strip() == f"nnx {__version__}"


@pytest.mark.parametrize("words", [["--help"], ["-h"]])
def test_help_names_every_command(nnx, words):
    result = nnx(*words)
    assert result.exit_code == 0 and all(name in result.stdout for name in COMMANDS)


def test_nothing_is_a_question_for_help(nnx):
    result = nnx()
    assert all(f"\n  {name}" in result.output for name in COMMANDS), result.output
    assert "nnx: Usage" not in result.output


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_every_command(nnx, command):
    result = nnx(command, "--help")
    assert result.exit_code == 0 and result.stdout.startswith("Usage: ") and "--json" in result.stdout


def test_help_of_train_names_the_fields_of_all_architectures(nnx):
    text = nnx("train", "--help").stdout
    for option in ("--dim", "--n-kv-heads", "--qk-norm", "--xpos-scale-base", "--max-steps", "--tokenizer"):
        assert option in text
    assert "model_dim" not in text and "--model-dim" not in text, "further spellings are not listed"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["trian"], "train"),
        (["trian", "--lr", 3], "train"),
        (["prepare", "--ot", "x"], "--out"),
        (["sample", "--top_q", 1], "--top-p"),
        (["train", "--model"], "--model"),
        (["train", "--max-steps", "many"], "--max-steps"),
        (["train", "surplus"], "surplus"),
        (["--lr", 3], "--lr"),
    ],
    ids=str,
)
def test_words_that_mean_nothing(refused, words, message):
    result = refused(2, message, *words)
    assert result.stdout == ""


def test_debug_shows_the_traceback(workspace, nnx):
    result = nnx("sample", "nobody", "--debug")
    assert result.exit_code == 5 and "Traceback" in result.stderr and "nnx: there is no run or model" in result.stderr


def test_an_internal_error_is_one_line(refused, workspace, monkeypatch):
    def crash(spec):
        raise RuntimeError("first\nsecond \x1b[2J")

    monkeypatch.setattr("nnx_cli.runs.find.find_model", crash)
    result = refused(1, "internal error: RuntimeError: first second", "sample", "words")
    assert "--debug" in result.stderr


def test_a_card_that_fails_is_told_from_an_error_of_ours(refused, monkeypatch):
    def crash(spec):
        raise torch.AcceleratorError("CUDA error: unspecified launch failure\nSearch for it in the manual")

    monkeypatch.setattr("nnx_cli.runs.find.find_model", crash)
    result = refused(1, "the card failed: CUDA error: unspecified launch failure", "sample", "words")
    assert "Search" not in result.stderr and "nnx train --resume last" in result.stderr


def test_running_out_of_memory_is_code_4(refused, monkeypatch):
    def crash(spec):
        raise MemoryError

    monkeypatch.setattr("nnx_cli.runs.find.find_model", crash)
    refused(4, "out of memory", "sample", "words")


def test_ctrl_c_is_code_130(nnx, monkeypatch):
    def stop(spec):
        raise KeyboardInterrupt

    monkeypatch.setattr("nnx_cli.runs.find.find_model", stop)
    result = nnx("sample", "words")
    assert result.exit_code == 130 and "Traceback" not in result.stderr
