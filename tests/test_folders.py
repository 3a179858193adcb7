"""Folders that an early version wrote open, resume, sample and evaluate as they did then."""

import json
import shutil
from pathlib import Path

import golden
import pytest

from nnx_cli.kernels import attention_c

FOLDERS = Path(__file__).with_name("folders")
EXPECTED = json.loads((FOLDERS / "expected.json").read_text())


@pytest.fixture
def copies(tmp_path, monkeypatch):
    for name in ("data", "weights"):
        shutil.copytree(FOLDERS / name, tmp_path / name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(attention_c, "takes", lambda q, k, v: False)  # which draws other masks of dropout


def check(name, found):
    exact = all(EXPECTED[key] == value for key, value in golden.capability().items())
    assert golden.unlike(EXPECTED[name], found, exact) == []


@pytest.mark.parametrize("name", ["nyx", "ngpt", "n4", "neon", "tape", "llama", "adapter"])
def test_a_run_resumes(copies, name):
    check(name, golden.resumed(golden.run_here, Path("weights") / name))


def test_a_run_with_bfloat16_weights_writes_and_quantizes(copies):
    run = Path("weights") / golden.BF16
    losses = golden.evaluate(golden.run_here, run)
    status = json.loads((run / "run.json").read_text())
    assert losses["loss"] == pytest.approx(status["best_val_loss"], rel=0.02)
    receipt = golden.quantize(golden.run_here, run, Path("weights") / "bf16-int8")
    assert receipt["before"]["bits_per_byte"] == pytest.approx(receipt["after"]["bits_per_byte"], rel=0.01)


@pytest.mark.parametrize("name", ["int8", "int4"])
def test_a_quantized_model_writes(copies, name):
    check(name, golden.written(golden.run_here, Path("weights") / name))


@pytest.mark.parametrize("name", ["byte", "char", "bpe"])
def test_a_token_folder_is_trained_on(copies, name):
    check(name, golden.trained_on(golden.run_here, Path("data") / name))


def test_every_folder_is_tried():
    names = {path.name for kind in ("data", "weights") for path in (FOLDERS / kind).iterdir()}
    assert names == EXPECTED.keys() - golden.capability().keys()
