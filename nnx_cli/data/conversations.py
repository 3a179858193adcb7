"""Conversations: rows of messages, the template that writes them as tokens, and which of those a model is to learn.

A conversation is an end-of-text token, then for every message the token of its role, its text, and <|end|>. What is
learned are the answers, each with its <|end|>.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from nnx_cli.data.formats import BadRow, first_name, leaves, text_of
from nnx_cli.data.tokenizers.base import END_OF_TEXT, Tokenizer
from nnx_cli.system.text import well_formed

SYSTEM, USER, ASSISTANT = "system", "user", "assistant"
ROLES = {role: f"<|{role}_start|>" for role in (SYSTEM, USER, ASSISTANT)}  # the tokens that messages begin with
END = "<|end|>"
ROLE_TOKENS = (*ROLES.values(), END)
TEXT_KEY, MESSAGES = "text", "messages"  # the field that a text is in by default, and that of a conversation
JINJA = (
    "{{ '%s' }}{%% for message in messages %%}"
    "{{ '<|' + message['role'] + '_start|>' + message['content'] + '%s' }}{%% endfor %%}"
    "{%% if add_generation_prompt %%}{{ '%s' }}{%% endif %%}"
)


class Message(NamedTuple):
    """What one side says."""

    role: str
    content: str


class Conversation(str):
    """Messages that were checked; as text, what is said in them, one below the other."""

    messages: tuple[Message, ...]


@dataclass(frozen=True)
class Pair:
    """The fields of a row, as dotted paths, that hold a prompt and the answer to it."""

    prompt: str
    answer: str


def conversation(messages: Sequence[Message]) -> Conversation | BadRow:
    """A conversation to learn from: it may begin with a system message, and goes from user to assistant."""
    turns = messages[1:] if messages and messages[0].role == SYSTEM else messages
    for number, message in enumerate(turns):
        expected = ASSISTANT if number % 2 else USER
        if message.role != expected:
            before = turns[number - 1].role if number else "the beginning"
            return BadRow(f"its roles are out of order: {message.role} follows {before}")
    if not turns or len(turns) % 2:
        return BadRow("it has no answer" if len(turns) < 2 else "its last message has no answer")
    if any(not message.content.strip() for message in turns[1::2]):
        return BadRow("one of its answers is empty")
    found = Conversation("\n".join(message.content for message in messages))
    found.messages = tuple(messages)
    return found


def conversation_in(row: object, key: str | Pair) -> Conversation | BadRow | None:
    """The conversation in a row: its fields `key`, or, where no other text is asked for, its messages. None where it
    has none."""
    if not isinstance(row, Mapping):
        return None
    if isinstance(key, Pair):
        return _pair_in(row, key)
    return _messages_in(row[MESSAGES]) if key == TEXT_KEY and isinstance(row.get(MESSAGES), list) else None


def question_and_answer(prompt: str, answer: str) -> Conversation | BadRow:
    """The conversation of one prompt and its answer."""
    return conversation([Message(USER, well_formed(prompt)), Message(ASSISTANT, well_formed(answer))])


def _pair_in(row: Mapping[str, Any], key: Pair) -> Conversation | BadRow:
    texts = []
    for what, path in (("prompt", key.prompt), ("answer", key.answer)):
        text = row.get(path)
        text = text if isinstance(text, str) else text_of(list(leaves(row, path)))
        if text is None:
            known = first_name(path, row) is not None
            return BadRow(f"its field {path!r} is not text" if known else f"it has no {what}: no field {path!r}")
        texts.append(text)
    return question_and_answer(*texts)


def _messages_in(rows: list[Any]) -> Conversation | BadRow:
    messages = []
    for row in rows:
        role, content = (row.get("role"), row.get("content")) if isinstance(row, Mapping) else (None, None)
        if not isinstance(role, str) or not isinstance(content, str):
            return BadRow("one of its messages has no text as its role or content")
        if role not in ROLES:
            return BadRow(f"the role {role[:40]!r} is none of {', '.join(ROLES)}")
        messages.append(Message(role, well_formed(content)))
    return conversation(messages)


class Template:
    """Conversations as the ids of a tokenizer that has the special tokens. In a message their names stay text."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        assert tokenizer.eot_id is not None
        self.tokenizer = tokenizer
        self.begin_id = tokenizer.eot_id
        self.role_ids = {role: tokenizer.specials[name] for role, name in ROLES.items()}
        self.end_id = tokenizer.specials[END]

    @property
    def ids(self) -> frozenset[int]:
        """All special tokens of it: none of them belongs in an answer."""
        return frozenset((self.begin_id, self.end_id, *self.role_ids.values()))

    def encode(self, messages: Sequence[Message]) -> tuple[np.ndarray, np.ndarray]:
        """Ids (N,) of a conversation behind its end-of-text token, and which of them count: bool (N,)."""
        ids, counts = [], []
        for role, content in messages:
            said = self.tokenizer.encode(content)
            ids.append(np.concatenate(([self.role_ids[role]], said, [self.end_id])))
            counts.append(np.full(len(said) + 2, role == ASSISTANT))
            counts[-1][0] = False
        return np.concatenate(ids).astype(self.tokenizer.dtype), np.concatenate(counts)

    def prompt(self, messages: Sequence[Message]) -> list[int]:
        """The ids that the assistant's next message follows."""
        return [self.begin_id, *self.encode(messages)[0].tolist(), self.role_ids[ASSISTANT]]

    def spoken(self, ids: Sequence[int]) -> str:
        """What is said in a conversation, each message a line."""
        ends = np.flatnonzero([token_id == self.end_id for token_id in ids])
        return "\n".join(self.tokenizer.decode(part) for part in np.split(np.array(ids, np.int64), ends))

    @property
    def jinja(self) -> str:
        """The template as Hugging Face's chat_template."""
        names = {token_id: name for name, token_id in self.tokenizer.specials.items()}
        return JINJA % (names[self.begin_id], END, ROLES[ASSISTANT])


def template_of(tokenizer: Tokenizer | None) -> Template | None:
    """The template of a tokenizer that has its special tokens."""
    if tokenizer is None or tokenizer.eot_id is None or not tokenizer.specials.keys() >= set(ROLE_TOKENS):
        return None
    return Template(tokenizer)


def with_template(tokenizer: Tokenizer) -> Tokenizer:
    """The tokenizer with the special tokens of conversations; those that it lacks follow its ids."""
    return tokenizer.with_specials([END_OF_TEXT] * (tokenizer.eot_id is None) + [*ROLE_TOKENS])
