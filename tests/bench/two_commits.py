"""Training speed of two checkouts in turn: steps of the same command, each side in a process of its own that stays.

    python tests/bench/two_commits.py OLD NEW [--rounds 9] [--rows nyx-124m llama-124m ...] [--markdown FILE]

Each side runs `nnx train` of its checkout until its steps are as fast as they get (compiled, or a CUDA graph); then the
sides take turns, `--rounds` times a block of steps each, while the other waits. A step is told by the batch it asks its
loader for. A ratio is the old side's seconds over the new side's, above 1 where the new one is faster; on a CPU
the seconds are processor time, user and system. `first step` is how long after the start of the process the second
batch was asked for. Before the rows, in turn: `import torch`, and `import torch, torch._dynamo`, medians of --imports
processes each after one that warms the disk's cache.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

GPU = "--device cuda --precision bf16 --vram 8GB --seq-len 1024 --compile graph --optimizer muon"
CPU = "--size nano --device cpu --seq-len 256 --batch-size 4 --grad-accum 1 --threads 2 --optimizer muon"
ROWS = {  # name: (options of `nnx train`, steps before the first block, steps of a block)
    "nyx-124m": (f"--model nyx --size base {GPU} --batch-size 8 --grad-accum 4", 20, 20),
    "llama-124m": (f"--model llama --size base {GPU} --batch-size 8 --grad-accum 4", 20, 20),
    "nyx-10.7m": (f"--model nyx --size tiny {GPU} --seq-len 256 --batch-size 128 --grad-accum 1", 60, 200),
    "llama-10.7m": (f"--model llama --size tiny {GPU} --seq-len 256 --batch-size 128 --grad-accum 1", 60, 200),
    "nyx-10.7m-fp16": (
        f"--model nyx --size tiny {GPU} --seq-len 256 --precision fp16 --batch-size 128 --grad-accum 1",
        60,
        200,
    ),
    "nyx-10.7m-lion": (
        f"--model nyx --size tiny {GPU} --seq-len 256 --optimizer lion --batch-size 128 --grad-accum 1",
        60,
        200,
    ),
    "nyx-10.7m-adamw": (
        f"--model nyx --size tiny {GPU} --seq-len 256 --optimizer adamw --batch-size 128 --grad-accum 1",
        60,
        200,
    ),
    "nano-cpu": (f"--model nyx {CPU} --compile off --dropout 0.1", 60, 150),
    "nano-cpu-compiled": (f"--model nyx {CPU} --compile on --dropout 0.1", 60, 150),
    "nano-cpu-no-dropout": (f"--model nyx {CPU} --compile on --dropout 0", 60, 150),
    "llama-cpu-compiled": (f"--model llama {CPU} --compile on --dropout 0.1", 60, 150),
}
EVERY_ROW = "--lr 0.001 --weight-decay 0.1 --warmup-steps 10 --max-steps 1000000 --val-every 1000000 --sample-every 0"
EVERY_ROW += " --save-every 1000000"
IMPORTS = ("import torch", "import torch, torch._dynamo")


def worker(checkout: str, text: str, out: str, words: list[str]) -> None:
    """Train, a block of steps for every line on standard input; answers each with a line of JSON."""
    began = float(os.environ["NNX_BENCH_BEGAN"])
    answers = os.fdopen(int(os.environ["NNX_BENCH_ANSWERS"]), "w", buffering=1)
    sys.path.insert(0, checkout)
    from nnx_cli.cli import app

    try:
        from nnx_cli.data.loader import Loader
    except ModuleNotFoundError:
        from nnx_cli.engine.loader import Loader
    import torch

    batch, state = Loader.batch, {"first": -1, "left": 0, "started": None}

    def cost() -> tuple[float, float]:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        used = resource.getrusage(resource.RUSAGE_SELF)
        return time.perf_counter(), used.ru_utime + used.ru_stime

    def counted(self: Any, first: int, count: int) -> Any:
        if first > state["first"]:  # a new step; what is tried out beside the run takes samples from the beginning
            if state["first"] == 0:
                answers.write(json.dumps({"first_step_s": time.monotonic() - began}) + "\n")
            state["first"] = first
            if state["left"] == 0:
                now = cost()
                if state["started"] is not None:
                    spent = [after - before for before, after in zip(state["started"], now, strict=True)]
                    peak = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
                    rss = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
                    answers.write(json.dumps({"wall_s": spent[0], "cpu_s": spent[1], "peak": peak or rss}) + "\n")
                if not (line := sys.stdin.readline()).strip():
                    os._exit(0)
                state["left"], state["started"] = int(line), cost()
            state["left"] -= 1
        return batch(self, first, count)

    Loader.batch = counted
    app([*"train --filepath".split(), text, *EVERY_ROW.split(), "--out", out, *words])


class Side:
    """One checkout's training process, at rest between blocks."""

    def __init__(self, checkout: Path, text: Path, folder: Path, words: list[str]) -> None:
        folder.mkdir(parents=True)
        reading, writing = os.pipe()
        self.log = open(folder / "log", "w")
        command = [sys.executable, __file__, "--worker", str(checkout), str(text), str(folder / "run"), "--", *words]
        keys = {
            "NNX_BENCH_ANSWERS": str(writing),
            "NNX_BENCH_BEGAN": str(time.monotonic()),
            "PYTHONPATH": os.environ.get("PYTHONPATH", ""),
            "OMP_WAIT_POLICY": "PASSIVE",  # as the command sets it, which is not called here
            "GOMP_SPINCOUNT": "1000",
        }
        self.process = subprocess.Popen(
            command,
            cwd=folder,
            stdin=subprocess.PIPE,
            stdout=self.log,
            stderr=self.log,
            pass_fds=[writing],
            env=os.environ | keys,
            text=True,
        )
        os.close(writing)
        self.answers = os.fdopen(reading)
        self.first_step_s = 0.0

    def block(self, n_steps: int) -> dict[str, float]:
        """Seconds, processor seconds and peak memory of some steps."""
        self.process.stdin.write(f"{n_steps}\n")
        self.process.stdin.flush()
        while line := self.answers.readline():
            answer = json.loads(line)
            if "wall_s" in answer:
                return answer
            self.first_step_s = answer["first_step_s"]
        self.process.wait()
        raise SystemExit(f"a side ended:\n{Path(self.log.name).read_text()[-3000:]}")

    def end(self) -> None:
        self.process.stdin.close()
        self.process.kill()
        self.process.wait()
        self.log.close()


