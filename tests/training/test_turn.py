"""A run whose validation turns goes back to its best weights, anneals those and ends; or else nothing changes."""

import math
import random
import shutil
from dataclasses import replace

import pytest
import torch

from nnx_cli.config import PrepareConfig, TrainConfig
from nnx_cli.data.prepare import prepare
from nnx_cli.data.sources import builtin_corpus
from nnx_cli.data.token_folder import open_token_folder
from nnx_cli.planning.plan import plan_run
from nnx_cli.runs.checkpoint import save_checkpoint
from nnx_cli.runs.run import Run
from nnx_cli.training import session
from nnx_cli.training.divergence import error_of_rise, has_turned, part_losses
from nnx_cli.training.observer import Silent
from nnx_cli.training.schedule import after_turn
from nnx_cli.training.state import TrainState
from tests.training.test_trainer import everything, records, resume, train

CPU = torch.device("cpu")
STEPS = 160


@pytest.fixture(scope="module")
def short(tmp_path_factory):
    """A text that a small model learns by heart."""
    folder = tmp_path_factory.mktemp("short")
    (folder / "short.txt").write_text(builtin_corpus()[20_000:26_000], encoding="utf-8")
    prepare([folder / "short.txt"], folder / "data", PrepareConfig(workers=1, val_fraction=0.5))
    return open_token_folder(folder / "data")


@pytest.fixture(scope="module")
def begin(short):
    """Starts a run on it that may end early: begin(folder, **training settings)."""

    def start(out, **settings):
        length = dict(max_steps=STEPS, max_time="90000s")
        every = dict(val_every=8, save_every=30, sample_every=0, val_batches=999)
        fixed = dict(batch_size=8, grad_accum=1, lr=1e-2, optimizer="muon", weight_decay=0.0, compile="off", threads=1)
        plan = plan_run(
            "nyx",
            "nano",
            dict(n_layers=2, dim=96, n_heads=2, seq_len=32, dropout=0.0),
            TrainConfig(**(length | every | fixed | settings)),
            vocab_size=256,
            train_tokens=len(short.train),
            val_tokens=len(short.val),
            device=CPU,
            precision="fp32",
            sources={},
        )
        return session.start(plan, short, out, CPU, Silent(), session.Sampling([10], 8), "nnx train", None)

    return start


@pytest.fixture(scope="module")
def whole(begin, tmp_path_factory):
    """A run that turned, from its beginning to its end."""
    run, trainer = begin(tmp_path_factory.mktemp("whole") / "run")
    assert train(run, trainer) == "finished"
    return run, trainer


@pytest.fixture(scope="module")
def full(begin, tmp_path_factory):
    """The same run, trained in full."""
    run, trainer = begin(tmp_path_factory.mktemp("full") / "run", stop_early="off")
    assert train(run, trainer) == "finished"
    return run, trainer


def validations(run):
    return {line["step"]: line["val_loss"] for line in records(run) if line["val_loss"] is not None}


def test_a_run_that_turns_ends_early_annealed_from_its_best(whole, full):
    run, trainer = whole
    state, lines = trainer.state, records(run)
    assert state.turned_at is not None and state.step < STEPS == full[1].state.step
    turned = round(state.turned_at * STEPS)
    (event,) = run.status()["events"]
    assert event.startswith("validation turned: ") and f"at step {turned}; back to the weights of step" in event
    before = [line for line in lines if line["step"] <= turned]
    assert before == records(full[0])[: len(before)], "nothing changes before it turns"
    best = round(state.turned_to * STEPS)
    rates = {line["step"]: line["lr"] for line in lines}
    after = [lr for step, lr in rates.items() if step > turned]
    assert after == sorted(after, reverse=True) and after[0] <= rates[best] and after[-1] < rates[best] / 20
    seen, wrong = validations(run), validations(full[0])
    assert seen[best] == min(loss for step, loss in seen.items() if step <= turned)
    assert seen[state.step] < wrong[STEPS] - 0.1 and seen[state.step] < seen[turned]
    assert state.ended_by(trainer.config) == "data"
    assert replace(state, turned_at=None).ended_by(trainer.config) == "interrupted"


@pytest.fixture(scope="module")
def halfway(begin, whole, tmp_path_factory):
    """The same run, interrupted shortly before it turns."""
    run, trainer = begin(tmp_path_factory.mktemp("halfway") / "run")
    assert train(run, trainer, stop_at=turn_of(whole) - 3) == "interrupted"
    return run


@pytest.fixture
def again(halfway, short, tmp_path):
    """A copy of it, and its trainer."""
    run = Run(shutil.copytree(halfway.folder, tmp_path / "weights" / "run"))
    return run, resume(run, data=short.path)


def turn_of(whole):
    """The step at which a run turned."""
    return round(whole[1].state.turned_at * STEPS)


@pytest.mark.parametrize("settings", [{"schedule": "constant"}, {"max_time": None}, {"stop_early": "off"}, {}])
def test_no_other_run_turns(again, whole, monkeypatch, settings):
    run, trainer = again
    trainer.config = replace(trainer.config, **settings)
    if not settings:
        monkeypatch.setattr(run, "best_found", lambda: None)
    train(run, trainer, stop_at=turn_of(whole) + 1)
    assert trainer.state.turned_at is None and trainer.state.step == turn_of(whole) + 1
    seen = validations(run)
    assert seen[turn_of(whole)] > min(seen.values()) + 0.05, "it had reason to"


class Killed(Exception):
    """Stands for a process that is gone."""


