"""Texts on a terminal: how many columns they take, what of them fits in a line, and what cannot break it."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence

from nnx_cli.system.text import printable

MOST_MARKS = 2  # combining characters on one letter: a pile of them covers the lines above

Line = Sequence[tuple[str, str]]  # pieces of text, and their styles


def wrapped_pieces(pieces: Sequence[Line], columns: int) -> list[Line]:
    """Short texts side by side, as many in a line as it has room for."""
    lines: list[list[tuple[str, str]]] = []
    room = 0
    for piece in pieces:
        width = 2 + sum(cells(text) for text, _ in piece)
        if room < width:
            lines.append([])
            room = columns - 1
        lines[-1] += [("  " if len(lines[-1]) else " ", ""), *((cut_cells(text, columns - 4), s) for text, s in piece)]
        room -= width
    return list(lines)


def fitting(parts: Sequence[str], columns: int) -> str:
    """Those of the parts that fit in a line, one behind the other."""
    line = ""
    for part in filter(None, map(plain_line, parts)):
        longer = f"{line}  {part}" if line else part
        line = longer if cells(longer) <= columns else line
    return line


def plain_line(text: str) -> str:
    """`text` in one line of characters that have a place of their own: lines are joined, what drives a terminal is
    escaped, what joins or varies letters goes, and of a pile of marks a few are left."""
    kept: list[str] = []
    marks = 0
    for char in printable(" ".join(text.split())):
        kind = unicodedata.category(char)
        marks = marks + 1 if kind in ("Mn", "Me") else 0
        if kind not in ("Cf", "Cn", "Co") and marks <= MOST_MARKS and not 0xFE00 <= ord(char) <= 0xFE0F:
            kept.append(char)
    return "".join(kept)


def cells(text: str) -> int:
    """Columns that a text takes."""
    from rich.cells import cell_len

    return cell_len(text)


def cut_cells(text: str, width: int) -> str:
    """The beginning of a text that fits."""
    from rich.cells import cell_len

    while text and cell_len(text) > width:
        text = text[: max(0, len(text) - max(1, (cell_len(text) - width) // 2))]
    return text


def wrapped(text: str, width: int, most: int) -> list[str]:
    """`text` in lines of at most `width` columns, cut between words where they fit; the first `most` of them."""
    lines: list[str] = []
    rest = text[: 4 * width * most]
    while rest and len(lines) < most:
        line = cut_cells(rest[: 2 * width], width) or rest[0]
        if len(line) < len(rest) and rest[len(line)] != " " and 2 * line.rfind(" ") > len(line):
            line = line[: line.rfind(" ")]
        lines.append(line.rstrip())
        rest = rest[len(line) :].lstrip()
    if rest and lines:
        lines[-1] = cut_cells(lines[-1], width - 1) + "…"
    return lines
