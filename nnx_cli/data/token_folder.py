"""A token folder: train.bin, val.bin, tokenizer.json and meta.json. The format lives here only."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from nnx_cli.data.tokenizers.base import Tokenizer
from nnx_cli.data.tokenizers.hf_json import load_tokenizer, save_tokenizer
from nnx_cli.errors import DataError
from nnx_cli.system import files

FORMAT = 1
SPLITS = ("train", "val")
DTYPES = {"uint8": "u1", "uint16": "<u2", "uint32": "<u4"}
BLOCK_BYTES = 2**20  # read at a time
WRITE_BYTES = 2**18  # gathered before a write; larger ones pass straight through
MAX_META_BYTES = 256 * 2**20  # a folder of a million files names them all
NANOGPT_DTYPE = "uint16"
NANOGPT_ROUND = 64  # vocabularies above 256 are rounded up to a multiple of this


@dataclass(frozen=True)
class TokenFolder:
    """Tokens ready to train on."""

    path: Path
    train: np.memmap  # (N,) ids
    val: np.memmap  # (M,) ids
    vocab_size: int
    tokenizer: Tokenizer | None  # None: a nanoGPT folder, whose ids nobody can read
    meta: dict[str, Any]
    fingerprint: str  # SHA-256 over the digests of both files and the tokenizer's fingerprint
    text_bytes: int | None  # of both splits; None without a tokenizer


class TokenFile:
    """Writes one .bin file from beginning to end. OSError passes through."""

    def __init__(self, path: Path, dtype: np.dtype) -> None:
        self.path = path
        self.n_tokens = 0
        self.last_id: int | None = None
        self._dtype = dtype
        self._file = open(path, "wb", buffering=WRITE_BYTES)

    def write(self, ids: np.ndarray) -> None:
        """Append ids (N,), which must have the type of the file."""
        assert ids.dtype == self._dtype, (ids.dtype, self._dtype)
        if len(ids):
            self._file.write(ids.data)
            self.n_tokens += len(ids)
            self.last_id = int(ids[-1])

    def flush(self) -> None:
        """Hand what was written to the system, so that `read_ids` sees it."""
        self._file.flush()

    def truncate(self, n_tokens: int) -> None:
        """Keep the first n tokens."""
        self._file.flush()
        self._file.truncate(n_tokens * self._dtype.itemsize)
        self.n_tokens = n_tokens

    def close(self) -> None:
        """Finish the file and wait until it is on the disk."""
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()

    def let_go(self) -> None:
        """Close the file as it is, whatever of it is on the disk: for one that is not to be."""
        with suppress(OSError):
            self._file.close()


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


def write_meta(folder: Path, tokenizer: Tokenizer, meta: dict[str, Any]) -> None:
    """Complete a folder whose .bin files are closed: tokenizer.json and meta.json. OSError passes through."""
    save_tokenizer(tokenizer, folder / "tokenizer.json")
    files.sync_file(folder / "tokenizer.json")
    head = {
        "format": FORMAT,
        "dtype": tokenizer.dtype.name,
        "vocab_size": tokenizer.vocab_size,
        "tokenizer": {"kind": tokenizer.kind, "fingerprint": tokenizer.fingerprint, "eot_id": tokenizer.eot_id},
        "separator": tokenizer.separator.tolist(),
    }
    files.write_synced(folder / "meta.json", files.to_json(head | meta))


def open_token_folder(path: Path | str, tokenizer: Tokenizer | None = None, verify: bool = True) -> TokenFolder:
    """Open a folder of ours or of nanoGPT.

    `tokenizer` is what the folder must have been made with; a nanoGPT folder has none of its own. `verify` reads all
    tokens once and compares them with their SHA-256. DataError where anything is missing, damaged or does not agree.
    """
    path = Path(path)
    mend = f"nnx prepare FILE --out {path}"
    for split in SPLITS:
        if not (path / f"{split}.bin").is_file():
            found = f"{path} holds no prepared tokens" if path.is_dir() else f"there is no token folder {path}"
            raise DataError(found, fix=mend)
    if not os.path.lexists(path / "meta.json"):
        if os.path.lexists(path / "tokenizer.json"):  # nanoGPT writes none
            raise DataError(f"the token folder {path} is damaged: it has no meta.json", fix=f"remove it, then: {mend}")
        return _open_nanogpt(path, tokenizer)
    try:
        meta = files.read_json(path / "meta.json", error=DataError, max_bytes=MAX_META_BYTES, follow_links=True)
    except DataError as error:
        raise DataError(str(error), fix=f"remove the folder, then: {mend}") from error
    try:
        return _open_ours(path, meta, tokenizer, verify)
    except _Damaged as error:
        raise DataError(f"the token folder {path} is damaged: {error}", fix=f"remove it, then: {mend}") from error


class _Damaged(Exception):
    """Says in a few words what is wrong with a token folder."""


def _open_ours(path: Path, meta: dict[str, Any], tokenizer: Tokenizer | None, verify: bool) -> TokenFolder:
    if meta.get("format") != FORMAT:
        raise DataError(f"{path} has token format {meta.get('format')!r}; this nnx reads {FORMAT}")
    own = load_tokenizer(path / "tokenizer.json")
    stated = meta.get("tokenizer")
    if not isinstance(stated, dict) or stated.get("fingerprint") != own.fingerprint:
        raise DataError(f"{path} was not made with its tokenizer.json", fix=f"nnx prepare FILE --out {path}-new")
    if tokenizer is not None and tokenizer.fingerprint != own.fingerprint:
        raise DataError(f"{path} was made with another tokenizer: {own.kind} of {own.vocab_size} ids")
    dtype_name, vocab_size = meta.get("dtype"), meta.get("vocab_size")
    if vocab_size != own.vocab_size or dtype_name != own.dtype.name:
        raise _Damaged("meta.json and tokenizer.json do not agree")
    dtype = np.dtype(DTYPES[dtype_name])
    digests, text_bytes = meta.get("sha256"), meta.get("text_bytes")
    for split in SPLITS:
        n_tokens = _count(meta, "tokens", split)
        _check_size(path / f"{split}.bin", n_tokens, dtype)
        if verify:
            sha256, largest = digest_ids(path / f"{split}.bin", dtype)
            if not isinstance(digests, dict) or sha256 != digests.get(f"{split}.bin"):
                raise _Damaged(f"{split}.bin is not what was written (SHA-256)")
            if largest >= vocab_size:
                raise _Damaged(f"{split}.bin has id {largest} in a vocabulary of {vocab_size}")
    return TokenFolder(
        path=path,
        train=_map(path / "train.bin", dtype),
        val=_map(path / "val.bin", dtype),
        vocab_size=vocab_size,
        tokenizer=own,
        meta=meta,
        fingerprint=_fingerprint(digests, own.fingerprint),
        text_bytes=sum(_count({"text_bytes": text_bytes}, "text_bytes", split) for split in SPLITS),
    )


def _open_nanogpt(path: Path, tokenizer: Tokenizer | None) -> TokenFolder:
    """uint16 ids and nothing else that may be opened: meta.pkl could run code."""
    dtype = np.dtype(DTYPES[NANOGPT_DTYPE])
    digests, largest = {}, 0
    for split in SPLITS:
        file = path / f"{split}.bin"
        size = file.stat().st_size
        if not size or size % dtype.itemsize:
            raise DataError(f"{file} holds {size} bytes; a nanoGPT folder holds {NANOGPT_DTYPE} ids")
        digests[f"{split}.bin"], last = digest_ids(file, dtype)
        largest = max(largest, last)
    if tokenizer is not None and largest >= tokenizer.vocab_size:
        raise DataError(f"{path} has id {largest}; the tokenizer {tokenizer.kind} has {tokenizer.vocab_size} ids")
    vocab_size, text_bytes = round_vocab_size(largest + 1), None
    train, val = _map(path / "train.bin", dtype), _map(path / "val.bin", dtype)
    if tokenizer is not None:
        lengths = tokenizer.token_bytes()
        vocab_size = tokenizer.vocab_size
        blocks = (ids for split in SPLITS for ids in read_ids(path / f"{split}.bin", dtype))
        text_bytes = sum(int(lengths[ids].sum()) for ids in blocks)
    return TokenFolder(
        path=path,
        train=train,
        val=val,
        vocab_size=vocab_size,
        tokenizer=tokenizer,
        meta={"dtype": NANOGPT_DTYPE, "sha256": digests, "tokens": {"train": len(train), "val": len(val)}},
        fingerprint=_fingerprint(digests, tokenizer.fingerprint if tokenizer else ""),
        text_bytes=text_bytes,
    )


def round_vocab_size(n: int) -> int:
    """n up to 256, above that the next multiple of 64, which matrices like."""
    return n if n <= 256 else -(-n // NANOGPT_ROUND) * NANOGPT_ROUND


def _count(meta: dict[str, Any], key: str, split: str) -> int:
    counts = meta.get(key)
    count = counts.get(split) if isinstance(counts, dict) else None
    if type(count) is not int or count < 0:
        raise _Damaged(f"meta.json lacks {key} of {split}")
    return count


def _check_size(file: Path, n_tokens: int, dtype: np.dtype) -> None:
    size = file.stat().st_size
    if not n_tokens or size != n_tokens * dtype.itemsize:
        raise _Damaged(f"{file.name} has {size:,} bytes, not {n_tokens:,} tokens of {dtype.itemsize}")


def _map(file: Path, dtype: np.dtype) -> np.memmap:
    return np.memmap(file, dtype, mode="r")


def _fingerprint(digests: Any, tokenizer_fingerprint: str) -> str:
    names = [f"{split}.bin" for split in SPLITS]
    if not isinstance(digests, dict) or not all(isinstance(digests.get(name), str) for name in names):
        raise _Damaged("meta.json lacks the SHA-256 of its files")
    return hashlib.sha256("\n".join([*(digests[name] for name in names), tokenizer_fingerprint]).encode()).hexdigest()
