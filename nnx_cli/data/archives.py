"""Archives: the files inside a zip or a tar, one after the other, none of them written to disk."""

from __future__ import annotations

import lzma
import re
import stat
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from functools import partial
from tarfile import (  # type: ignore[attr-defined]  # kinds of HeaderError that its documentation leaves out
    EmptyHeaderError,
    EOFHeaderError,
    InvalidHeaderError,
    TruncatedHeaderError,
)
from typing import BinaryIO, NamedTuple

from nnx_cli.data.compression import Stream, brief, refuse_bomb
from nnx_cli.data.formats import format_of
from nnx_cli.data.zip_directory import LegibleZip
from nnx_cli.errors import DataError

HEAD_BYTES = tarfile.BLOCKSIZE  # that tell an archive
ZIP_MAGIC = (b"PK\x03\x04", b"PK\x05\x06", b"PK\x07\x08")  # with files, without, once in several parts
ZIP_DAMAGE = (zipfile.BadZipFile, NotImplementedError, RuntimeError, ValueError, EOFError, struct.error)
ENCRYPTED = 1  # in the flags of a member of a zip
NO_CHECKSUM = re.compile(
    rb"(?s).{148}[^\0\x80-\xff]{0,7}[a-np-zA-NP-Z]"
)  # in the header of a tar that is an octal number
READ_AHEAD = 2**18  # bytes of an archive that may be read before the member they belong to
LONG_NAMES = (b"L", b"K", b"x", b"X", b"g")  # types of tar headers that describe the next one
LONG_NAME_BYTES = 2**20


class Member(NamedTuple):
    """A file in an archive: its bytes, or why they cannot be read; None where its name or kind says: no text."""

    name: str
    content: Stream | DataError | None


def kind_of(head: bytes, name: str) -> str | None:
    """ "zip", "tar" or None, by the first `HEAD_BYTES` of a file."""
    if head.startswith(ZIP_MAGIC):
        return "zip"
    if len(head) < HEAD_BYTES or NO_CHECKSUM.match(head):
        return None
    try:
        tarfile.TarInfo.frombuf(head, "utf-8", "replace")
    except tarfile.HeaderError:
        empty = len(head) == HEAD_BYTES and not any(head) and format_of(name) == ".tar"
        return "tar" if empty else None
    return "tar"


def zip_members(file: BinaryIO, name: str) -> Iterator[Member]:
    """The files of the zip archive `name`. DataError where it is damaged as a whole."""
    archive = _open_zip(file, name)
    n_read, n_stored = 0, file.seek(0, 2)
    for info in archive.infolist():
        if info.filename.endswith(("/", "\\")):
            continue
        if stat.S_ISLNK(info.external_attr >> 16) or not _is_visible_text(info.filename):
            yield Member(info.filename, None)
            continue
        label = f"{name}/{info.filename}"
        if info.flag_bits & ENCRYPTED:
            yield Member(info.filename, DataError(f"{label} is encrypted"))
            continue
        try:
            raw = archive.open(info)
        except (*ZIP_DAMAGE, OSError) as error:
            yield Member(info.filename, DataError(f"{label} cannot be read: {brief(error)}"))
            continue
        stream = Stream(raw, label, (*ZIP_DAMAGE, zlib.error, lzma.LZMAError, MemoryError))
        stream.n_stored = partial(min, info.compress_size, n_stored)
        yield Member(info.filename, stream)
        n_read += stream.n_read
        refuse_bomb(name, n_read, n_stored)  # members may share their bytes


def _open_zip(file: BinaryIO, name: str) -> zipfile.ZipFile:
    """A zip archive, whatever single entries of its directory are like."""
    try:
        return zipfile.ZipFile(file)
    except (*ZIP_DAMAGE, OSError) as error:
        refusal = error
    try:
        return zipfile.ZipFile(LegibleZip(file))
    except (*ZIP_DAMAGE, OSError):
        raise DataError(f"{name} is damaged: {brief(refusal)}") from refusal


def tar_members(stream: Stream) -> Iterator[Member]:
    """The files of a tar archive, read as a stream. DataError where it is damaged as a whole."""
    n_stored = stream.n_stored or (lambda: stream.n_read)
    try:
        with _Tar.open(
            mode="r|", fileobj=stream, bufsize=READ_AHEAD, ignore_zeros=True, encoding="utf-8", errors="replace"
        ) as archive:
            while info := archive.next():
                archive.members.clear()
                yield from archive.damage(stream.name)
                if info.isdir() or info.name.endswith("/"):
                    continue
                raw = archive.extractfile(info) if info.isreg() and _is_visible_text(info.name) else None
                if raw is None:
                    yield Member(info.name, None)
                    continue
                member = Stream(raw, f"{stream.name}/{info.name}", (tarfile.TarError, ValueError))
                member.n_stored = partial(_stored_since, n_stored() - READ_AHEAD, n_stored)
                yield Member(info.name, member)
            yield from archive.damage(stream.name)
    except (tarfile.TarError, ValueError, RecursionError) as error:
        raise DataError(f"{stream.name} is damaged: {brief(error)}") from error


def _stored_since(start: int, n_stored: Callable[[], int]) -> int:
    return n_stored() - start


def _is_visible_text(name: str) -> bool:
    """Whether a folder with this file would have it read."""
    parts = name.replace("\\", "/").split("/")
    if "__MACOSX" in parts or any(part[:1] == "." and part.strip(".") for part in parts):
        return False
    return format_of(parts[-1]) is not None


class _Header(tarfile.TarInfo):
    """A header that finds the next one where this one is damaged, and holds no name without end."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> _Header:
        header = super().frombuf(buf, encoding, errors)
        if header.size < 0 or (header.type in LONG_NAMES and header.size > LONG_NAME_BYTES):
            raise InvalidHeaderError("impossible size")
        return header

    @classmethod
    def fromtarfile(cls, archive: tarfile.TarFile) -> _Header:
        assert isinstance(archive, _Tar)
        try:
            header = super().fromtarfile(archive)
        except EmptyHeaderError:
            raise
        except EOFHeaderError:
            archive.ended = True
            raise
        except TruncatedHeaderError as error:
            if archive.ended:
                raise
            raise tarfile.ReadError("it ends too early") from error
        except (tarfile.HeaderError, ValueError) as error:
            archive.offset = archive.fileobj.tell() - tarfile.BLOCKSIZE
            if not archive.ended and archive.damaged_at is None:
                archive.damaged_at = archive.offset
            raise InvalidHeaderError(str(error)) from error
        archive.ended = False
        return header


class _Tar(tarfile.TarFile):
    """A tar archive that goes on behind a damaged header, and remembers where it was."""

    tarinfo = _Header
    members: list[tarfile.TarInfo]  # that it would remember, all of them
    ended = False  # whether the mark of the end was seen
    damaged_at: int | None = None

    def damage(self, name: str) -> Iterator[Member]:
        """What a damaged header stood for, as a member that cannot be read."""
        if self.damaged_at is not None:
            yield Member("", DataError(f"{name} has a damaged header at byte {self.damaged_at:,}"))
            self.damaged_at = None
