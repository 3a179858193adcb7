"""What `nnx sweep` takes: its options in the panels of its help, and the sweep that a command line and its files ask
for."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nnx_cli import models
from nnx_cli.commands._options import (
    ALIASES,
    ARCHITECTURE_HELP,
    COMMAND_LINE,
    DEFAULT_MODEL,
    SIZE_HELP,
    Branch,
    check_read,
    extra,
    given,
    model_fields,
    model_options,
    runs_named,
    settings,
)
from nnx_cli.commands._train_options import NAMED, PANELS, PREPARING, TRAINING, Request, ResumeRequest, read_request
from nnx_cli.commands._train_options import OPTIONS as OPTIONS_OF_TRAIN
from nnx_cli.config import LENGTHS, Field, SweepConfig, TrainConfig, check_choice, own_fields
from nnx_cli.errors import UsageError

if TYPE_CHECKING:
    from nnx_cli.experiments.search_space import Choice, Range

MAIN = "Main options"
NO_OPTION = (  # of training, that trials have not
    *("keep", "report", "watch", "log_to", "stop_early", "sample_every", "sample_prompt", "gpus", "parallel"),
)
SAME_FOR_ALL = ("device", "threads", "vram", "deterministic")  # trials are compared under them
BUDGET = "2m"
SWEEPING = own_fields(SweepConfig)
OPTIONS = [
    extra("set", list[str], "Setting to search: NAME=LOW..HIGH, NAME=LOW..HIGH:log, NAME=A,B,C; repeat it.", MAIN),
    *settings(SweepConfig, MAIN),
    extra("wandb_yaml", Path, "Search what this sweep of Weights & Biases names.", MAIN),
    extra("filepath", list[str], "Text to train on: a file, folder or glob; may be repeated.", MAIN),
    extra("data", Path, "Token folder made by nnx prepare.", MAIN),
    extra("model", str, ARCHITECTURE_HELP, MAIN, DEFAULT_MODEL),
    extra("size", str, SIZE_HELP, MAIN, "auto"),
    extra("out", Path, "Folder of the sweep: a new one, or one to resume.", MAIN, "weights/sweep-STEM"),
    extra("init_from", str, "MODEL whose shape and weights to start from.", MAIN, autocompletion=runs_named),
    extra("config", Path, "TOML file with settings of training; the command line wins.", MAIN),
    *settings(TrainConfig, "Length and batch", only=("max_time", "max_steps")),
    *(
        option
        for panel, names in PANELS.items()
        for option in settings((*TRAINING, *PREPARING), panel, NO_OPTION, names)
    ),
    *settings(TrainConfig, "Memory and speed", only=("vram",)),
    *model_options(),
]
BRANCHES = (
    Branch({"trials"}, lambda v: v["sampler"] != "grid", "with --sampler grid: all combinations are tried"),
    Branch({"eta"}, lambda v: v["sampler"] == "halving", "without --sampler halving"),
)


@dataclass(frozen=True)
class Asked:
    """A sweep as a command line and its files ask for it."""

    request: Request  # of all trials, in which nothing is chosen yet
    config: SweepConfig
    space: dict[str, Choice | Range]
    length: dict[str, Any]  # of a trial: max_steps, max_time, epochs or tokens; empty where it is searched
    out: Path | None


def read_sweep_request(options: Mapping[str, Any]) -> tuple[Asked, list[str]]:
    """What the options ask for, and notes on it. Raises UsageError where they disagree."""
    typed = given(options, SWEEPING)
    of_training = {name: value for name, value in options.items() if name not in typed}
    request = read_request({p.name: of_training.get(p.name) for p in OPTIONS_OF_TRAIN})
    assert not isinstance(request, ResumeRequest)  # no such option here
    space, filed, notes = _searched(options, request)
    config = SweepConfig(**(filed | typed))
    sources = dict.fromkeys(filed, f"file: {options['wandb_yaml']}") | dict.fromkeys(typed, COMMAND_LINE)
    notes += check_read(BRANCHES, {"sampler": config.sampler}, sources).values()
    for name in space.keys() & request.sources.keys():
        if request.sources[name] == COMMAND_LINE:
            raise UsageError(f"{name} is searched and given: --{name.replace('_', '-')}", fix="leave one out")
    return Asked(request, config, space, _length(config, request, space), options["out"]), notes


def _searched(
    options: Mapping[str, Any], request: Request
) -> tuple[dict[str, Choice | Range], dict[str, Any], list[str]]:
    """What is searched, settings of the sweep from a file, and notes on that. Raises UsageError for settings that are
    none, with the nearest one, and for values that they cannot have."""
    from nnx_cli.experiments.search_space import parse_setting

    fields = _fields(request)
    space, filed, notes = {}, {}, []
    if options["wandb_yaml"] is not None:
        from nnx_cli.commands._wandb_sweep import read_wandb_sweep

        read = read_wandb_sweep(options["wandb_yaml"], fields)
        fixed = {name for name, source in request.sources.items() if source == COMMAND_LINE}
        space = {name: each for name, each in read.space.items() if name not in fixed}
        filed, notes = read.settings, read.notes
    named = [parse_setting(text, fields) for text in options["set"] or []]
    names = [name for name, _ in named]
    if twice := [name for name in names if names.count(name) > 1]:
        raise UsageError(f"--set names {twice[0]} twice", fix=f"write all of its values in one: --set {twice[0]}=A,B")
    space |= dict(named)
    if not space:
        raise UsageError("nothing to search", fix="name a setting: --set lr=1e-3..3e-2:log")
    _check_values(request, space)
    return space, filed, notes


def _check_values(request: Request, space: Mapping[str, Choice | Range]) -> None:
    """Raise UsageError for a value that no trial could have, whatever its other settings."""
    for name, each in space.items():
        for value in each.ends:
            with_settings(request, {name: value})
    named = [str(value) for value in space["model"].ends] if "model" in space else [request.model or DEFAULT_MODEL]
    for model in named:
        models.check_name(model)
    for size in space["size"].ends if "size" in space else ():
        check_choice(
            "size", str(size), ("auto", *dict.fromkeys(size for model in named for size in models.sizes(model)))
        )


def _fields(request: Request) -> dict[str, Field | None]:
    """Settings that may be searched, by every name that they have; None for those that are the same for all trials."""
    fields: dict[str, Field | None] = {**model_fields(request.model)}
    fields |= {field.name: field for field in (*NAMED, *TRAINING) if field.name not in NO_OPTION}
    fields |= dict.fromkeys((*SAME_FOR_ALL, "vocab_size", *(field.name for field in PREPARING)))
    return fields | {alias: fields[name] for alias, name in ALIASES.items() if name in fields}


def _length(config: SweepConfig, request: Request, space: Iterable[str]) -> dict[str, Any]:
    """The length of a trial. Raises UsageError for two."""
    lengths = {name: value for name in LENGTHS if (value := getattr(request.train, name)) is not None}
    searched = [name for name in LENGTHS if name in space]
    named = [f"--{name.replace('_', '-')}" for name in lengths] + [f"--set {name}" for name in searched]
    budget = config.length()
    if len(named) + (budget is not None) > 1:
        words = [*(["--budget"] if budget else []), *named]
        raise UsageError(f"two lengths: {' and '.join(words)}; give one")
    if named:
        return lengths
    name, amount = budget or replace(config, budget=BUDGET).length() or ("", 0.0)
    return {name: f"{amount:g}s" if name == "max_time" else int(amount)}


def with_settings(request: Request, chosen: Mapping[str, Any]) -> Request:
    """What is asked for of a trial with these settings. Raises UsageError where they disagree."""
    training = {field.name for field in TRAINING}
    named = {name: value for name, value in chosen.items() if name in ("model", "size")}
    train = {name: value for name, value in chosen.items() if name in training}
    fields = {name: value for name, value in chosen.items() if name not in training | named.keys()}
    return replace(
        request,
        train=replace(request.train, **train),
        fields=request.fields | fields,
        sources=request.sources | dict.fromkeys(chosen, "sweep"),
        **named,
    )
