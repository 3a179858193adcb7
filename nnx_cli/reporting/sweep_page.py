"""A sweep as a page, drawn from the content of its sweep.json alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from nnx_cli.errors import counted
from nnx_cli.reporting.charts import WIDE_X, Line, Strip, chart, strips
from nnx_cli.reporting.foreign import mapping, mappings, number, written
from nnx_cli.reporting.page import charts, facts, page, paragraph, section, table
from nnx_cli.reporting.scales import Axis, short, spans
from nnx_cli.system.text import duration, size

Trial = Mapping[str, Any]
BITS = Axis("bits per byte (validation)", write="{:.4f}".format)


def sweep_page(sweep: Mapping[str, Any]) -> str:
    """The page of a sweep, finished or not: its best trial, bits per byte by each setting, all trials, and what was the
    same for them."""
    trials = mappings(sweep.get("trials"))
    names = [str(name) for name in mapping(sweep.get("searched"))]
    return page(f"Sweep: {', '.join(names)}", (part(sweep, names, trials) for part in SECTIONS))


def _bits(trial: Trial) -> float | None:
    return number(trial.get("bits_per_byte"))


def _rungs(trial: Trial) -> list[float]:
    """Bits per byte at each rung that a trial has reached."""
    found = trial.get("rungs_reached")
    return [bits for each in found if (bits := number(each)) is not None] if isinstance(found, list) else []


def _verdict(sweep: Mapping[str, Any], names: Sequence[str], trials: Sequence[Trial]) -> str:
    """The best trial."""
    words = []
    if sweep.get("state") != "finished":
        words.append(paragraph("This sweep is not finished: the page shows what there is so far.", "warning"))
    if not trials or _bits(trials[0]) is None:
        return "\n".join([*words, paragraph("No trial has a result yet.", "lead")])
    best = trials[0]
    chosen = ", ".join(f"{name} {_value(best, name)}" for name in names)
    named = f"{best.get('trial')} is the best of {counted(len(trials), 'trial')}"
    words.append(paragraph(f"{named}, {_bits(best):.4f} bits per byte, with {chosen}.", "lead"))
    words.append(paragraph(f"To train with its settings: {best.get('command')}"))
    return "\n".join(words)


def _value(trial: Trial, name: str) -> str:
    value = mapping(trial.get("settings")).get(name)
    return short(value) if isinstance(value, float) else str(value)


def _settings(sweep: Mapping[str, Any], names: Sequence[str], trials: Sequence[Trial]) -> str:
    """Bits per byte by each setting."""
    figures = [_figure(name, mapping(mapping(sweep.get("searched")).get(name)), trials) for name in names]
    about = "Other settings differ from mark to mark: where marks of one value are far apart, those matter more."
    return section("What each setting does", paragraph(about), charts(*figures)) if any(map(_rungs, trials)) else ""


def _figure(name: str, described: Mapping[str, Any], trials: Sequence[Trial]) -> str:
    """A mark for each trial, against a setting: along an axis where it is a number, else in a row for each value."""
    found = [(mapping(trial.get("settings")).get(name), _rungs(trial)) for trial in trials]
    title = f"Bits per byte by {name}"
    if any(number(value) is None for value, _ in found):
        about = (
            "A mark for each trial, at the first point where all were judged, a stroke for their mean; left is better."
        )
        return strips(title, about, BITS, _rows(name, trials))
    last = max((len(rungs) for _, rungs in found), default=0)
    lines = []
    for rung in range(last - 1, -1, -1):
        points = [(x, rungs[rung]) for value, rungs in found if (x := number(value)) is not None and len(rungs) > rung]
        best = min(points, key=lambda point: point[1], default=None) if rung == last - 1 else None
        lines.append(Line("whole length" if rung == last - 1 else f"rung {rung + 1}", points, best=best, joined=False))
    low, high = number(described.get("low")), number(described.get("high"))
    log = bool(described.get("log")) or (low is not None and high is not None and spans((low, high), WIDE_X))
    about = "A mark for each trial, a ring for the best. At an end of the axis, a value beyond it may be better still."
    return chart(title, about, Axis(name, log=log), BITS, lines)


def _rows(name: str, trials: Sequence[Trial]) -> list[Strip]:
    """The results at the first rung by value of a setting."""
    found: dict[str, list[float]] = {}
    for trial in trials:
        if rungs := _rungs(trial):
            found.setdefault(_value(trial, name), []).append(rungs[0])
    return [Strip(f"{name} {value}", bits, sum(bits) / len(bits)) for value, bits in sorted(found.items())]


def _table(sweep: Mapping[str, Any], names: Sequence[str], trials: Sequence[Trial]) -> str:
    """One row a trial."""
    columns = ["trial", "bits per byte", *names, "status", "parameters", "steps", "tokens", "time", "memory"]
    rows = [
        [
            trial.get("trial"),
            written(trial.get("bits_per_byte"), ".4f"),
            *(_value(trial, name) for name in names),
            trial.get("status"),
            written(trial.get("parameters"), short),
            written(trial.get("steps"), ",.0f"),
            written(trial.get("tokens"), short),
            written(trial.get("time_s"), duration),
            written(trial.get("peak_memory_bytes"), size),
        ]
        for trial in trials
    ]
    problems = [paragraph(f"{trial.get('trial')}: {why}") for trial in trials if (why := trial.get("problem"))]
    return section(
        "Trials", table(columns, rows, "The best first; fewer bits per byte are better.", "whole"), *problems
    )


def _conditions(sweep: Mapping[str, Any], names: Sequence[str], trials: Sequence[Trial]) -> str:
    """What was the same for all, and what was searched."""
    length = ", ".join(f"{name} {value}" for name, value in mapping(sweep.get("length")).items())
    same = {
        "sampler": sweep.get("sampler"),
        "length of a trial": length or None,
        "text": sweep.get("data"),
        "tokens that judge": written(sweep.get("judged_tokens"), ",.0f"),
        "device": sweep.get("device"),
        "fingerprint of the text": sweep.get("fingerprint"),
    }
    settings = mapping(sweep.get("settings"))
    described = {name: mapping(space) for name, space in mapping(sweep.get("searched")).items()}
    rows = [
        [name, value]
        for name, value in settings.items()
        if name != "searched" and name not in described and value is not None
    ]
    searched = [
        [name, ", ".join(f"{key} {_listed(value)}" for key, value in space.items() if value not in (None, False))]
        for name, space in described.items()
    ]
    return section(
        "Conditions",
        facts(same),
        table(["setting", "searched"], searched, "What was searched", "words"),
        table(["setting", "value"], rows, "The same for all trials", "words"),
    )


def _listed(value: Any) -> str:
    """A value, or each of several, in words."""
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


SECTIONS = (_verdict, _settings, _table, _conditions)
