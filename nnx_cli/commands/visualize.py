"""`nnx visualize`: what a model attends to, gates and selects in a text."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from nnx_cli.commands._inside_view import rounded, show_insides, show_layer, show_map
from nnx_cli.commands._options import Device, Model, ModelFile, command
from nnx_cli.commands._prompt import prompt_ids, read_prompt
from nnx_cli.config import TrainConfig
from nnx_cli.console.output import Output
from nnx_cli.errors import DataError, UsageError, counted

if TYPE_CHECKING:
    from nnx_cli.layers.insides import Insides, Panel
    from nnx_cli.models._base import LanguageModel

MOST_WEIGHTS = 2**26  # of all heads; an architecture may have a few maps for each
EXAMPLES = """Examples:

  nnx visualize --prompt "The cat sat on the mat"
  nnx visualize book --prompt "The cat sat" --layer 2 --head 1
  nnx visualize book --prompt "The cat sat" --html cat.html"""


@command()
def run(
    output: Output,
    model: Model = None,
    file: ModelFile = None,
    prompt: Annotated[str | None, typer.Option(help="Text to look at; - reads standard input.")] = None,
    html: Annotated[Path | None, typer.Option(help="File for a page with all pictures, which opens anywhere.")] = None,
    layer: Annotated[int | None, typer.Option(help="Look closer at one layer, from 1.", show_default="all")] = None,
    head: Annotated[
        int | None, typer.Option(help="Whole map of one head of --layer, from 1.", show_default="all")
    ] = None,
    device: Device = TrainConfig.device,
) -> None:
    """Show what a model attends to, gates and selects in a text."""
    if head is not None and layer is None:
        raise UsageError("--head needs the layer that it belongs to", fix="add --layer N")
    if html is not None and layer is not None:
        raise UsageError("--layer and --html: give one; a page shows all layers")
    if not prompt:
        raise UsageError("--prompt is missing" if prompt is None else "--prompt is empty", fix='--prompt "Some text"')
    from nnx_cli.inference.insides import look_inside, token_as_code
    from nnx_cli.reporting.page import BEGINNING
    from nnx_cli.reporting.run_record import refuse_foreign
    from nnx_cli.runs.find import find_model
    from nnx_cli.runs.load import load_model
    from nnx_cli.system.device import pick_device

    where = pick_device(device)
    ref = find_model(model, file)
    if html is not None:
        refuse_foreign(html, [BEGINNING.encode()], "name another file: --html FILE")
    output.note_reading(prompt)
    text = read_prompt(output, prompt, None, None)
    if not text:
        raise DataError("standard input is empty", fix='--prompt "Some text"')
    network = load_model(ref, where)
    text, ids = prompt_ids(text, ref, network.config.vocab_size)
    ids = _that_fit(output, ids, network)
    insides = look_inside(network, ids)
    if not insides.attention:
        raise UsageError(
            f"{ref.label} has nothing to show: its architecture neither calls torch's scaled_dot_product_attention nor "
            "has a method insides()"
        )
    _check_range(insides, layer, head)
    tokens = [token_as_code(ref.tokenizer, token) for token in ids]
    subject = f"{ref.label} ({network.architecture})"
    if html is not None:
        seen = " ".join(tokens) if ref.tokenizer is None else ref.tokenizer.decode(ids)
        _write(output, html, subject, seen, tokens, insides)
    elif head is not None and layer is not None:
        show_map(output, tokens, insides, layer, head)
    elif layer is not None:
        show_layer(output, tokens, insides, layer)
    else:
        show_insides(output, subject, tokens, insides)
    whole = {"model": ref.label, "architecture": network.architecture, "prompt": text, "tokens": tokens, "ids": ids}
    output.show_json(whole | _as_json(insides, layer, head) | {"out": html and str(html)})


def _write(output: Output, html: Path, subject: str, text: str, tokens: list[str], insides: Insides) -> None:
    """Write the page, and say where."""
    from nnx_cli.reporting.insides_page import insides_page
    from nnx_cli.reporting.page import write_page

    write_page(html, insides_page(subject, text, tokens, insides))
    output.made = html
    output.show(f"{html}: {subject} and {counted(len(tokens), 'token')}; open it in a browser")


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
    }
