"""nnx beside nanoGPT: time to a loss, and training speed, on the same GPU, the same text and in the same run.

    python tests/bench/against_nanogpt.py --nanogpt FOLDER --text tinyshakespeare.txt [--parts cpu ...]
                                          [--side both|nanogpt|nnx] [--results FILE] [--markdown FILE]

FOLDER is a checkout of https://github.com/karpathy/nanoGPT at 3adf61e1 (MIT), which runs as it is. It needs torch
and numpy. On a GPU both sides live under the same cap, --vram (8GB: 7.25 GiB of the allocator).

parts:
    cpu           nanoGPT's CPU recipe (0.8 million parameters, context 64) and ours of that size
    quality-warm  nanoGPT's character recipe (10.7 million) and ours, after a run that filled the compile cache
    quality-cold  the same with an empty compile cache on each side
    second        like quality-warm on another text: --second FILE, or the language documentation that Python ships
    speed-124m    tokens a second, 124 million parameters, vocabulary 50304, context 1024, best micro-batch, AdamW
    speed-10m     tokens a second, 10.7 million parameters, characters, context 256, best micro-batch, AdamW

Time to a loss: one evaluator judges both, in float32 over the whole validation split in windows of nanoGPT's context.
The target is the loss that nanoGPT itself reaches: of its CPU recipe the last checkpoint's, of its character recipe
1.47 on tinyshakespeare, or its best where it does not get there and on the second text. Its time runs from the start of
its process to the checkpoint that first is at the target (they are copied as they appear). Ours is a whole `nnx train`,
from the start of its process to its end, default recipe, with a length given beforehand: --lengths, from the shortest
on, until a run ends at the target or below. Every length that was tried is a row. On a CPU, which often does other
work too, shares are of processor time.

`against_nanogpt.py --profile PART MODEL MICRO-BATCH` says in what kernels a step of one of our rows for speed spends
its time (no checkout, no text).

Each side of each part is one call where time is short; rows are appended to --results, and every call prints the
tables of all rows that are there. A later row of the same kind replaces an earlier one.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.util
import json
import os
import platform
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from nnx_cli import models
from nnx_cli.config import TrainConfig, parse_bytes
from nnx_cli.data.sources import builtin_corpus
from nnx_cli.experiments import benchmark as bench
from nnx_cli.planning import flops as cost
from nnx_cli.runs.find import find_model
from nnx_cli.runs.load import load_model
from nnx_cli.system.device import RESERVE_BYTES, describe, pick_device, pick_precision
from nnx_cli.training import session

COMMIT = "3adf61e1"
WINDOWS_AT_ONCE = 64
TARGET = 1.47  # of the character recipe on tinyshakespeare: what nanoGPT's README states, rounded
CPU_RECIPE = [
    "config/train_shakespeare_char.py",
    "--device=cpu",
    "--compile=False",
    "--eval_iters=20",
    "--log_interval=1",
    "--block_size=64",
    "--batch_size=12",
    "--n_layer=4",
    "--n_head=4",
    "--n_embd=128",
    "--max_iters=2000",
    "--lr_decay_iters=2000",
    "--dropout=0.0",
]
GPU_RECIPE = ["config/train_shakespeare_char.py"]
LENGTHS = {"cpu": ["200", "250", "300", "400"], "cuda": ["4s", "6s", "9s", "13s", "18s"]}
PEER_BATCHES = {"speed-124m": [6, 8, 10], "speed-10m": [64, 128, 256]}
OUR_BATCHES = {"speed-124m": [8, 10, 12, 14], "speed-10m": [64, 128]}
SHAPES: dict[str, dict[str, dict[str, Any]]] = {  # ours, within 2 % of nanoGPT's parameters
    "speed-124m": {
        "llama": dict(dim=768, n_layers=9, n_heads=6, n_kv_heads=6, ffn_dim=3072, seq_len=1024, vocab_size=50304),
        "nyx": dict(dim=768, n_layers=10, n_heads=6, ffn_dim=3072, seq_len=1024, vocab_size=50304),
    },
    "speed-10m": {
        "llama": dict(dim=384, n_layers=6, n_heads=6, seq_len=256, vocab_size=65),
        "nyx": dict(dim=384, n_layers=5, n_heads=6, seq_len=256, vocab_size=65),
    },
}
PEER_PARAMETERS = {"speed-124m": 124_373_760, "speed-10m": 10_745_088}  # positions included
CAPPED = (
    "import runpy, sys, torch; torch.cuda.set_per_process_memory_fraction({cap} / "
    "torch.cuda.get_device_properties(0).total_memory); sys.argv = sys.argv[1:]; "
    "runpy.run_path(sys.argv[0], run_name='__main__')"
)  # the script as it is, within the cap
PREPARE = (
    "import runpy, sys, types; sys.modules.setdefault('requests', types.ModuleType('requests')); "
    "runpy.run_path(sys.argv[1], run_name='__main__')"
)  # it imports requests, and needs it only where the text is not there


@dataclass
class Place:
    """Where things are: nanoGPT's checkout, texts prepared by its script, runs and compile caches."""

    nanogpt: Path
    work: Path
    text: Path
    vram: str
    device: str
    limit_s: float
    batches: list[int] | None
    second: Path | None  # None: the documentation that Python ships

    def data(self, name: str) -> Path:
        """A text as nanoGPT's prepare.py encodes it: characters, the last tenth for validation."""
        folder = self.work / name
        if not (folder / "val.bin").exists():
            folder.mkdir(parents=True, exist_ok=True)
            source = self.second if name == "second_char" else self.text
            text = builtin_corpus() if source is None else source.read_text(encoding="utf-8")
            (folder / "input.txt").write_text(text, encoding="utf-8")
            shutil.copy(self.nanogpt / "data/shakespeare_char/prepare.py", folder)
            command = [sys.executable, "-c", PREPARE, str(folder / "prepare.py")]
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        return folder

    def cap_bytes(self) -> int:
        return (parse_bytes(self.vram) or 0) - RESERVE_BYTES

    def environment(self, side: str, cold: bool = False) -> dict[str, str]:
        """The environment of a process, with its compile cache: each side's own; empty where `cold`."""
        cache = self.work / f"cache-{side}"
        if cold:
            cache = Path(tempfile.mkdtemp(prefix="cold-", dir=self.work))
        caches = {"TORCHINDUCTOR_CACHE_DIR": str(cache), "TRITON_CACHE_DIR": str(cache / "triton")}
        return os.environ | caches | {"PYTHONUNBUFFERED": "1"}


