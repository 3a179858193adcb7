"""race.json: a race as it stands. It alone draws the table and the page, and is what `nnx compare --json` prints.

format                  1; another number is not read. Keys are added, never renamed
versions                {nnx, torch, python}
settings                what was asked for, with defaults: a race goes on where they are the same
device                  in words
fingerprint             of the token folder, as in a run's config.json
state                   running | finished | interrupted
comparisons             how many pairs of competitors were compared
equal, budget           time (seconds) | tokens | flops, and how much of it a run may use; null with --runs
data, tokenizer         the token folder's path; {kind, vocab_size, fingerprint}
train_tokens, seq_len, tokens_per_step
parameters_counted      {target, outside}: what is equal, and outside which tables it is counted
learning_rate_search    {rates: {MODEL: [{factor, lr, bits_per_byte, time_s}]}, tokens_each, time_s}; lr is that of a
                        whole run, of which a short one has a higher one; null bits: it diverged
target_bits_per_byte    of --target, or null
competitors             as many as there are, best first:
    model, size         its name; its named size, or null for another shape
    config              every field of its shape
    parameters, parameters_without_tables, flops_per_token
    lr, optimizer, weight_decay, dropout, warmup_steps     of its own recipe, but the rate, which was searched
    status              waiting | running | interrupted | finished | diverged | out of memory
    problem             in words, where it has not finished; else null
    runs                one a seed, those that are done:
        seed, out       and its run folder, a MODEL as race-NAME/MODEL-SEED
        status          finished | diverged | out of memory
        bits_per_byte   of its best weights, on the whole validation text (at most EVAL_TOKENS of it); null unless
                        finished
        tokens, time_s, flops, peak_memory_bytes           of training; null: not known
        curve           [{step, tokens, time_s, flops, train_loss, val_bits_per_byte}], null where not measured
        recall          [[distance, accuracy]] of --task recall: tokens back, share of right answers; else null
        plasticity      of --task plasticity, else null: [{text, bits_per_byte, earlier_bits_per_byte, effective_rank,
                        dead_units, weight_rms, curve: [[step, bits]], fresh}], a text each, measured after it on
                        its own validation text and on those of the earlier ones; fresh: the same of a model that
                        learned this text alone. bits_per_byte above is then the mean over all texts but the first
        sample          text, its prompt included, drawn with the same seed from every competitor
    bits_per_byte       {mean, stderr} over the seeds that finished; stderr is null with one, all is with none. Where
                        one failed there is no verdict, and the competitor stands behind those of whom none did
    tokens_per_s        mean over them
    to_target           {tokens, time_s, flops} until the target, mean over the seeds; null where one missed it
    plasticity          means over the seeds, of --task plasticity: {texts, new, fresh, behind, behind_by_seed, lost,
                        effective_rank, dead_units, weight_rms: [after the first text, after the last]}
    ties_with           [MODEL]: the 95 % interval of the mean difference, paired by seed, holds 0; null: no verdict
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from nnx_cli.errors import CheckpointError, nearest_file
from nnx_cli.experiments.folders import check_record
from nnx_cli.experiments.statistics import mean_and_error, ties
from nnx_cli.runs.find import RACE as NAME
from nnx_cli.system.files import read_json, replace_file, to_json

FORMAT = 1
NUMBER = (int, float, type(None))
WORDS = (str, type(None))
AXES = ("tokens", "time_s", "flops")
RACE_TYPES = {  # of what the table and the page rely on
    "versions": {},
    "settings": {},
    "state": str,
    "device": WORDS,
    "fingerprint": WORDS,
    "comparisons": int,
    "equal": WORDS,
    "budget": NUMBER,
    "data": WORDS,
    "tokenizer": {"kind": str, "vocab_size": int},
    "parameters_counted": {"target": NUMBER, "outside": str},
    "learning_rate_search": {"rates": {}, "tokens_each": NUMBER, "time_s": NUMBER},
    "target_bits_per_byte": NUMBER,
    "competitors": list,
}
COMPETITOR_TYPES = {
    "model": str,
    "size": WORDS,
    "config": {},
    "parameters": int,
    "parameters_without_tables": int,
    "lr": NUMBER,
    "optimizer": WORDS,
    "status": str,
    "problem": WORDS,
    "runs": list,
    "bits_per_byte": {"mean": NUMBER, "stderr": NUMBER},
    "tokens_per_s": NUMBER,
    "to_target": dict.fromkeys(AXES, NUMBER),
    "ties_with": (list, type(None)),
    "plasticity": {},
}
RUN_TYPES = {
    "seed": int,
    "out": str,
    "status": str,
    "bits_per_byte": NUMBER,
    "tokens": NUMBER,
    "time_s": NUMBER,
    "flops": NUMBER,
    "peak_memory_bytes": NUMBER,
    "curve": list,
    "sample": WORDS,
    "recall": (list, type(None)),
    "plasticity": (list, type(None)),
}
USED = ("effective_rank", "dead_units", "weight_rms")
PLASTICITY_TYPES = {"texts": list, "new": float, "fresh": float, "behind": list, "lost": float} | dict.fromkeys(
    USED, list
)
STAGE_TYPES = {"text": str, "bits_per_byte": float, "earlier_bits_per_byte": list, "fresh": {"bits_per_byte": float}}
RATE_TYPES = dict.fromkeys(("factor", "lr", "bits_per_byte", "time_s"), NUMBER)
POINT_TYPES = dict.fromkeys(("step", "train_loss", "val_bits_per_byte", *AXES), NUMBER)
NEEDED = {"state", "competitors"}, {"model", "status", "runs", "parameters", "parameters_without_tables"}, {"seed"}


def read_race(path: Path) -> dict[str, Any]:
    """A race from its file; unknown keys stay, and missing ones are null. Raises CheckpointError for what is none, is
    damaged or of another format."""
    if not path.exists():
        raise CheckpointError(f"there is no {path}{nearest_file(path)}")
    race = read_json(path)
    version = race.get("format")
    if type(version) is not int or "competitors" not in race:
        raise CheckpointError(f"{path} is no race: it has no format and no competitors")
    if version != FORMAT:
        raise CheckpointError(f"{path} has race format {version}; this version of nnx reads {FORMAT}")
    check_record(race, RACE_TYPES, NEEDED[0], path)
    search = race["learning_rate_search"] or {}
    for tried in (search.get("rates") or {}).values():
        for rate in tried if isinstance(tried, list) else [tried]:
            check_record(rate, RATE_TYPES, {"lr", "bits_per_byte", "time_s"}, path)
    for competitor in race["competitors"]:
        check_record(competitor, COMPETITOR_TYPES, NEEDED[1], path)
        if (means := competitor["plasticity"]) is not None:
            check_record(means, PLASTICITY_TYPES, {*PLASTICITY_TYPES}, path)
            _check_numbers([*means["behind"], *(x for name in USED for x in means[name])], path)
        for run in competitor["runs"]:
            check_record(run, RUN_TYPES, NEEDED[2], path)
            for stage in run["plasticity"] or []:
                check_record(stage, STAGE_TYPES, {*STAGE_TYPES, *USED}, path)
                _check_numbers([*stage["earlier_bits_per_byte"], *(stage[name] for name in USED)], path)
            for point in run["curve"] or []:
                check_record(point, POINT_TYPES, set(), path)
            for pair in run["recall"] or []:
                if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(x, (int, float)) for x in pair):
                    raise CheckpointError(f"{path} is damaged: its recall is {repr(pair)[:40]}")
    return race


def _check_numbers(values: Sequence[Any], path: Path) -> None:
    """Raise CheckpointError where one of several is no number."""
    for value in values:
        if not isinstance(value, NUMBER):
            raise CheckpointError(f"{path} is damaged: {repr(value)[:40]} is no number")


def write_race(folder: Path, race: Mapping[str, Any]) -> None:
    """Replace race.json in one step. Raises OutputError; then the old one stands."""
    replace_file(folder / NAME, to_json(race))


def judge(race: dict[str, Any]) -> None:
    """Fill in what follows from the runs: means, ties, the way to the target, and the order, best first."""
    competitors = race["competitors"]
    if (search := race.get("learning_rate_search")) and search["rates"]:
        search["time_s"] = round(sum(each["time_s"] or 0.0 for tried in search["rates"].values() for each in tried), 3)
    results = {}
    for competitor in competitors:
        finished = [run for run in competitor["runs"] if run["bits_per_byte"] is not None]
        failed = len(finished) < len(competitor["runs"])
        results[competitor["model"]] = {} if failed else {run["seed"]: run["bits_per_byte"] for run in finished}
        competitor["bits_per_byte"], competitor["tokens_per_s"] = None, None
        if finished:
            mean, error = mean_and_error([run["bits_per_byte"] for run in finished])
            competitor["bits_per_byte"] = {"mean": mean, "stderr": error}
            timed = [run["tokens"] / run["time_s"] for run in finished if run["tokens"] and run["time_s"]]
            competitor["tokens_per_s"] = round(mean_and_error(timed)[0], 1) if timed else None
        competitor["plasticity"] = _plasticity(competitor["runs"])
        competitor["to_target"] = _to_target(competitor["runs"], race["target_bits_per_byte"])
    tied, race["comparisons"] = ties(results)
    for competitor in competitors:
        competitor["ties_with"] = tied[competitor["model"]]
    competitors.sort(key=_rank)


def _plasticity(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """Means over the seeds of a competitor: bits per byte of the new texts, of fresh models on them, the difference by
    text, what the earlier texts lost since they were learned, and what is in use after the first text and the last."""
    found = [run["plasticity"] for run in runs if run.get("plasticity")]
    if not found:
        return None
    new = [[stage["bits_per_byte"] for stage in stages[1:]] for stages in found]
    fresh = [[stage["fresh"]["bits_per_byte"] for stage in stages[1:]] for stages in found]
    behind = [[a - b for a, b in zip(x, y, strict=True)] for x, y in zip(new, fresh, strict=True)]
    learned = [[stage["bits_per_byte"] for stage in stages[:-1]] for stages in found]
    lost = [
        mean(now - then for now, then in zip(stages[-1]["earlier_bits_per_byte"], at, strict=True))
        for stages, at in zip(found, learned, strict=True)
    ]
    used = {name: [_mean_or_none([stages[place][name] for stages in found]) for place in (0, -1)] for name in USED}
    return {
        "texts": [stage["text"] for stage in found[0]],
        "new": mean(map(mean, new)),
        "fresh": mean(map(mean, fresh)),
        "behind": [mean(values) for values in zip(*behind, strict=True)],
        "behind_by_seed": [values[-1] for values in behind],
        "lost": mean(lost),
        **used,
    }


def _mean_or_none(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return mean(known) if known else None


def _rank(competitor: Mapping[str, Any]) -> tuple[bool, bool, float, str]:
    """Those without a figure come last, before them those with a run that failed: the others flatter them."""
    bits = competitor["bits_per_byte"]
    failed = any(run["bits_per_byte"] is None for run in competitor["runs"])
    return bits is None, failed, bits["mean"] if bits else 0.0, competitor["model"]


def _to_target(runs: Sequence[Mapping[str, Any]], target: float | None) -> dict[str, float] | None:
    """What runs needed on average until their validation was at the target; None where one never was."""
    if target is None or not runs:
        return None
    reached = [_reached(run["curve"], target) for run in runs]
    found = [each for each in reached if each is not None]
    if len(found) < len(runs):
        return None
    return {axis: mean_and_error([each[axis] for each in found])[0] for axis in AXES}


def _reached(curve: Sequence[Mapping[str, Any]], target: float) -> dict[str, float] | None:
    """Where a curve comes down to a target, on the line between two validations; None where it does not."""
    points = [point for point in curve if None not in (point["val_bits_per_byte"], *(point[axis] for axis in AXES))]
    for number, point in enumerate(points):
        if point["val_bits_per_byte"] > target:
            continue
        before = points[max(0, number - 1)]
        drop = before["val_bits_per_byte"] - point["val_bits_per_byte"]
        share = (before["val_bits_per_byte"] - target) / drop if drop > 0 else 1.0
        return {axis: before[axis] + share * (point[axis] - before[axis]) for axis in AXES}
    return None
