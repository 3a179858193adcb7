"""Progress of work whose size is known, and the time it has left."""

from __future__ import annotations

import time
from collections import deque

from nnx_cli.console.cells import cells, fitting, plain_line
from nnx_cli.console.output import Output
from nnx_cli.console.terminal import styled
from nnx_cli.system.text import duration

SECONDS_SEEN = 60.0  # of the past, by whose speed the rest is judged
SECONDS_FIRST = 1.0  # before which nothing is said of the rest
REDRAW_SECONDS = 0.25
PLAIN_SECONDS = 5.0  # between lines where there is no terminal


class TimeLeft:
    """Tells what is left of work that is `done` from 0 to 1, at the speed of the last minute."""

    def __init__(self) -> None:
        self.seen: deque[tuple[float, float]] = deque()

    def update(self, done: float) -> None:
        """Take note of where it stands."""
        now = time.monotonic()
        if self.seen and done < self.seen[-1][1]:
            self.seen.clear()  # it went back
        if len(self.seen) < 2 or now - self.seen[-2][0] >= REDRAW_SECONDS:
            self.seen.append((now, done))
        else:
            self.seen[-1] = now, done
        while len(self.seen) > 2 and now - self.seen[1][0] > SECONDS_SEEN:
            self.seen.popleft()

    def seconds(self) -> float | None:
        """Seconds from now on; None where nobody knows yet."""
        if not self.seen:
            return None
        (began, before), (ended, done) = self.seen[0], self.seen[-1]
        if ended - began < SECONDS_FIRST or done <= before:
            return None
        left = (1.0 - done) * (ended - began) / (done - before)
        return max(0.0, left - (time.monotonic() - ended))

    def words(self) -> str:
        """What is left, in words; nothing where nobody knows yet."""
        seconds = self.seconds()
        return "" if seconds is None else f"{duration(seconds)} left"


class Progress:
    """A line on stderr that tells how much of something is done, and the time it has left; without a terminal to redraw
    it on, one every few seconds."""

    def __init__(self, output: Output) -> None:
        self.output = output
        self.what = ""
        self.left = TimeLeft()
        self.started = self.last = time.monotonic()
        self.width = 0

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self.end()

    def n_bytes(self, what: str, done: int, total: int | None) -> None:
        """Show where something stands: bytes of a `total`, if that is known; cheap to call often."""
        self._begin(what)
        if total:
            self.left.update(done / total)
        of = f" of {total / 1e6:,.0f}" if total else ""
        seconds = time.monotonic() - self.started
        speed = f"{done / 1e6 / seconds:,.0f} MB/s" if seconds >= REDRAW_SECONDS else ""
        self._show([f"{done / 1e6:,.0f}{of} MB", speed, self.left.words()])

    def share(self, what: str, done: float) -> None:
        """Show where something stands, from 0 to 1; cheap to call often."""
        self._begin(what)
        self.left.update(done)
        self._show([f"{100 * done:.0f} %", self.left.words()])

    def _begin(self, what: str) -> None:
        if what != self.what:
            self.what, self.left, self.started = what, TimeLeft(), time.monotonic()

    def _show(self, parts: list[str]) -> None:
        now, live = time.monotonic(), self.output.live
        if now - self.last < (REDRAW_SECONDS if live else PLAIN_SECONDS):
            return
        self.last = now
        line = plain_line(f"{self.what} " + ", ".join(filter(None, parts)))
        if not live:
            self.output.note(line)
            return
        room = self.output.err.width - 1
        if cells(line) > room:
            line = fitting(parts, room)
        width = cells(line)
        self.output.err.print(styled(line + " " * (min(self.width, room) - width)), end="\r")
        self.width = width

    def end(self) -> None:
        """Take the line off the screen."""
        if self.width:
            self.output.err.print(styled(" " * min(self.width, self.output.err.width - 1)), end="\r")
            self.width = 0
