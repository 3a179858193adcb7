"""Every value that the user left on auto, derived from the machine, the data and the model; and what fits."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch

from nnx_cli import models
from nnx_cli.config import TrainConfig
from nnx_cli.data.loader import check_length
from nnx_cli.errors import DataError, DoesNotFit, UsageError
from nnx_cli.kernels.gemm import linear
from nnx_cli.models._base import LanguageModel, ModelConfig
from nnx_cli.planning import flops as cost
from nnx_cli.planning.fit import Predictor, Rung, advice, descend
from nnx_cli.system.device import DTYPES, memory_budget
from nnx_cli.system.timing import call_seconds
from nnx_cli.training.schedule import MILESTONES

DEFAULT_SECONDS = 240  # training time of a run without a length
DEFAULT_EPOCHS = 30  # but no more passes over the text than this
TOKENS_PER_PARAMETER = 10  # what a size should see in the planned time to be worth its width
REACHED = {"cpu": (0.78, 430), "cuda": (0.4, 1000), "mps": (0.1, 0)}  # see `share_reached`; mps was never measured
DROPOUT = ((12, 0.2), (6, 0.1))  # passes over the text from which on a model needs it: tests/bench/zoo.md
MEMORISES = 1.5  # parameters a token of the text from which on a model can learn it by heart
SOONER_FROM = 4  # parameters a token from which on fewer passes are enough for that: see `default_dropout`
BY_HEART = 16  # passes from which on AdamW beats Muon, which learns a text by heart faster: tests/bench/zoo.md
PASSES_TO_FORGET, MOST_FORGOTTEN, WIDEST_RACED = 6, 3, 384  # see `default_weight_decay`
MOST_DECAY = 0.04  # of a weight, in a step
VALIDATION_SHARE = 0.02  # of the planned time that all validations together may take
CPU_TOKENS_PER_STEP = (1024, 2048)  # for models of up to 2 million parameters, and larger
GRAPH_BYTES = 2**27  # that a step recorded as a CUDA graph takes beside what a plain one does
GPU_TOKENS_PER_STEP = (8192, 16_384, 32_768)  # for models of up to 20 and 60 million parameters, and larger


@dataclass(frozen=True)
class Plan:
    """A run with every value filled in. `sources` says where each value came from, `rungs` what was given up for it to
    fit, `predict` its peak memory in bytes, when asked."""

    model: str
    size: str | None  # None: shapes of the user's own
    model_config: ModelConfig
    train: TrainConfig
    sources: dict[str, str]
    rungs: tuple[Rung, ...] = ()
    budget_bytes: int = 0
    predict: Callable[[], int] = lambda: 0


def plan_run(
    name: str,
    size: str,
    fields: Mapping[str, Any],
    train: TrainConfig,
    *,
    vocab_size: int,
    train_tokens: int,
    val_tokens: int,
    device: torch.device,
    precision: str,
    sources: Mapping[str, str],
) -> Plan:
    """Fill in every value that is None or auto.

    `fields` are the model's fields that were set, `sources` where set values came from. Raises UsageError for values
    that disagree, DoesNotFit where not even one sequence fits.
    """
    where = dict(sources)
    rate = matrix_flops(device, precision)
    seconds = train.max_time_s or DEFAULT_SECONDS
    if size == "auto":
        size = affordable_size(name, seconds * rate) if device.type == "cpu" else "small"
        where["size"] = "derived: device and planned time"
    config = models.make_config(name, size=size, **{**fields, "vocab_size": vocab_size})
    check_length(train_tokens, config.seq_len)
    where["vocab_size"] = "derived: tokenizer"
    shape = {"dim", "n_layers", "n_heads"} | {f.name for f in models.config_fields(name) if f.default is None}
    label = None if shape & fields.keys() else size
    derived: dict[str, Any] = {}

    def derive(field: str, value: Any, reason: str) -> None:
        current = getattr(train, field)
        if current is None or current == "auto":
            derived[field] = value
            where[field] = f"derived: {reason}"

    model = cost.meta_model(name, config)
    in_time = seconds * rate * share_reached(device, config.dim) / cost.flops_per_token(model)["train"]  # tokens
    passes = planned_tokens(train, model, device, train_tokens, in_time) / train_tokens
    learner = model if train.lora_rank is None else cost.meta_model(name, config, train.lora_rank)
    per_token = cost.count_parameters(learner)["trainable"] / train_tokens
    dropout = default_dropout(passes, per_token)
    if dropout and "dropout" not in fields:
        config = replace(config, dropout=dropout)
        where["dropout"] = f"derived: the text is read {passes:.0f} times"
    recipe = models.recipe(name)
    by_heart = passes >= BY_HEART and per_token >= MEMORISES
    preferred = preferred_optimizer(name, train.lora_rank, by_heart)
    derive("precision", precision, "device")
    fitted = fit(replace(train, **derived), config, name, device, where, preferred)
    derived |= fitted.settings
    optimizer = derived.get("optimizer", train.optimizer)
    if derived.get("optimizer") == preferred:
        where["optimizer"] = "derived: " + ("adapters" if train.lora_rank else "model, and how often the text is read")
    factor = recipe.muon_lr_factor if optimizer == "muon" else recipe.lr_factor
    derive("lr", default_lr(optimizer, config.dim, factor), "optimizer, width and model")
    derive("beta2", 0.99, "optimizer")
    tokens_per_step = derived["tokens_per_step"]
    epoch_steps = max(1, train_tokens // tokens_per_step)
    if train.epochs is not None:
        derived["max_steps"] = steps_in(train.epochs, train_tokens, tokens_per_step)
        where["max_steps"] = "derived: epochs"
    elif train.max_steps is None and train.max_time is None:
        derived["max_time"] = f"{DEFAULT_SECONDS}s"
        derived["max_steps"] = DEFAULT_EPOCHS * epoch_steps
        where["max_time"] = where["max_steps"] = "derived: default length, whichever ends first"
    steps, by_time = derived.get("max_steps", train.max_steps), int(in_time / tokens_per_step)
    timed = train.max_time is not None or "max_time" in derived
    expected_steps = max(1, min(steps or by_time, by_time) if timed else steps)
    decay, reason = recipe.weight_decay if optimizer in ("adamw", "adamw8bit", "muon") else 0.0, "optimizer and model"
    if decay and train.lora_rank is None:
        reason = "lr, width, passes over the text"
        seen = expected_steps * tokens_per_step / train_tokens
        peak = train.lr or derived["lr"]
        decay = default_weight_decay(decay, optimizer, peak, expected_steps, seen, config.dim)
    derive("weight_decay", decay, reason)
    warmup = 0 if train.schedule == "constant" or not recipe.warmup else min(200, max(1, expected_steps // 50))
    derive("warmup_steps", min(warmup, expected_steps), "length")
    if val_tokens < 2:
        raise DataError(
            "the validation text has fewer than two tokens", fix="give more text, or a larger --val-fraction"
        )
    if train.val_batches is None:
        validations = expected_steps / train.val_every if train.val_every else len(MILESTONES)
        budget = (
            VALIDATION_SHARE * 3 * expected_steps * tokens_per_step / max(1.0, validations)
        )  # forward: a third of a step
        rows = max(8, int(budget / config.seq_len))
        if rows * config.seq_len < val_tokens:
            derived["val_batches"] = max(1, rows // derived["batch_size"])
            where["val_batches"] = "derived: 2 % of the run"
    return Plan(name, label, config, replace(train, **derived), where, fitted.rungs, fitted.budget, fitted.predict)


def planned_tokens(
    train: TrainConfig, model: LanguageModel, device: torch.device, train_tokens: int, in_time: float
) -> float:
    """Tokens that a run is going to see, about, where its time is enough for `in_time`."""
    if train.epochs is not None:
        return train.epochs * train_tokens
    if train.max_steps is not None:
        rows = (train.batch_size or 0) * (train.grad_accum or 0) * model.config.seq_len
        return train.max_steps * (train.tokens_per_step or rows or default_tokens_per_step(model, device))
    return in_time if train.max_time is not None else min(in_time, DEFAULT_EPOCHS * train_tokens)


def default_dropout(passes: float, per_token: float) -> float:
    """Dropout for that many passes over a text, of which the model has `per_token` parameters a token: none where it is
    too small to learn it by heart, sooner the larger it is. Raced with 2, 10 and 25: tests/bench/zoo.md."""
    if per_token < MEMORISES:
        return 0.0
    passes *= max(1.0, per_token / SOONER_FROM) ** (1 / 3)
    return next((dropout for least, dropout in DROPOUT if passes >= least), 0.0)


def default_weight_decay(least: float, optimizer: str, lr: float, steps: int, passes: float, dim: int) -> float:
    """Weight decay for a peak learning rate and a number of steps that make as many passes over the text.

    What it does depends on its product with both: weights forget e^-D of where they were, D = decay * lr * steps / 2
    with a rate that falls to zero (Wang and Aitchison 2024, https://arxiv.org/abs/2405.13698). A text that is read
    again and again is learnt by heart unless D grows with the passes, sooner by wider models; with AdamW nothing beyond
    3 was better. Raced: tests/bench/zoo.md.
    """
    unit = 2 / (lr * steps)  # the decay that makes D 1
    wider = min(max(dim, 128), WIDEST_RACED) / 128
    wanted = passes / PASSES_TO_FORGET * wider if passes >= 2 else 0.0
    most = MOST_FORGOTTEN * (wider if optimizer == "muon" else 1)
    return float(f"{min(max(least, wanted * unit), most * unit, MOST_DECAY / lr):.2g}")


def preferred_optimizer(name: str, lora_rank: int | None, by_heart: bool = False) -> str:
    """The optimizer that `auto` means for a model where memory suffices."""
    return "adamw" if by_heart or lora_rank else models.recipe(name).optimizer


def share_reached(device: torch.device, dim: int) -> float:
    """Of the rate of large matrix products, what training reaches at a width, about: products grow with its square,
    all else with the width itself."""
    most, half_at = REACHED[device.type]
    return most * dim / (dim + half_at)


def steps_in(epochs: float, train_tokens: int, tokens_per_step: int) -> int:
    """Optimizer steps of that many passes over the training text, at least one."""
    return max(1, round(epochs * train_tokens / tokens_per_step))


def check_batch_shape(train: TrainConfig, seq_len: int) -> None:
    """Raise UsageError where batch_size x grad_accum x seq_len and tokens_per_step cannot agree."""
    T, B, A, N = seq_len, train.batch_size, train.grad_accum, train.tokens_per_step
    if B and A and N and B * A * T != N:
        raise UsageError(
            f"--batch-size {B} x --grad-accum {A} x --seq-len {T} is {B * A * T}, not --tokens-per-step {N}",
            fix="give two of the three",
        )
    if train.optimizer_in_backward and B and N and B * T != N:
        raise UsageError(
            f"--optimizer-in-backward sees one micro-batch: --batch-size {B} x --seq-len {T} is {B * T}, "
            f"not --tokens-per-step {N}",
            fix="leave out one of the two",
        )
    for option, part in (
        ("--seq-len", T),
        ("--batch-size x --seq-len", T * (B or 1)),
        ("--grad-accum x --seq-len", T * (A or 1)),
    ):
        if N and N % part:
            raise UsageError(f"--tokens-per-step {N} is no multiple of {option} {part}")


@dataclass(frozen=True)
class Fitted:
    """How a run fits: settings to take, what they give up, and the bytes of memory they have and are going to need."""

    settings: dict[str, Any]
    rungs: tuple[Rung, ...]
    budget: int
    predict: Callable[[], int]


def fit(
    train: TrainConfig, config: ModelConfig, name: str, device: torch.device, where: dict[str, str], optimizer: str
) -> Fitted:
    """batch_size x grad_accum x seq_len = tokens_per_step: two fix the third; free ones are the largest micro-batch
    that fits. Where what is asked does not fit, settings on auto go down the ladder until it does; at its top `auto`
    means `optimizer`.

    Raises DoesNotFit where even that is not enough.
    """
    T, B, A, N = config.seq_len, train.batch_size, train.grad_accum, train.tokens_per_step
    check_batch_shape(train, T)
    for field in ("batch_size", "grad_accum", "tokens_per_step"):
        if getattr(train, field) is None:
            where[field] = "derived: device, memory and the other two"
    default = N or default_tokens_per_step(cost.meta_model(name, config), device)
    if train.optimizer_in_backward:
        A = 1
    if B is None and A and N:
        B = N // (A * T)
    predictor = Predictor(name, config, train.lora_rank, device)
    budget = memory_budget(device, train.vram_bytes)
    chosen, rungs, fits = descend(predictor, replace(train, grad_accum=A), B or 1, budget, optimizer)
    if not fits:
        largest = predictor.largest(chosen, budget, B or 1)
        enough = f"a batch of {largest} would fit" if largest else "not even one sequence fits"
        needed = predictor.peak(chosen, B or 1)
        raise DoesNotFit(
            f"--batch-size {B or 1} needs about {needed / 2**30:.2f} GiB of {budget / 2**30:.2f} GiB; {enough}",
            fix=advice(predictor, train, budget, largest),
        )
    if B is None:
        rows = max(1, default // (T * (A or 1)))
        room = GRAPH_BYTES if device.type == "cuda" and train.compile != "off" else 0
        largest = predictor.largest(chosen, budget - room, rows) or predictor.largest(chosen, budget, rows)
        B = largest if A else max(b for b in range(1, largest + 1) if rows % b == 0)
    A = A or max(1, default // (B * T))
    settings = {"batch_size": B, "grad_accum": A, "tokens_per_step": B * A * T}
    for field in ("optimizer", "weight_precision", "activation_checkpointing"):
        if getattr(train, field) == "auto":
            settings[field] = getattr(chosen, field)
            reasons = [rung.text for rung in rungs if rung.field == field]
            where[field] = "derived: memory; " + reasons[0] if reasons else "derived: it fits"
    if train.lora_rank is not None and train.activation_checkpointing == "auto":
        where["activation_checkpointing"] = "derived: adapters are to take little memory; a third more work"
    final = replace(chosen, grad_accum=A, batch_size=B)
    return Fitted(settings, rungs, budget, lambda: predictor.peak(final, B))


def default_tokens_per_step(model: LanguageModel, device: torch.device) -> int:
    """Tokens of an optimizer step: few, so that there are many steps, but enough to keep a card busy."""
    total = cost.count_parameters(model)["total"]
    if device.type == "cpu":
        few, more = CPU_TOKENS_PER_STEP
        return few if total <= 2e6 else more
    few, more, many = GPU_TOKENS_PER_STEP
    return few if total <= 20e6 else more if total <= 60e6 else many


def default_lr(optimizer: str, dim: int, factor: float = 1.0) -> float:
    """Peak learning rate: falls with the width from 128 on, times an architecture's factor; Lion takes a tenth of it,
    Muon two and a half.

    Wolf has the rate its author gives.
    """
    if optimizer == "wolf":
        return 0.3678
    share = {"lion": 0.1, "muon": 2.5}.get(optimizer, 1.0)
    return float(f"{4e-3 * 128 / max(dim, 128) * share * factor:.2g}")


def affordable_size(name: str, flops: float) -> str:
    """The largest named size that sees 10 tokens a parameter on a CPU whose matrix products do `flops` in the time, at
    least the smallest."""
    chosen, device = models.sizes(name)[0], torch.device("cpu")
    for size in models.sizes(name):
        model = cost.meta_model(name, models.make_config(name, size=size))
        tokens = flops * share_reached(device, model.config.dim) / cost.flops_per_token(model)["train"]
        if tokens < TOKENS_PER_PARAMETER * cost.count_parameters(model)["total"]:
            break
        chosen = size
    return chosen


@cache
def matrix_flops(device: torch.device, precision: str) -> float:
    """Floating-point operations a second that a matrix product reaches here: of the fastest, for threads of a process
    that has just begun may share a core for a tenth of a second."""
    n, seconds = (512, 0.2) if device.type == "cpu" else (4096, 0.0)
    a, b = torch.randn(2, n, n, device=device, dtype=DTYPES[precision])
    linear(a, b)
    times, began = [], time.perf_counter()
    while len(times) < 5 or time.perf_counter() - began < seconds:
        times.append(call_seconds(lambda: linear(a, b), device))
    return 2 * n**3 / min(times)
