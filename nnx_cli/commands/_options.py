"""Options as the settings state them: made from dataclass fields, so that no name, default or help is written twice."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Annotated, Any

import typer

from nnx_cli import models
from nnx_cli.config import Field
from nnx_cli.console import Output

KEYWORD = inspect.Parameter.KEYWORD_ONLY
KINDS = {"int": int, "float": float, "str": str, "bool": bool}


def option(field: Field, panel: str | None = None, note: str = "") -> inspect.Parameter:
    """The keyword parameter of a setting: None means that it was not given; help shows the default."""
    kind = KINDS[field.type] | None
    shown = "auto" if field.default is None else str(field.default)
    names = [f"{field.option}/--no-{field.option[2:]}" if field.type == "bool" else field.option]
    info = typer.Option(*names, help=field.help + note, show_default=shown, rich_help_panel=panel)
    return inspect.Parameter(field.name, KEYWORD, default=None, annotation=Annotated[kind, info])


def hidden(name: str, kind: type, spelling: str | None = None) -> inspect.Parameter:
    """A further spelling that help does not list."""
    info = typer.Option(spelling or "--" + name.replace("_", "-"), hidden=True)
    return inspect.Parameter(name, KEYWORD, default=None, annotation=Annotated[kind | None, info])


def model_options() -> list[inspect.Parameter]:
    """One option for every field of every architecture's `Config`; help says whose it is."""
    owners: dict[str, list[str]] = {}
    fields: dict[str, Field] = {}
    for name in models.names():
        for field in models.config_fields(name):
            owners.setdefault(field.name, []).append(name)
            fields.setdefault(field.name, field)
    return [
        option(field, "Model", "" if len(owners[name]) == len(models.names()) else f" ({', '.join(owners[name])})")
        for name, field in fields.items()
    ]


def model_fields() -> dict[str, Field]:
    """Every field of every architecture by its name."""
    return {field.name: field for name in models.names() for field in models.config_fields(name)}


def settings(
    config: type | Iterable[Field], panel: str | None = None, without: Iterable[str] = ()
) -> list[inspect.Parameter]:
    """One option for every field of a settings dataclass."""
    from nnx_cli.config import own_fields

    fields = own_fields(config) if isinstance(config, type) else config
    return [option(field, panel) for field in fields if field.name not in set(without)]


def given(values: Mapping[str, Any], fields: Iterable[Field]) -> dict[str, Any]:
    """Those of `fields` that were given on the command line."""
    return {field.name: values[field.name] for field in fields if values.get(field.name) is not None}


def command(*extra: inspect.Parameter) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """A Typer command of `function(output, ...)`: its own parameters, those in `extra` (passed as keywords), and the
    common ones."""

    def decorate(function: Callable[..., None]) -> Callable[..., None]:
        signature = inspect.signature(function, eval_str=True)
        own = [p for p in list(signature.parameters.values())[1:] if p.kind is not inspect.Parameter.VAR_KEYWORD]
        common = [
            inspect.Parameter(name, KEYWORD, default=False, annotation=Annotated[bool, typer.Option(flag, help=text)])
            for name, flag, text in (
                ("json", "--json", "Print the result as JSON."),
                ("quiet", "--quiet", "Print the result only, no progress and no notes."),
                ("debug", "--debug", "Show the traceback of an error."),
            )
        ]

        @functools.wraps(function)
        def run(*args: Any, json: bool, quiet: bool, debug: bool, **options: Any) -> None:
            function(Output(json=json, quiet=quiet or json), *args, **options)

        parameters = [p.replace(kind=KEYWORD) for p in [*own, *extra, *common]]
        run.__signature__ = signature.replace(parameters=parameters)
        run.__annotations__ = {p.name: p.annotation for p in parameters}
        del run.__wrapped__  # the signature is this one
        return run

    return decorate
