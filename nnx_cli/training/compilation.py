"""How steps run: block by block through torch.compile, whole as CUDA graphs; kept where that is right and pays."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from nnx_cli.config import TrainConfig
from nnx_cli.errors import DoesNotFit
from nnx_cli.layers.blocks import compile_blocks, undo_compile
from nnx_cli.planning.fit import SMALLER
from nnx_cli.system.device import empty_cache
from nnx_cli.system.machine import missing_to_compile
from nnx_cli.system.timing import median_seconds
from nnx_cli.training.state import TrainState
from nnx_cli.training.stepper import Execution, Stepper, ordered_sums

TOLERANCE = {
    "fp32": (1e-4, 1e-3),
    "bf16": (2e-2, 1e-1),
    "fp16": (1e-2, 1e-1),
}  # relative differences of loss and gradient from eager that count as equal
COMPILE_SECONDS = {"cpu": 60.0, "cuda": 30.0}  # what compiling a block and its backward may cost
HOPED_SAVING = {"cpu": 0.1, "cuda": 0.25}  # of a step, before it is measured
WORTHWHILE = 0.95  # of the time of an eager step: what a compiled one may take at most; less is noise
COMPILED = "compiled: a step takes"  # a share of its time before, which follows
TIMED_STEPS = 3  # at most, and no more once they have taken so long:
TIMED_SECONDS = 0.5


@dataclass(frozen=True, kw_only=True)
class Conditions:
    """What the choice of an execution depends on."""

    requested: str  # value of --compile
    device_type: str
    precision: str
    in_backward: bool  # the optimizer steps during the backward pass
    missing: str | None  # what compiling needs and is not here
    max_steps: int | None
    max_time_s: float | None
    progress: float  # of the run, 0 to 1
    steps: int = 0  # taken so far
    is_divided: bool = False  # the model, among ranks

    def planned_s(self, step_s: float) -> float:
        """Training time that lies ahead, where a step takes `step_s`; infinity asks for the most that it may be."""
        if self.progress >= 1.0:
            return 0.0
        by_steps = math.inf if self.max_steps is None else self.max_steps * step_s
        by_time = math.inf if self.max_time_s is None else self.max_time_s
        return min(by_steps, by_time) * (1.0 - self.progress)


def conditions_of(
    config: TrainConfig, device: torch.device, requested: str, state: TrainState, is_divided: bool = False
) -> Conditions:
    """The conditions of a run with `config`, that is at `state`, on this machine."""
    return Conditions(
        requested=requested,
        device_type=device.type,
        precision=config.precision,
        in_backward=config.optimizer_in_backward,
        missing=missing_to_compile() if device.type == "cpu" else None,
        max_steps=config.max_steps,
        max_time_s=config.max_time_s,
        progress=state.progress(config),
        steps=state.step,
        is_divided=is_divided,
    )


def choose(conditions: Conditions, step_s: float = math.inf) -> Execution:
    """What is worth trying, where a step is known to take `step_s`: CUDA graphs on a GPU, and compiled blocks in a run
    that is long enough to earn that back, or where they are asked for; of a divided model only there, and no graphs."""
    if conditions.is_divided:
        wanted = choose(replace(conditions, is_divided=False), step_s)
        lost = ["no CUDA graph: not with --parallel fsdp"] if wanted.graph else []
        if wanted.compiled and conditions.requested != "on":
            lost.append("not compiled: with --parallel fsdp that has to be asked for, by --compile on")
        compiled = wanted.compiled and conditions.requested == "on"
        return Execution(compiled=compiled, notes=(*wanted.notes, *lost))
    requested, kind = conditions.requested, conditions.device_type
    if requested == "off" or (requested != "on" and kind not in COMPILE_SECONDS):
        return Execution()
    eager = Execution(graph=kind == "cuda")
    if requested == "graph":
        return eager
    if conditions.in_backward:  # weights would move while a compiled gradient is compared with an eager one
        notes = ("not compiled: not together with --optimizer-in-backward",) if requested == "on" else ()
        return replace(eager, notes=notes)
    if requested == "auto" and conditions.planned_s(step_s) * HOPED_SAVING[kind] < COMPILE_SECONDS[kind]:
        return eager
    if conditions.missing:
        return replace(eager, notes=(f"not compiled: no {conditions.missing} here; more: nnx doctor",))
    return replace(eager, compiled=True)


def verify(stepper: Stepper, wanted: Execution, conditions: Conditions) -> Execution:
    """Let steps run as `wanted`, as far as that works, gives what eager blocks give and, unless it was asked for, is
    faster; returns how they run then. Weights, optimizer and counters stay as they are.

    Raises DoesNotFit where one sequence at a time is too much for the memory.
    """
    now = replace(stepper.execution, notes=wanted.notes)
    if wanted.graph and not now.graph:
        now = _verify_graph(stepper, now, conditions)
    if wanted.compiled and not now.compiled:
        now = _verify_compiled(stepper, now, conditions)
    return now


def _verify_graph(stepper: Stepper, now: Execution, conditions: Conditions) -> Execution:
    """Record steps, if that works, and for `auto` if it is faster."""
    if not stepper.step.model.capturable:
        return replace(now, notes=(*now.notes, "no CUDA graph: functions from outside would be asked once and for all"))
    eager_s = _first_step_seconds(stepper, conditions.steps)
    problem = _record(stepper)
    if problem is not None:
        return replace(now, step_s=eager_s, notes=(*now.notes, problem))
    graph_s = stepper.ranks.most(step_seconds(stepper))
    if conditions.requested == "auto" and graph_s >= WORTHWHILE * eager_s:
        stepper.release_graphs()
        return replace(now, step_s=eager_s)
    return replace(now, graph=True, step_s=graph_s)


def _verify_compiled(stepper: Stepper, now: Execution, conditions: Conditions) -> Execution:
    """Compile blocks, if that works, is right, and for `auto` is faster; graphs are recorded anew."""
    whole_steps = _takes_whole_steps(stepper)
    eager = None if whole_steps else _attempt(stepper)(stepper, compiled=False)
    step_s = now.step_s if eager is None else stepper.ranks.most(eager.seconds) * stepper.n_micro
    assert step_s is not None
    if not choose(conditions, step_s).compiled:
        return now
    had_graphs = _release_graphs(stepper)  # there may be no room for another step beside them
    compiled, problem = _compile(stepper, eager, conditions.precision)
    problems = [problem, _record(stepper) if had_graphs else None]
    if compiled is not None:
        compiled_s = stepper.ranks.most(
            _step_seconds_or_inf(stepper) if whole_steps else compiled.seconds * stepper.n_micro
        )
        if compiled_s < math.inf and (conditions.requested != "auto" or compiled_s < WORTHWHILE * step_s):
            _compile_dropout(stepper)
            note = f"{COMPILED} {compiled_s / step_s:.0%} of its time before"
            return _settled(stepper, now, [*problems, note], compiled=True, step_s=compiled_s)
        undo_compile(stepper.step.model)
        problems.append(_record(stepper) if had_graphs else None)
        problems.append(f"not compiled: {'not enough memory' if compiled_s == math.inf else 'no faster here'}")
    return _settled(stepper, now, problems, compiled=False, step_s=step_s)


def follow_length(stepper: Stepper, config: TrainConfig, state: TrainState, progress: float) -> Execution:
    """Let steps read sequences as long as is due at that part of the run, 0 to 1; returns how they run then: as before,
    compiled and recorded anew where the length changed, as far as that works. Weights, optimizer and counters stay as
    they are.

    Raises DoesNotFit where one sequence at a time is too much for the memory.
    """
    now, pieces = stepper.execution, state.pieces(config, progress)
    if pieces == stepper.pieces:
        return now
    had_graphs = _release_graphs(stepper)
    stepper.pieces = pieces
    compiled, problems, step_s = None, [], now.step_s
    if now.compiled:
        undo_compile(stepper.step.model)
    if _takes_whole_steps(stepper):
        step_s = _first_step_seconds(stepper, state.step)
    if now.compiled:
        compiled, problem = _compile(stepper, None, config.precision)
        problems.append(problem)
        if compiled is not None:
            _compile_dropout(stepper)
    problems.append(_record(stepper) if had_graphs else None)
    if _takes_whole_steps(stepper) and (had_graphs or compiled is not None):
        step_s = stepper.ranks.most(_step_seconds_or_inf(stepper))
    return _settled(stepper, now, problems, compiled=compiled is not None, step_s=step_s)


def _release_graphs(stepper: Stepper) -> bool:
    """Forget graphs; returns whether there were any, on all ranks, of which one may have lost its own."""
    had_graphs = not stepper.ranks.any(stepper.graphs is None)
    if stepper.graphs is not None:
        stepper.release_graphs()
    return had_graphs


def _takes_whole_steps(stepper: Stepper) -> bool:
    """Whether whole steps are timed, which ranks can take alone."""
    return stepper.device.type == "cuda" and stepper.step.shards is None


def _attempt(stepper: Stepper) -> Callable[..., Trial]:
    """How a micro-batch is tried."""
    return try_micro_batch if stepper.step.shards is None else _together


def _compile_dropout(stepper: Stepper) -> None:
    """Compile blocks with the dropout that they were tried without, unless a whole step is timed, which does so."""
    if not _takes_whole_steps(stepper) and stepper.step.model.config.dropout:
        _attempt(stepper)(stepper, compiled=True, with_dropout=True)


def _settled(
    stepper: Stepper, now: Execution, notes: list[str | None], *, compiled: bool, step_s: float | None
) -> Execution:
    told = (*now.notes, *(note for note in notes if note is not None))
    return Execution(graph=stepper.graphs is not None, compiled=compiled, step_s=step_s, notes=told)


def _record(stepper: Stepper) -> str | None:
    """Let steps be CUDA graphs; returns why that does not work, here or on another rank, or None."""
    problem = None
    try:
        stepper.record_graphs()
    except torch.OutOfMemoryError:
        problem = "no CUDA graph: not enough memory"
    except RuntimeError as error:
        problem = f"no CUDA graph: {in_a_line(error)}"
    problem = _first_of_all(stepper, problem)
    if problem is not None:
        stepper.release_graphs()
    return problem


def _first_of_all(stepper: Stepper, problem: str | None) -> str | None:
    """The first problem of any rank: where one has one, none goes on without it."""
    return next((found for found in stepper.ranks.gather(problem) if found is not None), None)


@dataclass(frozen=True)
class Trial:
    """A micro-batch, tried: its loss, the norm of every parameter's gradient, and the seconds it takes."""

    loss: float
    seconds: float
    norms: Tensor

    def relative_error(self, other: Trial) -> tuple[float, float]:
        """Difference of loss and of gradient from another trial's, relative to that."""
        loss = abs(self.loss - other.loss) / max(abs(other.loss), 1e-9)
        gradient = (self.norms - other.norms).norm() / other.norms.norm().clamp(min=1e-12)
        return loss, gradient.item()


