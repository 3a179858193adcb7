"""What a model writes by heart: the longest piece of its samples that stands in the training text, and how many of
their pieces of 50 tokens do (as in Carlini et al. 2022, https://arxiv.org/abs/2202.07646).

Pieces are found by a polynomial hash modulo 2^64 (Karp and Rabin 1987). The samples are few, so theirs are what is
kept; the training text streams by in blocks, in memory that does not grow with it, once for every length that is asked
for. Pieces whose hashes are equal are compared token by token.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from nnx_cli.data.loader import mix

GRAM = 50  # tokens
SEARCHED_BYTES = 64 * 2**20  # of the training text's ids
BLOCK_TOKENS = 2**20  # of the training text at a time
BASE = 0x5851F42D4C957F2D  # odd, so that it has an inverse modulo 2^64
INVERSE = pow(BASE, -1, 2**64)
FILTER_BITS = 20


@dataclass(frozen=True)
class Copies:
    """What texts share with a training text."""

    longest: np.ndarray  # the longest piece of one text that stands there, (L,) ids
    share: float | None  # of all pieces of GRAM tokens, those that stand there; None where no text has one


def pieces_like(samples: Sequence[np.ndarray], text: np.ndarray) -> list[np.ndarray]:
    """Pieces of a text, evenly spread, as many and as long as the samples, or as it has."""
    starts = np.linspace(0, max(0, len(text) - max(map(len, samples))), len(samples)).astype(int)
    return [np.asarray(text[start : start + len(s)], np.int64) for start, s in zip(starts, samples, strict=True)]


def searched(training: np.ndarray) -> np.ndarray:
    """The part of a training text that is searched: its beginning, of at most SEARCHED_BYTES."""
    return training[: SEARCHED_BYTES // training.dtype.itemsize]


def find_copies(texts: Sequence[np.ndarray], training: np.ndarray) -> Copies:
    """What `texts` share with all of `training`; both are ids."""
    longest_text = max((len(text) for text in texts), default=0)
    grams = _Grams(texts, GRAM)
    occurs = grams.occurring(training) if len(grams) else np.empty(0, bool)
    found = grams.piece(int(occurs.argmax())) if occurs.any() else np.empty(0, np.int64)
    shortest, too_long = (GRAM, longest_text + 1) if len(found) else (0, min(GRAM, longest_text + 1))
    while too_long - shortest > 1:  # a piece that stands there begins with a shorter one
        length = min((shortest + too_long) // 2, 2 * shortest + 8)
        longer = _Grams(texts, length)
        if (number := longer.first_occurring(training)) is None:
            too_long = length
        else:
            shortest, found = length, longer.piece(number)
    return Copies(found, float(occurs.mean()) if len(grams) else None)


class _Grams:
    """All pieces of a length in some texts, found in another text by their hashes."""

    def __init__(self, texts: Sequence[np.ndarray], length: int) -> None:
        self.texts, self.length = texts, length
        self.places = [(text, start) for text, ids in enumerate(texts) for start in range(len(ids) - length + 1)]
        hashes = [_hashes(np.asarray(ids, np.int64), length) for ids in texts if len(ids) >= length]
        flat = np.concatenate(hashes) if hashes else np.empty(0, np.uint64)
        self.hashes, self.first, self.which = np.unique(flat, return_index=True, return_inverse=True)
        self.may_occur = np.zeros(2**FILTER_BITS, bool)  # by the leading bits of a hash
        self.may_occur[self.hashes >> np.uint64(64 - FILTER_BITS)] = True

    def __len__(self) -> int:
        return len(self.places)

    def piece(self, number: int) -> np.ndarray:
        """The ids of a piece."""
        text, start = self.places[number]
        return self.texts[text][start : start + self.length]

    def occurring(self, training: np.ndarray) -> np.ndarray:
        """Which pieces stand in `training`, (number of pieces,) bool."""
        found = np.zeros(len(self.hashes), bool)
        for numbers in self._matches(training):
            found[numbers] = True
        return found[self.which]

    def first_occurring(self, training: np.ndarray) -> int | None:
        """A piece that stands in `training`, if any does."""
        return next((int(self.first[numbers[0]]) for numbers in self._matches(training)), None)

    def _matches(self, training: np.ndarray) -> Iterator[np.ndarray]:
        """Block by block, numbers of the hashes whose pieces stand there, each compared with one place that has it."""
        for begin in range(0, len(training) - self.length + 1, BLOCK_TOKENS):
            ids = np.asarray(training[begin : begin + BLOCK_TOKENS + self.length - 1], np.int64)
            hashes = _hashes(ids, self.length)
            places = np.flatnonzero(self.may_occur[hashes >> np.uint64(64 - FILTER_BITS)])
            numbers = np.searchsorted(self.hashes, hashes[places])
            numbers[numbers == len(self.hashes)] = 0
            equal = self.hashes[numbers] == hashes[places]
            numbers, first = np.unique(numbers[equal], return_index=True)
            same = [
                np.array_equal(self.piece(int(self.first[number])), ids[place : place + self.length])
                for number, place in zip(numbers, places[equal][first], strict=True)
            ]
            if any(same):
                yield numbers[np.array(same)]


def _hashes(ids: np.ndarray, length: int) -> np.ndarray:
    """Hashes of all windows of `length` ids, uint64 (N - length + 1,): sums of id codes times powers of BASE, those
    before the window divided out."""
    with np.errstate(over="ignore"):
        sums = np.concatenate((np.zeros(1, np.uint64), np.cumsum(mix(ids, GRAM) * _powers(BASE, len(ids)))))
        return (sums[length:] - sums[:-length]) * _powers(INVERSE, len(ids) - length + 1)


@lru_cache(maxsize=8)  # the blocks of a training text are of one length
def _powers(base: int, n: int) -> np.ndarray:
    """1, base, base², … modulo 2^64, (n,)."""
    factors = np.full(n, base, np.uint64)
    factors[:1] = 1
    powers = np.cumprod(factors)
    powers.setflags(write=False)
    return powers
