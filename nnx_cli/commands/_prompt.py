"""The prompt of a command: where it is read, and its token ids."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from nnx_cli.console.output import Output
from nnx_cli.errors import UsageError

if TYPE_CHECKING:
    from nnx_cli.runs.load import ModelRef

MAX_PROMPT_BYTES = 64 * 2**20


def read_prompt(output: Output, prompt: str | None, prompt_file: Path | None, encoding: str | None) -> str:
    """The prompt from the option, or from a file or standard input, which are read as training text is."""
    from nnx_cli.data.charset import read_text
    from nnx_cli.data.sources import Source

    if prompt_file is None and prompt != "-":
        return prompt or ""
    source = Source("standard input") if prompt_file is None else Source(f"--prompt-file {prompt_file}", prompt_file)
    with source.open() as stream:
        text, notes = read_text(stream, MAX_PROMPT_BYTES, encoding)
    for note in notes:
        output.note(note)
    return text


def prompt_ids(text: str, ref: ModelRef, vocab_size: int) -> tuple[str, list[int]]:
    """A prompt as it is shown, and its token ids. Without a tokenizer the prompt is ids; without a prompt it is what a
    text begins with, of which no line break is shown."""
    from nnx_cli.data.conversations import template_of

    tokenizer = ref.tokenizer
    if not text.strip() and (tokenizer is None or not text):
        start = ref.start_ids
        if (template := template_of(tokenizer)) is not None:
            return template.spoken(start), start
        return "" if tokenizer is None else tokenizer.decode(start).lstrip("\n"), start
    if tokenizer is not None:
        return text, tokenizer.encode(text).tolist()
    words = text.split()
    if not all(word.isdecimal() and int(word) < vocab_size for word in words):
        raise UsageError(
            f"this model has no tokenizer: --prompt takes ids below {vocab_size}, such as --prompt '1 2 3'"
        )
    return " ".join(words) + " ", [int(word) for word in words]
