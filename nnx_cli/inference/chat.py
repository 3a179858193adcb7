"""A conversation with a model; with one that has no template for such, a text that both sides write."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from nnx_cli.config import SampleConfig
from nnx_cli.data.conversations import ASSISTANT, SYSTEM, USER, Message, template_of
from nnx_cli.data.tokenizers.base import Tokenizer
from nnx_cli.inference.generate import generate
from nnx_cli.models._base import LanguageModel

ROOM = 0.5  # part of the context that is kept free for a reply at most
MAX_SEED = 2**63


@dataclass(frozen=True)
class Reply:
    """What a model said. `n_forgotten` messages did not fit into its context; `stop_reason` as of a `Sample`."""

    text: str
    stop_reason: str
    n_tokens: int
    tokens_per_s: float
    n_forgotten: int


class Chat:
    """Messages and what a model answers. `system` is what it is told beforehand, where it has a template."""

    def __init__(self, model: LanguageModel, tokenizer: Tokenizer, start_ids: Sequence[int]) -> None:
        """`start_ids` are what a text begins with, for a model without a template."""
        self.model = model
        self.tokenizer = tokenizer
        self.template = template_of(tokenizer)
        self.start_ids = list(start_ids)
        self.system: str | None = None
        self.messages: list[Message] = []
        self.n_drawn = 0  # replies, each with a seed of its own

    @property
    def conversation(self) -> list[Message]:
        """All messages, the system's before them."""
        return ([] if self.system is None else [Message(SYSTEM, self.system)]) + self.messages

    @property
    def text(self) -> str:
        """What both sides wrote as one text, in which the user begins a new line."""
        text = ""
        for role, content in self.messages:
            text += "\n" * bool(role == USER and content and text and not text.endswith("\n")) + content
        return text

    def say(
        self,
        said: str,
        config: SampleConfig,
        stops: Sequence[str] = (),
        on_text: Callable[[str], None] = lambda text: None,
        should_stop: Callable[[], bool] = lambda: False,
    ) -> Reply:
        """What the model replies, which `on_text` gets as it comes; it ends early where `should_stop` says so. A reply
        that is ended before its first word is none: then nothing was said."""
        self.messages.append(Message(USER, said))
        ids, n_forgotten = self.prompt_ids(config.max_new_tokens)
        config = replace(config, num_samples=1, seed=(config.seed + self.n_drawn) % MAX_SEED)
        try:
            drawn = generate(
                self.model,
                self.tokenizer,
                [ids],
                config,
                stops=stops,
                on_text=lambda _, text: on_text(text),
                should_stop=should_stop,
            )
        except BaseException:
            self.messages.pop()
            raise
        sample = drawn.samples[0]
        self.n_drawn += 1
        if sample.text or sample.stop_reason != "interrupted":
            self.messages.append(Message(ASSISTANT, sample.text))
        else:
            self.messages.pop()
        return Reply(sample.text, sample.stop_reason, len(sample.tokens), drawn.decode_tokens_per_s, n_forgotten)

    def prompt_ids(self, max_new_tokens: int) -> tuple[list[int], int]:
        """The ids that the next reply follows, and how many of the oldest messages had to be left out of them."""
        if self.template is None:
            return self.tokenizer.encode(self.text).tolist() or self.start_ids, 0
        turns, n_forgotten = self.messages, 0
        system = self.conversation[: len(self.conversation) - len(turns)]
        most = self.model.config.seq_len - min(max_new_tokens, int(ROOM * self.model.config.seq_len))
        while len(ids := self.template.prompt([*system, *turns[n_forgotten:]])) > most and n_forgotten + 2 < len(turns):
            n_forgotten += 2
        return ids, n_forgotten

    def undo(self) -> str | None:
        """Take back the last exchange; returns what the user said in it, None where there was none."""
        if not self.messages:
            return None
        said = self.messages[-2].content
        del self.messages[-2:]
        return said

    def reset(self) -> None:
        """Begin anew."""
        self.messages.clear()
