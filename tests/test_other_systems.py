"""What can be imitated of Windows: a console that is not Unicode, and its locks."""

import io
import shlex
import sys
from types import SimpleNamespace

import pytest

from nnx_cli.cli import app
from nnx_cli.runs import run as runs
from nnx_cli.system import streams


@pytest.mark.parametrize("encoding", ["cp1252", "ascii"])
@pytest.mark.parametrize(
    "line",
    ["list", "summarize words", "sample words --prompt '小猫 naïve' --max-new-tokens 5", "report", "eval words --help"],
)
def test_a_console_that_is_not_unicode(run, monkeypatch, encoding, line):
    shown = {name: io.TextIOWrapper(io.BytesIO(), encoding=encoding) for name in ("stdout", "stderr")}
    for number, (name, stream) in enumerate(shown.items(), 1):
        monkeypatch.setattr(sys, name, streams._writable(stream, number))
    with pytest.raises(SystemExit) as ended:
        app(shlex.split(line))
    written = {}
    for name, stream in shown.items():
        stream.flush()
        written[name] = stream.buffer.getvalue().decode(encoding)
    assert ended.value.code == 0, written["stderr"]
    assert written["stdout"].strip() and "Traceback" not in written["stderr"]


def test_a_lock_of_windows_is_exclusive(tmp_path, monkeypatch):
    held = {}

    def locking(descriptor, mode, n_bytes):
        assert mode == "NBLCK" and n_bytes == 1
        if held.setdefault("by", descriptor) != descriptor:
            raise PermissionError

    monkeypatch.setitem(sys.modules, "msvcrt", SimpleNamespace(locking=locking, LK_NBLCK="NBLCK"))
    monkeypatch.setattr(sys, "platform", "win32")
    with open(tmp_path / "lock", "a+b") as first, open(tmp_path / "lock", "a+b") as second:
        assert runs._try_lock(first) and not runs._try_lock(second)
        assert first.tell() > 2**20  # beyond what is written there, which others read
