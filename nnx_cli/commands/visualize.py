"""`nnx visualize`: what a model attends to, gates and selects in a text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from nnx_cli.commands._inside_view import rounded, show_insides, show_layer, show_learning, show_map
from nnx_cli.commands._options import Branch, Device, Model, ModelFile, command
from nnx_cli.commands._prompt import prompt_ids, read_prompt
from nnx_cli.config import TrainConfig
from nnx_cli.console.output import Output
from nnx_cli.errors import DataError, UsageError, counted

if TYPE_CHECKING:
    from nnx_cli.layers.insides import Insides, Panel
    from nnx_cli.models._base import LanguageModel
    from nnx_cli.runs.load import ModelRef
    from nnx_cli.runs.snapshots import Snapshot

MOST_WEIGHTS = 2**26  # of all heads; an architecture may have a few maps for each
NO_PROMPT = "without --prompt: what the run kept as it learned is shown"
BRANCHES = (Branch({"device"}, lambda v: v["prompt"] is not None, NO_PROMPT),)
EXAMPLES = """Examples:

  nnx visualize --prompt "The cat sat on the mat"
  nnx visualize book --prompt "The cat sat" --layer 2 --head 1
  nnx visualize book --prompt "The cat sat" --html cat.html
  nnx visualize book    (what the run kept as it learned)"""


@dataclass(frozen=True)
class _Seen:
    """What there is to show: the insides of a model with a text, of which it sees the part `shown`."""

    subject: str
    architecture: str
    text: str | None
    shown: str
    ids: list[int] | None
    tokens: list[str]
    insides: Insides


@command(branches=BRANCHES)
def run(
    output: Output,
    model: Model = None,
    file: ModelFile = None,
    prompt: Annotated[
        str | None,
        typer.Option(help="Text to look at; - reads standard input.", show_default="what the run kept of itself"),
    ] = None,
    html: Annotated[Path | None, typer.Option(help="File for a page with all pictures, which opens anywhere.")] = None,
    layer: Annotated[int | None, typer.Option(help="Look closer at one layer, from 1.", show_default="all")] = None,
    head: Annotated[
        int | None, typer.Option(help="Whole map of one head of --layer, from 1.", show_default="all")
    ] = None,
    device: Device = TrainConfig.device,
) -> None:
    """Show what a model attends to, gates and selects in a text, and how that came as it learned."""
    if head is not None and layer is None:
        raise UsageError("--head needs the layer that it belongs to", fix="add --layer N")
    if html is not None and layer is not None:
        raise UsageError("--layer and --html: give one; a page shows all layers")
    if prompt == "":
        raise UsageError("--prompt is empty", fix='--prompt "Some text"')
    from nnx_cli.reporting.page import BEGINNING
    from nnx_cli.reporting.run_record import refuse_foreign
    from nnx_cli.runs.find import find_model

    ref = find_model(model, file)
    if html is not None:
        refuse_foreign(html, [BEGINNING.encode()], "name another file: --html FILE")
    snapshots = _snapshots(output, ref)
    seen = _kept(ref, snapshots) if prompt is None else _read(output, ref, prompt, device)
    insides = seen.insides
    _check_range(insides, layer, head)
    if html is not None:
        _write(output, html, seen, snapshots)
    elif head is not None and layer is not None:
        show_map(output, seen.tokens, insides, layer, head)
    elif layer is not None:
        show_layer(output, seen.tokens, insides, layer)
    else:
        show_insides(output, seen.subject, seen.tokens, insides)
        show_learning(output, snapshots)
    whole = {"model": ref.label, "architecture": seen.architecture, "prompt": seen.text, "tokens": seen.tokens}
    steps = [each.step for each in snapshots]
    output.show_json(
        {**whole, "ids": seen.ids, "steps": steps} | _as_json(insides, layer, head) | {"out": html and str(html)}
    )


def _snapshots(output: Output, ref: ModelRef) -> list[Snapshot]:
    """What the run of a model kept of its insides, up to the step that is asked for."""
    from nnx_cli.runs.snapshots import read_snapshots

    snapshots, damaged = read_snapshots(ref.folder)
    for line in damaged:
        output.warn(f"{line}; left out")
    return [each for each in snapshots if not ref.which.isdecimal() or each.step <= int(ref.which)]


def _kept(ref: ModelRef, snapshots: Sequence[Snapshot]) -> _Seen:
    """What a run saw in its model last. Raises UsageError where it kept nothing."""
    from nnx_cli.inference.insides import with_heads
    from nnx_cli.layers.insides import as_text

    if not snapshots:
        raise UsageError(
            f"--prompt is missing, and {ref.label} kept nothing of its insides as it learned",
            fix='--prompt "Some text"',
        )
    last, architecture = snapshots[-1], str(ref.config["model"]["name"])
    if not last.insides.attention:
        _refuse(ref)
    subject, tokens = f"{ref.label} ({architecture}) after step {last.step:,}", list(last.tokens)
    return _Seen(subject, architecture, None, "".join(as_text(tokens)), None, tokens, with_heads(last.insides))


def _read(output: Output, ref: ModelRef, prompt: str, device: str) -> _Seen:
    """What a model does with a prompt."""
    from nnx_cli.inference.insides import look_inside, spelled_out, token_as_code
    from nnx_cli.runs.load import load_model
    from nnx_cli.system.device import pick_device

    where = pick_device(device)
    output.note_reading(prompt)
    text = read_prompt(output, prompt, None, None)
    if not text:
        raise DataError("standard input is empty", fix='--prompt "Some text"')
    network = load_model(ref, where)
    text, ids = prompt_ids(text, ref, network.config.vocab_size)
    ids = _that_fit(output, ids, network)
    insides = spelled_out(look_inside(network, ids), ref.tokenizer)
    if not insides.attention:
        _refuse(ref)
    tokens = [token_as_code(ref.tokenizer, token) for token in ids]
    shown = " ".join(tokens) if ref.tokenizer is None else ref.tokenizer.decode(ids)
    return _Seen(f"{ref.label} ({network.architecture})", network.architecture, text, shown, ids, tokens, insides)


def _refuse(ref: ModelRef) -> NoReturn:
    raise UsageError(
        f"{ref.label} has nothing to show: its architecture neither calls torch's scaled_dot_product_attention nor "
        "has a method insides()"
    )


def _write(output: Output, html: Path, seen: _Seen, snapshots: Sequence[Snapshot]) -> None:
    """Write the page, and say where."""
    from nnx_cli.reporting.insides_page import insides_page
    from nnx_cli.reporting.page import write_page

    write_page(html, insides_page(seen.subject, seen.shown, seen.tokens, seen.insides, snapshots))
    output.made = html
    output.show(f"{html}: {seen.subject} and {counted(len(seen.tokens), 'token')}; open it in a browser")


def _that_fit(output: Output, ids: list[int], network: LanguageModel) -> list[int]:
    """The last tokens, as many as the context and the memory for maps have room for, with a note if they are fewer."""
    config = network.config
    room = max(1, int((MOST_WEIGHTS / (len(network.blocks) * config.n_heads)) ** 0.5))
    if len(ids) > config.seq_len:
        output.note(f"the prompt has {len(ids):,} tokens; the model sees the last {config.seq_len:,}")
    most = min(config.seq_len, room)
    if len(ids[-config.seq_len :]) > most:
        output.note(f"the maps of all heads have room for {most:,} tokens: the model sees the last ones only")
    return ids[-most:]


def _check_range(insides: Insides, layer: int | None, head: int | None) -> None:
    """Raise UsageError for a layer or head that is not there."""
    if layer is None:
        return
    n_layers = len(insides.layers)
    if not 1 <= layer <= n_layers:
        raise UsageError(f"--layer is {layer}; this model has {_numbered(n_layers, 'layer')}")
    n_heads = len(insides.attention[layer - 1])
    if head is not None and not 1 <= head <= n_heads:
        raise UsageError(f"--head is {head}; {insides.layers[layer - 1]} has {_numbered(n_heads, 'head')}")


def _numbered(n: int, noun: str) -> str:
    return f"{noun}s 1 to {n}" if n > 1 else f"one {noun}"


def _as_json(insides: Insides, layer: int | None, head: int | None) -> dict[str, Any]:
    """What --json prints of the insides: attention of the last token by layer and head, whole maps of one layer."""
    shown: dict[str, Any] = {
        "layers": list(insides.layers),
        "attention": [rounded(weights[:, -1]) for weights in insides.attention],
        "panels": [_panel_as_json(panel) for panel in insides.panels],
    }
    if layer is not None:
        weights = insides.attention[layer - 1]
        shown["maps"] = rounded(weights if head is None else weights[head - 1 : head])
    return shown


def _panel_as_json(panel: Panel) -> dict[str, Any]:
    columns = None if panel.columns is None else list(panel.columns)
    return {
        "title": panel.title,
        "about": panel.about,
        "kind": panel.kind,
        "rows": list(panel.rows),
        "columns": columns,
        "values": rounded(panel.values),
        "tokens": panel.tokens,
    }
