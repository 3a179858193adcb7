"""Documents that are there twice, word for word: in a split, or in both; counted in its files."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from hashlib import blake2b
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np

from nnx_cli.data.sorted_keys import places_of
from nnx_cli.data.token_file import START_DTYPE, read_ids
from nnx_cli.data.tokenizers.base import Tokenizer

BATCH_DOCUMENTS = 2**11
BATCH_TOKENS = 2**20  # but for a document that is longer
REMEMBERED = 10_000_000  # documents of one split; of more, a sample
HELD = 2**20  # validation documents looked for in one pass over the training text, which takes 100 MB at most
MARKS, MIN_MARKS = 16, 2**16  # bytes for each of them, and at least
ODD, HALF = np.uint64(0x9E3779B97F4A7C15), np.uint64(32)  # multiples of 2^64 / golden ratio are spread well


class _Batch(NamedTuple):
    """Documents that lie side by side in a file."""

    path: Path
    first: int  # token of the file
    ids: np.ndarray  # (N,), mapped: only what is looked at is in memory
    starts: np.ndarray  # (D,) in ids
    lengths: np.ndarray  # (D,) without the separator


class _Held(NamedTuple):
    """Validation documents to look for."""

    keys: np.ndarray  # sorted
    marks: np.ndarray  # true at the remainder of every key: most others are told by it alone
    digests: np.ndarray  # sorted, each once
    counts: np.ndarray  # how many documents have that digest
    found: np.ndarray  # whether one in the training text has it

    def look_at(self, batch: _Batch) -> None:
        """Note which of them are in the batch."""
        keys = _keys(batch)
        near = np.flatnonzero(self.marks[keys % np.uint64(len(self.marks))])
        near = near[places_of(keys[near], self.keys)[1]]
        places, known = places_of(_digests(batch, near), self.digests)
        self.found[places[known]] = True


def count_copies(train: Path, val: Path, tokenizer: Tokenizer) -> int:
    """How many documents of the file `val` are documents of `train` too; a line break at their end does not count.

    Documents count as equal when 64 bits of their BLAKE2b are.
    """
    n_copies, held_out = 0, _batches(val, tokenizer)
    while held := _next_held(held_out):
        for batch in _batches(train, tokenizer) if len(held.keys) else ():
            held.look_at(batch)
        n_copies += int(held.counts[held.found].sum())
    return n_copies


class Repeats(NamedTuple):
    """Of `n_documents` that were looked at, `n_repeated` are copies of one before."""

    n_documents: int
    n_repeated: int


def count_repeats(path: Path, tokenizer: Tokenizer, deadline: float = math.inf) -> Repeats:
    """How many documents of a file stand earlier in it; a line break at their end does not count, nor do empty ones.

    Where there are more than REMEMBERED, those are looked at whose keys fall into a share of all keys: copies do
    together. Ends before a `deadline` (of `time.perf_counter`), with the documents up to there.
    """
    n_all = path.with_suffix(".documents").stat().st_size // START_DTYPE.itemsize
    share = np.uint64(-(-n_all // REMEMBERED) or 1)
    keys, begun = [np.empty(0, np.uint64)], time.perf_counter()
    for batch in _batches(path, tokenizer):
        keys.append(_kept_keys(batch, share)[1])
        if time.perf_counter() - begun > (deadline - begun) / 3:  # what follows takes up to twice as long
            break
    values, counts = np.unique(np.concatenate(keys), return_counts=True)
    repeated = values[counts > 1]  # by chance too: digests tell
    if not len(repeated):
        return Repeats(sum(map(len, keys)), 0)
    n_documents, digests = 0, []
    for batch in islice(_batches(path, tokenizer), len(keys) - 1):
        kept, found = _kept_keys(batch, share)
        n_documents += len(kept)
        digests.append(_digests(batch, kept[places_of(found, repeated)[1]]))
        if time.perf_counter() > deadline:
            break
    found = np.concatenate(digests)
    return Repeats(n_documents, len(found) - len(np.unique(found)))


def _kept_keys(batch: _Batch, share: np.uint64) -> tuple[np.ndarray, np.ndarray]:
    """Which documents of a batch are looked at, and their keys."""
    keys = _keys(batch)
    kept = np.flatnonzero((batch.lengths > 0) & (keys % share == 0))
    return kept, keys[kept]


def _next_held(batches: Iterator[_Batch]) -> _Held | None:
    """The next HELD documents; None at the end."""
    all_keys, all_digests, n = [], [], 0
    for batch in batches:
        kept = np.flatnonzero(batch.lengths)
        all_keys.append(_keys(batch)[kept])
        all_digests.append(_digests(batch, kept))
        n += len(kept)
        if n >= HELD:
            break
    if not all_keys:
        return None
    keys = np.sort(np.concatenate(all_keys))
    digests, counts = np.unique(np.concatenate(all_digests), return_counts=True)
    marks = np.zeros(max(MIN_MARKS, MARKS * len(keys)), bool)
    marks[keys % np.uint64(len(marks))] = True
    return _Held(keys, marks, digests, counts, np.zeros(len(digests), bool))


def _keys(batch: _Batch) -> np.ndarray:
    """(D,) uint64: equal for equal documents, and mostly different for others."""
    keys = batch.lengths.astype(np.uint64)
    last = np.maximum(batch.lengths - 1, 0)
    for place in (0, last >> 2, last >> 1, last):
        keys *= ODD
        keys ^= keys >> HALF
        keys += batch.ids[batch.starts + place]
    keys *= ODD
    keys ^= keys >> HALF
    return keys


def _digests(batch: _Batch, which: np.ndarray) -> np.ndarray:
    """(len(which),) uint64, of the documents with these numbers."""
    digests = bytearray()
    content, size = batch.ids.view(np.uint8).data, batch.ids.itemsize
    for start, length in zip(batch.starts[which].tolist(), batch.lengths[which].tolist(), strict=True):
        if length <= BATCH_TOKENS:
            digest = blake2b(content[start * size : (start + length) * size], digest_size=8)
        else:
            digest, first = blake2b(digest_size=8), batch.first + start
            for block in read_ids(batch.path, batch.ids.dtype, first, first + length):
                digest.update(block.data)
        digests += digest.digest()
    return np.frombuffer(digests, np.uint64)


def _batches(path: Path, tokenizer: Tokenizer) -> Iterator[_Batch]:
    """All documents of SPLIT.bin, in order."""
    dtype, separator = tokenizer.dtype, tokenizer.separator[-1]
    n_tokens = path.stat().st_size // dtype.itemsize
    for bounds in _bounds(path.with_suffix(".documents"), n_tokens):
        begin = 0
        while begin < len(bounds) - 1:
            first = int(bounds[begin])
            end = max(int(np.searchsorted(bounds, first + BATCH_TOKENS, "right")) - 1, begin + 1)
            ids = np.memmap(path, dtype, "r", first * dtype.itemsize, (int(bounds[end]) - first,))
            starts, stops = bounds[begin:end] - first, bounds[begin + 1 : end + 1] - first
            yield _Batch(path, first, ids, starts, stops - starts - (ids[stops - 1] == separator))
            begin = end


def _bounds(path: Path, n_tokens: int) -> Iterator[np.ndarray]:
    """Starts of documents (int64), up to BATCH_DOCUMENTS at a time, each time with the end of the last one."""
    carried = np.empty(0, np.int64)
    for starts in read_ids(path, START_DTYPE):
        bounds = np.append(carried, starts.astype(np.int64))
        for i in range(0, len(bounds) - 1, BATCH_DOCUMENTS):
            yield bounds[i : i + BATCH_DOCUMENTS + 1]
        carried = bounds[-1:]
    if len(carried):
        yield np.append(carried, n_tokens)
