"""What a byte 5-gram gets on a text, in bits per byte: the reference that any model of text should beat.

Interpolated Witten-Bell smoothing (Witten and Bell 1991, https://doi.org/10.1109/18.87000): a context that was followed
N times, by T different bytes, gives the byte c the chance (N(c) + T * P(c | a context shorter by one)) / (N + T), where
N(c) of the N were c. The shortest, empty context is mixed with 1/256 in the same way.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

from nnx_cli.data.sample import histogram, spread_text
from nnx_cli.data.sorted_keys import places_of, run_starts
from nnx_cli.data.tokenizers.base import N_BYTES, Tokenizer

ORDER = 5
TRAIN_BYTES, VAL_BYTES = 16_000_000, 1_000_000  # that are read at most
RANGE_GRAMS = 2**21  # counted at once, but for more that begin with the same byte
BYTE = np.uint64(8)  # bits, by which n-grams are shifted


def ngram_reference(train: np.ndarray, val: np.ndarray, tokenizer: Tokenizer) -> float | None:
    """Bits per byte on the ids `val` of a 5-gram of the bytes of the ids `train`, both sampled evenly where they are
    long. None where the ids of `val` stand for no bytes."""
    return bits_per_byte(spread_text(train, tokenizer, TRAIN_BYTES), spread_text(val, tokenizer, VAL_BYTES))


def bits_per_byte(
    train: np.ndarray, val: np.ndarray, on_progress: Callable[[float], None] = lambda done: None
) -> float | None:
    """Bits per byte on `val` (M,) of a 5-gram that has counted `train` (N,), both uint8; None without anything in
    `val`. Its first bytes are told from the shorter contexts that they have."""
    if not len(val):
        return None
    found = {n: np.zeros((3, max(0, len(val) - n + 1)), np.uint32) for n in range(2, ORDER + 1)}
    singles = histogram(train, N_BYTES)
    for first, last in _ranges(singles):
        grams, counts = np.unique(_grams(train, ORDER, first, last)[0], return_counts=True)
        for n in range(ORDER, 1, -1):
            asked, starts = _grams(val, n, first, last)
            found[n][:, starts] = _look_up(grams, counts, asked)
            grams, counts = _shortened(grams, counts, train, n, first, last)
        on_progress(float(singles[: last + 1].sum() / max(1, len(train))))
    kinds = np.count_nonzero(singles)
    chances = ((singles + kinds / N_BYTES) / (len(train) + kinds) if kinds else np.full(N_BYTES, 1 / N_BYTES))[val]
    for n, (occurs, followed, different) in found.items():
        shorter = chances[n - 1 :]
        mixed, total = occurs + different * shorter, followed + different.astype(np.float64)
        chances[n - 1 :] = np.divide(mixed, total, out=shorter.copy(), where=followed > 0)
    return float(-np.log2(chances).mean())


def _ranges(counts: np.ndarray) -> Iterator[tuple[int, int]]:
    """First and last byte of ranges of bytes that occur about RANGE_GRAMS times together: memory is bounded by that."""
    numbers = (np.cumsum(counts) - counts) // RANGE_GRAMS
    for number in np.unique(numbers):
        values = np.flatnonzero(numbers == number)
        yield int(values[0]), int(values[-1])


def _grams(text: np.ndarray, n: int, first: int, last: int) -> tuple[np.ndarray, np.ndarray]:
    """The n-grams of a text that begin with a byte of a range, uint64 with the first byte in the highest place; and the
    places where they begin."""
    begins = text[: max(0, len(text) - n + 1)]
    starts = np.flatnonzero((begins >= first) & (begins <= last))
    grams = text[starts].astype(np.uint64)
    for place in range(1, n):
        grams <<= BYTE
        grams |= text[place:].take(starts)
    return grams, starts


def _shortened(
    grams: np.ndarray, counts: np.ndarray, text: np.ndarray, n: int, first: int, last: int
) -> tuple[np.ndarray, np.ndarray]:
    """Of all n-grams that begin with a byte of a range, those that are shorter by one: their beginnings, and the last
    one of the text, which begins no n-gram."""
    starts = run_starts(shorter := grams >> BYTE)
    shorter, counts = shorter[starts], np.add.reduceat(counts, starts) if len(starts) else counts
    begin = len(text) - n + 1
    if begin >= 0 and first <= text[begin] <= last:
        gram = _grams(text[begin:], n - 1, first, last)[0]
        place = int(np.searchsorted(shorter, gram)[0])
        if place < len(shorter) and shorter[place] == gram[0]:
            counts[place] += 1
        else:
            shorter, counts = np.insert(shorter, place, gram), np.insert(counts, place, 1)
    return shorter, counts


def _look_up(grams: np.ndarray, counts: np.ndarray, asked: np.ndarray) -> np.ndarray:
    """Of each n-gram that is asked for, (3, K): how often it occurs, how often anything follows its context, and how
    many different bytes do. `grams` are sorted."""
    found = np.zeros((3, len(asked)), np.uint32)
    if not len(grams) or not len(asked):
        return found
    starts = run_starts(contexts := grams >> BYTE)
    places, known = places_of(asked >> BYTE, contexts[starts])
    found[1] = known * np.add.reduceat(counts, starts)[places]
    found[2] = known * np.diff(starts, append=len(grams))[places]
    places, known = places_of(asked, grams)
    found[0] = known * counts[places]
    return found
