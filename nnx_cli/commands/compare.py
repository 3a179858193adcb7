"""`nnx compare`: which architecture learns a text better, of one size and on one budget."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING, Annotated, Any

import typer

from nnx_cli.commands._config_file import read_toml
from nnx_cli.commands._options import (
    COMMAND_LINE,
    READING,
    ROW_FIELDS,
    AllBut,
    Branch,
    at_home,
    check_read,
    command,
    extra,
    given,
    hidden,
    may_have_rows,
    model_fields,
    runs_named,
    settings,
)
from nnx_cli.commands._pages import page_writer
from nnx_cli.config import PrepareConfig, RaceConfig, TrainConfig, check_range, coerce, own_fields
from nnx_cli.console.output import Output
from nnx_cli.console.run_view import RunsView
from nnx_cli.errors import DataError, Interrupted, UsageError, counted, pasteable
from nnx_cli.system.text import duration, size

if TYPE_CHECKING:
    from nnx_cli.data.token_folder import TokenFolder
    from nnx_cli.experiments.entrants import Field
    from nnx_cli.experiments.race import Race

EXAMPLES = """Examples:

  nnx compare --models llama,nyx --budget 1M --seeds 2
  nnx compare --filepath book.txt --size tiny --equal time --budget 5m
  nnx compare --runs llama-book nyx-book
  nnx compare --show weights/race-book/race.json"""

MAIN, TRAINING, TEXT = "Main options", "Training", "Data"
RECALL_TOKENS = 4_000_000  # of generated text, where the budget says nothing of tokens
RECALL_SEED = 1
TRAINED_AS = ("tokens_per_step", "device", "precision", "compile", "vram", "threads")
PREPARED_AS = ("tokenizer", "val_fraction", *READING)
COLUMNS = ["model", "bits/byte", "ties with", "params", "outside", "lr", "tokens/s", "peak", "status"]
TARGET_COLUMN = "tokens to target"
EXPENDABLE = ["lr", "params", "peak", "status", "tokens/s", "outside"]  # on a narrow screen, in this order
SAMPLE_CHARS, SAMPLE_LINES = 240, 8  # of each that are shown
SEQ_LEN = model_fields()["seq_len"]
SHAPE = [replace(SEQ_LEN, default=None, help=f"{SEQ_LEN.help}; default that of the size")]
RACING, TRAIN, PREPARE = own_fields(RaceConfig), own_fields(TrainConfig), own_fields(PrepareConfig)
SETTINGS = [
    *RACING,
    *SHAPE,
    *(field for field in TRAIN if field.name in TRAINED_AS),
    *(field for field in PREPARE if field.name in PREPARED_AS),
]
OPTIONS = [
    *settings(RaceConfig, MAIN),
    extra("filepath", list[str], "Text to race on: a file, folder or glob; may be repeated.", MAIN),
    extra("data", Path, "Token folder made by nnx prepare.", MAIN),
    extra("out", Path, "Folder of the race: a new one, or one to resume.", MAIN, "weights/race-STEM"),
    extra("runs", list[str], "Compare these finished runs instead: --runs A B C.", MAIN, autocompletion=runs_named),
    extra("show", Path, "Show the race of this race.json, or of its folder, instead.", MAIN),
    extra("config", Path, "TOML file with settings; the command line wins.", MAIN),
    hidden("competitor", str),
    hidden("parent", int),
    *settings(SHAPE, TRAINING),
    *settings(TrainConfig, TRAINING, only=TRAINED_AS),
    *settings(PrepareConfig, TEXT, only=PREPARED_AS),
]
BRANCHES = (
    Branch(AllBut("show", "target"), lambda v: v["show"] is None, "beside --show: a race is shown, none is run"),
    Branch(
        AllBut("runs", "more", "target", "device", "precision", "show"),
        lambda v: not v["runs"],
        "beside --runs: runs are compared that are trained already",
    ),
    Branch(
        {"filepath", "data", *PREPARED_AS},
        lambda v: v["task"] != "recall",
        "with --task recall: its text is generated",
    ),
    Branch({"val_fraction"}, lambda v: v["data"] is None, "with --data: the token folder is split already"),
    Branch(READING, lambda v: v["data"] is None, "with --data: the text is read already"),
    Branch(
        {*ROW_FIELDS, "encoding", "errors"}, lambda v: v["filepath"], "without --filepath: the built-in text is plain"
    ),
    Branch(ROW_FIELDS, lambda v: may_have_rows(v["filepath"]), "with plain text: it names a field of rows"),
)


@command(*OPTIONS)
def run(
    output: Output,
    more: Annotated[
        list[str] | None,
        typer.Argument(metavar="RUN", help="Further runs of --runs.", show_default=False, autocompletion=runs_named),
    ] = None,
    **options: Any,
) -> None:
    """Race architectures on your text: the same batches, one size, one budget, and which differences are more than
    chance. A search of each one's learning rate comes first, 3 or 4 short runs beside the budget; to do without it,
    train them yourself (nnx train --lr) and compare the runs: --runs A B. The same command goes on with a race that was
    interrupted."""
    if options["competitor"] is not None:
        _compete(options)
        return
    values, notes = _values(options | {"more": more})
    config = RaceConfig(**{field.name: values[field.name] for field in RACING if field.name in values})
    for note in notes:
        output.note(note)
    if options["show"] is not None:
        _show_file(output, options["show"], config.target)
    elif options["runs"]:
        _compare_runs(output, [*options["runs"], *(more or [])], config.target, values)
    else:
        _race(output, config, values, options)


def _compete(options: Mapping[str, Any]) -> None:
    """Run one competitor of the race in --out, for the process that holds it."""
    from nnx_cli.experiments.race_gpus import work

    work(options["out"], options["competitor"], options["parent"], options["keep"])


def _values(options: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """The settings of the command line and the file of `--config`, and what to say of those that are not read."""
    path = options["config"]
    filed = {} if path is None else coerce(SETTINGS, read_toml(path), f"--config {path}")
    filed = {name: at_home(value, name) for name, value in filed.items()}
    typed = given(options, SETTINGS)
    besides = [name for name, value in options.items() if value not in (None, []) and name not in typed]
    sources = dict.fromkeys(filed, f"file: {path}") | dict.fromkeys([*typed, *besides], COMMAND_LINE)
    unread = check_read(BRANCHES, {**options, **filed, **typed}, sources)
    for one, other in (("size", "parameters"), ("parameters", "size")):
        if one in typed and other not in typed:
            filed.pop(other, None)
    values = {name: value for name, value in (filed | typed).items() if name not in unread}
    if options["more"] and not options["runs"]:
        raise UsageError(f"{options['more'][0]!r} does nothing without --runs", fix="a text is named with --filepath")
    if options["filepath"] and options["data"]:
        raise UsageError("--filepath and --data: give one, text or tokens")
    check_range("seq-len", values.get("seq_len"), 1, 2**20)
    return values, [*unread.values()]


def _race(output: Output, config: RaceConfig, values: Mapping[str, Any], options: Mapping[str, Any]) -> None:
    """Run a race, or what is left of it. Where there is none in the end, what was made for it goes."""
    from nnx_cli.experiments.entrants import competitors_of

    competitors_of(config.models)
    made: list[list[Path]] = []
    try:
        field = _enter(output, config, values, options, made)
        folder = _open(field, values, options, made)
    finally:
        if made:
            from nnx_cli.training.inputs import take_back

            take_back(made)
    _run(output, field, folder, values)
    from nnx_cli.experiments.race_file import NAME, read_race

    _report(output, read_race(folder / NAME), folder / NAME)


def _enter(
    output: Output,
    config: RaceConfig,
    values: Mapping[str, Any],
    options: Mapping[str, Any],
    made: list[list[Path]],
) -> Field:
    """Prepare the text, and plan who runs how far. `made` gets the folders that were made for that."""
    from nnx_cli.experiments.entrants import enter, target_of
    from nnx_cli.planning.match import context_for
    from nnx_cli.training.session import configure_device

    train = TrainConfig(**{name: values[name] for name in TRAINED_AS if name in values})
    device, precision = configure_device(train)
    target = target_of(config, device)
    seq_len = values.get("seq_len") or context_for(target)
    texts: tuple[TokenFolder, ...] = ()
    if config.task == "recall":
        tokens = _recall_text(output, config, seq_len, made)
    elif config.task == "plasticity":
        texts = _texts(output, target, seq_len, values, options, made)
        tokens = texts[0]
    else:
        tokens = _text(output, target, values, options, made)
    with output.spinner("planning (loading PyTorch takes some seconds)"):
        return replace(enter(config, train, target, seq_len, tokens, device, precision), texts=texts)


def _texts(
    output: Output,
    target: int,
    seq_len: int,
    values: Mapping[str, Any],
    options: Mapping[str, Any],
    made: list[list[Path]],
) -> tuple[TokenFolder, ...]:
    """The texts of a sequence, each a --filepath of its own, in one vocabulary: bytes where none is named."""
    from nnx_cli.data.tokenizers.build import needs_training

    paths = options["filepath"] or []
    if len(paths) < 2:
        raise UsageError(
            "--task plasticity trains on several texts in turn", fix="name them: --filepath A --filepath B"
        )
    tokenizer = values.get("tokenizer", "byte")
    if tokenizer == "auto" or needs_training(tokenizer):
        raise UsageError(f"--tokenizer {tokenizer} would differ from text to text", fix="take --tokenizer byte")
    alike = {**values, "tokenizer": tokenizer}
    found = tuple(_text(output, target, alike, {**options, "filepath": [path]}, made) for path in paths)
    for path, text in zip(paths, found, strict=True):
        if len(text.val) <= seq_len:
            raise DataError(f"{path} is too short: {counted(len(text.val), 'token')} to validate on")
    if len({text.fingerprint for text in found}) < len(found):
        raise UsageError("--filepath names a text twice", fix="name each text once")
    return found


def _recall_text(output: Output, config: RaceConfig, seq_len: int, made: list[list[Path]]) -> TokenFolder:
    """The generated text: enough for the budget where it is of tokens, so that nothing is read twice."""
    from nnx_cli.data.recall import make_recall_folder

    n_tokens = int(config.amount()) if config.equal == "tokens" else RECALL_TOKENS
    folder = Path("data") / f"recall-{n_tokens}-{seq_len}"
    made.append([path for path in (folder, *folder.parents) if not path.exists()])
    with output.spinner("writing text that asks for what it said before"):
        return make_recall_folder(folder, RECALL_SEED, n_tokens, seq_len)


def _text(
    output: Output, target: int, values: Mapping[str, Any], options: Mapping[str, Any], made: list[list[Path]]
) -> TokenFolder:
    """The tokens that were named, or prepared from text."""
    from nnx_cli.commands.prepare import preparation_view
    from nnx_cli.planning.recipe.tokenizer import vocabularies_for
    from nnx_cli.system.signals import half_made
    from nnx_cli.training.inputs import open_tokens, prepare_tokens

    preparing = PrepareConfig(**{name: values[name] for name in PREPARED_AS if name in values})
    named = None
    if options["data"] is not None:
        folder = options["data"]
        named = preparing.tokenizer if preparing.tokenizer != "auto" else None
    else:
        suited = vocabularies_for(target)
        with half_made(), preparation_view(output) as show:
            folder, new = prepare_tokens(options["filepath"] or [], preparing, None, show, options["out"], suited)
        made.append(new)
    return open_tokens(folder, None, named)


def _open(field: Field, values: Mapping[str, Any], options: Mapping[str, Any], made: list[list[Path]]) -> Path:
    """The folder of the race: one that was begun, or a new one."""
    from nnx_cli.experiments import race
    from nnx_cli.system.device import describe

    asked = {name: values[name] for name in TRAINED_AS if name in values}
    identity = race.identity(field, asked)
    path = field.data.path
    stem = path.resolve().name if options["data"] else path.name.rpartition("-")[0]  # without the hash
    stem = stem if field.config.task == "text" else field.config.task
    folder, is_begun = race.find_race(identity, field.data.fingerprint, describe(field.device), stem, options["out"])
    if not is_begun:
        race.begin(folder, race.new_record(field, identity))
    made.clear()
    return folder


def _run(output: Output, field: Field, folder: Path, values: Mapping[str, Any]) -> None:
    """Run what is left of a race. Raises Interrupted where it was stopped, after saving."""
    from nnx_cli.experiments.one_run import Stopped
    from nnx_cli.experiments.race import Race
    from nnx_cli.experiments.race_file import NAME, read_race
    from nnx_cli.experiments.race_gpus import gather, run_on_gpus
    from nnx_cli.runs.run import hold_folder
    from nnx_cli.system.signals import stop_signals

    line = pasteable(["nnx", *sys.argv[1:]])
    with hold_folder(folder), stop_signals() as should_stop, RunsView(output) as view:
        race = Race(field, folder, read_race(folder / NAME), view, line, should_stop, _pages(output, folder))
        gather(race)
        _tell(output, race)
        gpus = _gpus(values, field)
        try:
            if len(gpus) > 1:
                output.note(f"{len(gpus)} GPUs: a competitor at a time on each")
                run_on_gpus(race, gpus, should_stop)
            else:
                race.run()
        except Stopped as error:
            view.close()
            output.note("")
            raise Interrupted(f"{error}; everything is saved", fix=f"resume: {line}") from error


def _gpus(values: Mapping[str, Any], field: Field) -> list[dict[str, str]]:
    """An environment for each of several GPUs, in which a process sees that one alone; none where the race runs on one
    device. Without a tokenizer of its own a token folder is read here alone."""
    import torch

    named = values.get("device", TrainConfig.device)
    if (
        field.texts
        or field.device.type != "cuda"
        or named not in ("auto", "cuda")
        or not (field.data.path / "tokenizer.json").exists()
    ):
        return []
    seen = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    known = seen.split(",") if seen else [str(number) for number in range(torch.cuda.device_count())]
    return [{**os.environ, "CUDA_VISIBLE_DEVICES": gpu} for gpu in known[: torch.cuda.device_count()]]


def _pages(output: Output, folder: Path) -> Any:
    """Writes race.html of a race."""
    from nnx_cli.reporting.race_page import race_page

    return page_writer(output, folder / "race.html", race_page)


def _tell(output: Output, race: Race) -> None:
    """Who runs, in what shape, how far."""
    from nnx_cli.system.device import describe

    field, record = race.field, race.record
    each = _budget_words(record)
    output.note(
        f"{record['device']}, {field.precision}; {counted(record['settings']['seeds'], 'seed')}, {each} a run, "
        f"{field.tokens_per_step:,} tokens a step, {field.target:,} parameters outside embedding and head"
    )
    output.aligned([_shape_row(entrant.name, race.entry(entrant)) for entrant in field.entrants])
    done = sum(len(entry["runs"]) for entry in record["competitors"])
    if record["device"] != (here := describe(field.device)):
        output.note(f"begun on that device and resumed on {here}: times are of both")
    if record["state"] == "finished":
        output.note(f"{race.folder} is finished; another one: --out FOLDER")
        return
    tried = sum(len(rates) for rates in record["learning_rate_search"]["rates"].values())
    if done or tried:
        total = counted(len(field.entrants) * field.config.seeds, "run")
        output.note(f"resuming {race.folder}: {counted(tried, 'short run')} of the search and {done} of {total} done")
    if words := _work_words(race):
        output.note(words)


def _work_words(race: Race) -> str:
    """What is left to do and how long that takes; nothing where all is done."""
    from nnx_cli.experiments.rate_search import FACTORS

    entries = [race.entry(entrant) for entrant in race.racing]
    searched = [entry["model"] for entry in entries if entry["lr"] is None]
    n_runs = sum(len(race.seeds) - len(entry["runs"]) for entry in entries)
    if not searched and not n_runs:
        return ""
    tokens_each = race.record["learning_rate_search"]["tokens_each"]
    search = (
        f"{len(FACTORS)} or {len(FACTORS) + 1} short runs of {tokens_each:,} tokens each to find the learning rate of "
        f"{', '.join(searched)}; then "
    )
    return (
        f"to do: {search if searched else ''}{counted(n_runs, 'run')}: about {duration(race.seconds()[1])} of training "
        "in all, evaluation and saving on top"
    )


def _shape_row(name: str, entry: Mapping[str, Any]) -> tuple[str, str, str]:
    """A competitor's name, its parameters, its shape and recipe."""
    config = entry["config"]
    ffn = f", ffn {config['ffn_dim']}" if config.get("ffn_dim") else ""
    recipe = f"; {entry['optimizer']}, dropout {entry['dropout']:g}" if entry["optimizer"] else f"; {entry['problem']}"
    return (
        name,
        f"{entry['parameters']:,} parameters, {entry['parameters_without_tables']:,} outside",
        f"{entry['size'] or 'dim'} {config['dim']}, {counted(config['n_layers'], 'layer')}, "
        f"{counted(config['n_heads'], 'head')}{ffn}{recipe}",
    )


