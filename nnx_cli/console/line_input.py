"""Lines that a person types, with editing and history where this Python has them, or lines of a pipe."""

from __future__ import annotations

import sys
from contextlib import suppress
from importlib.util import find_spec
from typing import Any

from nnx_cli.console.terminal import moves_cursor

PROMPT = "> "


class LineInput:
    """Reads standard input line by line. At a terminal prompt_toolkit edits lines where it is installed, else readline
    where Python has it."""

    def __init__(self) -> None:
        stdin = sys.stdin
        self.is_terminal = stdin is not None and stdin.isatty()
        self._session: Any = None
        if stdin is not None and hasattr(stdin, "reconfigure"):
            stdin.reconfigure(errors="replace")
        self._edits = self.is_terminal and sys.stdout.isatty()
        if self._edits and moves_cursor() and find_spec("prompt_toolkit") is not None:
            from prompt_toolkit import PromptSession

            self._session = PromptSession()
        elif self._edits:
            with suppress(ImportError):  # Windows has none
                import readline  # noqa: F401  # `input` uses it from here on

    def read(self) -> str | None:
        """The next line without its end, None where there is none. Raises KeyboardInterrupt at Ctrl-C."""
        try:
            if self._session is not None:
                return self._session.prompt(PROMPT)
            if self._edits:
                return input(PROMPT)
        except EOFError:
            return None
        if self.is_terminal:
            sys.stderr.write(PROMPT)
            sys.stderr.flush()
        line = sys.stdin.readline() if sys.stdin is not None else ""
        return line.removesuffix("\n").removesuffix("\r") if line else None

    def new_line(self) -> None:
        """Leave the line that was typed on, where Ctrl-C or Ctrl-D ended it."""
        if self.is_terminal and self._session is None:
            sys.stderr.write("\n")
            sys.stderr.flush()
