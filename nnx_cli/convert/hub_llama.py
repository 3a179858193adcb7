"""Llama under the names that Hugging Face's Hub has for it: config.json and tensors of `LlamaForCausalLM`.

Rotary pairs are the two halves of a head in both, so that tensors are the same, packed here and apart there.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from nnx_cli import models
from nnx_cli.config import coerce
from nnx_cli.errors import CheckpointError
from nnx_cli.models.llama import Config, Model

CLASS = "LlamaForCausalLM"
FIELDS = {  # ours: theirs
    "vocab_size": "vocab_size",
    "seq_len": "max_position_embeddings",
    "dim": "hidden_size",
    "ffn_dim": "intermediate_size",
    "n_layers": "num_hidden_layers",
    "n_heads": "num_attention_heads",
    "n_kv_heads": "num_key_value_heads",
    "norm_eps": "rms_norm_eps",
    "tie_embeddings": "tie_word_embeddings",
}
DEFAULTS = {"rms_norm_eps": 1e-6, "tie_word_embeddings": False}  # of a config.json that leaves them out
ONLY = {  # what would be another function, and the value with which it is this one
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "partial_rotary_factor": 1.0,
    "quantization_config": None,
    "auto_map": None,
}
WHOLE = {"embedding.weight": "model.embed_tokens.weight", "norm.weight": "model.norm.weight"}
BLOCK = {
    "attention_norm.weight": "input_layernorm.weight",
    "attention.out.weight": "self_attn.o_proj.weight",
    "mlp_norm.weight": "post_attention_layernorm.weight",
    "mlp.down.weight": "mlp.down_proj.weight",
}
PACKED = {
    "attention.qkv.weight": ("self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight"),
    "mlp.gate_up.weight": ("mlp.gate_proj.weight", "mlp.up_proj.weight"),
}
HEAD, THEIR_HEAD = "head.weight", "lm_head.weight"
UNUSED = re.compile(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq")  # follows from rope_theta


def to_hub_config(config: Config) -> dict[str, Any]:
    """The config.json of a model."""
    return {
        "architectures": [CLASS],
        "model_type": "llama",
        **{theirs: getattr(config, ours) for ours, theirs in FIELDS.items()},
        "head_dim": config.dim // config.n_heads,
        "hidden_act": ONLY["hidden_act"],
        "rope_theta": config.rope_theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "attention_bias": False,
        "mlp_bias": False,
        "attention_dropout": 0.0,
    }


def from_hub_config(found: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of `Config` that a config.json says. Raises CheckpointError, naming what does not map, and UsageError
    for values of another type."""
    classes = found.get("architectures") or [found.get("model_type")]
    if classes == [None]:
        raise CheckpointError("its config.json names no architecture: it is no model of the Hub")
    if classes != [CLASS]:
        raise CheckpointError(f"it is a {', '.join(map(str, classes))}, not a {CLASS}")
    values = DEFAULTS | {"num_key_value_heads": found.get("num_attention_heads")} | dict(found)
    for name, needed in ONLY.items():
        if values.get(name, needed) != needed:
            raise CheckpointError(f"its {name} is {str(values[name])[:60]}, which llama does not have")
    missing = [theirs for theirs in FIELDS.values() if values.get(theirs) is None]
    if missing:
        raise CheckpointError(f"it does not say its {missing[0]}")
    fields = {ours: values[theirs] for ours, theirs in FIELDS.items()} | {"rope_theta": _rope_theta(values)}
    fields = coerce(models.config_fields("llama"), fields, "its config.json")
    head_dim = values.get("head_dim")
    if head_dim is not None and fields["dim"] != fields["n_heads"] * head_dim:
        raise CheckpointError(f"its head_dim is {head_dim}; in llama it is hidden_size / num_attention_heads")
    return fields


def _rope_theta(values: Mapping[str, Any]) -> Any:
    """The base of the rotary frequencies, which older and newer files have in other places. Raises CheckpointError for
    frequencies that are stretched."""
    theta = values.get("rope_theta")
    for name in ("rope_parameters", "rope_scaling"):
        rope = values.get(name)
        if not isinstance(rope, Mapping):
            continue
        kind = rope.get("rope_type", rope.get("type", "default"))
        if kind != "default" or rope.get("partial_rotary_factor", 1.0) != 1.0:
            raise CheckpointError(f"its {name} is {str(dict(rope))[:80]}, which llama does not have")
        theta = rope.get("rope_theta", theta)
    return Config.rope_theta if theta is None else theta


def _names(n_layers: int) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Our names, and theirs of the tensors that are stacked there."""
    yield from ((ours, (theirs,)) for ours, theirs in WHOLE.items())
    for i in range(n_layers):
        block, layer = f"blocks.{i}.", f"model.layers.{i}."
        yield from ((block + ours, (layer + theirs,)) for ours, theirs in BLOCK.items())
        yield from ((block + ours, tuple(layer + name for name in theirs)) for ours, theirs in PACKED.items())


def to_hub(model: Model) -> dict[str, Tensor]:
    """The tensors of a model under the Hub's names."""
    state = model.state_without_ties()
    tensors: dict[str, Tensor] = {}
    for ours, theirs in _names(model.config.n_layers):
        layer = model.get_submodule(ours.removesuffix(".weight"))
        parts = state[ours].split(layer.splits) if len(theirs) > 1 else (state[ours],)
        tensors |= dict(zip(theirs, parts, strict=True))
    return tensors | ({THEIR_HEAD: state[HEAD]} if HEAD in state else {})


def from_hub(config: Config, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a model of that shape from those of a folder, in their own types. Raises CheckpointError, naming
    what is missing, what has no place and what has another shape."""
    names, left = dict(_names(config.n_layers)), dict(tensors)
    if not config.tie_embeddings:
        names[HEAD] = (THEIR_HEAD,)
    elif (head := left.pop(THEIR_HEAD, None)) is not None and not _same(head, left.get(WHOLE["embedding.weight"])):
        raise CheckpointError(f"its {THEIR_HEAD} is not its embedding, though tie_word_embeddings says so")
    state = {ours: _stack(left, theirs) for ours, theirs in names.items()}
    if odd := [name for name in left if not UNUSED.fullmatch(name)]:
        raise CheckpointError(f"its {odd[0]} {tuple(left[odd[0]].shape)} has no place in this llama")
    try:
        with torch.device("meta"):
            expected = Model(config).state_without_ties()
    except RuntimeError as error:  # a size beyond what torch can count
        raise CheckpointError(f"its config.json describes no model: {error}") from error
    for ours, tensor in state.items():
        if tensor.shape != expected[ours].shape:
            theirs = " and ".join(names[ours])
            raise CheckpointError(
                f"its {theirs} make {tuple(tensor.shape)}, where its config.json says {tuple(expected[ours].shape)}"
            )
    return state


def _same(a: Tensor, b: Tensor | None) -> bool:
    return b is not None and a.shape == b.shape and bool((a == b).all())


def _stack(left: dict[str, Tensor], names: Iterable[str]) -> Tensor:
    """Take tensors out of those that are left, and stack their rows."""
    parts = []
    for name in names:
        if name not in left:
            raise CheckpointError(f"its {name} is missing")
        if not left[name].is_floating_point() or not left[name].dim():
            raise CheckpointError(f"its {name} is {left[name].dtype} {tuple(left[name].shape)}, no matrix of floats")
        parts.append(left.pop(name))
    if len({(part.dtype, part.shape[1:]) for part in parts}) > 1:
        raise CheckpointError(f"its {names} are of different widths or types")
    return torch.cat(parts) if len(parts) > 1 else parts[0]
