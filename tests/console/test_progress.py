"""Progress of work whose size is known."""

import re
import sys

import pytest

from nnx_cli.console.cells import cells
from nnx_cli.console.output import Output
from nnx_cli.console.progress import Progress, TimeLeft


@pytest.fixture
def clock(monkeypatch):
    """A clock that only the test moves."""
    now = [1000.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    return now


def test_the_time_left_follows_the_last_minute(clock):
    left = TimeLeft()
    assert left.words() == ""
    for done in range(0, 50, 10):  # 10 % in 100 s
        left.update(done / 100)
        clock[0] += 100.0
    assert left.seconds() == pytest.approx(600 - 100)
    for done in range(50, 91):  # then 1 % a second
        left.update(done / 100)
        clock[0] += 1.0
    assert left.seconds() < 100
    left.update(0.1)
    assert left.seconds() is None, "it went back"


@pytest.mark.parametrize("done", [[0.5], [0.5, 0.5, 0.5], [0.0, 0.0]])
def test_nobody_knows_what_is_left_of_work_that_stands_still(clock, done):
    left = TimeLeft()
    for each in done:
        left.update(each)
        clock[0] += 5.0
    assert left.seconds() is None


def test_a_line_that_is_redrawn(clock, monkeypatch, capsys):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    with Progress(Output()) as progress:
        for number in range(5):
            progress.n_bytes("preparing", number * 10**7, 10**8)
            clock[0] += 1.0
        for number in range(5):
            progress.share("measuring", number / 10)
            clock[0] += 1.0
    *lines, last = capsys.readouterr().err.split("\r")[:-1]
    assert [line.rstrip() for line in lines] == [
        "preparing 10 of 100 MB, 10 MB/s, 9 s left",
        "preparing 20 of 100 MB, 10 MB/s, 8 s left",
        "preparing 30 of 100 MB, 10 MB/s, 7 s left",
        "preparing 40 of 100 MB, 10 MB/s, 6 s left",
        "measuring 0 %",
        "measuring 10 %, 9 s left",
        "measuring 20 %, 8 s left",
        "measuring 30 %, 7 s left",
        "measuring 40 %, 6 s left",
    ]
    assert last.strip() == "" and len(last) >= len(lines[-1].rstrip())


@pytest.mark.parametrize("quiet", [False, True])
def test_a_pipe_gets_a_line_now_and_then(clock, capsys, quiet):
    with Progress(Output(quiet=quiet)) as progress:
        for second in range(14):
            progress.share("measuring", second / 20)
            clock[0] += 1.0
    lines = ["measuring 25 %, 15 s left", "measuring 50 %, 10 s left"]
    assert capsys.readouterr() == ("", "".join(f"{line}\n" for line in lines if not quiet))


@pytest.mark.parametrize("size", [(80, 24), (200, 60), (20, 5), (8, 2)], ids=str)
def test_one_line_is_redrawn_on_every_screen(on_terminal, size):
    terminal = on_terminal(size, "100", "0.02", "work")
    lines = terminal.read(lambda text: re.search("[6-9][0-9] %|[6-9][0-9] of 100", text))
    assert len(lines) == 1 and cells(lines[0]) < size[0]
    if size[0] >= 80:
        assert re.fullmatch(r"preparing \\x1b\[2J \d+ of 100 MB, \d+ MB/s, \d+ s left", lines[0])
    terminal.wait()
    assert [line for line in terminal.read() if line] == ["the end"] and not terminal.screen.cursor.hidden


def test_a_window_that_gets_narrow_gets_a_shorter_line(on_terminal):
    terminal = on_terminal((120, 24), "2000", "0.02", "work")
    terminal.read(lambda text: "left" in text)
    terminal.resize(20, 24)
    terminal.read(seconds=0.6)
    before = len(terminal.written)
    terminal.read(seconds=0.6)
    redrawn = terminal.written[before:].decode()
    assert "\r" in redrawn and "\n" not in redrawn and max(map(len, redrawn.split("\r"))) < 20


@pytest.mark.parametrize("quiet", [[], ["quiet"]], ids=["", "quiet"])
@pytest.mark.parametrize("variables", [{"NO_COLOR": "1"}, {"TERM": "dumb"}, {"TERM": ""}], ids=str)
def test_plain_lines_where_they_are_asked_for(on_terminal, variables, quiet):
    terminal = on_terminal((80, 24), "60", "0.1", "at-once", *quiet, **variables)
    terminal.read(seconds=30)
    plain = terminal.written.replace(b"\r\n", b"\n")
    assert b"\x1b" not in plain and b"\r" not in plain
    *lines, last = plain.decode().splitlines()
    assert last == "the end" and len(lines) == (0 if quiet else 1)
    assert quiet or re.fullmatch(r"preparing \\x1b\[2J 5\d of 60 MB, 10 MB/s, 1 s left", lines[0])


def test_a_notebook_gets_one_line_and_no_spinner(on_terminal):
    terminal = on_terminal((80, 24), "60", "0.03", "work", JPY_PARENT_PID="1")
    terminal.read(seconds=20)
    text = terminal.written.decode().replace("\r\n", "\n")
    assert re.search(r"\rpreparing .* \d+ of 60 MB", text) and "at work" not in text
    assert not re.search(r"\x1b\[[0-9;?]*[A-LN-Za-ln-z]", text), "colours are all it is sent"
