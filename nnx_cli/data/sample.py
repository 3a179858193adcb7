"""A bounded part of a text, spread evenly: what is measured of a token folder takes no longer for a larger one."""

from __future__ import annotations

import numpy as np

from nnx_cli.data.tokenizers.base import Tokenizer
from nnx_cli.data.tokenizers.byte import ByteTokenizer

PIECES = 64
PROBE_TOKENS = 2**16  # that tell how many bytes a token has
BLOCK_TOKENS = 2**19  # turned into text at once


def spread(ids: np.ndarray, most: int) -> np.ndarray:
    """A copy of the ids, or of pieces of them, spread evenly, that have at most so many together."""
    if len(ids) <= most:
        return np.array(ids)
    pieces = max(1, min(PIECES, most))
    length = most // pieces
    starts = (number * (len(ids) - length) // max(1, pieces - 1) for number in range(pieces))
    return np.concatenate([ids[start : start + length] for start in starts])


def spread_ids(ids: np.ndarray, tokenizer: Tokenizer, most_bytes: int) -> np.ndarray:
    """Ids that stand for about so many bytes of text, spread evenly; all where those are fewer."""
    a_token = tokenizer.token_bytes()[spread(ids, PROBE_TOKENS)].mean() if len(ids) else 1
    return spread(ids, int(most_bytes / max(a_token, 1)))


def text_of(ids: np.ndarray, tokenizer: Tokenizer) -> np.ndarray:
    """The bytes that ids stand for: uint8."""
    if isinstance(tokenizer, ByteTokenizer) and not tokenizer.specials:
        return ids.astype(np.uint8, copy=False)
    blocks = range(0, len(ids), BLOCK_TOKENS)
    return np.frombuffer(
        b"".join(tokenizer.decode_bytes(ids[start : start + BLOCK_TOKENS]) for start in blocks), np.uint8
    )


def spread_text(ids: np.ndarray, tokenizer: Tokenizer, most_bytes: int) -> np.ndarray:
    """At most so many bytes of the text of ids, spread evenly: uint8."""
    return text_of(spread_ids(ids, tokenizer, most_bytes), tokenizer)[:most_bytes]


def histogram(ids: np.ndarray, n_kinds: int) -> np.ndarray:
    """How often each of the ids 0 … n_kinds - 1 occurs; a block at a time, for each is made 64 bits wide."""
    counts = np.zeros(n_kinds, np.int64)
    for start in range(0, len(ids), BLOCK_TOKENS):
        counts += np.bincount(ids[start : start + BLOCK_TOKENS], minlength=n_kinds)
    return counts
