"""Loss with more context than a model was trained with, on the very targets that it has within its own length."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from nnx_cli import models
from nnx_cli.data.loader import windows_at
from nnx_cli.errors import DataError, counted
from nnx_cli.evaluation.losses import error_of_mean, evaluating
from nnx_cli.layers.loss import token_losses
from nnx_cli.models._base import LanguageModel

REFUSALS = (AssertionError, IndexError, RuntimeError, ValueError)  # what somebody's own model may answer with


@dataclass(frozen=True)
class ContextLoss:
    """Loss in nats per token within a context of so many tokens; None where the model gives no finite one."""

    n_tokens: int
    loss: float | None
    difference: float | None = None  # from the loss within the trained length, on the same targets
    stderr: float | None = None  # of the difference, over windows; None for a single one


def refusal(model: LanguageModel, seq_len: int) -> str | None:
    """Why a model cannot read `seq_len` tokens at once, or None where it can: as all of ours, which learn no positions.

    One from a file of the user's is asked, on the CPU: a GPU that is sent beyond a table does not come back.
    """
    if model.architecture in models.names():
        return None
    ids = torch.zeros(1, seq_len, dtype=torch.int64)
    try:
        with torch.no_grad():
            copy.deepcopy(model).cpu().eval().trunk(ids)
    except torch.OutOfMemoryError:
        raise
    except REFUSALS as error:
        return f"{type(error).__name__}: {error}".partition("\n")[0]
    return None


def check_text(n_tokens: int, seq_len: int, longest: int) -> None:
    """Raise DataError unless a text has one window of the longest context and the target behind it."""
    if n_tokens < longest + 1:
        most = (n_tokens - 1) / seq_len
        fix = f"take --context {math.floor(10 * most) / 10:g}x, or more text: --filepath FILE"
        raise DataError(
            f"the text has {counted(n_tokens, 'token')}; one window of the longest context has {longest + 1:,}",
            fix=fix if most >= 1.1 else "give more text: --filepath FILE",
        )


def losses_by_context(
    model: LanguageModel,
    tokens: np.ndarray,
    lengths: Sequence[int],
    batch_tokens: int,
    on_progress: Callable[[float], None] = lambda done: None,
) -> list[ContextLoss]:
    """Loss within contexts of `lengths` tokens, and first within the trained one, `seq_len`.

    Targets are the last `seq_len` of every window of the longest context, of which the text is full: each context ends
    with them and begins as much earlier as it is longer, so that all losses are of the same tokens. Raises DataError
    for a text shorter than that.
    """
    seq_len = model.config.seq_len
    longest = max([seq_len, *lengths])
    check_text(len(tokens), seq_len, longest)
    ends = np.arange(longest, len(tokens), longest)  # of the last target of every window
    found: list[ContextLoss] = []
    own: np.ndarray | None = None
    done, total = 0, len(ends) * (seq_len + sum(lengths))
    with evaluating(model):
        for length in (seq_len, *lengths):
            size = max(1, batch_tokens // length)
            parts = []
            for i in range(0, len(ends), size):
                starts = ends[i : i + size] - length
                parts.append(_window_losses(model, tokens, starts, length, seq_len))
                done += length * len(starts)
                on_progress(done / total)
            means = np.concatenate(parts)
            own = means if own is None else own
            found.append(_compared(length, means, own))
    return found


@torch.no_grad()
def _window_losses(
    model: LanguageModel, tokens: np.ndarray, starts: np.ndarray, length: int, n_targets: int
) -> np.ndarray:
    """Mean loss of the last targets of windows that begin at `starts`, (number of windows,)."""
    input_ids, targets = windows_at(tokens, starts, length)
    losses = token_losses(model, input_ids.to(model.device), targets.to(model.device))
    means: np.ndarray = losses[:, -n_targets:].cpu().double().mean(1).numpy()
    return means


def _compared(length: int, means: np.ndarray, own: np.ndarray) -> ContextLoss:
    if not np.isfinite(means).all():
        return ContextLoss(length, None)
    loss, difference = float(means.mean()), means - own
    if means is own or not np.isfinite(difference).all():
        return ContextLoss(length, loss)
    return ContextLoss(length, loss, float(difference.mean()), error_of_mean(difference))
