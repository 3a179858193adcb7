"""Signals that ask a program to stop: noted while a run is trained, raised before there is anything to save."""

from __future__ import annotations

import signal
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def stop_signals() -> Iterator[Callable[[], bool]]:
    """A function that says whether SIGINT, SIGTERM or SIGHUP has come; a second Ctrl-C raises KeyboardInterrupt."""
    asked: list[int] = []

    def ask(number: int, frame: Any) -> None:
        asked.extend(_arrived(receiver) or [number])
        if asked.count(signal.SIGINT) > 1 or (number == signal.SIGINT and asked[0] != number):
            raise KeyboardInterrupt

    sender, receiver = socket.socketpair()  # Python calls a handler once for signals that come at the same time
    with sender, receiver, _handled(("SIGINT", "SIGTERM", "SIGHUP"), ask):
        sender.setblocking(False)
        receiver.setblocking(False)
        woken = signal.set_wakeup_fd(sender.fileno(), warn_on_full_buffer=False)
        try:
            yield lambda: bool(asked)
        finally:
            signal.set_wakeup_fd(woken)


def _arrived(receiver: socket.socket) -> list[int]:
    """The numbers of the signals that came since the last look."""
    try:
        return list(receiver.recv(4096))
    except BlockingIOError:
        return []


@contextmanager
def _handled(names: tuple[str, ...], handler: Any) -> Iterator[None]:
    """Handle those of these signals that the system has and that are not ignored, as nohup and a shell's & ask for."""
    numbers = [getattr(signal, name) for name in names if hasattr(signal, name)]
    before = {number: signal.getsignal(number) for number in numbers}
    before = {number: old for number, old in before.items() if old is not signal.SIG_IGN}
    try:
        for number in before:
            signal.signal(number, handler)
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)


@contextmanager
def signals_as_ctrl_c() -> Iterator[None]:
    """SIGTERM and SIGHUP raise KeyboardInterrupt, as Ctrl-C does: for the time when there is nothing to save yet."""

    def interrupt(number: int, frame: Any) -> None:
        raise KeyboardInterrupt

    with _handled(("SIGTERM", "SIGHUP"), interrupt):
        yield
