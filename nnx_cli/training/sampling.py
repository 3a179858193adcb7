"""Samples that are drawn during a run."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from nnx_cli.config import SampleConfig
from nnx_cli.data.token_folder import TokenFolder
from nnx_cli.data.tokenizers.base import Tokenizer
from nnx_cli.inference.generate import generate
from nnx_cli.models._base import LanguageModel

SAMPLE_LENGTH = 200  # tokens of a sample during a run


@dataclass(frozen=True)
class Sampling:
    """What the samples during a run start with and how long they are."""

    prompt_ids: list[int]
    max_new_tokens: int = SAMPLE_LENGTH


def choose_sampling(
    tokenizer: Tokenizer | None, data: TokenFolder, prompt: str | None, prime_length: int, length: int | None
) -> Sampling:
    """How the run's samples start: with `prompt`, or `prime_length` tokens of validation text, or a line of its own."""
    if prime_length:
        ids = data.val[:prime_length].tolist()
    elif tokenizer is None:
        ids = data.val[:1].tolist()
    elif prompt:
        ids = tokenizer.encode(prompt).tolist()
    else:
        ids = [tokenizer.eot_id] if tokenizer.eot_id is not None else tokenizer.encode("\n").tolist()
    return Sampling(ids, length or SAMPLE_LENGTH)


def draw_sample(model: LanguageModel, tokenizer: Tokenizer | None, sampling: Sampling, seed: int) -> tuple[str, str]:
    """The prompt's text and what the model makes of it."""
    config = SampleConfig(max_new_tokens=sampling.max_new_tokens, seed=seed % 2**63)
    sample = generate(model, tokenizer, [sampling.prompt_ids], config).samples[0]
    prompt = tokenizer.decode(np.array(sampling.prompt_ids)) if tokenizer else ""
    return prompt, sample.text
