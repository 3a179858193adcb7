"""Files of text, whatever their format, compression and encoding: a stream of text with the ends of documents."""

from __future__ import annotations

import io
import os
import stat
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO

from nnx_cli.data import archives, formats
from nnx_cli.data.charset import LFS_POINTER, TextReader, guess_note
from nnx_cli.data.compression import BLOCK_BYTES, Bomb, Stream, unpack
from nnx_cli.data.conversations import TEXT_KEY, Conversation, Pair
from nnx_cli.data.delimited import Table
from nnx_cli.data.formats import FORMATS, format_of
from nnx_cli.data.json_records import is_lines, json_rows, jsonl_rows, records_in
from nnx_cli.data.parquet import ParquetText
from nnx_cli.data.separators import Documents, Piece
from nnx_cli.errors import DataError, counted, quoted
from nnx_cli.system.files import why_not_opened
from nnx_cli.system.streams import standard_input
from nnx_cli.system.text import well_formed

ROW_CHARS = 16 * 2**20  # longest row of a table or JSON lines
MAX_NOTES = 20
CHECKED_BYTES = 4 * 2**20  # of a file in an archive that are unpacked before any of it is used


@dataclass(frozen=True)
class Source:
    """A file to read, or standard input (`path` None), or text in memory (`content`)."""

    name: str  # as the user wrote it, for messages
    path: Path | None = None
    content: bytes | None = None
    of_many: bool = False  # found in a folder or by a glob: left out where it cannot be read

    @property
    def label(self) -> str:
        """How meta.json names it: without the folders of this machine."""
        path = os.fspath(self.path or "")
        if os.path.isabs(path) or os.pardir in path.split(os.sep):
            return well_formed(os.path.basename(path))
        return well_formed(self.name)

    @property
    def repeatable(self) -> bool:
        """Whether it can be read twice."""
        return self.content is not None or _status(self.path) is not None

    @property
    def size(self) -> int | None:
        """Bytes as stored; None where only reading tells."""
        if self.content is not None:
            return len(self.content)
        status = _status(self.path)
        return None if status is None else status.st_size

    def open(self) -> Stream:
        """Its bytes as stored. DataError where it cannot be opened."""
        if self.content is not None:
            return Stream(io.BytesIO(self.content), self.name)
        if self.path is None:
            return Stream(standard_input(), self.name)
        try:
            if stat.S_ISCHR(os.stat(self.path).st_mode) and str(self.path) != os.devnull and not _is_input(self.path):
                raise DataError(f"{self.name} is a device, which has no end")
            return Stream(open(self.path, "rb", buffering=0), self.name, path=self.path if self.repeatable else None)
        except (OSError, ValueError) as error:
            raise DataError(f"cannot read {self.name}: {why_not_opened(error)}") from error


@dataclass
class Report:
    """What reading found: for meta.json and for the notes at the end."""

    sources: list[dict[str, Any]] = field(default_factory=list)  # name, bytes, sha256
    n_replaced_bytes: int = 0
    n_skipped_rows: int = 0
    first_skipped: str = ""  # which rows, and why
    fix: str | None = None  # what would have them read
    n_bytes_read: int = 0  # of the files as stored
    notes: list[str] = field(default_factory=list)  # the first of them
    n_notes: int = 0

    def note(self, text: str) -> None:
        """Remember what the user should know, but not of ten thousand files."""
        self.n_notes += 1
        if len(self.notes) < MAX_NOTES:
            self.notes.append(text)


@dataclass
class _Many:
    """Files, not all of which need to be readable."""

    n_read: int = 0
    first_error: DataError | None = None

    def refuse_none(self, why: str = "") -> None:
        """Raise DataError where none was read."""
        if not self.n_read and (self.first_error or why):
            raise self.first_error or DataError(why)


