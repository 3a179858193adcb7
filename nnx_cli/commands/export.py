"""`nnx export`: a model for other programs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from nnx_cli.commands._options import Branch, Model, ModelFile, command, given, settings
from nnx_cli.config import Field, check_choice, module_names, read_fields
from nnx_cli.console.output import Output
from nnx_cli.console.progress import Progress
from nnx_cli.system.text import size

EXAMPLES = """Examples:

  nnx export --format hf
  nnx export book@last --format hf --out book-hf --data-name "My book"
  nnx export book --format gguf --outtype q8_0
  nnx export book --format onnx
  nnx export book --format html --bits 4"""

PACKAGE = "convert/export"
FORMATS = module_names(PACKAGE)


def _own_options(name: str) -> tuple[Field, ...]:
    """The options that a format alone has, read from its source."""
    try:
        return read_fields(Path(__file__).parents[1] / PACKAGE / f"{name}.py", "Options")
    except LookupError:
        return ()


OWN = {name: _own_options(name) for name in FORMATS}


def _branch(name: str) -> Branch:
    """The options of a format are read with that format."""
    return Branch({field.name for field in OWN[name]}, lambda v: v["format"] == name, f"without --format {name}")


@command(
    *(parameter for name, fields in OWN.items() for parameter in settings(fields, f"With --format {name}")),
    branches=[_branch(name) for name in FORMATS],
)
def run(
    output: Output,
    format: Annotated[str, typer.Option(help=f"What to write: {', '.join(FORMATS)}.")],
    model: Model = None,
    file: ModelFile = None,
    out: Annotated[
        Path | None, typer.Option(help="What to make.", show_default="NAME-FORMAT or NAME.FORMAT in the current folder")
    ] = None,
    data_name: Annotated[
        str | None, typer.Option(help="What the model card calls the text.", show_default="nothing")
    ] = None,
    **options: Any,
) -> None:
    """Write a model for other programs, open it with the format's own library, and show that both compute the same."""
    check_choice("format", format, FORMATS)
    from nnx_cli.convert.export._export import export_model, load_format
    from nnx_cli.runs.find import find_model

    ref = find_model(model, file)
    form = load_format(format)
    suffix = Path(form.FILE).suffix if form.FILE else f"-{format}"
    place = out or Path(f"{ref.folder.resolve().name}{suffix}")
    own = form.Options(**given(options, OWN[format])) if OWN[format] else None  # type: ignore[attr-defined]  # where there are some
    with Progress(output) as progress:
        receipt, notes = export_model(ref, format, place, options=own, data_name=data_name, tell=progress.share)
    output.made = place
    for note in notes:
        output.note(note)
    output.show_json(receipt)
    output.show(f"{receipt['out']}: {size(receipt['file_bytes'])}")
    if suffix == ".html":
        output.show(f"open it in a browser, here or elsewhere, without a network: {place.resolve().as_uri()}")
    output.show(
        f"checked: read again, it writes the same {receipt['same_greedy_tokens']} tokens as the model; scores of "
        f"tokens (logits) differ by {receipt['max_logit_difference']:.1e} at most"
    )
