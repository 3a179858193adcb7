"""What a model attends to, gates and selects in a text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from nnx_cli.layers.insides import Insides, Panel, by_layer
from nnx_cli.models._base import LanguageModel

HEADS = (
    "What each head looks at, on average over the text: shares of its attention, and how many tokens back it looks. "
    "Normal: heads of different reach; a head that gives nearly all to the first token is resting."
)


def look_inside(model: LanguageModel, ids: Sequence[int]) -> Insides:
    """The insides of a model with the tokens `ids`, where its heads look among them; no attention where it has none.

    The model is left as it was, and so are the random numbers of others."""
    was_training = model.training
    devices = [model.device] if model.device.type == "cuda" else []
    model.eval()
    try:
        with torch.no_grad(), torch.random.fork_rng(devices):
            found = model.insides(torch.tensor([list(ids)], device=model.device))
    finally:
        model.train(was_training)
    return replace(found, panels=[_heads(found.attention, found.layers), *found.panels]) if found.attention else found


def _heads(attention: Sequence[Tensor], layers: Sequence[str]) -> Panel:
    """What every head looks at, on average over the tokens that have a choice."""
    rows: list[str] = []
    values = []
    for name, weights in zip(layers, attention, strict=True):
        T = weights.shape[-1]
        at = torch.arange(T)
        back = (at[:, None] - at).clamp(min=0).float()
        chooses = slice(1 if T > 1 else 0, None)
        itself = weights.diagonal(dim1=-2, dim2=-1)[:, chooses].mean(-1)
        before = weights.diagonal(-1, -2, -1).mean(-1) if T > 1 else torch.zeros_like(itself)
        first = weights[:, chooses, 0].mean(-1)
        reach = (weights.abs() * back).sum(-1) / weights.abs().sum(-1).clamp(min=1e-9)
        rows += by_layer([name], len(weights), "head")
        values.append(torch.stack((itself, before, first, reach[:, chooses].mean(-1)), dim=-1))
    columns = ("itself", "token before", "first token", "tokens back")
    return Panel("Heads", HEADS, torch.cat(values), rows, "number", columns)
