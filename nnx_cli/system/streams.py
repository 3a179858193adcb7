"""Standard input, output and error as a process finds them: closed, full, hung up, without a reader."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, BinaryIO, TextIO, cast

from nnx_cli.errors import DataError, OutputError

NOBODY_READS = {errno.EPIPE, errno.ESHUTDOWN} | ({errno.EINVAL} if os.name == "nt" else set())


class ForgivingStream:
    """A stream that falls silent when writing fails, because the terminal was closed, nobody reads the pipe or the disk
    is full: a lost note ends no run."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream

    def write(self, text: str) -> int:
        """Write; says that all was written where nobody hears it."""
        if text != "":  # a library asks with nothing what this is, and loses what that fails with
            with self._listening():
                self.stream.write(text)
        return len(text)

    def flush(self) -> None:
        """Flush."""
        with self._listening():
            self.stream.flush()

    @contextmanager
    def _listening(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            with suppress(OSError), open(os.devnull, "wb") as nowhere:
                os.dup2(nowhere.fileno(), self.stream.fileno())  # for what is buffered, and Python's own last words
            self._lost(error)

    def _lost(self, error: OSError) -> None:
        """Called after a failure, when the stream leads nowhere."""

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


class ProductStream(ForgivingStream):
    """A stream whose text is wanted: raises BrokenPipeError where nobody reads it, OutputError where it cannot be
    written; it falls silent where its terminal was closed."""

    def __init__(self, stream: TextIO) -> None:
        super().__init__(stream)
        self._is_terminal = stream.isatty()

    def _lost(self, error: OSError) -> None:
        if error.errno in NOBODY_READS:
            raise BrokenPipeError(*error.args) from error
        if error.errno != errno.EIO or not self._is_terminal:
            raise OutputError(
                f"cannot write to standard output: {error.strerror or error}",
                fix="free some space there, or send it elsewhere",
            ) from error


def set_up_streams() -> None:
    """Make standard output and error writable, in whatever state this process found them."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:  # closed: the next file that is opened would take its number, and get what others print
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
        if hasattr(os, "set_blocking"):
            with suppress(OSError):
                os.set_blocking(number, True)  # another process may have changed what it shares with this one
    sys.stdout = cast("TextIO", ProductStream(_writable(sys.stdout, 1)))
    sys.stderr = cast("TextIO", ForgivingStream(_writable(sys.stderr, 2)))


def _writable(stream: TextIO | None, number: int) -> TextIO:
    """A stream that encodes whatever it is given; None (closed before this began) leads nowhere."""
    if stream is None:
        return open(number, "w", encoding="utf-8", errors="replace", closefd=False)
    if hasattr(stream, "reconfigure"):
        stream.reconfigure(errors="replace", **({"encoding": "utf-8"} if os.name == "nt" else {}))
    return stream


def standard_input() -> BinaryIO:
    """Standard input in bytes. Raises DataError where it was closed before this began."""
    if sys.stdin is None or sys.stdin.closed:
        raise DataError("standard input is closed", fix="name a file, or pipe the text into this command")
    return sys.stdin.buffer
