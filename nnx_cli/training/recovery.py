"""What a run does when numbers go bad, validation turns or memory runs out."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from nnx_cli.config import TrainConfig
from nnx_cli.errors import CheckpointError, QualityError
from nnx_cli.evaluation.losses import Evaluation
from nnx_cli.layers.blocks import eagerly
from nnx_cli.models._base import LanguageModel
from nnx_cli.planning.recipe.training import default_lr
from nnx_cli.runs.checkpoint import Checkpoint
from nnx_cli.runs.command_line import changed_command
from nnx_cli.runs.load import ModelRef
from nnx_cli.runs.logs import read_log
from nnx_cli.runs.run import Run
from nnx_cli.training.divergence import (
    LossCourse,
    LossSpikeDetector,
    all_finite,
    error_of_rise,
    first_overflow,
    has_turned,
    part_losses,
)
from nnx_cli.training.journal import Journal
from nnx_cli.training.pace import SlowRankDetector
from nnx_cli.training.state import TrainState, restore_checkpoint, spread_state, spread_weights
from nnx_cli.training.step import StepNumbers
from nnx_cli.training.stepper import Stepper

T = TypeVar("T")
MAX_BAD_STEPS = 8  # steps in a row without a finite gradient: more than chance
ROLLBACK_LR = 0.5  # of the learning rate is what a run goes on with after it went back to a checkpoint
LOWER = 0.25  # of it is what a new run should begin with
MOST_COUNTED = 2**26  # tokens of a text that are looked at


class Recovery:
    """Watches a run's numbers, and brings it back to its last checkpoint, or to its best weights."""

    def __init__(self, stepper: Stepper, state: TrainState, journal: Journal) -> None:
        self.stepper = stepper
        self.state = state
        self.journal = journal
        self.spikes = LossSpikeDetector()
        self.slow_ranks = SlowRankDetector()

    def read_numbers(self) -> StepNumbers:
        """Numbers of the newest step; synchronizes. Notices a spike of the loss since the last reading."""
        numbers = self.stepper.step.stats.read()
        self.state.skipped_steps, self.state.bad_steps = numbers.skipped_steps, numbers.bad_steps
        if self.spikes.update(numbers.highest_loss):
            self.journal.event(
                f"loss spike: {numbers.highest_loss:.3f} by step {self.state.step}, {self.spikes.mean:.3f} before it"
            )
        return numbers

    def watch_ranks(self, is_due: bool) -> None:
        """Notice, once, ranks that work longer at a step than the others, where it is time to look; synchronizes."""
        ranks = self.stepper.ranks
        if is_due and ranks.count > 1 and (line := self.slow_ranks.line(self.stepper.step.clock, ranks)):
            self.journal.event(line)

    def has_diverged(self, check_weights: bool) -> bool:
        """Whether steps fail one after the other, or, where those are checked, weights are not finite.

        With fp16 failing steps are the loss scale's business, until it is at its lowest.
        """
        step = self.stepper.step
        scaling = step.scaler.is_enabled() and step.scaler.get_scale() > 1
        if self.state.bad_steps >= MAX_BAD_STEPS and not scaling:
            return True
        weights = step.model.state_without_ties().values() if step.shards is None else step.parameters
        return check_weights and self.stepper.ranks.any(not all_finite(weights))

    def roll_back(self, run: Run, config: TrainConfig) -> None:
        """Go back to the last checkpoint and go on with a lower learning rate. Raises QualityError the second time."""
        state, stepper = self.state, self.stepper
        if state.lr_factor < 1.0:
            self._give_up(run, config)
        had_graphs = stepper.graphs is not None
        stepper.graphs = None  # they know the optimizer's state by its address
        failed_at, skipped, time_s = state.step, state.skipped_steps, state.time_s
        found: list[Checkpoint] = []  # on the first rank
        notes = stepper.ranks.first(lambda: self._restore_newest(run, found))
        spread_state(stepper.step, state, stepper.ranks, found[0] if found else None)
        state.lr_factor = ROLLBACK_LR
        state.time_s = time_s
        state.skipped_steps, state.bad_steps = skipped, 0
        stepper.step.stats.set_skipped(skipped, 0)
        self.journal.cut(run, state.step)
        if had_graphs:
            stepper.record_graphs()
        for note in notes:
            self.journal.event(note)
        self.journal.event(
            f"no finite gradient in {MAX_BAD_STEPS} steps up to step {failed_at}: back to step {state.step}, "
            f"with {ROLLBACK_LR:g} of the learning rate"
        )

    def _restore_newest(self, run: Run, found: list[Checkpoint]) -> list[str]:
        checkpoint, notes = run.newest_checkpoint()
        found.append(checkpoint)
        self._take_weights(checkpoint.model)
        restore_checkpoint(self.stepper.step, self.state, checkpoint)
        return notes

    def _take_weights(self, weights: Mapping[str, Tensor]) -> None:
        """Take weights, unless they are to be divided."""
        if self.stepper.step.shards is None:
            for name, tensor in self.stepper.step.model.state_without_ties().items():
                tensor.copy_(weights[name])

    def turn_back(self, run: Run, config: TrainConfig, progress: float, result: Evaluation) -> bool:
        """Where the validation that was just logged says that a run whose length is a time has turned: go back to the
        best weights, to anneal those over a short stretch and be done. Moments stay as they are, which matters for a
        few steps. Returns whether it did; it does not without the best weights, and once only."""
        state = self.state
        may = config.max_time is not None and config.stop_early == "auto" and config.schedule != "constant"
        may = may and state.turned_at is None and progress < 1.0 and not state.bad_steps
        if not may or not state.best_step or state.best_val_loss is None:
            return False
        rise, error = (
            result.loss - state.best_val_loss,
            error_of_rise(state.best_losses, part_losses(result.window_losses)),
        )
        if not has_turned(rise, error, progress * (1 - state.best_step / state.step)):
            return False
        ranks = self.stepper.ranks
        found: list[Mapping[str, Tensor]] = []  # on the first rank
        if not ranks.first(lambda: self._restore_best(run, rise, found)):
            return False
        state.turned_at, state.turned_to = progress, progress * state.best_step / state.step
        state.worse_validations = 0
        spread_weights(self.stepper.step, ranks, found[0] if found else None)
        state.time_s = ranks.first(lambda: state.time_s)
        self.spikes = LossSpikeDetector()
        self.journal.event(
            f"validation turned: {state.best_val_loss:.3f} at step {state.best_step}, {result.loss:.3f} at step "
            f"{state.step}; back to the weights of step {state.best_step}, and the learning rate falls to its end"
        )
        return True

    def _restore_best(self, run: Run, rise: float, weights: list[Mapping[str, Tensor]]) -> bool:
        """Take the best weights, unless the training loss rose with that of validation, or the disk lacks them; returns
        whether it did."""
        course, found = self.course(run), run.best_found()
        if course is None or course.since_best > rise / 2:  # its training loss went there with it
            return False
        if not found or found.get("best_step") != self.state.best_step:  # the disk refused them
            return False
        weights.append(ModelRef(run.folder).weights()[1])
        self._take_weights(weights[0])
        return True

    def course(self, run: Run) -> LossCourse | None:
        """How the losses of a run went, None where it has no log."""
        losses = ("step", "train_loss", "val_loss")
        with suppress(CheckpointError):
            records = read_log(run.folder / "metrics.jsonl")
            return LossCourse.of([{name: record.get(name) for name in losses} for record in records])
        return None

    def check_end(self, run: Run, config: TrainConfig, tokens: np.ndarray) -> None:
        """Raise QualityError where the losses of a run that is over say that it went wrong. `tokens` is its text."""
        self.stepper.ranks.first(lambda: self._check_end(run, config, tokens))

    def _check_end(self, run: Run, config: TrainConfig, tokens: np.ndarray) -> None:
        model, course = self.stepper.step.model, self.course(run)
        why = course and course.why_diverged(model.config.vocab_size, lambda: count_used(tokens))
        if why is not None:
            kept = (
                f"; {run.folder} has its weights of step {course.best_step:,}" if course and course.has_better else ""
            )
            raise QualityError(
                f"the run diverged: {why}; the likely cause is its learning rate, {config.lr:g}{kept}",
                fix=retry_command(run, model, config),
            )

    def _give_up(self, run: Run, config: TrainConfig) -> None:
        state, stepper = self.state, self.stepper
        where = "divided among GPUs as it is, none of its layers can be named"
        if stepper.step.shards is None:
            where = self._first_overflow()
        raise QualityError(
            f"the run diverged: no finite gradient in {MAX_BAD_STEPS} steps up to step {state.step}, also at a "
            f"lower learning rate; {where}",
            fix=retry_command(run, stepper.step.model, config),
        )

    def _first_overflow(self) -> str:
        stepper = self.stepper
        with eagerly(stepper.execution.compiled):
            first = self.state.step * stepper.samples_per_step
            return first_overflow(stepper.step.model, *stepper.part(first, n_micro=1))

    def retry_on_oom(self, look: Callable[[], T], use_less: Callable[[], bool] = lambda: False) -> T:
        """What `look` returns.

        Where memory runs out, `use_less` may let `look` need less; where it cannot, CUDA graphs, which keep the memory
        of a whole step to themselves, are given up. Raises torch.OutOfMemoryError where there are none.
        """
        while True:
            try:
                return look()
            except torch.OutOfMemoryError as error:
                refused = error.with_traceback(None)  # it would hold on to what was computed
            self.stepper.step.model.train()  # it was left as it was to look
            if use_less():
                continue
            if self.stepper.graphs is None:
                raise refused
            self.stepper.release_graphs()
            self.journal.event(f"out of memory at step {self.state.step}: training goes on without its CUDA graph")


def count_used(tokens: np.ndarray) -> int:
    """Ids that occur in a text, as far as it is looked at."""
    return len(np.unique(tokens[:MOST_COUNTED]))


def retry_command(run: Run, model: LanguageModel, config: TrainConfig) -> str:
    """The command line that made a run, with a lower learning rate: a quarter, at most what suits the model."""
    assert config.lr is not None and config.optimizer is not None
    lr = min(config.lr * LOWER, default_lr(config.optimizer, model.config.dim, model.recipe))
    command = None
    with suppress(CheckpointError):  # a damaged run.json
        command = run.status().get("command")
    dropped = ["--min-lr"] if config.min_lr > lr else []
    again = changed_command(command, run.folder, {"--lr": f"{lr:.2g}"}, dropped)
    return again or f"start it again with --lr {lr:.2g}"
