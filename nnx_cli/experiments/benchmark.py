"""Training and decoding speed of this machine, beside what its matrix units and its memory can do."""

from __future__ import annotations

import platform
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import date
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

from nnx_cli import models
from nnx_cli.config import SampleConfig, TrainConfig
from nnx_cli.data.token_folder import TokenFolder
from nnx_cli.errors import DoesNotFit, counted
from nnx_cli.inference.generate import generate
from nnx_cli.kernels.gemm import linear
from nnx_cli.models._base import ModelConfig
from nnx_cli.models._check import check_model
from nnx_cli.planning import flops as cost
from nnx_cli.planning.plan import plan_run
from nnx_cli.runs.manifest import versions
from nnx_cli.system.device import DTYPES, describe, peak_memory_bytes, pick_precision, reset_peak_memory, set_seed
from nnx_cli.system.timing import call_seconds
from nnx_cli.system.torch_private import compiler_is_loaded
from nnx_cli.training import session
from nnx_cli.training.observer import Silent
from nnx_cli.training.sampling import Sampling
from nnx_cli.training.trainer import Trainer

ROUNDS = 5  # whose median counts
WARMUP_CALLS = {"cpu": 1}  # before anything is timed: memory is taken, kernels are chosen, blocks compiled
GPU_WARMUP_CALLS = 5
MATRIX = {"cpu": 2048, "mps": 4096, "cuda": 8192}  # width of the square matrices whose matmul is timed
COPY_BYTES = {"cpu": 2**28, "mps": 2**29, "cuda": 2**30}
PROMPT_TOKENS = 8
MOST_NEW_TOKENS = 256
STEPS = 64  # of training that the random tokens last for
MANY_TOKENS = 2**32  # so that the length of a planned run is a time
DEFAULT_SIZE = {"cpu": "nano"}
GPU_SIZE = "small"


@dataclass(frozen=True)
class Limits:
    """What the device does at most, as measured: multiplications and additions a second of large matmuls by
    precision, and bytes a second, read and written, of a large copy."""

    flops: dict[str, float]
    bytes_per_s: float


@dataclass(frozen=True, kw_only=True)
class Row:
    """One measurement. A step of training is one micro-batch; a token of decoding is drawn and shown as in sampling.

    `share` is the part of the limit that is used: of the matmuls' rate in training, where attention counts as
    causal; in decoding of the copy's, for reading weights and cache once a step in the width of the precision.
    `problem` says why nothing was measured.
    """

    what: str  # training or decoding
    model: str
    size: str | None  # None: shapes of the caller's own
    parameters: int
    seq_len: int
    batch_size: int
    precision: str
    compile: str = "off"
    tokens_per_s: float | None = None
    share: float | None = None
    flops_per_token: int | None = None
    bytes_per_step: int | None = None
    peak_memory_bytes: int | None = None
    problem: str | None = None


@dataclass(frozen=True)
class Benchmark:
    """What was measured, where, and what the machine does at most."""

    machine: dict[str, Any]  # date, device, threads, system, versions
    limits: Limits
    rows: list[Row]


class Notes(Silent):
    """Hands a trainer's notes on."""

    def __init__(self, tell: Callable[[str], None]) -> None:
        self.tell = tell

    def note(self, text: str) -> None:
        """Hand a note on."""
        self.tell(text)


def calls_per_s(work: Callable[[], Any], device: torch.device, seconds: float) -> float:
    """How often a second `work` is done: median over rounds that take about `seconds` together. Slow work has one."""
    for _ in range(WARMUP_CALLS.get(device.type, GPU_WARMUP_CALLS)):
        work()

    def timed(n: int) -> float:
        return call_seconds(lambda: [work() for _ in range(n)], device) / n

    once = timed(1)
    if once >= seconds:
        return 1 / once
    n = max(1, int(seconds / ROUNDS / once))
    rounds = min(ROUNDS, max(1, int(seconds / (n * once))))
    return 1 / median(timed(n) for _ in range(rounds))


def _matmul_flops(device: torch.device, precision: str, seconds: float) -> float:
    """Floating-point operations a second of a large matmul."""
    n = MATRIX[device.type]
    a, b = torch.randn(2, n, n, device=device).to(DTYPES[precision])
    return 2 * n**3 * calls_per_s(lambda: linear(a, b), device, seconds)


