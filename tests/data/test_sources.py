import bz2
import gzip
import hashlib
import io
import json
import lzma
import os
import sys
import zipfile

import pytest

from nnx_cli.data import compression, formats, sources
from nnx_cli.data.find import find_sources
from nnx_cli.data.sources import Reader, Report, Source
from nnx_cli.errors import DataError, MissingFeature

TEXT = "One line.\nZwei Zeilen, größer.\r\n三行。\n"


def read(*paths, strict=False, text_key="text", spool=None) -> tuple[list[str], Report]:
    """All documents of some paths."""
    report, documents, parts = Report(), [], []
    for text, ends in Reader(text_key, strict, spool).pieces(find_sources(paths), report):
        parts.append(text)
        if ends:
            documents.append("".join(parts))
            parts = []
    assert not parts
    return documents, report


def refusal(*paths, **options) -> str:
    with pytest.raises(DataError) as error:
        read(*paths, **options)
    assert error.value.exit_code == 3
    return str(error.value)


@pytest.fixture
def text_file(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(TEXT.encode())
    return path


def test_standard_input(monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(gzip.compress(TEXT.encode()))))
    assert read("-")[0] == [TEXT]
    assert not sys.stdin.buffer.closed
    monkeypatch.setattr(sys, "stdin", None)
    assert "standard input is closed" in refusal("-")


# compression


def zstd(data: bytes) -> bytes:
    module = pytest.importorskip(
        "compression.zstd" if sys.version_info >= (3, 14) else "backports.zstd", reason="needs the extra nnx-cli[zstd]"
    )
    return module.compress(data)


@pytest.mark.parametrize("pack", [gzip.compress, bz2.compress, lzma.compress, zstd])
def test_compression_is_told_by_content(tmp_path, pack):
    path = tmp_path / "text"
    path.write_bytes(pack(TEXT.encode()))
    assert read(path)[0] == [TEXT]
    path.write_bytes(pack(TEXT.encode()) + pack(b"more"))
    assert read(path)[0] == [TEXT + "more"]
    path.write_bytes(gzip.compress(pack(TEXT.encode())))
    assert read(path)[0] == [TEXT]
    for damaged in (pack(TEXT.encode())[:-5], pack(TEXT.encode() * 50)[:40] + bytes(100)):
        path.write_bytes(damaged)
        assert "damaged" in refusal(path)


def test_a_dictionary_larger_than_memory_is_damage(tmp_path, monkeypatch):
    def read_in_no_memory(self, size=-1):
        raise MemoryError

    monkeypatch.setattr(lzma.LZMAFile, "read", read_in_no_memory)
    path = tmp_path / "a.txt.xz"
    path.write_bytes(lzma.compress(b"text"))
    assert refusal(path).endswith("a.txt.xz is damaged: unpacking it takes more memory than there is")


def test_gzip_in_gzip_in_gzip_is_refused(tmp_path):
    path = tmp_path / "a.txt.gz"
    path.write_bytes(gzip.compress(gzip.compress(gzip.compress(b"text"))))
    assert "compressed" in refusal(path)


@pytest.mark.parametrize("pack", [gzip.compress, bz2.compress, lzma.compress])
def test_bombs_are_refused_early(tmp_path, monkeypatch, pack):
    monkeypatch.setattr(compression, "BOMB_BYTES", 2**22)
    monkeypatch.setattr(compression, "BOMB_RATIO", 100)
    path = tmp_path / "bomb.txt.gz"
    path.write_bytes(pack(b"a" * 2**24))
    assert "unpacks to more than" in refusal(path)
    with zipfile.ZipFile(tmp_path / "bomb.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.txt", "a" * 2**24)
    assert "unpacks to more than" in refusal(tmp_path / "bomb.zip")


