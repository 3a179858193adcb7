"""`nnx eval`: how well a model predicts text that it has not seen."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated, Any

import typer

from nnx_cli.commands._options import (
    READING,
    READING_BRANCHES,
    Device,
    Model,
    ModelFile,
    Precision,
    command,
    given,
    settings,
)
from nnx_cli.config import PrepareConfig, TrainConfig, check_range, own_fields
from nnx_cli.console import Output
from nnx_cli.errors import counted

OPTIONS = settings(PrepareConfig, only=READING)
TOKENS_PER_BATCH = 8192


@command(*OPTIONS, branches=READING_BRANCHES)
def run(
    output: Output,
    model: Model = None,
    file: ModelFile = None,
    filepath: Annotated[
        list[str] | None, typer.Option(help="Text to read.", show_default="the validation split of the run")
    ] = None,
    batch_size: Annotated[int | None, typer.Option(help="Sequences at a time.", show_default="auto")] = None,
    device: Device = TrainConfig.device,
    precision: Precision = TrainConfig.precision,
    **options: Any,
) -> None:
    """Measure loss, perplexity and bits per byte on held-out text, with the standard error."""
    check_range("batch-size", batch_size, 1, 2**20)
    preparing = PrepareConfig(**given(options, own_fields(PrepareConfig)))
    from nnx_cli.commands.prepare import preparation_view
    from nnx_cli.evaluation.held_out import held_out_tokens
    from nnx_cli.evaluation.losses import evaluate
    from nnx_cli.runs.find import find_model
    from nnx_cli.runs.load import load_model
    from nnx_cli.system.device import pick_device, pick_precision

    where = pick_device(device)
    precision = pick_precision(precision, where)
    ref = find_model(model, file)
    network, tokenizer = load_model(ref, where, precision), ref.tokenizer
    seq_len = network.config.seq_len
    output.note_reading(*(filepath or []))
    with held_out_tokens(ref, filepath or [], preparing, preparation_view(output)) as tokens:
        result = evaluate(
            network,
            tokens,
            seq_len=seq_len,
            batch_size=batch_size or max(1, TOKENS_PER_BATCH // seq_len),
            token_bytes=None if tokenizer is None else tokenizer.token_bytes(),
        )
    numbers = {name: value for name, value in asdict(result).items() if name != "window_losses"}
    output.show_json({"model": ref.label, "loss": result.loss, "perplexity": result.perplexity} | numbers)
    error = "" if result.bits_per_byte_stderr is None else f" ± {result.bits_per_byte_stderr:.4f}"
    bits = "" if result.bits_per_byte is None else f", {result.bits_per_byte:.4f}{error} bits per byte"
    source = ", ".join(filepath) if filepath else "the validation split"
    output.show(
        f"{ref.label} on {source}: loss {result.loss:.4f}, perplexity {result.perplexity:.2f}{bits}",
        f"{counted(result.tokens, 'token')}, {result.tokens_per_s:,.0f} tokens/s",
    )
