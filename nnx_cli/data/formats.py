"""Formats of text files: told by their suffixes; tables and JSON lines give one document a row."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Container, Iterable, Iterator

from nnx_cli.errors import DataError
from nnx_cli.system.text import well_formed

FORMATS = (".txt", ".md", ".jsonl", ".csv", ".parquet")
COMPRESSIONS = (".gz", ".bz2", ".xz", ".zst", ".zip")
TARS = (".tar", ".tgz", ".tbz", ".tbz2", ".txz", ".tzst")


def format_of(name: str) -> str | None:
    """The known suffix of a file name below those of compression; ".zip", ".tar": an archive of whatever; or None."""
    stem, suffix = os.path.splitext(name.lower())
    while suffix in COMPRESSIONS:
        inner = os.path.splitext(stem)[1]
        if suffix == ".zip" and inner not in FORMATS + COMPRESSIONS + TARS:
            return suffix
        stem, suffix = os.path.splitext(stem)
    return ".tar" if suffix in TARS else suffix if suffix in FORMATS else None


class BadRow(str):
    """Why a row gives no document."""


def lines(blocks: Iterable[str], limit: int) -> Iterator[str | None]:
    """Lines without their newline; None for one longer than `limit` characters, which is never held."""
    start: list[str] = []
    length = 0
    for block in blocks:
        first, *rest = block.split("\n")
        length += len(first)
        if length <= limit:
            start.append(first)
        else:
            start = []
        for line in rest:
            yield "".join(start) if length <= limit else None
            start, length = [line], len(line)
    if length:
        yield "".join(start) if length <= limit else None


def jsonl_rows(blocks: Iterable[str], key: str, limit: int) -> Iterator[tuple[int, str | BadRow]]:
    """(line number, text) of every line that is not blank."""
    for number, line in enumerate(lines(blocks, limit), 1):
        if line is None:
            yield number, BadRow(f"it has more than {limit >> 20} MiB")
        elif line and not line.isspace():
            yield number, _json_text(line, key)


def _json_text(line: str, key: str) -> str | BadRow:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return BadRow("it is not JSON")
    if not isinstance(row, dict):
        return BadRow("it is not a JSON object")
    text = row.get(key)
    if not isinstance(text, str):
        text = text_of(list(leaves(row, key)))
    if text is None:
        known = first_name(key, row) is not None
        return BadRow(f"its field {key!r} is not text" if known else f"it has no field {key!r}: see --text-key")
    return text if text.isascii() else well_formed(text)


def leaves(value: object, path: str) -> Iterator[object]:
    """What stands at a dotted path of a row: in a list, that of every item; nothing where it is missing."""
    if isinstance(value, list):
        for item in value:
            yield from leaves(item, path)
    elif not path:
        yield value
    elif isinstance(value, dict) and (found := first_name(path, value)):
        name, rest = found
        yield from leaves(value[name], rest)


def first_name(path: str, names: Container[str]) -> tuple[str, str] | None:
    """The longest of `names` that a dotted path begins with, and the path behind it."""
    end = len(path)
    while end > 0:
        if path[:end] in names:
            return path[:end], path[end + 1 :]
        end = path.rfind(".", 0, end)
    return None


def text_of(values: list[object]) -> str | None:
    """One text of several, joined by newlines; None where there is none, or something else."""
    texts = [value for value in values if isinstance(value, str)]
    return "\n".join(texts) if texts and len(texts) == sum(value is not None for value in values) else None


def csv_rows(blocks: Iterable[str], key: str, limit: int, name: str) -> Iterator[tuple[int, str | BadRow]]:
    """(line number, text) of every row below the header. DataError where the header has no column `key`."""
    csv.field_size_limit(limit)
    ahead = lines(blocks, limit)
    header = next(ahead, None)
    if header is None:
        return
    delimiter = next((d for d in ",;\t" if key in _cells(header, d)), None)
    if delimiter is None:
        found = ", ".join(_cells(header, ",")[:10])
        raise DataError(f"{name} has no column {key!r} but {found[:200]}", fix="name one with --text-key")
    column = _cells(header, delimiter).index(key)
    too_long = []

    def kept() -> Iterator[str]:
        for number, line in enumerate(ahead, 2):
            if line is None:
                too_long.append(number)
            else:
                yield line + "\n"

    rows = csv.reader(kept(), delimiter=delimiter)
    while True:
        try:
            row = next(rows, None)
        except csv.Error as error:
            yield rows.line_num + 1, BadRow(str(error))
            continue
        if row is None:
            break
        if row:
            yield rows.line_num + 1, row[column] if column < len(row) else BadRow("it has too few columns")
    yield from ((number, BadRow(f"it has more than {limit >> 20} MiB")) for number in too_long)


def _cells(header: str, delimiter: str) -> list[str]:
    try:
        return next(csv.reader([header], delimiter=delimiter), [])
    except csv.Error:  # no header can look like that
        return []
