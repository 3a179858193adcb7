"""Tables, and texts in columns."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from nnx_cli.console.terminal import styled
from nnx_cli.system.text import printable

if TYPE_CHECKING:
    from rich.table import Table


def make_table(columns: Sequence[str], rows: Iterable[Sequence[Any]], title: str | None) -> Table:
    """A table of rich's; all columns but the first are numbers."""
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


def side_by_side(names: Sequence[str], texts: Sequence[str], width: int) -> Table:
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
