"""Values of the command line that are taken as they were typed.

Typer converts values by pydantic, which takes 0.1 s to import. What was not given needs no conversion, and text and
plain numbers little; all else is left to Typer, and with it what is said of a value that is none.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, get_args, get_origin

from typer.core import TyperArgument, TyperOption

PLAIN = {  # what a value of each type looks like that has but one reading
    str: re.compile(r"(?s).*"),
    Path: re.compile(r"(?s).*"),
    int: re.compile(r"-?[0-9]{1,18}"),
    float: re.compile(r"-?[0-9]{1,18}(\.[0-9]{1,18})?(e[+-]?[0-9]{1,2})?"),
}


class _Option(TyperOption):
    def process_value(self, ctx: Any, value: Any) -> Any:
        return _called_back(self, ctx, value) if _is_plain(self, value) else super().process_value(ctx, value)


class _Argument(TyperArgument):
    def process_value(self, ctx: Any, value: Any) -> Any:
        return _called_back(self, ctx, value) if _is_plain(self, value) else super().process_value(ctx, value)


def take_plain_values(params: list[Any]) -> list[Any]:
    """The same parameters, which convert plain values themselves then, and ask nothing else of them: no range that
    Typer would check, no existing file."""
    for param in params:
        param.__class__ = _Option if isinstance(param, TyperOption) else _Argument
    return params


def _type_of(param: Any) -> Any:
    """The type of a value, or of each where there are several."""
    kind = param.type_descriptor.annotation
    return get_args(kind)[0] if get_origin(kind) is list else kind


def _takes_several(param: Any) -> bool:
    return param.multiple or param.nargs != 1


def _is_plain(param: Any, value: Any) -> bool:
    if param.required or value is None:
        return not param.required
    pattern = PLAIN.get(_type_of(param))
    values = value if _takes_several(param) else [value]
    return pattern is not None and all(isinstance(each, str) and pattern.fullmatch(each) for each in values)


def _called_back(param: Any, ctx: Any, value: Any) -> Any:
    """A plain value, converted, or what the callback of its parameter makes of it."""
    kind = _type_of(param)
    if _takes_several(param):
        value = () if value is None else [kind(each) for each in value]
    elif value is not None:
        value = kind(value)
    return value if param.callback is None else param.callback(ctx, param, value)