def test_missing_zstd_names_the_extra(tmp_path, monkeypatch):
    path = tmp_path / "a.txt.zst"
    path.write_bytes(b"\x28\xb5\x2f\xfd rest")
    monkeypatch.setitem(sys.modules, "backports", None)
    monkeypatch.setitem(sys.modules, "compression", None)
    with pytest.raises(MissingFeature) as error:
        read(path)
    assert error.value.exit_code == 7 and "nnx-cli[zstd]" in error.value.fix


# one file of many that cannot be read


@pytest.mark.parametrize(
    "content",
    [b"\x7fELF\x02\x01" + bytes(100), gzip.compress(b"text" * 99)[:-4], b"PAR1 no table"],
    ids=["program", "cut gzip", "no parquet"],
)
@pytest.mark.parametrize("paths", [["folder"], ["folder/*"], ["fold*"], ["folder/*", "folder"]])
def test_a_file_of_a_folder_that_cannot_be_read_is_left_out(tmp_path, monkeypatch, content, paths):
    pytest.importorskip("pyarrow", reason="needs the extra nnx-cli[parquet]")
    monkeypatch.chdir(tmp_path)
    os.mkdir("folder")
    for name, text in (("a.txt", b"one"), ("b.txt", content), ("c.txt", b"three")):
        (tmp_path / "folder" / name).write_bytes(text)
    documents, report = read(*paths)
    assert documents == ["one", "three"] and report.notes[0].startswith(os.path.join("folder", "b.txt"))
    assert report.notes[0].endswith("; left out") and len(report.sources) == 3
    assert "b.txt" in refusal(*paths, strict=True)
    assert "b.txt" in refusal("folder/a.txt", "folder/b.txt")  # where it was named itself
    for name in ("a.txt", "c.txt"):
        os.remove(f"folder/{name}")
    assert "b.txt" in refusal(*paths)


# encodings


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32", "cp1252"])
@pytest.mark.parametrize("long", [False, True])
def test_encodings(tmp_path, encoding, long):
    text = "Größe, naïve façade — “quoted”.\r\n" * (40_000 if long else 3)
    path = tmp_path / "a.txt"
    path.write_bytes(text.encode(encoding))
    documents, report = read(path)
    assert documents == [text]
    assert bool(report.notes) is (encoding in ("utf-16-le", "utf-16-be", "cp1252"))
    if encoding == "cp1252":
        assert "at offset 2" in refusal(path, strict=True)
    else:
        assert read(path, strict=True)[0] == [text]


def test_character_on_the_border_of_blocks(tmp_path):
    path = tmp_path / "a.txt"
    text = "a" * (compression.BLOCK_BYTES - 1) + "é我\U0001f600" * 1000
    path.write_bytes(text.encode())
    assert read(path)[0] == [text]


@pytest.mark.parametrize(
    ("damage", "n_bytes", "marks"),
    [(b"\xff", 1, 1), (b"\xc0\xaf", 2, 2), (b"\xed\xa0\x80", 3, 3), (b"\xe6\x88", 2, 1), ("\ufffd".encode(), 0, 1)],
)
@pytest.mark.parametrize("before", [10, compression.BLOCK_BYTES - 1, compression.BLOCK_BYTES + 5])
def test_invalid_bytes_are_counted_or_refused(tmp_path, damage, n_bytes, marks, before):
    good = "é我é我é我" + "x" * before
    path = tmp_path / "a.txt"
    path.write_bytes(good.encode() + damage + b"end")
    documents, report = read(path)
    assert documents == [good + "\ufffd" * marks + "end"]
    assert report.n_replaced_bytes == n_bytes
    if n_bytes:
        assert f"at offset {len(good.encode())}" in refusal(path, strict=True)


