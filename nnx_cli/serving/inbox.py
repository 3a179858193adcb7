"""The way of what is written from the thread that decodes to the request that waits for it."""

from __future__ import annotations

import asyncio
from collections import deque
from contextlib import suppress

from nnx_cli.serving.engine import Piece

PAUSE_SECONDS = 0.05  # between two events of a request: to send one for every token takes longer than to draw it


class Inbox:
    """Pieces for one request, which are taken several at a time: the first at once, then after a pause, which the end
    of an answer cuts short. Made on the event loop."""

    def __init__(self) -> None:
        self.loop = asyncio.get_running_loop()
        self.pieces: deque[Piece] = deque()
        self.has_pieces = asyncio.Event()
        self.has_end = asyncio.Event()
        self.is_woken = False
        self.is_first = True

    def put(self, piece: Piece) -> None:
        """Add a piece, from any thread."""
        self.pieces.append(piece)
        if not self.is_woken or piece.ended is not None:
            self.is_woken = True
            with suppress(RuntimeError):  # the loop is closed: nobody waits any more
                self.loop.call_soon_threadsafe(self._wake, piece.ended is not None)

    def _wake(self, has_end: bool) -> None:
        self.has_pieces.set()
        if has_end:
            self.has_end.set()

    async def take(self) -> list[Piece]:
        """What has come since the last time; waits until something has."""
        await self.has_pieces.wait()
        if not self.is_first:
            with suppress(TimeoutError):
                await asyncio.wait_for(self.has_end.wait(), PAUSE_SECONDS)
        self.is_first = False
        self.has_pieces.clear()
        self.has_end.clear()
        self.is_woken = False  # whoever puts a piece from here on wakes it again
        return [self.pieces.popleft() for _ in range(len(self.pieces))]
