"""Ids are the bytes of UTF-8."""

from __future__ import annotations

import numpy as np

from nnx_cli.data.tokenizers.base import N_BYTES, Tokenizer, utf8


class ByteTokenizer(Tokenizer):
    """Ids are the bytes of UTF-8; nothing to train, nothing to look up."""

    def __init__(self) -> None:
        super().__init__("byte", [bytes([b]) for b in range(N_BYTES)])

    def encode(self, text: str) -> np.ndarray:
        """Ids (N,) uint8."""
        return np.frombuffer(bytearray(utf8(text)), np.uint8)
