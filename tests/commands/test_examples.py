"""What help shows at its end can be typed as it stands."""

import gzip
import importlib
import json
import shlex
import shutil
from pathlib import Path

import pytest
import torch
import typer

from nnx_cli import cli, models
from nnx_cli.cli import COMMANDS, app

CHEAP = "prepare sample chat eval report visualize summarize quantize merge import list doctor".split()
NOT_HERE = {  # tests of these commands have them
    "nnx summarize --vram 8GB",
    "nnx import llama-folder --model llama",
    "nnx visualize book",
}


def typed(text):
    """The command lines in an epilog, without the remarks behind them."""
    return [line.split("    (")[0].strip() for line in text.splitlines() if line.startswith("  nnx ")]


def epilog(name):
    return importlib.import_module(f"nnx_cli.commands.{COMMANDS[name][0]}").EXAMPLES


@pytest.mark.parametrize("name", COMMANDS)
def test_help_ends_with_three_examples_that_parse(nnx, name):
    found = typed(epilog(name))
    assert len({*found}) == len(found) >= 3
    assert " ".join(nnx(name, "--help").stdout.split()).endswith(" ".join(epilog(name).split()))
    group = typer.main.get_command(app)
    for line in found:
        words = shlex.split(line)
        assert words[:2] == ["nnx", name]
        if "--help" not in words:
            with group.make_context("nnx", words[1:]) as root:
                group.commands[name].make_context(name, words[2:], parent=root)


def test_nnx_alone_shows_what_to_do_first(nnx):
    steps = typed(cli.FIRST_STEPS)
    shown = nnx().stdout
    assert len(steps) == 3 and all(step in shown for step in steps)


@pytest.fixture
def book(run, workspace, text_file):
    """A folder with what the examples name: text of several forms, runs, an original's checkpoint."""
    shutil.move("weights/words", "weights/book")
    for other in ("book-a", "book-b", "book-c"):
        shutil.copytree("weights/book", f"weights/{other}")
    for name in ("book.txt", "other.txt"):
        shutil.copy(text_file, name)
    Path("books").mkdir()
    shutil.copy(text_file, "books/one.md")
    rows = [json.dumps({"text": line}) for line in text_file.read_text(encoding="utf-8").splitlines()]
    Path("web-1.jsonl.gz").write_bytes(gzip.compress("\n".join(rows).encode()))
    chats = [json.dumps({"question": f"behind {n}?", "answer": f"{n + 1}"}) for n in range(60)]
    Path("chats.jsonl").write_text("\n".join(chats))
    torch.save(models.reference_tensors(models.build("nyx", dim=32, n_layers=1, n_heads=2)), "nyx.pth")


@pytest.fixture
def adapters(book, nnx):
    words = "train --init-from book --data data/words --lora-rank 2 --max-steps 1 --batch-size 1 --grad-accum 1"
    assert nnx(*words.split(), "--sample-every", 0, "--out", "weights/book-lora").exit_code == 0


@pytest.mark.parametrize("name", CHEAP)
def test_cheap_examples_run(nnx, book, request, name):
    if name == "merge":
        request.getfixturevalue("adapters")
    before = {*Path("weights").iterdir()}
    lines = [line for line in typed(epilog(name)) if line not in NOT_HERE]
    assert len(lines) >= 2
    for line in lines:
        done = nnx(*shlex.split(line)[1:], input="")
        assert done.exit_code == 0, (line, done.stderr)
        for made in {*Path("weights").iterdir()} - before:  # each as the first thing that is done
            shutil.rmtree(made) if made.is_dir() else made.unlink()
