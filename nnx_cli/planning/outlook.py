"""What a planned run is going to take and to reach, about: tokens, time, disk, bits per byte."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch

from nnx_cli import models
from nnx_cli.config import MILESTONES
from nnx_cli.data.token_folder import TokenFolder
from nnx_cli.optim._build import build_optimizer
from nnx_cli.optim._groups import cast_matrices
from nnx_cli.planning.flops import count_parameters, meta_model
from nnx_cli.planning.plan import Plan

START_SECONDS = {"cpu": 4, "cuda": 7}  # from the command to its first step: tests/bench/main_job.md, against_nanogpt.md
MOST_STARTED = 40e6  # parameters of models that this was measured with
LIKE_PARAMETERS, LIKE_TEXT, LIKE_READ = 1.5, 3, 2  # factors within which runs are alike


class Measured(NamedTuple):
    """Runs of an architecture on one text, whose `losses` stand in a table of tests/bench."""

    table: str
    model: str
    parameters: float
    text: str
    text_bytes: float  # to train on
    losses: Mapping[float, float]  # at the end, by epochs: nats a byte, or, of `bpe`, bits a byte
    is_bpe: bool = False  # by byte pairs, else by bytes or characters


class Reached(NamedTuple):
    """What such a run ended at, and on what text."""

    bits_per_byte: float
    text: str


MEASURED = (
    Measured("zoo.md", "nyx", 0.79e6, "plays", 54e3, {6: 1.534, 12: 1.565, 30: 1.548}),
    Measured("zoo.md", "nyx", 0.79e6, "plays", 31e3, {10: 2.225}),
    Measured("zoo.md", "nyx", 0.79e6, "plays", 158e3, {5: 2.047}),
    Measured("zoo.md", "nyx", 0.79e6, "plays", 1e6, {0.4: 1.765, 1: 1.580, 3.5: 1.473}),
    Measured("zoo.md", "nyx", 0.79e6, "documentation", 418e3, {8: 1.101}),
    Measured("horizon.md", "nyx", 0.79e6, "plays", 225e3, {8: 1.496, 16: 1.433, 32: 1.428}),
    Measured("horizon.md", "nyx", 0.79e6, "plays", 900e3, {8: 1.440, 16: 1.424, 32: 1.408}),
    Measured("zoo.md", "nyx", 10.6e6, "plays", 1e6, {4.1: 1.433, 6.5: 1.423, 11.4: 1.408}),
    Measured("zoo.md", "nyx", 10.6e6, "a novel", 1.08e6, {3.8: 1.344, 6: 1.312, 10.5: 1.303}),
    Measured("zoo.md", "nyx", 10.6e6, "code", 1e6, {4.1: 1.146, 6.5: 1.120, 11.4: 1.050}),
    Measured("against_nanogpt.md", "nyx", 10.6e6, "scripture", 855e3, {3.4: 1.1086, 4.8: 1.1016}),
    Measured("horizon.md", "nyx", 10.7e6, "plays", 900e3, {6: 1.399, 12: 1.369, 16: 1.370}),
    Measured("horizon.md", "nyx", 10.7e6, "code", 900e3, {12: 0.910, 16: 0.906}),
    Measured("horizon.md", "nyx", 10.7e6, "manuals", 900e3, {12: 1.380, 16: 1.332}),
    Measured("horizon.md", "nyx", 10.7e6, "code", 8.1e6, {4: 0.743, 8: 0.735, 16: 0.730}),
    Measured("horizon.md", "nyx", 30e6, "plays", 900e3, {4: 1.624, 8: 1.400, 12: 1.379, 16: 1.364}),
    Measured("more_time.md", "nyx", 0.79e6, "documentation", 420e3, {1.2: 1.2724, 4.3: 1.1129, 16.7: 1.0885}),
    Measured("more_time.md", "nyx", 0.79e6, "plays", 1e6, {1.8: 1.5234, 7.1: 1.4667}),
    Measured("more_time.md", "nyx", 10.7e6, "documentation", 420e3, {8.4: 1.0631, 16: 1.0528}),
    Measured("more_time.md", "nyx", 10.7e6, "plays", 1e6, {4.8: 1.4442, 13.6: 1.4030, 16: 1.3967}),
    Measured("more_time.md", "nyx", 10.7e6, "code", 846e3, {5.1: 1.2136, 15.9: 1.0927}),
    Measured("more_time.md", "nyx", 10.7e6, "a novel", 2.9e6, {1.7: 1.2210, 4.6: 1.1872, 32: 1.1426}),
    Measured("more_time.md", "nyx", 30e6, "documentation", 420e3, {16: 1.0541}),
    Measured("more_time.md", "nyx", 30e6, "plays", 1e6, {9.5: 1.4182, 16: 1.3837}),
    Measured("more_time.md", "nyx", 30e6, "code", 846e3, {16: 1.0073}),
    Measured("more_time.md", "nyx", 30e6, "a novel", 2.9e6, {2.4: 1.2088, 13.7: 1.1038, 16: 1.0999}),
    Measured("more_time.md", "nyx", 125e6, "code", 846e3, {16: 1.3173}),
    Measured("more_time.md", "nyx", 125e6, "a novel", 2.9e6, {6.2: 1.1391, 12: 1.1216}),
    Measured("quality.md", "n4", 10.8e6, "plays", 1e6, {4: 1.4994}),
    Measured("quality.md", "neon", 10.5e6, "plays", 1e6, {4: 1.4085}),
    Measured("quality.md", "ngpt", 10.7e6, "plays", 1e6, {4: 1.4692}),
    Measured("quality.md", "tape", 10.7e6, "plays", 1e6, {4: 1.6067}),
    Measured("zoo.md", "llama", 10.65e6, "plays", 1e6, {8: 1.4355}),
    Measured("tokenizer_race.md", "nyx", 1.28e6, "a novel", 3.1e6, {1.7: 1.794}, True),
    Measured("five_minutes.md", "nyx", 1.28e6, "a novel", 2.9e6, {4.5: 1.677}, True),
    Measured("tokenizer_race.md", "nyx", 1.28e6, "code", 1.8e6, {2.8: 1.924}, True),
    Measured("tokenizer_race.md", "nyx", 1.28e6, "code", 6.1e6, {0.8: 1.621}, True),
    Measured("tokenizer_race.md", "nyx", 1.28e6, "code", 8.7e6, {0.6: 1.548}, True),
    Measured("tokenizer_race.md", "nyx", 1.28e6, "documentation", 23e6, {0.2: 2.262}, True),
    Measured("tokenizer_race.md", "nyx", 32e6, "code", 8e6, {7: 1.166}, True),
    Measured("five_minutes.md", "nyx", 34.1e6, "code", 218e6, {0.5: 0.630, 4.7: 0.538, 4.8: 0.602}, True),
)


@dataclass(frozen=True)
class Outlook:
    """Tokens and epochs that a run is going to see, seconds from the start of the command to its first sample (None:
    there is none, or nobody knows), bytes of its folder, and the lowest and highest of what such runs reached."""

    tokens: int
    epochs: float
    first_sample_s: float | None
    folder_bytes: int
    reached: tuple[Reached, Reached] | None


def outlook(plan: Plan, tokens: TokenFolder, device: torch.device) -> Outlook:
    """The outlook of a planned run on a token folder and a device."""
    train = plan.train
    n_train = tokens.epoch_tokens(plan.model_config.seq_len, train.seed)
    assert train.tokens_per_step is not None, "a plan has it"
    step_s = train.tokens_per_step / plan.tokens_per_s
    ends = [end for end in (train.max_time_s, train.max_steps and train.max_steps * step_s) if end]
    expected = max(train.tokens_per_step, round(min(ends) * plan.tokens_per_s))
    first = MILESTONES[0] * min(ends) if train.sample_every is None else min(min(ends), train.sample_every * step_s)
    n_parameters = count_parameters(meta_model(plan.model, plan.model_config))["total"]
    started = START_SECONDS.get(device.type) if n_parameters <= MOST_STARTED else None
    reached = None
    kind = None if tokens.tokenizer is None or tokens.val_mask is not None else tokens.tokenizer.kind
    if kind in ("byte", "char", "bpe") and train.lora_rank is None:
        assert tokens.text_bytes is not None, "a tokenizer tells the bytes"
        text_bytes = n_train * tokens.text_bytes / (n_train + len(tokens.val))
        reached = such_runs(models.stem(plan.model), n_parameters, text_bytes, expected / n_train, kind == "bpe")
    return Outlook(
        expected,
        expected / n_train,
        None if started is None or train.sample_every == 0 else started + first,
        run_folder_bytes(plan),
        reached,
    )


def run_folder_bytes(plan: Plan) -> int:
    """Bytes of tensors in a run folder at its fullest: the best weights, the checkpoints that are kept, and the next
    one while it is written."""
    train = plan.train
    model = meta_model(plan.model, plan.model_config, train.lora_rank)
    if train.weight_precision == "bf16":
        cast_matrices(model, "bf16")
    weights = sum(tensor.nbytes for tensor in model.state_without_ties().values())
    specs = build_optimizer(model, train).state_specs().values()
    states = sum(shape.numel() * dtype.itemsize for spec in specs for shape, dtype in spec.values())
    return weights + (train.keep + 1) * (weights + states)


def such_runs(
    model: str, parameters: float, text_bytes: float, epochs: float, is_bpe: bool = False
) -> tuple[Reached, Reached] | None:
    """The lowest and highest of what measured runs of an architecture reached that are like one of so many parameters
    and epochs of a text of so many bytes; None where nothing of the kind was measured."""
    found = [
        Reached(loss if is_bpe else loss / math.log(2), runs.text)
        for runs in MEASURED
        if (runs.model, runs.is_bpe) == (model, is_bpe)
        and _alike(runs.parameters, parameters, LIKE_PARAMETERS)
        and _alike(runs.text_bytes, text_bytes, LIKE_TEXT)
        for n, loss in runs.losses.items()
        if _alike(n * runs.text_bytes, epochs * text_bytes, LIKE_READ)
    ]
    return (min(found), max(found)) if found else None


def _alike(one: float, other: float, factor: float) -> bool:
    return one <= factor * other and other <= factor * one
