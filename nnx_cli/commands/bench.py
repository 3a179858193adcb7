"""`nnx bench`: how fast this machine trains and decodes."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from nnx_cli import models
from nnx_cli.commands._options import (
    ARCHITECTURE_HELP,
    DEFAULT_MODEL,
    SIZE_HELP,
    command,
    given,
    model_fields,
    settings,
)
from nnx_cli.config import TrainConfig, check_choice, check_range, own_fields
from nnx_cli.console.output import Output
from nnx_cli.errors import DoesNotFit, UsageError
from nnx_cli.system.text import size as size_text

if TYPE_CHECKING:
    from nnx_cli.experiments.benchmark import Benchmark

EXAMPLES = """Examples:

  nnx bench
  nnx bench --model all --size tiny
  nnx bench --batch-size 1,16 --seconds 0.5"""

COMPUTING = {"on": ", compiled", "graph": ", graph", "off": ""}
SHOWN = {"training": "model FLOPs, of large matmuls", "decoding": "bytes read, of a large copy"}
TRAINED_AS = [field for field in own_fields(TrainConfig) if field.name in ("compile", "device", "vram", "threads")]
SHAPE = [field for name, field in model_fields().items() if name in ("vocab_size", "seq_len")]


@command(*settings([*SHAPE, *TRAINED_AS]))
def run(
    output: Output,
    model: Annotated[str, typer.Option(help=f"{ARCHITECTURE_HELP} Or all.")] = DEFAULT_MODEL,
    size: Annotated[
        str | None,
        typer.Option(help=SIZE_HELP, show_default="nano; small on a GPU"),
    ] = None,
    batch_size: Annotated[str, typer.Option(help="Sequences at a time, one or more numbers.")] = "1,8,32",
    precision: Annotated[
        str | None,
        typer.Option(help="Arithmetic, one or more: auto, fp32, bf16, fp16.", show_default="auto; on a GPU fp32 too"),
    ] = None,
    seconds: Annotated[float, typer.Option(help="Time of each measurement.")] = 2.0,
    **options: Any,
) -> None:
    """Measure training and decoding speed, beside what the machine can do. Random tokens; no file is written."""
    names = models.names() if model == "all" else [model]
    for name in names:
        models.check_name(name)
    batch_sizes = _whole_numbers("batch-size", batch_size)
    precisions = _words(precision or "")
    for each in precisions:
        check_choice("precision", each, ("auto", "fp32", "bf16", "fp16"))
    check_range("seconds", seconds, 0.0, 3600.0, low_open=True)
    config = TrainConfig(**given(options, TRAINED_AS))
    fields = given(options, SHAPE)
    from nnx_cli.experiments.benchmark import measure_all

    found = measure_all(
        names, size, fields, config, batch_sizes=batch_sizes, precisions=precisions, seconds=seconds, tell=output.note
    )
    output.show_json(found.machine | {"limits": asdict(found.limits), "rows": [asdict(row) for row in found.rows]})
    _show(output, found)
    problems = [row.problem for row in found.rows if row.problem]
    if len(problems) == len(found.rows):
        raise DoesNotFit(problems[-1])


def _words(text: str) -> list[str]:
    """The parts of a list: "fp32,bf16" or "fp32 bf16", each once."""
    return list(dict.fromkeys(text.replace(",", " ").split()))


def _whole_numbers(option: str, text: str) -> list[int]:
    """The numbers of a list, at least one. Raises UsageError."""
    try:
        found = [int(word) for word in _words(text)]
    except ValueError:
        found = []
    if not found:
        raise UsageError(f"--{option} is {text!r}; it must be whole numbers", fix=f"write it like --{option} 1,8,32")
    for number in found:
        check_range(option, number, 1, 2**20)
    return found


def _show(output: Output, found: Benchmark) -> None:
    """Two tables under what they were measured on, to be pasted into an issue."""
    machine, limits = found.machine, found.limits
    versions = machine["versions"]
    rates = ", ".join(f"{precision} {rate / 1e12:.3g} TFLOP/s" for precision, rate in limits.flops.items())
    output.show(
        f"nnx {versions['nnx']}, torch {versions['torch']}, Python {versions['python']}, {machine['system']}, "
        f"{machine['date']}",
        machine["device"],
        f"large matmuls: {rates}; large copies: {limits.bytes_per_s / 1e9:,.1f} GB/s",
    )
    for what, share in SHOWN.items():
        lines = [
            [
                f"{row.model} {row.size}",
                f"{row.parameters / 1e6:,.2f} M",
                f"{row.batch_size} x {row.seq_len}",
                row.precision + COMPUTING[row.compile],
                "does not fit" if row.problem else f"{row.tokens_per_s:,.0f}",
                None if row.share is None else f"{row.share:.1%}",
                None if row.problem else size_text(row.peak_memory_bytes),
            ]
            for row in found.rows
            if row.what == what
        ]
        columns = ["model", "params", "batch", "computing", "tokens/s", "share", "peak"]
        output.table(columns, lines, f"{what} (share: {share})")
