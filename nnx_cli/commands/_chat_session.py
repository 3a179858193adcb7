"""The lines of a chat: what is said to the model, and commands that begin with a slash."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nnx_cli.config import Field, SampleConfig, own_fields, unescape
from nnx_cli.console.output import Output
from nnx_cli.errors import NnxError, OutputError, UsageError, nearest
from nnx_cli.system.files import refused_output, write_synced

if TYPE_CHECKING:
    from nnx_cli.inference.chat import Chat

SETTINGS = {field.name: field for field in own_fields(SampleConfig) if field.name != "num_samples"}
QUOTES = ("'", '"')  # may stand around the name of a file
YES, NO = ("on", "yes", "true", "1"), ("off", "no", "false", "0")


class ChatSession:
    """Takes the lines of a chat, one after the other."""

    def __init__(self, output: Output, chat: Chat, config: SampleConfig, stops: list[str]) -> None:
        self.output = output
        self.chat = chat
        self.config = config
        self.stops = stops
        self.commands: dict[str, Callable[[str], object]] = {
            "set": self.set,
            "show": self.show,
            "reset": self.reset,
            "retry": self.retry,
            "undo": self.undo,
            "save": self.save,
            "help": self.help,
        }

    def take(self, line: str) -> bool:
        """Do what a line asks for; False where it ends the chat. What is wrong with it is told, and ends nothing."""
        if not line.startswith("/") or line.startswith("//"):
            if line.strip() or self.chat.template is None:
                self.say(line[1:] if line.startswith("//") else line)
            return True
        name, _, rest = line[1:].partition(" ")
        if name == "quit":
            return False
        try:
            if name not in self.commands:
                raise UsageError(f"there is no /{name}{nearest(name, [*self.commands, 'quit'])}", fix="see: /help")
            self.commands[name](rest.strip())
        except NnxError as error:
            self.output.warn(f"{error}" + (f"; {error.fix}" if error.fix else ""))
        return True

    def say(self, said: str) -> None:
        """Show what the model replies; Ctrl-C ends it."""
        from nnx_cli.system.signals import on_interrupt

        asked: list[int] = []
        with on_interrupt(lambda number, frame: asked.append(number)):
            reply = self.chat.say(said, self.config, self.stops, self.output.stream, lambda: bool(asked))
        if reply.text and not reply.text.endswith("\n"):
            self.output.stream("\n")
        if reply.n_forgotten:
            self.output.note(f"(the first {reply.n_forgotten} messages are beyond its context)")
        if reply.stop_reason == "interrupted":
            self.output.note("(ended by Ctrl-C)" if reply.text else "(ended before its first word: nothing was said)")
        elif reply.stop_reason == "length" and self.chat.template is not None:
            self.output.note(f"(cut off after {reply.n_tokens} tokens: /set max-new-tokens)")
        elif not reply.text:
            self.output.note("(it says nothing)")

    def set(self, words: str) -> None:
        """/set NAME VALUE: draw otherwise; without VALUE: its default"""
        name, _, value = words.partition(" ")
        field, value = name.replace("-", "_"), value.strip()
        if field == "stop":
            self.stops = [unescape(value)] if value else []
        elif field == "system" and self.chat.template is not None:
            self.chat.system = value or None
        elif field in SETTINGS:
            self.config = replace(self.config, **{field: _parsed(SETTINGS[field], value)})
        else:
            known = [*SETTINGS, "stop", *(["system"] if self.chat.template is not None else [])]
            names = ", ".join(known).replace("_", "-")
            raise UsageError(f"there is no setting {name!r}{nearest(name, known)}", fix=f"there are {names}")
        self.output.note(f"{name.replace('_', '-')} is {self._shown(field)}")

    def _shown(self, field: str) -> str:
        if field == "stop":
            return ", ".join(map(repr, self.stops)) or "none"
        value = self.chat.system if field == "system" else getattr(self.config, field)
        return "none" if value is None else value if isinstance(value, str) else json.dumps(value)

    def show(self, words: str) -> None:
        """/show: the settings, and how much of the context is taken"""
        fields = [*SETTINGS, "stop", *(["system"] if self.chat.template is not None else [])]
        self.output.aligned([(field.replace("_", "-"), self._shown(field), "") for field in fields])
        taken, most = len(self.chat.prompt_ids(self.config.max_new_tokens)[0]), self.chat.model.config.seq_len
        self.output.note(f"{len(self.chat.messages)} messages; {taken:,} of {most:,} tokens of context")

    def reset(self, words: str) -> None:
        """/reset: begin anew"""
        self.chat.reset()
        self.output.note("forgotten")

    def retry(self, words: str) -> None:
        """/retry: another reply to what was said last"""
        said = self.chat.undo()
        if said is None:
            raise UsageError("nothing was said yet")
        if self.config.greedy or self.config.temperature == 0:
            self.output.note("(the likeliest token is taken every time: /set greedy off lets replies differ)")
        self.say(said)

    def undo(self, words: str) -> None:
        """/undo: take back what was said last, and the reply"""
        said = self.chat.undo()
        if said is None:
            raise UsageError("nothing was said yet")
        self.output.note(f"taken back: {said}")

    def save(self, words: str) -> None:
        """/save FILE: write the conversation, as a row that can be trained on, or the text"""
        name = words[1:-1] if words[:1] in QUOTES and words[-1:] == words[:1] else words
        if not name:
            raise UsageError("/save takes the name of a file")
        path = Path(os.path.expanduser(name))
        if os.path.lexists(path):
            raise OutputError(f"{path} exists already", fix="take another name")
        with refused_output(path):
            write_synced(path, self._content().encode())
        self.output.note(f"saved {path}")

    def _content(self) -> str:
        if self.chat.template is None:
            return self.chat.text
        return json.dumps({"messages": self.messages()}, ensure_ascii=False) + "\n"

    def messages(self) -> list[dict[str, str]]:
        """What was said so far."""
        return [{"role": role, "content": content} for role, content in self.chat.conversation]

    def help(self, words: str) -> None:
        """/help: these lines"""
        lines = [str(command.__doc__).partition(": ") for command in self.commands.values()]
        rows = [(name, what, "") for name, _, what in [*lines, ("/quit", ": ", "end the chat, as Ctrl-D does")]]
        self.output.aligned([*rows, ("//TEXT", "say something that begins with a slash", "")])


def _parsed(field: Field, text: str) -> Any:
    """The value of a setting as it is typed; its default where nothing is. Raises UsageError."""
    if not text or text == "none":
        return field.default
    if field.type == "bool":
        if text.lower() not in YES + NO:
            raise UsageError(f"{field.option[2:]} is on or off, not {text!r}")
        return text.lower() in YES
    try:
        return {"int": int, "float": float}[field.type](text)
    except ValueError as error:
        raise UsageError(f"{field.option[2:]} is a number, not {text!r}") from error
