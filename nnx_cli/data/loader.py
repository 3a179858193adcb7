"""Token folder to batches. Sample i of a run is a pure function of (seed, i): the only data state is a number."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from nnx_cli.data.aligned_windows import AlignedWindows
from nnx_cli.data.permutation import mix, permute
from nnx_cli.errors import DataError, counted

RESIDENT_TYPES = {1: np.uint8, 2: np.int32, 4: np.int32}  # of ids on a GPU, by the bytes they have on the disk


WORTHWHILE = 256  # tokens of a text from which on a shorter context is some help
MORE_TEXT = "give more text: 100 kB or more, for a model that writes words"


def check_length(n_tokens: int, seq_len: int) -> None:
    """Raise DataError unless a stream holds one sequence and the target after its last token."""
    if n_tokens < seq_len + 1:
        raise DataError(
            f"the training text has {counted(n_tokens, 'token')}; one sequence needs {seq_len + 1:,}",
            fix=f"give more text, or take --seq-len {n_tokens // 4}" if n_tokens >= WORTHWHILE else MORE_TEXT,
        )


class Loader:
    """Training batches of a token stream, in an order fixed by `seed`.

    An epoch is a permutation of windows of `seq_len` tokens (and the one that follows, as the last target). Where the
    first window begins differs from epoch to epoch, so that the cuts do too. With `documents`, their first tokens,
    windows begin at documents instead (`AlignedWindows`). Targets whose bit in `mask` (`TokenFolder.mask`) is 0 become
    `ignore_index`. A stream that fits in `room_bytes` of a GPU lives there. Raises DataError for a stream shorter than
    one window.
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
        documents: np.ndarray | None = None,
    ) -> None:
        check_length(len(tokens), seq_len)
        self.tokens = tokens
        self.seq_len = seq_len
        self.seed = seed
        self.mask = mask
        self.ignore_index = ignore_index
        aligned = None if documents is None else AlignedWindows(documents, len(tokens), seq_len, seed)
        self.aligned = aligned
        self.windows = max(1, (len(tokens) - seq_len) // seq_len) if aligned is None else aligned.n  # per epoch
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
        if self.resident is None:
            places = self.positions(first, count)
            sequences = torch.from_numpy(self.tokens[places].astype(np.int64))
            targets = sequences[:, 1:]
            if self.mask is not None:
                counted = bits_at(self.mask, places[:, 1:])
                targets = targets.masked_fill(torch.from_numpy(counted == 0), self.ignore_index)
            return self.send(sequences[:, :-1]), self.send(targets)
        on_device = self._positions_on_device(first, count)
        sequences = self.resident[on_device].long()
        input_ids, targets = sequences[:, :-1], sequences[:, 1:]
        if self.resident_mask is not None:
            targets = targets.masked_fill(bits_at(self.resident_mask, on_device[:, 1:]) == 0, self.ignore_index)
        return input_ids, targets

    def part(self, first: int, n: int, begin: int, count: int) -> tuple[Tensor, Tensor]:
        """`count` of the `n` samples from `first` on, beginning with the one at `begin`. Where there are fewer, others
        without a target are at the end."""
        there = max(0, min(count, n - begin))
        if there == count:
            return self.batch(first + begin, count)
        input_ids, targets = self.batch(first + min(begin, n - 1), max(1, there))
        rows = torch.arange(count, device=targets.device).clamp(max=len(targets) - 1)
        input_ids, targets = input_ids[rows], targets[rows]
        targets[there:] = self.ignore_index
        return input_ids, targets

    def positions(self, first: int, count: int) -> np.ndarray:
        """Positions (count, seq_len + 1) in the stream of samples first … first + count − 1."""
        if self.aligned is not None:
            return self.aligned.places(first, count)
        return self.starts(first, count)[:, None] + np.arange(self.seq_len + 1)

    def _positions_on_device(self, first: int, count: int) -> Tensor:
        if self.aligned is not None:
            return self.send(torch.from_numpy(self.aligned.places(first, count)))
        starts = self.send(torch.from_numpy(self.starts(first, count)))
        return starts[:, None] + torch.arange(self.seq_len + 1, device=self.device)

    def send(self, x: Tensor) -> Tensor:
        """`x` on the device; a GPU copies it from pinned memory while the CPU goes on."""
        if self.device.type == "cuda":
            return x.contiguous().pin_memory().to(self.device, non_blocking=True)
        return x.to(self.device)


def windows_at(tokens: np.ndarray, starts: np.ndarray, seq_len: int) -> tuple[Tensor, Tensor]:
    """input_ids and targets, int64 (len(starts), seq_len) each, of the windows that begin at `starts`."""
    sequences = torch.from_numpy(tokens[starts[:, None] + np.arange(seq_len + 1)].astype(np.int64))
    return sequences[:, :-1], sequences[:, 1:]


def bits_at(packed: Any, places: Any) -> Any:
    """The bits at `places` of a little-endian bit array; both are arrays, or both tensors."""
    return packed[places >> 3] >> (places & 7) & 1
