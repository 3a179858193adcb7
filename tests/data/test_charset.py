"""Bytes to text: which encoding, told how, and what becomes of bytes that do not belong to it."""

import io
import lzma

import pytest

from nnx_cli.config import PrepareConfig
from nnx_cli.data import charset
from nnx_cli.data.charset import TextReader, read_text
from nnx_cli.data.compression import BLOCK_BYTES, Stream
from nnx_cli.data.prepare import prepare
from nnx_cli.errors import DataError

CHINESE = "河水慢慢地流着，古老的桥映在水里。\n苹果树的花一直开到五月。\n"
RUSSIAN = "Река текла медленно, и старый мост отражался в воде.\n"
JAPANESE = "川はゆっくりと流れ、古い橋が水に映っていた。\n"
KOREAN = "강은 천천히 흐르고 오래된 다리가 물에 비쳤다.\n"
GERMAN = "Der Fluß floß träge, die Äpfel blühten.\n"


def read(data, strict=False, encoding=None):
    reader = TextReader(Stream(io.BytesIO(data), "a.txt"), strict=strict, encoding=encoding)
    return "".join(reader), reader


def refused(data, **options):
    with pytest.raises(DataError) as error:
        read(data, **options)
    return f"{error.value} | {error.value.fix}"


LEGACY = [(CHINESE, "gb18030"), (RUSSIAN, "cp1251"), (JAPANESE, "cp932"), (KOREAN, "cp949"), (GERMAN, "cp1252")]


@pytest.mark.parametrize(("text", "encoding"), LEGACY)
@pytest.mark.parametrize("n", [1, 60_000])
def test_unmarked_text_is_guessed_and_said(text, encoding, n):
    found, reader = read((text * n).encode(encoding))
    assert found == text * n and reader.encoding == encoding
    name = "GB18030" if encoding == "gb18030" else encoding
    (note,) = reader.notes
    assert note.startswith(f"a.txt: read as {name} (confidence ") and note.endswith(
        " %); --encoding NAME chooses another"
    )


@pytest.mark.parametrize(("text", "encoding"), LEGACY)
@pytest.mark.parametrize("before", [BLOCK_BYTES - 3, 3 * BLOCK_BYTES + 5, 100])
def test_the_first_byte_beyond_ascii_may_come_late(text, encoding, before):
    start = ("plain words\n" * before)[:before]
    assert read((start + text * 30).encode(encoding))[0] == start + text * 30


def test_one_foreign_letter_and_the_language_later():
    text = (
        "Caf\xe9 .\n"
        + "plain words\n" * 120_000
        + "Řeka tekla pomalu a starý most se zrcadlil ve vodě, děti křičely.\n" * 20
    )
    assert read(text.encode("cp1250"))[0] == text


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be", "utf-32-le", "utf-32-be"])
@pytest.mark.parametrize("text", [CHINESE, RUSSIAN, JAPANESE, KOREAN, GERMAN, "你好，世界"])
def test_wide_text_without_a_mark(encoding, text):
    for strict in (False, True):
        found, reader = read((text * 9).encode(encoding), strict=strict)
        assert found == text * 9 and "UTF-" in reader.notes[0]


@pytest.mark.parametrize(
    ("encoding", "text"),
    [
        ("iso2022_jp", JAPANESE),
        ("iso2022_jp_ext", "ｱｲｳ" + JAPANESE),
        ("iso2022_kr", KOREAN),
        ("iso2022_jp_2", JAPANESE + CHINESE),
    ],
)
def test_escape_sequences_tell_iso_2022(encoding, text):
    if encoding == "iso2022_jp_2":
        text = text.encode(encoding, "ignore").decode(encoding)
    for n in (1, 30_000):
        assert read((text * n).encode(encoding))[0] == text * n
    assert read(b"\x1b[1mbold\x1b[0m and \x1b$ nothing\n")[0].startswith("\x1b[1m")


def test_a_few_bad_bytes_do_not_make_text_foreign():
    data = (CHINESE * 20).encode() + b"\xff\xfe\n" + RUSSIAN.encode()
    found, reader = read(data)
    assert reader.encoding == "utf-8" and reader.guess is None and found.count("\ufffd") == reader.n_replaced == 2


