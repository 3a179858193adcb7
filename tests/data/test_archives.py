"""What is read of zips and tars, and what is left out of them."""

import bz2
import gzip
import io
import lzma
import os
import random
import stat
import struct
import sys
import tarfile
import tracemalloc
import zipfile

import pytest

from nnx_cli.data import compression, sources
from nnx_cli.data.compression import Stream
from nnx_cli.data.find import find_sources
from nnx_cli.data.formats import format_of
from nnx_cli.data.sources import Reader, Report, Source
from nnx_cli.errors import DataError

TEXT = "One line.\nZwei Zeilen, größer.\n三行。\n"
BINARY = b"\x7fELF\x02\x01" + bytes(500)


def read(path, **options) -> tuple[list[str], list[str]]:
    """The documents of a file, and the notes."""
    report, documents, parts = Report(), [], []
    for text, ends in Reader(**options).pieces([Source(path.name, path)], report):
        parts.append(text)
        if ends:
            documents.append("".join(parts))
            parts = []
    assert not parts
    return documents, report.notes


def refusal(path, **options) -> str:
    with pytest.raises(DataError) as error:
        read(path, **options)
    return str(error.value)


def write_zip(path, members, **options):
    with zipfile.ZipFile(path, "w", **options) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return path


def tar_bytes(members, format=tarfile.PAX_FORMAT) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=format) as archive:
        for name, content in members.items():
            info = name if isinstance(name, tarfile.TarInfo) else tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def write_tar(path, members, **options):
    path.write_bytes(tar_bytes(members, **options))
    return path


def special(name, kind, target=""):
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


def spoil(path, old: bytes, new: bytes):
    content = path.read_bytes()
    assert old in content and len(old) == len(new)
    path.write_bytes(content.replace(old, new, 1))
    return path


HIDDEN = ["__MACOSX/._book.txt", ".DS_Store", "a/.git/config.txt", "a/._b.txt", ".~lock.book.txt", "__MACOSX/a/b.md"]


@pytest.mark.parametrize("write", [write_zip, write_tar])
def test_what_a_folder_would_not_read_is_left_out(tmp_path, write):
    members = {
        "book.txt": b"book",
        "a/c.md": b"c",
        "picture.png": BINARY,
        "Makefile": b"all:",
        **dict.fromkeys(HIDDEN, BINARY),
    }
    path = write(tmp_path / "mac", members)
    for strict in (False, True):
        documents, notes = read(path, strict=strict)
        assert documents == ["book", "c"]
        assert notes == ["mac: left out for being hidden or of no text format: 8, such as picture.png"]
    only = write(tmp_path / "only", dict.fromkeys(HIDDEN, b"text"))
    assert "only holds no .txt" in refusal(only)


@pytest.mark.parametrize(
    "names", [["./a.txt", "./b/../c.txt"], ["../../etc/a.txt", "/c.txt"], ["dir\\a.txt", "C:\\c.txt"]]
)
@pytest.mark.parametrize("write", [write_zip, write_tar])
def test_names_are_only_labels(tmp_path, write, names):
    path = write(tmp_path / "pack", {"dir/": b"", **dict.fromkeys(names, b"text")})
    assert read(path) == (["text", "text"], [])
    assert os.listdir(tmp_path) == ["pack"]


def test_names_in_no_encoding(tmp_path):
    path = write_zip(tmp_path / "a.zip", {"cafe.txt": b"one", "b.txt": BINARY})
    path.write_bytes(path.read_bytes().replace(b"cafe.txt", b"\x83A\xff\xfe.txt").replace(b"b.txt", b"\xa0.txt"))
    documents, notes = read(path)
    assert documents == ["one"] and notes[0].encode()
    path = write_tar(tmp_path / "a.tar", {"xaf\u00e9.txt": b"one", "bad.txt": BINARY}, format=tarfile.USTAR_FORMAT)
    content = bytearray(path.read_bytes())
    content[512 * 2 : 512 * 2 + 3] = b"b\xfe\xff"
    content[512 * 2 + 148 : 512 * 2 + 156] = b"%06o\0 " % (256 + sum(content[1024:1172]) + sum(content[1180:1536]))
    path.write_bytes(content)
    documents, notes = read(path)
    assert documents == ["one"] and notes[0].encode()


# one member that cannot be read


def bad_crc(path):
    return spoil(
        write_zip(path, {"a.txt": b"good", "b.txt": b"as it was", "c.txt": b"too"}), b"as it was", b"as it is!"
    )


