"""What `nnx train` takes: its options in the panels of its help, and the request that a command line makes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from nnx_cli import models
from nnx_cli.commands._config_file import read_toml
from nnx_cli.commands._options import (
    ALIASES,
    ARCHITECTURE_HELP,
    COMMAND_LINE,
    DEFAULT_MODEL,
    READING,
    ROW_FIELDS,
    SIZE_HELP,
    AllBut,
    Branch,
    at_home,
    check_read,
    extra,
    given,
    hidden,
    may_have_rows,
    model_fields,
    model_options,
    runs_named,
    settings,
)
from nnx_cli.commands._ranks import is_started
from nnx_cli.config import (
    LENGTHS,
    MILESTONES,
    Field,
    PrepareConfig,
    TrainConfig,
    check_choice,
    check_one_length,
    coerce,
    module_names,
    own_fields,
)
from nnx_cli.errors import UsageError

MAIN = "Main options"
PANELS = {  # of the settings that training and preparing have
    "Length and batch": ("epochs", "stop_early", "batch_size", "grad_accum", "tokens_per_step", "short_sequences"),
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
        "parallel",
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
        "report",
        "watch",
        "log_to",
    ),
    "Data": ("tokenizer", "val_fraction", *READING),
}

# The recipe of the original NYX, whose spelling of options is ALIASES.
NYX_RECIPE = {
    "optimizer": "lion",
    "lr": 1e-4,
    "schedule": "constant",
    "grad_clip": 0.5,
    "weight_decay": 0.0,
    "dropout": 0.0,
}
SMALLER_PATIENCE = "take a smaller --patience or --val-every"
RESUMABLE = (
    *LENGTHS,
    "warmup_steps",
    "device",
    "threads",
    "batch_size",
    "grad_accum",
    "compile",
    "vram",
    "log_to",
    "parallel",
)
NAMED = (Field("model", "str", None, ""), Field("size", "str", None, ""))  # what a file may give besides settings
TRAINING = own_fields(TrainConfig)
PREPARING = tuple(field for field in own_fields(PrepareConfig) if field.name in PANELS["Data"])
GPUS_HELP = (
    "Number of GPUs of this machine to train on, or all: the same run on any number. With --dropout, what is dropped "
    "follows seed, step and GPU."
)


def _resumable(incomplete: str) -> list[str]:
    """What a shell completes --resume to."""
    return [name for name in ("last", *runs_named(incomplete)) if name.startswith(incomplete)]


OPTIONS = [
    extra("model", str, ARCHITECTURE_HELP, MAIN, DEFAULT_MODEL),
    extra("size", str, SIZE_HELP, MAIN, "auto"),
    extra("filepath", list[str], "Text to train on: a file, folder or glob; may be repeated.", MAIN),
    extra("data", Path, "Token folder made by nnx prepare.", MAIN),
    *settings(TrainConfig, MAIN, only=("max_time", "max_steps", "vram")),
    extra("out", Path, "Run folder to make.", MAIN, "weights/MODEL-STEM"),
    extra("resume", str, "Run to continue: folder, name, or last.", MAIN, autocompletion=_resumable),
    extra("init_from", str, "MODEL whose shape and weights to start from.", MAIN, autocompletion=runs_named),
    extra("config", Path, "TOML file with settings; the command line wins.", MAIN),
    extra("dry_run", bool, "Show the plan, every value and where it comes from, and stop.", MAIN, False, "--dry-run"),
    *(p for panel, names in PANELS.items() for p in settings((*TRAINING, *PREPARING), panel, only=names)),
    extra("gpus", str, GPUS_HELP, "Memory and speed", "1"),
    *model_options(),
    *(hidden(name, float if name == "learning_rate" else int) for name in ALIASES),
    hidden("checkpoint_path", str),
    hidden("prime_length", int),
    hidden("generate_length", int),
]


def _resumes(options: Mapping[str, Any]) -> bool:
    """Whether a run is gone on with."""
    checkpoint = options["checkpoint_path"]
    return options["resume"] is not None or (checkpoint is not None and not _is_foreign(checkpoint))


def _averages_squares(options: Mapping[str, Any]) -> bool:
    """Whether the optimizer has a beta2, or is not chosen yet."""
    name = options["optimizer"] or "auto"
    check_choice("optimizer", name, ("auto", *module_names("optim")))
    from nnx_cli.optim._build import defaults

    return name == "auto" or defaults(name).beta2


def _can_lose_patience(options: Mapping[str, Any]) -> bool:
    """Whether so many validations without a better one can come before the last one, as far as that is known."""
    before = options["patience"] + 1  # the first one is always the best so far
    steps = options["max_steps"] or math.inf
    if options["val_every"] is None:
        return before < min(len(MILESTONES), steps)
    return before * options["val_every"] < steps


KEPT = "on --resume: a run keeps what it began with"
BEGIN_ANEW = "leave it out, or start a new run with --init-from MODEL"
BETA2 = Branch({"beta2"}, _averages_squares, "with --optimizer {optimizer}, which averages no squared gradients")
BRANCHES = (
    Branch(
        AllBut("resume", "checkpoint_path", "filepath", "model", "bank_file", "data", "dry_run", "gpus", *RESUMABLE),
        lambda v: not _resumes(v),
        KEPT,
        BEGIN_ANEW,
    ),
    Branch(
        {"warmup_steps"},
        lambda v: not _resumes(v) or any(v[name] is not None for name in LENGTHS),
        "on --resume without a new length",
    ),
    Branch({"model"}, lambda v: not _resumes(v) or models.is_file(v["model"]), KEPT, BEGIN_ANEW),
    Branch({"checkpoint_path"}, lambda v: v["resume"] is None, "beside --resume"),
    # the documented commands name the text every time
    Branch({"filepath"}, lambda v: v["resume"] is None, KEPT, "leave it out; text that moved: --data FOLDER"),
    Branch({"init_from"}, lambda v: v["checkpoint_path"] is None, "beside --checkpoint_path"),
    Branch({"val_fraction"}, lambda v: v["data"] is None, "with --data: the token folder is split already"),
    Branch(READING, lambda v: v["data"] is None, "with --data: the text is read already"),
    Branch(
        {*ROW_FIELDS, "encoding", "errors"}, lambda v: v["filepath"], "without --filepath: the built-in text is plain"
    ),
    Branch(ROW_FIELDS, lambda v: may_have_rows(v["filepath"]), "with plain text: it names a field of rows"),
    Branch(
        {"stop_early"},
        lambda v: v["max_steps"] is None and v["epochs"] is None,
        "with --max-steps or --epochs: they are trained in full",
    ),
    Branch({"min_lr"}, lambda v: v["schedule"] != "constant", "with --schedule constant: the rate never falls"),
    BETA2,
    Branch({"parallel"}, lambda v: v["gpus"] is not None or is_started(), "on one GPU", "add --gpus N"),
    Branch(
        {"sample_prompt", "prime_length", "generate_length"},
        lambda v: v["sample_every"] != 0,
        "with --sample-every 0: no sample is drawn",
    ),
    Branch({"sample_prompt"}, lambda v: not v["prime_length"], "beside --prime_length: samples begin with that"),
    Branch({"patience"}, _can_lose_patience, "here: the run ends before it has as many validations", SMALLER_PATIENCE),
)


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
    gpus: str | None  # to be started
    checkpoint: str | None  # of an original, to be imported and started from
    prime_length: int  # tokens of validation text that samples start with
    generate_length: int | None  # tokens of a sample
    notes: list[str]  # what to say about how the command line is understood

    @property
    def file(self) -> Path | None:
        """The file of the user's whose code the model runs."""
        is_own = self.model is not None and models.is_file(self.model)
        named = self.model if is_own else self.fields.get("bank_file")
        return None if named is None else Path(named)


