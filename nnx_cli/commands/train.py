"""`nnx train`: text or token folder to run folder."""

from __future__ import annotations

import os
import shlex
import sys
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from nnx_cli import models
from nnx_cli.commands._options import command, given, hidden, model_fields, model_options, settings
from nnx_cli.config import PrepareConfig, TrainConfig, check_one_length, coerce, own_fields, read_toml
from nnx_cli.console import Output, TrainingView, duration
from nnx_cli.errors import CheckpointError, DataError, Interrupted, NnxError, OutputError, QualityError, UsageError

if TYPE_CHECKING:
    from nnx_cli.data.token_folder import TokenFolder
    from nnx_cli.data.tokenizers.base import Tokenizer
    from nnx_cli.runs.load import ModelRef
    from nnx_cli.runs.run import Run
    from nnx_cli.training.trainer import Trainer

# The command line of the original NYX: its spelling of each option, and ours.
ALIASES = {
    "model_dim": "dim",
    "layer_depth": "n_layers",
    "num_attention_heads": "n_heads",
    "num_batches": "max_steps",
    "gradient_accumulate_every": "grad_accum",
    "learning_rate": "lr",
    "validate_every": "val_every",
    "generate_every": "sample_every",
}
NYX_RECIPE = {
    "optimizer": "lion",
    "lr": 1e-4,
    "schedule": "constant",
    "grad_clip": 0.5,
    "weight_decay": 0.0,
    "dropout": 0.0,
}
LENGTHS = {"max_steps", "max_time", "epochs"}
RESUMABLE = ("max_steps", "max_time", "epochs", "device", "threads", "batch_size", "grad_accum", "compile", "vram")
PREPARING = ("tokenizer", "val_fraction", "text_key", "errors")

OPTIONS = [
    *model_options(),
    *settings(TrainConfig, "Training"),
    *settings([f for f in own_fields(PrepareConfig) if f.name in PREPARING], "Data"),
    *(hidden(name, float if name == "learning_rate" else int) for name in ALIASES),
    hidden("checkpoint_path", str),
    hidden("prime_length", int),
    hidden("generate_length", int),
]


@command(*OPTIONS)
def run(
    output: Output,
    model: Annotated[
        str | None, typer.Option(help=f"Architecture: {', '.join(models.names())}.", show_default="nyx")
    ] = None,
    size: Annotated[
        str | None, typer.Option(help="Named size: nano, tiny, small, base, large, xl.", show_default="auto")
    ] = None,
    filepath: Annotated[
        list[str] | None, typer.Option(help="Text to train on: a file, folder or glob; may be repeated.")
    ] = None,
    data: Annotated[Path | None, typer.Option(help="Token folder made by nnx prepare.")] = None,
    out: Annotated[Path | None, typer.Option(help="Run folder to make. [default: weights/MODEL-STEM]")] = None,
    init_from: Annotated[str | None, typer.Option(help="MODEL whose shape and weights to start from.")] = None,
    resume: Annotated[str | None, typer.Option(help="Run to continue: folder, name, or last.")] = None,
    config: Annotated[Path | None, typer.Option(help="TOML file with settings; the command line wins.")] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show every value and where it comes from, and stop.")
    ] = False,
    **options: Any,
) -> None:
    """Train a model from scratch: on --filepath, on --data, or on the language documentation that Python ships."""
    aliases = {ours: options[theirs] for theirs, ours in ALIASES.items() if options.get(theirs) is not None}
    cli = given(options, [*model_fields().values(), *own_fields(TrainConfig), *prepare_fields()])
    if twice := aliases.keys() & cli.keys():
        raise UsageError(f"--{twice.pop().replace('_', '-')} is given twice, in two spellings")
    cli |= aliases
    checkpoint = options["checkpoint_path"]
    if resume is None and checkpoint is not None and not is_foreign(checkpoint):
        resume, filepath = checkpoint, None
    from nnx_cli.system.signals import signals_as_ctrl_c

    if resume is not None:
        if any(value is not None for value in (model, size, filepath, out, init_from, config)):
            raise UsageError(
                "--resume takes model, text and settings from the run", fix="leave out what is given besides"
            )
        with signals_as_ctrl_c():
            resume_run(output, resume, cli, data, dry_run)
        return
    recipe = NYX_RECIPE if model is None and (aliases or checkpoint) else {}
    values, sources = merge(cli, config, recipe)
    named = {"model": model, "size": size, "data": data or filepath}
    sources |= {name: "command line" for name, value in named.items() if value is not None}
    filed = {name: values.pop(name, None) for name in ("model", "size")}
    model, size = model or filed["model"], size or filed["size"] or "auto"
    if checkpoint is not None:
        init_from = imported(model or "nyx", checkpoint)
    with signals_as_ctrl_c():
        new_run(output, model, size, values, sources, filepath, data, out, init_from, options, dry_run)


