import json
import shutil
import signal
import sys
from pathlib import Path

import pytest
import torch

from nnx_cli.commands.sweep import _other_gpus
from nnx_cli.experiments import sweep as sweeps
from nnx_cli.experiments.sweep_file import read_sweep

SHAPE = ["--dim", 32, "--n-heads", 2, "--n-layers", 1, "--seq-len", 32, "--tokens-per-step", 256]
HERE = ["--threads", 1, "--device", "cpu", "--compile", "off"]
SMALL = ["sweep", "--data", "data/words", *SHAPE, *HERE, "--max-steps", 12, "--save-every", 3]
LR = ["--set", "lr=1e-3..3e-2:log"]
YAML = """
program: train.py
method: random
metric: {name: val/loss, goal: minimize}
run_cap: 3
parameters:
  learning_rate: {distribution: log_uniform_values, min: 1e-3, max: 3e-2}
  dropout: {values: [0, 0.1]}
  schedule: {value: cosine}
"""


@pytest.fixture
def words(token_path, workspace):
    """The folder of tokens in the current one."""
    shutil.copytree(token_path, workspace / "data" / "words")
    return workspace


def table(folder):
    """What a sweep found, without times."""
    left_out = ("time_s", "peak_memory_bytes")
    trials = read_sweep(Path(folder))["trials"]
    return [{name: value for name, value in trial.items() if name not in left_out} for trial in trials]


