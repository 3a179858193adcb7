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
from nnx_cli.planning.recipe import table
from nnx_cli.planning.settings import Derived


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
        return self.epochs > table.EPOCHS_TO_OVERFIT and self.params_per_token >= table.PARAMETERS_PER_TOKEN_TO_OVERFIT


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
    warmup = min(table.MOST_WARMUP_STEPS, max(1, expected_steps // table.STEPS_PER_WARMUP_STEP)) if warms_up else 0
    return {
        "lr": Derived(lr, "optimizer, width, model, length" if optimizer == "muon" else "optimizer, width and model"),
        "beta2": Derived(table.BETA2, "optimizer"),
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
        few, more = table.CPU_TOKENS_PER_STEP
        return few if total <= table.MOST_PARAMETERS_ON_CPU else more
    few, more, many = table.GPU_TOKENS_PER_STEP
    small, large = table.MOST_PARAMETERS_ON_GPU
    return few if total <= small else more if total <= large else many


def default_lr(optimizer: str, dim: int, recipe: Recipe, steps: int | None = None) -> float:
    """Peak learning rate: the optimizer's share of one that falls with the width from 128 on, times an architecture's
    factor; or the optimizer's own.

    With Muon, whose updates are as large as the root of the width (measured as what they do to a vector), it falls with
    that root alone in runs of few `steps`, as far as that was raced: tests/bench/zoo.md.
    """
    own, wider = defaults(optimizer), max(dim, 128) / 128
    lr = table.LR_AT_128 / wider * own.lr_share * (recipe.muon_lr_factor if optimizer == "muon" else recipe.lr_factor)
    if optimizer == "muon" and steps is not None:
        lr *= min(wider, table.WIDEST_RACED / 128, max(1.0, recipe.few_steps / max(1, steps))) ** 0.5
    return own.lr or float(f"{lr:.2g}")


def default_short_sequences(device: torch.device, seq_len: int, steps: int) -> float:
    """The part of a run from new weights that reads sequences of half the length (Li et al. 2022,
    https://arxiv.org/abs/2108.06084): a third where that was better in races, on a CPU and in so many steps, else none:
    tests/bench/zoo.md.
    """
    pays = device.type == "cpu" and seq_len % 2 == 0 and steps >= table.STEPS_FOR_SHORT
    return table.SHORT_SEQUENCES if pays else 0.0


def useful_epochs(params_per_token: float, train_tokens: int) -> int:
    """How often a text of so many tokens is worth reading by a model that trains so many parameters a token of it, with
    the dropout and weight decay that this takes: beyond that the last weights get no better. Raced:
    tests/bench/horizon.md.
    """
    parameters = params_per_token * train_tokens
    if params_per_token < table.PARAMETERS_PER_TOKEN_TO_OVERFIT or parameters < table.LARGE:
        return table.USEFUL_EPOCHS
    if parameters < table.VERY_LARGE:
        return table.USEFUL_EPOCHS_TO_LARGE
    enough = max(table.LEAST_USEFUL_EPOCHS, math.ceil(table.MOST_USEFUL_TOKENS / train_tokens))
    return min(enough, table.USEFUL_EPOCHS_TO_LARGE)


def has_enough_text(parameters: float, train_tokens: int) -> bool:
    """Whether a text of so many tokens, read as often as is of use, is enough for so many parameters."""
    epochs = useful_epochs(parameters / train_tokens, train_tokens)
    return epochs * train_tokens >= table.TOKENS_PER_PARAMETER * parameters


def default_dropout(epochs: float, params_per_token: float) -> float:
    """Dropout for that many epochs of a text of which the model has `params_per_token` parameters a token: none where
    it is too small to overfit, sooner the larger it is. Raced from 0.9 to 33: tests/bench/horizon.md, zoo.md."""
    if params_per_token < table.PARAMETERS_PER_TOKEN_TO_DROP:
        return 0.0
    epochs *= max(1.0, params_per_token / table.SOONER_FROM) ** (1 / 3)
    return next((dropout for lowest, dropout in table.DROPOUT if epochs >= lowest), 0.0)


def default_weight_decay(lowest: float, optimizer: str, lr: float, steps: int, epochs: float, dim: int) -> float:
    """Weight decay for a peak learning rate and a number of steps that make as many epochs.

    What it does depends on its product with both: weights forget e^-D of where they were, D = decay * lr * steps / 2
    with a rate that falls to zero (Wang and Aitchison 2024, https://arxiv.org/abs/2405.13698). A text that is read
    again and again is overfitted unless D grows with the epochs, sooner by wider models and in runs of many steps; with
    AdamW nothing beyond 3 was better, and short runs with Muon are better with a little than with less. Raced:
    tests/bench/zoo.md.
    """
    unit = 2 / (lr * steps)  # the decay that makes D 1
    wider = min(max(dim, 128), table.WIDEST_RACED) / 128
    epochs = epochs if epochs >= table.READ_AGAIN else 0.0
    wanted, most = epochs / table.EPOCHS_TO_FORGET * wider, float(table.MOST_FORGOTTEN)
    if optimizer == "muon":
        least = table.LEAST_FORGOTTEN * min(1.0, steps / table.SHORTEST_RACED)
        slowly = min(epochs / table.EPOCHS_OF_ANY_WIDTH, steps / table.STEPS_TO_FORGET, table.MOST_OF_ANY_WIDTH)
        wanted, most = max(least, wanted, slowly), max(most * wider, slowly)
    return float(f"{min(max(lowest, wanted * unit), most * unit, table.MOST_DECAY / lr, MOST_WEIGHT_DECAY):.2g}")