@dataclass(frozen=True)
class Reader:
    """Reads sources as text. `key` is the field of rows with the text, or the two that are a conversation, `spool` the
    folder for what must be unpacked before it can be read."""

    key: str | Pair = TEXT_KEY
    strict: bool = False
    spool: Path | None = None
    on_bytes: Callable[[int], None] | None = None  # called with the bytes read so far
    encoding: str | None = None  # of text without a mark; None: found out
    separator: str | None = None  # of documents in a text; None: lines with an end-of-text marker

    def pieces(self, sources: Iterable[Source], report: Report) -> Iterator[Piece]:
        """All documents, in pieces of at most about 1 MiB (a row of a table: one piece)."""
        many = _Many()
        for source in sources:
            try:
                stream = source.open()
            except DataError as error:
                if self.strict or not source.of_many:
                    raise
                report.note(f"{error}; left out")
                many.first_error = many.first_error or error
                continue
            before, told = _state(source), -1
            with stream:
                for piece in self._one(
                    self._documents(stream, source.name, report), stream, many, report, source.of_many
                ):
                    yield piece
                    if self.on_bytes and stream.n_read != told:
                        told = stream.n_read
                        self.on_bytes(report.n_bytes_read + told)
                stream.drain()
            if _state(source) != before:
                raise DataError(f"{source.name} changed while it was read", fix="run the command again")
            report.n_bytes_read += stream.n_read
            digest = stream.sha256.hexdigest()
            report.sources.append({"name": source.label, "bytes": stream.n_read, "sha256": digest})
        many.refuse_none()

    def _documents(self, stored: Stream, name: str, report: Report, inside_archive: bool = False) -> Iterator[Piece]:
        stream = unpack(stored)
        head = stream.peek(CHECKED_BYTES if inside_archive else archives.HEAD_BYTES)
        kind = archives.kind_of(head[: archives.HEAD_BYTES], name)
        if kind and inside_archive:
            raise DataError(f"{name} is an archive inside an archive, which must be unpacked first")
        if kind == "zip":
            with self._seekable(stream) as file:
                yield from self._archive(archives.zip_members(file, name), stream, report)
        elif kind == "tar":
            yield from self._archive(archives.tar_members(stream), stream, report)
        elif head.startswith(b"PAR1"):
            with self._seekable(stream) as file:
                yield from self._parquet(
                    ParquetText(file, self.key, name, strict=self.strict, encoding=self.encoding), name, report
                )
        else:
            suffix = os.path.splitext(name.lower())[1]
            if suffix == ".zip" or format_of(name) == ".tar":
                raise DataError(
                    f"{name} is no archive, whatever its name says",
                    fix="look inside: it may be a web page saved under that name",
                )
            if suffix in formats.COMPRESSIONS and stream is stored:
                report.note(f"{name} is not compressed, whatever its name says: read as it is")
            yield from self._text(stream, name, report)

    def _archive(self, members: Iterator[archives.Member], stream: Stream, report: Report) -> Iterator[Piece]:
        """The text files of an archive. DataError where none can be read."""
        many = _Many()
        n_left_out, example = 0, ""
        for name, content in members:
            if content is None:
                n_left_out, example = n_left_out + 1, example or name
            else:
                yield from self._one(self._member(content, report), stream, many, report)
        many.refuse_none(f"{stream.name} holds no {' '.join(FORMATS)} file; documents must be saved as plain text")
        if n_left_out:
            left_out = f"{n_left_out:,}, such as {example}" if n_left_out > 1 else example
            report.note(f"{stream.name}: left out for being hidden or of no text format: {left_out}")

    def _member(self, content: Stream | DataError, report: Report) -> Iterator[Piece]:
        if isinstance(content, DataError):
            raise content
        with content:
            yield from self._documents(content, content.name, report, inside_archive=True)

    def _one(
        self, pieces: Iterator[Piece], outer: Stream, many: _Many, report: Report, optional: bool = True
    ) -> Iterator[Piece]:
        """The pieces of one file of many, where it is `optional`: up to where it cannot be read, which is noted."""
        n_chars, piece = 0, Piece("", True)
        try:
            for piece in pieces:
                yield piece
                n_chars += len(piece.text)
        except DataError as error:
            if self.strict or not optional or outer.failed or isinstance(error, Bomb):
                raise
            read = f"read as far as it goes: {counted(n_chars, 'character')}" if n_chars else "left out"
            report.note(f"{error}; {read}")
            many.first_error = many.first_error or error
            if n_chars == 0:
                return
            if not piece.ends:
                yield Piece("", True)
        many.n_read += 1

    def _parquet(self, table: ParquetText, name: str, report: Report) -> Iterator[Piece]:
        documents = Documents(self.separator)
        yield from self._rows(table.rows(), name, "row", documents, report)
        report.n_replaced_bytes += table.n_replaced
        if table.n_replaced:
            report.note(f"{name}: {counted(table.n_replaced, 'invalid byte')} became U+FFFD")
        if table.guess is not None:
            report.note(guess_note(name, table.guess))
        for note in documents.notes(name):
            report.note(note)

    def _text(self, stream: Stream, name: str, report: Report) -> Iterator[Piece]:
        reader = TextReader(stream, strict=self.strict, encoding=self.encoding)
        kind = format_of(name)
        if kind == ".parquet" and not stream.peek(len(LFS_POINTER)).startswith(LFS_POINTER):
            raise DataError(f"{name} is damaged: it does not begin like a parquet table")
        blocks = iter(reader)
        head = next(blocks, "")
        blocks = chain([head], blocks)
        documents = Documents(self.separator)
        if kind in (".csv", ".tsv"):
            table = Table(blocks, self.key, ROW_CHARS, name, quoted=kind == ".csv")
            yield from self._rows(table.rows(), name, "line", documents, report)
        elif (found := self._records(kind, head, name, report)) == "lines":
            yield from self._rows(jsonl_rows(blocks, self.key, ROW_CHARS), name, "line", documents, report)
        elif found == "records":
            yield from self._rows(json_rows(blocks, self.key, ROW_CHARS, name), name, "record", documents, report)
        else:
            yield from documents.pieces(blocks)
        report.n_replaced_bytes += reader.n_replaced
        for note in (*reader.notes, *documents.notes(name)):
            report.note(note)

    def _records(self, kind: str | None, head: str, name: str, report: Report) -> str | None:
        """How the records of a JSON file lie in it, "lines" or "records"; None for plain text."""
        if kind in (".jsonl", ".ndjson"):
            return "records" if head.lstrip().startswith("[") and not is_lines(head) else "lines"
        if kind == ".json":
            return "lines" if is_lines(head) else "records"
        found, field = records_in(head, self.key), self.key.prompt if isinstance(self.key, Pair) else self.key
        if found and kind is not None:
            report.note(f"{name}: read as plain text; named .json, the field {field!r} of its JSON is")
        elif found:
            report.note(f"{name}: read as JSON, for its field {field!r}; named .txt it is plain text")
        return None if kind else found

    def _rows(
        self,
        numbered: Iterator[tuple[int, str | formats.BadRow]],
        name: str,
        unit: str,
        documents: Documents,
        report: Report,
    ) -> Iterator[Piece]:
        skipped, first = 0, ""
        by_markers, talks = documents.by_markers, None
        for number, text in numbered:
            talk = isinstance(text, Conversation)
            if not isinstance(text, formats.BadRow):
                talks = talk if talks is None else talks  # as the first row is, so have to be all
                if talk is not talks:
                    odd = "a conversation among plain text" if talk else "plain text among conversations"
                    text = formats.BadRow(f"it is {odd}")
            if not isinstance(text, formats.BadRow):
                if talk or (by_markers and "|" not in text):
                    yield Piece(text, True)
                else:
                    yield from documents.pieces([text])
                continue
            if report.fix is None and (key := formats.likely_key(text.row)):
                report.fix = f"add --text-key {quoted(key)}"
            if self.strict:
                raise DataError(f"{name}, {unit} {number}: {text}", report.fix or "mend it, or take --errors replace")
            skipped += 1
            first = first or f"{unit} {number}: {text}"
        if skipped:
            report.n_skipped_rows += skipped
            where = "the first at" if skipped > 1 else "at"
            note = f"{name}: {counted(skipped, 'row')} skipped, {where} {first}"
            report.first_skipped = report.first_skipped or note
            report.note(note)

    @contextmanager
    def _seekable(self, stream: Stream) -> Iterator[BinaryIO]:
        """The stream as a file to jump around in; a temporary one where it is not stored so."""
        if stream.path:
            with open(stream.path, "rb") as stored:
                yield stored
            return
        with tempfile.TemporaryFile(dir=self.spool) as file:
            while block := stream.read(BLOCK_BYTES):
                file.write(block)
            file.seek(0)
            yield file


def _status(path: Path | None) -> os.stat_result | None:
    """Of a regular file; None for what is none, or is not there."""
    try:
        status = None if path is None else os.stat(path)
    except (OSError, ValueError):
        return None
    return status if status is not None and stat.S_ISREG(status.st_mode) else None


def _is_input(path: Path) -> bool:
    """Whether a device is where this process, or a person, types."""
    return os.path.realpath(path).startswith(("/dev/tty", "/dev/pts/", "/dev/con", "/dev/fd/", "/proc/self/fd/"))


def _state(source: Source) -> tuple[int, int] | None:
    """What changes when a file is written to; None for what is no regular file."""
    if source.path is None:
        return None
    try:
        status = os.stat(source.path)
    except OSError as error:
        raise DataError(f"cannot read {source.name}: {error.strerror}") from error
    return (status.st_size, status.st_mtime_ns) if stat.S_ISREG(status.st_mode) else None


def builtin_corpus() -> str:
    """The language documentation that Python ships, about 0.5 MB. DataError where this Python lacks it."""
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise DataError("this Python ships no documentation to train on", fix="name a text: --filepath FILE") from error
    return "\n\n".join(topics[name].strip("\n") for name in sorted(topics)) + "\n"
