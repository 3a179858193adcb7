"""What authors of the zoo's architectures promise and did not build, as options here: what each brings.

    python tests/bench/promises.py PART --text FILE [--size SIZE] [--tokens N] [--seeds 3] [--limit SECONDS]
                                   [--rows FILE] [--markdown FILE]

A row that stands in --rows is not measured again, and none is begun that would end after --limit: the same command
goes on.

latents: N4 with keys and values of each head, of fewer heads that queries share, and risen from a latent that takes at
    most as much cache as those; the width of the feed-forward makes up for the parameters. Loss is the mean over the
    validation split and the seeds, ± half of their spread. Decoding is of the same shapes, untrained, at a context
    of --context tokens.
beyond: NYX of several xPos scale bases, and with plain rotary positions, at 1 to 8 times the context that it was
    trained with, in bits per byte of validation text: of the last quarter of the trained context, the same targets in
    contexts of all lengths, and over all positions, the same text cut into windows of all lengths. With a window,
    attention reaches as many positions as the trained context has, as it would in decoding: through the cache.
tape: Tape (nano) with other tails of its head's kernel, without its critics, moderator or prophet, and with a reward
    for the entropy of attention; the width of the feed-forward makes up for the parameters. Loss of the validation
    split ± its standard error, and what it is less that of Tape as it is with the same seeds; speed of the fastest
    run, peak of memory, and the degrees of freedom that were learned.
"""

from __future__ import annotations

import argparse
import datetime
import math
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from rows import Rows
from torch import Tensor
from zoo import coerced, make_trainer_for, race, table, train

from nnx_cli import models
from nnx_cli.config import PrepareConfig
from nnx_cli.data.loader import windows_at
from nnx_cli.data.prepare import prepare
from nnx_cli.data.token_folder import TokenFolder, open_token_folder
from nnx_cli.evaluation.context import check_text
from nnx_cli.evaluation.losses import evaluating
from nnx_cli.experiments.benchmark import Case, Limits, decoding
from nnx_cli.experiments.statistics import mean_and_error
from nnx_cli.layers.loss import token_losses
from nnx_cli.models._base import LanguageModel, ModelConfig
from nnx_cli.planning.flops import count_parameters, meta_model, sampling_bytes
from nnx_cli.system.device import (
    describe,
    peak_memory_bytes,
    pick_device,
    pick_precision,
    release_memory,
    reset_peak_memory,
)
from nnx_cli.training.trainer import Trainer

FFN_STEP = 8  # of widths that are tried
BATCHES = (1, 16)
NO_LIMITS = Limits({}, 1.0)

SCALE_BASES = (64.0, 256.0, 512.0, 2048.0, None)  # None: plain rotary positions
FACTORS = (1, 2, 4, 8)  # of the trained context
N_WINDOWS = 256  # at most, whose last quarters are measured
TOKENS_AT_ONCE = 32_768

TOKENS_PER_STEP = 4096  # of Tape, whose prophet takes as long for a small batch
TAPES: dict[str, dict[str, Any]] = {
    "as it is: ν = e, a critic and the moderator, the prophet": {},
    "ν = 1": {"student_df": 1.0},
    "ν = 10": {"student_df": 10.0},
    "ν = 100": {"student_df": 100.0},
    "ν learned, from e on": {"tails": "learned"},
    "normal, the limit of ν": {"tails": "normal"},
    "the coda alone, nobody reads a prophet": {"n_critics": 0},
    "the moderator alone": {"n_critics": 1},
    "two critics, no moderator": {"moderator": False},
    "no prophet": {"prophet": False},
    "entropy rewarded with 0.01": {"entropy_weight": 0.01},
    "entropy rewarded with 0.1": {"entropy_weight": 0.1},
}


