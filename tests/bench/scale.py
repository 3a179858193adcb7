"""How training scales with GPUs: speed, memory, what communication costs, a model too large for one, and kills.

    python tests/bench/scale.py speed  [--gpus 1,2,4,8] [--models llama,nyx] [--parallel ddp,fsdp]
    python tests/bench/scale.py capped [--gpus 2] [--vram 4.75GB] [--resume-on 2 [--resume-vram 24GB]] [-- ...]
    python tests/bench/scale.py kills  [--gpus 2] [--kills 10]
    python tests/bench/scale.py sent   [--gpus 2] [--models llama,nyx] [--parallel ddp,fsdp]
    python tests/bench/scale.py predict [--gpus 2,8] [--models nyx,llama] --alone-ms 89.8,101.9 --batch-size 8

Every part drives the command itself, `nnx train --gpus N --parallel …`, on the text of --filepath or the built-in one,
and prints a table in Markdown (--markdown FILE appends it there), with lines of JSON in --results. On a machine without
GPUs: --device cpu --size nano --seq-len 64 --rows 4 --batch-size 2, where processes take turns on the cores.

speed: each GPU takes --rows sequences of --seq-len tokens a step, --batch-size at a time, on one GPU as on many.
    Efficiency is tokens a second beside as many times those of one GPU in the same call. Bytes are those that a GPU
    sends in a step; `sending` is the part of a step that they would take at the bandwidth that an all-reduce reached
    just before, `waiting` the part of a step by which it is longer than on one GPU. The model of communication says
    what follows for more GPUs if nothing is hidden behind computing and, for FSDP, which gathers the next block
    meanwhile, if all is that can be. Memory is the peak of the first rank, of its allocator (on a CPU of its process),
    and on GPUs what nvidia-smi saw on each.
capped: what one GPU held to --vram refuses trains on all of --gpus so held, 50 steps; then goes on on fewer. With
    4.75GB the allocator may take 4 GiB. What follows -- is a model of 3 billion parameters, say, for four GPUs:
    --gpus 4 --vram 16.75GB --resume-on 2 --resume-vram 32GB -- --model llama --dim 3072 --n-layers 27 --n-heads 24
kills: one process of `torchrun --max-restarts` is killed at a random moment after its first step, in one run after the
    other; losses are set beside those of a run that nobody disturbed.
sent: the bytes that a process sends in a step, counted at the calls of torch.distributed, beside that model. They are
    the same on every device, so that CPUs will do: --device cpu --size nano --seq-len 64 --rows 4 --batch-size 2.
predict: what the model of communication says where there is one GPU or none: of a step whose time --alone-ms on one GPU
    is known, with links of the bandwidths --gb-per-s and a --latency-us of each message, which are assumed.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from nnx_cli import models
from nnx_cli.data.sources import builtin_corpus
from nnx_cli.optim._groups import hidden_matrices
from nnx_cli.planning.flops import count_parameters, meta_model
from nnx_cli.planning.recipe.training import preferred_optimizer
from nnx_cli.system.device import describe, pick_device
from nnx_cli.system.ranks import BUCKET_BYTES

NNX = (sys.executable, "-m", "nnx_cli")
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone")
PREDICTED = (4, 8)  # GPUs that the model of communication speaks of
SMALL_BYTES = 4096  # of one that is all latency
TRIALS = 10
RESTARTS = 3
MORE_STEPS = 10  # of a run that is resumed on fewer GPUs
QUIET = ("--sample-every", "0", "--val-batches", "1", "--no-report", "--no-watch")


@dataclass(frozen=True)
class Link:
    """What an all-reduce of so many processes reached: seconds of a small one, and bytes a second that each sends."""

    n: int
    latency_s: float
    bytes_per_s: float

    def seconds(self, sent: float, n_messages: int) -> float:
        """Of messages that make each process send so many bytes."""
        return n_messages * self.latency_s + sent / self.bytes_per_s


@dataclass(frozen=True)
class Traffic:
    """What a model sends in a step of `n_micro` micro-batches, in fp32: `inside` bytes are of its blocks, which go one
    by one, `outside` of all else. Muon works on `n_elements` of its matrices, in so many bytes each."""

    inside: int
    outside: int
    n_blocks: int
    n_micro: int
    n_elements: int
    n_bytes: int

    def sent(self, parallel: str, n: int) -> float:
        """Bytes that each of `n` GPUs sends in a step. A ring: an all-reduce sends all but an nth part twice, an
        all-gather and a reduce-scatter once. FSDP gathers a block's weights for each forward and each backward pass,
        all else once for both. Muon's updates are gathered, and before that momenta that are divided, in fp32."""
        updates = self.n_bytes * self.n_elements
        if parallel == "ddp":
            return (n - 1) / n * (2 * (self.inside + self.outside) + updates)
        weights = self.n_micro * (3 * self.inside + 2 * self.outside)
        return (n - 1) / n * (weights + 4 * self.n_elements + updates)

    def messages(self, parallel: str) -> int:
        """Collective operations in a step, without Muon's few."""
        if parallel == "ddp":
            return math.ceil((self.inside + self.outside) / BUCKET_BYTES)
        return self.n_micro * (3 * self.n_blocks + 2)


