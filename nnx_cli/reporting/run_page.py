"""report.html: how a run goes or went, from the files of its folder."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path

from nnx_cli.errors import counted, quoted
from nnx_cli.layers.insides import as_text
from nnx_cli.reporting.charts import WIDE_Y, Line, Reference, chart, rescaled, thinned
from nnx_cli.reporting.coach import findings
from nnx_cli.reporting.foreign import mapping, number, written
from nnx_cli.reporting.insides_figures import attention_maps
from nnx_cli.reporting.learning import STEP, learning_section, surprise_figure
from nnx_cli.reporting.page import charts, facts, page, paragraph, sample, section, table, text, write_page
from nnx_cli.reporting.run_record import ABOUT_NGRAM, NGRAM, RunRecord, read_run
from nnx_cli.reporting.scales import Axis, memory_unit, spans
from nnx_cli.system.text import duration, listed, size

NAME = "report.html"
MOST_SAMPLES = 12  # of a run, evenly spread
OPEN_SAMPLES = 4
MOST_SAMPLE_CHARS = 3000
MOST_EVENTS = 50
WELL_BELOW = 0.95  # of the planned learning rate, where its peak is worth a word
MOST_MAP_CELLS = 40_000  # of all attention maps together: about 400 kB
ENDED = {
    "length": "its length was reached",
    "time": "its time was up",
    "data": "its text had given what it has to a model of this size",
    "patience": "validation grew no better for as long as --patience allows",
    "interrupted": "it was stopped",
}


def write_run_page(folder: Path) -> Path:
    """Write report.html into a run folder, whatever state the run is in; returns its path.

    Raises CheckpointError where the folder is no run, OutputError where the page cannot be written.
    """
    path = folder / NAME
    write_page(path, run_page(read_run(folder)))
    return path


def run_page(run: RunRecord) -> str:
    """The page of one run."""
    return page(f"Run {run.name}", (part(run) for part in SECTIONS))


def _outcome(run: RunRecord) -> str:
    """What kind of run it is, and what came of it."""
    status, model = run.status, mapping(run.config.get("model"))
    bits, loss = number(status.get("best_val_bits_per_byte")), number(status.get("best_val_loss"))
    so_far = f"{counted(int(run.reached('step') or 0), 'step')} in {duration(run.reached('time_s') or 0)}"
    lead = [f"{str(model.get('name'))} with {run.config['parameters']:,} parameters: {run.state} after {so_far}"]
    if bits is not None:
        lead.append(f"best {bits:.4f} bits per byte of validation text")
    elif loss is not None:
        lead.append(f"best validation loss {loss:.4f} nats a token")
    values = {
        "state": run.state,
        "model": " ".join(str(part) for part in (model.get("name"), model.get("size")) if part),
        "parameters": f"{run.config['parameters']:,}",
        "steps": written(run.reached("step"), ",.0f"),
        "tokens read": written(run.reached("tokens"), ",.0f"),
        "training time": written(run.reached("time_s"), duration),
        "bits per byte, best": written(bits, ".4f"),
        "validation loss, best": written(loss, ".4f"),
        "perplexity, best": None if loss is None or loss > 50 else f"{math.exp(loss):.2f}",
        "at step": written(status.get("best_step"), ",.0f"),
        "tokens a second": written(run.speed, ",.0f"),
        "waited for data": written(run.last("data_wait_share"), ".0%"),
        "peak memory": written(run.last("peak_memory_bytes"), size),
        "skipped steps": written(number(status.get("skipped_steps")) or None, ",.0f"),
    }
    return "\n".join([paragraph(", ".join(lead) + ".", "lead"), *_warnings(run), facts(values)])


def _warnings(run: RunRecord) -> Iterator[str]:
    """What a reader has to know before any number."""
    for name, lines in run.damaged.items():
        if lines:
            yield paragraph(f"{name} has {counted(lines, 'damaged line')}, left out.", "warning")
    if damaged := run.snapshots[1]:
        yield paragraph(f"insides/ has {counted(len(damaged), 'damaged file')}, left out.", "warning")
    if run.state == "diverged":
        yield paragraph("The run diverged: its losses went wrong, and a lower learning rate is worth a try.", "warning")
    if not run.metrics:
        missing = "No step has been logged yet" if run.state == "running" else "metrics.jsonl has no step"
        yield paragraph(f"{missing}: there are no curves.", "warning")
    elif not run.series("val_loss"):
        yield paragraph("The run has not been validated: there is only the loss on the text it learns from.", "warning")


def _coach(run: RunRecord) -> str:
    """What should be done otherwise."""
    found = [f"<li><p>{text(each.text)}; try:</p><pre>{text(each.command)}</pre></li>" for each in findings(run)]
    if not found:
        nothing = "Its numbers ask for no change: they fit none of the rules for what goes wrong often."
        return section("What to change", paragraph(nothing)) if run.metrics else ""
    about = "By rules over the numbers of this run, the most important first, each with a command that helps."
    return section("What to change", paragraph(about), f"<ul>{''.join(found)}</ul>")


def _losses(run: RunRecord) -> str:
    """Training and validation loss, beside what a guess gets."""
    lines = [thinned("training", run.series("train_loss"))]
    if run.series("val_loss"):
        lines.append(thinned("validation", run.series("val_loss"), run.best("val_loss")))
    vocabulary = number(mapping(run.config.get("model")).get("vocab_size")) or 0
    guess = [Reference("a guess without learning", math.log(vocabulary))] if vocabulary > 1 else []
    about = (
        "How surprised the model is by each next token: of the text it learns from, and of text it never sees "
        "(validation). Normal: both fall steeply, then ever more slowly. Where training falls on and validation rises, "
        "the text is learned by heart; with dropout, training may lie above validation."
    )
    return chart("Loss", about, STEP, Axis("loss (nats a token)", log=_is_wide(lines)), lines, guess)


def _bits_per_byte(run: RunRecord) -> str:
    """Validation in the unit in which tokenizers compare."""
    line = thinned("validation", run.series("val_bits_per_byte"), run.best("val_bits_per_byte"))
    about = (
        "The same surprise in bits for each byte of validation text, so that runs with other tokenizers compare. "
        "Normal: steep, then ever flatter. 8 is no knowledge at all; gzip needs about 3 for English text. The ring is "
        "the best validation, whose weights the run keeps."
    )
    ngram = run.ngram_bits_per_byte
    if ngram is not None:
        about += f" {ABOUT_NGRAM}"
    counting = [Reference(NGRAM, ngram)] if ngram is not None else []
    axis = Axis("bits per byte", log=_is_wide([line]))
    return chart("Bits per byte", about, STEP, axis, [line], counting) if line.points else ""


def _learning_rate(run: RunRecord) -> str:
    about = (
        "How far a step moves the weights. Normal: up during the warm-up, then down to the end, where the last gain in "
        "quality comes from. A sudden half means that the run went back to a checkpoint."
    )
    rates, training = run.series("lr"), mapping(run.config.get("training"))
    planned, warmup = number(training.get("lr")) or 0.0, number(training.get("warmup_steps")) or 0.0
    highest = max((rate for _, rate in rates), default=planned)
    if (run.reached("step") or 0.0) > warmup and highest < WELL_BELOW * planned:
        about += (
            f" The plan has {planned:g} at most, and {highest:.2g} was the highest: the schedule falls from the first "
            f"step on, while the {counted(int(warmup), 'step')} of warm-up still raise the rate."
        )
    return chart("Learning rate", about, STEP, Axis("learning rate", from_zero=True), [thinned("rate", rates)])


def _gradients(run: RunRecord) -> str:
    line = thinned("norm", run.series("grad_norm"))
    clip = number(mapping(run.config.get("training")).get("grad_clip"))
    about = (
        "How steep the loss is. Normal: high at first, then level with single peaks. Steps above the line are "
        "shortened to it. Growing for long: the learning rate is too high."
    )
    axis = Axis("norm of the gradient", log=_is_wide([line]))
    return chart("Gradient norm", about, STEP, axis, [line], [Reference("clipped above", clip)] if clip else [])


def _speed(run: RunRecord) -> str:
    line = thinned("speed", run.series("tokens_per_s"))
    about = (
        "Tokens trained on in a second. Normal: level after the first steps. Falling: the machine has other work, "
        "grows hot, or waits for its disk."
    )
    return chart("Speed", about, STEP, Axis("tokens a second", from_zero=True), [line])


def _memory(run: RunRecord) -> str:
    points = run.series("peak_memory_bytes")
    unit, scale = memory_unit(max((most for _, most in points), default=0.0))
    about = "The most memory that was in use so far. Normal: level after the first steps and the first validation."
    line = rescaled(thinned("memory", points), y=scale)
    return chart("Peak memory", about, STEP, Axis(f"peak memory ({unit})", from_zero=True), [line])


def _is_wide(lines: Sequence[Line]) -> bool:
    return spans((y for line in lines for _, y in line.points), WIDE_Y)


FIGURES = (_losses, _bits_per_byte, _learning_rate, _gradients, _speed, _memory)


def _curves(run: RunRecord) -> str:
    """One chart for everything that was logged."""
    if not run.metrics:
        return ""
    shaded = (
        "Where many steps share a point, the line is their mean and the shade reaches from the lowest to the highest."
    )
    is_thinned = len(run.metrics) > len(thinned("", [(0.0, 0.0)] * len(run.metrics)).points)
    figures = (figure(run) for figure in FIGURES)
    return section("How it learned", paragraph(shaded) if is_thinned else "", charts(*filter(None, figures)))


def _plan(run: RunRecord) -> str:
    """What was planned beside what happened, then every setting and where it came from."""
    status, training, automatic = (
        mapping(m) for m in (run.status, run.config.get("training"), run.config.get("automatic"))
    )
    steps, step_tokens = number(status.get("max_steps")), number(training.get("tokens_per_step"))
    planned_tokens = steps * step_tokens if steps and step_tokens else None
    rows = [
        ["steps", written(steps, ",.0f"), written(run.reached("step"), ",.0f")],
        ["tokens", written(planned_tokens, ",.0f"), written(run.reached("tokens"), ",.0f")],
        ["training time", written(status.get("max_time_s"), duration), written(run.reached("time_s"), duration)],
        ["memory", training.get("vram") or "no limit given", written(run.last("peak_memory_bytes"), size)],
    ]
    both = "The first length that is reached ends the run." if steps and number(status.get("max_time_s")) else ""
    ended = ENDED.get(str(status.get("ended")))
    events = status.get("events")
    told = [paragraph(f"It ended because {ended}.") if ended else ""]
    if isinstance(events, list) and events:
        told.append(paragraph("On the way:"))
        told.append(f"<ul>{''.join(f'<li>{text(event)}</li>' for event in events[:MOST_EVENTS])}</ul>")
    chosen = [
        [name, listed(value), str(automatic.get(name, "given, or the default")).removeprefix("derived: ")]
        for name, value in {**mapping(run.config.get("model")), **training}.items()
        if value is not None
    ]
    caption = "Every setting, and from what it was chosen where it was left to nnx"
    settings = table(["setting", "value", "why"], chosen, caption, "words")
    columns = ["", "at most" if both else "planned", "turned out"]
    outcome = table(columns, rows, f"The plan, and how it turned out. {both}".strip(), "whole")
    return section("The plan", outcome, *told, _folded("All settings", settings))


def _samples(run: RunRecord) -> str:
    """What the model wrote as it learned."""
    found = [line for line in run.samples if isinstance(line.get("text"), str)]
    if not found:
        return ""
    last = len(found) - 1
    spread = range(MOST_SAMPLES) if last >= MOST_SAMPLES else range(len(found))
    picked = sorted({round(nth * last / max(1, len(spread) - 1)) for nth in spread})
    opened = {*picked[:1], *picked[1 - OPEN_SAMPLES :]}
    shown = [
        sample(
            f"step {found[n]['step']:,}",
            str(found[n].get("prompt", ""))[:MOST_SAMPLE_CHARS],
            found[n]["text"][:MOST_SAMPLE_CHARS],
            n in opened,
        )
        for n in picked
    ]
    about = (
        "What the model wrote when asked to continue, the first sample first. Normal: noise before it has learned "
        "anything, then letters, syllables, words of the text, and sentences that nearly mean something."
    )
    some = f" {len(picked)} of {len(found)} are shown." if len(picked) < len(found) else ""
    return section("What it wrote", paragraph(about + some), f"<div class=samples>{''.join(shown)}</div>")


def _surprise(run: RunRecord) -> str:
    """Validation text, coloured by what the model expected of it."""
    snapshots = run.snapshots[0]
    if not snapshots:
        return ""
    begun = "" if len(snapshots) == 1 else _folded(f"After step {snapshots[0].step:,}", surprise_figure(snapshots[0]))
    return section("What surprises it", surprise_figure(snapshots[-1]), begun)


def _inside(run: RunRecord) -> str:
    """What happens inside the model as it learns; how to look into it where nothing of that was kept."""
    if run.snapshots[0] or not run.metrics:
        return learning_section(run.snapshots[0])
    command = f'nnx visualize {quoted(run.folder)} --prompt "Some text" --html inside.html'
    about = "The run kept nothing of what happens inside its model. This looks into it:"
    return section("Inside the model", paragraph(about), f"<pre>{text(command)}</pre>")


def _attention(run: RunRecord) -> str:
    """Where the heads look, as the model is now."""
    snapshots = run.snapshots[0]
    if not snapshots or not snapshots[-1].insides.attention:
        return ""
    last = snapshots[-1]
    return section(
        "Where it looks",
        paragraph(
            f"After step {last.step:,}, in the first {counted(len(last.tokens), 'token')} of the validation text:"
        ),
        f"<pre>{text(''.join(as_text(last.tokens)))}</pre>",
        *attention_maps(last.tokens, last.insides, MOST_MAP_CELLS),
    )


def _folded(title: str, inner: str) -> str:
    return f"<details><summary>{text(title)}</summary>{inner}</details>"


def _conditions(run: RunRecord) -> str:
    """Where and how it was run."""
    config, status = run.config, run.status
    versions = ", ".join(f"{name} {version}" for name, version in mapping(config.get("versions")).items())
    values = {
        "started": written(status.get("started"), _date),
        "machine": config.get("machine") or status.get("device"),
        "versions": versions or None,
        "data": mapping(config.get("data")).get("folder"),
        "tokenizer": mapping(config.get("tokenizer")).get("kind"),
        "seed": mapping(config.get("training")).get("seed"),
        "started from": config.get("init_from"),
    }
    command = status.get("command")
    typed = f"<p>The command:</p><pre>{text(command)}</pre>" if command else ""
    return section("Environment", facts(values), typed)


def _date(seconds: float) -> str:
    try:
        return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M UTC")
    except (OverflowError, ValueError, OSError):
        return "at an unknown time"


SECTIONS = (
    _outcome,
    _coach,
    _curves,
    _plan,
    _samples,
    _surprise,
    _inside,
    _attention,
    _conditions,
)  # each takes the run; one with nothing to say is ""
