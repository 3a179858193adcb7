import errno
import json
import shutil
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch

from nnx_cli import models
from nnx_cli.cli import app  # noqa: F401  # the command line, whole, before a format is replaced
from nnx_cli.convert.export import _compare, _export, hf
from nnx_cli.errors import QualityError
from nnx_cli.runs.find import find_model
from nnx_cli.runs.load import load_model

TOLERANCE = 1e-4


@pytest.fixture
def form(monkeypatch):
    """A format without a library: the tensors as torch writes them. `form.error` is added to every logit."""

    def write(source, folder):
        source.tell("writing", 0.5)
        torch.save(source.model.state_without_ties(), folder / "weights.pt")
        (folder / "README.md").write_text(source.card.to_markdown("Load it.", ["test"], "torch"), encoding="utf-8")
        if made.refusal:
            raise made.refusal

    def check(source, folder):
        state = torch.load(folder / "weights.pt", weights_only=True)
        assert state.keys() == source.model.state_without_ties().keys()

        def generate(prompt, n):
            ids = prompt
            for _ in range(n):
                ids = torch.cat((ids, source.model(ids)[:, -1:].argmax(-1)), dim=1)
            chosen = ids[0, prompt.shape[1] :].clone()
            chosen[made.same :] = (chosen[made.same :] + 1) % 256
            return chosen

        return _compare.compare(source, lambda ids: source.model(ids) + made.error, generate, TOLERANCE)

    made = types.SimpleNamespace(
        LIBRARIES=(), FILE=None, write=write, check=check, error=0.0, same=10**6, refusal=None, why_not=lambda *_: None
    )
    monkeypatch.setattr(_export, "load_format", lambda name: made)
    return made


def left(folder="."):
    """Everything here but the run and its data."""
    return sorted(path.name for path in Path(folder).iterdir() if path.name not in ("data", "weights"))


def test_the_receipt_says_what_was_made(nnx, run, form):
    result = nnx("export", "words", "--format", "hf", "--json")
    receipt = json.loads(result.stdout)
    assert list(receipt) == ["format", "out", "file_bytes", "max_logit_difference", "same_greedy_tokens"]
    assert receipt["out"] == "words-hf" and receipt["format"] == "hf" and left() == ["words-hf"]
    assert receipt["file_bytes"] == sum(path.stat().st_size for path in Path("words-hf").iterdir())
    assert receipt["max_logit_difference"] == 0 and receipt["same_greedy_tokens"] == 16  # half of a context of 32


def test_one_file_becomes_what_was_asked_for(nnx, run, form):
    form.FILE = "weights.pt"
    assert nnx("export", "words", "--format", "hf").exit_code == 0
    assert left() == ["words.pt"] and Path("words.pt").is_file()


@pytest.mark.parametrize(
    ("error", "same", "told"),
    [(2e-4, 10**6, "2.0e-04 in a logit"), (float("nan"), 10**6, "inf in a logit"), (0.0, 5, "5 of 16 greedy tokens")],
)
def test_what_computes_something_else_is_not_kept(refused, run, form, error, same, told):
    form.error, form.same = error, same
    refused(6, told, "export", "words", "--format", "hf", "--out", "new/place")


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EACCES])
def test_a_place_that_cannot_be_written_is_left_as_it_was(refused, run, form, number):
    form.refusal = OSError(number, "as the system says")
    refused(8, "export", "export", "words", "--format", "hf", "--out", "export")


@pytest.fixture
def llama(start, workspace):
    """A run of the architecture that every format holds."""
    made, trainer = start(workspace / "weights" / "llama", model="llama", max_steps=4)
    with made.lock():
        made.set_status(status=trainer.train(made, lambda: False))


def test_a_disk_without_room_is_told_before_anything_is_written(refused, llama, monkeypatch):
    monkeypatch.setattr(hf, "LIBRARIES", ())
    monkeypatch.setattr(shutil, "disk_usage", lambda path: types.SimpleNamespace(free=1000))
    refused(8, "disk full", "export", "llama", "--format", "hf")


