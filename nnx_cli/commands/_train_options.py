"""What `nnx train` takes: its options in the panels of its help, and the request that a command line makes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nnx_cli import models
from nnx_cli.commands._config_file import read_toml
from nnx_cli.commands._options import (
    ARCHITECTURE_HELP,
    DEFAULT_MODEL,
    SIZE_HELP,
    extra,
    given,
    hidden,
    model_fields,
    model_options,
    settings,
)
from nnx_cli.config import Field, PrepareConfig, TrainConfig, check_one_length, coerce, own_fields
from nnx_cli.errors import UsageError

MAIN = "Main options"
PANELS = {  # of the settings that training and preparing have
    "Length and batch": ("epochs", "batch_size", "grad_accum", "tokens_per_step"),
    "Optimizer": (
        "optimizer",
        "lr",
        "schedule",
        "warmup_steps",
        "min_lr",
        "weight_decay",
        "beta2",
        "grad_clip",
        "lora_rank",
        "seed",
    ),
    "Memory and speed": (
        "device",
        "precision",
        "weight_precision",
        "compile",
        "activation_checkpointing",
        "optimizer_in_backward",
        "threads",
        "deterministic",
    ),
    "Watching": (
        "val_every",
        "val_batches",
        "sample_every",
        "sample_prompt",
        "save_every",
        "keep",
        "patience",
    ),
    "Data": ("tokenizer", "val_fraction", "text_key", "encoding", "errors"),
}

# The command line of the original NYX: its spelling of each option, and ours.
ALIASES = {
    "model_dim": "dim",
    "layer_depth": "n_layers",
    "num_attention_heads": "n_heads",
    "num_batches": "max_steps",
    "gradient_accumulate_every": "grad_accum",
    "learning_rate": "lr",
    "validate_every": "val_every",
    "generate_every": "sample_every",
}
NYX_RECIPE = {
    "optimizer": "lion",
    "lr": 1e-4,
    "schedule": "constant",
    "grad_clip": 0.5,
    "weight_decay": 0.0,
    "dropout": 0.0,
}
LENGTHS = {"max_steps", "max_time", "epochs"}
RESUMABLE = ("max_steps", "max_time", "epochs", "device", "threads", "batch_size", "grad_accum", "compile", "vram")
NAMED = (Field("model", "str", None, ""), Field("size", "str", None, ""))  # what a file may give besides settings
SET_BY_A_RUN = frozenset({"model", "size", "filepath", "out", "init_from", "config"})

TRAINING = own_fields(TrainConfig)
PREPARING = tuple(field for field in own_fields(PrepareConfig) if field.name in PANELS["Data"])
OPTIONS = [
    extra("model", str, ARCHITECTURE_HELP, MAIN, DEFAULT_MODEL),
    extra("size", str, SIZE_HELP, MAIN, "auto"),
    extra("filepath", list[str], "Text to train on: a file, folder or glob; may be repeated.", MAIN),
    extra("data", Path, "Token folder made by nnx prepare.", MAIN),
    *settings(TrainConfig, MAIN, only=("max_time", "max_steps", "vram")),
    extra("out", Path, "Run folder to make.", MAIN, "weights/MODEL-STEM"),
    extra("resume", str, "Run to continue: folder, name, or last.", MAIN),
    extra("init_from", str, "MODEL whose shape and weights to start from.", MAIN),
    extra("config", Path, "TOML file with settings; the command line wins.", MAIN),
    extra("dry_run", bool, "Show every value and where it comes from, and stop.", MAIN, False, "--dry-run"),
    *(p for panel, names in PANELS.items() for p in settings((*TRAINING, *PREPARING), panel, only=names)),
    *model_options(),
    *(hidden(name, float if name == "learning_rate" else int) for name in ALIASES),
    hidden("checkpoint_path", str),
    hidden("prime_length", int),
    hidden("generate_length", int),
]


@dataclass(frozen=True, kw_only=True)
class Request:
    """A run as a command line and its `--config` file ask for it."""

    model: str | None
    size: str  # auto where none is asked for
    fields: dict[str, Any]  # of the architecture's Config
    train: TrainConfig
    prepare: PrepareConfig
    sources: dict[str, str]  # where each value that is given comes from
    filepath: list[str]
    data: Path | None
    out: Path | None
    init_from: str | None
    dry_run: bool
    checkpoint: str | None  # of an original, to be imported and started from
    prime_length: int  # tokens of validation text that samples start with
    generate_length: int | None  # tokens of a sample
    note: str | None  # what to say about how the command line is understood


@dataclass(frozen=True, kw_only=True)
class ResumeRequest:
    """A run to go on with, and the settings that are given anew."""

    run: str
    file: Path | None  # of its architecture, where it is the user's
    settings: dict[str, Any]
    data: Path | None
    dry_run: bool


def _all_fields(model: str | None) -> list[Field]:
    """Every setting that a command line or a file may give; `model` may be a file with fields of its own."""
    return [*model_fields(model).values(), *TRAINING, *PREPARING]


def read_request(options: Mapping[str, Any]) -> Request | ResumeRequest:
    """What the options ask for. Raises UsageError where they disagree, or name what the architecture does not have."""
    aliases = {ours: options[theirs] for theirs, ours in ALIASES.items() if options[theirs] is not None}
    filed = _read_config(options["config"], options["model"]) if options["resume"] is None else {}
    settings = given(options, _all_fields(options["model"] or filed.get("model")))
    if twice := aliases.keys() & settings.keys():
        raise UsageError(f"--{twice.pop().replace('_', '-')} is given twice, in two spellings")
    settings |= aliases
    run, checkpoint, fixed = options["resume"], options["checkpoint_path"], SET_BY_A_RUN
    if run is None and checkpoint is not None and not _is_foreign(checkpoint):
        run, fixed = checkpoint, fixed - {"filepath"}  # which the documented commands name every time
    if run is None:
        return _new_request(settings, filed, aliases, options)
    file = options["model"] if options["model"] is not None and models.is_file(options["model"]) else None
    if any(options[name] is not None for name in (fixed if file is None else fixed - {"model"})):
        raise UsageError("--resume takes model, text and settings from the run", fix="leave out what is given besides")
    return _resume_request(run, file, settings, options)


def _resume_request(run: str, file: str | None, settings: dict[str, Any], options: Mapping[str, Any]) -> ResumeRequest:
    for name in settings.keys() - set(RESUMABLE):
        raise UsageError(
            f"--{name.replace('_', '-')} cannot change on --resume", fix="start a new run, maybe with --init-from"
        )
    TrainConfig(**settings)
    check_one_length(settings)
    return ResumeRequest(
        run=run,
        file=None if file is None else Path(file),
        settings=settings,
        data=options["data"],
        dry_run=bool(options["dry_run"]),
    )


def _read_config(path: Path | None, model: str | None) -> dict[str, Any]:
    """The settings of a `--config` file, for the `model` of the command line or else the one that the file names."""
    if path is None:
        return {}
    values = read_toml(path)
    fields = _all_fields(model or str(values.get("model", "")))
    return coerce([*fields, *NAMED], values, f"--config {path}")


def _new_request(
    settings: dict[str, Any], filed: dict[str, Any], aliases: Iterable[str], options: Mapping[str, Any]
) -> Request:
    checkpoint = options["checkpoint_path"]
    recipe = NYX_RECIPE if options["model"] is None and (aliases or checkpoint) else {}
    values, sources = _merge({"recipe: NYX": recipe, f"file: {options['config']}": filed, "command line": settings})
    named = {"model": options["model"], "size": options["size"], "data": options["data"] or options["filepath"]}
    sources |= {name: "command line" for name, value in named.items() if value is not None}
    for field in NAMED:
        values.pop(field.name, None)
    fields, train, prepare = _split(values)
    if options["filepath"] and options["data"]:
        raise UsageError("--filepath and --data: give one, text or tokens")
    return Request(
        model=options["model"] or filed.get("model"),
        size=options["size"] or filed.get("size") or "auto",
        fields=fields,
        train=train,
        prepare=prepare,
        sources=sources,
        filepath=options["filepath"] or [],
        data=options["data"],
        out=options["out"],
        init_from=options["init_from"],
        dry_run=bool(options["dry_run"]),
        checkpoint=checkpoint,
        prime_length=options["prime_length"] or 0,
        generate_length=options["generate_length"],
        note=_recipe_note(options) if recipe else None,
    )


def _recipe_note(options: Mapping[str, Any]) -> str:
    """Why a run follows the recipe of the original NYX."""
    spelling = next(name for name in (*ALIASES, "checkpoint_path") if options[name] is not None)
    recipe = ", ".join(f"{name} {value}" for name, value in NYX_RECIPE.items())
    return f"--{spelling} is the original NYX's spelling, so its recipe holds ({recipe}); without that: --model nyx"


def _is_foreign(checkpoint: str) -> bool:
    """Whether --checkpoint_path names a file of the original rather than a run."""
    return checkpoint.endswith((".pth", ".pt", ".safetensors")) and not Path(checkpoint).is_dir()


def _merge(layers: Mapping[str, Mapping[str, Any]]) -> tuple[dict[str, Any], dict[str, str]]:
    """Settings by where they come from, the later ones winning, as one; and where each came from."""
    values: dict[str, Any] = {}
    sources: dict[str, str] = {}
    for origin, layer in layers.items():
        check_one_length(layer)
        if LENGTHS & layer.keys():  # a length takes the place of another one
            values = {name: value for name, value in values.items() if name not in LENGTHS}
        values |= layer
        sources |= dict.fromkeys(layer, origin)
    return values, sources


def _split(values: dict[str, Any]) -> tuple[dict[str, Any], TrainConfig, PrepareConfig]:
    """Settings by owner: the model's fields, training, preparing."""
    train_names = {field.name for field in TRAINING}
    prepare_names = {field.name for field in PREPARING}
    train = TrainConfig(**{k: v for k, v in values.items() if k in train_names})
    prepare = PrepareConfig(**{k: v for k, v in values.items() if k in prepare_names})
    return {k: v for k, v in values.items() if k not in train_names | prepare_names}, train, prepare
