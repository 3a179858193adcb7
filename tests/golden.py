"""Whether two commits compute the same numbers, to the last digit.

    python tests/golden.py OLD NEW [--quick] [--models nyx,llama]
    python tests/golden.py --record

OLD and NEW are commits, or folders with a checkout in them (with what is not committed there). Both run on this
machine, one thread, through the command line alone, so that what is inside may be arranged in any way. Every setting
that a run could derive from a clock is given. One line tells of each thing compared; exit 1 where anything differs.

`--record` writes tests/golden.json, the numbers of tests/test_golden.py, with the code as it is. Do that only in a
commit that is meant to alter a number and says why.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import math
import os
import random
import runpy
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

NNX = Callable[..., str]  # runs a command line and returns what it printed

MODELS = ("nyx", "ngpt", "n4", "neon", "tape", "llama")
SIZES = ("nano", "tiny", "small", "base", "large", "xl")
MORE_SIZES = {"neon": ("test", "spark", "glow", "beam", "arc", "nova")}
WORDS = "the a cat dog tree sees likes über naïve 小猫 and under river stone light 🙂 old small quickly".split()
LR = {"muon": 0.01, "adamw": 0.003, "lion": 0.0003}

# No matrix of a nano with bytes for tokens has more than 2**17 weights, and up to there int8 products are not raced
# but computed in floating point: so no receipt here depends on a clock. Larger ones are left out.
LARGE = ("--size", "nano", "--seq-len", 64, "--batch-size", 4, "--grad-accum", 2)
SMALL = ("--n-layers", 2, "--dim", 64, "--n-heads", 4, "--seq-len", 32, "--batch-size", 4, "--grad-accum", 2)
LARGE_RUNS = tuple((model, "muon") for model in MODELS) + tuple(
    (model, optimizer) for model in ("nyx", "llama") for optimizer in ("adamw", "lion")
)
SMALL_RUNS = (*LARGE_RUNS[:6], ("nyx", "adamw"), ("llama", "lion"))

CPU = ("--device", "cpu")
ALONE = ("--compile", "off", *CPU, "--precision", "fp32", "--weight-precision", "fp32", "--threads", 1)
ALONE += ("--activation-checkpointing", "off", "--sample-every", 0, "--keep", 1, "--seed", 1337, "--deterministic")

SUMMARIES = (
    "",
    "--vram 8GB",
    "--batch-size 4 --optimizer adamw --precision fp32 --activation-checkpointing off",
    "--batch-size 4 --optimizer lion --activation-checkpointing on --vram 8GB",
    "--optimizer muon --activation-checkpointing half --vram 8GB",
    "--optimizer adamw8bit --weight-precision bf16 --precision bf16 --activation-checkpointing on",
    "--batch-size 2 --optimizer wolf --optimizer-in-backward --activation-checkpointing off --vram 8GB",
    "--batch-size 8 --lora-rank 8 --precision fp16",
)
FEWER_SUMMARIES, FEWER_SIZES = SUMMARIES[1:4], ("nano", "small", "xl")


def write_text(path: Path, lines: int = 400) -> Path:
    """A text of a few words, always the same, some of them not ASCII."""
    draw = random.Random(5)
    text = "".join(" ".join(draw.choices(WORDS, k=draw.randint(4, 9))) + "\n" for _ in range(lines))
    path.write_text(text, encoding="utf-8", newline="\n")
    return path


def prepare(nnx: NNX, folder: Path) -> Path:
    """The text as bytes, in a token folder."""
    data = folder / "data" / "words"
    nnx("prepare", write_text(folder / "words.txt"), "--out", data, "--tokenizer", "byte", "--workers", 1, "--quiet")
    return data


def train(nnx: NNX, data: Path, out: Path, model: str, optimizer: str, shape: tuple, steps: int) -> list[dict]:
    """What a run logs of each of its steps, without times."""
    words = ("train", "--model", model, "--data", data, "--out", out, *shape, "--dropout", 0.1, *ALONE)
    words += ("--optimizer", optimizer, "--lr", LR[optimizer], "--weight-decay", 0.1)
    words += ("--schedule", "linear", "--warmup-steps", 5, "--max-steps", steps, "--save-every", steps)
    nnx(*words, "--val-every", 1, "--val-batches", 2, "--quiet")
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def sample(nnx: NNX, run: Path, *how: object) -> list[str]:
    found = json.loads(nnx("sample", run, "--prompt", "the cat", "--precision", "fp32", *CPU, "--json", *how))
    return [sample["text"] for sample in found["samples"]]


def evaluate(nnx: NNX, run: Path) -> dict[str, Any]:
    """What `eval` finds, without its speed."""
    found = json.loads(nnx("eval", run, "--precision", "fp32", *CPU, "--json"))
    return {key: value for key, value in found.items() if key not in ("model", "tokens_per_s")}


def quantize(nnx: NNX, run: Path, out: Path) -> dict[str, Any]:
    """An int8 receipt without its speeds."""
    found = json.loads(nnx("quantize", run, "--bits", 8, "--max-drop", 1, "--out", out, *CPU, "--json"))
    del found["out"]
    for side in ("before", "after"):
        del found[side]["decode_tokens_per_s"]
    return found


def measure_run(
    nnx: NNX, data: Path, model: str, optimizer: str, shape: tuple = LARGE, steps: int = 60, length: int = 64
) -> dict[str, Any]:
    """All that is compared of one run."""
    run = data.parents[1] / "weights" / f"{model}-{optimizer}"
    logged = train(nnx, data, run, model, optimizer, shape, steps)
    return {
        **{key: [row[key] for row in logged] for key in ("train_loss", "val_loss", "grad_norm")},
        "greedy": sample(nnx, run, "--greedy", "--max-new-tokens", length),
        "seeded": sample(nnx, run, "--seed", 7, "--top-k", 40, "--num-samples", 2, "--max-new-tokens", length),
        "eval": evaluate(nnx, run),
        "int8": quantize(nnx, run, run.with_name(f"{run.name}-int8")),
    }


def measure_runs(nnx: NNX, model: str, steps: int) -> dict[str, Any]:
    """All that is compared of an architecture's runs, in the current folder."""
    data = prepare(nnx, Path())
    runs = [run for run in LARGE_RUNS if run[0] == model]
    return {" ".join(run): measure_run(nnx, data, *run, steps=steps) for run in runs}


