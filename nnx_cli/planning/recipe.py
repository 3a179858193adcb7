"""What a model learns best from: optimizer, learning rate, dropout, weight decay and tokens a step, from its parameters
and the tokens it is going to see."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from nnx_cli import models
from nnx_cli.config import MOST_WEIGHT_DECAY, TrainConfig
from nnx_cli.models._base import LanguageModel, Recipe
from nnx_cli.optim._build import defaults
from nnx_cli.planning.flops import count_parameters
from nnx_cli.planning.settings import Derived

DROPOUT = ((20, 0.3), (12, 0.2), (6, 0.1))  # epochs from which on a model needs it: tests/bench/horizon.md, zoo.md
USEFUL_EPOCHS, USEFUL_EPOCHS_TO_LARGE = 32, 16  # more bring nothing: tests/bench/horizon.md
LARGE = 5e6  # parameters, from which on the latter holds where there are enough of them a token to overfit
VERY_LARGE = 6e7  # parameters, from which on fewer epochs are enough
LEAST_USEFUL_EPOCHS, MOST_USEFUL_TOKENS = 12, 3.4e7  # of those: 12, or up to 16 until so many tokens are read
PARAMS_PER_TOKEN_TO_DROP = 0.5  # of the text, from which on dropout pays: tests/bench/horizon.md
PARAMS_PER_TOKEN_TO_OVERFIT = 8  # from which on a model can learn the text by heart
SOONER_FROM = 4  # parameters a token from which on fewer epochs are enough for that: see `default_dropout`
EPOCHS_TO_OVERFIT = 16  # beyond which AdamW beats Muon, which learns a text by heart faster: tests/bench/zoo.md
EPOCHS_TO_FORGET, MOST_FORGOTTEN, WIDEST_RACED = 6, 3, 384  # see `default_weight_decay`
READ_AGAIN = 3  # epochs from which on they count there
STEPS_TO_FORGET, MOST_OF_NARROW = 700, 6  # of models that are not wide, in runs of many steps
LEAST_FORGOTTEN, SHORTEST_RACED = 0.6, 295  # by Muon's matrices, in steps; less in fewer: tests/bench/zoo.md
MOST_DECAY = 0.04  # of a weight, in a step
CPU_TOKENS_PER_STEP = (1024, 2048)  # for models of up to 2 million parameters, and larger
GPU_TOKENS_PER_STEP = (8192, 16_384, 32_768)  # for models of up to 20 and 60 million parameters, and larger
MOST_WARMUP_STEPS = 200
SHORT_SEQUENCES, STEPS_FOR_SHORT = 1 / 3, 400  # of a run of so many steps: tests/bench/zoo.md


@dataclass(frozen=True)
class Horizon:
    """How much a run is going to see: epochs over its text, of which the model trains `params_per_token` parameters a
    token, tokens a second where its length is a time, and FLOPs of training on a token."""

    epochs: float
    params_per_token: float
    tokens_per_s: float
    flops_per_token: int

    @property
    def overfits(self) -> bool:
        """Whether the model learns its text by heart."""
        return self.epochs > EPOCHS_TO_OVERFIT and self.params_per_token >= PARAMS_PER_TOKEN_TO_OVERFIT


def training_recipe(
    name: str, train: TrainConfig, dim: int, expected_steps: int, train_tokens: int, from_scratch: bool = True
) -> dict[str, Derived]:
    """Learning rate, its warm-up, beta2 and weight decay of a run of `expected_steps`; `train` has its optimizer and
    tokens a step filled in."""
    recipe, optimizer = models.recipe(name), train.optimizer
    lr = train.lr or default_lr(optimizer, dim, recipe, expected_steps if from_scratch else None)
    decay = Derived(recipe.weight_decay if defaults(optimizer).weight_decay else 0.0, "optimizer and model")
    if decay.value and train.lora_rank is None and train.tokens_per_step:
        epochs = expected_steps * train.tokens_per_step / train_tokens
        value = default_weight_decay(decay.value, optimizer, lr, expected_steps, epochs, dim)
        decay = Derived(value, "lr, width, epochs")
    warms_up = train.schedule != "constant" and recipe.warmup
    warmup = min(MOST_WARMUP_STEPS, max(1, expected_steps // 50)) if warms_up else 0
    return {
        "lr": Derived(lr, "optimizer, width, model, length" if optimizer == "muon" else "optimizer, width and model"),
        "beta2": Derived(0.99, "optimizer"),
        "weight_decay": decay,
        "warmup_steps": Derived(min(warmup, expected_steps), "length"),
    }


def preferred_optimizer(name: str, lora_rank: int | None, overfits: bool = False) -> str:
    """The optimizer that `auto` means for a model where memory suffices."""
    return "adamw" if overfits or lora_rank else models.recipe(name).optimizer


def default_tokens_per_step(model: LanguageModel, device: torch.device) -> int:
    """Tokens of an optimizer step: few, so that there are many steps, but enough to keep a GPU busy."""
    total = count_parameters(model)["total"]
    if device.type == "cpu":
        few, more = CPU_TOKENS_PER_STEP
        return few if total <= 2e6 else more
    few, more, many = GPU_TOKENS_PER_STEP
    return few if total <= 20e6 else more if total <= 60e6 else many


def default_lr(optimizer: str, dim: int, recipe: Recipe, steps: int | None = None) -> float:
    """Peak learning rate: the optimizer's share of one that falls with the width from 128 on, times an architecture's
    factor; or the optimizer's own.

    With Muon, whose updates are as large as the root of the width (measured as what they do to a vector), it falls with
    that root alone in runs of few `steps`, as far as that was raced: tests/bench/zoo.md.
    """
    own, wider = defaults(optimizer), max(dim, 128) / 128
    lr = 4e-3 / wider * own.lr_share * (recipe.muon_lr_factor if optimizer == "muon" else recipe.lr_factor)
    if optimizer == "muon" and steps is not None:
        lr *= min(wider, WIDEST_RACED / 128, max(1.0, recipe.few_steps / max(1, steps))) ** 0.5
    return own.lr or float(f"{lr:.2g}")


def default_short_sequences(device: torch.device, seq_len: int, steps: int) -> float:
    """The part of a run from new weights that reads sequences of half the length (Li et al. 2022,
    https://arxiv.org/abs/2108.06084): a third where that was better in races, on a CPU and in so many steps, else none:
    tests/bench/zoo.md.
    """
    return SHORT_SEQUENCES if device.type == "cpu" and seq_len % 2 == 0 and steps >= STEPS_FOR_SHORT else 0.0


def useful_epochs(params_per_token: float, train_tokens: int) -> int:
    """How often a text of so many tokens is worth reading by a model that trains so many parameters a token of it, with
    the dropout and weight decay that this takes: beyond that the last weights get no better. Raced:
    tests/bench/horizon.md.
    """
    parameters = params_per_token * train_tokens
    if params_per_token < PARAMS_PER_TOKEN_TO_OVERFIT or parameters < LARGE:
        return USEFUL_EPOCHS
    if parameters < VERY_LARGE:
        return USEFUL_EPOCHS_TO_LARGE
    enough = max(LEAST_USEFUL_EPOCHS, math.ceil(MOST_USEFUL_TOKENS / train_tokens))
    return min(enough, USEFUL_EPOCHS_TO_LARGE)


def default_dropout(epochs: float, params_per_token: float) -> float:
    """Dropout for that many epochs of a text of which the model has `params_per_token` parameters a token: none where
    it is too small to overfit, sooner the larger it is. Raced from 0.9 to 33: tests/bench/horizon.md, zoo.md."""
    if params_per_token < PARAMS_PER_TOKEN_TO_DROP:
        return 0.0
    epochs *= max(1.0, params_per_token / SOONER_FROM) ** (1 / 3)
    return next((dropout for lowest, dropout in DROPOUT if epochs >= lowest), 0.0)


def default_weight_decay(lowest: float, optimizer: str, lr: float, steps: int, epochs: float, dim: int) -> float:
    """Weight decay for a peak learning rate and a number of steps that make as many epochs.

    What it does depends on its product with both: weights forget e^-D of where they were, D = decay * lr * steps / 2
    with a rate that falls to zero (Wang and Aitchison 2024, https://arxiv.org/abs/2405.13698). A text that is read
    again and again is overfitted unless D grows with the epochs, sooner by wider models and in runs of many steps; with
    AdamW nothing beyond 3 was better, and short runs with Muon are better with a little than with less. Raced:
    tests/bench/zoo.md.
    """
    unit = 2 / (lr * steps)  # the decay that makes D 1
    wider = min(max(dim, 128), WIDEST_RACED) / 128
    wanted, most = (epochs / EPOCHS_TO_FORGET * wider if epochs >= READ_AGAIN else 0.0), float(MOST_FORGOTTEN)
    if optimizer == "muon":
        least = LEAST_FORGOTTEN * min(1.0, steps / SHORTEST_RACED)
        slowly = min(epochs / 2, steps / STEPS_TO_FORGET, MOST_OF_NARROW) if epochs >= READ_AGAIN else 0.0
        wanted, most = max(least, wanted, slowly), max(most * wider, slowly)
    return float(f"{min(max(lowest, wanted * unit), most * unit, MOST_DECAY / lr, MOST_WEIGHT_DECAY):.2g}")
