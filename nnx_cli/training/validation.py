"""Loss on held-out text during a run, and the best weights so far."""

from __future__ import annotations

import math
from typing import Any

from nnx_cli.config import TrainConfig
from nnx_cli.data.token_folder import TokenFolder
from nnx_cli.evaluation.losses import Evaluation, LossFunction, Masked, evaluate, graphed_losses
from nnx_cli.layers.blocks import eagerly
from nnx_cli.layers.loss import token_losses
from nnx_cli.models._base import LanguageModel
from nnx_cli.runs.run import Run
from nnx_cli.system.device import empty_cache
from nnx_cli.training.divergence import part_losses
from nnx_cli.training.journal import Journal
from nnx_cli.training.recovery import Recovery
from nnx_cli.training.state import TrainState, whole_weights
from nnx_cli.training.stepper import Stepper


class Validation:
    """Takes the loss on fixed windows of the validation split: as many at a time as a step has, in a graph of its own
    where steps have one, and less of both where memory runs out."""

    def __init__(self, model: LanguageModel, data: TokenFolder, stepper: Stepper, recovery: Recovery) -> None:
        self.model = model
        self.data = data
        self.masked = Masked.of(data.val_mask, data.documents["val"])
        self.token_bytes = None if data.tokenizer is None else data.tokenizer.token_bytes()
        self.stepper = stepper
        self.recovery = recovery
        self.reset()

    def reset(self) -> None:
        """Take as much memory as steps do."""
        self.batch_size = self.stepper.micro_rows
        self.losses_of: LossFunction = token_losses
        self.may_record = not self.model.syncs_in_eval

    def halve_eval_batch(self) -> bool:
        """Take less memory from here on: fewer windows at a time, then no graph. Returns whether that was possible."""
        if self.batch_size > 1:
            self.batch_size //= 2
        elif self.stepper.graphs is not None and self.may_record:
            self.may_record = False
        else:
            return False
        self.losses_of = token_losses
        empty_cache()
        return True

    def __call__(self, config: TrainConfig) -> Evaluation:
        """Losses of the model as it is. Raises torch.OutOfMemoryError."""
        assert config.batch_size is not None
        n_windows = None if config.val_batches is None else config.val_batches * config.batch_size
        with eagerly(self.stepper.execution.compiled):
            if self.stepper.step.shards is not None:  # in turns that all ranks take together
                return self._evaluate(n_windows)
            return self.recovery.retry_on_oom(lambda: self._evaluate(n_windows), self.halve_eval_batch)

    def _evaluate(self, n_windows: int | None) -> Evaluation:
        seq_len = self.model.config.seq_len
        if self.stepper.graphs is not None and self.may_record and self.losses_of is token_losses:
            self.model.eval()
            self.losses_of = graphed_losses(self.model, self.batch_size, seq_len)
            self.model.train()
        return evaluate(
            self.model,
            self.data.val,
            seq_len=seq_len,
            batch_size=self.batch_size,
            token_bytes=self.token_bytes,
            n_windows=n_windows,
            losses_of=self.losses_of,
            masked=self.masked,
            group=self.stepper.ranks,
            is_divided=self.stepper.step.shards is not None,
        )


class BestWeights:
    """The best weights of a run, and whether the disk has them: `saved_best` is step and losses of those that are on
    it, `pending_best` of better ones that it refused."""

    def __init__(self, stepper: Stepper, state: TrainState, journal: Journal) -> None:
        self.stepper = stepper
        self.state = state
        self.journal = journal
        self.saved_best: dict[str, Any] | None = None
        self.pending_best: dict[str, Any] | None = None

    def find(self, run: Run) -> None:
        """Learn which best weights the run folder has. They may be of a later step than the newest checkpoint, where
        the run was killed between the two; or missing, where the disk was full."""
        state, found = self.state, self.stepper.ranks.first(run.best_found)
        known: dict[str, Any] | None = None
        if state.best_val_loss is not None:
            known = {key: getattr(state, key) for key in ("best_step", "best_val_loss", "best_val_bits_per_byte")}
            if found is None:
                self.journal.observer.note("the best weights are missing or damaged: the next validation replaces them")
        self.saved_best = known if found == {} else found
        if known and (self.saved_best is None or known["best_val_loss"] < self.saved_best["best_val_loss"]):
            self.pending_best = known
            self.journal.try_write(lambda: self.write(run))

    def update(self, run: Run, result: Evaluation) -> None:
        """Take note of a validation, and keep the weights if they are the best."""
        state = self.state
        improved = math.isfinite(result.loss) and (state.best_val_loss is None or result.loss < state.best_val_loss)
        if improved:
            state.best_val_loss, state.best_val_bits_per_byte = result.loss, result.bits_per_byte
            state.best_step, state.worse_validations = state.step, 0
            state.best_losses = part_losses(result.window_losses)
        else:
            state.worse_validations += 1
        before = math.inf if self.saved_best is None else self.saved_best["best_val_loss"]
        if result.loss < before or (improved and result.loss == before):  # equal: the same step once more, after a kill
            self.pending_best = {
                "best_step": state.step,
                "best_val_loss": result.loss,
                "best_val_bits_per_byte": result.bits_per_byte,
            }
            self.journal.try_write(lambda: self.write(run))

    def write(self, run: Run) -> None:
        """Write the weights as the best ones, if that is what they are. Raises OutputError."""
        if self.pending_best is not None and self.pending_best["best_step"] == self.state.step:
            weights, found = whole_weights(self.stepper.step), self.pending_best
            self.stepper.ranks.first(lambda: run.save_best(weights, found))
            self.saved_best, self.pending_best = self.pending_best, None