@dataclass(frozen=True, kw_only=True)
class ResumeRequest:
    """A run to go on with, and the settings that are given anew."""

    run: str
    file: Path | None  # of its architecture, where it is the user's
    settings: dict[str, Any]
    data: Path | None
    dry_run: bool
    gpus: str | None


def _all_fields(model: str | None) -> list[Field]:
    """Every setting that a command line or a file may give; `model` may be a file with fields of its own."""
    return [*model_fields(model).values(), *TRAINING, *PREPARING]


def read_request(options: Mapping[str, Any]) -> Request | ResumeRequest:
    """What the options ask for. Raises UsageError where they disagree, or name what the architecture does not have."""
    aliases = {ours: theirs for theirs, ours in ALIASES.items() if options[theirs] is not None}
    filed = _read_config(options["config"], options["model"]) if options["resume"] is None else {}
    settings = given(options, _all_fields(options["model"] or filed.get("model")))
    if twice := aliases.keys() & settings.keys():
        raise UsageError(f"--{twice.pop().replace('_', '-')} is given twice, in two spellings")
    settings |= {ours: options[theirs] for ours, theirs in aliases.items()}
    if not _resumes(options):
        return _new_request(settings, filed, aliases, options)
    check_read(BRANCHES, options, dict.fromkeys((*settings, *_given_besides(options)), COMMAND_LINE), aliases)
    file = options["model"] or settings.pop("bank_file", None)  # whose code it runs: nothing else is read of a model
    return _resume_request(options["resume"] or options["checkpoint_path"], file, settings, options)