def _copy_bytes_per_s(device: torch.device, seconds: float) -> float:
    """Bytes a second, read and written, of a copy that no cache holds."""
    source = torch.zeros(COPY_BYTES[device.type] // 4, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes * calls_per_s(lambda: target.copy_(source), device, seconds)


def measure_limits(device: torch.device, precisions: list[str], seconds: float) -> Limits:
    """The device's limits, to compare speeds with."""
    found = Limits({p: _matmul_flops(device, p, seconds) for p in precisions}, _copy_bytes_per_s(device, seconds))
    _free_memory(device)
    return found


def machine(device: torch.device) -> dict[str, Any]:
    """What speeds depend on besides the model."""
    return {
        "date": date.today().isoformat(),
        "device": describe(device),
        "threads": torch.get_num_threads(),
        "system": f"{platform.system()} {platform.machine()}",
        "versions": versions(),
    }


@dataclass(frozen=True)
class Case:
    """What is measured."""

    model: str
    size: str | None  # None: shapes of the caller's own
    config: ModelConfig
    precision: str
    batch_size: int

    def row(self, what: str, **found: Any) -> Row:
        """A row of this case."""
        parameters = cost.count_parameters(cost.meta_model(self.model, self.config))["total"]
        return Row(
            what=what,
            model=self.model,
            size=self.size,
            parameters=parameters,
            seq_len=self.config.seq_len,
            batch_size=self.batch_size,
            precision=self.precision,
            **found,
        )


def _random_tokens(config: ModelConfig, batch_size: int) -> TokenFolder:
    """Tokens in memory that nobody wrote, for training; no tokenizer knows them."""
    draw = np.random.default_rng(0)
    tokens = draw.integers(0, config.vocab_size, STEPS * batch_size * config.seq_len + 1, dtype=np.uint32)
    return TokenFolder(
        path=Path(),
        train=tokens,
        val=tokens[: config.seq_len + 1],
        vocab_size=config.vocab_size,
        tokenizer=None,
        meta={},
        fingerprint="",
        text_bytes=None,
    )


def _plan_training(case: Case, config: TrainConfig, device: torch.device) -> TrainConfig:
    """`config` as a run of the default length would fill it in, with one micro-batch of whole sequences a step. Raises
    DoesNotFit."""
    fields = {field: value for field, value in models.config_dict(case.config).items() if field != "vocab_size"}
    shape = replace(config, batch_size=case.batch_size, grad_accum=1, short_sequences=0.0)
    wanted = replace(shape, precision=case.precision)
    smallest = models.sizes(case.model)[0]  # every field is given, so that no size has a say
    return plan_run(
        case.model,
        smallest,
        fields,
        wanted,
        vocab_size=case.config.vocab_size,
        train_tokens=MANY_TOKENS,
        val_tokens=2,
        device=device,
        precision=case.precision,
        sources={},
    ).train


def make_trainer(case: Case, config: TrainConfig, device: torch.device, tell: Callable[[str], None]) -> Trainer:
    """A trainer on random tokens, that has decided how it steps. Raises DoesNotFit."""
    config = _plan_training(case, config, device)
    _free_memory(device)
    set_seed(config.seed)
    model = models.from_config(case.model, case.config)
    data = _random_tokens(case.config, case.batch_size)
    trainer = session.make_trainer(model, data, config, device, Notes(tell), Sampling([0]))
    trainer.choose_execution(config.compile, postpone=False)
    model.train()
    return trainer


def take_step(trainer: Trainer) -> None:
    """One step of training at the peak learning rate."""
    assert trainer.config.lr is not None
    trainer.take_step(trainer.config.lr)
    trainer.state.step += 1


def training(
    case: Case, config: TrainConfig, device: torch.device, limits: Limits, seconds: float, tell: Callable[[str], None]
) -> Row:
    """Speed of the trainer's steps, loader and optimizer included. Raises DoesNotFit."""
    trainer = make_trainer(case, config, device, tell)
    steps_per_s = calls_per_s(lambda: take_step(trainer), device, seconds)
    assert trainer.config.tokens_per_step is not None and trainer.config.batch_size is not None
    tokens_per_s = trainer.config.tokens_per_step * steps_per_s
    if trainer.config.batch_size < case.batch_size:
        raise DoesNotFit(
            f"out of memory: the trainer went on with {counted(trainer.config.batch_size, 'sequence')} at a time"
        )
    flops = cost.training_flops(case.model, case.config)
    return case.row(
        "training",
        compile=trainer.config.compile,
        tokens_per_s=tokens_per_s,
        flops_per_token=flops,
        share=flops * tokens_per_s / limits.flops[case.precision],
        peak_memory_bytes=peak_memory_bytes(device),
    )


def decoding(case: Case, device: torch.device, limits: Limits, seconds: float) -> Row:
    """Speed of drawing the tokens of `batch_size` samples side by side, from a short prompt on."""
    _free_memory(device)
    set_seed(0)
    model = models.from_config(case.model, case.config).to(device).eval()
    model.compute_dtype = DTYPES[case.precision]
    prompt = [0] * min(PROMPT_TOKENS, max(1, case.config.seq_len // 2))
    n_tokens = max(2, min(MOST_NEW_TOKENS, case.config.seq_len - len(prompt)))

    def steps_per_s(n: int) -> float:
        drawn = generate(model, None, [prompt], SampleConfig(max_new_tokens=n, num_samples=case.batch_size))
        return drawn.decode_tokens_per_s / case.batch_size

    steps_per_s(2)
    first = steps_per_s(min(8, n_tokens))
    n_tokens = max(2, min(n_tokens, int(seconds / ROUNDS * first)))
    rounds = max(1, min(ROUNDS, int(seconds * first / n_tokens)))
    speed = median(steps_per_s(n_tokens) for _ in range(rounds))
    bytes_per_step = bytes_read(case, len(prompt) + n_tokens // 2)
    return case.row(
        "decoding",
        tokens_per_s=case.batch_size * speed,
        bytes_per_step=bytes_per_step,
        share=bytes_per_step * speed / limits.bytes_per_s,
        peak_memory_bytes=peak_memory_bytes(device),
    )


def bytes_read(case: Case, positions: int) -> int:
    """Bytes that one more token of every sequence needs: the weights in the width of the precision, but of a table of
    embeddings that is not the head's the tokens' own rows only, and each sequence's cache of `positions` tokens."""
    model = cost.meta_model(case.model, case.config)
    head = {id(p) for p in model.head.parameters()}
    tables = sum(p.numel() for p in model.embedding.parameters() if id(p) not in head)
    weights = cost.count_parameters(model)["total"] - tables
    if tables:
        weights += case.batch_size * case.config.dim
    _, cache_bytes = cost.sampling_bytes(model, case.precision)
    return weights * DTYPES[case.precision].itemsize + case.batch_size * positions * cache_bytes


def measure_all(
    names: list[str],
    size: str | None,
    fields: dict[str, Any],
    config: TrainConfig,
    *,
    batch_sizes: list[int],
    precisions: list[str],
    seconds: float,
    tell: Callable[[str], None],
) -> Benchmark:
    """Measure the machine's limits, then decoding and training for every model, precision and batch size.

    `config` holds device, compile, threads and vram; without `precisions` the device's best counts, and on a GPU fp32
    beside it; without a size nano does on a CPU and small elsewhere. What does not fit is a row with a `problem`.
    Raises MissingFeature for a device or precision that is not there, UsageError for a model or shape that cannot be.
    """
    device, best = session.configure_device(config)
    size = size or DEFAULT_SIZE.get(device.type, GPU_SIZE)
    configs = {name: models.make_config(name, size=size, **fields) for name in names}
    for name, shape in configs.items():
        check_model(name, shape)
    chosen = [pick_precision(precision, device) for precision in precisions] or list(dict.fromkeys([best, "fp32"]))
    tell("large matmuls and copies")
    limits = measure_limits(device, chosen, seconds / 2)
    rows = []
    for name in names:
        for precision in chosen:
            for batch_size in batch_sizes:
                case = Case(name, size, configs[name], precision, batch_size)
                tell(f"{name} {size}, {precision}, batch {batch_size}")
                decode = partial(decoding, case, device, limits, seconds)
                train = partial(training, case, config, device, limits, seconds, tell)
                rows += [attempt(case, "decoding", decode), attempt(case, "training", train)]
    return Benchmark(machine(device), limits, rows)


def attempt(case: Case, what: str, measure: Callable[[], Row]) -> Row:
    """A row, or the reason why there is none: memory."""
    try:
        return measure()
    except (DoesNotFit, torch.OutOfMemoryError, MemoryError) as error:
        return case.row(what, problem=str(error) if isinstance(error, DoesNotFit) else "out of memory")


def _free_memory(device: torch.device) -> None:
    """Let go of what the last model held, and begin to look for the peak of memory anew, where the system can."""
    if compiler_is_loaded():
        torch.compiler.reset()  # the next shapes are no variants of the last ones
    reset_peak_memory(device)
