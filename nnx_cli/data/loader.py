"""Token folder to batches. Sample i of a run is a pure function of (seed, i): the only data state is a number."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from nnx_cli.errors import DataError, counted

RESIDENT_TYPES = {1: np.uint8, 2: np.int32, 4: np.int32}  # of ids on a GPU, by the bytes they have on the disk


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
            f"the training text has {counted(n_tokens, 'token')}; one sequence needs {seq_len + 1:,}",
            fix=f"give more text, or take --seq-len {max(1, n_tokens // 4)}",
        )


class Loader:
    """Training batches of a token stream, in an order fixed by `seed`.

    An epoch is a permutation of windows of `seq_len` tokens (and the one that follows, as the last target). Where the
    first window begins differs from epoch to epoch, so that the cuts do too. Targets whose bit in `mask`
    (`TokenFolder.mask`) is 0 become `ignore_index`. A stream that fits in `room_bytes` of a GPU lives there. Raises
    DataError for a stream shorter than one window.
    """

    def __init__(
        self,
        tokens: np.ndarray,
        seq_len: int,
        seed: int,
        device: torch.device | None = None,
        room_bytes: int = 0,
        mask: np.ndarray | None = None,
        ignore_index: int = -100,
    ) -> None:
        check_length(len(tokens), seq_len)
        self.tokens = tokens
        self.seq_len = seq_len
        self.seed = seed
        self.mask = mask
        self.ignore_index = ignore_index
        self.windows = max(1, (len(tokens) - seq_len) // seq_len)  # per epoch
        self.device = device or torch.device("cpu")
        self.resident: Tensor | None = None  # the whole stream on a GPU, where batches are then cut out
        self.resident_mask: Tensor | None = None
        if self.device.type == "cuda" and tokens.nbytes + (0 if mask is None else mask.nbytes) <= room_bytes:
            self.resident = torch.from_numpy(tokens.astype(RESIDENT_TYPES[tokens.dtype.itemsize])).to(self.device)
            if mask is not None:
                self.resident_mask = torch.from_numpy(np.array(mask)).to(self.device)

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
        """Samples first … first + count − 1 on the device: input_ids and targets, int64 (count, seq_len) each."""
        starts = self.starts(first, count)
        if self.resident is None:
            input_ids, targets = windows_at(self.tokens, starts, self.seq_len)
            if self.mask is not None:
                counted = _bits(self.mask, starts[:, None] + np.arange(1, self.seq_len + 1))
                targets = targets.masked_fill(torch.from_numpy(counted == 0), self.ignore_index)
            return self.send(input_ids), self.send(targets)
        places = self.send(torch.from_numpy(starts))[:, None] + torch.arange(self.seq_len + 1, device=self.device)
        sequences = self.resident[places].long()
        input_ids, targets = sequences[:, :-1], sequences[:, 1:]
        if self.resident_mask is not None:
            targets = targets.masked_fill(_bits(self.resident_mask, places[:, 1:]) == 0, self.ignore_index)
        return input_ids, targets

    def send(self, x: Tensor) -> Tensor:
        """`x` on the device; a GPU copies it from pinned memory while the CPU goes on."""
        if self.device.type == "cuda":
            return x.contiguous().pin_memory().to(self.device, non_blocking=True)
        return x.to(self.device)


def windows_at(tokens: np.ndarray, starts: np.ndarray, seq_len: int) -> tuple[Tensor, Tensor]:
    """input_ids and targets, int64 (len(starts), seq_len) each, of the windows that begin at `starts`."""
    sequences = torch.from_numpy(tokens[starts[:, None] + np.arange(seq_len + 1)].astype(np.int64))
    return sequences[:, :-1], sequences[:, 1:]


def _bits(packed: Any, places: Any) -> Any:
    """The bits at `places` of a little-endian bit array; both are arrays, or both tensors."""
    return packed[places >> 3] >> (places & 7) & 1
