import json
import math
import os
import signal
import time
from dataclasses import asdict, replace

import pytest
import torch
from typer.testing import CliRunner

from nnx_cli.cli import app
from nnx_cli.errors import DataError, DoesNotFit, OutputError, QualityError, UsageError
from nnx_cli.evaluation.losses import Evaluation
from nnx_cli.optim._base import DeviceOptimizer
from nnx_cli.optim._build import build_optimizer
from nnx_cli.planning.recipe import table
from nnx_cli.runs import checkpoint as ckpt
from nnx_cli.runs import run as run_module
from nnx_cli.runs.run import Run
from nnx_cli.training import compilation, sampling, session, validation
from nnx_cli.training import trainer as trainer_module
from nnx_cli.training.observer import Several, Silent
from nnx_cli.training.stepper import Execution

SAMPLE_LENGTH = sampling.SAMPLE_LENGTH  # before conftest shortens it
TIMES = ("time_s", "tokens_per_s", "peak_memory_bytes", "mfu", "data_wait_share")


class GradientDescent(torch.optim.SGD):
    clip = DeviceOptimizer.clip


def records(run, name="metrics.jsonl"):
    lines = (run.folder / name).read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in TIMES} for line in lines]


def everything(run):
    """All that a run leaves behind, as comparable values, less what a clock says."""
    newest, notes = run.newest_checkpoint()
    assert notes == []
    tensors = {f"model {key}": value for key, value in newest.model.items()}
    tensors |= {f"optimizer {key}": value for key, value in newest.optimizer.items()}
    tensors |= {f"best {key}": value for key, value in session.ModelRef(run.folder).weights()[1].items()}
    digests = {key: (value.dtype, value.numpy().tobytes()) for key, value in tensors.items()}
    state = {key: value for key, value in newest.state.items() if key not in TIMES}
    status = {key: run.status()[key] for key in ("step", "tokens", "best_val_loss", "best_step", "val_loss")}
    return digests, state, records(run), records(run, "samples.jsonl"), status


def train(run, trainer, stop_at=None):
    """Train to the end, or as if a signal came during step `stop_at`."""
    with run.lock():
        ended = trainer.train(run, lambda: stop_at is not None and trainer.state.step >= stop_at)
    run.set_status(status=ended, step=trainer.state.step, tokens=trainer.state.tokens)
    return ended


def resume(run, **overrides):
    return session.resume(session.plan_restart(Run(run.folder), overrides, overrides.pop("data", None)), Silent())[0]


# a step


@pytest.mark.parametrize("shape", [(2, 4), (8, 1)])
def test_division_into_micro_batches_changes_nothing(start, workspace, shape):
    """Same gradients, so the same weights; plain gradient descent, so that no rule magnifies rounding."""

    def weights(name, batch_size, grad_accum):
        run, trainer = start(workspace / name, batch_size=batch_size, grad_accum=grad_accum, weight_decay=0.0)
        trainer.stepper.step.optimizer = GradientDescent(trainer.model.parameters(), lr=0.1, fused=True)
        results = []
        for _ in range(3):
            n_tokens = trainer.take_step(0.1)
            numbers = trainer.recovery.read_numbers()
            results.append((numbers.loss, numbers.grad_norm, n_tokens))
            trainer.state.step += 1
        return results, [p.detach().clone() for p in trainer.model.parameters()]

    wanted, ours = weights("a", 1, 8), weights("b", *shape)
    for (loss, norm, n_tokens), (other_loss, other_norm, other_n) in zip(wanted[0], ours[0], strict=True):
        assert loss == pytest.approx(other_loss, abs=1e-6) and norm == pytest.approx(other_norm, abs=1e-6)
        assert n_tokens == other_n == 8 * 32
    for a, b in zip(wanted[1], ours[1], strict=True):
        assert (a - b).abs().max() <= 1e-6


def test_the_loss_is_the_mean_over_all_targets(start, workspace):
    run, trainer = start(workspace / "a", batch_size=4, grad_accum=2)
    ids, targets = trainer.stepper.loader.batch(0, 8)
    with torch.no_grad():
        wanted = torch.nn.functional.cross_entropy(trainer.model(ids).flatten(0, 1), targets.flatten()).item()
    trainer.take_step(1e-3)
    assert trainer.recovery.read_numbers().loss == pytest.approx(wanted, abs=1e-6)


