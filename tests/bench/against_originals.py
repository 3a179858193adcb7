"""Training speed and memory beside the code that the architectures come from: same configuration, batch and run.

    python tests/bench/against_originals.py --originals FOLDER [--model nyx ...] [--markdown FILE]

FOLDER holds the originals, as `originals.py` says.

A step is forward, backward and AdamW, on random tokens. Originals run eagerly, with their own loss on all logits, under
autocast to bf16 on CUDA; ours as the trainer runs it, in bf16 there, eager and with compiled blocks, where on CUDA the
whole step is one graph. On a CPU all is float32. Every side lives in a process of its own and they take turns, a round
each, so that what else the machine does hits all; numbers are medians over rounds. Memory is what a process had
allocated at most (CPU: resident), and what of that lies above 16 bytes a parameter: weights, gradients and AdamW's
moments. The matrix-product rate of the machine is taken in the same rounds; "share" is matrix products of ours
(attention counted as causal) a second, over that rate.
"""

from __future__ import annotations

import argparse
import hashlib
import math
import multiprocessing
import platform
import re
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from datetime import date
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from typing import Any

import torch
from originals import CASES, Case, our_config
from torch import Tensor, nn

from nnx_cli import __version__, models
from nnx_cli.config import TrainConfig
from nnx_cli.kernels.gemm import linear
from nnx_cli.layers.blocks import compile_blocks
from nnx_cli.optim._build import build_optimizer
from nnx_cli.planning import flops as cost
from nnx_cli.system.device import DTYPES, describe, peak_memory_bytes, pick_device, set_threads, synchronize
from nnx_cli.system.machine import keep_freed_memory
from nnx_cli.training.step import Step, StepGraphs

PRECISION = {"cuda": "bf16", "cpu": "fp32"}
ROUND_SECONDS = {"cuda": 0.5, "cpu": 0.0}  # a round has as many steps as fit, at least one
WARMUP_STEPS = {"cuda": 3, "cpu": 1}
CALIBRATIONS = {"cuda": 2, "cpu": 1}
MATRIX = {"cuda": 8192, "cpu": 2048}  # width of the matrices whose product is timed
SHARE = 0.75  # of the matrix-product rate, which counts on a CPU where the times asked cannot be had
MEMORY = 0.5  # of the original's memory above STATE_BYTES a parameter
STATE_BYTES = 16
SIDES = ("original", "eager", "compiled")


# the processes that are timed


def prepare_original(case: Case, folder: Path, device: torch.device) -> tuple[nn.Module, Callable[[Tensor], Tensor]]:
    sys.path.insert(0, str(folder / "packages"))
    original = case.build(folder, case.config, device)
    optimizer = torch.optim.AdamW([p for p in original.model.parameters() if p.requires_grad], lr=1e-4, fused=True)

    def step(tokens: Tensor) -> Tensor:
        cast = torch.autocast(device.type, DTYPES[PRECISION["cuda"]]) if device.type == "cuda" else nullcontext()
        with cast:
            loss = original.loss(tokens)
        loss.backward()
        optimizer.step()
        original.after_step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    return original.model, step


def prepare_ours(case: Case, device: torch.device, compiled: bool) -> tuple[nn.Module, Callable[[Tensor], Tensor]]:
    if device.type == "cpu":
        keep_freed_memory()
    config = our_config(case, case.batch[device.type][1])
    model = models.from_config(case.name, config).to(device)
    model.compute_dtype = DTYPES[PRECISION[device.type]]
    optimizer = build_optimizer(model, TrainConfig(optimizer="adamw", lr=1e-4, weight_decay=0.1))
    whole_step = Step(model, optimizer, torch.amp.GradScaler(device.type, enabled=False), grad_clip=0.0)
    if compiled:
        compile_blocks(model)
    captured: list[StepGraphs] = []

    def step(tokens: Tensor) -> Tensor:
        ids, targets = tokens[:, :-1], tokens[:, 1:]
        if compiled and device.type == "cuda":
            if not captured:
                captured.append(StepGraphs(whole_step, ids, targets, len(ids)))
            captured[0](ids, targets)
        else:
            whole_step(ids, targets, len(ids))
        return whole_step.stats.loss

    return model, step


