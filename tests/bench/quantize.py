"""What quantization saves and costs: quality of trained models, files, decoding speed.

    python tests/bench/quantize.py --runs FOLDER [--text tinyshakespeare.txt] [--parts quality,files,speed]
                                   [--models nyx,llama] [--sizes nano,small,base,large] [--batches 1,8] [--device cuda]
                                   [--markdown FILE]

- quality: bits per byte of the six architectures at `nano`, trained on --text to FOLDER/NAME, for MINUTES each where no
  run is there yet. Quantized matmuls are used for every matrix, also for those so small that `nnx sample` unpacks them.
- files: whole folders of Tape in the shape of its author's notebook, random weights.
- speed: tokens a second of `nnx sample`, random weights; models take turns, and the best of several rounds counts.

With the runs there, all of it should take six minutes on two idle cores.
"""

from __future__ import annotations

import argparse
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from datetime import date
from pathlib import Path

import numpy as np
import torch

from nnx_cli import models
from nnx_cli.config import SampleConfig
from nnx_cli.convert.quantize import compare, quantized_state
from nnx_cli.data.token_folder import open_token_folder
from nnx_cli.inference.generate import generate
from nnx_cli.layers import quantized
from nnx_cli.layers.quantized import (
    Quantization,
    QuantizedMatrix,
    quantizable,
    quantize_layers,
    widen,
)
from nnx_cli.models._base import LanguageModel
from nnx_cli.runs.load import ModelRef, fill_model, load_model, model_from_config
from nnx_cli.runs.manifest import write_model_folder
from nnx_cli.runs.tensors import write_tensors
from nnx_cli.system.device import DTYPES, describe, set_seed

MINUTES = 1
CPU = torch.device("cpu")
NOTEBOOK = dict(vocab_size=65, dim=256, n_critics=4, seq_len=128)  # of Tape's author: 49,337,088 parameters
WAYS = {
    "int8": Quantization(bits=8, group_size=None, kept=[]),
    "int4": Quantization(bits=4, group_size=32, kept=[]),
}
QUALITY_LIMITS = {"int8": 0.5, "int4": 2.0}  # % of bits per byte
FILE_LIMITS = {"int8": 50, "int4": 30}  # MB
TITLE = """# Quantization, measured

By `python tests/bench/quantize.py`, which says what is measured and how: bits per byte of trained `nano` models (int8
may cost 0.5 %, int4 in groups of 32 may cost 2 %), whole folders of Tape in the shape of its author's notebook, and
tokens a second of `nnx sample`.
"""
ROUNDS, SECONDS = 8, 12.0  # of every model and batch, at most


def train(runs: Path, name: str, text: Path) -> None:
    """Make FOLDER/NAME where it is not there."""
    if not (runs / name / "model.safetensors").exists():
        line = [sys.executable, "-m", "nnx_cli", "train", "--model", name, "--size", "nano", "--filepath", str(text)]
        line += ["--max-time", f"{MINUTES}m", "--stop-early", "off", "--device", "cpu", "--out", str(runs / name)]
        subprocess.run(line, check=True)


def quality(runs: Path, text: Path) -> Iterator[str]:
    yield "| model | tokens | fp32 | int8 | | int4 | | |"
    yield "| --- | ---: | ---: | ---: | ---: | ---: | ---: | --- |"
    small, quantized.SMALL_MATRIX = quantized.SMALL_MATRIX, 0
    for name in models.names():
        train(runs, name, text)
        ref = ModelRef(runs / name)
        before = load_model(ref, CPU)
        folder = open_token_folder((runs / name / ref.config["data"]["folder"]).resolve())
        cells, reached = [], True
        for key, how in WAYS.items():
            after = model_from_config(ref.config, ref.folder)
            quantize_layers(after, how)
            fill_model(after, widen(quantized_state(before, how)), ref.folder, CPU, "fp32")
            found = compare(before, after, np.asarray(folder.val), folder.tokenizer.token_bytes())
            old, new, _ = found.in_units()
            share = 100 * (new / old - 1)
            reached &= share <= QUALITY_LIMITS[key]
            cells += [f"{new:.4f}", f"{share:+.3f}%"]
        verdict = "reached" if reached else "missed"
        yield f"| {name} | {found.n_tokens:,} | {old:.4f} | {' | '.join(cells)} | {verdict} |"
    quantized.SMALL_MATRIX = small


def files() -> Iterator[str]:
    yield "| | folder | |"
    yield "| --- | ---: | --- |"
    model = models.build("tape", **NOTEBOOK)
    n_parameters = sum(p.numel() for p in {id(p): p for p in model.parameters()}.values())
    config = {"model": {"name": "tape", **models.config_dict(model.config)}}
    with tempfile.TemporaryDirectory() as temporary:
        path = Path(temporary) / "fp32"
        path.mkdir()
        write_tensors(path / "model.safetensors", model.state_without_ties())
        yield f"| fp32, {n_parameters:,} parameters | {folder_bytes(path) / 1e6:.1f} MB | |"
        for key, how in WAYS.items():
            path = Path(temporary) / key
            path.mkdir()
            write_model_folder(path, config, None, quantized_state(model, how))
            size = folder_bytes(path) / 1e6
            verdict = "reached" if size < FILE_LIMITS[key] else "missed"
            yield f"| {key} | {size:.1f} MB | below {FILE_LIMITS[key]}: {verdict} |"