def test_gradients_are_clipped_and_reported_unclipped(start, workspace):
    moves = {}
    for clip in (0.0, 1e-3):
        run, trainer = start(workspace / str(clip), grad_clip=clip)
        trainer.stepper.step.optimizer = GradientDescent(trainer.model.parameters(), lr=1.0, fused=True)
        before = [p.detach().clone() for p in trainer.model.parameters()]
        trainer.take_step(1.0)
        norm = trainer.recovery.read_numbers().grad_norm
        moved = sum(((p.detach() - b) ** 2).sum() for p, b in zip(trainer.model.parameters(), before, strict=True))
        moves[clip] = (norm, math.sqrt(moved))
    assert moves[0.0][0] == moves[1e-3][0] > 1e-2
    assert moves[0.0][1] == pytest.approx(moves[0.0][0], rel=1e-4)
    assert moves[1e-3][1] == pytest.approx(1e-3, rel=1e-2)


def poison(trainer, monkeypatch, value, steps=(1,)):
    """Make the loss, or only the gradient of one weight, not finite at some steps."""
    forward = trainer.stepper.step.micro_step.forward

    def forward_badly(ids, targets):
        loss, count = forward(ids, targets)
        if trainer.state.step in steps:
            loss = loss * value if value is not None else loss + explode(trainer.model.norm.weight)
        return loss, count

    monkeypatch.setattr(trainer.stepper.step.micro_step, "forward", forward_badly)


def explode(parameter):
    """Zero, with a gradient that is not finite."""
    return (parameter * 0.0).abs().sqrt().sum() * 1e-30


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, None])
def test_a_gradient_that_is_not_finite_never_reaches_the_weights(start, workspace, monkeypatch, value):
    run, trainer = start(workspace / "a")
    poison(trainer, monkeypatch, value)
    trainer.take_step(1e-3)
    trainer.state.step = 1
    before = {key: tensor.clone() for key, tensor in trainer.checkpoint().model.items()}
    moments = {key: tensor.clone() for key, tensor in trainer.checkpoint().optimizer.items()}
    trainer.take_step(1e-3)
    norm = trainer.recovery.read_numbers().grad_norm
    assert not math.isfinite(norm)
    assert all(torch.equal(before[key], tensor) for key, tensor in trainer.checkpoint().model.items())
    assert all(torch.equal(moments[key], tensor) for key, tensor in trainer.checkpoint().optimizer.items())
    assert (trainer.state.skipped_steps, trainer.state.bad_steps) == (1, 1)
    trainer.state.step = 2
    trainer.take_step(1e-3)
    norm = trainer.recovery.read_numbers().grad_norm
    assert math.isfinite(norm), "the bad gradient is gone"
    assert (trainer.state.skipped_steps, trainer.state.bad_steps) == (1, 0)
    assert not torch.equal(before["norm.weight"], trainer.model.norm.weight)


def test_a_run_without_finite_gradients_goes_back_once_and_ends(start, workspace, monkeypatch):
    run, trainer = start(workspace / "weights" / "a", max_steps=40, save_every=4, val_every=40)
    poison(trainer, monkeypatch, math.nan, range(6, 40))
    with pytest.raises(QualityError, match="diverged: no finite gradient in 8 steps up to step 14, also at") as error:
        train(run, trainer)
    assert "--lr" in error.value.fix
    (event,) = run.status()["events"]
    assert "up to step 14: back to step 4" in event and trainer.state.lr_factor == 0.5
    checkpoint, _ = run.newest_checkpoint()
    assert checkpoint.step == 4 and all(tensor.isfinite().all() for tensor in checkpoint.model.values())
    assert trainer.state.skipped_steps == 16


def test_a_run_goes_on_after_a_rollback(start, workspace, monkeypatch):
    run, trainer = start(workspace / "weights" / "a", max_steps=20, save_every=4, val_every=20)
    bad = list(range(6, 14))
    poison(trainer, monkeypatch, math.nan, bad)
    monkeypatch.setattr(trainer.observer, "note", lambda text: bad.clear(), raising=False)
    assert train(run, trainer) == "finished"
    steps = [record["step"] for record in records(run)]
    assert steps == sorted(set(steps)) and steps[-1] == 20, "the log forgets what was undone"
    assert (trainer.state.skipped_steps, trainer.state.lr_factor) == (8, 0.5)
    assert records(run)[-1]["skipped_steps"] == 8


