"""Parquet tables: the text of one column, whatever type it is stored as and however deep it lies."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import cache, partial
from typing import TYPE_CHECKING, Any, BinaryIO

from nnx_cli.data.charset import TextReader
from nnx_cli.data.charset_guess import SAMPLE_BYTES, Guess, guess_encoding
from nnx_cli.data.compression import Stream, brief
from nnx_cli.data.conversations import MESSAGES, TEXT_KEY, Pair, conversation_in
from nnx_cli.data.formats import BadRow, first_name, leaves, likely_key, text_of
from nnx_cli.errors import DataError, MissingFeature, pip_install, quoted

if TYPE_CHECKING:
    from pyarrow import DataType, RecordBatch, Schema, StructType

BATCH_ROWS = 256  # decoded at a time
FIRST_ROWS = 16  # that tell where the text is
NAMED = 10  # columns in a message


class ParquetText:
    """The text at the dotted path `key` of every row of a table, or its conversation. After the last row: `n_replaced`
    (bytes), `guess`."""

    def __init__(
        self, file: BinaryIO, key: str | Pair, name: str, *, strict: bool, encoding: str | None = None
    ) -> None:
        self.n_replaced = 0
        self.guess: Guess | None = None  # of the encoding, where bytes were read that are not UTF-8
        self._encoding = encoding
        self._likely: Callable[[], Guess] | None = None  # the encoding of all rows around one that is not UTF-8
        self._file = file
        self._key = key
        self._name = name
        self._strict = strict
        self._padded = False  # with zero bytes, to a fixed size

    def rows(self) -> Iterator[tuple[int, str | BadRow]]:
        """(row number, text). DataError where the column is missing or holds no text."""
        try:
            import pyarrow as arrow
            import pyarrow.parquet as parquet
        except ImportError as error:
            raise MissingFeature(f"reading {self._name} needs pyarrow", fix=pip_install("nnx-cli[parquet]")) from error
        number = 0
        try:
            table = parquet.ParquetFile(self._file)
            if talking := self._conversation_columns(table.schema_arrow):
                for number, row in enumerate(_rows(table, talking), 1):
                    yield number, conversation_in(row, self._key) or BadRow(f"its column {MESSAGES!r} is empty")
                return
            assert isinstance(self._key, str)
            top, path, columns = self._column(table, self._key)
            for batch in table.iter_batches(batch_size=BATCH_ROWS, columns=columns, use_threads=False):
                rows = _values(batch, top)
                if self.guess is None:
                    self._likely = cache(partial(_guess, rows, path))
                for row in rows:
                    number += 1
                    yield number, self._text(row, path)
        except (arrow.ArrowException, OSError) as error:
            raise DataError(f"{self._name} is damaged: {brief(error)}") from error

    def _conversation_columns(self, schema: Schema) -> list[str]:
        """The columns that hold conversations; none where the text at `key` is wanted. DataError where they are not
        there."""
        if isinstance(self._key, str):
            plain = _type_at(schema, self._key) is not None or self._key != TEXT_KEY
            return [] if plain or MESSAGES not in schema.names else [MESSAGES]
        found = [first_name(key, schema.names) for key in (self._key.prompt, self._key.answer)]
        for key, name in zip((self._key.prompt, self._key.answer), found, strict=True):
            if name is None:
                raise DataError(f"{self._name} has no column {key!r} but {', '.join(schema.names[:NAMED])}")
        return sorted({name[0] for name in found if name is not None})

    def _column(self, table: Any, key: str) -> tuple[str, str, list[str]]:
        """The column of the schema that `key` begins with, the path from there, and the stored columns to read."""
        schema = table.schema_arrow
        texts = _text_paths(schema)
        hint = f"; text is in {', '.join(texts[:NAMED])}" if texts else "; nothing in it is text"
        kind = _type_at(schema, key)
        fix = f"add --text-key {quoted(_fullest(table, texts))}" if texts and not (kind and _is_text(kind)) else None
        if kind is None:
            raise DataError(f"{self._name} has no column {key!r}{hint[:200]}", fix=fix)
        if not _is_text(kind):
            raise DataError(f"the column {key!r} of {self._name} holds {kind}, not text{hint[:200]}", fix=fix)
        self._padded = _is_padded(kind)
        top, path = first_name(key, schema.names) or (key, "")
        last = f".{path.rpartition('.')[2]}." if path else "."
        stored = (table.schema.column(i).path for i in range(len(table.schema)))
        return top, path, [name for name in stored if name == top or name.startswith(f"{top}.") and last in f"{name}."]

    def _text(self, row: Any, path: str) -> str | BadRow:
        values = [self._decoded(value) if isinstance(value, bytes) else value for value in leaves(row, path)]
        bad = next((value for value in values if isinstance(value, BadRow)), None)
        text = text_of(values)
        return bad or (BadRow(f"its column {self._key!r} is empty") if text is None else text)

    def _decoded(self, value: bytes) -> str | BadRow:
        if self._padded:
            value = value.rstrip(b"\0")
        if self._encoding is None and _is_utf8(value) and b"\0" not in value:
            return value.decode("utf-8-sig")
        reader = TextReader(
            Stream(io.BytesIO(value), f"its column {self._key!r}"),
            strict=self._strict,
            encoding=self._encoding,
            likely=self._likely,
        )
        try:
            text = "".join(reader)
        except DataError as error:
            return BadRow(str(error))
        self.n_replaced += reader.n_replaced
        self.guess = self.guess or reader.guess
        return text


def _rows(table: Any, columns: list[str]) -> Iterator[dict[str, Any]]:
    """What rows have in some columns."""
    for batch in table.iter_batches(batch_size=BATCH_ROWS, columns=columns, use_threads=False):
        for row in zip(*(_values(batch, name) for name in columns), strict=True):
            yield dict(zip(columns, row, strict=True))


def _fullest(table: Any, texts: list[str]) -> str:
    """Which of the paths to text has most of it in the first rows, as far as these are strings."""
    tops = [name for name in table.schema_arrow.names if any(f"{path}.".startswith(f"{name}.") for path in texts)]
    rows = next(table.iter_batches(batch_size=FIRST_ROWS, columns=tops), None)
    key = None
    with suppress(UnicodeDecodeError):
        key = likely_key(rows.to_pylist()) if rows is not None else None
    return key if key in texts else texts[0]


def _guess(rows: list[Any], path: str) -> Guess:
    """The encoding of all values that are not UTF-8: one alone may be short."""
    values = (value for row in rows for value in leaves(row, path) if isinstance(value, bytes))
    return guess_encoding(b"\n".join(value[:SAMPLE_BYTES] for value in values if not _is_utf8(value)))


def _is_utf8(value: bytes) -> bool:
    try:
        value.decode()
    except UnicodeDecodeError:
        return False
    return True


def _values(batch: RecordBatch, column: str) -> list[Any]:
    """A column as Python's own objects, with strings as bytes where one of them is not UTF-8."""
    values = batch.column(batch.schema.names.index(column))
    try:
        return values.to_pylist()
    except UnicodeDecodeError:
        return values.cast(_with_bytes(values.type)).to_pylist()


