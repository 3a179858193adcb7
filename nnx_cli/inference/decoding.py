"""Tokens to the logits of the next one: with a cache, on a GPU as a CUDA graph."""

from __future__ import annotations

from contextlib import suppress

import torch
from torch import Tensor

from nnx_cli.layers.kv_cache import Cache
from nnx_cli.models._base import LanguageModel
from nnx_cli.system.cuda_graph import CudaGraph

GRAPH_FROM = 16  # tokens still to draw, from which on recording a decoding step pays


def window_start(length: int, seq_len: int) -> int:
    """Where the model's view begins when `length` tokens are there: when the context is full, its older half is
    dropped."""
    if length <= seq_len:
        return 0
    half = max(1, seq_len // 2)
    return -(-(length - seq_len) // half) * half


class Context:
    """The tokens of R sequences, and the model's logits after the newest one of each.

    Sequences may differ in length. With a cache only new tokens are read; what the model sees of a sequence
    (`window_start`) depends on nothing but its own length, so that cached, uncached and single decoding see the same.
    """

    def __init__(self, model: LanguageModel, sequences: list[list[int]], capacity: int, use_cache: bool) -> None:
        self.model = model
        self.seq_len = model.config.seq_len
        self.use_cache = use_cache
        self.lengths = [len(sequence) for sequence in sequences]
        self.history = torch.zeros(len(sequences), max(self.lengths) + capacity, dtype=torch.int64)
        for number, sequence in enumerate(sequences):
            self.history[number, : len(sequence)] = torch.tensor(sequence)
        self.history = self.history.to(model.device)
        self.starts = self._starts()
        self.cache: Cache | None = None
        self.graph: CudaGraph | None = None
        self.records = use_cache and capacity >= GRAPH_FROM and model.device.type == "cuda"
        self.records = self.records and not model.syncs_in_eval

    def _starts(self) -> list[int]:
        return [window_start(length, self.seq_len) for length in self.lengths]

    def repeat(self, n: int) -> None:
        """Make `n` copies of every sequence."""
        self.history = self.history.repeat_interleave(n, dim=0)
        self.lengths = [length for length in self.lengths for _ in range(n)]
        self.starts = self._starts()
        if self.cache is not None:
            self.cache.repeat(n)

    def append(self, tokens: Tensor) -> None:
        """Add a token (R,) to every sequence."""
        self.history[torch.arange(len(tokens)), self._lengths()] = tokens
        self.lengths = [length + 1 for length in self.lengths]

    def _lengths(self) -> Tensor:
        return torch.tensor(self.lengths, device=self.history.device)

    def seen(self) -> Tensor:
        """Where `history` holds real tokens, (R, S)."""
        return torch.arange(self.history.shape[1], device=self.history.device) < self._lengths()[:, None]

    def read_all(self) -> Tensor:
        """Logits (R, V) after the last token of every sequence, from a pass over all that the model sees of it."""
        self.starts = self._starts()
        views = [length - start for length, start in zip(self.lengths, self.starts, strict=True)]
        longest = max(views)
        index = torch.tensor(self.starts, device=self.history.device)[:, None]
        index = index + torch.arange(longest, device=self.history.device)
        ids = self.history.gather(1, index.clamp(max=self.history.shape[1] - 1))  # sequences are padded on the right
        if self.use_cache and self.cache is None:
            self.cache = self.model.make_cache(len(ids), self.seq_len)
        elif self.cache is not None:
            self.cache.reset()
        ends = torch.tensor(views, device=ids.device)
        last = self.model.trunk(ids, self.cache)[torch.arange(len(ids)), ends - 1]
        if self.cache is not None:
            self.cache.truncate(ends)
        return self.model.head(last)

    def read_newest(self) -> Tensor:
        """Logits (R, V) after the last token, the one before it having been read already."""
        if self.cache is None or self._starts() != self.starts:
            return self.read_all()
        newest = self.history.gather(1, self._lengths()[:, None] - 1)
        if self.records and hasattr(self.cache, "snapshot"):  # somebody's own architecture may have less
            self.records = False
            with suppress(RuntimeError):  # out of memory: decoding goes on op by op
                self.graph = decoding_graph(self.model, self.cache, newest)
        if self.graph is None:
            return self.model(newest, cache=self.cache)[:, -1]
        logits = self.graph(newest)
        self.cache.note_advance(1)
        return logits


def decoding_graph(model: LanguageModel, cache: Cache, input_ids: Tensor) -> CudaGraph:
    """One more token (R, 1) of every sequence, through a model and its cache, to logits (R, V).

    The cache becomes static, has to stay the same, and is told of every replay by `note_advance`.

    Raises RuntimeError where something cannot be recorded, torch.OutOfMemoryError where memory does not suffice; the
    cache is then as it was.
    """
    restore = cache.snapshot()

    def warm_up(input_ids: Tensor) -> None:
        model(input_ids, cache=cache)
        restore()

    cache.static = True
    try:
        return CudaGraph(lambda ids: model(ids, cache=cache)[:, -1], (input_ids,), warm_up=warm_up)
    except RuntimeError:
        cache.static = False
        raise
    finally:
        restore()
