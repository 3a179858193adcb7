"""How Typer draws help."""

from __future__ import annotations

import os
import sys
from typing import Any

from nnx_cli.console.terminal import COLUMNS, columns_of, stated_number

PANEL_COLUMNS = 75  # what the panels of help take


def prepare_help(command: Any) -> None:
    """Have Typer draw the help of `command` without control codes where NO_COLOR asks for that, which rich takes for
    colours alone, and where it is not read from a terminal; without panels where they would cut words."""
    from typer import rich_utils

    plain = os.environ.get("NO_COLOR") or not (sys.stdout.isatty() or os.environ.get("FORCE_COLOR"))
    rich_utils.COLOR_SYSTEM = None if plain else "auto"
    for name in ("COLUMNS", "LINES"):
        if stated_number(name) is None:
            os.environ.pop(name, None)  # Typer and rich read them too, and stumble over what is no number
    rich_utils.MAX_WIDTH = columns_of(sys.stdout, sys.stderr, sys.stdin) or COLUMNS
    if rich_utils.MAX_WIDTH < PANEL_COLUMNS:
        command.rich_markup_mode = None
        command.epilog = command.epilog and command.epilog.replace("\n\n", "\n\n\b\n")  # examples stay lines
