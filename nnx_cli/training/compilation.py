"""torch.compile, block by block, and whole steps as CUDA graphs: kept only where it is right and pays."""

from __future__ import annotations

import math
import shutil
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from nnx_cli.layers.blocks import compile_blocks, undo_compile
from nnx_cli.system.device import synchronize

if TYPE_CHECKING:
    from nnx_cli.training.trainer import Trainer

TOLERANCE = {
    "fp32": (1e-4, 1e-3),
    "bf16": (2e-2, 1e-1),
    "fp16": (1e-2, 1e-1),
}  # relative differences of loss and gradient from eager that count as equal
COMPILE_SECONDS = {"cpu": 60.0, "cuda": 30.0}  # what compiling a block and its backward may cost
HOPED_SAVING = {"cpu": 0.1, "cuda": 0.25}  # of a step, before it is measured
WORTHWHILE = 0.95  # of the time of an eager step: what a compiled one may take at most; less is noise
TIMED_STEPS = 3  # at most, and no more once they have taken so long:
TIMED_SECONDS = 0.5


@dataclass(frozen=True)
class Trial:
    """A micro-batch, tried: its loss, the norm of every parameter's gradient, and the seconds it takes."""

    loss: float
    seconds: float
    norms: Tensor

    def off_by(self, other: Trial) -> tuple[float, float]:
        """Difference of loss and of gradient from another trial's, relative to that."""
        loss = abs(self.loss - other.loss) / max(abs(other.loss), 1e-9)
        gradient = (self.norms - other.norms).norm() / other.norms.norm().clamp(min=1e-12)
        return loss, gradient.item()


def decide(trainer: Trainer, wish: str) -> str:
    """Compile the trainer's model, or leave it eager; on a card also capture its step as a CUDA graph.

    Returns on, graph (captured, not compiled) or off, notes it in the trainer's settings, and tells the observer why.
    `auto` tries what the run is long enough to earn back, compares loss and speed with eager, and keeps what is right
    and faster.
    """
    step_s = begin(trainer, wish)
    if step_s is not None:
        go_on(trainer, wish, step_s)
    return trainer.config.compile


def begin(trainer: Trainer, wish: str) -> float | None:
    """Decide what needs no compiler, which takes long to import. Returns None where that is all; else the seconds of a
    step on a card; elsewhere 0, for `go_on` times them."""
    kind = trainer.device.type
    note_how(trainer, "off")
    if wish == "off" or (wish != "on" and kind not in COMPILE_SECONDS):
        return None
    step_s = 0.0
    if kind == "cpu":
        if wish == "graph":
            return None
        if not any(map(shutil.which, ("c++", "g++", "clang++"))):
            trainer.observer.note("not compiled: there is no C++ compiler here")
            return None
    if kind == "cuda":
        step_s = first_step(trainer)
        if capture(trainer, wish, step_s):
            note_how(trainer, "graph")
            step_s = timed_step(trainer)
        if wish == "graph":
            return None
    if trainer.step.in_backward:  # weights would move while a compiled gradient is compared with an eager one
        if wish == "on":
            trainer.observer.note("not compiled: not together with --optimizer-in-backward")
        return None
    if wish == "auto":
        at_most = saved_at_most(trainer) if kind == "cpu" else planned_seconds(trainer, step_s) * HOPED_SAVING[kind]
        if at_most < COMPILE_SECONDS[kind]:
            return None
    return step_s


def go_on(trainer: Trainer, wish: str, step_s: float) -> None:
    """Compile after `begin`, which returned `step_s`."""
    kind, was_captured = trainer.device.type, trainer.captured is not None
    eager = None
    if kind != "cuda":
        eager = timed(trainer)
        step_s = eager.seconds * trainer.config.grad_accum
        if wish == "auto" and planned_seconds(trainer, step_s) * HOPED_SAVING[kind] < COMPILE_SECONDS[kind]:
            return
    if was_captured:
        trainer.release()  # there may be no room for another step beside it
    after_s = compile_checked(trainer, eager)
    if was_captured:
        capture(trainer, wish, None)
    if after_s is None:
        return
    after_s = step_that_fits(trainer) if kind == "cuda" else after_s * trainer.config.grad_accum
    if wish == "auto" and after_s >= WORTHWHILE * step_s or after_s == math.inf:
        undo_compile(trainer.model)
        if was_captured:
            capture(trainer, wish, None)
        trainer.observer.note(f"not compiled: {'not enough memory' if after_s == math.inf else 'no faster here'}")
        return
    note_how(trainer, "on")
    trainer.observer.note(f"compiled: a step takes {after_s / step_s:.0%} of its time before")


def note_how(trainer: Trainer, how: str) -> None:
    trainer.config = replace(trainer.config, compile=how)


def first_step(trainer: Trainer) -> float:
    """`timed_step` of steps that fit: where memory runs out, micro-batches get smaller. Raises DoesNotFit."""
    while True:
        try:
            return timed_step(trainer)
        except torch.OutOfMemoryError:
            pass  # the exception holds on to what was computed: it has to go first
        trainer.shrink()


