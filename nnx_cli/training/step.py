"""One optimizer step: gradients of its micro-batches, clipping, update. Op by op, or recorded as CUDA graphs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import torch
from torch import Tensor

from nnx_cli.layers.loss import TrainStep
from nnx_cli.models._base import LanguageModel
from nnx_cli.optim._base import DeviceOptimizer
from nnx_cli.optim._in_backward import InBackward

WARM_UPS = 2  # steps before capture: libraries choose kernels and make their workspaces
WARM_MICRO_BATCHES = 2  # of such a step: the second one adds to the gradients of the first


@cache
def capture_stream() -> torch.cuda.Stream:
    """Where graphs are recorded: always the same, for matrix products keep a workspace for every stream."""
    return torch.cuda.Stream()


class Step:
    """Takes optimizer steps without asking the device anything.

    The loss is the sum over all targets divided by their number, however they are divided into micro-batches. A
    gradient that is not finite never reaches the weights: the optimizer is told on the device, by `found_inf`, to leave
    weights and state as they are. `hold` makes it do so whatever the gradients are. With `in_backward` the optimizer
    moves each weight as soon as its gradient is there, and only one micro-batch makes a step.

    `stats` (5,), float32 on the device: mean loss and norm of the gradient before clipping of the newest step, the
    highest loss since somebody last put a number there, steps skipped so far, steps skipped in a row.
    """

    def __init__(
        self,
        model: LanguageModel,
        optimizer: DeviceOptimizer,
        scaler: torch.amp.GradScaler,
        grad_clip: float,
        in_backward: bool = False,
    ) -> None:
        self.model, self.optimizer, self.scaler = model, optimizer, scaler
        self.micro_step = TrainStep(model)
        self.grad_clip = grad_clip  # largest norm of the gradient; 0: no limit
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.stats = torch.zeros(5, device=model.device)
        self.hold = torch.zeros((), device=model.device)
        self.in_backward = InBackward(model, optimizer, grad_clip) if in_backward else None
        if self.in_backward:
            self.hold = self.in_backward.hold
        self.updating = False  # while the optimizer is at work: what it began cannot be taken back

    def __call__(self, input_ids: Tensor, targets: Tensor, batch_size: int) -> None:
        """One step on all samples (N, T), `batch_size` at a time."""
        n_targets = (targets != self.model.ignore_index).sum()
        if self.in_backward:
            loss, _ = self.micro_step(input_ids, targets)
            self.in_backward.begin()
            self.updating = True
            (loss / n_targets).backward()
            norm, bad = self.in_backward.finish()
            self.finish(loss.detach() / n_targets, norm, bad)
            return
        total = torch.zeros((), device=input_ids.device)
        for ids, wanted in zip(input_ids.split(batch_size), targets.split(batch_size), strict=True):
            total += self.accumulate(ids, wanted, n_targets)
        self.end(total / n_targets)

    def accumulate(self, input_ids: Tensor, targets: Tensor, n_targets: Tensor) -> Tensor:
        """Add the gradient of a micro-batch (B, T) to that of the step, which has `n_targets`; returns the sum of its
        losses."""
        loss, _ = self.micro_step(input_ids, targets)
        self.scaler.scale(loss / n_targets).backward()
        return loss.detach()

    def gradients(self) -> list[Tensor]:
        return [p.grad for p in self.parameters if p.grad is not None]

    def end(self, loss: Tensor) -> None:
        """What follows the last micro-batch of a step whose mean loss is `loss`."""
        self.scaler.unscale_(self.optimizer)
        norm = torch.nn.utils.get_total_norm(self.gradients(), foreach=True)
        if self.grad_clip:
            self.optimizer.clip(norm, self.grad_clip)
        self.update(loss, norm)

    @torch.no_grad()
    def update(self, loss: Tensor, norm: Tensor) -> None:
        """Let the optimizer take the gradients, unless they or the loss are not finite; forget them."""
        bad = 1 - (loss.isfinite() & norm.isfinite()).float()
        self.optimizer.found_inf = torch.maximum(bad, self.hold)
        self.updating = True
        self.optimizer.step()
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self.finish(loss, norm, bad)

    @torch.no_grad()
    def finish(self, loss: Tensor, norm: Tensor, bad: Tensor) -> None:
        """Let the model do what it does after a step, and count it; `bad` is 1.0 where it was skipped."""
        self.updating = False
        self.model.post_optim_step()
        highest, skipped, in_a_row = self.stats[2:].unbind()
        highest = torch.maximum(highest, loss.nan_to_num(0.0, 0.0, 0.0))
        self.stats.copy_(torch.stack((loss, norm, highest, skipped + bad, (in_a_row + 1) * bad)))

    def forget(self) -> None:
        """Forget what an unfinished step has left: gradients, and that they were unscaled or being used."""
        self.optimizer.zero_grad(set_to_none=True)
        self.updating = False
        if self.scaler.is_enabled():
            self.scaler._per_optimizer_states.clear()

    @contextmanager
    def rehearsal(self) -> Iterator[None]:
        """Steps taken inside leave weights, optimizer and counters as they were."""
        touched = type(self.model).post_optim_step is not LanguageModel.post_optim_step
        state = self.model.state_without_ties() if touched else {}
        before = {name: tensor.to("cpu", copy=True) for name, tensor in state.items()}
        stats, scale = self.stats.clone(), self.scaler.state_dict()
        self.hold.fill_(1.0)
        try:
            yield
        finally:
            self.forget()
            self.hold.zero_()
            for name, tensor in state.items():
                tensor.copy_(before[name])
            self.stats.copy_(stats)
            if scale:
                self.scaler.load_state_dict(scale)


class CapturedStep:
    """A `Step` recorded as CUDA graphs and replayed: one launch for the hundreds or thousands of kernels of a step,
    which a processor cannot launch as fast as a card runs them. A step of several micro-batches is two graphs, one of
    which is replayed for each of them, so that many do not take longer to record than one.

    Raises RuntimeError where something in the step cannot be recorded, torch.OutOfMemoryError where memory does not
    suffice.
    """

    def __init__(self, step: Step, input_ids: Tensor, targets: Tensor, batch_size: int) -> None:
        self.ignore_index = step.model.ignore_index
        warm = [x[: WARM_MICRO_BATCHES * batch_size].clone() for x in (input_ids, targets)]
        self.input_ids, self.targets = (x[:batch_size].clone() for x in (input_ids, targets))  # what a replay reads
        self.n_targets = (targets != self.ignore_index).sum()
        self.total = torch.zeros((), device=input_ids.device)
        self.gradients: list[Tensor] = []  # what micro-batches add to
        self.graph, self.rest = torch.cuda.CUDAGraph(), None  # a micro-batch, and the end of a step; or a whole one
        stream = capture_stream()
        with step.rehearsal():
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(WARM_UPS):
                    step(*warm, batch_size)
                if len(input_ids) > batch_size:
                    step.accumulate(self.input_ids, self.targets, self.n_targets)
                    self.gradients = step.gradients()
            torch.cuda.current_stream().wait_stream(stream)
            torch.cuda.synchronize()
            torch.cuda.empty_cache()  # graphs have a pool of their own
            if len(input_ids) == batch_size:
                with torch.cuda.graph(self.graph, stream=stream):
                    step(self.input_ids, self.targets, batch_size)
                return
            with torch.cuda.graph(self.graph, stream=stream):
                self.total += step.accumulate(self.input_ids, self.targets, self.n_targets)
            self.rest = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.rest, stream=stream, pool=self.graph.pool()):
                step.end(self.total / self.n_targets)

    def __call__(self, input_ids: Tensor, targets: Tensor) -> None:
        """One step on samples (N, T), as many as were recorded, or any multiple of a micro-batch where those were
        several."""
        if self.rest is None:
            self.read(input_ids, targets)
            self.graph.replay()
            return
        self.n_targets.copy_((targets != self.ignore_index).sum())
        self.total.zero_()
        torch._foreach_zero_(self.gradients)
        n = len(self.input_ids)
        for ids, wanted in zip(input_ids.split(n), targets.split(n), strict=True):
            self.read(ids, wanted)
            self.graph.replay()
        self.rest.replay()

    def read(self, input_ids: Tensor, targets: Tensor) -> None:
        """Put a micro-batch where the graph reads it."""
        self.input_ids.copy_(input_ids, non_blocking=True)
        self.targets.copy_(targets, non_blocking=True)