def measure(name: str, checkouts: list[Path], text: Path, folder: Path, rounds: int) -> dict[str, Any]:
    """One row: both sides warmed up, then in turn."""
    options, warm, steps = ROWS[name]
    kind = "cpu_s" if "--device cpu" in options else "wall_s"
    sides = []
    for number, checkout in enumerate(checkouts):
        sides.append(Side(checkout, text, folder / name / str(number), options.split()))
        sides[-1].block(warm)
    times: list[list[float]] = [[], []]
    peaks = [0.0, 0.0]
    for round_ in range(rounds):
        for which in (0, 1) if round_ % 2 == 0 else (1, 0):
            found = sides[which].block(steps)
            times[which].append(found[kind] / steps)
            peaks[which] = found["peak"]
    for side in sides:
        side.end()
    ratios = [old / new for old, new in zip(*times, strict=True)]
    return {
        "row": name,
        "old_ms": median(times[0]) * 1e3,
        "new_ms": median(times[1]) * 1e3,
        "ratio": median(ratios),
        "lowest": min(ratios),
        "highest": max(ratios),
        "old_peak": peaks[0],
        "new_peak": peaks[1],
        "old_first_step_s": sides[0].first_step_s,
        "new_first_step_s": sides[1].first_step_s,
    }


def import_seconds(rounds: int) -> list[float]:
    """Median wall time of a process that does each of IMPORTS."""
    times: list[list[float]] = [[] for _ in IMPORTS]
    for round_ in range(rounds + 1):
        for kept, line in zip(times, IMPORTS, strict=True):
            started = time.perf_counter()
            subprocess.run([sys.executable, "-c", line], check=True)
            if round_:
                kept.append(time.perf_counter() - started)
    return [median(kept) for kept in times]


def table(found: list[dict[str, Any]]) -> list[str]:
    """The rows as Markdown."""
    lines = ["| row | old ms a step | new | ratio (lowest to highest) | old peak MiB | new | first step old s | new |"]
    lines.append("| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |")
    for row in found:
        lines.append(
            f"| {row['row']} | {row['old_ms']:.3f} | {row['new_ms']:.3f} | {row['ratio']:.3f} "
            f"({row['lowest']:.3f} to {row['highest']:.3f}) | {row['old_peak'] / 2**20:,.1f} "
            f"| {row['new_peak'] / 2**20:,.1f} | {row['old_first_step_s']:.1f} | {row['new_first_step_s']:.1f} |"
        )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--rows", nargs="*", default=[], choices=ROWS)
    parser.add_argument("--imports", type=int, default=3)
    parser.add_argument("--markdown", type=Path)
    args = parser.parse_args()
    import torch

    on_gpu = torch.cuda.is_available()
    names = args.rows or [name for name in ROWS if ("cpu" in name) != on_gpu]
    machine = torch.cuda.get_device_name() if on_gpu else f"{os.cpu_count()} CPU cores"
    head = f"{machine}, torch {torch.__version__}, Python {platform.python_version()}, {datetime.date.today()}"
    if args.imports:
        seconds = zip(IMPORTS, import_seconds(args.imports), strict=True)
        head += "; " + ", ".join(f"`{line}` {spent:.1f} s" for line, spent in seconds)
    print(head, flush=True)
    found = []
    with tempfile.TemporaryDirectory() as folder:
        text = Path(folder) / "words.txt"
        draw = random.Random(1)
        words = ["".join(draw.choices("etaoinshrdlu", k=draw.randint(2, 9))) for _ in range(3000)]
        text.write_text("\n".join(" ".join(draw.choices(words, k=12)) for _ in range(100_000)))
        for name in names:
            found.append(measure(name, [args.old.resolve(), args.new.resolve()], text, Path(folder), args.rounds))
            print(table(found)[-1], flush=True)
    if args.markdown:
        args.markdown.write_text("\n".join([f"{head}; {args.rounds} rounds", "", *table(found), ""]))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        worker(*sys.argv[2:5], sys.argv[6:])
    else:
        main()
