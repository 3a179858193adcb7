"""A coach: what the numbers of a run say should be done otherwise, each with its evidence and one command."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from nnx_cli import models
from nnx_cli.config import module_names
from nnx_cli.errors import counted, pasteable
from nnx_cli.evaluation.by_position import Verdict
from nnx_cli.planning.flops import count_parameters, meta_model
from nnx_cli.planning.recipe.table import TOKENS_PER_PARAMETER
from nnx_cli.planning.recipe.training import default_lr, has_enough_text, useful_epochs
from nnx_cli.reporting.charts import Point
from nnx_cli.reporting.foreign import mapping, number
from nnx_cli.reporting.run_record import RunRecord
from nnx_cli.reporting.scales import short
from nnx_cli.runs.command_line import changed_command, longer_command
from nnx_cli.system.files import follow
from nnx_cli.system.text import duration
from nnx_cli.training.compilation import COMPILED, WORTHWHILE
from nnx_cli.training.divergence import LossCourse
from nnx_cli.training.recovery import LOWER

LEAST_RISE = 0.02  # nats above its best that a validation loss is no chance
LATE = 0.9  # of a run, from which on its best validation is as good as its end
SPIKES = 3  # jumps of the loss that are no bad luck
FAR_BELOW, STILL_FALLING = 0.1, 0.02  # of the rate that suits the model; nats in the last quarter of a run
WARM = 0.2  # of a run, within which what is read for the first time may take its time
HALF = 0.5  # of a run, before which some rules are silent
LEAST_LOGGED = 8  # losses from which on their course says something
TELLING = 0.02  # standard error in nats of a difference that is as good as none
WELL_ABOVE = 1.1  # times as many epochs as are useful
GUESSING = 0.9  # of the loss of a guess, above which nothing was learned
MOST_DROPOUT = 0.5
WAITING, LEAST_WAITS = 0.1, 4  # share of the time that steps wait for data, and as many lines of the log that say so
MORE = "MORE.txt"  # stands for more text in a command
LENGTHS = ("--max-steps", "--max-time", "--epochs")
TEXT = ("--filepath", "--val-fraction", "--text-key", "--encoding", "--separator", "--errors")  # not beside --data
# Tokens that a parameter saw: raced from 0.5 (30M parameters, 16 epochs of 0.9 MB) to 36 (0.8M, 32 epochs), see
# tests/bench/horizon.md; below TOKENS_PER_PARAMETER and above these a model of another size learns more in the time
MANY_TOKENS, FRESH_EPOCHS = 100, 4
SKIPPED_SHARE, LEAST_SKIPPED = 0.01, 3  # of the steps in the second half of a run; a loss scale skips 1 in 2,000


@dataclass(frozen=True)
class Finding:
    """What is wrong with a run, its evidence in numbers, and the command that helps. `rule` is the name of its rule."""

    rule: str
    text: str
    command: str

    def __str__(self) -> str:
        return f"{self.text}; try:\n  {self.command}"


def findings(run: RunRecord, named: str = "") -> list[Finding]:
    """What the rules find in a run, the most important first. `named` stands beside the run in commands on it."""
    numbers = _Numbers(run, named)
    return [found for rule in RULES if (found := rule(numbers)) is not None] if run.metrics else []


def unused_context(run: RunRecord, verdict: Verdict) -> Finding | None:
    """What `nnx eval --by-position` finds of a run: the loss far from position 64 is no lower than around it, and that
    is no want of text to tell by."""
    if verdict.used or (verdict.used is None and verdict.stderr > TELLING):
        return None
    first, last = verdict.positions
    text = (
        f"context beyond position 64 brings it nothing: loss {verdict.late:.3f} at positions {first:,} to {last:,}, "
        f"{verdict.early:.3f} for the same tokens around position 64; a shorter context trains faster"
    )
    return Finding("unused-context", text, _Numbers(run, "").again("--seq-len", str(max(64, last // 2))))


class _Numbers:
    """The numbers of a run that rules compare."""

    def __init__(self, run: RunRecord, named: str) -> None:
        self.run = run
        self.named = named
        self.training = mapping(run.config.get("training"))
        self.model = mapping(run.config.get("model"))
        events = run.status.get("events")
        self.events = [str(event) for event in events] if isinstance(events, list) else []
        self.parameters = number(run.config.get("parameters")) or 0.0
        self.tokens = run.reached("tokens") or 0.0
        self.train_tokens = number(mapping(run.config.get("data")).get("train_tokens")) or 0.0
        self.steps = run.reached("step") or 0.0
        self.is_lora = number(self.training.get("lora_rank")) is not None

    @cached_property
    def course(self) -> LossCourse | None:
        """How the losses went, up to the last validation."""
        rows = [
            {name: number(row.get(name)) for name in ("step", "train_loss", "val_loss")} for row in self.run.metrics
        ]
        last = max((place for place, row in enumerate(rows) if row["val_loss"] is not None), default=len(rows) - 1)
        return LossCourse.of([row for row in rows[: last + 1] if row["step"] is not None])

    @property
    def epochs(self) -> float | None:
        """How often the text was read."""
        return self.tokens / self.train_tokens if self.train_tokens else None

    @property
    def is_used_up(self) -> bool:
        """Whether it ended because its text had given what it has."""
        return self.run.status.get("ended") == "data"

    @property
    def useful_epochs(self) -> int:
        """How often a text of that length is worth reading by a model of that size."""
        return useful_epochs(self.parameters / self.train_tokens, int(self.train_tokens))

    @property
    def is_repeated(self) -> bool:
        """Whether the text was read more often than that."""
        return not self.is_used_up and self._was_read(WELL_ABOVE)

    @property
    def can_go_on(self) -> bool:
        """Whether more steps on the same text may bring something."""
        return not self.is_used_up and not self._was_read(1.0)

    def _was_read(self, times: float) -> bool:
        """Whether the text was read so many times as often as that, or more often."""
        known = self.epochs is not None and self.parameters and not self.is_lora
        return bool(known) and (self.epochs or 0.0) > times * self.useful_epochs

    @property
    def is_running(self) -> bool:
        """Whether more is still to come."""
        return self.run.state == "running"

    @cached_property
    def done(self) -> float:
        """The part of it that is over, 0 to 1."""
        status = self.run.status
        lengths = ((self.steps, status.get("max_steps")), (self.run.reached("time_s") or 0.0, status.get("max_time_s")))
        shares = [done / most for done, planned in lengths if (most := number(planned))]
        return min(1.0, max(shares, default=0.0)) if self.is_running else 1.0

    @property
    def is_far(self) -> bool:
        """Whether it is over, or at least half of it: before that too much is still to come."""
        return self.done >= HALF

    def late(self, name: str) -> list[Point]:
        """What was logged under a name in the second half of the steps so far."""
        return [point for point in self.run.series(name) if 2 * point[0] >= self.steps]

    @cached_property
    def over_counting(self) -> str:
        """How a table of which bytes follow four others is the better model, in words; "" where it is not."""
        ngram, best = self.run.ngram_bits_per_byte, number(self.run.status.get("best_val_bits_per_byte"))
        if best is None:
            lowest = self.run.best("val_bits_per_byte")
            best = lowest and lowest[1]
        if ngram is None or best is None or best <= ngram or self.done < LATE:
            return ""
        table = "a byte 5-gram, a table of what follows four bytes"
        return f"it is worse than {table}: {best:.2f} bits per byte against {ngram:.2f}"

    def suited_lr(self) -> float | None:
        """The peak learning rate that suits optimizer, width, architecture and length, where it is one of ours."""
        name, optimizer, dim = self.model.get("name"), self.training.get("optimizer"), number(self.model.get("dim"))
        if name not in models.names() or optimizer not in module_names("optim") or not dim or self.is_lora:
            return None
        steps = round(self.steps / self.done) if self.done and not self.run.config.get("init_from") else None
        return default_lr(str(optimizer), int(dim), models.recipe(str(name)), steps)

    def size_beside(self, step: int) -> str | None:
        """The next larger (1) or smaller (-1) named size."""
        name, size = self.model.get("name"), self.model.get("size")
        sizes = list(models.sizes(str(name))) if name in models.names() else []
        place = sizes.index(size) + step if size in sizes else -1
        return sizes[place] if 0 <= place < len(sizes) else None

    def size_that_helps(self) -> str | None:
        """A larger size, unless this one has learned its text by heart already, or the text is not enough for it."""
        turned, larger = any(event.startswith("validation turned") for event in self.events), self.size_beside(1)
        if turned or larger is None or not self.train_tokens:
            return None
        name, vocab_size = str(self.model.get("name")), number(self.model.get("vocab_size")) or 256
        model = meta_model(name, models.make_config(name, size=larger, vocab_size=int(vocab_size)))
        return larger if has_enough_text(count_parameters(model)["total"], int(self.train_tokens)) else None

    def more_text(self) -> str:
        """The command for a run that its text is too short for: a larger size, or else more text."""
        larger = self.size_that_helps()
        return self.again("--size", larger) if larger else self.again("--filepath", MORE, ("--data",))

    @property
    def length(self) -> tuple[str, str] | None:
        """The option that gave the run its length, and its value; None where nobody did."""
        automatic = mapping(self.run.config.get("automatic"))
        for name in ("max_time", "epochs", "max_steps"):
            if self.training.get(name) is not None and name not in automatic:
                return f"--{name.replace('_', '-')}", str(self.training[name])
        return None

    def again(self, option: str, value: str, dropped: tuple[str, ...] = ()) -> str:
        """The command that made the run, with another value of an option, and the length that it had in the end."""
        command, options = self.run.status.get("command"), {option: value}
        length = None if {option, *dropped} & {*LENGTHS} else self.length
        if length is not None and " ".join(length) not in str(command).replace("=", " "):
            options, dropped = dict([length]) | options, (*dropped, *LENGTHS)
        made = changed_command(command, self.run.folder, options, dropped)
        if made is not None:
            return made
        data = follow(self.run.folder, str(mapping(self.run.config.get("data")).get("folder")))
        shape = [word for key in ("name", "size") if (word := self.model.get(key))]
        named = [word for pair in zip(("--model", "--size"), map(str, shape), strict=False) for word in pair]
        text = [] if "--data" in dropped else ["--data", str(data)]
        return pasteable(["nnx", "train", *named, *text, option, value])

    def longer(self) -> str:
        """The command that trains the run for twice its time."""
        time_s = (self.run.reached("time_s") or 0.0) / max(self.done, HALF)
        return longer_command(self.run.folder, time_s, self.named)


def _learning_rate_too_high(run: _Numbers) -> Finding | None:
    """The run diverged, its loss blew up or jumped again and again, or it had to go back to a checkpoint."""
    course, lr = run.course, number(run.training.get("lr"))
    jumps = sum(event.startswith("loss spike") for event in run.events)
    back = sum(event.startswith("no finite gradient") for event in run.events)
    if course is None or not lr:
        return None
    if course.blew_up:
        evidence = f"its loss, {course.first:.2f} at first, was {course.peak:,.0f} on the way"
    elif run.run.status.get("status") == "diverged":
        evidence = f"the run diverged at step {run.steps:,.0f}"
    elif back:
        evidence = f"it went back to a checkpoint {counted(back, 'time')} for want of finite gradients"
    elif jumps >= SPIKES:
        evidence = f"its loss jumped {counted(jumps, 'time')}"
    else:
        return None
    lower = min(lr * LOWER, run.suited_lr() or lr)
    command = run.again("--lr", f"{lower:.2g}", ("--min-lr",))
    return Finding("lr-too-high", f"{evidence}; a lower learning rate learns more than {lr:g}", command)


def _overfits(run: _Numbers) -> Finding | None:
    """Validation grew worse for the last part of the run, and the training loss did not."""
    course = run.course
    if course is None or course.blew_up or not course.best_step or course.best_step >= LATE * run.steps:
        return None
    if not LEAST_RISE < course.val - course.best_val < float("inf") or course.since_best > 0:
        return None
    since = [loss for step, loss in run.run.series("val_loss") if step > course.best_step]
    if run.is_running and (len(since) < 2 or since[-2] - course.best_val <= LEAST_RISE):
        return None  # it may yet fall
    dropout = number(run.model.get("dropout")) or 0.0
    text = (
        f"it learns its text by heart: training loss {course.recent:.2f}, validation {course.val:.2f}, which was "
        f"{course.best_val:.2f} at step {course.best_step:,.0f} and rose since; more text would help most, then dropout"
    )
    return Finding("overfitting", text, run.again("--dropout", f"{min(MOST_DROPOUT, dropout + 0.1):.1f}"))


def _text_is_used_up(run: _Numbers) -> Finding | None:
    """It ended before its time was up."""
    most, larger = number(run.run.status.get("max_time_s")), run.size_that_helps()
    if not run.is_used_up or not most:
        return None
    left = duration(most - (run.run.reached("time_s") or 0.0))
    text = (
        f"this text has given what it has to a model of this size; more text{f' or --size {larger}' if larger else ''} "
        f"would use the {left} left"
    )
    return Finding("used-up", text, run.more_text())


def _learning_rate_too_low(run: _Numbers) -> Finding | None:
    """It is far below what suits the model, and the loss was still on its way down, or never left that of a guess."""
    lr, suited = number(run.training.get("lr")), run.suited_lr()
    losses = [loss for _, loss in run.run.series("train_loss")]
    if not lr or suited is None or lr > FAR_BELOW * suited or len(losses) < LEAST_LOGGED or not run.is_far:
        return None
    width, middle = max(1, len(losses) // 8), 3 * len(losses) // 4
    last, guess = _mean(losses[-width:]), math.log(max(2.0, number(run.model.get("vocab_size")) or 0.0))
    fell = _mean(losses[middle - width : middle]) - last
    evidence = [run.over_counting] if run.over_counting else []
    if last > GUESSING * guess:
        evidence.insert(0, f"the loss is {last:.2f}, where a guess costs {guess:.2f}")
    elif fell >= STILL_FALLING:
        evidence.insert(0, f"the loss still fell by {fell:.2f} nats in the last quarter")
    if not evidence:
        return None
    text = (
        f"the learning rate is low: {lr:g}, where {suited:g} suits optimizer, width and length, and "
        f"{', and '.join(evidence)}"
    )
    return Finding("lr-too-low", text, run.again("--lr", f"{suited:g}"))


def _worse_than_counting(run: _Numbers) -> Finding | None:
    """It is worse than an n-gram model, and that is not for its learning rate, which has a rule of its own."""
    if not run.over_counting or _learning_rate_too_high(run) or _learning_rate_too_low(run):
        return None
    if _overfits(run):
        command = run.again("--filepath", MORE, ("--data",))
    else:
        command = run.longer() if run.can_go_on else run.more_text()
    return Finding("worse-than-ngram", run.over_counting, command)


def _fp16_skips(run: _Numbers) -> Finding | None:
    """Its loss scale is at work long after it should have found its place."""
    half = run.late("skipped_steps")
    if run.training.get("precision") != "fp16" or len(half) < 2:
        return None
    (begin, before), (end, after) = half[0], half[-1]
    if after - before < max(LEAST_SKIPPED, SKIPPED_SHARE * (end - begin)):
        return None
    text = (
        f"gradients do not fit in fp16: {after - before:,.0f} of the steps {begin:,.0f} to {end:,.0f} were skipped, "
        f"{after:,.0f} in all"
    )
    return Finding("fp16-skips", text, run.again("--precision", "fp32"))


def _waits_for_data(run: _Numbers) -> Finding | None:
    """Reading its samples holds it up."""
    shares = [share for _, share in run.late("data_wait_share")]
    if len(shares) < LEAST_WAITS or run.done < WARM or not WAITING <= _mean(shares) <= 1.0:
        return None
    tokens = Path(str(mapping(run.run.config.get("data")).get("folder"))).name
    text = (
        f"steps waited for data for {100 * _mean(shares):.0f} % of the time: the disk is slow, or the memory too small "
        "to keep what it read; copy the token folder to a faster disk"
    )
    return Finding("waits-for-data", text, run.again("--data", f"FASTER_DISK/{tokens}", TEXT))


def _text_is_repeated(run: _Numbers) -> Finding | None:
    """It was read more often than brought anything in our races."""
    if not run.is_repeated:
        return None
    useful = run.useful_epochs
    text = f"the text was read {run.epochs:,.0f} times; beyond {useful} nothing was gained by a model of this size"
    return Finding("repeated", text, run.again("--epochs", str(useful), (*LENGTHS, "--stop-early")))


def _size_is_far_off(run: _Numbers) -> Finding | None:
    """Its parameters saw too few tokens to be worth their time, or more than they can keep."""
    if not run.parameters or not run.tokens or run.is_lora or not run.is_far or run.epochs is None:
        return None
    tokens = run.tokens / run.done  # that it will have seen in the end
    seen = tokens / run.parameters
    is_large, is_small = seen < TOKENS_PER_PARAMETER, seen > MANY_TOKENS and run.epochs / run.done < FRESH_EPOCHS
    size = run.size_beside(-1 if is_large else 1)
    if not (is_large or is_small) or size is None:
        return None
    by_then = " by its end" if run.is_running else ""
    counts = f"{short(tokens)} tokens{by_then} for {short(run.parameters)} parameters, {seen:.2g} each"
    which = "large for so short a run" if is_large else "small for so much text"
    return Finding("size", f"the model is {which}: {counts}", run.again("--size", size))


def _compiling_does_not_pay(run: _Numbers) -> Finding | None:
    """Compiled because it was asked for, and no faster."""
    found = (re.match(rf"{COMPILED} (\d+)%", event) for event in run.events)
    share = next((int(match[1]) for match in found if match), None)
    if share is None or share < 100 * WORTHWHILE:
        return None
    return Finding(
        "compile", f"compiling does not pay: a step takes {share} % of its time before", run.again("--compile", "off")
    )


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


RULES = (  # each takes the numbers of a run; the most important first
    _learning_rate_too_high,
    _overfits,
    _text_is_used_up,
    _learning_rate_too_low,
    _worse_than_counting,
    _fp16_skips,
    _waits_for_data,
    _text_is_repeated,
    _size_is_far_off,
    _compiling_does_not_pay,
)
