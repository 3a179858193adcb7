"""What others train with and the default recipe does not: each candidate beside it, for all architectures.

    python tests/bench/recipe_race.py --text FILE... [--models nyx llama ...] [--candidates cosine softcap ...]
                                      [--size nano] [--steps 400] [--seeds 3] [--limit SECONDS]
                                      [--results FILE] [--markdown FILE]

A run is `nnx train --short-sequences 0` for as many steps, or the tokens of these, with everything else on auto but for
one thing; its loss is that of the last weights over the whole validation split. Candidates:

cosine, wsd     the schedule, in place of a rate that falls linearly to zero
momentum        Muon's, from 0.85 to 0.95 in the first fifth of the run, in place of 0.9 (modded-nanogpt does so in its
                first 300 steps; 0.95 throughout: zoo.md)
batch           half the sequences a step in the first third of the tokens, so that there are a third more steps
                (McCandlish et al. 2018, https://arxiv.org/abs/1812.06162: gradients are less noisy early, so that small
                batches are enough)
smaller         the same in the whole run
longer          as it is, in as many more steps as take the time of `batch`, whose row has to be there before: what
                `batch` has to be better than
sequences       sequences of half the length, twice as many, in the first third (Li et al. 2022,
                https://arxiv.org/abs/2108.06084); what came of it: --short-sequences 0.33
half            the same in the first half of the run
quarters        of a quarter of the length in the first sixth, then of half until the first third
newton          Muon's matrices by five steps of one quintic (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon)
                in place of Polar Express's, of which a CPU takes four
five            all five of Polar Express's on a CPU too
softcap         logits z as 15 tanh(z / 15) (nanochat; Gemma 2 has 30); not for tape, whose head is a Student's t

Weight decay is what is planned as it is, so that weights forget 1.6 times as much with wsd and batch, and twice as much
with smaller.

Rows are appended to --results, those that are there are not run again, and several calls at once may share it. On a GPU
steps are CUDA graphs, but with `momentum`, which they would hold fast. Times in the table are right where nothing else
runs on the device.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import math
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from zoo import make_trainer_for

from nnx_cli import models
from nnx_cli.config import PrepareConfig
from nnx_cli.data.prepare import prepare
from nnx_cli.data.token_folder import TokenFolder, open_token_folder
from nnx_cli.evaluation.losses import evaluate
from nnx_cli.layers import loss as loss_module
from nnx_cli.optim import muon
from nnx_cli.optim._base import set_lr
from nnx_cli.system.device import describe, pick_device, set_seed, synchronize
from nnx_cli.training.step import StepGraphs
from nnx_cli.training.trainer import Trainer, scheduled_lr

AS_IT_IS = "as it is"
CANDIDATES = (
    "cosine",
    "wsd",
    "momentum",
    "batch",
    "smaller",
    "longer",
    "sequences",
    "half",
    "quarters",
    "newton",
    "five",
    "softcap",
)
EARLY = 1 / 3  # of the tokens
FEWER = {"batch": EARLY, "smaller": 1.0}  # the part of the run until which a step has half the sequences
SHORTER = {  # parts of the run until which sequences are that many times shorter
    "sequences": ((EARLY, 2),),
    "half": ((1 / 2, 2),),
    "quarters": ((EARLY / 2, 4), (EARLY, 2)),
}
WARM, COLD_MOMENTUM, WARM_MOMENTUM = 1 / 5, 0.85, 0.95
ITERATIONS = {"newton": ((3.4445, -4.7750, 2.0315),) * 5, "five": muon.POLAR_EXPRESS}
CAP = 15.0


@contextlib.contextmanager
def capped(model: models.LanguageModel) -> Iterator[None]:
    """Meanwhile the logits of a model are at most CAP."""
    handle = model.head.register_forward_hook(lambda head, args, logits: CAP * torch.tanh(logits.float() / CAP))
    fused, loss_module.as_linear_head = loss_module.as_linear_head, lambda head: None  # type: ignore[assignment]
    try:
        yield
    finally:
        handle.remove()
        loss_module.as_linear_head = fused


@contextlib.contextmanager
def iterating(steps: tuple[tuple[float, float, float], ...]) -> Iterator[None]:
    """Meanwhile Muon's iteration has those coefficients."""
    before = muon.POLAR_EXPRESS, muon.SHORTER
    muon.POLAR_EXPRESS = muon.SHORTER = steps
    try:
        yield
    finally:
        muon.POLAR_EXPRESS, muon.SHORTER = before


