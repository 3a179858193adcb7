"""torch.compile, block by block: kept only where it is right and pays."""

from __future__ import annotations

import shutil
import time
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING

import torch

from nnx_cli.engine.device import synchronize
from nnx_cli.models._base import LanguageModel

if TYPE_CHECKING:
    from nnx_cli.engine.trainer import Trainer

TOLERANCE = {
    "fp32": 1e-4,
    "bf16": 2e-2,
    "fp16": 1e-2,
}  # relative difference of the loss from eager that counts as equal
COMPILE_SECONDS = {"cpu": 60.0, "cuda": 30.0}  # what compiling a block and its backward may cost
HOPED_SAVING = {"cpu": 0.1, "cuda": 0.25}  # of a step, before it is measured
WORTHWHILE = 0.95  # of the time of an eager step: what a compiled one may take at most; less is noise
TIMED_STEPS = 3


def compile_blocks(model: LanguageModel) -> None:
    """Compile every block in place; blocks of one shape share the code, and names in the state dict stay."""
    for block in model.blocks:
        block.compile(dynamic=False)


def eagerly(compiled: str) -> AbstractContextManager:
    """Run compiled blocks eagerly for a while: passes of other shapes, or without gradients, would be compiled anew."""
    return torch.compiler.set_stance("force_eager") if compiled == "on" else nullcontext()


def undo_compile(model: LanguageModel) -> None:
    """Run every block eagerly again."""
    for block in model.blocks:
        block._compiled_call_impl = None


def decide(trainer: Trainer, wish: str) -> str:
    """Compile the trainer's model, or leave it eager; returns on or off, and tells the observer why.

    `auto` tries one micro-batch when the run is long enough to earn the cost back, compares loss and speed with eager,
    and keeps the faster one if it is right.
    """
    kind = trainer.device.type
    if wish == "off" or (wish == "auto" and kind not in COMPILE_SECONDS):
        return "off"
    tell = trainer.observer.note
    if (
        kind == "cpu"
        and shutil.which("c++") is None
        and shutil.which("g++") is None
        and shutil.which("clang++") is None
    ):
        tell("not compiled: there is no C++ compiler here")
        return "off"
    eager_loss, eager_s = timed(trainer)
    if wish == "auto" and planned_seconds(trainer, eager_s) * HOPED_SAVING[kind] < COMPILE_SECONDS[kind]:
        return "off"
    if kind == "cpu":
        torch.use_deterministic_algorithms(True)  # compiled sums would be split among threads as it comes
    compile_blocks(trainer.model)
    try:
        compiled_loss, compiled_s = timed(trainer)
    except torch.OutOfMemoryError:
        raise
    except (torch._dynamo.exc.TorchDynamoException, torch._inductor.exc.InductorError, RuntimeError) as error:
        undo_compile(trainer.model)
        tell(f"not compiled: {type(error).__name__}: {str(error).strip().splitlines()[0][:120]}")
        return "off"
    off_by = abs(compiled_loss - eager_loss) / max(abs(eager_loss), 1e-9)
    right, pays = off_by <= TOLERANCE[trainer.config.precision], compiled_s < WORTHWHILE * eager_s
    if not right or (wish == "auto" and not pays):
        undo_compile(trainer.model)
        tell("not compiled: " + ("no faster here" if right else f"the loss differs from eager by {off_by:.1e}"))
        return "off"
    tell(f"compiled: a step takes {compiled_s / eager_s:.0%} of its time in eager mode")
    return "on"


def planned_seconds(trainer: Trainer, micro_step_s: float) -> float:
    """Training time that lies ahead, in eager mode."""
    config = trainer.config
    by_steps = (config.max_steps or 0) * config.grad_accum * micro_step_s
    by_time = config.max_time_s or 0.0
    ahead = min(by_steps, by_time) if by_steps and by_time else by_steps or by_time
    return ahead * (1.0 - trainer.progress())


def timed(trainer: Trainer) -> tuple[float, float]:
    """Loss of the first micro-batch, and the median time of its forward and backward pass; leaves no gradient
    behind."""
    torch.manual_seed(0)
    trainer.model.train(trainer.model.config.dropout == 0)  # dropout draws other masks when compiled
    input_ids, targets = (x.to(trainer.device) for x in trainer.loader.batch(0, trainer.config.batch_size))
    times, loss = [], 0.0
    try:
        for _ in range(TIMED_STEPS + 1):  # the first one warms up, and compiles
            synchronize(trainer.device)
            started = time.perf_counter()
            total, count = trainer.train_step(input_ids, targets)
            (total / count).backward()
            loss = (total / count).item()
            synchronize(trainer.device)
            times.append(time.perf_counter() - started)
            trainer.model.zero_grad(set_to_none=True)
    finally:
        trainer.model.zero_grad(set_to_none=True)
        trainer.model.train()
    return loss, sorted(times[1:])[TIMED_STEPS // 2]