def test_weights_that_are_not_finite_are_not_saved(start, workspace):
    run, trainer = start(workspace / "weights" / "a", max_steps=8, save_every=4, val_every=8)
    step = trainer.stepper.step.model.post_optim_step

    def spoil():
        step()
        if trainer.state.step == 3 and trainer.state.lr_factor == 1.0:
            trainer.model.norm.weight.data[0] = math.inf

    trainer.stepper.step.model.post_optim_step = spoil
    assert train(run, trainer) == "finished"
    assert "back to step 0" in run.status()["events"][0]
    assert all(tensor.isfinite().all() for tensor in run.newest_checkpoint()[0].model.values())


# memory


def out_of_memory(trainer, monkeypatch, at, above):
    """Let memory run out at step `at` for micro-batches of more than `above` sequences."""
    forward = trainer.stepper.step.micro_step.forward

    def limited(ids, targets):
        if trainer.state.step == at and len(ids) > above:
            raise torch.OutOfMemoryError("out of memory")
        return forward(ids, targets)

    monkeypatch.setattr(trainer.stepper.step.micro_step, "forward", limited)


def test_out_of_memory_heals_without_a_seam(start, workspace, monkeypatch):
    whole, undisturbed = start(workspace / "a", batch_size=8, grad_accum=1, max_steps=6)
    train(whole, undisturbed)
    run, trainer = start(workspace / "b", batch_size=8, grad_accum=1, max_steps=6)
    out_of_memory(trainer, monkeypatch, at=3, above=2)
    assert train(run, trainer) == "finished"
    assert (trainer.config.batch_size, trainer.config.grad_accum) == (2, 4)
    assert [run.config["training"][key] for key in ("batch_size", "grad_accum")] == [2, 4], "a resumed run knows"
    assert [event[:24] for event in run.status()["events"]] == ["out of memory at step 4:"] * 2
    for ours, theirs in zip(records(run), records(whole), strict=True):
        assert ours["train_loss"] == pytest.approx(theirs["train_loss"], abs=1e-5)
        assert ours["tokens"] == theirs["tokens"]


def test_memory_for_not_even_one_sequence(start, workspace, monkeypatch):
    run, trainer = start(workspace / "a", batch_size=2, grad_accum=2, max_steps=6)
    out_of_memory(trainer, monkeypatch, at=3, above=0)
    with pytest.raises(DoesNotFit, match="out of memory at step 4, 1 sequence at a time"):
        train(run, trainer)


def test_a_validation_that_is_not_finite_is_recorded(start, workspace, monkeypatch):
    run, trainer = start(workspace / "a", max_steps=4, val_every=2)
    results = iter([math.nan, 3.0])
    monkeypatch.setattr(
        validation, "evaluate", lambda *args, **options: Evaluation(*[next(results)] * 2, None, 1, 1, 1.0)
    )
    assert train(run, trainer) == "finished"
    assert run.status()["best_val_loss"] == 3.0 and run.status()["best_step"] == 4
    assert [record["val_loss"] for record in records(run) if record["step"] % 2 == 0] == [None, 3.0]


# a run


def test_a_run_learns_and_leaves_what_is_promised(finished):
    run = Run(finished)
    status, lines = run.status(), records(run)
    assert status["status"] == "finished" and status["step"] == 40
    first, last = lines[0], lines[-1]
    assert first["step"] == 1 and last["step"] == 40 and last["tokens"] == 40 * 8 * 32
    assert first["train_loss"] == pytest.approx(math.log(256), rel=0.1)
    assert last["val_loss"] < 3.8 < first["train_loss"]
    assert last["val_bits_per_byte"] == pytest.approx(last["val_loss"] / math.log(2))
    assert [line["step"] for line in lines if line["val_loss"] is not None] == [10, 20, 30, 40]
    assert status["best_val_loss"] == min(line["val_loss"] for line in lines if line["val_loss"] is not None)
    assert status["val_loss"] == last["val_loss"] and status["train_loss"] == last["train_loss"]
    assert ckpt.steps_in(run.checkpoints) == [20, 40]
    with open(finished / "metrics.jsonl") as file:
        keys = list(json.loads(file.readline()))
    assert keys == [
        "step",
        "tokens",
        "time_s",
        "train_loss",
        "val_loss",
        "val_bits_per_byte",
        "lr",
        "grad_norm",
        "tokens_per_s",
        "peak_memory_bytes",
        "skipped_steps",
        "mfu",
        "data_wait_share",
    ]
    assert all(0 <= json.loads(line)["data_wait_share"] <= 1 for line in open(finished / "metrics.jsonl"))


