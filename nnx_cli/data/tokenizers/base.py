"""Text to ids and back. Every tokenizer encodes any text and loses nothing but lone surrogates."""

from __future__ import annotations

import codecs
import hashlib
import json
from collections.abc import Iterable, Mapping
from functools import cached_property

import numpy as np

from nnx_cli.system.text import well_formed

N_BYTES = 256
END_OF_TEXT = "<|endoftext|>"
END_OF_TEXT_NAMES = (END_OF_TEXT, "<|end_of_text|>", "</s>", "<|im_end|>", "<eos>")


class Tokenizer:
    """A vocabulary and its algorithm. `tokens[id]` is the bytes an id stands for, empty for special and unused ids."""

    pattern: str | None = None  # what splits text before byte pairs are merged

    def __init__(
        self, kind: str, tokens: list[bytes], eot_id: int | None = None, specials: Mapping[str, int] | None = None
    ) -> None:
        """`specials` are the ids of special tokens by their names; in a text these names stay text."""
        self.kind = kind
        self.tokens = tokens
        self.eot_id = eot_id
        self.specials = dict(specials or {})

    @property
    def vocab_size(self) -> int:
        """Number of ids, special and unused ones too."""
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

    def with_specials(self, names: Iterable[str]) -> Tokenizer:
        """The same tokenizer, with a special token of each of these names; new ones follow its ids."""
        new = [name for name in names if name not in self.specials]
        return self._with_specials(self.specials | {name: self.vocab_size + i for i, name in enumerate(new)})

    def _with_specials(self, specials: dict[str, int]) -> Tokenizer:
        raise NotImplementedError

    def use_fast_encoder(self) -> None:
        """Take the fastest encoder that is installed; worth its start before much text is encoded."""

    @property
    def warning(self) -> str | None:
        """Why a fast encoder was given up, for the user."""
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


class StreamDecoder:
    """Turns ids that arrive one by one into text, whole characters at a time."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokens = tokenizer.tokens
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_id: int) -> str:
        """The characters that this id completes; may be empty."""
        return self._utf8.decode(self._tokens[token_id])


def end_of_text(specials: Mapping[str, int]) -> int | None:
    """The id of end-of-text among special tokens, under whatever name."""
    return next((specials[name] for name in END_OF_TEXT_NAMES if name in specials), None)


def utf8(text: str) -> bytes:
    """UTF-8 of any str: surrogate pairs are joined, lone surrogates become U+FFFD."""
    try:
        return text.encode()
    except UnicodeEncodeError:
        return well_formed(text).encode()
