"""nnx from Python: the commands' options, errors and numbers, and nothing on the screen."""

import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

import nnx_cli
from nnx_cli import load, models, prepare, sample, train
from nnx_cli.errors import CheckpointError, DataError, NnxError, UsageError

README = Path(nnx_cli.__file__).parents[1] / "README.md"
SHORT = dict(max_steps=2, dim=32, n_layers=1, n_heads=2, seq_len=32, batch_size=2, grad_accum=1, val_batches=1)
SHORT |= dict(compile="off", device="cpu", threads=1, sample_every=0, watch=False)


def test_the_example_of_the_readme_runs(workspace, text_file, capfd):
    shutil.copy(text_file, "book.txt")
    (code,) = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.S)
    assert 'max_time="5m"' in code and len(code.splitlines()) <= 10
    short = ", ".join(f"{name}={value!r}" for name, value in SHORT.items())
    names = {}
    exec(code.replace('max_time="5m"', short), names)
    said = capfd.readouterr()
    assert said.out.startswith("nano\n") and said.out.count("AI is") == 2 and "nyx-book" in said.out
    assert isinstance(names["network"], torch.nn.Module) and not said.err


def test_it_is_what_the_command_does(workspace, nnx, text_file):
    shutil.copy(text_file, "book.txt")
    run = train("book.txt", out="weights/python", **SHORT)
    words = [f"--{name.replace('_', '-')}={value}" for name, value in SHORT.items()]
    assert nnx("train", "--filepath", "book.txt", "--out", "weights/typed", *words).exit_code == 0
    typed = load("typed")
    same = zip(run.model.state_dict().values(), typed.model.state_dict().values(), strict=True)
    assert all(torch.equal(a, b) for a, b in same)
    assert run.metrics[-1]["val_loss"] == typed.metrics[-1]["val_loss"]
    written = nnx("sample", "typed", "--prompt", "the", "--max-new-tokens", 9, "--seed", 3).stdout
    assert run.sample("the", max_new_tokens=9, seed=3) + "\n" == written
    again = train(resume=run.folder, max_steps=3)
    assert again.folder == run.folder and again.metrics[-1]["step"] == 3


@pytest.mark.parametrize(
    ("kind", "message", "wrong"),
    [
        (UsageError, "--dimm", lambda: train("book.txt", dimm=3)),
        (NnxError, "whole number", lambda: train("book.txt", dim="wide")),
        (UsageError, "no model", lambda: train("book.txt", model="gpt")),
        (DataError, "missing.txt", lambda: train("missing.txt")),
        (DataError, "missing.txt", lambda: prepare("missing.txt")),
        (CheckpointError, "nothing", lambda: load("nothing")),
        (UsageError, "command line", lambda: train(dry_run=True)),
        (UsageError, "num_samples", lambda: sample(num_samples=2)),
        (UsageError, "not bytes", lambda: sample("words", b"the")),
        (UsageError, "one by one", lambda: prepare(["book.txt"])),
        (UsageError, "one by one", lambda: train(["book.txt"])),
    ],
)
def test_errors_are_the_commands_own(workspace, kind, message, wrong, capfd):
    with pytest.raises(kind, match=message):
        wrong()
    assert capfd.readouterr() == ("", "") and not any(workspace.iterdir())


def test_in_a_thread_of_another_program(workspace, token_path):
    made = []
    thread = threading.Thread(target=lambda: made.append(train(data=token_path, **SHORT)))
    thread.start()
    thread.join()
    assert made[0].metrics[-1]["step"] == 2


def test_progress_is_shown_where_it_is_asked_for(workspace, text_file, capfd):
    prepare(text_file, out="data/silent")
    assert capfd.readouterr() == ("", "")
    train(data="data/silent", progress=True, **SHORT)
    said = capfd.readouterr()
    assert "parameters" in said.err and not said.out


def test_to_import_it_imports_no_torch():
    code = "import sys; from nnx_cli import train; assert 'torch' not in sys.modules; import nnx_cli; nnx_cli.nothing"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "AttributeError" in done.stderr, done.stderr


def test_a_file_is_named_as_on_the_command_line(workspace, text_file):
    source = (models.FOLDER / "llama.py").read_text(encoding="utf-8")
    Path("mine.py").write_text(f"{source}# {workspace}\n", encoding="utf-8")
    run = train(text_file, model="mine.py", out="weights/mine", **SHORT)
    assert load("mine", model="mine.py").model.architecture == run.model.architecture == "mine"
    for wrong, message, note in (
        ({}, "in mine.py", "name the file: --model mine.py"),
        ({"bank_file": "mine.py", "model": "mine.py"}, "not both", None),
    ):
        with pytest.raises(NnxError, match=message) as error:
            load("mine", **wrong)
        assert note is None or note in error.value.__notes__[0]
    Path("mine.py").write_text("another text")
    with pytest.raises(CheckpointError, match="SHA-256 differs"):
        load("mine", model="mine.py")
