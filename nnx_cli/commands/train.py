"""`nnx train`: text or token folder to run folder."""

from __future__ import annotations

import math
import os
import shlex
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager, nullcontext, suppress
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nnx_cli import models
from nnx_cli.commands._options import DEFAULT_MODEL, Branch, check_read, command, field_branches, typed_words
from nnx_cli.commands._plan_table import PlanTable, show_settings
from nnx_cli.commands._ranks import connected, count_restarts, devices_of, how_many, is_started, start_all
from nnx_cli.commands._run_verdict import RunVerdict
from nnx_cli.commands._train_options import BETA2, OPTIONS, Request, ResumeRequest, read_request
from nnx_cli.config import LENGTHS, parse_bytes
from nnx_cli.console.output import Output
from nnx_cli.console.run_screen import RunFacts
from nnx_cli.console.run_view import TrainingView
from nnx_cli.errors import (
    CheckpointError,
    DoesNotFit,
    FunctionError,
    Interrupted,
    NnxError,
    OutputError,
    QualityError,
    UsageError,
    counted,
    quoted,
)
from nnx_cli.system.text import duration

if TYPE_CHECKING:
    import torch

    from nnx_cli.data.token_folder import TokenFolder
    from nnx_cli.data.tokenizers.build import Vocabularies
    from nnx_cli.layers.insides import Panel
    from nnx_cli.planning.parallel import RankDevice
    from nnx_cli.planning.plan import Plan
    from nnx_cli.runs.load import ModelRef
    from nnx_cli.runs.run import Run
    from nnx_cli.system.ranks import Ranks
    from nnx_cli.training.inputs import Shape
    from nnx_cli.training.observer import Observer, Several
    from nnx_cli.training.sampling import Sampling
    from nnx_cli.training.session import Restart
    from nnx_cli.training.trainer import Trainer

EXAMPLES = """Examples:

  nnx train --filepath book.txt --max-time 20m
  nnx train --model llama --size tiny --data data/book --vram 8GB
  nnx train --resume last
  nnx train --model ngpt --help    (with the options that only nGPT has)"""


PLANNING = "planning (loading PyTorch takes some seconds)"
PACE_SECONDS = 10  # of training after which its speed is known well enough


class _PacedView(TrainingView):
    """Says once where a run that ends by the clock is not as fast as its recipe was planned for. `out` is the folder
    that its command names, if any."""

    def __init__(self, output: Output, shown: PlanTable, facts: RunFacts, out: Path | None) -> None:
        super().__init__(output, facts)
        self.plan = shown.plan
        self.outlook = shown.outlook
        self.out = out
        self.planned = self.plan.tokens_per_s if self.plan.train.max_time else None
        self.first: Mapping[str, Any] | None = None  # the first steps load and compile: they say nothing of the others

    def step(self, record: Mapping[str, Any], progress: float) -> None:
        """Show a logged step."""
        super().step(record, progress)
        if self.planned is None:
            return
        if self.first is None:
            self.first = record
            return
        seconds = record["time_s"] - self.first["time_s"]
        if seconds >= PACE_SECONDS:
            from nnx_cli.planning.rates import pace_note

            speed = (record["tokens"] - self.first["tokens"]) / seconds
            note = pace_note(self.planned, speed)
            self.planned = None
            if note is not None:
                self.note(note + self._other_length(record, speed))

    def _other_length(self, record: Mapping[str, Any], speed: float) -> str:
        """How far a run gets at that speed, and the command that plans for it; "" where that is about as planned."""
        from nnx_cli.runs.command_line import changed_command

        train, sources = self.plan.train, self.plan.sources
        assert train.tokens_per_step is not None and train.max_time_s is not None, "it ends by the clock"
        planned = max(1, round(self.outlook.tokens / train.tokens_per_step))
        left = max(0.0, train.max_time_s - record["time_s"]) * speed / train.tokens_per_step
        steps = int(min(record["step"] + left, train.max_steps or math.inf))
        if planned / 2 <= steps <= 2 * planned:
            return ""
        promised = f"; the bits per byte of the plan are for {planned:,}" if self.outlook.reached else ""
        note = f": about {counted(steps, 'step')} in {train.max_time}, not {planned:,}" + promised
        options = {"--max-steps": str(steps)}
        if self.plan.size is not None and sources.get("size", "").startswith("derived"):
            options["--size"] = self.plan.size
        command = changed_command(_command_line(), self.out or Path(), options, ("--max-time", "--stop-early"))
        return note if command is None else f"{note}; to plan for {steps:,}, stop this run and start:\n  {command}"


