"""`nnx sweep`: which settings train best on a text."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nnx_cli import models
from nnx_cli.commands._options import DEFAULT_MODEL, command
from nnx_cli.commands._pages import page_writer
from nnx_cli.commands._sweep_options import OPTIONS, Asked, read_sweep_request, with_settings
from nnx_cli.commands._train_options import TRAINING, Request
from nnx_cli.config import LENGTHS, TrainConfig, parse_duration
from nnx_cli.console.output import Output
from nnx_cli.console.run_view import RunsView
from nnx_cli.errors import DataError, DoesNotFit, Interrupted, OutputError, QualityError, UsageError, counted, pasteable
from nnx_cli.system.text import duration, size

if TYPE_CHECKING:
    import torch

    from nnx_cli.experiments.samplers import Settings
    from nnx_cli.experiments.sweep import Conditions, Search
    from nnx_cli.planning.plan import Plan
    from nnx_cli.runs.load import ModelRef
    from nnx_cli.training.inputs import Shape

EXAMPLES = """Examples:

  nnx sweep --filepath book.txt --set lr=1e-3..3e-2:log --set dropout=0,0.1 --trials 20 --budget 2m
  nnx sweep --data data/book --set n_layers=2..6 --sampler halving --trials 27 --budget 20M
  nnx sweep --filepath book.txt --wandb-yaml sweep.yaml"""

TRIALS, ETA = 20, 3
NOT_A_DIFFERENCE = ("device", "threads")  # a sweep goes on on another GPU
MOST_PROBLEMS = 5  # that are told
EXPENDABLE = ["peak", "params", "steps", "time", "status"]  # on a narrow screen, in this order


@command(*OPTIONS)
def run(output: Output, **options: Any) -> None:
    """Search settings of training: many runs of one length on your text, the best first. The same command goes on with
    a sweep that was interrupted; started in several processes, they share its trials."""
    asked, notes = read_sweep_request(options)
    for note in [*notes, *asked.request.notes]:
        output.note(note)
    made: list[list[Path]] = []
    try:
        search, conditions, folder = _open(output, asked, made)
    finally:
        if made:
            from nnx_cli.training.inputs import take_back

            take_back(made)
    _run(output, search, conditions, folder)


def _open(output: Output, asked: Asked, made: list[list[Path]]) -> tuple[Search, Conditions, Path]:
    """Prepare the text, and find or make the folder of the sweep. `made` gets the folders that were made for a sweep
    that is not to be."""
    from nnx_cli.experiments import samplers, sweep
    from nnx_cli.experiments.folders import make_folder
    from nnx_cli.experiments.search_space import combinations
    from nnx_cli.experiments.sweep_file import NAME
    from nnx_cli.system.device import describe

    config, space, request = asked.config, asked.space, asked.request
    total = samplers.check_grid(space) if config.sampler == "grid" else combinations(space)
    if config.sampler == "tpe":
        samplers.check_tpe()
    n_trials = (total or 0) if config.sampler == "grid" else min(config.trials or TRIALS, total or samplers.MOST_TRIALS)
    eta = config.eta or ETA
    if config.sampler == "halving" and n_trials < eta:
        raise UsageError(f"halving needs at least {eta} trials, not {n_trials}: one in {eta} goes on")
    seed = TrainConfig.seed if "seed" in space else request.train.seed
    search = sweep.Search(space, config.sampler, n_trials, eta, seed)
    conditions = _conditions(output, asked, search, made)
    identity = _identity(asked, search)
    path = conditions.data.path
    stem = path.resolve().name if request.data else path.name.rpartition("-")[0]  # without the hash
    while True:  # another process may begin the same sweep meanwhile
        folder, is_begun = sweep.find_sweep(
            identity, conditions.data.fingerprint, describe(conditions.device), stem, asked.out
        )
        if is_begun:
            break
        with output.spinner("planning (loading PyTorch takes some seconds)"):
            record = sweep.new_record(search, conditions, identity, asked.length)
        try:
            make_folder(folder, NAME, record)
        except OutputError:
            if not folder.exists():
                raise
    made.clear()
    return search, conditions, folder


def _conditions(output: Output, asked: Asked, search: Search, made: list[list[Path]]) -> Conditions:
    """What the trials share. The text is prepared for the first of them that can be."""
    from nnx_cli.commands.train import check_named, chosen_shape, token_folder
    from nnx_cli.experiments.sweep import Conditions, first_that_can_be
    from nnx_cli.training import session
    from nnx_cli.training.inputs import open_and_plan, open_tokens

    def shaped(chosen: Settings) -> tuple[Request, ModelRef | None, Shape]:
        request = with_settings(asked.request, chosen)
        check_named(request)
        base, shape, _ = chosen_shape(Output(quiet=True), request, made)
        return request, base, shape

    first, base, shape = first_that_can_be(search, shaped)
    device, precision = session.configure_device(first.train)
    folder, prepared = token_folder(output, first, base, shape, device, precision)
    made.append(prepared)
    named = first.prepare.tokenizer if first.data is not None and first.prepare.tokenizer != "auto" else None
    tokens = open_tokens(folder, base, named if base is None else None)
    if tokens.tokenizer is None:
        raise DataError(f"bits per byte of {folder} need its tokenizer", fix="name it: --tokenizer FILE")

    def plan(chosen: Settings) -> Plan:
        request = with_settings(asked.request, chosen)
        train = replace(request.train, sample_every=0, report=False, watch=False, stop_early="off", **epochs)
        base, shape, sources = chosen_shape(Output(quiet=True), replace(request, train=train), [])
        precision = session.configure_device(train)[1]
        planned = open_and_plan(
            folder, shape, train, device=device, precision=precision, sources=sources, base=base, tokenizer=named
        )[1]
        return _ending(planned, asked.length)

    n_tokens = asked.length.get("tokens")
    epochs = {"epochs": n_tokens / len(tokens.train)} if n_tokens else asked.length
    command = _commands(asked, folder)
    return Conditions(tokens, device, plan, command, base, asked.config.keep)


def _ending(plan: Plan, length: Mapping[str, Any]) -> Plan:
    """A plan that ends after so many tokens, where that is its length: known are its tokens a step only now."""
    if "tokens" not in length:
        return plan
    assert plan.train.tokens_per_step is not None
    steps = max(1, length["tokens"] // plan.train.tokens_per_step)
    return replace(plan, train=replace(plan.train, epochs=None, max_steps=steps))


def _commands(asked: Asked, folder: Path) -> Any:
    """Writes the `nnx train` that trains with settings as a trial does."""
    request = asked.request
    values = {"model": request.model or DEFAULT_MODEL, "size": request.size, "init_from": request.init_from}
    values |= request.fields | {field.name: getattr(request.train, field.name) for field in TRAINING}
    besides = {
        name: value for name in ("model", *request.sources, "init_from") if (value := values.get(name)) is not None
    }

    def command(chosen: Settings, plan: Plan | None) -> str:
        words = ["nnx", "train", "--data", str(folder)]
        ends = {} if plan is None else {name: getattr(plan.train, name) for name in ("max_time", "max_steps")}
        ends = {name: value for name, value in ends.items() if value is not None}
        settings = {name: value for name, value in (besides | chosen).items() if name not in LENGTHS}
        if "max_time" in ends:
            settings["stop_early"], ends = "off", {"max_time": ends["max_time"]}
        for name, value in (settings | ends).items():
            option = f"--{name.replace('_', '-')}"
            words += [option if value else f"--no-{option[2:]}"] if isinstance(value, bool) else [option, str(value)]
        return shlex.join(words)

    return command


def _identity(asked: Asked, search: Search) -> dict[str, Any]:
    """The settings that make a sweep: with others it is another one."""
    from nnx_cli.system.files import sha256_file

    request, config = asked.request, asked.config
    training = {name: getattr(request.train, name) for name in request.sources if hasattr(request.train, name)}
    model = request.model or DEFAULT_MODEL
    file = {"sha256": sha256_file(Path(model))} if models.is_file(model) else {}
    return {
        "model": model,
        "size": request.size,
        **request.fields,
        **{name: value for name, value in training.items() if name not in (*NOT_A_DIFFERENCE, *LENGTHS)},
        **file,
        "init_from": request.init_from,
        "sampler": config.sampler,
        "seed": search.seed,
        **({"trials": search.trials, "eta": search.eta} if config.sampler == "halving" else {}),
        **{f"length in {name}": value for name, value in asked.length.items()},
        "searched": {name: each.described() for name, each in search.space.items()},
    }


def _run(output: Output, search: Search, conditions: Conditions, folder: Path) -> None:
    """Run what is left of a sweep and show it. Raises Interrupted where it was stopped, after saving."""
    from nnx_cli.experiments.one_run import Stopped
    from nnx_cli.experiments.sweep import Sweep
    from nnx_cli.experiments.sweep_file import PAGE, read_sweep
    from nnx_cli.reporting.sweep_page import sweep_page
    from nnx_cli.system.signals import stop_signals

    line = pasteable(["nnx", *sys.argv[1:]])
    changed = page_writer(output, folder / PAGE, sweep_page)
    with stop_signals() as should_stop, RunsView(output) as view:
        _tell(output, search, read_sweep(folder), folder, conditions.device)
        try:
            record = Sweep(search, conditions, folder, view, should_stop, changed).run()
        except Stopped as error:
            view.close()
            output.note("")
            raise Interrupted(f"{error}; everything is saved", fix=f"resume: {line}") from error
    _report(output, record, folder, conditions)


def _tell(output: Output, search: Search, record: Mapping[str, Any], folder: Path, device: torch.device) -> None:
    """What is searched, how, and how far it is."""
    from nnx_cli.experiments.halving import is_over, lengths

    n_trials, shares = search.trials, search.shares
    length = _length_words(record["length"])
    output.note(f"{record['device']}; {counted(n_trials, 'trial')} of {length}, {search.sampler}")
    output.aligned([(name, str(each), "") for name, each in search.space.items()])
    if len(shares) > 1:
        rungs = ", ".join(f"{share:.0%}" for share in shares[:-1])
        whole = lengths(n_trials, shares, search.eta)
        output.note(
            f"after {rungs} of a trial the best of each {search.eta} continue: the work of {whole:.3g} whole trials"
        )
    if (others := _other_gpus(device)) is not None:
        output.note(others)
    done = sum(map(is_over, record["trials"]))
    if record["state"] == "finished" and done >= n_trials:
        output.note(f"{folder} is finished; another one: --out FOLDER")
    elif record["trials"]:
        output.note(f"resuming {folder}: {done} of {counted(n_trials, 'trial')} done")


def _other_gpus(device: torch.device) -> str | None:
    """What to do where this process sees GPUs that it leaves idle."""
    import torch

    count = torch.cuda.device_count() if device.type == "cuda" else 1
    if count == 1:
        return None
    return (
        f"this process trains on one of {count} GPUs; in a terminal for each other one, start the same command with "
        "CUDA_VISIBLE_DEVICES=1 before it, =2, …"
    )


def _length_words(length: Mapping[str, Any]) -> str:
    """How long a trial is."""
    for name, value in length.items():
        if name == "max_time":
            return f"{duration(parse_duration(value) or 0.0)} of training"
        return f"{value:,} {name.removeprefix('max_')}"
    return "the lengths that are searched"


def _report(output: Output, record: Mapping[str, Any], folder: Path, conditions: Conditions) -> None:
    """A sweep as a table, the best first, or as JSON. Raises QualityError, or what refused the trials, where none
    has a result."""
    from nnx_cli.experiments.one_run import OUT_OF_MEMORY
    from nnx_cli.experiments.sweep import REFUSED
    from nnx_cli.experiments.sweep_file import NAME, PAGE

    trials, names = record["trials"], list(record["searched"])
    output.made = folder
    output.show_json(record)
    columns = ["trial", "bits/byte", *names, "params", "steps", "time", "peak", "status"]
    output.table(columns, [_row(trial, names) for trial in trials], expendable=EXPENDABLE)
    failed = [trial for trial in trials if trial["problem"]]
    output.show(*(f"{trial['trial']}: {trial['problem']}" for trial in failed[:MOST_PROBLEMS]))
    if len(failed) > MOST_PROBLEMS:
        output.show(f"{counted(len(failed) - MOST_PROBLEMS, 'more trial')} failed: {folder / NAME} says why")
    best = trials[0]
    if best["bits_per_byte"] is None:
        kind = {REFUSED: UsageError, OUT_OF_MEMORY: DoesNotFit}.get(best["status"], QualityError)
        raise kind(f"no trial of {folder} has a result: {best['problem']}", fix="search other values: --set")
    output.show(
        f"best: {best['out']}, {best['bits_per_byte']:.4f} bits per byte of {record['judged_tokens']:,} tokens of the "
        "validation text",
        f"train longer with its settings: {conditions.command(best['settings'], None)} --max-time 20m",
        f"{folder / NAME}: all numbers; {folder / PAGE}: bits per byte by each setting",
    )


def _row(trial: Mapping[str, Any], names: list[str]) -> list[Any]:
    """A trial in the table."""
    from nnx_cli.experiments.search_space import shown

    bits, peak, settings = trial["bits_per_byte"], trial["peak_memory_bytes"], trial["settings"]
    return [
        trial["trial"],
        None if bits is None else f"{bits:.4f}",
        *(shown(settings[name]) for name in names),
        trial["parameters"] and f"{trial['parameters']:,.0f}",
        trial["steps"] and f"{trial['steps']:,}",
        trial["time_s"] and duration(trial["time_s"]),
        peak and size(peak),
        trial["status"],
    ]
