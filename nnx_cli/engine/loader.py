"""Token folder to batches. Sample i of a run is a pure function of (seed, i): the only data state is a number."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from nnx_cli.errors import DataError


def mix(values: np.ndarray, key: int) -> np.ndarray:
    """A 64-bit hash of every value under a key (the finaliser of SplitMix64, Steele et al. 2014)."""
    with np.errstate(over="ignore"):
        x = values.astype(np.uint64) + np.uint64((key * 0x9E3779B97F4A7C15 + 0x632BE59BD9B4E019) % 2**64)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def permute(index: np.ndarray, n: int, key: int) -> np.ndarray:
    """Where a keyed permutation of 0 … n − 1 sends `index`: four Feistel rounds, walked until back below n."""
    half = max(1, (max(n - 1, 1).bit_length() + 1) // 2)
    low = np.uint64(2**half - 1)
    x = index.astype(np.uint64)
    todo = np.ones(len(x), dtype=bool)
    while todo.any():
        left, right = x[todo] >> np.uint64(half), x[todo] & low
        for round_ in range(4):
            left, right = right, left ^ (mix(right, key * 4 + round_) & low)
        x[todo] = (left << np.uint64(half)) | right
        todo = x >= n
    return x.astype(np.int64)


def check_length(n_tokens: int, seq_len: int) -> None:
    """Raise DataError unless a stream holds one sequence and the target after its last token."""
    if n_tokens < seq_len + 1:
        raise DataError(
            f"the training text has {n_tokens:,} tokens; one sequence needs {seq_len + 1:,}",
            fix=f"give more text, or take --seq-len {max(1, n_tokens // 4)}",
        )


class Loader:
    """Training batches of a token stream, in an order fixed by `seed`.

    An epoch is a permutation of windows of `seq_len` tokens (and the one that follows, as the last target). Where the
    first window begins differs from epoch to epoch, so that the cuts do too. Raises DataError for a stream shorter than
    one window.
    """

    def __init__(self, tokens: np.ndarray, seq_len: int, seed: int) -> None:
        check_length(len(tokens), seq_len)
        self.tokens, self.seq_len, self.seed = tokens, seq_len, seed
        self.windows = max(1, (len(tokens) - seq_len) // seq_len)  # per epoch

    def starts(self, first: int, count: int) -> np.ndarray:
        """Positions in the stream where samples first … first + count − 1 begin."""
        number = np.arange(first, first + count)
        epochs, places = number // self.windows, number % self.windows
        slack = len(self.tokens) - 1 - self.windows * self.seq_len
        starts = np.empty(count, dtype=np.int64)
        for epoch in np.unique(epochs):
            inside = epochs == epoch
            shift = int(mix(np.array([epoch]), self.seed)[0] % np.uint64(slack + 1))
            key = (self.seed << 20) + int(epoch)
            starts[inside] = permute(places[inside], self.windows, key) * self.seq_len + shift
        return starts

    def batch(self, first: int, count: int) -> tuple[Tensor, Tensor]:
        """Samples first … first + count − 1: input_ids and targets, int64 (count, seq_len) each."""
        return windows_at(self.tokens, self.starts(first, count), self.seq_len)


def windows_at(tokens: np.ndarray, starts: np.ndarray, seq_len: int) -> tuple[Tensor, Tensor]:
    """input_ids and targets, int64 (len(starts), seq_len) each, of the windows that begin at `starts`."""
    rows = torch.from_numpy(tokens[starts[:, None] + np.arange(seq_len + 1)].astype(np.int64))
    return rows[:, :-1], rows[:, 1:]