def random_tokens(case: Case, device: torch.device) -> Iterator[Tensor]:
    """Batches (B, T + 1) without an end, the same for every side."""
    batch_size, seq_len = case.batch[device.type]
    vocab_size = our_config(case, seq_len).vocab_size
    draw = torch.Generator().manual_seed(0)
    batches = [torch.randint(vocab_size, (batch_size, seq_len + 1), generator=draw).to(device) for _ in range(8)]
    while True:
        yield from batches


class Side:
    """One side of a comparison: knows how to take a round, in its own process."""

    def __init__(self, key: str, side: str, folder: Path, device: torch.device) -> None:
        case = CASES[key]
        self.device, self.case = device, case
        self.captured = device.type == "cuda" and side == "compiled"
        self.resident = 0 if device.type == "cuda" else peak_memory_bytes(device) or 0
        torch.manual_seed(0)
        prepare = (
            (lambda: prepare_original(case, folder, device))
            if side == "original"
            else (lambda: prepare_ours(case, device, side == "compiled"))
        )
        model, self.step = prepare()
        self.tokens = random_tokens(case, device)
        self.n_tokens = math.prod(case.batch[device.type])
        self.parameters = sum(p.numel() for p in {id(p): p for p in model.parameters()}.values())

    def warm_up(self) -> dict[str, Any]:
        first = self.step(next(self.tokens)).item()
        for _ in range(WARMUP_STEPS[self.device.type] - 1):
            self.step(next(self.tokens))
        if not math.isfinite(first):
            raise ArithmeticError(f"the first loss is {first}")
        synchronize(self.device)
        return {"parameters": self.parameters, "first_loss": first}

    def calibrate(self) -> dict[str, Any]:
        """Decide how many steps a round has, when nothing else runs any more."""
        if self.device.type == "cuda" and not self.captured:  # the graph's memory is counted while it is recorded
            torch.cuda.reset_peak_memory_stats()
        self.n_steps = 1
        seconds = self.n_tokens / max(self.round()["per_s"] for _ in range(CALIBRATIONS[self.device.type]))
        self.n_steps = max(1, round(ROUND_SECONDS[self.device.type] / seconds))
        return {"steps": self.n_steps}

    def round(self) -> dict[str, Any]:
        synchronize(self.device)
        started = time.perf_counter()
        for _ in range(self.n_steps):
            self.step(next(self.tokens))
        synchronize(self.device)
        seconds = time.perf_counter() - started
        peak = (peak_memory_bytes(self.device) or 0) - self.resident
        return {"per_s": self.n_steps * self.n_tokens / seconds, "peak_bytes": peak}

    def profile(self) -> dict[str, Any]:
        """The five longest kernels (CPU: operators) of a step, and how much of its time the device computes."""
        n_steps, cuda = 3, self.device.type == "cuda"
        seconds = self.n_tokens / median(self.round()["per_s"] for _ in range(3))
        with torch.profiler.profile() as profiler:
            for _ in range(n_steps):
                self.step(next(self.tokens))
            synchronize(self.device)
        own = "self_device_time_total" if cuda else "self_cpu_time_total"
        kind = torch.autograd.DeviceType.CUDA if cuda else torch.autograd.DeviceType.CPU
        events = [e for e in profiler.key_averages() if e.device_type == kind and not e.is_user_annotation]
        events.sort(key=lambda event: -getattr(event, own))
        return {
            "step_ms": 1e3 * seconds,
            "busy_ms": sum(getattr(event, own) for event in events) / 1e3 / n_steps,
            "launches": sum(event.count for event in events) // n_steps,
            "top": [(event.key, getattr(event, own) / 1e3 / n_steps, event.count // n_steps) for event in events[:5]],
        }


class MatrixProduct:
    """The machine's rate of products of large matrices, in the precision that ours computes in, by the faster of the
    libraries that torch brings along."""

    def __init__(self, device: torch.device) -> None:
        self.device, n = device, MATRIX[device.type]
        self.a, self.b = torch.randn(2, n, n, device=device, dtype=DTYPES[PRECISION[device.type]])
        self.n_times = 20 if device.type == "cuda" else 4

    def warm_up(self) -> dict[str, Any]:
        return self.round()

    def round(self) -> dict[str, Any]:
        synchronize(self.device)
        started = time.perf_counter()
        for _ in range(self.n_times):
            linear(self.a, self.b)
        synchronize(self.device)
        return {"per_s": 2 * self.n_times * len(self.a) ** 3 / (time.perf_counter() - started)}


def work(pipe: Connection, key: str | None, side: str, folder: Path, device: torch.device, threads: int | None) -> None:
    """Body of a process: does what is asked through `pipe` and answers with a dictionary."""
    try:
        set_threads(threads)
        worker = MatrixProduct(device) if key is None else Side(key, side, folder, device)
        while (command := pipe.recv()) is not None:
            pipe.send(getattr(worker, command)())
    except Exception as error:  # whatever keeps one side from running is a line of the report
        traceback.print_exc()
        message = (str(error).strip().splitlines() or [""])[0][:160]
        pipe.send({"error": f"{type(error).__name__}: {message}"})


class Worker:
    """The near end of a process that is timed."""

    def __init__(self, *arguments: Any) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, far = context.Pipe()
        self.process = context.Process(target=work, args=(far, *arguments))
        self.process.start()
        far.close()
        self.error: str | None = None
        self.rounds: list[dict[str, Any]] = []

    def ask(self, command: str) -> None:
        self.pipe.send(command)

    def answer(self, deadline: float) -> dict[str, Any] | None:
        """None where there is none in time; `error` then says why."""
        try:
            if not self.pipe.poll(max(0.0, deadline - time.monotonic())):
                self.error = "over its time limit"
            elif "error" in (answer := self.pipe.recv()):
                self.error = answer["error"]
            else:
                return answer
        except (EOFError, OSError):
            self.error = "its process ended"
        self.process.kill()
        return None

    def stop(self) -> None:
        if self.process.is_alive() and self.error is None:
            self.pipe.send(None)
            self.process.join(10)
        self.process.kill()
        self.process.join()


@dataclass
class Row:
    """What was measured of a case; per side, where it ran."""

    key: str
    device: str
    speed: dict[str, float] = field(default_factory=dict)  # tokens/s
    peak: dict[str, int] = field(default_factory=dict)  # bytes
    parameters: dict[str, int] = field(default_factory=dict)
    matrix_rate: float = math.nan
    notes: list[str] = field(default_factory=list)
    profile: dict[str, Any] | None = None

    @property
    def best(self) -> str | None:
        """The faster of our sides."""
        return max((side for side in ("eager", "compiled") if side in self.speed), key=self.speed.get, default=None)

    @property
    def times(self) -> float:
        if self.best is None or "original" not in self.speed:
            return math.nan
        return self.speed[self.best] / self.speed["original"]

    @property
    def share(self) -> float:
        """Of the machine's matrix-product rate that ours reaches."""
        if self.best is None:
            return math.nan
        case = CASES[self.key]
        seq_len = case.batch[self.device][1]
        flops = cost.flops_per_token(cost.meta_model(case.name, our_config(case, seq_len)), seq_len)["train"]
        return flops * self.speed[self.best] / self.matrix_rate

    def above(self, side: str) -> float:
        """Bytes above those that every parameter takes."""
        return self.peak[side] - STATE_BYTES * self.parameters[side] if side in self.peak else math.nan

    @property
    def fast_enough(self) -> bool:
        return self.times >= CASES[self.key].times[self.device] or (self.device == "cpu" and self.share >= SHARE)

    @property
    def small_enough(self) -> bool:
        return self.device == "cpu" or self.above(self.best or "") <= MEMORY * self.above("original")


def start(key: str, folder: Path, device: torch.device, options: argparse.Namespace) -> tuple[Row, dict[str, Worker]]:
    """The processes of a case's sides, told to warm up; they compile side by side."""
    row, source = Row(key, device.type), folder / CASES[key].source
    sides = [side for side in SIDES if side != "compiled" or not options.no_compile]
    if not source.exists():
        row.notes.append(f"the original is not there: {CASES[key].source} is missing")
        sides.remove("original")
    elif not hashlib.sha256(source.read_bytes()).hexdigest().startswith(CASES[key].sha256):
        row.notes.append(f"{CASES[key].source} is not the file of the commit")
    workers = {side: Worker(key, side, folder, device, options.threads) for side in sides}
    for worker in workers.values():
        worker.ask("warm_up")
    return row, workers


def wait(row: Row, workers: dict[str, Worker], limit: float) -> None:
    """Until all sides have warmed up, or failed to."""
    deadline = time.monotonic() + limit
    for side, worker in workers.items():
        if (ready := worker.answer(deadline)) is not None:
            row.parameters[side] = ready["parameters"]
            tell(f"{row.key} {side}: {ready['parameters']:,} parameters, first loss {ready['first_loss']:.3f}")


def measure(row: Row, workers: dict[str, Worker], options: argparse.Namespace, matrix: Worker) -> None:
    """Let the sides take turns, within the time limit, and end them."""
    deadline = time.monotonic() + options.limit
    for worker in workers.values():
        if worker.error is None:
            worker.ask("calibrate")
            worker.answer(deadline)
    rates = []
    for _ in range(options.rounds):
        for side, worker in {"matrix": matrix, **workers}.items():
            if worker.error is None and time.monotonic() < deadline:
                worker.ask("round")
                if (answer := worker.answer(deadline)) is not None:
                    (rates if side == "matrix" else worker.rounds).append(answer)
    row.matrix_rate = median(rate["per_s"] for rate in rates) if rates else math.nan
    for side, worker in workers.items():
        if worker.rounds:
            row.speed[side] = median(answer["per_s"] for answer in worker.rounds)
            row.peak[side] = max(answer["peak_bytes"] for answer in worker.rounds)
            spread = sorted(answer["per_s"] for answer in worker.rounds)
            tell(f"{row.key} {side}: {row.speed[side]:,.0f} tokens/s ({spread[0]:,.0f} to {spread[-1]:,.0f})")
        if worker.error is not None:
            row.notes.append(f"{side}: {worker.error}")
    if options.profile and math.isfinite(row.times) and not (row.fast_enough and row.small_enough):
        workers[row.best].ask("profile")
        row.profile = workers[row.best].answer(time.monotonic() + 60)
    for worker in workers.values():
        worker.stop()


def tell(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


# the report


def rounded(value: float, digits: int = 3) -> str:
    """Three digits, thousands apart; an en dash where there is no value."""
    if not math.isfinite(value):
        return "–"
    places = max(0, digits - 1 - math.floor(math.log10(abs(value)))) if value else 0
    return f"{round(value, digits - 1 - math.floor(math.log10(abs(value)))) if value else 0:,.{places}f}"


def short(kernel: str) -> str:
    """A kernel's name without its templates' namespaces."""
    return re.sub(r"^void |\(anonymous namespace\)::|at::native::|at::detail::|std::", "", kernel)[:90]


def table(rows: list[Row]) -> Iterator[str]:
    """Markdown lines of all rows, the lost ones included."""
    device = rows[0].device
    yield (
        "| model | batch | original tokens/s | ours, eager | ours, compiled | times | asked | share | "
        "original GiB (above) | ours GiB (above) | part of above | |"
    )
    yield "| --- " + "| ---: " * 10 + "| --- |"
    for row in rows:
        case, best = CASES[row.key], row.best
        speeds = " | ".join(rounded(row.speed.get(side, math.nan)) for side in SIDES)
        memory = " | ".join(
            f"{row.peak[side] / 2**30:.2f} ({row.above(side) / 2**30:.2f})" if side in row.peak else "–"
            for side in ("original", best)
        )
        part = row.above(best or "") / row.above("original")
        verdict = [word for word, good in (("speed", row.fast_enough), ("memory", row.small_enough)) if not good]
        known = math.isfinite(row.times)
        yield (
            f"| {row.key} | {'×'.join(map(str, case.batch[device]))} | {speeds} | {rounded(row.times)} | "
            f"{case.times[device]:g} | {row.share:.0%} | {memory} | {rounded(part, 2)} | "
            f"{('short of ' + ', '.join(verdict) if verdict else 'reached') if known else 'not compared'} |"
        )


def report(rows: list[Row], device: torch.device, options: argparse.Namespace) -> str:
    """The table under what it was measured on, with notes and profiles below."""
    precision = PRECISION[device.type]
    rate = median(row.matrix_rate for row in rows)
    lines = [
        f"{describe(device)}, {precision}, torch {torch.__version__}, Python {platform.python_version()}, "
        f"nnx {__version__} ({options.commit or commit()}), {date.today()}; median of {options.rounds} rounds; "
        f"matrix products of {MATRIX[device.type]}: {rate / 1e12:.3g} TFLOP/s.",
        "",
        *table(rows),
    ]
    notes = [f"- {row.key}: {note}" for row in rows for note in row.notes]
    for row in rows:
        if row.profile is not None:
            found = row.profile
            top = "; ".join(f"`{short(name)}` {ms:.2f} ms ({count}×)" for name, ms, count in found["top"])
            busy = f", {found['busy_ms']:.1f} ms of it computing in {found['launches']} launches"
            notes.append(
                f"- {row.key}, {row.best}: a step takes {found['step_ms']:.1f} ms"
                f"{busy if device.type == 'cuda' else ''}; longest: {top}"
            )
    return "\n".join([*lines, *([""] if notes else []), *notes])


def commit() -> str:
    """The commit of this checkout, as far as git knows."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--exclude", "*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "commit unknown"


def write_section(path: Path, name: str, text: str) -> None:
    """Put `text` between the marks of section `name`; what people wrote around them stays."""
    begin, end = f"<!-- {name}: written by against_originals.py -->", f"<!-- end of {name} -->"
    old = path.read_text(encoding="utf-8") if path.exists() else ""
    section = f"{begin}\n{text}\n{end}"
    if begin in old:
        new = re.sub(f"{re.escape(begin)}.*?{re.escape(end)}", lambda _: section, old, flags=re.DOTALL)
    else:
        new = f"{old}\n{section}\n".lstrip()
    path.write_text(new, encoding="utf-8")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--originals", type=Path, required=True, metavar="FOLDER", help="the checkouts")
    parser.add_argument("--model", nargs="+", choices=CASES, default=list(CASES), help="default: all")
    parser.add_argument("--device", default="auto", help="cuda or cpu; default: cuda where there is one")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each side")
    parser.add_argument("--limit", type=float, default=600.0, metavar="SECONDS", help="most time for one model")
    parser.add_argument("--threads", type=int, help="CPU threads; default: torch's choice")
    parser.add_argument("--no-compile", action="store_true", help="only run ours eagerly")
    parser.add_argument(
        "--together",
        action="store_true",
        help="start and compile all models at once: faster where cores and memory abound",
    )
    parser.add_argument("--profile", action="store_true", help="name the longest kernels of rows that fall short")
    parser.add_argument("--commit", help="of nnx, where this is no git checkout")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="also write the table there, as its section")
    options = parser.parse_args()
    device = pick_device(options.device)
    set_threads(options.threads)
    folder = options.originals.resolve()
    matrix = Worker(None, "", folder, device, options.threads)
    matrix.ask("warm_up")
    matrix.answer(time.monotonic() + options.limit)
    started = (start(key, folder, device, options) for key in options.model)
    if options.together:
        started = list(started)
        for row, workers in started:
            wait(row, workers, options.limit)
    rows: list[Row] = []
    for row, workers in started:
        if not options.together:
            wait(row, workers, options.limit)
        measure(row, workers, options, matrix)
        rows.append(row)
        text = report(rows, device, options)
        if options.markdown:
            write_section(options.markdown, device.type, text)
    matrix.stop()
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
