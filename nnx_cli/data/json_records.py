"""JSON: a record a line, one array of records, or an object that holds such an array. One document a record."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from typing import Any

from nnx_cli.data.conversations import Pair, conversation_in
from nnx_cli.data.formats import BadRow, first_name, leaves, likely_key, lines, text_of
from nnx_cli.errors import DataError, quoted
from nnx_cli.system.text import well_formed

BLANKS = " \t\r\n"
SPACE = re.compile(f"[{BLANKS}]*")
BETWEEN_RECORDS = re.compile(r"\}\s*,?\s*(?=\{)")
CUT_SHORT = 16  # characters before the end of what is there: an error so near may be mended by more
OBJECT_CHARS = 2**20  # a longer object is read field by field
DECODER = json.JSONDecoder(strict=False)  # a line break or tab in a text is a mistake that many make
NAMED = 10  # fields in a message


def jsonl_rows(blocks: Iterable[str], key: str | Pair, limit: int) -> Iterator[tuple[int, str | BadRow]]:
    """(line number, text) of every line that is not blank."""
    for number, line in enumerate(lines(blocks, limit), 1):
        if line is None:
            yield number, _too_long(limit)
        elif line and not line.isspace():
            yield number, _line_text(line, key)


def json_rows(blocks: Iterable[str], key: str | Pair, limit: int, name: str) -> Iterator[tuple[int, str | BadRow]]:
    """(record number, text) of an array, of objects one after the other, or of the arrays in a single object.

    DataError where there is no record. Holds no more than one record, of at most `limit` characters.
    """
    scanner = _Scanner(blocks, limit)
    begins = scanner.peek()
    if scanner.take("["):
        yield from _records(scanner, key, closing="]")
        return
    if begins != "{":
        raise DataError(f"{name} is not JSON" if begins else f"no text in {name}: empty")
    try:
        record = scanner.value(OBJECT_CHARS)
    except _TooLong:
        yield from _members(scanner, key, name)
    except _Unreadable:
        yield from _records(scanner, key)
    else:
        if _is_record(record, key) or scanner.peek():
            yield 1, _record_text(record, key)
            scanner.take(",")
            yield from _records(scanner, key, 2)
        else:
            yield from _members(_Scanner([json.dumps(record)], limit), key, name)


def _records(
    scanner: _Scanner, key: str | Pair, number: int = 1, closing: str = "", plain: bool = True
) -> Iterator[tuple[int, str | BadRow]]:
    """Records that follow each other, up to the end or what closes their list; texts are records too where `plain`."""
    while (following := scanner.peek()) != closing:
        if not following:
            yield number, BadRow("the file ends inside the list")
            return
        try:
            yield number, _record_text(scanner.value(), key, plain)
        except _Unreadable as error:
            yield number, BadRow(str(error))
            if not scanner.skip_broken():
                return
        number += 1
        scanner.take(",")
    scanner.take(closing)


def _members(scanner: _Scanner, key: str | Pair, name: str) -> Iterator[tuple[int, str | BadRow]]:
    """The records in one object: in the field that `key` begins with, else in any list with text at `key`, and in any
    object with text there."""
    number, fields, likely = 0, [], None
    try:
        scanner.take("{")
        while scanner.peek() not in ("", "}"):
            fields.append(str(scanner.value()))
            scanner.take(":")
            named = first_name(key, fields[-1:]) if isinstance(key, str) else None
            below = key if named is None else named[1]
            is_list = scanner.take("[")
            is_record = False
            if is_list:
                records = _records(scanner, below, closing="]", plain=named is not None)
            else:
                value = scanner.value()
                records, is_record = _texts_of(value, below), isinstance(value, dict) and _is_record(value, key)
            for _, text in records:
                if named is not None or ((is_list or is_record) and not isinstance(text, BadRow)):
                    number += 1
                    yield number, text
                elif isinstance(text, BadRow) and likely is None and (inner := likely_key(text.row)):
                    likely = f"{fields[-1]}.{inner}"
            scanner.take(",")
    except _Unreadable as error:
        raise DataError(f"{name} is damaged: in its field {fields[-1:]!r}, {error}") from error
    if not number:
        found = ", ".join(fields[:NAMED])[:200]
        field = key.prompt if isinstance(key, Pair) else key
        raise DataError(
            f"{name} is JSON without records: an object of {found}, no list with a field {field!r}",
            fix=f"add --text-key {quoted(likely)}" if likely else "name the field with the text: --text-key LIST.NAME",
        )
    scanner.take("}")
    yield from _records(scanner, key, number + 1)


def _texts_of(value: object, path: str | Pair) -> Iterator[tuple[int, str | BadRow]]:
    """The text at a path of a value; of an object of texts each of them, as pandas writes a column."""
    if isinstance(path, Pair):
        yield 1, _record_text(value, path)
        return
    column = value.values() if isinstance(value, dict) and not path else [text_of(list(leaves(value, path)))]
    for number, text in enumerate(column, 1):
        yield number, well_formed(text) if isinstance(text, str) else BadRow("it is not text")


def records_in(head: str, key: str | Pair) -> str | None:
    """ "records" or "lines" by the beginning of a text, where the first of them has text at `key`; else None."""
    start = head.lstrip(BLANKS)
    if not start.startswith("["):
        line = start.partition("\n")[0]
        return "lines" if line.startswith("{") and not isinstance(_line_text(line, key), BadRow) else None
    try:
        record = _Scanner([start[1:]], len(start)).value()
    except _Unreadable:
        return None
    return "records" if isinstance(record, dict) and _is_record(record, key) else None


def is_lines(head: str) -> bool:
    """Whether the first line of a text is a whole object, and more follows."""
    line, _, rest = head.lstrip(BLANKS).partition("\n")
    try:
        return bool(rest.strip()) and isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def _line_text(line: str, key: str | Pair) -> str | BadRow:
    try:
        record = _json_of(line)
    except (ValueError, RecursionError):
        return BadRow("it is not JSON")
    return _record_text(record, key)


def _json_of(line: str) -> Any:
    """The value in a line, with the control characters in its texts; marks of the beginning and of the end of a record
    do not matter. ValueError where it is not JSON."""
    line = line.strip(BLANKS)
    try:
        value, end = DECODER.raw_decode(line)
    except ValueError:
        end = -1
    return value if end == len(line) else DECODER.decode(line.strip("\x1e\ufeff," + BLANKS))


def _record_text(record: object, key: str | Pair, plain: bool = True) -> str | BadRow:
    """The text of a record: its field `key`, or the record itself where that is a text."""
    if not isinstance(record, dict):
        if isinstance(record, str) and plain and isinstance(key, str):
            return well_formed(record)
        return BadRow("it is not a JSON object")
    if isinstance(key, Pair):
        return conversation_in(record, key) or BadRow("it has no conversation")
    text = record.get(key)
    if not isinstance(text, str):
        text = text_of(list(leaves(record, key)))
    if text is None and (said := conversation_in(record, key)) is not None:
        return said
    if text is None:
        known = first_name(key, record) is not None
        bad = BadRow(f"its field {key!r} is not text" if known else f"it has no field {key!r}: see --text-key")
        bad.row = None if known else record
        return bad
    return text if text.isascii() else well_formed(text)


def _is_record(record: Any, key: str | Pair) -> bool:
    """Whether an object is a record, rather than one with a list of records."""
    if conversation_in(record, key) is not None and not isinstance(_record_text(record, key), BadRow):
        return True
    if isinstance(key, Pair):
        return False
    found = first_name(key, record)
    return (
        found is not None
        and isinstance(record[found[0]], (str, dict))
        and not isinstance(_record_text(record, key), BadRow)
    )


def _too_long(limit: int) -> BadRow:
    return BadRow(f"it has more than {limit >> 20} MiB")


class _Unreadable(Exception):
    """Says in a few words why a value cannot be read."""


class _TooLong(_Unreadable):
    """A value of more characters than may be held."""


class _Scanner:
    """Values of a JSON text, one at a time."""

    def __init__(self, blocks: Iterable[str], limit: int) -> None:
        self._blocks = iter(blocks)
        self._limit = limit
        self._text = ""
        self._at = 0

    def _more(self) -> bool:
        """Append the next block; False at the end."""
        block = next(self._blocks, "")
        self._text, self._at = self._text[self._at :] + block, 0
        return bool(block)

    def peek(self) -> str:
        """The next character that is no white space; empty at the end."""
        while True:
            match = SPACE.match(self._text, self._at)
            assert match is not None
            self._at = match.end()
            if self._at < len(self._text) or not self._more():
                return self._text[self._at : self._at + 1]

    def take(self, char: str) -> bool:
        """Step over `char` where it comes next."""
        found = self.peek() == char
        self._at += found
        return found

    def value(self, limit: int | None = None) -> Any:
        """The next value, of at most `limit` characters. Raises _Unreadable, and stays before it."""
        limit = limit or self._limit
        self.peek()
        while True:
            try:
                value, end = DECODER.raw_decode(self._text, self._at)
            except RecursionError as error:
                raise _Unreadable("it is nested too deeply") from error
            except json.JSONDecodeError as error:
                broken = error.pos < len(self._text) - CUT_SHORT and not error.msg.startswith("Unterminated")
                if not broken and len(self._text) - self._at > limit:
                    raise _TooLong(_too_long(limit)) from error
                if broken or not self._more():
                    raise _Unreadable("it is not JSON" if broken else "the file ends inside it") from error
                continue
            if end - self._at > limit:
                raise _TooLong(_too_long(limit))
            if end == len(self._text) and self._more():  # a number may go on
                continue
            self._at = end
            return value

    def skip_broken(self) -> bool:
        """Step to the record behind one that cannot be read; False where there is none."""
        self._at += 1
        while (found := BETWEEN_RECORDS.search(self._text, self._at)) is None:
            last = self._text.rfind("}", self._at)
            is_end = last >= 0 and not self._text[last + 1 :].strip(", " + BLANKS)
            self._at = last if is_end else len(self._text)
            if not self._more():
                return False
        self._at = found.end()
        return True
