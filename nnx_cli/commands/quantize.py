"""`nnx quantize`: a model in 8 or 4 bits, with a receipt."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from nnx_cli.commands._options import (
    READING,
    READING_BRANCHES,
    Branch,
    Device,
    Model,
    ModelFile,
    command,
    given,
    settings,
)
from nnx_cli.config import PrepareConfig, QuantizeConfig, TrainConfig, own_fields
from nnx_cli.console.output import Output
from nnx_cli.console.progress import Progress
from nnx_cli.errors import quoted
from nnx_cli.system.text import size

EXAMPLES = """Examples:

  nnx quantize
  nnx quantize book --bits 4
  nnx quantize book --keep head --out weights/book-small"""

BRANCHES = (
    *READING_BRANCHES,
    Branch(
        {"group_size"},
        lambda v: v["bits"] == 4,
        "with 8 bits, which have one scale a row",
        "leave it out, or add --bits 4",
    ),
)


@command(*settings(QuantizeConfig), *settings(PrepareConfig, only=READING), branches=BRANCHES)
def run(
    output: Output,
    model: Model = None,
    file: ModelFile = None,
    keep: Annotated[
        list[str] | None, typer.Option(help="Layer that stays as it is, such as head; may be repeated.")
    ] = None,
    filepath: Annotated[
        list[str] | None, typer.Option(help="Text to measure on.", show_default="the validation split of the run")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder to make.", show_default="weights/NAME-int8 or -int4")] = None,
    device: Device = TrainConfig.device,
    **options: Any,
) -> None:
    """Make a smaller, faster copy of a model and measure what that costs."""
    config = QuantizeConfig(**given(options, own_fields(QuantizeConfig)))
    preparing = PrepareConfig(**given(options, own_fields(PrepareConfig)))
    from nnx_cli.convert.quantize import quantize_model
    from nnx_cli.layers.quantized import Quantization
    from nnx_cli.runs.find import WEIGHTS, find_model
    from nnx_cli.system.device import pick_device, pick_precision

    where = pick_device(device)
    ref = find_model(model, file)
    folder = out or WEIGHTS / f"{ref.folder.resolve().name}-int{config.bits}"
    how = Quantization(bits=config.bits, group_size=config.group_size if config.bits == 4 else None, kept=keep or [])
    output.note_reading(*(filepath or []))
    with Progress(output) as progress:
        receipt, notes = quantize_model(
            ref,
            folder,
            how,
            paths=filepath or (),
            preparing=preparing,
            max_drop=config.max_drop,
            device=where,
            precision=pick_precision("auto", where),
            tell=progress.share,
        )
    for note in notes:
        output.note(note)
    output.made = folder
    output.show_json(receipt)
    sides = receipt["before"], receipt["after"]
    output.table(
        [ref.label, "before", "after"],
        [
            ["file", *(size(side["file_bytes"]) for side in sides)],
            ["bits per byte", *(_number(side["bits_per_byte"], ".4f") for side in sides)],
            ["decoding, tokens/s", *(_number(side["decode_tokens_per_s"], ",.0f") for side in sides)],
        ],
    )
    output.show(
        f"the likeliest next token is the same {receipt['same_top_token']:.2%} of the time; KL divergence "
        f"{receipt['kl_divergence']:.5f} nats a token",
        f"{folder}",
        f"next: nnx sample {quoted(folder)}{ref.naming}",
    )


def _number(value: float | None, form: str) -> str | None:
    """A number as text, or None."""
    return None if value is None else format(value, form)
