"""A run from its parts: a new one from a plan, or an old one from its folder."""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from nnx_cli import models
from nnx_cli.config import LENGTHS, TrainConfig, coerce, own_fields
from nnx_cli.data.token_folder import TokenFolder, open_token_folder
from nnx_cli.errors import CheckpointError, DataError, MissingFeature, UsageError, counted, quoted
from nnx_cli.layers.lora import add_adapters
from nnx_cli.layers.quantized import widen
from nnx_cli.models._base import LanguageModel
from nnx_cli.optim._groups import cast_matrices
from nnx_cli.planning.flops import count_parameters, training_flops
from nnx_cli.planning.plan import Plan, replan, steps_in
from nnx_cli.planning.settings import Derived
from nnx_cli.runs.checkpoint import Checkpoint, step_folder
from nnx_cli.runs.command_line import how_to_go_on
from nnx_cli.runs.find import WEIGHTS, find_runs
from nnx_cli.runs.load import ModelRef, architecture_of, model_from_config
from nnx_cli.runs.manifest import check_format, describe_model, read_tokenizer
from nnx_cli.runs.run import BLANK_STATUS, Run, live_status, read_status
from nnx_cli.runs.tensors import load_weights, size_on_disk
from nnx_cli.system.device import (
    describe,
    limit_memory,
    pick_device,
    pick_precision,
    set_deterministic,
    set_seed,
    set_threads,
)
from nnx_cli.system.files import follow, free_name, relative
from nnx_cli.system.machine import keep_freed_memory
from nnx_cli.system.ranks import ALONE, Ranks
from nnx_cli.training.distributed import lead
from nnx_cli.training.observer import Observer
from nnx_cli.training.sampling import Sampling
from nnx_cli.training.state import TrainState, describe_state, restore_checkpoint
from nnx_cli.training.stepper import divide_step
from nnx_cli.training.trainer import Trainer, is_divided, make_trainer
from nnx_cli.training.vocabulary import extend_rows

COUNTED = ("step", "tokens", "time_s", "skipped_steps", "best_step", "best_val_loss", "best_val_bits_per_byte")
MANY = 0.05  # of the conversations, whose length is worth a note


def configure_device(config: TrainConfig, strict: bool = True) -> tuple[torch.device, str]:
    """The device and the precision of a run, with its limits set.

    Raises MissingFeature for a precision that the device lacks; unless `strict`, takes the device's best instead.
    """
    set_threads(config.threads)
    device = pick_device(config.device)
    if device.type == "cpu":
        keep_freed_memory()
    if config.deterministic:
        set_deterministic()
    limit_memory(device, config.vram_bytes)
    try:
        return device, pick_precision(config.precision, device)
    except MissingFeature:
        if strict:
            raise
        return device, pick_precision("auto", device)


def free_folder(stem: str) -> Path:
    """weights/STEM, or -2, -3, … where that exists."""
    return free_name(WEIGHTS / stem)


def start(
    plan: Plan,
    data: TokenFolder,
    out: Path,
    device: torch.device,
    observer: Observer,
    sampling: Sampling,
    command: str,
    init_from: ModelRef | None,
    ranks: Ranks = ALONE,
) -> tuple[Run, Trainer]:
    """Make a new run: its model, its folder, its first checkpoint."""
    set_seed(plan.train.seed)
    model = models.from_config(plan.model, plan.model_config)
    if init_from is not None:
        path, state = init_from.weights()
        old, new = init_from.config["model"]["vocab_size"], plan.model_config.vocab_size
        load_weights(model, extend_rows(widen(state), model, old, new), path, device)
    if plan.train.lora_rank is not None:
        add_adapters(model, plan.train.lora_rank)
    n_parameters, whole = count_parameters(model)["total"], None
    if is_divided(plan.train, ranks):
        whole = Checkpoint(0, model.state_without_ties(), {}, {})
        model = blank_like(model, plan.model, plan.train.lora_rank)
    trainer = make_trainer(model, data, plan.train, device, observer, sampling, ranks)
    seq_len = model.config.seq_len
    if data.begins_at_documents and (share := data.share_longer_than(seq_len)) > MANY:
        observer.note(f"{share:.0%} of the conversations are longer than --seq-len {seq_len}: their ends stand alone")
    trainer.flops_per_token = plan.flops_per_token
    tokenizer = data.tokenizer
    described = {
        **describe_model(plan.model, plan.size, plan.model_config, n_parameters, tokenizer),
        "training": asdict(plan.train),
        "automatic": {field: why for field, why in plan.sources.items() if why.startswith("derived")},
        "sampling": asdict(sampling),
        "data": _describe_data(data, out),
        "init_from": None if init_from is None else init_from.label,
        "lora": None if plan.train.lora_rank is None else {"rank": plan.train.lora_rank},
        "machine": describe(device),
    }
    if whole is not None:
        whole = replace(whole, state=describe_state(trainer.stepper.step, trainer.state, plan.train.seed))
    lead(trainer, out, described, whole)
    config = trainer.choose_execution(plan.train.compile)
    described["training"] = asdict(config)
    file = models.own_file(plan.model, plan.model_config)
    with trainer.cadence.saving.timed():
        status = first_status(config, device, command)
        first = trainer.checkpoint() if whole is None else whole
        run = Run.create(out, described, tokenizer, status, first, file)
    return run, trainer


