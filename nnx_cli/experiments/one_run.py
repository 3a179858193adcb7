"""One run of many that a command trains: from its beginning or where it was interrupted, to its end."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from nnx_cli.data.token_folder import TokenFolder
from nnx_cli.errors import DoesNotFit, Interrupted, QualityError, is_out_of_memory
from nnx_cli.evaluation.losses import BATCH_TOKENS, Masked, evaluate
from nnx_cli.models._base import LanguageModel
from nnx_cli.runs.manifest import BEST
from nnx_cli.runs.run import Run
from nnx_cli.system.device import release_memory
from nnx_cli.training import session
from nnx_cli.training.observer import Observer
from nnx_cli.training.trainer import Trainer

OUT_OF_MEMORY, PAUSED = "out of memory", "paused"
EVAL_TOKENS = 2**19  # of a validation text that a finished run is judged by, at most


class Stopped(Interrupted):
    """A command with many runs was asked to stop, and has saved everything."""


class Spectator(Observer, Protocol):
    """Watches many runs, and which one it is."""

    def begins(self, what: str, done: float, share: float) -> None:
        """A run begins, where `done` of the whole is over, of which the run is `share`."""


@dataclass(frozen=True)
class OneRun:
    """A run in its folder: how it is begun, on what data, the file of its architecture where that is the user's,
    after what part of its length it pauses, and settings that it is given anew where it goes on."""

    folder: Path
    begin: Callable[[], tuple[Run, Trainer]]
    data: TokenFolder
    file: Path | None
    observer: Observer
    should_stop: Callable[[], bool]
    until: float = 1.0
    anew: Mapping[str, Any] = field(default_factory=dict)

    def train(self) -> tuple[str, str | None]:
        """Train it to its end, from where it is, and release its memory. Returns finished, paused, diverged or out of
        memory, and why.

        Raises Stopped where it was asked to stop, after saving.
        """
        try:
            return self._train()
        finally:
            release_memory()

    def _train(self) -> tuple[str, str | None]:
        try:
            run, trainer = self._resumed() if self.folder.exists() else self.begin()
            if trainer is None:
                return str(run.status()["status"]), run.status().get("problem")
            with run.lock():
                return self._finish(run, trainer)
        except (DoesNotFit, MemoryError, RuntimeError) as error:
            return OUT_OF_MEMORY, memory_problem(error)

    def _resumed(self) -> tuple[Run, Trainer | None]:
        """The run and what goes on with it; None where it is over."""
        run = Run(self.folder)
        if run.status().get("status") in ("finished", "diverged"):
            return run, None
        trainer, notes = session.resume(
            session.plan_restart(run, self.anew, file=self.file, data=self.data), self.observer
        )
        for note in notes:
            self.observer.note(note)
        return run, trainer

    def _finish(self, run: Run, trainer: Trainer) -> tuple[str, str | None]:
        """Train the locked run to its end and record how it ended."""

        def pauses() -> bool:
            return self.until < 1.0 and trainer.progress() >= self.until

        try:
            ended = "interrupted" if pauses() else trainer.train(run, lambda: pauses() or self.should_stop())
        except QualityError as error:
            session.record_end(run, trainer, "diverged", str(error))
            return "diverged", str(error)
        except (DoesNotFit, MemoryError, RuntimeError):
            session.record_end(run, trainer, "interrupted")
            raise
        session.record_end(run, trainer, ended)
        if ended == "interrupted" and pauses():
            return PAUSED, None
        if ended == "interrupted":
            raise Stopped(f"interrupted at step {trainer.state.step} of {run.folder}")
        return ended, None


def memory_problem(error: Exception) -> str:
    """What an error says of memory that does not suffice, in a line. Raises it again where it is another one."""
    if not isinstance(error, DoesNotFit) and not is_out_of_memory(error):
        raise error
    return str(error).partition("\n")[0] or OUT_OF_MEMORY


def bits_per_byte(model: LanguageModel, data: TokenFolder, tokens: np.ndarray, most: int = EVAL_TOKENS) -> float | None:
    """What a model needs for a byte of a text of `data`, or of `most` tokens of it."""
    assert data.tokenizer is not None
    seq_len = model.config.seq_len
    return evaluate(
        model,
        tokens,
        seq_len=seq_len,
        batch_size=max(1, BATCH_TOKENS // seq_len),
        token_bytes=data.tokenizer.token_bytes(),
        n_windows=None if len(tokens) <= most else max(1, most // seq_len),
        masked=Masked.of(data.val_mask, data.documents["val"]),
    ).bits_per_byte


def drop_weights(folder: Path, keep: str) -> None:
    """Delete what a run that is done needs no more: its checkpoints and, unless the best weights are kept, those."""
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    if keep == "none":
        (folder / BEST).unlink(missing_ok=True)
