"""The original of nyx: its tensors' names and layout, and its constructor arguments."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from nnx_cli.errors import UsageError
from nnx_cli.models.originals._base import OriginalTensors

EMBEDDINGS = ("token_embedding.weight",)


def reference_config(
    *,
    model_dim: int,
    vocab_size: int,
    layer_depth: int,
    head_dimension: int = 64,
    num_attention_heads: int = 8,
    feedforward_scale: int = 4,
    attention_dropout_rate: float = 0.0,
    feedforward_dropout_rate: float = 0.0,
    use_qk_rmsnorm: bool = False,
    lora_rank: int = 8,
    rotary_pos_emb_scale: float = 512.0,
    use_causal_mask: bool = True,
    finetune_contexts: Any = None,
    loss_ignore_index: int = 0,
) -> dict[str, Any]:
    """The original's constructor arguments as fields of `Config`.

    `lora_rank` and `finetune_contexts` only matter to adapters; `loss_ignore_index` is that of variant `original`.
    """
    if not use_causal_mask:
        raise UsageError("NYX without its causal mask is not a language model: use_causal_mask must be true")
    if attention_dropout_rate != feedforward_dropout_rate:
        raise UsageError("attention_dropout_rate and feedforward_dropout_rate must be equal")
    return dict(
        vocab_size=vocab_size,
        dim=model_dim,
        n_layers=layer_depth,
        n_heads=num_attention_heads,
        head_dim=head_dimension,
        ffn_dim=feedforward_scale * model_dim,
        dropout=attention_dropout_rate,
        qk_norm=use_qk_rmsnorm,
        xpos_scale_base=rotary_pos_emb_scale,
    )


def infer_reference(weights: Mapping[str, Tensor]) -> dict[str, Any]:
    """The original's constructor arguments, read off the shapes of its weights. KeyError or ValueError for other
    weights."""
    vocab_size, dim = weights[EMBEDDINGS[0]].shape
    rows = weights["layers.0.func.fused_attention_feedforward.weight"].shape[0]
    inner = weights["layers.0.func.attn_output_proj.weight"].shape[1]
    ffn_dim = weights["layers.0.func.feedforward_net.2.weight"].shape[1]
    head_dim = (rows - inner - 2 * ffn_dim) // 2  # the rest of the rows are one key and one value
    layers = {name.split(".")[1] for name in weights if name.startswith("layers.")}
    return dict(
        model_dim=dim,
        vocab_size=vocab_size,
        layer_depth=len(layers),
        head_dimension=head_dim,
        num_attention_heads=inner // head_dim,
        feedforward_scale=ffn_dim // dim,
        use_qk_rmsnorm="layers.0.func.q_scale" in weights,
    )


class Tensors(OriginalTensors):
    """Tensors of a model under the original's names and in its layout."""

    def names(self) -> dict[str, str]:
        """As in the base; packed matrices are left to `load` and `save`."""
        names = {"embedding.weight": "token_embedding.weight", "norm.weight": "norm_layer.gamma"}
        for i in range(self.config.n_layers):
            block, theirs = f"blocks.{i}.", f"layers.{i}.func."
            names[block + "norm.weight"] = theirs + "norm_layer.gamma"
            names[block + "in_proj.weight"] = theirs + "fused_attention_feedforward.weight"
            names[block + "attn_out.weight"] = theirs + "attn_output_proj.weight"
            names[block + "ffn_out.weight"] = theirs + "feedforward_net.2.weight"
            if self.config.qk_norm:
                names[block + "q_norm_weight"] = theirs + "q_scale"
                names[block + "k_norm_weight"] = theirs + "k_scale"
        return names

    def load(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """As in the base, packing what the original keeps apart."""
        state = super().load(weights)
        if self.model.blocks[0].attn_out.lora_a is None:
            return state
        for i in range(self.config.n_layers):
            a, b = ([weights[f"finetune_modules.task.{i}.{j}.matrix_{m}"].T for j in range(4)] for m in "ab")
            block = f"blocks.{i}."
            state[block + "in_proj.lora_a"], state[block + "in_proj.lora_b"] = torch.cat(a[:3]), torch.cat(b[:3])
            state[block + "attn_out.lora_a"], state[block + "attn_out.lora_b"] = a[3], b[3]
        return state

    def save(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """As in the base, unpacking again."""
        theirs = super().save(tensors)
        for i, block in enumerate(self.model.blocks):
            for layer, first in (("in_proj", 0), ("attn_out", 3)):
                a, b = (tensors.get(f"blocks.{i}.{layer}.lora_{m}") for m in "ab")
                if a is not None and b is not None:
                    widths = block.in_proj.splits[:3] if first == 0 else (len(b),)
                    for j, (one_a, one_b) in enumerate(zip(a.chunk(len(widths)), b.split(widths), strict=True), first):
                        theirs[f"finetune_modules.task.{i}.{j}.matrix_a"] = one_a.T
                        theirs[f"finetune_modules.task.{i}.{j}.matrix_b"] = one_b.T
        return theirs
