"""What stands between the documents of one text: a line `<|endoftext|>` or its like, or what the user says."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from itertools import chain
from typing import NamedTuple

from nnx_cli.errors import counted, quoted

MARKER = re.compile(r"(end[-_]?of[-_]?(text|doc|document|story|file)|eo[stdf])", re.IGNORECASE)  # inside <| and |>
MAX_LINE_CHARS = 64  # of a line with a marker, blanks and all
MAX_HOPS = 500  # from | to |, and then from > to >, in a block; where there are more of both, "|>" is searched for


class Piece(NamedTuple):
    """A stretch of one document; `ends` with its last one (whose text may be empty)."""

    text: str
    ends: bool


class Documents:
    """Cuts texts into documents where `separator` stands, or else at lines that hold nothing but an end-of-text marker.

    Counts separators (`n_found`), and markers that stand in lines with other words (`n_inside`).
    """

    def __init__(self, separator: str | None) -> None:
        self.n_found = self.n_inside = 0
        self.marker = ""  # as it is written, the first time
        self.by_markers = separator is None
        self._text = separator
        self._separator = None if separator is None else _pattern(separator)
        self._reach = MAX_LINE_CHARS if separator is None else len(separator) + separator.count("\n") + 2
        self._after_separator = False
        self._at_line_start = True

    def pieces(self, blocks: Iterable[str]) -> Iterator[Piece]:
        """The documents of one text, in pieces of at most a block."""
        self._after_separator, self._at_line_start = False, True
        held = ""  # from the last block: what the next one decides on
        for block in chain(blocks, [None]):
            is_last = block is None
            text = block or ""
            if held and self._separator is None and not _may_be_marker(held + text[: self._reach]):  # spares a copy
                yield Piece(self._opened(held), False)
                self._at_line_start = False
            elif held:
                text = held + text
            at = 0
            for start, end in self._separators(text, is_last):
                self.n_found += 1
                yield Piece(self._opened(text[at:start]), True)
                self._after_separator, at = True, end
            keep = len(text) if is_last else max(at, self._undecided(text))
            if keep > at:
                yield Piece(self._opened(text[at:keep]), False)
            held = text[keep:]
            self._at_line_start = text[keep - 1] == "\n" if keep else self._at_line_start
        yield Piece("", True)

    def notes(self, name: str) -> list[str]:
        """What the user should know of the file `name`, once all is read."""
        if not self.by_markers:
            return [] if self.n_found else [f"{name}: no {self._text!r} in it separates documents"]
        notes = []
        if self.n_found:
            notes.append(
                f"{name}: documents end at {counted(self.n_found, 'line')} {self.marker}; --separator TEXT: another"
            )
        if self.n_inside:
            how = f"--separator {quoted(self.marker)} lets it end documents"
            notes.append(
                f"{name}: {self.marker} beside other words stays text, {counted(self.n_inside, 'time')}; {how}"
            )
        return notes

    def _opened(self, text: str) -> str:
        """A part of a document, without the empty lines between a separator and its first word."""
        if self._after_separator:
            text = text.lstrip("\r\n")
            self._after_separator = not text
        return text

    def _separators(self, text: str, is_last: bool) -> Iterator[tuple[int, int]]:
        """Beginning and end of each separator in a text that another block may follow."""
        if self._separator is None:
            yield from self._marker_lines(text, is_last)
            return
        for found in self._separator.finditer(text):
            if is_last or found.end() < len(text) - 1:  # else a line break may follow that belongs to it
                yield found.span()

    def _marker_lines(self, text: str, is_last: bool) -> Iterator[tuple[int, int]]:
        for close in _closing_marks(text):
            start = text.rfind("<|", max(0, close - MAX_LINE_CHARS), close)
            if start < 0 or not MARKER.fullmatch(text, start + 2, close):
                continue
            self.marker = self.marker or text[start : close + 2]
            begin, end = text.rfind("\n", 0, start) + 1, text.find("\n", close) + 1
            line = text[begin : end or len(text)]
            if line.strip() == text[start : close + 2] and (begin or self._at_line_start):
                if end or is_last:
                    yield begin, end or len(text)
            else:
                self.n_inside += 1

    def _undecided(self, text: str) -> int:
        """Where the part of a text begins that may belong to a separator in the next block."""
        if self._separator is not None:
            return len(text) - self._reach - 2
        begin = text.rfind("\n") + 1
        may_be = len(text) - begin <= self._reach and _may_be_marker(text[begin:])
        return begin if may_be and (begin or self._at_line_start) else len(text)


def _pattern(separator: str) -> re.Pattern[str]:
    """A separator as it may be written on any system, and the line break behind it."""
    return re.compile(re.escape(separator).replace("\\\n", "\r?\n") + ("" if separator.endswith("\n") else "(\r?\n)?"))


def _may_be_marker(line: str) -> bool:
    """Whether a line that begins like this may hold a marker."""
    start = line.lstrip(" \t")[:2]
    return start in ("", "<", "<|")


def _closing_marks(text: str) -> Iterator[int]:
    """Where "|>" is. A single character is found at the speed of memory, two of them are not."""
    start = 0
    for char, place in (("|", 0), (">", 1)):
        for _ in range(MAX_HOPS):
            at = text.find(char, start + place) - place
            if at < 0:
                return
            if text.startswith("|>", at):
                yield at
            start = at + 1
    while (at := text.find("|>", start)) >= 0:
        yield at
        start = at + 1
