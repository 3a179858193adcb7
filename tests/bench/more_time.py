"""Whether more time ever hurts: the validation loss of RUN@best, and the last one, beside the time a run may take.

    python tests/bench/more_time.py TEXT... [--times 5s 20s 80s] [--sizes auto] [--model nyx] [--seeds 3] [--vram 8GB]
                                    [--device auto] [--threads N] [--limit SECONDS] [--results FILE] [--markdown FILE]

Every run is what `nnx train --max-time TIME` does with everything else on auto, in one process; the losses, in nats a
token, are over the whole validation split, of the best weights and of those at the end. A run that ends before its time
because the text has given what it has is the run of every longer time too: its plan is the same but for --max-time,
which is checked, and its row is written for these without training again ("same"). Rows are appended to --results, and
those that are there are not run again; none is begun that would end after --limit.
"""

from __future__ import annotations

import argparse
import datetime
import json
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from nnx_cli.config import PrepareConfig, TrainConfig
from nnx_cli.data.prepare import prepare
from nnx_cli.data.token_folder import TokenFolder
from nnx_cli.evaluation.losses import evaluate
from nnx_cli.planning.plan import Plan
from nnx_cli.runs.find import find_model
from nnx_cli.runs.load import load_model
from nnx_cli.system.device import describe, release_memory
from nnx_cli.training import session
from nnx_cli.training.inputs import Shape, model_vocabularies, open_and_plan
from nnx_cli.training.observer import Silent
from nnx_cli.training.sampling import choose_sampling

KEYS = ("text", "size", "time", "seed")
ALLOWED_NATS = 0.01  # that a longer run may be worse by, or two standard errors
ALLOWED_LAST = 0.02  # that the last validation may be worse by than the best
OVERHEAD_S = 15  # of a run, beside its training


def plan(folder: Path, shape: Shape, config: TrainConfig) -> tuple[TokenFolder, Plan, torch.device]:
    """What `nnx train` would do."""
    device, precision = session.configure_device(config)
    tokens, planned = open_and_plan(
        folder, shape, config, device=device, precision=precision, sources={}, base=None, tokenizer=None
    )
    return tokens, planned, device


def is_same_run(longer: Plan, shorter: Plan) -> bool:
    """Whether a plan is another's but for the time that it may take."""
    own = replace(longer.train, max_time=shorter.train.max_time, val_batches=shorter.train.val_batches)
    return own == shorter.train and longer.model_config == shorter.model_config


def run(folder: Path, shape: Shape, config: TrainConfig, out: Path) -> dict[str, Any]:
    """Train one model to its end; returns losses and what the run was."""
    release_memory()
    tokens, planned, device = plan(folder, shape, config)
    sampling = choose_sampling(tokens.tokenizer, tokens, None, 0, None)
    started, trainer = session.start(planned, tokens, out, device, Silent(), sampling, "", None)
    with started.lock():
        trainer.train(started, lambda: False)
    state = trainer.state
    losses = {}
    for which in ("best", "last"):
        model = load_model(find_model(f"{out}@{which}"), device, planned.train.precision)
        seq_len = model.config.seq_len
        losses[which] = round(evaluate(model, tokens.val, seq_len=seq_len, batch_size=16, token_bytes=None).loss, 4)
    return losses | {
        "ended": state.ended_by(trainer.config),
        "turned": state.turned_at is not None,
        "train_s": round(state.time_s, 1),
        "steps": state.step,
        "epochs": round(state.tokens / len(tokens.train), 1),
        "parameters": started.config["parameters"],
        "per_token": round(started.config["parameters"] / len(tokens.train), 2),
        "vocab_size": tokens.vocab_size,
        "dropout": planned.model_config.dropout,
        "optimizer": planned.train.optimizer,
        "same": False,
    }


