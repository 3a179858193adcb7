"""A training run, and a race, on stderr."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Self

from nnx_cli.console.output import Output
from nnx_cli.console.terminal import styled
from nnx_cli.system.text import printable

if TYPE_CHECKING:
    from rich.progress import Progress

PLAIN_SECONDS = 5.0  # between progress lines where there is no terminal
RACE_SECONDS = 30.0  # and of a race


class TrainingView:
    """A training run on stderr: a bar where there is a terminal, else a plain line every few seconds.

    Has the methods of `training.trainer.Observer`.
    """

    def __init__(self, output: Output) -> None:
        self.output = output
        self.last_line = 0.0
        self.validation = ""
        self.bar: Progress | None = None

    def __enter__(self) -> Self:
        if self.output.live:
            from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

            self.bar = Progress(
                BarColumn(bar_width=24),
                TaskProgressColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.description}"),
                console=self.output.err,
                transient=True,
            )
            self.bar.start()
            self.bar.add_task("starting", total=1.0)
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Take the bar off the screen."""
        if self.bar:
            self.bar.stop()

    def step(self, record: Mapping[str, Any], progress: float) -> None:
        """Move the bar; a line where it was validated, and every few seconds without a terminal."""
        if record["val_loss"] is not None:
            bits = record["val_bits_per_byte"]
            self.validation = f"val {record['val_loss']:.4f}" + (f" ({bits:.4f} bits/byte)" if bits is not None else "")
        line = self.describe(record)
        if self.bar:
            self.bar.update(self.bar.task_ids[0], completed=progress, description=line)
        if record["val_loss"] is not None or (not self.bar and time.monotonic() - self.last_line > PLAIN_SECONDS):
            self.last_line = time.monotonic()
            self.output.note(f"{100 * progress:5.1f} %  {line}")

    def describe(self, record: Mapping[str, Any]) -> str:
        """The numbers of a step in a line."""
        memory = record["peak_memory_bytes"]
        parts = [
            f"step {record['step']}",
            f"loss {record['train_loss']:.4f}",
            self.validation,
            f"lr {record['lr']:.2e}",
            f"{record['tokens_per_s']:,.0f} tokens/s",
            f"{memory / 2**30:.2f} GiB" if memory else "",
        ]
        if record["skipped_steps"]:
            parts.append(f"{record['skipped_steps']} skipped")
        return "  ".join(part for part in parts if part)

    def sampled(self, step: int, text: str) -> None:
        """Show a sample."""
        if not self.output.quiet:
            shown = "\n".join("    " + line for line in printable(text).splitlines())
            self.output.err.print(styled(f"  sample at step {step}:\n") + styled(shown, style="cyan"))

    def saved(self, step: int) -> None:
        """Saving is what is expected: not worth a line."""

    def note(self, text: str) -> None:
        """A line on the way."""
        self.output.note(text)


class RaceView(TrainingView):
    """A race on stderr: one bar for all of its runs, a line for each that is over.

    Has the methods of `experiments.race.Spectator`.
    """

    def __init__(self, output: Output) -> None:
        super().__init__(output)
        self.what = ""
        self.done = self.share = 0.0

    def begins(self, what: str, done: float, share: float) -> None:
        """A run begins, where `done` of the race is over, of which the run is `share`."""
        self.what, self.done, self.share = what, done, share
        self._move(0.0, what)

    def step(self, record: Mapping[str, Any], progress: float) -> None:
        """Move the bar; without a terminal, a line now and then."""
        self._move(progress, f"{self.what}  loss {record['train_loss']:.3f}")

    def _move(self, progress: float, line: str) -> None:
        done = min(1.0, self.done + self.share * progress)
        if self.bar:
            self.bar.update(self.bar.task_ids[0], completed=done, description=line)
        elif time.monotonic() - self.last_line > RACE_SECONDS:
            self.last_line = time.monotonic()
            self.output.note(f"{100 * done:5.1f} %  {line}")
