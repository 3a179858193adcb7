"""The training loop."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from nnx_cli.config import TrainConfig
from nnx_cli.data.loader import Loader
from nnx_cli.data.token_folder import TokenFolder
from nnx_cli.errors import OutputError, counted, quoted
from nnx_cli.evaluation.losses import Evaluation
from nnx_cli.layers.blocks import checkpoint_blocks, eagerly
from nnx_cli.models._base import LanguageModel
from nnx_cli.optim._groups import cast_matrices
from nnx_cli.optim.adamw8bit import eight_bit_matrices
from nnx_cli.runs import checkpoint as ckpt
from nnx_cli.runs.checkpoint import Checkpoint
from nnx_cli.runs.run import Run
from nnx_cli.system.device import DTYPES, memory_budget, peak_memory_bytes, synchronize
from nnx_cli.system.ranks import ALONE, Ranks
from nnx_cli.training.cadence import Cadence, Due
from nnx_cli.training.compilation import choose, conditions_of, follow_length, verify
from nnx_cli.training.journal import Journal, finite
from nnx_cli.training.observer import Observer
from nnx_cli.training.recovery import Recovery
from nnx_cli.training.sampling import Sampling, draw_sample
from nnx_cli.training.schedule import lr_at
from nnx_cli.training.shards import Shards
from nnx_cli.training.state import TrainState, make_checkpoint
from nnx_cli.training.step import StepNumbers
from nnx_cli.training.stepper import Execution, Stepper, divide_step
from nnx_cli.training.validation import BestWeights, Validation

RESIDENT_SHARE = 1 / 64  # of the memory to plan for: what the tokens of a small text may take of it


class Trainer:
    """A run in progress. `config` has every value filled in.

    Every rank of a run on several GPUs has a trainer that takes the same turns; what clocks and files say, they have
    from the first one.
    """

    def __init__(
        self,
        model: LanguageModel,
        data: TokenFolder,
        config: TrainConfig,
        device: torch.device,
        observer: Observer,
        sampling: Sampling,
        ranks: Ranks = ALONE,
        shards: Shards | None = None,
    ) -> None:
        self.model = model
        self.data = data
        self.config = config
        self.device = device
        self.observer = observer
        self.sampling = sampling
        self.state = TrainState()
        self.journal = Journal(observer)
        loader = make_loader(model, data, config, device)
        self.stepper = Stepper(model, loader, config, device, self.journal.event, ranks, shards)
        self.cadence = Cadence(config)
        self.recovery = Recovery(self.stepper, self.state, self.journal)
        self.validation = Validation(model, data, self.stepper, self.recovery)
        self.stepper.on_release = self.validation.reset
        self.best = BestWeights(self.stepper, self.state, self.journal)
        self.flops_per_token: int | None = None  # in training; None: not counted
        self.verify_later: Callable[[], Execution] | None = None  # what is left to do once a step has been shown

    def train(self, run: Run, should_stop: Callable[[], bool]) -> str:
        """Train to the end of the length, or until `should_stop`; returns finished or interrupted.

        Raises QualityError when gradients are not finite even after going back to the last checkpoint with a lower
        learning rate, or when the losses went wrong; DoesNotFit when one sequence at a time is too much for the memory.
        """
        state, journal = self.state, self.journal
        self.best.find(run)
        self.model.train()
        journal.mark(state)
        done = self.progress()
        while (before := done) < 1.0:  # not the progress by now: what is due in between would be missed
            self.settle_execution(run, before)
            with training_time(state):
                config, lr = self.config, self.lr(before)
                state.tokens += self.take_step(lr)
                state.step += 1
                if self.config is not config:  # memory ran out
                    self.write_config(run)
            done, stop, due = self.decide(before, should_stop())
            self.observer.moved(done)
            if due.log or due.save or self.device.type != "cuda":
                with training_time(state):
                    numbers = self.recovery.read_numbers()
                if self.recovery.has_diverged(check_weights=due.save):
                    done = min(before, self.roll_back(run))
                    continue
                self.recovery.watch_ranks(due.log)
                journal.report_events(run)
            if due.log:
                record = self.record(numbers, lr)
                if due.validate:
                    result = self.validate(run, numbers.loss)
                    record |= {"val_loss": result.loss, "val_bits_per_byte": result.bits_per_byte}
                journal.log_step(run, record, done)
            if due.sample:
                self.sample(run)
            gave_up = due.validate and state.is_out_of_patience(self.config)
            turned = due.validate and not gave_up and self.turn_back(run, done, result)
            if stop or gave_up or done >= 1.0:
                self.save(run)
            elif (due.save or turned) and not state.bad_steps:  # what a run goes back to is from before its trouble
                journal.try_write(lambda: self.save(run))
            if gave_up:
                tried = counted(self.config.patience or 0, "validation")
                self.observer.note(f"stopped early: {tried} without a better one")
                break
            if stop and done < 1.0:
                return "interrupted"
            done = self.progress() if turned else done
        self.recovery.check_end(run, self.config, self.data.train)
        return "finished"

    # where the run is

    def progress(self) -> float:
        """The part of the run that is done, 0 to 1."""
        return self.state.progress(self.config)

    def decide(self, before: float, asked: bool) -> tuple[float, bool, Due]:
        """How far the run is, whether it is to stop, as any rank may be `asked` to, and what is due by the first one's
        clock."""
        due = self.cadence.due(self.state.step, before, self.progress(), must_save=self.is_overdue())
        told = self.stepper.ranks.gather((self.state.time_s, due, asked))
        self.state.time_s, due, _ = told[0]
        stop = any(asked for *_, asked in told)
        return self.progress(), stop, replace(due, save=due.save or stop)

    def lr(self, progress: float) -> float:
        """Learning rate of the next step."""
        return self.state.lr_factor * scheduled_lr(self.config, self.state.step, progress)

    def is_overdue(self) -> bool:
        """Whether a checkpoint is due by the clock: the last one is old, or was refused a while ago."""
        return self.cadence.is_overdue() if self.journal.refused_at is None else self.journal.should_retry()

    def checkpoint(self) -> Checkpoint:
        """Everything that `restore_checkpoint` needs."""
        return make_checkpoint(self.stepper.step, self.state, self.config.seed)

    # steps

    def take_step(self, lr: float) -> int:
        """One optimizer step; returns its number of tokens. A GPU may still be at work on it."""
        n_tokens = self.stepper.take(self.state.step, lr)
        self.config = divide_step(self.config, self.stepper.batch_size)
        return n_tokens

    def choose_execution(self, requested: str, postpone: bool = True) -> TrainConfig:
        """Let steps run as `requested` and as the machine allows; returns the settings for the run's files.

        On a GPU a run that may be compiled takes its first steps before that, so that they can be seen soon, and notes
        what is requested meanwhile; not where its bits are promised, nor without `postpone`. Nor where the model is
        divided among ranks: what is requested stays noted, for a run on one GPU that goes on with it.
        """
        whole = self.stepper.step.shards is None
        self.stepper.pieces = self.state.pieces(self.config, self.progress())
        conditions = conditions_of(self.config, self.device, requested, self.state, is_divided=not whole)
        wanted = choose(conditions)
        can_wait = self.device.type == "cuda" and not self.config.deterministic and whole
        postponed = postpone and wanted.compiled and can_wait
        self._apply(verify(self.stepper, replace(wanted, compiled=wanted.compiled and not postponed), conditions))
        now = self.stepper.execution
        if not (whole or now.compiled):
            self.config = replace(self.config, compile=requested)
        if postponed and now.step_s is not None and choose(conditions, now.step_s).compiled:
            self.verify_later = partial(verify, self.stepper, replace(now, compiled=True, notes=()), conditions)
            return replace(self.config, compile=requested)
        return self.config

    def settle_execution(self, run: Run, progress: float) -> None:
        """Let steps run as is due at that part of the run; once one has been shown, compile what was left for then.
        That takes its time, which is none of training's."""
        if (now := follow_length(self.stepper, self.config, self.state, progress)) != self.stepper.execution:
            self._apply(now)
            self.write_config(run)
        if self.verify_later is None or not self.journal.has_shown_steps:
            return
        verify_later, self.verify_later = self.verify_later, None
        self.observer.note("compiling; training goes on after it")
        self._apply(verify_later())
        self.write_config(run)

    def _apply(self, execution: Execution) -> None:
        for note in execution.notes:
            self.observer.note(note)
        self.stepper.execution = replace(execution, notes=())
        self.config = divide_step(replace(self.config, compile=execution.name), self.stepper.batch_size)

    def write_config(self, run: Run) -> None:
        """Let config.json say how steps run, so that a resumed run knows."""
        changed = ["batch_size", "grad_accum", "val_batches", *(["compile"] if self.verify_later is None else [])]
        training = run.config["training"] | {key: getattr(self.config, key) for key in changed}
        self.journal.try_write(lambda: run.set_config(run.config | {"training": training}))

    def roll_back(self, run: Run) -> float:
        """Go back to the last checkpoint; returns the progress there. Raises QualityError the second time."""
        self.recovery.roll_back(run, self.config)
        self.journal.mark(self.state)
        self.journal.report_events(run)
        return self.progress()

    def turn_back(self, run: Run, done: float, result: Evaluation) -> bool:
        """Where validation turned, go back to the best weights. Returns whether it did: a checkpoint has to follow, for
        better weights may take the place of those."""
        turned = self.recovery.turn_back(run, self.config, done, result)
        self.journal.report_events(run)
        return turned

    # what follows a step

    def record(self, numbers: StepNumbers, lr: float) -> dict[str, Any]:
        """A line of metrics.jsonl, without a validation."""
        state, speed = self.state, self.journal.tokens_per_s(self.state)
        record = {
            "step": state.step,
            "tokens": state.tokens,
            "time_s": round(state.time_s, 3),
            "train_loss": numbers.loss,
            "val_loss": None,
            "val_bits_per_byte": None,
            "lr": lr,
            "grad_norm": numbers.grad_norm,
            "tokens_per_s": speed,
            "peak_memory_bytes": peak_memory_bytes(self.device),
            "skipped_steps": state.skipped_steps,
            "mfu": mfu(self, speed),
            "data_wait_share": round(min(1.0, self.stepper.waited() / self.journal.seconds(state)), 4),
        }
        self.journal.mark(state)
        return record

    def validate(self, run: Run, train_loss: float) -> Evaluation:
        """Loss on fixed windows of the validation split; the best weights so far are kept in the run folder."""
        result = self.validation(self.config)
        self.best.update(run, result)
        self.journal.set_status(
            run,
            step=self.state.step,
            train_loss=finite(train_loss),
            val_loss=finite(result.loss),
            val_bits_per_byte=finite(result.bits_per_byte),
            **(self.best.saved_best or {}),
        )
        return result

    def sample(self, run: Run) -> None:
        """Draw a sample, show it and log it: the first rank does."""
        shards = self.stepper.step.shards
        model = self.model if shards is None else shards.copied()
        if model is None or not self.stepper.ranks.is_first:
            return
        step, seed = self.state.step, self.config.seed + self.state.step
        draw = partial(draw_sample, model, self.data.tokenizer, self.sampling, seed)
        with eagerly(self.stepper.execution.compiled), self.cadence.sampling.timed():
            prompt, text = self.recovery.retry_on_oom(draw)
        self.journal.log(run, "samples.jsonl", {"step": step, "prompt": prompt, "text": text})
        self.observer.sampled(step, prompt + text)

    def save(self, run: Run) -> None:
        """Write a checkpoint and drop those that are no longer kept. Raises OutputError; then the older ones stand."""
        synchronize(self.device)
        ranks = self.stepper.ranks
        with saying_how_to_go_on(run):
            with self.cadence.saving.timed():  # after it nothing keeps the tensors
                ranks.first(partial(write_checkpoint, run, self.journal, self.checkpoint()))
            self.best.write(run)
            ranks.first(lambda: self._tidy(run))
        self.journal.saved(self.state.step)

    def _tidy(self, run: Run) -> None:
        ckpt.prune_checkpoints(run.checkpoints, self.config.keep, self.state.step)
        self.journal.status |= {"step": self.state.step, **(self.best.saved_best or {})}
        run.set_status(**self.journal.status)