def test_truncated_at_the_end(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes("ééé我".encode()[:-1])
    assert read(path)[0] == ["ééé\ufffd"]
    assert "offset 6" in refusal(path, strict=True)


@pytest.mark.parametrize(
    "content",
    [b"\x7fELF\x02\x01" + bytes(100), b"\x89PNG\r\n\x1a\n\x00", bytes(1000), bytes(range(256)) * 10, b"text\x00" * 50],
)
def test_binary_is_refused(tmp_path, content):
    path = tmp_path / "a.txt"
    path.write_bytes(content)
    assert str(path) in refusal(path)


def test_long_line_is_streamed(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"x" * 5 * 2**20)
    sizes = [len(piece.text) for piece in Reader().pieces(find_sources([path]), Report())]
    assert sum(sizes) == 5 * 2**20 and max(sizes) <= compression.BLOCK_BYTES


# rows


def test_jsonl(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(
        b'{"text": "one\\ntwo"}\r\n\n{"text": "\\ud83d\\ude00 \\ud800", "n": NaN}\n{"text": ""}\n{"text": "last"}'
    )
    assert read(path)[0] == ["one\ntwo", "😀 \ufffd", "", "last"]


@pytest.mark.parametrize(
    "row",
    [
        b"{",
        b"5",
        b'{"txt": "a"}',
        b'{"text": null}',
        b'{"text": ["a", 5]}',
        b'{"text": {"text": "a"}}',
        b'{"text": []}',
        b"[" * 100_000,
        b'{"text": "' + b"x" * 5000 + b'"}',
    ],
)
def test_bad_jsonl_rows_are_counted_or_refused(tmp_path, monkeypatch, row):
    monkeypatch.setattr(sources, "ROW_CHARS", 1000)
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "good"}\n' + row + b'\n{"text": "fine"}\n')
    documents, report = read(path)
    assert documents == ["good", "fine"]
    assert report.n_skipped_rows == 1 and "line 2" in report.notes[0]
    assert "line 2" in refusal(path, strict=True)


def test_an_endless_line_is_never_held():
    held = []
    blocks = (held.append(1) or "x" * 1000 for _ in range(100))
    assert list(formats.lines(blocks, 5000)) == [None]
    assert list(formats.lines(iter(["ab", "c\nd\n\n", "e"]), 3)) == ["abc", "d", "", "e"]
    assert list(formats.lines(iter(["abcd\nef", "gh\nij\n"]), 3)) == [None, None, "ij"]


def test_csv(tmp_path):
    path = tmp_path / "a.csv"
    path.write_bytes('\ufeffid,text\r\n1,"one, ""two""\r\nthree"\r\n\r\n2,vier\r\n3\r\n'.encode())
    documents, report = read(path)
    assert documents == ['one, "two"\r\nthree', "vier"]
    assert report.n_skipped_rows == 1
    path.write_text("id;body\n1;a,b\n")
    assert read(path, text_key="body")[0] == ["a,b"]
    assert "no column 'text'" in refusal(path)


@pytest.mark.parametrize(
    ("key", "expected"),
    [
        ("messages.content", ["hi\nho", "hey"]),
        ("meta.title", ["One", "Two"]),
        ("a.b", ["dotted", "dots"]),
        ("a.c", ["c", "C"]),
        ("lines", ["1\n2", "3"]),
        ("deep.list.x.y", ["q\nr", "s"]),
    ],
)
def test_jsonl_by_path(tmp_path, key, expected):
    rows = [
        {
            "messages": [{"role": "user", "content": "hi"}, {"role": "tool"}, {"content": None}, {"content": "ho"}],
            "meta": {"title": "One"},
            "a.b": "dotted",
            "a": {"b": "not this", "c": "c"},
            "lines": ["1", None, "2"],
            "deep.list": [[{"x.y": "q"}], [{"x": {"y": "r"}}]],
        },
        {
            "messages": [{"content": "hey"}],
            "meta": {"title": "Two"},
            "a.b": "dots",
            "a": {"c": "C"},
            "lines": "3",
            "deep.list": {"x": {"y": "s"}},
        },
        {"a": 5, "lines": [7]},
    ]
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    documents, report = read(path, text_key=key)
    assert documents == expected and report.n_skipped_rows == 1


# which of them a file holds

LINES = '{"text": "one"}\n{"text": "zwei, größer"}\n'
RECORDS = [json.loads(line) for line in LINES.splitlines()]
ROWS = ["one", "zwei, größer"]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.json", LINES),
        ("a.json", json.dumps(RECORDS)),
        ("a.json", json.dumps({"data": RECORDS}, indent=1)),
        ("a.jsonl", json.dumps(RECORDS)),
        ("a.ndjson", LINES),
        ("a.NDJSON", json.dumps(RECORDS, indent=2)),
        ("a", LINES),
        ("a.log", json.dumps(RECORDS)),
        ("a.csv", 'id;text\n1;one\n2;"zwei, größer"\n'),
        ("a.tsv", "id\ttext\n1\tone\n2\tzwei, größer\n"),
    ],
)
def test_records_are_told_by_name_and_content(tmp_path, name, content):
    for encoding in ("utf-8", "utf-8-sig", "utf-16", "cp1252"):
        (tmp_path / name).write_bytes(content.encode(encoding))
        documents, report = read(tmp_path / name)
        assert documents == ROWS
        assert any("read as JSON, for its field 'text'" in note for note in report.notes) is (name in ("a", "a.log"))
    (tmp_path / f"{name}.gz").write_bytes(gzip.compress(content.encode()))
    assert read(tmp_path / f"{name}.gz")[0] == ROWS


