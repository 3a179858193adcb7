"""Windows of a token stream that begin where its documents do."""

from __future__ import annotations

import numpy as np

from nnx_cli.data.permutation import permute

DOCUMENTS = 1 << 19  # in a key: the order of documents, not of windows


class Lap:
    """Windows through documents that are laid out one after the other.

    A window of `seq_len` tokens, and the one that follows, begins at the last document that the window before reaches
    or, inside a document that is longer, where that window ends; the first begins at the first document. So every
    token but the first is the target of a window, and of the first one that it could be, it has all its document
    before it, or as much as the window holds. Behind the last document stands the first again.
    """

    def __init__(self, begins: np.ndarray, lengths: np.ndarray, seq_len: int, n_windows: int | None = None) -> None:
        """`begins` (D,) and `lengths` (D,) of documents as the stream has them, in the order of the layout. Without
        `n_windows` there are as many windows as reach the last document's end."""
        self.ends = np.cumsum(lengths)  # in the layout
        self.offsets = begins - (self.ends - lengths)  # from the layout to the stream
        self.total = int(self.ends[-1])
        windows = -(-lengths // seq_len)  # that begin in each document, where one begins with it
        reached = self.ends - lengths + windows * seq_len  # by the last of them
        behind, place = np.divmod(reached, self.total)
        following = np.searchsorted(self.ends, place, side="right") + behind * len(begins)
        visited, found, at = [], 0, 0
        while found < n_windows if n_windows is not None else at < len(begins):
            at %= len(begins)
            visited.append(at)
            found += windows.item(at)
            at = following.item(at)
        of_each = windows[visited]
        inside = np.arange(found) - np.repeat(np.cumsum(of_each) - of_each, of_each)
        self.starts = (np.repeat((self.ends - lengths)[visited], of_each) + inside * seq_len)[:n_windows]

    def places(self, windows: np.ndarray, length: int) -> np.ndarray:
        """Positions (W, length) in the stream of what stands in some windows, by their numbers."""
        laid_out = (self.starts[windows][:, None] + np.arange(length)) % self.total
        return laid_out + self.offsets[np.searchsorted(self.ends, laid_out, side="right")]


def with_separators(documents: np.ndarray, n_tokens: int) -> tuple[np.ndarray, np.ndarray]:
    """Begins and lengths of documents, given their first tokens, each with the separator before it."""
    begins = np.unique(np.maximum(documents.astype(np.int64) - 1, 0))
    return begins, np.diff(begins, append=n_tokens)


def windows_in_order(documents: np.ndarray, n_tokens: int, seq_len: int) -> np.ndarray:
    """Where windows begin that go through documents, given their first tokens, as the stream has them."""
    return Lap(*with_separators(documents, n_tokens), seq_len).starts


class AlignedWindows:
    """Sample i as a pure function of (seed, i), every sample a window that begins at a document or goes on with one.

    Every epoch is a `Lap` of its own, its documents and then its windows in an order of their own. All have `n`
    windows, as many as the first needs for all documents; another may have to leave out the last few, or repeat its
    first.
    """

    def __init__(self, documents: np.ndarray, n_tokens: int, seq_len: int, seed: int) -> None:
        """`documents` are the first tokens of each, ascending from 0, in a stream of at least `seq_len` + 1 tokens."""
        self.seq_len = seq_len
        self.seed = seed
        self._begins, self._lengths = with_separators(documents, n_tokens)
        self._laps = {0: self._lap(0, None)}
        self.n = len(self._laps[0].starts)  # windows of an epoch

    def places(self, first: int, count: int) -> np.ndarray:
        """Positions (count, seq_len + 1) in the stream of samples first … first + count − 1."""
        epochs, numbers = np.divmod(np.arange(first, first + count), self.n)
        places = np.empty((count, self.seq_len + 1), np.int64)
        for epoch in np.unique(epochs).tolist():
            inside = epochs == epoch
            windows = permute(numbers[inside], self.n, (self.seed << 20) + epoch)
            places[inside] = self._lap_of(epoch).places(windows, self.seq_len + 1)
        return places

    def _lap_of(self, epoch: int) -> Lap:
        """The lap of an epoch; the newest is kept."""
        if epoch not in self._laps:
            self._laps = {epoch: self._lap(epoch, self.n)}
        return self._laps[epoch]

    def _lap(self, epoch: int, n_windows: int | None) -> Lap:
        n = len(self._begins)
        order = permute(np.arange(n), n, (self.seed << 20) + DOCUMENTS + epoch)
        return Lap(self._begins[order], self._lengths[order], self.seq_len, n_windows)
