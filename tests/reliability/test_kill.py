"""Promise 1: a process killed at any instant loses nothing but the steps since the last checkpoint."""

from __future__ import annotations

import itertools
import os
import random
import signal
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from nnx_cli.runs.run import Run
from nnx_cli.training import session
from tests.reliability import Result
from tests.reliability.faults import KillAt
from tests.reliability.processes import (
    Command,
    Setting,
    Watching,
    assert_same,
    make_data,
    outcome,
    start_small,
    train_words,
    workplace,
)

pytestmark = pytest.mark.skipif(os.name != "posix", reason="signals are those of POSIX")

STEPS = 40
LONG = 80  # steps in which there is a save, every second one, for every call that may come after one
N_CALLS = 20  # of a save and the pruning after it, at least
PATIENCE = 6  # kills of one run, after which it may finish
AIMED = ("saving", "saving", "saving", "rotating", "evaluating", "sampling", "best", "resuming", "creating")


def uninterrupted(folder: Path, data: Path, model: str, steps: int = STEPS, **changes: Any) -> dict:
    """How a run ends that nobody kills."""
    command = Command(folder, *train_words(data, f"weights/{model}", model, steps, **changes))
    assert command.wait() == 0, command.output
    return outcome(folder / "weights" / model)


def go_on(data: Path, out: Path, model: str, steps: int = STEPS, **changes: Any) -> list:
    """The command for a run wherever it stands: begin, where it was killed before it existed, or resume."""
    if not (out / "run.json").exists():
        return train_words(data, out, model, steps, **changes)
    return ["train", "--resume", out]


def kill_somewhere(command: Command, draw: random.Random, duration: float) -> str | None:
    """Kill the process at a random moment, or a random time after it enters a random phase; the phase it was in, or
    None where it ended before."""
    if draw.random() < 0.6:
        command.wait_for(draw.choice(AIMED), times=draw.randint(1, 3))
        time.sleep(draw.random() * 0.003)
    else:
        time.sleep(draw.random() * duration)
    command.send(signal.SIGKILL)
    code = command.wait()
    assert code in (0, -signal.SIGKILL), command.output
    return command.phase if code else None


def kill_often(folder: Path, models: tuple[str, ...], n_kills: int, seed: int) -> Counter:
    """Kill runs again and again, resume them, and compare their ends with those of runs that nobody killed; returns
    what they were doing when killed."""
    draw, killed = random.Random(seed), Counter()
    data = make_data(folder)
    wanted = {model: uninterrupted(folder, data, model) for model in models}
    for number in itertools.count():
        model = models[number % len(models)]
        out = folder / "weights" / f"{model}-{number}"
        kills = 0
        while kills < PATIENCE and killed.total() < n_kills:
            command = Command(folder, *go_on(data, out, model))
            phase = kill_somewhere(command, draw, duration=1.5)
            if phase is None:
                break
            killed[phase] += 1
            kills += 1
        if not (out / "run.json").exists() or b'"finished"' not in (out / "run.json").read_bytes():
            command = Command(folder, *go_on(data, out, model))
            assert command.wait() == 0, command.output
        assert_same(outcome(out), wanted[model], f"{model} after {kills} kills")
        leftovers = [path.name for path in (folder / "weights").glob(".*")]
        assert not leftovers, leftovers
        if killed.total() >= n_kills:
            return killed


def kill_at_every_call(folder: Path, model: str, moments: tuple[str, ...], step: int = 1) -> int:
    """Kill a run at the first, second, … call that changes the disk, or at each `step`-th, from the start of a save to
    its end, each time resuming it; returns how many calls there were."""
    data = make_data(folder)
    wanted, kills = uninterrupted(folder, data, model, LONG, save_every=2), 0
    for when in moments:
        out = folder / "weights" / f"every-{when}"
        (folder / "calls").unlink(missing_ok=True)
        for number in itertools.count(1, step):
            words = go_on(data, out, model, LONG, save_every=2)
            command = Command(folder, *words, setting=Setting(change=KillAt(number, when)))
            code = command.wait()
            if code == 0:
                assert N_CALLS <= int((folder / "calls").read_text()) < number, "all calls had their turn"
                break
            assert code == -signal.SIGKILL and command.phase in ("saving", "rotating"), command.output
            kills += 1
        assert_same(outcome(out), wanted, f"{model} killed {when} each of {number - 1} calls")
    return kills


def test_killed_at_random_moments(tmp_path):
    killed = kill_often(tmp_path, ("nyx",), 6, seed=1)
    assert killed.total() == 6 and len(killed) > 1


def test_killed_at_every_other_call_of_a_save(tmp_path):
    assert kill_at_every_call(tmp_path, "nyx", ("before",), step=2) >= N_CALLS // 2


class PowerCut(BaseException):
    """The machine is off: no handler for ordinary errors runs."""


def test_best_weights_of_a_future_that_never_came(tmp_path):
    """Killed between a validation and the next checkpoint, a run by the clock does not take the same steps again: its
    best weights stay until it finds better ones, and run.json says whose they are."""

    class Cut(Watching):
        def step(self, record, progress):
            if record["step"] == 4:
                raise PowerCut

    data = make_data(tmp_path)
    run, trainer = start_small(data, tmp_path / "run", Cut(), max_steps=8, val_every=2, save_every=100)
    with pytest.raises(PowerCut), run.lock():
        trainer.train(run, lambda: False)
    weights = (run.folder / "model.safetensors").read_bytes()
    again, _ = session.resume(session.plan_restart(Run(run.folder), {}), Watching())
    assert again.state.step == 0
    again.config = replace(again.config, lr=1e-9, min_lr=0.0)  # this time it learns nothing
    with run.lock():
        assert again.train(run, lambda: False) == "finished"
    status = run.status()
    assert status["best_step"] == 4 and status["best_val_loss"] < status["val_loss"]
    assert (run.folder / "model.safetensors").read_bytes() == weights
    assert {key: status[key] for key in run.best_found()} == run.best_found()
    assert again.state.best_val_loss > status["best_val_loss"], "patience goes by this run's own steps"


def random_moments(full: bool) -> Result:
    n_kills, models = (200, ("nyx", "n4", "neon", "ngpt", "tape", "llama")) if full else (20, ("nyx", "llama", "n4"))
    with workplace() as folder:
        killed = kill_often(folder, models, n_kills, seed=int(time.time()))
    where = ", ".join(f"{phase} {count}" for phase, count in killed.most_common())
    return Result(1, f"kill -9 at random moments of {', '.join(models)}", n_kills, killed.total(), [f"while {where}"])


def every_call(full: bool) -> Result:
    models, moments = (("nyx", "tape", "llama"), ("before", "after")) if full else (("nyx",), ("before",))
    kills = 0
    for model in models:
        with workplace() as folder:
            kills += kill_at_every_call(folder, model, moments)
    return Result(1, f"kill -9 {' and '.join(moments)} every write, fsync and rename of a save", kills, kills)


PARTS = {"kill-anywhere": random_moments, "kill-every-call": every_call}
