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

from nnx_cli.data.loader import windows_at
from nnx_cli.errors import DataError
from nnx_cli.layers.loss import token_losses, token_scores
from nnx_cli.models._base import LanguageModel
from nnx_cli.system.cuda_graph import CudaGraph

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
    window_losses: tuple[float, ...] = ()  # nats per token of every window, in their order

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


class Accuracy:
    """Counts how often the target is the likeliest token, and how often among the five likeliest."""

    def __init__(self) -> None:
        self.n_tokens, self.n_top1, self.n_top5 = 0, 0, 0

    def add(self, scores: Scores) -> None:
        """Count the targets of some windows."""
        self.n_tokens += scores.ranks.size
        self.n_top1 += int((scores.ranks < 1).sum())
        self.n_top5 += int((scores.ranks < 5).sum())

    def shares(self) -> dict[str, float]:
        """Both as shares of the targets."""
        return {"top1_accuracy": self.n_top1 / self.n_tokens, "top5_accuracy": self.n_top5 / self.n_tokens}


def graphed_losses(model: LanguageModel, batch_size: int, seq_len: int) -> LossFunction:
    """`token_losses` of a model in evaluation mode, as a CUDA graph for batches (B, T) of that shape; others are
    computed op by op. A result is good until the next call."""
    blank = torch.zeros(batch_size, seq_len, dtype=torch.int64, device=model.device)
    graph = CudaGraph(partial(token_losses, model), (blank, blank))

    def losses(model: LanguageModel, input_ids: Tensor, targets: Tensor) -> Tensor:
        if input_ids.shape != blank.shape:
            return token_losses(model, input_ids, targets)
        return graph(input_ids, targets)

    return losses


def window_starts(n_tokens: int, seq_len: int, n_windows: int | None) -> np.ndarray:
    """Starts of the windows that cover a stream without overlap, or of `n_windows` of them, evenly spread."""
    starts = np.arange(0, max(n_tokens - seq_len, 0), seq_len)
    if n_windows is not None and n_windows < len(starts):
        starts = starts[np.linspace(0, len(starts) - 1, n_windows).round().astype(int)]
    return starts


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
) -> Evaluation:
    """Loss of `model` over `tokens`, every window read from its own start.

    With `n_windows` None every token but the first is a target, the last window being shorter; else that many evenly
    spread windows count. `token_bytes` (V,) gives each token's length in bytes; without it there are no bits per byte.
    `watchers` are handed every batch of windows, scored; `losses_of` is not asked then. Raises DataError where there is
    no target.
    """
    if len(tokens) < 2:
        raise DataError("the text to evaluate has fewer than two tokens")
    started = time.perf_counter()
    starts = window_starts(len(tokens), seq_len, n_windows)
    batches = [(starts[i : i + batch_size], seq_len) for i in range(0, len(starts), batch_size)]
    tail = (len(tokens) - 1) % seq_len
    if tail and (n_windows is None or not batches):
        batches.append((np.array([len(tokens) - 1 - tail]), tail))
    wide = torch.float32 if model.device.type == "mps" else torch.float64
    nats, n_bytes, lengths = [], [], []
    with evaluating(model):
        for begin, length in batches:
            input_ids, targets = windows_at(tokens, begin, length)
            on_device = input_ids.to(model.device), targets.to(model.device)
            if watchers:
                losses, ranks = token_scores(model, *on_device)
                scores = Scores(begin, targets.numpy(), losses.cpu().double().numpy(), ranks.cpu().numpy())
                for watch in watchers:
                    watch(scores)
            else:
                losses = losses_of(model, *on_device)  # (B, T)
            nats.append(losses.to(wide).sum(1))
            lengths.append(np.full(len(begin), length))
            if token_bytes is not None:
                n_bytes.append(token_bytes[targets.numpy()].sum(1))
    nats_by_window = torch.cat(nats).cpu().numpy()
    total, tokens_by_window = float(nats_by_window.sum()), np.concatenate(lengths)
    n_tokens = int(tokens_by_window.sum())
    bits = stderr = text_bytes = None
    if token_bytes is not None and (text_bytes := int(sum(b.sum() for b in n_bytes))):
        bits, stderr = ratio_with_error(nats_by_window / math.log(2), np.concatenate(n_bytes))
    return Evaluation(
        total / n_tokens,
        bits,
        stderr,
        n_tokens,
        text_bytes,
        n_tokens / (time.perf_counter() - started),
        tuple((nats_by_window / tokens_by_window).tolist()),
    )


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
