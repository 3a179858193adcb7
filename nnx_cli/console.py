"""What people see: the product on stdout, progress and notes on stderr. The only place that imports rich."""

from __future__ import annotations

import json
import os
import re
import sys
import textwrap
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Literal, Self

from nnx_cli.errors import OutputError, counted
from nnx_cli.system.text import printable, well_formed

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress
    from rich.table import Table
    from rich.text import Text

COLUMNS, LINES = 80, 25  # of a screen that does not say how large it is
PANEL_COLUMNS = 75  # what the panels of help take
NO_CURSOR = (None, "", "dumb", "unknown")  # what TERM says where lines cannot be redrawn
PLAIN_SECONDS = 5.0  # between progress lines where there is no terminal
RACE_SECONDS = 30.0  # and of a race


def styled(text: str, style: str = "") -> Text:
    """Text for rich to print as it is, in a style."""
    from rich.text import Text

    return Text(text, style)


def prepare_help(command: Any) -> None:
    """Have Typer draw the help of `command` without control codes where NO_COLOR asks for that, which rich takes for
    colours alone, and where it is not read from a terminal; without panels where they would cut words."""
    from typer import rich_utils

    plain = os.environ.get("NO_COLOR") or not (sys.stdout.isatty() or os.environ.get("FORCE_COLOR"))
    rich_utils.COLOR_SYSTEM = None if plain else "auto"
    for name in ("COLUMNS", "LINES"):
        if _stated(name) is None:
            os.environ.pop(name, None)  # Typer and rich read them too, and stumble over what is no number
    rich_utils.MAX_WIDTH = columns_of(sys.stdout, sys.stderr, sys.stdin) or COLUMNS
    if rich_utils.MAX_WIDTH < PANEL_COLUMNS:
        command.rich_markup_mode = None
        command.epilog = command.epilog and command.epilog.replace("\n\n", "\n\n\b\n")  # examples stay lines


def columns_of(*streams: IO[str] | None) -> int | None:
    """The width of the screen: what COLUMNS says, where that is a number of columns, else that of the first terminal
    among `streams`; None where they are files and pipes."""
    if (stated := _stated("COLUMNS")) is not None:
        return stated
    for stream in filter(None, streams):
        with suppress(OSError, ValueError):
            if columns := os.get_terminal_size(stream.fileno()).columns:
                return columns
    return None


def _stated(name: str) -> int | None:
    """The number of columns or lines that a variable of the environment states, if it does."""
    value = os.environ.get(name, "")
    return int(value) if re.fullmatch("0*[1-9][0-9]{0,3}", value) else None


def _console(file: IO[str]) -> Console:
    """A console of rich's on a stream, as wide as `columns_of` says, plain where NO_COLOR asks for that."""
    from rich.console import Console, ConsoleDimensions

    class Screen(Console):
        @property  # type: ignore[misc]  # Rich's can be set
        def size(self) -> ConsoleDimensions:
            return ConsoleDimensions((columns_of(file) or COLUMNS) - self.legacy_windows, LINES)

    colours: Literal["auto"] | None = None if os.environ.get("NO_COLOR") else "auto"
    return Screen(file=file, width=COLUMNS, height=LINES, color_system=colours, highlight=False, soft_wrap=True)


def show_cursor() -> None:
    """Show the cursor again, which moving lines hide, where this process ends without taking them off the screen."""
    if sys.stderr.isatty() and moves_cursor():
        with suppress(OSError):
            os.write(sys.stderr.fileno(), b"\x1b[?25h")


def moves_cursor() -> bool:
    """Whether the terminal, if this is one, can redraw lines."""
    return os.name == "nt" or os.environ.get("TERM") not in NO_CURSOR