@pytest.mark.parametrize("when", ["before", "during", "after", "later"])
def test_a_killed_run_turns_as_one_that_was_not(again, whole, short, monkeypatch, when):
    """Killed a step before it turns, while the checkpoint of the turn is written, a step later, or once it was better
    than ever, so that the weights that it went back to are gone."""
    (run, trainer), turned = again, turn_of(whole)
    better = max(step for step in validations(whole[0]) if step < whole[1].state.step)
    at = {"before": turned - 1, "during": None, "after": turned + 1, "later": better + 1}[when]

    def watch():
        if trainer.state.step == at:
            raise Killed
        return False

    def save(folder, checkpoint):
        if at is None and checkpoint.step == turned:
            raise Killed
        return save_checkpoint(folder, checkpoint)

    with monkeypatch.context() as patch, pytest.raises(Killed), run.lock():
        patch.setattr("nnx_cli.runs.checkpoint.save_checkpoint", save)
        trainer.train(run, watch)
    trainer = resume(run, data=short.path)
    assert (trainer.state.turned_at is None) == (when in ("before", "during"))
    assert train(run, trainer) == "finished"
    assert everything(run) == everything(whole[0])


@pytest.mark.parametrize("after", [-1, 0, 1])
def test_an_interrupted_run_turns_as_one_that_was_not(again, whole, short, after):
    run, trainer = again
    assert train(run, trainer, stop_at=turn_of(whole) + after) == "interrupted"
    assert train(run, resume(run, data=short.path)) == "finished"
    assert everything(run) == everything(whole[0])


def test_a_longer_length_is_trained_by_its_own_schedule(whole, tmp_path):
    run = Run(shutil.copytree(whole[0].folder, tmp_path / "weights" / "run"))
    step = whole[1].state.step
    assert resume(run, max_time="90000s", data=whole[1].data.path).state.turned_at is None
    longer = resume(run, max_steps=step + 40, data=whole[1].data.path)
    assert longer.progress() == step / (step + 40) and longer.lr(longer.progress()) > 0


# what it goes by


@pytest.mark.parametrize(
    ("rise", "stderr", "since_best", "wanted"),
    [
        (0.1, 0.01, 0.5, True),
        (0.1, 0.01, 0.15, True),
        (0.1, 0.01, 0.14, False),
        (0.015, 0.001, 0.5, False),
        (0.1, 0.04, 0.5, False),
        (0.1, math.inf, 0.5, False),
        (math.inf, 0.01, 0.5, False),
        (math.nan, 0.01, 0.5, False),
        (-0.1, 0.01, 0.5, False),
    ],
)
def test_validation_turns_where_it_rises_by_more_than_chance_far_from_its_best(rise, stderr, since_best, wanted):
    assert has_turned(rise, stderr, since_best) == wanted


def test_a_training_loss_that_rises_too_is_another_trouble(again, whole, monkeypatch):
    run, trainer = again
    course = trainer.recovery.course(run)
    monkeypatch.setattr(trainer.recovery, "course", lambda run: replace(course, since_best=0.2))
    train(run, trainer, stop_at=turn_of(whole) + 1)
    assert trainer.state.turned_at is None


def test_losses_of_the_same_parts_tell_a_rise_from_chance():
    draw = random.Random(3)
    before = [draw.gauss(2.0, 0.5) for _ in range(640)]
    after = [loss + draw.gauss(0.05, 0.1) for loss in before]
    parts = part_losses(before), part_losses(after)
    assert [len(losses) for losses in parts] == [64, 64] and parts[0][0] == pytest.approx(sum(before[:10]) / 10)
    assert error_of_rise(*parts) == pytest.approx(0.1 / 640**0.5, rel=0.3)
    assert part_losses(before[:5]) == pytest.approx(before[:5]) and part_losses([]) == []
    assert error_of_rise(parts[0], part_losses(before[:5])) == error_of_rise([2.0], [3.0]) == math.inf


def test_a_run_that_turned_reads_whole_sequences():
    config = TrainConfig(short_sequences=0.5)
    assert [TrainState().pieces(config, progress) for progress in (0.0, 0.4, 0.5, 1.0)] == [2, 2, 1, 1]
    assert TrainState(turned_at=0.9, turned_to=0.2).pieces(config, 0.2) == 1
    assert TrainState().pieces(TrainConfig(), 0.0) == 1


@pytest.mark.parametrize(("turned_at", "turned_to", "end"), [(0.8, 0.6, 0.92), (0.9, 0.7, 1.0), (0.3, 0.1, 0.32)])
def test_the_rest_of_the_schedule_fits_into_a_short_stretch(turned_at, turned_to, end):
    state = TrainState(turned_at=turned_at, turned_to=turned_to)
    config = TrainConfig(max_steps=1000, max_time="90000s")

    def progress(share):
        return replace(state, step=round(1000 * share)).progress(config)

    assert progress(turned_at) == pytest.approx(turned_to) and progress(end) == pytest.approx(1.0)
    assert progress((turned_at + end) / 2) == pytest.approx((1 + turned_to) / 2)
    assert after_turn(1.0, 1.0, 0.5) == 0.5


def test_the_same_time_once_more_leaves_a_run_that_turned_at_its_end(begin, tmp_path):
    run, trainer = begin(tmp_path / "run", max_steps=None)
    assert train(run, trainer) == "finished" and trainer.state.turned_at is not None
    assert trainer.state.step < trainer.config.max_steps
    assert session.plan_restart(Run(run.folder), {"max_time": "90000s"}).is_over
    longer = session.plan_restart(Run(run.folder), {"max_time": "99999s"})
    assert not longer.is_over and longer.config.max_steps == trainer.config.max_steps