def damaged_deflate(path):
    text = bytes(random.Random(1).choices(b"abcdef \n", k=5000))
    write_zip(path, {"a.txt": b"good", "b.txt": text, "c.txt": b"too"}, compression=zipfile.ZIP_DEFLATED)
    content = bytearray(path.read_bytes())
    content[200:300] = b"\xff" * 100
    path.write_bytes(content)
    return path


def encrypted(path):
    write_zip(path, {"a.txt": b"good", "b.txt": b"secret", "c.txt": b"too"})
    content = bytearray(path.read_bytes())
    at = content.index(b"b.txt", content.index(b"PK\x01\x02"))
    content[at - 38] |= 1
    path.write_bytes(content)
    return path


def unknown_method(path):
    write_zip(path, {"a.txt": b"good", "b.txt": b"packed", "c.txt": b"too"})
    content = bytearray(path.read_bytes())
    at = content.index(b"b.txt", content.index(b"PK\x01\x02"))
    content[at - 36 : at - 34] = struct.pack("<H", 9)  # deflate64
    path.write_bytes(content)
    return path


def damaged_header(path):
    return spoil(write_zip(path, {"a.txt": b"good", "b.txt": b"packed", "c.txt": b"too"}), b"b.txt", b"?????")


def of_zip(content):
    return lambda path: write_zip(path, {"a.txt": b"good", "b.txt": content, "c.txt": b"too"})


def of_tar(content, name="b.txt"):
    return lambda path: write_tar(path, {"a.txt": b"good", name: content, "c.txt": b"too"})


def tar_header(path):
    return spoil(of_tar(b"text")(path), b"b.txt\0", b"b.tyt\0")


def pax_header(path):
    info = tarfile.TarInfo("b.txt")
    info.pax_headers = {"comment": "x"}
    members = {"a.txt": b"good", info: b"text", "c.txt": b"too"}
    return spoil(write_tar(path, members), b"\0b.txt\0\0\0", b"\0b.tyt\0\0\0")


UNREADABLE = {
    "checksum": (bad_crc, "Bad CRC-32"),
    "deflate": (damaged_deflate, "is damaged"),
    "encrypted": (encrypted, "b.txt is encrypted"),
    "method": (unknown_method, "b.txt cannot be read: That compression method"),
    "header": (damaged_header, "b.txt cannot be read"),
    "binary": (of_zip(BINARY), "not text but an ELF program"),
    "zeros": (of_tar(bytes(2000)), "b.txt is binary"),
    "gzip": (of_zip(gzip.compress(b"text" * 99)[:-5]), "b.txt is damaged"),
    "xz": (of_tar(lzma.compress(b"text" * 99)[:-5], "b.txt.xz"), "b.txt.xz is damaged"),
    "zip in zip": (of_zip(b"PK\x03\x04 and so on"), "archive inside an archive"),
    "tar in tar": (of_tar(gzip.compress(tar_bytes({"x.txt": b"x"})), "b.tgz"), "b.tgz is an archive inside an archive"),
    "columns": (
        lambda path: write_tar(path, {"a.txt": b"good", "b.csv": b"id,label\n1,2\n", "c.txt": b"too"}),
        "no column 'text'",
    ),
    "tar header": (tar_header, "damaged header at byte 1,024"),
    "pax header": (pax_header, "damaged header at byte "),
}


@pytest.mark.parametrize("kind", UNREADABLE)
def test_a_member_that_cannot_be_read_is_left_out(tmp_path, kind):
    make, why = UNREADABLE[kind]
    path = make(tmp_path / "pack")
    documents, [note] = read(path)
    assert documents == ["good", "too"]
    assert why in note and note.endswith("; left out") and "pack" in note
    assert why in refusal(path, strict=True)


def patched_entry(path, field, new):
    """Write over bytes of the directory's entry of the member b.txt, `field` bytes behind its beginning."""
    data = bytearray(path.read_bytes())
    entry = data.rindex(b"PK\x01\x02", 0, data.rindex(b"b.txt"))
    data[entry + field : entry + field + len(new)] = new
    path.write_bytes(data)


def name_in(encoding, name):
    """Marked as UTF-8 and in another encoding: in the directory and before the member."""

    def spoiled(path):
        write_zip(path, {"a.txt": TEXT, "éé.txt": TEXT, "c.txt": TEXT})
        path.write_bytes(path.read_bytes().replace("éé".encode(), name.encode(encoding)))

    return spoiled


def version_to_come(path):
    write_zip(path, {"a.txt": TEXT, "b.txt": TEXT, "c.txt": TEXT})
    patched_entry(path, 6, b"\xff")


