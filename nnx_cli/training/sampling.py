"""Samples that are drawn during a run."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from nnx_cli.config import SampleConfig
from nnx_cli.data.conversations import ASSISTANT, USER, Message, Template, template_of
from nnx_cli.data.token_folder import TokenFolder
from nnx_cli.data.tokenizers.base import Tokenizer
from nnx_cli.inference.generate import generate
from nnx_cli.models._base import LanguageModel

SAMPLE_LENGTH = 200  # tokens of a sample during a run
MOST_PARTS = 4  # tokens that a character may be divided into
BLOCK, MOST_READ = 2**20, 2**26  # tokens of a text that are looked at, at once and at most


@dataclass(frozen=True)
class Sampling:
    """What the samples during a run start with and how long they are."""

    prompt_ids: list[int]
    max_new_tokens: int = SAMPLE_LENGTH
    start_ids: list[int] = field(default_factory=list)  # what text without a prompt begins with, here and later


def choose_sampling(
    tokenizer: Tokenizer | None, data: TokenFolder, prompt: str | None, prime_length: int, length: int | None
) -> Sampling:
    """How the run's samples start: with `prompt`, or `prime_length` tokens of validation text, or as a text does."""
    template = template_of(tokenizer) if data.val_mask is not None else None
    ids = start = choose_start(tokenizer, data.train) if template is None else first_question(template, data.val)
    if prime_length:
        ids = data.val[:prime_length].tolist()
    elif template is not None and prompt:
        ids = template.prompt([Message(USER, prompt)])
    elif tokenizer is not None and prompt:
        ids = tokenizer.encode(prompt).tolist()
    return Sampling(ids, length or SAMPLE_LENGTH, start)


def choose_start(tokenizer: Tokenizer | None, tokens: np.ndarray) -> list[int]:
    """What text begins with where there is no prompt: end-of-text or a newline, if the model is trained to go on after
    it, else the first character of its text, or the first token where there is no tokenizer."""
    if tokenizer is None:
        return tokens[:1].tolist()
    starts = [] if tokenizer.eot_id is None else [[tokenizer.eot_id]]
    starts.append(tokenizer.encode("\n").tolist())
    starts += [tokens[:n].tolist() for n in range(1, MOST_PARTS + 1) if "\ufffd" not in tokenizer.decode(tokens[:n])]
    starts.append(tokens[:1].tolist())
    return next(ids for ids in starts if all(_is_input(token, tokens) for token in ids))


def first_question(template: Template, tokens: np.ndarray) -> list[int]:
    """The first conversation of a text up to where the assistant is to answer; only the end of one that is long."""
    places = np.flatnonzero(tokens[:MOST_READ] == template.role_ids[ASSISTANT])
    asked = tokens[: places[0] + 1].tolist() if len(places) else template.prompt([Message(USER, "")])
    return [template.begin_id] * (asked[0] != template.begin_id) + asked[-SAMPLE_LENGTH:]


def _is_input(token: int, tokens: np.ndarray) -> bool:
    """Whether something follows a token anywhere in a text, as far as is looked."""
    end = min(len(tokens) - 1, MOST_READ)
    return any((tokens[i : min(i + BLOCK, end)] == token).any() for i in range(0, end, BLOCK))


def draw_sample(model: LanguageModel, tokenizer: Tokenizer | None, sampling: Sampling, seed: int) -> tuple[str, str]:
    """The prompt's text and what the model makes of it."""
    config = SampleConfig(max_new_tokens=sampling.max_new_tokens, seed=seed % 2**63)
    sample = generate(model, tokenizer, [sampling.prompt_ids], config).samples[0]
    template = template_of(tokenizer)
    if template is not None:
        return template.spoken(sampling.prompt_ids), sample.text
    return tokenizer.decode(np.array(sampling.prompt_ids)) if tokenizer else "", sample.text
