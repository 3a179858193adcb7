"""A run's steps on its samples: op by op, compiled, as CUDA graphs; in smaller micro-batches where memory runs out."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from nnx_cli.config import TrainConfig
from nnx_cli.data.loader import Loader
from nnx_cli.errors import DoesNotFit, counted
from nnx_cli.models._base import LanguageModel
from nnx_cli.optim._base import set_lr
from nnx_cli.optim._build import build_optimizer
from nnx_cli.planning.fit import SMALLER
from nnx_cli.planning.rates import known_flops
from nnx_cli.system.device import empty_cache, set_seed
from nnx_cli.system.ranks import ALONE, Ranks
from nnx_cli.training.shards import Shards
from nnx_cli.training.step import OutOfMemoryElsewhere, Step, StepGraphs

AHEAD = 2  # steps that the host may prepare while a GPU is still busy


@dataclass(frozen=True)
class Execution:
    """How steps run, what there is to say about that, and the seconds that one takes, where it was timed."""

    graph: bool = False  # as CUDA graphs
    compiled: bool = False  # blocks through torch.compile
    step_s: float | None = None
    notes: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """The value of `--compile` for it: on, graph (not compiled) or off."""
        if self.compiled:
            return "on"
        return "graph" if self.graph else "off"


def divide_step(config: TrainConfig, batch_size: int) -> TrainConfig:
    """`config` with the samples of a step in micro-batches of `batch_size`, which divides them, and validations on at
    least as many windows."""
    assert config.batch_size is not None and config.grad_accum is not None
    if batch_size == config.batch_size:
        return config
    n = config.batch_size * config.grad_accum
    val_batches = config.val_batches and -(-config.val_batches * config.batch_size // batch_size)
    return replace(config, batch_size=batch_size, grad_accum=n // batch_size, val_batches=val_batches)


@contextmanager
def ordered_sums(execution: Execution, device: torch.device) -> Iterator[None]:
    """Compiled code on a CPU adds in the same order every time inside; else threads would share sums as it comes.

    torch would also fill all new memory first, which is for finding those who read it too early.
    """
    if not execution.compiled or device.type != "cpu":
        yield
        return
    before = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    memory: Any = torch.utils.deterministic
    fills = memory.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    memory.fill_uninitialized_memory = False
    try:
        yield
    finally:
        memory.fill_uninitialized_memory = fills
        torch.use_deterministic_algorithms(before, warn_only=warn_only)


class Stepper:
    """Takes the steps of a run. What samples a step has never changes; how many of them are a micro-batch does, where
    memory runs out. Of several ranks each takes its part of a step's samples.

    `report` is told what happened; `on_release` is called when graphs and the memory they kept are gone, or
    micro-batches got smaller.
    """

    def __init__(
        self,
        model: LanguageModel,
        loader: Loader,
        config: TrainConfig,
        device: torch.device,
        report: Callable[[str], None],
        ranks: Ranks = ALONE,
        shards: Shards | None = None,
    ) -> None:
        assert config.batch_size is not None and config.grad_accum is not None
        self.device = device
        self.loader = loader
        self.seed = config.seed
        self.batch_size = config.batch_size
        self.pieces = 1  # sequences that each sample is read as
        self.samples_per_step = config.batch_size * config.grad_accum
        scaler = torch.amp.GradScaler(device.type, enabled=config.precision == "fp16")
        optimizer = build_optimizer(model, config)
        self.ranks = ranks
        if shards is not None:
            optimizer.move(shards.local, ranks.rank, shards.owners)
        in_backward = config.optimizer_in_backward
        self.step = Step(model, optimizer, scaler, config.grad_clip, in_backward, ranks, shards)
        self.rate = known_flops(device, config.precision)  # FLOPs a second of large matmuls, of all ranks together
        self.execution = Execution()
        self.graphs: StepGraphs | None = None
        self.report = report
        self.on_release: Callable[[], None] = lambda: None
        self.data_wait_s = 0.0  # in which the device had nothing to do but to wait for samples
        self._running: deque[torch.cuda.Event] = deque()

    @property
    def cannot_heal(self) -> bool:
        """Whether a step that ran out of memory cannot be taken again: weights moved, or other ranks wait inside it."""
        return self.step.in_backward is not None or self.step.shards is not None

    @property
    def n_micro(self) -> int:
        """Micro-batches that a rank takes in a step."""
        return -(-self.samples_per_step // (self.ranks.count * self.batch_size))

    @property
    def micro_rows(self) -> int:
        """Samples of such a micro-batch, at most `batch_size`."""
        return -(-self.samples_per_step // (self.ranks.count * self.n_micro))

    @property
    def micro_sequences(self) -> int:
        """Sequences that those are read as."""
        return self.micro_rows * self.pieces

    def take(self, number: int, lr: float) -> int:
        """Step `number` of the run; returns its number of tokens, masked ones too. A GPU may still be at work on it.

        Where memory runs out, the same samples are taken in smaller micro-batches from here on. Raises DoesNotFit.
        """
        n = self.samples_per_step
        while True:
            set_seed(self.seed, number, self.ranks.rank)
            set_lr(self.step.optimizer, lr)
            try:
                self.run(*self._samples(number * n))
                break
            except torch.OutOfMemoryError as error:  # it holds on to what was computed: it has to go first
                others_know = isinstance(error, OutOfMemoryElsewhere)
            if not (others_know or self.step.updating or self.cannot_heal):
                self.ranks.any(True)
            self.halve_micro_batch(number)
        if self.device.type == "cuda":
            self._wait_for_older_steps()
        return n * self.loader.seq_len

    def _samples(self, first: int) -> tuple[Tensor, Tensor]:
        """This rank's part of a step's samples, which begin at `first`. Where they are not on the device, and it is
        idle by the time they are, it waited for them: to ask whether it is does not synchronize."""
        started = time.perf_counter()
        batch = self.part(first)
        is_idle = not self._running or self._running[-1].query()
        if is_idle and self.loader.resident is None:
            self.data_wait_s += time.perf_counter() - started
        return batch

    def part(self, first: int = 0, n_micro: int | None = None) -> tuple[Tensor, Tensor]:
        """Sequences and targets of this rank in the step whose samples begin at `first`, or in that many micro-batches
        of it."""
        rows = self.micro_rows * self.n_micro
        wanted = self.micro_rows * (n_micro or self.n_micro)
        samples = self.loader.part(first, self.samples_per_step, self.ranks.rank * rows, wanted)
        input_ids, targets = (part.reshape(self.pieces * len(part), -1) for part in samples)
        return input_ids, targets

    def waited(self) -> float:
        """Seconds that it waited for samples since it was asked the last time."""
        seconds, self.data_wait_s = self.data_wait_s, 0.0
        return seconds

    def run(self, input_ids: Tensor, targets: Tensor) -> None:
        """One optimizer step on sequences (N, T), as long as they are read now."""
        if self.graphs is not None:
            self.graphs(input_ids, targets)
            return
        with ordered_sums(self.execution, self.device):
            self.step(input_ids, targets, self.micro_sequences)

    def _wait_for_older_steps(self) -> None:
        """Keep the host at most AHEAD steps before the GPU: that is enough to never leave it idle, and little enough
        for the clock to tell the time of a step."""
        event = torch.cuda.Event()
        event.record()
        self._running.append(event)
        if len(self._running) > AHEAD:
            self._running.popleft().synchronize()

    def halve_micro_batch(self, number: int) -> None:
        """Divide a step into more micro-batches, `number` being the step that ran out of memory.

        Raises DoesNotFit where they hold one sequence already, or where weights were changing.
        """
        self.graphs = None
        self.step.optimizer.zero_grad(set_to_none=True)
        n, size, several = self.samples_per_step, self.micro_rows, self.ranks.count > 1
        if size == 1 or self.cannot_heal or self.step.updating:
            raise DoesNotFit(
                f"out of memory at step {number + 1}, {counted(size, 'sequence')} at a time; the last "
                "checkpoint is intact",
                fix=SMALLER,
            )
        self.step.forget()
        empty_cache()
        self.batch_size = max(divisor for divisor in range(1, size // 2 + 1) if n % divisor == 0)
        self.on_release()
        self.report(
            f"out of memory at step {number + 1}: {counted(self.micro_rows, 'sequence')} at a time instead of {size}, "
            f"{counted(self.n_micro, 'time')} a step{' on every GPU' if several else ''}; the samples stay the same"
        )

    def record_graphs(self) -> None:
        """Run steps as CUDA graphs from now on, recorded anew. Raises RuntimeError, torch.OutOfMemoryError."""
        self.release_graphs()
        self.graphs = StepGraphs(self.step, *self.part(), self.micro_sequences)

    def release_graphs(self) -> None:
        """Forget what was recorded, and give its memory back."""
        self.graphs = None
        self.on_release()
        empty_cache()