def blank_like(model: LanguageModel, name: str, lora_rank: int | None) -> LanguageModel:
    """A model of the same shape on the meta device."""
    with torch.device("meta"):
        blank = models.from_config(name, model.config)
        if lora_rank is not None:
            add_adapters(blank, lora_rank)
    return blank


def _describe_data(data: TokenFolder, folder: Path) -> dict[str, Any]:
    """What config.json of a run in `folder` says of its tokens."""
    return {
        "folder": relative(data.path, folder),
        "fingerprint": data.fingerprint,
        "train_tokens": len(data.train),
        "ngram_bits_per_byte": data.ngram_bits_per_byte,
    }


def first_status(config: TrainConfig, device: torch.device, command: str) -> dict[str, Any]:
    """The first run.json of a run."""
    return BLANK_STATUS | {
        "status": "running",
        "command": command,
        "device": device.type,
        "started": round(time.time()),
        "step": 0,
        "max_steps": config.max_steps,
        "max_time_s": config.max_time_s,
        "time_s": 0.0,
        "tokens": 0,
        "skipped_steps": 0,
    }


def find_unfinished() -> Path:
    """The newest run that was interrupted. Raises CheckpointError where there is none, about a run that is being
    trained, or else the newest: one that diverged would do so again."""
    others: dict[str, tuple[Path, dict[str, Any]]] = {}  # the newest of each status
    for folder in find_runs():
        try:
            status = Run(folder).status()
        except CheckpointError:
            continue  # a damaged run does not hide the others
        live = live_status(folder, status)
        if live == "interrupted":
            return folder
        if live in ("running", "diverged", "finished"):
            others.setdefault(live, (folder, status))
    kind = "running" if "running" in others else next(iter(others), None)
    if kind is None:
        raise CheckpointError(
            "there is nothing to resume: no run in weights/ is unfinished", fix="see the runs: nnx list"
        )
    folder, status = others[kind]
    how, fix = {
        "running": (
            "is being trained now, and no other run is unfinished",
            "wait for it or stop it; how far it is: nnx list",
        ),
        "diverged": ("diverged, and no other run is unfinished", f"nnx train --resume {quoted(folder)}"),
        "finished": ("is finished", how_to_go_on(folder, status)),
    }[kind]
    raise CheckpointError(f"there is nothing to resume: {folder} {how}", fix=fix)


def find_begun(command: str) -> Path | None:
    """The newest run that was begun by a command line and is not over."""
    for folder in find_runs():
        with suppress(CheckpointError):
            status = read_status(folder)
            if status.get("command") == command and live_status(folder, status) == "interrupted":
                return folder
    return None


@dataclass(frozen=True)
class Restart:
    """Where a run goes on, and with what: settings as they were, and as they are now; `sources` says where those come
    from that are new, `precision` is what this device computes in. `is_over`: it has the new length already."""

    run: Run
    old: TrainConfig
    config: TrainConfig
    sources: dict[str, str]
    is_over: bool
    precision: str
    checkpoint: Checkpoint
    data: TokenFolder
    device: torch.device
    file: Path | None
    notes: list[str]


def plan_restart(
    run: Run,
    overrides: Mapping[str, Any],
    data_folder: Path | None = None,
    file: Path | None = None,
    data: TokenFolder | None = None,
) -> Restart:
    """What a run goes on with from its newest intact checkpoint. Changes nothing.

    `overrides` are new values of training settings, `file` is that of the architecture where it is the user's, `data`
    what the run is trained on, where that is open already. With another length, what was derived from the length is
    derived anew. Raises CheckpointError without an intact checkpoint, DataError where the data is not the run's,
    UsageError for settings that disagree.
    """
    old = settings_of(run)
    config, sources = same_samples(old, overrides), dict.fromkeys(overrides, "command line")
    checkpoint, notes = run.newest_checkpoint()
    device, precision = configure_device(config, strict=False)
    if precision != config.precision:
        notes.append(f"this device computes in {precision}, the run did in {config.precision}")
    data, is_over = open_data(run, data_folder) if data is None else data, False
    if any(name in overrides for name in LENGTHS):
        epoch = data.epoch_tokens(run.config["model"]["seq_len"], config.seed)
        if config.epochs:
            assert config.tokens_per_step is not None
            config = replace(config, max_steps=steps_in(config.epochs, epoch, config.tokens_per_step))
            sources["max_steps"] = "derived: epochs"
        state = TrainState(step=checkpoint.step, time_s=checkpoint.state["time_s"])
        if state.progress(config) < 1.0:
            name, model = architecture_of(run.config, run.folder, file), model_from_config(run.config, run.folder, file)
            fresh = replan(name, config, model.config, epoch, device)
            config, derived = _derive_anew(run, old, config, overrides, fresh, state)
            sources |= derived
        if _as_long(config, old):  # it keeps its schedule, which may have turned
            state.turned_at = checkpoint.state.get("turned_at")
            state.turned_to = checkpoint.state.get("turned_to", 0.0)
        is_over = state.progress(config) >= 1.0
    return Restart(run, old, config, sources, is_over, precision, checkpoint, data, device, file, notes)


