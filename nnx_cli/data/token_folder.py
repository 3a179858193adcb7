"""A token folder: the ids of two splits and where their documents begin, tokenizer.json and meta.json.

Format 1 has no documents: each split counts as one. In format 2 train.mask and val.mask may say which tokens count in
the loss; without one all do.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from nnx_cli.data.aligned_windows import AlignedWindows
from nnx_cli.data.conversations import with_template
from nnx_cli.data.ngram import ngram_reference
from nnx_cli.data.token_file import START_DTYPE, digest_ids, read_ids
from nnx_cli.data.tokenizers.base import Tokenizer
from nnx_cli.data.tokenizers.hf_json import load_tokenizer, save_tokenizer
from nnx_cli.errors import DataError, OutputError, counted, nearest_file, quoted
from nnx_cli.system import files

FORMAT = 2
SPLITS = ("train", "val")
MASKS = tuple(f"{split}.mask" for split in SPLITS)
NGRAM = "ngram_bits_per_byte"
MAX_META_BYTES = 256 * 2**20  # a folder of a million files names them all
NANOGPT_DTYPE = np.dtype("<u2")
NANOGPT_ROUND = 64  # vocabularies above 256 are rounded up to a multiple of this


@dataclass(frozen=True)
class TokenFolder:
    """Tokens ready to train on."""

    path: Path
    train: np.ndarray  # (N,) ids
    val: np.ndarray  # (M,) ids
    vocab_size: int
    tokenizer: Tokenizer | None  # None: a nanoGPT folder, whose ids nobody can read
    meta: dict[str, Any]
    fingerprint: (
        str  # SHA-256 over the digests of both splits' ids, the tokenizer's fingerprint, and the masks' digests
    )
    text_bytes: int | None  # of both splits; None without a tokenizer
    documents: Mapping[str, np.ndarray] = field(default_factory=lambda: dict.fromkeys(SPLITS, _one_document()))
    """By split, the first token of each document: uint64, ascending from 0."""
    mask: np.ndarray | None = None
    """Bits, uint8 (ceil(N / 8),): token i of train counts as a target where bit i % 8 of byte i // 8 is set."""
    val_mask: np.ndarray | None = None
    """The same of val."""

    @property
    def begins_at_documents(self) -> bool:
        """Whether training windows begin at documents: where only parts of those count, what stands before them in the
        document has to be in the window."""
        return self.mask is not None and len(self.documents["train"]) > 1

    def epoch_tokens(self, seq_len: int, seed: int) -> int:
        """Tokens that an epoch of training reads: more than there are where windows begin at documents, and overlap."""
        if not self.begins_at_documents or len(self.train) <= seq_len:
            return len(self.train)
        return AlignedWindows(self.documents["train"], len(self.train), seq_len, seed).n * seq_len

    def share_longer_than(self, n_tokens: int) -> float:
        """The share of the documents to train on that have more tokens."""
        lengths = np.diff(self.documents["train"].astype(np.int64), append=len(self.train))
        return float((lengths > n_tokens).mean())

    @cached_property
    def ngram_bits_per_byte(self) -> float | None:
        """What a byte 5-gram gets on the validation text (`data.ngram`); None without a tokenizer.

        Worked out, and kept in meta.json, where that does not have it yet; a folder that cannot be written to is left
        as it is.
        """
        if self.val_mask is not None:  # only a part of that text counts
            return None
        known = self.meta.get("xray")
        known = known if isinstance(known, dict) else {}
        bits = known.get(NGRAM)
        if self.tokenizer is None or (NGRAM in known and (bits is None or _is_bits(bits))):
            return bits
        bits = ngram_reference(self.train, self.val, self.tokenizer)
        path = self.path / "meta.json"
        if "format" in self.meta and not path.is_symlink():
            with suppress(OutputError):
                files.replace_file(path, files.to_json(self.meta | {"xray": known | {NGRAM: bits}}))
        return bits


