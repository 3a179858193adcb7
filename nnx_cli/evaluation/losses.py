"""Held-out loss over fixed windows."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from nnx_cli.data.aligned_windows import windows_in_order
from nnx_cli.data.loader import bits_at, windows_at
from nnx_cli.errors import DataError
from nnx_cli.layers.loss import token_losses, token_scores
from nnx_cli.models._base import LanguageModel
from nnx_cli.system.cuda_graph import CudaGraph
from nnx_cli.system.ranks import ALONE, Ranks

BATCH_TOKENS = 8192  # that an evaluation reads at a time, where nothing else is asked for

LossFunction = Callable[[LanguageModel, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Evaluation:
    """Losses of a stretch of text. `loss` is nats per token; bits per byte counts the bytes of the target tokens."""

    loss: float
    bits_per_byte: float | None
    bits_per_byte_stderr: float | None
    tokens: int
    text_bytes: int | None
    tokens_per_s: float
    window_losses: tuple[float, ...] = ()  # nats per token of every window with a target, in their order

    @property
    def perplexity(self) -> float:
        """exp(loss)."""
        return math.exp(min(self.loss, 700.0))


@dataclass(frozen=True)
class Scores:
    """What a model makes of the targets of windows (B, T)."""

    starts: np.ndarray  # (B,) where the windows begin: target t of a window is token start + 1 + t
    targets: np.ndarray  # (B, T)
    losses: np.ndarray  # (B, T) nats, float64
    ranks: np.ndarray  # (B, T) tokens that the model finds likelier than the target
    counts: np.ndarray | None = None  # (B, T) which targets count; None: all


class Accuracy:
    """Counts how often the target is the likeliest token, and how often among the five likeliest."""

    def __init__(self) -> None:
        self.n_tokens, self.n_top1, self.n_top5 = 0, 0, 0

    def add(self, scores: Scores) -> None:
        """Count the targets of some windows."""
        ranks = scores.ranks if scores.counts is None else scores.ranks[scores.counts]
        self.n_tokens += ranks.size
        self.n_top1 += int((ranks < 1).sum())
        self.n_top5 += int((ranks < 5).sum())

    def shares(self) -> dict[str, float]:
        """Both as shares of the targets."""
        return {"top1_accuracy": self.n_top1 / self.n_tokens, "top5_accuracy": self.n_top5 / self.n_tokens}


def graphed_losses(model: LanguageModel, batch_size: int, seq_len: int) -> LossFunction:
    """`token_losses` of a model in evaluation mode, as a CUDA graph for batches (B, T) of that shape; others are
    computed op by op. A result is good until the next call."""
    blank = torch.zeros(batch_size, seq_len, dtype=torch.int64, device=model.device)
    graph = CudaGraph(partial(token_losses, model), (blank, blank), family="evaluation")

    def losses(model: LanguageModel, input_ids: Tensor, targets: Tensor) -> Tensor:
        if input_ids.shape != blank.shape:
            return token_losses(model, input_ids, targets)
        return graph(input_ids, targets)

    return losses


def window_starts(n_tokens: int, seq_len: int, n_windows: int | None, masked: Masked | None = None) -> np.ndarray:
    """Starts of the windows that cover a stream without overlap, or of `n_windows` of them, evenly spread; with
    `masked` of those that begin at documents."""
    starts = np.arange(0, max(n_tokens - seq_len, 0), seq_len)
    if masked is not None:
        starts = masked.window_starts(n_tokens, seq_len)
    return _spread(starts[starts + seq_len < n_tokens], n_windows)


def _spread(items: np.ndarray, n: int | None) -> np.ndarray:
    """All items, or `n` of them, evenly spread."""
    if n is None or n >= len(items):
        return items
    return items[np.linspace(0, len(items) - 1, n).round().astype(int)]


@dataclass(frozen=True)
class Masked:
    """Which tokens of a stream count as targets, and in which documents they stand: windows begin at those, so that
    what counts has what belongs to it before it."""

    mask: np.ndarray  # bits (`TokenFolder.mask`)
    documents: np.ndarray  # the first token of each

    @classmethod
    def of(cls, mask: np.ndarray | None, documents: np.ndarray) -> Masked | None:
        """None without a mask: all tokens count."""
        return None if mask is None else cls(mask, documents)

    def window_starts(self, n_tokens: int, seq_len: int) -> np.ndarray:
        """Starts of windows through all documents."""
        return windows_in_order(self.documents, n_tokens, seq_len)

    def counts(self, starts: np.ndarray, last: np.ndarray, length: int) -> np.ndarray:
        """Which targets of windows count, bool (B, length); none behind the `last` (B,) that a window is to judge."""
        places = starts[:, None] + np.arange(1, length + 1)
        return (bits_at(self.mask, places) == 1) & (places <= last[:, None])


@contextmanager
def evaluating(model: LanguageModel) -> Iterator[None]:
    """Meanwhile the model is in evaluation mode."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


