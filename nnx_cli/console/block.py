"""A block of lines at the bottom of a terminal, while others scroll above it."""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, TextIO, cast

from nnx_cli.console.cells import Line, cells
from nnx_cli.console.terminal import on_screen, screen_size

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions
    from rich.segment import Segment

ERASE_BELOW, CLEAR, UP = "\x1b[J", "\x1b[H\x1b[2J", "\x1b[{}A"
HIDE_CURSOR, SHOW_CURSOR = "\x1b[?25l", "\x1b[?25h"
NO_WRAP, WRAP = "\x1b[?7l", "\x1b[?7h"  # what a terminal finds wider than we do is cut, and takes one row all the same
KEPT_LINES = 300  # of what scrolls above: with them a screen whose size changed is painted anew

Layout = Callable[[int, int], Sequence[Line]]  # columns and lines of the screen -> the block


class Block:
    """What `layout` makes of the size of the screen, kept below everything else that is written. A hook of rich's.

    Between two drawings the cursor stands at the end of its last line, hidden. With `returns_only` it is one line that
    is overwritten after a carriage return, and nothing else moves. `before` is what was written already.
    """

    def __init__(
        self, console: Console, layout: Layout, *, returns_only: bool = False, before: Iterable[Any] = ()
    ) -> None:
        self.console = console
        self.layout = layout
        self.returns_only = returns_only
        self.size = screen_size(console.file)
        self.n_rows = 0  # that it takes on the screen
        self.widest = 0
        self.scrolled = deque(before, maxlen=KEPT_LINES)
        self.streams: tuple[TextIO, TextIO] | None = None

    def start(self) -> None:
        """Begin to keep it below what is written, be it by others to stdout and stderr."""
        from rich.file_proxy import FileProxy

        self.console.push_render_hook(cast("Any", self))  # which has the method that a hook needs
        self.streams = sys.stdout, sys.stderr
        sys.stdout, sys.stderr = (cast("TextIO", FileProxy(self.console, stream)) for stream in self.streams)
        on_screen.append(self.erasing)
        self.draw()

    def stop(self) -> None:
        """Take it off the screen."""
        if self.streams is None:
            return
        for stream in (sys.stdout, sys.stderr):
            stream.flush()  # a line that was begun
        (sys.stdout, sys.stderr), self.streams = self.streams, None
        self.console.pop_render_hook()
        on_screen.remove(self.erasing)
        self._write(self.erasing())
        self.n_rows = 0

    def draw(self) -> None:
        """Draw it anew."""
        self._write("")

    def process_renderables(self, renderables: list[Any]) -> list[Any]:
        """What rich writes: the block is taken off before it, and put back after it."""
        from rich.segment import Segment

        new = [renderable for renderable in renderables if not isinstance(renderable, _Raw)]
        self.scrolled.extend(new)
        size, erasing = screen_size(self.console.file), self.erasing()
        lines = self.layout(*size)
        if size != self.size and (self.widest > size[0] or self.n_rows > size[1]):
            new, erasing = self._last_lines(size[0], size[1] - len(lines)), CLEAR  # nobody knows where it is by now
        self.size, self.n_rows = size, len(lines)
        self.widest = max(sum(map(len, (text for text, _ in line))) for line in lines)
        hide, no_wrap, wrap = ("", "", "") if self.returns_only else (HIDE_CURSOR, NO_WRAP, WRAP)
        segments = [Segment(no_wrap)]
        for line in lines:
            segments += [Segment(text, self.console.get_style(style) if style else None) for text, style in line]
            segments.append(Segment("\n"))
        return [_Raw(Segment(erasing + hide)), *new, _Raw(*segments[:-1], Segment(wrap))]

    def erasing(self) -> str:
        """What takes it off the screen."""
        if self.returns_only:
            return f"\r{' ' * self.widest}\r" if self.n_rows else ""
        up = UP.format(self.n_rows - 1) if self.n_rows > 1 else ""
        return f"\r{up}{ERASE_BELOW}{WRAP}{SHOW_CURSOR}" if self.n_rows else ""

    def _write(self, text: str) -> None:
        from rich.segment import Segment

        self.console.print(_Raw(Segment(text)), end="")

    def _last_lines(self, width: int, room: int) -> list[Any]:
        """The last of what scrolled above that the screen has room for."""
        shown: list[Any] = []
        for renderable in reversed(self.scrolled):
            lines = str(renderable).removesuffix("\n").split("\n")
            room -= sum(max(1, -(-cells(line) // width)) for line in lines)
            if room < 0:
                break
            shown.insert(0, renderable)
        return shown


class _Raw:
    """Segments that rich writes as they are."""

    def __init__(self, *segments: Segment) -> None:
        self.segments = segments

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Segment]:
        yield from self.segments
