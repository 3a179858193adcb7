"""Standard streams that are closed, full, hung up, without a reader: real processes, most of them without torch."""

import errno
import io
import os
import subprocess
import sys

import pytest

from nnx_cli.commands._prompt import read_prompt
from nnx_cli.console.output import Output
from nnx_cli.errors import DataError, OutputError
from nnx_cli.system.streams import ForgivingStream, ProductStream

pytestmark = pytest.mark.skipif(os.name != "posix", reason="redirected by a POSIX shell")
needs_full = pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no device that is always full")


def shell(line, cwd=None, **variables):
    """A line of a shell in which $NNX is the command: exit code, stdout, stderr."""
    nnx = f"{sys.executable} -m nnx_cli"
    done = subprocess.run(
        ["sh", "-c", line], cwd=cwd, env=os.environ | {"NNX": nnx} | variables, capture_output=True, timeout=120
    )
    return done.returncode, done.stdout.decode(), done.stderr.decode()


LIGHT = ["--help", "train --help", "--version"]  # what needs no torch


@needs_full
@pytest.mark.parametrize("words", LIGHT)
def test_a_full_disk_is_code_8_and_one_line(words):
    code, _, said = shell(f"$NNX {words} > /dev/full")
    assert code == 8 and said.count("nnx: ") == 1 and "No space left on device" in said
    assert "Traceback" not in said and "Exception" not in said
    assert shell(f"$NNX {words} > /dev/full 2> /dev/full") == (8, "", "")


@pytest.mark.parametrize("words", LIGHT[1:])
def test_streams_that_are_closed(words):
    _, whole, _ = shell(f"$NNX {words}")
    assert whole.endswith("\n")
    for closed in ("<&-", "2>&-", "<&- 2>&-"):
        assert shell(f"$NNX {words} {closed}") == (0, whole, ""), closed
    for closed in (">&-", ">&- 2>&-", "<&- >&- 2>&-"):
        assert shell(f"$NNX {words} {closed}") == (0, "", ""), closed


@needs_full
def test_a_full_disk_below_help_without_panels():
    code, _, said = shell("$NNX list --help > /dev/full", COLUMNS="40")
    assert code == 8 and "No space left on device" in said


def test_what_cannot_be_written_to_is_code_8():
    code, _, said = shell("$NNX --version 1< /dev/null")
    assert code == 8 and said.startswith("nnx: cannot write to standard output: Bad file descriptor")


@pytest.mark.parametrize("words", LIGHT)
def test_a_reader_that_leaves_is_no_error(words):
    code, _, said = shell(f"$NNX {words} | true; $NNX {words} | head -c 5 > /dev/null")
    assert (code, said) == (0, "")


@needs_full
@pytest.mark.parametrize("redirected", ["2> /dev/full", "> /dev/full", "2>&-", ">&- 2>&-", "> /dev/full 2>&-"])
def test_an_error_keeps_its_code_where_nobody_hears_it(redirected):
    assert shell(f"$NNX frobnicate {redirected}")[0] == 2


@pytest.mark.parametrize("words", ["list", "prepare words.txt", "summarize --all", "sample --prompt x"])
def test_a_current_folder_that_was_deleted(tmp_path, words):
    code, out, said = shell(f"mkdir gone; cd gone; rmdir ../gone; $NNX {words} 2>&1 | grep -v getcwd", tmp_path)
    assert out == "nnx: the current folder was deleted\n     cd ~\n"


def test_no_file_gets_the_number_of_a_closed_stream():
    """What others print must not end up in a file of ours."""
    script = "from nnx_cli.system.streams import set_up_streams; set_up_streams(); import os\n"
    script += "print(os.open(os.devnull, os.O_RDONLY) > 2)"
    done = subprocess.run(["sh", "-c", f"{sys.executable} -c '{script}' <&- 2>&-"], capture_output=True)
    assert done.stdout == b"True\n"


def test_a_pipe_that_another_process_made_impatient(tmp_path):
    """With O_NONBLOCK set, as others leave it, a slow reader would cost the rest of the text."""
    script = "import os; os.set_blocking(1, False); os.set_blocking(2, False)\n"
    script += "from nnx_cli.system.streams import set_up_streams; set_up_streams()\nprint('x' * 10**6)"
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert os.read(process.stdout.fileno(), 3) == b"xxx"
        out, said = process.communicate()
    assert len(out) == 10**6 - 2 and said == b"" and process.returncode == 0


class Failing(io.StringIO):
    """A stream whose file descriptor leads to a file of its own, and whose writes fail."""

    def __init__(self, code, terminal, path):
        super().__init__()
        self.code, self.terminal, self.file = code, terminal, open(path, "w")

    def write(self, text):
        raise OSError(self.code, os.strerror(self.code))

    def fileno(self):
        return self.file.fileno()

    def isatty(self):
        return self.terminal


@pytest.mark.parametrize("code", [errno.EIO, errno.EPIPE, errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EBADF])
def test_notes_are_lost_in_silence(tmp_path, code):
    stream = ForgivingStream(Failing(code, True, tmp_path / "x"))
    assert stream.write("words") == 5
    assert os.path.samestat(os.fstat(stream.fileno()), os.stat(os.devnull)), "for what is still buffered"


@pytest.mark.parametrize(
    ("code", "terminal", "kind"),
    [
        (errno.ENOSPC, False, OutputError),
        (errno.EDQUOT, False, OutputError),
        (errno.EFBIG, False, OutputError),
        (errno.EIO, False, OutputError),
        (errno.EPIPE, False, BrokenPipeError),
        (errno.ESHUTDOWN, False, BrokenPipeError),
        (errno.EIO, True, None),
    ],
)
def test_a_product_that_is_lost_is_an_error(tmp_path, code, terminal, kind):
    stream = ProductStream(Failing(code, terminal, tmp_path / "x"))
    if kind is None:  # the terminal was closed
        assert stream.write("words") == 5
    else:
        with pytest.raises(kind):
            stream.write("words")


@pytest.mark.parametrize(
    "words", ["prepare - --out x", "prepare - --tokenizer char --out x", "prepare --filepath - --out x"]
)
def test_standard_input_that_is_closed_is_code_3(tmp_path, words):
    code, _, said = shell(f"$NNX {words} <&-", tmp_path)
    assert code == 3 and said.splitlines()[0] == "nnx: standard input is closed" and len(said.splitlines()) == 2
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("stdin", [None, io.StringIO()], ids=["never open", "closed since"])
def test_a_prompt_from_standard_input_that_is_closed(monkeypatch, stdin):
    if stdin is not None:
        stdin.close()
    monkeypatch.setattr(sys, "stdin", stdin)
    with pytest.raises(DataError, match="standard input is closed"):
        read_prompt(Output(quiet=True), "-", None, None)


def test_standard_input_that_cannot_be_read(monkeypatch, tmp_path):
    class Unreadable:
        closed = False

        class buffer:
            @staticmethod
            def read(n):
                raise OSError(errno.EBADF, "Bad file descriptor")

    monkeypatch.setattr(sys, "stdin", Unreadable())
    with pytest.raises(DataError, match="cannot read standard input: Bad file descriptor"):
        read_prompt(Output(quiet=True), "-", None, None)
