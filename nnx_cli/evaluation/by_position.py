"""Loss by position of the context, and whether a model uses what it has read far back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from nnx_cli.data.loader import windows_at
from nnx_cli.evaluation.losses import Scores, error_of_mean, evaluating, window_starts
from nnx_cli.layers.loss import token_losses
from nnx_cli.models._base import LanguageModel

EARLY = (57, 72)  # positions around 64
CHUNK = EARLY[1] - EARLY[0] + 1
MIN_SEQ_LEN = 128  # of a context with positions far beyond those
SURE = 1.96  # standard errors


@dataclass(frozen=True)
class Verdict:
    """Loss in nats per token at late positions, and of the same tokens when they stand around position 64."""

    positions: tuple[int, int]
    late: float
    early: float
    difference: float  # late less early
    stderr: float  # of the difference, over windows

    @property
    def used(self) -> bool | None:
        """Whether the context beyond position 64 is used; None where the difference may be chance."""
        return None if abs(self.difference) <= SURE * self.stderr else self.difference < 0

    def __str__(self) -> str:
        first, last = self.positions
        how = {True: "lowers the loss", False: "raises the loss", None: "makes no difference that this text shows"}
        return (
            f"context beyond position 64 {how[self.used]}: {self.late:.4f} at positions {first:,} to {last:,}, "
            f"{self.early:.4f} for the same tokens around position 64, difference {self.difference:+.4f} ± "
            f"{self.stderr:.4f}"
        )


class ByPosition:
    """Adds up losses by position: position p is that of the target which a model predicts from p tokens."""

    def __init__(self, seq_len: int) -> None:
        self.seq_len = seq_len
        self.bands = doubling_bands(seq_len)
        self.n_late = seq_len // 4 // CHUNK * CHUNK  # positions at the end of the context
        self.counts = np.zeros(seq_len, np.int64)  # windows that have a position
        self.nats = np.zeros(seq_len)
        self._band_means: list[np.ndarray] = []  # of full windows, (B, number of bands) each
        self._late_means: list[np.ndarray] = []  # of full windows, (B,) each

    def add(self, scores: Scores) -> None:
        """Add some windows, of which the last of a text may be shorter."""
        n, T = scores.losses.shape
        self.counts[:T] += n
        self.nats[:T] += scores.losses.sum(0)
        if self.seq_len == T:
            bands = [scores.losses[:, first - 1 : last].mean(1) for first, last in self.bands]
            self._band_means.append(np.stack(bands, axis=1))
            if self.n_late:
                self._late_means.append(scores.losses[:, -self.n_late :].mean(1))

    def losses(self) -> list[tuple[int, float]]:
        """Positions from 1 on that any window has, each with its mean loss."""
        return [(p + 1, float(self.nats[p] / n)) for p, n in enumerate(self.counts) if n]

    def rows(self) -> list[tuple[tuple[int, int], float, float | None]]:
        """Positions 1, 2, 3 to 4, 5 to 8, …: mean loss and its standard error over windows, of full windows alone."""
        if not self._band_means:
            return []
        means = np.concatenate(self._band_means)
        return [(band, float(x.mean()), error_of_mean(x)) for band, x in zip(self.bands, means.T, strict=True)]

    def verdict(
        self,
        model: LanguageModel,
        tokens: np.ndarray,
        batch_tokens: int,
        on_progress: Callable[[float], None] = lambda done: None,
    ) -> Verdict | str:
        """Whether context is used, or why that cannot be said. The late tokens of every window are read once more from
        some 64 tokens before them: other tokens at early positions would differ for other reasons."""
        if self.seq_len < MIN_SEQ_LEN:
            return f"a context of {self.seq_len} tokens has no positions far beyond 64 to compare with it"
        late = np.concatenate(self._late_means) if self._late_means else np.empty(0)
        if len(late) < 2:
            return f"whether context is used takes two windows of {self.seq_len:,} tokens to say; the text has fewer"
        first = window_starts(len(tokens), self.seq_len, None) + self.seq_len - self.n_late  # of the late targets
        chunks = np.arange(0, self.n_late, CHUNK) - (EARLY[0] - 1)
        starts = (first[:, None] + chunks).ravel()
        early = _chunk_losses(model, tokens, starts, batch_tokens, on_progress).reshape(len(first), -1).mean(1)
        stderr = error_of_mean(late - early)
        assert stderr is not None
        positions = self.seq_len - self.n_late + 1, self.seq_len
        return Verdict(positions, float(late.mean()), float(early.mean()), float((late - early).mean()), stderr)


@torch.no_grad()
def _chunk_losses(
    model: LanguageModel,
    tokens: np.ndarray,
    starts: np.ndarray,
    batch_tokens: int,
    on_progress: Callable[[float], None],
) -> np.ndarray:
    """Mean loss at the EARLY positions of windows that begin at `starts`, (N,)."""
    means, size = [], max(1, batch_tokens // EARLY[1])
    with evaluating(model):
        for i in range(0, len(starts), size):
            input_ids, targets = windows_at(tokens, starts[i : i + size], EARLY[1])
            losses = token_losses(model, input_ids.to(model.device), targets.to(model.device))
            means.append(losses[:, -CHUNK:].cpu().double().mean(1).numpy())
            on_progress(min(1.0, (i + size) / len(starts)))
    return np.concatenate(means)


def doubling_bands(n: int) -> list[tuple[int, int]]:
    """Positions 1 to n in bands of 1, 1, 2, 4, 8, … positions, first and last of each."""
    bands, first = [(1, 1)], 2
    while first <= n:
        bands.append((first, min(2 * (first - 1), n)))
        first = bands[-1][1] + 1
    return bands