def extra_too_long(path):
    info = zipfile.ZipInfo("b.txt")
    info.extra = struct.pack("<2H4x", 1, 4)
    write_zip(path, {"a.txt": TEXT, info: TEXT, "c.txt": TEXT})
    patched_entry(path, 46 + len("b.txt"), struct.pack("<2H", 1, 999))


def wrong_name_before(path):
    write_zip(path, {"a.txt": TEXT, "b.txt": TEXT, "c.txt": TEXT})
    patched_entry(path, 46, b"d")


@pytest.mark.parametrize(
    ("spoil", "n"),
    [
        (name_in("latin-1", "étés"), 3),
        (name_in("gbk", "中文"), 3),
        (name_in("cp1251", "тест"), 3),
        (version_to_come, 3),
        (extra_too_long, 3),
        (wrong_name_before, 2),
    ],
    ids=["latin-1", "gbk", "cp1251", "version", "extra", "name"],
)
@pytest.mark.parametrize("before", [b"", b"PK\x03\x04" * 99], ids=["", "behind others"])
def test_an_entry_of_a_zip_that_is_wrong_spoils_no_other(tmp_path, spoil, n, before):
    path = tmp_path / "a.zip"
    spoil(path)
    path.write_bytes(before + path.read_bytes())
    documents, notes = read(path)
    assert documents == [TEXT] * n and len(notes) == (n < 3), notes


@pytest.mark.parametrize("write", [write_zip, write_tar])
def test_refused_when_nothing_is_left(tmp_path, write):
    path = write(tmp_path / "pack", {"a.txt": BINARY, "b.txt": b"text\0" * 50, "c.png": b"x"})
    assert "pack/a.txt is not text but an ELF program" in refusal(path)
    for members in ({}, {"folder/": b""}, {"a/": b"", "b/c/": b""}):
        assert "holds no .txt" in refusal(write(tmp_path / "empty.tar", members))


def test_what_was_read_of_a_long_member_stays(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "CHECKED_BYTES", 10)
    monkeypatch.setattr("nnx_cli.data.charset.PROBE_BYTES", 10)
    monkeypatch.setattr("nnx_cli.data.compression.AHEAD_BYTES", 10)
    monkeypatch.setattr("nnx_cli.data.charset.BLOCK_BYTES", 100)
    path = write_zip(tmp_path / "pack", {"a.txt": b"x" * 20_000 + b"as it was", "b.txt": b"too"})
    documents, [note] = read(spoil(path, b"as it was", b"as it is!"))
    assert documents[1:] == ["too"] and 10_000 < documents[0].count("x") == len(documents[0]) <= 20_000
    assert "Bad CRC-32" in note and note.endswith(f"read as far as it goes: {len(documents[0]):,} characters")
    rows = b'{"text": "row"}\n' * 1000
    path = write_zip(tmp_path / "rows", {"a.jsonl": rows + b'{"text": "as it was"}\n', "b.txt": b"too"})
    documents, [note] = read(spoil(path, b"as it was", b"as it is!"))
    assert set(documents) == {"row", "too"} and 500 < len(documents) < 1002


# zip


def test_zip_archive(tmp_path):
    path = tmp_path / "pack.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("b.txt", TEXT)
        archive.writestr("picture.png", b"\x89PNG\r\n\x1a\n")
        archive.writestr("../a.jsonl.gz", gzip.compress(b'{"text": "row"}\n'))
    assert read(path)[0] == [TEXT, "row"]
    (tmp_path / "pack").write_bytes(gzip.compress(path.read_bytes()))
    assert read(tmp_path / "pack", spool=tmp_path)[0] == [TEXT, "row"]
    assert sorted(os.listdir(tmp_path)) == ["pack", "pack.zip"]
    path.write_bytes(path.read_bytes()[:-30])
    assert "damaged" in refusal(path)


@pytest.mark.parametrize("member", ["a.zip", "a.docx"])
def test_zip_without_text(tmp_path, member):
    with zipfile.ZipFile(tmp_path / "inner.zip", "w") as archive:
        archive.writestr("a.txt", "text")
    with zipfile.ZipFile(tmp_path / "pack.zip", "w") as archive:
        archive.write(tmp_path / "inner.zip", member)
    refusal(tmp_path / "pack.zip")


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_zip_methods(tmp_path, method):
    path = write_zip(tmp_path / "a.zip", {"a.txt": TEXT * 100, "b.txt": TEXT}, compression=method)
    assert read(path) == ([TEXT * 100, TEXT], [])
    content = path.read_bytes()
    for at in range(60, 100, 7):
        path.write_bytes(content[:at] + bytes([content[at] ^ 0x55]) + content[at + 1 :])
        documents, [note] = read(path)
        assert documents == [TEXT] and "a.txt" in note


