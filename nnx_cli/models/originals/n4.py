"""The original of n4: its tensors' names and layout, and its constructor arguments."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from nnx_cli.errors import UsageError
from nnx_cli.models.originals._base import OriginalTensors

EMBEDDINGS = ("n4b.embedding.weight",)


def reference_config(
    *, vocab_size: int, hidden_size: int, inter_size: int, heads: int, layers: int, bias: bool = False
) -> dict[str, Any]:
    """The original's constructor arguments as fields of `Config`."""
    return dict(vocab_size=vocab_size, dim=hidden_size, ffn_dim=inter_size, n_heads=heads, n_layers=layers, bias=bias)


def infer_reference(weights: Mapping[str, Tensor]) -> dict[str, Any]:
    """The original's constructor arguments, read off the shapes of its weights. KeyError or ValueError for other
    weights."""
    vocab_size, dim = weights[EMBEDDINGS[0]].shape
    return dict(
        vocab_size=vocab_size,
        hidden_size=dim,
        inter_size=weights["n4b.n4d.0.mlp.down_proj.weight"].shape[1],
        heads=weights["n4b.n4d.0.n4.qkvh_linear.weight"].shape[0] - 3 * dim,  # one gate each
        layers=len({name.split(".")[2] for name in weights if name.startswith("n4b.n4d.")}),
        bias="lm_head.bias" in weights,
    )


class Tensors(OriginalTensors):
    """Tensors of a model under the original's names and in its layout."""

    @property
    def unused(self) -> frozenset[str]:
        """A gain in every layer that nothing reads."""
        return frozenset(f"n4b.n4d.{i}.n4.norm.weight" for i in range(self.config.n_layers))

    def names(self) -> dict[str, str]:
        """As in the base; packed matrices are left to `load` and `save`."""
        config = self.config
        if config.n_kv_heads != config.n_heads or config.dyt_alpha or config.kv_latent_dim is not None:
            raise UsageError("the original of n4 has no place for --n-kv-heads, --kv-latent-dim or --dyt-alpha")
        names, linears = {"embedding.weight": "n4b.embedding.weight"}, {"head": "lm_head"}
        for i in range(self.config.n_layers):
            block, theirs = f"blocks.{i}.", f"n4b.n4d.{i}."
            names[block + "attention_norm.weight"] = theirs + "pre_n4_norm.weight"
            names[block + "attention_out_norm.weight"] = theirs + "post_n4_norm.weight"
            names[block + "mlp_norm.weight"] = theirs + "pre_mlp_norm.weight"
            names[block + "mlp_out_norm.weight"] = theirs + "post_mlp_norm.weight"
            linears[block + "attention.qkvg"] = theirs + "n4.qkvh_linear"
            linears[block + "attention.out"] = theirs + "n4.out_linear"
            linears[block + "mlp.up"] = theirs + "mlp.up_proj"
            linears[block + "mlp.down"] = theirs + "mlp.down_proj"
        for ours, theirs in linears.items():
            names[ours + (".linear.weight" if self.config.bias else ".weight")] = theirs + ".weight"
            if self.config.bias:
                names[ours + ".bias"] = theirs + ".bias"
        return names

    def load(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """As in the base, packing what the original keeps apart."""
        tensors, H = super().load(weights), self.config.n_heads
        return {name: _regroup(x, H, 3, H) if ".qkvg." in name else x for name, x in tensors.items()}

    def save(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """As in the base, unpacking again."""
        tensors, H = super().save(tensors), self.config.n_heads
        return {name: _regroup(x, 3, H, H) if ".qkvh_linear." in name else x for name, x in tensors.items()}


def _regroup(x: Tensor, outer: int, inner: int, n_gates: int) -> Tensor:
    """Rows of queries, keys, values and, last, gates: all but these go from the order (outer, inner, K) to
    (inner, outer, K).

    The original orders by head, then q, k, v; here all queries come first.
    """
    qkv, gates = x[:-n_gates], x[-n_gates:]
    return torch.cat((qkv.unflatten(0, (outer, inner, -1)).transpose(0, 1).flatten(0, 2), gates))
