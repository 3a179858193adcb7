"""What is served: a model, how much a request may ask of it, and its page."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any

from nnx_cli.data.conversations import Template, template_of
from nnx_cli.data.tokenizers.base import Tokenizer
from nnx_cli.serving.engine import Engine
from nnx_cli.serving.protocol import Refused
from nnx_cli.webpage.page import About, Page, describe_tokenizer, fill_page

WHERE = "It runs on the server that this page came from: what you write is sent there, and nowhere else."


@dataclass(frozen=True)
class Service:
    """A model that is served: its `name`, and how much a request may ask for."""

    name: str
    engine: Engine
    start_ids: Sequence[int]
    about: About
    max_prompt_tokens: int
    max_new_tokens: int

    @property
    def tokenizer(self) -> Tokenizer | None:
        """What turns text into ids."""
        return self.engine.tokenizer

    @property
    def template(self) -> Template | None:
        """How conversations are written for it, where it learned that."""
        return template_of(self.tokenizer)

    def check_model(self, name: str | None) -> None:
        """Raise Refused where a request names another model."""
        if name is not None and name != self.name:
            raise Refused(404, f"there is no model {name[:100]!r} here, but {self.name!r}", "model")

    def check_tokens(self, wanted: int | None, field: str) -> None:
        """Raise Refused where an answer is to be longer than it may, as `field` of the request asks for."""
        if wanted is not None and wanted > self.max_new_tokens:
            raise Refused(422, f"{field} is {wanted:,}; up to {self.max_new_tokens:,} are written", field)

    def check_prompts(self, prompts: Sequence[Sequence[int]], field: str) -> None:
        """Raise Refused where a prompt, which `field` of the request holds, is longer than it may be, or there is
        none."""
        if not prompts:
            raise Refused(422, "prompt: there is none in the list", field)
        longest = max(map(len, prompts))
        if longest > self.max_prompt_tokens:
            raise Refused(413, f"a prompt has {longest:,} tokens; up to {self.max_prompt_tokens:,} are read", field)

    def prompts(self, asked: str | list[Any]) -> list[list[int]]:
        """The ids of the prompts of a request; what a text begins with, where one is empty. Raises Refused."""
        if isinstance(asked, str):
            return [self._ids(asked)]
        if asked and isinstance(asked[0], int):
            return [self._ids(asked)]
        return [self._ids(each) for each in asked]

    def _ids(self, prompt: str | list[int]) -> list[int]:
        if isinstance(prompt, str) and self.tokenizer is None and prompt:
            raise Refused(422, "this model has no tokenizer: a prompt is a list of ids", "prompt")
        vocab_size = self.engine.model.config.vocab_size
        if isinstance(prompt, list) and not all(0 <= token < vocab_size for token in prompt):
            raise Refused(422, f"a prompt has ids that are not below {vocab_size:,}", "prompt")
        if isinstance(prompt, str) and self.tokenizer is not None:
            prompt = self.tokenizer.encode(prompt).tolist()
        return list(prompt) or list(self.start_ids)  # type: ignore[arg-type]  # ids by now

    def described(self) -> dict[str, Any]:
        """What the page has to know of the model."""
        config = self.engine.model.config
        shape = {"vocab_size": config.vocab_size, "seq_len": config.seq_len}
        tokenizer = describe_tokenizer(self.tokenizer, list(self.start_ids))
        return {"config": shape | {"max_prompt_tokens": self.max_prompt_tokens}, "tokenizer": tokenizer}

    def page(self, locked: bool) -> Page:
        """The page of the model, which asks here for tokens; `locked`: requests have to bring a key, also that for what
        it has to know."""
        backend = resources.files(__package__).joinpath("remote.js").read_text(encoding="utf-8")
        content, most = json.dumps(None if locked else self.described()), self.max_new_tokens
        return fill_page(self.about, self.tokenizer, backend, content, where=WHERE, most=most, connects=True)