def test_zip64_and_links(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        with archive.open("a.txt", "w", force_zip64=True) as member:
            member.write(b"text")
        link = zipfile.ZipInfo("link.txt")
        link.external_attr = (stat.S_IFLNK | 0o777) << 16
        archive.writestr(link, "a.txt")
    documents, [note] = read(tmp_path / "a.zip")
    assert documents == ["text"] and note.endswith("format: link.txt")


def test_zip_of_one_member_many_times_over(tmp_path, monkeypatch):
    """Members that share their bytes: each of them is small."""
    monkeypatch.setattr(compression, "BOMB_BYTES", 2**20)
    monkeypatch.setattr(compression, "BOMB_RATIO", 100)
    path = write_zip(tmp_path / "a.zip", {"a.txt": b"a" * 50_000}, compression=zipfile.ZIP_DEFLATED)
    content = path.read_bytes()
    at, end = content.index(b"PK\x01\x02"), content.index(b"PK\x05\x06")
    n = 500
    tail = struct.pack("<4s4H2LH", b"PK\x05\x06", 0, 0, n, n, n * (end - at), at, 0)
    path.write_bytes(content[:at] + content[at:end] * n + tail)
    with pytest.raises(DataError, match="unpacks to more than|verlap"):
        read(path, strict=True)


# tar


def packed(suffix: str, data: bytes) -> bytes:
    if suffix in (".tgz", ".tar.gz"):
        return gzip.compress(data)
    if suffix in (".tbz", ".tbz2", ".tar.bz2"):
        return bz2.compress(data)
    if suffix in (".txz", ".tar.xz"):
        return lzma.compress(data)
    if suffix in (".tzst", ".tar.zst"):
        name = "compression.zstd" if sys.version_info >= (3, 14) else "backports.zstd"
        return pytest.importorskip(name, reason="needs the extra nnx-cli[zstd]").compress(data)
    return data


SUFFIXES = [".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tbz", ".tbz2", ".tar.xz", ".txz", ".tar.zst", ".tzst"]


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_tar_is_told_by_content_and_found_by_suffix(tmp_path, suffix):
    data = packed(suffix, tar_bytes({"a.txt": TEXT.encode(), "b.jsonl.gz": gzip.compress(b'{"text": "row"}\n')}))
    (tmp_path / "plain").write_bytes(data)
    assert read(tmp_path / "plain") == ([TEXT, "row"], [])
    (tmp_path / ("Pack" + suffix.upper())).write_bytes(data)
    assert [source.path.name for source in find_sources([tmp_path])] == ["Pack" + suffix.upper()]
    assert format_of("x.jsonl" + suffix) == ".tar"
    if suffix != ".tar":
        (tmp_path / "plain").write_bytes(data[:-6])
        for strict in (False, True):
            assert "plain is damaged" in refusal(tmp_path / "plain", strict=strict)


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_tar_formats(tmp_path, format):
    long = "/".join(["folder"] * 14) + "/a.txt"
    path = write_tar(tmp_path / "pack", {long: b"long", "caf\u00e9.txt": b"accent"}, format=format)
    assert read(path) == (["long", "accent"], [])
    content = path.read_bytes()
    path.write_bytes(content.rstrip(b"\0") + bytes(-len(content.rstrip(b"\0")) % 512))
    assert read(path)[0] == ["long", "accent"]  # without the mark of the end
    path.write_bytes(content + content)
    assert read(path)[0] == ["long", "accent"] * 2
    path.write_bytes(content + b"\x55" * 3000)
    assert read(path) == (["long", "accent"], [])


def test_tar_of_the_first_unix(tmp_path):
    """Without the word `ustar` in its headers."""
    content = bytearray(tar_bytes({"a.txt": b"old"}, format=tarfile.USTAR_FORMAT))
    content[257:265] = bytes(8)
    content[148:156] = b"%06o\0 " % (256 + sum(content[:148]) + sum(content[156:512]))
    (tmp_path / "old").write_bytes(content)
    assert read(tmp_path / "old") == (["old"], [])


def test_links_and_devices_in_a_tar_are_left_out(tmp_path):
    members = {
        special("folder", tarfile.DIRTYPE): b"",
        "folder/a.txt": b"text",
        special("link.txt", tarfile.SYMTYPE, "/etc/passwd"): b"",
        special("hard.txt", tarfile.LNKTYPE, "folder/a.txt"): b"",
        special("pipe.txt", tarfile.FIFOTYPE): b"",
        special("disk.txt", tarfile.BLKTYPE): b"",
    }
    documents, [note] = read(write_tar(tmp_path / "pack", members))
    assert documents == ["text"] and "no text format: 4, such as link.txt" in note


def test_sparse_member(tmp_path):
    header = bytearray(tar_bytes({"s.txt": b"x" * 1024}, format=tarfile.GNU_FORMAT)[:512])
    header[156:157] = b"S"
    header[386:410] = b"%011o\0%011o\0" % (0, 512)
    header[410:434] = b"%011o\0%011o\0" % (512, 512)
    header[483:495] = b"%011o\0" % 1024
    header[148:156] = b"%06o\0 " % (256 + sum(header[:148]) + sum(header[156:512]))
    (tmp_path / "pack").write_bytes(bytes(header) + b"y" * 1024 + bytes(1024))
    assert read(tmp_path / "pack") == (["y" * 1024], [])


@pytest.mark.parametrize("cut", [600, 1000, 1100, 1536, 2100])
def test_truncated_tar_is_refused(tmp_path, cut):
    path = write_tar(tmp_path / "pack", {"a.txt": b"x" * 500, "b.txt": b"y" * 900})
    path.write_bytes(path.read_bytes()[:cut])
    if cut == 1536:
        assert "damaged" in refusal(path)
    assert "damaged" in refusal(path)


def test_long_names_and_negative_sizes_are_no_memory(tmp_path):
    for size in (b"%011o\0" % 2**32, b"\xff" * 12):
        header = bytearray(tar_bytes({"x": b""}, format=tarfile.GNU_FORMAT)[:512])
        header[156:157] = b"L"
        header[124:136] = size
        header[148:156] = b"%06o\0 " % (256 + sum(header[:148]) + sum(header[156:512]))
        (tmp_path / "pack").write_bytes(
            tar_bytes({"a.txt": b"text"})[:1024] + bytes(header) + tar_bytes({"b.txt": b"more"})
        )
        documents, [note] = read(tmp_path / "pack")
        assert documents == ["text", "more"] and "damaged header at byte 1,024" in note


@pytest.mark.parametrize("suffix", [".tgz", ".tar"])
def test_bombs_in_a_tar(tmp_path, monkeypatch, suffix):
    monkeypatch.setattr(compression, "BOMB_BYTES", 2**22)
    monkeypatch.setattr(compression, "BOMB_RATIO", 20)
    bomb = b"a" * 2**24
    members = {"a.txt": bomb} if suffix == ".tgz" else {"x.txt": b"good", "a.txt.gz": gzip.compress(bomb)}
    (tmp_path / "pack").write_bytes(packed(suffix, tar_bytes(members)))
    assert "unpacks to more than" in refusal(tmp_path / "pack")


def test_memory_does_not_grow_with_a_tar(tmp_path):
    peaks = {}
    for name, n, size in (("few", 400, 1000), ("many", 3_000, 1000), ("long", 3, 6_000_000)):
        block = bytes(random.Random(0).choices(b"abcdefgh \n", k=1000)) * (size // 1000)
        member = tar_bytes({"a.txt": block})[: 512 + -(-size // 512) * 512]
        (tmp_path / name).write_bytes(gzip.compress(member * n, 1))
        tracemalloc.start()
        n_chars = sum(len(piece.text) for piece in Reader().pieces([Source(name, tmp_path / name)], Report()))
        peaks[name] = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert n_chars == n * size
    assert peaks["many"] < peaks["few"] + 2**18
    assert peaks["long"] < 2**25


def test_standard_input_takes_a_tar(monkeypatch):
    content = tar_bytes({"a.txt": b"text", "b.txt": b"more"})
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(gzip.compress(content))))
    pieces = Reader().pieces(find_sources(["-"]), Report())
    assert "".join(piece.text for piece in pieces) == "textmore"


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_damaged_tars_never_surprise(tmp_path, suffix):
    content = packed(
        ".tar" + suffix, tar_bytes({"a.txt": b"one" * 300, "b.jsonl": b'{"text": "x"}\n' * 20, "c" * 120: b"y"})
    )
    draw = random.Random(5)
    for _ in range(300):
        data = bytearray(content)
        for _ in range(draw.randint(1, 4)):
            data[draw.randrange(len(data))] = draw.randrange(256)
        stream = Stream(io.BytesIO(bytes(data[: draw.randint(1, len(data))])), "x")
        stream.close()
        try:
            list(Reader().pieces([Source("x.tar", content=bytes(data))], Report()))
        except DataError as error:
            assert "x.tar" in str(error)