def try_micro_batch(stepper: Stepper, *, compiled: bool, with_dropout: bool = False) -> Trial:
    """The first micro-batch, forward and backward, by the median time; leaves no gradient behind."""
    model = stepper.step.model
    torch.manual_seed(0)
    model.train(with_dropout or model.config.dropout == 0)  # dropout draws other masks when compiled
    input_ids, targets = stepper.part(n_micro=1)
    loss = torch.zeros(())
    most_s = TIMED_SECONDS if stepper.step.shards is None else math.inf  # ranks go through a divided model together

    def pass_through() -> None:
        nonlocal loss
        model.zero_grad(set_to_none=True)
        total, count = stepper.step.micro_step(input_ids, targets)
        loss = total / count.clamp(min=1)
        loss.backward()

    try:
        with ordered_sums(Execution(compiled=compiled), stepper.device):
            seconds = median_seconds(pass_through, stepper.device, TIMED_STEPS, most_s)
        stepper.step.gradients()  # which gives a divided model's to what the optimizer moves
        moved = model.parameters() if stepper.step.shards is None else stepper.step.shards.local.values()
        gradients = [p.new_zeros(()) if p.grad is None else p.grad for p in moved]
        norms = torch.stack([norm.float() for norm in torch._foreach_norm(gradients)]).cpu()
    finally:
        stepper.step.forget()
        model.train()
    return Trial(loss.item(), seconds, norms)