@command(*OPTIONS)
def run(output: Output, **options: Any) -> None:
    """Train a model from scratch: on --filepath, on --data, or on the language documentation that Python ships."""
    request = read_request(options)
    device = _device_of(request)
    n = 1 if is_started() else how_many(request.gpus, device)
    if n > 1 and not request.dry_run:
        start_all(n, device)
        return
    with connected(output, device) as ranks:
        devices = devices_of(ranks, n, device, _vram_of(request))
        if not ranks.is_first:
            _follow_run(request, ranks)
            return
        if count_restarts() and isinstance(request, Request) and (begun := _begun(request)) is not None:
            request = begun
        if isinstance(request, ResumeRequest):
            _resume_run(output, request, ranks)
        else:
            _new_run(output, request, ranks, devices)


def _device_of(request: Request | ResumeRequest) -> str:
    """The value of --device, as it is given, or as a run that goes on has it."""
    if isinstance(request, Request):
        return request.train.device
    if "device" not in request.settings and (request.gpus is not None or is_started()):
        from nnx_cli.runs.run import Run
        from nnx_cli.training import session

        with suppress(CheckpointError):  # on another machine
            return session.settings_of(Run(_folder_of(request))).device
    return request.settings.get("device", "auto")


def _vram_of(request: Request | ResumeRequest) -> int | None:
    """--vram in bytes, as far as it is given."""
    return request.train.vram_bytes if isinstance(request, Request) else parse_bytes(request.settings.get("vram"))


def _folder_of(request: ResumeRequest) -> Path:
    """The folder of the run to go on with."""
    from nnx_cli.runs.find import find_folder
    from nnx_cli.training import session

    return session.find_unfinished() if request.run == "last" else find_folder(request.run)


def _follow_run(request: Request | ResumeRequest, ranks: Ranks) -> None:
    """Train what the first rank leads. Raises Interrupted where it was stopped."""
    from nnx_cli.config import TrainConfig
    from nnx_cli.system.signals import stop_signals
    from nnx_cli.training import session
    from nnx_cli.training.distributed import follow

    config = request.train if isinstance(request, Request) else TrainConfig(**request.settings)
    device, _ = session.configure_device(config, strict=False)
    followed = follow(ranks, request.data, request.file, device)
    if followed is None:
        ranks.close()
        return
    run, trainer = followed
    with stop_signals() as should_stop:
        ended = trainer.train(run, should_stop)
    ranks.close()
    if ended == "interrupted":
        raise Interrupted("interrupted")


def _begun(request: Request) -> ResumeRequest | None:
    """The run that this command line had begun before torchrun started it anew."""
    from nnx_cli.training import session

    folder = request.out if request.out is not None else session.find_begun(_command_line())
    if folder is None or not (folder / "run.json").exists():
        return None
    return ResumeRequest(run=str(folder), file=request.file, settings={}, data=None, dry_run=False, gpus=None)


def _new_run(output: Output, request: Request, ranks: Ranks, devices: list[RankDevice]) -> None:
    """A new run. Where there is none in the end, what was made for it goes."""
    made: list[list[Path]] = []
    begins_anew = request.init_from is None and request.checkpoint is None
    try:
        with nullcontext() if begins_anew else _advising("take a smaller --seq-len, or start from a smaller model"):
            _prepare_and_train(output, request, made, ranks, devices)
    finally:
        if made:
            from nnx_cli.training.inputs import take_back

            take_back(made)


@contextmanager
def _advising(instead: str) -> Iterator[None]:
    """Have a run that does not fit say what is to be done `instead` of taking another size, which it cannot."""
    from nnx_cli.planning.fit import SMALLER

    try:
        yield
    except DoesNotFit as error:
        if error.fix == SMALLER:
            error.fix = instead
        raise


