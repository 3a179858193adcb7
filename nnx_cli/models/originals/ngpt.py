"""The original of ngpt: its tensors' names and layout, and its constructor arguments."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from nnx_cli.models.originals._base import OriginalTensors

RAW, PLAIN = ".linear.parametrizations.weight.original", ".linear.weight"  # how the original spells a matrix
EMBEDDINGS = ("token_embed" + RAW, "token_embed" + PLAIN)


def reference_config(
    *,
    num_tokens: int,
    dim: int,
    depth: int,
    dim_head: int = 64,
    heads: int = 8,
    attn_norm_qk: bool = True,
    ff_expand_factor: float = 4.0,
    tied_embedding: bool = False,
    add_value_residual: bool = True,
    manual_norm_weights: bool = False,
    alpha_init: float | None = None,
    alpha_attn_init: Any = None,
    alpha_ff_init: Any = None,
    alpha_attn_scale: Any = None,
    alpha_ff_scale: Any = None,
    s_qk_init: Any = 1.0,
    s_qk_scale: Any = None,
    s_ff_hidden_init: Any = 1.0,
    s_ff_hidden_scale: Any = 1.0,
    s_ff_gate_init: Any = 1.0,
    s_ff_gate_scale: Any = 1.0,
    s_logit_init: float = 1.0,
    s_logit_scale: float | None = None,
) -> dict[str, Any]:
    """The original's constructor arguments as fields of `Config`; scales are a number, or one for every layer."""
    return dict(
        vocab_size=num_tokens,
        dim=dim,
        n_layers=depth,
        n_heads=heads,
        head_dim=dim_head,
        ffn_dim=int(dim * ff_expand_factor * 2 / 3),
        qk_norm=attn_norm_qk,
        value_residual=add_value_residual,
        tie_embeddings=tied_embedding,
        normalize_on_use=not manual_norm_weights,
        alpha_attn_init=alpha_init if alpha_attn_init is None else alpha_attn_init,
        alpha_attn_scale=alpha_attn_scale,
        alpha_mlp_init=alpha_init if alpha_ff_init is None else alpha_ff_init,
        alpha_mlp_scale=alpha_ff_scale,
        s_qk_init=s_qk_init,
        s_qk_scale=s_qk_scale,
        s_hidden_init=s_ff_hidden_init,
        s_hidden_scale=s_ff_hidden_scale,
        s_gate_init=s_ff_gate_init,
        s_gate_scale=s_ff_gate_scale,
        s_logit_init=s_logit_init,
        s_logit_scale=s_logit_scale,
    )


def infer_reference(weights: Mapping[str, Tensor]) -> dict[str, Any]:
    """The original's constructor arguments, read off the shapes of its weights. KeyError for other weights.

    Normalised queries and keys, value residual and the scales leave no trace there: the constructor's defaults stand.
    """
    spelling = PLAIN if "token_embed" + PLAIN in weights else RAW
    num_tokens, dim = weights["token_embed" + spelling].shape
    ffn_dim = len(weights["layers.0.1.fn.hidden_scale.scale"])
    dim_head = 2 * len(weights["rotary_embed.freqs"])
    expand = round(ffn_dim * 1.5 / dim)
    return dict(
        num_tokens=num_tokens,
        dim=dim,
        depth=sum(name.endswith(".1.branch_scale.scale") for name in weights),
        dim_head=dim_head,
        heads=len(weights["layers.0.0.fn.qk_scale.scale"]) // dim_head,
        ff_expand_factor=expand if int(dim * expand * 2 / 3) == ffn_dim else (ffn_dim + 0.5) * 1.5 / dim,
        tied_embedding="to_logits" + spelling not in weights,
        manual_norm_weights=spelling == PLAIN,
    )


class Tensors(OriginalTensors):
    """Tensors of a model under the original's names and in its layout."""

    unused = frozenset({"rotary_embed.freqs"})  # a constant table: computed from positions here

    def names(self) -> dict[str, str]:
        """Parameters that the original has, too; `_packed_names` has the others."""
        weight = self._weight_name
        names = {"embedding.weight": weight("token_embed"), "head.s_logit.weight": "logit_scale.scale"}
        if not self.config.tie_embeddings:
            names["head.proj.weight"] = weight("to_logits")
        for i in range(self.config.n_layers):
            block, attention, mlp = f"blocks.{i}.", f"layers.{i}.0.", f"layers.{i}.1."
            names[block + "attention.out.weight"] = weight(attention + "fn.to_out")
            names[block + "mlp.down.weight"] = weight(mlp + "fn.to_out")
            names[block + "mlp.s_hidden.weight"] = mlp + "fn.hidden_scale.scale"
            names[block + "mlp.s_gate.weight"] = mlp + "fn.gate_scale.scale"
            names[block + "alpha_attn.weight"] = attention + "branch_scale.scale"
            names[block + "alpha_mlp.weight"] = mlp + "branch_scale.scale"
        return names

    def _packed_names(self) -> dict[str, list[tuple[str, bool]]]:
        """Our parameters to the original's, one below the other, and whether these have rotary pairs side by side."""
        names = {}
        for i in range(self.config.n_layers):
            block, attention, mlp = f"blocks.{i}.", f"layers.{i}.0.fn.", f"layers.{i}.1.fn."
            names[block + "attention.s_qk.weight"] = [(attention + "qk_scale.scale", True)]
            names[block + "attention.qkv.weight"] = [
                (self._weight_name(f"{attention}to_{part}"), part != "v") for part in "qkv"
            ]
            names[block + "mlp.hidden_gate.weight"] = [
                (self._weight_name(f"{mlp}to_{part}"), False) for part in ("hidden", "gate")
            ]
        return names

    def _weight_name(self, module: str) -> str:
        return module + (RAW if self.config.normalize_on_use else PLAIN)

    def load(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """As in the base, packing what the original keeps apart."""

        def ours(name: str, has_pairs: bool) -> Tensor:
            return _regroup(weights[name], (-1, self.config.head_dim // 2, 2)) if has_pairs else weights[name]

        packed = {name: torch.cat([ours(*part) for part in parts]) for name, parts in self._packed_names().items()}
        return super().load(weights) | packed

    def save(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """As in the base, unpacking again."""
        found = super().save(tensors)
        for name, parts in self._packed_names().items():
            if name in tensors:
                for (theirs, has_pairs), part in zip(parts, tensors[name].chunk(len(parts)), strict=True):
                    found[theirs] = _regroup(part, (-1, 2, self.config.head_dim // 2)) if has_pairs else part
        return found


def _regroup(x: Tensor, shape: tuple[int, int, int]) -> Tensor:
    """Rows (heads, pairs, 2) as (heads, 2, pairs), or back: rotary pairs are neighbours there and K/2 apart here."""
    return x.view(*shape, *x.shape[1:]).transpose(1, 2).reshape(x.shape)
