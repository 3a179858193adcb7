"""One optimizer step: gradient accumulation, gradient clipping, update. Op by op, or as CUDA graphs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils import get_total_norm

from nnx_cli.layers.loss import LossModule
from nnx_cli.models._base import LanguageModel
from nnx_cli.optim._base import DeviceOptimizer
from nnx_cli.optim._in_backward import InBackward
from nnx_cli.system.cuda_graph import CudaGraph
from nnx_cli.system.ranks import ALONE, Ranks
from nnx_cli.training.pace import WorkClock
from nnx_cli.training.shards import Shards

WARM_UPS = 2  # steps before capture: libraries choose kernels and make their workspaces
WARM_MICRO_BATCHES = 2  # of such a step: the second one adds to the gradients of the first


@dataclass(frozen=True)
class StepNumbers:
    """Numbers of the newest step, read on the host.

    `loss` is the mean over its targets, `grad_norm` the norm of the gradient before clipping, `highest_loss` that of
    all steps since the last reading; `skipped_steps` counts all that were skipped, `bad_steps` those in a row.
    """

    loss: float
    grad_norm: float
    highest_loss: float
    skipped_steps: int
    bad_steps: int


class StepStats:
    """What steps tell of themselves: `values` (5,) float32 on the device, and by name; only `read` synchronizes."""

    def __init__(self, device: torch.device) -> None:
        self.values = torch.zeros(5, device=device)
        self.loss, self.grad_norm, self.highest_loss, self.skipped_steps, self.bad_steps = self.values.unbind()

    def update(self, loss: Tensor, grad_norm: Tensor, bad: Tensor) -> None:
        """Count a step; `bad` is 1.0 where it was skipped."""
        highest = torch.maximum(self.highest_loss, loss.nan_to_num(0.0, 0.0, 0.0))
        values = (loss, grad_norm, highest, self.skipped_steps + bad, (self.bad_steps + 1) * bad)
        self.values.copy_(torch.stack(values))

    def read(self) -> StepNumbers:
        """The numbers, by one synchronization; the highest loss begins anew."""
        loss, grad_norm, highest_loss, skipped, bad = self.values.tolist()
        self.highest_loss.zero_()
        return StepNumbers(loss, grad_norm, highest_loss, int(skipped), int(bad))

    def set_skipped(self, skipped_steps: int, bad_steps: int) -> None:
        """Go on counting from there."""
        self.skipped_steps.fill_(skipped_steps)
        self.bad_steps.fill_(bad_steps)


class OutOfMemoryElsewhere(torch.OutOfMemoryError):
    """Another rank ran out of memory, so that all take smaller micro-batches."""


class Step:
    """Takes optimizer steps without asking the device anything.

    The loss is the sum over all targets divided by their number, however they are divided into micro-batches. A
    gradient that is not finite never reaches the weights: the optimizer is told on the device, by `found_inf`, to leave
    weights and state as they are. `frozen` makes it do so whatever the gradients are. With `in_backward` the optimizer
    moves each weight as soon as its gradient is there, and only one micro-batch makes a step.

    Of several ranks each has a part of the samples; gradients are added up once, after the last micro-batch of all.
    """

    def __init__(
        self,
        model: LanguageModel,
        optimizer: DeviceOptimizer,
        scaler: torch.amp.GradScaler,
        grad_clip: float,
        in_backward: bool = False,
        ranks: Ranks = ALONE,
        shards: Shards | None = None,
    ) -> None:
        self.model = model
        self.shards = shards
        self.optimizer = optimizer
        self.ranks = optimizer.ranks = ranks
        self.scaler = scaler
        self.micro_step = LossModule(model)
        self.grad_clip = grad_clip  # largest norm of the gradient; 0: no limit
        moved = model.parameters() if shards is None else shards.local.values()
        self.parameters = [p for p in moved if p.requires_grad]
        self.stats = StepStats(model.device)
        self.frozen = torch.zeros((), device=model.device)
        self.clock = WorkClock(model.device)
        if shards is not None:
            self.clock.follow(model.blocks)
        self.in_backward = InBackward(model, optimizer, grad_clip) if in_backward else None
        if self.in_backward:
            self.frozen = self.in_backward.frozen
        self.updating = False  # while the optimizer is at work: what it began cannot be taken back

    def __call__(self, input_ids: Tensor, targets: Tensor, batch_size: int) -> None:
        """One step on all samples (N, T), `batch_size` at a time."""
        n_targets = self.count_targets(targets)
        if self.in_backward:
            with self.work():  # gradients are added up within the backward pass
                loss, _ = self.micro_step(input_ids, targets)
            self.in_backward.begin()
            self.updating = True
            (loss / n_targets).backward()
            norm, bad = self.in_backward.finish()
            self.after_update(self._added(loss.detach()) / n_targets, norm, bad)
            return
        total = torch.zeros((), device=input_ids.device)
        with self.work():
            for ids, wanted in zip(input_ids.split(batch_size), targets.split(batch_size), strict=True):
                total += self.accumulate(ids, wanted, n_targets)
        self.add_up(self.gradients(), total)
        self.end(total / n_targets)

    def work(self) -> AbstractContextManager[None]:
        """Around what a rank does between two moments in which it waits for others: it is timed, where there are any.
        Of a model that is divided, the clock follows the blocks."""
        return nullcontext() if self.ranks.count == 1 or self.shards is not None else self.clock.running()

    def count_targets(self, targets: Tensor) -> Tensor:
        """Targets of all ranks that the mask leaves, int64 (); at least 1, so that a step without any has loss 0."""
        return self._added((targets != self.model.ignore_index).sum()).clamp(min=1)

    def accumulate(self, input_ids: Tensor, targets: Tensor, n_targets: Tensor) -> Tensor:
        """Gradient accumulation, under loss scaling: add a micro-batch's (B, T) part of the mean over `n_targets`.

        Returns the sum of its losses.
        """
        loss, _ = self.micro_step(input_ids, targets)
        mean = loss / n_targets
        self.scaler.scale(mean if self.shards is None else mean * self.ranks.count).backward()
        return loss.detach()

    def add_up(self, gradients: list[Tensor], total: Tensor) -> None:
        """Add up the ranks' gradients and summed losses, in place. Raises OutOfMemoryElsewhere, before anything is
        changed, where another rank has none."""
        if self.ranks.count == 1:
            return
        if self.shards is not None:  # which has added up its own
            gradients = self.shards.undivided_gradients()
            for gradient in gradients:
                gradient /= self.ranks.count
        elif self.ranks.any(False):
            raise OutOfMemoryElsewhere
        self.updating = True
        self.ranks.add_up([*gradients, total])

    def _added(self, value: Tensor) -> Tensor:
        self.ranks.add_up([value])
        return value

    def gradients(self) -> list[Tensor]:
        """The gradients that are there."""
        if self.shards is not None:
            self.shards.take_gradients()
        return [p.grad for p in self.parameters if p.grad is not None]

    def end(self, loss: Tensor) -> None:
        """What follows the last micro-batch of a step whose mean loss is `loss`."""
        self.scaler.unscale_(self.optimizer)
        norm = get_total_norm(self.gradients(), foreach=True) if self.shards is None else self.shards.norm()
        if self.grad_clip:
            self.optimizer.clip(norm, self.grad_clip)
        self.update(loss, norm)

    @torch.no_grad()
    def update(self, loss: Tensor, norm: Tensor) -> None:
        """Let the optimizer take the gradients, unless they or the loss are not finite; forget them."""
        bad = 1 - (loss.isfinite() & norm.isfinite()).float()
        self.optimizer.found_inf = torch.maximum(bad, self.frozen)
        self.updating = True
        self.optimizer.step()
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self.after_update(loss, norm, bad)

    @torch.no_grad()
    def after_update(self, loss: Tensor, norm: Tensor, bad: Tensor) -> None:
        """Let the model do what it does after a step, and count it; `bad` is 1.0 where it was skipped."""
        self.updating = False
        self.model.post_optim_step()
        self.stats.update(loss, norm, bad)

    def forget(self) -> None:
        """Forget what an unfinished step has left: gradients, and that they were unscaled or being used."""
        self.optimizer.zero_grad(set_to_none=True)
        self.model.zero_grad(set_to_none=True)
        self.updating = False
        if self.scaler.is_enabled():
            getattr(self.scaler, "_per_optimizer_states", {}).clear()

    @contextmanager
    def without_effects(self) -> Iterator[None]:
        """Steps taken inside leave weights, optimizer and counters as they were."""
        touched = type(self.model).post_optim_step is not LanguageModel.post_optim_step
        state = self.model.state_without_ties() if touched else {}
        before = {name: tensor.to("cpu", copy=True) for name, tensor in state.items()}
        stats, scale = self.stats.values.clone(), self.scaler.state_dict()
        ranks = self.ranks
        self.ranks = self.optimizer.ranks = ALONE  # others may take fewer of them
        self.frozen.fill_(1.0)
        try:
            yield
        finally:
            self.ranks = self.optimizer.ranks = ranks
            self.forget()
            self.frozen.zero_()
            for name, tensor in state.items():
                tensor.copy_(before[name])
            self.stats.values.copy_(stats)
            if scale:
                self.scaler.load_state_dict(scale)


class StepGraphs:
    """A `Step` as CUDA graphs. A step of several micro-batches is two of them: one is replayed for each micro-batch, so
    that many do not take longer to record than one, the other is the end of the step. One that is a single micro-batch
    is one graph, unless ranks have to add up their gradients in between. What the optimizer cannot have recorded, the
    end of a step, runs op by op after the replays.

    Raises RuntimeError where something in the step cannot be recorded, torch.OutOfMemoryError where memory does not
    suffice.
    """

    def __init__(self, step: Step, input_ids: Tensor, targets: Tensor, batch_size: int) -> None:
        self.step = step
        self.batch_size = batch_size
        self.n_targets = step.count_targets(targets)
        self.total = torch.zeros((), device=input_ids.device)  # summed loss of a step's micro-batches
        self.gradients: dict[Tensor, Tensor] = {}  # of each parameter: what micro-batches add to
        self.whole: CudaGraph | None = None
        self.end: CudaGraph | None = None
        capturable = step.optimizer.may_be_captured
        several = step.ranks.count > 1
        if step.in_backward and several:
            raise RuntimeError("gradients of several GPUs are added up within the backward pass")
        if step.in_backward and not capturable:
            raise RuntimeError("this optimizer's step cannot be recorded, and is part of the backward pass")
        warm_ids, warm_targets = (x[: WARM_MICRO_BATCHES * batch_size].clone() for x in (input_ids, targets))
        first = (input_ids[:batch_size], targets[:batch_size])

        def warm_up(input_ids: Tensor, targets: Tensor) -> None:
            for _ in range(WARM_UPS):
                step(warm_ids, warm_targets, batch_size)

        def warm_up_and_accumulate(input_ids: Tensor, targets: Tensor) -> None:
            warm_up(input_ids, targets)
            step.accumulate(input_ids, targets, self.n_targets)
            self.gradients = {p: p.grad for p in step.parameters if p.grad is not None}

        def accumulate(input_ids: Tensor, targets: Tensor) -> None:
            self.total += step.accumulate(input_ids, targets, self.n_targets)

        with step.without_effects():
            if len(input_ids) == batch_size and capturable and not several:
                self.whole = CudaGraph(
                    lambda ids, wanted: step(ids, wanted, batch_size), first, warm_up=warm_up, family="training"
                )
                return
            self.micro_batch = CudaGraph(accumulate, first, warm_up=warm_up_and_accumulate, family="training")
            if capturable:
                self.end = CudaGraph(self._end, warm_up=lambda: None, pool=self.micro_batch.pool(), family="training")

    def __call__(self, input_ids: Tensor, targets: Tensor) -> None:
        """One step on samples (N, T), as many as were recorded, or any multiple of a micro-batch where those were
        several."""
        if self.whole is not None:
            self.whole(input_ids, targets)
            return
        self.n_targets.copy_(self.step.count_targets(targets))
        self.total.zero_()
        torch._foreach_zero_(list(self.gradients.values()))
        with self.step.work():
            for ids, wanted in zip(input_ids.split(self.batch_size), targets.split(self.batch_size), strict=True):
                self.micro_batch(ids, wanted)
        self.step.add_up(list(self.gradients.values()), self.total)
        if self.end is not None:
            self.end()
            return
        for parameter, gradient in self.gradients.items():
            parameter.grad = gradient
        self._end()

    def _end(self) -> None:
        self.step.end(self.total / self.n_targets)
