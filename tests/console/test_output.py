"""What people see, on screens of every width."""

import io
import json
import os
import re
import subprocess
import sys

import pytest

from nnx_cli.cli import COMMANDS
from nnx_cli.console.output import Output
from nnx_cli.console.run_view import RunsView
from nnx_cli.console.tables import aligned
from nnx_cli.console.terminal import columns_of
from nnx_cli.errors import OutputError

NO_WIDTH = ["0", "00", "-5", "abc", "", " ", "80x", "1e3", "²", "9" * 40]
posix = pytest.mark.skipif(sys.platform == "win32", reason="no pseudoterminals")


@pytest.fixture
def screen(monkeypatch, capsys):
    """Reads what was written since the last time: screen() returns it as (stdout, stderr)."""
    monkeypatch.delenv("COLUMNS", raising=False)
    return capsys.readouterr


def show_table(**options):
    rows = [["a-long-name-of-a-run", "nyx", 12, "2.3456"], ["b", "llama", 1200, "1.9"]]
    Output().table(["name", "model", "steps", "bits/byte"], rows, **options)


@pytest.mark.parametrize("stated", NO_WIDTH)
def test_what_is_no_width_is_not_heeded(screen, monkeypatch, stated):
    show_table()
    whole = screen()
    monkeypatch.setenv("COLUMNS", stated)
    monkeypatch.setenv("LINES", stated)
    show_table()
    assert columns_of(sys.stdout) is None and screen() == whole
    Output().show("a line that is shown")
    assert screen() == ("a line that is shown\n", "")


@pytest.mark.parametrize("columns", [1, 2, 3, 5, 7, 20, 33, 79, 500, 10**5])
def test_a_table_keeps_all_it_has(screen, monkeypatch, columns):
    """Too narrow for it, the screen wraps the lines: no cell is cut, no column goes without a word."""
    monkeypatch.setenv("COLUMNS", str(columns))
    show_table()
    shown, said = screen()
    assert {"a-long-name-of-a-run", "nyx", "12", "2.3456", "llama", "1200", "1.9"} < set(shown.split()) and said == ""


@pytest.mark.parametrize("columns", [1, 30, 40, 44, 60])
def test_a_table_cuts_no_word(screen, monkeypatch, columns):
    monkeypatch.setenv("COLUMNS", str(columns))
    rows = [["embedding", "PackedEmbedding", "1 x 32 x 256", "10,240 x 12"], ["norm", "小猫小猫", None, ""]]
    Output().table(["layer", "kind", "output of one sequence", "parameters"], rows)
    words = "layer kind output of one sequence parameters embedding PackedEmbedding 1 x 32 x 256 10,240 x 12"
    assert sorted(screen().out.replace("─", "").split()) == sorted(f"{words} norm 小猫小猫 –".split())


def test_columns_that_go_are_named(screen, monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    show_table(expendable=["steps", "model", "bits/byte"])
    shown, said = screen()
    assert "a-long-name-of-a-run" in shown and "2.3456" in shown and "nyx" not in shown and "1200" not in shown
    assert said == "not shown on 40 columns: model, steps; --json has all\n"


def test_a_file_has_no_width(screen):
    """A pipe or a file gets every column, though a screen that does not say its width counts as 80 wide."""
    Output().table(["name", "value"], [["x" * 70, "y" * 70]], expendable=["value"])
    assert "x" * 70 + "   " + "y" * 70 in screen().out


@pytest.mark.parametrize("columns", [None, 0, 1, 5, 20, 60])
@posix
def test_terminals_of_every_width(columns):
    """A real one: all commands and their lines are shown, with whole words."""
    words = " ".join(on_a_terminal(["--help"], columns, NO_COLOR="1").replace("│", " ").split())
    for name, (_, line) in COMMANDS.items():
        assert f"{name} {line}" in words, words
    assert "--install-completion" in words and "--help" in words


def on_a_terminal(words, columns, **variables):
    """What the command writes to a terminal of so many columns."""
    import fcntl
    import pty
    import struct
    import termios
    from contextlib import suppress

    ours, theirs = pty.openpty()
    if columns is not None:
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    kept = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "NO_COLOR", "FORCE_COLOR")}
    command = [sys.executable, "-m", "nnx_cli", *words]
    with subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, env=kept | variables) as process:
        os.close(theirs)
        text = b""
        with suppress(OSError):  # what Linux raises at the end
            while part := os.read(ours, 4096):
                text += part
    os.close(ours)
    assert process.returncode == 0, text
    return text.decode()


@pytest.mark.parametrize("term", [None, "", "dumb", "unknown"])
def test_a_terminal_that_moves_no_cursor_gets_plain_lines(screen, monkeypatch, term):
    if term is None:
        monkeypatch.delenv("TERM", raising=False)
    else:
        monkeypatch.setenv("TERM", term)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    assert Output().live == (os.name == "nt")
    monkeypatch.setenv("TERM", "xterm")
    assert Output().live and not Output(quiet=True).live
    monkeypatch.setattr(sys.stderr, "isatty", lambda: False)
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert not Output().live


@pytest.mark.parametrize("text", ["\udcff", "a\ud800b", "\udfff\ud800", "\ud83d\ude42", "é\x7f\x1b\u202e🙂"])
def test_json_holds_no_lone_surrogate(screen, text):
    Output(json=True).show_json({"text": [text], text: 1.5, "nothing": None})
    written = screen().out
    assert written.isascii() and "\x7f" not in written and "\x1b" not in written
    shown = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    assert json.loads(written) == {"text": [shown], shown: 1.5, "nothing": None}
    shown.encode()  # as UTF-8 holds it