def tell(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


# nanoGPT's side


def peer_command(place: Place, script: str, *arguments: str) -> list[str]:
    """A script of nanoGPT, under the cap where there is a GPU."""
    capped = ["-c", CAPPED.format(cap=place.cap_bytes())] if place.device == "cuda" else []
    return [sys.executable, *capped, script, *arguments]


@dataclass
class Seen:
    """A process of nanoGPT's: its lines with the seconds at which they came, and copies of its checkpoints."""

    lines: list[tuple[float, str]]
    checkpoints: list[tuple[float, Path]]
    seconds: float
    code: int
    cpu_seconds: float = 0.0


def watch(
    command: list[str], place: Place, environment: dict[str, str], limit_s: float, checkpoint: Path | None = None
) -> Seen:
    """Run a script of nanoGPT to its end or to the time limit. A checkpoint is copied once the next line shows that it
    is written; its time is that of its file."""
    started, clock, used = time.perf_counter(), time.time(), children_cpu_s()
    seen = Seen([], [], 0.0, 0)
    pending = False
    own = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "start_new_session": True}
    with subprocess.Popen(command, cwd=place.nanogpt, env=environment, **own) as process:
        guard = threading.Timer(limit_s, os.killpg, (process.pid, signal.SIGKILL))  # its compile workers too
        guard.start()
        try:
            for line in process.stdout:
                seen.lines.append((time.perf_counter() - started, line.rstrip()))
                if pending and checkpoint is not None and checkpoint.exists():
                    keep(seen, checkpoint, clock)
                pending = line.startswith("saving checkpoint")
            code = process.wait()
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)
            raise
        finally:
            guard.cancel()
        if pending and code == 0 and checkpoint is not None:
            keep(seen, checkpoint, clock)
    seen.seconds, seen.code, seen.cpu_seconds = time.perf_counter() - started, code, children_cpu_s() - used
    return seen


def keep(seen: Seen, checkpoint: Path, clock: float) -> None:
    written = checkpoint.stat().st_mtime
    copy = checkpoint.with_name(f"ckpt-{len(seen.checkpoints)}.pt")
    shutil.copy(checkpoint, copy)
    seen.checkpoints.append((written - clock, copy))