def _prepare_and_train(
    output: Output, request: Request, made: list[list[Path]], ranks: Ranks, devices: list[RankDevice]
) -> None:
    """Prepare what has to be prepared, plan, and train. `made` has the folders that were made for a run that does not
    exist yet, `devices` are those of all ranks, where there are several."""
    check_named(request)
    from nnx_cli.system.device import pick_device

    pick_device(request.train.device)  # before all that takes a while
    from nnx_cli.runs.load import ModelRef
    from nnx_cli.runs.run import refuse_taken
    from nnx_cli.trackers._tracker import check_installed
    from nnx_cli.training import session
    from nnx_cli.training.inputs import open_and_plan
    from nnx_cli.training.observer import Several
    from nnx_cli.training.sampling import choose_sampling

    check_installed(request.train.trackers)
    for note in request.notes:
        output.note(note)
    base, shape, sources = chosen_shape(output, request, made)
    device, precision = session.configure_device(request.train)
    if request.out is not None:
        refuse_taken(request.out)
    folder, prepared = token_folder(output, request, base, shape, device, precision)
    made.append(prepared)
    brings_none = base is None or base.tokenizer is None
    named = request.data is not None and brings_none and "tokenizer" in request.sources
    with output.spinner(PLANNING):
        tokens, plan = open_and_plan(
            folder,
            shape,
            request.train,
            device=device,
            precision=precision,
            sources=sources,
            base=base,
            tokenizer=request.prepare.tokenizer if named and request.prepare.tokenizer != "auto" else None,
            ranks=devices,
        )
    for note in check_read(_planned(tokens), asdict(plan.train), request.sources).values():
        output.note(note)
    sampling = choose_sampling(
        tokens.tokenizer, tokens, request.train.sample_prompt, request.prime_length, request.generate_length
    )
    shown = PlanTable(plan, tokens, device, request, base)
    if request.dry_run:
        shown.show(output)
        return
    shown.tell(output)
    with _PacedView(output, shown, _facts(shown, tokens), request.out) as view:
        stem = folder.resolve().name if request.data else folder.name.rpartition("-")[0]  # without the hash
        observers = Several(view)
        started, trainer = _start(plan, tokens, request.out, stem, device, observers, sampling, base, ranks)
        made.clear()
        with started.lock():
            ref = ModelRef(started.folder, file=models.own_file(plan.model, plan.model_config))
            _finish(output, started, trainer, view, observers, ref.naming)


def check_named(request: Request) -> None:
    """Raise UsageError for an architecture that is none, and for adapters of no model."""
    if request.model is not None:
        models.check_name(request.model)
    if request.train.lora_rank is not None and request.init_from is None and request.checkpoint is None:
        raise UsageError("--lora-rank trains adapters of an existing model", fix="name it: --init-from MODEL")


def _facts(shown: PlanTable, tokens: TokenFolder) -> RunFacts:
    """What the live screen knows of a new run beforehand."""
    plan, named = shown.plan, models.stem(shown.plan.model)
    return RunFacts(
        title=f"{named} {plan.size or ''}".strip() + f", {shown.n_parameters:,} parameters",
        max_steps=None if plan.train.max_time else plan.train.max_steps,
        budget_bytes=plan.budget_bytes or None,
        ngram_bits_per_byte=_ngram_bits_per_byte(tokens),
    )


def _facts_of(restart: Restart) -> RunFacts:
    """What the live screen knows beforehand of a run that goes on."""
    from nnx_cli.system.device import memory_budget

    return RunFacts(
        title=f"{restart.run.folder}, {restart.run.config['parameters']:,} parameters",
        max_steps=None if restart.config.max_time else restart.config.max_steps,
        budget_bytes=memory_budget(restart.device, restart.config.vram_bytes),
        ngram_bits_per_byte=_ngram_bits_per_byte(restart.data),
    )


def _ngram_bits_per_byte(tokens: TokenFolder) -> float | None:
    """What an n-gram model gets on the text, where that was measured."""
    xray = tokens.meta.get("xray")
    bits = xray.get("ngram_bits_per_byte") if isinstance(xray, dict) else None
    return float(bits) if isinstance(bits, int | float) and 0 < bits < 100 else None