def test_every_step_is_told(start, workspace):
    class Watch(Silent):
        def __init__(self):
            self.moves = []

        def moved(self, progress):
            self.moves.append(progress)

    watch = Watch()
    run, trainer = start(workspace / "a", observer=Several(Silent(), watch), max_steps=12)
    train(run, trainer)
    assert watch.moves == pytest.approx([step / 12 for step in range(1, 13)])


def test_the_schedule_ends_with_the_run(start, workspace):
    rates = []

    class Watch(Silent):
        def step(self, record, progress):
            rates.append((record["step"], record["lr"], progress))

    settings = dict(max_steps=8, val_every=1, lr=1e-3, warmup_steps=0, min_lr=1e-4)
    run, trainer = start(workspace / "a", observer=Watch(), **settings)
    assert train(run, trainer) == "finished"
    assert rates == [(n, pytest.approx(1e-4 + 9e-4 * (1 - (n - 1) / 8)), n / 8) for n in range(1, 9)]


def test_milestones_are_looked_at(start, workspace):
    run, trainer = start(workspace / "a", max_steps=20, val_every=None, save_every=None, sample_every=0)
    train(run, trainer)
    validated = [record["step"] for record in records(run) if record["val_loss"] is not None]
    assert validated == [1, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20]


def test_time_that_reading_numbers_takes_passes_over_nothing_that_is_due(start, workspace, monkeypatch):
    run, trainer = start(workspace / "a", max_steps=None, max_time="1000s", val_every=None)
    read, passes = trainer.recovery.read_numbers, {4: 300.0, 8: 1000.0}

    def slow_read():
        trainer.state.time_s += passes.get(trainer.state.step, 0.0)
        return read()

    monkeypatch.setattr(trainer.recovery, "read_numbers", slow_read)
    assert train(run, trainer) == "finished"
    assert [record["step"] for record in records(run) if record["val_loss"] is not None] == [5, 9]
    assert run.newest_checkpoint()[0].state["step"] == 9


def test_patience_stops_a_run_that_gets_no_better(start, workspace, monkeypatch):
    losses = iter([3.0, 2.0, 2.5, 2.1, 1.9, 2.0, 2.0, 1.0])
    monkeypatch.setattr(validation, "evaluate", lambda *args, **options: Evaluation(next(losses), 1.0, None, 1, 1, 1.0))
    run, trainer = start(workspace / "a", max_steps=100, val_every=1, save_every=50, patience=2)
    notes = []
    trainer.observer.note = notes.append
    assert train(run, trainer) == "finished"
    assert trainer.state.step == 4 and trainer.state.best_step == 2 and "stopped early" in notes[0]
    assert ckpt.steps_in(run.checkpoints)[-1] == 4, "what it stopped with is saved"
    again = resume(run)
    assert train(run, again) == "finished"
    assert again.state.step == 7, "going on, it gets a new chance at the next validation"


def test_checkpoints_beyond_keep_are_dropped(start, workspace):
    run, trainer = start(workspace / "a", save_every=2, keep=3)
    train(run, trainer)
    assert ckpt.steps_in(run.checkpoints) == [8, 10, 12]


@pytest.mark.parametrize("decided", [Execution(graph=True), Execution()])
def test_what_is_compiled_later_follows_the_first_step_that_is_shown(start, workspace, decided):
    run, trainer = start(workspace / "a", max_steps=6, val_every=3)
    run.set_config(run.config | {"training": run.config["training"] | {"compile": "auto"}})  # as requested, meanwhile
    shown, notes = [], []
    trainer.observer.step = lambda record, progress: shown.append(record["step"])
    trainer.observer.note = notes.append

    def verify_later():
        assert shown == [1] and trainer.verify_later is None
        return decided

    trainer.verify_later = verify_later
    assert trainer.config.compile == "off"
    train(run, trainer)
    assert shown[-1] == 6 and [note for note in notes if "compiling" in note]
    assert run.config["training"] == asdict(trainer.config) and trainer.config.compile == decided.name