def _budget_words(record: Mapping[str, Any]) -> str:
    """The budget of a run."""
    amount = record["budget"]
    if record["equal"] == "time":
        return f"{duration(amount)} of training"
    if record["equal"] == "flops":
        return f"{amount:g} FLOPs"
    steps = int(amount // record["tokens_per_step"])
    return f"{steps * record['tokens_per_step']:,} tokens"


def _show_file(output: Output, path: Path, target: float | None) -> None:
    """Show a race from its file, with the way to another target where one is given."""
    from nnx_cli.experiments.race_file import NAME, judge, read_race

    path = path / NAME if path.is_dir() else path
    record = read_race(path)
    if target is not None:
        record["target_bits_per_byte"] = target
        judge(record)
    _pages(output, path.parent)(record)
    _report(output, record, path)


def _compare_runs(output: Output, specs: Sequence[str], target: float | None, values: Mapping[str, Any]) -> None:
    """Compare runs that are trained already."""
    from nnx_cli.experiments.finished_runs import race_of_runs
    from nnx_cli.system.device import pick_device, pick_precision

    device = pick_device(values.get("device", TrainConfig.device))
    precision = pick_precision(values.get("precision", TrainConfig.precision), device)
    with output.spinner("reading their validation text"):
        record = race_of_runs(specs, target, device, precision)
    _report(output, record, None)


def _report(output: Output, record: Mapping[str, Any], path: Path | None) -> None:
    """A race as table, samples and sentences, or as JSON."""
    output.made = path
    output.show_json(record)
    columns, with_target = list(COLUMNS), record["target_bits_per_byte"] is not None
    if with_target:
        columns.insert(3, TARGET_COLUMN)
    rows = [_row(entry, with_target) for entry in record["competitors"]]
    output.table(columns, rows, expendable=EXPENDABLE)
    _show_recall(output, record["competitors"])
    _show_plasticity(output, record["competitors"])
    samples = {entry["model"]: _sample_of(entry) for entry in record["competitors"]}
    if written := {name: text for name, text in samples.items() if text}:
        output.show("what they write, from the same prompt and seed:", "")
        output.side_by_side(written)
        output.show("")
    output.show(*_sentences(record, path))


def _row(entry: Mapping[str, Any], with_target: bool) -> list[Any]:
    """A competitor in the table."""
    bits, ties, reached = entry["bits_per_byte"], entry["ties_with"], entry["to_target"]
    error = "" if bits is None or bits["stderr"] is None else f" ± {bits['stderr']:.4f}"
    peaks = [run["peak_memory_bytes"] for run in entry["runs"] if run["peak_memory_bytes"]]
    row = [
        entry["model"],
        None if bits is None else f"{bits['mean']:.4f}{error}",
        None if ties is None else ", ".join(ties) or "none",
        _short(entry["parameters"]),
        _short(entry["parameters_without_tables"]),
        None if entry["lr"] is None else f"{entry['lr']:g}",
        None if entry["tokens_per_s"] is None else f"{entry['tokens_per_s']:,.0f}",
        size(max(peaks)) if peaks else None,
        entry["status"],
    ]
    if with_target:
        row.insert(3, None if reached is None else f"{reached['tokens']:,.0f}")
    return row


def _short(n: int) -> str:
    """A number of parameters."""
    return f"{n / 1e6:.2f} M" if n >= 1e6 else f"{n / 1e3:.1f} K"


def _show_recall(output: Output, competitors: Sequence[Mapping[str, Any]]) -> None:
    """The share of right answers by distance, mean over the seeds, where there are any."""
    found: dict[str, dict[int, list[float]]] = {}
    for entry in competitors:
        for run in entry["runs"]:
            for distance, accuracy in run["recall"] or []:
                found.setdefault(entry["model"], {}).setdefault(distance, []).append(accuracy)
    distances = sorted({distance for by_distance in found.values() for distance in by_distance})
    if not distances:
        return
    rows = [
        [name, *(f"{mean(by_distance[d]):.1%}" if d in by_distance else None for d in distances)]
        for name, by_distance in found.items()
    ]
    output.table(["model", *(f"{distance} back" for distance in distances)], rows, "answers recalled")


PLASTICITY = ["model", "new texts", "fresh", "behind, last", "old lost", "rank", "dead units", "weight rms"]


def _show_plasticity(output: Output, competitors: Sequence[Mapping[str, Any]]) -> None:
    """What models that learned several texts in turn are beside fresh ones, mean over the seeds."""
    found = {entry["model"]: entry["plasticity"] for entry in competitors if entry["plasticity"]}
    if not found:
        return
    rows = []
    for name, each in found.items():
        forms = {"effective_rank": ".1f", "dead_units": ".1%", "weight_rms": ".4f"}
        used = [" → ".join("–" if x is None else format(x, form) for x in each[key]) for key, form in forms.items()]
        bits = [f"{each['new']:.4f}", f"{each['fresh']:.4f}", f"{each['behind'][-1]:+.4f}", f"{each['lost']:+.4f}"]
        rows.append([name, *bits, *used])
    (texts,) = {tuple(each["texts"]) for each in found.values()}
    output.table(PLASTICITY, rows, f"bits per byte after {', then '.join(texts)}", expendable=PLASTICITY[:4:-1])
    output.show(
        "new texts: those after the first, by the model that learned the ones before; fresh: by a new model; behind:",
        "the difference on the last; old lost: what earlier texts lost; others: after the first text → after the last",
    )


def _sample_of(entry: Mapping[str, Any]) -> str:
    """The beginning of what a competitor wrote, without blank lines."""
    written = [run["sample"] for run in entry["runs"] if run["sample"]]
    lines = [line for line in written[0].split("\n") if line.strip()] if written else []
    return "\n".join(lines[:SAMPLE_LINES])[:SAMPLE_CHARS]


def _sentences(record: Mapping[str, Any], path: Path | None) -> list[str]:
    """What the table says, in words."""
    n_seeds = max((len(entry["runs"]) for entry in record["competitors"]), default=0)
    verdict = (
        f"{counted(record['comparisons'], 'comparison')}, paired by seed over {counted(n_seeds, 'seed')}: two "
        "architectures tie where the 95 % interval of their mean difference holds 0"
    )
    if n_seeds == 1 and record["state"] == "finished":
        verdict = "one seed, so no verdict: the differences may be chance; take --seeds 3"
    elif not record["comparisons"]:
        verdict = "no verdict, for no two have two seeds in common: the differences may be chance"
    lines = [verdict] if record["state"] == "finished" else [f"the race is {record['state']}: {verdict}"]
    if record["equal"] is not None:
        target, search = record["parameters_counted"], record["learning_rate_search"]
        lines.append(
            f"equal: {_budget_words(record)} a run, and {target['target']:,} parameters outside {target['outside']}, "
            "within 2 %; bits per byte of the validation text"
        )
        tried = sum(len(rates) for rates in search["rates"].values())
        lines.append(
            f"learning rates: searched in {counted(tried, 'run')} of {search['tokens_each']:,} tokens of the training "
            f"text, {duration(search['time_s'])} beside the budget; all else is each architecture's own recipe"
        )
    lines += [f"{entry['model']}: {entry['problem']}" for entry in record["competitors"] if entry["problem"]]
    if path is not None:
        page = path.with_name("race.html")
        lines.append(f"{path}: all numbers" + (f"; {page}: curves, samples, shapes" if page.is_file() else ""))
    return lines
