"""The files of one split: its ids, where its documents begin, which tokens count. Written and read as streams."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

import numpy as np

from nnx_cli.data.tokenizers.base import Tokenizer

START_DTYPE = np.dtype("<u8")  # of the first token of a document
BLOCK_BYTES = 2**20  # read at a time
MASK_DTYPE = np.dtype("u1")  # of a token's flag, before eight of them become a byte
WRITE_BYTES = 2**18  # gathered before a write; larger ones pass straight through


class TokenFile:
    """Writes SPLIT.bin and SPLIT.documents from beginning to end, and SPLIT.mask where it is `masked`. OSError passes
    through."""

    def __init__(self, path: Path, dtype: np.dtype, masked: bool = False) -> None:
        self.path = path
        self.documents_path = path.with_suffix(".documents")
        self.flags_path = path.with_suffix(".flags")  # a byte a token, while the file is written
        self.n_tokens = 0
        self._last: np.ndarray | None = None  # written
        self._dtype = dtype
        self._file = _new_file(path)
        self._documents = _new_file(self.documents_path)
        self._flags = _new_file(self.flags_path) if masked else None

    @property
    def paths(self) -> list[Path]:
        """What is there once it is closed."""
        return [self.path, self.documents_path, *([self.path.with_suffix(".mask")] if self._flags else [])]

    @property
    def _files(self) -> list[BinaryIO]:
        return [self._file, self._documents, *([self._flags] if self._flags else [])]

    def begin_document(self, at: int | None = None) -> None:
        """Record that a document begins at token `at`, without it: at the next one to be written."""
        start = self.n_tokens if at is None else at
        self._documents.write(start.to_bytes(START_DTYPE.itemsize, "little"))

    def write(self, ids: np.ndarray, counts: np.ndarray | None = None) -> None:
        """Append ids (N,), which must have the type of the file. Where it has a mask, `counts` says which of them
        count; without it none does."""
        assert ids.dtype is self._dtype or ids.dtype == self._dtype, (ids.dtype, self._dtype)
        if n := len(ids):
            self._file.write(ids)  # type: ignore[call-overload]  # an array is a buffer, which 3.11 cannot type
            self.n_tokens += n
            self._last = ids
            if self._flags:
                self._flags.write((np.zeros(n, bool) if counts is None else counts).astype(MASK_DTYPE).data)

    def ends_with(self, token: int) -> bool:
        """Whether that is the last id that was written."""
        return self._last is not None and self._last.item(-1) == token

    def flush(self) -> None:
        """Hand what was written to the system, so that `read_ids` sees it."""
        for file in self._files:
            file.flush()

    def truncate(self, n_tokens: int) -> None:
        """Keep the first `n_tokens` and the documents that begin among them. Nothing is written after that."""
        self.flush()
        n_documents = sum(int((starts < n_tokens).sum()) for starts in read_ids(self.documents_path, START_DTYPE))
        self._file.truncate(n_tokens * self._dtype.itemsize)
        self._documents.truncate(n_documents * START_DTYPE.itemsize)
        if self._flags:
            self._flags.truncate(n_tokens)
        self.n_tokens = n_tokens

    def close(self) -> None:
        """Finish the files and wait until they are on the disk."""
        if self._flags:
            self._flags.flush()
            _pack(self.flags_path, self.path.with_suffix(".mask"))
            self._flags.close()
            self.flags_path.unlink()
        for file in (self._file, self._documents):
            file.flush()
            os.fsync(file.fileno())
            file.close()

    def let_go(self) -> None:
        """Close the files as they are, whatever of them is on the disk: for some that are not to be."""
        for file in self._files:
            with suppress(OSError):
                file.close()


def _new_file(path: Path) -> BinaryIO:
    return open(path, "wb", buffering=WRITE_BYTES)


def _pack(flags: Path, mask: Path) -> None:
    """A file of bytes to one of bits, little-endian, that is on the disk."""
    with open(mask, "wb") as file:
        for block in read_ids(flags, MASK_DTYPE):  # all but the last have a multiple of eight
            file.write(np.packbits(block, bitorder="little").data)
        file.flush()
        os.fsync(file.fileno())


def read_ids(path: Path, dtype: np.dtype, start: int = 0, stop: int | None = None) -> Iterator[np.ndarray]:
    """Ids start..stop of a .bin file, in blocks. Mapped memory would count as this process's own; this does not."""
    with open(path, "rb") as file:
        file.seek(start * dtype.itemsize)
        left = None if stop is None else (stop - start) * dtype.itemsize
        while left is None or left > 0:
            data = file.read(BLOCK_BYTES if left is None else min(BLOCK_BYTES, left))
            if not data:
                return
            left = None if left is None else left - len(data)
            yield np.frombuffer(data, dtype)


def digest_ids(path: Path, dtype: np.dtype) -> tuple[str, int]:
    """SHA-256 (hex) of a .bin file and its largest id."""
    sha256, largest = hashlib.sha256(), 0
    for ids in read_ids(path, dtype):
        sha256.update(ids.data)
        largest = max(largest, int(ids.max()))
    return sha256.hexdigest(), largest


def count_bytes(path: Path, tokenizer: Tokenizer) -> int:
    """Bytes of text that the ids of a .bin file stand for."""
    lengths = tokenizer.token_bytes()
    n = tokenizer.vocab_size
    return sum(int(np.bincount(ids, minlength=n) @ lengths) for ids in read_ids(path, tokenizer.dtype))
