"""What `nnx eval` measures in depth when it is asked to: each function shows it, and returns what --json prints."""

from __future__ import annotations

import importlib.util
import io
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, suppress
from functools import partial
from itertools import count
from typing import TYPE_CHECKING, Annotated, Any

import typer

from nnx_cli.config import SampleConfig
from nnx_cli.console.output import Output
from nnx_cli.console.progress import Progress
from nnx_cli.errors import CheckpointError, DataError, DoesNotFit, MissingFeature, UsageError, counted, pip_install
from nnx_cli.system.text import size

if TYPE_CHECKING:
    from nnx_cli.data.token_folder import TokenFolder
    from nnx_cli.evaluation.by_position import ByPosition, Verdict
    from nnx_cli.evaluation.held_out import HeldOutText
    from nnx_cli.models._base import LanguageModel
    from nnx_cli.runs.load import ModelRef

PANEL = "In depth"
MAX_FACTOR = 1024.0
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

TaskNames = Annotated[
    str | None,
    Depth(help="Tasks of lm-evaluation-harness, or files of yours: lambada_openai,my.yaml. They may load their data."),
]


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


def show_positions(
    output: Output, ref: ModelRef, network: LanguageModel, text: HeldOutText, positions: ByPosition
) -> dict[str, Any]:
    """Loss by position in bands, and whether the context is used."""
    from nnx_cli.evaluation.losses import BATCH_TOKENS

    with Progress(output) as progress:
        tell = partial(progress.share, "reading the same tokens with less before them")
        verdict = positions.verdict(network, text.tokens, BATCH_TOKENS, tell)
    rows = [
        [f"{first:,}" if first == last else f"{first:,} to {last:,}", f"{loss:.4f}", _plus_minus(stderr)]
        for (first, last), loss, stderr in positions.rows()
    ]
    if rows:
        output.table(["position", "loss", "±"], rows)
    output.show(str(verdict))
    if not isinstance(verdict, str):
        _coach_context(output, ref, verdict)
    measured = None if isinstance(verdict, str) else vars(verdict) | {"used": verdict.used}
    return {"by_position": positions.losses(), "context_used": measured}


def _coach_context(output: Output, ref: ModelRef, verdict: Verdict) -> None:
    """What to do about a context that a run does not use, where the model is a run."""
    from nnx_cli.reporting.coach import unused_context
    from nnx_cli.reporting.run_record import read_run

    with suppress(CheckpointError):
        if (found := unused_context(read_run(ref.folder), verdict)) is not None:
            output.show(str(found))


def show_contexts(
    output: Output,
    network: LanguageModel,
    text: HeldOutText,
    lengths: Mapping[str, int],
    refused: Mapping[str, str],
) -> dict[str, Any]:
    """Loss beyond the trained length beside the loss within it, on the same targets."""
    from nnx_cli.evaluation.context import losses_by_context
    from nnx_cli.evaluation.losses import BATCH_TOKENS

    seq_len = network.config.seq_len
    readable = [name for name in lengths if name not in refused]
    with Progress(output) as progress:
        tell = partial(progress.share, "reading longer contexts")
        found = losses_by_context(network, text.tokens, [lengths[name] for name in readable], BATCH_TOKENS, tell)
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

    config = SampleConfig(num_samples=N_SAMPLES, max_new_tokens=SAMPLE_TOKENS)
    with Progress(output) as progress:
        pieces = count(1)
        most = N_SAMPLES * SAMPLE_TOKENS

        def tell(sample: int, piece: str) -> None:
            progress.share("drawing samples", next(pieces) / most)

        drawn = generate(network, ref.tokenizer, [ref.start_ids], config, on_text=tell).samples
    with output.spinner("looking for copies"):
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


def task_names(value: str | None) -> list[str]:
    """The tasks of --tasks. Raises UsageError, and MissingFeature where the harness is not installed."""
    names = [] if value is None else [name.strip() for name in value.split(",")]
    if not all(names):
        raise UsageError(f"--tasks is {value!r}; it must be names with commas between them")
    if names and importlib.util.find_spec("lm_eval") is None:
        raise MissingFeature("--tasks needs lm-evaluation-harness", fix=pip_install("nnx-cli[eval]"))
    return names


def find_tasks(output: Output, names: Sequence[str]) -> Any:
    """The harness's tasks, among which `names` are. Raises UsageError."""
    with _harness_at_work(output, "loading lm-evaluation-harness"):
        from nnx_cli.evaluation import harness

        return harness.find_tasks(names)


def load_tasks(output: Output, ref: ModelRef, names: Sequence[str], known: Any) -> Any:
    """Tasks with their data. Raises DataError where it cannot be had, or the model reads no text."""
    from nnx_cli.evaluation import harness

    if ref.tokenizer is None:
        raise DataError(f"{ref.label} has no tokenizer: it cannot read tasks", fix="leave out --tasks")
    with _harness_at_work(output, f"loading {', '.join(names)}"):
        return harness.load_tasks(known, names)


@contextmanager
def _harness_at_work(output: Output, what: str) -> Iterator[None]:
    """Meanwhile our sign of life is on the screen, and nothing of the bars and notes of the harness."""
    with output.spinner(what), redirect_stderr(io.StringIO()):
        yield


def show_tasks(output: Output, ref: ModelRef, network: LanguageModel, loaded: Any) -> dict[str, Any]:
    """What the harness finds of a model on its tasks."""
    from nnx_cli.evaluation.harness import HarnessModel, evaluate_tasks
    from nnx_cli.inference.generate import generate

    tokenizer = ref.tokenizer
    assert tokenizer is not None

    def write(prompts: list[list[int]], config: SampleConfig, stops: list[str]) -> list[str]:
        return [sample.text for sample in generate(network, tokenizer, prompts, config, stops=stops).samples]

    with Progress(output) as progress, redirect_stderr(io.StringIO()):
        tell = partial(progress.share, f"at work on {', '.join(loaded['tasks'])}")
        found = evaluate_tasks(HarnessModel(network, tokenizer, ref.start_ids, write, tell), loaded)
    rows = [
        [task, metric, None if value is None else f"{value:.4f}", _plus_minus(metrics.get(_stderr_of(metric)))]
        for task, metrics in found.items()
        for metric, value in metrics.items()
        if "_stderr" not in metric
    ]
    output.table(["task", "metric", "value", "±"], rows)
    return {"tasks": found}


def _stderr_of(metric: str) -> str:
    """The name of a metric's standard error: of acc acc_stderr, of exact_match,strict exact_match_stderr,strict."""
    name, comma, filtered = metric.partition(",")
    return f"{name}_stderr{comma}{filtered}"


def _plus_minus(stderr: float | None) -> str | None:
    """A standard error as text, or None."""
    return None if stderr is None else f"{stderr:.4f}"