def measure_summaries(nnx: NNX, model: str, quick: bool) -> dict[str, Any]:
    """What `summarize` says of every size."""
    sizes = FEWER_SIZES if quick else SIZES + MORE_SIZES.get(model, ())
    found = {}
    for size in sizes:
        for options in FEWER_SUMMARIES if quick else SUMMARIES:
            words = ("summarize", "--model", model, "--size", size, *options.split())
            found[" ".join(words)] = json.loads(nnx(*words, "--json", may_fail=True))
    return found


def run_here(*words: object, may_fail: bool = False) -> str:
    """Run a command line in this process, as `python -m nnx_cli` does; returns what it printed."""
    printed, said, code = io.StringIO(), io.StringIO(), 0
    line = ["nnx", *map(str, words)]
    with mock.patch.object(sys, "argv", line), contextlib.redirect_stdout(printed), contextlib.redirect_stderr(said):
        try:
            runpy.run_module("nnx_cli", run_name="__main__")
        except SystemExit as end:
            code = end.code or 0
    if code and not may_fail:
        raise RuntimeError(f"{' '.join(line)} ended with {code}: {said.getvalue()}")
    return printed.getvalue()


def measure(out: Path, model: str, quick: bool) -> None:
    """In a process that sees one checkout only: write what it finds for one architecture."""
    steps = 20 if quick else 60
    found = measure_runs(run_here, model, steps) | measure_summaries(run_here, model, quick)
    out.write_text(json.dumps(found))


def measured(checkout: Path, model: str, quick: bool) -> dict[str, Any]:
    """What a checkout finds for one architecture, in a process and an empty folder of its own."""
    environment = os.environ | {"PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    with tempfile.TemporaryDirectory() as folder:
        words = [sys.executable, Path(__file__).resolve(), "--measure", model, *(["--quick"] if quick else [])]
        subprocess.run(words, cwd=folder, env=environment, check=True)
        return json.loads((Path(folder) / "found.json").read_text())


@contextlib.contextmanager
def checkout(spec: str) -> Iterator[Path]:
    """The folder of a checkout: `spec` itself, or a commit's, which is there for as long as it is needed."""
    if (Path(spec) / "nnx_cli").is_dir():
        yield Path(spec).resolve()
        return
    git = ["git", "-C", str(Path(__file__).resolve().parent)]
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder) / "tree"
        subprocess.run([*git, "worktree", "add", "--quiet", "--detach", tree, spec], check=True)
        try:
            yield tree
        finally:
            subprocess.run([*git, "worktree", "remove", "--force", tree], check=True)