def _as_long(config: TrainConfig, old: TrainConfig) -> bool:
    """Whether a run has the length that it had."""
    return all(getattr(config, name) == getattr(old, name) for name in LENGTHS)


def _derive_anew(
    run: Run,
    old: TrainConfig,
    config: TrainConfig,
    overrides: Mapping[str, Any],
    fresh: Mapping[str, Derived],
    state: TrainState,
) -> tuple[TrainConfig, dict[str, str]]:
    """Settings of a run that is given another length at `state`, and where those come from that are derived anew: what
    was derived before becomes what is `fresh`. A warm-up that is over stays, another one covers the steps so far; a run
    that reads whole sequences goes on with them.

    Raises UsageError where a warm-up of the user's own is longer than the run.
    """
    assert old.warmup_steps is not None
    if _as_long(config, old):
        return replace(config, warmup_steps=overrides.get("warmup_steps", old.warmup_steps)), {}
    automatic = run.config.get("automatic", {})
    warmup = old.warmup_steps if state.step >= old.warmup_steps else max(state.step, fresh["warmup_steps"].value)
    values = {field: new.value for field, new in fresh.items()} | {"warmup_steps": warmup}
    values = {
        field: value
        for field, value in values.items()
        if (field == "max_steps" or field in automatic) and field not in overrides
    }
    sources = {field: f"derived: {fresh[field].reason}" for field in values}
    most = values.get("max_steps", config.max_steps)
    if not {"warmup_steps"} & (values.keys() | overrides.keys()):
        if most and old.warmup_steps > most:
            words = [f"--{name.replace('_', '-')} {quoted(value)}" for name, value in overrides.items()]
            raise UsageError(
                f"{run.folder} has --warmup-steps {old.warmup_steps}, more than --max-steps {most}",
                fix=" ".join(["nnx train --resume", quoted(run.folder), *words, f"--warmup-steps {warmup}"]),
            )
        values["warmup_steps"] = old.warmup_steps
    if config.short_sequences and "short_sequences" not in overrides and state.pieces(old, state.progress(old)) == 1:
        values["short_sequences"] = 0.0
        sources["short_sequences"] = "derived: it reads whole ones already"
    return replace(config, **values), sources


def resume(restart: Restart, observer: Observer, ranks: Ranks = ALONE) -> tuple[Trainer, list[str]]:
    """Continue a run; returns the trainer and what there is to say about it."""
    run, data, device = restart.run, restart.data, restart.device
    config = replace(restart.config, precision=restart.precision)
    model = load_model_of(run, restart.checkpoint, config, device, restart.file, is_divided(config, ranks))
    trainer = make_trainer(model, data, config, device, observer, Sampling(**run.config["sampling"]), ranks)
    name = architecture_of(run.config, run.folder, restart.file)
    trainer.flops_per_token = training_flops(name, model.config)
    restore_checkpoint(trainer.stepper.step, trainer.state, restart.checkpoint)
    trainer.cadence.expect_to_save(size_on_disk(restart.checkpoint.model, restart.checkpoint.optimizer))
    if not _as_long(config, restart.old):
        trainer.state.turned_at = None  # it follows the schedule of another length
    lead(trainer, run.folder, run.config, restart.checkpoint)
    config = trainer.choose_execution(config.compile)
    notes = [*restart.notes, *differences(run, restart.old, trainer), *run.cut_logs(trainer.state.step)]
    where = run.config["data"] | _describe_data(data, run.folder)
    requested = asdict(replace(config, precision=restart.old.precision))  # another device's precision is for this time
    origins = run.config.get("automatic", {}) | restart.sources
    automatic = {name: why for name, why in origins.items() if why.startswith("derived")}
    changed = {"training": requested, "automatic": automatic, "data": where, "machine": describe(device)}
    run.set_config(run.config | changed)
    lost = {} if run.has_status() else {name: getattr(trainer.state, name) for name in COUNTED}
    run.set_status(**lost, status="running", ended=None, max_steps=config.max_steps, max_time_s=config.max_time_s)
    return trainer, notes


