"""N4: how much of each token enters the averages of keys."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from nnx_cli.layers.insides import Attended, AttentionRecorder, Insides, Panel, by_layer, watched

GATES = (
    "The copying gate: how much of a token's key enters the running average, from -1 to 1, for every key head. Normal: "
    "values of both signs that differ from token to token; a head whose gates are all alike copies without choosing."
)
AVERAGE = (
    "How much of each token is in the averaged key of the last token: its gate times its position, over the square of "
    "the length. Normal: newer tokens weigh more, and gates decide the sign; each value is small, since all share one "
    "key."
)


def insides(model: Any, input_ids: Tensor) -> Insides:
    """Attention to averaged keys, the copying gates, and the last average."""
    T = input_ids.shape[1]
    layers = [block.attention for block in model.blocks]
    with AttentionRecorder(model.blocks) as recorder, watched(layers, lambda inputs, _: inputs[0]) as read:
        model(input_ids)
    names = [f"layer {number}" for number in range(1, len(layers) + 1)]
    window = layers[0].window
    if window is None or window >= T:
        maps = [calls[0].weights[0].cpu() for calls in recorder.passes]
    else:
        maps = [_assembled(calls, T, window).cpu() for calls in recorder.passes]
    gates = torch.stack([layer.gates(x)[0].T for layer, x in zip(layers, read, strict=True)])
    gates = gates.cpu()  # (L, G, T)
    rows = by_layer(names, gates.shape[1], "key head")
    shares = gates * torch.arange(1, T + 1) / T**2
    panels = [
        Panel("Copying gate", GATES, gates.flatten(0, 1), rows, "signed"),
        Panel("Average key of the last token", AVERAGE, shares.flatten(0, 1), rows, "signed"),
    ]
    return Insides(maps, names, panels)


def _assembled(calls: Sequence[Attended], n_tokens: int, window: int) -> Tensor:
    """The map (H, T, T) of windowed attention, which is computed in blocks of `window` queries."""
    first, rest = calls
    H, blocks = first.weights.shape[1], 1 + len(rest.weights)
    whole = first.weights.new_zeros(H, blocks * window, blocks * window)
    whole[:, :window, :window] = first.weights[0]
    for number, weights in enumerate(rest.weights):  # (H, window, 2 · window), of its own block and the one before
        start = number * window
        whole[:, start + window : start + 2 * window, start : start + 2 * window] = weights
    return whole[:, :n_tokens, :n_tokens]
