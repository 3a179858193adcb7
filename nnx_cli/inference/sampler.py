"""Logits to the next token: drawing rules, and the random numbers they draw with."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from nnx_cli.config import SampleConfig

GREEDY_BELOW = 1e-20  # a temperature under which logits that differ at all leave the likeliest token alone
MAX_PENALISED = 1e15  # what a penalty near 0 makes of a logit at most: over any temperature still a finite number
MIN_TOP_P = 2.0**-126  # the smallest normal number: what is less would be 0, and leave no token
UNIFORMS_AT_ONCE = 256  # random numbers of a sequence that exist at a time


@dataclass(frozen=True)
class Stages:
    """Which rules act, and so which operations run; what numbers they act with is in `Rules`."""

    greedy: bool
    repetition_penalty: bool
    top_k: int  # likeliest tokens that are looked for, the power of two from `top_k` on; 0: top-k is off
    top_p: bool
    min_p: bool

    @classmethod
    def of(cls, config: SampleConfig, vocab_size: int) -> Stages:
        """The rules that `config` leaves any effect, on so many tokens."""
        greedy = config.greedy or config.temperature < GREEDY_BELOW
        k = config.top_k if config.top_k is not None and config.top_k < vocab_size else 0
        return cls(
            greedy=greedy,
            repetition_penalty=config.repetition_penalty != 1.0,
            top_k=0 if greedy or not k else min(vocab_size, 1 << (k - 1).bit_length()),
            top_p=not greedy and config.top_p is not None and config.top_p < 1.0,
            min_p=not greedy and config.min_p is not None and config.min_p > 0.0,
        )


class Rules:
    """How the next token is drawn. Numbers are tensors: what was recorded as a CUDA graph reads those of the moment,
    and needs to be recorded anew only where `stages` change."""

    def __init__(self, config: SampleConfig, vocab_size: int, device: torch.device) -> None:
        self.vocab_size = vocab_size
        self.numbers = torch.zeros(4, device=device)
        self.temperature, self.top_p, self.min_p, self.repetition_penalty = self.numbers.unbind()
        self.top_k = torch.zeros(1, dtype=torch.int64, device=device)
        self.set(config)

    def set(self, config: SampleConfig) -> None:
        """Draw as `config` says from now on."""
        self.stages = Stages.of(config, self.vocab_size)
        top_p = 1.0 if config.top_p is None else max(config.top_p, MIN_TOP_P)
        numbers = (config.temperature, top_p, config.min_p or 0.0, config.repetition_penalty)
        self.numbers.copy_(torch.tensor(numbers))
        self.top_k.fill_(config.top_k or self.vocab_size)


def next_tokens(logits: Tensor, rules: Rules, occurred: Tensor, uniform: Tensor | None) -> Tensor:
    """The next token (R,) of sequences with logits (R, V) and uniform numbers (R,) in [0, 1); greedy needs none.

    `occurred` (R, V) says which tokens are in a sequence already; the repetition penalty alone asks.
    """
    if uniform is None:
        return penalised(logits.float(), rules, occurred).argmax(1)
    return draw(next_probabilities(logits, rules, occurred), uniform)


def penalised(logits: Tensor, rules: Rules, occurred: Tensor) -> Tensor:
    """Logits (R, V) after the repetition penalty: Keskar et al. 2019, https://arxiv.org/abs/1909.05858."""
    if not rules.stages.repetition_penalty:
        return logits
    penalty = rules.repetition_penalty
    changed = torch.where(logits > 0, logits / penalty, logits * penalty).clamp(-MAX_PENALISED, MAX_PENALISED)
    return torch.where(occurred, changed, logits)


def next_probabilities(logits: Tensor, rules: Rules, occurred: Tensor) -> Tensor:
    """Probabilities (R, V) to draw from, after penalty, temperature, top-k, top-p and min-p, in that order.

    Top-p: Holtzman et al. 2020, https://arxiv.org/abs/1904.09751; min-p: Nguyen et al. 2024,
    https://arxiv.org/abs/2407.01082.
    """
    stages = rules.stages
    logits = penalised(logits.float(), rules, occurred) / rules.temperature
    if stages.top_k:
        likeliest = logits.topk(stages.top_k).values  # (R, at least k)
        kth = likeliest.gather(1, (rules.top_k - 1).expand(len(logits), 1))
        logits = logits.masked_fill(logits < kth, -torch.inf)
    probabilities = logits.softmax(1)
    if stages.top_p:
        ordered, index = probabilities.sort(descending=True, dim=1)
        beyond = ordered.cumsum(1) - ordered >= rules.top_p  # the mass before a token already suffices
        probabilities = torch.zeros_like(ordered).scatter_(1, index, ordered.masked_fill(beyond, 0.0))
    if stages.min_p:
        least = rules.min_p * probabilities.max(1, keepdim=True).values
        probabilities = probabilities.masked_fill(probabilities < least, 0.0)
    return probabilities


def draw(probabilities: Tensor, uniform: Tensor) -> Tensor:
    """The token (R,) where the cumulated probabilities (R, V) pass `uniform` (R,) in [0, 1)."""
    cumulated = probabilities.cumsum(1)
    total = cumulated[:, -1:]
    below = torch.nextafter(total, torch.zeros_like(total))  # so that what has no probability is never reached
    return (cumulated <= torch.minimum(uniform[:, None] * total, below)).sum(1)


class Uniforms:
    """Numbers in [0, 1) for R sequences, a step's after the other's.

    Every sequence has a stream of its own, from the seed and its number: it depends neither on how many sequences there
    are nor on how many numbers are taken. They lie ready in a table of the device, of `UNIFORMS_AT_ONCE` steps.
    """

    def __init__(self, seed: int, n_sequences: int, device: torch.device) -> None:
        self.generators = [torch.Generator() for _ in range(n_sequences)]
        for number, generator in enumerate(self.generators):
            generator.manual_seed((seed * 1_000_003 + number) % 2**63)
        self.table = torch.zeros(UNIFORMS_AT_ONCE, n_sequences, device=device)
        self.step = torch.zeros(1, dtype=torch.int64, device=device)  # the row of the table that is next
        self.n_left = 0

    def prepare(self) -> None:
        """Have the next numbers ready; before every `take`, on the host."""
        if self.n_left == 0:
            rows = [torch.rand(UNIFORMS_AT_ONCE, generator=generator) for generator in self.generators]
            self.table.copy_(torch.stack(rows, dim=1))
            self.step.zero_()
            self.n_left = UNIFORMS_AT_ONCE
        self.n_left -= 1

    def take(self) -> Tensor:
        """The numbers (R,) of the next step."""
        numbers = self.table.index_select(0, self.step).squeeze(0)
        self.step += 1
        return numbers
