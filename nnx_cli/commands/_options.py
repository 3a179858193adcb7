"""Options as the settings state them: made from dataclass fields, so that no name, default or help is written twice."""

from __future__ import annotations

import gc
import inspect
import os
import sys
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from nnx_cli import models
from nnx_cli.config import Field, TrainConfig, own_fields
from nnx_cli.console.output import Output
from nnx_cli.errors import DataError, NnxError, UsageError

if TYPE_CHECKING:
    from nnx_cli.models._base import ModelConfig

KEYWORD = inspect.Parameter.KEYWORD_ONLY
KINDS = {"int": int, "float": float, "str": str, "bool": bool, "list[str]": list[str]}
DEFAULT_MODEL = "nyx"
MODEL_PANEL = "Model"
OUTPUT_PANEL = "Output"
SIZES = ", ".join(models.sizes(models.names()[0]))
ARCHITECTURE_HELP = f"Architecture: {', '.join(models.names())}, or a file of yours: my.py."
SIZE_HELP = f"Named size: {SIZES}."
COMMAND_LINE = "command line"  # where a value comes from, in --dry-run
TEXTS = {
    "prompt",
    "sample_prompt",
    "stop",
    "separator",
    "system",
}  # options that hold text; of all others a leading ~ is a home

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

TRAINING = {field.name: field for field in own_fields(TrainConfig)}


def runs_named(incomplete: str) -> list[str]:
    """What a shell completes a MODEL to: names of folders in weights/, those of a race or a sweep by theirs too."""
    folders = [path.parent for depth in ("*", "*/*") for path in Path("weights").glob(f"{depth}/config.json")]
    found = [folder.relative_to("weights") for folder in folders]
    return sorted(path.as_posix() for path in found if path.as_posix().startswith(incomplete))


Model = Annotated[
    str | None,
    typer.Argument(
        help="A run folder or its name, RUN@best, RUN@last, RUN@500, or a quantized folder.",
        show_default="the newest run",
        autocompletion=runs_named,
    ),
]
ModelFile = Annotated[
    Path | None,
    typer.Option(
        "--model", "--bank-file", help="File of its architecture, or of its bank, where that is yours: my.py, bank.py."
    ),
]
Device = Annotated[str, typer.Option(help=TRAINING["device"].sentence)]
Precision = Annotated[str, typer.Option(help=TRAINING["precision"].sentence)]


@dataclass(frozen=True)
class Caller:
    """A program that runs a command: the words of the command line, and what takes the place of its screen."""

    words: Sequence[str]
    screen: Output


CALLER: ContextVar[Caller | None] = ContextVar("caller", default=None)


def typed_words() -> list[str]:
    """The command line behind `nnx`."""
    caller = CALLER.get()
    return sys.argv[1:] if caller is None else [*caller.words]


def option(field: Field, panel: str | None = None) -> inspect.Parameter:
    """The keyword parameter of a setting: None means that it was not given; help shows the default."""
    kind = KINDS[field.type] | None
    names = [f"{field.option}/--no-{field.option[2:]}" if field.type == "bool" else field.option]
    info = typer.Option(*names, help=field.sentence, show_default=shown_default(field), rich_help_panel=panel)
    return inspect.Parameter(field.name, KEYWORD, default=None, annotation=Annotated[kind, info])


def shown_default(field: Field) -> str | bool:
    """The default of a setting for help; False where there is nothing to say, or its help says it."""
    if (field.type == "bool" and not field.default) or (field.default is None and "default" in field.help):
        return False
    if field.type == "bool":
        return f"on; off: --no-{field.option[2:]}"
    return "auto" if field.default is None else str(field.default)


def extra(
    name: str, kind: Any, text: str, panel: str | None = None, default: str | bool = False, *spelling: str, **how: Any
) -> inspect.Parameter:
    """The keyword parameter of an option that is no setting; None where it is not given, `default` is for help, `how`
    what else Typer is told."""
    names = spelling or ("--" + name.replace("_", "-"),)
    info = typer.Option(*names, help=text, show_default=default, rich_help_panel=panel, **how)
    return inspect.Parameter(name, KEYWORD, default=None, annotation=Annotated[kind | None, info])


def hidden(name: str, kind: type) -> inspect.Parameter:
    """A further spelling that help does not list."""
    info = typer.Option("--" + name.replace("_", "-"), hidden=True)
    return inspect.Parameter(name, KEYWORD, default=None, annotation=Annotated[kind | None, info])


def model_options() -> list[inspect.Parameter]:
    """One option for every field of every architecture's `Config`. Help shows those of one, or those that all have."""
    return [option(field, MODEL_PANEL) for field in model_fields().values()]


def model_fields(named: str | None = None) -> dict[str, Field]:
    """Every field of every architecture by its name; shared ones as the base states them, those of a file of the
    user's that is named as they stand there."""
    fields: dict[str, Field] = {}
    own = [named] if named is not None and models.is_file(named) else []
    for name in own + models.names():
        for field in models.config_fields(name):
            fields.setdefault(field.name, field)
    return fields


def settings(
    config: type | Iterable[Field],
    panel: str | None = None,
    without: Iterable[str] = (),
    only: Iterable[str] | None = None,
) -> list[inspect.Parameter]:
    """One option for every field of a settings dataclass, or for those named in `only`, in that order."""
    fields = {field.name: field for field in (own_fields(config) if isinstance(config, type) else config)}
    names = fields.keys() if only is None else only
    return [option(fields[name], panel) for name in names if name not in set(without)]


