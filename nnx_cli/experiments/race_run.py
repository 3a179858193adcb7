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
from nnx_cli.evaluation.losses import evaluate
from nnx_cli.experiments.entrants import Entrant, Field
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
EVAL_BATCH_TOKENS = 8192
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
            return OUT_OF_MEMORY, str(error).partition("\n")[0]

    def _started(self, plan: Plan, data: TokenFolder, folder: Path) -> tuple[Run, Trainer]:
        device = self.field.device
        return session.start(plan, data, folder, device, self.observer, self.sampling, self.command, None)

    def _resumed(self, entrant: Entrant, data: TokenFolder, folder: Path) -> tuple[Run, Trainer | None]:
        """A run and what goes on with it; None where it is over."""
        run = Run(folder)
        if run.status().get("status") in ("finished", "diverged"):
            return run, None
        trainer, notes = session.resume(session.plan_restart(run, {}, data.path, entrant.file), self.observer)
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

    def result(
        self, entrant: Entrant, folder: Path, seed: int, status: str, peak_known: bool, tokens: np.ndarray
    ) -> dict[str, Any]:
        """What race.json says of a run that is over; `tokens` is the text that it is judged by."""
        records = [*read_log(folder / "metrics.jsonl")] if folder.exists() else []
        last: dict[str, Any] = Run(folder).status() if folder.exists() else {}
        n_tokens = last.get("tokens") or 0
        peaks = [record["peak_memory_bytes"] for record in records if record.get("peak_memory_bytes")]
        bits = sample = None
        if status == "finished":
            bits, sample = self.judge(entrant, folder, tokens)
        return {
            "seed": seed,
            "out": str(folder),
            "status": status,
            "bits_per_byte": bits,
            "tokens": n_tokens,
            "time_s": last.get("time_s") or 0.0,
            "flops": n_tokens * entrant.flops,
            "peak_memory_bytes": max(peaks) if peaks and peak_known else None,
            "curve": curve_of(records, entrant.flops),
            "sample": sample,
        }

    def judge(self, entrant: Entrant, folder: Path, tokens: np.ndarray) -> tuple[float | None, str]:
        """Bits per byte of a run's best weights on a text, and what they write."""
        assert self.field.data.tokenizer is not None
        model = load_model(ModelRef(folder, file=entrant.file), self.field.device, self.field.precision)
        seq_len = model.config.seq_len
        bits = evaluate(
            model,
            tokens,
            seq_len=seq_len,
            batch_size=max(1, EVAL_BATCH_TOKENS // seq_len),
            token_bytes=self.field.data.tokenizer.token_bytes(),
            n_windows=None if len(tokens) <= EVAL_TOKENS else EVAL_TOKENS // seq_len,
        ).bits_per_byte
        prompt, text = draw_sample(model, self.field.data.tokenizer, self.sampling, SAMPLE_SEED)
        return bits, prompt + text

    def forget(self) -> bool:
        """Let memory be as before the first run; returns whether its peak is measured anew."""
        return reset_peak_memory(self.field.device)


def curve_of(records: list[dict[str, Any]], flops: int) -> list[dict[str, Any]]:
    """The course of a run by the lines of its log: all validations, and some of the other steps."""
    every = -(-len(records) // MOST_POINTS)
    return [
        {
            "step": record["step"],
            "tokens": record["tokens"],
            "time_s": record["time_s"],
            "flops": record["tokens"] * flops,
            "train_loss": record["train_loss"],
            "val_bits_per_byte": record["val_bits_per_byte"],
        }
        for number, record in enumerate(records)
        if number % every == 0 or record["val_bits_per_byte"] is not None
    ]


def drop_weights(folder: Path, keep: str) -> None:
    """Delete what a run that is done needs no more: its checkpoints and, unless the best weights are kept, those."""
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    if keep == "none":
        (folder / BEST).unlink(missing_ok=True)
