"""The learning rate of each competitor: short runs with the same few multiples of the one that its recipe has.

They see training text alone: what they are judged by is cut off its end. Short runs want higher rates than long ones:
without `short_rate` twice to four times the best rate was chosen for `nyx` of 0.4 million parameters and a million
tokens, which cost 0.01 to 0.04 bits per byte.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from nnx_cli.data.loader import check_length
from nnx_cli.data.token_folder import TokenFolder
from nnx_cli.errors import CheckpointError
from nnx_cli.experiments.entrants import Entrant, Field
from nnx_cli.experiments.one_run import bits_per_byte, memory_problem
from nnx_cli.experiments.race_run import Runner, run_entry
from nnx_cli.planning.plan import Plan
from nnx_cli.runs.load import ModelRef, load_model
from nnx_cli.runs.run import Run

FACTORS = (0.5, 1.0, 2.0)  # of the recipe's rate; one step further where the best one is at an edge
SHARE = 0.25  # of the tokens of the competitor that sees fewest
HORIZON = (
    0.32  # power of its tokens by which a run's best rate falls: Bjorck et al. 2024, https://arxiv.org/abs/2409.19913
)
LEAST_STEPS = 50  # but no more than a run has
VAL_SHARE = 0.05  # of the training text
SEED = 1


def tokens_each(field: Field) -> int:
    """Tokens of every short run, the same for all competitors."""
    sees = [field.expected_tokens(entrant) for entrant in field.entrants if entrant.plan is not None]
    steps = min(sees, default=0) / field.tokens_per_step
    return max(1, int(min(steps, max(LEAST_STEPS, SHARE * steps)))) * field.tokens_per_step


def training_text(data: TokenFolder, seq_len: int) -> TokenFolder:
    """The training text alone, divided anew into text to train on and to validate on. Raises DataError where it is too
    short for that."""
    n_val = max(seq_len + 1, int(VAL_SHARE * len(data.train)))
    check_length(len(data.train) - n_val, seq_len)
    cut, named = len(data.train) - n_val, f"{data.fingerprint}, its training text"
    if data.mask is None:
        return replace(data, train=data.train[:cut], val=data.train[cut:], fingerprint=named)
    n_bytes, starts = cut // 8, data.documents["train"].astype(np.int64)
    cut = 8 * n_bytes
    return replace(
        data,
        train=data.train[:cut],
        val=data.train[cut:],
        mask=data.mask[:n_bytes],
        val_mask=data.mask[n_bytes:],
        documents={"train": starts[starts < cut], "val": np.append(0, starts[starts > cut] - cut)},
        fingerprint=named,
    )


def rate_of(entrant: Entrant, factor: float) -> float:
    """A multiple of the recipe's rate, to two digits."""
    assert entrant.plan is not None and entrant.plan.train.lr is not None
    return float(f"{entrant.plan.train.lr * factor:.2g}")


def short_rate(rate: float, tokens: int, whole: float) -> float:
    """The rate of a run of so many tokens that stands for `rate` in one of `whole`, to two digits."""
    return float(f"{rate * (max(whole, tokens) / tokens) ** HORIZON:.2g}")


def next_factor(tried: Sequence[dict[str, Any]]) -> float | None:
    """The factor to try after those, with the bits per byte that they reached (None: diverged); None: no more."""
    done = {t["factor"]: math.inf if t["bits_per_byte"] is None else t["bits_per_byte"] for t in tried}
    if left := [factor for factor in FACTORS if factor not in done]:
        return left[0]
    if len(done) > len(FACTORS):
        return None
    best = min(done, key=lambda factor: (done[factor], factor))
    if best == FACTORS[0]:
        return best / 2
    return best * 2 if best == FACTORS[-1] else None


def best_rate(tried: Sequence[dict[str, Any]]) -> float:
    """The rate that reached the fewest bits per byte; the lowest where all diverged."""
    known = [each for each in tried if each["bits_per_byte"] is not None]
    if not known:
        return min(each["lr"] for each in tried)
    return min(known, key=lambda each: (each["bits_per_byte"], each["lr"]))["lr"]


def try_rate(runner: Runner, entrant: Entrant, rate: float, tokens: int, folder: Path) -> dict[str, Any]:
    """Bits per byte that a short run reaches on its part of the training text with what stands for a rate of a whole
    one, None where it diverges or memory does not suffice, and the seconds of training that took.

    It goes on from where it was interrupted. Raises Stopped.
    """
    field = runner.field
    data = training_text(field.data, field.seq_len)
    plan = _short_plan(field, entrant, rate, tokens)
    if not _is_run_of(plan, folder):
        shutil.rmtree(folder, ignore_errors=True)
    status, _ = runner.train(entrant, plan, data, folder)
    bits, time_s = None, run_entry(folder, SEED, status, entrant.flops)["time_s"]
    if status == "finished":
        try:
            model = load_model(ModelRef(folder, file=entrant.file), field.device, field.precision)
            bits = bits_per_byte(model, data, data.val)
        except (MemoryError, RuntimeError) as error:
            memory_problem(error)
    shutil.rmtree(folder, ignore_errors=True)
    return {"lr": rate, "bits_per_byte": bits, "time_s": time_s}


def _is_run_of(plan: Plan, folder: Path) -> bool:
    """Whether a folder has a run of that plan that can be gone on with."""
    try:
        run = Run(folder)
        run.newest_checkpoint()
        training = run.config["training"]
    except (CheckpointError, KeyError):
        return False
    return all(training.get(name) == getattr(plan.train, name) for name in ("lr", "max_steps", "tokens_per_step"))


def _short_plan(field: Field, entrant: Entrant, rate: float, tokens: int) -> Plan:
    """The plan of a short run, which drops as much as a whole one."""
    assert entrant.plan is not None
    steps = tokens // field.tokens_per_step
    rate = short_rate(rate, tokens, field.expected_tokens(entrant))
    asked = replace(entrant.asked, max_steps=steps, max_time=None, val_every=steps, lr=rate, seed=SEED)
    return field.plan(entrant.model, entrant.match, asked, entrant.plan.model_config.dropout)
