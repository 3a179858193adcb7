"""Tables as text (CSV and TSV): one document a row, and no row that swallows others."""

from __future__ import annotations

import csv
import re
import shlex
from collections import deque
from collections.abc import Iterable, Iterator
from itertools import chain
from typing import Any

from nnx_cli.data.formats import BadRow, lines
from nnx_cli.errors import DataError

DELIMITERS = ",;\t|"
NEVER = "\x1f"  # the delimiter of a table of one column
NAMED = 10  # columns in a message
LIKE_ROWS, LIKE_ROWS_WITH_NUMBERS = 10, 3  # so many lines in one field, each like a row: its quote is a mistake


class Table:
    """The text in the column `key` of every row. `quoted` False: a quote that is not closed is text (TSV)."""

    def __init__(self, blocks: Iterable[str], key: str, limit: int, name: str, *, quoted: bool = True) -> None:
        csv.field_size_limit(limit)
        self._limit = limit
        self._quoted = quoted
        self._lines = _numbered(blocks, limit)
        self._again: deque[tuple[int, str | None]] = deque()  # lines that were taken for the rest of a row
        self._blanks = False  # behind delimiters
        self._delimiter, self._columns = self._header(key, name)
        self._column = self._columns.index(key.strip()) if self._columns else 0
        self._numbers: set[int] | None = None  # columns that hold a number in every row so far

    def rows(self) -> Iterator[tuple[int, str | BadRow]]:
        """(line number, text)."""
        while (line := self._next()) is not None:
            number, text = line
            if text is None:
                yield number, BadRow(f"it has more than {self._limit >> 20} MiB")
            elif text and not text.isspace():
                cells = self._cells(text) if '"' in text else self._split(text)
                yield number, cells if isinstance(cells, BadRow) else self._text_of(cells)

    def _next(self) -> tuple[int, str | None] | None:
        return self._again.popleft() if self._again else next(self._lines, None)

    def _header(self, key: str, name: str) -> tuple[str, list[str]]:
        """Delimiter and names of columns; none where the table is empty. DataError where no column is named `key`."""
        line = next((text for _, text in self._lines if text is None or text.strip()), "")
        stated = re.fullmatch(r'"?sep=(.)"?\s*', line or "", re.IGNORECASE)  # what Excel writes and reads
        if stated is not None:
            line = next((text for _, text in self._lines if text is None or text.strip()), "")
        if line is None or not line:
            return NEVER, []
        key = key.strip()
        found = {delimiter: _names(line, delimiter) for delimiter in (stated[1] if stated else DELIMITERS)}
        delimiter, names = max(found.items(), key=lambda item: (key in item[1], len(item[1])))
        if key not in names:
            raise _no_column(line, names, key, name)
        self._blanks = f"{delimiter} " in line
        return (delimiter, names) if len(names) > 1 else (NEVER, names)

    def _text_of(self, cells: list[str]) -> str | BadRow:
        n = len(self._columns)
        if len(cells) <= self._column:
            return BadRow("it has too few columns")
        if any(map(str.strip, cells[n:])):
            return BadRow(f"it has {len(cells)} columns, the header {n}")
        numbers = {i for i, cell in enumerate(cells[:n]) if i != self._column and cell.strip().isdecimal()}
        self._numbers = numbers if self._numbers is None else self._numbers & numbers
        return cells[self._column]

    def _split(self, line: str) -> list[str]:
        cells = line.rstrip("\r").split(self._delimiter)
        return [cell.lstrip(" ") for cell in cells] if self._blanks else cells

    def _cells(self, first: str) -> list[str] | BadRow:
        """The cells of a row with quotes, which may go on for several lines."""
        taken: list[tuple[int, str | None]] = []
        how: dict[str, Any] = {"delimiter": self._delimiter, "skipinitialspace": self._blanks}
        rows = csv.reader(chain([first + "\n"], self._more(taken)), strict=True, **how)
        try:
            cells = next(rows)
            if not self._swallowed([text or "" for _, text in taken]):
                return cells
        except csv.Error:
            pass
        self._again.extendleft(reversed(taken))
        if not self._quoted:
            return self._split(first)
        rows = csv.reader([first, ""], **how)
        cells = next(rows)
        return cells if rows.line_num == 1 else BadRow("its quote is not closed before other rows begin")

    def _more(self, taken: list[tuple[int, str | None]]) -> Iterator[str]:
        """The lines that follow, for as long as they may belong to one row."""
        size = 0
        while (line := self._next()) is not None:
            taken.append(line)
            size += len(line[1] or "") + 1
            if line[1] is None or size > self._limit:
                return
            yield line[1] + "\n"
            if len(taken) <= LIKE_ROWS and self._swallowed([text or "" for _, text in taken]):
                return

    def _swallowed(self, texts: list[str]) -> bool:
        """Whether lines that one field goes on for are rows of their own."""
        n = len(self._columns)
        if n < 2 or len(texts) < (LIKE_ROWS_WITH_NUMBERS if self._numbers else LIKE_ROWS):
            return False
        rows = [text.split(self._delimiter) for text in texts]
        numbers = self._numbers or ()
        return all(len(cells) == n and all(cells[i].strip().isdecimal() for i in numbers) for cells in rows)


def _numbered(blocks: Iterable[str], limit: int) -> Iterator[tuple[int, str | None]]:
    """Lines from 1 on, which end with a line feed, or with a carriage return where there is no line feed at first."""
    parts = iter(blocks)
    head = ""
    for block in parts:
        head += block
        if "\n" in head or "\r" in head[:-1] or len(head) > limit:
            break
    end = "\r" if "\r" in head and "\n" not in head else "\n"
    return enumerate(lines(chain([head], parts), limit, end), 1)


def _names(header: str, delimiter: str) -> list[str]:
    """The names in a header, without the blanks around them."""
    try:
        return [cell.strip(" \t\r\ufeff") for cell in next(csv.reader([header], delimiter=delimiter), [])]
    except csv.Error:  # no header can look like that
        return []


def _no_column(header: str, names: list[str], key: str, name: str) -> DataError:
    """Why a table has no column `key`, and what mends that."""
    word = re.escape(key)
    apart = re.search(rf"\w[\"']?([^\w\"']+)[\"']?{word}(?!\w)", header)
    apart = apart or re.search(rf"(?<!\w){word}[\"']?([^\w\"']+)[\"']?\w", header)
    if apart and len(names) == 1:
        mark = apart[1]
        fix = f"write sep={mark} in a line above the header" if len(mark) == 1 else "write it with commas"
        return DataError(
            f"the columns of {name} are separated by {mark!r}, not by a comma, semicolon, tab or |", fix=fix
        )
    found = ", ".join(names[:NAMED])
    likely = next((each for each in names if each.casefold() == key.casefold()), None)
    fix = f"add --text-key {shlex.quote(likely)}" if likely else "name one with --text-key"
    return DataError(f"{name} has no column {key!r} but {found[:200]}", fix=fix)
