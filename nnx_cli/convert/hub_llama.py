"""Llama under the names that the Hub has for it: config.json and tensors of `LlamaForCausalLM`."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from nnx_cli.models.llama import Config, Model

NORM_EPS = 1e-5  # of RMSNorm here
PLAIN = {  # ours: theirs, of a block
    "attention_norm.weight": "input_layernorm.weight",
    "attention.out.weight": "self_attn.o_proj.weight",
    "mlp_norm.weight": "post_attention_layernorm.weight",
    "mlp.down.weight": "mlp.down_proj.weight",
}
PACKED = {
    "attention.qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "mlp.gate_up": ("mlp.gate_proj", "mlp.up_proj"),
}


def hub_config(config: Config) -> dict[str, Any]:
    """The config.json of a model."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": config.vocab_size,
        "hidden_size": config.dim,
        "intermediate_size": config.ffn_dim,
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": config.n_heads,
        "num_key_value_heads": config.n_kv_heads,
        "head_dim": config.dim // config.n_heads,
        "hidden_act": "silu",
        "max_position_embeddings": config.seq_len,
        "rms_norm_eps": NORM_EPS,
        "rope_theta": config.rope_theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "attention_bias": False,
        "mlp_bias": False,
        "attention_dropout": 0.0,
        "tie_word_embeddings": config.tie_embeddings,
        "use_cache": True,
    }


def to_hub(model: Model) -> dict[str, Tensor]:
    """The tensors of a model under the Hub's names: rotary pairs are the two halves of a head in both."""
    state, layers = model.state_without_ties(), dict(model.named_modules())
    tensors = {"model.embed_tokens.weight": state["embedding.weight"], "model.norm.weight": state["norm.weight"]}
    if "head.weight" in state:
        tensors["lm_head.weight"] = state["head.weight"]
    for i in range(model.config.n_layers):
        block, theirs = f"blocks.{i}.", f"model.layers.{i}."
        for ours, name in PLAIN.items():
            tensors[theirs + name] = state[block + ours]
        for ours, names in PACKED.items():
            parts = state[f"{block}{ours}.weight"].split(layers[block + ours].splits)
            tensors |= {f"{theirs}{name}.weight": part for name, part in zip(names, parts, strict=True)}
    return tensors