def test_on_a_gpu_compiling_waits_unless_bits_are_promised(start, workspace, monkeypatch):
    _, trainer = start(workspace / "a", max_steps=10**6)
    trainer.device, asked = torch.device("cuda"), []

    def verify(stepper, wanted, conditions):
        asked.append((wanted.graph, wanted.compiled, conditions.requested))
        return Execution(graph=True, compiled=wanted.compiled, step_s=0.5)

    monkeypatch.setattr(trainer_module, "verify", verify)
    assert trainer.choose_execution("auto").compile == "auto" and trainer.config.compile == "graph"
    assert asked == [(True, False, "auto")]
    assert trainer.verify_later().name == "on" and asked[1:] == [(True, True, "auto")]
    trainer.verify_later, trainer.config = None, replace(trainer.config, deterministic=True)
    assert trainer.choose_execution("on").compile == "on" and trainer.verify_later is None
    assert asked[2:] == [(True, True, "on")]


def test_a_gpu_whose_steps_are_too_fast_to_earn_it_back_does_not_compile_later(start, workspace, monkeypatch):
    _, trainer = start(workspace / "a")
    trainer.device = torch.device("cuda")
    monkeypatch.setattr(trainer_module, "verify", lambda *_: Execution(graph=True, step_s=0.5))
    assert trainer.choose_execution("auto").compile == "graph" and trainer.verify_later is None


def test_samples_are_logged(start, workspace):
    run, trainer = start(workspace / "a", max_steps=6, sample_every=3)
    train(run, trainer)
    drawn = records(run, "samples.jsonl")
    assert [(line["step"], line["prompt"]) for line in drawn] == [(3, "\n"), (6, "\n")]
    assert all(line["text"] for line in drawn)


@pytest.mark.parametrize(("full_at", "newest"), [((8,), 12), ((12,), 8), ((8, 12), 4)])
def test_a_full_disk_while_saving_costs_no_checkpoint(start, workspace, monkeypatch, full_at, newest):
    """A checkpoint in between can wait, the last one cannot."""
    notes = []
    observer = Silent()
    observer.note = notes.append
    run, trainer = start(workspace / "a", save_every=4, observer=observer)

    def full(path, *contents):
        if trainer.state.step in full_at:
            raise OSError(28, "No space left on device")
        return write(path, *contents)

    write = ckpt.write_tensors
    for user in (ckpt, run_module):
        monkeypatch.setattr(user, "write_tensors", full)
    if 12 in full_at:
        with pytest.raises(OutputError, match=f"disk full.*the newest checkpoint is of step {newest}"):
            train(run, trainer)
    else:
        assert train(run, trainer) == "finished"
    assert sum("disk full" in note for note in notes) == 1
    monkeypatch.undo()
    assert run.newest_checkpoint()[0].step == newest
    assert train(run, resume(run)) == "finished"
    assert [record["step"] for record in records(run)] == [1, 4, 8, 10, 12]
    assert not list(run.folder.rglob(".*"))


# resuming


@pytest.mark.parametrize(
    ("model", "settings"),
    [
        ("nyx", {"optimizer": "adamw"}),
        ("llama", {"optimizer": "lion", "lr": 3e-4}),
        ("llama", {"optimizer": "adamw", "batch_size": 20, "schedule": "cosine"}),  # several epochs
    ],
)
def test_resuming_equals_never_having_stopped(start, workspace, model, settings):
    settings = settings | {"max_steps": 42, "val_every": 10, "save_every": 12, "sample_every": 14}
    fields = {"dropout": 0.1}
    whole, trainer = start(workspace / "whole", model, fields, **settings)
    assert train(whole, trainer) == "finished"

    run, trainer = start(workspace / "parts", model, fields, **settings)
    assert train(run, trainer, stop_at=13) == "interrupted"
    assert run.newest_checkpoint()[0].step == 13
    assert train(run, resume(run), stop_at=29) == "interrupted"
    assert train(run, resume(run)) == "finished"
    assert everything(run) == everything(whole)


@pytest.mark.parametrize("forget", ["optimizer", "step"])
def test_forgetting_something_would_show(start, workspace, forget):
    """The negative control: a checkpoint that lacks a part does not lead to the same end."""
    whole, trainer = start(workspace / "whole")
    train(whole, trainer)
    run, trainer = start(workspace / "parts")
    train(run, trainer, stop_at=6)
    again = resume(run)
    if forget == "optimizer":
        again.stepper.step.optimizer = build_optimizer(again.model, again.config)
    else:
        again.stepper.loader.seed += 1
    train(run, again)
    assert everything(run)[0] != everything(whole)[0]