def table(rows: list[dict[str, Any]]) -> list[str]:
    """Means over the seeds, a line for each text, size and time, and whether that is worse than the time before."""
    head = (
        "| text | size | parameters a token | time | seeds | epochs | ended by | seconds | best | ± | last - best | |"
    )
    lines = [head, "| --- | --- | ---: | --- | ---: | ---: | --- | ---: | ---: | ---: | ---: | --- |"]
    groups: dict[tuple[str, str], dict[str, list[dict[str, Any]]]] = {}
    for row in rows:
        groups.setdefault((row["text"], row["size"]), {}).setdefault(row["time"], []).append(row)
    for (text, size), times in groups.items():
        before: list[float] = []
        for time_, found in sorted(times.items(), key=lambda item: TrainConfig(max_time=item[0]).max_time_s or 0):
            best, last = [r["best"] for r in found], [r["last"] for r in found]
            mean, error = statistics.mean(best), standard_error(best)
            later = statistics.mean(last) - mean
            spread = 2 * (error**2 + standard_error(before) ** 2) ** 0.5
            worse = bool(before) and mean > statistics.mean(before) + max(ALLOWED_NATS, spread)
            verdict = ", ".join(["worse"] * worse + ["ends above its best"] * (later > ALLOWED_LAST))
            ended = " or ".join(sorted({r["ended"] for r in found})) + ", turned" * any(r["turned"] for r in found)
            epochs, seconds = (statistics.mean(r[key] for r in found) for key in ("epochs", "train_s"))
            is_same = all(r["same"] for r in found)
            lines.append(
                f"| {text} | {size} | {found[0]['per_token']:g} | {time_} | {len(found)} | {epochs:.1f} | {ended} "
                f"| {seconds:.1f} | {mean:.4f} | {error:.4f} | {later:.4f} | "
                f"{'the run above' if is_same else verdict or 'ok'} |"
            )
            before = best
    return lines


def standard_error(values: list[float]) -> float:
    """Of a mean; 0 of a single value."""
    return statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0


def race(options: argparse.Namespace, scratch: Path) -> list[dict[str, Any]]:
    """Run what is missing, short times first, and return all rows."""
    end = time.monotonic() + options.limit
    known = options.results.read_text().splitlines() if options.results.exists() else []
    rows = {tuple(row[key] for key in KEYS): row for row in map(json.loads, known)}

    def keep(row: dict[str, Any]) -> None:
        rows[tuple(row[key] for key in KEYS)] = row
        print(json.dumps(row), flush=True)
        with open(options.results, "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

    times = sorted(options.times, key=lambda text: TrainConfig(max_time=text).max_time_s or 0)
    for seed in range(options.seeds):
        for text in options.text:
            for size in options.sizes:
                shape, over = Shape(options.model, size, {}), None
                for time_ in times:
                    job = {"text": text.stem, "size": size, "time": time_, "seed": seed}
                    config = TrainConfig(
                        max_time=time_,
                        seed=seed,
                        vram=options.vram,
                        device=options.device,
                        threads=options.threads,
                    )
                    folder = scratch / text.stem
                    if not folder.exists():
                        device, precision = session.configure_device(config)
                        vocabularies = model_vocabularies(shape, config, device, precision)
                        prepare([text], folder, PrepareConfig(), None, lambda news: None, vocabularies)
                    planned = plan(folder, shape, config)[1]
                    if (found := rows.get(tuple(job.values()))) is None:
                        if over is not None and is_same_run(planned, over[0]):
                            keep(over[1] | job | {"same": True})
                            continue
                        if time.monotonic() + (planned.train.max_time_s or 0) + OVERHEAD_S > end:
                            continue
                        with tempfile.TemporaryDirectory() as out:
                            found = job | run(folder, shape, config, Path(out) / "run")
                        keep(found)
                    over = (planned, found) if found["ended"] == "data" and not found["turned"] else None
    return list(rows.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", type=Path, nargs="+")
    parser.add_argument("--times", nargs="+", default=["5s", "20s", "80s"])
    parser.add_argument("--sizes", nargs="+", default=["auto"])
    parser.add_argument("--model", default="nyx")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--vram")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--limit", type=float, default=1e9)
    parser.add_argument("--results", type=Path, default=Path("more_time.jsonl"))
    parser.add_argument("--markdown", type=Path)
    options = parser.parse_args()
    device, _ = session.configure_device(TrainConfig(device=options.device, threads=options.threads))
    with tempfile.TemporaryDirectory() as scratch:
        rows = race(options, Path(scratch))
    machine = f"{describe(device)}, torch {torch.__version__}, {datetime.date.today().isoformat()}"
    output = "\n".join([f"`{options.model}`; {machine}.", "", *table(rows), ""])
    print(output)
    if options.markdown:
        options.markdown.write_text(output, encoding="utf-8")


if __name__ == "__main__":
    main()
