"""Signals that ask a program to stop: noted while a run is trained, obeyed at once when there is nothing to save."""

from __future__ import annotations

import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from nnx_cli.errors import Interrupted

STOPPING = ("SIGINT", "SIGTERM", "SIGHUP", "SIGBREAK")
arrived: list[int] = []
"""The signals that `leave_on_signals` has seen: what a library makes of one may be any error."""

_half_made: list[None] = []


@contextmanager
def stop_signals() -> Iterator[Callable[[], bool]]:
    """A function that says whether SIGINT, SIGTERM or SIGHUP has come; a second Ctrl-C raises KeyboardInterrupt. Python
    hears signals in its first thread alone: in another one none comes."""
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    asked: list[int] = []

    def ask(number: int, frame: Any) -> None:
        asked.extend(_arrived(receiver) or [number])
        if asked.count(signal.SIGINT) > 1 or (number == signal.SIGINT and asked[0] != number):
            raise KeyboardInterrupt

    sender, receiver = socket.socketpair()  # Python calls a handler once for signals that come at the same time
    with sender, receiver, _handled(ask):
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


def _heard() -> list[int]:
    """The signals that ask to stop: those that the system has and that are not ignored, as nohup and a shell's & ask
    for."""
    numbers = [getattr(signal, name) for name in STOPPING if hasattr(signal, name)]
    return [number for number in numbers if signal.getsignal(number) is not signal.SIG_IGN]


@contextmanager
def _handled(handler: Any) -> Iterator[None]:
    """Handle the signals that ask to stop."""
    before = {number: signal.getsignal(number) for number in _heard()}
    try:
        for number in before:
            signal.signal(number, handler)
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)


@contextmanager
def on_interrupt(handler: Any) -> Iterator[None]:
    """Handle Ctrl-C meanwhile, where it is not ignored: by a function, or by None, which raises KeyboardInterrupt."""
    before = signal.getsignal(signal.SIGINT)
    if before is signal.SIG_IGN or threading.current_thread() is not threading.main_thread():
        yield
        return
    signal.signal(signal.SIGINT, handler or signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def leave_on_signals(before: Callable[[], None]) -> None:
    """From here on SIGINT, SIGTERM and SIGHUP end this process at once, after a call of `before`: an exception in the
    middle of a library's import or callback may be lost, or crash it.

    While something is `half_made`, they raise KeyboardInterrupt, so that it can be removed first.
    """

    def leave(number: int, frame: Any) -> None:
        arrived.append(number)
        if _half_made:
            raise KeyboardInterrupt
        before()
        os._exit(Interrupted.exit_code)

    for number in _heard():
        signal.signal(number, leave)


@contextmanager
def half_made() -> Iterator[None]:
    """Something is made that must not be left behind when a signal comes: an exception handler inside removes it."""
    _half_made.append(None)
    try:
        yield
    finally:
        _half_made.pop()