@pytest.mark.parametrize("first", [CHINESE, RUSSIAN, JAPANESE, GERMAN])
@pytest.mark.parametrize(("second", "encoding"), [(RUSSIAN, "cp1251"), (CHINESE, "gbk"), (GERMAN, "cp1252")])
def test_files_joined_into_one_stay_what_the_first_one_is(first, second, encoding):
    """However much follows in another encoding: that is marked, counted and said."""
    found, reader = read((first * 20).encode() + (second * 200).encode(encoding))
    assert found.startswith(first * 20) and reader.encoding == "utf-8" and reader.guess is None
    assert "invalid bytes became U+FFFD" in reader.notes[0]


# what the user says


@pytest.mark.parametrize(
    ("text", "encoding"),
    [
        *LEGACY,
        (GERMAN, "cp037"),
        (GERMAN, "utf-7"),
        (CHINESE, "hz"),
        (RUSSIAN, "utf-16"),
        (CHINESE, "utf-16-be"),
        (RUSSIAN, "kz1048"),
    ],
)
def test_a_named_encoding_is_taken_and_not_said(text, encoding):
    for strict in (False, True):
        found, reader = read((text * 5000).encode(encoding), strict=strict, encoding=encoding)
        assert found == text * 5000 and reader.notes == []


def test_a_named_encoding_is_strict_where_all_is():
    data = RUSSIAN.encode("cp1251") + b"\x98"
    assert "is not cp1251: invalid byte 0x98 at offset 53" in refused(data, strict=True, encoding="cp1251")
    found, reader = read(data, encoding="cp1251")
    assert found == RUSSIAN + "\ufffd" and reader.notes == ["a.txt: 1 invalid byte became U+FFFD"]


@pytest.mark.parametrize("mark", ["utf-8-sig", "utf-16", "utf-32"])
def test_a_mark_says_more_than_the_user(mark):
    assert read(RUSSIAN.encode(mark), encoding="cp1251")[0] == RUSSIAN


# what is refused


@pytest.mark.parametrize(("text", "encoding"), LEGACY)
def test_strict_takes_no_guess_but_tells_it(text, encoding):
    message = refused((text * 9).encode(encoding), strict=True)
    first = next(i for i, char in enumerate(text) if not char.isascii())
    assert "is not UTF-8: invalid byte" in message and f"at offset {first}" in message
    assert f"take --encoding {encoding}" in message and "(confidence 9" in message


@pytest.mark.parametrize("encoding", ["cp037", "cp500", "cp1140"])
def test_what_nobody_can_tell_is_refused(encoding):
    for strict in (False, True):
        assert "--encoding NAME" in refused((GERMAN * 20).encode(encoding, "ignore"), strict=strict)
    assert read((GERMAN * 20).encode(encoding), encoding=encoding)[0] == GERMAN * 20


@pytest.mark.parametrize("content", [bytes(1000), bytes(range(256)) * 10, b"text\x00" * 50, b"\x01\x02\x03\x04" * 99])
def test_binary_is_refused(content):
    assert "binary" in refused(content)


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:abc\nsize 123\n"


@pytest.mark.parametrize(
    ("content", "what", "fix"),
    [
        (POINTER, "a pointer of Git LFS", "git lfs pull"),
        (b"%PDF-1.7\n" + b"text " * 99, "a PDF", "plain text"),
        (rb"{\rtf1\ansi Once upon a time}", "a rich text document", "plain text"),
        (b"%!PS-Adobe-3.0\n(Once) show", "a PostScript document", "plain text"),
        (b"Rar!\x1a\x07\x01\0" + bytes(99), "a RAR archive", "unpack it"),
        (b"\x04\x22\x4d\x18" + bytes(99), "compressed by lz4", "unpack it"),
        (lzma.compress(b"text" * 999, lzma.FORMAT_ALONE), "compressed by lzma", "unpack it"),
        (b"ARROW1\0\0" + bytes(99), "an Arrow table", "JSON lines"),
        (b"GGUF\x03\0\0\0" + bytes(99), "a GGUF model", None),
    ],
)
def test_what_is_no_text_is_named_with_what_makes_text_of_it(content, what, fix, tmp_path):
    (tmp_path / "book.txt").write_bytes(content)
    with pytest.raises(DataError, match=f"book.txt is not text but {what}") as error:
        prepare([tmp_path / "book.txt"], tmp_path / "made", PrepareConfig())
    assert (fix is None and error.value.fix is None) or fix in error.value.fix