def _with_bytes(kind: DataType) -> DataType:
    """A type with bytes in place of strings."""
    import pyarrow as arrow

    if arrow.types.is_struct(kind):
        return arrow.struct([(field.name, _with_bytes(field.type)) for field in kind.fields])
    if _is_list(kind):
        return arrow.large_list(_with_bytes(kind.value_type))
    return arrow.large_binary() if _is_text(kind) else kind


def _type_at(fields: Schema | StructType, path: str) -> DataType | None:
    """The type at a dotted path, that of the items where it is a list."""
    found = first_name(path, fields.names)
    if found is None:
        return None
    name, rest = found
    kind = next(_item_type(field.type) for field in fields if field.name == name)
    if not rest:
        return kind
    return _type_at(kind, rest) if _is_struct(kind) else None


def _text_paths(fields: Schema | StructType, before: str = "") -> list[str]:
    """Where text is, as dotted paths."""
    paths: list[str] = []
    for field in fields:
        kind, path = _item_type(field.type), before + field.name
        paths += [path] if _is_text(kind) else _text_paths(kind, path + ".") if _is_struct(kind) else []
    return paths


def _item_type(kind: DataType) -> DataType:
    while _is_list(kind):
        kind = kind.value_type
    return kind


def _is_list(kind: DataType) -> bool:
    from pyarrow import types

    tests = types.is_list, types.is_large_list, types.is_fixed_size_list, types.is_list_view, types.is_large_list_view
    return any(test(kind) for test in tests)


def _is_struct(kind: DataType) -> bool:
    from pyarrow import types

    return types.is_struct(kind)


def _is_padded(kind: DataType) -> bool:
    from pyarrow import types

    return types.is_fixed_size_binary(kind.value_type if types.is_dictionary(kind) else kind)


def _is_text(kind: DataType) -> bool:
    from pyarrow import BaseExtensionType, types

    if types.is_dictionary(kind):
        return _is_text(kind.value_type)
    strings = types.is_string, types.is_large_string, types.is_string_view
    if isinstance(kind, BaseExtensionType):  # JSON, but no UUID
        return any(test(kind.storage_type) for test in strings)
    binary = types.is_binary, types.is_large_binary, types.is_binary_view, types.is_fixed_size_binary
    return any(test(kind) for test in (*strings, *binary))
