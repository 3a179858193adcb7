import json
import time
from unittest.mock import Mock

import pytest
import torch

from nnx_cli.config import TrainConfig
from nnx_cli.errors import DoesNotFit
from nnx_cli.training import stepper as stepper_module
from nnx_cli.training.stepper import Execution, divide_step


def test_a_step_divided_anew_has_the_same_samples_and_validates_as_much():
    config = TrainConfig(batch_size=8, grad_accum=3, val_batches=2)
    assert divide_step(config, 8) is config
    for batch_size in (1, 2, 3, 4, 6, 12, 24):
        divided = divide_step(config, batch_size)
        assert divided.batch_size * divided.grad_accum == 24
        assert 16 <= divided.val_batches * batch_size < 16 + batch_size
    assert divide_step(TrainConfig(batch_size=8, grad_accum=1), 2).val_batches is None


def test_the_name_of_an_execution_is_the_option():
    names = [Execution(graph=g, compiled=c).name for g in (False, True) for c in (False, True)]
    assert names == ["off", "on", "graph", "on"]


@pytest.mark.parametrize("pieces", [1, 2, 4])
def test_a_step_reads_each_sample_as_so_many_sequences(start, workspace, monkeypatch, pieces):
    _, trainer = start(workspace / "a", batch_size=4, grad_accum=2)
    stepper, step = trainer.stepper, Mock()
    batch = stepper.loader.batch(0, 8)
    monkeypatch.setattr(stepper, "step", Mock(optimizer=stepper.step.optimizer, side_effect=step))
    stepper.pieces = pieces
    assert stepper.take(0, 1e-3) == batch[0].numel()
    (ids, targets, rows), length = step.call_args.args, batch[0].shape[1] // pieces
    assert rows == 4 * pieces and stepper.part(n_micro=1)[0].shape == (rows, length)
    for got, whole in zip((ids, targets), batch, strict=True):
        for piece in range(pieces):
            assert got[piece::pieces].equal(whole[:, piece * length : (piece + 1) * length])


def test_graphs_are_recorded_of_the_sequences_that_are_read(start, workspace, monkeypatch):
    _, trainer = start(workspace / "a", batch_size=4, grad_accum=2)
    stepper, made = trainer.stepper, Mock()
    monkeypatch.setattr(stepper_module, "StepGraphs", made)
    stepper.pieces = 4
    stepper.record_graphs()
    step, ids, targets, rows = made.call_args.args
    assert step is stepper.step and ids.shape == targets.shape == (32, stepper.loader.seq_len // 4) and rows == 16
    stepper.take(0, 1e-3)
    assert stepper.graphs.call_args.args[0].shape == ids.shape


def test_micro_batches_halve_until_one_sequence_is_left(start, workspace):
    _, trainer = start(workspace / "a", batch_size=6, grad_accum=2)
    stepper, released, sizes = trainer.stepper, [], []
    stepper.on_release = lambda: released.append(stepper.batch_size)
    while stepper.batch_size > 1:
        stepper.graphs = object()
        stepper.halve_micro_batch(3)
        assert stepper.graphs is None and stepper.batch_size * stepper.n_micro == 12
        sizes.append(stepper.batch_size)
    assert sizes == released == [3, 1] and len(trainer.journal.events) == 2
    with pytest.raises(DoesNotFit, match="out of memory at step 4, 1 sequence at a time"):
        stepper.halve_micro_batch(3)


def test_memory_that_runs_out_while_weights_change_ends_the_run(start, workspace):
    _, trainer = start(workspace / "a")
    trainer.stepper.step.updating = True
    with pytest.raises(DoesNotFit):
        trainer.stepper.halve_micro_batch(0)


def test_a_compiled_step_is_deterministic_and_the_next_eager_one_is_not(start, workspace, monkeypatch):
    _, trainer = start(workspace / "a")
    stepper, seen = trainer.stepper, []

    def accumulate(*_):
        seen.append(torch.are_deterministic_algorithms_enabled())
        return torch.ones(())

    monkeypatch.setattr(stepper.step, "accumulate", accumulate)
    monkeypatch.setattr(stepper.step, "end", lambda loss: None)
    for execution in (Execution(compiled=True), Execution()):
        stepper.execution = execution
        stepper.take(0, 1e-3)
    assert seen == [True, True, False, False] and not torch.are_deterministic_algorithms_enabled()


def test_steps_that_wait_for_their_samples_say_so(start, workspace, monkeypatch):
    run, trainer = start(workspace / "a")
    load = trainer.stepper.loader.batch

    def slow(first, count):
        time.sleep(0.05)
        return load(first, count)

    monkeypatch.setattr(trainer.stepper.loader, "batch", slow)
    with run.lock():
        trainer.train(run, lambda: False)
    lines = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
    assert lines[0]["data_wait_share"] * lines[0]["time_s"] == pytest.approx(0.05, rel=0.5)
    assert all(0.1 < line["data_wait_share"] <= 1 for line in lines)


@pytest.mark.parametrize(
    ("is_idle", "is_resident", "counts"), [(True, False, True), (False, False, False), (True, True, False)]
)
def test_only_an_idle_device_waits_and_only_for_what_it_has_not(
    start, workspace, monkeypatch, is_idle, is_resident, counts
):
    class Event:
        def query(self):
            return is_idle

    _, trainer = start(workspace / "a")
    stepper = trainer.stepper
    stepper._running.append(Event())
    if is_resident:
        stepper.loader.resident = torch.from_numpy(stepper.loader.tokens.copy())
    stepper.take(0, 1e-3)
    assert (stepper.data_wait_s > 0) == counts
