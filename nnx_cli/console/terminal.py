"""The terminal: how large it is, whether its lines can be redrawn, rich's console on it."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import IO, TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

COLUMNS, LINES = 80, 25  # of a screen that does not say how large it is
NOTEBOOK_VARIABLES = ("JPY_PARENT_PID", "COLAB_RELEASE_TAG")  # which commands in the cells of notebooks inherit
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


def screen_size(file: IO[str]) -> tuple[int, int]:
    """Columns and lines of the screen that `file` is."""
    columns, lines = COLUMNS, LINES
    with suppress(OSError, ValueError):
        columns, lines = os.get_terminal_size(file.fileno())
    return stated_number("COLUMNS") or columns or COLUMNS, stated_number("LINES") or lines or LINES


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
    how: dict[str, Any] = dict(highlight=False, soft_wrap=True, force_jupyter=False)  # which cannot overwrite a line
    return Screen(file=file, width=COLUMNS, height=LINES, color_system=colours, **how)


on_screen: list[Callable[[], str]] = []
"""What takes moving lines off the screen, while there are such."""


def clean_screen() -> None:
    """Take moving lines off the screen and show the cursor again, where this process ends without doing so."""
    if sys.stderr.isatty() and moves_cursor():
        with suppress(OSError):
            os.write(sys.stderr.fileno(), "".join([*(erase() for erase in on_screen), "\x1b[?25h"]).encode())


def moves_cursor() -> bool:
    """Whether the terminal, if this is one, can redraw lines."""
    return os.name == "nt" or os.environ.get("TERM") not in NO_CURSOR


def in_notebook(file: IO[str]) -> bool:
    """Whether `file` leads to a cell of a notebook, which knows of control codes the carriage return alone."""
    return "ipykernel" in sys.modules or (file.isatty() and any(name in os.environ for name in NOTEBOOK_VARIABLES))