def token_folder(
    output: Output, request: Request, base: ModelRef | None, shape: Shape, device: torch.device, precision: str
) -> tuple[Path, list[Path]]:
    """The tokens that were named, or prepared from text now or before, and the folders that were made for them now."""
    from nnx_cli.commands.prepare import preparation_view
    from nnx_cli.system.signals import half_made
    from nnx_cli.training.inputs import model_vocabularies, prepare_tokens

    if request.data is not None:
        return request.data, []
    vocabularies: Vocabularies = ()
    if base is None and request.prepare.tokenizer in ("auto", "bpe"):
        with output.spinner(PLANNING):
            vocabularies = model_vocabularies(shape, request.train, device, precision)
    out = request.out
    if request.dry_run and out is None:  # what is made for it goes again
        out = Path(tempfile.gettempdir()) / f"nnx-{os.getpid()}" / "run"
    with half_made(), preparation_view(output) as show:
        return prepare_tokens(request.filepath, request.prepare, base, show, out, vocabularies)


def chosen_shape(
    output: Output, request: Request, made: list[list[Path]]
) -> tuple[ModelRef | None, Shape, dict[str, str]]:
    """The model to start from, if any, the shape of the new one, and where each value comes from.

    `made` gets the folders of a model that is imported now. Raises UsageError for a shape or a batch that cannot be,
    before any text is read.
    """
    from nnx_cli.layers.lora import check_rank
    from nnx_cli.models._check import check_model
    from nnx_cli.planning.fit import check_batch_shape
    from nnx_cli.planning.flops import meta_model
    from nnx_cli.training.inputs import Shape, brings, start_from

    base, sources, spec = None, request.sources, request.init_from
    branches: list[Branch] = []
    if request.checkpoint is not None:
        spec, imported = _imported(output, request.model or DEFAULT_MODEL, request.checkpoint)
        made.append(imported)
    if spec is not None:
        base, shape = start_from(spec, request.model, request.size, request.fields)
        sources = dict.fromkeys(["model", "size", *shape.fields], f"model: {spec}") | sources
        is_own = brings(base, request.prepare.tokenizer)
        branches.append(Branch({"tokenizer"}, lambda v: is_own, "with --init-from: the model brings its own"))
    else:
        shape = Shape(request.model or DEFAULT_MODEL, request.size, request.fields)
    smallest = models.sizes(shape.model)[0]
    config = models.make_config(shape.model, size=smallest if shape.size == "auto" else shape.size, **shape.fields)
    check_model(shape.model, config)
    if shape.size != "auto" or "seq_len" in shape.fields:
        check_batch_shape(request.train, config.seq_len)
    if request.train.lora_rank is not None:
        check_rank(meta_model(shape.model, config), request.train.lora_rank)
    for note in check_read([*branches, *field_branches(config)], {}, request.sources).values():
        output.note(note)
    return base, shape, sources


def _planned(tokens: TokenFolder) -> list[Branch]:
    """Branches that a plan decides."""
    speaks = tokens.tokenizer is not None
    return [BETA2, Branch({"sample_prompt"}, lambda v: speaks, "without a tokenizer", "name it: --tokenizer FILE")]


def _imported(output: Output, model: str, checkpoint: str) -> tuple[str, list[Path]]:
    """The model folder of an original's checkpoint, imported now or before, and the folders that were made for it now,
    innermost first."""
    from nnx_cli.convert.import_original import import_checkpoint, place_of_import
    from nnx_cli.runs.find import WEIGHTS

    folder = place_of_import(Path(checkpoint), WEIGHTS / f"{model}-{Path(checkpoint).stem}")
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    if made:
        for note in import_checkpoint(model, Path(checkpoint), folder)[1]:
            output.note(note)
    return str(folder), made


def _start(
    plan: Plan,
    tokens: TokenFolder,
    out: Path | None,
    stem: str,
    device: torch.device,
    observer: Observer,
    sampling: Sampling,
    base: ModelRef | None,
    ranks: Ranks,
) -> tuple[Run, Trainer]:
    """Make the run folder: `out`, or the next free name in weights/."""
    from nnx_cli.training import session

    while True:
        folder = out or session.free_folder(f"{models.stem(plan.model)}-{stem}")
        try:
            return session.start(plan, tokens, folder, device, observer, sampling, _command_line(), base, ranks)
        except OutputError:
            if out is not None or not folder.exists():  # else another process took the name meanwhile
                raise


