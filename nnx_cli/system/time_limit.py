"""Calls that may take so long and no longer."""

from __future__ import annotations

from collections.abc import Callable
from queue import Empty, SimpleQueue
from threading import Thread, current_thread
from typing import Any


class TookTooLong(Exception):
    """A call did not end in time."""


class Worker:
    """Makes calls on a thread of its own, one at a time: one that hangs can be left behind there.

    A call from within a call is made at once. The thread ends with the process, whatever it is at.
    """

    def __init__(self) -> None:
        self._calls: SimpleQueue[tuple[Callable[[], Any], SimpleQueue[Any]]] = SimpleQueue()
        self._thread: Thread | None = None

    def run(self, call: Callable[[], Any], seconds: float) -> Any:
        """What `call` returns or raises. Raises TookTooLong after so many seconds."""
        if current_thread() is self._thread:
            return call()
        if self._thread is None or not self._thread.is_alive():  # it does not survive a fork
            self._calls = SimpleQueue()
            self._thread = Thread(target=_serve, args=(self._calls,), daemon=True)
            self._thread.start()
        answers: SimpleQueue[tuple[Any, BaseException | None]] = SimpleQueue()
        self._calls.put((call, answers))
        try:
            value, error = answers.get(timeout=seconds)
        except Empty:
            self._thread = None
            raise TookTooLong from None
        if error is not None:
            raise error
        return value


def _serve(calls: SimpleQueue[tuple[Callable[[], Any], SimpleQueue[Any]]]) -> None:
    while True:
        call, answers = calls.get()
        try:
            answers.put((call(), None))
        except BaseException as error:  # SystemExit too: it is raised where the call was asked for
            answers.put((None, error))
        del call, answers  # and what they hold, until the next one comes