def test_json_in_a_text_file_is_text_and_said(tmp_path):
    for name, content in (("a.txt", LINES), ("a.md", json.dumps(RECORDS))):
        (tmp_path / name).write_text(content, encoding="utf-8")
        documents, report = read(tmp_path / name)
        assert documents == [content] and "read as plain text" in report.notes[0] and ".json" in report.notes[0]
        assert not read(tmp_path / name, text_key="body")[1].notes


def test_records_from_standard_input(monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(LINES.encode())))
    assert read("-")[0] == ROWS


def test_settings_beside_texts_are_left_out_and_named(tmp_path):
    (tmp_path / "a.txt").write_text("words")
    (tmp_path / "config.json").write_text('{"lr": 0.001}')
    documents, report = read(tmp_path)
    assert documents == ["words"] and "config.json is JSON without records" in report.notes[0]
    message = refusal(tmp_path / "config.json")
    assert "an object of lr" in message


def test_a_lone_quote_is_told_with_its_line(tmp_path):
    rows = [f"{i},hello number {i}" for i in range(300)]
    rows[100] = '100,"hello number 100'
    (tmp_path / "a.csv").write_text("\n".join(["id,text", *rows, ""]))
    documents, report = read(tmp_path / "a.csv")
    assert documents == [f"hello number {i}" for i in range(300) if i != 100]
    assert report.n_skipped_rows == 1 and "line 102: its quote is not closed" in report.notes[0]
    assert "line 102" in refusal(tmp_path / "a.csv", strict=True)


# the rest


def test_sources_are_described(text_file):
    _, report = read(text_file)
    content = text_file.read_bytes()
    expected = {"name": "a.txt", "bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    assert report.sources == [expected]


def test_a_file_that_changes_while_it_is_read_is_refused(text_file):
    pieces = Reader().pieces(find_sources([text_file]), Report())
    next(pieces)
    with open(text_file, "ab") as file:
        file.write(b"more")
    with pytest.raises(DataError, match="changed"):
        list(pieces)


def test_unreadable_file(text_file, monkeypatch):
    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("builtins.open", refuse)
    assert "Permission denied" in refusal(text_file)


def test_text_in_memory():
    source = Source("made up", content=b"text")
    assert (source.size, source.repeatable) == (4, True)
    assert [piece.text for piece in Reader().pieces([source], Report())] == ["text", ""]


def test_builtin_corpus(monkeypatch):
    text = sources.builtin_corpus()
    assert len(text) > 300_000 and "\n" in text and json.dumps(text)
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    with pytest.raises(DataError) as error:
        sources.builtin_corpus()
    assert "--filepath" in error.value.fix
