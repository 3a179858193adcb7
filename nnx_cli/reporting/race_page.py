"""A race of architectures as a page, drawn from the content of its race.json alone."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from nnx_cli.reporting.charts import WIDE_X, Line, Point, Reference, Strip, chart, learning_curves, strips
from nnx_cli.reporting.foreign import mapping, mappings, number, written
from nnx_cli.reporting.page import charts, facts, page, paragraph, sample, section, table
from nnx_cli.reporting.scales import Axis, scientific, short, spans
from nnx_cli.system.text import duration, size

GRID_POINTS = 120  # of a mean over seeds
CHANCE = 20  # comparisons with 95 % intervals, of which one is expected to be wrong
MOST_SAMPLE_CHARS = 3000


@dataclass(frozen=True)
class _Competitor:
    """One architecture of a race."""

    name: str
    facts: Mapping[str, Any]
    runs: list[Mapping[str, Any]]

    @property
    def bits(self) -> float | None:
        """Mean bits per byte over the seeds."""
        return number(mapping(self.facts.get("bits_per_byte")).get("mean"))

    @property
    def label(self) -> str:
        """Its name, with how it stands where it has not finished."""
        status = self.facts.get("status")
        return self.name if status in (None, "finished") else f"{self.name} ({status})"

    @property
    def measured(self) -> int:
        """Runs that have a result."""
        return sum(number(run.get("bits_per_byte")) is not None for run in self.runs)

    def course(self, x: str, y: str) -> Line:
        """What was measured of `y` against `x`: the mean of its finished runs, else the run that got farthest."""
        finished = [run for run in self.runs if number(run.get("bits_per_byte")) is not None]
        curves = []
        for run in finished or self.runs:
            pairs = [(number(point.get(x)), number(point.get(y))) for point in mappings(run.get("curve"))]
            curves.append(sorted((a, b) for a, b in pairs if a is not None and b is not None))
        curves = sorted((curve for curve in curves if curve), key=lambda curve: curve[-1][0])
        return mean_over_seeds(self.label, curves if finished else curves[-1:])


def race_page(race: Mapping[str, Any]) -> str:
    """The page of a race: a table, losses against tokens, time and FLOPs, samples, and what was raced."""
    competitors = _competitors(race)
    names = ", ".join(competitor.name for competitor in competitors) or "nobody"
    return page(f"Race: {names}", (part(race, competitors) for part in SECTIONS))


def _competitors(race: Mapping[str, Any]) -> list[_Competitor]:
    """The competitors, the best first; those without a result stand behind."""
    found = mappings(race.get("competitors"))
    times = Counter((each.get("model")) for each in found if isinstance(each.get("model"), str))
    named = []
    for each in found:
        name = str(each.get("model", "unnamed"))
        parts = [name, str(each["size"])] if times[name] > 1 and each.get("size") else [name]
        named.append(_Competitor(" ".join(parts), each, mappings(each.get("runs"))))
    return sorted(named, key=lambda each: float("inf") if each.bits is None else each.bits)


def _verdict(race: Mapping[str, Any], competitors: Sequence[_Competitor]) -> str:
    """Who is ahead, and whether that means anything."""
    ranked = [each for each in competitors if each.bits is not None]
    words = []
    if str(race.get("state", "finished")) != "finished":
        words.append(paragraph("This race is not finished: the page shows what there is so far.", "warning"))
    if not ranked:
        return "\n".join([*words, paragraph("No competitor has a result yet.", "lead")])
    first = ranked[0]
    ties = first.facts.get("ties_with")
    tied = " and ".join(map(str, ties)) if isinstance(ties, list) else ""
    no_verdict = "ties_with" in first.facts and ties is None
    result = f"{first.name} has the fewest bits per byte, {first.bits:.4f}"
    if max(each.measured for each in ranked) < 2:
        lead = f"{result}, with one seed each: the differences may be chance, so there is no verdict."
    elif len(ranked) == 1:
        lead = f"{result}; nobody else has a result."
    elif no_verdict:
        lead = f"{result}; too few seeds ended for a verdict."
    elif tied:
        lead = f"{result}, but that is a tie with {tied}: the 95 % interval of the difference holds 0."
    else:
        lead = f"{result}, and the 95 % intervals of its differences to the others do not hold 0."
    words.append(paragraph(lead, "lead"))
    made = race.get("comparisons")
    n_made = len(made) if isinstance(made, (list, dict)) else int(number(made) or 0)
    if n_made:
        chance = f"with 95 % intervals about one in {CHANCE} shows a difference where there is none"
        words.append(paragraph(f"Comparisons made: {n_made}; {chance}."))
    return "\n".join(words)


def _result(competitor: _Competitor) -> str | None:
    bits, error = competitor.bits, written(mapping(competitor.facts.get("bits_per_byte")).get("stderr"), ".4f")
    return None if bits is None else f"{bits:.4f}" + (f" ± {error}" if error else "")


def _mean_over_runs(competitor: _Competitor, name: str) -> float | None:
    values = [value for run in competitor.runs if (value := number(run.get(name))) is not None]
    return sum(values) / len(values) if values else None


def _table(race: Mapping[str, Any], competitors: Sequence[_Competitor]) -> str:
    """One row a competitor."""
    target = number(race.get("target_bits_per_byte"))
    columns = ["architecture", "bits per byte", "ties with", "status, seeds", "parameters", "outside tables"]
    columns += ["learning rate", "tokens", "time", "FLOPs", "tokens/s", "memory"]
    columns += [f"tokens to {target:.4g}", f"time to {target:.4g}"] if target else []
    rows = []
    for each in competitors:
        ties, reached = each.facts.get("ties_with"), mapping(each.facts.get("to_target"))
        row = [
            each.name,
            _result(each),
            ", ".join(map(str, ties)) if isinstance(ties, list) and ties else None,
            f"{each.facts.get('status', 'unknown')}, {each.measured}\u00a0of\u00a0{len(each.runs)}",
            written(each.facts.get("parameters"), short),
            written(each.facts.get("parameters_without_tables"), short),
            written(each.facts.get("lr"), short),
            written(_mean_over_runs(each, "tokens"), short),
            written(_mean_over_runs(each, "time_s"), duration),
            written(_mean_over_runs(each, "flops"), scientific),
            written(each.facts.get("tokens_per_s"), ",.0f"),
            written(_mean_over_runs(each, "peak_memory_bytes"), size),
        ]
        if target:
            row += [written(reached.get("tokens"), short), written(reached.get("time_s"), duration)]
        rows.append(row)
    caption = "Bits per byte of validation text: mean over the seeds ± its standard error; fewer are better."
    problems = [paragraph(f"{each.name}: {problem}") for each in competitors if (problem := each.facts.get("problem"))]
    return section("Result", table(columns, rows, caption, "whole"), *problems, _ends(competitors)) if rows else ""


def _ends(competitors: Sequence[_Competitor]) -> str:
    """Where every seed of each ended."""
    rows = []
    for each in competitors:
        values = [bits for run in each.runs if (bits := number(run.get("bits_per_byte"))) is not None]
        if values and each.bits is not None:
            rows.append(
                Strip(each.name, values, each.bits, number(mapping(each.facts.get("bits_per_byte")).get("stderr")))
            )
    about = (
        "A mark for each seed, a stroke for their mean, its standard error shaded; left is better. Where the marks of "
    )
    about += "two mix, the seed matters more than the architecture."
    axis = Axis("bits per byte (validation)", write="{:.4f}".format)
    return charts(strips("Where they ended", about, axis, rows)) if rows else ""


def mean_over_seeds(name: str, curves: Sequence[Sequence[Point]]) -> Line:
    """The mean of several curves, with the lowest and the highest of them as its spread.

    Curves of as many points were measured at the same steps, or at the same parts of a run: the mean goes through the
    means of those points, though one seed took longer for them. Others are compared where all of them were.
    """
    if len(curves) < 2:
        return Line(name, curves[0] if curves else [])
    if len({len(curve) for curve in curves}) == 1:
        grid = [sum(x for x, _ in points) / len(points) for points in zip(*curves, strict=True)]
        at = [[y for _, y in points] for points in zip(*curves, strict=True)]
    else:
        start, stop = max(curve[0][0] for curve in curves), min(curve[-1][0] for curve in curves)
        grid = sorted({x for curve in curves for x, _ in curve if start <= x <= stop})
        at = [[_interpolated(curve, x) for curve in curves] for x in grid]
    every = max(1, len(grid) // GRID_POINTS)
    picked = [*range(0, len(grid) - 1, every), *range(len(grid))[-1:]]
    means = [(grid[n], sum(at[n]) / len(at[n])) for n in picked]
    return Line(name, means, [(grid[n], min(at[n]), max(at[n])) for n in picked])


def _interpolated(curve: Sequence[Point], x: float) -> float:
    """The height of a curve at `x`, which lies between its ends."""
    right = bisect_left(curve, x, key=lambda point: point[0])
    (x1, y1) = curve[right]
    if x1 == x or right == 0:
        return y1
    (x0, y0) = curve[right - 1]
    return y0 + (y1 - y0) * (x - x0) / (x1 - x0)


COURSES = {  # what is drawn against what: title, and what the chart shows and what is normal
    ("tokens", "val_bits_per_byte"): (
        "Bits per byte by tokens read",
        "How much each learns from the same text. Curves fall steeply, then ever more slowly; lower is better.",
    ),
    ("time_s", "val_bits_per_byte"): (
        "Bits per byte by training time",
        "What each is worth on this machine: one that learns more from a token may need longer for it.",
    ),
    ("flops", "val_bits_per_byte"): (
        "Bits per byte by FLOPs",
        "What each makes of the same arithmetic, however fast this machine does it.",
    ),
    ("tokens", "train_loss"): (
        "Training loss by tokens read",
        "The loss on the text it learns from. Where it falls while bits per byte rise, the text is learned by heart.",
    ),
}
MEASURED = {"val_bits_per_byte": "bits per byte (validation)", "train_loss": "training loss (nats a token)"}


def _courses(race: Mapping[str, Any], competitors: Sequence[_Competitor]) -> str:
    """Losses against tokens, time and FLOPs."""
    figures = [_course(race, competitors, x, y, *words) for (x, y), words in COURSES.items()]
    shaded = "Lines are means over the seeds; shaded is what lies between the lowest and the highest of them."
    one_seed = all(each.measured < 2 for each in competitors)
    return section("How they learned", "" if one_seed else paragraph(shaded), charts(*figures)) if competitors else ""


def _course(race: Mapping[str, Any], competitors: Sequence[_Competitor], x: str, y: str, title: str, about: str) -> str:
    lines = [each.course(x, y) for each in competitors]
    target = number(race.get("target_bits_per_byte")) if y == "val_bits_per_byte" else None
    return learning_curves(title, about, x, Axis(MEASURED[y]), lines, [Reference("target", target)] if target else [])


def _recall(race: Mapping[str, Any], competitors: Sequence[_Competitor]) -> str:
    """Accuracy by distance, where the race had that task."""
    lines = []
    for each in competitors:
        curves = [
            sorted((a, b) for pair in run["recall"] if (point := _pair(pair)) for a, b in [point])
            for run in each.runs
            if isinstance(run.get("recall"), list)
        ]
        lines.append(mean_over_seeds(each.name, [curve for curve in curves if curve]))
    if not any(line.points for line in lines):
        return ""
    about = (
        "How often each names what stood beside a word it saw that many tokens ago. Falling with distance is normal."
    )
    distances = [x for line in lines for x, _ in line.points]
    across = Axis("distance (tokens)", log=spans(distances, WIDE_X))
    return section("Recall", charts(chart("Accuracy by distance", about, across, Axis("accuracy"), lines)))


def _plasticity(race: Mapping[str, Any], competitors: Sequence[_Competitor]) -> str:
    """What a sequence of texts did to each, where the race had that task."""
    rows, lines = [], []
    for each in competitors:
        found = mapping(each.facts.get("plasticity"))
        behind = [value for x in found.get("behind") or [] if (value := number(x)) is not None]
        if not behind:
            continue
        lines.append(Line(each.name, [(place, value) for place, value in enumerate(behind, start=2)]))
        used = [
            " → ".join(written(x, form) or "–" for x in found.get(name) or [])
            for name, form in (("effective_rank", ".1f"), ("dead_units", ".1%"), ("weight_rms", ".4f"))
        ]
        bits = [written(found.get(name), ".4f") for name in ("new", "fresh")]
        rows.append([each.name, *bits, written(behind[-1], "+.4f"), written(found.get("lost"), "+.4f"), *used])
    if not rows:
        return ""
    columns = [
        "competitor",
        "new texts",
        "fresh",
        "behind on the last",
        "old texts lost",
        "effective rank",
        "dead units",
    ]
    caption = (
        "Bits per byte, mean over the seeds; of rank, dead units and weights: after the first text → after the last."
    )
    about = (
        "Bits per byte of the model that went on, less those of one that began with this text. Above 0 it learns worse"
    )
    about += " for what it learned before; rising is a loss of plasticity. Below 0 what it knew helps."
    figure = chart("Behind a fresh model", about, Axis("text, in turn"), Axis("bits per byte"), lines)
    return section("Plasticity", table([*columns, "weights (RMS)"], rows, caption, "whole"), charts(figure))


def _pair(value: Any) -> Point | None:
    """A point, where a value is a pair of numbers."""
    if not isinstance(value, (list, tuple)) or len(value) != 2:
        return None
    x, y = number(value[0]), number(value[1])
    return None if x is None or y is None else (x, y)


def _runs(race: Mapping[str, Any], competitors: Sequence[_Competitor]) -> str:
    """Every run."""
    rows = [
        [
            f"{each.name}, seed {run.get('seed', '?')}",
            run.get("status"),
            written(run.get("bits_per_byte"), ".4f"),
            written(run.get("tokens"), short),
            written(run.get("time_s"), duration),
            written(run.get("flops"), scientific),
            written(run.get("peak_memory_bytes"), size),
        ]
        for each in competitors
        for run in each.runs
    ]
    columns = ["run", "status", "bits per byte", "tokens", "time", "FLOPs", "peak memory"]
    return section("Every run", table(columns, rows, "Runs of one seed saw the same batches.")) if rows else ""


def _samples(race: Mapping[str, Any], competitors: Sequence[_Competitor]) -> str:
    """What each wrote, of the seed that most have a sample of."""
    written_by = [(each, run) for each in competitors for run in each.runs if _sample_text(run)[1]]
    if not written_by:
        return ""
    seeds = Counter(str(run.get("seed")) for _, run in written_by)
    seed = seeds.most_common(1)[0][0]
    shown = [sample(each.name, *_sample_text(run)) for each, run in written_by if str(run.get("seed")) == seed]
    return section(
        "What they write", paragraph(f"Samples of seed {seed}."), f"<div class=samples>{''.join(shown)}</div>"
    )


def _sample_text(run: Mapping[str, Any]) -> tuple[str, str]:
    """The prompt and the continuation of a run's sample."""
    found = run.get("sample")
    if isinstance(found, Mapping):
        return str(found.get("prompt", ""))[:MOST_SAMPLE_CHARS], str(found.get("text", ""))[:MOST_SAMPLE_CHARS]
    return "", found[:MOST_SAMPLE_CHARS] if isinstance(found, str) else ""


