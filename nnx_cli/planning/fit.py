"""What fits: the largest micro-batch, and what is given up, one thing after the other, where not even one sequence
would."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from nnx_cli.config import TrainConfig
from nnx_cli.errors import DoesNotFit, UsageError
from nnx_cli.models._base import LanguageModel, ModelConfig
from nnx_cli.optim._groups import cast_matrices
from nnx_cli.planning.flops import count_parameters, meta_model, over_blocks
from nnx_cli.planning.memory import (
    CPU,
    NO_PASS,
    Memory,
    Pass,
    accumulates,
    hardware_to_plan_for,
    micro_step,
    optimizer_states,
    optimizer_step,
    training_memory,
)
from nnx_cli.planning.parallel import RankDevice, common_budget, per_gpu
from nnx_cli.planning.recipe.training import default_tokens_per_step
from nnx_cli.planning.settings import Derived
from nnx_cli.planning.shapes import ShapeCache
from nnx_cli.system.device import budget_words, check_cap, memory_budget
from nnx_cli.system.hardware import Hardware
from nnx_cli.system.torch_private import DispatchMode

SIMULATED_TOKENS = 2**18  # larger micro-batches are on the line through this many and half of them
GIB = 2**30
GRAPH_BYTES = 2**27  # that a step recorded as a CUDA graph takes beside what a plain one does
KEPT = {"fp32": 0.7, "bf16": 0.38, "fp16": 0.38}  # of all a forward pass computes in 32 bits, at most; seen: 0.57, 0.30
KEPT_WITH_DROPOUT = 2.0  # but on CUDA, all keep the scores of attention then; seen: 1.26, up to this many positions:
DROPOUT_POSITIONS = 1024

T = TypeVar("T")


@dataclass(frozen=True)
class MemorySaver:
    """A setting that saves memory, what it costs, and whether that is time alone."""

    field: str
    value: Any
    text: str
    exact: bool = False


MEMORY_SAVERS = (  # exact ones first
    MemorySaver(
        "activation_checkpointing",
        "half",
        "every second block runs again in the backward pass: a sixth more work",
        True,
    ),
    MemorySaver("activation_checkpointing", "on", "all blocks run again in the backward pass: a third more work", True),
    MemorySaver("optimizer", "adamw8bit", "the optimizer's moments are kept in 8 bits: coarser steps"),
    MemorySaver("weight_precision", "bf16", "weights are kept in bf16, rounded at random: noisier steps"),
)
SMALLER = "take a smaller --size or --seq-len"  # where they are options
MORE_GPUS = "take more GPUs, or a smaller --size or --seq-len"


def savings(train: TrainConfig, optimizer: str = "adamw") -> Iterator[tuple[TrainConfig, tuple[MemorySaver, ...]]]:
    """Settings with nothing left on auto, from those that cost nothing down, and the memory savers among them.

    A saver is for settings that are on auto only. `optimizer` is what that one means where memory suffices. Adapters
    begin with all blocks checkpointed: without that, activations would undo what their few gradients save.
    """
    blocks = "off" if train.lora_rank is None else "on"
    plain: dict[str, Any] = {"activation_checkpointing": blocks, "optimizer": optimizer, "weight_precision": "fp32"}
    free = {field for field in plain if getattr(train, field) == "auto"}
    chosen = replace(train, **{field: plain[field] for field in free})
    taken: dict[str, MemorySaver] = {}
    yield chosen, ()
    for saver in MEMORY_SAVERS:
        if saver.field in free and plain[saver.field] != "on":
            chosen = replace(chosen, **{saver.field: saver.value})
            taken[saver.field] = saver
            yield chosen, tuple(taken.values())


class _FusedAttention(TorchFunctionMode):
    """Has attention write its output and a number a row, as fused kernels do, and no scores."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not F.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        q, _, v = args[:3]
        q.new_empty(q.shape[:-1], dtype=torch.float32)
        return q.new_empty(*q.shape[:-1], v.shape[-1])


class _ComputedBytes(DispatchMode):
    """Adds up the bytes of every result."""

    n_bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        results = out if isinstance(out, (tuple, list)) else (out,)
        self.n_bytes += sum(x.nbytes for x in results if isinstance(x, Tensor))
        return out


