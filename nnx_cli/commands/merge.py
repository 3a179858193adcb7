"""`nnx merge`: a run with adapters to a plain model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from nnx_cli.commands._options import Device, ModelFile, command, runs_named
from nnx_cli.config import TrainConfig
from nnx_cli.console.output import Output
from nnx_cli.errors import quoted

EXAMPLES = """Examples:

  nnx merge
  nnx merge book-lora
  nnx merge book-lora --out weights/mine"""


@command()
def run(
    output: Output,
    model: Annotated[
        str | None, typer.Argument(help="Run with adapters.", show_default="the newest run", autocompletion=runs_named)
    ] = None,
    file: ModelFile = None,
    out: Annotated[Path | None, typer.Option(help="Folder to make.", show_default="weights/NAME-merged")] = None,
    device: Device = TrainConfig.device,
) -> None:
    """Add the adapters of --lora-rank to the weights, and show that both models agree."""
    from nnx_cli.convert.merge_lora import merge_model
    from nnx_cli.runs.find import WEIGHTS, find_model
    from nnx_cli.system.device import pick_device

    where = pick_device(device)
    ref = find_model(model, file)
    result = merge_model(ref, out or WEIGHTS / f"{ref.folder.resolve().name}-merged", where)
    output.made = Path(result["out"])
    output.show_json(result)
    output.show(
        f"{result['out']}: {result['parameters']:,} parameters; scores of tokens (logits) differ by "
        f"{result['largest_logit_difference']:.1e} at most from those with the adapter",
        f"next: nnx sample {quoted(result['out'])}{ref.naming}",
    )
