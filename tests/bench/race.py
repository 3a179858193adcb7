"""The races of the whole zoo that README's table shows, and what they say of its authors' claims.

    python tests/bench/race.py --plays tinyshakespeare.txt --docs kernel-docs.jsonl [--parts bytes-tokens bpe-time ...]
                               [--folder weights/races] [--limit SECONDS] [--publish tests/bench/races]

Each part of PARTS is an `nnx compare` of its own, which goes on where it stopped: with --limit a part that is running
then is asked to save, and the same command goes on with it on the same machine. On several GPUs a competitor runs on
each. The text of `bpe` parts is prepared with 4,096 ids first; any text of 20 MB or more will do. --publish keeps
PART.json, its race.json with the validations alone, and prints the tables; `nnx compare --show PART.json` draws it.
"""

from __future__ import annotations

import argparse
import json
import math
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

GPU = ["--vram", "8GB", "--seeds", "3"]
CPU = ["--device", "cpu", "--threads", "2", "--seeds", "3"]
PARTS = {  # words of nnx compare; what the first one of a name races on stands in `text_of`
    "bytes-tokens": ["--size", "tiny", "--equal", "tokens", "--budget", "10M", *GPU],
    "bytes-time": ["--size", "tiny", "--equal", "time", "--budget", "30s", *GPU],
    "bpe-tokens": ["--size", "tiny", "--equal", "tokens", "--budget", "10M", *GPU],
    "bpe-time": ["--size", "tiny", "--equal", "time", "--budget", "30s", *GPU],
    # three sizes, two tokens a parameter outside the tables
    "bpe-curve-nano": ["--parameters", "0.75M", "--equal", "tokens", "--budget", "1.5M", *GPU],
    "bpe-curve-3m": ["--parameters", "3M", "--equal", "tokens", "--budget", "6M", *GPU],
    "bpe-curve-tiny": ["--size", "tiny", "--equal", "tokens", "--budget", "21M", *GPU],
    "bytes-cpu": ["--size", "nano", "--equal", "time", "--budget", "45s", *CPU],
    "recall": ["--task", "recall", "--equal", "tokens", "--budget", "2M", *GPU],
}


def text_of(part: str, options: argparse.Namespace) -> list[str]:
    """The words that name the text of a part; that of `bpe` is prepared where it is not."""
    kind = part.partition("-")[0]
    if kind == "recall":
        return []
    if kind == "bytes":
        return ["--filepath", str(options.plays), "--tokenizer", "byte"]
    folder = options.folder / "docs-bpe"
    if not folder.exists():
        words = ["prepare", *map(str, options.docs), "--tokenizer", "bpe", "--vocab-size", "4096", "--no-xray"]
        subprocess.run([sys.executable, "-m", "nnx_cli", *words, "--out", str(folder)], check=True)
    return ["--data", str(folder)]


def race(part: str, options: argparse.Namespace, end: float) -> bool:
    """Run a part to its end, or until the time is up; returns whether it is over."""
    out = options.folder / part
    models = ["--models", options.models] if "-curve-" in part else []
    words = ["compare", *text_of(part, options), *PARTS[part], *models, "--out", str(out), "--quiet"]
    print("nnx", shlex.join(words), flush=True)
    process = subprocess.Popen([sys.executable, "-m", "nnx_cli", *words])
    try:
        process.wait(None if end == math.inf else max(1.0, end - time.monotonic()))
    except subprocess.TimeoutExpired:
        process.terminate()
        process.wait()
    return process.returncode == 0


