"""One run of a race: an ordinary run, and what race.json says of it."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from nnx_cli.data.token_folder import TokenFolder
from nnx_cli.errors import DoesNotFit, Interrupted, QualityError, is_out_of_memory
from nnx_cli.evaluation.losses import BATCH_TOKENS, Masked, evaluate
from nnx_cli.evaluation.recall import recall_accuracy
from nnx_cli.experiments.entrants import Entrant, Field
from nnx_cli.models._base import LanguageModel
from nnx_cli.planning.plan import Plan
from nnx_cli.runs.load import ModelRef, load_model
from nnx_cli.runs.logs import read_log
from nnx_cli.runs.manifest import BEST
from nnx_cli.runs.run import Run
from nnx_cli.system.device import reset_peak_memory
from nnx_cli.training import session
from nnx_cli.training.observer import Observer
from nnx_cli.training.sampling import Sampling, draw_sample
from nnx_cli.training.trainer import Trainer

OUT_OF_MEMORY = "out of memory"
EVAL_TOKENS = 2**19  # of a validation text that a finished run is judged by, at most
SAMPLE_SEED = 0
MOST_POINTS = 200  # of a curve, besides validations


class Stopped(Interrupted):
    """The race was asked to stop, and has saved everything."""


@dataclass(frozen=True)
class Runner:
    """How runs are trained: what their samples start with, who watches, the command they come from, when to stop."""

    field: Field
    sampling: Sampling
    observer: Observer
    command: str
    should_stop: Callable[[], bool]

    def train(self, entrant: Entrant, plan: Plan, data: TokenFolder, folder: Path) -> tuple[str, str | None]:
        """Train a run to its end, from where it is. Returns finished, diverged or out of memory, and why.

        Raises Stopped where it was asked to stop, after saving.
        """
        try:
            if folder.exists():
                run, trainer = self._resumed(entrant, data, folder)
            else:
                run, trainer = self._started(plan, data, folder)
            if trainer is None:
                return str(run.status()["status"]), None
            with run.lock():
                return self._finish(run, trainer)
        except (DoesNotFit, MemoryError, RuntimeError) as error:
            if not isinstance(error, DoesNotFit) and not is_out_of_memory(error):
                raise
            return OUT_OF_MEMORY, str(error).partition("\n")[0] or OUT_OF_MEMORY

    def _started(self, plan: Plan, data: TokenFolder, folder: Path) -> tuple[Run, Trainer]:
        device = self.field.device
        return session.start(plan, data, folder, device, self.observer, self.sampling, self.command, None)

    def _resumed(self, entrant: Entrant, data: TokenFolder, folder: Path) -> tuple[Run, Trainer | None]:
        """A run and what goes on with it; None where it is over."""
        run = Run(folder)
        if run.status().get("status") in ("finished", "diverged"):
            return run, None
        trainer, notes = session.resume(session.plan_restart(run, {}, file=entrant.file, data=data), self.observer)
        for note in notes:
            self.observer.note(note)
        return run, trainer

    def _finish(self, run: Run, trainer: Trainer) -> tuple[str, str | None]:
        """Train a locked run to its end and record how it ended."""
        try:
            ended = trainer.train(run, self.should_stop)
        except QualityError as error:
            session.record_end(run, trainer, "diverged")
            return "diverged", str(error)
        except (DoesNotFit, MemoryError, RuntimeError):
            session.record_end(run, trainer, "interrupted")
            raise
        session.record_end(run, trainer, ended)
        if ended == "interrupted":
            raise Stopped(f"interrupted at step {trainer.state.step} of {run.folder}")
        return ended, None

    def result(self, entrant: Entrant, folder: Path, seed: int, status: str, peak_known: bool) -> dict[str, Any]:
        """What race.json says of a run that is over."""
        entry = run_entry(folder, seed, status, entrant.flops)
        if not peak_known:
            entry["peak_memory_bytes"] = None
        if status == "finished":
            field, ref = self.field, ModelRef(folder, file=entrant.file)
            model = load_model(ref, field.device, field.precision)
            entry["bits_per_byte"] = bits_per_byte(model, field.data, field.data.val)
            entry["sample"] = sample_of(model, field.data, self.sampling)
            if field.config.task == "recall":
                rows = max(1, BATCH_TOKENS // field.seq_len)
                entry["recall"] = recall_accuracy(model, field.data.val[:EVAL_TOKENS], rows)
        return entry

    def forget(self) -> bool:
        """Let memory be as before the first run; returns whether its peak is measured anew."""
        return reset_peak_memory(self.field.device)


def run_entry(folder: Path, seed: int, status: str, flops: int) -> dict[str, Any]:
    """What a run folder tells of a run that is over; `flops` is what a token takes. It has no verdict yet."""
    records = [*read_log(folder / "metrics.jsonl")] if folder.exists() else []
    last: dict[str, Any] = Run(folder).status() if folder.exists() else {}
    n_tokens = last.get("tokens") or 0
    return {
        "seed": seed,
        "out": str(folder),
        "status": status,
        "bits_per_byte": None,
        "tokens": n_tokens,
        "time_s": last.get("time_s") or 0.0,
        "flops": n_tokens * flops,
        "peak_memory_bytes": max((record.get("peak_memory_bytes") or 0 for record in records), default=0) or None,
        "curve": curve_of(records, flops),
        "sample": None,
        "recall": None,
    }


def bits_per_byte(model: LanguageModel, data: TokenFolder, tokens: np.ndarray) -> float | None:
    """What a model needs for a byte of a text of `data`, or of EVAL_TOKENS of it."""
    assert data.tokenizer is not None
    seq_len = model.config.seq_len
    return evaluate(
        model,
        tokens,
        seq_len=seq_len,
        batch_size=max(1, BATCH_TOKENS // seq_len),
        token_bytes=data.tokenizer.token_bytes(),
        n_windows=None if len(tokens) <= EVAL_TOKENS else EVAL_TOKENS // seq_len,
        masked=Masked.of(data.val_mask, data.documents["val"]),
    ).bits_per_byte


def sample_of(model: LanguageModel, data: TokenFolder, sampling: Sampling) -> str:
    """What a model writes, from the same prompt and with the same seed as all others."""
    prompt, text = draw_sample(model, data.tokenizer, sampling, SAMPLE_SEED)
    return prompt + text


def curve_of(records: list[dict[str, Any]], flops: int) -> list[dict[str, Any]]:
    """The course of a run by the lines of its log: all validations, and some of the other steps."""
    every = -(-len(records) // MOST_POINTS)
    return [
        {
            "step": record["step"],
            "tokens": record.get("tokens"),
            "time_s": record.get("time_s"),
            "flops": (record.get("tokens") or 0) * flops,
            "train_loss": record.get("train_loss"),
            "val_bits_per_byte": record.get("val_bits_per_byte"),
        }
        for number, record in enumerate(records)
        if number % every == 0 or record.get("val_bits_per_byte") is not None
    ]


def drop_weights(folder: Path, keep: str) -> None:
    """Delete what a run that is done needs no more: its checkpoints and, unless the best weights are kept, those."""
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    if keep == "none":
        (folder / BEST).unlink(missing_ok=True)
