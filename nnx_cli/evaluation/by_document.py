"""How much bits per byte vary from document to document: the standard error of text that was drawn as documents."""

from __future__ import annotations

import math

import numpy as np

from nnx_cli.evaluation.losses import Scores, ratio_with_error

MIN_DOCUMENTS = 10  # fewer say too little of how documents differ


class ByDocument:
    """Adds up the losses and the bytes of documents, whatever windows their tokens were read in."""

    def __init__(self, documents: np.ndarray, token_bytes: np.ndarray) -> None:
        """`documents` are the first tokens of each, ascending from 0; `token_bytes` (V,) the lengths of tokens."""
        self.documents, self.token_bytes = np.asarray(documents, np.int64), token_bytes
        self.nats, self.n_bytes = np.zeros(len(documents)), np.zeros(len(documents))

    def add(self, scores: Scores) -> None:
        """Add the targets of some windows."""
        places = scores.starts[:, None] + 1 + np.arange(scores.targets.shape[1])  # (B, T)
        document = np.searchsorted(self.documents, places.ravel(), side="right") - 1
        n, weights = len(self.documents), 1 if scores.counts is None else scores.counts.ravel()
        self.nats += np.bincount(document, scores.losses.ravel() * weights, n)
        self.n_bytes += np.bincount(document, self.token_bytes[scores.targets].ravel() * weights, n)

    @property
    def n_documents(self) -> int:
        """Documents with a byte among the targets."""
        return int((self.n_bytes > 0).sum())

    def stderr(self) -> float | None:
        """Standard error of bits per byte, documents being independent; None for fewer than MIN_DOCUMENTS."""
        if self.n_documents < MIN_DOCUMENTS:
            return None
        seen = self.n_bytes > 0
        return ratio_with_error(self.nats[seen] / math.log(2), self.n_bytes[seen])[1]
