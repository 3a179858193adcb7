"""The model beside its copy in another library: logits of text, and the tokens that greedy decoding chooses."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from nnx_cli.convert.export._base import Found, Source
from nnx_cli.models._base import LanguageModel

FLOPS = 2e11  # spent on text by each of the two models: seconds of a small computer
TOKENS = (64, 2048)  # at least and at most
WINDOWS = 8  # at most, of the context's length
GREEDY_TOKENS = 50
RELATIVE = 1e-4  # of the largest logit: what rounding to float32 may make of any
PROMPT = 16  # tokens that they continue, or half of a shorter context


def compared_shape(model: LanguageModel) -> tuple[int, int]:
    """How many windows of how many tokens are enough for a model."""
    n_parameters = sum(tensor.numel() for tensor in model.state_without_ties().values())
    n_tokens = min(max(int(FLOPS / (2 * n_parameters)), TOKENS[0]), TOKENS[1])
    length = min(model.config.seq_len, n_tokens)
    return max(1, min(WINDOWS, n_tokens // length)), length


@torch.inference_mode()
def compare(
    source: Source,
    logits: Callable[[Tensor], Tensor],
    generate: Callable[[Tensor, int], Tensor],
    tolerance: float,
) -> Found:
    """Compare with what another library computes: `logits` of ids (1, T), (1, T, V), and `generate`, which continues
    ids (1, T) by n greedy tokens (n,), with its cache.

    The tolerance is of a logit, RELATIVE of the largest one at least. Of two tokens whose logits are equal within it,
    either may be chosen.
    """
    model, worst, largest = source.model, 0.0, 0.0
    for number, window in enumerate(source.ids.split(1)):
        source.tell("comparing", number / len(source.ids))
        expected = model(window)
        difference = (expected - logits(window)).abs().max()
        worst = max(worst, difference.nan_to_num(nan=torch.inf).item())
        largest = max(largest, expected.abs().max().nan_to_num(0.0, 0.0).item())
    tolerance = max(tolerance, RELATIVE * largest)
    prompt = source.ids[:1, : max(1, min(PROMPT, model.config.seq_len // 2))]
    n = max(1, min(GREEDY_TOKENS, model.config.seq_len - prompt.shape[1]))
    source.tell("writing text", 0.0)
    chosen = generate(prompt, n)
    text = torch.cat((prompt, chosen[None, :-1]), dim=1)
    ours = model(text, cache=model.make_cache(1, text.shape[1]))[0, -len(chosen) :]  # (n, V)
    short = ours.max(-1).values - ours.gather(1, chosen[:, None])[:, 0]
    same = int((short <= 2 * tolerance).cumprod(0).sum())
    return Found(worst, tolerance, same, n)
