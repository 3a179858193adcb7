"""Promise 5: numbers go bad. A step without finite numbers never reaches the weights; a run of them goes back once."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch

from nnx_cli.runs.checkpoint import steps_in
from nnx_cli.system.files import read_json
from tests.reliability import Result
from tests.reliability.faults import NanAt, OverflowAt, SpikeAt
from tests.reliability.processes import Command, Setting, make_data, train_words, workplace

pytestmark = pytest.mark.skipif(os.name != "posix", reason="processes are forked")

MODELS = ("nyx", "llama", "n4", "neon", "ngpt", "tape")
VALUES = (math.nan, math.inf, -math.inf)
STEPS, SAVE_EVERY = 30, 6
ENDLESS = 10**6


def run(folder: Path, change: Any, model: str = "nyx", **options: Any) -> tuple[Command, Path, int]:
    """A small run with something going wrong in it; its folder and exit code."""
    out = folder / "weights" / "run"
    words = train_words(make_data(folder), out, model, STEPS, **{"save_every": SAVE_EVERY} | options)
    command = Command(folder, *words, setting=Setting(change=change))
    return command, out, command.wait()


def assert_finite(out: Path) -> None:
    """Nothing that is not finite is on the disk, but in pictures of the model's insides, where it marks a gap."""
    for path in {*out.rglob("*.safetensors")} - {*out.glob("insides/*")}:
        for name, tensor in safetensors.torch.load_file(path).items():
            assert not tensor.is_floating_point() or tensor.isfinite().all(), f"{path}: {name}"


def skips(folder: Path, model: str, value: float) -> None:
    """Steps now and then are skipped and counted."""
    command, out, code = run(folder, NanAt((6, 9, 10, 20), value), model)
    assert code == 0, command.output
    status = read_json(out / "run.json")
    assert status["skipped_steps"] == 4 and status["status"] == "finished" and "events" not in status
    assert_finite(out)


def goes_back(folder: Path, model: str) -> None:
    """Eight bad steps in a row: back to the last good checkpoint, with half the learning rate, and on to the end."""
    command, out, code = run(folder, NanAt(tuple(range(14, 22))), model)
    assert code == 0, command.output
    status = read_json(out / "run.json")
    (event,) = status["events"]
    assert "back to step 12" in event and event in command.output.replace("\n", " ")
    assert status["status"] == "finished" and status["step"] == STEPS
    state = read_json(out / "checkpoints" / f"step-{STEPS:08d}" / "state.json")
    assert state["lr_factor"] == 0.5 and state["skipped_steps"] == 8
    assert_finite(out)


def ends(folder: Path, model: str) -> None:
    """Bad steps that do not cease: exit 6 with one command to try; what was saved is good, and can be gone on with."""
    command, out, code = run(folder, NanAt(tuple(range(14, ENDLESS))), model)
    assert code == 6, command.output
    assert "no finite gradient in 8 steps" in command.output and " --lr " in command.output
    assert "Traceback" not in command.output
    status = read_json(out / "run.json")
    assert status["status"] == "diverged" and len(status["events"]) == 1
    assert steps_in(out / "checkpoints")[-1] == 12
    assert_finite(out)
    again = Command(folder, "train", "--resume", out)
    assert again.wait() == 0, again.output
    assert read_json(out / "run.json")["step"] == STEPS


def names_the_layer(folder: Path, model: str) -> None:
    """Weights that overflow are not saved; the run goes back, and the second time it names the place."""
    command, out, code = run(folder, OverflowAt((14, 24)), model)
    assert code == 6, command.output
    assert "blocks.0." in command.output.replace("\n", " "), command.output
    assert_finite(out)


def shows_spikes(folder: Path, model: str) -> None:
    """A loss that jumps is said, and kept in run.json; the run goes on."""
    command, out, code = run(folder, SpikeAt((25,)), model)
    assert code == 0, command.output
    (event,) = read_json(out / "run.json")["events"]
    assert event.startswith("loss spike: ") and "loss spike" in command.output


@pytest.mark.parametrize(("model", "value"), [("nyx", math.nan), ("tape", math.inf)])
def test_a_bad_step_is_skipped(tmp_path, model, value):
    skips(tmp_path, model, value)


@pytest.mark.parametrize("case", [goes_back, ends, names_the_layer, shows_spikes])
def test_numbers_that_go_bad(tmp_path, case):
    case(tmp_path, "nyx")


def numbers(full: bool) -> Result:
    models, values = (MODELS, VALUES) if full else (MODELS[:1], VALUES[:1])
    times = 0
    for model in models:
        for value in values:
            with workplace() as folder:
                skips(folder, model, value)
            times += 1
        for case in (goes_back, ends, names_the_layer, shows_spikes):
            with workplace() as folder:
                case(folder, model)
            times += 1
    return Result(5, f"numbers that go bad at chosen steps of a run: {', '.join(models)}", times, times)


PARTS = {"numbers": numbers}
