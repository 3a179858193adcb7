"""Neon: differences of attention maps, functions chosen, memories read."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from nnx_cli.layers.function_bank import KINDS, FunctionBank
from nnx_cli.layers.insides import AttentionRecorder, Insides, Panel, maps_of, watched
from nnx_cli.layers.memory_slots import Memory

DIFFERENCE = (
    "Where each token looks: a row is a token that reads, a column one that is read. A head's map is the difference of "
    "two, the second times the layer's lambda, so that a row sums to 1 - lambda and values may be below 0: what both "
    "maps see cancels, like noise in headphones. Normal: a few clear spots on a faint ground."
)
LAMBDAS = (
    "The share of the second map that is taken from the first, one number a layer: where it began and where it is. "
    "Normal: between 0 and 1; far from where it began means that the layer learned to cancel more, or less."
)
CHOICES = (
    "The function of the bank that each token chose, by its number; shared ones serve all layers. Normal: different "
    "tokens choose differently; one function for all means that the choice has collapsed."
)
READS = (
    "How a token's reading spreads over the memory slots: the share of its strongest slot. Normal: low shares early in "
    "training, when all slots are read alike; higher ones where a token has found what it looks for."
)
SLOTS = "The slot that each token reads most, by its number. Normal: like tokens read like slots, and several are used."
CONTENTS = (
    "What the memory slots hold: a row is a slot, a column a feature of the stream. Normal: rows that differ from each "
    "other; before training they are noise of one small size."
)
PLACES = {"global": "shared", "layer": "own"}


def insides(model: Any, input_ids: Tensor) -> Insides:
    """Differential attention, and what tokens take from the banks."""
    T = input_ids.shape[1]
    banks = [(number, block.bank) for number, block in enumerate(model.blocks, start=1)]
    choosers = [(number, bank) for number, bank in banks if isinstance(bank, FunctionBank)]
    readers = [(number, bank) for number, bank in banks if isinstance(bank, Memory)]
    drawn: list[dict[str, Any]] = []
    hooks = [
        bank.register_forward_pre_hook(lambda _, inputs, given: drawn.append(given), with_kwargs=True)
        for _, bank in choosers
    ]
    scored = [bank.scorer for _, bank in choosers] + [bank.query for _, bank in readers]
    try:
        with AttentionRecorder(model.blocks) as recorder, watched(scored, lambda _, output: output) as scores:
            model(input_ids)
    finally:
        for hook in hooks:
            hook.remove()
    panels: list[Panel] = []
    if choosers:
        panels += _choices([number for number, _ in choosers], scores, drawn, T)
    if readers:
        panels += [*_reads([number for number, _ in readers], scores), *_contents(model, readers)]
    if model.config.n_maps == 1:
        maps, names = maps_of(recorder.passes, T)
        return Insides(maps, names, panels)
    starts = model.config.lambda_init(input_ids.device)
    lambdas = [block.attention.lambda_(start) for block, start in zip(model.blocks, starts, strict=True)]
    maps = []
    for (call,), weight in zip(recorder.passes, lambdas, strict=True):
        first, second = call.weights[0].unflatten(0, (-1, 2)).unbind(1)  # (H, T, T) each
        maps.append((first - weight * second).cpu())
    names = [f"layer {number}" for number in range(1, len(maps) + 1)]
    values = torch.stack((starts, torch.stack(lambdas)), dim=-1).float().cpu()
    panels.append(Panel("Lambda", LAMBDAS, values, names, "number", ("at the start", "learned")))
    return Insides(maps, names, panels, DIFFERENCE)


def _choices(layers: list[int], scores: list[Any], drawn: list[dict[str, Any]], n_tokens: int) -> Iterator[Panel]:
    """The function that each token chose, as the bank chose it."""
    rows, chosen = [], []
    for number, parts, given in zip(layers, scores, drawn, strict=True):
        for kind, part in zip(KINDS, parts, strict=True):
            if part.shape[-1]:
                logits = part.float().view(n_tokens, -1)
                if given["noise"] is not None:
                    logits = logits / given["temperature"] + given["noise"][kind][0]
                rows.append(f"layer {number}, {PLACES[kind]}")
                chosen.append(logits.argmax(-1) + 1)
    yield Panel("Functions chosen", CHOICES, torch.stack(chosen).cpu(), rows, "choice")


def _reads(layers: list[int], scores: list[Any]) -> Iterator[Panel]:
    """The slot that each token reads most, and how much of its reading that is."""
    rows, shares, slots = [], [], []
    for number, parts in zip(layers, scores, strict=True):
        for kind, part in zip(KINDS, parts, strict=True):
            if part.shape[-1]:
                share, slot = part[0].float().softmax(-1).max(-1)
                rows.append(f"layer {number}, {PLACES[kind]}")
                shares.append(share)
                slots.append(slot + 1)
    yield Panel("Memory read", READS, torch.stack(shares).cpu(), rows)
    yield Panel("Slot read most", SLOTS, torch.stack(slots).cpu(), rows, "choice")


def _contents(model: Any, readers: list[tuple[int, Memory]]) -> Iterator[Panel]:
    """What is in the slots."""
    places = [("shared", model.memories), *((f"layer {number}", bank.slots) for number, bank in readers)]
    for place, slots in places:
        if slots is not None:
            columns = [str(number) for number in range(1, slots.shape[1] + 1)]
            rows = [f"slot {number}" for number in range(1, len(slots) + 1)]
            values = slots.detach().float().cpu()
            yield Panel(f"Memories, {place}", CONTENTS, values, rows, "signed", columns)