def _shapes(race: Mapping[str, Any], competitors: Sequence[_Competitor]) -> str:
    """The configuration of each, field by field."""
    configs = [mapping(each.facts.get("config")) for each in competitors]
    fields = list(dict.fromkeys(name for config in configs for name in config))
    rows = [[field, *(config.get(field) for config in configs)] for field in fields]
    names = ["field", *(each.name for each in competitors)]
    return (
        section("What was raced", table(names, rows, "Configurations; – where it has no such field.")) if rows else ""
    )


def _search(race: Mapping[str, Any], competitors: Sequence[_Competitor]) -> str:
    """What the learning rate of each was chosen from."""
    search = mapping(race.get("learning_rate_search"))
    found = mapping(search.get("rates"))
    lines = []
    for each in competitors:
        tried = mappings(found.get(str(each.facts.get("model"))))
        pairs = [(number(rate.get("lr")), number(rate.get("bits_per_byte"))) for rate in tried]
        points = [(lr, bits) for lr, bits in pairs if lr is not None and bits is not None]
        lines.append(Line(each.name, points, best=min(points, key=lambda point: point[1], default=None)))
    tokens, time_s = written(search.get("tokens_each"), short), written(search.get("time_s"), duration)
    if not any(line.points for line in lines):
        return ""
    about = f"Each rate was tried for {tokens or '?'} tokens; {time_s or '?'} in all, which is no part of the budget. "
    about += "A valley is normal; where the ring is at an end of its line, a rate beyond that may be better still."
    axis = Axis("learning rate", log=True)
    figure = chart("Bits per byte by learning rate", about, axis, Axis("bits per byte (own validation part)"), lines)
    return section("How the learning rates were chosen", charts(figure))


