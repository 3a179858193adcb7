"""Who runs in a race: architectures in shapes of one size, and the plans of their runs."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from nnx_cli import models
from nnx_cli.config import RaceConfig, TrainConfig, module_names, parse_count
from nnx_cli.data.token_folder import TokenFolder
from nnx_cli.errors import DataError, DoesNotFit, UsageError, counted
from nnx_cli.models._check import check_model
from nnx_cli.planning.fit import check_batch_shape
from nnx_cli.planning.flops import meta_model, training_flops
from nnx_cli.planning.match import Match, match_shape, size_target
from nnx_cli.planning.plan import Plan, plan_run
from nnx_cli.planning.recipe.training import default_tokens_per_step

CPU_PARAMETERS = 300_000  # two architectures, two seeds and a million tokens take minutes on two cores
GPU_SIZE = "tiny"
VALIDATIONS = 20  # of a run whose steps are known beforehand
VALIDATION_TOKENS = 2**13  # that each reads at least; they are no part of the budget
LEAST_STEPS = {"tokens": 10, "time": 50, "flops": 50}  # fewer make no curve; of 50, a step is 2 % of the budget


@dataclass(frozen=True)
class Entrant:
    """A competitor: its shape, what is asked of its runs, and their plan; without one `problem` says why."""

    model: str  # an architecture, or a file of the user's
    match: Match
    flops: int  # of training, a token
    asked: TrainConfig
    plan: Plan | None
    problem: str | None = None
    optimizer: str | None = None  # where `--models` names one

    @property
    def name(self) -> str:
        """What it is called."""
        return models.stem(self.model) + (f"+{self.optimizer}" if self.optimizer else "")

    @property
    def spec(self) -> str:
        """How `--models` names it."""
        return self.model + (f"+{self.optimizer}" if self.optimizer else "")

    @property
    def file(self) -> Path | None:
        """Its file, where it is the user's."""
        return Path(self.model) if models.is_file(self.model) else None


@dataclass(frozen=True)
class Field:
    """All that the runs of a race share, and who runs."""

    config: RaceConfig
    target: int  # parameters outside the tables
    seq_len: int
    tokens_per_step: int
    data: TokenFolder
    device: torch.device
    precision: str
    entrants: tuple[Entrant, ...] = ()
    texts: tuple[TokenFolder, ...] = ()  # of --task plasticity, in turn; `data` is the first
    val_windows: int | None = None  # that every validation reads, the same in all runs; None: the whole text

    def expected_tokens(self, entrant: Entrant) -> float:
        """What a run of a competitor sees, on a device of this kind about."""
        steps = entrant.asked.max_steps
        if steps or entrant.plan is None:
            return (steps or 0) * self.tokens_per_step
        return entrant.plan.tokens_per_s * self.config.amount()

    def plan(self, model: str, match: Match, asked: TrainConfig, dropout: float | None = None) -> Plan:
        """The plan of a run of that shape, as its architecture's recipe has it. Raises DoesNotFit."""
        return _with_validation(self.draft(model, match, asked, dropout), self.val_windows)

    def draft(self, model: str, match: Match, asked: TrainConfig, dropout: float | None = None) -> Plan:
        """`plan` with a validation of its own. Raises DoesNotFit."""
        fields = {key: value for key, value in asdict(match.config).items() if key != "dropout"}
        plan = plan_run(
            model,
            None,
            fields if dropout is None else fields | {"dropout": dropout},
            asked,
            vocab_size=self.data.vocab_size,
            train_tokens=len(self.data.train),
            val_tokens=len(self.data.val),
            device=self.device,
            precision=self.precision,
            sources={},
            may_halve=self.config.task == "text" and self.data.mask is None,
        )
        return replace(plan, size=match.size)


