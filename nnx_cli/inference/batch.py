"""Sequences that are decoded together, and come and go while others go on (continuous batching)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby

import torch
from torch import Tensor

from nnx_cli.config import SampleConfig
from nnx_cli.inference.decoding import span, window_start
from nnx_cli.inference.sampler import UNIFORMS_AT_ONCE, numbers_of, stages_of, stream_seed
from nnx_cli.kernels.next_token import Numbers, Stages, draw, next_probabilities, penalised
from nnx_cli.layers.kv_cache import Cache
from nnx_cli.models._base import LanguageModel
from nnx_cli.system.cuda_graph import CudaGraphs


class Row:
    """A sequence: the ids of its prompt, what is drawn after them, and how.

    `number` is that of the sample among those of its seed. `n_likeliest`: with every token, that many of the likeliest
    and their log-probabilities are kept in `likeliest`, and its own in `logprobs`; None keeps neither.
    """

    def __init__(
        self, prompt: Sequence[int], config: SampleConfig, number: int = 0, n_likeliest: int | None = None
    ) -> None:
        assert prompt, "a model goes on from one token at least"
        self.ids = list(prompt)
        self.config = config
        self.n_likeliest = n_likeliest
        self.logprobs: list[float] = []
        self.likeliest: list[list[tuple[int, float]]] = []
        self.start = -1  # where the model's view of it begins; -1: it was not read yet
        self.occurred: Tensor | None = None  # (V,), bool: the tokens that are in it
        self._generator = torch.Generator().manual_seed(stream_seed(config.seed, number))
        self._uniforms: list[float] = []

    def uniform(self) -> float:
        """The next of its random numbers in [0, 1): those that it has when it is drawn alone."""
        if not self._uniforms:
            self._uniforms = torch.rand(UNIFORMS_AT_ONCE, generator=self._generator).tolist()[::-1]
        return self._uniforms.pop()

    def view(self, seq_len: int) -> list[int]:
        """What the model sees of it."""
        return self.ids[window_start(len(self.ids), seq_len) :]

    def occurring(self, vocab_size: int, device: torch.device) -> Tensor:
        """Which tokens are in it, (V,), bool."""
        if self.occurred is None:
            self.occurred = torch.zeros(vocab_size, dtype=torch.bool, device=device)
            self.occurred[torch.tensor(self.ids, device=device)] = True
        return self.occurred


class Batch:
    """Up to `most` rows that a model draws tokens of together.

    They lie in the slots of one cache, whose number doubles when there are too few, and falls when a quarter suffices:
    what is in a free slot is computed in vain, and to move rows takes longer than a step. On a GPU, which computes few
    rows no faster than many, there are always as many as may be, and a pass over the newest tokens is a CUDA graph.
    """

    def __init__(self, model: LanguageModel, most: int) -> None:
        self.model = model
        self.most = most
        self.seq_len = model.config.seq_len
        self.slots: list[Row | None] = []
        self.counts: list[int] = []  # positions of the cache that are filled, also in free slots
        self.cache: Cache | None = None
        self.captures = model.device.type == "cuda" and not model.syncs_in_eval
        self.has_spans = self.captures  # whether a pass does the same operations whatever the cache holds
        self.newest = torch.empty(0)  # (slots, 1), int64: what the next pass reads
        self.graphs = CudaGraphs(self._pass)

    @property
    def rows(self) -> list[Row]:
        """The rows that are at work."""
        return [row for row in self.slots if row is not None]

    @torch.inference_mode()
    def add(self, rows: Sequence[Row]) -> None:
        """Have rows join; they are read before the next step."""
        assert len(self.rows) + len(rows) <= self.most
        if not rows:
            return
        self._resize(len(self.rows) + len(rows))
        free = (slot for slot, row in enumerate(self.slots) if row is None)
        for row in rows:
            self.slots[next(free)] = row

    def remove(self, row: Row) -> None:
        """Have a row leave."""
        self.slots[self.slots.index(row)] = None

    def clear(self) -> None:
        """Have all rows leave, and give the memory of the cache back."""
        self.slots, self.counts, self.cache = [], [], None
        self.graphs = CudaGraphs(self._pass)

    @torch.inference_mode()
    def step(self) -> list[tuple[Row, int]]:
        """Draw the next token of every row."""
        if not self.rows:
            return []
        if 4 * len(self.rows) <= len(self.slots):
            self._resize(len(self.rows))
        self._read([slot for slot, row in enumerate(self.slots) if row is not None and self._is_unread(row)])
        self._forget_free()
        self.newest.copy_(torch.tensor([[0 if row is None else row.ids[-1]] for row in self.slots]))
        logits = self._logits()
        self.counts = [count + 1 for count in self.counts]
        tokens = self._draw(logits)
        for row, token in tokens:
            row.ids.append(token)
            if row.occurred is not None:
                row.occurred[token] = True
        return tokens

    def _logits(self) -> Tensor:
        """Logits (slots, V) after the newest tokens, good until the next step."""
        cache = self.cache
        if not self.has_spans or cache is None or not hasattr(cache, "span"):  # which somebody's own may lack
            return self._pass()
        cache.span = span(max(self.counts) + 1, self.seq_len)
        logits: Tensor = self.graphs(cache.span) if self.captures else self._pass()
        cache.note_advance(1)
        return logits

    def _pass(self) -> Tensor:
        """Everything of it that happens on the device."""
        return self.model(self.newest, cache=self.cache)[:, -1]

    def _is_unread(self, row: Row) -> bool:
        """Whether the model's view of a row is not what the cache has: it is new, or its older half is to go."""
        return row.start != window_start(len(row.ids), self.seq_len)

    def _resize(self, n: int) -> None:
        """Have slots for `n` rows, as many as a power of two, and rows side by side."""
        wanted = self.most if self.has_spans else min(self.most, 1 << max(0, n - 1).bit_length())
        if wanted == len(self.slots) or (wanted < len(self.slots) and 4 * n > len(self.slots)):
            return
        kept = [slot for slot, row in enumerate(self.slots) if row is not None]
        try:
            cache = self.model.make_cache(wanted, self.seq_len)
        except torch.OutOfMemoryError:
            if not self.has_spans:
                raise
            self.has_spans = self.captures = False
            self._resize(n)
            return
        old, counts = self.cache, [self.counts[slot] for slot in kept]
        self.slots = [self.slots[slot] for slot in kept] + [None] * (wanted - len(kept))
        self.counts = counts + [0] * (wanted - len(kept))
        if kept and old is not None and hasattr(old, "take"):
            cache.put(torch.arange(len(kept), device=self.model.device), old.take(self._indices(kept)))
        else:  # nothing is there yet, or it is somebody's own cache
            for row in self.rows:
                row.start = -1
        self.cache = cache
        self.newest = torch.zeros(wanted, 1, dtype=torch.int64, device=self.model.device)
        self.graphs = CudaGraphs(self._pass)

    def _indices(self, slots: Sequence[int]) -> Tensor:
        return torch.tensor(slots, device=self.model.device)

    def _read(self, slots: Sequence[int]) -> None:
        """Have the cache hold what the model sees of the rows in `slots`, but for the newest token of each."""
        if not slots:
            return
        assert self.cache is not None
        if not hasattr(self.cache, "put"):
            if self.has_spans:
                self.cache.span = None  # of more than one token at a time, or exactly one
            self._fill(self.cache.reset(), range(len(self.slots)))
            return
        for part in self._alike(slots):
            longest = max(len(self._seen(slot)) for slot in part) - 1
            cache = self.model.make_cache(len(part), max(1, longest))
            self._fill(cache, part)
            self.cache.put(self._indices(part), cache)

    def _seen(self, slot: int) -> list[int]:
        """What the model sees of a slot: a token, where it is free."""
        row = self.slots[slot]
        return [0] if row is None else row.view(self.seq_len)

    def _alike(self, slots: Sequence[int]) -> Iterator[list[int]]:
        """Slots whose rows are of about the same length, so that none is read beside one much longer."""
        ordered = sorted(slots, key=lambda slot: len(self._seen(slot)))
        for _, group in groupby(ordered, key=lambda slot: len(self._seen(slot)).bit_length()):
            yield list(group)

    def _fill(self, cache: Cache, slots: Sequence[int]) -> None:
        """Read the rows of `slots` into an empty cache of as many."""
        views = [self._seen(slot) for slot in slots]
        ends = [len(view) - 1 for view in views]
        longest = max(ends)
        if longest:
            tokens = torch.zeros(len(views), longest, dtype=torch.int64)
            for line, view, end in zip(tokens, views, ends, strict=True):
                line[:end] = torch.tensor(view[:end], dtype=torch.int64)
            self.model.trunk(tokens.to(self.model.device), cache)
        if min(ends) < longest:
            cache.truncate(self._indices(ends))
        for slot, end in zip(slots, ends, strict=True):
            self.counts[slot] = end
            if (row := self.slots[slot]) is not None:
                row.start = window_start(len(row.ids), self.seq_len)

    def _forget_free(self) -> None:
        """Empty free slots, where one holds more than any row does."""
        busy = max(count for count, row in zip(self.counts, self.slots, strict=True) if row is not None)
        if max(self.counts) > busy:
            self.counts = [0 if row is None else n for n, row in zip(self.counts, self.slots, strict=True)]
            assert self.cache is not None
            self.cache.truncate(self._indices(self.counts))

    def _draw(self, logits: Tensor) -> list[tuple[Row, int]]:
        """The next token of every row, from logits (slots, V)."""
        V = logits.shape[1]
        places = [(stages_of(row.config, V), slot) for slot, row in enumerate(self.slots) if row is not None]
        tokens: dict[int, int] = {}
        for stages in dict.fromkeys(stages for stages, _ in places):
            slots = [slot for own, slot in places if own == stages]
            tokens |= zip(slots, self._draw_alike(logits[slots], stages, slots), strict=True)
        self._keep_logprobs(logits, tokens)
        return [(row, tokens[slot]) for slot, row in enumerate(self.slots) if row is not None]

    def _draw_alike(self, logits: Tensor, stages: Stages, slots: Sequence[int]) -> list[int]:
        """The tokens of rows that the same rules act on, each with numbers of its own, from logits (R, V)."""
        (R, V), device = logits.shape, logits.device
        rows = [row for slot in slots if (row := self.slots[slot]) is not None]
        values = torch.tensor([numbers_of(row.config) for row in rows], device=device).T.reshape(4, R, 1)
        top_k = torch.tensor([[row.config.top_k or V] for row in rows], device=device)
        asked = stages.repetition_penalty
        occurred = torch.stack([row.occurring(V, device) for row in rows]) if asked else torch.empty(0, device=device)
        if stages.greedy:
            drawn = penalised(logits.float(), stages, Numbers(values, top_k), occurred).argmax(1)
        else:
            uniforms = torch.tensor([row.uniform() for row in rows], device=device)
            drawn = draw(next_probabilities(logits, stages, Numbers(values, top_k), occurred), uniforms)
        found: list[int] = drawn.tolist()
        return found

    def _keep_logprobs(self, logits: Tensor, tokens: dict[int, int]) -> None:
        """Keep the log-probabilities of the model, before any rule, for the rows that ask for them."""
        for slot, token in tokens.items():
            row = self.slots[slot]
            if row is not None and row.n_likeliest is not None:
                logprobs = logits[slot].float().log_softmax(0)
                row.logprobs.append(float(logprobs[token]))
                best = logprobs.topk(min(row.n_likeliest, len(logprobs)))
                row.likeliest.append(list(zip(best.indices.tolist(), best.values.tolist(), strict=True)))
