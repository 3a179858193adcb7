"""`nnx eval`: how well a model predicts text that it has not seen."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Annotated, Any

import typer

from nnx_cli.commands._depth import (
    ByPositionFlag,
    ContextFactors,
    MemorisedFlag,
    TaskNames,
    check_contexts,
    context_factors,
    context_lengths,
    find_tasks,
    load_tasks,
    show_contexts,
    show_memorised,
    show_positions,
    show_tasks,
    task_names,
)
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
from nnx_cli.console.output import Output
from nnx_cli.console.progress import Progress
from nnx_cli.errors import UsageError, counted
from nnx_cli.system.text import duration

if TYPE_CHECKING:
    from nnx_cli.evaluation.by_position import ByPosition
    from nnx_cli.evaluation.held_out import HeldOutText
    from nnx_cli.models._base import LanguageModel
    from nnx_cli.runs.load import ModelRef

EXAMPLES = """Examples:

  nnx eval
  nnx eval book --by-position --context 2x,4x
  nnx eval book@last --filepath other.txt"""

OPTIONS = settings(PrepareConfig, only=READING)


@command(*OPTIONS, branches=READING_BRANCHES)
def run(
    output: Output,
    model: Model = None,
    file: ModelFile = None,
    filepath: Annotated[
        list[str] | None, typer.Option(help="Text to read.", show_default="the validation split of the run")
    ] = None,
    by_position: ByPositionFlag = False,
    context: ContextFactors = None,
    memorised: MemorisedFlag = False,
    tasks: TaskNames = None,
    batch_size: Annotated[int | None, typer.Option(help="Sequences at a time.", show_default="auto")] = None,
    device: Device = TrainConfig.device,
    precision: Precision = TrainConfig.precision,
    **options: Any,
) -> None:
    """Measure loss, perplexity, accuracy and bits per byte on held-out text, with the standard error."""
    check_range("batch-size", batch_size, 1, 2**20)
    factors, names = context_factors(context), task_names(tasks)
    preparing = PrepareConfig(**given(options, own_fields(PrepareConfig)))
    from nnx_cli.commands.prepare import preparation_view
    from nnx_cli.evaluation.by_position import ByPosition
    from nnx_cli.evaluation.held_out import held_out_text, training_folder
    from nnx_cli.runs.find import find_model
    from nnx_cli.runs.load import load_model
    from nnx_cli.system.device import pick_device, pick_precision

    where = pick_device(device)
    precision = pick_precision(precision, where)
    known = find_tasks(output, names) if names else None
    ref = find_model(model, file)
    network = load_model(ref, where, precision)
    training = training_folder(ref, "leave out --memorised, or put the folder back") if memorised else None
    loaded = load_tasks(output, ref, names, known) if names else None
    output.note_reading(*(filepath or []))
    with preparation_view(output) as tell, held_out_text(ref, filepath or [], preparing, tell) as text:
        if text.mask is not None and (by_position or factors):
            raise UsageError(
                "--by-position and --context count every token; in conversations only the answers count",
                fix="leave them out, or name a text: --filepath FILE",
            )
        lengths = context_lengths(network, factors)
        refused = check_contexts(ref, network, text, lengths)
        positions = ByPosition(network.config.seq_len) if by_position else None
        source = ", ".join(filepath) if filepath else "the validation split"
        product = _losses(output, ref, network, text, batch_size, positions, source)
        if positions is not None:
            product |= show_positions(output, ref, network, text, positions)
        if lengths:
            product |= show_contexts(output, network, text, lengths, refused)
        if training is not None:
            product |= show_memorised(output, ref, network, text, training)
        if loaded is not None:
            product |= show_tasks(output, ref, network, loaded)
    output.show_json(product)


def _announcement(network: LanguageModel, n_targets: int, source: str) -> str:
    """What is going to be measured and how long that takes, about: two operations a parameter and token, at the speed
    that is planned with."""
    from nnx_cli.planning.rates import expected_mfu, nominal_flops
    from nnx_cli.system.device import DTYPES

    device, parameters = network.device, sum(p.numel() for p in network.parameters())
    precision = next(name for name, dtype in DTYPES.items() if dtype == network.compute_dtype)
    rate = nominal_flops(device, precision) * expected_mfu(device, network.config.dim)
    seconds = 2 * parameters * n_targets / rate
    return f"measuring {counted(n_targets, 'token')} of {source}: about {duration(max(1, seconds))} by nominal speed"


def _losses(
    output: Output,
    ref: ModelRef,
    network: LanguageModel,
    text: HeldOutText,
    batch_size: int | None,
    positions: ByPosition | None,
    source: str,
) -> dict[str, Any]:
    """Measure losses and accuracy, and show them; `positions` watches. Returns what --json prints of them."""
    from nnx_cli.evaluation.by_document import ByDocument
    from nnx_cli.evaluation.losses import BATCH_TOKENS, Accuracy, evaluate

    token_bytes = None if ref.tokenizer is None else ref.tokenizer.token_bytes()
    seq_len, accuracy = network.config.seq_len, Accuracy()
    documents = None if token_bytes is None else ByDocument(text.documents, token_bytes)
    watchers = [watcher.add for watcher in (accuracy, documents, positions) if watcher is not None]
    if not output.live:  # where it is, a bar says it
        output.note(_announcement(network, text.n_targets, source))
    with Progress(output) as progress:
        n_targets = max(1, text.n_targets)
        result = evaluate(
            network,
            text.tokens,
            seq_len=seq_len,
            batch_size=batch_size or max(1, BATCH_TOKENS // seq_len),
            token_bytes=token_bytes,
            masked=text.masked,
            watchers=[*watchers, lambda scores: progress.share("measuring", accuracy.n_tokens / n_targets)],
        )
    over = "windows"
    if documents is not None and (stderr := documents.stderr()) is not None:
        result, over = replace(result, bits_per_byte_stderr=stderr), "documents"
    shares = accuracy.shares()
    error = "" if result.bits_per_byte_stderr is None else f" ± {result.bits_per_byte_stderr:.4f}"
    bits = "" if result.bits_per_byte is None else f", {result.bits_per_byte:.4f}{error} bits per byte"
    output.show(
        f"{ref.label} on {source}: loss {result.loss:.4f}, perplexity {result.perplexity:.2f}{bits}",
        f"the next token is the likeliest {shares['top1_accuracy']:.1%} of the time, among the five likeliest "
        f"{shares['top5_accuracy']:.1%}",
        f"{counted(result.tokens, 'token')}, {result.tokens_per_s:,.0f} tokens/s"
        + (f"; error over {counted(documents.n_documents, 'document')}" if documents and over == "documents" else ""),
    )
    numbers = {name: value for name, value in asdict(result).items() if name != "window_losses"}
    measured = {"model": ref.label, "loss": result.loss, "perplexity": result.perplexity} | numbers
    return measured | shares | {"stderr_over": over if error else None}
