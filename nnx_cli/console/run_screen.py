"""What the block of a training run shows, for every size of the screen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from nnx_cli.console.cells import Line, cells, cut_cells, fitting, plain_line, wrapped, wrapped_pieces
from nnx_cli.console.curves import BEST, REFERENCE, Chart, Series, draw
from nnx_cli.console.progress import TimeLeft
from nnx_cli.reporting import foreign
from nnx_cli.system.text import escaped, size

LEAST_COLUMNS, LEAST_LINES = 40, 12  # of a screen with more than one line of it
MOST_CHART_ROWS = 18
LEAST_CHART_ROWS = 3
UNIT = "loss: nats a token"  # of the scale beside the curves
NOISE_SHARE, NOISE_CHARS = 0.1, 120  # of a sample that is no text: characters that nobody writes; what is shown of it
NOISE = "it has not learned yet which bytes make text"
STYLES = {"train": "magenta", "val": "bold", "best": "bold", "reference": "dim", "": ""}  # seen on dark and on light


@dataclass(frozen=True)
class RunFacts:
    """What is known of a run before it begins. `budget_bytes` is the memory that was planned for,
    `ngram_bits_per_byte` what an n-gram model gets on its text."""

    title: str
    max_steps: int | None = None
    budget_bytes: int | None = None
    ngram_bits_per_byte: float | None = None


class RunScreen:
    """A run so far: numbers and curves, and the block that they make."""

    def __init__(self, facts: RunFacts) -> None:
        self.facts = facts
        self.progress = 0.0
        self.left = TimeLeft()
        self.record: Mapping[str, Any] = {}
        self.validation: Mapping[str, Any] = {}
        self.best: Mapping[str, Any] = {}
        self.train = Series()
        self.val = Series()
        self.sample: tuple[int, str] | None = None

    def step(self, record: Mapping[str, Any], progress: float) -> None:
        """Take note of a logged step."""
        if record["step"] <= self.record.get("step", 0):  # it went back to a checkpoint
            self.train.cut(record["step"])
            self.val.cut(record["step"])
        self.record = record
        self.move(progress)
        self.train.add(record["step"], record["train_loss"])
        if record["val_loss"] is not None:
            self.val.add(record["step"], record["val_loss"])
            self.validation = record
            if not self.best or record["val_loss"] < self.best["val_loss"]:
                self.best = record

    def remember(self, records: Sequence[Mapping[str, Any]]) -> None:
        """Take note of lines of metrics.jsonl from before a run was resumed, as far as they hold losses."""
        for record in records:
            step, train, val = (foreign.number(record.get(name)) for name in ("step", "train_loss", "val_loss"))
            if step is not None and train is not None:
                self.train.add(step, train)
            if step is not None and val is not None:
                self.val.add(step, val)
                if not self.best or val < self.best["val_loss"]:
                    bits = foreign.number(record.get("val_bits_per_byte"))
                    self.best = {"step": round(step), "val_loss": val, "val_bits_per_byte": bits}

    def move(self, progress: float) -> None:
        """Take note of a step between the logged ones."""
        self.progress = progress
        self.left.update(progress)

    def reference(self) -> float | None:
        """The n-gram model's bits per byte in nats a token, as the losses are."""
        bits, seen = self.facts.ngram_bits_per_byte, self.validation
        if bits is None or not seen or not seen["val_bits_per_byte"]:
            return None
        return bits * seen["val_loss"] / seen["val_bits_per_byte"]

    def layout(self, columns: int, lines: int) -> list[Line]:
        """The block for a screen of that size."""
        if columns < LEAST_COLUMNS or lines < LEAST_LINES:
            return [[(self.line(columns - 1), "")]]
        budget = lines * 2 // 3
        legend, numbers = (wrapped_pieces(pieces, columns) for pieces in (self._legend(), self._numbers()))
        sample = self._sample_lines(columns, min(6, max(2, lines // 10)))
        fixed = 3  # the rule, the bar, the steps below the chart
        for part, least in (
            (sample, 0),
            (numbers, 1),
            (legend, 1),
        ):  # where there is little room, the chart counts more
            missing = LEAST_CHART_ROWS - (budget - fixed - len(legend) - len(numbers) - len(sample))
            if missing > 0:
                del part[max(least, len(part) - missing) :]
        rows = min(budget - fixed - len(legend) - len(numbers) - len(sample), MOST_CHART_ROWS)
        return [self._rule(columns), self._bar(columns), *legend, *self._chart(columns, rows), *numbers, *sample]

    def line(self, columns: int) -> str:
        """The run in one line, the most important first; what does not fit as a whole is left out."""
        if not self.record:
            return fitting(["starting", self.facts.title], columns)
        parts = [
            f"{100 * self.progress:.0f} %",
            f"loss {self.record['train_loss']:.3f}",
            f"step {self.record['step']:,}",
        ]
        if self.validation:
            parts.append(f"val {self.validation['val_loss']:.3f}")
        return fitting([*parts, self.left.words()], columns)

    def _rule(self, columns: int) -> Line:
        title = cut_cells(plain_line(self.facts.title), columns - 8)
        return [("── ", "dim"), (title, "bold"), (" " + "─" * (columns - 4 - cells(title)), "dim")]

    def _bar(self, columns: int) -> Line:
        left = f"{100 * self.progress:5.1f} % "
        right = f" {self.left.words()}" if self.record else " starting"
        if self.record:
            step = f"step {self.record['step']:,}" + (f" of {self.facts.max_steps:,}" if self.facts.max_steps else "")
            right = "  " + ", ".join(filter(None, [step, self.left.words()]))
        width = max(0, columns - len(left) - len(right))
        done = round(width * min(1.0, self.progress))
        return [(left, ""), ("━" * done, "magenta"), ("─" * (width - done), "dim"), (right, "")]

    def _legend(self) -> list[Line]:
        """What the curves are, and where they stand."""
        record = self.record
        pieces: list[Line] = []
        if record:
            pieces.append([("━ ", STYLES["train"]), (f"training loss {record['train_loss']:.4f}", "")])
        if self.validation:
            pieces.append([("━ ", STYLES["val"]), (f"validation {_loss(self.validation)}", "")])
            is_newest = self.best["step"] == self.validation["step"]
            best = "best so far" if is_newest else f"best {_loss(self.best)}, step {self.best['step']:,}"
            pieces.append([(f"{BEST} ", STYLES["best"]), (best, "")])
        if (reference := self.reference()) is not None:
            shown = f"n-gram model {reference:.4f} ({self.facts.ngram_bits_per_byte:.3f} bits/byte)"
            pieces.append([(f"{REFERENCE} ", STYLES["reference"]), (shown, "")])
        return pieces

    def _chart(self, columns: int, rows: int) -> list[Line]:
        """Curves beside their scale, and the steps they span below."""
        curves = {"train": self.train.all(), "val": self.val.all()}
        best = (self.best["step"], self.best["val_loss"]) if self.best else None
        margin = 9
        chart = draw(curves, columns - margin, rows, best, self.reference())
        if chart is None:
            return []
        first = curves["train"][0][0] if curves["train"] else 0
        last = self.record.get("step") or max(x for points in curves.values() for x, _ in points)
        ends = f"{first:,.0f}", f"step {last:,}"
        between = columns - margin - len("".join(ends))
        axis = ends[0] + (UNIT if between >= len(UNIT) + 2 else "").center(between) + ends[1]
        return [*_scaled(chart), [(" " * margin + axis, "dim")]]

    def _numbers(self) -> list[Line]:
        record = self.record
        if not record:
            return []
        used, budget = record["peak_memory_bytes"], self.facts.budget_bytes
        of = f" of {size(budget)} planned for" if used and budget else ""
        parts = [
            f"learning rate {record['lr']:.2e}",
            f"gradient norm {record['grad_norm']:.3g}",
            f"{record['tokens_per_s']:,.0f} tokens/s",
            f"MFU {100 * record['mfu']:.0f} %" if record.get("mfu") is not None else "",
            f"memory {size(used)}{of}" if used else "",
            f"{record['skipped_steps']} skipped" if record["skipped_steps"] else "",
        ]
        return [[(part, "")] for part in parts if part]

    def _sample_lines(self, columns: int, most: int) -> list[Line]:
        """The newest sample under its heading."""
        if self.sample is None:
            return []
        title, text = titled_sample(*self.sample)
        lines = wrapped(plain_line(text), columns - 4, most)
        return [[(cut_cells(f" {title}", columns), "dim")], *([("   " + line, "")] for line in lines)]


def titled_sample(step: int, text: str) -> tuple[str, str]:
    """A sample's heading, and what is to be shown of it: little of what a model writes before it writes text."""
    title = f"sample at step {step:,}"
    odd = sum(char == "\ufffd" or (char not in "\n\r\t" and escaped(char) != char) for char in text)
    if odd <= NOISE_SHARE * len(text):
        return title, text
    line = " ".join(text.split())
    return f"{title} ({NOISE})", line[:NOISE_CHARS] + "…" * (len(line) > NOISE_CHARS)


def _loss(record: Mapping[str, Any]) -> str:
    bits = record["val_bits_per_byte"]
    return f"{record['val_loss']:.4f}" + ("" if bits is None else f" ({bits:.3f} bits/byte)")


def _scaled(chart: Chart) -> list[Line]:
    """The rows of a chart, with the values at the top, in the middle and at the bottom."""
    n, decimals = len(chart.rows), 2 if chart.top - chart.bottom >= 0.1 else 4
    labelled = {0: chart.top, n - 1: chart.bottom} | ({n // 2: (chart.top + chart.bottom) / 2} if n > 4 else {})
    lines: list[Line] = []
    for number, row in enumerate(chart.rows):
        label = f"{labelled[number]:7.{decimals}f} ┤" if number in labelled else "        │"
        pieces, kind, text = [(label, "dim")], "", ""
        for cell in row:
            if cell.kind != kind and text:
                pieces.append((text, STYLES[kind]))
                text = ""
            kind, text = cell.kind, text + cell.char
        lines.append([*pieces, (text, STYLES[kind])])
    return lines
