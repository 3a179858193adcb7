"""Text to ids and back. Every tokenizer encodes any text and loses nothing but lone surrogates.

The simple ones live here: `byte` (ids are the UTF-8 bytes) and `char` (the characters of a corpus, after 256 byte
tokens for all others). Byte pair encoding is in `bpe.py`, the file format in `tokenizer_json.py`.
"""

from __future__ import annotations

import codecs
import hashlib
import json
from collections.abc import Iterable, Iterator
from functools import cached_property
from pathlib import Path

import numpy as np

from nnx_cli.errors import UsageError

N_BYTES = 256
N_CODE_POINTS = 0x110000


class Tokenizer:
    """A vocabulary and its algorithm. `tokens[id]` is the bytes an id stands for, empty for special and unused ids."""

    pattern: str | None = None  # what splits text before byte pairs are merged
    specials: dict[str, int] = {}

    def __init__(self, kind: str, tokens: list[bytes], eot_id: int | None = None) -> None:
        self.kind = kind
        self.tokens = tokens
        self.eot_id = eot_id

    @property
    def vocab_size(self) -> int:
        return len(self.tokens)

    @property
    def dtype(self) -> np.dtype:
        """The narrowest little-endian type that holds every id: uint8, uint16 or uint32."""
        return np.dtype("u1" if self.vocab_size <= 2**8 else "<u2" if self.vocab_size <= 2**16 else "<u4")

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 (hex) over algorithm, pattern, special ids and every token: equal exactly when all ids are."""
        head = {
            "algorithm": self.kind if self.kind in ("byte", "char") else "bpe",
            "pattern": self.pattern,
            "specials": sorted(self.specials.items()),
            "eot_id": self.eot_id,
        }
        digest = hashlib.sha256(json.dumps(head).encode())
        digest.update("\n".join(token.hex() for token in self.tokens).encode())
        return digest.hexdigest()

    @cached_property
    def separator(self) -> np.ndarray:
        """Ids that stand between two documents: the end-of-text id, or else a newline."""
        return self.encode("\n") if self.eot_id is None else np.array([self.eot_id], self.dtype)

    def encode(self, text: str) -> np.ndarray:
        """Ids (N,) of `dtype`. Lone surrogates count as U+FFFD."""
        raise NotImplementedError

    def hasten(self) -> None:
        """Called before much text is encoded: take the fastest encoder that is installed."""

    @property
    def doubt(self) -> str | None:
        """What to tell the user of a fast encoder that was given up."""
        return None

    def safe_cut(self, text: str) -> tuple[int, bool]:
        """The last place where `text` may be cut, whatever follows it: both parts encode to the ids of the whole.

        0 asks for more text. The flag is True where a run had to be cut that offers no such place.
        """
        return len(text), False

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The bytes of `ids`; special and unused ids add nothing. An id outside the vocabulary is an IndexError."""
        flat = np.asarray(ids if isinstance(ids, np.ndarray) else list(ids), dtype=np.int64).tolist()
        if flat and min(flat) < 0:
            raise IndexError(f"id {min(flat)} is negative")
        return b"".join(map(self.tokens.__getitem__, flat))

    def decode(self, ids: Iterable[int]) -> str:
        """Text of `ids`; bytes that are not UTF-8 become U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def token_bytes(self) -> np.ndarray:
        """Length in bytes of every id, int32 (V,); 0 for end-of-text."""
        return np.fromiter(map(len, self.tokens), np.int32, self.vocab_size)

    def save(self, path: Path | str) -> None:
        """Write tokenizer.json in the format of Hugging Face's `tokenizers`. OSError passes through."""
        from nnx_cli.data.tokenizers.hf_json import to_json

        Path(path).write_text(json.dumps(to_json(self), ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


class ByteTokenizer(Tokenizer):
    """Ids are the bytes of UTF-8; nothing to train, nothing to look up."""

    def __init__(self) -> None:
        super().__init__("byte", [bytes([b]) for b in range(N_BYTES)])

    def encode(self, text: str) -> np.ndarray:
        return np.frombuffer(bytearray(utf8(text)), np.uint8)


class CharTokenizer(Tokenizer):
    """Ids 0..255 are single bytes, then one id a character, in the order of their code points."""

    def __init__(self, characters: Iterable[str]) -> None:
        self.characters = sorted(set(characters))
        super().__init__("char", [bytes([b]) for b in range(N_BYTES)] + [c.encode() for c in self.characters])
        codes = np.array([ord(c) for c in self.characters], np.int64)
        self._id_of = np.zeros(N_CODE_POINTS, self.dtype)  # 0: not in the vocabulary (no character has id 0)
        self._id_of[codes] = np.arange(N_BYTES, self.vocab_size, dtype=self.dtype)

    @classmethod
    def train(cls, pieces: Iterable[str], vocab_size: int | None = None) -> CharTokenizer:
        """All characters of the text, or the `vocab_size` - 256 most frequent ones."""
        if vocab_size is None:
            return cls(_distinct(pieces))
        if vocab_size < N_BYTES:
            raise UsageError(f"--vocab-size is {vocab_size}; char needs at least {N_BYTES}, one id for every byte")
        counts = np.zeros(N_CODE_POINTS, np.int64)
        for piece in pieces:
            n = np.bincount(_code_points(piece))
            counts[: len(n)] += n
        frequent = np.argsort(-counts, kind="stable")[: vocab_size - N_BYTES]
        return cls(chr(code) for code in frequent if counts[code])

    def encode(self, text: str) -> np.ndarray:
        codes = _code_points(text)
        ids = np.empty(len(codes), self.dtype)
        np.take(self._id_of, codes, out=ids, mode="clip")  # no code is outside: this mode is the one without a copy
        if len(ids) and not ids.all():
            return self._encode_rare(codes, ids)
        return ids

    def _encode_rare(self, codes: np.ndarray, ids: np.ndarray) -> np.ndarray:
        """Put the bytes of unknown characters where `ids` is 0."""
        parts, position = [], 0
        unknown = np.flatnonzero(ids == 0)
        runs = np.split(unknown, np.flatnonzero(np.diff(unknown) > 1) + 1)
        for run in runs:
            first, last = int(run[0]), int(run[-1]) + 1
            raw = codes[first:last].astype("<u4").tobytes().decode("utf-32-le").encode()
            parts += [ids[position:first], np.frombuffer(raw, np.uint8).astype(self.dtype)]
            position = last
        return np.concatenate([*parts, ids[position:]])


class StreamDecoder:
    """Turns ids that arrive one by one into text, whole characters at a time."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokens = tokenizer.tokens
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_id: int) -> str:
        """The characters that this id completes; may be empty."""
        return self._utf8.decode(self._tokens[token_id])


def utf8(text: str) -> bytes:
    """UTF-8 of any str: surrogate pairs are joined, lone surrogates become U+FFFD."""
    try:
        return text.encode()
    except UnicodeEncodeError:
        return well_formed(text).encode()


def well_formed(text: str) -> str:
    """`text` with surrogate pairs joined and lone surrogates replaced by U+FFFD."""
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


def _code_points(text: str) -> np.ndarray:
    if text.isascii():
        return np.frombuffer(text.encode(), np.uint8)
    try:
        raw = text.encode("utf-32-le")
    except UnicodeEncodeError:
        raw = well_formed(text).encode("utf-32-le")
    return np.frombuffer(raw, "<u4")


def _distinct(pieces: Iterable[str]) -> Iterator[str]:
    """Every character once. Known ASCII is deleted at memory speed, so that a plain text costs next to nothing."""
    ascii_seen = b""
    seen = np.zeros(N_CODE_POINTS, bool)
    for piece in pieces:
        if piece.isascii():
            ascii_seen += bytes(set(piece.encode().translate(None, ascii_seen)))
        else:
            codes = _code_points(piece)
            seen[codes[~seen[codes]]] = True
    seen[list(ascii_seen)] = True
    return map(chr, np.flatnonzero(seen).tolist())


def build_tokenizer(
    kind_or_file: str, *, vocab_size: int | None = None, sample: Iterator[str] | None = None
) -> Tokenizer:
    """The tokenizer of that name, trained on `sample` (pieces of text) where it is `char` or `bpe`.

    UsageError for a name that is no kind and no file, or a `vocab_size` that the tokenizer cannot have;
    MissingFeature where an extra or a vocabulary is not on this machine; DataError for a damaged file.
    """
    from nnx_cli.data.tokenizers import bpe

    if kind_or_file == "char":
        return CharTokenizer.train(sample or iter(()), vocab_size)
    if kind_or_file == "bpe":
        return bpe.train(sample or iter(()), bpe.DEFAULT_VOCAB_SIZE if vocab_size is None else vocab_size)
    if kind_or_file == "byte":
        tokenizer = ByteTokenizer()
    elif kind_or_file in bpe.PUBLISHED:
        tokenizer = bpe.published(kind_or_file)
    elif Path(kind_or_file).is_file():
        tokenizer = load_tokenizer(kind_or_file)
    else:
        kinds = ", ".join(["byte", "char", "bpe", *bpe.PUBLISHED])
        raise UsageError(f"--tokenizer is {kind_or_file!r}; choose from {kinds}, or name a tokenizer.json")
    if vocab_size is not None and vocab_size != tokenizer.vocab_size:
        raise UsageError(f"--vocab-size is {vocab_size}; {kind_or_file} has {tokenizer.vocab_size} tokens")
    return tokenizer


def needs_training(kind_or_file: str) -> bool:
    """Whether `build_tokenizer` reads a sample: char and bpe."""
    return kind_or_file in ("char", "bpe")


def load_tokenizer(path: Path | str) -> Tokenizer:
    """The tokenizer of a tokenizer.json, ours or a foreign byte-level one. DataError where missing or damaged."""
    from nnx_cli.data.tokenizers.hf_json import read

    return read(Path(path))
