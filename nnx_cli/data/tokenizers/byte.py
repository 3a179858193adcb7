"""Ids are the bytes of UTF-8, special tokens behind them."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from nnx_cli.data.tokenizers.base import N_BYTES, Tokenizer, end_of_text, utf8


class ByteTokenizer(Tokenizer):
    """Ids are the bytes of UTF-8; nothing to train, nothing to look up."""

    def __init__(self, specials: Mapping[str, int] | None = None) -> None:
        """`specials` have the ids from N_BYTES on, without a gap."""
        specials = specials or {}
        tokens = [bytes([b]) for b in range(N_BYTES)] + [b""] * len(specials)
        super().__init__("byte", tokens, end_of_text(specials), specials)

    def _with_specials(self, specials: dict[str, int]) -> ByteTokenizer:
        return ByteTokenizer(specials)

    def encode(self, text: str) -> np.ndarray:
        """Ids (N,) of `dtype`."""
        return np.frombuffer(bytearray(utf8(text)), np.uint8).astype(self.dtype, copy=False)
