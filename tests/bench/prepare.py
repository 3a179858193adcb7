"""How fast `nnx prepare` is, and how much memory it takes, beside tiktoken's own batch encoder in the same run.

    python tests/bench/prepare.py [--megabytes 200] [--text FILE] [--rounds 3] [--kinds byte char bpe gpt2 ...]
                                  [--markdown FILE]

The text is Python's documentation and the sources of its standard library, in ASCII, over and over up to --megabytes;
for `byte` and `char` also with Cyrillic letters in place of the Latin ones (two bytes each). `byte` and `char` run on
one core, the others on all. A run of nnx is everything from opening the text to the synced token folder: encoding
check, checksums, tokenizer.json. `bpe` is a vocabulary of 4096 trained beforehand on the same text.

tiktoken gets the text in memory, in parts of 1 MiB cut where its ids do not change, and only `encode_ordinary_batch` is
timed, with its own regular expression and as many threads as there are cores. The ids of both sides are compared by
SHA-256. With gigatoken installed (`nnx-cli[fast]`) nnx runs with and without it.

Every run is a new process, and the sides take turns. Numbers are medians over the rounds; MB are 10^6 bytes of text.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import subprocess
import sys
import sysconfig
import tempfile
import time
from datetime import date
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import tiktoken

from nnx_cli.config import PrepareConfig
from nnx_cli.data.prepare import prepare
from nnx_cli.data.sources import builtin_corpus
from nnx_cli.data.tokenizers import bpe, gigatoken
from nnx_cli.data.tokenizers.build import build_tokenizer
from nnx_cli.system.machine import cpu_model, n_cores, peak_rss_bytes

ONE_CORE = ("byte", "char")
CYRILLIC = str.maketrans("abcdefghijklmnopqrstuvwxyz", "абцдефгхийклмнопярстужвьыз")
PART_CHARS = 2**20


def write_text(path: Path, n_bytes: int, given: Path | None, cyrillic: bool = False) -> None:
    """`n_bytes` of text, of --text or of what Python ships."""
    if given:
        text = given.read_text(encoding="utf-8", errors="replace")
    else:
        library = Path(sysconfig.get_path("stdlib"))
        sources = [file for file in sorted(library.rglob("*.py")) if "site-packages" not in file.parts]
        parts = [builtin_corpus(), *(file.read_text(encoding="utf-8", errors="ignore") for file in sources)]
        text = "\n".join(parts).encode("ascii", "ignore").decode()
    data = (text.translate(CYRILLIC) if cyrillic else text).encode()
    with open(path, "wb") as file:
        for start in range(0, n_bytes, len(data)):
            file.write(data[: n_bytes - start])


def run_nnx(text: Path, tokenizer: str, n_workers: int, out: Path) -> dict[str, Any]:
    """One preparation in this process. The digest is that of all ids."""
    if n_workers == 1 and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    cpu, started = time.process_time(), time.perf_counter()
    made = prepare([text], out, PrepareConfig(tokenizer=tokenizer, workers=n_workers))
    wall, cpu, rss = time.perf_counter() - started, time.process_time() - cpu, peak_rss_bytes()
    ids = hashlib.sha256()
    for split in ("train", "val"):
        ids.update((out / f"{split}.bin").read_bytes())
    return {"wall_s": wall, "cpu_s": cpu, "rss": rss, "bytes": made["text_bytes"], "ids": ids.hexdigest()}


def run_tiktoken(text: Path, tokenizer: str) -> dict[str, Any]:
    """tiktoken's batch encoder in this process."""
    ours = build_tokenizer(tokenizer)
    whole = text.read_bytes().decode()
    parts, start = [], 0
    while start < len(whole):
        part = whole[start : start + PART_CHARS]
        cut = ours.safe_cut(part)[0] if start + len(part) < len(whole) else len(part)
        parts.append(part[:cut])
        start += cut
    pattern = {"gpt2": bpe.GPT2_PATTERN, "bpe": ours.pattern}.get(ours.kind)
    theirs = (
        tiktoken.Encoding("peer", pat_str=pattern, mergeable_ranks=ours.ranks, special_tokens={})
        if pattern
        else tiktoken.get_encoding(ours.kind)
    )
    cpu, started = time.process_time(), time.perf_counter()
    lists = theirs.encode_ordinary_batch(parts, num_threads=n_cores())
    wall, cpu = time.perf_counter() - started, time.process_time() - cpu
    ids = hashlib.sha256()
    for part in lists:
        ids.update(np.array(part, ours.dtype).tobytes())
    return {"wall_s": wall, "cpu_s": cpu, "rss": peak_rss_bytes(), "bytes": len(whole.encode()), "ids": ids.hexdigest()}


