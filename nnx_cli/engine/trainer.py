"""The training loop."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace

import numpy as np
import torch
from torch import Tensor

from nnx_cli.config import SampleConfig, TrainConfig
from nnx_cli.engine import checkpoint as ckpt
from nnx_cli.engine.checkpoint import Checkpoint
from nnx_cli.engine.compiler import eagerly
from nnx_cli.engine.device import peak_memory_bytes, set_seed, synchronize
from nnx_cli.engine.evaluator import Evaluation, evaluate
from nnx_cli.engine.loader import Loader
from nnx_cli.engine.loss import TrainStep
from nnx_cli.engine.optimizer import build_optimizer, load_optimizer_state, optimizer_state, set_lr
from nnx_cli.engine.run import Run
from nnx_cli.engine.sampler import generate
from nnx_cli.engine.schedule import MILESTONES, lr_at
from nnx_cli.engine.tokens import TokenFolder
from nnx_cli.errors import QualityError
from nnx_cli.models._base import LanguageModel

SAVE_SECONDS = 600  # without --save-every: no checkpoint is older than this
LOG_STEPS = 10
MAX_BAD_STEPS = 8  # steps in a row without a finite gradient before a run counts as diverged


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
        self, model: LanguageModel, data: TokenFolder, config: TrainConfig, device: torch.device, observer: Observer,
        sample_config: SampleConfig, sample_prompt: list[int],
    ) -> None:  # fmt: skip
        self.model, self.data, self.config, self.device, self.observer = model, data, config, device, observer
        self.sample_config, self.sample_prompt = sample_config, sample_prompt
        self.loader = Loader(data.train, model.config.seq_len, config.seed)
        self.samples_per_step = config.batch_size * config.grad_accum
        self.train_step = TrainStep(model)
        self.optimizer = build_optimizer(model, config)
        self.scaler = torch.amp.GradScaler(device.type, enabled=config.precision == "fp16")
        self.token_bytes = None if data.tokenizer is None else data.tokenizer.token_bytes()
        self.state = State()
        self._saved_at = time.monotonic()

    # checkpoints

    def checkpoint(self) -> Checkpoint:
        """Everything that `restore` needs. Random numbers are a function of seed and step, so the step is their
        state."""
        state = asdict(self.state) | {
            "format": ckpt.FORMAT, "scaler": self.scaler.state_dict(),
            "random": {"seed": self.config.seed, "step": self.state.step},
        }  # fmt: skip
        return Checkpoint(
            self.state.step, self.model.unique_state(), optimizer_state(self.optimizer, self.model), state
        )

    def restore(self, checkpoint: Checkpoint) -> None:
        """Continue from a checkpoint whose weights the model has. Raises CheckpointError where it is another's."""
        load_optimizer_state(self.optimizer, self.model, checkpoint.optimizer)
        if self.scaler.is_enabled() and checkpoint.state["scaler"]:
            self.scaler.load_state_dict(checkpoint.state["scaler"])
        known = State.__dataclass_fields__
        self.state = State(**{key: value for key, value in checkpoint.state.items() if key in known})

    # the loop

    def progress(self) -> float:
        """The part of the run that is done, 0 to 1."""
        config, state = self.config, self.state
        by_steps = state.step / config.max_steps if config.max_steps else 0.0
        by_time = state.time_s / config.max_time_s if config.max_time else 0.0
        return min(1.0, max(by_steps, by_time))

    def train(self, run: Run, should_stop: Callable[[], bool]) -> str:
        """Train to the end of the length, or until `should_stop`; returns finished or interrupted.

        Raises QualityError when gradients stay without finite numbers; the last checkpoint is from before that.
        """
        config, state = self.config, self.state
        self.model.train()
        while (before := self.progress()) < 1.0:
            started = time.perf_counter()
            lr = lr_at(
                state.step, before, schedule=config.schedule, lr=config.lr, min_lr=config.min_lr,
                warmup_steps=config.warmup_steps,
            )  # fmt: skip
            loss, grad_norm, n_tokens = self.take_step(lr)
            state.step += 1
            state.tokens += n_tokens
            elapsed = time.perf_counter() - started
            state.time_s += elapsed
            done = self.progress()
            validate = self._due(config.val_every, before, done)
            record = {
                "step": state.step, "tokens": state.tokens, "time_s": round(state.time_s, 3), "train_loss": loss,
                "val_loss": None, "val_bits_per_byte": None, "lr": lr, "grad_norm": grad_norm,
                "tokens_per_s": round(n_tokens / elapsed, 1), "peak_memory_bytes": peak_memory_bytes(self.device),
                "skipped_steps": state.skipped_steps,
            }  # fmt: skip
            if validate:
                result = self.validate(run, loss)
                record |= {"val_loss": result.loss, "val_bits_per_byte": result.bits_per_byte}
            if validate or state.step % LOG_STEPS == 0 or state.step == 1:
                run.append("metrics.jsonl", record)
                self.observer.step(record, done)
            if self._due(config.sample_every, before, done):
                self.sample(run)
            gave_up = validate and config.patience is not None and state.worse_validations >= config.patience
            stop = should_stop() or gave_up
            overdue = config.save_every is None and time.monotonic() - self._saved_at > SAVE_SECONDS
            if stop or overdue or done >= 1.0 or self._due(config.save_every, before, done):
                self.save(run)
            if gave_up:
                self.observer.note(f"stopped early: {config.patience} validations without a better one")
                return "finished"
            if stop and done < 1.0:
                return "interrupted"
        return "finished"

    def _due(self, every: int | None, before: float, done: float) -> bool:
        """Whether something that happens every so many steps (0: never; None: at MILESTONES), and at the end, happens
        now."""
        if every == 0:
            return False
        if done >= 1.0:
            return True
        if every is not None:
            return self.state.step % every == 0
        return any(before < milestone <= done for milestone in MILESTONES)

    def take_step(self, lr: float) -> tuple[float, float, int]:
        """One optimizer step: mean loss, norm of the gradient before clipping, and the number of targets.

        The loss is the sum over all targets divided by their number, however they are divided into micro-batches. A
        gradient that is not finite never reaches the weights.
        """
        config, state = self.config, self.state
        set_seed(config.seed, state.step)
        set_lr(self.optimizer, lr)
        input_ids, targets = self.loader.batch(state.step * self.samples_per_step, self.samples_per_step)
        n_targets = int((targets != self.model.ignore_index).sum())
        total = torch.zeros((), device=self.device)
        for ids, wanted in self._micro_batches(input_ids, targets):
            loss, _ = self.train_step(ids, wanted)
            self.scaler.scale(loss / n_targets).backward()
            total += loss.detach()
        self.scaler.unscale_(self.optimizer)
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        norm = torch.nn.utils.clip_grad_norm_(parameters, config.grad_clip or math.inf)
        mean_loss, grad_norm = torch.stack((total / n_targets, norm)).tolist()
        if math.isfinite(grad_norm) and math.isfinite(mean_loss):
            self.scaler.step(self.optimizer)
            self.model.post_optim_step()
            state.bad_steps = 0
        else:
            state.skipped_steps += 1
            state.bad_steps += 0 if self.scaler.is_enabled() and self.scaler.get_scale() > 1 else 1
            if state.bad_steps >= MAX_BAD_STEPS:
                raise QualityError(
                    f"the run diverged: no finite gradient in {state.bad_steps} steps up to step {state.step + 1}",
                    fix="try a lower --lr, or --precision fp32",
                )
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        return mean_loss, grad_norm, targets.numel()

    def _micro_batches(self, input_ids: Tensor, targets: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        size = self.config.batch_size
        for ids, wanted in zip(input_ids.split(size), targets.split(size), strict=True):
            if self.device.type == "cuda":
                ids, wanted = ids.contiguous().pin_memory(), wanted.contiguous().pin_memory()
            pinned = self.device.type == "cuda"
            yield ids.to(self.device, non_blocking=pinned), wanted.to(self.device, non_blocking=pinned)

    # looking at the run

    def validate(self, run: Run, train_loss: float) -> Evaluation:
        """Loss on fixed windows of the validation split; the best weights so far are kept in the run folder."""
        config, state = self.config, self.state
        n_windows = None if config.val_batches is None else config.val_batches * config.batch_size
        with eagerly(config.compile):
            result = evaluate(
                self.model, self.data.val, seq_len=self.model.config.seq_len, batch_size=config.batch_size,
                token_bytes=self.token_bytes, n_windows=n_windows,
            )  # fmt: skip
        if math.isfinite(result.loss) and (state.best_val_loss is None or result.loss < state.best_val_loss):
            state.best_val_loss, state.best_val_bits_per_byte = result.loss, result.bits_per_byte
            state.best_step, state.worse_validations = state.step, 0
            run.save_best(self.model.unique_state())
        else:
            state.worse_validations += 1
        run.set_status(
            step=state.step, train_loss=finite(train_loss), val_loss=finite(result.loss),
            val_bits_per_byte=finite(result.bits_per_byte), best_step=state.best_step,
            best_val_loss=state.best_val_loss, best_val_bits_per_byte=state.best_val_bits_per_byte,
        )  # fmt: skip
        return result

    def sample(self, run: Run) -> None:
        """Draw a sample, show it and log it."""
        seed = replace(self.sample_config, seed=(self.sample_config.seed + self.state.step) % 2**63)
        with eagerly(self.config.compile):
            drawn = generate(self.model, self.data.tokenizer, [self.sample_prompt], seed).samples[0]
        prompt = self.data.tokenizer.decode(np.array(self.sample_prompt)) if self.data.tokenizer else ""
        run.append("samples.jsonl", {"step": self.state.step, "prompt": prompt, "text": drawn.text})
        self.observer.sampled(self.state.step, prompt + drawn.text)

    def save(self, run: Run) -> None:
        """Write a checkpoint and drop those that are no longer kept."""
        synchronize(self.device)
        ckpt.save_checkpoint(run.checkpoints, self.checkpoint())
        ckpt.prune_checkpoints(run.checkpoints, self.config.keep, self.state.step)
        run.set_status(step=self.state.step)
        self._saved_at = time.monotonic()
        self.observer.saved(self.state.step)


def finite(value: float | None) -> float | None:
    """A number that JSON has a word for, or None."""
    return value if value is not None and math.isfinite(value) else None