def test_what_was_made_is_named_where_the_result_cannot_be_written(screen, monkeypatch):
    def refuse(text):
        raise OutputError("cannot write to standard output: full", fix="make room")

    output = Output()
    monkeypatch.setattr(sys.stdout, "write", refuse)
    for show in (lambda: output.show("x"), lambda: output.stream("x"), lambda: output.table(["a"], [["b"]])):
        output.made = None
        with pytest.raises(OutputError, match="full$"):
            show()
        output.made = "weights/x"
        with pytest.raises(OutputError, match="full; weights/x is complete$") as caught:
            show()
        assert caught.value.fix == "make room"


def test_a_person_at_the_keyboard_is_told(screen, monkeypatch):
    class Keyboard(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setattr(sys, "stdin", Keyboard())
    Output().note_reading("book.txt", None)
    assert screen().err == ""
    Output().note_reading("book.txt", "-")
    assert screen().err.startswith("reading standard input; end it with Ctrl-")
    for stdin in (io.StringIO(), None):
        monkeypatch.setattr(sys, "stdin", stdin)
        Output().note_reading("-")
    assert screen().err == ""


@pytest.mark.parametrize("stated", NO_WIDTH)
def test_help_on_a_screen_of_no_width(nnx, monkeypatch, stated):
    monkeypatch.delenv("COLUMNS", raising=False)
    whole = nnx("list", "--help").stdout
    monkeypatch.setenv("COLUMNS", stated)
    monkeypatch.setenv("LINES", stated)
    assert nnx("list", "--help").stdout == whole


@pytest.mark.parametrize("width", [1, 20, 50, 60, 74])
@pytest.mark.parametrize("words", [[], *([name] for name in COMMANDS)], ids=str)
def test_help_on_a_narrow_screen_has_every_word(nnx, monkeypatch, words, width):
    """Without the panels: all names and texts, none of them cut, and the examples line by line."""
    monkeypatch.setenv("COLUMNS", "200")
    wide = nnx(*words, "--help").stdout
    titles = {word for line in wide.splitlines() if line.startswith("╭") for word in re.findall(r"\w+", line)}
    monkeypatch.setenv("COLUMNS", str(width))
    narrow = nnx(*words, "--help").stdout
    titles.add("bool")  # which the panels show beside an option without a value
    assert set(re.findall(r"\w+", wide)) - titles <= set(re.findall(r"\w+", narrow))
    assert "…" not in narrow and "\x1b" not in narrow
    assert [line.strip() for line in wide.splitlines() if line.strip().startswith("nnx ")] == [
        line.strip() for line in narrow.splitlines() if line.strip().startswith("nnx ")
    ]


def test_columns_give_way_on_a_narrow_screen():
    rows = [("size", "small", "why not"), ("learning rate", "0.01, linear", ""), ("x", "1", "a remark")]
    assert (
        aligned(rows, None)
        == aligned(rows, 80)
        == [
            "size           small         why not",
            "learning rate  0.01, linear",
            "x              1             a remark",
        ]
    )
    assert aligned(rows, 30) == [
        "size           small (why not)",
        "learning rate  0.01, linear",
        "x              1 (a remark)",
    ]
    narrow = aligned(rows, 20)
    assert max(map(len, narrow)) <= 20 and narrow[-1] == "  remark)"


@pytest.mark.parametrize(("columns", "in_a_row"), [(30, 1), (80, 2), (120, 3), (200, 5)])
def test_texts_side_by_side(screen, monkeypatch, columns, in_a_row):
    monkeypatch.setenv("COLUMNS", str(columns))
    names = ["one", "two", "three", "four", "five"]
    Output().side_by_side({name: f"{name}-wrote " * 9 + "\x1b[2J" for name in names})
    shown, said = screen()
    lines = [line.split() for line in shown.splitlines()]
    heads = [line for line in lines if line and line[0] in names]
    assert [name for head in heads for name in head] == names and len(heads[0]) == in_a_row
    assert max(map(len, shown.splitlines())) <= columns and "\x1b" not in shown and said == ""
    for name in names:
        assert shown.split().count(f"{name}-wrote") == 9


def test_a_race_without_a_terminal_says_where_it_is_now_and_then(screen, monkeypatch):
    clock = [1000.0]
    monkeypatch.setattr("time.monotonic", lambda: clock[0])
    with RunsView(Output()) as view:
        for number in range(4):
            view.begins(f"llama, seed {number}", number / 4, 1 / 4)
            clock[0] += 20.0
            view.step({"train_loss": 1.5, "val_loss": 1.6}, 0.5)
            view.note("over")
    lines = screen().err.splitlines()
    assert lines[0] == "  0.0 %  llama, seed 0" and lines.count("over") == 4
    assert [line for line in lines[1:] if "%" in line] == [
        " 37.5 %  llama, seed 1  loss 1.500  1 min 40 s left",
        " 87.5 %  llama, seed 3  loss 1.500  20 s left",
    ]


def test_in_the_kernel_of_a_notebook_lines_stay_lines(screen, monkeypatch):
    """Rich would show each of them as a block of its own, which nothing can overwrite."""
    monkeypatch.setattr("rich.console._is_jupyter", lambda: True)
    Output().note("a note")
    Output().show("a result")
    assert screen() == ("a result\n", "a note\n")
