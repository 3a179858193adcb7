"""Signs that a run goes wrong: a loss that jumps, elements that are no longer finite."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from nnx_cli.layers.loss import LossModule
from nnx_cli.models._base import LanguageModel

MEMORY = 0.9  # share of the past in running averages of the loss
FAMILIAR = 20  # losses that have to be seen before one can be called unusual
UNUSUAL = 6.0  # standard deviations above the average
LEAST_JUMP = 0.2  # nats above the average: less is no spike, however calm the run was


class LossSpikeDetector:
    """Tells a jump of the loss from its usual ups and downs, by running averages of loss and squared distance."""

    def __init__(self) -> None:
        self.n_seen = 0
        self.mean = 0.0
        self.variance = 0.0

    def update(self, loss: float) -> bool:
        """Take note of a loss in nats; returns whether it is a spike. A spike does not count as usual."""
        distance = loss - self.mean
        jump = max(LEAST_JUMP, UNUSUAL * self.variance**0.5)
        if self.n_seen >= FAMILIAR and distance > jump:
            self.mean += (1 - MEMORY) * jump  # a loss that stays up becomes the usual one after a while
            return True
        self.n_seen += 1
        share = max(1 - MEMORY, 1 / self.n_seen)
        self.mean += share * distance
        self.variance = (1 - share) * (self.variance + share * distance**2)
        return False


def all_finite(tensors: Iterable[Tensor]) -> bool:
    """Whether every element of floating-point tensors is finite."""
    return all(bool(tensor.isfinite().all()) for tensor in tensors if tensor.is_floating_point())


def first_overflow(model: LanguageModel, input_ids: Tensor, targets: Tensor) -> str:
    """Where the first element that is not finite comes from, in words: a weight, a layer's output, or a gradient."""
    for name, parameter in model.named_parameters():
        if not all_finite([parameter]):
            return f"{name} has elements that are not finite"
    found: list[str] = []

    def watch(name: str) -> Any:
        def look(module: nn.Module, args: Any, output: Any) -> None:
            outputs = output if isinstance(output, (tuple, list)) else (output,)
            if not found and not all_finite(x for x in outputs if isinstance(x, Tensor)):
                found.append(name)

        return look

    names = {module: name for name, module in model.named_modules() if name}
    hooks = [module.register_forward_hook(watch(name)) for module, name in names.items()]
    try:
        loss, count = LossModule(model)(input_ids, targets)
        if not found:
            (loss / count.clamp(min=1)).backward()
    finally:
        for hook in hooks:
            hook.remove()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    bad = [name for name, grad in gradients.items() if not all_finite([grad])]
    model.zero_grad(set_to_none=True)
    if found:
        return f"the output of {found[0]} is the first that is not finite"
    return f"the gradient of {bad[-1]} is the first that is not finite" if bad else "now everything is finite"