def _resume_run(output: Output, request: ResumeRequest, ranks: Ranks) -> None:
    """Continue a run from its newest checkpoint."""
    from nnx_cli.runs.command_line import how_to_go_on
    from nnx_cli.runs.load import ModelRef
    from nnx_cli.runs.logs import read_intact
    from nnx_cli.runs.run import Run
    from nnx_cli.system.torch_private import compiler_is_loaded
    from nnx_cli.trackers._tracker import check_installed
    from nnx_cli.training import session
    from nnx_cli.training.observer import Several

    folder = _folder_of(request)
    run = Run(folder)
    status, lost = _read_or_lost(run)
    if status.get("status") == "finished" and not any(name in request.settings for name in LENGTHS):
        output.show_json(_as_json(run, status))
        output.show(f"{folder} is finished; {how_to_go_on(folder, status, ModelRef(folder, file=request.file).naming)}")
        return
    if request.dry_run:
        restart = session.plan_restart(run, request.settings, request.data, request.file)
        _say_over(output, restart, status) if restart.is_over else _show_restart(output, restart)
        return
    named = ModelRef(folder, file=request.file).naming
    elsewhere = f"go on where there is more memory: nnx train --resume {quoted(folder)}{named} --device cpu"
    with _advising(elsewhere), run.lock():
        with output.spinner("planning what is left"):
            restart = session.plan_restart(run, request.settings, request.data, request.file)
        if restart.is_over:
            _say_over(output, restart, status)
            return
        check_installed(restart.config.trackers)
        with TrainingView(output, _facts_of(restart)) as view:
            if not compiler_is_loaded():
                output.note("loading PyTorch takes some seconds")
            observers = Several(view)
            trainer, notes = session.resume(restart, observers, ranks)
            del restart  # which holds all weights once more
            for note in [*lost, *notes]:
                output.warn(note)
            output.note(f"resuming {folder} at step {trainer.state.step}")
            view.remember(read_intact(folder / "metrics.jsonl")[0])
            _finish(output, run, trainer, view, observers, named)


def _show_restart(output: Output, restart: Restart) -> None:
    """Every value of a run that goes on and where it comes from."""
    shape = dict(restart.run.config["model"])
    rows = {"model": shape.pop("name"), **shape, **asdict(restart.config)}
    kept = f"run: {restart.run.folder}"
    show_settings(output, rows, {name: restart.sources.get(name, kept) for name in rows})


def _say_over(output: Output, restart: Restart, status: dict[str, Any]) -> None:
    """Say that a run has the length that it is given. Raises QualityError where it diverged."""
    from nnx_cli.runs.command_line import how_to_go_on

    run, state = restart.run, restart.checkpoint.state
    there = f"{run.folder} is at step {state['step']:,} after {duration(state['time_s'])} of training"
    if status.get("status") == "diverged":
        raise QualityError(f"{there}, and has diverged", fix="start it again with a lower --lr")
    if status.get("status") == "running":  # it was killed: nobody else has it
        status = status | {"status": "interrupted"}
    named = next(name for name in LENGTHS if restart.sources.get(name) == "command line")
    given = f"--{named.replace('_', '-')} {getattr(restart.config, named)}"
    output.made = run.folder
    output.show_json(_as_json(run, status))
    if named == "max_time" and state["time_s"] < (restart.config.max_time_s or 0.0):
        output.show(f"{there}: {how_to_go_on(run.folder, {'ended': 'data'})}")
        return
    output.show(f"{there}: {given} is reached, counted from its beginning: nothing is left to do")


def _read_or_lost(run: Run) -> tuple[dict[str, Any], list[str]]:
    """What run.json says, and a note where it is damaged: a run goes on without it."""
    try:
        return run.status(), []
    except CheckpointError as error:
        return {}, [f"{error}; its numbers come from the checkpoint"]


