"""Values of the command line that nnx converts itself are those that Typer would make of them."""

import subprocess
import sys
from pathlib import Path
from typing import Annotated

import pytest
import typer
from typer.exceptions import TyperException

from nnx_cli.cli import COMMANDS, app
from nnx_cli.commands._values import take_plain_values


def command(take_plain):
    """A command with options of all types, with Typer's conversion or ours."""
    made = typer.Typer(add_completion=False, pretty_exceptions_enable=False)

    @made.command()
    def show(
        words: Annotated[list[str] | None, typer.Argument()] = None,
        text: Annotated[str | None, typer.Option()] = None,
        path: Annotated[Path | None, typer.Option()] = None,
        whole: Annotated[int | None, typer.Option()] = None,
        real: Annotated[float | None, typer.Option()] = None,
        flag: Annotated[bool, typer.Option()] = False,
        many: Annotated[list[str] | None, typer.Option()] = None,
        counts: Annotated[list[int] | None, typer.Option()] = None,
        seen: Annotated[str | None, typer.Option(callback=lambda value: f"<{value}>")] = None,
        fixed: Annotated[str, typer.Option()] = "fixed",
    ):
        pass

    built = typer.main.get_command(made)
    if take_plain:
        take_plain_values(built.params)
    return built


def understood(built, line):
    """The values of a command line, or what is said of them."""
    try:
        return built.make_context("show", [*line]).params
    except TyperException as error:
        return error.exit_code, error.format_message()


@pytest.mark.parametrize(
    "line",
    [
        [],
        ["a", "b c", "", "--flag"],
        ["--text", "", "--path", "", "--fixed", ""],
        ["--text", "two\nlines", "--path", "~/a b", "--seen", "x"],
        ["--text", "\udcff", "--path", "a\udcff"],
        ["--whole", "007", "--real", "12"],
        ["--whole", "-3", "--real", "-0.0"],
        ["--whole", "999999999999999999", "--real", "123456789.123456789e-17"],
        ["--whole", "99999999999999999999", "--real", "1e+9"],
        ["--whole", " 5 ", "--real", " 5.5 "],
        ["--whole", "1_000", "--real", "1_000.5"],
        ["--whole", "2.0", "--real", "inf"],
        ["--whole", "+4", "--real", ".5"],
        ["--whole", "٣"],
        ["--real", "nan"],
        ["--real", "1e400"],
        ["--whole", "2.5"],
        ["--whole", ""],
        ["--whole", "--real"],
        ["--real", "0x10"],
        ["--real", "half"],
        ["--many", "a", "--many", "", "--counts", "3", "--counts", "-4"],
        ["--counts", "3", "--counts", "three"],
        ["--seen", ""],
    ],
)
def test_the_same_values_as_typer(line):
    assert repr(understood(command(True), line)) == repr(understood(command(False), line))


def test_a_required_value_is_missed():
    made = typer.Typer(add_completion=False)

    @made.command()
    def show(text: Annotated[str, typer.Argument()]):
        pass

    built = typer.main.get_command(made)
    take_plain_values(built.params)
    assert understood(built, ["a"]) == {"text": "a"}
    assert understood(built, [])[0] == 2


@pytest.mark.parametrize("name", COMMANDS)
def test_options_have_no_demands_that_only_typer_checks(name):
    for param in typer.main.get_command(app).commands[name].params:
        info = param.type_descriptor.parameter_info
        assert (info.min, info.max, info.parser, info.path_type) == (None, None, None, None)
        assert not any((info.exists, info.writable, info.resolve_path)) and info.file_okay and info.dir_okay


def test_plain_values_are_taken_without_pydantic(tmp_path):
    (tmp_path / "a.txt").write_text("some words\n" * 100)
    words = ["prepare", "a.txt", "--out", "b", "--tokenizer", "byte", "--workers", "1", "--val-fraction", "0.2"]
    code = f"import sys\nfrom nnx_cli.cli import app\ntry: app({words})\nfinally: assert 'pydantic' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == "", done.stderr
