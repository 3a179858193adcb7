"""What happens inside a model at milestones of its run: an observer that keeps it in the run folder."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from nnx_cli.config import MILESTONES
from nnx_cli.data.token_folder import TokenFolder
from nnx_cli.errors import NnxError
from nnx_cli.inference.insides import take_snapshot
from nnx_cli.layers.blocks import eagerly
from nnx_cli.layers.insides import Panel
from nnx_cli.runs.snapshots import save_snapshot, steps_of
from nnx_cli.training.cadence import TimeBudget
from nnx_cli.training.observer import Silent
from nnx_cli.training.trainer import Trainer

SHARE = 0.02  # of a run's time that may go into looking
MOST_TEXT = 256  # tokens of validation text that are looked at


class Watch(Silent):
    """Observes a run and looks into its model after the first step, at milestones as far as time allows, and at the
    end. It changes nothing of the training, and what goes wrong with it never ends a run.

    `note` shows a line, `show` what is worth to be seen at once: a step, the tokens of the text, and values over them.
    """

    def __init__(
        self,
        folder: Path,
        trainer: Trainer,
        note: Callable[[str], None],
        show: Callable[[int, Sequence[str], Panel], None] | None = None,
    ) -> None:
        self.folder = folder
        self.trainer = trainer
        self.show_note = note
        self.show = show
        self.budget = TimeBudget(share=SHARE)
        self.progress = trainer.progress()
        self.has_looked = bool(steps_of(folder))
        self.has_failed = False
        self.text = _beginning(trainer.data)

    def step(self, record: Mapping[str, Any], progress: float) -> None:
        """As in Observer: look inside where a milestone was passed since the last logged step."""
        before, self.progress = self.progress, progress
        passed = any(before < milestone <= progress for milestone in MILESTONES)
        if not self.has_looked or progress >= 1.0 or (passed and self.budget.is_affordable()):
            self.look(record["step"])

    def look(self, step: int) -> None:
        """Keep what is inside; say once where that cannot be done."""
        self.has_looked = True
        model, tokenizer = self.trainer.model, self.trainer.data.tokenizer
        try:
            with self.budget.timed(), eagerly(self.trainer.stepper.execution.compiled):
                snapshot = take_snapshot(model, tokenizer, self.text, step)
                save_snapshot(self.folder, snapshot)
        except (NnxError, OSError, RuntimeError) as error:  # torch says with the last that memory is out
            self._say(f"not watched: {error}")
        except Exception as error:  # a user's own architecture has an `insides` of its own
            self._say(f"not watched: insides() of the model raised {type(error).__name__}: {error}")
        else:
            for panel in snapshot.insides.panels:
                if panel.is_live and self.show is not None:
                    self.show(step, snapshot.tokens, panel)

    def _say(self, text: str) -> None:
        if not self.has_failed:
            self.show_note(text)
        self.has_failed = True


def _beginning(data: TokenFolder) -> list[int]:
    """The beginning of the validation text, or of the training text where that has none, without blanks in front."""
    ids = (data.val if len(data.val) > 1 else data.train)[: 2 * MOST_TEXT]
    pieces = [data.tokenizer.decode([token]) for token in ids[:-2]] if data.tokenizer else []
    first = next((number for number, piece in enumerate(pieces) if not piece or piece.strip()), 0)
    return ids[first : first + MOST_TEXT + 1].tolist()