def killed_at(n_saves, *command):
    """Run a command in a process that is killed when it is about to save for the n-th time."""
    from tests.reliability.processes import Command, Setting

    process = Command(Path.cwd(), *command, setting=Setting(pause=("saving", n_saves)))
    assert process.pauses(), process.output
    process.send(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL


@pytest.mark.skipif(sys.platform == "win32", reason="there is no SIGKILL on Windows")
def test_a_sweep_that_is_killed_ends_like_one_that_is_not(nnx, words):
    line = [*SMALL, *LR, "--trials", 3, "--save-every", 2]
    folder = Path("weights/sweep-words")
    killed_at(9, *line)
    assert [path.name for path in sorted((folder / "002" / "checkpoints").iterdir())][-1] == "step-00000004"
    assert [each["status"] for each in read_sweep(folder)["trials"]] == ["finished", "waiting", "waiting"]
    assert nnx("list").stdout.split().count("interrupted") == 1
    result = nnx(*line)
    assert result.exit_code == 0 and "resuming weights/sweep-words: 1 of 3 trials done" in result.stderr
    shutil.move(folder, "killed")
    result = nnx(*line)
    found = [row.split()[0] for row in result.stdout.splitlines() if row.split()[-1:] == ["finished"]]
    assert found == [trial["trial"] for trial in read_sweep(folder)["trials"]] and len(found) == 3
    assert table("killed") == table(folder)
    page = (folder / "sweep.html").read_text()
    assert page.startswith("<!doctype html>") and "Bits per byte by lr" in page and found[0] in page
    best = read_sweep(folder)["trials"][0]
    again = next(text for text in result.stdout.splitlines() if text.startswith("train longer"))
    assert f"--lr {best['settings']['lr']:g}" in again and "--data data/words" in again
    shown = nnx(*line, "--json")
    assert json.loads(shown.stdout) == read_sweep(folder) and "is finished" in nnx(*line).stderr
    assert nnx(*best["command"].split()[1:], "--out", "again", "--no-watch", "--no-report").exit_code == 0
    assert Path("again/model.safetensors").read_bytes() == Path(best["out"], "model.safetensors").read_bytes()


def test_a_sweep_of_weights_and_biases(nnx, words, monkeypatch):
    pytest.importorskip("yaml", reason="PyYAML is an extra: pip install 'nnx-cli[sweep]'")
    monkeypatch.setattr(sweeps, "LEAST_STEPS", 2)
    Path("s.yaml").write_text(YAML)
    line = ["--wandb-yaml", "s.yaml", "--set", "dropout=0.05", "--budget", "600", "--keep", "none"]
    small = [word for word in SMALL if word not in ("--max-steps", 12)]
    assert nnx(*small, *line).exit_code == 2  # a number without a unit
    line[line.index("600")] = "0.6K"
    result = nnx(*small, *line)
    assert result.exit_code == 0, result.stderr
    assert "s.yaml: not read, for they are for agents: program" in result.stderr
    record = read_sweep(Path("weights/sweep-words"))
    assert record["length"] == {"tokens": 600} and [trial["steps"] for trial in record["trials"]] == [2, 2, 2]
    assert {trial["settings"]["schedule"] for trial in record["trials"]} == {"cosine"}
    assert {trial["settings"]["dropout"] for trial in record["trials"]} == {0.05}
    assert not [*Path("weights").glob("*/*/*.safetensors")]
    assert all(1e-3 <= trial["settings"]["lr"] <= 3e-2 for trial in record["trials"])


@pytest.mark.parametrize(
    ("code", "message", "options"),
    [
        (2, "nothing to search", []),
        (2, "no setting 'lrr'; did you mean lr?", ["--set", "lrr=1,2"]),
        (2, "no setting 'n_layer'; did you mean n_layers?", ["--set", "n_layer=1..4"]),
        (2, "is upside down", ["--set", "lr=1e-2..1e-4:log"]),
        (2, "begins above 0", ["--set", "lr=0..1e-2:log"]),
        (2, "--lr is -1", ["--set", "lr=-1..2"]),
        (2, "--optimizer has no choice 'adam'; did you mean adamw?", ["--set", "optimizer=adam,muon"]),
        (2, "there is no model 'llamma'; did you mean llama?", ["--set", "model=nyx,llamma"]),
        (2, "--size has no choice 'tinny'", ["--set", "size=nano,tinny"]),
        (2, "lr is searched and given", [*LR, "--lr", 0.1]),
        (2, "names lr twice", [*LR, *LR]),
        (2, "tokenizer is the same for all trials", ["--set", "tokenizer=byte,bpe"]),
        (2, "device is the same for all trials", ["--set", "device=cpu,cuda"]),
        (2, "two lengths: --budget and --max-steps", [*LR, "--budget", "2m"]),
        (2, "max_steps is searched and given", ["--set", "max_steps=20,30"]),
        (2, "neither a length of time nor a number of tokens", [*LR, "--budget", "2 parsecs"]),
        (2, "--keep has no choice 'all'", [*LR, "--keep", "all"]),
        (2, "--sampler has no choice 'bayes'", [*LR, "--sampler", "bayes"]),
        (2, "--trials does nothing with --sampler grid", ["--set", "lr=1,2", "--sampler", "grid", "--trials", 4]),
        (2, "is any number from 0.001 to 0.03", [*LR, "--sampler", "grid"]),
        (2, "--eta does nothing without --sampler halving", [*LR, "--eta", 2]),
        (2, "halving needs at least 3 trials", [*LR, "--sampler", "halving", "--trials", 2]),
        (2, "too short for a trial: 1 step", [*LR, "--sampler", "halving", "--trials", 9]),
        (2, "--ffn-dim 0 at least 1", ["--set", "ffn_dim=0,-3"]),
        (3, "cannot read --wandb-yaml nowhere.yaml", ["--wandb-yaml", "nowhere.yaml"]),
    ],
)
def test_what_a_sweep_refuses(refused, words, code, message, options):
    refused(code, message, *SMALL, *options)


@pytest.mark.parametrize(("status", "code"), [("diverged", 6), ("out of memory", 4)])
def test_a_sweep_without_a_result(nnx, words, monkeypatch, status, code):
    monkeypatch.setattr(sweeps.OneRun, "train", lambda run: (status, "it went wrong"))
    result = nnx(*SMALL, "--set", "lr=0.1,0.2", "--sampler", "grid")
    assert result.exit_code == code and "no trial of weights/sweep-words has a result" in result.stderr
    assert result.stdout.count(status) == 2 and "002: it went wrong" in result.stdout
    (row,) = json.loads(nnx("list", "--json").stdout)
    assert (row["model"], row["status"], row["best_val_bits_per_byte"]) == ("nyx", "finished", None)


def test_gpus_that_are_left_idle_are_told(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert "one of 4 GPUs" in _other_gpus(torch.device("cuda"))
    assert _other_gpus(torch.device("cpu")) is None
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert _other_gpus(torch.device("cuda")) is None


def test_libraries_that_are_missing(refused, words, monkeypatch):
    for name, options in (("optuna", [*LR, "--sampler", "tpe"]), ("yaml", ["--wandb-yaml", "s.yaml"])):
        Path("s.yaml").write_text(YAML)
        monkeypatch.setitem(sys.modules, name, None)
        assert "pip install 'nnx-cli[sweep]'" in refused(7, "needs", *SMALL, *options).stderr