def _with_validation(plan: Plan, windows: int | None) -> Plan:
    """A plan with so many windows in a validation."""
    assert plan.train.batch_size is not None
    n_batches = None if windows is None else -(-windows // plan.train.batch_size)
    return replace(plan, train=replace(plan.train, val_batches=n_batches))


def _val_windows(plans: Sequence[Plan], seq_len: int) -> int | None:
    """Windows of a validation: as many as any of the plans has, enough for a smooth curve, and the same text for all,
    whatever the size of their batches. None: the whole text."""
    batches = [(plan.train.batch_size or 1, plan.train.val_batches) for plan in plans]
    wanted = [VALIDATION_TOKENS // seq_len, *(size * count for size, count in batches if count is not None)]
    if len(wanted) <= len(batches):
        return None
    whole = math.lcm(*(size for size, _ in batches))
    return -(-max(wanted) // whole) * whole


def _split(spec: str) -> tuple[str, str | None]:
    """An architecture, and the optimizer that `--models` names with it."""
    name, plus, optimizer = spec.rpartition("+")
    return (name, optimizer) if plus and optimizer in module_names("optim") else (spec, None)


def competitors_of(text: str) -> list[str]:
    """The architectures that `--models` names, with their optimizers. Raises UsageError for one that is none, or is
    named twice."""
    words = text.replace(",", " ").split()
    names = models.names() if words == ["all"] else words
    for name, optimizer in map(_split, names):
        if "+" in name and not optimizer and name.partition("+")[0] in models.names():
            raise UsageError(
                f"--models: there is no optimizer {name.partition('+')[2]!r}",
                fix=f"choose from {', '.join(module_names('optim'))}",
            )
        models.check_name(name)
    called = [models.stem(name) + (f"+{optimizer}" if optimizer else "") for name, optimizer in map(_split, names)]
    if twice := [name for name in called if called.count(name) > 1]:
        raise UsageError(f"--models names {twice[0]} twice", fix="name each architecture once")
    if len(names) < 2:
        raise UsageError("--models names fewer than two: nothing to compare", fix="write it like --models llama,nyx")
    return names


def target_of(config: RaceConfig, device: torch.device) -> int:
    """Parameters outside the tables that all competitors are to have. Raises UsageError for an unknown size."""
    if (count := parse_count("parameters", config.parameters)) is not None:
        return count
    if config.size is None and device.type == "cpu":
        return CPU_PARAMETERS
    return size_target(config.size or GPU_SIZE)


def enter(
    config: RaceConfig,
    train: TrainConfig,
    target: int,
    seq_len: int,
    data: TokenFolder,
    device: torch.device,
    precision: str,
) -> Field:
    """Choose shapes of one size and plan their runs. `train` has what was asked for of all of them.

    Raises UsageError for a size that an architecture cannot have, or a budget that is too small; DataError for a text
    that is too short, or of which nobody knows how many bytes its tokens are.
    """
    if data.tokenizer is None:
        raise DataError(f"bits per byte of {data.path} need its tokenizer", fix="name it: --tokenizer FILE")
    specs = competitors_of(config.models)
    names = [*dict.fromkeys(name for name, _ in map(_split, specs))]
    shapes = {name: match_shape(name, target, vocab_size=data.vocab_size, seq_len=seq_len) for name in names}
    for name, match in shapes.items():
        check_model(name, match.config)
    networks = {name: meta_model(name, match.config) for name, match in shapes.items()}
    tokens_per_step = train.tokens_per_step
    if tokens_per_step is None:
        most = max(default_tokens_per_step(network, device) for network in networks.values())
        tokens_per_step = max(1, most // seq_len) * seq_len
    train = replace(train, tokens_per_step=tokens_per_step, sample_every=0, stop_early="off")
    check_batch_shape(train, seq_len)
    field = Field(config, target, seq_len, tokens_per_step, data, device, precision)
    costs = {name: training_flops(name, match.config) for name, match in shapes.items()}
    entrants = [*_entrants(field, specs, shapes, costs, train)]
    windows = _val_windows([plan for entrant in entrants if (plan := entrant.plan) is not None], seq_len)
    alike = (replace(e, plan=e.plan and _with_validation(e.plan, windows)) for e in entrants)
    return replace(field, val_windows=windows, entrants=tuple(alike))


def _entrants(
    field: Field, specs: Sequence[str], shapes: dict[str, Match], costs: dict[str, int], train: TrainConfig
) -> Iterable[Entrant]:
    """Competitors with the plans of their runs, which end where the budget does."""
    config = field.config
    for name, optimizer in map(_split, specs):
        match = shapes[name]
        asked = _with_length(train if optimizer is None else replace(train, optimizer=optimizer), config, costs[name])
        try:
            plan = field.draft(name, match, asked)
        except DoesNotFit as error:
            yield Entrant(name, match, costs[name], asked, None, str(error), optimizer)
            continue
        if config.equal == "time":
            _check_steps(
                config, int(config.amount() * plan.tokens_per_s / field.tokens_per_step), field.tokens_per_step
            )
        yield Entrant(name, match, costs[name], asked, plan, optimizer=optimizer)


def _with_length(train: TrainConfig, config: RaceConfig, flops: int) -> TrainConfig:
    """The settings of a run that ends where its budget does. Raises UsageError where that is too soon."""
    amount, tokens_per_step = config.amount(), train.tokens_per_step
    assert tokens_per_step is not None
    if config.equal == "time":
        return replace(train, max_time=f"{amount:f}s")
    steps = int(amount // tokens_per_step) if config.equal == "tokens" else round(amount / (flops * tokens_per_step))
    _check_steps(config, steps, tokens_per_step)
    return replace(train, max_steps=steps, val_every=max(1, steps // VALIDATIONS))


def _check_steps(config: RaceConfig, steps: int, tokens_per_step: int) -> None:
    """Raise UsageError for a budget that has too few steps."""
    least = LEAST_STEPS[config.equal]
    if steps < least:
        raise UsageError(
            f"--budget {config.budget} is too small for an evaluation: {counted(steps, 'step')} of "
            f"{tokens_per_step:,} tokens, and it needs {least}",
            fix="give a larger --budget, or a smaller --tokens-per-step",
        )
