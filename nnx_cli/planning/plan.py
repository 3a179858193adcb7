"""Every value that the user left on auto, derived from the machine, the data and the model; and what fits."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from nnx_cli import models
from nnx_cli.config import MILESTONES, TrainConfig
from nnx_cli.data.loader import check_length
from nnx_cli.errors import DataError, UsageError
from nnx_cli.models._base import ModelConfig
from nnx_cli.planning.fit import MemorySaver, fit_memory
from nnx_cli.planning.flops import count_parameters, meta_model, training_flops
from nnx_cli.planning.parallel import RankDevice, common_flops
from nnx_cli.planning.rates import expected_mfu, expected_speed, nominal_flops
from nnx_cli.planning.recipe import table
from nnx_cli.planning.recipe.training import (
    Horizon,
    default_dropout,
    default_short_sequences,
    default_tokens_per_step,
    has_enough_text,
    preferred_optimizer,
    training_recipe,
    useful_epochs,
)
from nnx_cli.planning.settings import Derived, Settings

VALIDATION_SHARE = 0.02  # of the planned time that all validations together may take
LEAST_VALIDATION_ROWS = 8


@dataclass(frozen=True)
class Plan:
    """A run with every value filled in. `sources` says where each value came from, `savers` what was given up for it to
    fit, `predict` its peak memory in bytes, when asked, `tokens_per_s` the speed that was assumed, `flops_per_token`
    what training on a token costs, `ranks` the devices, where there are several."""

    model: str
    size: str | None  # None: shapes of the user's own
    model_config: ModelConfig
    train: TrainConfig
    sources: dict[str, str]
    savers: tuple[MemorySaver, ...] = ()
    budget_bytes: int = 0
    predict: Callable[[], int] = lambda: 0
    tokens_per_s: float = 0.0
    flops_per_token: int = 0
    ranks: Sequence[RankDevice] = ()


@dataclass(frozen=True)
class Data:
    """What a plan knows of the text."""

    vocab_size: int
    train_tokens: int
    val_tokens: int


LONG_TEXT = Data(256, 10**12, 10**9)  # of bytes, more than any run reads
EpochTokens = Callable[[int, int], int]  # of a context and a seed: tokens that an epoch reads


def plan_run(
    name: str,
    size: str | None,
    fields: Mapping[str, Any],
    train: TrainConfig,
    *,
    vocab_size: int,
    train_tokens: int,
    val_tokens: int,
    device: torch.device,
    precision: str,
    sources: Mapping[str, str],
    epoch_tokens: EpochTokens | None = None,
    ranks: Sequence[RankDevice] = (),
    from_scratch: bool = True,
    may_halve: bool = True,
) -> Plan:
    """Fill in every value that is None or auto.

    `fields` are the model's fields that were set, `sources` where set values came from; `epoch_tokens` are those that
    an epoch reads, where they are not `train_tokens`; `ranks` the devices of a run on several; `from_scratch` is
    False where weights are there to start from, `may_halve` where what is to be learned needs whole sequences. Raises
    UsageError for values that disagree, DoesNotFit where not even one sequence fits.
    """
    settings, data = Settings(train, sources), Data(vocab_size, train_tokens, val_tokens)
    rate = common_flops(ranks) if ranks else nominal_flops(device, precision)
    label, config = model_shape(settings, name, size, fields, data, device, rate)
    if epoch_tokens is not None:
        data = replace(data, train_tokens=epoch_tokens(config.seq_len, train.seed))
    horizon = expected_tokens(train, name, config, data, device, rate)
    if "dropout" not in fields:
        dropout = default_dropout(horizon.epochs, horizon.params_per_token)
        config = replace(config, dropout=dropout or config.dropout)
        settings.note(
            "dropout", f"{horizon.epochs:.1f} epochs, {horizon.params_per_token:.1f} parameters for each token of text"
        )
    settings.fill_all({"precision": Derived(precision, "device")})
    optimizer = preferred_optimizer(name, train.lora_rank, horizon.overfits)
    fitted = fit_memory(settings.train, config, name, device, optimizer, ranks)
    settings.fill_all(fitted.values)
    settings.fill_all(run_length(train, data, horizon, fitted.tokens_per_step))
    steps = expected_steps(settings.train, horizon, fitted.tokens_per_step)
    settings.fill_all(training_recipe(name, settings.train, config.dim, steps, data.train_tokens, from_scratch))
    settings.fill_all(short_sequences(train, config.seq_len, device, steps if from_scratch and may_halve else 0))
    settings.fill_all(validation(settings.train, config.seq_len, data, steps))
    return Plan(
        name,
        label,
        config,
        settings.train,
        settings.sources,
        fitted.savers,
        fitted.budget,
        fitted.predict,
        horizon.tokens_per_s,
        horizon.flops_per_token,
        ranks,
    )


def model_shape(
    settings: Settings,
    name: str,
    size: str | None,
    fields: Mapping[str, Any],
    data: Data,
    device: torch.device,
    rate: float,
) -> tuple[str | None, ModelConfig]:
    """The size's name, None where the shape is the user's own, and the configuration. Raises DataError where the text
    is shorter than the context."""
    if size == "auto":
        size = auto_size(name, settings.requested, device, rate, data)
        settings.note("size", "device, planned time and text")
    config = models.make_config(name, size=size, **{**fields, "vocab_size": data.vocab_size})
    check_length(data.train_tokens, config.seq_len)
    settings.note("vocab_size", "tokenizer")
    shape = {"dim", "n_layers", "n_heads"} | {f.name for f in models.config_fields(name) if f.default is None}
    return None if shape & fields.keys() else size, config


def auto_size(name: str, train: TrainConfig, device: torch.device, rate: float, data: Data = LONG_TEXT) -> str:
    """The size that `auto` is on a device whose large matmuls reach `rate` FLOPs a second.

    On a GPU it is `small`, but for runs that are too short, or texts, to train so many parameters. Raced: `tiny` and
    `small`, six texts, tests/bench/more_time.md.
    """
    if device.type == "cpu":
        ends = train.max_steps is None and train.epochs is None and train.stop_early == "auto"
        return affordable_size(name, (train.max_time_s or table.DEFAULT_SECONDS) * rate, data if ends else LONG_TEXT)
    config = models.make_config(name, size="small", vocab_size=data.vocab_size)
    horizon = expected_tokens(train, name, config, data, device, rate)
    return "small" if horizon.epochs >= table.TOKENS_PER_PARAMETER * horizon.params_per_token else "tiny"


def affordable_size(name: str, flops: float, data: Data = LONG_TEXT) -> str:
    """The largest named size that sees 10 tokens a parameter on a CPU whose matmuls do `flops` in the time, and that
    the text has enough for; at least the smallest."""
    chosen, device = models.sizes(name)[0], torch.device("cpu")
    for size in models.sizes(name)[1:]:
        model = meta_model(name, models.make_config(name, size=size, vocab_size=data.vocab_size))
        tokens = flops * expected_mfu(device, model.config.dim) / training_flops(name, model.config)
        n = count_parameters(model)["total"]
        if tokens < table.TOKENS_PER_PARAMETER_ON_CPU * n or not has_enough_text(n, data.train_tokens):
            break
        chosen = size
    return chosen


def expected_tokens(
    train: TrainConfig, name: str, config: ModelConfig, data: Data, device: torch.device, rate: float
) -> Horizon:
    """How much the run is going to see, about, on a device whose large matmuls reach `rate` FLOPs a second."""
    model = meta_model(name, config)
    learner = model if train.lora_rank is None else meta_model(name, config, train.lora_rank)
    params_per_token = count_parameters(learner)["trainable"] / data.train_tokens
    rows = (train.batch_size or 0) * (train.grad_accum or 0) * config.seq_len
    step_tokens = train.tokens_per_step or rows or default_tokens_per_step(model, device)
    half_width, flops = models.recipe(name).gpu_half_width, training_flops(name, config)
    speed = expected_speed(device, config.dim, half_width, rate, flops, step_tokens)
    tokens = speed * (train.max_time_s or table.DEFAULT_SECONDS)
    if train.epochs is not None:
        tokens = train.epochs * data.train_tokens
    elif train.max_steps is not None:
        tokens = train.max_steps * step_tokens
    elif train.stop_early == "auto":
        tokens = min(tokens, useful_epochs(params_per_token, data.train_tokens) * data.train_tokens)
    return Horizon(tokens / data.train_tokens, params_per_token, speed, flops)


def run_length(train: TrainConfig, data: Data, horizon: Horizon, tokens_per_step: int) -> dict[str, Derived]:
    """Where the run ends, unless steps or epochs were given: after a time, or sooner where the text has given what it
    can to a model of this size."""
    if train.epochs is not None:
        return {"max_steps": Derived(steps_in(train.epochs, data.train_tokens, tokens_per_step), "epochs")}
    if train.max_steps is not None:
        return {}
    ends = {"max_time": Derived(f"{table.DEFAULT_SECONDS}s", "default length")}
    if train.stop_early == "auto":
        epochs = useful_epochs(horizon.params_per_token, data.train_tokens)
        steps = steps_in(epochs, data.train_tokens, tokens_per_step)
        ends["max_steps"] = Derived(steps, f"{epochs} epochs, all that a model of this size can use")
    return ends


def expected_steps(train: TrainConfig, horizon: Horizon, tokens_per_step: int) -> int:
    """Steps until the first end, at least one."""
    ends = [train.max_steps] if train.max_steps else []
    if train.max_time_s:
        ends.append(int(horizon.tokens_per_s * train.max_time_s / tokens_per_step))
    return max(1, min(ends))


def short_sequences(train: TrainConfig, seq_len: int, device: torch.device, steps: int) -> dict[str, Derived]:
    """The part of a run that reads short sequences, of as many steps as are free to do so.

    Raises UsageError where they were asked for and can't be halved.
    """
    if train.short_sequences and seq_len % 2:
        raise UsageError("--short-sequences needs an even context", fix="take an even --seq-len, or leave it out")
    value = default_short_sequences(device, seq_len, steps) if train.lora_rank is None else 0.0
    return {"short_sequences": Derived(value, "device and length")}


def validation(train: TrainConfig, seq_len: int, data: Data, steps: int) -> dict[str, Derived]:
    """Micro-batches of a validation, so that all of them take 2 % of the run; nothing where the whole text takes no
    longer.

    Raises DataError where there is nothing to validate on.
    """
    if data.val_tokens < 2:
        raise DataError(
            "the validation text has fewer than two tokens", fix="give more text, or a larger --val-fraction"
        )
    assert train.tokens_per_step is not None and train.batch_size is not None, "fit_memory comes first"
    validations = steps / train.val_every if train.val_every else len(MILESTONES)
    tokens = VALIDATION_SHARE * 3 * steps * train.tokens_per_step / max(1.0, validations)  # forward: a third of a step
    rows = max(LEAST_VALIDATION_ROWS, int(tokens / seq_len))
    if rows * seq_len >= data.val_tokens:
        return {}
    return {"val_batches": Derived(max(1, rows // train.batch_size), "2 % of the run")}


def replan(
    name: str, train: TrainConfig, config: ModelConfig, train_tokens: int, device: torch.device
) -> dict[str, Derived]:
    """Warm-up and weight decay of a run that is given another length, and the steps that a time has at most; `train`
    has all the other values."""
    assert train.tokens_per_step is not None
    data, rate = Data(config.vocab_size, train_tokens, 0), nominal_flops(device, train.precision)
    tokens_per_step = train.tokens_per_step
    horizon = expected_tokens(train, name, config, data, device, rate)
    ends = {} if train.max_steps else run_length(train, data, horizon, tokens_per_step)
    most = {field: end for field, end in ends.items() if field == "max_steps"}
    train = replace(train, **{field: end.value for field, end in most.items()})
    steps = expected_steps(train, horizon, tokens_per_step)
    recipe = training_recipe(name, train, config.dim, steps, train_tokens)
    return {field: recipe[field] for field in ("warmup_steps", "weight_decay")} | most


def steps_in(epochs: float, train_tokens: int, tokens_per_step: int) -> int:
    """Optimizer steps of that many epochs, at least one."""
    return max(1, round(epochs * train_tokens / tokens_per_step))
