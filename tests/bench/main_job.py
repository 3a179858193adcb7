"""The main job on this machine: what README says of it, measured.

    python tests/bench/main_job.py --text tinyshakespeare.txt [--markdown tests/bench/main_job.md]

First `nnx train --model nyx` without a file: seconds until the first sample is on the screen and until the command
ends, and of the words of four letters and more in five samples of 300 characters the share that occurs in the training
text. Then 60 seconds of training on --text with all defaults: bits per byte. Then decoding of a 30 million parameter
model in fp32, int8 and int4 (random weights: speed does not depend on them). Run it on a quiet machine, in an empty
folder or with --folder.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from nnx_cli.data.sources import builtin_corpus
from nnx_cli.system.machine import cpu_model

NNX = [sys.executable, "-m", "nnx_cli"]


def run(*words: object, folder: Path) -> subprocess.CompletedProcess:
    return subprocess.run([*NNX, *map(str, words)], cwd=folder, capture_output=True, text=True, check=True)


def known_words(samples: list[str], text: str) -> float:
    """Share of the words of four letters and more in `samples` that occur in `text`."""
    pattern = re.compile(r"[^\W\d_]{4,}")
    vocabulary = set(pattern.findall(text))
    words = [word for sample in samples for word in pattern.findall(sample)]
    return sum(word in vocabulary for word in words) / len(words)


def first_run(folder: Path) -> dict[str, object]:
    """The default run: `nnx train --model nyx`, no file."""
    started = time.perf_counter()
    first_sample = None
    command = [*NNX, "train", "--model", "nyx"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, cwd=folder, **pipes) as process:
        for line in process.stderr:
            if first_sample is None and "sample at step" in line:
                first_sample = time.perf_counter() - started
        verdict = process.stdout.read()
    seconds = time.perf_counter() - started
    drawn = json.loads(
        run("sample", "--num-samples", 5, "--max-new-tokens", 300, "--temperature", 0.8, "--json", folder=folder).stdout
    )
    share = known_words([sample["text"] for sample in drawn["samples"]], builtin_corpus())
    status = json.loads((folder / "weights" / "nyx-python-docs" / "run.json").read_text())
    return {
        "first sample, s": round(first_sample or 0, 1),
        "whole command, s": round(seconds, 1),
        "known words": f"{share:.1%}",
        "bits per byte": round(status["best_val_bits_per_byte"], 3),
        "steps": status["step"],
        "verdict": verdict.strip(),
    }


def one_minute(folder: Path, text: Path) -> dict[str, object]:
    """`nnx train --max-time 60s` with all defaults."""
    started = time.perf_counter()
    status = json.loads(run("train", "--filepath", text, "--max-time", "60s", "--json", folder=folder).stdout)
    judged = json.loads(run("eval", status["out"], "--json", folder=folder).stdout)
    return {
        "whole command, s": round(time.perf_counter() - started, 1),
        "steps": status["step"],
        "tokens": status["tokens"],
        "bits per byte in the run": round(status["best_val_bits_per_byte"], 3),
        "bits per byte, whole split": f"{judged['bits_per_byte']:.3f} ± {judged['bits_per_byte_stderr']:.3f}",
    }


def decoding(folder: Path, text: Path) -> dict[str, object]:
    """Receipts of a 30 million parameter NYX in 8 and 4 bits."""
    run(
        "train",
        "--filepath",
        text,
        "--size",
        "small",
        "--seq-len",
        128,
        "--tokens-per-step",
        256,
        "--max-steps",
        1,
        "--out",
        "weights/small",
        "--sample-every",
        0,
        "--quiet",
        folder=folder,
    )
    found: dict[str, object] = {}
    for bits in (8, 4):
        receipt = json.loads(run("quantize", "small", "--bits", bits, "--max-drop", 9, "--json", folder=folder).stdout)
        before, after = (receipt[side]["decode_tokens_per_s"] for side in ("before", "after"))
        found[f"fp32 beside int{bits}, tokens/s"] = round(before)
        found[f"int{bits}, tokens/s"] = f"{after:.0f} ({after / before:.2f} x)"
        found[f"int{bits} file, bytes"] = f"{receipt['after']['file_bytes']:,} of {receipt['before']['file_bytes']:,}"
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--markdown", type=Path)
    options = parser.parse_args()
    text = options.text.resolve()
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        parts = {
            "`nnx train --model nyx`": first_run(folder),
            f"`nnx train --filepath {text.name} --max-time 60s`": one_minute(folder, text),
            "decoding, NYX `small`, batch 1": decoding(folder, text),
        }
    today = datetime.date.today().isoformat()
    lines = [
        "# The main job, measured",
        "",
        f"{cpu_model()}, {torch.get_num_threads()} threads, torch {torch.__version__}, "
        f"Python {platform.python_version()}, {platform.system()}, {today}. "
        f"Made by `python tests/bench/main_job.py --text {text.name}`.",
        "",
    ]
    for title, rows in parts.items():
        lines += [f"## {title}", "", "| figure | measured |", "| --- | --- |"]
        lines += [f"| {name} | {value} |" for name, value in rows.items() if name != "verdict"] + [""]
        if "verdict" in rows:
            lines += ["```", str(rows["verdict"]), "```", ""]
    output = "\n".join(lines)
    print(output)
    if options.markdown:
        options.markdown.write_text(output, encoding="utf-8")


if __name__ == "__main__":
    main()
