"""Text in every type of column that holds it."""

import gzip
import io
import random
import sys

import pytest

from nnx_cli.config import PrepareConfig
from nnx_cli.data.prepare import prepare
from nnx_cli.data.sources import Reader, Report, Source
from nnx_cli.errors import DataError, MissingFeature

try:
    import pyarrow as arrow
    import pyarrow.parquet as parquet
except ImportError:
    arrow = None

needs_pyarrow = pytest.mark.skipif(arrow is None, reason="needs the extra nnx-cli[parquet]")
TEXTS = ["one", "zwei ü", None, "", "三" * 50, "one"]
ROWS = ["one", "zwei ü", "", "三" * 50, "one"]


def read(content: bytes, key="text", **options) -> tuple[list[str], Report]:
    """The documents of a table, and what was noted."""
    report = Report()
    pieces = list(Reader(key, **options).pieces([Source("t.parquet", content=content)], report))
    assert all(piece.ends for piece in pieces)
    return [piece.text for piece in pieces], report


def refusal(content: bytes, key="text", **options) -> DataError:
    with pytest.raises(DataError) as error:
        read(content, key, **options)
    return error.value


def table(**options) -> bytes:
    """A table of columns by their names."""
    columns, buffer = options.pop("columns", options), io.BytesIO()
    parquet.write_table(arrow.table(columns), buffer)
    return buffer.getvalue()


def types() -> dict:
    if arrow is None:
        return {}
    return {
        "string": arrow.string(),
        "large string": arrow.large_string(),
        "string view": arrow.string_view(),
        "bytes": arrow.binary(),
        "large bytes": arrow.large_binary(),
        "view of bytes": arrow.binary_view(),
        "category": arrow.dictionary(arrow.int8(), arrow.string()),
        "ordered category": arrow.dictionary(arrow.int32(), arrow.large_string(), ordered=True),
        "category of bytes": arrow.dictionary(arrow.int16(), arrow.binary()),
    }


@needs_pyarrow
@pytest.mark.parametrize("kind", types())
@pytest.mark.parametrize("n", [1, 200])
def test_types_of_text(kind, n):
    content = table(n=list(range(6 * n)), text=arrow.array(TEXTS * n, type=types()[kind]))
    documents, report = read(content)
    assert documents == ROWS * n
    assert report.n_skipped_rows == n and "row 3: its column 'text' is empty" in report.notes[0]
    assert "row 3" in str(refusal(content, strict=True))


@needs_pyarrow
@pytest.mark.parametrize("kind", types())
@pytest.mark.parametrize("outer", ["list_", "large_list", "list_view", "struct", "list of structs", "list of lists"])
def test_nested_text(kind, outer):
    inner = types()[kind]
    person = arrow.struct([("role", arrow.string()), ("content", inner)])
    rows, key, kind = {
        "struct": ([{"content": "hi"}, None, {"role": "x"}, {"content": "ho"}], "text.content", person),
        "list of structs": (
            [[{"content": "a"}, {"role": "x"}, {"content": "b"}], None, [], [{"content": "c"}]],
            "text.content",
            arrow.list_(person),
        ),
        "list of lists": ([[["a"], [], ["b", None]], None, [[]], [["c"]]], "text", arrow.list_(arrow.list_(inner))),
    }.get(outer) or ([["a", None, "b"], None, [], ["c"]], "text", getattr(arrow, outer)(inner))
    try:
        content = table(n=[1, 2, 3, 4], text=arrow.array(rows, type=kind))
    except arrow.ArrowNotImplementedError as error:
        pytest.skip(f"pyarrow cannot write it: {error}")
    documents, report = read(content, key)
    assert documents == (["hi", "ho"] if outer == "struct" else ["a\nb", "c"])
    assert report.n_skipped_rows == 2 and report.n_replaced_bytes == 0


@needs_pyarrow
def test_fixed_size_bytes_are_padded():
    texts = arrow.array([b"ab\0\0", b"abcd", "ü".encode() + b"\0\0", None], type=arrow.binary(4))
    assert read(table(text=texts))[0] == ["ab", "abcd", "ü"]


@needs_pyarrow
def test_names_with_dots():
    content = table(
        columns={
            "a.b": ["top", "level"],
            "a": [{"b": "nested", "c.d": ["x"], "e": [{"f.g": "y"}]}, {"b": "values", "c.d": ["z"], "e": []}],
            "a.b.c": [1, 2],
        }
    )
    assert read(content, "a.b")[0] == ["top", "level"]
    assert read(content, "a.c.d")[0] == ["x", "z"]
    assert read(content, "a.e.f.g")[0] == ["y"]
    assert "holds int64, not text" in str(refusal(content, "a.b.c"))


@needs_pyarrow
def test_json_text_and_two_columns_of_a_name():
    assert read(table(text=arrow.array(['{"a": 1}'], type=arrow.json_())))[0] == ['{"a": 1}']
    buffer = io.BytesIO()
    parquet.write_table(arrow.Table.from_arrays([arrow.array(["a"]), arrow.array(["b"])], ["text", "text"]), buffer)
    assert "no column" in str(refusal(buffer.getvalue(), "body"))
    assert read(buffer.getvalue())[0] == ["a"]


