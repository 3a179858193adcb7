"""Tables as text (CSV and TSV): one document a row, and no row that swallows others."""

from __future__ import annotations

import csv
import re
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from functools import partial
from itertools import chain, islice
from operator import itemgetter
from typing import Any

from nnx_cli.data.conversations import Pair, question_and_answer
from nnx_cli.data.formats import BadRow, line_lists
from nnx_cli.errors import DataError, counted, quoted

DELIMITERS = ",;\t|"
COMMENT = "#"  # begins lines above the header
NEVER = "\x1f"  # the delimiter of a table of one column
NAMED = 10  # columns in a message
LIKE_ROWS, LIKE_ROWS_WITH_NUMBERS = 10, 3  # so many lines in one field, each like a row: its quote is a mistake
FIRST_ROWS = 50  # that tell which columns hold numbers, and how quotes are written
DOUBLED = partial(re.compile(r"\\(.)").sub, lambda pair: '""' if pair[1] == '"' else pair[0])


class Table:
    """The text in the column `key` of every row, or the conversation in two of them. `quoted` False: a quote that is
    not closed is text (TSV)."""

    def __init__(self, blocks: Iterable[str], key: str | Pair, limit: int, name: str, *, quoted: bool = True) -> None:
        csv.field_size_limit(limit)
        self._limit = limit
        self._quoted = quoted
        self._lists = _line_lists(blocks, limit)
        self._n_lines = 0  # in the lists that were begun
        self._here: Iterator[tuple[int, str | None]] = iter(())  # lines of the list that is read
        self._again: deque[tuple[int, str]] = deque()  # lines that were taken for the rest of a row
        self._taken: list[tuple[int, str]] = []  # the lines of the row that is read
        self._too_long: list[int] = []
        self._how: dict[str, Any] = {}  # delimiter and blanks behind it, for the reader of rows
        keys = [key.strip() for key in ((key.prompt, key.answer) if isinstance(key, Pair) else (key,))]
        self._columns = self._header(keys, name)
        self._read = [self._columns.index(key) for key in keys] if self._columns else [0]
        self._take: Callable[[list[str]], str | BadRow] = itemgetter(self._read[0])
        if len(self._read) > 1:
            self._take = lambda cells: question_and_answer(*(cells[column] for column in self._read))
        self._n_rows = 0
        self._numbers: set[int] = set()  # columns with a number in each of the first rows

    def rows(self) -> Iterator[tuple[int, str | BadRow]]:
        """(line number, text)."""
        while (lines := self._next_list()) is not None:
            yield from self._plain_rows(lines)
            yield from self._quoted_rows()
        yield from ((number, BadRow(f"it has more than {self._limit >> 20} MiB")) for number in self._too_long)

    def _next_list(self) -> list[str | None] | None:
        """Begin the next lines; None at the end."""
        lines = next(self._lists, None)
        if lines is not None:
            self._here = enumerate(lines, self._n_lines + 1)
            self._n_lines += len(lines)
        return lines

    def _plain_rows(self, lines: list[Any]) -> Iterator[tuple[int, str | BadRow]]:
        """The rows of the lines that were begun, up to one that is no line of its own. Much faster than the others."""
        take, n, before, done = self._take, len(self._columns), self._n_lines - len(lines), 0
        rows = csv.reader(lines, strict=True, **self._how)
        with suppress(csv.Error):
            for cells in rows:
                if rows.line_num != done + 1:
                    break
                done += 1
                if len(cells) == n and self._n_rows == FIRST_ROWS:
                    yield before + done, take(cells)
                elif len(cells) > 1 or any(map(str.strip, cells)):
                    yield before + done, self._text_of(cells)
        self._here = enumerate(lines[done:], before + done + 1)

    def _quoted_rows(self) -> Iterator[tuple[int, str | BadRow]]:
        """The rows of the other lines, some of which may go on in the next."""
        taken, take, n = self._taken, self._take, len(self._columns)
        rows = csv.reader(self._feed(), strict=True, **self._how)
        while True:
            taken.clear()
            try:
                cells = next(rows, None)
                swallowed = len(taken) > LIKE_ROWS_WITH_NUMBERS and self._swallowed()
            except csv.Error:
                cells, swallowed = [], True
            if swallowed:
                rows = csv.reader(self._feed(), strict=True, **self._how)
                self._again.extendleft(reversed(taken[1:]))
                yield taken[0][0], self._alone(taken[0][1])
            elif cells is None:
                break
            elif len(cells) == n and self._n_rows == FIRST_ROWS:
                yield taken[0][0], take(cells)
            elif len(cells) > 1 or any(map(str.strip, cells)):
                yield taken[0][0], self._text_of(cells)

    def _feed(self) -> Iterator[str]:
        """Lines for a reader of rows, which takes more than one where quotes are open; ends where it takes too many,
        and with the row in which the lines that are read end."""
        taken, again = self._taken, self._again
        size = 0
        while True:
            number, text = again.popleft() if again else next(self._here, (0, ""))
            if not number:
                if not taken or self._next_list() is None:
                    return
                continue
            if text is None:
                self._too_long.append(number)
                continue
            taken.append((number, text))
            yield text + "\n"
            if not taken:  # the row was whole
                size = 0
                continue
            size += len(text)
            checked = len(taken) - 1 == (LIKE_ROWS_WITH_NUMBERS if self._numbers else LIKE_ROWS)
            if size > self._limit or (checked and self._swallowed()):
                return

    def _header(self, keys: list[str], name: str) -> list[str]:
        """The names of the columns; none where the table is empty. DataError where one of `keys` is not among them."""
        stated = None
        while (line := self._first_line()) is not None:
            said = re.fullmatch(r'"?sep=(.)"?\s*', line, re.IGNORECASE)  # what Excel writes and reads
            stated = stated or said
            found = {delimiter: _names(line, delimiter) for delimiter in (stated[1] if stated else DELIMITERS)}
            delimiter, names = max(found.items(), key=lambda item: (keys[0] in item[1], len(item[1])))
            if said is None and (keys[0] in names or not line.lstrip().startswith(COMMENT)):
                break
        rest = [text for _, text in self._here]
        self._n_lines -= len(rest)
        self._lists = chain([rest], self._lists)
        if line is None:
            return []
        options = ("--text-key",) if len(keys) == 1 else ("--prompt-key", "--answer-key")
        for key, option in zip(keys, options, strict=True):
            if key not in names:
                raise _no_column(line, names, key, name, option)
        self._how = {"delimiter": delimiter if len(names) > 1 else NEVER, "skipinitialspace": f"{delimiter} " in line}
        if self._quoted:
            self._double_quotes(delimiter)
        return names

    def _first_line(self) -> str | None:
        """The next line that is not blank; None at the end, and where it is too long."""
        while True:
            for _, text in self._here:
                if text is None or text.strip():
                    return text
            if self._next_list() is None:
                return None

    def _double_quotes(self, delimiter: str) -> None:
        """Where the first rows have a backslash before the quotes inside of a cell, read them as the doubled quotes
        that others write."""
        inside = re.compile(rf'[^\\]\\"(?!"|\s*(?:{re.escape(delimiter)}|$))')
        ahead: list[list[str | None]] = []
        while sum(map(len, ahead)) < FIRST_ROWS and (lines := next(self._lists, None)) is not None:
            ahead.append(lines)
        self._lists = chain(ahead, self._lists)
        if any(text is not None and inside.search(text) for text in islice(chain(*ahead), FIRST_ROWS)):
            self._lists = ([text and DOUBLED(text) for text in lines] for lines in self._lists)

    def _text_of(self, cells: list[str]) -> str | BadRow:
        n = len(self._columns)
        if len(cells) <= max(self._read):
            return BadRow("it has too few columns")
        if len(cells) > n and any(map(str.strip, cells[n:])):
            return BadRow(f"it has {counted(len(cells), 'column')}, the header {n}")
        if self._n_rows < FIRST_ROWS:
            numbers = {i for i, cell in enumerate(cells[:n]) if i not in self._read and cell.strip().isdecimal()}
            self._numbers = self._numbers & numbers if self._n_rows else numbers
            self._n_rows += 1
        return self._take(cells)

    def _alone(self, line: str) -> str | BadRow:
        """The text of a row whose quotes make no sense, by its first line alone."""
        if not self._quoted:
            return self._text_of(line.rstrip("\r").split(self._how["delimiter"]))
        rows = csv.reader([line, ""], **self._how)
        try:
            cells = next(rows)
        except csv.Error as error:
            return BadRow(str(error))
        return self._text_of(cells) if rows.line_num == 1 else BadRow("its quote is not closed before other rows begin")

    def _swallowed(self) -> bool:
        """Whether the lines that one row goes on for are rows of their own."""
        texts = [text for _, text in self._taken[1:]]
        n = len(self._columns)
        if n < 2 or len(texts) < (LIKE_ROWS_WITH_NUMBERS if self._numbers else LIKE_ROWS):
            return False
        rows = (text.split(self._how["delimiter"]) for text in texts)
        return all(len(cells) == n and all(cells[i].strip().isdecimal() for i in self._numbers) for cells in rows)