def peer_quality(place: Place, data: Path, recipe: list[str], cold: bool) -> Iterator[dict[str, Any]]:
    """nanoGPT's checkpoints, with the time of each and its loss by the common evaluator."""
    environment = place.environment("nanogpt", cold)
    if place.device == "cuda" and not cold:
        short = ["--max_iters=20", "--eval_iters=2", f"--out_dir={place.work / 'warm'}", f"--dataset={data}"]
        watch(peer_command(place, "train.py", *recipe, *short), place, environment, place.limit_s)
    with tempfile.TemporaryDirectory(dir=place.work) as out:
        command = peer_command(place, "train.py", *recipe, f"--dataset={data}", f"--out_dir={out}")
        seen = watch(command, place, environment, place.limit_s, Path(out) / "ckpt.pt")
        if not seen.checkpoints:
            raise SystemExit("nanoGPT saved no checkpoint:\n" + "\n".join(line for _, line in seen.lines[-15:]))
        if seen.code and place.device == "cpu":
            raise SystemExit(f"nanoGPT did not end within {place.limit_s:.0f} s: give it more, --limit")
        for seconds, path in seen.checkpoints:
            logits, block_size, step = nanogpt_model(place, path)
            loss = common_loss(logits, val_tokens(data), block_size, place.device)
            part = seconds / seen.seconds  # of its processor time, as far as can be told
            yield {
                "side": "nanogpt",
                "step": step,
                "seconds": seconds,
                "cpu_seconds": part * seen.cpu_seconds,
                "loss": loss,
                "block_size": block_size,
            }


