"""The original of neon: its tensors' names and layout, and its constructor arguments."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from nnx_cli.errors import CheckpointError
from nnx_cli.layers.linear import PackedLinear
from nnx_cli.models.neon import BANKS
from nnx_cli.models.originals._base import OriginalTensors

EMBEDDINGS = ("model.embed_tokens.weight",)
NAMES = {
    "embedding": "embed_tokens",
    "norm": "norm",
    "head": "",
    "functions": "global_functions",
    "memories": "global_memories",
    "attention_norm": "input_layernorm",
    "attention.out": "self_attn.o_proj",
    "attention.norm": "self_attn.subln",
    "mlp_norm": "post_attention_layernorm",
    "mlp.down": "mlp.down_proj",
    "mlp.norm": "mlp.subln",
    "bank.functions": "layer_functions",
    "bank.slots": "layer_memories",
    "bank.mix": "memory_mix",
    "bank.0": "extra_linear_layers.0",
    "bank.1": "extra_linear_layers.1",
    **{f"attention.lambda_.{x}": f"self_attn.lambda_{x}" for x in ("q1", "k1", "q2", "k2")},
    **{f"mlp.lambda_.{x}": f"mlp.lambda_{y}" for x, y in (("q1", "g1"), ("k1", "u1"), ("q2", "g2"), ("k2", "u2"))},
}
PACKS = {
    "attention.qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "mlp.gate_up": ("mlp.gate_proj1", "mlp.up_proj1", "mlp.gate_proj2", "mlp.up_proj2"),
    "bank.scorer": ("global_function_scorer", "layer_function_scorer"),
    "bank.query": ("global_query", "layer_query"),
}
BANK_NAMES = {"regular": "attention", "memory": "memory", "function": "function", "linear-control": "extra"}


def reference_config(
    *,
    vocab_size: int,
    hidden_size: int,
    intermediate_size: int,
    num_hidden_layers: int,
    num_attention_heads: int,
    num_key_value_heads: int | None = None,
    max_position_embeddings: int = 2048,
    rms_norm_eps: float = 1e-6,
    rope_theta: float = 10_000.0,
    tie_word_embeddings: bool = True,
    attention_dropout: float = 0.0,
    diff_attention_mode: str = "expressive",
    diff_mlp: bool = False,
    decoder_implementation: str = "regular",
    num_global_memories: int = 0,
    num_layer_memories: int = 0,
    num_global_functions: int = 0,
    num_layer_functions: int = 0,
    **others: Any,
) -> dict[str, Any]:
    """The original's constructor arguments as fields of `Config`; other keys of Hugging Face are left aside with a
    warning.

    Its `none` computes what `expressive` does. Counts that its decoder has no use for are dropped.
    """
    if others:
        warnings.warn(f"neon does not read {', '.join(sorted(others))}", stacklevel=2)
    counts = {
        "n_global_functions": num_global_functions,
        "n_layer_functions": num_layer_functions,
        "n_global_memories": num_global_memories,
        "n_layer_memories": num_layer_memories,
    }
    used = BANKS.get(decoder_implementation, (None,))[0]
    return dict(
        vocab_size=vocab_size,
        dim=hidden_size,
        n_layers=num_hidden_layers,
        n_heads=num_attention_heads,
        n_kv_heads=num_key_value_heads,
        ffn_dim=intermediate_size,
        seq_len=max_position_embeddings,
        norm_eps=rms_norm_eps,
        rope_theta=float(rope_theta),
        tie_embeddings=tie_word_embeddings,
        dropout=attention_dropout,
        diff_mlp=diff_mlp,
        decoder=decoder_implementation,
        diff_attention="expressive" if diff_attention_mode == "none" else diff_attention_mode,
        **{name: n or 0 for name, n in counts.items() if used and name.endswith(used)},
    )


def infer_reference(weights: Mapping[str, Tensor]) -> dict[str, Any]:
    """The original's constructor arguments, read off its weights. KeyError or ValueError for other weights.

    The context and the base of the rotary frequencies leave no trace there: the published ones, 2048 and 10,000, stand.
    """
    layer, embedding = "model.layers.0.", weights[EMBEDDINGS[0]]
    q_rows, dim = weights[layer + "self_attn.q_proj.weight"].shape
    pair = 2 * len(weights[layer + "self_attn.lambda_q1"])  # width of both maps of a head
    if q_rows not in (dim, 2 * dim) or q_rows % pair:
        raise ValueError(f"queries of {q_rows} rows are neither constrained nor expressive at width {dim}")

    def count(prefix: str) -> int:
        return sum(name.startswith(prefix) for name in weights)

    def slots(name: str) -> int:
        return len(weights[name]) if name in weights else 0

    counts = {
        "num_global_functions": count("model.global_functions."),
        "num_layer_functions": count(layer + "layer_functions."),
        "num_global_memories": slots("model.global_memories"),
        "num_layer_memories": slots(layer + "layer_memories"),
    }
    decoder = "function" if any(list(counts.values())[:2]) else "memory" if any(counts.values()) else "regular"
    if maps := count(layer + "extra_linear_layers."):
        decoder = "linear-control"
        counts |= {"num_global_functions": 1, "num_layer_functions": maps - 1}
    head = weights.get("lm_head.weight")
    return dict(
        vocab_size=len(embedding),
        hidden_size=dim,
        intermediate_size=len(weights[layer + "mlp.gate_proj1.weight"]),
        num_hidden_layers=len({name.split(".")[2] for name in weights if name.startswith("model.layers.")}),
        num_attention_heads=q_rows // pair,
        num_key_value_heads=len(weights[layer + "self_attn.k_proj.weight"]) // pair,
        tie_word_embeddings=head is None or torch.equal(head, embedding),
        diff_attention_mode="expressive" if q_rows == 2 * dim else "constrained",
        diff_mlp=layer + "mlp.gate_proj2.weight" in weights,
        decoder_implementation=decoder,
        **counts,
    )


class Tensors(OriginalTensors):
    """Tensors of a model under the original's names and in its layout."""

    @property
    def unused(self) -> frozenset[str]:
        """A tied head: the embedding once more."""
        return frozenset({"lm_head.weight"} if self.config.tie_embeddings else ())

    def names(self) -> dict[str, str]:
        """Tensors that are one there, too; `_packed_names` has the others."""
        names = {}
        own_norms = {
            "bank_norm": NAMES["mlp_norm"],
            "mlp_norm": f"post_{BANK_NAMES[self.config.decoder]}_layernorm",
        }
        for ours in self.model.state_without_ties():
            theirs, rest = "model.", ours
            if ours.startswith("blocks."):
                _, layer, rest = ours.split(".", 2)
                theirs = f"model.layers.{layer}."
            table = NAMES | (own_norms if self.config.decoder != "regular" else {})
            if part := max((key for key in table if f"{rest}.".startswith(f"{key}.")), key=len, default=""):
                names[ours] = theirs + table[part] + rest[len(part) :]
        if "head.weight" in names:
            names["head.weight"] = "lm_head.weight"
        return names

    def _packed_names(self) -> dict[str, dict[str, int]]:
        """Our packed matrices to the original's, one below the other, with their numbers of rows."""
        packs = {}
        for name, module in self.model.named_modules():
            if isinstance(module, PackedLinear):
                _, layer, rest = name.split(".", 2)
                parts = zip(PACKS[rest], module.splits, strict=False)
                packs[f"{name}.weight"] = {
                    f"model.layers.{layer}.{theirs}.weight": rows for theirs, rows in parts if rows
                }
        return packs

    def load(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """As in the base, packing what the original keeps apart."""
        state = super().load(weights)
        for ours, parts in self._packed_names().items():
            for theirs, rows in parts.items():
                if (found := tuple(weights[theirs].shape)) != (rows, self.config.dim):
                    raise CheckpointError(f"{theirs} is {found}, this neon needs {(rows, self.config.dim)}")
            state[ours] = torch.cat([self._regroup(theirs, weights[theirs], (-1, 2)) for theirs in parts])
        return state

    def save(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """As in the base, unpacking again."""
        found = super().save(tensors)
        for ours, parts in self._packed_names().items():
            if ours in tensors:
                rows = tensors[ours].split(list(parts.values()))
                found |= {
                    theirs: self._regroup(theirs, part, (2, -1)) for theirs, part in zip(parts, rows, strict=True)
                }
        return found

    def _regroup(self, theirs: str, x: Tensor, shape: tuple[int, int]) -> Tensor:
        """Rows of queries and keys, (heads, K, D): rotary pairs are neighbours there, (K/2, 2), and K/2 apart here."""
        if not theirs.endswith(("q_proj.weight", "k_proj.weight")):
            return x
        return x.unflatten(0, (-1, self.config.head_dim)).unflatten(1, shape).transpose(1, 2).reshape(x.shape)
