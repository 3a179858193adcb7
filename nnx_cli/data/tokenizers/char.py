"""One id a character of a corpus, and 256 byte tokens for all others."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import numpy as np

from nnx_cli.data.tokenizers.base import N_BYTES, Tokenizer, end_of_text
from nnx_cli.errors import UsageError
from nnx_cli.system.text import well_formed

N_CODE_POINTS = 0x110000


class CharTokenizer(Tokenizer):
    """Ids 0..255 are single bytes, then one id a character, in the order of their code points; special tokens last."""

    def __init__(self, characters: Iterable[str], specials: Mapping[str, int] | None = None) -> None:
        """`specials` have the ids behind the characters, without a gap."""
        self.characters = sorted(set(characters))
        specials = specials or {}
        tokens = [bytes([b]) for b in range(N_BYTES)] + [c.encode() for c in self.characters] + [b""] * len(specials)
        super().__init__("char", tokens, end_of_text(specials), specials)
        codes = np.array([ord(c) for c in self.characters], np.int64)
        self._id_of = np.zeros(N_CODE_POINTS, self.dtype)  # 0: not in the vocabulary (no character has id 0)
        self._id_of[codes] = np.arange(N_BYTES, N_BYTES + len(codes), dtype=self.dtype)

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

    def _with_specials(self, specials: dict[str, int]) -> CharTokenizer:
        return CharTokenizer(self.characters, specials)

    def encode(self, text: str) -> np.ndarray:
        """Ids (N,) of `dtype`; bytes for characters that are not in the vocabulary."""
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
