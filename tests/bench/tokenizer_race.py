"""Which tokenizer, and which windows: bits per byte of a text after the same training time.

    python tests/bench/tokenizer_race.py FILE... [--tokenizers byte bpe:1024 bpe:8192:nanochat ...]
                                         [--megabytes 1 10 ...] [--held-out 1000000]
                                         [--seconds 20 | --flops 1e13] [--seeds 3]
                                         [--windows free aligned] [--model nyx] [--size small]
                                         [--gpus 4] [--limit SECONDS]
                                         [--results FILE] [--markdown FILE] [--count]

A tokenizer is `byte`, or `bpe:SIZE` with the pattern of `--tokenizer bpe`, or `bpe:SIZE:PATTERN` (see PATTERNS). A
text is a file, or its first --megabytes; its last tenth, at most --held-out bytes, is held out, the same bytes for
every tokenizer. A run has --seconds of training steps with everything else on `auto`; validation, capturing CUDA graphs
and all preparing come on top. Where a clock cannot be trusted give --flops instead: then all take the steps that cost
as many FLOPs. Weights are judged on all that is held out, at LOOKS: the table has the best of these, and the last
("end").
--count trains nothing and shows bytes a token of what is held out.

--windows is where sequences begin: `free`, as `nnx train` cuts a text, or `aligned`, at documents (the rows of a JSONL
or CSV file): at the last one that the sequence before reaches or, inside a long one, where that ends. What is held out
is judged in windows without overlap and, in the column "aligned", in those, where every byte counts once.

Jobs are handed to --gpus processes, each of which sees one GPU (0: one process on the CPU, one thread), seeds
outermost. Finished ones are rows in --results and are not done again; none is begun that would end after --limit. On
four GPUs, eight minutes each:

    ... prose.txt code.txt hindi.txt table.csv --tokenizers bpe:8192:today bpe:8192:llama-bpe bpe:8192:qwen35 \\
        bpe:8192:nanochat --seconds 20 --gpus 4 --limit 480
    ... large.txt --megabytes 0.1 0.5 2 10 50 --tokenizers byte bpe:1024 bpe:4096 bpe:16384 --seconds 20 --gpus 4 \\
        --seeds 2 --limit 480
    ... short.jsonl long.jsonl --tokenizers byte bpe:8192 --windows free aligned --seconds 20 --gpus 4 --limit 480
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import os
import queue
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from zoo import make_trainer, take_step

from nnx_cli import models
from nnx_cli.config import PrepareConfig, TrainConfig
from nnx_cli.data.aligned_windows import windows_in_order
from nnx_cli.data.find import find_sources
from nnx_cli.data.formats import FORMATS
from nnx_cli.data.loader import Loader, windows_at
from nnx_cli.data.prepare import prepare
from nnx_cli.data.sources import Reader, Report
from nnx_cli.data.token_folder import open_token_folder
from nnx_cli.data.tokenizers import bpe
from nnx_cli.data.tokenizers.hf_json import save_tokenizer
from nnx_cli.errors import NnxError
from nnx_cli.evaluation.losses import evaluate
from nnx_cli.layers.loss import token_losses
from nnx_cli.planning.flops import training_flops
from nnx_cli.system.device import describe, pick_device, reset_peak_memory, synchronize

CONTRACTIONS = r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])"
LETTERS = r"|[^\r\n\p{L}\p{N}]?\p{L}+"
SPACES = r"|\s*[\r\n]+|\s+(?!\S)|\s+"
LETTERS_AND_MARKS = r"|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+"
PATTERNS = {  # those that llama.cpp runs too stand under its names (src/llama-vocab.cpp)
    "gpt-2": bpe.GPT2_PATTERN,
    "today": r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+|\p{N}{1,2}| ?[^\s\p{L}\p{N}]+|\s+$|\s+(?!\S)|\s",  # digits in pairs
    "llama-bpe": CONTRACTIONS + LETTERS + r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*" + SPACES,
    "qwen2": CONTRACTIONS + LETTERS + r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*" + SPACES,
    "qwen35": CONTRACTIONS + LETTERS_AND_MARKS + r"|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*" + SPACES,
    "nanochat": r"'(?i:[sdmt]|ll|ve|re)" + LETTERS + r"|\p{N}{1,2}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+",
    "marks": CONTRACTIONS + LETTERS_AND_MARKS + r"|\p{N}{1,3}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*" + SPACES,  # nobody's
}
LOOKS = (0.4, 0.6, 0.8, 0.9, 1.0)  # parts of a run after which its weights are judged
HELD_OUT = 0.1
MEGABYTE = 10**6
JUDGED_TOKENS = 8192  # at once
SYNC_STEPS = 10  # between two looks at the clock
KEYS = (
    "text",
    "megabytes",
    "tokenizer",
    "windows",
    "seed",
    "model",
    "size",
    "seconds",
    "flops",
)  # that make two jobs the same


def aligned_starts(documents: np.ndarray, n_tokens: int, seq_len: int) -> np.ndarray:
    """Where windows begin that go through documents and together have every token but the first as a target; the last
    ones end with the stream."""
    return np.unique(np.minimum(windows_in_order(documents, n_tokens, seq_len), n_tokens - 1 - seq_len))


def cut_text(path: Path, megabytes: float | None, folder: Path, most: int = 10**6) -> Path:
    """A folder with train and val: the beginning of a text and what is held out of that, both whole lines."""
    with open(path, "rb") as file:
        text = file.read(-1 if megabytes is None else int(megabytes * MEGABYTE))
    head = text[: text.find(b"\n") + 1] if path.suffix == ".csv" else b""
    n_val = min(int(len(text) * HELD_OUT), most)
    cut = text.rfind(b"\n", 0, len(text) - n_val) + 1 or len(text) - n_val
    folder.mkdir(parents=True)
    suffix = path.suffix if path.suffix in FORMATS else ".txt"
    (folder / f"train{suffix}").write_bytes(text[:cut])
    (folder / f"val{suffix}").write_bytes(head + text[cut:])
    return folder


def make_tokens(texts: Path, tokenizer: str, out: Path) -> None:
    """The token folder `out` of a cut text."""
    named, (train,), (val,) = tokenizer, texts.glob("train.*"), texts.glob("val.*")
    if tokenizer != "byte":
        _, size, *pattern = tokenizer.split(":")
        pieces = (piece.text for piece in Reader().pieces(find_sources([train]), Report()))
        named = str(out.with_suffix(".json"))
        save_tokenizer(bpe.train(pieces, int(size), *(PATTERNS[name] for name in pattern)), Path(named))
    prepare([train], out, PrepareConfig(tokenizer=named), [val])


def run_job(job: dict[str, Any]) -> dict[str, Any]:
    """Train one model and judge it. `job["data"]` is its token folder."""
    device = pick_device("cpu" if job["cpu"] else "cuda")
    reset_peak_memory(device)
    data = open_token_folder(job["data"])
    if job["flops"]:
        shape = make_trainer(job["model"], job["size"], data, TrainConfig(max_steps=1), device)
        flops = training_flops(job["model"], shape.model.config)
        cost = flops * shape.config.tokens_per_step
        config = TrainConfig(max_steps=max(10, round(job["flops"] / cost)), seed=job["seed"])
    else:
        config = TrainConfig(max_time=f"{job['seconds']}s", seed=job["seed"])
    trainer = make_trainer(job["model"], job["size"], data, config, device)
    if job["windows"] == "aligned":
        free, documents = trainer.stepper.loader, data.documents["train"]
        room = 0 if free.resident is None else data.train.nbytes
        trainer.stepper.loader = Loader(data.train, free.seq_len, free.seed, device, room, documents=documents)
    trainer.model.train()
    trainer.choose_execution("graph")
    seen = train(trainer, config)
    lengths = data.tokenizer.token_bytes()
    return {key: job[key] for key in KEYS} | {
        "best": min(seen.values()),
        "end": seen[1.0],
        "aligned": judge_aligned(trainer),
        "looks": list(seen.values()),
        "parameters": sum(p.numel() for p in trainer.model.parameters()),
        "vocab_size": data.vocab_size,
        "bytes_per_token": float(lengths[data.val].sum() / len(data.val)),
        "steps": trainer.state.step,
        "tokens": trainer.state.tokens,
        "epochs": trainer.state.tokens / len(data.train),
        "optimizer": trainer.config.optimizer,
        "dropout": trainer.model.config.dropout,
        "device": describe(device),
        "torch": torch.__version__,
    }


def train(trainer: Any, config: TrainConfig) -> dict[float, float]:
    """Bits per byte at LOOKS of a run that ends by the clock or after its steps."""
    state, seen = trainer.state, {}
    synchronize(trainer.device)
    started = time.perf_counter()
    while len(seen) < len(LOOKS):
        done = state.step / config.max_steps if config.max_steps else state.time_s / config.max_time_s
        if done < 1.0:
            take_step(trainer, done)
        if state.step % SYNC_STEPS == 0 or done >= 1.0:
            synchronize(trainer.device)
        if config.max_steps:
            done = state.step / config.max_steps
        else:
            state.time_s += time.perf_counter() - started
            done, started = state.time_s / config.max_time_s, time.perf_counter()
        if done >= LOOKS[len(seen)]:
            seen[LOOKS[len(seen)]] = judge(trainer)
            started = time.perf_counter()
    return seen


def judge(trainer: Any) -> float:
    """Bits per byte of all that is held out."""
    result = evaluate(
        trainer.model,
        trainer.data.val,
        seq_len=trainer.model.config.seq_len,
        batch_size=16,
        token_bytes=trainer.validation.token_bytes,
    )
    synchronize(trainer.device)
    assert result.bits_per_byte is not None
    return result.bits_per_byte


def judge_aligned(trainer: Any) -> float:
    """Bits per byte of all that is held out, read in windows that begin at documents."""
    model, tokens = trainer.model, trainer.data.val
    seq_len = min(model.config.seq_len, len(tokens) - 1)
    starts = aligned_starts(trainer.data.documents["val"], len(tokens), seq_len)
    model.eval()
    losses_of = partial(token_losses, model)
    return bits_per_byte(losses_of, tokens, trainer.validation.token_bytes, starts, seq_len, model.device)


@torch.no_grad()
def bits_per_byte(
    losses_of: Callable[[Tensor, Tensor], Tensor],
    tokens: np.ndarray,
    token_bytes: np.ndarray,
    starts: np.ndarray,
    seq_len: int,
    device: torch.device,
) -> float:
    """Bits per byte of a stream read in windows from `starts`, where every target counts in the first window that has
    it, and those without bytes (end-of-text) never."""
    known = np.concatenate([[0], np.maximum(starts[:-1] + seq_len - starts[1:], 0)])  # targets of the window before
    nats = n_bytes = 0.0
    at_once = max(1, JUDGED_TOKENS // seq_len)
    for some in range(0, len(starts), at_once):
        input_ids, targets = windows_at(tokens, starts[some : some + at_once], seq_len)
        lengths = torch.from_numpy(token_bytes[targets.numpy()].astype(np.int64))
        counts = torch.arange(seq_len) >= torch.from_numpy(known[some : some + at_once])[:, None]
        losses = losses_of(*(x.contiguous().to(device) for x in (input_ids, targets))).cpu().double()
        nats += float(losses[counts & (lengths > 0)].sum())
        n_bytes += int(lengths[counts].sum())
    return nats / math.log(2) / n_bytes


def work() -> None:
    """Jobs from standard input, a line each; results to standard output."""
    for line in sys.stdin:
        job = json.loads(line)
        try:
            answer = run_job(job)
        except NnxError as error:  # the text is too short, the model too large
            answer = job | {"failed": str(error)}
        print(json.dumps(answer), flush=True)


def feed(
    gpu: int | None, jobs: queue.Queue[dict[str, Any]], done: list[dict[str, Any]], options: Any, end: float
) -> None:
    """Hand jobs to a process of its own that sees one GPU, until there are none or the time is up."""
    environment = os.environ | ({"OMP_NUM_THREADS": "1"} if gpu is None else {"CUDA_VISIBLE_DEVICES": str(gpu)})
    command = [sys.executable, __file__, "--worker"]
    longest = 0.0
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    ) as process:
        assert process.stdin is not None and process.stdout is not None
        while time.monotonic() + longest < end:
            try:
                job = jobs.get_nowait()
            except queue.Empty:
                break
            started = time.monotonic()
            process.stdin.write(json.dumps(job) + "\n")
            process.stdin.flush()
            answer = process.stdout.readline()
            longest = max(longest, time.monotonic() - started)
            row = json.loads(answer or '{"failed": "its process died"}')
            name = f"{job['text']} {job['megabytes'] or 'all'} {job['tokenizer']} {job['windows']} {job['seed']}"
            print(f"{name}: {row['failed'] if 'failed' in row else row['best']}", flush=True)
            if not answer:
                break
            if "failed" not in row:
                done.append(row)
                with open(options.results, "a", encoding="utf-8") as file:
                    file.write(answer)
        process.stdin.close()


def table(rows: list[dict[str, Any]]) -> list[str]:
    """A line for each text and tokenizer, the best of a text in bold."""
    groups: dict[tuple, list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault(tuple(row[key] for key in ("text", "megabytes", "tokenizer", "windows")), []).append(row)
    best = {}
    for (text, megabytes, *_), found in groups.items():
        mean = statistics.mean(row["best"] for row in found)
        best[text, megabytes] = min(mean, best.get((text, megabytes), mean))
    lines = [
        "| text | MB | tokenizer | windows | ids | bytes a token | parameters | epochs | bits per byte | ± | end "
        "| aligned | seeds |",
        "|" + " --- |" * 13,
    ]
    for (text, megabytes, tokenizer, windows), found in sorted(
        groups.items(), key=lambda item: (item[0][0], item[0][1] or 0)
    ):
        bits = [row["best"] for row in found]
        mean, row = statistics.mean(bits), found[0]
        error = f"{statistics.stdev(bits) / len(bits) ** 0.5:.4f}" if len(bits) > 1 else "–"
        shown = f"**{mean:.4f}**" if mean == best[text, megabytes] else f"{mean:.4f}"
        lines.append(
            f"| {text} | {megabytes or 'all'} | {tokenizer} | {windows} | {row['vocab_size']:,} "
            f"| {row['bytes_per_token']:.2f} | {row['parameters'] / 1e6:.2f} M | {row['epochs']:.1f} | {shown} "
            f"| {error} | {statistics.mean(row['end'] for row in found):.4f} "
            f"| {statistics.mean(row['aligned'] for row in found):.4f} | {len(found)} |"
        )
    return lines


def counts(options: argparse.Namespace, scratch: Path) -> list[str]:
    """Bytes a token of what is held out: a line for each text, a column for each tokenizer."""
    lines = ["| text | " + " | ".join(options.tokenizers) + " |", "|" + " --- |" * (1 + len(options.tokenizers))]
    for path, megabytes in product(options.text, options.megabytes):
        texts = cut_text(path, megabytes, scratch / f"{path.stem}-{megabytes}", options.held_out)
        cells = []
        for tokenizer in options.tokenizers:
            make_tokens(texts, tokenizer, out := texts / tokenizer.replace(":", "-"))
            data = open_token_folder(out)
            cells.append(f"{data.tokenizer.token_bytes()[data.val].sum() / len(data.val):.2f}")
        lines.append(f"| {path.stem} | " + " | ".join(cells) + " |")
        print(lines[-1], flush=True)
    return lines


def race(options: argparse.Namespace, scratch: Path) -> list[dict[str, Any]]:
    """Prepare what is needed, run what is missing, and return all rows of these jobs."""
    end = time.monotonic() + options.limit
    known = [json.loads(line) for line in options.results.read_text().splitlines()] if options.results.exists() else []
    finished = {tuple(row[key] for key in KEYS): row for row in known}
    jobs, seconds = [], None if options.flops else options.seconds
    for seed, path, megabytes, tokenizer, windows in product(
        range(options.seeds), options.text, options.megabytes, options.tokenizers, options.windows
    ):
        named = f"{path.stem}-{megabytes or 'all'}"
        data = scratch / named / tokenizer.replace(":", "-")
        settings = {"model": options.model, "size": options.size, "seconds": seconds, "flops": options.flops}
        job = {"text": path.stem, "megabytes": megabytes, "tokenizer": tokenizer, "windows": windows, "seed": seed}
        jobs.append(job | settings | {"data": str(data), "cpu": not options.gpus})
    todo = [job for job in jobs if tuple(job[key] for key in KEYS) not in finished]
    waiting: queue.Queue[dict[str, Any]] = queue.Queue()
    with ProcessPoolExecutor(max_workers=options.workers) as pool:
        for path, megabytes in product(options.text, options.megabytes):
            cut_text(path, megabytes, scratch / f"{path.stem}-{megabytes or 'all'}", options.held_out)
        made = {}
        for job in todo:
            data = Path(job["data"])
            if data not in made:
                made[data] = pool.submit(make_tokens, data.parent, job["tokenizer"], data)
        for preparing in made.values():
            preparing.result()
    for job in todo:
        waiting.put(job)
    done: list[dict[str, Any]] = []
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    gpus: list[Any] = (visible.split(",") if visible else list(range(options.gpus)))[: options.gpus] or [None]
    threads = [threading.Thread(target=feed, args=(gpu, waiting, done, options, end)) for gpu in gpus]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    finished |= {tuple(row[key] for key in KEYS): row for row in done}
    if not waiting.empty():
        print(f"{waiting.qsize()} jobs left: call again with the same --results", file=sys.stderr)
    return [finished[key] for job in jobs if (key := tuple(job[name] for name in KEYS)) in finished]


def main() -> None:
    if sys.argv[1:] == ["--worker"]:
        work()
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", type=Path, nargs="+", metavar="FILE")
    parser.add_argument("--tokenizers", nargs="+", default=["byte", "bpe:1024", "bpe:4096", "bpe:16384"])
    parser.add_argument("--megabytes", nargs="+", type=float, default=[None])
    parser.add_argument("--held-out", type=int, default=10**6)
    parser.add_argument("--windows", nargs="+", choices=["free", "aligned"], default=["free"])
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--flops", type=float)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--model", default="nyx", choices=models.names())
    parser.add_argument("--size", default="small")
    parser.add_argument("--gpus", type=int, default=torch.cuda.device_count())
    parser.add_argument("--workers", type=int, default=None, help="processes that prepare")
    parser.add_argument("--limit", type=float, default=1e9)
    parser.add_argument("--results", type=Path, default=Path("tokenizer_race.jsonl"))
    parser.add_argument("--markdown", type=Path)
    parser.add_argument("--count", action="store_true", help="bytes a token, without training")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        if options.count:
            print("\n".join(counts(options, Path(scratch))))
            return
        rows = race(options, Path(scratch))
    budget = f"{options.flops:.2g} FLOPs" if options.flops else f"{options.seconds:g} s of training"
    head = f"{options.model} {options.size}, {budget} a run"
    machine = f"{rows[0]['device']}, torch {rows[0]['torch']}" if rows else "nothing ran"
    output = "\n".join([f"{head}; {machine}, {datetime.date.today().isoformat()}.", "", *table(rows), ""])
    print(output)
    if options.markdown:
        options.markdown.write_text(output, encoding="utf-8")


if __name__ == "__main__":
    main()
