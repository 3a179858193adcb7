"""One command's screen."""

from __future__ import annotations

import json
import os
import sys
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nnx_cli.console.tables import aligned, make_table, side_by_side
from nnx_cli.console.terminal import COLUMNS, columns_of, in_notebook, make_console, moves_cursor, on_screen, styled
from nnx_cli.errors import OutputError, counted
from nnx_cli.system.text import printable, well_formed

if TYPE_CHECKING:
    from rich.text import Text

KEPT_NOTES = 200  # with which a screen can be painted anew


class Output:
    """One command's screen. `json` and `quiet` are the options of those names."""

    def __init__(self, *, json: bool = False, quiet: bool = False) -> None:
        self.json = json
        self.quiet = quiet
        self.made: Path | None = None  # what a command leaves behind, whatever becomes of what it prints
        self.out, self.err = make_console(sys.stdout), make_console(sys.stderr)
        self.said: deque[Text] = deque(maxlen=KEPT_NOTES)

    def say(self, text: Text) -> None:
        """Text as it is, on stderr."""
        self.said.append(text)
        self.err.print(text)

    def note(self, text: str) -> None:
        """A note, on stderr."""
        if not self.quiet:
            self.say(styled(printable(text)))

    def note_reading(self, *paths: str | None) -> None:
        """Say that a person at the keyboard is waited for, where one of `paths` is standard input."""
        if "-" in paths and sys.stdin is not None and sys.stdin.isatty():
            self.note(f"reading standard input; end it with {'Ctrl-Z and Enter' if os.name == 'nt' else 'Ctrl-D'}")

    def warn(self, text: str) -> None:
        """A warning, on stderr; --quiet does not silence it."""
        self.say(styled("warning: ", style="yellow") + styled(printable(text)))

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
            table = make_table([columns[n] for n in shown], [[row[n] for n in shown] for row in rows], title)
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
                self.out.print(side_by_side(row, [texts[name] for name in row], width), soft_wrap=False)

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
        """Whether there is a terminal, or a cell of a notebook, to redraw lines on, and somebody who wants that."""
        redraws = in_notebook(self.err.file) or (self.err.file.isatty() and moves_cursor())
        return redraws and not self.quiet and not os.environ.get("NO_COLOR")

    @contextmanager
    def spinner(self, text: str) -> Iterator[None]:
        """A sign of life on stderr while something takes its time; none with --quiet or without a terminal."""
        if not self.live or in_notebook(self.err.file):
            yield
            return
        on_screen.append(_line_erased)
        try:
            with self.err.status(styled(printable(text))):
                yield
        finally:
            on_screen.remove(_line_erased)


def _line_erased() -> str:
    return "\r\x1b[2K"