def differences(old: Any, new: Any, where: str = "") -> Iterator[str]:
    """Each place where two measurements differ; a key that is new is none."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in old:
            yield from differences(old.get(key), new.get(key), f"{where} {key}")
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        for number, pair in enumerate(zip(old, new, strict=True)):
            yield from differences(*pair, f"{where}[{number}]")
    elif old != new:
        yield f"{where.strip()}: {old!r}, then {new!r}"


def parts(found: dict[str, Any]) -> dict[str, Any]:
    """The things that get a line each: the parts of runs, and summaries."""
    flat = {}
    for name, value in found.items():
        flat |= {name: value} if name.startswith("summarize") else {f"{name} {key}": value[key] for key in value}
    return flat


def compare(old: dict[str, Any], new: dict[str, Any]) -> int:
    """Print a line for each thing compared; returns how many differ."""
    n_different = 0
    for name in old:
        found = list(differences(old.get(name), new.get(name)))
        n_different += bool(found)
        print(f"{name}: " + (f"{len(found)} values differ, first {found[0]}" if found else "equal"), flush=True)
    return n_different


def capability() -> dict[str, str]:
    """What the last digits depend on."""
    import torch

    from nnx_cli.system.hardware import cpu_vendor

    capability = torch.backends.cpu.get_cpu_capability()
    return {"cpu_vendor": cpu_vendor(), "cpu_capability": capability, "torch": torch.__version__}


INEXACT = {"grad_norm", "greedy", "seeded", "kl_divergence", "same_top_token"}  # what small differences may change


def unlike(recorded: Any, found: Any, exact: bool) -> list[str]:
    """Where `found` is not as recorded: to the last digit where `exact`, else within 1e-4, without INEXACT."""
    if exact:
        return list(differences(recorded, found))
    return list(differences(rounded(recorded, recorded), rounded(found, recorded)))


def rounded(found: Any, recorded: Any) -> Any:
    """`found` with what is close to the recorded in its place."""
    if isinstance(found, dict) and isinstance(recorded, dict):
        return {key: rounded(value, recorded.get(key)) for key, value in found.items() if key not in INEXACT}
    if isinstance(found, list) and isinstance(recorded, list) and len(found) == len(recorded):
        return [rounded(*pair) for pair in zip(found, recorded, strict=True)]
    numbers = isinstance(found, float) and isinstance(recorded, float)
    return recorded if numbers and math.isclose(found, recorded, rel_tol=1e-4) else found


def measure_small(nnx: NNX, data: Path, run: tuple[str, str]) -> dict[str, Any]:
    """The small form: what tests/golden.json records of a run. A step of tape takes as long as ten of others."""
    return measure_run(nnx, data, *run, shape=SMALL, steps=8 if run[0] == "tape" else 20, length=24)


BF16 = "llama"  # its weights are bfloat16: that early version trained them, and could not open them again


def written(nnx: NNX, model: Path) -> dict[str, Any]:
    """A greedy sample and the losses of a model."""
    greedy = ("--greedy", "--max-new-tokens", 24)
    return {"greedy": sample(nnx, model, *greedy), "eval": evaluate(nnx, model)}


def resumed(nnx: NNX, run: Path, steps: int = 9) -> dict[str, Any]:
    """A run of tests/folders, gone on with to its step 9: what it logs from there on, and what it writes."""
    nnx("train", "--resume", run, "--max-steps", steps, "--quiet")
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    logged = {key: [row[key] for row in rows] for key in ("step", "train_loss", "val_loss", "grad_norm")}
    return logged if run.name == BF16 else logged | written(nnx, run)


def trained_on(nnx: NNX, data: Path) -> dict[str, Any]:
    """What a run on a token folder of tests/folders logs."""
    shape = ("--n-layers", 2, "--dim", 32, "--n-heads", 2, "--seq-len", 32, "--batch-size", 4, "--grad-accum", 1)
    rows = train(nnx, data, Path("weights") / f"on-{data.name}", "nyx", "muon", shape, steps=6)
    return {key: [row[key] for row in rows] for key in ("train_loss", "val_loss")}


def record_folders() -> None:
    """Write tests/folders/expected.json: only ever with the code that wrote those folders."""
    folders = Path(__file__).resolve().with_name("folders")
    found: dict[str, Any] = capability()
    with tempfile.TemporaryDirectory() as copies, contextlib.chdir(copies):
        for kind in ("data", "weights"):
            shutil.copytree(folders / kind, kind)
        for path in sorted(Path("data").iterdir()):
            found[path.name] = trained_on(run_here, path)
        for path in sorted((folders / "weights").iterdir()):
            what = resumed if (path / "checkpoints").is_dir() else written
            found[path.name] = what(run_here, Path("weights") / path.name)
    (folders / "expected.json").write_text(json.dumps(found, indent=1) + "\n")


def record() -> None:
    """Write tests/golden.json."""
    path = Path(__file__).resolve().with_name("golden.json")
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        data = prepare(run_here, Path())
        runs = {" ".join(run): measure_small(run_here, data, run) for run in SMALL_RUNS}
    path.write_text(json.dumps(capability() | {"runs": runs}, indent=1) + "\n")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("old", nargs="?")
    parser.add_argument("new", nargs="?")
    parser.add_argument("--quick", action="store_true", help="20 steps, and fewer summaries")
    parser.add_argument("--models", default=",".join(MODELS), help="architectures, separated by commas")
    parser.add_argument("--record", action="store_true", help="write tests/golden.json with the code as it is")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        measure(Path("found.json"), options.measure, options.quick)
        return 0
    if options.record:
        record()
        return 0
    if options.new is None:
        parser.error("name two commits or checkouts")
    n_different = 0
    with checkout(options.old) as old, checkout(options.new) as new:
        for model in options.models.split(","):
            found = [parts(measured(tree, model, options.quick)) for tree in (old, new)]
            n_different += compare(*found)
    print(f"{n_different} things differ" if n_different else "all equal")
    return 1 if n_different else 0


if __name__ == "__main__":
    sys.exit(main())
