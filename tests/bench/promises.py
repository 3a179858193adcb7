"""What authors of the zoo's architectures promise and did not build, as options here: what each brings.

    python tests/bench/promises.py PART --text FILE [--size tiny] [--tokens N] [--seeds 3] [--limit SECONDS]
                                   [--rows FILE] [--markdown FILE]

A row that stands in --rows is not measured again, and none is begun that would end after --limit: the same command
goes on.

latents: N4 with keys and values of each head, of fewer heads that queries share, and risen from a latent that takes at
    most as much cache as those; the width of the feed-forward makes up for the parameters. Loss is the mean over the
    validation split and the seeds, ± half of their spread. Decoding is of the same shapes, untrained, at a context
    of --context tokens.
"""

from __future__ import annotations

import argparse
import datetime
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rows import Rows
from zoo import coerced, race, table

from nnx_cli import models
from nnx_cli.config import PrepareConfig
from nnx_cli.data.prepare import prepare
from nnx_cli.data.token_folder import TokenFolder, open_token_folder
from nnx_cli.experiments.benchmark import Case, Limits, decoding
from nnx_cli.models._base import ModelConfig
from nnx_cli.planning.flops import count_parameters, meta_model, sampling_bytes
from nnx_cli.system.device import describe, pick_device, pick_precision

FFN_STEP = 8  # of widths that are tried
BATCHES = (1, 16)
NO_LIMITS = Limits({}, 1.0)


def caches(size: str) -> Iterator[dict[str, int]]:
    """Fields of N4 at a size: plain, and for each number of shared heads those, and a latent with no more cache."""
    plain = models.make_config("n4", size=size)
    head_dim = plain.dim // plain.n_heads
    yield {}
    for n_kv_heads in (n for n in (2, 1) if plain.n_heads % n == 0 and n < plain.n_heads):
        yield {"n_kv_heads": n_kv_heads}
        yield {"kv_latent_dim": (2 * n_kv_heads * head_dim - plain.n_heads) // 8 * 8}


def as_large(fields: dict[str, int], size: str) -> ModelConfig:
    """N4 with these fields, whose feed-forward brings it to the parameters of the plain one."""
    plain = models.make_config("n4", size=size)
    wanted = count_parameters(meta_model("n4", plain))["total"]

    def widened(ffn_dim: int) -> ModelConfig:
        return models.make_config("n4", size=size, **fields, ffn_dim=ffn_dim)

    def excess(ffn_dim: int) -> int:
        return abs(count_parameters(meta_model("n4", widened(ffn_dim)))["total"] - wanted)

    return widened(min(range(plain.ffn_dim // 2, 2 * plain.ffn_dim, FFN_STEP), key=excess))


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
    config = as_large(fields, options.size)
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


PARTS = {"latents": latents}
TOKENS = {"latents": 4_000_000}  # of a run


def main() -> None:
    """Print a table in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--size", default="tiny")
    parser.add_argument("--tokens", type=int)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--context", type=int, default=2048)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--limit", type=float)
    parser.add_argument("--rows", type=Path)
    parser.add_argument("--markdown", type=Path)
    options = parser.parse_args()
    options.tokens = options.tokens or TOKENS[options.part]
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