def folder_bytes(path: Path) -> int:
    return sum(each.stat().st_size for each in path.rglob("*") if each.is_file())


def random_quantized(name: str, size: str, how: Quantization, device: torch.device, precision: str) -> LanguageModel:
    """A model with random codes, as it is when it has been loaded."""
    with torch.device("meta"):
        model = models.build(name, size=size)
    stored = model.state_without_ties()
    linear = {key for key, layer in quantizable(model).items()}
    quantize_layers(model, how)
    state = {}
    for key, tensor in model.state_without_ties().items():
        owner = key.rpartition(".")[0]
        if isinstance(model.get_submodule(owner), QuantizedMatrix) and owner in linear:
            if key.endswith(".scale"):
                state[key] = torch.full(tensor.shape, 1e-3 if how.bits == 8 else 1e-2)
            else:
                low, high = (-127, 128) if tensor.dtype == torch.int8 else (0, 256)
                state[key] = torch.randint(low, high, tensor.shape, dtype=tensor.dtype)
        else:
            state[key] = torch.ones(stored[key].shape, dtype=stored[key].dtype)
    return fill_model(model, state, Path(), device, precision)


def speed(options: argparse.Namespace, device: torch.device) -> Iterator[str]:
    precision = "bf16" if device.type == "cuda" else "fp32"
    titles = [f"{key}{', batch ' + str(b)}" for b in options.batches for key in (precision, *WAYS)]
    yield f"| model | parameters | {' | '.join(titles)} |"
    yield f"| --- | ---: | {'---: | ' * len(titles)}".rstrip()
    for size in options.sizes:
        for name in options.models:
            set_seed(0)
            with device:
                plain = models.build(name, size=size).eval().requires_grad_(False)
            plain.compute_dtype = DTYPES[precision]
            n_parameters = sum(p.numel() for p in {id(p): p for p in plain.parameters()}.values())
            zoo = {precision: plain}
            zoo |= {key: random_quantized(name, size, how, device, precision) for key, how in WAYS.items()}
            cells = []
            for batch in options.batches:
                best = race(zoo, batch)
                cells += [f"{best[precision]:,.0f}"]
                cells += [f"{best[key]:,.0f} ({best[key] / best[precision]:.2f}×)" for key in WAYS]
            yield f"| {name} {size} | {n_parameters:,} | {' | '.join(cells)} |"
            del zoo, plain


def race(zoo: dict[str, LanguageModel], batch: int) -> dict[str, float]:
    """Tokens a second of every model: the best of rounds in which they take turns."""
    best = dict.fromkeys(zoo, 0.0)
    started, n = time.perf_counter(), 24
    for number in range(ROUNDS + 1):
        for key, model in zoo.items():
            how = SampleConfig(max_new_tokens=min(n, model.config.seq_len - 16), num_samples=batch)
            found = generate(model, None, [[1, 2, 3, 4]], how).decode_tokens_per_s
            if number:  # the first makes matmuls and kernels ready
                best[key] = max(best[key], found)
        if not number:
            steps_per_s = found / batch
            n = max(24, int(0.4 * steps_per_s))
        elif time.perf_counter() - started > SECONDS:
            break
    return best


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--runs", type=Path, default=Path("weights/quantize-bench"))
    parser.add_argument("--text", type=Path, default=Path("tinyshakespeare.txt"))
    parser.add_argument("--parts", type=lambda s: s.split(","), default=["quality", "files", "speed"])
    parser.add_argument("--models", type=lambda s: s.split(","), default=["nyx", "llama"])
    parser.add_argument("--sizes", type=lambda s: s.split(","), default=["nano", "small", "base", "large"])
    parser.add_argument("--batches", type=lambda s: [int(n) for n in s.split(",")], default=[1, 8])
    parser.add_argument("--device", type=torch.device, default=CPU)
    parser.add_argument("--markdown", type=Path)
    options = parser.parse_args()
    machine = f"{describe(options.device)}, {platform.machine()}, {torch.get_num_threads()} threads"
    lines = [TITLE, f"{machine}, torch {torch.__version__}, {date.today()}."]
    parts = {
        "quality": lambda: quality(options.runs, options.text),
        "files": files,
        "speed": lambda: speed(options, options.device),
    }
    print(lines[-1])
    for part in options.parts:
        lines += ["", f"## {part.capitalize()}", ""]
        for line in parts[part]():
            print(line, flush=True)
            lines.append(line)
    if options.markdown:
        options.markdown.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
