"""What a GPU of 8 GB trains: whether the planner's batch fits and a larger one not, a billion parameters, and more.

    python tests/bench/fits.py promise [--models nyx ...]     # 50 steps with the planner's batch, then a fifth more
    python tests/bench/fits.py billion --text FILE            # `nnx train` with a billion parameters, 200 steps
    python tests/bench/fits.py sizes --text FILE [--sizes xl] # `nnx train`, a few steps of every named size
    python tests/bench/fits.py largest [--nanogpt FOLDER]     # the most blocks of the widest size that still train

Needs a GPU, whose allocator is held to what --vram leaves (8GB: 7.25 GiB), so that a larger GPU will do.

promise: each architecture at its default size on a GPU (`small`), micro-batches as large as the planner takes, two to
    a step, optimizer and all else its defaults: op by op, and captured as a CUDA graph (where a graph does not fit,
    training goes on without). Then a fifth more sequences, op by op, which should run out of memory.
billion, sizes: whole commands, each in its own process; validation loss is of the run's own windows at the end.
largest: blocks are added to `xl` while the prediction fits with every rung of the ladder, one sequence of 1024 bytes at
    a time; then three steps are taken under the cap. With --nanogpt the same is done with that project's model and
    optimizer (fp32 weights, bf16 autocast, fused AdamW, not compiled), by trying.

One line of JSON a result, and a table of all lines in --results.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import date
from pathlib import Path
from types import ModuleType
from typing import Any

os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")  # as the command line does

import torch

from nnx_cli import models
from nnx_cli.config import TrainConfig, parse_bytes
from nnx_cli.layers.blocks import checkpoint_blocks
from nnx_cli.optim._build import build_optimizer
from nnx_cli.optim._groups import cast_matrices
from nnx_cli.planning.fit import Predictor, first_that_fits
from nnx_cli.planning.memory import hardware_to_plan_for
from nnx_cli.planning.plan import plan_run
from nnx_cli.system.device import DTYPES, limit_memory, memory_budget, pick_device, release_memory
from nnx_cli.training.step import Step, StepGraphs

STEPS = 50
MANY_ROWS = 720_720  # of a step: more than fit, with many divisors, of which the planner takes one as micro-batch
FEW_STEPS = 4  # of the part `sizes`
BILLION = {  # what `nnx train --size xl` is told besides
    "llama": ["--tokens-per-step", "4096"],
    "nyx": ["--tokens-per-step", "4096"],
    "ngpt": ["--tokens-per-step", "4096", "--optimizer-in-backward"],
}
PEER_WIDTH = dict(n_embd=1280, n_head=20, block_size=1024, vocab_size=256, dropout=0.0, bias=False)


class Session:
    """A model in training as a config says, one micro-step's memory after the other."""

    def __init__(self, name: str, config: models.ModelConfig, train: TrainConfig, device: torch.device) -> None:
        torch.manual_seed(0)
        with torch.device("cpu" if train.weight_precision == "bf16" else device):
            model = models.from_config(name, config)
        if train.weight_precision == "bf16":
            cast_matrices(model, "bf16")
        self.model = model.to(device).train()
        model.compute_dtype = DTYPES[train.precision]
        checkpoint_blocks(model, train.activation_checkpointing)
        train = replace(train, lr=train.lr or 1e-4, weight_decay=train.weight_decay or 0.0)
        scaler = torch.amp.GradScaler("cuda", enabled=False)
        optimizer = build_optimizer(model, train)
        self.step = Step(model, optimizer, scaler, train.grad_clip, train.optimizer_in_backward)
        self.device, self.config = device, config

    def run(self, rows: int, n_micro: int, n_steps: int, captured: bool = False) -> float:
        """Loss after that many steps on random tokens."""
        shape = (rows * n_micro, self.config.seq_len + 1)
        ids = torch.randint(self.config.vocab_size, shape, device=self.device)
        ids, targets = ids[:, :-1].contiguous(), ids[:, 1:].contiguous()
        take = StepGraphs(self.step, ids, targets, rows) if captured else self.step
        for _ in range(n_steps):
            take(ids, targets) if captured else take(ids, targets, rows)
        return self.step.stats.loss.item()


def attempt(make: Callable[[], float]) -> tuple[float | None, int]:
    """What it returns, None where memory ran out, and the most bytes allocated meanwhile."""
    clean()
    try:
        value = make()
    except torch.OutOfMemoryError:
        value = None
    peak = torch.cuda.max_memory_allocated()
    clean()
    return value, peak


def clean() -> None:
    release_memory()
    torch.cuda.reset_peak_memory_stats()