def _line_lists(blocks: Iterable[str], limit: int) -> Iterator[list[str | None]]:
    """Lines, which end with a line feed, or with a carriage return where there is no line feed at first."""
    parts = iter(blocks)
    head = ""
    for block in parts:
        head += block
        if "\n" in head or "\r" in head[:-1] or len(head) > limit:
            break
    end = "\r" if "\r" in head and "\n" not in head else "\n"
    return line_lists(chain([head], parts), limit, end)


def _names(header: str, delimiter: str) -> list[str]:
    """The names in a header, without the blanks around them."""
    try:
        return [cell.strip(" \t\r\ufeff") for cell in next(csv.reader([header], delimiter=delimiter), [])]
    except csv.Error:  # no header can look like that
        return []


def _no_column(header: str, names: list[str], key: str, name: str, option: str) -> DataError:
    """Why a table has no column `key`, which `option` names, and what mends that."""
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
    if any(cell.replace(".", "", 1).isdecimal() for cell in names):
        return DataError(
            f"{name} has no column {key!r}: its first line is no header but {found[:200]}",
            fix="write the names of its columns in a line above",
        )
    likely = next((each for each in names if each.casefold() == key.casefold()), None)
    fix = (
        f"{'add' if option == '--text-key' else 'take'} {option} {quoted(likely)}"
        if likely
        else f"name one with {option}"
    )
    return DataError(f"{name} has no column {key!r} but {found[:200]}", fix=fix)
