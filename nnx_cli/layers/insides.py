"""What a model does inside with a text: attention maps, recomputed from a forward pass, and panels of values."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

ATTENTION = (
    "Where each token looks: a row is a token that reads, a column one that is read, and what a row gives away sums to "
    "1. Normal: nothing right of the diagonal, since no token sees the future; heads differ from each other, and some "
    "look at the token before or at the very first one."
)
Kind = Literal["share", "signed", "choice", "number"]


@dataclass(frozen=True)
class Panel:
    """A matrix of values with a name for every row and column; `columns` None: the tokens of the text.

    A `share` is shown as a shade from 0 up, a `signed` value as one of two colours, a `choice` as the number it is, and
    a `number` in digits, each column for itself. Where each value is of a token, `tokens` has their ids, or, spelled
    out, their text.
    """

    title: str
    about: str
    values: Tensor  # (R, C), float32 or int64, on the CPU
    rows: Sequence[str]
    kind: Kind = "share"
    columns: Sequence[str] | None = None
    is_live: bool = False  # worth to be shown while a run goes on
    tokens: Sequence[Sequence[Any]] | None = None  # R of C each


@dataclass(frozen=True)
class Insides:
    """Attention of one text by layer, (H, T, T) float32 on the CPU each, and what else an architecture has to show."""

    attention: Sequence[Tensor]
    layers: Sequence[str]  # names of the layers that attend
    panels: Sequence[Panel] = ()
    about: str = ATTENTION


@dataclass(frozen=True)
class Attended:
    """What one call of `scaled_dot_product_attention` was given and returned, float32."""

    q: Tensor  # (B, H, T, K)
    k: Tensor  # (B, G, S, K)
    v: Tensor  # (B, G, S, K')
    weights: Tensor  # (B, H, T, S)
    output: Tensor  # (B, H, T, K')


class AttentionRecorder(TorchFunctionMode):
    """Keeps what attention was given while it is entered: `passes` has a list of calls for every pass of a block."""

    def __init__(self, blocks: Iterable[nn.Module]) -> None:
        super().__init__()
        self.passes: list[list[Attended]] = []
        self._blocks = list(dict.fromkeys(blocks))
        self._hooks = ExitStack()

    def __enter__(self) -> AttentionRecorder:
        for block in self._blocks:
            self._hooks.callback(block.register_forward_pre_hook(self._enter_block).remove)
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._hooks.close()

    def _enter_block(self, *_: Any) -> None:
        self.passes.append([])

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call `func`, and keep what it was given if it is attention."""
        y = func(*args, **(kwargs or {}))
        if func is F.scaled_dot_product_attention and self.passes:
            self.passes[-1].append(_attended(y, *args, **(kwargs or {})))
        return y


def _attended(
    output: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Attended:
    """The weights of a call with these arguments, which are torch's."""
    q, k, v, y = (x.detach().float() for x in (query, key, value, output))
    scores = (
        q @ each_query_head(k, q.shape[1]).transpose(-1, -2) * (query.shape[-1] ** -0.5 if scale is None else scale)
    )
    if attn_mask is not None and attn_mask.dtype != torch.bool:
        scores = scores + attn_mask
    elif attn_mask is not None:
        scores = scores.masked_fill(~attn_mask, -math.inf)
    if is_causal:
        scores = causal(scores)
    return Attended(q, k, v, scores.softmax(-1), y)


def each_query_head(x: Tensor, n_heads: int) -> Tensor:
    """Key-value heads (B, G, ...) repeated to one for every query head."""
    return x.repeat_interleave(n_heads // x.shape[1], dim=1)


def causal(scores: Tensor) -> Tensor:
    """Scores (..., T, S) without those of later positions."""
    later = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu_(1)
    return scores.masked_fill(later, -math.inf)


@contextmanager
def watched(modules: Iterable[nn.Module], keep: Callable[[tuple[Any, ...], Any], Any]) -> Iterator[list[Any]]:
    """What `keep(inputs, output)` makes of every pass of these modules, in their order."""
    kept: list[Any] = []
    with ExitStack() as hooks:
        for module in modules:
            hook = module.register_forward_hook(lambda _, inputs, output: kept.append(keep(inputs, output)))
            hooks.callback(hook.remove)
        yield kept


def maps_of(passes: Sequence[Sequence[Attended]], n_tokens: int) -> tuple[list[Tensor], list[str]]:
    """Attention maps (H, T, T) of the passes that have some over the whole text, and the names of their layers."""
    maps, names = [], []
    for number, calls in enumerate(passes, start=1):
        whole = [call.weights[0] for call in calls if call.weights.shape[-2:] == (n_tokens, n_tokens)]
        if whole:
            maps.append(torch.cat(whole).cpu())
            names.append(f"layer {number}")
    return maps, names


def by_layer(layers: Sequence[str], n: int, what: str) -> list[str]:
    """Names of `n` rows for every layer."""
    return [f"{layer}, {what} {number}" for layer in layers for number in range(1, n + 1)]


def as_text(tokens: Sequence[str]) -> list[str]:
    """Tokens that stand as code would write them, as pieces of one line: without quotes, where they have them; what has
    none, an id, with a blank behind it."""
    return [token[1:-1] if token[:1] in ("'", '"') else f"{token} " for token in tokens]