def in_new_process(*words: Any) -> dict[str, Any]:
    command = [sys.executable, __file__, "--one", *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout)


def one(side: str, text: str, tokenizer: str, n_workers: str) -> dict[str, Any]:
    if side == "tiktoken":
        return run_tiktoken(Path(text), tokenizer)
    if side == "nnx":
        gigatoken.is_installed = lambda: False
    with tempfile.TemporaryDirectory(dir=Path(text).parent) as folder:
        return run_nnx(Path(text), tokenizer, int(n_workers), Path(folder) / "made")


def cases(kinds: list[str], folder: Path, n_bytes: int, given: Path | None) -> list[tuple[str, str, Path, str, int]]:
    """(label, side, text, tokenizer, workers) of every run of a round."""
    write_text(folder / "text.txt", n_bytes, given)
    if given is None and any(kind in ONE_CORE for kind in kinds):
        write_text(folder / "cyrillic.txt", n_bytes, None, cyrillic=True)
    found = []
    for kind in kinds:
        if kind in ONE_CORE:
            for text in sorted(folder.glob("*.txt"), reverse=True):
                label = kind if given else f"{kind}, {'ASCII' if text.stem == 'text' else 'Cyrillic'}"
                found.append((label, "nnx", text, kind, 1))
            continue
        tokenizer = kind
        if kind == "bpe":
            prepare([folder / "text.txt"], folder / "vocabulary", PrepareConfig(tokenizer="bpe"))
            tokenizer = str(folder / "vocabulary" / "tokenizer.json")
        found.append((kind, "tiktoken", folder / "text.txt", tokenizer, n_cores()))
        found.append((kind, "nnx", folder / "text.txt", tokenizer, n_cores()))
        if gigatoken.is_installed() and kind in gigatoken.SCHEMES:
            found.append((kind, "nnx + gigatoken", folder / "text.txt", tokenizer, n_cores()))
    return found


def table(results: dict[tuple[str, str, int], list[dict[str, Any]]]) -> str:
    lines = ["| tokenizer | side | cores | MB/s | CPU s | MB per CPU s | peak RSS MiB | ids |", "| --- " * 8 + "|"]
    oracle = {label: runs[0]["ids"] for (label, side, _), runs in results.items() if side == "tiktoken"}
    for (label, side, n_workers), runs in results.items():
        wall, cpu = (median(run[key] for run in runs) for key in ("wall_s", "cpu_s"))
        rss, n_bytes = median(run["rss"] for run in runs) / 2**20, runs[0]["bytes"] / 1e6
        same = "" if label not in oracle else "equal" if all(r["ids"] == oracle[label] for r in runs) else "DIFFER"
        lines.append(
            f"| {label} | {side} | {n_workers} | {n_bytes / wall:.0f} | {cpu:.2f} | {n_bytes / cpu:.0f} | {rss:.0f} "
            f"| {same} |"
        )
    return "\n".join(lines)


def main() -> None:
    if sys.argv[1:2] == ["--one"]:
        print(json.dumps(one(*sys.argv[2:])))
        return
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--megabytes", type=int, default=200)
    parser.add_argument("--text", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--kinds", nargs="*", default=["byte", "char", "bpe", "gpt2"])
    parser.add_argument("--markdown", type=Path)
    options = parser.parse_args()
    results: dict[tuple[str, str, int], list[dict[str, Any]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        todo = cases(options.kinds, Path(folder), options.megabytes * 10**6, options.text)
        for _ in range(options.rounds):
            for label, side, text, tokenizer, n_workers in todo:
                run = in_new_process(side, text, tokenizer, n_workers)
                results.setdefault((label, side, n_workers), []).append(run)
    head = (
        f"{cpu_model()}, {n_cores()} cores, load {os.getloadavg()[0]:.1f}, Python {platform.python_version()}, "
        f"{options.megabytes} MB, median of {options.rounds}, {date.today().isoformat()}"
    )
    text = f"{head}\n\n{table(results)}\n"
    print(text)
    if options.markdown:
        options.markdown.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