def promise(name: str, device: torch.device, vram: str) -> Iterator[dict[str, Any]]:
    """The planner's micro-batch of a default run, and a fifth more."""
    seq_len = models.make_config(name, size="small").seq_len
    train = TrainConfig(max_steps=STEPS, vram=vram, tokens_per_step=MANY_ROWS * seq_len)
    plan = plan_run(
        name,
        "small",
        {},
        train,
        vocab_size=256,
        train_tokens=10**9,
        val_tokens=10**6,
        device=device,
        precision="bf16",
        sources={},
    )
    rows, predicted = plan.train.batch_size, plan.predict()
    more = math.ceil(1.2 * rows)
    for what, batch_size, captured in (
        ("planned", rows, False),
        ("planned", rows, True),
        ("a fifth more", more, False),
    ):
        loss, peak = attempt(
            lambda n=batch_size, c=captured: Session(name, plan.model_config, plan.train, device).run(n, 2, STEPS, c)
        )
        yield {
            "model": name,
            "what": what,
            "mode": "graph" if captured else "eager",
            "rows": batch_size,
            "optimizer": plan.train.optimizer,
            "checkpointing": plan.train.activation_checkpointing,
            "predicted_bytes": predicted if what == "planned" else None,
            "peak_bytes": peak,
            "result": "out of memory" if loss is None else f"{STEPS} steps",
            "loss": loss,
        }


def billion(name: str, text: Path, vram: str) -> dict[str, Any]:
    """A run of `nnx train` with a billion parameters."""
    return whole_run(name, text, ["--size", "xl", "--max-steps", "200", "--vram", vram, *BILLION[name]])


def sizes(name: str, text: Path, vram: str, wanted: list[str] | None) -> Iterator[dict[str, Any]]:
    """Short runs of `nnx train`, one for every size, or every one that is wanted, as it is by default."""
    for size in models.sizes(name):
        if wanted and size not in wanted:
            continue
        row = whole_run(name, text, ["--size", size, "--max-steps", str(FEW_STEPS), "--vram", vram])
        yield {"size": size} | {key: value for key, value in row.items() if key not in ("command", "val_loss")}


def whole_run(name: str, text: Path, words: list[str]) -> dict[str, Any]:
    """What a run of `nnx train` chose and came to."""
    words = ["--model", name, *words]
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        command = [sys.executable, "-m", "nnx_cli", "train", "--filepath", str(text), *words]
        started = time.perf_counter()
        done = subprocess.run([*command, "--out", str(run)], cwd=folder, capture_output=True, text=True)
        seconds = time.perf_counter() - started
        row = {"model": name, "command": " ".join(["nnx train", *words]), "seconds": round(seconds)}
        if done.returncode:
            return row | {"result": f"exit {done.returncode}: {done.stderr.strip()[-1500:]}"}
        config, status = (json.loads((run / file).read_text()) for file in ("config.json", "run.json"))
        metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        training = config["training"]
        return row | {
            "parameters": config["parameters"],
            "seq_len": config["model"]["seq_len"],
            "rows": training["batch_size"],
            "micro_batches": training["grad_accum"],
            "optimizer": training["optimizer"],
            "weights": training["weight_precision"],
            "checkpointing": training["activation_checkpointing"],
            "compile": training["compile"],
            "tokens_per_s": round(max(line.get("tokens_per_s") or 0 for line in metrics)),
            "peak_bytes": max(line.get("peak_memory_bytes") or 0 for line in metrics),
            "steps": status["step"],
            "val_loss": status["val_loss"],
            "result": "trained",
            "events": "; ".join(status.get("events", [])) or None,
        }


def largest(name: str, device: torch.device, vram: str) -> dict[str, Any]:
    """The deepest `xl` that the prediction lets in, and whether it trains."""
    budget, hardware = memory_budget(device, parse_bytes(vram)), hardware_to_plan_for(device)
    wide = models.make_config(name, size="xl", seq_len=1024)
    ways = [
        TrainConfig(precision="bf16", grad_accum=1, optimizer_in_backward=in_backward) for in_backward in (False, True)
    ]

    def fitting(n_layers: int) -> TrainConfig | None:
        predictor = Predictor(name, replace(wide, n_layers=n_layers), None, hardware)
        for way in ways:
            chosen, _, fits = first_that_fits(predictor, way, 1, budget)
            if fits:
                return chosen
        return None

    low, high = wide.n_layers, 4 * wide.n_layers
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fitting(middle) else (low, middle)
    config, train = replace(wide, n_layers=low), fitting(low)
    session: list[Session] = []

    def steps() -> float:
        session.append(Session(name, config, train, device))
        return session[0].run(1, 1, 3)

    loss, peak = attempt(steps)
    parameters = sum(p.numel() for p in session[0].model.parameters()) if session else None
    return {
        "model": name,
        "parameters": parameters,
        "n_layers": low,
        "dim": config.dim,
        "weights": train.weight_precision,
        "optimizer": train.optimizer,
        "in_backward": train.optimizer_in_backward,
        "peak_bytes": peak,
        "result": "out of memory" if loss is None else "trained",
        "loss": loss,
    }


