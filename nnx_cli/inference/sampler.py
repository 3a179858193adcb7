"""What the next token is drawn with: rules, and random numbers."""

from __future__ import annotations

import torch

from nnx_cli.config import SampleConfig
from nnx_cli.kernels.next_token import Numbers, Stages

GREEDY_BELOW = 1e-20  # a temperature under which logits that differ at all leave the likeliest token alone
MIN_TOP_P = 2.0**-126  # the smallest normal number: what is less would be 0, and leave no token
UNIFORMS_AT_ONCE = 256  # random numbers of a sequence that exist at a time


def stages_of(config: SampleConfig, vocab_size: int) -> Stages:
    """The rules that `config` leaves any effect, on so many tokens."""
    greedy = config.greedy or config.temperature < GREEDY_BELOW
    k = config.top_k if config.top_k is not None and config.top_k < vocab_size else 0
    return Stages(
        greedy=greedy,
        repetition_penalty=config.repetition_penalty != 1.0,
        top_k=0 if greedy or not k else min(vocab_size, 1 << (k - 1).bit_length()),
        top_p=not greedy and config.top_p is not None and config.top_p < 1.0,
        min_p=not greedy and config.min_p is not None and config.min_p > 0.0,
    )


def numbers_of(config: SampleConfig) -> tuple[float, float, float, float]:
    """Temperature, top-p, min-p and repetition penalty as the rules take them."""
    top_p = 1.0 if config.top_p is None else max(config.top_p, MIN_TOP_P)
    return config.temperature, top_p, config.min_p or 0.0, config.repetition_penalty


def stream_seed(seed: int, number: int) -> int:
    """The seed of the random numbers of a sample, from that of all samples and its number among them."""
    return (seed * 1_000_003 + number) % 2**63


class Rules:
    """How the next token is drawn. What was captured as a CUDA graph is captured anew only where `stages` change."""

    def __init__(self, config: SampleConfig, vocab_size: int, device: torch.device) -> None:
        self.vocab_size = vocab_size
        self.numbers = Numbers(torch.zeros(4, device=device), torch.zeros(1, dtype=torch.int64, device=device))
        self.set(config)

    def set(self, config: SampleConfig) -> None:
        """Draw as `config` says from now on."""
        self.stages = stages_of(config, self.vocab_size)
        self.numbers.values.copy_(torch.tensor(numbers_of(config)))
        self.numbers.top_k.fill_(config.top_k or self.vocab_size)


class Uniforms:
    """Numbers in [0, 1) for R sequences, a step's after the other's.

    Every sequence has a stream of its own, from the seed and its number: it depends neither on how many sequences there
    are nor on how many numbers are taken. They lie ready in a table of the device, of `UNIFORMS_AT_ONCE` steps.
    """

    def __init__(self, seed: int, n_sequences: int, device: torch.device) -> None:
        self.generators = [torch.Generator() for _ in range(n_sequences)]
        for number, generator in enumerate(self.generators):
            generator.manual_seed(stream_seed(seed, number))
        self.table = torch.zeros(UNIFORMS_AT_ONCE, n_sequences, device=device)
        self.step = torch.zeros(n_sequences, dtype=torch.int64, device=device)  # the row of the table that is next
        self.n_left = 0

    def prepare(self) -> None:
        """Have the next numbers ready; before every step, on the host."""
        if self.n_left == 0:
            rows = [torch.rand(UNIFORMS_AT_ONCE, generator=generator) for generator in self.generators]
            self.table.copy_(torch.stack(rows, dim=1))
            self.step.zero_()
            self.n_left = UNIFORMS_AT_ONCE
        self.n_left -= 1
