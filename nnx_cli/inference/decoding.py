"""Sequences that grow token by token; on a GPU a step is a CUDA graph, which the host follows some steps behind."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from nnx_cli.config import SampleConfig
from nnx_cli.inference.sampler import Rules, Uniforms
from nnx_cli.kernels.next_token import State, append_next
from nnx_cli.layers.kv_cache import Cache
from nnx_cli.models._base import LanguageModel
from nnx_cli.system.cuda_graph import CudaGraphs

GRAPH_FROM = 16  # tokens still to draw, from which on capturing a step pays
SPAN = 256  # positions that a captured step covers at least; those of the next are twice as many
ALIGNED = 64  # positions that spans are multiples of
LAG = 8  # steps that a GPU may be ahead of the host


def window_start(length: int, seq_len: int) -> int:
    """Where the model's view begins when `length` tokens are there: when the context is full, its older half is
    dropped."""
    if length <= seq_len:
        return 0
    half = max(1, seq_len // 2)
    return -(-(length - seq_len) // half) * half


class Window:
    """The newest tokens of R sequences: what the model sees of each.

    That depends on nothing but the sequence's own length (`window_start`), so that cached, uncached and single decoding
    see the same. Numbers that the device counts in `lengths` are counted on the host too, which never asks.
    """

    def __init__(self, sequences: Sequence[Sequence[int]], seq_len: int, device: torch.device) -> None:
        views = [sequence[window_start(len(sequence), seq_len) :] for sequence in sequences]
        tokens = torch.zeros(len(views), seq_len + 1, dtype=torch.int64)
        for row, view in zip(tokens, views, strict=True):
            row[: len(view)] = torch.tensor(view)
        self.seq_len = seq_len
        self.tokens = tokens.to(device)  # (R, seq_len + 1)
        self._take([len(view) for view in views])

    def _take(self, counts: list[int]) -> None:
        """Begin with so many tokens of every sequence."""
        self._counts, self._appended = counts, 0
        self.longest = max(counts)  # tokens of the sequence that has most of them
        self.lengths = torch.tensor(counts, device=self.tokens.device)  # (R,)

    def counts(self) -> list[int]:
        """Tokens of every sequence."""
        return [count + self._appended for count in self._counts]

    def repeat(self, n: int) -> None:
        """Make `n` copies of every sequence, side by side."""
        self.tokens = self.tokens.repeat_interleave(n, dim=0)
        self._take([count for count in self.counts() for _ in range(n)])

    def newest(self) -> Tensor:
        """The last token of every sequence, (R, 1)."""
        return self.tokens.gather(1, self.lengths[:, None] - 1)

    def note_append(self) -> None:
        """Count on the host a token more of every sequence, which the device has put there."""
        self._appended += 1
        self.longest += 1

    def slide(self) -> list[int]:
        """Drop the older half of sequences longer than the context; returns their numbers."""
        if self.longest <= self.seq_len:
            return []
        half, counts = max(1, self.seq_len // 2), self.counts()
        rows = [row for row, count in enumerate(counts) if count > self.seq_len]
        kept = self.seq_len + 1 - half
        self.tokens[rows, :kept] = self.tokens[rows, half:]
        self._counts, self._appended = [kept if n > self.seq_len else n for n in counts], 0
        self.longest = max(self._counts)
        self.lengths[rows] = kept
        return rows


class Decoder:
    """Draws the tokens of sequences, one of each at a time: `num_samples` continuations of every prompt.

    A step is a pass over the newest tokens, the rules, the draw, and the token's way into the window. All that it reads
    and writes is tensors that stay where they are, so that a CUDA graph can hold the whole of it; whatever depends on
    how much is there happens between steps, on the host.
    """

    def __init__(
        self, model: LanguageModel, prompts: Sequence[Sequence[int]], config: SampleConfig, use_cache: bool = True
    ) -> None:
        device, n = model.device, config.num_samples
        self.model = model
        self.rules = Rules(config, model.config.vocab_size, device)
        self.window = Window(prompts, model.config.seq_len, device)
        self.capacity = min(self.window.seq_len, aligned(self.window.longest + config.max_new_tokens))
        self.cache: Cache | None = model.make_cache(len(prompts), self.capacity) if use_cache else None
        spans = device.type == "cuda" and not model.syncs_in_eval and hasattr(self.cache, "span")
        self.has_spans = spans and config.max_new_tokens >= GRAPH_FROM
        self.captures = self.has_spans
        self.graphs = CudaGraphs(self._step)
        if self.cache is not None:
            self._read(self.cache, list(range(len(prompts))))
        if n > 1:
            self.window.repeat(n)
        if n > 1 and self.cache is not None:
            self.cache.repeat(n)
        self.newest = self.window.newest()  # (R, 1), not read yet
        self.uniforms = Uniforms(config.seed, len(self.newest), device)
        self.state = State(
            tokens=self.window.tokens,
            lengths=self.window.lengths,
            newest=self.newest,
            occurred=occurred(prompts, self.rules).repeat_interleave(n, dim=0),
            uniforms=self.uniforms.table,
            step=self.uniforms.step,
        )

    def _read(self, cache: Cache, rows: list[int]) -> None:
        """Have the cache hold what the model sees of sequences `rows`, but for the newest token of each."""
        counts, tokens = self.window.counts(), self.window.tokens
        if self.has_spans:
            cache.span = None  # of more than one token at a time, or exactly one
        if len(rows) < len(counts) and hasattr(cache, "put"):  # which somebody's own cache may lack
            ends = [counts[row] - 1 for row in rows]
            part = self.model.make_cache(len(rows), max(1, *ends))
            self._fill(part, tokens[rows], ends)
            cache.put(torch.tensor(rows, device=tokens.device), part)
        else:
            self._fill(cache.reset(), tokens, [count - 1 for count in counts])

    def _fill(self, cache: Cache, tokens: Tensor, ends: list[int]) -> None:
        """Read the first `ends` tokens of sequences into an empty cache."""
        longest = max(ends)
        if longest:
            self.model.trunk(tokens[:, :longest], cache)
        if min(ends) < longest:
            cache.truncate(torch.tensor(ends, device=tokens.device))

    def tokens(self, n: int) -> Iterator[list[int]]:
        """The next `n` tokens of the sequences, R at a time; on a GPU some more are being drawn meanwhile."""
        if self.newest.device.type != "cuda":
            for _ in range(n):
                yield self.step().flatten().tolist()
            return
        host = torch.empty(LAG + 1, *self.newest.shape, dtype=torch.int64, pin_memory=True)
        events = [torch.cuda.Event() for _ in host]
        n_read = 0
        for number in range(n):
            host[number % len(host)].copy_(self.step(), non_blocking=True)
            events[number % len(host)].record()
            while n_read <= number:
                event = events[n_read % len(host)]
                must = number - n_read == LAG or number in (0, n - 1)
                if not must and not event.query():
                    break
                event.synchronize()
                yield host[n_read % len(host)].flatten().tolist()
                n_read += 1

    def step(self) -> Tensor:
        """Draw the next token of every sequence: (R, 1), good until the next step."""
        self._make_room()
        if not self.rules.stages.greedy:
            self.uniforms.prepare()
        if self.captures and self.cache is not None:
            self.graphs((self.cache.span, self.rules.stages))
        else:
            self._step()
        self.window.note_append()
        if self.has_spans and self.cache is not None:
            self.cache.note_advance(1)
        return self.newest

    def _make_room(self) -> None:
        """Drop what the model does not see any more, and have the cache's span cover what it does see."""
        rows, cache = self.window.slide(), self.cache
        if cache is None:
            return
        if rows:
            self._read(cache, rows)
        if self.has_spans and (cache.span is None or cache.span < self.window.longest):
            cache.span = span(self.window.longest, self.capacity)

    def _step(self) -> None:
        """Everything that happens on the device."""
        logits = self._logits_of_all() if self.cache is None else self.model(self.newest, cache=self.cache)[:, -1]
        append_next(logits, self.rules.stages, self.rules.numbers, self.state)

    def _logits_of_all(self) -> Tensor:
        """Logits (R, V) after the newest tokens, from a pass over all that the model sees."""
        states = self.model.trunk(self.window.tokens[:, : self.window.longest])  # padded on the right
        return self.model.head(states[torch.arange(len(states)), self.window.lengths - 1])


def aligned(n: int) -> int:
    """The next multiple of ALIGNED."""
    return -(-n // ALIGNED) * ALIGNED


def span(length: int, capacity: int) -> int:
    """Positions that captured steps cover when `length` are there: the capacity, or half as often as leaves room for
    some steps more."""
    covered = capacity
    while covered >= 2 * SPAN and (half := aligned(-(-covered // 2))) >= length + GRAPH_FROM:
        covered = half
    return covered


def occurred(sequences: Sequence[Sequence[int]], rules: Rules) -> Tensor:
    """Which tokens are in every sequence, (R, V), bool; V is 0 where the rules do not ask."""
    if not rules.stages.repetition_penalty:
        return torch.zeros(len(sequences), 0, dtype=torch.bool, device=rules.numbers.values.device)
    found = torch.zeros(len(sequences), rules.vocab_size, dtype=torch.bool)
    for row, sequence in zip(found, sequences, strict=True):
        row[torch.tensor(sequence)] = True
    return found.to(rules.numbers.values.device)
