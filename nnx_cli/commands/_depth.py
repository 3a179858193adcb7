"""What `nnx eval` measures in depth when it is asked to: each function shows it, and returns what --json prints."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any

import typer

from nnx_cli.config import SampleConfig
from nnx_cli.console import Output
from nnx_cli.errors import DoesNotFit, UsageError, counted
from nnx_cli.system.text import size

if TYPE_CHECKING:
    from nnx_cli.data.token_folder import TokenFolder
    from nnx_cli.evaluation.by_position import ByPosition
    from nnx_cli.evaluation.held_out import HeldOutText
    from nnx_cli.models._base import LanguageModel
    from nnx_cli.runs.load import ModelRef

PANEL = "In depth"
MAX_FACTOR = 1024.0
TOKENS_PER_BATCH = 8192
N_SAMPLES, SAMPLE_TOKENS = 16, 512  # that copies are looked for in
SHOWN_CHARS = 200  # of the longest copy

Depth = partial(typer.Option, rich_help_panel=PANEL)
ByPositionFlag = Annotated[
    bool, Depth("--by-position", help="Loss at each position of the context, and whether the context is used.")
]
ContextFactors = Annotated[
    str | None, Depth(help="Loss with so many times the trained context, on the same targets: 2x,4x.")
]
MemorisedFlag = Annotated[bool, Depth("--memorised", help="Draw samples; what they copy from the training text.")]


def context_factors(value: str | None) -> dict[str, float]:
    """The factors of --context by their names, in their order: 2x, 4x. Raises UsageError."""
    factors: dict[str, float] = {}
    for word in [] if value is None else value.split(","):
        match = re.fullmatch(r"([0-9]{1,9}(?:\.[0-9]{1,9})?)x?", word.strip().lower())
        factor = float(match[1]) if match else math.nan
        if not 1 < factor <= MAX_FACTOR:
            raise UsageError(
                f"--context is {value!r}; it must be factors above 1 and at most {MAX_FACTOR:g}, such as 2x,4x"
            )
        factors[f"{factor:g}x"] = factor
    return factors


def context_lengths(network: LanguageModel, factors: Mapping[str, float]) -> dict[str, int]:
    """The factors of --context in tokens."""
    seq_len = network.config.seq_len
    return {name: max(seq_len + 1, round(factor * seq_len)) for name, factor in factors.items()}


def check_contexts(
    ref: ModelRef, network: LanguageModel, text: HeldOutText, lengths: Mapping[str, int]
) -> dict[str, str]:
    """Of the contexts that the model cannot read, why. Raises DataError for a text that is shorter than the longest,
    DoesNotFit for a context that takes more memory than there is."""
    from nnx_cli.evaluation.context import check_text, refusal
    from nnx_cli.planning.memory import evaluation_bytes, hardware_to_plan_for
    from nnx_cli.runs.load import model_from_config
    from nnx_cli.system.device import memory_budget

    refused: dict[str, str] = {}
    for name, length in lengths.items():
        check_text(len(text.tokens), network.config.seq_len, max(lengths.values()))
        if (why := refusal(network, length)) is not None:
            refused[name] = why
            continue
        blank = model_from_config(ref.config, ref.folder, ref.file)
        needed = evaluation_bytes(blank, 1, length, hardware_to_plan_for(network.device))
        if needed > (budget := memory_budget(network.device, None)):
            raise DoesNotFit(
                f"a context of {name}, {length:,} tokens, takes about {size(needed)}; there is room for {size(budget)}",
                fix="take a smaller factor",
            )
    return refused


def show_positions(output: Output, network: LanguageModel, text: HeldOutText, positions: ByPosition) -> dict[str, Any]:
    """Loss by position in bands, and whether the context is used."""
    verdict = positions.verdict(network, text.tokens, TOKENS_PER_BATCH)
    rows = [
        [f"{first:,}" if first == last else f"{first:,} to {last:,}", f"{loss:.4f}", _plus_minus(stderr)]
        for (first, last), loss, stderr in positions.rows()
    ]
    if rows:
        output.table(["position", "loss", "±"], rows)
    output.show(str(verdict))
    measured = None if isinstance(verdict, str) else vars(verdict) | {"used": verdict.used}
    return {"by_position": positions.losses(), "context_used": measured}


def show_contexts(
    output: Output,
    network: LanguageModel,
    text: HeldOutText,
    lengths: Mapping[str, int],
    refused: Mapping[str, str],
) -> dict[str, Any]:
    """Loss beyond the trained length beside the loss within it, on the same targets."""
    from nnx_cli.evaluation.context import losses_by_context

    seq_len = network.config.seq_len
    readable = [name for name in lengths if name not in refused]
    found = losses_by_context(network, text.tokens, [lengths[name] for name in readable], TOKENS_PER_BATCH)
    by_name = dict(zip(["1x", *readable], found, strict=True))
    rows = [
        [
            name,
            f"{each.n_tokens:,}",
            None if each.loss is None else f"{each.loss:.4f}",
            None if each.difference is None else f"{each.difference:+.4f}",
            _plus_minus(each.stderr),
        ]
        for name, each in by_name.items()
    ]
    output.table(["context", "tokens", "loss", "from 1x", "±"], rows)
    for name, why in refused.items():
        output.note(f"{network.architecture} cannot read {name} its context of {seq_len:,} tokens: {why}")
    for name in (name for name, each in by_name.items() if each.loss is None):
        output.note(f"{network.architecture} gives no finite loss at {name} its context of {seq_len:,} tokens")
    measured = dict.fromkeys(lengths) | {name: each.loss for name, each in by_name.items()}
    differences = {
        name: [each.difference, each.stderr] for name, each in by_name.items() if each.difference is not None
    }
    return {"context": {"1x": measured.pop("1x")} | measured, "context_from_1x": differences}


def show_memorised(
    output: Output, ref: ModelRef, network: LanguageModel, text: HeldOutText, training: TokenFolder
) -> dict[str, Any]:
    """What samples copy from the training text, beside what held-out text of the same length has in common with it."""
    import numpy as np

    from nnx_cli.evaluation.memorised import GRAM, find_copies, pieces_like, searched
    from nnx_cli.inference.generate import generate

    with output.spinner("drawing samples and looking for copies"):
        config = SampleConfig(num_samples=N_SAMPLES, max_new_tokens=SAMPLE_TOKENS)
        drawn = generate(network, ref.tokenizer, [ref.start_ids], config).samples
        samples = [np.array(sample.tokens, np.int64) for sample in drawn]
        part = searched(training.train)
        copies, beside = (find_copies(texts, part) for texts in (samples, pieces_like(samples, text.tokens)))
    rows = [
        [name, len(found.longest), None if found.share is None else f"{found.share:.2%}"]
        for name, found in (("samples", copies), ("held-out text", beside))
    ]
    n_tokens = sum(map(len, samples))
    output.table(["in the training text", "longest copy, tokens", f"share of {GRAM}-grams"], rows)
    where = "all" if len(part) == len(training.train) else f"the first {len(part):,}"
    output.show(
        f"{counted(n_tokens, 'token')} of {len(samples)} samples, {where} of {len(training.train):,} training tokens"
    )
    longest = ref.tokenizer.decode(copies.longest) if ref.tokenizer is not None else None
    if longest:
        output.show(f"longest copy: {longest[:SHOWN_CHARS]!r}{'…' if len(longest) > SHOWN_CHARS else ''}")
    measured = {
        "longest_tokens": len(copies.longest),
        "share_50_grams": copies.share,
        "longest_text": longest,
        "held_out": {"longest_tokens": len(beside.longest), "share_50_grams": beside.share},
        "sample_tokens": n_tokens,
        "searched_tokens": len(part),
        "training_tokens": len(training.train),
    }
    return {"memorised": measured}


def _plus_minus(stderr: float | None) -> str | None:
    """A standard error as text, or None."""
    return None if stderr is None else f"{stderr:.4f}"