def step_that_fits(trainer: Trainer) -> float:
    """`timed_step`, or infinity where memory runs out."""
    try:
        return timed_step(trainer)
    except torch.OutOfMemoryError:
        pass  # the exception holds on to what was computed: it has to go first
    torch.cuda.empty_cache()
    return math.inf


def compile_checked(trainer: Trainer, eager: Trial | None) -> float | None:
    """Compile the blocks; returns the seconds of a micro-batch then. None, and all is undone, where that fails, or
    where loss or gradient differ from those of eager blocks, which are tried now unless they have been."""
    if trainer.device.type == "cpu":
        torch.use_deterministic_algorithms(True)  # compiled sums would be split among threads as it comes
    try:
        eager = eager or timed(trainer)
        compile_blocks(trainer.model)
        trial = timed(trainer)
    except torch.OutOfMemoryError:
        undo_compile(trainer.model)
        torch.cuda.empty_cache()
        trainer.observer.note("not compiled: not enough memory")
        return None
    except (torch._dynamo.exc.TorchDynamoException, torch._inductor.exc.InductorError, RuntimeError) as error:
        undo_compile(trainer.model)
        trainer.observer.note(f"not compiled: {in_a_line(error)}")
        return None
    for what, off_by, allowed in zip(
        ("loss", "gradient"), trial.off_by(eager), TOLERANCE[trainer.config.precision], strict=True
    ):
        if not off_by <= allowed:
            undo_compile(trainer.model)
            trainer.observer.note(f"not compiled: the {what} differs from eager by {off_by:.1e}")
            return None
    return trial.seconds


def capture(trainer: Trainer, wish: str, plain_s: float | None) -> bool:
    """Let the trainer's step be one CUDA graph, if that works, and if it is faster than `plain_s` where that is
    given."""
    try:
        if not trainer.capture():
            return False
    except torch.OutOfMemoryError:
        trainer.observer.note("no CUDA graph: not enough memory")
    except RuntimeError as error:
        trainer.observer.note(f"no CUDA graph: {in_a_line(error)}")
    else:
        if wish != "auto" or plain_s is None or timed_step(trainer) < WORTHWHILE * plain_s:
            return True
    trainer.captured = None
    torch.cuda.empty_cache()
    return False


def in_a_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0][:120]}"


def timed_step(trainer: Trainer) -> float:
    """Median time of an optimizer step as it is taken now, told from its first micro-batch and its second one; changes
    nothing."""
    size, n_micro = trainer.config.batch_size, trainer.config.grad_accum
    times = []
    with trainer.step.without_effects():
        for n in range(1, min(n_micro, 2) + 1):
            samples = trainer.loader.batch(0, n * size)
            times.append(median_seconds(lambda samples=samples: trainer.run_step(*samples), trainer.device))
    return times[0] + (n_micro - 1) * max(0.0, times[-1] - times[0])


def median_seconds(call: Callable[[], None], device: torch.device) -> float:
    """Median time of a few calls, but for the first one, which warms up and compiles."""
    times: list[float] = []
    while len(times) <= TIMED_STEPS and (len(times) < 2 or sum(times[1:]) < TIMED_SECONDS):
        synchronize(device)
        started = time.perf_counter()
        call()
        synchronize(device)
        times.append(time.perf_counter() - started)
    return statistics.median(times[1:])


def saved_at_most(trainer: Trainer) -> float:
    """Seconds that compiling may save in a run whose time is limited, however long a step takes."""
    ahead = math.inf if trainer.config.max_time_s is None else trainer.config.max_time_s * (1 - trainer.progress())
    return ahead * HOPED_SAVING[trainer.device.type]


def planned_seconds(trainer: Trainer, step_s: float) -> float:
    """Training time that lies ahead, where a step takes `step_s`."""
    config = trainer.config
    by_steps = (config.max_steps or 0) * step_s
    by_time = config.max_time_s or 0.0
    ahead = min(by_steps, by_time) if by_steps and by_time else by_steps or by_time
    return ahead * (1.0 - trainer.progress())


def timed(trainer: Trainer) -> Trial:
    """The first micro-batch, forward and backward, by the median time; leaves no gradient behind."""
    torch.manual_seed(0)
    trainer.model.train(trainer.model.config.dropout == 0)  # dropout draws other masks when compiled
    input_ids, targets = trainer.loader.batch(0, trainer.config.batch_size)
    loss = torch.zeros(())

    def pass_through() -> None:
        nonlocal loss
        trainer.model.zero_grad(set_to_none=True)
        total, count = trainer.step.micro_step(input_ids, targets)
        loss = total / count
        loss.backward()

    try:
        seconds = median_seconds(pass_through, trainer.device)
        gradients = [p.grad for p in trainer.model.parameters() if p.grad is not None]
        norms = torch.stack(torch._foreach_norm(gradients)).float().cpu()
    finally:
        trainer.model.zero_grad(set_to_none=True)
        trainer.model.train()
    return Trial(loss.item(), seconds, norms)
