"""Signs that a run goes wrong: a loss that jumps or ends too high, elements that are no longer finite."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import stdev
from typing import Any

from torch import Tensor, nn

from nnx_cli.layers.loss import LossModule
from nnx_cli.models._base import LanguageModel

MEMORY = 0.9  # share of the past in running averages of the loss
FAMILIAR = 20  # losses that have to be seen before one can be called unusual
UNUSUAL = 6.0  # standard deviations above the average
LEAST_JUMP = 0.2  # nats above the average: less is no spike, however calm the run was
RISE = 1.0  # nats above its best, or where it began, from which on a loss went wrong
BLOW_UP = 2.0  # nats above where it began: batches of a text do not differ by that
SLACK = 0.5  # nats above where it began that a loss may end at by chance, or for want of time
TURN_SHARE = 0.15  # of a run that its best validation has to lie back for it to have turned
TURN_RISE, TURN_SIGMAS = 0.02, 3  # nats above its best, and standard errors of that rise, that are no chance
MOST_PARTS = 64  # of the validation text, whose losses are compared
RECENT = 10  # logged losses, and at most a tenth of all, whose mean is the training loss of a moment


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


@dataclass(frozen=True)
class LossCourse:
    """How the losses of a run went, by the lines of its log, in nats per token. `first` is the training loss before any
    update, `peak` the highest, `recent` that of the end; `since_best` is how far it rose since the best validation."""

    first: float
    peak: float
    recent: float
    since_best: float
    val: float
    best_val: float
    best_step: int

    @classmethod
    def of(cls, records: Sequence[Mapping[str, Any]]) -> LossCourse | None:
        """That of the lines of metrics.jsonl, the last of which has a validation; None where nothing was logged."""
        trained = [record for record in records if _is_number(record.get("train_loss"))]
        if not trained:
            return None
        validated = [record for record in records if _is_number(record.get("val_loss"))]
        never: dict[str, Any] = {"val_loss": math.inf, "step": 0}
        best = min(validated, key=lambda record: record["val_loss"], default=never)
        losses = [record["train_loss"] for record in trained]
        width = max(1, min(RECENT, len(losses) // 10))
        at_best = max(1, sum(record["step"] <= best["step"] for record in trained))
        recent = _mean(losses[-width:])
        val = records[-1].get("val_loss")
        return cls(
            first=losses[0],
            peak=max(losses),
            recent=recent,
            since_best=recent - _mean(losses[max(0, at_best - width) : at_best]),
            val=math.inf if val is None else val,
            best_val=best["val_loss"],
            best_step=best["step"],
        )

    @property
    def blew_up(self) -> bool:
        """Whether the loss was far above where it began at some time, as with too high a learning rate."""
        return self.peak > self.first + BLOW_UP

    @property
    def has_better(self) -> bool:
        """Whether there was a better model than the last one, and better than that before any update."""
        return self.best_val < min(self.first, self.val)

    @property
    def overfitted(self) -> bool:
        """Whether the validation loss rose while the training loss did not."""
        return self.val > self.best_val + RISE and not self._trained_away()

    def _trained_away(self) -> bool:
        """Whether the validation loss is far above its best, and the training loss went there with it."""
        rise = self.val - self.best_val
        return rise > RISE and self.since_best > rise / 2

    def why_diverged(self, vocab_size: int, n_used: Callable[[], int]) -> str | None:
        """What is wrong with how it ended, in words; None where nothing is, or where there was too little time.

        To guess costs the logarithm of `vocab_size`; after the loss blew up, that of `n_used()`, the ids that the text
        has.
        """
        if not math.isfinite(self.val):
            return "its validation loss is no finite number"
        guessing = math.log(max(2, n_used()) if self.blew_up else vocab_size)
        if self.val > guessing and (self.blew_up or self.val > self.first + SLACK):
            return f"its validation loss is {self.val:.2f}, and guessing costs {guessing:.2f}"
        if self._trained_away():
            return (
                f"its validation loss rose from {self.best_val:.2f} at step {self.best_step:,} to {self.val:.2f}, and "
                "the training loss with it"
            )
        if self.peak > math.log(vocab_size) and min(self.val, self.recent) > self.first + RISE:
            return f"its loss began at {self.first:.2f} and ended at {self.val:.2f}"
        return None


def has_turned(rise: float, stderr: float, since_best: float) -> bool:
    """Whether the validation loss went up for good: it is `rise` nats above its best, of which chance may be `stderr`,
    and that part of the run was trained since then."""
    return since_best >= TURN_SHARE and max(TURN_RISE, TURN_SIGMAS * stderr) < rise < math.inf


def part_losses(window_losses: Sequence[float]) -> list[float]:
    """Mean losses of MOST_PARTS stretches of windows at most."""
    n = len(window_losses)
    bounds = [n * part // MOST_PARTS for part in range(MOST_PARTS + 1)]
    return [_mean(window_losses[a:b]) for a, b in pairwise(sorted(set(bounds)))]


def error_of_rise(before: Sequence[float], after: Sequence[float]) -> float:
    """Standard error of the mean difference between losses of the same parts of a text; infinite for fewer than two."""
    differences = [b - a for a, b in zip(before, after, strict=False)]
    if len(before) != len(after) or len(differences) < 2:
        return math.inf
    return stdev(differences) / math.sqrt(len(differences))


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


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