def nanogpt_model(place: Place, checkpoint: Path) -> tuple[Callable[[Tensor], Tensor], int, int]:
    """The logits of a checkpoint, by nanoGPT's own class, its context, and its step."""
    spec = importlib.util.spec_from_file_location("nanogpt_model", place.nanogpt / "model.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    found = torch.load(checkpoint, map_location=place.device, weights_only=True)
    state = {name.removeprefix("_orig_mod."): tensor for name, tensor in found["model"].items()}
    model = module.GPT(module.GPTConfig(**found["model_args"])).to(place.device).eval()
    model.load_state_dict(state)
    return (lambda ids: model(ids, ids)[0]), model.config.block_size, found["iter_num"]


def peer_speed(part: str, place: Place) -> Iterator[dict[str, Any]]:
    """Tokens a second of every micro-batch, until one does not fit."""
    deadline = time.monotonic() + place.limit_s
    for batch_size in place.batches or PEER_BATCHES[part]:
        left = deadline - time.monotonic()
        if left < 20:
            tell(f"no time left for nanoGPT at batch {batch_size}")
            return
        measure = bench_speed if part == "speed-124m" else train_speed
        speed, why = measure(place, batch_size, left)
        yield {
            "side": "nanogpt",
            "model": "GPT",
            "parameters": PEER_PARAMETERS[part],
            "batch_size": batch_size,
            "tokens_per_s": speed,
            "problem": why,
        }
        if speed is None:
            return


def bench_speed(place: Place, batch_size: int, limit_s: float) -> tuple[float | None, str | None]:
    """bench.py: 20 steps after 10, on one batch that stays on the device, no clipping."""
    arguments = ["--real_data=False", "--compile=True", f"--batch_size={batch_size}"]
    seen = watch(peer_command(place, "bench.py", *arguments), place, place.environment("nanogpt"), limit_s)
    for _, line in seen.lines:
        if found := re.match(r"time per iteration: ([\d.]+)ms", line):
            return batch_size * 1024 / (float(found[1]) / 1e3), None
    return None, why_it_failed(seen)


def train_speed(place: Place, batch_size: int, limit_s: float) -> tuple[float | None, str | None]:
    """train.py without dropout: 300 steps between two of its log lines, from step 100 on."""
    with tempfile.TemporaryDirectory(dir=place.work) as out:
        arguments = [
            *GPU_RECIPE,
            f"--dataset={place.data('shakespeare_char')}",
            f"--out_dir={out}",
            "--dropout=0.0",
            f"--batch_size={batch_size}",
            "--max_iters=400",
            "--eval_interval=100000",
            "--eval_iters=1",
            "--log_interval=100",
        ]
        seen = watch(peer_command(place, "train.py", *arguments), place, place.environment("nanogpt"), limit_s)
    times = {int(found[1]): at for at, line in seen.lines if (found := re.match(r"iter (\d+): loss", line))}
    if 100 not in times or 400 not in times:
        return None, why_it_failed(seen)
    return 300 * batch_size * 256 / (times[400] - times[100]), None


def why_it_failed(seen: Seen) -> str:
    text = "\n".join(line for _, line in seen.lines)
    if "out of memory" in text.lower():
        return "out of memory"
    return "over the time limit" if seen.code < 0 else "failed: " + " ".join(text.splitlines()[-1:])[:120]


# our side


def our_quality(
    part: str, place: Place, data: Path, names: list[str], lengths: list[str], target: float, block_size: int
) -> Iterator[dict[str, Any]]:
    """Whole runs of `nnx train`, from the shortest length on, until one ends at the target."""
    cold = part == "quality-cold"
    size = ["--size", "nano", "--seq-len", "64"] if part == "cpu" else ["--size", "tiny", "--vram", place.vram]
    environment = place.environment("nnx") if place.device == "cpu" or not cold else None
    for name in names:
        if environment is not None and place.device == "cuda":
            train(place, data, ["--model", name, *size, *length_option(lengths[-1])], environment)
        deadline = time.monotonic() + place.limit_s
        for length in lengths:
            if time.monotonic() > deadline:
                tell(f"no time left for {name} at {length}")
                break
            where = environment or place.environment("nnx", cold=True)
            used = children_cpu_s()
            seconds, run = train(place, data, ["--model", name, *size, *length_option(length)], where)
            used = children_cpu_s() - used
            model = load_model(find_model(str(run)), pick_device(place.device))
            loss = common_loss(model, val_tokens(data), block_size, place.device)
            status = json.loads((run / "run.json").read_text())
            shutil.rmtree(run)
            yield {
                "side": "nnx",
                "model": name,
                "length": length,
                "seconds": seconds,
                "cpu_seconds": used,
                "loss": loss,
                "step": status["step"],
                "tokens": status["tokens"],
                "block_size": block_size,
                "parameters": cost.count_parameters(model)["total"],
            }
            if loss <= target:
                break


def length_option(length: str) -> list[str]:
    """A bare number is a number of steps, everything else a time."""
    return ["--max-steps" if length.isdecimal() else "--max-time", length]


def children_cpu_s() -> float:
    """Processor time of all processes that this one has started and that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def train(place: Place, data: Path, words: list[str], environment: dict[str, str]) -> tuple[float, Path]:
    """Seconds of a whole `nnx train`, and its run folder."""
    run = Path(tempfile.mkdtemp(prefix="run-", dir=place.work)) / "run"
    command = [sys.executable, "-m", "nnx_cli", "train", "--data", str(data), *words, "--out", str(run)]
    started = time.perf_counter()
    done = subprocess.run(
        [*command, "--device", place.device, "--quiet"], env=environment, capture_output=True, text=True
    )
    seconds = time.perf_counter() - started
    if done.returncode:
        raise SystemExit(f"nnx train ended with {done.returncode}: {done.stderr}")
    return seconds, run


def our_speed(part: str, place: Place, names: list[str]) -> Iterator[dict[str, Any]]:
    """Tokens a second of every micro-batch, each in a process of its own, until one does not fit."""
    deadline = time.monotonic() + place.limit_s
    for name in names:
        for batch_size in place.batches or OUR_BATCHES[part]:
            left = deadline - time.monotonic()
            if left < 10:
                tell(f"no time left for {name} at batch {batch_size}")
                return
            asked = [part, name, str(batch_size), place.device, place.vram]
            command = [sys.executable, __file__, "--measure", *asked]
            pipes = {"stdout": subprocess.PIPE, "text": True, "timeout": left}
            try:
                done = subprocess.run(command, env=place.environment("nnx"), **pipes)
            except subprocess.TimeoutExpired:
                tell(f"{name} at batch {batch_size}: over the time limit")
                break
            row = json.loads(done.stdout) if done.returncode == 0 else {"problem": "failed"}
            yield {"side": "nnx", "model": name, "batch_size": batch_size, "tokens_per_s": None} | row
            if row["problem"]:
                break


def bench_case(part: str, name: str, batch_size: str, device: str, vram: str) -> tuple[bench.Case, TrainConfig]:
    """A shape of ours and how it trains: AdamW, compiled on a GPU, on random tokens."""
    where = pick_device(device)
    config = TrainConfig(device=device, vram=vram, optimizer="adamw", compile="on" if where.type == "cuda" else "off")
    session.configure_device(config)
    shape = models.make_config(name, **SHAPES[part][name])
    return bench.Case(name, None, shape, pick_precision("auto", where), int(batch_size)), config


def measure(part: str, name: str, batch_size: str, device: str, vram: str) -> None:
    """Print the speed of one shape and micro-batch as JSON: the trainer's own steps."""
    where = pick_device(device)
    case, config = bench_case(part, name, batch_size, device, vram)
    precision = case.precision
    limits = bench.measure_limits(where, [precision], 1.0)
    row = bench.attempt(case, "training", lambda: bench.training(case, config, where, limits, 3.0, tell))
    total = row.parameters
    if abs(total / PEER_PARAMETERS[part] - 1) > 0.02:
        raise SystemExit(f"{name} has {total:,} parameters, nanoGPT {PEER_PARAMETERS[part]:,}")
    print(
        json.dumps(
            {
                "parameters": total,
                "tokens_per_s": row.tokens_per_s,
                "problem": row.problem,
                "compile": row.compile,
                "share": row.share,
                "matrix_flops": limits.flops[precision],
                "peak_memory_bytes": row.peak_memory_bytes,
            }
        )
    )


KERNELS = {"matrix products": r"nvjet|gemm|cutlass_|splitk", "attention": r"flash|fmha|attention"}
PROFILED_STEPS = 10


def profile(part: str, name: str, batch_size: str, device: str = "cuda", vram: str = "8GB") -> str:
    """What the kernels of a step take on a GPU, as a table: products, attention, then every other one by its name."""
    case, config = bench_case(part, name, batch_size, device, vram)
    trainer = bench.make_trainer(case, config, pick_device(device), tell)
    for _ in range(PROFILED_STEPS):
        bench.take_step(trainer)
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        for _ in range(PROFILED_STEPS):
            bench.take_step(trainer)
        torch.cuda.synchronize()
    events = [e for e in profiler.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    groups: dict[str, list[float]] = {}
    for event in events:
        group = next((g for g, words in KERNELS.items() if re.search(words, event.name, re.I)), event.name[:70])
        groups.setdefault(group, []).append(event.time_range.elapsed_us())
    begun, ended = min(e.time_range.start for e in events), max(e.time_range.end for e in events)
    lines = ["| kernels | a step | ms |", "| --- | ---: | ---: |"]
    lines += [
        f"| {group} | {len(times) / PROFILED_STEPS:g} | {sum(times) / PROFILED_STEPS / 1e3:.3f} |"
        for group, times in sorted(groups.items(), key=lambda item: -sum(item[1]))
    ]
    busy = sum(map(sum, groups.values()))
    lines.append(f"| all | {len(events) / PROFILED_STEPS:g} | {busy / PROFILED_STEPS / 1e3:.3f} |")
    lines.append(f"| by the clock | | {(ended - begun) / PROFILED_STEPS / 1e3:.3f} |")
    return "\n".join(lines)


# what both sides share


@torch.no_grad()
def common_loss(
    logits: Callable[[Tensor], Tensor], tokens: np.ndarray, seq_len: int, device: torch.device | str
) -> float:
    """Nats a token over a whole split: windows of `seq_len` from the first token on, each read from its own start, the
    last one shorter; every token but the first is a target. `logits` maps ids (B, T) to (B, T, V)."""
    stream = torch.from_numpy(tokens.astype(np.int64))
    ids, targets = stream[:-1], stream[1:]
    whole = len(ids) // seq_len * seq_len
    windows = [part[:whole].view(-1, seq_len).split(WINDOWS_AT_ONCE) for part in (ids, targets)]
    pieces = [*zip(*windows, strict=True)]
    if whole < len(ids):
        pieces.append((ids[None, whole:], targets[None, whole:]))
    total = 0.0
    for x, y in pieces:
        predicted = logits(x.to(device)).flatten(0, 1).float()
        total += F.cross_entropy(predicted, y.to(device).flatten(), reduction="sum").item()
    return total / len(ids)


def val_tokens(folder: Path) -> np.ndarray:
    """The validation split of a folder of nanoGPT's."""
    return np.fromfile(folder / "val.bin", dtype=np.uint16)


def quality(part: str, place: Place, options: argparse.Namespace, known: list[dict[str, Any]]) -> Iterator[dict]:
    """Rows of a part that asks for the time to a loss."""
    data = place.data("second_char" if part == "second" else "shakespeare_char")
    rows = [row for row in known if row["part"] == part and row["side"] == "nanogpt"]
    if options.side in ("both", "nanogpt"):
        recipe = CPU_RECIPE if part == "cpu" else GPU_RECIPE
        rows = []
        for row in peer_quality(place, data, recipe, cold=part == "quality-cold"):
            rows.append(row)
            yield row
    if options.side in ("both", "nnx"):
        if not rows:
            raise SystemExit(f"{part}: nanoGPT's side has not run yet: --side nanogpt")
        aim = target(part, rows)
        tell(f"{part}: the target is {aim:.4f}")
        lengths = options.lengths or LENGTHS[place.device]
        yield from our_quality(part, place, data, options.models or ["nyx"], lengths, aim, rows[0]["block_size"])


def target(part: str, rows: Iterable[dict[str, Any]]) -> float:
    """The loss to reach: where nanoGPT's CPU recipe ends; else the best it saw, but no better than 1.47 is asked."""
    losses = [row["loss"] for row in rows]
    if part == "cpu":
        return losses[-1]
    return min(losses) if part == "second" else max(TARGET, min(losses))


def speed(part: str, place: Place, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Rows of a part that asks for tokens a second."""
    if place.device != "cuda":
        raise SystemExit(f"{part} needs a GPU")
    if options.side in ("both", "nanogpt"):
        yield from peer_speed(part, place)
    if options.side in ("both", "nnx"):
        yield from our_speed(part, place, [name for name in SHAPES[part] if name in (options.models or SHAPES[part])])


# the report


def rows_of(path: Path) -> list[dict[str, Any]]:
    """All rows so far, of every kind the newest."""
    found = {}
    if path.exists():
        for line in path.read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            kind = ("part", "side", "model", "length", "batch_size") + (("step",) if row["side"] == "nanogpt" else ())
            key = tuple(str(row.get(field)) for field in kind)
            if row["side"] == "nanogpt" and "loss" in row:  # a run replaces an earlier run's checkpoints
                found = {k: r for k, r in found.items() if not stale(r, row)}
            found[key] = row
    return list(found.values())


def stale(old: dict[str, Any], new: dict[str, Any]) -> bool:
    return (old["part"], old["side"]) == (new["part"], new["side"]) and old["call"] != new["call"]


def report(rows: list[dict[str, Any]]) -> str:
    """Markdown tables of all parts that have rows."""
    lines = [
        "# Beside nanoGPT",
        "",
        "Made by [against_nanogpt.py](against_nanogpt.py), which says what is compared and how.",
    ]
    for part in PARTS:
        own = [row for row in rows if row["part"] == part]
        if own:
            lines += ["", f"## {part}", "", own[-1]["machine"], ""]
            lines += speed_table(part, own) if part.startswith("speed") else quality_table(part, own)
    return "\n".join(lines) + "\n"


def quality_table(part: str, rows: list[dict[str, Any]]) -> Iterator[str]:
    peers = [row for row in rows if row["side"] == "nanogpt"]
    aim = target(part, peers) if peers else float("nan")
    clock = "cpu_seconds" if part == "cpu" else "seconds"
    first = next((row for row in peers if row["loss"] <= aim), None)
    yield "| side | length | step | seconds from the start | processor s | loss | at the target | of nanoGPT's time |"
    yield "| --- | --- | ---: | ---: | ---: | ---: | --- | ---: |"
    for row in rows:
        peer = row["side"] == "nanogpt"
        if peer and row is not first and row["loss"] > min(r["loss"] for r in peers) and row is not peers[-1]:
            continue
        length = "recipe" if peer else row["length"] + (" steps" if row["length"].isdecimal() else "")
        name = "nanoGPT" if peer else f"nnx `{row['model']}`, {row['parameters'] / 1e6:.2f} M"
        share = "" if first is None or peer else f"{row[clock] / first[clock]:.0%}"
        mark = "first" if row is first else "yes" if row["loss"] <= aim else "no"
        yield (
            f"| {name} | {length} | {row['step']:,} | {row['seconds']:.1f} | "
            f"{row['cpu_seconds']:.1f} | {row['loss']:.4f} | "
            f"{mark} | {share} |"
        )
    if peers:
        yield ""
        yield f"Target: {aim:.4f}."


def speed_table(part: str, rows: list[dict[str, Any]]) -> Iterator[str]:
    peers = [row["tokens_per_s"] for row in rows if row["side"] == "nanogpt" and row["tokens_per_s"]]
    best = max(peers, default=float("nan"))
    yield "| side | parameters | micro-batch | tokens/s | of nanoGPT's best | share of matrix products | peak GiB |"
    yield "| --- | ---: | ---: | ---: | ---: | ---: | ---: |"
    for row in rows:
        name = "nanoGPT" if row["side"] == "nanogpt" else f"nnx `{row['model']}`"
        speed = row["tokens_per_s"]
        share, peak = row.get("share"), row.get("peak_memory_bytes")
        size = f"{row['parameters'] / 1e6:.2f} M" if "parameters" in row else ""
        yield (
            f"| {name} | {size} | {row['batch_size']} | "
            f"{f'{speed:,.0f}' if speed else row['problem']} | {f'{speed / best:.2f}' if speed else ''} | "
            f"{f'{share:.0%}' if share else ''} | {f'{peak / 2**30:.2f}' if peak else ''} |"
        )


PARTS = ("cpu", "quality-warm", "quality-cold", "second", "speed-124m", "speed-10m")


def main() -> None:
    if sys.argv[1:2] == ["--measure"]:
        measure(*sys.argv[2:])
        return
    if sys.argv[1:2] == ["--profile"]:
        print(profile(*sys.argv[2:]))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nanogpt", type=Path, required=True)
    parser.add_argument("--text", type=Path, required=True, help="tinyshakespeare")
    parser.add_argument("--second", type=Path, help="the text of the part `second`")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--parts", nargs="+", choices=PARTS, help="default: cpu on a CPU, the others on a GPU")
    parser.add_argument("--side", choices=("both", "nanogpt", "nnx"), default="both")
    parser.add_argument("--models", nargs="+", choices=models.names(), help="ours; default: nyx, for speed llama too")
    parser.add_argument(
        "--lengths", nargs="+", help=f"of ours, shortest first: times, or numbers of steps; default {LENGTHS}"
    )
    parser.add_argument("--batches", nargs="+", type=int, help="micro-batches to try for speed, smallest first")
    parser.add_argument("--vram", default="8GB")
    parser.add_argument("--limit", type=float, help="seconds of a side of a part; default 110, and 600 on a CPU")
    parser.add_argument("--work", type=Path, help="for texts and compile caches; default: a folder that is removed")
    parser.add_argument("--results", type=Path, default=Path("against_nanogpt.jsonl"))
    parser.add_argument("--note", help="a sentence about the machine, for the table")
    parser.add_argument("--markdown", type=Path)
    options = parser.parse_args()
    parts = options.parts or [part for part in PARTS if (part == "cpu") == (options.device == "cpu")]
    limit = options.limit or (600.0 if options.device == "cpu" else 110.0)
    call = datetime.datetime.now().isoformat(timespec="seconds")
    with tempfile.TemporaryDirectory() as temporary:
        work = (options.work or Path(temporary)).resolve()
        work.mkdir(parents=True, exist_ok=True)
        place = Place(
            options.nanogpt.resolve(),
            work,
            options.text.resolve(),
            options.vram,
            options.device,
            limit,
            options.batches,
            options.second and options.second.resolve(),
        )
        machine = (
            f"{describe(pick_device(options.device))}, torch {torch.__version__}, Python {platform.python_version()}, "
            f"nanoGPT {COMMIT}, {call[:10]}.{' ' + options.note if options.note else ''}"
        )
        for part in parts:
            found = (
                speed(part, place, options)
                if part.startswith("speed")
                else quality(part, place, options, rows_of(options.results))
            )
            for row in found:
                row = {"part": part, "call": call, "machine": machine} | row
                tell(", ".join(f"{key} {value}" for key, value in row.items() if key not in ("call", "machine")))
                with open(options.results, "a", encoding="utf-8") as file:
                    file.write(json.dumps(row) + "\n")
    text = report(rows_of(options.results))
    print(text)
    if options.markdown:
        options.markdown.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