def _together(stepper: Stepper, *, compiled: bool, with_dropout: bool = False) -> Trial:
    """`try_micro_batch` by all ranks that have a model divided among them, where whoever fails cannot go on without the
    others. Raises DoesNotFit."""
    try:
        return try_micro_batch(stepper, compiled=compiled, with_dropout=with_dropout)
    except torch.OutOfMemoryError:
        pass  # the exception holds on to what was computed: it has to go first
    if compiled:
        raise DoesNotFit("compiled blocks need more memory than there is", fix="train without: --compile off")
    raise DoesNotFit("not even the first micro-batch fits", fix=SMALLER)


def _what_keeps_from_compiling(device: torch.device) -> str | None:
    """Why nothing can be compiled here, whatever it is: what a rank can find out without the others."""
    x = torch.ones(8, device=device, requires_grad=True)
    try:
        torch.compile(lambda x: x.sin() + 1, dynamic=False)(x).sum().backward()
    except RuntimeError as error:
        return in_a_line(error)
    return None


def _compile(stepper: Stepper, eager: Trial | None, precision: str) -> tuple[Trial | None, str | None]:
    """Compile the blocks; returns how a micro-batch went then. None and why, and all is undone, where that fails, or
    where loss or gradient differ from those of eager blocks, which are tried now unless they have been."""
    trial = problem = None
    is_divided = stepper.step.shards is not None
    try:
        if is_divided:
            problem = _first_of_all(stepper, _what_keeps_from_compiling(stepper.device))
        if problem is None:
            eager = eager or _attempt(stepper)(stepper, compiled=False)
            compile_blocks(stepper.step.model, without_hooks=is_divided)
            trial = _attempt(stepper)(stepper, compiled=True)
            errors = zip(("loss", "gradient"), trial.relative_error(eager), TOLERANCE[precision], strict=True)
            wrong = [(what, error) for what, error, allowed in errors if not error <= allowed]
            problem = "the {} differs from eager by {:.1e}".format(*wrong[0]) if wrong else None
    except torch.OutOfMemoryError:
        problem = "not enough memory"
    except RuntimeError as error:  # the compiler's own errors are such
        if is_divided:
            raise
        problem = in_a_line(error)
    problem = _first_of_all(stepper, problem)
    if problem is None:
        return trial, None
    undo_compile(stepper.step.model)
    empty_cache()
    return None, f"not compiled: {problem}"


