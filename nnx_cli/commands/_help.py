"""Help in panels. Fields that only some architectures have are shown when `--model NAME` stands beside `--help`."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import typer
from typer.core import TyperCommand, TyperOption

from nnx_cli import models
from nnx_cli.commands._agent_words import plain_words
from nnx_cli.commands._config_file import read_toml
from nnx_cli.commands._options import DEFAULT_MODEL, MODEL_PANEL, OUTPUT_PANEL, at_home, option, shown_default
from nnx_cli.config import Field
from nnx_cli.console.help import prepare_help
from nnx_cli.errors import NnxError

BY_THE_TEXT = ("vocab_size", "dropout")  # fields of all architectures that a run takes by what it is trained on


class Command(TyperCommand):
    """A command whose help shows the options that the named architecture has; all of them parse."""

    def make_context(self, info_name: str | None, args: list[str], parent: Any = None, **extra: Any) -> Any:
        """Take the fields of an architecture of the user's among the options, where its file is named."""
        name = self._named_model(args)
        takes_fields = any(_is_of_model(p) for p in self.params)
        command = _with_fields(self, name) if name and models.is_file(name) and takes_fields else self
        return TyperCommand.make_context(command, info_name, args, parent, **extra)

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Note the architecture first: help is answered in the middle of parsing."""
        ctx.meta["nnx.model"] = self._named_model(args)
        return super().parse_args(ctx, [*plain_words(self, args)])

    def _named_model(self, args: Sequence[str]) -> str | None:
        """The architecture that `--model`, or else the file of `--config`, names; None where it names none."""
        name = _value_of("--model", args)
        config = _value_of("--config", args) if any(p.name == "config" for p in self.params) else None
        if name is None and config is not None:
            with suppress(NnxError):  # what is wrong with the file is said where its settings are read
                name = str(read_toml(Path(config)).get("model"))
        if name is not None and models.is_file(name):
            models.check_name(name)
            return name
        return name if name in models.names() else None

    def spellings(self, ctx: Any) -> list[str]:
        """All options that may be given, beside the architecture that is named."""
        name = ctx.meta["nnx.model"]
        shown = self.params if name is None else [p for p in self.params if _is_shown(p, fields_of(name))]
        return [spelling for p in shown for spelling in (*p.opts, *p.secondary_opts)]

    def get_help_option(self, ctx: Any) -> TyperOption | None:
        """`--help`, in the panel of the options that all commands have."""
        option = super().get_help_option(ctx)
        if option is not None:
            option.rich_help_panel = OUTPUT_PANEL
        return option

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Write the help of a copy of this command that has only what is to be shown."""
        shown = copy.copy(self)
        prepare_help(shown)
        name = ctx.meta.get("nnx.model")
        fields, sized = fields_of(name), models.sized_fields(name or DEFAULT_MODEL)
        defaults = dict.fromkeys(sized, "of the size")
        if any(p.name == "max_time" for p in self.params):
            defaults |= dict.fromkeys(BY_THE_TEXT, "auto")
        shown.params = [_as_shown(p, fields, defaults) for p in self.params if _is_shown(p, fields)]
        TyperCommand.format_help(shown, ctx, formatter)


def make_command(run: Callable[..., None], name: str | None, examples: str | None) -> Command:
    """The command that Typer makes of a function, whose help ends with examples."""
    alone = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode="rich")
    alone.command(name=name, cls=Command, epilog=examples)(run)
    command = typer.main.get_command(alone)
    assert isinstance(command, Command)
    return command


def _value_of(option: str, args: Sequence[str]) -> str | None:
    """What stands after `option` or, with `=`, in one word with it, or None."""
    for number, word in enumerate(args):
        name, _, value = word.partition("=")
        if name == option:
            return at_home(value or "".join(args[number + 1 : number + 2]))
    return None


def fields_of(name: str | None) -> dict[str, Field]:
    """The fields of an architecture; without one those that all of them have, as far as their help is the same."""
    if name is not None:
        return {field.name: field for field in models.config_fields(name)}
    first, *others = ({field.name: field for field in models.config_fields(other)} for other in models.names())
    shared = {}
    for field in first.values():
        texts = {other[field.name].help for other in others if field.name in other}
        if all(field.name in other for other in others):
            shared[field.name] = field if texts == {field.help} else replace(field, help=field.help.partition(";")[0])
    return shared


def _is_shown(param: Any, fields: dict[str, Field]) -> bool:
    return not _is_of_model(param) or param.name in fields


def _is_of_model(param: Any) -> bool:
    return getattr(param, "rich_help_panel", None) == MODEL_PANEL


def _with_fields(command: Command, name: str) -> Command:
    """The same command with an option for each field of an architecture, in place of the zoo's of that name."""
    assert command.callback is not None
    run: Any = inspect.unwrap(command.callback)
    own = {field.name: option(field, MODEL_PANEL) for field in models.config_fields(name)}
    parameters = dict(run.__signature__.parameters) | own

    def extended(**options: Any) -> None:
        run(**options)

    signature = run.__signature__.replace(parameters=list(parameters.values()))
    extended.__signature__ = signature  # type: ignore[attr-defined]  # what Typer reads
    extended.__annotations__ = {p.name: p.annotation for p in parameters.values()}
    extended.__doc__ = run.__doc__
    return make_command(extended, command.name, command.epilog)


def _as_shown(param: Any, fields: dict[str, Field], defaults: dict[str, str]) -> Any:
    """A parameter without its negative spelling, which would take the width of a column; a field of an architecture
    with its help and default there, unless `defaults` says where that comes from."""
    shown = copy.copy(param)
    shown.secondary_opts = []
    if _is_of_model(param):
        field = fields[param.name]
        shown.help, shown.show_default = field.sentence, defaults.get(param.name) or shown_default(field)
    return shown
