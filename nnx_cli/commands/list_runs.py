"""`nnx list`: the runs in weights/."""

from __future__ import annotations

from nnx_cli.commands._options import command
from nnx_cli.console import Output, duration


@command()
def run(output: Output) -> None:
    """List the runs: name, model, size, status, steps, best bits per byte, age."""
    from nnx_cli.runs.find import list_models

    rows = list_models()
    output.show_json(rows)
    if not rows:
        output.show("no runs in weights/ yet; train one: nnx train --filepath FILE")
        return
    table = []
    for row in rows:
        bits = row.get("best_val_bits_per_byte")
        table.append(
            [
                row["name"],
                row["kind"],
                row.get("model"),
                row.get("size") or "own shape",
                row["status"],
                row.get("steps"),
                None if bits is None else f"{bits:.4f}",
                duration(row["age_s"]),
            ]
        )
    output.table(["name", "kind", "model", "size", "status", "steps", "bits/byte", "age"], table)
