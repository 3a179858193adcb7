"""One optimizer step: gradients of its micro-batches, clipping, update. Op by op, or captured as one CUDA graph."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import torch
from torch import Tensor

from nnx_cli.engine.device_optimizer import DeviceOptimizer
from nnx_cli.engine.in_backward import InBackward
from nnx_cli.engine.loss import TrainStep
from nnx_cli.models._base import LanguageModel

MAX_CAPTURED = 32  # micro-batches of a step that one graph may hold; more of them keep a card busy without it
WARM_UPS = 2  # steps before capture: libraries choose kernels and make their workspaces


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
        self, model: LanguageModel, optimizer: DeviceOptimizer, scaler: torch.amp.GradScaler, grad_clip: float,
        in_backward: bool = False,
    ) -> None:  # fmt: skip
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
            loss, _ = self.micro_step(ids, wanted)
            self.scaler.scale(loss / n_targets).backward()
            total += loss.detach()
        self.scaler.unscale_(self.optimizer)
        norm = torch.nn.utils.get_total_norm([p.grad for p in self.parameters if p.grad is not None], foreach=True)
        if self.grad_clip:
            self.optimizer.clip(norm, self.grad_clip)
        self.update(total / n_targets, norm)

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

    @contextmanager
    def rehearsal(self) -> Iterator[None]:
        """Steps taken inside leave weights, optimizer and counters as they were."""
        touched = type(self.model).post_optim_step is not LanguageModel.post_optim_step
        state = self.model.unique_state() if touched else {}
        before = {name: tensor.to("cpu", copy=True) for name, tensor in state.items()}
        stats, scale = self.stats.clone(), self.scaler.state_dict()
        self.hold.fill_(1.0)
        try:
            yield
        finally:
            self.optimizer.zero_grad(set_to_none=True)
            self.hold.zero_()
            for name, tensor in state.items():
                tensor.copy_(before[name])
            self.stats.copy_(stats)
            if scale:
                self.scaler.load_state_dict(scale)


class CapturedStep:
    """A `Step` recorded once as a CUDA graph and replayed: one launch for the hundreds or thousands of kernels of a
    step, which a processor cannot launch as fast as a card runs them.

    Raises RuntimeError where something in the step cannot be recorded, torch.OutOfMemoryError where memory does not
    suffice.
    """

    def __init__(self, step: Step, input_ids: Tensor, targets: Tensor, batch_size: int) -> None:
        self.input_ids, self.targets = input_ids.clone(), targets.clone()  # (N, T): what a replay reads
        self.graph = torch.cuda.CUDAGraph()
        with step.rehearsal():
            stream = capture_stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(WARM_UPS):
                    step(self.input_ids, self.targets, batch_size)
            torch.cuda.current_stream().wait_stream(stream)
            torch.cuda.synchronize()
            torch.cuda.empty_cache()  # the graph has a pool of its own
            with torch.cuda.graph(self.graph, stream=stream):
                step(self.input_ids, self.targets, batch_size)

    def __call__(self, input_ids: Tensor, targets: Tensor) -> None:
        """One step on samples of the recorded shape (N, T)."""
        self.input_ids.copy_(input_ids, non_blocking=True)
        self.targets.copy_(targets, non_blocking=True)
        self.graph.replay()