class Output:
    """One command's screen. `json` and `quiet` are the options of those names."""

    def __init__(self, *, json: bool = False, quiet: bool = False) -> None:
        self.json = json
        self.quiet = quiet
        self.made: Path | None = None  # what a command leaves behind, whatever becomes of what it prints
        self.out, self.err = _console(sys.stdout), _console(sys.stderr)

    def note(self, text: str) -> None:
        """A note, on stderr."""
        if not self.quiet:
            self.err.print(styled(printable(text)))

    def note_reading(self, *paths: str | None) -> None:
        """Say that a person at the keyboard is waited for, where one of `paths` is standard input."""
        if "-" in paths and sys.stdin is not None and sys.stdin.isatty():
            self.note(f"reading standard input; end it with {'Ctrl-Z and Enter' if os.name == 'nt' else 'Ctrl-D'}")

    def warn(self, text: str) -> None:
        """A warning, on stderr; --quiet does not silence it."""
        self.err.print(styled("warning: ", style="yellow") + styled(printable(text)))

    def show(self, *lines: str) -> None:
        """Lines of the product, on stdout; with --json the product is another."""
        if not self.json:
            with self._writing():
                for line in lines:
                    self.out.print(styled(printable(line)))

    def stream(self, text: str) -> None:
        """A piece of the product, as it comes."""
        if not self.json:
            self._write(printable(text))

    def show_json(self, value: Any) -> None:
        """The product as JSON, when --json asks for it."""
        if self.json:
            whole = json.loads(well_formed(json.dumps(value, ensure_ascii=False, allow_nan=False)))
            text = json.dumps(whole, indent=2)  # ASCII, and DEL is the one control left in it
            self._write(text.replace("\x7f", "\\u007f") + "\n")

    def table(
        self,
        columns: Sequence[str],
        rows: Iterable[Sequence[Any]],
        title: str | None = None,
        expendable: Sequence[str] = (),
    ) -> None:
        """A table on stdout; all columns but the first are numbers, to the right. The first one's cells stay whole.

        On a narrow screen the `expendable` columns go, the first of them first.
        """
        if self.json:
            return
        rows, shown, limit = list(rows), list(range(len(columns))), columns_of(sys.stdout)
        wide = self.out.options.update(width=10**6)  # to measure what no screen narrows
        for name in (None, *expendable):
            shown = [number for number in shown if columns[number] != name]
            table = _table([columns[n] for n in shown], [[row[n] for n in shown] for row in rows], title)
            needed = self.out.measure(table, options=wide)
            if limit is None or needed.maximum <= limit:
                break
        table.width = needed.maximum if limit is None else max(needed.minimum, min(needed.maximum, limit))
        with self._writing():
            self.out.print(table, soft_wrap=False, crop=False)
        if hidden := [name for number, name in enumerate(columns) if number not in shown]:
            self.note(f"not shown on {counted(limit or 0, 'column')}: {', '.join(hidden)}; --json has all")

    def aligned(self, rows: Sequence[tuple[str, str, str]], *, product: bool = False) -> None:
        """Rows of a name, a value and a remark in columns: the product, or a note."""
        lines = aligned(rows, columns_of(sys.stdout if product else sys.stderr))
        self.show(*lines) if product else self.note("\n".join(lines))

    def side_by_side(self, texts: Mapping[str, str], least: int = 30) -> None:
        """Texts under their names on stdout, beside each other: as many in a row as have `least` columns each."""
        if self.json or not texts:
            return
        names, width = list(texts), columns_of(sys.stdout) or COLUMNS
        in_a_row = max(1, min(len(names), (width + 2) // (least + 2)))
        with self._writing():
            for first in range(0, len(names), in_a_row):
                row = names[first : first + in_a_row]
                self.out.print(_columns(row, [texts[name] for name in row], width), soft_wrap=False)

    def _write(self, text: str) -> None:
        with self._writing():
            self.out.file.write(text)
            self.out.file.flush()

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """Say of a result that cannot be written that what was made before is whole."""
        try:
            yield
        except OutputError as error:
            if self.made is None:
                raise
            raise OutputError(f"{error}; {self.made} is complete", fix=error.fix) from error

    @property
    def live(self) -> bool:
        """Whether there is a terminal to redraw lines on, and somebody who wants to see them."""
        return self.err.file.isatty() and not self.quiet and moves_cursor()  # whatever colours are asked for

    def spinner(self, text: str) -> AbstractContextManager[object]:
        """A sign of life on stderr while something takes its time; none with --quiet or without a terminal."""
        return self.err.status(styled(printable(text))) if self.live else nullcontext()

    def progress(self, what: str) -> ByteProgress:
        """Progress over bytes, on stderr."""
        return ByteProgress(self, what)


def _table(columns: Sequence[str], rows: Iterable[Sequence[Any]], title: str | None) -> Table:
    from rich import box
    from rich.cells import cell_len
    from rich.table import Table

    table = Table(title=title and styled(printable(title)), box=box.SIMPLE, title_justify="left")
    lines = [[printable("–" if cell is None else str(cell)) for cell in row] for row in rows]
    for number, column in enumerate(map(printable, columns)):
        if number == 0:
            table.add_column(styled(column), no_wrap=True, overflow="ignore")
        else:
            words = " ".join([column, *(line[number] for line in lines)]).split()
            longest = max(map(cell_len, words), default=1)
            table.add_column(styled(column), justify="right", overflow="fold", min_width=longest)
    for line in lines:
        table.add_row(*map(styled, line))
    return table


def _columns(names: Sequence[str], texts: Sequence[str], width: int) -> Table:
    """Texts of the same width under their names."""
    from rich.table import Table

    table = Table(box=None, width=width, pad_edge=False, padding=(0, 2, 1, 0))
    for name in names:
        table.add_column(styled(printable(name), "bold"), ratio=1, overflow="fold")
    table.add_row(*(styled(printable(text)) for text in texts))
    return table


def aligned(rows: Sequence[tuple[str, str, str]], limit: int | None) -> list[str]:
    """Lines of rows of a name, a value and a remark in columns; within a `limit` too narrow for them remarks stand in
    brackets behind values, and go on below those."""
    first, second = (max(len(row[column]) for row in rows) for column in (0, 1))
    lines = [f"{name:<{first}}  {value:<{second}}  {remark}".rstrip() for name, value, remark in rows]
    if limit is None or max(map(len, lines)) <= limit:
        return lines
    indent = " " * (first + 2 if limit >= 2 * first else 2)
    whole = [f"{name:<{first}}  {value}" + (f" ({remark})" if remark else "") for name, value, remark in rows]
    return [
        line
        for text in whole
        for line in textwrap.wrap(text, max(limit, 10), subsequent_indent=indent, break_on_hyphens=False)
    ]


class ByteProgress:
    """A line that tells how many megabytes are done, where there is a terminal to redraw it."""

    def __init__(self, output: Output, what: str) -> None:
        self.output = output
        self.what = what
        self.started = time.monotonic()
        self.last = 0.0

    def update(self, done_bytes: int, total_bytes: int | None) -> None:
        """Show where it stands; cheap to call often."""
        now = time.monotonic()
        if self.output.live and now - self.last > 0.1:
            self.last = now
            of = f" of {total_bytes / 1e6:,.0f}" if total_bytes else ""
            speed = done_bytes / 1e6 / max(now - self.started, 1e-6)
            self.output.err.print(styled(f"{self.what} {done_bytes / 1e6:,.0f}{of} MB, {speed:,.0f} MB/s"), end="\r")

    def end(self) -> None:
        """Take the line off the screen."""
        if self.output.live and self.last:
            self.output.err.print(" " * 60, end="\r")


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