def changed(candidate: str, model: models.LanguageModel) -> contextlib.AbstractContextManager[None]:
    """In which a candidate trains."""
    if candidate in ITERATIONS:
        return iterating(ITERATIONS[candidate])
    return capped(model) if candidate == "softcap" else contextlib.nullcontext()


def samples(trainer: Trainer, first: int, candidate: str, progress: float) -> tuple[Tensor, Tensor]:
    """The sequences (N, T) of the step that begins with the one of number `first`, and their targets."""
    rows = trainer.stepper.samples_per_step
    if progress < FEWER.get(candidate, 0.0):
        rows //= 2
    times = next((times for until, times in SHORTER.get(candidate, ()) if progress < until), 1)
    ids, targets = (part.reshape(times * rows, -1) for part in trainer.stepper.loader.batch(first, rows))
    return ids, targets


class Steps:
    """Steps of a trainer on samples of any shape: as CUDA graphs of each, where that is asked for."""

    def __init__(self, trainer: Trainer, as_graphs: bool) -> None:
        self.trainer = trainer
        self.as_graphs = as_graphs
        self.graphs: dict[torch.Size, StepGraphs] = {}

    def __call__(self, input_ids: Tensor, targets: Tensor) -> None:
        """One step on samples (N, T)."""
        if self.as_graphs:
            self.record(input_ids, targets)
            self.graphs[input_ids.shape](input_ids, targets)
        else:
            self.trainer.stepper.step(input_ids, targets, self.micro_batch(input_ids))

    def micro_batch(self, input_ids: Tensor) -> int:
        """Sequences of a micro-batch of them."""
        stepper = self.trainer.stepper
        return math.gcd(len(input_ids), stepper.batch_size * (stepper.loader.seq_len // input_ids.shape[1]))

    def record(self, input_ids: Tensor, targets: Tensor) -> None:
        """Have a graph of steps on such samples; changes nothing else."""
        if input_ids.shape not in self.graphs:
            step = self.trainer.stepper.step
            self.graphs[input_ids.shape] = StepGraphs(step, input_ids, targets, self.micro_batch(input_ids))


def train(trainer: Trainer, candidate: str) -> tuple[int, float]:
    """All steps of a run; returns how many there were, and the seconds that they took."""
    config, step = trainer.config, trainer.stepper.step
    every, done, n_steps = config.max_steps * trainer.stepper.samples_per_step, 0, 0
    steps = Steps(trainer, trainer.device.type == "cuda" and candidate != "momentum" and trainer.model.capturable)
    trainer.model.train()
    if steps.as_graphs:  # recorded before the clock runs
        for progress in (0.0, EARLY / 2, 0.99):
            steps.record(*samples(trainer, 0, candidate, progress))
    synchronize(trainer.device)
    started = time.perf_counter()
    while done < every:
        progress = done / every
        set_seed(config.seed, n_steps)
        set_lr(step.optimizer, scheduled_lr(config, n_steps, progress))
        if candidate == "momentum":
            momentum = COLD_MOMENTUM + (WARM_MOMENTUM - COLD_MOMENTUM) * min(1.0, progress / WARM)
            for group in step.optimizer.param_groups:
                group |= {"momentum": momentum} if "momentum" in group else {}
        input_ids, targets = samples(trainer, done, candidate, progress)
        steps(input_ids, targets)
        trainer.state.step = n_steps = n_steps + 1
        done += input_ids.numel() // trainer.stepper.loader.seq_len
    synchronize(trainer.device)
    return n_steps, time.perf_counter() - started


def steps_of(job: dict[str, Any], rows: list[dict[str, Any]]) -> int:
    """Steps as they are that a run's tokens are of. Raises SystemExit for `longer` where nothing was timed."""
    if job["candidate"] != "longer":
        return job["steps"]
    seconds = {
        row["candidate"]: row["seconds"]
        for row in rows
        if all(row[key] == job[key] for key in job if key != "candidate")
    }
    if not {AS_IT_IS, "batch"} <= seconds.keys():
        raise SystemExit("recipe_race.py: longer needs the time of batch: --candidates batch longer")
    return round(job["steps"] * seconds["batch"] / seconds[AS_IT_IS])


def run(job: dict[str, Any], n_steps: int, data: TokenFolder, device: torch.device) -> dict[str, Any]:
    """One run on the tokens of `n_steps` steps: its loss, in nats a token, and what the recipe was."""
    own = {"schedule": job["candidate"]} if job["candidate"] in ("cosine", "wsd") else {}
    shape = make_trainer_for(10**6, job["model"], job["size"], data, job["seed"], device, **own).config
    tokens = n_steps * shape.tokens_per_step
    trainer = make_trainer_for(tokens, job["model"], job["size"], data, job["seed"], device, **own)
    config, model = trainer.config, trainer.model
    with changed(job["candidate"], model):
        taken, seconds = train(trainer, job["candidate"])
        bytes_of = trainer.validation.token_bytes
        found = evaluate(model, data.val, seq_len=model.config.seq_len, batch_size=16, token_bytes=bytes_of)
    return {
        "loss": round(found.loss, 4),
        "taken": taken,
        "tokens_per_step": config.tokens_per_step,
        "epochs": round(tokens / len(data.train), 2),
        "optimizer": config.optimizer,
        "lr": config.lr,
        "seconds": round(seconds, 3),
    }


def difference(pairs: list[tuple[dict[str, Any], dict[str, Any]]]) -> str:
    """A cell of the table: runs of a candidate, each with the one of its seed that is as it is."""
    apart = [row["loss"] - plain["loss"] for row, plain in pairs]
    error = f" ± {statistics.stdev(apart) / len(apart) ** 0.5:.3f}" if len(apart) > 1 else ""
    time_share = statistics.mean(row["seconds"] / plain["seconds"] for row, plain in pairs)
    return f"{statistics.mean(apart):+.3f}{error} ({time_share:.2f})"


def table(rows: list[dict[str, Any]]) -> list[str]:
    """A line for each text and model: the mean over the seeds as it is, and the mean difference of each candidate to
    the runs of the same seeds, with its standard error; in brackets the share of their time."""
    cells: dict[tuple[str, str], dict[str, dict[int, dict[str, Any]]]] = {}
    for row in rows:
        mine = cells.setdefault((row["text"], row["model"]), {})
        mine.setdefault(row["candidate"], {})[row["seed"]] = row
    candidates = [c for c in CANDIDATES if any(c in mine for mine in cells.values())]
    lines = [f"| text | model | {AS_IT_IS} | {' | '.join(candidates)} |"]
    lines.append("| --- | --- | ---: |" + " ---: |" * len(candidates))
    for (text, model), mine in sorted(cells.items()):
        plain = mine.get(AS_IT_IS, {})
        if not plain:
            continue
        lines.append(f"| {text} | {model} | {statistics.mean(row['loss'] for row in plain.values()):.4f} |")
        for candidate in candidates:
            pairs = [(row, plain[seed]) for seed, row in mine.get(candidate, {}).items() if seed in plain]
            lines[-1] += f" {difference(pairs)} |" if pairs else " |"
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, nargs="+", required=True)
    parser.add_argument("--models", nargs="+", default=models.names())
    parser.add_argument("--candidates", nargs="+", choices=CANDIDATES, default=list(CANDIDATES))
    parser.add_argument("--size", default="nano")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--limit", type=float, default=1e9, help="seconds after which no run is begun")
    parser.add_argument("--results", type=Path, default=Path("recipe_race.jsonl"))
    parser.add_argument("--markdown", type=Path)
    args = parser.parse_args()
    started, device = time.monotonic(), pick_device(args.device)
    if args.threads:
        torch.set_num_threads(args.threads)

    def known() -> list[dict[str, Any]]:
        return [json.loads(line) for line in args.results.read_text().splitlines()] if args.results.exists() else []

    with tempfile.TemporaryDirectory() as folder:
        for path in args.text:
            prepare([path], Path(folder) / path.stem, PrepareConfig(tokenizer="byte"))
        jobs = [
            {"text": path.stem, "model": name, "size": args.size, "steps": args.steps}
            | {"seed": seed, "candidate": candidate}
            for seed in range(args.seeds)
            for path in args.text
            for name in args.models
            for candidate in (AS_IT_IS, *args.candidates)
            if (name, candidate) != ("tape", "softcap")
        ]
        for job in jobs:
            if any(job.items() <= row.items() for row in known()) or time.monotonic() - started > args.limit:
                continue
            row = job | run(job, steps_of(job, known()), open_token_folder(Path(folder) / job["text"]), device)
            row |= {"machine": f"{describe(device)}, torch {torch.__version__}, {datetime.date.today()}"}
            print(json.dumps(row), flush=True)
            with open(args.results, "a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
    mine = [row for row in known() if (row["size"], row["steps"]) == (args.size, args.steps)]
    text = "\n".join([*table(mine), ""])
    print(text)
    if args.markdown:
        args.markdown.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
