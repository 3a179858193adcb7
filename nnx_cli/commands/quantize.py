"""`nnx quantize`: a model in 8 or 4 bits, with a receipt."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from nnx_cli.commands._options import command
from nnx_cli.config import check_choice, check_range
from nnx_cli.console import Output, size

GROUP_SIZE = 32


@command()
def run(
    output: Output,
    model: Annotated[
        str | None, typer.Argument(help="Run folder, its name, RUN@best, RUN@last, RUN@500. [default: the newest run]")
    ] = None,
    bits: Annotated[int, typer.Option(help="Bits of a weight: 8 or 4.")] = 8,
    group_size: Annotated[
        int | None,
        typer.Option(help="With 4 bits: neighbouring weights that share a scale.", show_default=str(GROUP_SIZE)),
    ] = None,
    keep: Annotated[
        list[str] | None, typer.Option(help="Layer that stays as it is, such as head; may be repeated.")
    ] = None,
    max_drop: Annotated[
        float | None,
        typer.Option(
            help="Bits per byte that it may cost; if it costs more, exit 6.", show_default="1 % of the model's"
        ),
    ] = None,
    filepath: Annotated[
        list[str] | None, typer.Option(help="Text to measure on. [default: the validation split of the run]")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder to make. [default: weights/NAME-int8 or -int4]")] = None,
    device: Annotated[str, typer.Option(help="Where to measure: auto, cpu, cuda, cuda:N, mps")] = "auto",
) -> None:
    """Make a smaller, faster copy of a model and measure what that costs."""
    check_choice("bits", str(bits), ("8", "4"))
    check_range("group-size", group_size, 2, 2**16)
    check_range("max-drop", max_drop, 0.0, 100.0)
    if bits == 8 and group_size is not None:
        output.note("--group-size is for 4 bits; with 8 there is one scale a row")
    from nnx_cli.convert.quantize import quantize_model
    from nnx_cli.layers.quantized import Quantization
    from nnx_cli.runs.find import WEIGHTS, find_model
    from nnx_cli.system.device import pick_device, pick_precision

    where = pick_device(device)
    ref = find_model(model)
    folder = out or WEIGHTS / f"{ref.folder.resolve().name}-int{bits}"
    how = Quantization(bits=bits, group_size=(group_size or GROUP_SIZE) if bits == 4 else None, kept=keep or [])
    receipt, notes = quantize_model(
        ref, folder, how, paths=filepath or (), max_drop=max_drop, device=where, precision=pick_precision("auto", where)
    )
    for note in notes:
        output.note(note)
    output.show_json(receipt)
    sides = receipt["before"], receipt["after"]
    output.table(
        [ref.label, "before", "after"],
        [
            ["file", *(size(side["file_bytes"]) for side in sides)],
            ["bits per byte", *(number(side["bits_per_byte"], ".4f") for side in sides)],
            ["decoding, tokens/s", *(number(side["decode_tokens_per_s"], ",.0f") for side in sides)],
        ],
    )
    output.show(
        f"divergence {receipt['kl_divergence']:.5f} nats per token, same top token {receipt['same_top_token']:.2%}",
        f"{folder}: try it with: nnx sample {folder}",
    )


def number(value: float | None, form: str) -> str | None:
    """A number as text, or None."""
    return None if value is None else format(value, form)