def test_bad_input_is_refused(refused, run, form, monkeypatch):
    Path("taken").mkdir()
    refused(2, "no choice 'huggingface'", "export", "words", "--format", "huggingface")
    refused(5, "no run or model", "export", "nothing", "--format", "hf")
    refused(8, "taken exists already", "export", "words", "--format", "hf", "--out", "taken")
    for inside in ("weights/words/hf", "weights/words/checkpoints/a/b", "data/../weights/words/x"):
        refused(8, "inside the folder of the model", "export", "words", "--format", "hf", "--out", inside)
    with run.lock():
        run.set_status(status="running")
        for which in ("words", "words@best", "words@last"):
            refused(5, "still training", "export", which, "--format", "hf")
    form.LIBRARIES = ("torch", "no_such_library")
    result = refused(7, "needs no_such_library", "export", "words", "--format", "hf")
    assert "pip install 'nnx-cli[hf]'" in result.stderr


def test_a_killed_run_can_be_exported(nnx, run, form):
    run.set_status(status="running")  # and nobody holds its lock
    assert nnx("export", "words", "--format", "hf").exit_code == 0


def test_an_architecture_that_does_not_fit_is_told_which_do(refused, run, monkeypatch):
    only = types.SimpleNamespace(
        FILE=None, why_not=lambda name, config: None if name == "llama" else "it knows no xPos"
    )
    every = types.SimpleNamespace(why_not=lambda name, config: None)
    monkeypatch.setattr(_export, "load_format", lambda name: only if name == "hf" else every)
    monkeypatch.setattr(_export, "names", lambda: ("hf", "other", "third"))
    result = refused(2, "nyx, for it knows no xPos; it holds llama", "export", "words", "--format", "hf")
    assert "nyx can be exported with --format other or third" in result.stderr


KILLED = """
import os, signal
from nnx_cli.cli import main
from nnx_cli.convert.export import hf
def check(source, folder):
    os.kill(os.getpid(), signal.SIGKILL)
hf.LIBRARIES, hf.check = (), check
main()
"""


@pytest.mark.skipif(sys.platform == "win32", reason="nothing is killed like that there")
def test_a_killed_export_leaves_nothing_that_looks_complete(nnx, llama, form):
    words = ["export", "llama", "--format", "hf", "--out", "made"]
    died = subprocess.run([sys.executable, "-c", KILLED, *words], capture_output=True, text=True)
    assert died.returncode == -9, died.stderr
    assert not Path("made").exists() and all(name.startswith(".tmp-made-") for name in left())
    assert nnx(*words).exit_code == 0 and left() == ["made"]


def test_best_and_last_are_different_weights(nnx, run, form):
    shutil.copy(run.folder / "model.safetensors", "kept.safetensors")
    states = {}
    for which in ("words@best", "words@last", "words@20"):
        assert nnx("export", which, "--format", "hf", "--out", which).exit_code == 0
        states[which] = torch.load(f"{which}/weights.pt", weights_only=True)
        ours = load_model(find_model(which), torch.device("cpu")).state_without_ties()
        assert all(torch.equal(tensor, ours[name]) for name, tensor in states[which].items())
    assert any(not torch.equal(x, states["words@last"][name]) for name, x in states["words@20"].items())