def predicted(traffic: Traffic, link: Link, parallel: str, n: int, alone_s: float) -> tuple[float, float]:
    """Efficiency of `n` GPUs whose step takes `alone_s` on one: if no communication hides behind computing, and if all
    does that can. DDP sends when the backward pass is over."""
    sending = link.seconds(traffic.sent(parallel, n), traffic.messages(parallel))
    hidden = alone_s + sending if parallel == "ddp" else max(alone_s, sending)
    return alone_s / (alone_s + sending), alone_s / hidden


def probe(device: str) -> None:
    """One of several processes: time all-reduces, and print what they reach."""
    rank, n = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    place = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if device == "cuda" else torch.device("cpu")
    if device == "cuda":
        torch.cuda.set_device(place)
    dist.init_process_group("nccl" if device == "cuda" else "gloo")
    took = {}
    for n_bytes in (SMALL_BYTES, BUCKET_BYTES):
        message, times = torch.zeros(n_bytes // 4, device=place), []
        for _ in range(TRIALS + 3):
            dist.barrier()
            started = time.perf_counter()
            dist.all_reduce(message)
            if device == "cuda":
                torch.cuda.synchronize()
            times.append(time.perf_counter() - started)
        took[n_bytes] = statistics.median(times[3:])
    sent = 2 * (n - 1) / n * BUCKET_BYTES
    if rank == 0:
        speed = sent / max(1e-9, took[BUCKET_BYTES] - took[SMALL_BYTES])
        print(json.dumps({"n": n, "latency_s": took[SMALL_BYTES], "bytes_per_s": speed}))
    dist.destroy_process_group()


class Counter(TorchDispatchMode):
    """Counts the bytes that a rank sends in collective operations, if they go around a ring."""

    def __init__(self, n: int) -> None:
        super().__init__()
        self.share = (n - 1) / n
        self.sent = 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func)
        if name.startswith("c10d.allreduce_"):
            self.sent += 2 * self.share * sum(tensor.nbytes for tensor in args[0])
        elif name.startswith("c10d.allgather_"):
            self.sent += self.share * sum(tensor.nbytes for tensor in args[0][0])
        elif name.startswith("c10d._allgather_base_"):
            self.sent += self.share * args[0].nbytes
        elif name.startswith("c10d._reduce_scatter_base_"):
            self.sent += self.share * args[1].nbytes
        elif name.startswith("c10d."):
            raise ValueError(f"not counted yet: {name}")
        return func(*args, **(kwargs or {}))


