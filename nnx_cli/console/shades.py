"""Matrices as shades of characters."""

from __future__ import annotations

from collections.abc import Sequence
from typing import IO, TYPE_CHECKING, Any

from nnx_cli.system.text import printable

if TYPE_CHECKING:
    from rich.text import Text

BLOCKS, LETTERS = " ░▒▓█", " .:*#"  # from nothing to the most; the second where the screen's encoding has no blocks
BELOW = " -="  # the same below zero
LEVELS = ("dim", "", "bold", "bold magenta", "reverse magenta")  # of text, seen on dark and on light
MOST_LABEL = 16

Group = tuple[str, Sequence[Sequence[float]]]  # a name, and columns of one value for every row


def ramp_for(file: IO[str]) -> str:
    """The characters that a stream can write."""
    try:
        BLOCKS.encode(getattr(file, "encoding", None) or "ascii")
    except (UnicodeEncodeError, LookupError):
        return LETTERS
    return BLOCKS


def shade(value: float, most: float, ramp: str) -> str:
    """The character for a value among values of up to `most`, in size."""
    share = min(1.0, abs(value) / most) if most else 0.0
    steps = ramp if value >= 0 else BELOW
    return steps[round(share * (len(steps) - 1))]


def weighted(pieces: Sequence[str], values: Sequence[float]) -> Text:
    """A text whose pieces stand out the more, the larger their values are beside the largest."""
    from rich.text import Text

    text, most = Text(), max(map(abs, values), default=0.0)
    for piece, value in zip(pieces, values, strict=True):
        share = min(1.0, abs(value) / most) if most else 0.0
        text.append(printable(piece), LEVELS[round(share * (len(LEVELS) - 1))])
    return text


def shaded(labels: Sequence[str], groups: Sequence[Group], ramp: str, *, together: bool = False) -> list[str]:
    """Lines of a table of shades: rows under their labels, columns in groups under theirs.

    The strongest value of a column is the darkest, or with `together` that of all columns.
    """
    everything = max((abs(value) for _, columns in groups for column in columns for value in column), default=0.0)

    def written(column: Sequence[float]) -> list[str]:
        most = everything if together else max(map(abs, column), default=0.0)
        return [shade(value, most, ramp) for value in column]

    return lettered(labels, [(name, [written(column) for column in columns]) for name, columns in groups])


def lettered(labels: Sequence[str], groups: Sequence[tuple[str, Sequence[Sequence[str]]]]) -> list[str]:
    """Lines of a table of characters that are ready: rows under their labels, columns in groups under theirs."""
    width = label_width(labels)
    widths = [group_width(name, columns) for name, columns in groups]
    head = " ".join(fitted(name, n) for (name, _), n in zip(groups, widths, strict=True))
    lines = [f"{' ' * width} {head}".rstrip()]
    for row, label in enumerate(labels):
        parts = zip(groups, widths, strict=True)
        cells = (fitted("".join(column[row] for column in columns), n) for (_, columns), n in parts)
        lines.append(f"{fitted(label, width)} {' '.join(cells)}".rstrip())
    return lines


def label_width(labels: Sequence[str]) -> int:
    """Columns that labels take."""
    from rich.cells import cell_len

    return min(MOST_LABEL, max(map(cell_len, labels), default=0))


def group_width(name: str, columns: Sequence[Sequence[str | float]]) -> int:
    """Columns of the screen that a group takes, of values of one character or of words of one width."""
    from rich.cells import cell_len

    each = max((cell_len(cell) if isinstance(cell, str) else 1 for column in columns for cell in column), default=1)
    return max(len(name), each * len(columns))


def that_fit(groups: Sequence[tuple[str, Any]], labels: Sequence[str], limit: int) -> Sequence[tuple[str, Any]]:
    """The groups, or as few evenly picked ones as a screen of `limit` columns has room for."""
    room = limit - label_width(labels) - 1
    for step in range(1, len(groups) + 1):
        picked = groups[::step]
        if sum(group_width(*group) + 1 for group in picked) <= room + 1:
            return picked
    return groups[:1]


def fitted(text: str, width: int) -> str:
    """Text in exactly so many columns, which letters of some scripts take two of."""
    from rich.cells import cell_len, set_cell_size

    return set_cell_size(text, width) if cell_len(text) <= width else set_cell_size(text, width - 1) + "~"
