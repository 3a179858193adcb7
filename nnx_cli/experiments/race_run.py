"""One run of a race: an ordinary run, and what race.json says of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from nnx_cli.data.token_folder import TokenFolder
from nnx_cli.evaluation.losses import BATCH_TOKENS
from nnx_cli.evaluation.recall import recall_accuracy
from nnx_cli.experiments.entrants import Entrant, Field
from nnx_cli.experiments.one_run import EVAL_TOKENS, OUT_OF_MEMORY, OneRun, bits_per_byte, memory_problem
from nnx_cli.models._base import LanguageModel
from nnx_cli.planning.plan import Plan
from nnx_cli.runs.load import ModelRef, load_model
from nnx_cli.runs.logs import read_log
from nnx_cli.runs.run import Run
from nnx_cli.system.device import reset_peak_memory
from nnx_cli.training import session
from nnx_cli.training.observer import Observer
from nnx_cli.training.sampling import Sampling, draw_sample

SAMPLE_SEED = 0
MOST_POINTS = 200  # of a curve, besides validations


@dataclass(frozen=True)
class Runner:
    """How runs are trained: what their samples start with, who watches, the command they come from, when to stop."""

    field: Field
    sampling: Sampling
    observer: Observer
    command: str
    should_stop: Callable[[], bool]

    def train(
        self, entrant: Entrant, plan: Plan, data: TokenFolder, folder: Path, init_from: ModelRef | None = None
    ) -> tuple[str, str | None]:
        """Train a run to its end, from where it is; a new one from fresh weights or those of `init_from`. Returns
        finished, diverged or out of memory, and why.

        Raises Stopped where it was asked to stop, after saving.
        """
        device, command = self.field.device, self.command
        begin = partial(session.start, plan, data, folder, device, self.observer, self.sampling, command, init_from)
        return OneRun(folder, begin, data, entrant.file, self.observer, self.should_stop).train()

    def result(
        self, entrant: Entrant, folder: Path, seed: int, status: str, peak_known: bool
    ) -> tuple[dict[str, Any], str | None]:
        """What race.json says of a run that is over, and why it ran out of memory when it was judged."""
        entry = run_entry(folder, seed, status, entrant.flops)
        if not peak_known:
            entry["peak_memory_bytes"] = None
        if status == "finished":
            try:
                return entry | self._judged(entrant, folder), None
            except (MemoryError, RuntimeError) as error:
                return entry | {"status": OUT_OF_MEMORY}, memory_problem(error)
        return entry, None

    def _judged(self, entrant: Entrant, folder: Path) -> dict[str, Any]:
        field, ref = self.field, ModelRef(folder, file=entrant.file)
        model = load_model(ref, field.device, field.precision)
        judged: dict[str, Any] = {
            "bits_per_byte": bits_per_byte(model, field.data, field.data.val),
            "sample": sample_of(model, field.data, self.sampling),
        }
        if field.config.task == "recall":
            rows = max(1, BATCH_TOKENS // field.seq_len)
            judged["recall"] = recall_accuracy(model, field.data.val[:EVAL_TOKENS], rows)
        return judged

    def forget(self) -> bool:
        """Let memory be as before the first run; returns whether its peak is measured anew."""
        return reset_peak_memory(self.field.device)


def run_entry(folder: Path, seed: int, status: str, flops: int) -> dict[str, Any]:
    """What a run folder tells of a run that is over; `flops` is what a token takes. It has no verdict yet."""
    records = [*read_log(folder / "metrics.jsonl")] if folder.exists() else []
    last: dict[str, Any] = Run(folder).status() if folder.exists() else {}
    n_tokens = last.get("tokens") or 0
    return {
        "seed": seed,
        "out": str(folder),
        "status": status,
        "bits_per_byte": None,
        "tokens": n_tokens,
        "time_s": last.get("time_s") or 0.0,
        "flops": n_tokens * flops,
        "peak_memory_bytes": max((record.get("peak_memory_bytes") or 0 for record in records), default=0) or None,
        "curve": curve_of(records, flops),
        "sample": None,
        "recall": None,
        "plasticity": None,
    }


def sample_of(model: LanguageModel, data: TokenFolder, sampling: Sampling) -> str:
    """What a model writes, from the same prompt and with the same seed as all others."""
    prompt, text = draw_sample(model, data.tokenizer, sampling, SAMPLE_SEED)
    return prompt + text


def curve_of(records: list[dict[str, Any]], flops: int) -> list[dict[str, Any]]:
    """The course of a run by the lines of its log: all validations, and some of the other steps."""
    every = -(-len(records) // MOST_POINTS)
    return [
        {
            "step": record["step"],
            "tokens": record.get("tokens"),
            "time_s": record.get("time_s"),
            "flops": (record.get("tokens") or 0) * flops,
            "train_loss": record.get("train_loss"),
            "val_bits_per_byte": record.get("val_bits_per_byte"),
        }
        for number, record in enumerate(records)
        if number % every == 0 or record.get("val_bits_per_byte") is not None
    ]