def _resume_request(run: str, file: str | None, settings: dict[str, Any], options: Mapping[str, Any]) -> ResumeRequest:
    TrainConfig(**settings)
    check_one_length(settings)
    return ResumeRequest(
        run=run,
        file=None if file is None else Path(file),
        settings=settings,
        data=options["data"],
        dry_run=bool(options["dry_run"]),
        gpus=options["gpus"],
    )


def _read_config(path: Path | None, model: str | None) -> dict[str, Any]:
    """The settings of a `--config` file, for the `model` of the command line or else the one that the file names."""
    if path is None:
        return {}
    values = read_toml(path)
    fields = _all_fields(model or str(values.get("model", "")))
    return {name: at_home(value, name) for name, value in coerce([*fields, *NAMED], values, f"--config {path}").items()}


def _new_request(
    settings: dict[str, Any], filed: dict[str, Any], aliases: Mapping[str, str], options: Mapping[str, Any]
) -> Request:
    checkpoint = options["checkpoint_path"]
    recipe = NYX_RECIPE if options["model"] is None and (aliases or checkpoint) else {}
    values, sources = _merge({"recipe: NYX": recipe, f"file: {options['config']}": filed, COMMAND_LINE: settings})
    named = {"model": options["model"], "size": options["size"], "data": options["data"] or options["filepath"]}
    sources |= {name: COMMAND_LINE for name, value in named.items() if value is not None}
    besides = dict.fromkeys(_given_besides(options), COMMAND_LINE)
    unread = check_read(BRANCHES, {**options, **values}, sources | besides, aliases)
    fields, train, prepare = _split({k: v for k, v in values.items() if k not in {"model", "size", *unread}})
    sources = {name: origin for name, origin in sources.items() if name not in unread}
    if recipe and "tokenizer" not in values:
        prepare = replace(prepare, tokenizer="byte")
    if prepare.tokenizer in ("auto", "bpe"):
        prepare = replace(prepare, vocab_size=fields.get("vocab_size"))
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
        gpus=options["gpus"],
        checkpoint=checkpoint,
        prime_length=options["prime_length"] or 0,
        generate_length=options["generate_length"],
        notes=[*([_recipe_note(options)] if recipe else []), *unread.values()],
    )


def _given_besides(options: Mapping[str, Any]) -> list[str]:
    """Options of the command line that are no settings."""
    names = {field.name for field in _all_fields(options["model"])} | ALIASES.keys()
    return [name for name, value in options.items() if name not in names and value not in (None, [])]


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
        if any(name in layer for name in LENGTHS):  # a length takes the place of another one
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
