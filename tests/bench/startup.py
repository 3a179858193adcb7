"""How long `nnx --help` and `nnx COMMAND --help` take, beside an empty Typer app with the same commands and options.

    python tests/bench/startup.py [--rounds 11] [--commands train list ...] [--markdown FILE]

The empty app is written to a temporary folder: for every command a function with the same parameters, types, help
texts, panels and examples and nothing in it; what the help of nnx does not show without `--model NAME` is hidden there
too. Every measurement is a new process; the sides take turns, round by round; numbers are medians over the rounds of
user time and of wall time. `python -c "import typer, rich"` is the floor below both. The demands: at most 8 times the
floor, and at most 1.2 times the empty app, in user time.
"""

from __future__ import annotations

import argparse
import datetime
import importlib
import inspect
import platform
import resource
import subprocess
import sys
import tempfile
import time
import typing
from pathlib import Path
from statistics import median

import typer

from nnx_cli.cli import COMMANDS, app
from nnx_cli.commands._help import fields_of
from nnx_cli.commands._options import MODEL_PANEL
from nnx_cli.system.machine import cpu_model

HEAD = """import pathlib
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer()

"""
FLOOR = "import typer, rich"
SIDES = {
    "empty app": "import empty_app; empty_app.app()",
    "nnx": "from nnx_cli.cli import main; main()",
}


def empty_app(commands: dict[str, inspect.Signature]) -> str:
    """The source of an app with these commands, none of which does anything."""
    parts = [HEAD]
    root = inspect.signature(app.registered_callback.callback, eval_str=True)
    parts.append(f"@app.callback()\ndef root({parameters(root)}):\n    '''Nothing.'''\n\n")
    for number, (name, signature) in enumerate(commands.items()):
        parts.append(f"@app.command({name!r}, epilog={examples_of(name)!r})\n")
        parts.append(f"def command_{number}({parameters(signature)}):\n    '''Do nothing.'''\n\n")
    return "".join(parts)


def parameters(signature: inspect.Signature) -> str:
    return "*, " + ", ".join(parameter(p) for p in signature.parameters.values())


def parameter(p: inspect.Parameter) -> str:
    """A parameter as its author would write it."""
    kind, info = typing.get_args(p.annotation)
    named = "Argument" if isinstance(info, typer.models.ArgumentInfo) else "Option"
    words = [repr(word) for word in (info.default, *(info.param_decls or ())) if isinstance(word, str)]
    unseen = info.rich_help_panel == MODEL_PANEL and p.name not in fields_of(None)
    for name in ("help", "hidden", "show_default", "rich_help_panel"):
        value = getattr(info, name) or (name == "hidden" and unseen)
        if isinstance(value, (str, bool)):
            words.append(f"{name}={value!r}")
    written = kind.__name__ if isinstance(kind, type) else str(kind)
    default = "" if p.default is p.empty else f" = {p.default!r}"
    return f"{p.name}: Annotated[{written}, typer.{named}({', '.join(words)})]{default}"


def measure(command: list[str], folder: Path) -> tuple[float, float]:
    """User and wall seconds of a new process."""
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run(command, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=True)
    wall, after = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime - before.ru_utime, wall


def race(commands: list[str], rounds: int, folder: Path) -> dict[str, dict[str, tuple[float, float]]]:
    """Median (user, wall) seconds of every side for every line of words."""
    taken: dict[str, dict[str, list]] = {}
    lines = {"--help": ["--help"]} | {f"{name} --help": [name, "--help"] for name in commands}
    for number in range(rounds + 1):
        for label, words in lines.items():
            for side, program in SIDES.items():
                cost = measure([sys.executable, "-c", program, *words], folder)
                if number:  # the first round writes the compiled files
                    taken.setdefault(label, {}).setdefault(side, []).append(cost)
        cost = measure([sys.executable, "-c", FLOOR], folder)
        if number:
            taken.setdefault(FLOOR, {}).setdefault("floor", []).append(cost)
    return {
        label: {side: tuple(median(column) for column in zip(*costs, strict=True)) for side, costs in sides.items()}
        for label, sides in taken.items()
    }


def table(results: dict[str, dict[str, tuple[float, float]]]) -> str:
    """Markdown: milliseconds, user / wall, and what nnx takes of the floor and of the empty app (user time)."""
    lines = ["| nnx … | empty app | nnx | of the floor | of the empty app |", "| --- " * 5 + "|"]
    floor = results[FLOOR]["floor"]
    lines.append(f"| *{FLOOR}* | {cell(floor)} | | | |")
    for label, sides in results.items():
        if label != FLOOR:
            ratios = [sides["nnx"][0] / floor[0], sides["nnx"][0] / sides["empty app"][0]]
            cells = [cell(sides[side]) for side in SIDES] + [f"{ratio:.2f}×" for ratio in ratios]
            lines.append(f"| `{label}` | {' | '.join(cells)} |")
    return "\n".join(lines)


def cell(cost: tuple[float, float]) -> str:
    return f"{1e3 * cost[0]:.0f} / {1e3 * cost[1]:.0f}"


def signature_of(name: str) -> inspect.Signature:
    """What `nnx NAME` takes."""
    return inspect.signature(importlib.import_module(f"nnx_cli.commands.{COMMANDS[name][0]}").run)


def examples_of(name: str) -> str | None:
    """What the help of `nnx NAME` ends with."""
    return getattr(importlib.import_module(f"nnx_cli.commands.{COMMANDS[name][0]}"), "EXAMPLES", None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--commands", nargs="*", default=list(COMMANDS), choices=list(COMMANDS))
    parser.add_argument("--markdown", type=Path)
    options = parser.parse_args()
    commands = {name: signature_of(name) for name in COMMANDS}
    n_options = sum(len(signature.parameters) for signature in commands.values())
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "empty_app.py").write_text(empty_app(commands), encoding="utf-8")
        results = race(options.commands, options.rounds, Path(folder))
    machine = {
        "cpu": cpu_model(),
        "python": platform.python_version(),
        "typer": typer.__version__,
        "commands": len(commands),
        "options": n_options,
        "rounds": options.rounds,
        "date": datetime.date.today().isoformat(),
    }
    shown = ", ".join(f"{name} {value}" for name, value in machine.items())
    text = f"{shown}; milliseconds, user / wall\n\n{table(results)}\n"
    print(text)
    if options.markdown:
        options.markdown.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
