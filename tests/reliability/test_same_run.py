"""Promises 7 and 8: the same run on the same machine has the same bytes; on another one it is still the same run."""

from __future__ import annotations

import json
import os
import re
import signal
from pathlib import Path

import pytest

from nnx_cli.system.files import read_json, sha256_file, to_json
from tests.reliability import Result
from tests.reliability.processes import (
    Command,
    Setting,
    assert_same,
    make_data,
    outcome,
    timeless,
    train_words,
    workplace,
)

pytestmark = pytest.mark.skipif(os.name != "posix", reason="processes are forked")

STEPS = 16
MODELS = ("nyx", "llama", "n4", "neon", "ngpt", "tape")


# determinism


def twice(folder: Path, model: str, **changes: object) -> None:
    """The same command twice; and a third time with every value that the first chose by itself given to it."""
    data = make_data(folder)
    outcomes = []
    for name in ("first", "second"):
        command = Command(folder, *train_words(data, f"weights/{name}", model, STEPS, **changes))
        assert command.wait() == 0, command.output
        outcomes.append(outcome(folder / "weights" / name))
    assert_same(*outcomes, f"{model} again")
    assert outcomes[0]["metrics.jsonl"][-1]["step"] == STEPS
    chosen = read_json(folder / "weights" / "first" / "config.json")["training"]
    given = {name: chosen[name] for name in ("lr", "optimizer", "schedule", "warmup_steps", "weight_decay", "min_lr")}
    command = Command(folder, *train_words(data, "weights/third", model, STEPS, **(changes | given)))
    assert command.wait() == 0, command.output
    assert_same(outcome(folder / "weights" / "third"), outcomes[0], f"{model} with the recorded choices")


@pytest.mark.parametrize("model", ["nyx", "tape"])
def test_the_same_run_twice(tmp_path, model):
    twice(tmp_path, model, lr=None, dropout=0.1)


def test_another_seed_is_another_run(tmp_path):
    """The comparison above can fail."""
    data = make_data(tmp_path)
    for seed in (1, 2):
        command = Command(tmp_path, *train_words(data, f"weights/{seed}", steps=STEPS, seed=seed))
        assert command.wait() == 0, command.output
    with pytest.raises(AssertionError, match="differs"):
        assert_same(outcome(tmp_path / "weights" / "1"), outcome(tmp_path / "weights" / "2"), "seeds")


# the machine changes


def pretend(run: Path, **changes: object) -> None:
    """Let config.json say that the run began under other conditions."""
    config = read_json(run / "config.json") | changes
    (run / "config.json").write_bytes(to_json(config))
    manifest = read_json(run / "manifest.json")
    manifest["files"]["config.json"] = sha256_file(run / "config.json")
    (run / "manifest.json").write_bytes(to_json(manifest))


def records(run: Path) -> list[dict]:
    return [timeless(json.loads(line)) for line in (run / "metrics.jsonl").read_text().splitlines()]


def uninterrupted(folder: Path, model: str) -> Path:
    """Data and a run that nobody stops; returns the folder they are in."""
    whole = Command(folder, *train_words(make_data(folder), "weights/whole", model, STEPS))
    assert whole.wait() == 0, whole.output
    return folder


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return uninterrupted(tmp_path_factory.mktemp("moved"), "nyx")


def moved(folder: Path, model: str, change: str, options: tuple, pretended: dict, says: str, tolerance: float) -> None:
    """Stop a run, resume it under other conditions: it says so, and follows the uninterrupted one's data and schedule,
    its losses within `tolerance` nats."""
    data, out = folder / "data" / "words", folder / "weights" / change
    first = Command(folder, *train_words(data, out, model, STEPS), setting=Setting(pause=("saving", 2)))
    assert first.pauses(), first.output
    first.send(signal.SIGTERM)
    assert first.wait() == 130, first.output
    stopped = read_json(out / "run.json")["step"]
    pretend(out, **pretended)
    second = Command(folder, "train", "--resume", out, *options)
    assert second.wait() == 0, second.output
    assert re.search(rf"warning: .*{says}.*the same run, not the same bits", " ".join(second.output.split())), (
        second.output
    )
    wanted, ours = records(folder / "weights" / "whole"), records(out)
    assert [(line["step"], line["tokens"], line["lr"]) for line in ours] == [
        (line["step"], line["tokens"], line["lr"]) for line in wanted
    ], "schedule and count of tokens"
    for line, other in zip(ours, wanted, strict=True):
        limit = tolerance if line["step"] > stopped else 0.0
        for loss in ("train_loss", "val_loss"):  # other samples would differ by tenths
            assert line[loss] == other[loss] or abs(line[loss] - other[loss]) <= limit, (line, other)
    assert read_json(out / "run.json")["status"] == "finished"


CHANGES = {
    "threads": (("--threads", 2), {}, r"this is CPU \(.*, 2 threads\), the run was on CPU \(.*, 1 thread\)", 1e-3),
    "batch": (("--batch-size", 2), {}, "2 sequences at a time, 4 before", 1e-3),
    "accumulation": (("--grad-accum", 4), {}, "1 sequence at a time, 4 before", 1e-3),
    "torch": (
        (),
        {"versions": {"nnx": "0.0.1", "torch": "2.99.0+cu999", "python": "3.20.1"}},
        r"torch is .*, the run began with 2\.99\.0\+cu999",
        0.0,
    ),
    "device": (
        (),
        {"machine": "NVIDIA GeForce RTX 3060 (12 GiB)"},
        r"this is CPU \(.*\), the run was on NVIDIA GeForce RTX 3060 \(12 GiB\)",
        0.0,
    ),
}


@pytest.mark.parametrize("change", ["threads", "batch", "torch", "device"])
def test_resuming_under_other_conditions(place, change):
    moved(place, "nyx", change, *CHANGES[change])


def determinism(full: bool) -> Result:
    models = MODELS if full else MODELS[:2]
    optimizers = ("adamw", "lion") if full else ("adamw",)
    for model in models:
        for optimizer in optimizers:
            with workplace() as folder:
                twice(folder, model, lr=None, dropout=0.1, optimizer=optimizer)
    times = len(models) * len(optimizers)
    return Result(8, f"one run three times: {', '.join(models)} with {', '.join(optimizers)}", times, times)


def machines(full: bool) -> Result:
    models = ("nyx", "llama", "n4") if full else ("nyx",)
    for model in models:
        with workplace() as folder:
            uninterrupted(folder, model)
            for change, how in CHANGES.items():
                moved(folder, model, change, *how)
    times = len(models) * len(CHANGES)
    return Result(7, f"resumed with other {', '.join(CHANGES)}: {', '.join(models)}", times, times)


PARTS = {"machine-changes": machines, "determinism": determinism}
