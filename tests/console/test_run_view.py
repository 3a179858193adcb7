"""The live screen, as a real terminal shows it."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from nnx_cli.console.output import Output
from nnx_cli.console.run_view import RunsView

DRIVER = str(Path(__file__).with_name("driver.py"))
SIZES = [(80, 24), (200, 60), (20, 5)]
pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="no pseudoterminals")
BRAILLE = re.compile("[\u2801-\u28ff]")


def assert_clean(terminal, last="the end"):
    """The cursor is shown behind the last line, lines wrap again, and nothing of the block is left."""
    lines = terminal.read()
    shown = [line for line in lines if line]
    assert shown[-1] == last[-terminal.screen.columns :] and not terminal.screen.cursor.hidden
    assert terminal.screen.cursor.x == 0 and 7 in {mode >> 5 for mode in terminal.screen.mode}
    assert not BRAILLE.search("\n".join(lines)) and "left" not in shown[-1]
    return lines


@pytest.mark.parametrize("size", [(80, 24), (200, 60), (120, 30), (60, 16)], ids=str)
def test_the_block_stands_below_the_lines(on_terminal, size):
    terminal = on_terminal(size, "40", "0.01", "wait")
    lines = terminal.read(lambda text: "step 40 of 40" in text)
    top = next(n for n, line in enumerate(lines) if line.startswith("── nyx nano, 787,072 parameters ──"))
    block = "\n".join(lines[top:])
    assert lines[top - 1] and not BRAILLE.search("\n".join(lines[:top])), "lines scroll above it"
    assert len(lines) - top <= size[1] * 2 // 3 and len(lines[top]) == size[0], "and it fills the width"
    chart = [line for line in lines[top:] if BRAILLE.search(line)]
    assert len(chart) >= (10 if size[1] >= 50 else 2) and max(map(len, chart)) == size[0]
    assert sum(line.count("●") for line in chart) == 1 and "learning rate" in block
    if size[1] >= 24:
        assert any(line.count("┄") > size[0] // 3 for line in lines[top:])
        assert "(2.310 bits/byte)" in block and "━ validation" in block and "best so far" in block
        for words in ("gradient norm 0.8", "7,300 tokens/s", "MFU 31 %", "414.0 MiB of 7.00 GiB"):
            assert words in block
        assert "sample at step 20" in block and "\\x1b[2J\\x1b[31mred\\x07" in block
    assert size[1] < 30 or any("a library warns" in line for line in lines[:top])
    assert terminal.screen.cursor.hidden
    os.write(terminal.ours, b"\n\n")
    assert_clean(terminal)


@pytest.mark.parametrize("size", [(20, 5), (39, 50), (200, 4)], ids=str)
def test_a_small_window_has_one_line(on_terminal, size):
    terminal = on_terminal(size, "40", "0.01", "wait")
    lines = terminal.read(lambda text: re.search(r"^(98|100) %", text, re.M))
    assert re.fullmatch(r"(98|100) %  loss 1\.\d+(  .*)?", lines[-1]) and len(lines[-1]) < size[0]
    os.write(terminal.ours, b"\n\n")
    assert_clean(terminal)


@pytest.mark.parametrize("size", [(1, 1), (2, 40), (80, 1), (5, 3)], ids=str)
def test_no_window_is_too_small(on_terminal, size):
    terminal = on_terminal(size, "20", "0.0", "run")
    terminal.read()
    assert terminal.wait() == 0 and b"the end" in terminal.written and not terminal.screen.cursor.hidden


@pytest.mark.parametrize(
    "sizes", [((80, 24), (50, 24)), ((80, 24), (200, 60)), ((200, 60), (80, 14)), ((80, 24), (20, 5))]
)
def test_after_a_resize_there_is_one_block(on_terminal, sizes):
    terminal = on_terminal(sizes[0], "40", "0.01", "wait")
    terminal.read(lambda text: "step 40" in text)
    terminal.resize(*sizes[1])
    os.write(terminal.ours, b"\n")
    lines = terminal.read(lambda text: re.search(r"100(\.0)? % .*(step 40|loss)", text))
    text = "\n".join(lines)
    if sizes[1][0] >= 40:
        assert text.count("── nyx nano") == 1 and text.count("learning rate") == 1 and "step 40 of 40" in text
        assert text.count("●") == 2, "in the legend, and in the chart"
    os.write(terminal.ours, b"\n")
    assert_clean(terminal)


def test_an_exception_leaves_the_terminal_clean(on_terminal):
    terminal = on_terminal((80, 24), "20", "0.0", "fail")
    assert_clean(terminal, "RuntimeError: it failed")


def test_an_interrupt_leaves_the_terminal_clean(on_terminal):
    terminal = on_terminal((80, 24), "4000", "0.01", "run")
    terminal.read(lambda text: "learning rate" in text)
    terminal.interrupt()
    assert_clean(terminal, "KeyboardInterrupt")


@pytest.mark.parametrize("how", ["leave", "spin"])
def test_a_process_that_ends_at_once_leaves_the_terminal_clean(on_terminal, how):
    terminal = on_terminal((80, 24), "20", "0.2", how)
    lines = [line for line in terminal.read() if line]
    assert terminal.wait() == 130 and not terminal.screen.cursor.hidden
    assert lines and not any(word in line for line in lines for word in ("at work", "──", "learning"))


def test_a_race_has_one_bar(on_terminal):
    terminal = on_terminal((80, 24), "40", "0.03", "race")
    lines = terminal.read(lambda text: re.search(r"━ ?─+ +\d+ % .*llama, seed 1", text))
    assert [line for line in lines if "llama, seed 1" in line]
    assert_clean(terminal)


@pytest.mark.parametrize("columns", [40, 60, 100])
def test_a_race_tells_its_time_left_on_every_screen(monkeypatch, columns):
    view = RunsView(Output())
    view.progress, view.line = 0.4, "llama, seed 1 of 3  loss 2.345"
    monkeypatch.setattr(view.left, "words", lambda: "12 min 59 s left")
    (line,) = view.layout(columns, 24)
    text = "".join(text for text, _ in line)
    assert " 40 %  12 min 59 s left" in text and len(text) < columns and text.count("━") > 3


def test_a_notebook_gets_one_line_and_no_control_codes(on_terminal):
    terminal = on_terminal((80, 24), "40", "0.01", "run", JPY_PARENT_PID="1")
    terminal.read(seconds=20)
    text = terminal.written.decode().replace("\r\n", "\n")
    assert "\r" in text and re.search(r"\r\d+ %  loss [\d.]+  step \d+", text)
    assert not re.search(r"\x1b\[[0-9;?]*[A-LN-Za-ln-z]", text), "colours are all it is sent"


@pytest.mark.parametrize(
    "variables", [{"NO_COLOR": "1"}, {"TERM": "dumb"}, {"TERM": "dumb", "JPY_PARENT_PID": "", "NO_COLOR": "x"}], ids=str
)
def test_plain_lines_are_those_of_a_pipe(on_terminal, variables):
    terminal = on_terminal((80, 24), "40", "0.0", "run", **variables)
    terminal.read(seconds=20)
    piped = subprocess.run([sys.executable, DRIVER, "40", "0.0", "run"], capture_output=True, check=True)
    plain = terminal.written.replace(b"\r\n", b"\n")
    assert b"\x1b" not in plain and b"\r" not in plain
    assert plain == piped.stderr + piped.stdout
    steps = [line for line in piped.stderr.decode().splitlines() if line.startswith((" ", "1")) and " %  step" in line]
    assert steps == [
        "  2.5 %  step 1  loss 4.6428  lr 9.75e-03  7,300 tokens/s  0.40 GiB",
        " 25.0 %  step 10  loss 2.0925  val 2.1925 (3.1631 bits/byte)  lr 7.50e-03  7,300 tokens/s  0.40 GiB",
        " 50.0 %  step 20  loss 1.3991  val 1.4991 (2.1628 bits/byte)  lr 5.00e-03  7,300 tokens/s  0.40 GiB",
        " 75.0 %  step 30  loss 1.2444  val 1.3444 (1.9396 bits/byte)  lr 2.50e-03  7,300 tokens/s  0.40 GiB",
        "100.0 %  step 40  loss 1.2099  val 1.3099 (1.8898 bits/byte)  lr 0.00e+00  7,300 tokens/s  0.40 GiB",
    ]
    assert "  contribution at step 20: critic 1 0.10, moderator 0.75" in piped.stderr.decode().splitlines()


def test_what_parts_of_a_model_weigh_is_coloured_over_the_text(on_terminal):
    terminal = on_terminal((80, 60), "40", "0.0", "run")
    lines = terminal.read(seconds=20)
    at = lines.index("  contribution at step 20:")
    assert lines[at + 1 : at + 3] == [f"    {name}  the \\x1b[2Jcat" for name in ("critic 1  0.10", "moderator 0.75")]
    for row, strongest in ((1, "cat"), (2, "\\x1b[2J")):
        cells = terminal.screen.buffer[at + row]
        dark = "".join(cells[x].data for x in range(terminal.screen.columns) if cells[x].reverse)
        assert dark.strip() == strongest


def test_quiet_shows_nothing(on_terminal):
    terminal = on_terminal((80, 24), "40", "0.0", "quiet")
    lines = [line for line in terminal.read(seconds=20) if line]
    assert lines[-1] == "the end" and not any("step" in line or "nyx" in line for line in lines)