def test_a_quantized_model_is_dequantized_and_its_card_says_so(nnx, run, form):
    for bits in (8, 4):
        name = f"words-int{bits}"
        assert nnx("quantize", "words", "--bits", bits, "--max-drop", 9).exit_code == 0
        assert nnx("export", name, "--format", "hf").exit_code == 0
        card = Path(f"{name}-hf/README.md").read_text(encoding="utf-8")
        assert f"quantized to int{bits}" in card
        state = torch.load(f"{name}-hf/weights.pt", weights_only=True)
        assert {tensor.dtype for tensor in state.values()} == {torch.float32}
        rows = state["blocks.0.ffn_out.weight"][0]
        assert len(rows.unique()) <= 2**bits * (1 if bits == 8 else len(rows) // 32 + 1)


def test_the_card_names_the_data_only_when_asked(nnx, run, form):
    assert nnx("export", "words", "--format", "hf", "--out", "a").exit_code == 0
    assert nnx("export", "words", "--format", "hf", "--out", "b", "--data-name", "Words | of | mine").exit_code == 0
    card, named = (Path(f"{folder}/README.md").read_text(encoding="utf-8") for folder in "ab")
    assert "words" not in card.lower() and r"Words \| of \| mine" in named
    best = run.best_found()
    assert f"{best['best_val_bits_per_byte']:.6g}" in card and f"| steps | {best['best_step']} |" in card


@pytest.mark.parametrize(("largest", "allowed"), [(0.5, 1e-4), (40.0, 4e-3), (float("inf"), 1e-4)])
def test_large_logits_may_differ_by_more(largest, allowed):
    """Rounding is a share of what is rounded."""

    def model(ids, cache=None):
        return torch.nn.functional.one_hot(ids, 5) * largest

    model.config, model.make_cache = types.SimpleNamespace(seq_len=4), lambda batch_size, max_seq_len: None
    source = types.SimpleNamespace(model=model, ids=torch.zeros(2, 4, dtype=torch.int64), tell=lambda what, done: None)
    found = _compare.compare(source, model, lambda prompt, n: torch.zeros(n, dtype=torch.int64), TOLERANCE)
    assert found.tolerance == pytest.approx(allowed)


def test_nothing_computed_is_no_reason_to_pass():
    with pytest.raises(QualityError):
        _export._judge("hf", _compare.Found(float("nan"), TOLERANCE, 50, 50))


def test_the_card_says_where_the_model_comes_from(nnx, run, form):
    assert nnx("export", "words", "--format", "hf").exit_code == 0
    assert "trained from scratch" in Path("words-hf/README.md").read_text(encoding="utf-8")
    torch.save(models.reference_tensors(models.build("nyx", dim=32, n_layers=1, n_heads=2)), "other.pth")
    assert nnx("import", "--model", "nyx", "other.pth").exit_code == 0
    assert nnx("export", "nyx-other", "--format", "hf").exit_code == 0
    card = Path("nyx-other-hf/README.md").read_text(encoding="utf-8")
    assert "trained" not in card and "## Training" not in card and "other" not in card


def test_a_model_from_a_file_of_the_users_is_refused(refused, nnx, workspace, token_path):
    source = (models.FOLDER / "llama.py").read_text(encoding="utf-8")
    Path("my.py").write_text(source, encoding="utf-8")
    words = ["--dim", 32, "--n-layers", 1, "--n-heads", 2, "--seq-len", 32, "--max-steps", 1, "--batch-size", 2]
    words += ["--threads", 1, "--sample-every", 0, "--data", token_path, "--out", "weights/mine"]
    assert nnx("train", "--model", "my.py", *words).exit_code == 0
    refused(2, "it runs code from a file of yours", "export", "mine", "--model", "my.py", "--format", "hf")


def test_an_exported_folder_in_weights_is_no_run(nnx, run, form):
    assert nnx("export", "words", "--format", "hf", "--out", "weights/made").exit_code == 0
    Path("weights/made/config.json").write_text('{"model_type": "llama"}')
    listed = json.loads(nnx("list", "--json").stdout)
    assert [row["name"] for row in listed] == ["words"]
    assert "nnx import --model llama" in nnx("sample", "weights/made").stderr
    Path("weights/made").rename("words")
    assert nnx("sample", "words", "--max-new-tokens", 2).exit_code == 0  # the run of that name
