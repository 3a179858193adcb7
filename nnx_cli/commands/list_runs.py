"""`nnx list`: the models in weights/."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

import typer

from nnx_cli.commands._options import command
from nnx_cli.console.output import Output
from nnx_cli.system.text import duration

EXAMPLES = """Examples:

  nnx list
  nnx list --all
  nnx list --json"""

COLUMNS = ["name", "kind", "model", "size", "status", "steps", "bits/byte", "age"]
EXPENDABLE = ["size", "steps", "age", "model", "bits/byte", "kind", "status"]  # on a narrow screen, in this order


@command()
def run(
    output: Output,
    every: Annotated[bool, typer.Option("--all", help="Show each run of a race or a sweep, too.")] = False,
) -> None:
    """List the models in weights/: runs, races, sweeps, and what was merged, quantized or imported."""
    from nnx_cli.runs.find import list_models

    models = list_models(every)
    output.show_json(models)
    if models:
        output.table(COLUMNS, [_row(model) for model in models], expendable=EXPENDABLE)
    else:
        output.show("no models in weights/ yet; train one: nnx train --filepath FILE")


def _row(model: Mapping[str, Any]) -> list[Any]:
    bits = model.get("best_val_bits_per_byte")
    return [
        model["name"],
        model["kind"],
        model.get("model"),
        model.get("size") or ("own shape" if model.get("model") and model["kind"] not in ("race", "sweep") else None),
        model["status"],
        model.get("steps"),
        None if bits is None else f"{bits:.4f}",
        duration(model["age_s"]),
    ]