def _conditions(race: Mapping[str, Any], competitors: Sequence[_Competitor]) -> str:
    """What was the same for all."""
    budget = race.get("budget")
    amount = number(budget)
    if amount is not None:
        budget = duration(amount) if race.get("equal") == "time" else short(amount)
    values = {
        "equal": race.get("equal"),
        "budget": budget,
        "text": _words(race.get("data")),
        "tokenizer": _words(race.get("tokenizer")),
        "parameters counted": _words(race.get("parameters_counted")),
        "target (bits per byte)": race.get("target_bits_per_byte"),
        "device": _words(race.get("device")),
        "versions": _words(race.get("versions") or race.get("version")),
        "fingerprint of the text": race.get("fingerprint"),
    }
    settings = mapping(race.get("settings"))
    rows = [[name, _words(value)] for name, value in settings.items() if value is not None]
    more = table(["setting", "value"], rows, "Settings of every run", "words") if rows else ""
    return section(
        "Conditions", facts(values), f"<details><summary>All settings</summary>{more}</details>" if more else ""
    )


def _words(value: Any) -> Any:
    """A value of JSON in a line."""
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_words(inner)}" for name, inner in value.items() if inner is not None)
    return ", ".join(map(str, value)) if isinstance(value, list) else value


SECTIONS = (_verdict, _table, _courses, _recall, _plasticity, _samples, _runs, _search, _shapes, _conditions)
