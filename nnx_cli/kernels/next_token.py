"""Logits to the next token of every sequence, put where the next pass finds it; one Triton kernel on CUDA."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from nnx_cli.system.hardware import takes_triton

MAX_PENALISED = 1e15  # what a penalty near 0 makes of a logit at most: over any temperature still a finite number
MAX_VOCABULARY = 2**16  # tokens whose logits a kernel's program holds


@dataclass(frozen=True)
class Stages:
    """Which rules act, and so which operations run; what numbers they act with is in `Numbers`."""

    greedy: bool
    repetition_penalty: bool
    top_k: int  # likeliest tokens that are looked for, the power of two from `top_k` on; 0: top-k is off
    top_p: bool
    min_p: bool


class Numbers(NamedTuple):
    """What the rules act with, as tensors: what was captured as a CUDA graph reads those of the moment."""

    values: Tensor  # (4,), float32: temperature, top-p, min-p, repetition penalty; (4, R, 1): of each sequence its own
    top_k: Tensor  # (1,), int64; or (R, 1)


class State(NamedTuple):
    """R sequences: what a step of decoding reads and writes besides the model's cache."""

    tokens: Tensor  # (R, S), int64
    lengths: Tensor  # (R,), int64: how many are there
    newest: Tensor  # (R, 1), int64: the last ones
    occurred: Tensor  # (R, V), bool: which tokens were ever there; the repetition penalty alone asks
    uniforms: Tensor  # (N, R), in [0, 1): numbers to draw with
    step: Tensor  # (R,), int64: which is next


def append_next(logits: Tensor, stages: Stages, numbers: Numbers, state: State) -> None:
    """Draw the next token of every sequence from its logits (R, V), and append it."""
    if takes_triton(logits) and logits.shape[1] <= MAX_VOCABULARY:
        from nnx_cli.kernels import next_token_triton

        next_token_triton.append_next(logits, stages, MAX_PENALISED, *numbers, *state)
    else:
        plain_append_next(logits, stages, numbers, state)


def plain_append_next(logits: Tensor, stages: Stages, numbers: Numbers, state: State) -> None:
    """`append_next` by operations of torch."""
    if stages.greedy:
        tokens = penalised(logits.float(), stages, numbers, state.occurred).argmax(1, keepdim=True)
    else:
        uniform = state.uniforms.gather(0, state.step.unsqueeze(0)).squeeze(0)
        tokens = draw(next_probabilities(logits, stages, numbers, state.occurred), uniform).unsqueeze(1)
        state.step.add_(1)
    state.newest.copy_(tokens)
    state.tokens.scatter_(1, state.lengths.unsqueeze(1), tokens)
    state.lengths.add_(1)
    if stages.repetition_penalty:
        state.occurred.scatter_(1, tokens, True)


def penalised(logits: Tensor, stages: Stages, numbers: Numbers, occurred: Tensor) -> Tensor:
    """Logits (R, V) after the repetition penalty: Keskar et al. 2019, https://arxiv.org/abs/1909.05858."""
    if not stages.repetition_penalty:
        return logits
    penalty = numbers.values[3]
    changed = torch.where(logits > 0, logits / penalty, logits * penalty).clamp(-MAX_PENALISED, MAX_PENALISED)
    return torch.where(occurred, changed, logits)


def next_probabilities(logits: Tensor, stages: Stages, numbers: Numbers, occurred: Tensor) -> Tensor:
    """Probabilities (R, V) to draw from, after penalty, temperature, top-k, top-p and min-p, in that order.

    Top-p: Holtzman et al. 2020, https://arxiv.org/abs/1904.09751; min-p: Nguyen et al. 2024,
    https://arxiv.org/abs/2407.01082.
    """
    temperature, top_p, min_p, _ = numbers.values.unbind()
    logits = penalised(logits.float(), stages, numbers, occurred) / temperature
    if stages.top_k:
        likeliest = logits.topk(stages.top_k).values  # (R, at least k)
        kth = likeliest.gather(1, (numbers.top_k - 1).expand(len(logits), 1))
        logits = logits.masked_fill(logits < kth, -torch.inf)
    probabilities = logits.softmax(1)
    if stages.top_p:
        ordered, index = probabilities.sort(descending=True, dim=1)
        beyond = ordered.cumsum(1) - ordered >= top_p  # the mass before a token already suffices
        probabilities = torch.zeros_like(ordered).scatter_(1, index, ordered.masked_fill(beyond, 0.0))
    if stages.min_p:
        least = min_p * probabilities.max(1, keepdim=True).values
        probabilities = probabilities.masked_fill(probabilities < least, 0.0)
    return probabilities


def draw(probabilities: Tensor, uniform: Tensor) -> Tensor:
    """The token (R,) where the cumulated probabilities (R, V) pass `uniform` (R,) in [0, 1)."""
    cumulated = probabilities.cumsum(1)
    total = cumulated[:, -1:]
    below = torch.nextafter(total, torch.zeros_like(total))  # so that what has no probability is never reached
    return (cumulated <= torch.minimum(uniform[:, None] * total, below)).sum(1)
