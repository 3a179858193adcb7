"""What goes wrong with a disk: calls that fail, or in which the process dies."""

from __future__ import annotations

import builtins
import contextlib
import hashlib
import itertools
import math
import os
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

CALLS = ("fsync", "rename", "replace", "mkdir", "unlink", "rmdir")


class WatchedFile:
    """An open file that asks before every write."""

    def __init__(self, file: Any, ask: Callable[[str, Callable], Any]) -> None:
        self._file, self._ask = file, ask

    def write(self, data: Any) -> int:
        def half() -> None:
            self._file.write(data[: len(data) // 2])
            self._file.flush()

        return self._ask("write", lambda: self._file.write(data), half)

    def truncate(self, size: int) -> int:
        return self._ask("truncate", lambda: self._file.truncate(size))

    def __enter__(self) -> WatchedFile:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


@contextlib.contextmanager
def watched(ask: Callable[..., Any]) -> Iterator[None]:
    """Call `ask(name, do, half=None)` in place of everything that changes the disk: it may `do()` it, do `half()` of a
    write, raise, or kill. Calls inside of `ask` pass."""
    inside = False

    def asking(name: str, do: Callable[[], Any], half: Callable[[], None] | None = None) -> Any:
        nonlocal inside
        if inside:
            return do()
        inside = True
        try:
            return ask(name, do, half)
        finally:
            inside = False

    def wrap(name: str, real: Callable) -> Callable:
        return lambda *args, **options: asking(name, lambda: real(*args, **options))

    real_open = builtins.open

    def watched_open(file: Any, mode: str = "r", *args: Any, **options: Any) -> Any:
        if not set(mode) & set("wax+") or str(file) == os.devnull:
            return real_open(file, mode, *args, **options)
        return WatchedFile(asking("open", lambda: real_open(file, mode, *args, **options)), asking)

    with contextlib.ExitStack() as stack:
        for name in CALLS:
            stack.enter_context(mock.patch.object(os, name, wrap(name, getattr(os, name))))
        stack.enter_context(mock.patch.object(builtins, "open", watched_open))
        yield


@dataclass(frozen=True)
class KillAt:
    """Kills its process at the n-th call that changes the disk during the first save and the pruning after it; where
    there are fewer, writes their number into a file."""

    number: int
    when: str  # before or after the call; a write is half done before
    count: str = "calls"  # that file

    def __call__(self) -> None:
        from nnx_cli.runs import checkpoint

        calls, saves = 0, 0

        def ask(name: str, do: Callable[[], Any], half: Callable[[], None] | None) -> Any:
            nonlocal calls
            calls += 1
            if calls != self.number:
                return do()
            with contextlib.suppress(OSError):
                if self.when == "after":
                    do()
                elif half:
                    half()
            os.kill(os.getpid(), signal.SIGKILL)

        for name in ("save_checkpoint", "prune_checkpoints"):
            real = getattr(checkpoint, name)

            def call(*args: Any, real: Callable = real, name: str = name, **options: Any) -> None:
                nonlocal saves
                if Path(args[0]).parent.name.startswith("."):
                    return real(*args, **options)  # the first checkpoint of a run that does not exist yet
                saves += name == "save_checkpoint"
                with watched(ask) if saves == 1 else contextlib.nullcontext():
                    real(*args, **options)
                if saves == 1 and name == "prune_checkpoints":
                    Path(self.count).write_text(str(calls))

            setattr(checkpoint, name, call)


@dataclass(frozen=True)
class SlowStep:
    """Makes one step take seconds in a single call into C, and leaves a file when it begins."""

    step: int
    signs: str = "slow"

    def __call__(self) -> None:
        from nnx_cli.training.trainer import Trainer

        real = Trainer.take_step

        def take_step(trainer: Any, lr: float) -> Any:
            if trainer.state.step == self.step:
                Path(self.signs).touch()
                hashlib.pbkdf2_hmac("sha256", b"", b"", 2_000_000)
            return real(trainer, lr)

        Trainer.take_step = take_step


@dataclass(frozen=True)
class SlowSave:
    """Makes every write of a checkpoint, but those of the first, take a while."""

    seconds: float = 0.1

    def __call__(self) -> None:
        from nnx_cli.runs import checkpoint

        real = checkpoint.save_checkpoint

        def ask(name: str, do: Callable[[], Any], half: Callable[[], None] | None) -> Any:
            time.sleep(self.seconds)
            return do()

        def save(folder: Path, content: Any) -> None:
            with watched(ask) if content.step else contextlib.nullcontext():
                real(folder, content)

        checkpoint.save_checkpoint = save


@dataclass(frozen=True)
class NanAt:
    """Puts a number that is not finite into a gradient at the given steps, counted as they are taken from 0."""

    steps: tuple[int, ...]
    value: float = math.nan

    def __call__(self) -> None:
        from nnx_cli.training.step import Step

        real, taken = Step.update, itertools.count()

        def update(step: Any, loss: Any, norm: Any) -> None:
            if next(taken) in self.steps:
                parameter = next(p for p in step.parameters if p.grad is not None)
                parameter.grad.view(-1)[0] = self.value
                norm = norm + self.value
            real(step, loss, norm)

        Step.update = update


@dataclass(frozen=True)
class OverflowAt:
    """Makes a vector of the first block so large, after the given steps, that the next forward pass overflows there."""

    steps: tuple[int, ...]

    def __call__(self) -> None:
        import torch

        from nnx_cli.training.step import Step

        real, taken = Step.after_update, itertools.count()

        def after_update(step: Any, *numbers: Any) -> None:
            real(step, *numbers)
            if next(taken) in self.steps:
                with torch.no_grad():
                    next(p for p in step.model.blocks[0].parameters() if p.dim() == 1).fill_(3e38)

        Step.after_update = after_update


@dataclass(frozen=True)
class SpikeAt:
    """Adds to the loss that a step reports, at the given steps."""

    steps: tuple[int, ...]
    height: float = 50.0

    def __call__(self) -> None:
        from nnx_cli.training.step import Step

        real, taken = Step.after_update, itertools.count()

        def after_update(step: Any, loss: Any, norm: Any, bad: Any) -> None:
            real(step, loss + self.height if next(taken) in self.steps else loss, norm, bad)

        Step.after_update = after_update