def test_a_run_that_went_back_reaches_the_same_end(start, workspace):
    """The newest checkpoint is damaged, so that steps are taken again."""
    whole, trainer = start(workspace / "whole")
    train(whole, trainer)
    run, trainer = start(workspace / "parts", keep=1)
    train(run, trainer, stop_at=7)
    ckpt.save_checkpoint(run.checkpoints, ckpt.Checkpoint(9, {}, {}, {}))
    (run.checkpoints / "step-00000009" / "manifest.json").write_text("{}")
    again, notes = session.resume(session.plan_restart(Run(run.folder), {}), Silent())
    assert again.state.step == 7 and "going back" in notes[0]
    train(run, again)
    assert everything(run) == everything(whole)


def test_a_longer_length_goes_on_from_there(start, workspace):
    run, trainer = start(workspace / "a", max_steps=4)
    train(run, trainer)
    again = resume(run, max_steps=10)
    assert again.progress() == 0.4
    assert train(run, again) == "finished" and again.state.step == 10
    assert Run(run.folder).config["training"]["max_steps"] == 10 and run.status()["max_steps"] == 10


def test_a_length_in_epochs_has_an_end(start, workspace):
    run, trainer = start(workspace / "a", max_steps=4)
    train(run, trainer)
    again = resume(run, epochs=0.25)
    steps = round(0.25 * len(trainer.data.train) / 256)
    assert again.config.max_steps == steps > 4
    train(run, again)
    assert again.state.step == steps


@pytest.mark.parametrize("overrides", [{"batch_size": 2}, {"grad_accum": 8}, {"batch_size": 8, "grad_accum": 1}])
def test_another_batch_size_keeps_the_samples_of_a_step(start, workspace, overrides):
    whole, trainer = start(workspace / "whole")
    train(whole, trainer)
    run, trainer = start(workspace / "parts")
    train(run, trainer, stop_at=5)
    again = resume(run, **overrides)
    assert again.stepper.samples_per_step == 8
    assert again.config.val_batches * again.config.batch_size == 8
    train(run, again)
    ours, wanted = run.newest_checkpoint()[0], whole.newest_checkpoint()[0]
    assert ours.state["tokens"] == wanted.state["tokens"]
    assert run.status()["val_loss"] == pytest.approx(whole.status()["val_loss"], abs=1e-3)


@pytest.mark.parametrize("overrides", [{"batch_size": 3}, {"batch_size": 16}, {"batch_size": 4, "grad_accum": 4}])
def test_a_batch_size_that_changes_a_step_is_refused(start, workspace, overrides):
    run, trainer = start(workspace / "a")
    with pytest.raises(UsageError, match="a step of this run has 8 sequences"):
        resume(run, **overrides)


def test_data_that_changed_is_noticed(run, workspace):
    path = workspace / "data" / "words" / "train.bin"
    data = bytearray(path.read_bytes())
    data[100] ^= 1
    path.write_bytes(data)
    with pytest.raises(DataError, match="damaged"):
        resume(run, max_steps=50)
    path.unlink()
    with pytest.raises(DataError, match="no prepared tokens"):
        resume(run, max_steps=50)


def test_a_moved_run_is_told_where_its_data_is_once(run, workspace):
    (workspace / "far" / "far").mkdir(parents=True)
    run.folder.rename(workspace / "far" / "far" / "away")
    moved = Run(workspace / "far" / "far" / "away")
    with pytest.raises(DataError, match="is gone"):
        resume(moved, max_steps=41)
    train(moved, resume(moved, max_steps=41, data=workspace / "data" / "words"))
    train(moved, resume(moved, max_steps=42))
    assert moved.status()["step"] == 42


@pytest.mark.parametrize("first", [{"max_steps": None, "max_time": "1000s"}, {"max_steps": 12}, {"epochs": 9.0}])
def test_another_time_reads_the_text_no_more_often_than_is_of_use(start, workspace, monkeypatch, first):
    most = start(workspace / "planned", max_steps=None, max_time="1000s")[1].config.max_steps
    run, trainer = start(workspace / "a", **first)
    train(run, trainer, 3)
    for longer in ("1000s", "9000s"):
        restart = session.plan_restart(Run(run.folder), {"max_time": longer})
        assert restart.config.max_steps == most > 12 and not restart.is_over
        assert "32 epochs" in restart.sources["max_steps"]
    assert session.plan_restart(Run(run.folder), {"max_steps": 2 * most}).config.max_steps == 2 * most
    monkeypatch.setattr(table, "USEFUL_EPOCHS", 32 * 3 / most)
    assert session.plan_restart(Run(run.folder), {"max_time": "9000s"}).is_over