@contextmanager
def _watched(
    output: Output, run: Run, trainer: Trainer, observers: Several, view: TrainingView, named: str
) -> Iterator[None]:
    """Have the coach watch a run, and, as far as that is wanted, what happens inside the model kept, its page written
    as it goes and when it ends, and trackers told."""
    from nnx_cli.reporting.live_coach import LiveCoach

    observers.observers.append(LiveCoach(run.folder, named, view.note))
    with ExitStack() as stack:
        if trainer.config.trackers:
            from nnx_cli.trackers._process import Tracking

            modules = [f"nnx_cli.trackers.{name}" for name in trainer.config.trackers]
            tracking = Tracking(run.folder, modules, trainer.state.step, view.note, output.warn)
            observers.observers.append(stack.enter_context(tracking))
        if trainer.config.watch and trainer.stepper.step.shards is not None:
            view.note("with --parallel fsdp nothing is kept of what happens inside the model")
        elif trainer.config.watch:
            from nnx_cli.reporting.watch import Watch

            observers.observers.append(Watch(run.folder, trainer, view.note, partial(_show_panel, view)))
        if trainer.config.report:
            from nnx_cli.reporting.live_report import LiveReport

            observers.observers.append(stack.enter_context(LiveReport(run.folder, view.note)))
        yield


def _show_panel(view: TrainingView, step: int, tokens: Sequence[str], panel: Panel) -> None:
    """Show values over a text."""
    from nnx_cli.layers.insides import as_text

    rows = dict(zip(panel.rows, panel.values.tolist(), strict=True))
    view.weighed(step, panel.title.lower(), as_text(tokens), rows)


def _finish(output: Output, run: Run, trainer: Trainer, view: TrainingView, observers: Several, named: str) -> None:
    """Train a locked run to the end, watched by coach and report, and say how it ended. Raises Interrupted where it was
    stopped. `named` stands beside the run in the commands that may follow."""
    with _watched(output, run, trainer, observers, view, named):
        status = _train_to_end(output, run, trainer, view, named)
        output.made = run.folder
        output.show_json(_as_json(run, status))
        if not output.json:
            RunVerdict(run, trainer, status, named, _ngram_bits_per_byte(trainer.data)).show(output)


def _train_to_end(output: Output, run: Run, trainer: Trainer, view: TrainingView, named: str) -> dict[str, Any]:
    """Train, and record how it ended; returns run.json. Raises Interrupted where it was stopped."""
    from nnx_cli.system.signals import stop_signals
    from nnx_cli.training import session

    with stop_signals() as should_stop:
        try:
            with closing(view):
                ended = trainer.train(run, should_stop)
        except NnxError as error:
            diverged = isinstance(error, QualityError)
            with suppress(OutputError):  # a full disk is what the error may be
                if isinstance(error, FunctionError):
                    _keep_before(error, run, trainer, named)
                how, problem = ("diverged", str(error)) if diverged else ("interrupted", None)
                status = session.record_end(run, trainer, how, problem)
                if diverged:
                    output.show_json(_as_json(run, status))
            raise
        status = session.record_end(run, trainer, ended)
    trainer.stepper.ranks.close()
    if ended == "interrupted":
        output.note("")
        raise Interrupted(
            f"interrupted at step {trainer.state.step}; everything is saved",
            fix=f"resume: nnx train --resume {quoted(run.folder)}{named}",
        )
    return status


def _keep_before(error: FunctionError, run: Run, trainer: Trainer, named: str) -> None:
    """Save the last whole step before a function failed, and say how to go on from there."""
    resume = f"once it is mended: nnx train --resume {quoted(run.folder)}{named}"
    if trainer.stepper.ranks.count > 1 or trainer.stepper.step.updating:  # others do not wait; weights moved already
        error.fix = f"the last checkpoint is intact; {resume}"
        return
    trainer.save(run)
    error.fix = f"step {trainer.state.step:,} is saved; {resume}"


def _as_json(run: Run, status: dict[str, Any]) -> dict[str, Any]:
    """What --json prints of a run: run.json, and which it is."""
    return status | {"out": str(run.folder), "parameters": run.config["parameters"]}


def _command_line() -> str:
    """This command as it was typed, in words that `shlex.split` finds again on every system."""
    return shlex.join(["nnx", *typed_words()])
