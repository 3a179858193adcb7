"""A sweep as Weights & Biases' files describe it (https://docs.wandb.ai/models/sweeps/sweep-config-keys), as one of
ours."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nnx_cli.commands._config_file import read_settings_text
from nnx_cli.config import Field
from nnx_cli.errors import MissingFeature, UsageError, nearest, pip_install
from nnx_cli.experiments.samplers import PACKAGE
from nnx_cli.experiments.search_space import Choice, Range, brief, choice, find_field, make_range

METHODS = {"random": "random", "grid": "grid", "bayes": "tpe"}
METRICS = ("val_bits_per_byte", "bits_per_byte", "val_loss", "val/loss", "validation_loss", "eval_loss", "eval/loss")
FOR_AGENTS = ("program", "command", "project", "entity", "name", "description", "controller")  # of no use here
KEYS = ("method", "metric", "parameters", "early_terminate", "run_cap", *FOR_AGENTS)
HYPERBAND = ("type", "eta", "s", "min_iter", "max_iter", "strict")
PARAMETER = ("distribution", "value", "values", "min", "max", "q")
LISTS = ("constant", "categorical")
RANGES = ("uniform", "int_uniform", "q_uniform", "log_uniform_values", "log_uniform")


@dataclass(frozen=True)
class WandbSweep:
    """What is searched, settings of the sweep, and what to say about how the file is understood."""

    space: dict[str, Choice | Range]
    settings: dict[str, Any]
    notes: list[str]


def read_wandb_sweep(path: Path, fields: Mapping[str, Field | None]) -> WandbSweep:
    """The sweep of a file. Raises DataError where it cannot be read, UsageError for what is unknown or cannot be done
    here, which it names, MissingFeature without PyYAML."""
    origin = f"--wandb-yaml {path}"
    content = _mapping(_read_yaml(path), origin)
    _check_keys(content, KEYS, origin)
    parameters = _mapping(content.get("parameters"), f"{origin}: parameters")
    space: dict[str, Choice | Range] = {}
    for name, described in parameters.items():
        field = find_field(str(name), fields, origin)
        if field.name in space:
            raise UsageError(f"{origin}: {field.name} is there twice, in two spellings")
        space[field.name] = _parameter(f"{origin}: {field.name}", _mapping(described, f"{origin}: {name}"), field)
    if not space:
        raise UsageError(f"{origin} has no parameters: nothing to search")
    settings, notes = _how(content, origin)
    if unread := [key for key in FOR_AGENTS if key in content]:
        notes.append(f"{origin}: not read, for they are for agents: {', '.join(unread)}")
    return WandbSweep(space, settings, notes)


def _read_yaml(path: Path) -> Any:
    """The content of a YAML file, in which nothing is run."""
    text = read_settings_text(path, "--wandb-yaml")
    try:
        import yaml
    except ModuleNotFoundError as error:
        raise MissingFeature("--wandb-yaml needs PyYAML", fix=pip_install(PACKAGE)) from error
    try:
        return yaml.safe_load(text)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = "" if mark is None else f" (line {mark.line + 1}, column {mark.column + 1})"
        why = ", ".join(filter(None, (error.context, error.problem)))
        raise UsageError(f"--wandb-yaml {path} is not YAML: {why}{where}") from error
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        why = " ".join(str(error).split())
        raise UsageError(f"--wandb-yaml {path} is not YAML: {why}") from error


def _mapping(value: Any, origin: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise UsageError(f"{origin} is {'empty' if value is None else brief(value)}; it must have names and values")
    return value


def _check_keys(found: Iterable[Any], known: Iterable[str], origin: str) -> None:
    """Raise UsageError for a key that is not known, with the nearest one."""
    for key in found:
        if key not in known:
            near = nearest(key, known) if isinstance(key, str) else ""
            raise UsageError(f"{origin}: {brief(key)} is not known here{near}")


def _parameter(origin: str, described: Mapping[str, Any], field: Field) -> Choice | Range:
    """What a setting is chosen from."""
    kind = described["distribution"] if "distribution" in described else _kind(described, origin)
    if kind not in (*LISTS, *RANGES):
        near = nearest(kind, (*LISTS, *RANGES)) if isinstance(kind, str) else ""
        raise UsageError(
            f"{origin}: the distribution {brief(kind)} is not known here{near}",
            fix=f"known are {', '.join((*LISTS, *RANGES))}",
        )
    _check_keys(described, PARAMETER, origin)
    needed = {"constant": ("value",), "categorical": ("values",), "q_uniform": ("min", "max", "q")}.get(
        kind, ("min", "max")
    )
    for key in needed:
        if key not in described:
            raise UsageError(f"{origin}: the distribution {kind} needs {key}")
    if surplus := [key for key in described if key not in ("distribution", *needed)]:
        raise UsageError(f"{origin}: {surplus[0]} does nothing with the distribution {kind}", fix="leave it out")
    if kind in LISTS:
        values = described[needed[0]]
        return choice(origin, values if kind == "categorical" and isinstance(values, list) else [values], field)
    low, high = described["min"], described["max"]
    if kind == "log_uniform":  # its ends are exponents
        low, high = (_power(end, origin) for end in (low, high))
    return make_range(origin, low, high, field, log=kind.startswith("log"), step=described.get("q"))


def _kind(described: Mapping[str, Any], origin: str) -> str:
    """The distribution of a parameter that names none, as Weights & Biases has it."""
    _check_keys(described, PARAMETER, origin)
    if "value" in described or "values" in described:
        return "constant" if "value" in described else "categorical"
    ends = described.get("min"), described.get("max")
    if None in ends:
        raise UsageError(f"{origin} has neither value, values nor min and max")
    return "int_uniform" if all(isinstance(end, int) for end in ends) else "uniform"


def _power(exponent: Any, origin: str) -> float:
    """e to a power."""
    try:
        return float(f"{math.exp(float(exponent)):.12g}")
    except (TypeError, ValueError, OverflowError) as error:
        raise UsageError(
            f"{origin}: {brief(exponent)} is no exponent of e", fix="log_uniform_values takes the values themselves"
        ) from error


def _how(content: Mapping[str, Any], origin: str) -> tuple[dict[str, Any], list[str]]:
    """Settings of the sweep, and notes on them."""
    notes = []
    method = content.get("method", "random")
    if not isinstance(method, str) or method not in METHODS:
        near = nearest(method, METHODS) if isinstance(method, str) else ""
        raise UsageError(
            f"{origin}: the method {brief(method)} is not known here{near}",
            fix=f"known are {', '.join(METHODS)}",
        )
    settings: dict[str, Any] = {"sampler": METHODS[method]}
    if method == "bayes":
        notes.append(f"{origin}: bayes is done by Optuna's TPE")
    metric = _mapping(content.get("metric", {}), f"{origin}: metric")
    _check_keys(metric, ("name", "goal", "target"), f"{origin}: metric")
    if (
        metric.get("goal", "minimize") != "minimize"
        or metric.get("name", "val_loss") not in METRICS
        or "target" in metric
    ):
        told = ", ".join(f"{key} {brief(value)}" for key, value in metric.items())
        raise UsageError(
            f"{origin}: the metric ({told}) is not ours: trials are ranked by bits per byte of the validation text",
            fix="leave metric out, or name val_bits_per_byte with the goal minimize",
        )
    if (cap := content.get("run_cap")) is not None:
        if isinstance(cap, bool) or not isinstance(cap, int):
            raise UsageError(f"{origin}: run_cap is {brief(cap)}; it must be a whole number")
        settings["trials"] = cap
    if (early := content.get("early_terminate")) is not None:
        notes += _halving(settings, _mapping(early, f"{origin}: early_terminate"), f"{origin}: early_terminate")
    return settings, notes


def _halving(settings: dict[str, Any], early: Mapping[str, Any], origin: str) -> list[str]:
    """Take halving for Hyperband; returns notes on it."""
    _check_keys(early, HYPERBAND, origin)
    if early.get("type") != "hyperband":
        raise UsageError(f"{origin}: the type {brief(early.get('type'))} is not known here", fix="known is hyperband")
    if settings["sampler"] != "random":
        raise UsageError(f"{origin} goes with the method random alone", fix="leave it out")
    settings["sampler"] = "halving"
    if "eta" in early:
        if isinstance(early["eta"], bool) or not isinstance(early["eta"], int):
            raise UsageError(f"{origin}: eta is {brief(early['eta'])}; it must be a whole number")
        settings["eta"] = early["eta"]
    unread = [key for key in HYPERBAND if key in early and key not in ("type", "eta")]
    told = f"; {', '.join(unread)} not read: rungs follow from trials and eta" if unread else ""
    return [f"{origin}: hyperband is done by successive halving{told}"]
