"""Progress of work whose size is known."""

import sys

import pytest

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


def test_a_pipe_gets_nothing_of_it(clock, capsys):
    with Progress(Output()) as progress:
        clock[0] += 10.0
        progress.share("measuring", 0.5)
        progress.n_bytes("preparing", 5, None)
    assert capsys.readouterr() == ("", "")