@needs_pyarrow
def test_what_is_no_text_is_refused_with_the_columns_that_are():
    columns = {
        "id": [1],
        "price": arrow.array([1], type=arrow.decimal128(5, 2)),
        "when": arrow.array([0], type=arrow.timestamp("s")),
        "uuid": arrow.array([bytes(16)], type=arrow.uuid()),
        "flag": [True],
        "none": arrow.array([None], type=arrow.null()),
        "vector": [[1.5]],
        "map": arrow.array([[("k", "v")]], type=arrow.map_(arrow.string(), arrow.string())),
        "turns": [[{"who": 1, "said it": "hi"}]],
        "body": ["text"],
    }
    content = table(columns=columns)
    for name in ("id", "price", "when", "uuid", "flag", "none", "vector", "map", "turns", "turns.who"):
        error = refusal(content, name)
        assert "not text" in str(error) and "turns.said it, body" in str(error)
        assert error.fix == "add --text-key body"
    for name in ("text", "body.x", "turns.what", "id.x", "Body"):
        assert f"no column {name!r}; text is in turns.said it, body" in str(refusal(content, name))
    assert read(content, "turns.said it")[0] == ["hi"]
    columns = {name: columns[name] for name in ("id", "flag")}
    assert refusal(table(columns=columns)).fix is None


@needs_pyarrow
def test_bytes_are_decoded_like_a_file():
    values = [
        "\ufeffmarked".encode(),
        "groß\n".encode() * 20,
        "groß ".encode() * 50 + b"\xff",
        "naïve".encode("utf-16"),
    ]
    documents, report = read(table(text=arrow.array(values, type=arrow.binary())))
    assert documents == ["marked", "groß\n" * 20, "groß " * 50 + "\ufffd", "naïve"]
    assert report.n_replaced_bytes == 1 and "1 invalid byte" in report.notes[0]
    assert "row 3" in str(refusal(table(text=arrow.array(values, type=arrow.binary())), strict=True))


@needs_pyarrow
def test_short_values_tell_their_encoding_together():
    words = "да нет река мост яблоко дед хлеб Петь соль мы".split() * 60
    column = arrow.array([word.encode("cp1251") for word in words], type=arrow.binary())
    documents, report = read(table(text=column))
    assert documents == words and "read as cp1251 (confidence 9" in report.notes[0] and len(report.notes) == 1
    assert "row 1" in str(refusal(table(text=column), strict=True))


@needs_pyarrow
def test_bytes_that_are_no_text_are_skipped():
    images = [b"\x89PNG\r\n\x1a\n" + bytes(40), b"\x7fELF" + bytes(40), bytes(100)]
    documents, report = read(table(text=arrow.array([*images, b"text"], type=arrow.binary())))
    assert (
        documents == ["text"]
        and report.n_skipped_rows == 3
        and "row 1: its column 'text' is not text but a PNG" in (report.notes[0])
    )


@needs_pyarrow
@pytest.mark.parametrize("nested", [False, True])
def test_strings_that_are_not_utf8(nested):
    """Some writers do not look."""
    raw = arrow.array(["groß ".encode() * 50, b"b\xffd " + "groß ".encode() * 50, b"good"])
    texts = arrow.StringArray.from_buffers(3, *raw.buffers()[1:])
    column = (
        arrow.ListArray.from_arrays([0, 1, 2, 3], arrow.StructArray.from_arrays([texts], ["x"])) if nested else texts
    )
    documents, report = read(table(text=column), "text.x" if nested else "text")
    assert documents == ["groß " * 50, "b\ufffdd " + "groß " * 50, "good"] and report.n_replaced_bytes == 1


@needs_pyarrow
def test_only_the_column_is_read():
    """The bytes of another one may be damaged."""
    noise = random.Random(0).randbytes(500).hex()
    content = bytearray(table(turns=[[{"image": "secret" + noise, "text": "hi"}]], other=["mystery" + noise]))
    for damaged in (b"secret", b"mystery"):
        at = content.index(damaged)
        content[at - 20 : at + 40] = bytes(60)
    assert read(bytes(content), "turns.text")[0] == ["hi"]
    assert "damaged" in str(refusal(bytes(content), "other"))


@needs_pyarrow
def test_packed_and_damaged(tmp_path):
    content = table(text=TEXTS)
    assert read(gzip.compress(content), spool=tmp_path)[0] == ROWS
    assert "no column 'body'" in str(refusal(content, "body"))
    assert "damaged" in str(refusal(content[:-20]))
    assert "damaged" in str(refusal(b"no table"))


def test_missing_pyarrow_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(MissingFeature) as error:
        read(b"PAR1 and more")
    assert "nnx-cli[parquet]" in error.value.fix


@needs_pyarrow
@pytest.mark.parametrize(
    ("row", "key"),
    [
        ({"turns": [{"role": "user", "content": "a long question"}, {"role": "me", "content": "no"}]}, "turns.content"),
        ({"title": "short", "body": "much longer than that"}, "body"),
        ({"id": "17", "page": {"url": "x.org", "html": "<p>words and words</p>"}}, "page.html"),
        ({"n": 3, "raw": b"bytes"}, "raw"),
        ({"title": "short", "said it": "much longer than that"}, "'said it'"),
    ],
)
def test_the_column_with_most_of_the_text_is_named(tmp_path, row, key):
    parquet.write_table(arrow.Table.from_pylist([row] * 30), tmp_path / "a.parquet")
    with pytest.raises(DataError) as error:
        prepare([tmp_path / "a.parquet"], tmp_path / "made", PrepareConfig())
    assert error.value.fix == f"add --text-key {key}"
