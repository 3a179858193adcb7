"""`nnx import`: a checkpoint of others to a model folder."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from nnx_cli import models
from nnx_cli.commands._options import command, model_fields
from nnx_cli.console.output import Output
from nnx_cli.errors import UsageError, quoted

EXAMPLES = """Examples:

  nnx import nyx.pth --model nyx
  nnx import nyx.pth --model nyx --out weights/mine
  nnx import llama-folder --model llama    (of Hugging Face's Hub)"""

VARIANT = model_fields()["variant"]


@command()
def run(
    output: Output,
    file: Annotated[
        Path,
        typer.Argument(help="Checkpoint of an original: .pth, .pt or .safetensors; for llama a folder of the Hub's."),
    ],
    model: Annotated[str, typer.Option(help=f"Architecture it belongs to: {', '.join(models.names())}.")],
    tokenizer: Annotated[
        str | None,
        typer.Option(help="Its tokenizer, or none.", show_default="a folder's own; bytes where the vocabulary is 256"),
    ] = None,
    variant: Annotated[str | None, typer.Option(help=VARIANT.sentence, show_default="the architecture's")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder to make.", show_default="weights/MODEL-NAME")] = None,
) -> None:
    """Read an original's checkpoint, running nothing that is in it, and write a model folder."""
    models.check_name(model)
    from nnx_cli.convert.import_hub import import_hub
    from nnx_cli.convert.import_original import import_checkpoint
    from nnx_cli.training.session import free_folder

    is_folder = file.is_dir()
    stem = file.resolve().name if is_folder else file.stem
    out = out or free_folder(stem if is_folder and stem.startswith(f"{model}-") else f"{model}-{stem}")
    if is_folder:
        if variant is not None:
            raise UsageError("--variant does nothing with a folder of the Hub's layout", fix="leave it out")
        config, notes = import_hub(model, file, out, tokenizer)
    elif model == "llama":
        raise UsageError(
            "llama has no original: it is read from a folder of the Hub's layout, with its config.json",
            fix=f"name the folder: nnx import --model llama {quoted(file.parent)}",
        )
    else:
        config, notes = import_checkpoint(model, file, out, tokenizer, variant)
    output.made = out
    for note in notes:
        output.note(note)
    output.show_json({"out": str(out), "model": model, "parameters": config["parameters"]})
    output.show(f"{out}: {model} with {config['parameters']:,} parameters", f"next: nnx sample {quoted(out)}")
