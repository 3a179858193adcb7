"""Runs that are trained already, side by side as in a race: each on the validation text that they share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch

from nnx_cli.config import TrainConfig
from nnx_cli.data.token_folder import TokenFolder, open_token_folder
from nnx_cli.errors import CheckpointError, DataError, UsageError, quoted
from nnx_cli.experiments import race_file
from nnx_cli.experiments.one_run import bits_per_byte
from nnx_cli.experiments.race_run import run_entry, sample_of
from nnx_cli.planning.flops import count_parameters, training_flops
from nnx_cli.planning.match import parameters_without_tables
from nnx_cli.runs.find import find_folder
from nnx_cli.runs.load import ModelRef, architecture_of, load_model, model_from_config
from nnx_cli.runs.manifest import versions
from nnx_cli.runs.run import Run
from nnx_cli.system.device import describe
from nnx_cli.system.files import follow
from nnx_cli.training.sampling import Sampling, choose_sampling

MAY_DIFFER = {  # settings of the runs of one competitor: the seed, and what makes no other model
    *("seed", "batch_size", "grad_accum", "optimizer_in_backward", "device", "compile", "activation_checkpointing"),
    *("vram", "threads", "val_every", "val_batches", "sample_every", "sample_prompt", "save_every", "keep", "report"),
    "deterministic",
}


def race_of_runs(specs: Sequence[str], target: float | None, device: torch.device, precision: str) -> dict[str, Any]:
    """What race.json would say of finished runs: those of the same model and settings are one competitor's.

    Raises CheckpointError for a run that is none or has not finished, UsageError for one that is named twice or has
    another tokenizer, DataError for one of another text.
    """
    runs = [_finished(spec) for spec in specs]
    folders = [run.folder.resolve() for run in runs]
    if twice := [run.folder for run, folder in zip(runs, folders, strict=True) if folders.count(folder) > 1]:
        raise UsageError(f"--runs names {twice[0]} twice", fix="name each run once")
    if len(runs) < 2:
        raise UsageError(f"--runs names {runs[0].folder} alone: nothing to compare", fix="write it like --runs A B")
    _check_alike(runs)
    data = _data_of(runs[0])
    assert data.tokenizer is not None
    sampling = choose_sampling(data.tokenizer, data, None, 0, None)
    record: dict[str, Any] = {
        "format": race_file.FORMAT,
        "versions": versions(),
        "settings": {"runs": [str(run.folder) for run in runs]},
        "device": describe(device),
        "fingerprint": data.fingerprint,
        "state": "finished",
        "comparisons": 0,
        "equal": None,
        "budget": None,
        "data": str(data.path),
        "tokenizer": runs[0].config["tokenizer"],
        "train_tokens": len(data.train),
        "parameters_counted": None,
        "learning_rate_search": None,
        "target_bits_per_byte": target,
        "competitors": _competitors(runs, data, sampling, device, precision),
    }
    race_file.judge(record)
    return record


def _finished(spec: str) -> Run:
    """A run by its name. Raises CheckpointError where it has not finished."""
    run = Run(find_folder(spec))
    status = run.status().get("status")
    if status != "finished":
        raise CheckpointError(
            f"{run.folder} has not finished: it is {status}", fix=f"nnx train --resume {quoted(run.folder)}"
        )
    return run


def _check_alike(runs: Sequence[Run]) -> None:
    """Raise UsageError, DataError or CheckpointError where runs are not of one tokenizer and one text."""
    first = runs[0]
    for run in runs:
        if not run.config.get("tokenizer") or not run.config.get("data"):
            raise DataError(f"{run.folder} names no text or no tokenizer: its bits per byte cannot be told")
        if run.config["tokenizer"]["fingerprint"] != first.config["tokenizer"]["fingerprint"]:
            raise UsageError(
                f"{run.folder} has another tokenizer than {first.folder}", fix="compare runs on one token folder"
            )
        if run.config["data"]["fingerprint"] != first.config["data"]["fingerprint"]:
            raise DataError(
                f"{run.folder} was trained on another text than {first.folder}", fix="compare runs on one token folder"
            )


def _data_of(run: Run) -> TokenFolder:
    """The token folder of a run. Raises DataError where it is gone or another one."""
    folder = follow(run.folder, run.config["data"]["folder"])
    data = open_token_folder(folder)
    if data.fingerprint != run.config["data"]["fingerprint"]:
        raise DataError(f"{folder} is not the text that {run.folder} was trained on")
    return data


def _competitors(
    runs: Sequence[Run], data: TokenFolder, sampling: Sampling, device: torch.device, precision: str
) -> list[dict[str, Any]]:
    """Runs with another seed alone together, every other one by itself, under the model's name or the run's."""
    groups: dict[str, list[Run]] = {}
    for run in runs:
        training = asdict(TrainConfig()) | (run.config.get("training") or {})
        alike = {name: value for name, value in training.items() if name not in MAY_DIFFER}
        groups.setdefault(repr([run.config["model"], run.config.get("init_from"), alike]), []).append(run)
    for key, group in [*groups.items()]:
        seeds = [_seed(run) for run in group]
        if len(set(seeds)) < len(seeds):  # the same seed again: two tries, not two seeds
            del groups[key]
            groups |= {f"{key} {run.folder}": [run] for run in group}
    names = [group[0].config["model"]["name"] for group in groups.values()]
    found = []
    for name, group in zip(names, groups.values(), strict=True):
        label = name if names.count(name) == 1 else str(group[0].folder.name)
        found.append(_competitor(label, group, data, sampling, device, precision))
    return found


def _seed(run: Run) -> int:
    return (run.config.get("training") or {}).get("seed", 0)


def _competitor(
    label: str, group: Sequence[Run], data: TokenFolder, sampling: Sampling, device: torch.device, precision: str
) -> dict[str, Any]:
    """What race.json says of runs that differ in their seed alone."""
    first = group[0]
    described, training = dict(first.config["model"]), first.config.get("training") or {}
    network = model_from_config(first.config, first.folder)
    name = architecture_of(first.config, first.folder)
    flops = training_flops(name, network.config)
    runs = []
    for run in group:
        model = load_model(ModelRef(run.folder), device, precision)
        judged = {"bits_per_byte": bits_per_byte(model, data, data.val), "sample": sample_of(model, data, sampling)}
        runs.append(run_entry(run.folder, _seed(run), "finished", flops) | judged)
    return {
        "model": label,
        "size": described.pop("size", None),
        "config": {key: value for key, value in described.items() if key != "name"},
        "parameters": count_parameters(network)["total"],
        "parameters_without_tables": parameters_without_tables(network),
        "flops_per_token": flops,
        "lr": training.get("lr"),
        "optimizer": training.get("optimizer"),
        "weight_decay": training.get("weight_decay"),
        "dropout": described.get("dropout"),
        "warmup_steps": training.get("warmup_steps"),
        "status": "finished",
        "problem": None,
        "runs": runs,
    }
