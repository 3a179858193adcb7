"""Options as the agents of sweeps write them: `--watch=True`, `--watch False`, `--n_layers=4.0`, `--patience=None`."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from typing import Any, get_args

from nnx_cli.commands._options import TEXTS
from nnx_cli.config import KINDS_IN_WORDS
from nnx_cli.errors import UsageError

YES, NO = {"true", "1", "yes", "on"}, {"false", "0", "no", "off"}
AS_PYTHON = "True", "False"  # may stand behind a flag, in a word of their own
MOST_DIGITS = 18  # of an integer


def plain_words(command: Any, words: Sequence[str]) -> Iterator[str]:
    """The words behind a command as people write them. Raises UsageError for a flag that is set to neither true nor
    false, and for words where a number is to stand."""
    by_type = {kind: [p for p in command.params if p.param_type_name == kind] for kind in ("option", "argument")}
    options = {name: option for option in by_type["option"] for name in (*option.opts, *option.secondary_opts)}
    takes_arguments = bool(by_type["argument"])
    kinds = inspect.unwrap(command.callback).__annotations__
    left = [*reversed(words)]
    while left:
        word = left.pop()
        name, equals, value = word.partition("=")
        name = name.replace("_", "-")
        option = options.get(name)
        if word == "--":
            yield from (word, *reversed(left))
            return
        if option is None:
            yield word
        elif option.is_flag:
            if not equals and not takes_arguments and left and left[-1] in AS_PYTHON:
                equals, value = "=", left.pop()
            yield from _flag(option, name, value) if equals else [word]
        elif equals or left:
            value = value if equals else left.pop()
            if value != "None" or option.name in TEXTS:
                yield f"{name}={_number(name, value, kinds[option.name], command.name)}"
        else:
            yield word


def _flag(option: Any, name: str, value: str) -> Sequence[str]:
    """The word for a flag that is set to a value; none where that changes nothing."""
    if value == "None":
        return []
    if value.lower() not in YES | NO:
        raise UsageError(f"{name} is {value!r}; it must be {KINDS_IN_WORDS['bool']}")
    is_on = (value.lower() in YES) == (name in option.opts)
    return (option.opts if is_on else option.secondary_opts)[:1]


def _is_of(kind: type, annotation: Any) -> bool:
    return annotation is kind or any(_is_of(kind, part) for part in get_args(annotation))


def _number(name: str, value: str, annotation: Any, command: str) -> str:
    """The value of an option; where it takes an integer, without its point or exponent if it was written as 128.0 or
    1e4. Raises UsageError for what is no number."""
    is_integer = _is_of(int, annotation)
    if not is_integer and not _is_of(float, annotation):
        return value
    try:
        number = float(value)
        if is_integer and number.is_integer() and abs(number) < 10**MOST_DIGITS:
            return str(int(number))
        (int if is_integer else float)(value)
    except ValueError as error:
        kind = KINDS_IN_WORDS["int" if is_integer else "float"]
        fix = f"see: nnx {command} --help"
        if value == "auto":
            fix = "leave it out, and it is chosen"
        elif value.count(",") == 1:
            fix = f"write its point as a point: {name} {value.replace(',', '.')}"
        raise UsageError(f"{name} is {value!r}; it must be {kind}", fix=fix) from error
    return value