def given(values: Mapping[str, Any], fields: Iterable[Field]) -> dict[str, Any]:
    """Those of `fields` that were given on the command line."""
    return {field.name: values[field.name] for field in fields if values.get(field.name) not in (None, [])}


class AllBut:
    """Every option but these."""

    def __init__(self, *names: str) -> None:
        self.names = names

    def __contains__(self, name: object) -> bool:
        return name not in self.names


@dataclass(frozen=True)
class Branch:
    """A branch of a command: options that nothing else in it reads, and whether it is `taken` with the values of all
    options. `otherwise` says why they do nothing where it is not, `fix` what to do then. An option in several branches
    is read where all of them are taken, one in none always."""

    reads: Container[str]
    taken: Callable[[Mapping[str, Any]], Any]
    otherwise: str
    fix: str = "leave it out"


def field_branches(config: ModelConfig) -> list[Branch]:
    """The branches of a model: fields of its configuration that change nothing beside its other values."""
    return [Branch({name}, lambda v: False, f"without {option}") for name, option in config.unread().items()]


def check_read(
    branches: Iterable[Branch],
    values: Mapping[str, Any],
    sources: Mapping[str, str],
    aliases: Mapping[str, str] | None = None,
) -> dict[str, str]:
    """Raise UsageError where an option of the command line is read by no branch that is taken with these values.

    `sources` says of every option that was given where it comes from, `aliases` of some how they were spelled. A file
    may serve several commands: of its values that are not read, returns why.
    """
    unread: dict[str, str] = {}
    for branch in branches:
        names = [name for name in sources if name in branch.reads and name not in unread]
        if not names or branch.taken(values):
            continue
        why = f"nothing {branch.otherwise.format_map(values)}"
        if typed := [spelled((aliases or {}).get(name, name)) for name in names if sources[name] == COMMAND_LINE]:
            raise UsageError(f"{' and '.join(typed)} {'does' if len(typed) == 1 else 'do'} {why}", fix=branch.fix)
        unread |= {name: f"{sources[name]}: {name} does {why}" for name in names}
    return unread


def spelled(name: str) -> str:
    """An option as its users type it."""
    return f"--{name if name in ALIASES else name.replace('_', '-')}"


def may_have_rows(paths: Iterable[str]) -> bool:
    """Whether one of the files behind these paths may be a table or JSON lines, by its name."""
    from nnx_cli.data.find import find_sources
    from nnx_cli.data.formats import format_of

    try:
        names = [source.name for source in find_sources([*paths])]
    except NnxError:  # said where it is read
        return True
    return any(format_of(name) not in (".txt", ".md") for name in names)


ROW_FIELDS = ("text_key", "prompt_key", "answer_key")
READING = (*ROW_FIELDS, "encoding", "separator", "errors")  # how text is read that a model is measured on
READING_BRANCHES = (
    Branch(READING, lambda v: v["filepath"], "without --filepath: the validation split is read already"),
    Branch(ROW_FIELDS, lambda v: may_have_rows(v["filepath"]), "with plain text: it names a field of rows"),
)


def at_home(value: Any, name: str = "") -> Any:
    """The value of an option, of a list each: a path that begins with ~ or ~user in that home."""
    if isinstance(value, list):
        return [at_home(each, name) for each in value]
    if name in TEXTS or not isinstance(value, (str, Path)):
        return value
    return type(value)(os.path.expanduser(value))


def _check_current_folder() -> None:
    """Raise DataError where the current folder was deleted: nothing is found or made there, and torch dies of it."""
    try:
        os.getcwd()
    except FileNotFoundError as error:
        raise DataError("the current folder was deleted", fix="cd ~") from error


def command(
    *extra: inspect.Parameter, branches: Sequence[Branch] = ()
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """A Typer command of `function(output, ...)`: its own parameters, those in `extra` (passed as keywords), and the
    common ones. Raises UsageError for an option that none of the `branches` reads which are taken."""

    def decorate(function: Callable[..., None]) -> Callable[..., None]:
        signature = inspect.signature(function, eval_str=True)
        own = [p for p in list(signature.parameters.values())[1:] if p.kind is not inspect.Parameter.VAR_KEYWORD]
        common = [
            inspect.Parameter(
                name,
                KEYWORD,
                default=False,
                annotation=Annotated[bool, typer.Option(f"--{name}", help=text, rich_help_panel=OUTPUT_PANEL)],
            )
            for name, text in (
                ("json", "Print the result as JSON."),
                ("quiet", "Print the result only, no progress and no notes."),
                ("debug", "Show the traceback of an error."),
            )
        ]

        parameters = [p.replace(kind=KEYWORD) for p in [*own, *extra, *common]]
        defaults = {p.name: p.default for p in parameters}

        def run(*, json: bool, quiet: bool, debug: bool, **options: Any) -> None:
            options = {name: at_home(value, name) for name, value in options.items()}
            given = [name for name, value in options.items() if value not in (None, [], defaults.get(name))]
            check_read(branches, options, dict.fromkeys(given, COMMAND_LINE))
            _check_current_folder()
            if not gc.isenabled():  # since the start of the process: what is there by now stays
                gc.freeze()
                gc.enable()
            caller = CALLER.get()
            function(Output(json=json, quiet=quiet or json) if caller is None else caller.screen, **options)

        run.__doc__ = function.__doc__
        run.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]  # what Typer reads
        run.__annotations__ = {p.name: p.annotation for p in parameters}
        return run

    return decorate
