"""What the live screen costs: whole runs on a terminal with it and, with NO_COLOR, without it, in turn.

    python tests/bench/live_screen.py [--pairs 5] [--size 80x24] [-- WORDS OF nnx train]

Each run is a process on a pseudo-terminal that somebody reads, with the same seed and number of steps; its time is what
run.json says of training beside the wall clock of the whole command. The cost is the mean of the pairs' differences,
with its standard error. Run it on a quiet machine.
"""

import argparse
import fcntl
import json
import math
import os
import pty
import statistics
import struct
import subprocess
import sys
import tempfile
import termios
import time
from contextlib import suppress
from pathlib import Path

WORDS = ["--model", "nyx", "--size", "nano", "--max-steps", "1500"]


def timed(folder: Path, words: list[str], size: tuple[int, int], live: bool) -> tuple[float, float, int]:
    """Seconds of a whole command, seconds of its training steps, and bytes that it wrote to the terminal."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", size[1], size[0], 0, 0))
    kept = {name: value for name, value in os.environ.items() if name not in ("NO_COLOR", "COLUMNS", "LINES")}
    environment = kept | {"TERM": "xterm-256color"} | ({} if live else {"NO_COLOR": "1"})
    command = [sys.executable, "-m", "nnx_cli", "train", *words, "--out", str(folder)]
    started = time.perf_counter()
    with subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, env=environment) as process:
        os.close(theirs)
        n_bytes = 0
        with suppress(OSError):  # what Linux raises at the end
            while part := os.read(ours, 65536):
                n_bytes += len(part)
    os.close(ours)
    seconds = time.perf_counter() - started
    if process.returncode != 0:
        raise SystemExit(f"nnx train ended with {process.returncode}")
    return seconds, json.loads((folder / "run.json").read_text())["time_s"], n_bytes


def main() -> None:
    """Measure pairs, the first of each in turn with and without."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--size", default="80x24", help="columns x lines of the terminal")
    parser.add_argument("words", nargs="*", help="of nnx train, after --")
    options = parser.parse_args()
    columns, lines = map(int, options.size.split("x"))
    words, costs = options.words or WORDS, []
    with tempfile.TemporaryDirectory() as work:
        for pair in range(options.pairs):
            found = {}
            for live in (True, False) if pair % 2 == 0 else (False, True):
                found[live] = timed(Path(work) / f"{pair}-{live}", words, (columns, lines), live)
            costs.append(found[True][0] / found[False][0] - 1.0)
            print(
                json.dumps({"pair": pair, "with": found[True], "without": found[False], "cost": costs[-1]}), flush=True
            )
    error = statistics.stdev(costs) / math.sqrt(len(costs)) if len(costs) > 1 else math.nan
    print(f"{options.size}: {statistics.mean(costs):+.2%} ± {error:.2%} of the whole command")


if __name__ == "__main__":
    main()