def in_a_line(error: Exception) -> str:
    """Kind and first line of an error."""
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0][:120]}"


def _first_step_seconds(stepper: Stepper, number: int) -> float:
    """`step_seconds` of steps that fit: where memory runs out, micro-batches get smaller. Raises DoesNotFit.

    `number` is that of the step that comes next.
    """
    while True:
        seconds = stepper.ranks.most(_step_seconds_or_inf(stepper))
        if seconds < math.inf:
            return seconds
        stepper.halve_micro_batch(number)


def _step_seconds_or_inf(stepper: Stepper) -> float:
    """`step_seconds`, or infinity where memory runs out."""
    try:
        return step_seconds(stepper)
    except torch.OutOfMemoryError:
        pass  # the exception holds on to what was computed: it has to go first
    empty_cache()
    return math.inf


def step_seconds(stepper: Stepper) -> float:
    """Median time of an optimizer step as it is taken now, told from its first micro-batch and its second one; changes
    nothing."""
    n_micro = stepper.n_micro
    times = []
    with stepper.step.without_effects():
        for n in range(1, min(n_micro, 2) + 1):
            call = partial(stepper.run, *stepper.part(n_micro=n))
            times.append(median_seconds(call, stepper.device, TIMED_STEPS, TIMED_SECONDS))
    return times[0] + (n_micro - 1) * max(0.0, times[-1] - times[0])
