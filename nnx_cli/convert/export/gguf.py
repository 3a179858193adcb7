"""One file for llama.cpp and what is built on it: matrices in fp16 or Q8_0, and the tokenizer."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nnx_cli.config import check_choice
from nnx_cli.convert.export._base import Found, Source
from nnx_cli.convert.export._compare import compare
from nnx_cli.convert.export._gguf_vocabulary import Vocabulary, share_of_other_ids, validation_texts, vocabulary
from nnx_cli.convert.export._llama_cpp import LlamaCpp
from nnx_cli.convert.export._llama_cpp import is_installed as llama_cpp_is_installed
from nnx_cli.convert.hub_llama import to_hub
from nnx_cli.data.conversations import Template, template_of
from nnx_cli.errors import DataError, QualityError
from nnx_cli.models._base import ModelConfig
from nnx_cli.models.llama import Config, Model
from nnx_cli.runs.tensors import size_on_disk
from nnx_cli.system.files import require_space, sync_file

LIBRARIES = ("gguf",)
FILE = "model.gguf"
TOLERANCES = {"f16": 0.1, "q8_0": 1.0}  # of a logit, by the type of matrices: ten times what a trained `nano` loses
Q8_BLOCK = 32  # weights that share a scale: a row is so many of them, or stays in fp16
MAX_DRIFT = 0.01  # share of the validation text with other ids


@dataclass(frozen=True, kw_only=True)
class Options:
    """What a file may be like."""

    outtype: str = "f16"  # type of the matrices: f16, or q8_0
    allow_tokenizer_drift: bool = False  # take a tokenizer that gives more than 1 % of the text other ids there

    def __post_init__(self) -> None:
        check_choice("outtype", self.outtype, tuple(TOLERANCES))


def why_not(name: str, config: ModelConfig) -> str | None:
    """As in the base."""
    return None if name == "llama" else "llama.cpp has none of this kind"


def write(source: Source, folder: Path) -> None:
    """As in the base."""
    import gguf

    model, outtype = source.model, source.options.outtype
    assert isinstance(model, Model)
    if source.tokenizer is None:
        raise DataError("this model has no tokenizer, without which llama.cpp reads no text")
    require_space(folder, size_on_disk(model.state_without_ties()) // 2)
    writer = gguf.GGUFWriter(folder / FILE, "llama")
    writer.add_name(source.card.title)
    data = [f"Trained on {value}." for what, value in source.card.training if what == "data"]
    writer.add_description(" ".join([source.card.origin, *data, *source.card.changes]))
    _add_shape(writer, model.config)
    files = {"f16": gguf.LlamaFileType.MOSTLY_F16, "q8_0": gguf.LlamaFileType.MOSTLY_Q8_0}
    writer.add_file_type(files[outtype])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    _add_vocabulary(writer, _vocabulary(source), template_of(source.tokenizer))
    source.tell("writing", 0.0)
    for name, tensor in _under_their_names(model):
        kind = gguf.GGMLQuantizationType.F16 if tensor.dim() > 1 else gguf.GGMLQuantizationType.F32
        if outtype == "q8_0" and tensor.dim() > 1 and tensor.shape[1] % Q8_BLOCK == 0:
            kind = gguf.GGMLQuantizationType.Q8_0
        weights = _turned(name, tensor, model.config, (2, -1)).contiguous().numpy()
        writer.add_tensor(name, gguf.quants.quantize(weights, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    sync_file(folder / FILE)


def _add_shape(writer: Any, config: Config) -> None:
    writer.add_context_length(config.seq_len)
    writer.add_embedding_length(config.dim)
    writer.add_block_count(config.n_layers)
    writer.add_feed_forward_length(config.ffn_dim)
    writer.add_head_count(config.n_heads)
    writer.add_head_count_kv(config.n_kv_heads)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    writer.add_rope_dimension_count(config.dim // config.n_heads)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_vocab_size(config.vocab_size)


def _vocabulary(source: Source) -> Vocabulary:
    assert source.tokenizer is not None
    texts = validation_texts(source.ref, source.tokenizer)
    return vocabulary(source.tokenizer, source.model.config.vocab_size, texts)


def _add_vocabulary(writer: Any, known: Vocabulary, template: Template | None) -> None:
    """The tokenizer, and the template of conversations. What is left unsaid would be another's: id 11 for the end of
    text, a token before every text."""
    writer.add_tokenizer_model(known.model)
    writer.add_tokenizer_pre(known.pre)
    writer.add_token_list(known.tokens)
    writer.add_token_types(known.kinds)
    if known.merges:
        writer.add_token_merges(known.merges)
    else:
        writer.add_token_scores([0.0] * len(known.tokens))
    for add in (writer.add_bos_token_id, writer.add_unk_token_id):
        add(known.end_id)
    writer.add_eos_token_id(known.end_id if template is None else template.end_id)
    if template is not None:
        writer.add_chat_template(template.jinja)
    writer.add_add_bos_token(False)
    writer.add_add_eos_token(False)
    writer.add_add_space_prefix(False)


def _under_their_names(model: Model) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a model, which they share, under llama.cpp's names."""
    import gguf

    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, model.config.n_layers)
    for name, tensor in to_hub(model).items():
        known = names.get_name(name, try_suffixes=(".weight",))
        assert known is not None, name
        yield known, tensor


