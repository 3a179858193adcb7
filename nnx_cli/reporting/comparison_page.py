"""Several runs on one page: which is better, how they got there, and what differs between them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from nnx_cli.reporting.charts import Line, Reference, learning_curves, thinned
from nnx_cli.reporting.foreign import mapping, number, written
from nnx_cli.reporting.page import charts, page, paragraph, sample, section, table
from nnx_cli.reporting.run_record import ABOUT_NGRAM, NGRAM, RunRecord
from nnx_cli.reporting.scales import Axis, short
from nnx_cli.system.text import duration

POINTS = 120  # of a line, of which there may be thirty
MOST_SHADED = 6  # runs, of which each line may have a spread
MOST_REFERENCES = 3  # of runs on so many texts
MOST_SAMPLE_CHARS = 1500
OPEN_SAMPLES = 6
BITS, LOSS = "val_bits_per_byte", "val_loss"
MEASURED = {
    BITS: "bits per byte (validation)",
    LOSS: "validation loss (nats a token)",
    "train_loss": "training loss (nats a token)",
    "lr": "learning rate",
}
COURSES = {  # what is drawn against what (None: what the runs are ranked by): title, what it shows and what is normal
    ("tokens", None): (
        "Validation by tokens read",
        "Which learns more from the same amount of text. Normal: steep, then ever flatter; lower is better.",
    ),
    ("time_s", None): (
        "Validation by training time",
        "Which learns more in the same time; runs of different machines do not compare here.",
    ),
    ("tokens", "train_loss"): (
        "Training loss by tokens read",
        "The loss on the text they learn from. Normal: a little below validation; far below, it is learned by heart.",
    ),
    ("tokens", "lr"): (
        "Learning rate",
        "How far each step moved the weights. Normal: a short rise, then a fall to the end.",
    ),
}


def comparison_page(runs: Sequence[RunRecord]) -> str:
    """The page of several runs, the best first."""
    measured = BITS if any(run.series(BITS) for run in runs) else LOSS
    ranked = sorted(runs, key=lambda run: _best(run, measured, float("inf")))
    return page(f"{len(runs)} runs compared", (part(ranked, measured) for part in SECTIONS))


def _best(run: RunRecord, measured: str, otherwise: Any = None) -> Any:
    """The best value of what runs are ranked by."""
    stated = number(run.status.get(f"best_{measured}"))
    found = run.best(measured)
    return stated if stated is not None else found[1] if found else otherwise


def _ranking(runs: Sequence[RunRecord], measured: str) -> str:
    """One row a run."""
    rows = [
        [
            run.name,
            written(_best(run, measured), ".4f"),
            mapping(run.config.get("model")).get("name"),
            mapping(run.config.get("model")).get("size"),
            written(run.config.get("parameters"), short),
            run.state,
            written(run.reached("step"), ",.0f"),
            written(run.reached("tokens"), short),
            written(run.reached("time_s"), duration),
            mapping(run.config.get("training")).get("optimizer"),
            written(mapping(run.config.get("training")).get("lr"), short),
        ]
        for run in runs
    ]
    columns = [
        "run",
        MEASURED[measured],
        "model",
        "size",
        "parameters",
        "state",
        "steps",
        "tokens",
        "time",
        "optimizer",
        "lr",
    ]
    caption = "The best validation of each run; lower is better"
    return "\n".join([*_warnings(runs, measured), section("Result", table(columns, rows, caption, "whole"))])


def _warnings(runs: Sequence[RunRecord], measured: str) -> list[str]:
    """Why numbers may not compare."""
    texts = {mapping(run.config.get("data")).get("fingerprint") for run in runs}
    tokenizers = {str(mapping(run.config.get("tokenizer")).get("fingerprint")) for run in runs}
    words = []
    if len(texts) > 1:
        words.append(
            "These runs learned from different texts, or texts prepared differently: their numbers may not compare."
        )
    if len(tokenizers) > 1 and measured == LOSS:
        words.append("These runs have different tokenizers: their losses a token do not compare.")
    if damaged := [run.name for run in runs if any(run.damaged.values())]:
        words.append(f"Damaged lines are left out of the logs of {', '.join(damaged)}.")
    if silent := [run.name for run in runs if not run.series(measured)]:
        words.append(f"Without a validation, and so without a line below: {', '.join(silent)}.")
    return [paragraph(each, "warning") for each in words]


def _courses(runs: Sequence[RunRecord], measured: str) -> str:
    """Validation against tokens and time, training loss against tokens."""
    figures = [_course(runs, x, measured if y is None else y, *words) for (x, y), words in COURSES.items()]
    return section("How they learned", charts(*figures))


def _course(runs: Sequence[RunRecord], x: str, y: str, title: str, about: str) -> str:
    lines = [thinned(run.name, run.series(y, x), most=POINTS) for run in runs]
    if len(lines) > MOST_SHADED:
        lines = [Line(line.name, line.points) for line in lines]
    counting = _references(runs) if y == BITS else []
    about += f" {ABOUT_NGRAM}" if counting else ""
    return learning_curves(title, about, x, Axis(MEASURED[y], from_zero=y == "lr"), lines, counting)


def _references(runs: Sequence[RunRecord]) -> list[Reference]:
    """What a byte 5-gram gets on the text of the runs; on each, where there are several, up to a few."""
    found: dict[float, str] = {}
    for run in runs:
        if run.ngram_bits_per_byte is not None:
            found.setdefault(round(run.ngram_bits_per_byte, 4), run.name)
    names = found.values() if len(found) > 1 else []
    told = [f"{NGRAM} on the text of {name}" for name in names] or [NGRAM]
    return [Reference(name, bits) for name, bits in zip(told, found, strict=False)][:MOST_REFERENCES]


def _differences(runs: Sequence[RunRecord], measured: str) -> str:
    """The settings that are not the same everywhere."""
    settings = [{**mapping(run.config.get("model")), **mapping(run.config.get("training"))} for run in runs]
    names = list(dict.fromkeys(name for each in settings for name in each))
    differing = [name for name in names if len({str(each.get(name)) for each in settings}) > 1]
    rows = [[run.name, *(each.get(name) for name in differing)] for run, each in zip(runs, settings, strict=True)]
    if not differing:
        return section("What differs", paragraph("No setting differs between these runs."))
    return section("What differs", table(["run", *differing], rows, "Settings that are not the same in all", "whole"))


def _samples(runs: Sequence[RunRecord], measured: str) -> str:
    """The last thing each wrote."""
    shown: list[str] = []
    for run in runs:
        last = next((line for line in reversed(run.samples) if isinstance(line.get("text"), str)), None)
        if last is not None:
            title, is_open = f"{run.name}, step {last['step']:,}", len(shown) < OPEN_SAMPLES
            prompt = str(last.get("prompt", ""))[:MOST_SAMPLE_CHARS]
            shown.append(sample(title, prompt, last["text"][:MOST_SAMPLE_CHARS], is_open))
    return section("What they wrote last", f"<div class=samples>{''.join(shown)}</div>" if shown else "")


SECTIONS = (_ranking, _courses, _differences, _samples)