@pytest.mark.parametrize("name", ["a.parquet", "a.jsonl", "a.csv", "a.txt.gz", "a.json"])
def test_a_pointer_of_git_lfs_is_told_under_every_name(name, tmp_path):
    (tmp_path / name).write_bytes(POINTER)
    with pytest.raises(DataError, match="pointer of Git LFS"):
        prepare([tmp_path / name], tmp_path / "made", PrepareConfig())


@pytest.mark.parametrize("name", ["a.zip", "a.tar", "a.tgz", "a.tar.gz", "a.tar.zst"])
def test_a_page_that_came_instead_of_an_archive_is_told(name, tmp_path):
    (tmp_path / name).write_text("<html><title>404 Not Found</title></html>\n" * 9)
    with pytest.raises(DataError, match="is no archive, whatever its name says"):
        prepare([tmp_path / name], tmp_path / "made", PrepareConfig())


@pytest.mark.parametrize("name", ["a.txt.gz", "a.md.xz", "a.bz2", "a.csv.zst"])
def test_text_that_is_not_as_compressed_as_its_name(name, tmp_path):
    (tmp_path / name).write_text("text\nsome words\nmore words\n")
    told = []
    prepare([tmp_path / name], tmp_path / "made", PrepareConfig(), on_progress=told.append)
    assert any("is not compressed" in event.get("note", "") for event in told)


# invalid bytes


@pytest.mark.parametrize(
    ("text", "encoding", "damage", "n_bytes"),
    [
        (CHINESE, "gb18030", b"\xff", 1),
        (RUSSIAN, "cp1251", b"\x98\x98", 2),
        (GERMAN, "cp1252", b"\x81", 1),
        (JAPANESE, "euc_jp", b"\xff", 1),
        (JAPANESE, "iso2022_jp", b"\xff\xff", 2),
        (CHINESE, "utf-16-le", b"\x00\xdc", 2),
        (CHINESE, "utf-8", b"\xe6\x88 ", 2),
    ],
)
@pytest.mark.parametrize("before", [10, BLOCK_BYTES - 1])
def test_invalid_bytes_are_counted_in_every_encoding(text, encoding, damage, n_bytes, before):
    start = text * 3 + "x" * before
    found, reader = read((start).encode(encoding) + damage + "end".encode(encoding), encoding=encoding)
    assert reader.n_replaced == n_bytes and found.startswith(start + "\ufffd") and found.endswith("end")


def test_a_real_replacement_character_is_no_damage():
    found, reader = read("ein \ufffd größer\n".encode() * 3)
    assert found.count("\ufffd") == 3 and reader.n_replaced == 0


# small files


def test_small_files_are_read_alike():
    def text_of(data, **options):
        return read_text(Stream(io.BytesIO(data), "a.txt"), 1000, **options)

    assert text_of(b"\xef\xbb\xbfThe river") == ("The river", [])
    assert text_of("The river".encode("utf-16")) == ("The river", [])
    assert text_of(b"caf\xe9 r\xe9sum\xe9")[0] == "café résumé"
    assert text_of(RUSSIAN.encode("koi8-r"), encoding="koi8-r") == (RUSSIAN, [])
    assert text_of(b"") == ("", [])
    for controls in (b"\x1b]52;c;?\x07", bytes(range(1, 32)), b"a\x00b", b"\x07" * 5):
        assert text_of(controls) == (controls.decode(), [])
    assert text_of("Жили-были".encode("utf-16-be"))[0] == "Жили-были"
    with pytest.raises(DataError, match="has more than"):
        text_of(b"x" * 1001)
    with pytest.raises(DataError, match="PNG"):
        text_of(b"\x89PNG\r\n\x1a\n")


def test_memory_stays_small(monkeypatch):
    monkeypatch.setattr(charset, "GUESS_BYTES", 2 * BLOCK_BYTES)
    stream = Stream(io.BytesIO(b"Caf\xe9 and words\n" + b"plain words\n" * 2**20), "a.txt")
    sizes = [len(text) for text in TextReader(stream, strict=False)]
    assert max(sizes) <= BLOCK_BYTES and sum(sizes) == 15 + 12 * 2**20
