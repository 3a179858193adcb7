"""The command line that made a run, with other values of some options."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from nnx_cli.errors import pasteable, quoted
from nnx_cli.system.files import free_name

GIVEN = "its text has given what it has to a model of this size"
SPELLINGS = {"--lr": "--learning-rate", "--max-steps": "--num-batches"}  # further ones of an option that takes a value


def longer_command(folder: Path, time_s: float, named: str = "") -> str:
    """The command that trains a run for twice the `time_s` that it has, at least a minute in all. `named` stands beside
    the run in commands on it."""
    return f"nnx train --resume {quoted(folder)}{named} --max-time {max(2 * time_s, 60) / 60:.0f}m"


def how_to_go_on(folder: Path, status: Mapping[str, Any], named: str = "") -> str:
    """What a finished run may be trained further with, in words."""
    if status.get("ended") == "data":
        return f"{GIVEN}; to read it more often all the same: nnx train --resume {quoted(folder)}{named} --epochs N"
    return f"train it longer: {longer_command(folder, status.get('time_s') or 0.0, named)}"


def changed_command(command: Any, folder: Path, options: Mapping[str, str], dropped: Iterable[str] = ()) -> str | None:
    """`command`, as run.json has it, with `options` and without those that are `dropped`; where it named its folder, it
    names one beside that. None where it is no command of ours. All of these options take a value."""
    try:
        words = shlex.split(str(command))
    except ValueError:
        return None
    if words[:2] != ["nnx", "train"]:
        return None
    gone = {"--out", *options, *dropped}
    gone |= {SPELLINGS[option] for option in gone & SPELLINGS.keys()}
    kept, skip = [], False
    for word in words:
        option, equals, _ = word.partition("=")
        named = option.replace("_", "-") in gone
        if not named and not skip:
            kept.append(word)
        skip = named and not equals
    out = ["--out", str(free_name(folder))] if "--out" in {word.partition("=")[0] for word in words} else []
    return pasteable([*kept, *(word for option in options.items() for word in option), *out])
