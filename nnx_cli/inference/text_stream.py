"""Tokens to text, piece by piece."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from nnx_cli.data.conversations import template_of
from nnx_cli.data.tokenizers.base import StreamDecoder, Tokenizer


class TextStream:
    """Tokens of one sample to text: whole characters only, nothing beyond a stop string, an end-of-text token or any
    special token of a conversation, for a text in it ends there."""

    def __init__(self, tokenizer: Tokenizer | None, stops: Sequence[str], on_text: Callable[[str], None]) -> None:
        self.decoder = StreamDecoder(tokenizer) if tokenizer is not None else None
        template = template_of(tokenizer)
        self.end_ids = frozenset((tokenizer and tokenizer.eot_id,)) if template is None else template.ids
        self.stops = [stop for stop in stops if stop]
        self.on_text = on_text
        self.tokens: list[int] = []
        self.pieces: list[str] = []
        self.held = ""  # what may be the beginning of a stop string
        self.stop_reason: str | None = None

    @property
    def text(self) -> str:
        """What has been let go so far."""
        return "".join(self.pieces)

    def push(self, token: int) -> None:
        """Take the next token; sets `stop_reason` when the sample ends with it."""
        if token in self.end_ids:
            self.finish("eot")
            return
        self.tokens.append(token)
        self._release(self.decoder.push(token) if self.decoder else f"{token} ", final=False)

    def finish(self, reason: str) -> None:
        """End the sample, unless it has ended, and let go of what was held back, but not of half a character."""
        if self.stop_reason is None:
            self._release("", final=True)
            self.stop_reason = self.stop_reason or reason

    def _release(self, new: str, final: bool) -> None:
        self.held += new
        found = [at for stop in self.stops if (at := self.held.find(stop)) >= 0]
        if found:
            self.held, self.stop_reason = self.held[: min(found)], "stop"
        keep = 0 if final or found else max((overlap(self.held, stop) for stop in self.stops), default=0)
        out, self.held = self.held[: len(self.held) - keep], self.held[len(self.held) - keep :]
        if out:
            self.pieces.append(out)
            self.on_text(out)


def overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that could be the beginning of `stop`."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