def record_end(run: Run, trainer: Trainer, status: str, problem: str | None = None) -> dict[str, Any]:
    """Write into run.json how a run stands that has ended or was stopped, and why it diverged; returns all of it."""
    state = trainer.state
    return run.set_status(
        status=status,
        ended=None if status == "diverged" else state.ended_by(trainer.config),
        step=state.step,
        tokens=state.tokens,
        time_s=round(state.time_s, 3),
        skipped_steps=state.skipped_steps,
        problem=problem,
    )


def open_data(run: Run, moved_to: Path | None) -> TokenFolder:
    """The token folder that a run is trained on. Raises DataError where it is gone or another one."""
    folder = moved_to or follow(run.folder, run.config["data"]["folder"])
    if moved_to is None and not folder.exists():
        raise DataError(
            f"the token folder of {run.folder} is gone: no {folder}",
            fix=f"say where it is now: nnx train --resume {quoted(run.folder)} --data FOLDER",
        )
    data = open_token_folder(folder, tokenizer=read_tokenizer(run.folder))
    if data.fingerprint != run.config["data"]["fingerprint"]:
        raise DataError(
            f"{folder} holds other tokens than {run.folder} was trained on: its fingerprint differs",
            fix=f"start a new run on it: nnx train --init-from {quoted(run.folder)} --data {quoted(folder)}",
        )
    return data


def load_model_of(
    run: Run,
    checkpoint: Checkpoint,
    config: TrainConfig,
    device: torch.device,
    file: Path | None = None,
    divided: bool = False,
) -> LanguageModel:
    """The model of a run with a checkpoint's weights; on the meta device without them where it is to be `divided`.
    Raises CheckpointError where they are not its own."""
    model = model_from_config(run.config, run.folder, file)
    if config.weight_precision == "bf16":
        cast_matrices(model, "bf16")
    path = step_folder(run.checkpoints, checkpoint.step)
    check_format(checkpoint.state, path / "state.json")
    if not divided:
        load_weights(model, checkpoint.model, path, device)
    return model


def differences(run: Run, old: TrainConfig, trainer: Trainer) -> list[str]:
    """What is no longer as it was and changes rounding, though not the data order or the schedule."""
    began_with, now, before = run.config["versions"]["torch"], describe(trainer.device), run.config.get("machine")
    config = trainer.config
    found = []
    if began_with != torch.__version__:
        found.append(f"torch is {torch.__version__}, the run began with {began_with}")
    if before not in (None, now):
        found.append(f"this is {now}, the run was on {before}")
    if config.batch_size != old.batch_size:
        found.append(f"{counted(config.batch_size or 0, 'sequence')} at a time, {old.batch_size} before")
    return [f"{what}: the same run, not the same bits" for what in found]


def settings_of(run: Run) -> TrainConfig:
    """The training settings of a run. Raises CheckpointError where its config.json has none that can be."""
    path = run.folder / "config.json"
    try:
        stated = run.config["training"]
        coerce(own_fields(TrainConfig), {key: value for key, value in stated.items() if value is not None}, "training")
        return TrainConfig(**stated)
    except (UsageError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} describes no training: {error}") from error


def same_samples(old: TrainConfig, overrides: Mapping[str, Any]) -> TrainConfig:
    """Settings with a step divided anew where batch size or accumulation is given: its samples stay the same, and so do
    those of a validation. Another length takes the place of the old one, and of the warm-up, which follows from it.
    Raises UsageError where they cannot."""
    assert old.batch_size is not None and old.grad_accum is not None
    per_step = old.batch_size * old.grad_accum
    batch_size, grad_accum = old.batch_size, old.grad_accum
    if overrides.get("batch_size") or overrides.get("grad_accum"):
        batch_size = overrides.get("batch_size") or max(1, per_step // overrides["grad_accum"])
        grad_accum = overrides.get("grad_accum") or max(1, per_step // batch_size)
    if batch_size * grad_accum != per_step:
        raise UsageError(
            f"a step of this run has {counted(per_step, 'sequence')}, not --batch-size {batch_size} x "
            f"--grad-accum {grad_accum}",
            fix=f"take a --batch-size that divides {per_step}",
        )
    changed: dict[str, Any] = {**overrides, "batch_size": batch_size, "grad_accum": grad_accum}
    if any(name in overrides for name in LENGTHS):
        changed = dict.fromkeys(("warmup_steps", *LENGTHS)) | changed
    return replace(divide_step(old, batch_size), **changed)
