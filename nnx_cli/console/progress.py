"""Progress of work whose size is known."""

from __future__ import annotations

import time

from nnx_cli.console.output import Output
from nnx_cli.console.terminal import styled


class ByteProgress:
    """A line that tells how many megabytes are done, where there is a terminal to redraw it."""

    def __init__(self, output: Output, what: str) -> None:
        self.output = output
        self.what = what
        self.started = time.monotonic()
        self.last = 0.0

    def update(self, done_bytes: int, total_bytes: int | None) -> None:
        """Show where it stands; cheap to call often."""
        now = time.monotonic()
        if self.output.live and now - self.last > 0.1:
            self.last = now
            of = f" of {total_bytes / 1e6:,.0f}" if total_bytes else ""
            speed = done_bytes / 1e6 / max(now - self.started, 1e-6)
            self.output.err.print(styled(f"{self.what} {done_bytes / 1e6:,.0f}{of} MB, {speed:,.0f} MB/s"), end="\r")

    def end(self) -> None:
        """Take the line off the screen."""
        if self.output.live and self.last:
            self.output.err.print(" " * 60, end="\r")
