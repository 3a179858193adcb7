"""Loss of plasticity: one text after another is learned by the same model, and each by a fresh one for comparison.

Dohare et al. 2024, https://www.nature.com/articles/s41586-024-07711-7: a network that goes on learning may come to
learn worse than one that begins. Every text has the same budget and a schedule and an optimizer state of its own; what
goes on are the weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from torch import Tensor

from nnx_cli.data.token_folder import TokenFolder
from nnx_cli.experiments.entrants import Entrant
from nnx_cli.experiments.one_run import OUT_OF_MEMORY, bits_per_byte, memory_problem
from nnx_cli.experiments.race_run import Runner, run_entry, sample_of
from nnx_cli.layers.linear import Linear
from nnx_cli.models._base import LanguageModel
from nnx_cli.planning.plan import Plan
from nnx_cli.runs.load import ModelRef, load_model

WINDOWS = 8  # of validation text that activations are told from
DEAD = 0.1  # share of its layer's mean magnitude below which a hidden unit is dead: https://arxiv.org/abs/2302.12902


def folders(folder: Path, n_texts: int) -> list[tuple[Path, Path | None]]:
    """The run folders of every text in turn, and of the fresh model where it is not the first: the last run of the
    sequence is `folder` itself."""
    names = [folder.with_name(f"{folder.name}.{number}") for number in range(1, n_texts)] + [folder]
    fresh = [None] + [folder.with_name(f"{folder.name}.{number}-fresh") for number in range(2, n_texts + 1)]
    return [*zip(names, fresh, strict=True)]


def learn_in_turn(
    runner: Runner, entrant: Entrant, plan: Plan, folder: Path, seed: int
) -> tuple[dict[str, Any], str | None]:
    """What race.json says of a model that learned every text of the field in turn, from where that was interrupted, and
    what was wrong. Raises Stopped where it was asked to stop, after saving."""
    texts, before = runner.field.texts, None
    places = folders(folder, len(texts))
    for text, (here, fresh) in zip(texts, places, strict=True):
        for place, start in ((here, before), (fresh, None)):
            if place is not None:
                status, problem = runner.train(entrant, plan, text, place, start)
                if status != "finished":
                    return run_entry(place, seed, status, entrant.flops), problem
        before = ModelRef(here, "last", entrant.file)
    entry = _whole(runner, entrant, places, seed)
    try:
        stages = _stages(runner, entrant, places)
        sample = sample_of(_loaded(runner, entrant, folder), texts[-1], runner.sampling)
    except (MemoryError, RuntimeError) as error:
        return entry | {"status": OUT_OF_MEMORY}, memory_problem(error)
    bits = mean(stage["bits_per_byte"] for stage in stages[1:])
    return entry | {"bits_per_byte": bits, "plasticity": stages, "sample": sample}, None


def _whole(runner: Runner, entrant: Entrant, places: Sequence[tuple[Path, Path | None]], seed: int) -> dict[str, Any]:
    """What the runs of a sequence tell together; its curve goes through all texts."""
    entries = [run_entry(here, seed, "finished", entrant.flops) for here, _ in places]
    whole, curve = dict(entries[-1]), []
    sums = dict.fromkeys(("tokens", "time_s", "flops"), 0.0)
    for entry in entries:
        curve += [point | {axis: sums[axis] + (point[axis] or 0) for axis in sums} for point in entry["curve"]]
        sums = {axis: sums[axis] + entry[axis] for axis in sums}
    peaks = [entry["peak_memory_bytes"] or 0 for entry in entries]
    return whole | sums | {"tokens": int(sums["tokens"]), "curve": curve, "peak_memory_bytes": max(peaks) or None}


def _loaded(runner: Runner, entrant: Entrant, folder: Path) -> LanguageModel:
    """The model of a run as it was at its end."""
    return load_model(ModelRef(folder, "last", entrant.file), runner.field.device, runner.field.precision)


def _stages(runner: Runner, entrant: Entrant, places: Sequence[tuple[Path, Path | None]]) -> list[dict[str, Any]]:
    """What is measured after each text."""
    texts, stages = runner.field.texts, []
    for number, (here, fresh) in enumerate(places):
        model, text = _loaded(runner, entrant, here), texts[number]
        stage: dict[str, Any] = {
            "text": text.path.name,
            "bits_per_byte": bits_per_byte(model, text, text.val),
            "earlier_bits_per_byte": [bits_per_byte(model, old, old.val) for old in texts[:number]],
            **activity(model, text),
            "curve": _course(here),
            "fresh": None,
        }
        if fresh is not None:
            other = _loaded(runner, entrant, fresh)
            stage["fresh"] = {
                "bits_per_byte": bits_per_byte(other, text, text.val),
                **activity(other, text),
                "curve": _course(fresh),
            }
        stages.append(stage)
    return stages


def _course(folder: Path) -> list[list[float]]:
    """The validations of a run, [step, bits per byte]."""
    points = run_entry(folder, 0, "finished", 0)["curve"]
    return [[p["step"], p["val_bits_per_byte"]] for p in points if p["val_bits_per_byte"] is not None]


@torch.no_grad()
def activity(model: LanguageModel, data: TokenFolder) -> dict[str, float | None]:
    """What says how much of a model is in use, on a validation text: the effective rank of its blocks' outputs (exp of
    the entropy of their normalised singular values, mean over blocks), the share of dead units among the inputs of
    layers that come down from a wider space (None without such layers), the RMS of the blocks' matrices."""
    length = min(model.config.seq_len, len(data.val))
    starts = torch.linspace(0, len(data.val) - length, WINDOWS).long().tolist()
    rows = [torch.from_numpy(data.val[start : start + length].astype("int64")) for start in starts]
    outputs: list[Tensor] = []
    hidden: list[Tensor] = []
    down = [m for m in model.blocks.modules() if isinstance(m, Linear) and m.in_features > m.out_features]
    hooks = [block.register_forward_hook(lambda _, args, y: outputs.append(_first(y))) for block in model.blocks]
    hooks += [layer.register_forward_pre_hook(lambda _, args: hidden.append(args[0])) for layer in down]
    try:
        model(torch.stack(rows).to(model.device))
    finally:
        for hook in hooks:
            hook.remove()
    magnitudes = [h.float().abs().flatten(0, -2).mean(0) for h in hidden]
    dead = torch.cat([(each <= DEAD * each.mean()).float() for each in magnitudes]) if magnitudes else None
    matrices = [p.float().square() for p in model.blocks.parameters() if p.dim() == 2]
    return {
        "effective_rank": mean(effective_rank(x) for x in outputs),
        "dead_units": None if dead is None else dead.mean().item(),
        "weight_rms": (sum(m.sum().item() for m in matrices) / sum(m.numel() for m in matrices)) ** 0.5,
    }


def effective_rank(x: Tensor) -> float:
    """exp of the entropy of the singular values of x (..., D), normalised to sum 1 (Roy & Vetterli 2007)."""
    values = torch.linalg.svdvals(x.flatten(0, -2).double().cpu())
    p = values / values.sum()
    return torch.special.entr(p).sum().exp().item()


def _first(y: Any) -> Tensor:
    return y if isinstance(y, Tensor) else y[0]