def count(words: list[str]) -> None:
    """One of several processes of `nnx train`: the first one prints the bytes that a step sends."""
    from nnx_cli.__main__ import main
    from nnx_cli.training.step import Step

    counter, n_steps, take = Counter(int(os.environ["WORLD_SIZE"])), 0, Step.__call__

    def counted(self: Step, *args: Any) -> None:
        nonlocal n_steps
        n_steps += 1
        with counter:
            take(self, *args)

    Step.__call__ = counted  # type: ignore[method-assign]
    sys.argv[1:] = words
    try:
        main()
    finally:
        if os.environ["RANK"] == "0":
            print(json.dumps({"sent_bytes": counter.sent / max(1, n_steps)}), file=sys.stderr)


def measure_link(n: int, device: str) -> Link:
    """What an all-reduce between `n` processes of this machine reaches."""
    command = [*TORCHRUN, "--nproc-per-node", str(n), __file__, "probe", "--device", device]
    return Link(**json.loads(checked(command).splitlines()[-1]))


def checked(command: list[str]) -> str:
    """Standard output of a command that has to succeed."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(command)}\nended with {done.returncode}:\n{done.stderr[-3000:]}")
    return done.stdout


class GpuMemory:
    """The most bytes in use on each GPU, as nvidia-smi sees them, while this context lasts; none without it."""

    def __init__(self) -> None:
        self.most: list[int] = []
        self._ended = threading.Event()
        self._watcher = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> GpuMemory:
        if shutil.which("nvidia-smi"):
            self._watcher.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._ended.set()
        if self._watcher.ident is not None:
            self._watcher.join()

    def _watch(self) -> None:
        command = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
        while not self._ended.wait(0.5):
            used = [int(line) * 2**20 for line in checked(command).split()]
            self.most = [max(pair) for pair in zip(used, self.most or used, strict=True)]


def train(options: argparse.Namespace, out: Path, *more: str) -> list[str]:
    """The words of a run after `nnx`."""
    return [
        "train",
        "--data",
        str(options.data),
        "--out",
        str(out),
        "--device",
        options.device,
        *QUIET,
        *more,
        "--json",
    ]


def on_gpus(n: int, parallel: str | None = None) -> tuple[str, ...]:
    """Options of a run on `n` GPUs."""
    return ("--gpus", str(n), *(("--parallel", parallel) if parallel else ())) if n > 1 else ()


def records(run: Path) -> list[dict[str, Any]]:
    """The lines of a run's log that have a loss of training."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [line for line in lines if line["train_loss"] is not None]