@torch.no_grad()
def computed_bytes(model: LanguageModel) -> int:
    """Bytes of all that one sequence forward computes in float32, views included, by a model of the meta device."""
    model.compute_dtype = torch.float32
    ids = torch.zeros(1, model.config.seq_len, dtype=torch.int64, device="meta")

    def measure() -> int:
        with _ComputedBytes() as computed, _FusedAttention():
            model(ids)
        return computed.n_bytes

    return over_blocks(model, measure)


class Predictor:
    """Memory of one model on one device, or on each of several alike, in whatever way it is trained; what was computed
    is kept. A real device is asked for its kernels where they matter, which takes a second on a card."""

    def __init__(
        self,
        name: str,
        config: ModelConfig,
        lora_rank: int | None,
        hardware: Hardware | torch.device,
        n_gpus: int = 1,
    ) -> None:
        self.n_gpus = n_gpus
        self._simulated_rows = max(2, SIMULATED_TOKENS // config.seq_len)
        self.shapes = ShapeCache()
        with self.shapes:
            self._model = meta_model(name, config, lora_rank)
        self._weights, self._asked = "fp32", hardware
        self._results: dict[Any, Any] = {}
        kind = hardware.type if isinstance(hardware, torch.device) else hardware.kind
        self._keeps_scores = kind != "cuda" and config.dropout > 0
        self._bounded = lora_rank is None and not (self._keeps_scores and config.seq_len > DROPOUT_POSITIONS)

    @cached_property
    def hardware(self) -> Hardware:
        """What is planned for."""
        return hardware_to_plan_for(self._asked) if isinstance(self._asked, torch.device) else self._asked

    def model(self, weight_precision: str = "fp32") -> LanguageModel:
        """The model on the meta device, always the same, its matrices cast to what is asked for."""
        if self._weights != weight_precision:
            cast_matrices(self._model, weight_precision)
            self._weights = weight_precision
        return self._model

    def _once(self, key: Any, compute: Callable[[], T]) -> T:
        if key not in self._results:
            self._results[key] = compute()
        return self._results[key]

    def fits(self, train: TrainConfig, rows: int, budget: int) -> bool:
        """Whether micro-batches of `rows` fit in `budget`. A step is simulated only where that is not plain to see."""
        if self.lower_bound(train) > budget:
            return False
        if self.clearly_fits(train, rows, budget):
            return True
        if rows <= self._simulated_rows and self.memory(train, rows, optimizer_step=False).peak_bytes > budget:
            return False
        return self.peak(train, rows) <= budget

    def clearly_fits(self, train: TrainConfig, rows: int, budget: int) -> bool:
        """Whether even the upper bound is within `budget`."""
        return self._bounded and self.upper_bound(train, rows) <= budget

    def lower_bound(self, train: TrainConfig) -> int:
        """Lower bound on peak memory: what there is between two micro-steps."""
        weights = train.weight_precision
        states = self._optimizer_states(train)
        return self._once(
            ("bound", weights, train.optimizer_in_backward, train.parallel, states),
            lambda: self._predicted(self._accumulating(train), CPU, states).peak_bytes,
        )

    def upper_bound(self, train: TrainConfig, rows: int) -> int:
        """Upper bound on peak memory, at least 20 % above every prediction: half a GiB, 24 bytes for a
        parameter with all that belongs to it, twice as much on one of several GPUs, and more of what a forward pass
        computes than is kept."""
        parameters = self._once("parameters", lambda: count_parameters(self.model())["total"])
        kept = KEPT_WITH_DROPOUT if self._keeps_scores else KEPT[train.precision]
        resting = (24 if self.n_gpus == 1 else 48) * parameters
        return GIB // 2 + resting + int(rows * self._once("computed", self._computed_bytes) * kept)

    def _computed_bytes(self) -> int:
        with self.shapes:
            return computed_bytes(self.model())

    def memory(self, train: TrainConfig, rows: int, optimizer_step: bool = True) -> Memory:
        """Prediction for micro-batches of up to SIMULATED_TOKENS; `train` as `predict` takes it. It may be too low
        where the optimizer's step is left out."""
        weights, train = train.weight_precision, self._accumulating(train)
        how = weights, train.precision, train.activation_checkpointing, accumulates(train), train.optimizer_in_backward

        def predicted() -> Memory:
            model, states = self.model(weights), self._optimizer_states(train)
            step = self._once(("micro-step", how, rows), lambda: micro_step(model, train, rows, self.hardware))
            moment = self._optimizer_step(train) if optimizer_step else 0
            return self._predicted(train, self.hardware, states, moment, step)

        return self._once(("memory", how, train.parallel, train.optimizer, rows, optimizer_step), predicted)

    def _accumulating(self, train: TrainConfig) -> TrainConfig:
        """The settings, with accumulation where FSDP adds gradients to shards that exist anyway."""
        return replace(train, grad_accum=None) if self.n_gpus > 1 and train.parallel == "fsdp" else train

    def _predicted(
        self, train: TrainConfig, hardware: Hardware, states: int, moment: int = 0, step: Pass = NO_PASS
    ) -> Memory:
        """`training_memory`, on one of all GPUs."""
        model = self.model(train.weight_precision)
        whole = training_memory(model, train, hardware, states, moment, step)
        return whole if self.n_gpus == 1 else per_gpu(whole, model, train.parallel, self.n_gpus)

    def _optimizer_states(self, train: TrainConfig) -> int:
        weights = train.weight_precision
        return self._once(("states", weights, train.optimizer), lambda: optimizer_states(self.model(weights), train))

    def _optimizer_step(self, train: TrainConfig) -> int:
        weights = train.weight_precision
        return self._once(
            ("step", weights, train.optimizer), lambda: optimizer_step(self.model(weights), train, self.hardware)
        )

    def peak(self, train: TrainConfig, rows: int) -> int:
        """Predicted peak in bytes, of any micro-batch."""
        most = self._simulated_rows
        if rows <= most:
            return self.memory(train, rows).peak_bytes
        half, whole = (self.memory(train, n).peak_bytes for n in (most // 2, most))
        return whole + (rows - most) * (whole - half) // (most - most // 2)

    def largest(self, train: TrainConfig, budget: int, most: int, fitting: int = 0) -> int:
        """The largest micro-batch within `budget`, up to `most`, where one of `fitting` rows is known to fit; 0 where
        there is none."""
        least = self.lower_bound(train)
        if least > budget:
            return 0
        if self.clearly_fits(train, fitting or 1, budget) and self.fits(train, most, budget):
            return most
        return largest_batch(lambda rows: self.peak(train, rows), budget, most, fitting, least)


def largest_batch(peak: Callable[[int], int], budget: int, most: int, fitting: int = 0, least: int = 0) -> int:
    """The most rows, up to `most`, whose peak is within `budget`, as that of `fitting` is: 0 where not even one is.

    Peaks lie close to a line from `least`, which no rows would take; a guess is where that through the last two meets
    the budget.
    """
    low, high = fitting or 1, most + 1  # what fits, and what does not
    before, last = (0, least), (low, peak(low))
    if last[1] > budget:
        return 0
    while high - low > 1:
        slope = (last[1] - before[1]) / (last[0] - before[0])
        guess = int(last[0] + (budget - last[1]) / slope) if slope > 0 else most
        guess = min(max(guess, low + 1), high - 1)
        before, last = last, (guess, peak(guess))
        if last[1] <= budget:
            low = guess
        else:
            high = guess
    return low


Found = tuple[TrainConfig, tuple[MemorySaver, ...], bool]  # settings, the savers among them, whether they fit


def first_that_fits(
    predictor: Predictor, train: TrainConfig, rows: int, budget: int, optimizer: str = "adamw"
) -> Found:
    """The first settings of `savings`, each of which takes less memory than those before it, with which micro-batches
    of `rows` fit; the last settings where none do. With several GPUs, `parallel` on auto is chosen too."""
    if predictor.n_gpus > 1 and train.parallel == "auto":
        if not may_be_divided(train):
            return first_that_fits(predictor, replace(train, parallel="ddp"), rows, budget, optimizer)
        return _choose_parallel(
            lambda kind: first_that_fits(predictor, replace(train, parallel=kind), rows, budget, optimizer)
        )
    steps = [*savings(train, optimizer)]
    n = bisect_left(steps, True, key=lambda step: predictor.fits(step[0], rows, budget))
    chosen, taken = steps[min(n, len(steps) - 1)]
    return chosen, taken, n < len(steps)


def may_be_divided(train: TrainConfig) -> bool:
    """Whether FSDP can do what is asked for: no rank has whole gradients then."""
    return not train.optimizer_in_backward and train.precision != "fp16"


def _choose_parallel(find: Callable[[str], Found]) -> Found:
    """DDP where each GPU holds the model at the price of time alone, or of no more than with FSDP; else FSDP."""
    ddp = find("ddp")
    if ddp[2] and all(saver.exact for saver in ddp[1]):
        return ddp
    fsdp = find("fsdp")
    losses = [sum(not saver.exact for saver in found[1]) for found in (ddp, fsdp)]
    return ddp if ddp[2] and losses[0] <= losses[1] else fsdp


def strongest(train: TrainConfig, n_gpus: int) -> TrainConfig:
    """The settings that take least memory."""
    *_, (last, _) = savings(train)
    if n_gpus == 1 or last.parallel != "auto":
        return last
    return replace(last, parallel="fsdp" if may_be_divided(train) else "ddp")


def advice(predictor: Predictor, train: TrainConfig, budget: int, largest: int) -> str:
    """What would help training that does not fit, in a few words that can be typed: with the batch that was asked for,
    or the largest that there is room for then."""
    if largest:
        return f"take --batch-size {largest}"
    set_by_hand = {saver.field: saver.value for saver in MEMORY_SAVERS}  # the strongest of each
    if predictor.n_gpus > 1:
        set_by_hand["parallel"] = "fsdp"
    given = {field for field, last in set_by_hand.items() if getattr(train, field) not in ("auto", last)}
    auto: dict[str, Any] = dict.fromkeys(given, "auto")
    freed = replace(train, **auto)
    if given and (found := first_that_fits(predictor, freed, 1, budget))[2]:
        left_out = " and ".join("--" + field.replace("_", "-") for field in sorted(given))
        return f"{_batch_first(predictor, found[0], train, budget)}leave out {left_out}"
    if predictor.n_gpus > 1 and may_be_divided(train):
        return MORE_GPUS
    last = replace(strongest(freed, predictor.n_gpus), optimizer_in_backward=True, grad_accum=1, batch_size=None)
    if not train.optimizer_in_backward and predictor.peak(last, 1) <= budget:
        first = _batch_first(predictor, last, train, budget)
        return f"{first}add --optimizer-in-backward: no accumulation, no clipping by the norm of all gradients"
    return SMALLER


def _batch_first(predictor: Predictor, helped: TrainConfig, train: TrainConfig, budget: int) -> str:
    """Words for the smaller batch that is needed although `helped` saves memory; none where what was asked for fits."""
    asked = train.batch_size or 1
    largest = predictor.largest(helped, budget, asked, fitting=1)
    return f"take --batch-size {largest} and " if largest < asked else ""


@dataclass(frozen=True)
class Fitted:
    """How a run fits: values to take, what they give up, and the bytes of memory it has and is going to need."""

    values: dict[str, Derived]
    tokens_per_step: int
    savers: tuple[MemorySaver, ...]
    budget: int
    predict: Callable[[], int]


def fit_memory(
    train: TrainConfig,
    config: ModelConfig,
    name: str,
    device: torch.device,
    optimizer: str,
    ranks: Sequence[RankDevice] = (),
) -> Fitted:
    """batch_size x grad_accum x seq_len = tokens_per_step: two fix the third; free ones are the largest micro-batch
    that fits. Where what is asked does not fit, settings on auto save memory until it does; before that `auto` means
    `optimizer`. Of several `ranks` each takes as many rows of a step, and the micro-batch that the smallest does.

    Raises UsageError where the three disagree, DoesNotFit where even that is not enough.
    """
    T, B, A, N = config.seq_len, train.batch_size, train.grad_accum, train.tokens_per_step
    check_batch_shape(train, T)
    check_cap(train.vram_bytes)
    default = N or default_tokens_per_step(meta_model(name, config), device)
    if train.optimizer_in_backward:
        A = 1
    if B is None and A and N:
        B = N // (A * T)
    n_ranks = max(1, len(ranks))
    predictor = Predictor(name, config, train.lora_rank, device, n_ranks)
    budget = common_budget(ranks) if ranks else memory_budget(device, train.vram_bytes)
    asked, of_rank = rows_of_rank(B or 1, A, n_ranks), None if A is None else -(-A // n_ranks)
    chosen, savers, fits = first_that_fits(predictor, replace(train, grad_accum=of_rank), asked, budget, optimizer)
    if not fits:
        _refuse(predictor, train, chosen, asked, budget)
    if B is None:
        rows = max(1, default // (T * (A or 1)))
        room = GRAPH_BYTES if device.type == "cuda" and train.compile != "off" else 0
        most = rows_of_rank(rows, A or 1, n_ranks)
        largest = predictor.largest(chosen, budget - room, most) or predictor.largest(chosen, budget, most)
        whole = rows // n_ranks if rows % n_ranks == 0 else rows  # that micro-batches divide, of each rank if they can
        B = min(rows, largest * max(1, n_ranks // A)) if A else max(b for b in range(1, largest + 1) if whole % b == 0)
    A = A or max(1, default // (B * T))
    reason = "device, memory and the other two"
    values = {"batch_size": Derived(B, reason), "grad_accum": Derived(A, reason)}
    values["tokens_per_step"] = Derived(B * A * T, reason)
    final = replace(chosen, grad_accum=-(-A // n_ranks), batch_size=B)
    values |= _saving_values(train, chosen, savers, optimizer)
    return Fitted(values, B * A * T, savers, budget, lambda: predictor.peak(final, rows_of_rank(B, A, n_ranks)))


def rows_of_rank(rows: int, grad_accum: int | None, n_ranks: int) -> int:
    """Rows of a rank's micro-batches, where those of a step have `rows` each: fewer than that only where there are
    fewer micro-batches than ranks."""
    return rows if grad_accum is None else min(rows, -(-rows * grad_accum // n_ranks))


def _refuse(predictor: Predictor, train: TrainConfig, chosen: TrainConfig, rows: int, budget: int) -> None:
    """Raise DoesNotFit for micro-batches of `rows`, with what would help."""
    largest = predictor.largest(chosen, budget, rows)
    enough = f"a batch of {largest} would fit" if largest else "not even one sequence fits"
    if not largest and rows > 1:
        enough += f", which needs {predictor.peak(chosen, 1) / GIB:.2f} GiB"
    raise DoesNotFit(
        f"--batch-size {rows} needs about {predictor.peak(chosen, rows) / GIB:.2f} GiB "
        f"of {budget_words(budget, train.vram_bytes)}; {enough}",
        fix=advice(predictor, train, budget, largest),
    )


def _saving_values(
    train: TrainConfig, chosen: TrainConfig, savers: tuple[MemorySaver, ...], optimizer: str
) -> dict[str, Derived]:
    """The chosen values of settings that may save memory, and why each."""
    values = {}
    for field in ("optimizer", "weight_precision", "activation_checkpointing"):
        costs = [saver.text for saver in savers if saver.field == field]
        reason = f"memory; {costs[0]}" if costs else "it fits"
        values[field] = Derived(getattr(chosen, field), reason)
    if chosen.parallel != train.parallel:
        reason = "the model fits a GPU" if chosen.parallel == "ddp" else "memory; the model is divided among the GPUs"
        values["parallel"] = Derived(chosen.parallel, reason)
    if chosen.optimizer == optimizer:
        reason = "adapters" if train.lora_rank else "model, and how often the text is read"
        values["optimizer"] = Derived(optimizer, reason)
    if train.lora_rank is not None:
        reason = "adapters are to take little memory; a third more work"
        values["activation_checkpointing"] = Derived(chosen.activation_checkpointing, reason)
    return values


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