def largest_peer(folder: Path, device: torch.device) -> dict[str, Any]:
    """The deepest model of nanoGPT's, by trying."""
    module = load(folder / "model.py")
    best: dict[str, Any] = {"model": "nanoGPT", "result": "nothing trained"}
    low, high = 8, 32
    while high - low > 1:
        middle = (low + high) // 2
        found: dict[str, Any] = {}

        def steps(n_layer: int = middle, found: dict[str, Any] = found) -> float:
            torch.manual_seed(0)
            model = module.GPT(module.GPTConfig(n_layer=n_layer, **PEER_WIDTH)).to(device)
            found["parameters"] = sum(p.numel() for p in model.parameters())
            optimizer = model.configure_optimizers(0.1, 1e-4, (0.9, 0.95), "cuda")
            ids = torch.randint(256, (1, 1025), device=device)
            for _ in range(3):
                with torch.autocast("cuda", torch.bfloat16):
                    _, loss = model(ids[:, :-1], ids[:, 1:])
                loss.backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            return loss.item()

        loss, peak = attempt(steps)
        if loss is None:
            high = middle
        else:
            low = middle
            best = {
                "model": "nanoGPT",
                "n_layers": middle,
                "dim": PEER_WIDTH["n_embd"],
                **found,
                "peak_bytes": peak,
                "result": "trained",
                "loss": loss,
            }
    return best


def load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("nanogpt_model", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def table(rows: list[dict[str, Any]]) -> Iterator[str]:
    """Markdown tables of all results, one a part."""
    for part in dict.fromkeys(row["part"] for row in rows):
        own = [row for row in rows if row["part"] == part]
        columns = [key for key in dict.fromkeys(key for row in own for key in row) if key not in ("part", "machine")]
        yield from ("", f"## {part}", "", "; ".join(dict.fromkeys(row["machine"] for row in own)), "")
        yield "| " + " | ".join(column.removesuffix("_bytes") for column in columns) + " |"
        yield "|" + " --- |" * len(columns)
        for row in own:
            yield "| " + " | ".join(cell(column, row.get(column)) for column in columns) + " |"


def cell(column: str, value: Any) -> str:
    if value is None:
        return ""
    if column.endswith("_bytes"):
        return f"{value / 2**30:.2f} GiB"
    return f"{value:.3f}" if isinstance(value, float) else f"{value:,}" if type(value) is int else in_a_line(value)


def in_a_line(value: Any) -> str:
    return " ".join(str(value).split())


def results(options: argparse.Namespace, device: torch.device) -> Iterator[dict[str, Any]]:
    for name in options.models or (BILLION if options.part == "billion" else models.names()):
        if options.part == "promise":
            yield from promise(name, device, options.vram)
        elif options.part == "billion":
            yield billion(name, options.text.resolve(), options.vram)
        elif options.part == "sizes":
            yield from sizes(name, options.text.resolve(), options.vram, options.sizes)
        else:
            yield largest(name, device, options.vram)
    if options.nanogpt:
        yield largest_peer(options.nanogpt, device)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("promise", "billion", "sizes", "largest"))
    parser.add_argument("--models", nargs="*", choices=models.names())
    parser.add_argument("--text", type=Path, help="for billion and sizes")
    parser.add_argument("--sizes", nargs="*", help="for sizes: these alone")
    parser.add_argument("--nanogpt", type=Path, help="for largest: a checkout of nanoGPT")
    parser.add_argument("--vram", default="8GB")
    parser.add_argument("--results", type=Path, default=Path("fits.jsonl"))
    options = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("this needs a GPU")
    device = pick_device("cuda")
    if options.part in ("promise", "largest"):
        limit_memory(device, parse_bytes(options.vram))
    machine = f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}, {options.vram}, {date.today()}"
    for row in results(options, device):
        row = {"part": options.part, "machine": machine} | row
        print(json.dumps(row), file=sys.stderr, flush=True)
        with open(options.results, "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
    print("\n".join(table([json.loads(line) for line in options.results.read_text().splitlines()])))


if __name__ == "__main__":
    main()