def is_foreign(checkpoint: str) -> bool:
    """Whether --checkpoint_path names a file of the original rather than a run."""
    return checkpoint.endswith((".pth", ".pt", ".safetensors")) and not Path(checkpoint).is_dir()


def imported(model: str, checkpoint: str) -> str:
    """The model folder of an original's checkpoint: imported now, or before."""
    from nnx_cli.convert.import_original import import_checkpoint
    from nnx_cli.runs.find import WEIGHTS

    folder = WEIGHTS / f"{model}-{Path(checkpoint).stem}"
    if not folder.exists():
        import_checkpoint(model, Path(checkpoint), folder)
    return str(folder)


def prepare_fields() -> list:
    return [field for field in own_fields(PrepareConfig) if field.name in PREPARING]


def merge(cli: dict[str, Any], config: Path | None, recipe: dict[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
    """Settings from the recipe, the TOML file and the command line, the later ones winning, and where each came
    from."""
    fields = [*model_fields().values(), *own_fields(TrainConfig), *prepare_fields()]
    layers = [("recipe: NYX", recipe)]
    if config is not None:
        known = [field.name for field in fields] + ["model", "size"]
        layers.append((f"file: {config}", coerce(fields, read_toml(config, known), f"--config {config}")))
    layers.append(("command line", cli))
    values: dict[str, Any] = {}
    sources: dict[str, str] = {}
    for origin, layer in layers:
        check_one_length(layer)
        if LENGTHS & layer.keys():  # a length takes the place of another one
            values = {name: value for name, value in values.items() if name not in LENGTHS}
        values |= layer
        sources |= dict.fromkeys(layer, origin)
    return values, sources


def split(values: dict[str, Any]) -> tuple[dict[str, Any], TrainConfig, PrepareConfig]:
    """Settings by owner: the model's fields, training, preparing. Raises UsageError for a field the model does not
    have."""
    train_names = {field.name for field in own_fields(TrainConfig)}
    prepare_names = {field.name for field in prepare_fields()}
    train = TrainConfig(**{k: v for k, v in values.items() if k in train_names})
    preparing = PrepareConfig(**{k: v for k, v in values.items() if k in prepare_names})
    fields = {k: v for k, v in values.items() if k not in train_names | prepare_names}
    return fields, train, preparing


def new_run(
    output: Output,
    model: str | None,
    size: str | None,
    values: dict[str, Any],
    sources: dict[str, str],
    filepath: list[str] | None,
    data: Path | None,
    out: Path | None,
    init_from: str | None,
    options: dict[str, Any],
    dry_run: bool,
) -> None:
    """Prepare what has to be prepared, plan, and train."""
    if model is not None:
        models.check_name(model)
    fields, train, preparing = split(values)
    if train.lora_rank is not None and init_from is None:
        raise UsageError("--lora-rank trains adapters of an existing model", fix="name it: --init-from MODEL")
    if filepath and data:
        raise UsageError("--filepath and --data: give one, text or tokens")
    from nnx_cli.data.tokenizers.build import build_tokenizer
    from nnx_cli.planning.plan import check_batch_shape
    from nnx_cli.training import session

    base = None
    if init_from is not None:
        base, model, fields = start_from(init_from, model, size, fields)
        sources = dict.fromkeys(["model", "size", *fields], f"model: {init_from}") | sources
        size = None
    model = model or "nyx"
    shape = models.make_config(model, size=models.sizes(model)[0] if size == "auto" else size, **fields)
    if size != "auto" or "seq_len" in fields:
        check_batch_shape(train, shape.seq_len)
    device, precision = session.prepare_device(train)
    if out is not None and os.path.lexists(out):
        raise OutputError(f"{out} exists already", fix="name another folder with --out, or resume it with --resume")
    folder, made = token_folder(output, filepath, data, preparing, base)
    try:
        tokenizer = build_tokenizer(preparing.tokenizer) if data is not None and "tokenizer" in values else None
        tokens, plan = make_plan(model, size, fields, train, sources, folder, device, precision, base, tokenizer)
        prompt = session.sampling(
            tokens.tokenizer,
            tokens,
            train.sample_prompt,
            options.get("prime_length") or 0,
            options.get("generate_length"),
        )
        if dry_run:
            show_plan(output, plan, folder)
            take_back(made)
            return
        stem = folder.resolve().name if data is not None else folder.name.rpartition("-")[0]  # without the hash
        tell_plan(output, plan, tokens, device)
        with TrainingView(output) as view:
            while True:
                folder = out or session.free_folder(f"{plan.model}-{stem}")
                try:
                    started, trainer = session.start(plan, tokens, folder, device, view, prompt, command_line(), base)
                    break
                except OutputError:
                    if out is not None or not folder.exists():  # else another process took the name meanwhile
                        raise
            made = []
            finish(output, started, trainer, view)
    except NnxError:
        take_back(made)
        raise


def take_back(made: list[Path]) -> None:
    """Remove the folders, innermost first, that were made for a run that is not to be; others may use an outer one."""
    from nnx_cli.system.files import discard_folder

    for number, folder in enumerate(made):
        with suppress(OSError):
            discard_folder(folder) if number == 0 else folder.rmdir()


def start_from(
    spec: str, model: str | None, size: str | None, fields: dict[str, Any]
) -> tuple[ModelRef, str, dict[str, Any]]:
    """The model to start from, its name, and its shape with the context and dropout that may differ."""
    from nnx_cli.runs.find import find_model

    base = find_model(spec)
    if base.config.get("lora") or base.config.get("quantization"):
        raise CheckpointError(
            f"{spec} is no plain model", fix="take the run it was made from; merge adapters: nnx merge"
        )
    described = dict(base.config["model"])
    name, _ = described.pop("name"), described.pop("size", None)
    if model not in (None, name) or size != "auto":
        raise UsageError(f"{spec} is a {name} of its own size", fix="leave out --model and --size")
    for field in fields.keys() - {"seq_len", "dropout"}:
        if fields[field] != described.get(field):
            raise UsageError(f"--{field.replace('_', '-')} {fields[field]} is not what {spec} has", fix="leave it out")
    return base, name, described | fields


def make_plan(
    model: str,
    size: str | None,
    fields: dict[str, Any],
    train: TrainConfig,
    sources: dict[str, str],
    folder: Path,
    device: Any,
    precision: str,
    base: ModelRef | None,
    tokenizer: Tokenizer | None,
) -> tuple[TokenFolder, Any]:
    """Open the tokens and fill in every value."""
    from nnx_cli.data.token_folder import open_token_folder
    from nnx_cli.planning.plan import plan_run

    tokens = open_token_folder(folder, tokenizer=base.tokenizer if base else tokenizer)
    if base is not None and tokens.vocab_size != fields["vocab_size"]:
        raise DataError(f"{folder} has a vocabulary of {tokens.vocab_size:,}, {base.label} of {fields['vocab_size']:,}")
    if (wanted := fields.pop("vocab_size", None)) is not None and wanted != tokens.vocab_size:
        raise UsageError(f"--vocab-size {wanted} is not the tokenizer's {tokens.vocab_size}", fix="leave it out")
    plan = plan_run(
        model,
        size,
        fields,
        train,
        vocab_size=tokens.vocab_size,
        train_tokens=len(tokens.train),
        val_tokens=len(tokens.val),
        device=device,
        precision=precision,
        sources=sources,
    )
    return tokens, plan


def token_folder(
    output: Output, filepath: list[str] | None, data: Path | None, preparing: PrepareConfig, base: ModelRef | None
) -> tuple[Path, list[Path]]:
    """The token folder to train on, and the folders that were made for it now."""
    if data is not None:
        return data, []
    if "-" in (filepath or []):
        raise UsageError("train cannot read standard input", fix="prepare it first: nnx prepare - --out data/NAME")
    from nnx_cli.commands.prepare import preparation_view
    from nnx_cli.data import prepare

    if base is not None and base.tokenizer is not None:
        preparing = replace(preparing, tokenizer=str(base.folder / "tokenizer.json"))
    folder = prepare.default_folder(filepath or [], preparing)
    if (folder / "meta.json").exists():
        return folder, []
    made = [folder] if folder.parent.exists() else [folder, folder.parent]
    view = preparation_view(output)
    try:
        if filepath:
            prepare.prepare(filepath, folder, preparing, None, view)
        else:
            output.note("no --filepath: training on the language documentation that Python ships")
            prepare.prepare_builtin(folder, preparing, view)
    except OutputError:
        if not (folder / "meta.json").exists():  # else another process prepared the same text meanwhile
            raise
        return folder, []
    return folder, made


def resume_run(output: Output, which: str, cli: dict[str, Any], data: Path | None, dry_run: bool) -> None:
    """Continue a run from its newest checkpoint."""
    for name in cli.keys() - set(RESUMABLE):
        raise UsageError(
            f"--{name.replace('_', '-')} cannot change on --resume", fix="start a new run, maybe with --init-from"
        )
    TrainConfig(**cli)
    check_one_length(cli)
    from nnx_cli.runs.find import find_folder
    from nnx_cli.runs.run import Run
    from nnx_cli.training import session

    folder = session.find_unfinished() if which == "last" else find_folder(which)
    run = Run(folder)
    lengths = LENGTHS & cli.keys()
    status, lost = read_or_lost(run)
    if status.get("status") == "finished" and not lengths:
        output.show_json(status | {"out": str(folder), "parameters": run.config["parameters"]})
        output.show(f"{folder} is finished; train it longer with --max-steps or --max-time")
        return
    if dry_run:
        shape = dict(run.config["model"])
        rows = {"model": shape.pop("name"), **shape, **run.config["training"], **cli}
        show_rows(output, rows, {name: "command line" if name in cli else f"run: {folder}" for name in rows})
        return
    if lengths:
        cli = {"max_steps": None, "max_time": None, "epochs": None} | cli
    with run.lock(), TrainingView(output) as view:
        trainer, notes = session.resume(run, cli, data, view)
        for note in [*lost, *notes]:
            output.warn(note)
        output.note(f"resuming {folder} at step {trainer.state.step}")
        finish(output, run, trainer, view, locked=True)


def read_or_lost(run: Run) -> tuple[dict[str, Any], list[str]]:
    """What run.json says, and a note where it is damaged: a run goes on without it."""
    try:
        return run.status(), []
    except CheckpointError as error:
        return {}, [f"{error}; its numbers come from the checkpoint"]


def finish(output: Output, run: Run, trainer: Trainer, view: TrainingView, locked: bool = False) -> None:
    """Train to the end, record how it ended, and say so."""
    if not locked:
        with run.lock():
            return finish(output, run, trainer, view, locked=True)
    from nnx_cli.system.signals import stop_signals

    with stop_signals() as should_stop:
        try:
            ended = trainer.train(run, should_stop)
        except NnxError as error:
            with suppress(OutputError):  # a full disk is what the error may be
                record(run, trainer, "diverged" if isinstance(error, QualityError) else "interrupted")
            raise
        status = record(run, trainer, ended)
    view.__exit__()
    if ended == "interrupted":
        output.note("")
        raise Interrupted(
            f"interrupted at step {trainer.state.step}; everything is saved",
            fix=f"resume: nnx train --resume {run.folder}",
        )
    parameters = run.config["parameters"]
    output.show_json(status | {"out": str(run.folder), "parameters": parameters})
    output.show(*verdict(run, trainer, status, parameters))


def record(run: Run, trainer: Trainer, status: str) -> dict[str, Any]:
    """Write how a run stands into run.json."""
    state = trainer.state
    return run.set_status(
        status=status,
        step=state.step,
        tokens=state.tokens,
        time_s=round(state.time_s, 3),
        skipped_steps=state.skipped_steps,
    )


def verdict(run: Run, trainer: Trainer, status: dict[str, Any], parameters: int) -> list[str]:
    """What happened, and what to do next."""
    state, bits, best_step = trainer.state, status["best_val_bits_per_byte"], status["best_step"] or 0
    quality = (
        f"validation loss {status['best_val_loss']:.4f}" if status["best_val_loss"] is not None else "no validation"
    )
    if bits is not None:
        quality += f", {bits:.3f} bits per byte"
    lines = [
        f"{run.folder}: {run.config['model']['name']} with {parameters:,} parameters, {state.step:,} steps, "
        f"{state.tokens:,} tokens in {duration(state.time_s)}; {quality} (best, at step {best_step:,})"
    ]
    if best_step < 0.9 * state.step:
        dropout = f"--dropout {min(0.5, trainer.model.config.dropout + 0.1):.1f}"
        lines.append(f"it was better earlier: more text, a smaller model or {dropout} would help more than more steps")
    prompt = "" if trainer.data.tokenizer is None else ' --prompt "AI is a power!"'
    longer = max(2 * trainer.state.time_s, 60)
    return [
        *lines,
        "next:",
        f"  nnx sample {run.folder}{prompt}",
        f"  nnx eval {run.folder}",
        f"  nnx train --resume {run.folder} --max-time {longer / 60:.0f}m",
    ]


def command_line() -> str:
    """This command as it was typed."""
    return shlex.join(["nnx", *sys.argv[1:]])


def tell_plan(output: Output, plan: Any, tokens: TokenFolder, device: Any) -> None:
    """What is about to happen, in two lines."""
    from nnx_cli.planning import flops as cost
    from nnx_cli.system.device import describe

    train, config = plan.train, plan.model_config
    total = cost.count_parameters(cost.meta_model(plan.model, config))["total"]
    ends = [f"{train.max_steps:,} steps"] if train.max_steps else []
    ends += [duration(train.max_time_s)] if train.max_time else []
    output.note(
        f"{plan.model} {plan.size or 'of your shape'}: {total:,} parameters, on {describe(device)}, {train.precision}"
    )
    for rung in plan.rungs:
        output.note(f"to fit in {plan.budget_bytes / 2**30:.2f} GiB, {rung.text}")
    output.note(
        f"{len(tokens.train):,} tokens to train on; {train.batch_size} x {train.grad_accum} x {config.seq_len} tokens "
        f"a step, {train.optimizer}, learning rate {train.lr:g}, for {' or '.join(ends)}"
    )


def show_plan(output: Output, plan: Any, folder: Path) -> None:
    """Every value of a planned run and where it comes from."""
    values = {"model": plan.model, "size": plan.size, "data": str(folder)}
    values |= models.config_dict(plan.model_config) | asdict(plan.train)
    sources = {
        name: plan.sources.get(name, "size" if name in plan.model_config.__dataclass_fields__ else "default")
        for name in values
    }
    show_rows(output, values, sources)


def show_rows(output: Output, values: dict[str, Any], sources: dict[str, str]) -> None:
    """Settings, their values and where each came from."""
    rows = [{"setting": name, "value": value, "source": sources[name]} for name, value in values.items()]
    output.show_json(rows)
    output.table(["setting", "value", "source"], [[row["setting"], row["value"], row["source"]] for row in rows])