@torch.no_grad()
def evaluate(
    model: LanguageModel,
    tokens: np.ndarray,
    *,
    seq_len: int,
    batch_size: int,
    token_bytes: np.ndarray | None,
    n_windows: int | None = None,
    losses_of: LossFunction = token_losses,
    watchers: Sequence[Callable[[Scores], None]] = (),
    masked: Masked | None = None,
    group: Ranks = ALONE,
    is_divided: bool = False,
) -> Evaluation:
    """Loss of `model` over `tokens`, every window read from its own start.

    With `n_windows` None every token but the first is a target, the last window being shorter; else that many evenly
    spread windows count. Where not all tokens count, `masked` says which do. `token_bytes` (V,) gives each token's
    length in bytes; without it there are no bits per byte. `watchers` are handed every batch of windows, scored;
    `losses_of` is not asked then. Of a `group` of ranks each reads a part; of a model that `is_divided` among them all
    make as many passes, for each takes part in those of the others. Raises DataError where there is no target.
    """
    if len(tokens) < 2:
        raise DataError("the text to evaluate has fewer than two tokens")
    started = time.perf_counter()
    wide = torch.float32 if model.device.type == "mps" else torch.float64
    nats: list[Tensor] = []
    n_bytes: list[np.ndarray] = []
    n_targets: list[np.ndarray] = []
    of_rank = partial(_batches, len(tokens), seq_len, batch_size, n_windows, masked, group.count)
    batches = of_rank(group.rank)
    n_passes = max(len(of_rank(rank)) for rank in range(group.count)) if is_divided else len(batches)
    with evaluating(model):
        for begin, length, counts in batches:
            input_ids, targets = windows_at(tokens, begin, length)
            on_device = input_ids.to(model.device), targets.to(model.device)
            if watchers:
                losses, ranks = token_scores(model, *on_device)
                scores = Scores(begin, targets.numpy(), losses.cpu().double().numpy(), ranks.cpu().numpy(), counts)
                for watch in watchers:
                    watch(scores)
            else:
                losses = losses_of(model, *on_device)  # (B, T)
            if counts is not None:
                losses = losses.where(torch.from_numpy(counts).to(losses.device), 0.0)
            nats.append(losses.to(wide).sum(1))
            n_targets.append(np.full(len(begin), length) if counts is None else counts.sum(1))
            if token_bytes is not None:
                lengths = token_bytes[targets.numpy()]
                n_bytes.append((lengths if counts is None else lengths * counts).sum(1))
        for _ in range(n_passes - len(batches)):  # in which others read theirs
            token_losses(model, *(part.to(model.device) for part in windows_at(tokens, np.zeros(1, int), 1)))
    mine = [torch.cat(nats).cpu().numpy() if nats else np.empty(0), _joined(n_targets), _joined(n_bytes)]
    windows = [np.concatenate(parts) for parts in zip(*group.gather(mine), strict=True)]
    return _evaluation(time.perf_counter() - started, *windows)


def _evaluation(seconds: float, nats: np.ndarray, n_targets: np.ndarray, n_bytes: np.ndarray) -> Evaluation:
    """The losses of windows (N,) together; no bytes where nobody knows them. Raises DataError without a target."""
    total, n_tokens, text_bytes = float(nats.sum()), int(n_targets.sum()), int(n_bytes.sum())
    if not n_tokens:
        raise DataError("the text to evaluate has no token that counts")
    seen = n_targets > 0
    bits, stderr = ratio_with_error(nats / math.log(2), n_bytes) if text_bytes else (None, None)
    return Evaluation(
        total / n_tokens,
        bits,
        stderr,
        n_tokens,
        text_bytes if len(n_bytes) else None,
        n_tokens / seconds,
        tuple((nats[seen] / n_targets[seen]).tolist()),
    )


def _batches(
    n_tokens: int,
    seq_len: int,
    batch_size: int,
    n_windows: int | None,
    masked: Masked | None,
    n_ranks: int = 1,
    rank: int = 0,
) -> list[tuple[np.ndarray, int, np.ndarray | None]]:
    """A rank's windows, `batch_size` at a time: their starts (B,), their length, and which targets count, None for
    all."""
    begins = np.arange(0, n_tokens - 1, seq_len) if masked is None else masked.window_starts(n_tokens, seq_len)
    last = np.append(begins[1:], n_tokens - 1)  # target that a window judges: the next one begins with it
    whole = np.flatnonzero(begins + seq_len < n_tokens)
    tail = begins[len(whole) :]
    whole = _spread(whole, n_windows)
    with_tail = len(tail) and (n_windows is None or not len(whole))
    whole = np.array_split(whole, n_ranks)[rank]
    batches = [(whole[i : i + batch_size], seq_len) for i in range(0, len(whole), batch_size)]
    if with_tail and rank == n_ranks - 1:
        batches.append((np.array([len(begins) - 1]), n_tokens - 1 - int(tail[0])))
    return [
        (begins[windows], length, None if masked is None else masked.counts(begins[windows], last[windows], length))
        for windows, length in batches
    ]


def _joined(parts: list[np.ndarray]) -> np.ndarray:
    return np.concatenate(parts) if parts else np.empty(0, dtype=np.int64)


def error_of_mean(values: np.ndarray) -> float | None:
    """Standard error of the mean of independent values; None for fewer than two."""
    return float(values.std(ddof=1) / math.sqrt(len(values))) if len(values) > 1 else None


def ratio_with_error(amounts: np.ndarray, sizes: np.ndarray) -> tuple[float, float | None]:
    """sum(amounts) / sum(sizes) and its standard error over the windows; no error for a single window."""
    ratio = float(amounts.sum() / sizes.sum())
    n = len(sizes)
    if n < 2:
        return ratio, None
    spread = float(((amounts - ratio * sizes) ** 2).sum())
    return ratio, math.sqrt(spread * n / (n - 1)) / float(sizes.sum())