def _turned(name: str, tensor: Tensor, config: Config, halves: tuple[int, int]) -> Tensor:
    """Rows of queries and keys in another order: from pairs that are the halves of a head, (2, K/2), to pairs of
    neighbours, (K/2, 2), or the way back."""
    n_heads = {"attn_q": config.n_heads, "attn_k": config.n_kv_heads}.get(name.split(".")[-2])
    return tensor if n_heads is None else tensor.unflatten(0, (n_heads, *halves)).transpose(1, 2).flatten(0, 2)


def check(source: Source, folder: Path) -> Found:
    """As in the base. What the library reads is computed with here, and llama.cpp itself asked where it is there."""
    stored, options = _read(source, folder), source.options
    llama = LlamaCpp(folder / FILE, source.model.config.seq_len) if llama_cpp_is_installed() else None
    differences, same = [0.0], 0

    def generate(prompt: Tensor, n: int) -> Tensor:
        """`n` greedy tokens, compared with what the model says at their places."""
        nonlocal same
        ids, likeliest = llama.continued(prompt[0].tolist(), n) if llama else (_greedy(stored, prompt, n), [])
        chosen = torch.tensor(ids)
        ours = source.model(torch.cat((prompt, chosen[None, :-1]), dim=1))[0, -n:].log_softmax(-1)  # (n, V)
        same = int((ours.argmax(-1) == chosen).cumprod(0).sum())
        for place, theirs in zip(ours, likeliest, strict=False):
            differences.append((place[list(theirs)] - torch.tensor(list(theirs.values()))).abs().max().item())
        return chosen

    found = compare(source, stored, generate, TOLERANCES[options.outtype])
    if found.same_greedy_tokens == found.greedy_tokens:  # as far as rounding can tell; the receipt has those that are
        found = replace(found, same_greedy_tokens=same, greedy_tokens=same)
    drift = _drift(source, llama)
    checked_with, notes = ["gguf", "llama.cpp"], []
    if llama is None:
        checked_with, notes = ["gguf"], ["not run in llama.cpp itself, which pip install xllamacpp brings"]
    if drift:
        notes.append(f"llama.cpp gives {drift:.2%} of the validation text other ids")
    more = {"outtype": options.outtype, "tokenizer_drift": drift, "checked_with": checked_with}
    worst = max(found.max_logit_difference, *differences)
    return replace(found, max_logit_difference=worst, more=more, notes=notes)


def _drift(source: Source, llama: LlamaCpp | None) -> float | None:
    """The share of the validation text with other ids in llama.cpp, None where there is no text. Raises QualityError
    where it is too large, or unknown where there may be one."""
    assert source.tokenizer is not None
    known, texts = _vocabulary(source), validation_texts(source.ref, source.tokenizer)
    share = share_of_other_ids(source.tokenizer, known.encode if llama is None else llama.encode, texts)
    if source.options.allow_tokenizer_drift or (share or 0.0) <= MAX_DRIFT and (texts or known.is_exact):
        return share
    how_much = f"would give {share:.1%} of the validation text other ids" if texts else "there is no text to try it on"
    raise QualityError(
        f"llama.cpp has no name for how this tokenizer splits text, and {how_much}",
        fix="take it as it is: --allow-tokenizer-drift",
    )


def _greedy(model: Model, prompt: Tensor, n: int) -> list[int]:
    """`n` greedy tokens after a prompt (1, T)."""
    cache, new, chosen = model.make_cache(1, prompt.shape[1] + n), prompt, []
    for _ in range(n):
        new = model(new, cache=cache)[:, -1:].argmax(-1)
        chosen.append(int(new))
    return chosen


def _read(source: Source, folder: Path) -> Model:
    """A model with the tensors of the file."""
    import gguf

    model = copy.deepcopy(source.model)
    assert isinstance(model, Model)
    kept = {tensor.name: tensor for tensor in gguf.GGUFReader(folder / FILE).tensors}
    with torch.no_grad():
        for name, ours in _under_their_names(model):
            weights = torch.tensor(gguf.quants.dequantize(kept[name].data, kept[name].tensor_type))
            ours.copy_(_turned(name, weights, model.config, (-1, 2)))
    return model
