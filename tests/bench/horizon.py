"""How often a text is worth reading: final loss beside the number of epochs, for models of several sizes.

    python tests/bench/horizon.py --text A.txt B.txt [--bytes 1000000] [--sizes nano tiny small]
                                  [--epochs 4 8 12 16 24 32] [--set dropout=0.2,0.3 optimizer=muon,adamw]
                                  [--seeds 1] [--jobs 4] [--results FILE]

Every run is a whole one, with the default recipe for its length but for what --set fixes (each combination is a run),
and ends annealed. Rows hold the loss over the whole validation split at the end and at the best of ten looks on the
way. Texts are cut after --bytes; the last tenth is for validation. --jobs processes share the work, one for every
GPU: two on one card die of each other. Rows are appended to --results, and those that are there are not run again.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import os
import tempfile
import time
from pathlib import Path
from typing import Any

LOOKS = 10


def work(number: int, jobs: Any, done: Any) -> None:
    """Run jobs until there are none."""
    if gpus := os.environ["NNX_BENCH_GPUS"].split():
        os.environ["CUDA_VISIBLE_DEVICES"] = gpus[number % len(gpus)]
    while (job := jobs.get()) is not None:
        try:
            done.put(job | run(job))
        except Exception as error:
            done.put(job | {"problem": f"{type(error).__name__}: {error}"})


def run(job: dict[str, Any]) -> dict[str, Any]:
    """Train one model; returns losses, in nats a token, and what the recipe was."""
    from zoo import coerced, make_trainer, take_step

    from nnx_cli import models
    from nnx_cli.config import TrainConfig
    from nnx_cli.data.token_folder import open_token_folder
    from nnx_cli.evaluation.losses import evaluate
    from nnx_cli.system.device import pick_device, reset_peak_memory, synchronize

    device = pick_device("auto")
    reset_peak_memory(device)
    data = open_token_folder(Path(job["tokens"]))
    settings = coerced(job["model"], job["set"])
    own = {field.name for field in models.config_fields(job["model"])}
    fields = {key: value for key, value in settings.items() if key in own}
    recipe = {key: value for key, value in settings.items() if key not in own}
    config = TrainConfig(epochs=job["epochs"], seed=job["seed"], **recipe)
    trainer = make_trainer(job["model"], job["size"], data, config, device, fields)
    trainer.model.train()
    trainer.choose_execution("graph")
    train, state, curve, spent = trainer.config, trainer.state, [], 0.0
    seq_len, token_bytes = trainer.model.config.seq_len, trainer.validation.token_bytes
    looks = {round(train.max_steps * (n + 1) / LOOKS) for n in range(LOOKS)}
    synchronize(device)
    started = time.perf_counter()
    for step in range(train.max_steps):
        take_step(trainer, step / train.max_steps)
        if state.step in looks:
            synchronize(device)
            spent += time.perf_counter() - started
            found = evaluate(trainer.model, data.val, seq_len=seq_len, batch_size=64, token_bytes=token_bytes)
            curve.append([state.step, round(found.loss, 4)])
            trainer.model.train()
            started = time.perf_counter()
    n_parameters = sum(p.numel() for p in trainer.model.parameters())
    best = min(curve, key=lambda look: look[1])
    return {
        "parameters": n_parameters,
        "per_token": round(n_parameters / len(data.train), 2),
        "steps": train.max_steps,
        "tokens_per_step": train.tokens_per_step,
        "optimizer": train.optimizer,
        "lr": train.lr,
        "decay": train.weight_decay,
        "dropout": trainer.model.config.dropout,
        "loss": curve[-1][1],
        "best": best[1],
        "best_at": round(best[0] / train.max_steps, 2),
        "train_s": round(spent, 1),
        "curve": curve,
    }


def combinations(words: list[str]) -> list[dict[str, str]]:
    """Every choice of one value for each KEY=VALUE,VALUE."""
    keys = [word.split("=", 1)[0] for word in words]
    values = [word.split("=", 1)[1].split(",") for word in words]
    return [dict(zip(keys, chosen, strict=True)) for chosen in itertools.product(*values)]


def table(rows: list[dict[str, Any]]) -> list[str]:
    """Rows as Markdown."""
    head = (
        "| text | size | parameters a token | epochs | optimizer | dropout | decay | loss | best look (at) | seconds |"
    )
    lines = [head, "| --- | --- | ---: | ---: | --- | ---: | ---: | ---: | ---: | ---: |"]
    for row in sorted(rows, key=lambda r: (r["text"], r["model"], r.get("per_token", 0), r["epochs"])):
        if "problem" in row:
            lines.append(f"| {row['text']} | {row['size']} | | {row['epochs']:g} | {row['set']} | {row['problem']} |")
            continue
        lines.append(
            f"| {row['text']} | {row['size']} | {row['per_token']:g} | {row['epochs']:g} | {row['optimizer']} "
            f"| {row['dropout']:g} | {row['decay']:g} | {row['loss']:.4f} | {row['best']:.4f} ({row['best_at']:.0%}) "
            f"| {row['train_s']:.0f} |"
        )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, nargs="+", required=True)
    parser.add_argument("--bytes", type=int, nargs="+", default=[1_000_000])
    parser.add_argument("--model", nargs="+", default=["nyx"])
    parser.add_argument("--sizes", nargs="+", default=["tiny"])
    parser.add_argument("--epochs", type=float, nargs="+", default=[4, 8, 12, 16, 24, 32])
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE,VALUE")
    parser.add_argument("--tokenizer", default="byte")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--limit", type=float, default=1e9, help="seconds after which nothing is begun")
    parser.add_argument("--results", type=Path)
    parser.add_argument("--markdown", type=Path)
    args = parser.parse_args()

    import torch

    from nnx_cli.config import PrepareConfig
    from nnx_cli.data.prepare import prepare

    started = time.monotonic()
    visible = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(torch.cuda.device_count())))
    os.environ["NNX_BENCH_GPUS"] = visible.replace(",", " ")
    known = args.results.read_text().splitlines() if args.results and args.results.exists() else []
    rows = [row for line in known if "problem" not in (row := json.loads(line))]
    with tempfile.TemporaryDirectory() as folder:
        tokens = {}
        for text, size in itertools.product(args.text, args.bytes):
            cut, tokens[text, size] = Path(folder) / f"{text.stem}-{size}.txt", Path(folder) / f"{text.stem}-{size}"
            cut.write_bytes(text.read_bytes()[:size])
            prepare([cut], tokens[text, size], PrepareConfig(tokenizer=args.tokenizer))
        wanted = [
            {
                "text": text.stem,
                "bytes": size,
                "model": model,
                "size": shape,
                "epochs": epochs,
                "seed": seed,
                "set": own,
            }
            | {"tokens": str(tokens[text, size])}
            for text, size in itertools.product(args.text, args.bytes)
            for model, shape, epochs in itertools.product(args.model, args.sizes, args.epochs)
            for own in combinations(args.set)
            for seed in range(args.seeds)
        ]
        same = ("text", "bytes", "model", "size", "epochs", "seed", "set")
        there = {json.dumps([row[key] for key in same]) for row in rows}
        wanted = [job for job in wanted if json.dumps([job[key] for key in same]) not in there]
        wanted.sort(key=lambda job: -job["epochs"] * job["bytes"])  # long ones first
        context = multiprocessing.get_context("spawn")
        jobs, done = context.Queue(1), context.Queue()
        workers = [context.Process(target=work, args=(n, jobs, done), daemon=True) for n in range(args.jobs)]
        for worker in workers:
            worker.start()
        waiting = 0
        while wanted or waiting:
            while wanted and time.monotonic() - started < args.limit and not jobs.full():
                jobs.put(wanted.pop(0))
                waiting += 1
            if not waiting:
                break
            try:
                row = done.get(timeout=0.2)
            except Exception:
                continue
            waiting -= 1
            row.pop("tokens")
            rows.append(row)
            print(table([row])[-1], flush=True)
            if args.results:
                with open(args.results, "a") as file:
                    file.write(json.dumps(row) + "\n")
        for _ in workers:
            jobs.put(None)
    lines = table(rows)
    print("\n".join(lines))
    if args.markdown:
        args.markdown.write_text("\n".join([*lines, ""]))


if __name__ == "__main__":
    main()