@pytest.mark.parametrize("length", [{"max_steps": 40}, {"max_steps": 10}, {"max_time": "0.001s"}, {"epochs": 0.01}])
def test_a_length_that_is_reached_is_known(run, length):
    assert session.plan_restart(Run(run.folder), length).is_over
    assert not session.plan_restart(Run(run.folder), {"max_steps": 41}).is_over


# processes

LENGTH = 240  # about a second after the checkpoint that is waited for
COMMAND = [
    "--model",
    "nyx",
    "--dim",
    "32",
    "--n-layers",
    "2",
    "--n-heads",
    "2",
    "--seq-len",
    "32",
    "--dropout",
    "0.1",
    "--max-steps",
    str(LENGTH),
    "--batch-size",
    "4",
    "--grad-accum",
    "1",
    "--lr",
    "2e-3",
    "--val-every",
    "50",
    "--val-batches",
    "2",
    "--save-every",
    "20",
    "--sample-every",
    "100",
    "--compile",
    "off",
    "--device",
    "cpu",
    "--threads",
    "1",
]


@pytest.fixture(scope="module")
def whole_samples():
    """Samples as long as those of other processes, which conftest does not shorten."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sampling, "SAMPLE_LENGTH", SAMPLE_LENGTH)
        yield


@pytest.fixture(scope="module")
def uninterrupted(whole_samples, token_path, tmp_path_factory):
    out = tmp_path_factory.mktemp("whole") / "run"
    result = CliRunner().invoke(app, ["train", *COMMAND, "--data", str(token_path), "--out", str(out)])
    assert result.exit_code == 0, result.output
    return Run(out)


@pytest.mark.skipif(os.name != "posix", reason="signals are those of POSIX")
@pytest.mark.parametrize("name", ["SIGKILL", "SIGTERM", "SIGINT"])
def test_a_stopped_process_resumes_to_the_same_bits(uninterrupted, token_path, workspace, nnx, name):
    out = workspace / "weights" / "run"
    from tests.reliability.processes import Command, Setting  # POSIX only

    (workspace / "stdout").touch()
    setting = Setting(stdout=str(workspace / "stdout"))
    command = Command(workspace, "train", *COMMAND, "--data", token_path, "--out", out, setting=setting)
    while command.running() and max(ckpt.steps_in(out / "checkpoints"), default=0) < 40:
        time.sleep(0.002)
    command.send(getattr(signal, name))
    code = command.wait(timeout=60)
    run = Run(out)
    stopped_at = run.newest_checkpoint()[0].step
    assert 40 <= stopped_at < LENGTH, command.output
    if name == "SIGKILL":
        assert code == -signal.SIGKILL
        assert run.status()["status"] == "running"
    else:
        assert code == 130 and run.status()["status"] == "interrupted"
        stderr = command.output
        assert f"interrupted at step {stopped_at}; everything is saved" in stderr and "Traceback" not in stderr
        assert (workspace / "stdout").read_text() == "" and f"nnx train --resume {out}" in stderr
    result = nnx("train", "--resume", "last", "--json")
    assert result.exit_code == 0, result.stderr
    assert f"resuming {os.path.join('weights', 'run')} at step {stopped_at}" not in result.stdout
    assert json.loads(result.stdout)["status"] == "finished"
    assert everything(run) == everything(uninterrupted)


# short sequences


def lengths_of(trainer):
    """The sequence lengths of the steps that a trainer is going to take, as it takes them."""
    lengths, take = [], trainer.stepper.step.__call__

    class Seen(type(trainer.stepper.step)):
        def __call__(self, input_ids, targets, batch_size):
            lengths.append(input_ids.shape[1])
            return take(input_ids, targets, batch_size)

    trainer.stepper.step.__class__ = Seen
    return lengths


def test_a_run_that_begins_with_short_sequences_resumes_to_the_same_bits(start, workspace):
    settings = dict(short_sequences=0.5, model="nyx")
    run, trainer = start(workspace / "whole", **settings)
    lengths = lengths_of(trainer)
    assert train(run, trainer) == "finished"
    T = trainer.stepper.loader.seq_len
    assert lengths == [T // 2] * 6 + [T] * 6
    assert [line["tokens"] for line in records(run)][-1] == 12 * 8 * T
    for stop_at in (3, 6, 9):
        other, trainer = start(workspace / f"until {stop_at}", **settings)
        assert train(other, trainer, stop_at) == "interrupted"
        trainer = resume(other)
        lengths = lengths_of(trainer)
        assert train(other, trainer) == "finished"
        assert lengths == ([T // 2] * 6 + [T] * 6)[stop_at:]
        assert everything(other) == everything(run)


@pytest.mark.parametrize("stop_at, short_steps", [(3, 9), (9, 0)])
def test_a_run_that_is_given_another_length_does_not_go_back_to_short_sequences(start, workspace, stop_at, short_steps):
    run, trainer = start(workspace / "a", short_sequences=0.5)
    train(run, trainer, stop_at)
    trainer = resume(run, max_steps=24)
    lengths = lengths_of(trainer)
    assert train(run, trainer) == "finished"
    T = trainer.stepper.loader.seq_len
    assert lengths == [T // 2] * short_steps + [T] * (24 - stop_at - short_steps)
    assert run.config["training"]["short_sequences"] == (0.5 if short_steps else 0.0)


def test_a_run_says_once_how_it_runs_with_whole_sequences(start, workspace, monkeypatch):
    run, trainer = start(workspace / "a", short_sequences=0.5)
    asked, notes = [], []
    trainer.observer.note = notes.append

    def follow_length(stepper, config, state, progress):
        asked.append((state.step, progress))
        return Execution(graph=True, notes=("not compiled",)) if state.step == 6 else stepper.execution

    monkeypatch.setattr(trainer_module, "follow_length", follow_length)
    assert trainer.stepper.pieces == 2
    train(run, trainer)
    assert asked == [(step, step / 12) for step in range(12)] and notes == ["not compiled"]
    assert run.config["training"]["compile"] == trainer.config.compile == "graph"


def test_blocks_are_compiled_for_both_lengths_before_their_steps(start, workspace, monkeypatch):
    run, trainer = start(workspace / "a", short_sequences=0.5)
    trainer.stepper.execution, passes = Execution(compiled=True), []
    monkeypatch.setattr(compilation, "compile_blocks", lambda model, without_hooks: passes.append("compile"))
    lengths = lengths_of(trainer)

    def try_micro_batch(stepper, *, compiled, with_dropout=False):
        lengths.append(("compiled" if compiled else "eager", stepper.part(n_micro=1)[0].shape[1]))
        return compilation.Trial(5.5, 1.0, torch.ones(1))

    monkeypatch.setattr(compilation, "try_micro_batch", try_micro_batch)
    train(run, trainer)
    T = trainer.stepper.loader.seq_len
    assert lengths == [T // 2] * 6 + [("eager", T), ("compiled", T)] + [T] * 6 and passes == ["compile"]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
@pytest.mark.parametrize("how", ["graph", "on"])
def test_steps_of_both_lengths_are_recorded(start, workspace, how):
    """A run whose steps are graphs, of each length in turn, ends like one that runs op by op."""
    losses = {}
    for requested in ("off", how):
        settings = dict(compile=requested, short_sequences=0.5, batch_size=4, grad_accum=2, device="cuda")
        run, trainer = start(workspace / requested, **settings)
        T = trainer.stepper.loader.seq_len
        for length, stop_at in ((T // 2, 6), (T, None)):
            graphs = trainer.stepper.graphs
            assert (
                graphs is None
                if requested == "off"
                else graphs.micro_batch.inputs[0].shape == (4 * T // length, length)
            )
            train(run, trainer, stop_at)
            trainer.settle_execution(run, trainer.progress())
        assert run.config["training"]["compile"] == requested
        losses[requested] = [line["train_loss"] for line in records(run)]
    torch.testing.assert_close(losses[how], losses["off"], rtol=1e-3, atol=1e-3)


def test_a_run_that_knows_of_no_short_sequences_goes_on_without(start, workspace):
    run, trainer = start(workspace / "old", short_sequences=0.0)
    assert train(run, trainer, 3) == "interrupted"
    config = run.config
    del config["training"]["short_sequences"]
    run.set_config(config)
    trainer = resume(run)
    lengths = lengths_of(trainer)
    assert train(run, trainer) == "finished" and set(lengths) == {trainer.stepper.loader.seq_len}
