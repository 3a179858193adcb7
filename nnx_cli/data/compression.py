"""Binary input: read in blocks, counted, hashed, and unpacked whatever its name says."""

from __future__ import annotations

import bz2
import gzip
import hashlib
import io
import lzma
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from nnx_cli.errors import DataError, MissingFeature, pip_install

BLOCK_BYTES = 2**20
AHEAD_BYTES = 2**16  # read at least, where the beginning of a file is looked at
MESSAGE_CHARS = 100
MAX_LAYERS = 3  # of compression around one text
BOMB_BYTES = 64 * 2**20  # output that a file may have
BOMB_RATIO = 1000  # or this many times its own size; text does not come near
ZSTD_WINDOW_LOG = 27  # 128 MiB, what the zstd command accepts too

MAGIC = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ\x00": "xz", b"\x28\xb5\x2f\xfd": "zstd"}


class Bomb(DataError):
    """A file that unpacks without end."""


class Readable(Protocol):
    """What a stream reads from: a file, or an unpacker."""

    def read(self, n: int, /) -> bytes:
        """At most n bytes, none at the end."""

    def close(self) -> None:
        """Free what it holds."""


class Stream(io.RawIOBase):
    """A binary file that can be peeked into. Counts what is read; raises DataError naming the file."""

    def __init__(
        self, raw: Readable, name: str, damage: tuple[type[Exception], ...] = (), *, path: Path | None = None
    ) -> None:
        self.name = name
        self.path = path  # where the same bytes lie in a file
        self.n_read = 0
        self.n_stored: Callable[[], int] | None = None  # bytes that this was unpacked from; None: it was not packed
        self.failed = False  # whether reading ended with an error
        self.sha256 = hashlib.sha256()
        self._raw = raw
        self._ahead = b""
        self._ended = False
        self._damage = damage

    def readable(self) -> bool:
        """True: unpackers ask."""
        return True

    def peek(self, n: int) -> bytes:
        """The next n bytes (fewer at the end), which `read` will return again."""
        if len(self._ahead) < n and not self._ended:
            self._ahead += self._fetch(max(n, AHEAD_BYTES) - len(self._ahead))
        return self._ahead[:n]

    def read(self, n: int = -1) -> bytes:
        """Exactly n bytes, fewer only at the end."""
        data, self._ahead = self._ahead[:n], self._ahead[n:]
        return data + self._fetch(n - len(data)) if len(data) < n and not self._ended else data

    def _fetch(self, n: int) -> bytes:
        parts, missing = [], n
        while missing and not self._ended:
            try:
                part = self._raw.read(missing)
            except self._damage as error:
                self.failed = True
                raise DataError(f"{self.name} is damaged: {brief(error)}") from error
            except OSError as error:
                self.failed = True
                raise DataError(f"cannot read {self.name}: {error.strerror or error}") from error
            if not part:
                self._ended = True
                break
            parts.append(part)
            missing -= len(part)
        data = b"".join(parts)  # no copy, where there is one
        self.n_read += len(data)
        if self.n_stored is None:
            self.sha256.update(data)
        else:
            refuse_bomb(self.name, self.n_read, self.n_stored())
        return data

    def close(self) -> None:
        """Close the file below, but not standard input."""
        if not self.closed and self._raw is not getattr(sys.stdin, "buffer", None):
            self._raw.close()
        super().close()

    def drain(self) -> None:
        """Read to the end, so that size and digest cover the whole file."""
        while self.read(BLOCK_BYTES):
            pass


def refuse_bomb(name: str, n_bytes: int, n_stored: int) -> None:
    """Raise Bomb where `n_bytes` are too many to be text that took `n_stored`."""
    if n_bytes > BOMB_BYTES and n_bytes > BOMB_RATIO * n_stored:
        raise Bomb(f"{name} unpacks to more than {BOMB_RATIO} times its size; that is no text")


def brief(error: Exception) -> str:
    """A library's message in one short line: some of them quote the file."""
    text = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, MemoryError):
        text = "unpacking it takes more memory than there is"
    return text if len(text) <= MESSAGE_CHARS else text[:MESSAGE_CHARS] + "..."


def unpack(stream: Stream) -> Stream:
    """The stream below every layer of gzip, bzip2, xz and zstd, told by their first bytes."""
    n_stored = stream.n_stored or (lambda: packed.n_read)
    packed = stream
    for _ in range(MAX_LAYERS):
        head = stream.peek(8)
        if not head.startswith(tuple(MAGIC)):
            return stream
        kind = next(kind for magic, kind in MAGIC.items() if head.startswith(magic))
        stream = UNPACKERS[kind](stream)
        stream.n_stored = n_stored
    raise DataError(f"{stream.name} is compressed more than {MAX_LAYERS - 1} times over")


def _gzip(stream: Stream) -> Stream:
    return Stream(gzip.GzipFile(fileobj=stream), stream.name, (gzip.BadGzipFile, EOFError, zlib.error))


def _bzip2(stream: Stream) -> Stream:
    return Stream(bz2.BZ2File(stream), stream.name, (OSError, EOFError, ValueError))


def _xz(stream: Stream) -> Stream:
    return Stream(lzma.LZMAFile(stream), stream.name, (lzma.LZMAError, EOFError, MemoryError))  # type: ignore[arg-type]  # needs `read`


def _zstd(stream: Stream) -> Stream:
    try:
        if sys.version_info >= (3, 14):
            from compression import zstd
        else:
            from backports import zstd
    except ImportError as error:
        raise MissingFeature(
            f"{stream.name} is compressed with zstd, which this Python cannot read",
            fix=pip_install("nnx-cli[zstd]"),
        ) from error
    options: dict[int, int] = {zstd.DecompressionParameter.window_log_max: ZSTD_WINDOW_LOG}
    return Stream(zstd.ZstdFile(stream, options=options), stream.name, (zstd.ZstdError, EOFError))


UNPACKERS: dict[str, Callable[[Stream], Stream]] = {"gzip": _gzip, "bzip2": _bzip2, "xz": _xz, "zstd": _zstd}
