"""The original of tape: its tensors' names and layout, and its constructor arguments."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from nnx_cli.models.originals._base import OriginalTensors

EMBEDDINGS = ("holistic_embed.weight",)
SIDES = ("left", "right")
AFFINE = {"weight": "linear.weight", "bias": "bias"}  # of a layer there and of ours
IN_PROJ = "cached_attn.attn.in_proj_"
NEVER_CALLED = (
    "norm_gate",
    "embed_ln.weight",
    "embed_ln.bias",
    "merger.proj.weight",
    "final_norm.weight",
    "merge_projection.weight",
    "merge_projection_final.weight",
)
PROPHET_OUT = {"prophet.out.linear.weight": "rnn_projection.weight", "prophet.out.bias": "rnn_projection.bias"}
PROPHET_CELLS = {  # our tensors hold the left cell's rows and below them the right one's
    f"prophet.{layer}.{ours}": tuple(f"prophet.cells_{side}.{number}.{theirs}" for side in SIDES)
    for number, layer in enumerate(("first", "second"))
    for ours, theirs in (
        ("input.linear.weight", "i2h.weight"),
        ("input.bias", "i2h.bias"),
        ("weight", "h2h.weight"),
        ("bias", "h2h.bias"),
    )
}


def reference_config(
    *,
    vocab_size: int,
    seq_len: int = 128,
    embed_dim: int = 128,
    num_heads: int = 2,
    dropout: float = 0.1,
    num_layers: int | None = None,
) -> dict[str, Any]:
    """The original's constructor arguments as fields of `Config`. Its `num_heads` are critics; it ignores
    `num_layers`."""
    return dict(
        vocab_size=vocab_size,
        seq_len=seq_len,
        dim=embed_dim,
        n_critics=num_heads,
        dropout=dropout,
        n_layers=4,
        coda_layers=2,
        n_heads=4,
    )


def infer_reference(weights: Mapping[str, Tensor]) -> dict[str, Any]:
    """The original's constructor arguments, read off its weights. KeyError or ValueError for other weights.

    The length of the context leaves no trace in them: it is the original's 128. So is dropout: it is none.
    """
    vocab_size, dim = weights[EMBEDDINGS[0]].shape
    critics = {int(name.split(".")[1]) for name in weights if name.startswith("residualheads.")}
    if critics != set(range(len(critics))) or not critics:
        raise ValueError(f"its critics are {sorted(critics)}")
    return dict(vocab_size=vocab_size, seq_len=128, embed_dim=dim, num_heads=len(critics), dropout=0.0)


class Tensors(OriginalTensors):
    """Tensors of a model under the original's names and in its layout."""

    @property
    def unused(self) -> frozenset[str]:
        """Modules that the original never calls and, without `tape`, those that its output does not depend on."""
        unused = set(NEVER_CALLED)
        if self.model.prophet is None:
            unused.update(PROPHET_OUT.values(), *PROPHET_CELLS.values())
            for block in sum(_block_prefixes("residualheads.{}", self.config.n_critics - 1, self.config.n_layers), ()):
                unused.update(_stream_names("", block).values(), (f"{block}{IN_PROJ}{kind}" for kind in AFFINE))
        return frozenset(unused)

    def _level_prefixes(self) -> list[tuple[str, ...]]:
        """Names of the left and right block of every level in the original."""
        config = self.config
        critics = _block_prefixes("residualheads.{}", config.n_critics, config.n_layers)
        return _block_prefixes("codahead", 1, config.coda_layers) + critics[-config.live_critics * config.n_layers :]

    def names(self) -> dict[str, str]:
        """As in the base; packed matrices are left to `load` and `save`."""
        names = {"embedding.weight": "holistic_embed.weight"} | ({} if self.model.prophet is None else PROPHET_OUT)
        for number, blocks in enumerate(self._level_prefixes()):
            for side, block in zip(SIDES, blocks, strict=True):
                names |= _stream_names(f"blocks.{number}.{side}.", block)
        return names

    def load(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """As in the base, packing what the original keeps apart."""
        tensors = super().load(weights) | {"head.weight": weights["unembedding"].t()}
        if self.model.prophet is not None:
            tensors |= {ours: torch.cat([weights[cell] for cell in cells]) for ours, cells in PROPHET_CELLS.items()}
        for number, blocks in enumerate(self._level_prefixes()):
            for kind, ours in AFFINE.items():
                q, k, v = zip(*(weights[block + IN_PROJ + kind].chunk(3) for block in blocks), strict=True)
                tensors[f"blocks.{number}.q.{ours}"] = torch.cat(q)
                tensors[f"blocks.{number}.kv.{ours}"] = torch.cat(k + v)
        return tensors

    def save(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """As in the base, unpacking again."""
        weights = super().save(tensors)
        if "head.weight" in tensors:
            weights["unembedding"] = tensors["head.weight"].t()
        for ours, cells in PROPHET_CELLS.items():
            if ours in tensors:
                weights |= zip(cells, tensors[ours].chunk(2), strict=True)
        for number, blocks in enumerate(self._level_prefixes()):
            for kind, ours in AFFINE.items():
                if f"blocks.{number}.q.{ours}" in tensors:
                    q, kv = (tensors[f"blocks.{number}.{part}.{ours}"] for part in ("q", "kv"))
                    k, v = kv.chunk(2)
                    for block, *rows in zip(blocks, q.chunk(2), k.chunk(2), v.chunk(2), strict=True):
                        weights[block + IN_PROJ + kind] = torch.cat(rows)
        return weights


def _block_prefixes(head: str, n_heads: int, n_levels: int) -> list[tuple[str, ...]]:
    """Prefixes of the left and right block of every level of the original's heads `head.format(0)`, ..."""
    return [
        tuple(f"{head.format(number)}.blocks_{side}.{level}." for side in SIDES)
        for number in range(n_heads)
        for level in range(n_levels)
    ]


def _stream_names(ours: str, theirs: str) -> dict[str, str]:
    """Names within one side of a level to those within a block of the original."""
    names = {
        "out.linear.weight": "cached_attn.attn.out_proj.weight",
        "out.bias": "cached_attn.attn.out_proj.bias",
        "attention_norm.weight": "ln_attn.weight",
        "attention_norm.bias": "ln_attn.bias",
        "up.linear.weight": "mlp.expand.weight",
        "up.bias": "mlp.expand.bias",
        "down.weight": "mlp.linear.weight",
        "mlp_norm.weight": "ln_mlp.weight",
        "mlp_norm.bias": "ln_mlp.bias",
    }
    return {ours + mine: theirs + name for mine, name in names.items()}
