"""Logits to the next token: drawing rules."""

from __future__ import annotations

import torch
from torch import Tensor

from nnx_cli.config import SampleConfig

GREEDY_BELOW = 1e-20  # a temperature under which logits that differ at all leave the likeliest token alone
MAX_PENALISED = 1e15  # what a penalty near 0 makes of a logit at most: over any temperature still a finite number
MIN_TOP_P = 2.0**-126  # the smallest normal number: what is less would be 0, and leave no token


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
        logits = torch.where(repeated, penalised.clamp(-MAX_PENALISED, MAX_PENALISED), logits)
    if config.greedy or config.temperature < GREEDY_BELOW:
        return torch.zeros_like(logits).scatter_(1, logits.argmax(1, keepdim=True), 1.0)
    logits = logits / config.temperature
    if config.top_k is not None and config.top_k < logits.shape[1]:
        logits = logits.masked_fill(logits < logits.topk(config.top_k).values[:, -1:], -torch.inf)
    probabilities = logits.softmax(1)
    if config.top_p is not None:
        ordered, index = probabilities.sort(descending=True, dim=1)
        beyond = ordered.cumsum(1) - ordered >= max(config.top_p, MIN_TOP_P)  # the mass before a token already suffices
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


def uniforms(config: SampleConfig, n_sequences: int) -> Tensor:
    """One number in [0, 1) for every sequence and token, (R, N). A sequence's numbers do not depend on how many there
    are."""
    generator = torch.Generator()
    numbers = []
    for sequence in range(n_sequences):
        generator.manual_seed((config.seed * 1_000_003 + sequence) % 2**63)
        numbers.append(torch.rand(config.max_new_tokens, generator=generator))
    return torch.stack(numbers)