def mfu(trainer: Trainer, tokens_per_s: float) -> float | None:
    """Model FLOPs utilization at a speed: of the rate that large matmuls reach on the devices of all ranks, the share
    that training takes. None where that is not known."""
    flops, rate = trainer.flops_per_token, trainer.stepper.rate
    return None if flops is None or rate is None else flops * tokens_per_s / rate


def write_checkpoint(run: Run, journal: Journal, checkpoint: Checkpoint) -> None:
    """Write a checkpoint, and before that what the logs lack. Raises OutputError."""
    journal.write_lines(run)
    run.sync_logs()
    ckpt.save_checkpoint(run.checkpoints, checkpoint)


@contextmanager
def training_time(state: TrainState) -> Iterator[None]:
    """What happens inside counts as time spent in training steps."""
    started = time.perf_counter()
    yield
    state.time_s += time.perf_counter() - started


def scheduled_lr(config: TrainConfig, step: int, progress: float) -> float:
    """Learning rate of a run's schedule."""
    assert config.lr is not None and config.warmup_steps is not None
    return lr_at(
        step,
        progress,
        schedule=config.schedule,
        lr=config.lr,
        min_lr=config.min_lr,
        warmup_steps=config.warmup_steps,
    )


@contextmanager
def saying_how_to_go_on(run: Run) -> Iterator[None]:
    """Let an OutputError inside say which checkpoint stands, and how a run goes on from it."""
    try:
        yield
    except OutputError as error:
        newest = max(ckpt.steps_in(run.checkpoints), default=0)
        raise OutputError(
            f"{error}; the newest checkpoint is of step {newest}",
            fix=f"free some space, then: nnx train --resume {quoted(run.folder)}",
        ) from error