def _is_bits(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and value >= 0


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


def open_token_folder(path: Path | str, tokenizer: Tokenizer | None = None, *, may_extend: bool = False) -> TokenFolder:
    """Open a folder of ours or of nanoGPT. Reads all tokens once and compares them with their SHA-256.

    `tokenizer` is what the folder must have been made with, or where it `may_extend` it, that with the special tokens
    of conversations; a nanoGPT folder has none of its own. DataError where anything is missing, damaged or does not
    agree.
    """
    path = Path(path)
    if path.is_file():
        raise DataError(f"{path} is a file, not a token folder", fix=f"name a text so: --filepath {quoted(path)}")
    mend = f"nnx prepare FILE --out {quoted(path)}"
    for split in SPLITS:
        if not (path / f"{split}.bin").is_file():
            missing = f"there is no token folder {path}{nearest_file(path)}"
            raise DataError(f"{path} holds no prepared tokens" if path.is_dir() else missing, fix=mend)
    if not os.path.lexists(path / "meta.json"):
        if os.path.lexists(path / "tokenizer.json"):  # nanoGPT writes none
            raise DataError(f"the token folder {path} is damaged: it has no meta.json", fix=f"remove it, then: {mend}")
        return _open_nanogpt(path, tokenizer)
    try:
        meta = files.read_json(path / "meta.json", error=DataError, max_bytes=MAX_META_BYTES, follow_links=True)
    except DataError as error:
        raise DataError(str(error), fix=f"remove the folder, then: {mend}") from error
    try:
        return _open_ours(path, meta, tokenizer, may_extend)
    except _Damaged as error:
        raise DataError(f"the token folder {path} is damaged: {error}", fix=f"remove it, then: {mend}") from error


class _Damaged(Exception):
    """Says in a few words what is wrong with a token folder."""


def _open_ours(path: Path, meta: dict[str, Any], tokenizer: Tokenizer | None, may_extend: bool) -> TokenFolder:
    version = meta.get("format")
    if type(version) is not int or not 1 <= version <= FORMAT:
        raise DataError(f"{path} has token format {repr(version)[:20]}; this version of nnx reads 1 to {FORMAT}")
    own = load_tokenizer(path / "tokenizer.json")
    stated = meta.get("tokenizer")
    if not isinstance(stated, dict) or stated.get("fingerprint") != own.fingerprint:
        raise DataError(
            f"{path} was not made with its tokenizer.json", fix=f"nnx prepare FILE --out {quoted(f'{path}-new')}"
        )
    is_extended = tokenizer is not None and may_extend and with_template(tokenizer).fingerprint == own.fingerprint
    if tokenizer is not None and tokenizer.fingerprint != own.fingerprint and not is_extended:
        raise DataError(f"{path} was made with another tokenizer: {own.kind} of {own.vocab_size} ids")
    if meta.get("vocab_size") != own.vocab_size or meta.get("dtype") != own.dtype.name:
        raise _Damaged("meta.json and tokenizer.json do not agree")
    digests = _digests(meta, version)
    ids = {split: _ids(path / f"{split}.bin", _count(meta, "tokens", split), own.dtype) for split in SPLITS}
    documents = {split: _one_document() for split in SPLITS}
    masks: dict[str, np.ndarray | None] = dict.fromkeys(MASKS)
    if version > 1:
        documents = {split: _documents(path / f"{split}.documents", len(ids[split])) for split in SPLITS}
        masks = {n: _mask(path / n, len(ids[split]), n in digests) for n, split in zip(MASKS, SPLITS, strict=True)}
    _verify(path, digests, own)
    digests |= {
        name: files.sha256_file(path / name) for name, mask in masks.items() if mask is not None and name not in digests
    }
    return TokenFolder(
        path=path,
        **ids,
        vocab_size=own.vocab_size,
        tokenizer=own,
        meta=meta,
        fingerprint=_fingerprint(digests, own.fingerprint),
        text_bytes=sum(_count(meta, "text_bytes", split) for split in SPLITS),
        documents=documents,
        mask=masks[MASKS[0]],
        val_mask=masks[MASKS[1]],
    )


def _digests(meta: dict[str, Any], version: int) -> dict[str, str]:
    """SHA-256 of the files of a folder, by their names."""
    needed = [f"{split}.{kind}" for split in SPLITS for kind in ("bin", "documents")[:version]]
    known = [*needed, *MASKS] if version > 1 else needed
    stated = meta.get("sha256")
    if not isinstance(stated, dict) or not all(isinstance(stated.get(name), str) for name in needed):
        raise _Damaged("meta.json lacks the SHA-256 of its files")
    return {name: str(stated[name]) for name in known if name in stated}


def _verify(path: Path, digests: Mapping[str, str], tokenizer: Tokenizer) -> None:
    """Read all files of a folder once and compare them with their SHA-256."""
    for name, wanted in digests.items():
        if name.endswith(".bin"):
            sha256, largest = digest_ids(path / name, tokenizer.dtype)
        else:
            sha256, largest = files.sha256_file(path / name), 0
        if sha256 != wanted:
            raise _Damaged(f"{name} is not what was written (SHA-256)")
        if largest >= tokenizer.vocab_size:
            raise _Damaged(f"{name} has id {largest} in a vocabulary of {tokenizer.vocab_size}")


def _ids(file: Path, n_tokens: int, dtype: np.dtype) -> np.ndarray:
    size = file.stat().st_size
    if not n_tokens or size != n_tokens * dtype.itemsize:
        raise _Damaged(f"{file.name} has {counted(size, 'byte')}, not {counted(n_tokens, 'token')} of {dtype.itemsize}")
    return np.memmap(file, dtype, mode="r")


def _documents(file: Path, n_tokens: int) -> np.ndarray:
    size = file.stat().st_size if file.is_file() else 0
    if not size or size % START_DTYPE.itemsize:
        raise _Damaged(f"{file.name} has {counted(size, 'byte')}, not a number of 8 for each document")
    last = -1
    for starts in read_ids(file, START_DTYPE):
        steps = np.diff(starts.astype(np.int64), prepend=last)
        if (steps <= 0).any() or starts[-1] >= n_tokens or (last < 0 and starts[0]):
            raise _Damaged(f"{file.name} does not ascend from 0 to {n_tokens:,} tokens")
        last = int(starts[-1])
    return np.memmap(file, START_DTYPE, mode="r")


def _mask(file: Path, n_tokens: int, listed: bool) -> np.ndarray | None:
    """Its bits are little-endian, like those of `numpy.packbits(bitorder="little")`."""
    if not listed and not os.path.lexists(file):
        return None
    size, needed = file.stat().st_size if file.is_file() else 0, -(-n_tokens // 8)
    if size != needed:
        raise _Damaged(f"{file.name} has {counted(size, 'byte')}, not {needed:,} for {counted(n_tokens, 'token')}")
    return np.memmap(file, np.uint8, mode="r")


def _one_document() -> np.ndarray:
    return np.zeros(1, START_DTYPE)


def _open_nanogpt(path: Path, tokenizer: Tokenizer | None) -> TokenFolder:
    """uint16 ids and nothing else that may be opened: meta.pkl could run code."""
    dtype = NANOGPT_DTYPE
    digests, largest = {}, 0
    for split in SPLITS:
        file = path / f"{split}.bin"
        size = file.stat().st_size
        if not size or size % dtype.itemsize:
            raise DataError(f"{file} holds {counted(size, 'byte')}; a nanoGPT folder holds {dtype.name} ids")
        digests[f"{split}.bin"], last = digest_ids(file, dtype)
        largest = max(largest, last)
    if tokenizer is not None and largest >= tokenizer.vocab_size:
        raise DataError(f"{path} has id {largest}; the tokenizer {tokenizer.kind} has {tokenizer.vocab_size} ids")
    vocab_size, text_bytes = _round_vocab_size(largest + 1), None
    train, val = (np.memmap(path / f"{split}.bin", dtype, mode="r") for split in SPLITS)
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
        meta={"dtype": dtype.name, "sha256": digests, "tokens": {"train": len(train), "val": len(val)}},
        fingerprint=_fingerprint(digests, tokenizer.fingerprint if tokenizer else ""),
        text_bytes=text_bytes,
    )


def _round_vocab_size(n: int) -> int:
    """n up to 256, above that the next multiple of 64, which matrices like."""
    return n if n <= 256 else -(-n // NANOGPT_ROUND) * NANOGPT_ROUND


def _count(meta: dict[str, Any], key: str, split: str) -> int:
    counts = meta.get(key)
    count = counts.get(split) if isinstance(counts, dict) else None
    if type(count) is not int or count < 0:
        raise _Damaged(f"meta.json lacks {key} of {split}")
    return count


def _fingerprint(digests: Mapping[str, str], tokenizer_fingerprint: str) -> str:
    """What decides the examples of a run. Boundaries of documents do where there is a mask."""
    parts = [*(digests[f"{split}.bin"] for split in SPLITS), tokenizer_fingerprint]
    for name in MASKS:
        if name in digests:
            parts += [digests[name], digests[name.replace(".mask", ".documents")]]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()
