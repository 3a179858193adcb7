"""What watching a run costs: whole runs on a terminal with and without the live screen, with and without the report.

    python tests/bench/live_screen.py [--part screen|report ...] [--pairs 6] [--size 80x24] [--results FILE]
                                      [--markdown FILE] [-- WORDS OF nnx train]

Each run is a process on a pseudo-terminal that somebody reads, with the same seed and number of steps. The screen's
cost is that of a run with it beside one with NO_COLOR; the report's that of --report beside --no-report. The runs of a
pair go at the same time, each with all of its threads on one core of its own, and change cores from pair to pair: so
whatever else slows the machine slows both. A cost is the mean of the pairs' differences in the time of the whole
command, with its standard error. Linux only, on an otherwise idle machine.
"""

import argparse
import datetime
import fcntl
import json
import math
import os
import platform
import pty
import statistics
import struct
import subprocess
import sys
import tempfile
import termios
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from nnx_cli.system.machine import cpu_model

WORDS = {  # two to three minutes, and about eight, of one CPU core
    "screen": ["--model", "nyx", "--size", "nano", "--max-steps", "500"],
    "report": ["--model", "nyx", "--size", "nano", "--max-steps", "1850"],
}
WITHOUT: dict[str, tuple[list[str], dict[str, str]]] = {  # words and variables of a run without it
    "screen": ([], {"NO_COLOR": "1"}),
    "report": (["--no-report"], {}),
}
MOST = {"screen": 0.01, "report": 0.02}  # that it is to cost


def timed(
    folder: Path, words: list[str], size: tuple[int, int], variables: dict[str, str], core: int
) -> dict[str, float]:
    """Seconds of a whole command and of its training steps, and bytes that it wrote to the terminal."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", size[1], size[0], 0, 0))
    kept = {name: value for name, value in os.environ.items() if name not in ("NO_COLOR", "COLUMNS", "LINES")}
    environment = kept | {"TERM": "xterm-256color"} | variables
    command = [sys.executable, "-m", "nnx_cli", "train", *words, "--threads", "1", "--out", str(folder)]
    on_core = ["taskset", "--cpu-list", str(core), *command]
    started = time.perf_counter()
    with subprocess.Popen(on_core, stdin=theirs, stdout=theirs, stderr=theirs, env=environment) as process:
        os.close(theirs)
        n_bytes = 0
        with suppress(OSError):  # what Linux raises at the end
            while part := os.read(ours, 65536):
                n_bytes += len(part)
    os.close(ours)
    seconds = time.perf_counter() - started
    if process.returncode != 0:
        raise SystemExit(f"nnx train ended with {process.returncode}")
    training_s = json.loads((folder / "run.json").read_text(encoding="utf-8"))["time_s"]
    return {"seconds": seconds, "training_s": training_s, "terminal_bytes": n_bytes}


def measure(part: str, pair: int, words: list[str], size: tuple[int, int], work: Path) -> dict[str, Any]:
    """One pair of runs, with and without a part; which core they have changes from pair to pair."""
    more, variables = WITHOUT[part]
    cores = sorted(os.sched_getaffinity(0))[:2]

    def side(whole: bool) -> dict[str, float]:
        folder, core = work / f"{part}-{pair}-{whole}", cores[(whole + pair) % 2]
        return timed(folder, words + ([] if whole else more), size, {} if whole else variables, core)

    with ThreadPoolExecutor() as sides:
        found = dict(zip((True, False), sides.map(side, (True, False)), strict=True))
    cost = found[True]["seconds"] / found[False]["seconds"] - 1.0
    return {
        "part": part,
        "size": f"{size[0]}x{size[1]}",
        "words": words,
        "pair": pair,
        "with": found[True],
        "without": found[False],
        "cost": cost,
    }


def mean_and_error(values: list[float]) -> tuple[float, float]:
    """A mean and its standard error."""
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return statistics.mean(values), error


def as_markdown(rows: list[dict[str, Any]], machine: str) -> str:
    """What pairs of runs found, as the page live_screen.md."""
    lines = ["# What watching a run costs", "", machine, ""]
    lines += ["Whole runs of `nnx train` on a pseudo-terminal, with and without: the screen beside `NO_COLOR`,"]
    lines += [
        "`report.html` beside `--no-report`. The two of a pair run at the same time, one core each, which they change;",
        "a cost is the mean of the pairs' differences ± its standard error.",
        "",
    ]
    lines += ["| part | terminal | run | pairs | with, s | without, s | cost | may cost |"]
    lines += ["| --- | --- | --- | ---: | ---: | ---: | ---: | ---: |"]
    groups = dict.fromkeys((row["part"], row["size"], tuple(row["words"])) for row in rows)
    for part, size, words in groups:
        own = [row for row in rows if (row["part"], row["size"], tuple(row["words"])) == (part, size, words)]
        cost, error = mean_and_error([row["cost"] for row in own])
        sides = (statistics.mean(row[side]["seconds"] for row in own) for side in ("with", "without"))
        times = " | ".join(f"{seconds:.1f}" for seconds in sides)
        costs = f"{cost:+.2%} ± {error:.2%} | {MOST[part]:.0%}"
        lines.append(f"| {part} | {size} | `{' '.join(words)}` | {len(own)} | {times} | {costs} |")
    return "\n".join([*lines, ""])


def main() -> None:
    """Measure pairs, and print the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", action="append", choices=list(WORDS), help="default: both")
    parser.add_argument("--pairs", type=int, default=6)
    parser.add_argument("--size", default="80x24", help="columns x lines of the terminal")
    parser.add_argument("--results", type=Path, help="JSON lines: what stands there counts too")
    parser.add_argument("--markdown", type=Path)
    parser.add_argument("words", nargs="*", help="of nnx train, after --")
    options = parser.parse_args()
    columns, lines = map(int, options.size.split("x"))
    rows: list[dict[str, Any]] = []
    if options.results and options.results.exists():
        rows = [json.loads(line) for line in options.results.read_text(encoding="utf-8").splitlines()]
    with tempfile.TemporaryDirectory() as work:
        for part in options.part or WORDS:
            for pair in range(options.pairs):
                rows.append(measure(part, pair, options.words or WORDS[part], (columns, lines), Path(work)))
                print(json.dumps(rows[-1]), flush=True)
                if options.results:
                    with options.results.open("a", encoding="utf-8") as file:
                        file.write(json.dumps(rows[-1]) + "\n")
    machine = (
        f"{cpu_model()}, one thread a run, torch {torch.__version__}, Python "
        f"{platform.python_version()}, {platform.system()}, {datetime.date.today().isoformat()}. "
        "Made by `python tests/bench/live_screen.py`."
    )
    text = as_markdown(rows, machine)
    print(text)
    if options.markdown:
        options.markdown.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
