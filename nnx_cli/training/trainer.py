"""The training loop."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from nnx_cli.config import SampleConfig, TrainConfig
from nnx_cli.data.loader import Loader
from nnx_cli.data.token_folder import TokenFolder
from nnx_cli.errors import DoesNotFit, OutputError, QualityError
from nnx_cli.evaluation.evaluator import Evaluation, evaluate, graphed_losses
from nnx_cli.inference.sampler import generate
from nnx_cli.layers.blocks import eagerly
from nnx_cli.layers.loss import token_losses
from nnx_cli.models._base import LanguageModel
from nnx_cli.optim._base import set_lr
from nnx_cli.optim._build import build_optimizer
from nnx_cli.optim._state import load_optimizer_state, optimizer_state
from nnx_cli.runs import checkpoint as ckpt
from nnx_cli.runs.checkpoint import Checkpoint
from nnx_cli.runs.run import Run
from nnx_cli.system.device import memory_budget, peak_memory_bytes, set_seed, synchronize
from nnx_cli.training.divergence import SpikeWatch, all_finite, first_overflow
from nnx_cli.training.schedule import MILESTONES, lr_at
from nnx_cli.training.step import Step, StepGraphs

T = TypeVar("T")
SAVE_SECONDS = 600  # without --save-every: no checkpoint is older than this
UPKEEP_SHARE = 0.05  # of the time may go into saving, and as much into samples, unless they were asked for
UPKEEP_SECONDS = 0.1  # what they are taken to need before the first one: nothing of it in a run's first two seconds
RETRY_SECONDS = 60  # after which a refused save is tried again
LOG_STEPS = 10
MAX_BAD_STEPS = 8  # steps in a row without a finite gradient: more than chance
ROLLBACK_LR = 0.5  # of the learning rate is what a run goes on with after it went back to a checkpoint
AHEAD = 2  # steps that the processor may prepare while a card is still busy
RESIDENT_SHARE = 1 / 64  # of the memory to plan for: what the tokens of a small text may take of it


@dataclass
class State:
    """Where a run is: everything besides tensors that it needs to go on."""

    step: int = 0
    tokens: int = 0
    time_s: float = 0.0  # spent in training steps
    best_val_loss: float | None = None
    best_val_bits_per_byte: float | None = None
    best_step: int = 0
    worse_validations: int = 0  # since the best one
    skipped_steps: int = 0
    bad_steps: int = 0  # skipped ones in a row
    lr_factor: float = 1.0  # on the schedule's learning rate; below 1 after a rollback


@dataclass
class Upkeep:
    """Keeps something that a run does beside training to a share of its time."""

    ended_at: float = field(default_factory=lambda: time.monotonic())
    seconds: float = UPKEEP_SECONDS  # that it took the last time

    def is_affordable(self) -> bool:
        return time.monotonic() - self.ended_at >= self.seconds / UPKEEP_SHARE

    @contextmanager
    def timed(self) -> Iterator[None]:
        started = time.monotonic()
        yield
        self.ended_at = time.monotonic()
        self.seconds = self.ended_at - started


class Observer:
    """What a run tells whoever watches it. The engine itself prints nothing."""

    def step(self, record: dict, progress: float) -> None:
        """A logged step: a line of metrics.jsonl; `progress` is the part of the run that is done."""

    def sampled(self, step: int, text: str) -> None:
        """A sample was drawn."""

    def saved(self, step: int) -> None:
        """A checkpoint is on the disk."""

    def note(self, text: str) -> None:
        """Something worth a line happened."""


class Trainer:
    """A run in progress: model, optimizer, data and state. `config` has every value filled in."""

    def __init__(
        self,
        model: LanguageModel,
        data: TokenFolder,
        config: TrainConfig,
        device: torch.device,
        observer: Observer,
        sample_config: SampleConfig,
        sample_prompt: list[int],
    ) -> None:
        self.model, self.data, self.config, self.device, self.observer = model, data, config, device, observer
        self.sample_config, self.sample_prompt = sample_config, sample_prompt
        room = int(memory_budget(device, config.vram_bytes) * RESIDENT_SHARE) if device.type == "cuda" else 0
        self.loader = Loader(data.train, model.config.seq_len, config.seed, device, room, data.mask, model.ignore_index)
        self.samples_per_step = config.batch_size * config.grad_accum
        self.optimizer = build_optimizer(model, config)
        self.scaler = torch.amp.GradScaler(device.type, enabled=config.precision == "fp16")
        self.step = Step(model, self.optimizer, self.scaler, config.grad_clip, config.optimizer_in_backward)
        self.captured: StepGraphs | None = None
        self.compile_later: Callable[[], None] | None = None  # what is left to do once the first step has been shown
        self.validate_in_full()
        self.spikes = SpikeWatch()
        self.news: list[str] = []  # what happened and `train` has not yet told
        self.token_bytes = None if data.tokenizer is None else data.tokenizer.token_bytes()
        self.state = State()
        self.best: dict | None = None  # step and losses of the best weights that are on the disk
        self.better: dict | None = None  # of better ones that the disk refused
        self.status: dict = {}  # what run.json should say
        self.unwritten: list[tuple[str, dict]] = []  # lines of logs that the disk refused
        self.saving, self.sampling = Upkeep(), Upkeep()
        self._saved_at = time.monotonic()
        self._refused_at: float | None = None  # when the disk last refused a write
        self._running: deque[torch.cuda.Event] = deque()

    # checkpoints

    def checkpoint(self) -> Checkpoint:
        """Everything that `restore` needs. Random numbers are a function of seed and step, so the step is their
        state."""
        state = asdict(self.state) | {
            "format": ckpt.FORMAT,
            "scaler": self.scaler.state_dict(),
            "random": {"seed": self.config.seed, "step": self.state.step},
        }
        return Checkpoint(
            self.state.step, self.model.state_without_ties(), optimizer_state(self.optimizer, self.model), state
        )

    def restore(self, checkpoint: Checkpoint) -> None:
        """Continue from a checkpoint whose weights the model has. Raises CheckpointError where it is another's."""
        self.optimizer.state.clear()
        load_optimizer_state(self.optimizer, self.model, checkpoint.optimizer)
        if self.scaler.is_enabled() and checkpoint.state["scaler"]:
            self.scaler.load_state_dict(checkpoint.state["scaler"])
        for key in State.__dataclass_fields__.keys() & checkpoint.state.keys():
            setattr(self.state, key, checkpoint.state[key])
        self.step.stats.set_skipped(self.state.skipped_steps, self.state.bad_steps)

    # the loop

    def progress(self) -> float:
        """The part of the run that is done, 0 to 1."""
        config, state = self.config, self.state
        by_steps = state.step / config.max_steps if config.max_steps else 0.0
        by_time = state.time_s / config.max_time_s if config.max_time else 0.0
        return min(1.0, max(by_steps, by_time))

    def train(self, run: Run, should_stop: Callable[[], bool]) -> str:
        """Train to the end of the length, or until `should_stop`; returns finished or interrupted.

        Raises QualityError when gradients stay without finite numbers even after going back to the last checkpoint with
        a lower learning rate; DoesNotFit when one sequence at a time is too much for the memory.
        """
        config, state = self.config, self.state
        self.find_best(run)
        self.model.train()
        logged, logged_at = state.tokens, state.time_s
        shown = False
        while (before := self.progress()) < 1.0:
            if shown and self.compile_later is not None:
                self.compile_now()
            started = time.perf_counter()
            lr = state.lr_factor * lr_at(
                state.step,
                before,
                schedule=config.schedule,
                lr=config.lr,
                min_lr=config.min_lr,
                warmup_steps=config.warmup_steps,
            )
            state.tokens += self.take_step(lr)
            state.step += 1
            if self.config is not config:  # memory ran out, or blocks were compiled
                config = self.config
                changed = ("batch_size", "grad_accum", "val_batches", *(() if self.compile_later else ("compile",)))
                training = run.config["training"] | {key: getattr(config, key) for key in changed}
                self.attempt(lambda training=training: run.set_config(run.config | {"training": training}))
            state.time_s += time.perf_counter() - started
            done = self.progress()
            validate = self._due(config.val_every, before, done)
            log = validate or state.step % LOG_STEPS == 0 or state.step == 1
            stop = should_stop()
            overdue = self.is_overdue()
            save = stop or overdue or done >= 1.0 or self._due(config.save_every, before, done, self.saving)
            if log or save or self.device.type != "cuda":
                started = time.perf_counter()
                loss, grad_norm = self.read_stats()
                state.time_s += time.perf_counter() - started
                lost = self.lost() or (save and not all_finite(self.model.state_without_ties().values()))
                if lost:
                    self.roll_back(run)
                    logged, logged_at = state.tokens, state.time_s
                self.tell(run)
                if lost:
                    continue
                if state.bad_steps and done < 1.0 and not stop:
                    save = False  # what a run goes back to is from before its trouble
            if log:
                record = {
                    "step": state.step,
                    "tokens": state.tokens,
                    "time_s": round(state.time_s, 3),
                    "train_loss": loss,
                    "val_loss": None,
                    "val_bits_per_byte": None,
                    "lr": lr,
                    "grad_norm": grad_norm,
                    "tokens_per_s": round((state.tokens - logged) / (state.time_s - logged_at), 1),
                    "peak_memory_bytes": peak_memory_bytes(self.device),
                    "skipped_steps": state.skipped_steps,
                }
                logged, logged_at = state.tokens, state.time_s
                if validate:
                    result = self.validate(run, loss)
                    record |= {"val_loss": result.loss, "val_bits_per_byte": result.bits_per_byte}
                self.log(run, "metrics.jsonl", record)
                self.observer.step(record, done)
                shown = True
            if self._due(config.sample_every, before, done, self.sampling):
                with self.sampling.timed():
                    self.sample(run)
            gave_up = validate and config.patience is not None and state.worse_validations >= config.patience
            if stop or gave_up or done >= 1.0:
                self.save(run)
            elif save:
                self.attempt(lambda: self.save(run))
            if gave_up:
                self.observer.note(f"stopped early: {config.patience} validations without a better one")
                return "finished"
            if stop and done < 1.0:
                return "interrupted"
        return "finished"

    def _due(self, every: int | None, before: float, done: float, upkeep: Upkeep | None = None) -> bool:
        """Whether something that happens every so many steps (0: never; None: at MILESTONES, if there is time for it),
        and at the end, happens now."""
        if every == 0:
            return False
        if done >= 1.0:
            return True
        if every is not None:
            return self.state.step % every == 0
        at_milestone = any(before < milestone <= done for milestone in MILESTONES)
        return at_milestone and (upkeep is None or upkeep.is_affordable())

    def take_step(self, lr: float) -> int:
        """One optimizer step; returns its number of targets. A card may still be at work on it: see `read_stats`.

        Where memory runs out, the same samples are taken in smaller micro-batches from here on.
        """
        state, n = self.state, self.samples_per_step
        while True:
            set_seed(self.config.seed, state.step)
            set_lr(self.optimizer, lr)
            try:
                self.run_step(*self.loader.batch(state.step * n, n))
                break
            except torch.OutOfMemoryError:
                pass  # the exception holds on to what was computed: it has to go first
            self.shrink()
        if self.device.type == "cuda":
            self._wait_for_older_steps()
        return n * self.loader.seq_len

    def run_step(self, input_ids: Tensor, targets: Tensor) -> None:
        """One optimizer step on samples (N, T), in the faster of the ways that there are."""
        if self.captured is not None:
            self.captured(input_ids, targets)
        else:
            self.step(input_ids, targets, self.config.batch_size)

    def _wait_for_older_steps(self) -> None:
        """Keep the processor at most AHEAD steps before the card: that is enough to never leave it idle, and little
        enough for the clock to tell the time of a step."""
        event = torch.cuda.Event()
        event.record()
        self._running.append(event)
        if len(self._running) > AHEAD:
            self._running.popleft().synchronize()

    def shrink(self) -> None:
        """Divide a step into more micro-batches. Raises DoesNotFit where they hold one sequence already, or where
        memory ran out while weights changed."""
        self.captured = None
        self.optimizer.zero_grad(set_to_none=True)
        if self.config.batch_size == 1 or self.step.in_backward or self.step.updating:
            raise DoesNotFit(
                f"out of memory at step {self.state.step + 1}, {self.config.batch_size} sequences at a time",
                fix="the last checkpoint is intact; take a smaller --size or --seq-len, or more --vram",
            )
        self.step.forget()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        n, size = self.samples_per_step, self.config.batch_size
        smaller = max(divisor for divisor in range(1, size // 2 + 1) if n % divisor == 0)
        validated = self.config.val_batches and -(-self.config.val_batches * size // smaller)
        self.config = replace(self.config, batch_size=smaller, grad_accum=n // smaller, val_batches=validated)
        self.validate_in_full()
        self.news.append(
            f"out of memory at step {self.state.step + 1}: {smaller} sequences at a time instead of {size}, "
            f"{n // smaller} times a step; the samples stay the same"
        )

    def release(self) -> None:
        """Forget what was recorded as a CUDA graph, and give its memory back."""
        self.captured = None
        self.validate_in_full()
        torch.cuda.empty_cache()

    def compile_now(self) -> None:
        """Compile what was left for later. That takes its time, which is none of training's."""
        compile_later, self.compile_later = self.compile_later, None
        self.observer.note("compiling; training goes on after it")
        compile_later()
        self.config = replace(self.config)  # what was decided is to be written, whatever it is

    def capture(self) -> bool:
        """Record the step as a CUDA graph from now on; returns whether that is possible here."""
        if self.device.type != "cuda":
            return False
        self.release()
        input_ids, targets = self.loader.batch(0, self.samples_per_step)
        self.captured = StepGraphs(self.step, input_ids, targets, self.config.batch_size)
        return True

    def read_stats(self) -> tuple[float, float]:
        """Mean loss of the newest step and norm of its gradient before clipping; waits for the device."""
        numbers = self.step.stats.read()
        self.state.skipped_steps, self.state.bad_steps = numbers.skipped_steps, numbers.bad_steps
        if self.spikes.seen(numbers.highest_loss):
            highest = f"{numbers.highest_loss:.3f} up to step {self.state.step}"
            self.news.append(f"loss spike: {highest}, after {self.spikes.mean:.3f}")
        return numbers.loss, numbers.grad_norm

    # numbers that go bad

    def lost(self) -> bool:
        """Whether steps fail one after the other. With fp16 that is the loss scale's business, until it is at its
        lowest."""
        scaling = self.scaler.is_enabled() and self.scaler.get_scale() > 1
        return self.state.bad_steps >= MAX_BAD_STEPS and not scaling

    def roll_back(self, run: Run) -> None:
        """Go back to the last checkpoint and go on with a lower learning rate. Raises QualityError the second time."""
        state, captured = self.state, self.captured is not None
        if state.lr_factor < 1.0:
            with eagerly(self.config.compile):
                first = state.step * self.samples_per_step
                where = first_overflow(self.model, *self.loader.batch(first, self.config.batch_size))
            raise QualityError(
                f"the run diverged: no finite gradient in {MAX_BAD_STEPS} steps up to step {state.step}, also at a "
                f"lower learning rate; {where}",
                fix=f"try --lr {self.config.lr * ROLLBACK_LR**2:.2g}, or --precision fp32",
            )
        checkpoint, notes = run.newest_checkpoint()
        self.captured = None  # it knows the optimizer's state by its address
        for name, tensor in self.model.state_without_ties().items():
            tensor.copy_(checkpoint.model[name])
        failed, skipped, time_s = state.step, state.skipped_steps, state.time_s
        self.restore(checkpoint)
        state.lr_factor, state.skipped_steps, state.time_s, state.bad_steps = ROLLBACK_LR, skipped, time_s, 0
        self.step.stats.set_skipped(skipped, 0)
        self.unwritten = [(name, record) for name, record in self.unwritten if record["step"] <= state.step]
        run.cut_logs(state.step)
        if captured:
            self.capture()
        self.news += [
            *notes,
            f"no finite gradient in {MAX_BAD_STEPS} steps up to step {failed}: back to step {state.step}, "
            f"going on with {ROLLBACK_LR:g} of the learning rate",
        ]

    def tell(self, run: Run) -> None:
        """Show what happened, and keep it in run.json."""
        for text in self.news:
            self.observer.note(text)
        if self.news:
            told = self.status.get("events") or run.status().get("events", [])
            self.status["events"], self.news = [*told, *self.news], []
            self.attempt(lambda: run.set_status(**self.status))

    # looking at the run

    def validate(self, run: Run, train_loss: float) -> Evaluation:
        """Loss on fixed windows of the validation split; the best weights so far are kept in the run folder."""
        config, state = self.config, self.state
        n_windows = None if config.val_batches is None else config.val_batches * config.batch_size
        seq_len = self.model.config.seq_len

        def look() -> Evaluation:
            if self.captured is not None and self.captures_validation and self.losses_of is token_losses:
                self.model.eval()
                self.losses_of = graphed_losses(self.model, self.val_rows, seq_len)
                self.model.train()
            return evaluate(
                self.model,
                self.data.val,
                seq_len=seq_len,
                batch_size=self.val_rows,
                token_bytes=self.token_bytes,
                n_windows=n_windows,
                losses_of=self.losses_of,
            )

        with eagerly(config.compile):
            result = self.with_room(look, self.validate_in_less)
        improved = math.isfinite(result.loss) and (state.best_val_loss is None or result.loss < state.best_val_loss)
        if improved:
            state.best_val_loss, state.best_val_bits_per_byte = result.loss, result.bits_per_byte
            state.best_step, state.worse_validations = state.step, 0
        else:
            state.worse_validations += 1
        before = math.inf if self.best is None else self.best["best_val_loss"]
        if result.loss < before or (improved and result.loss == before):  # equal: the same step once more, after a kill
            found = {
                "best_step": state.step,
                "best_val_loss": result.loss,
                "best_val_bits_per_byte": result.bits_per_byte,
            }
            self.better = found
            self.attempt(lambda: self.write_best(run))
        self.status |= {
            "step": state.step,
            "train_loss": finite(train_loss),
            "val_loss": finite(result.loss),
            "val_bits_per_byte": finite(result.bits_per_byte),
            **(self.best or {}),
        }
        self.attempt(lambda: run.set_status(**self.status))
        return result

    def sample(self, run: Run) -> None:
        """Draw a sample, show it and log it."""
        seed = replace(self.sample_config, seed=(self.sample_config.seed + self.state.step) % 2**63)
        with eagerly(self.config.compile):
            drawn = self.with_room(lambda: generate(self.model, self.data.tokenizer, [self.sample_prompt], seed))
        drawn = drawn.samples[0]
        prompt = self.data.tokenizer.decode(np.array(self.sample_prompt)) if self.data.tokenizer else ""
        self.log(run, "samples.jsonl", {"step": self.state.step, "prompt": prompt, "text": drawn.text})
        self.observer.sampled(self.state.step, prompt + drawn.text)

    def validate_in_full(self) -> None:
        """Let validation take as many windows at a time as a step, in a graph of its own where steps have one."""
        self.val_rows, self.losses_of = self.config.batch_size, token_losses
        self.captures_validation = not self.model.syncs_in_eval

    def validate_in_less(self) -> bool:
        """Let validation take less memory from here on: fewer windows at a time, then no graph of its own. Returns
        whether that was possible."""
        if self.val_rows > 1:
            self.val_rows //= 2
        elif self.captured is not None and self.captures_validation:
            self.captures_validation = False
        else:
            return False
        self.losses_of = token_losses
        torch.cuda.empty_cache()
        return True

    def with_room(self, look: Callable[[], T], with_less: Callable[[], bool] = lambda: False) -> T:
        """What `look` returns. Where memory does not suffice, `with_less` may let `look` need less; where it cannot, a
        CUDA graph, which keeps the memory of a whole step to itself, is given up. Raises torch.OutOfMemoryError where
        there is none."""
        while True:
            try:
                return look()
            except torch.OutOfMemoryError as error:
                refused = error.with_traceback(None)  # it would hold on to what was computed
            self.model.train()  # it was left as it was to look
            if with_less():
                continue
            if self.captured is None:
                raise refused
            self.release()
            self.news.append(f"out of memory at step {self.state.step}, beside the CUDA graph: no graph from here on")

    def find_best(self, run: Run) -> None:
        """Learn which best weights the run folder has. They may be of a later step than the newest checkpoint, where
        the run was killed between the two; or missing, where the disk was full."""
        state, found = self.state, run.best_found()
        known = {key: getattr(state, key) for key in ("best_step", "best_val_loss", "best_val_bits_per_byte")}
        if state.best_val_loss is None:
            known = None
        elif found is None:
            self.observer.note("the best weights are missing or damaged: the next validation replaces them")
        self.best = known if found == {} else found
        if known and (self.best is None or state.best_val_loss < self.best["best_val_loss"]):
            self.better = known
            self.attempt(lambda: self.write_best(run))

    # writing

    def log(self, run: Run, name: str, record: dict) -> None:
        """Add a line to a log, now or when the disk has room again."""
        self.unwritten.append((name, record))
        self.attempt(lambda: self.write_logs(run))

    def write_best(self, run: Run) -> None:
        """Write the weights as the best ones, if that is what they are. Raises OutputError."""
        if self.better is not None and self.better["best_step"] == self.state.step:
            run.save_best(self.model.state_without_ties(), self.better)
            self.best, self.better = self.better, None

    def write_logs(self, run: Run) -> None:
        """Write what the logs lack. Raises OutputError."""
        while self.unwritten:
            run.append(*self.unwritten[0])
            del self.unwritten[0]

    def attempt(self, write: Callable[[], object]) -> bool:
        """Write something that the run can do without for now: where the disk refuses, it says so once and goes on."""
        try:
            write()
        except OutputError as error:
            if self._refused_at is None:
                self.observer.note(f"{error}; training goes on, and tries again every {RETRY_SECONDS} s")
            self._refused_at = time.monotonic()
            return False
        return True

    def is_overdue(self) -> bool:
        """Whether a checkpoint is due by the clock: the last one is old, or was refused a while ago."""
        now = time.monotonic()
        if self._refused_at is not None:
            return now - self._refused_at > RETRY_SECONDS
        return self.config.save_every is None and now - self._saved_at > SAVE_SECONDS

    def save(self, run: Run) -> None:
        """Write a checkpoint and drop those that are no longer kept. Raises OutputError; then the older ones stand."""
        synchronize(self.device)
        try:
            self.write_logs(run)
            run.sync_logs()
            with self.saving.timed():
                ckpt.save_checkpoint(run.checkpoints, self.checkpoint())
            self.write_best(run)
            ckpt.prune_checkpoints(run.checkpoints, self.config.keep, self.state.step)
            self.status |= {"step": self.state.step, **(self.best or {})}
            run.set_status(**self.status)
        except OutputError as error:
            newest = max(ckpt.steps_in(run.checkpoints), default=0)
            raise OutputError(
                f"{error}; the newest checkpoint is of step {newest}",
                fix=f"free some space, then: nnx train --resume {run.folder}",
            ) from error
        if self._refused_at is not None:
            self.observer.note(f"the disk takes what is written again: saved step {self.state.step}")
        self._saved_at, self._refused_at = time.monotonic(), None
        self.observer.saved(self.state.step)


def finite(value: float | None) -> float | None:
    """A number that JSON has a word for, or None."""
    return value if value is not None and math.isfinite(value) else None
