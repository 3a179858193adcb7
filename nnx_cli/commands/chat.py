"""`nnx chat`: talk to a model."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from nnx_cli.commands._chat_session import SETTINGS, ChatSession
from nnx_cli.commands._options import Branch, Device, Model, ModelFile, Precision, command, given, settings
from nnx_cli.commands.sample import DRAWING, STOP, Stops
from nnx_cli.config import SampleConfig, TrainConfig, unescape
from nnx_cli.console.line_input import LineInput
from nnx_cli.console.output import Output
from nnx_cli.errors import UsageError

EXAMPLES = """Examples:

  nnx chat
  nnx chat book --temperature 0.7 --max-new-tokens 100
  nnx chat book --greedy"""

BRANCHES = (STOP, *DRAWING, Branch({"system"}, lambda v: v["system"], "without text"))


@command(*settings(SETTINGS.values()), branches=BRANCHES)
def run(
    output: Output,
    model: Model = None,
    file: ModelFile = None,
    system: Annotated[str | None, typer.Option(help="What a model of conversations is told beforehand.")] = None,
    stop: Stops = None,
    device: Device = TrainConfig.device,
    precision: Precision = TrainConfig.precision,
    **options: Any,
) -> None:
    """Talk to a model that was trained on conversations, or write a text together with another one."""
    config = SampleConfig(**given(options, SETTINGS.values()))
    from nnx_cli.inference.chat import Chat
    from nnx_cli.runs.find import find_model
    from nnx_cli.runs.load import load_model
    from nnx_cli.system.device import pick_device, pick_precision

    where = pick_device(device)
    ref = find_model(model, file)
    tokenizer = ref.tokenizer
    if tokenizer is None:
        raise UsageError(f"{ref.label} has no tokenizer: it reads no text", fix="nnx sample takes its ids as --prompt")
    chat = Chat(load_model(ref, where, pick_precision(precision, where)), tokenizer, ref.start_ids)
    if chat.template is None and system is not None:
        raise UsageError(
            f"{ref.label} was trained on no conversations: --system says nothing to it", fix="leave it out"
        )
    chat.system = system
    session = ChatSession(output, chat, config, [unescape(text) for text in stop or ()])
    lines = LineInput()
    if lines.is_terminal:
        _introduce(output, ref.label, chat.template is not None)
    _talk(output, lines, session)
    said = session.messages()
    output.show_json({"model": ref.label, "template": chat.template is not None, "messages": said})


def _introduce(output: Output, label: str, talks: bool) -> None:
    what = f"{label} was trained on conversations: ask it something"
    if not talks:
        what = f"{label} answers no questions: it continues text. Type how one begins; Enter alone goes on with it"
    output.note(f"{what}\n/help lists commands, Ctrl-C ends a reply, Ctrl-D the chat")


def _talk(output: Output, lines: LineInput, session: ChatSession) -> None:
    """Take lines until they or a command end the chat."""
    from nnx_cli.system.signals import on_interrupt

    with on_interrupt(None):
        while True:
            try:
                line = lines.read()
                if line is None:
                    lines.new_line()
                    return
                if not session.take(line):
                    return
            except KeyboardInterrupt:
                if not lines.is_terminal:
                    raise
                lines.new_line()
                output.note("(Ctrl-D or /quit ends the chat)")