def make_trainer(
    model: LanguageModel,
    data: TokenFolder,
    config: TrainConfig,
    device: torch.device,
    observer: Observer,
    sampling: Sampling,
    ranks: Ranks = ALONE,
) -> Trainer:
    """A trainer of a model on the CPU, which it moves to `device` and prepares for `config`; of one on the meta device
    where it is to be divided."""
    if config.weight_precision == "bf16":
        cast_matrices(model, "bf16")
    divided = is_divided(config, ranks)
    if not divided:
        model.to(device)
    model.compute_dtype = DTYPES[config.precision]
    checkpoint_blocks(model, config.activation_checkpointing)
    in_blocks = eight_bit_matrices(model) if config.optimizer == "adamw8bit" else ()
    shards = Shards(model, ranks, device, in_blocks) if divided else None
    return Trainer(model, data, config, device, observer, sampling, ranks, shards)


def is_divided(config: TrainConfig, ranks: Ranks) -> bool:
    """Whether each rank has a part of the model."""
    return config.parallel == "fsdp" and ranks.count > 1


def make_loader(model: LanguageModel, data: TokenFolder, config: TrainConfig, device: torch.device) -> Loader:
    """Batches of the training text, whose tokens live on a GPU where they take little of it."""
    resident = int(memory_budget(device, config.vram_bytes) * RESIDENT_SHARE) if device.type == "cuda" else 0
    return Loader(
        data.train,
        model.config.seq_len,
        config.seed,
        device,
        resident,
        data.mask,
        model.ignore_index,
        data.documents["train"] if data.begins_at_documents else None,
    )