def publish(part: str, record: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Keep a race beside the benchmark, without the folders of this machine."""
    folder.mkdir(parents=True, exist_ok=True)
    record["data"] = f"data/{Path(record['data']).name}"
    for entry in record["competitors"]:
        for run in entry["runs"]:
            run["out"] = f"weights/races/{part}/{entry['model']}-{run['seed']}"
            run["curve"] = [point for point in run["curve"] if point["val_bits_per_byte"] is not None]
    text = json.dumps(record, ensure_ascii=False, separators=(",", ":"))
    (folder / f"{part}.json").write_text(text + "\n", encoding="utf-8")
    return record


def section(part: str, record: dict[str, Any]) -> list[str]:
    """The table of a race."""
    words = shlex.join(["nnx", "compare", *PARTS[part]])
    tokenizer, search = record["tokenizer"], record["learning_rate_search"]
    lines = [
        f"## {part}",
        "",
        f"`{words}`, {record['device']}, torch {record['versions']['torch']}; {tokenizer['kind']}, "
        f"{tokenizer['vocab_size']:,} ids, {record['train_tokens']:,} tokens to train on, context {record['seq_len']}, "
        f"{record['tokens_per_step']:,} tokens a step; rates by short runs of {search['tokens_each']:,} tokens "
        f"({search['time_s']:.0f} s of training together); {record['state']}.",
        "",
        "| model | parameters | outside the tables | lr | bits per byte | ± | tokens | epochs | s a run | tokens/s "
        "| GiB | ties with |",
        "| --- " + "| ---: " * 10 + "| --- |",
    ]
    for entry in record["competitors"]:
        runs = [run for run in entry["runs"] if run["status"] == "finished"]
        if not runs:
            lines.append(f"| {entry['model']} | {entry['parameters']:,} |" + " |" * 9 + f" {entry['status']} |")
            continue
        tokens, time_s = (sum(run[key] for run in runs) / len(runs) for key in ("tokens", "time_s"))
        peak = max((run["peak_memory_bytes"] or 0 for run in runs), default=0) / 2**30
        bits = entry["bits_per_byte"]
        error = "" if bits["stderr"] is None else f"{bits['stderr']:.4f}"
        ties = ", ".join(entry["ties_with"] or []) if entry["ties_with"] is not None else "no verdict"
        lines.append(
            f"| {entry['model']} | {entry['parameters']:,} | {entry['parameters_without_tables']:,} | {entry['lr']:g} "
            f"| {bits['mean']:.4f} | {error} | {tokens:,.0f} | {tokens / record['train_tokens']:.1f} | {time_s:.1f} "
            f"| {entry['tokens_per_s']:,.0f} | {peak:.2f} | {ties} |"
        )
    if any(run["recall"] for entry in record["competitors"] for run in entry["runs"]):
        lines += ["", *recall(record)]
    return [*lines, ""]


def recall(record: dict[str, Any]) -> list[str]:
    """Share of right answers by how many tokens back they were, mean over the seeds."""
    tables = {e["model"]: [dict(run["recall"]) for run in e["runs"] if run["recall"]] for e in record["competitors"]}
    distances = sorted({distance for runs in tables.values() for run in runs for distance in run})
    lines = [
        "| right answers, tokens back | " + " | ".join(map(str, distances)) + " |",
        "| --- " + "| ---: " * len(distances) + "|",
    ]
    for model, runs in tables.items():
        cells = [[run[distance] for run in runs if run.get(distance) is not None] for distance in distances]
        lines.append(
            f"| {model} | " + " | ".join(f"{sum(cell) / len(cell):.1%}" if cell else "" for cell in cells) + " |"
        )
    return lines


def main() -> None:
    """Run the parts in turn and write their tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plays", type=Path)
    parser.add_argument("--docs", type=Path, nargs="+")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=[*PARTS])
    parser.add_argument("--models", default="llama,nyx,neon", help="of the curve: the control and the best two")
    parser.add_argument("--folder", type=Path, default=Path("weights/races"))
    parser.add_argument("--limit", type=float, default=math.inf)
    parser.add_argument("--publish", type=Path)
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + options.limit
    for part in options.parts:
        if time.monotonic() >= end or not race(part, options, end):
            break
    for part in PARTS:
        if options.publish and (path := options.folder / part / "race.json").exists():
            print("\n".join(section(part, publish(part, json.loads(path.read_text()), options.publish))))


if __name__ == "__main__":
    main()
