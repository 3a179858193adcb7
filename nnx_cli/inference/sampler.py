"""Logits to tokens to text: drawing rules, and generation with a cache."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

import torch
from torch import Tensor

from nnx_cli.config import SampleConfig
from nnx_cli.data.tokenizers.base import StreamDecoder, Tokenizer
from nnx_cli.inference.decoding import decoding_graph
from nnx_cli.models._base import LanguageModel
from nnx_cli.system.cuda_graph import CudaGraph
from nnx_cli.system.device import synchronize

GRAPH_FROM = 16  # tokens still to draw, from which on recording a decoding step pays


@dataclass(frozen=True)
class Sample:
    """One generated text. `stop_reason` is length, stop (a stop string) or eot (end-of-text token)."""

    text: str
    tokens: list[int]
    stop_reason: str


@dataclass
class Generation:
    """Samples, prompt after prompt, and what reading the prompts and drawing the tokens took."""

    samples: list[Sample] = field(default_factory=list)
    prefill_tokens: int = 0
    prefill_s: float = 0.0
    decode_tokens: int = 0
    decode_s: float = 0.0

    @property
    def prefill_tokens_per_s(self) -> float:
        return self.prefill_tokens / max(self.prefill_s, 1e-9)

    @property
    def decode_tokens_per_s(self) -> float:
        return self.decode_tokens / max(self.decode_s, 1e-9)


def next_probabilities(logits: Tensor, config: SampleConfig, history: Tensor, seen: Tensor) -> Tensor:
    """Probabilities (R, V) to draw from, after penalty, temperature, top-k, top-p and min-p, in that order.

    `history` (R, S) holds the tokens so far, `seen` (R, S) where they are real. Repetition penalty: Keskar et al. 2019,
    https://arxiv.org/abs/1909.05858; top-p: Holtzman et al. 2020, https://arxiv.org/abs/1904.09751; min-p: Nguyen et
    al. 2024, https://arxiv.org/abs/2407.01082.
    """
    logits = logits.float()
    if config.repetition_penalty != 1.0:
        repeated = torch.zeros_like(logits).scatter_add_(1, history, seen.float()) > 0
        penalised = torch.where(logits > 0, logits / config.repetition_penalty, logits * config.repetition_penalty)
        logits = torch.where(repeated, penalised, logits)
    if config.greedy or config.temperature == 0:
        return torch.zeros_like(logits).scatter_(1, logits.argmax(1, keepdim=True), 1.0)
    logits = logits / config.temperature
    if config.top_k is not None and config.top_k < logits.shape[1]:
        logits = logits.masked_fill(logits < logits.topk(config.top_k).values[:, -1:], -torch.inf)
    probabilities = logits.softmax(1)
    if config.top_p is not None:
        ordered, index = probabilities.sort(descending=True, dim=1)
        beyond = ordered.cumsum(1) - ordered >= config.top_p  # the mass before a token already suffices
        probabilities = torch.zeros_like(ordered).scatter_(1, index, ordered.masked_fill(beyond, 0.0))
    if config.min_p is not None:
        likeliest = probabilities.max(1, keepdim=True).values
        probabilities = probabilities.masked_fill(probabilities < config.min_p * likeliest, 0.0)
    return probabilities


def draw(probabilities: Tensor, uniform: Tensor) -> Tensor:
    """The token (R,) where the cumulated probabilities (R, V) pass `uniform` (R,) in [0, 1)."""
    cumulated = probabilities.cumsum(1)
    chosen = (cumulated <= uniform[:, None] * cumulated[:, -1:]).sum(1)
    return torch.minimum(chosen, cumulated.argmax(1))  # never past the last token that has any probability


def window_start(length: int, seq_len: int) -> int:
    """Where the model's view begins when `length` tokens are there: when the context is full, its older half is
    dropped."""
    if length <= seq_len:
        return 0
    half = max(1, seq_len // 2)
    return -(-(length - seq_len) // half) * half


class Context:
    """The tokens of R rows, and the model's logits after the newest one of each.

    Rows may differ in length. With a cache only new tokens are read; a row's view (`window_start`) depends on nothing
    but its own length, so that cached, uncached and single-row decoding see the same.
    """

    def __init__(self, model: LanguageModel, rows: list[list[int]], capacity: int, use_cache: bool) -> None:
        self.model, self.seq_len, self.use_cache = model, model.config.seq_len, use_cache
        self.lengths = [len(row) for row in rows]
        self.history = torch.zeros(len(rows), max(self.lengths) + capacity, dtype=torch.int64)
        for number, row in enumerate(rows):
            self.history[number, : len(row)] = torch.tensor(row)
        self.history = self.history.to(model.device)
        self.starts = self._starts()
        self.cache = None
        self.graph: CudaGraph | None = None
        self.records = use_cache and capacity >= GRAPH_FROM and model.device.type == "cuda"
        self.records = self.records and not model.syncs_in_eval

    def _starts(self) -> list[int]:
        return [window_start(length, self.seq_len) for length in self.lengths]

    def repeat(self, n: int) -> None:
        """Make `n` copies of every row."""
        self.history = self.history.repeat_interleave(n, dim=0)
        self.lengths = [length for length in self.lengths for _ in range(n)]
        self.starts = self._starts()
        if self.cache is not None:
            self.cache.repeat(n)

    def append(self, tokens: Tensor) -> None:
        """Add a token (R,) to every row."""
        self.history[torch.arange(len(tokens)), self._lengths()] = tokens
        self.lengths = [length + 1 for length in self.lengths]

    def _lengths(self) -> Tensor:
        return torch.tensor(self.lengths, device=self.history.device)

    def seen(self) -> Tensor:
        """Where `history` holds real tokens, (R, S)."""
        return torch.arange(self.history.shape[1], device=self.history.device) < self._lengths()[:, None]

    def read_all(self) -> Tensor:
        """Logits (R, V) after the last token of every row, from a pass over each row's whole view."""
        self.starts = self._starts()
        views = [length - start for length, start in zip(self.lengths, self.starts, strict=True)]
        longest = max(views)
        index = torch.tensor(self.starts, device=self.history.device)[:, None]
        index = index + torch.arange(longest, device=self.history.device)
        ids = self.history.gather(1, index.clamp(max=self.history.shape[1] - 1))  # rows padded on the right
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


