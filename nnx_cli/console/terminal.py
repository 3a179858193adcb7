"""The terminal: how wide it is, whether its lines can be redrawn, rich's console on it."""

from __future__ import annotations

import os
import re
import sys
from contextlib import suppress
from typing import IO, TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

COLUMNS, LINES = 80, 25  # of a screen that does not say how large it is
NO_CURSOR = (None, "", "dumb", "unknown")  # what TERM says where lines cannot be redrawn


def styled(text: str, style: str = "") -> Text:
    """Text for rich to print as it is, in a style."""
    from rich.text import Text

    return Text(text, style)


def columns_of(*streams: IO[str] | None) -> int | None:
    """The width of the screen: what COLUMNS says, where that is a number of columns, else that of the first terminal
    among `streams`; None where they are files and pipes."""
    if (stated := stated_number("COLUMNS")) is not None:
        return stated
    for stream in filter(None, streams):
        with suppress(OSError, ValueError):
            if columns := os.get_terminal_size(stream.fileno()).columns:
                return columns
    return None


def stated_number(name: str) -> int | None:
    """The number of columns or lines that a variable of the environment states, if it does."""
    value = os.environ.get(name, "")
    return int(value) if re.fullmatch("0*[1-9][0-9]{0,3}", value) else None


def make_console(file: IO[str]) -> Console:
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
