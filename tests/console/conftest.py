"""Commands on a terminal of a test's own."""

import sys
from pathlib import Path

import pytest
from console.terminal import Terminal

DRIVER = str(Path(__file__).with_name("driver.py"))


@pytest.fixture
def on_terminal():
    """Runs the driver: on_terminal((columns, lines), words, VARIABLES)."""
    if sys.platform == "win32":
        pytest.skip("pseudo-terminals of POSIX")
    opened = []

    def run(size, *words, **variables):
        opened.append(Terminal([DRIVER, *words], *size, **variables))
        return opened[-1]

    yield run
    for terminal in opened:
        terminal.close()
