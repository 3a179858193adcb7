"""Which layers of a model suffer most from being quantized."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn

from nnx_cli.data.loader import windows_at
from nnx_cli.evaluation.losses import window_starts
from nnx_cli.layers.linear import Linear
from nnx_cli.layers.quantized import Quantization, dequantize, quantizable, quantize
from nnx_cli.models._base import LanguageModel

FLOPS = 1e12  # spent on the forward passes, one for each matrix
TOKENS = (256, 1024)  # of a pass, at least and at most
LOGITS = 2**25  # that a pass may have: 128 MiB of float32


@torch.no_grad()
def rank_layers(
    model: LanguageModel,
    quantization: Quantization,
    tokens: np.ndarray,
    on_progress: Callable[[float], None] = lambda done: None,
) -> list[str]:
    """The layers that are quantized, from that which alone costs most: the divergence of the float model's next-token
    distribution from its own with this one matrix rounded. A matrix of several layers is named once."""
    layers = unique_matrices(model, quantization)
    input_ids = _sample(model, tokens, len(layers)).to(model.device)
    reference = _log_probabilities(model, input_ids)
    shares = reference.exp()
    costs = {}
    for name, layer in layers.items():
        with _rounded(layer, quantization):
            divergence = shares * (reference - _log_probabilities(model, input_ids))
        costs[name] = float(divergence.sum(-1).mean().nan_to_num(nan=torch.inf))
        on_progress(len(costs) / len(layers))
    return sorted(costs, key=lambda name: -costs[name])


def unique_matrices(model: LanguageModel, quantization: Quantization) -> dict[str, Linear | nn.Embedding]:
    """The layers that are quantized, by name; of those that share their matrix the first."""
    first: dict[int, tuple[str, Linear | nn.Embedding]] = {}
    for name, layer in quantizable(model, quantization.kept).items():
        first.setdefault(id(layer.weight), (name, layer))
    return dict(first.values())


def _sample(model: LanguageModel, tokens: np.ndarray, n_passes: int) -> Tensor:
    """Windows (B, T) of the text, as many as FLOPS, LOGITS and TOKENS allow for every pass."""
    config = model.config
    n_parameters = sum(tensor.numel() for tensor in model.state_without_ties().values())
    affordable = int(FLOPS / (2 * n_parameters * n_passes))
    n_tokens = min(max(affordable, TOKENS[0]), TOKENS[1], max(1, LOGITS // config.vocab_size))
    seq_len = min(config.seq_len, len(tokens) - 1, n_tokens)
    return windows_at(tokens, window_starts(len(tokens), seq_len, max(1, n_tokens // seq_len)), seq_len)[0]


def _log_probabilities(model: LanguageModel, input_ids: Tensor) -> Tensor:
    return model(input_ids).float().log_softmax(-1)


@contextmanager
def _rounded(layer: Linear | nn.Embedding, quantization: Quantization) -> Iterator[None]:
    """Meanwhile a layer, and all that share its matrix, compute with what quantization leaves of it."""
    weight = layer.weight
    exact = weight.data
    codes, scale = quantize(exact, quantization)
    weight.data = dequantize(codes, scale, exact.shape[1], quantization.group_size).to(exact.dtype)
    try:
        yield
    finally:
        weight.data = exact