def caches(size: str) -> Iterator[dict[str, int]]:
    """Fields of N4 at a size: plain, and for each number of shared heads those, and a latent with no more cache."""
    plain = models.make_config("n4", size=size)
    head_dim = plain.dim // plain.n_heads
    yield {}
    for n_kv_heads in (n for n in (2, 1) if plain.n_heads % n == 0 and n < plain.n_heads):
        yield {"n_kv_heads": n_kv_heads}
        yield {"kv_latent_dim": (2 * n_kv_heads * head_dim - plain.n_heads) // 8 * 8}


def as_large(name: str, fields: dict[str, Any], size: str) -> ModelConfig:
    """A model with these fields, whose feed-forward brings it to the parameters of the plain one."""
    plain = models.make_config(name, size=size)

    def widened(steps: int) -> ModelConfig:
        return models.make_config(name, size=size, **fields, ffn_dim=plain.ffn_dim + steps * FFN_STEP)

    def parameters(config: ModelConfig) -> int:
        return count_parameters(meta_model(name, config))["total"]

    start = parameters(widened(0))
    return widened(round((parameters(plain) - start) / (parameters(widened(1)) - start)))


def latents(
    data: TokenFolder, options: argparse.Namespace, device: torch.device, rows: Rows
) -> Iterator[dict[str, Any]]:
    """A row for every way to keep keys and values."""
    for fields in caches(options.size):
        name = " ".join(f"{key}={value}" for key, value in fields.items()) or "of each head"
        measured = rows.get(lambda fields=fields: with_cache(fields, data, options, device), cache=name)
        if measured is not None:
            yield {"keys and values": name} | measured


def with_cache(
    fields: dict[str, int], data: TokenFolder, options: argparse.Namespace, device: torch.device
) -> dict[str, Any]:
    """What N4 with these fields takes and brings."""
    precision = pick_precision("auto", device)
    config = as_large("n4", fields, options.size)
    settings = coerced("n4", {key: str(value) for key, value in fields.items()} | {"ffn_dim": str(config.ffn_dim)})
    raced = race("n4", options.size, data, options.tokens, options.seeds, device, **settings)
    model = meta_model("n4", replace(config, seq_len=options.context))
    row: dict[str, Any] = {"ffn_dim": config.ffn_dim, "parameters": raced["parameters"]}
    row |= {"cache of a token, bytes": sampling_bytes(model, precision)[1], "loss": raced["loss"]}
    row |= {"±": raced["spread"] / 2, "training tokens/s": raced["tokens/s"]}
    for batch in BATCHES:
        case = Case("n4", None, model.config, precision, batch)
        row[f"decoding tokens/s, batch {batch}"] = round(decoding(case, device, NO_LIMITS, 5.0).tokens_per_s or 0)
    return row


def beyond(
    data: TokenFolder, options: argparse.Namespace, device: torch.device, rows: Rows
) -> Iterator[dict[str, Any]]:
    """Two rows for every scale base: the last positions, and all."""
    found: dict[float | None, list[dict[str, list[float]]]] = {base: [] for base in SCALE_BASES}
    for seed in range(options.seeds):
        for base in SCALE_BASES:
            fields = {"xpos": False} if base is None else {"xpos_scale_base": base}

            def measure(seed: int = seed, fields: dict[str, Any] = fields) -> dict[str, list[float]]:
                release_memory()
                trainer = make_trainer_for(options.tokens, "nyx", options.size, data, seed, device, **fields)
                train(trainer)
                return by_length(trainer)

            if (measured := rows.get(measure, scale_base=base, seed=seed)) is not None:
                found[base].append(measured)
    for base, runs in found.items():
        for at, positions in enumerate(("last", "all")):
            if runs:
                row = {"scale base": "plain rotary" if base is None else f"{base:g}", "positions": positions}
                yield row | {name: with_error([run[name][at] for run in runs]) for name in runs[0]}


def by_length(trainer: Trainer) -> dict[str, list[float]]:
    """Bits per byte of the last positions and of all, by length of the context and with a window or without."""
    seq_len, tokens = trainer.model.config.seq_len, trainer.data.val
    longest = FACTORS[-1] * seq_len
    check_text(len(tokens), seq_len, longest)
    ends = np.arange(longest, len(tokens), seq_len)
    ends = ends[:: -(-len(ends) // N_WINDOWS)]
    tiles = np.arange(0, len(tokens) - longest, longest)[: N_WINDOWS // FACTORS[-1]]
    found = {}
    for factor in FACTORS:
        length = factor * seq_len
        parts = (tiles[:, None] + np.arange(0, longest, length)).ravel()
        for window in (None, seq_len)[: 1 + (factor > 1)]:
            last = losses_of(trainer.model, tokens, ends - length, length, window)[:, -(seq_len // 4) :]
            every = losses_of(trainer.model, tokens, parts, length, window)
            name = f"{factor}x" if window is None else f"{factor}x, window"
            found[name] = [float(losses.mean()) / math.log(2) for losses in (last, every)]
    return found


@torch.no_grad()
def losses_of(
    model: LanguageModel, tokens: np.ndarray, starts: np.ndarray, length: int, window: int | None
) -> np.ndarray:
    """Losses (N, `length`) of the windows of text that begin at `starts` (N,)."""
    parts, size = [], max(1, TOKENS_AT_ONCE // length)
    with evaluating(model):
        for i in range(0, len(starts), size):
            ids, targets = (x.to(model.device) for x in windows_at(tokens, starts[i : i + size], length))
            losses = token_losses(model, ids, targets) if window is None else decoded(model, ids, targets, window)
            parts.append(losses.double().cpu().numpy())
    return np.concatenate(parts)


def decoded(model: LanguageModel, input_ids: Tensor, targets: Tensor, window: int) -> Tensor:
    """Losses (B, T) with attention to the newest `window` positions of a cache, which holds all of them."""
    cache = model.make_cache(*input_ids.shape)
    cache.window = window
    pieces = zip(input_ids.split(window, dim=1), targets.split(window, dim=1), strict=True)
    losses = [
        F.cross_entropy(model(ids, cache=cache).transpose(1, 2).float(), wanted, reduction="none")
        for ids, wanted in pieces
    ]
    return torch.cat(losses, dim=1)


def tapes(data: TokenFolder, options: argparse.Namespace, device: torch.device, rows: Rows) -> Iterator[dict[str, Any]]:
    """A row for every Tape."""
    runs: dict[str, dict[int, dict[str, Any]]] = {name: {} for name in TAPES}
    for seed in range(options.seeds):
        for name, fields in TAPES.items():
            measured = rows.get(
                lambda fields=fields, seed=seed: tape_run(fields, seed, data, options, device),
                tokens_per_step=TOKENS_PER_STEP,
                **fields,
                seed=seed,
            )
            if measured is not None:
                runs[name][seed] = measured
    plain = next(iter(runs.values()))
    for name, own in runs.items():
        if own:
            yield {"tape": name} | tape_row(own, plain)


def tape_run(
    fields: dict[str, Any], seed: int, data: TokenFolder, options: argparse.Namespace, device: torch.device
) -> dict[str, Any]:
    """What a run of Tape with these fields brings and takes."""
    release_memory()
    reset_peak_memory(device)
    settings = fields | {"ffn_dim": as_large("tape", fields, options.size).ffn_dim, "tokens_per_step": TOKENS_PER_STEP}
    trainer = make_trainer_for(options.tokens, "tape", options.size, data, seed, device, **settings)
    loss, speed, _ = train(trainer)
    log_df = trainer.model.state_dict().get("head.log_df")
    return {
        "ffn_dim": settings["ffn_dim"],
        "parameters": sum(p.numel() for p in trainer.model.parameters()),
        "loss": loss,
        "tokens/s": round(speed),
        "peak MiB": round((peak_memory_bytes(device) or 0) / 2**20),
        "ν": None if log_df is None else log_df.exp().item(),
    }


def tape_row(runs: dict[int, dict[str, Any]], plain: dict[int, dict[str, Any]]) -> dict[str, Any]:
    """Runs by seed as a row, beside those of the plain one."""
    every = [*runs.values()]
    less = [run["loss"] - plain[seed]["loss"] for seed, run in runs.items() if seed in plain and runs is not plain]
    learned = [run["ν"] for run in every if run["ν"] is not None]
    row: dict[str, Any] = {key: every[0][key] for key in ("ffn_dim", "parameters")} | {"seeds": len(runs)}
    row |= {"loss": with_error([run["loss"] for run in every]), "less as it is": with_error(less, "+") if less else ""}
    row |= {key: max(run[key] for run in every) for key in ("tokens/s", "peak MiB")}
    return row | {"ν at the end": with_error(learned) if learned else ""}


def with_error(values: Sequence[float], sign: str = "") -> str:
    """The mean, and its standard error where there are several."""
    mean, error = mean_and_error(values)
    return f"{mean:{sign}.3f}" if error is None else f"{mean:{sign}.3f} ± {error:.3f}"


PARTS = {"latents": latents, "beyond": beyond, "tape": tapes}
SIZES = {"latents": "tiny", "beyond": "tiny", "tape": "nano"}
TOKENS = {"latents": 4_000_000, "beyond": 2_000_000, "tape": 1_000_000}  # of a run


def main() -> None:
    """Print a table in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--size")
    parser.add_argument("--tokens", type=int)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--context", type=int, default=2048)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--limit", type=float)
    parser.add_argument("--rows", type=Path)
    parser.add_argument("--markdown", type=Path)
    options = parser.parse_args()
    options.size, options.tokens = options.size or SIZES[options.part], options.tokens or TOKENS[options.part]
    device = pick_device(options.device)
    shape = {"text": options.text.name, "size": options.size, "tokens": options.tokens}
    machine = {"device": describe(device), "torch": torch.__version__}
    rows = Rows(options.rows, options.limit, part=options.part, **shape, **machine)
    with tempfile.TemporaryDirectory() as folder:
        prepare([options.text], Path(folder) / "tokens", PrepareConfig(tokenizer="byte"))
        lines = list(PARTS[options.part](open_token_folder(Path(folder) / "tokens"), options, device, rows))
    if rows.missing:
        print(f"{rows.missing} rows are missing; the same command goes on, with --rows where this one ended")
    if not lines:
        return
    head = f"{options.part}, size {options.size}, {options.tokens:,} tokens of {options.text.name}, "
    head += f"{options.seeds} seeds: "
    head += f"{describe(device)}, torch {torch.__version__}, {datetime.date.today()}."
    output = "\n".join([head, "", *table(lines), ""])
    print(output)
    if options.markdown and not rows.missing:
        with options.markdown.open("a", encoding="utf-8") as file:
            file.write("\n" + output)


if __name__ == "__main__":
    main()