def speed_of(run: Path) -> float:
    """Tokens a second in the second half of a run."""
    lines = records(run)
    first, last = lines[len(lines) // 2 - 1], lines[-1]
    return (last["tokens"] - first["tokens"]) / (last["time_s"] - first["time_s"])


def of_size(name: str, options: argparse.Namespace) -> tuple[str, ...]:
    """Options of a model in the part `speed`."""
    return ("--model", name, "--size", options.size, "--seq-len", str(options.seq_len), "--dropout", "0")


def traffic_of(name: str, options: argparse.Namespace) -> Traffic:
    """What the model sends in a step, in fp32."""
    model = meta_model(name, models.make_config(name, size=options.size, seq_len=options.seq_len))
    inside = 4 * sum({id(p): p.numel() for p in model.blocks.parameters()}.values())
    outside = 4 * count_parameters(model)["total"] - inside
    matrices = hidden_matrices(model) if preferred_optimizer(name, None) == "muon" else ()
    n_micro, n_elements = -(-options.rows // options.batch_size), sum(p.numel() for p in matrices)
    n_bytes = 4 if options.device == "cpu" else 2  # of Muon's arithmetic
    return Traffic(inside, outside, len(model.blocks), n_micro, n_elements, n_bytes)


def sent(options: argparse.Namespace, folder: Path) -> Iterator[dict[str, Any]]:
    """The bytes that a rank sends in a step, counted where they go out, beside what the model of communication says."""
    for name in options.models:
        for n in options.gpus:
            for parallel in options.parallel:
                tokens, out = n * options.rows * options.seq_len, folder / f"{name}-{parallel}-{n}"
                steps = ("--max-steps", "2", "--tokens-per-step", str(tokens), "--batch-size", str(options.batch_size))
                words = train(options, out, *of_size(name, options), *steps, "--parallel", parallel, "--compile", "off")
                command = [*TORCHRUN, "--nproc-per-node", str(n), __file__, "count", "--", *words]
                told = subprocess.run(command, capture_output=True, text=True, check=False)
                if told.returncode:
                    sys.exit(told.stderr[-3000:])
                counted = json.loads(told.stderr.splitlines()[-1])["sent_bytes"]
                said = traffic_of(name, options).sent(parallel, n)
                yield {"model": name, "gpus": n, "parallel": parallel, "counted": counted, "model_says": said}


def sent_table(rows: list[dict[str, Any]]) -> str:
    """The rows of `sent` in Markdown."""
    lines = ["| model | processes | | counted, KiB a step | by the model | |", "|" + 6 * "---|"]
    for row in rows:
        counted, said = row["counted"], row["model_says"]
        start = f"| {row['model']} | {row['gpus']} | {row['parallel']} | {counted / 1024:,.1f} | {said / 1024:,.1f} |"
        lines.append(f"{start} {said / counted - 1:+.1%} |")
    return "\n".join(lines)


def speed(options: argparse.Namespace, folder: Path) -> Iterator[dict[str, Any]]:
    """Speed and memory of each model on each number of GPUs in each way."""
    counts = sorted({1, *options.gpus})
    links = {n: measure_link(n, options.device) for n in counts if n > 1}
    for name in options.models:
        traffic, alone_s = traffic_of(name, options), 0.0
        for n in counts:
            for parallel in options.parallel if n > 1 else (None,):
                out, tokens = folder / f"{name}-{parallel}-{n}", n * options.rows * options.seq_len
                steps = ("--max-steps", str(options.steps), "--tokens-per-step", str(tokens))
                batch = ("--batch-size", str(options.batch_size), *steps, "--val-every", str(options.steps))
                words = (*on_gpus(n, parallel), *of_size(name, options), *batch, *options.more)
                with GpuMemory() as memory:
                    checked([*NNX, *train(options, out, *words)])
                found = speed_of(out)
                step_s = tokens / found
                alone_s = alone_s or step_s
                row = {"model": name, "gpus": n, "parallel": parallel, "tokens_per_s": found, "step_s": step_s}
                row |= {"efficiency": alone_s / step_s, "peak_memory_bytes": records(out)[-1]["peak_memory_bytes"]}
                row["gpu_memory_bytes"] = memory.most[:n]
                if parallel:
                    sent, link = traffic.sent(parallel, n), links[n]
                    row |= {"sent_bytes": sent, "sending": link.seconds(sent, traffic.messages(parallel)) / step_s}
                    row |= {"waiting": 1 - alone_s / step_s, "link_bytes_per_s": link.bytes_per_s}
                    row["link_latency_s"] = link.latency_s
                    row["predicted"] = {m: predicted(traffic, link, parallel, m, alone_s) for m in (n, *PREDICTED)}
                yield row
                shutil.rmtree(out)


def speed_table(rows: list[dict[str, Any]]) -> str:
    """The rows of `speed` in Markdown."""
    columns = "model|GPUs||tokens/s|efficiency|peak of a GPU|nvidia-smi, GiB|sent a step|sending|waiting|by the model"
    lines = [f"|{columns}|", "|" + 11 * "---|"]
    for row in rows:
        seen = " ".join(f"{n_bytes / 2**30:.2f}" for n_bytes in row["gpu_memory_bytes"])
        start = f"| {row['model']} | {row['gpus']} | {row['parallel'] or ''} | {row['tokens_per_s']:,.0f} | "
        start += f"{row['efficiency']:.1%} | {row['peak_memory_bytes'] / 2**30:.2f} GiB | {seen} |"
        if not row["parallel"]:
            lines.append(f"{start} | | | |")
            continue
        model = ", ".join(f"{n}: {plain:.1%} to {hidden:.1%}" for n, (plain, hidden) in row["predicted"].items())
        lines.append(
            f"{start} {row['sent_bytes'] / 2**20:,.0f} MiB at {row['link_bytes_per_s'] / 1e9:.2f} GB/s | "
            f"{row['sending']:.1%} | {row['waiting']:.1%} | {model} |"
        )
    return "\n".join(lines)


def capped(options: argparse.Namespace, folder: Path) -> Iterator[dict[str, Any]]:
    """A model that one GPU refuses, on several; then on fewer, from its checkpoint."""
    n, out = max(options.gpus), folder / "capped"
    model = options.more or ["--model", "llama", "--size", "xl"]
    length = ("--vram", options.vram, "--max-steps", str(options.steps), "--val-every", str(options.steps))
    alone = [*NNX, *train(options, folder / "alone", *model, *length)]
    refused = subprocess.run(alone, capture_output=True, text=True, check=False)
    said = next((line for line in refused.stderr.splitlines() if line.startswith("nnx: ")), "")
    yield {"gpus": 1, "exit_code": refused.returncode, "said": said}
    with GpuMemory() as memory:
        status = json.loads(checked([*NNX, *train(options, out, *on_gpus(n), *model, *length)]))
    yield capped_row(out, n, status, memory)
    if options.resume_on:
        more = ["--resume", str(out), *on_gpus(options.resume_on), "--max-steps", str(options.steps + MORE_STEPS)]
        more += ["--vram", options.resume_vram] if options.resume_vram else []
        with GpuMemory() as memory:
            status = json.loads(checked([*NNX, "train", *more, "--device", options.device, "--json"]))
        yield capped_row(out, options.resume_on, status, memory)


def capped_row(run: Path, n: int, status: dict[str, Any], memory: GpuMemory) -> dict[str, Any]:
    """What a run came to."""
    lines = records(run)
    first, last = ((line["step"], line["train_loss"]) for line in (lines[0], lines[-1]))
    row = {"gpus": n, "exit_code": 0, "parameters": status["parameters"], "first": first, "last": last}
    row |= {"tokens_per_s": speed_of(run), "peak_memory_bytes": lines[-1]["peak_memory_bytes"]}
    return row | {"gpu_memory_bytes": memory.most[:n]}


def capped_table(rows: list[dict[str, Any]]) -> str:
    """The rows of `capped` in Markdown."""
    lines = ["| GPUs | exit code | |", "|---|---|---|"]
    for row in rows:
        if "said" in row:
            lines.append(f"| {row['gpus']} | {row['exit_code']} | {row['said']} |")
            continue
        seen = " ".join(f"{n_bytes / 2**30:.2f}" for n_bytes in row["gpu_memory_bytes"])
        (first, before), (last, after) = row["first"], row["last"]
        lines.append(
            f"| {row['gpus']} | 0 | {row['parameters']:,} parameters: loss {before:.3f} at step {first}, "
            f"{after:.3f} at step {last}; {row['tokens_per_s']:,.0f} tokens/s, peak "
            f"{row['peak_memory_bytes'] / 2**30:.2f} GiB (nvidia-smi {seen or 'not there'}) |"
        )
    return "\n".join(lines)


def kills(options: argparse.Namespace, folder: Path) -> Iterator[dict[str, Any]]:
    """Runs of which a process is killed, beside one that nobody disturbs."""
    draw = random.Random(options.seed)
    with elastic(options, folder / "plain") as plain:
        started = first_step(plain, folder / "plain")
        if plain.wait():
            sys.exit((folder / "plain.log").read_text(encoding="utf-8")[-3000:])
    usual_s = time.monotonic() - started
    wanted = {line["step"]: line["train_loss"] for line in records(folder / "plain")}
    for number in range(1, options.kills + 1):
        out = folder / f"killed-{number}"
        with elastic(options, out) as process:
            started = first_step(process, out)
            time.sleep(draw.uniform(0, usual_s))
            reached, workers = records(out)[-1]["step"], children(process.pid)
            if workers:
                os.kill(draw.choice(workers), signal.SIGKILL)
            row = {"kill": number, "killed": bool(workers), "after_step": reached, "exit_code": process.wait()}
        row["of_usual_time"] = (time.monotonic() - started) / usual_s
        if row["exit_code"] == 0:
            found = {line["step"]: line["train_loss"] for line in records(out)}
            row["steps_alike"] = found.keys() == wanted.keys()
            row["largest_difference"] = max(abs(found[step] - wanted[step]) for step in found.keys() & wanted.keys())
        yield row


def first_step(process: subprocess.Popen[bytes], run: Path) -> float:
    """The moment when a run has logged a step. Ends this program where the run ends before."""
    while not (run / "metrics.jsonl").exists() or not records(run):
        if process.poll() is not None:
            sys.exit(run.with_suffix(".log").read_text(encoding="utf-8")[-3000:])
        time.sleep(0.1)
    return time.monotonic()


def elastic(options: argparse.Namespace, out: Path) -> subprocess.Popen[bytes]:
    """A run started by torchrun, which starts it anew where a process dies."""
    n = max(options.gpus)
    model = options.more or ["--model", "llama", "--size", options.size, "--seq-len", str(options.seq_len)]
    length = ["--max-steps", str(options.steps), "--save-every", str(max(1, options.steps // 10))]
    words = train(options, out, *model, *length, "--dropout", "0", "--deterministic")
    command = [*TORCHRUN, "--nproc-per-node", str(n), "--max-restarts", str(RESTARTS), "-m", "nnx_cli", *words]
    with out.with_suffix(".log").open("wb") as log:
        return subprocess.Popen(command, stdout=log, stderr=log)


def children(pid: int) -> list[int]:
    """Processes that a process has started."""
    found = subprocess.run(["pgrep", "-P", str(pid)], capture_output=True, text=True, check=False)
    return [int(word) for word in found.stdout.split()]


def kills_table(rows: list[dict[str, Any]]) -> str:
    """The rows of `kills` in Markdown."""
    lines = [
        "| kill | after step | exit code | time beside an undisturbed run | steps | largest difference of losses |"
    ]
    lines.append("|---|---|---|---|---|---|")
    for row in rows:
        alike = {True: "the same", False: "others", None: ""}[row.get("steps_alike")]
        what = row["kill"] if row["killed"] else f"{row['kill']} (was over)"
        lines.append(
            f"| {what} | {row['after_step']} | {row['exit_code']} | {row['of_usual_time']:.1f} | {alike} | "
            f"{row.get('largest_difference', math.nan):.2g} |"
        )
    return "\n".join(lines)


def predict(options: argparse.Namespace, folder: Path) -> Iterator[dict[str, Any]]:
    """What a step sends on more GPUs, and what that costs of its time on links of several bandwidths."""
    for name, alone_ms in zip(options.models, options.alone_ms, strict=True):
        traffic = traffic_of(name, options)
        for n in options.gpus:
            for parallel in options.parallel:
                links = {gb: Link(n, options.latency_us / 1e6, gb * 1e9) for gb in options.gb_per_s}
                found = {gb: predicted(traffic, link, parallel, n, alone_ms / 1000) for gb, link in links.items()}
                row = {"model": name, "alone_ms": alone_ms, "gpus": n, "parallel": parallel}
                yield row | {"sent_bytes": traffic.sent(parallel, n), "efficiency": found}


def predict_table(rows: list[dict[str, Any]]) -> str:
    """The rows of `predict` in Markdown."""
    speeds = [*rows[0]["efficiency"]]
    columns = "|".join(["model", "one GPU, ms", "GPUs", "", "sent a step", *(f"at {gb:g} GB/s" for gb in speeds)])
    lines = [f"|{columns}|", "|" + (5 + len(speeds)) * "---|"]
    for row in rows:
        shares = [
            f"{a:.0%}" if round(a, 2) == round(b, 2) else f"{a:.0%} to {b:.0%}" for a, b in row["efficiency"].values()
        ]
        start = [row["model"], f"{row['alone_ms']:.1f}", str(row["gpus"]), row["parallel"]]
        lines.append("| " + " | ".join([*start, f"{row['sent_bytes'] / 2**20:,.0f} MiB", *shares]) + " |")
    return "\n".join(lines)


PARTS = {
    "speed": (speed, speed_table),
    "capped": (capped, capped_table),
    "kills": (kills, kills_table),
    "sent": (sent, sent_table),
    "predict": (predict, predict_table),
}


def parse(words: list[str]) -> argparse.Namespace:
    """The command line; what follows `--` is for `nnx train`."""
    own, more = (words[: words.index("--")], words[words.index("--") + 1 :]) if "--" in words else (words, [])
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=[*PARTS, "probe", "count"])
    parser.add_argument("--gpus", type=lambda text: [int(n) for n in text.split(",")], default=[2])
    parser.add_argument("--models", type=lambda text: text.split(","), default=["llama", "nyx"])
    parser.add_argument("--parallel", type=lambda text: text.split(","), default=["ddp", "fsdp"])
    parser.add_argument("--size", default="base")
    parser.add_argument("--seq-len", type=int, default=1024)
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--steps", type=int, default=None)
    parser.add_argument("--vram", default="4.75GB")
    parser.add_argument("--resume-on", type=int, default=None)
    parser.add_argument("--resume-vram", default=None)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--alone-ms", type=lambda text: [float(ms) for ms in text.split(",")], default=[])
    parser.add_argument("--gb-per-s", type=lambda text: [float(gb) for gb in text.split(",")], default=[300, 50, 20])
    parser.add_argument("--latency-us", type=float, default=50)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--filepath", default=None)
    parser.add_argument("--markdown", type=Path)
    parser.add_argument("--results", type=Path)
    options = parser.parse_args(own)
    options.steps = options.steps or {"speed": 60, "capped": 50, "kills": 100}.get(options.part, 0)
    options.more = more
    return options


def prepare_text(options: argparse.Namespace, folder: Path) -> None:
    """Make the token folder that runs are trained on."""
    text = Path(options.filepath or folder / "text.txt")
    if options.filepath is None:
        text.write_text(builtin_corpus(), encoding="utf-8")
    checked([*NNX, "prepare", str(text), "--tokenizer", "byte", "--no-xray", "--out", str(options.data)])


def main() -> None:
    options = parse(sys.argv[1:])
    if options.part in ("probe", "count"):
        probe(options.device) if options.part == "probe" else count(options.more)
        return
    measure, table = PARTS[options.part]
    rows = []
    with tempfile.TemporaryDirectory() as work:
        options.data = Path(work) / "data"
        if options.part != "predict":
            prepare_text(options, Path(work))
        for row in measure(options, Path(work)):
            print(json.dumps(row), file=sys.stderr, flush=True)
            rows.append(row)
    place = "no GPU" if options.part == "predict" else describe(pick_device(options.device))
    head = f"{options.part}, {place}, torch {torch.__version__}, {date.today()}: "
    page = f"{head}`scale.py {' '.join(sys.argv[1:])}`\n\n{table(rows)}\n"
    print(page)
    if options.markdown:
        with options.markdown.open("a", encoding="utf-8") as file:
            file.write("\n" + page)
    if options.results:
        with options.results.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)


if __name__ == "__main__":
    main()
