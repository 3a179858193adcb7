"""A training run, and many runs of one command, on stderr."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any, Self

from nnx_cli.console.block import Block
from nnx_cli.console.cells import Line, fitting
from nnx_cli.console.output import Output
from nnx_cli.console.progress import PLAIN_SECONDS, REDRAW_SECONDS, TimeLeft
from nnx_cli.console.run_screen import LEAST_COLUMNS, RunFacts, RunScreen, titled_sample
from nnx_cli.console.shades import weighted
from nnx_cli.console.terminal import in_notebook, styled
from nnx_cli.system.text import printable

MANY_SECONDS = 30.0  # between lines of many runs where there is no terminal
BAR_COLUMNS = 24
JUMP = 0.01  # of what is done, that is no work but another reckoning
ONE_LINE_COLUMNS = 79  # where lines can only be overwritten
SHARE = 0.005  # of the time that drawing may take


class _LiveView:
    """Keeps a block below the lines where there is a terminal for it, which is drawn a few times a second at most."""

    def __init__(self, output: Output) -> None:
        self.output = output
        self.last_line = 0.0
        self.block: Block | None = None
        self.next_draw = 0.0

    def layout(self, columns: int, lines: int) -> Sequence[Line]:
        """The block for a screen of that size."""
        raise NotImplementedError

    def __enter__(self) -> Self:
        output = self.output
        if output.live:
            simple = (
                in_notebook(output.err.file)
                or output.err.legacy_windows
                or not output.err.encoding.lower().startswith("utf")
            )
            layout = self._one_line if simple else self.layout
            self.block = Block(output.err, layout, returns_only=simple, before=output.said)
            self.block.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Take the block off the screen."""
        if self.block:
            self.block.stop()
            self.block = None

    def draw(self) -> None:
        """Draw the block, if it is time to: what the last drawing took is a small share of the time until the next."""
        now = time.monotonic()
        if self.block and now >= self.next_draw:
            self.block.draw()
            ended = time.monotonic()
            self.next_draw = ended + max(REDRAW_SECONDS, (ended - now) / SHARE)

    def moved(self, progress: float) -> None:
        """Show how far it is; the numbers are those of the last logged step."""

    def sampled(self, step: int, text: str) -> None:
        """Show a sample."""
        if not self.output.quiet:
            title, text = titled_sample(step, text)
            shown = "\n".join("    " + line for line in printable(text).splitlines())
            self.output.say(styled(f"  {title}:\n") + styled(shown, style="cyan"))

    def saved(self, step: int) -> None:
        """Saving is what is expected: not worth a line."""

    def note(self, text: str) -> None:
        """A line on the way."""
        self.output.note(text)

    def _one_line(self, columns: int, lines: int) -> Sequence[Line]:
        return self.layout(min(columns, ONE_LINE_COLUMNS), 1)


class TrainingView(_LiveView):
    """A training run: a block with its curves where there is a terminal, else a plain line every few seconds.

    Has the methods of `training.trainer.Observer`.
    """

    def __init__(self, output: Output, facts: RunFacts) -> None:
        super().__init__(output)
        self.validation = ""
        self.screen = RunScreen(facts)

    def layout(self, columns: int, lines: int) -> Sequence[Line]:
        """Progress, curves, numbers and the newest sample."""
        return self.screen.layout(columns, lines)

    def step(self, record: Mapping[str, Any], progress: float) -> None:
        """Show a step; a line where it was validated, and every few seconds without a terminal."""
        if record["val_loss"] is not None:
            bits = record["val_bits_per_byte"]
            self.validation = f"val {record['val_loss']:.4f}" + (f" ({bits:.4f} bits/byte)" if bits is not None else "")
        self.screen.step(record, progress)
        self.draw()
        if record["val_loss"] is not None or (not self.block and time.monotonic() - self.last_line > PLAIN_SECONDS):
            self.last_line = time.monotonic()
            self.output.note(f"{100 * progress:5.1f} %  {self.describe(record)}")

    def moved(self, progress: float) -> None:
        """Show how far it is; the numbers are those of the last logged step."""
        if self.block and self.screen.record:
            self.screen.move(progress)
            self.draw()

    def describe(self, record: Mapping[str, Any]) -> str:
        """The numbers of a step in a line; those that the block shows are not repeated."""
        memory = record["peak_memory_bytes"]
        parts = [f"step {record['step']}", f"loss {record['train_loss']:.4f}", self.validation]
        if not self.block:
            parts += [f"lr {record['lr']:.2e}", f"{record['tokens_per_s']:,.0f} tokens/s"]
            parts += [f"{memory / 2**30:.2f} GiB"] if memory else []
        if record["skipped_steps"]:
            parts.append(f"{record['skipped_steps']} skipped")
        return "  ".join(part for part in parts if part)

    def sampled(self, step: int, text: str) -> None:
        """Show a sample."""
        self.screen.sample = step, text
        super().sampled(step, text)

    def remember(self, records: Sequence[Mapping[str, Any]]) -> None:
        """Take note of the steps of a run that goes on: its curves begin where it began."""
        self.screen.remember(records)

    def weighed(self, step: int, title: str, tokens: Sequence[str], rows: Mapping[str, Sequence[float]]) -> None:
        """Show how much each of some parts of a model matters: over a text on a terminal, else on average."""
        means = {name: sum(values) / max(1, len(values)) for name, values in rows.items()}
        if self.block is None or self.block.returns_only:
            self.note(f"  {title} at step {step}: " + ", ".join(f"{name} {mean:.2f}" for name, mean in means.items()))
            return
        text, width = styled(f"  {title} at step {step}:"), max(map(len, rows))
        for name, values in rows.items():
            text += styled(f"\n    {name.ljust(width)} {means[name]:.2f}  ") + weighted(tokens, values)
        self.output.say(text)


class RunsView(_LiveView):
    """Many runs: one bar for all of them, a line for each that is over.

    Has the methods of `experiments.one_run.Spectator`.
    """

    def __init__(self, output: Output) -> None:
        super().__init__(output)
        self.what = ""
        self.line = ""
        self.done = self.share = self.progress = 0.0
        self.left = TimeLeft()

    def layout(self, columns: int, lines: int) -> Sequence[Line]:
        """A bar, the time left, and the run that is going on."""
        width = min(BAR_COLUMNS, columns // 4)
        done = round(width * self.progress)
        bar, rest = "━" * done, "─" * (width - done) + " "
        if columns < LEAST_COLUMNS:
            bar = rest = ""
        parts = [f"{100 * self.progress:3.0f} %", self.left.words(), self.line]
        return [[(bar, "magenta"), (rest, "dim"), (fitting(parts, columns - len(bar + rest) - 1), "")]]

    def begins(self, what: str, done: float, share: float) -> None:
        """A run begins, where `done` of the whole is over, of which the run is `share`."""
        self.what, self.done, self.share = what, done, share
        if share and abs(done - self.progress) > JUMP:
            self.left = TimeLeft()
        self._move(0.0, what)

    def step(self, record: Mapping[str, Any], progress: float) -> None:
        """Move the bar; without a terminal, a line now and then."""
        self._move(progress, f"{self.what}  loss {record['train_loss']:.3f}")

    def _move(self, progress: float, line: str) -> None:
        self.progress, self.line = min(1.0, self.done + self.share * progress), line
        self.left.update(self.progress)
        self.draw()
        if not self.block and time.monotonic() - self.last_line > MANY_SECONDS:
            self.last_line = time.monotonic()
            self.output.note("  ".join(filter(None, [f"{100 * self.progress:5.1f} %", line, self.left.words()])))