class TextStream:
    """Tokens of one sample to text: whole characters only, nothing beyond a stop string or an end-of-text token."""

    def __init__(self, tokenizer: Tokenizer | None, stops: Sequence[str], on_text: Callable[[str], None]) -> None:
        self.decoder = StreamDecoder(tokenizer) if tokenizer is not None else None
        self.eot_id = tokenizer.eot_id if tokenizer is not None else None
        self.stops, self.on_text = [stop for stop in stops if stop], on_text
        self.tokens: list[int] = []
        self.text, self.held, self.stop_reason = "", "", None

    def push(self, token: int) -> None:
        """Take the next token; sets `stop_reason` when the sample ends with it."""
        if token == self.eot_id:
            self.finish("eot")
            return
        self.tokens.append(token)
        self._release(self.decoder.push(token) if self.decoder else f"{token} ", final=False)

    def finish(self, reason: str) -> None:
        """End the sample, unless it has ended, and let go of what was held back, but not of half a character."""
        if self.stop_reason is None:
            self._release("", final=True)
            self.stop_reason = self.stop_reason or reason

    def _release(self, new: str, final: bool) -> None:
        self.held += new
        found = [at for stop in self.stops if (at := self.held.find(stop)) >= 0]
        if found:
            self.held, self.stop_reason = self.held[: min(found)], "stop"
        keep = 0 if final or found else max((overlap(self.held, stop) for stop in self.stops), default=0)
        out, self.held = self.held[: len(self.held) - keep], self.held[len(self.held) - keep :]
        self.text += out
        if out:
            self.on_text(out)


def overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that could be the beginning of `stop`."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)


def uniforms(config: SampleConfig, n_rows: int) -> Tensor:
    """One number in [0, 1) for every row and token, (R, N). A row's numbers do not depend on how many rows there
    are."""
    generator = torch.Generator()
    rows = []
    for row in range(n_rows):
        generator.manual_seed((config.seed * 1_000_003 + row) % 2**63)
        rows.append(torch.rand(config.max_new_tokens, generator=generator))
    return torch.stack(rows)


@torch.inference_mode()
def generate(
    model: LanguageModel,
    tokenizer: Tokenizer | None,
    prompts: Sequence[Sequence[int]],
    config: SampleConfig,
    *,
    stops: Sequence[str] = (),
    use_cache: bool = True,
    on_text: Callable[[int, str], None] = lambda sample, text: None,
) -> Generation:
    """Draw `num_samples` continuations of every prompt (token ids, at least one each) side by side.

    `on_text(number of the sample, piece of text)` is called as text appears. Of a prompt longer than the context the
    model sees the end.
    """
    was_training = model.training
    model.eval()
    n_rows = len(prompts) * config.num_samples
    result = Generation(prefill_tokens=sum(min(len(p), model.config.seq_len) for p in prompts))
    streams = [TextStream(tokenizer, stops, lambda text, row=row: on_text(row, text)) for row in range(n_rows)]
    random = uniforms(config, n_rows).to(model.device)
    started = time.perf_counter()
    context = Context(model, [list(prompt) for prompt in prompts], config.max_new_tokens, use_cache)
    logits = context.read_all().repeat_interleave(config.num_samples, dim=0)
    context.repeat(config.num_samples)
    synchronize(model.device)
    result.prefill_s = time.perf_counter() - started
    for number in range(config.max_new_tokens):
        probabilities = next_probabilities(logits, config, context.history, context.seen())
        tokens = draw(probabilities, random[:, number])
        for stream, token in zip(streams, tokens.tolist(), strict=True):
            if stream.stop_reason is None:
                stream.push(token)
                result.decode_tokens += 1
        if number + 1 == config.max_new_tokens or all(stream.stop_reason for stream in streams):
            break
        context.append(tokens)
        logits = context.read_newest()
    for stream in streams:
        stream.finish("length")
        result.samples.append(Sample(stream.text, stream.tokens, stream.stop_reason))
    result.decode_s = time.perf_counter() - started - result.prefill_s
    model.train(was_training)
    return result
