"""Formats of text files by their suffixes, and what those with rows share: lines, paths of fields, bad rows."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Container, Iterable, Iterator
from itertools import chain

FORMATS = (".txt", ".md", ".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet")
COMPRESSIONS = (".gz", ".bz2", ".xz", ".zst", ".zip")
MAX_FIELDS = 1000  # of a row that are looked at in search of its text
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
    """Why a row gives no document; `row` is what it holds, where it may have text in another field."""

    row: object = None


def lines(blocks: Iterable[str], limit: int, end: str = "\n") -> Iterator[str | None]:
    """Lines without their `end`; None for one longer than `limit` characters, which is never held."""
    return chain.from_iterable(line_lists(blocks, limit, end))


def line_lists(blocks: Iterable[str], limit: int, end: str = "\n") -> Iterator[list[str | None]]:
    """The same lines, those that end in a block at a time."""
    start: list[str] = []
    length = 0
    for block in blocks:
        first, *rest = block.split(end)
        length += len(first)
        if length <= limit:
            start.append(first)
        else:
            start = []
        if rest:
            last = rest.pop()
            whole = rest if len(block) <= limit else [line if len(line) <= limit else None for line in rest]
            yield ["".join(start) if length <= limit else None, *whole]
            start, length = [last], len(last)
    if length:
        yield ["".join(start) if length <= limit else None]


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


def likely_key(row: object) -> str | None:
    """The dotted path to most of the text in a row; None where there is none."""
    n_chars: Counter[str] = Counter()
    waiting = [("", row)]
    for _ in range(MAX_FIELDS):
        if not waiting:
            break
        path, value = waiting.pop()
        if isinstance(value, str):
            n_chars[path] += len(value)
        elif isinstance(value, list):
            waiting += [(path, item) for item in value]
        elif isinstance(value, dict):
            waiting += [(f"{path}.{name}" if path else name, inner) for name, inner in value.items()]
    return max(n_chars, key=lambda path: n_chars[path], default=None)


def text_of(values: list[object]) -> str | None:
    """One text of several, joined by newlines; None where there is none, or something else."""
    texts = [value for value in values if isinstance(value, str)]
    return "\n".join(texts) if texts and len(texts) == sum(value is not None for value in values) else None
