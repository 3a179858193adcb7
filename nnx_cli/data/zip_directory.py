"""The directory of a zip archive, made legible where one entry in it would have all members refused."""

from __future__ import annotations

import io
import struct
from bisect import bisect_left
from collections.abc import Iterator
from typing import BinaryIO

END = struct.Struct("<4s8x2LH")  # size and place of the directory, length of a comment
ENTRY = struct.Struct("<4s2xBxH18x3H8xL")  # version, flags; lengths of name, extra and comment; where the member lies
EXTRA = struct.Struct("<2H")  # kind and length of an extra field
END_MAGIC, ENTRY_MAGIC, LOCAL_MAGIC = b"PK\x05\x06", b"PK\x01\x02", b"PK\x03\x04"
LONGEST_END = END.size + 2**16
MAX_DIRECTORY_BYTES = 2**28
VERSION_AT, FLAGS_AT, LOCAL_FLAGS_AT = 6, 8, 6  # in an entry; in what stands before a member
IS_UTF8 = 0x800  # in the flags: the name is UTF-8
HIGHEST_VERSION = 63  # of the format that Python reads
UNKNOWN = 0xFFFF  # kind of an extra field


class LegibleZip(io.RawIOBase):
    """A zip archive as it is, but for entries of its directory that Python's reader stumbles over: names that are
    marked as UTF-8 and are not, versions to come, extra fields that do not add up.

    ValueError where the directory is not found.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._changed = dict(_changes(file))
        self._places = sorted(self._changed)

    def readable(self) -> bool:
        """True: readers ask."""
        return True

    def seekable(self) -> bool:
        """True: readers ask."""
        return True

    def seek(self, place: int, whence: int = 0) -> int:
        """Go to a place."""
        return self._file.seek(place, whence)

    def tell(self) -> int:
        """The place that comes next."""
        return self._file.tell()

    def read(self, n: int = -1) -> bytes:
        """The next n bytes."""
        start = self._file.tell()
        data = bytearray(self._file.read(n))
        for place in self._places[bisect_left(self._places, start) : bisect_left(self._places, start + len(data))]:
            data[place - start] = self._changed[place]
        return bytes(data)


def _changes(file: BinaryIO) -> Iterator[tuple[int, int]]:
    """Places in the archive and the bytes that make it legible there."""
    n_stored = file.seek(0, 2)
    tail_at = file.seek(max(0, n_stored - LONGEST_END))
    tail = file.read()
    end = tail.rfind(END_MAGIC, 0, len(tail) - END.size + len(END_MAGIC))
    if end < 0:
        raise ValueError("no directory")
    _, size, place, _ = END.unpack_from(tail, end)
    begin = tail_at + end - size
    if begin < 0 or size > MAX_DIRECTORY_BYTES:  # that of a zip64 lies elsewhere
        raise ValueError("no directory")
    file.seek(begin)
    directory, at = file.read(size), 0
    while len(directory) - at >= ENTRY.size and directory.startswith(ENTRY_MAGIC, at):
        _, version, flags, n_name, n_extra, n_comment, member = ENTRY.unpack_from(directory, at)
        name_at = at + ENTRY.size
        extra_at = name_at + n_name
        if version > HIGHEST_VERSION:
            yield begin + at + VERSION_AT, HIGHEST_VERSION
        if flags & IS_UTF8 and not _is_utf8(directory[name_at:extra_at]):
            yield begin + at + FLAGS_AT + 1, (flags & ~IS_UTF8) >> 8
            yield begin - place + member + LOCAL_FLAGS_AT + 1, (flags & ~IS_UTF8) >> 8
        if n_extra >= EXTRA.size and not _adds_up(directory[extra_at : extra_at + n_extra]):
            yield from enumerate(EXTRA.pack(UNKNOWN, n_extra - EXTRA.size), begin + extra_at)
        at = extra_at + n_extra + n_comment


def _is_utf8(name: bytes) -> bool:
    try:
        name.decode()
    except UnicodeDecodeError:
        return False
    return True


def _adds_up(extra: bytes) -> bool:
    """Whether extra fields fill the place that they have."""
    while len(extra) >= EXTRA.size:
        end = EXTRA.size + EXTRA.unpack_from(extra)[1]
        if end > len(extra):
            return False
        extra = extra[end:]
    return True
