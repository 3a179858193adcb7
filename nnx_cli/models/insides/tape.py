"""Tape: what each critic reads, and what becomes of the prediction without it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from nnx_cli.layers.insides import Insides, Panel, causal, watched

SEGMENTS = ("previous", "tokens", "state")
CONTRIBUTIONS = (
    "How much the prediction after each token changes when a part is silenced: 0 not at all, 1 entirely. A silenced "
    "critic passes on the coda's output, a silenced prophet says nothing. Normal: the moderator, who speaks last, "
    "matters most; one near 0 everywhere does no work yet."
)
PREDICTED = (
    "The token that each part expects next, and how likely it finds that, if the head reads its output in place of the "
    "last part's: the coda says what is, critics what could be, the moderator what can be, and that is what the model "
    "predicts. The line below says what came. Normal: parts that differ, and a moderator that is right more often; the "
    "head never learned to read the others."
)
READING = (
    "What the last token reads of the text, of each part, as a mean over its levels and heads: shares that sum to 1. "
    "Normal: parts that look at different tokens."
)
SHARES = (
    "Which segment each level attends to: the embedding before (in a critic's first level, what the prophet says), its "
    "tokens (for a later critic, what the critic before it says), and its own state. Normal: no segment at 0 in all "
    "levels; a level without one has a dash."
)
REPEATS = {1: (1,), 2: (2, 1), 3: (1, 1, 1)}  # how often segments occur, by how many are told apart


def insides(model: Any, input_ids: Tensor) -> Insides:
    """Attention over all segments of every level, what critics read, and what they contribute."""
    config, levels = model.config, list(model.blocks)
    with (
        watched([level.q for level in levels], lambda _, output: output) as queries,
        watched([level.kv for level in levels], lambda _, output: output) as keys_values,
        watched(levels, lambda _, output: output[0]) as states,
    ):
        log_probs = model(input_ids)
    by_segment = [
        segment_weights(q, kv, 2 * config.n_heads, config.variant != "original")
        for q, kv in zip(queries, keys_values, strict=True)
    ]
    parts = _parts(config)
    names = [f"{part}, level {n}" for part, members in parts.items() for n in range(1, len(members) + 1)]
    maps = [weights.sum(-1).cpu() for weights in by_segment]
    last = [torch.stack([maps[i][:, -1].mean(0) for i in members]).mean(0) for members in parts.values()]
    panels = [
        *_contributions(model, input_ids, log_probs, parts),
        _predictions(model, states, parts),
        Panel("Read by the last token", READING, torch.stack(last), list(parts)),
    ]
    if config.n_segments == 3:
        shares = torch.stack([_segment_shares(weights) for weights in by_segment])
        panels.append(Panel("Segments", SHARES, shares, names, "number", SEGMENTS))
    return Insides(maps, names, panels)


def _parts(config: Any) -> dict[str, range]:
    """The coda and the critics by name, with the numbers of their levels."""
    parts = {"coda": range(config.coda_layers)}
    for number in range(1, config.live_critics + 1):
        start = config.coda_layers + (number - 1) * config.n_layers
        moderates = number == config.live_critics and config.moderator
        name = "moderator" if moderates else f"critic {number}"
        parts[name] = range(start, start + config.n_layers)
    return parts


def segment_weights(q: Tensor, kv: Tensor, n_heads: int, is_causal: bool) -> Tensor:
    """Attention (2 H, T, T, G) of queries (1, T, 2 D) to the segments of kv (G, 1, T, 4 D), as `attend` computes it:
    of a segment that occurs n times, the n together."""
    q = q.float().unflatten(-1, (n_heads, -1))[0]  # (T, 2 H, K)
    k = kv.float().unflatten(-1, (2, n_heads, -1))[:, 0, :, 0]  # (G, T, 2 H, K)
    scores = torch.einsum("thk,gshk->ghts", q, k) * q.shape[-1] ** -0.5
    if is_causal:
        scores = causal(scores)
    times = torch.tensor(REPEATS[len(k)], device=q.device).log()
    scores = (scores + times[:, None, None, None]).permute(1, 2, 3, 0)  # (2 H, T, T, G)
    return scores.flatten(-2).softmax(-1).view_as(scores)


def _segment_shares(weights: Tensor) -> Tensor:
    """What a level gives to each segment, (3,), on average; nan for a segment it has not."""
    shares = weights.sum(2).mean((0, 1)).cpu()  # (G,)
    if len(shares) == 3:
        return shares
    if len(shares) == 2:  # the tokens stand for the embedding before them, too
        return torch.stack((shares[0] / 2, shares[0] / 2, shares[1]))
    return torch.tensor([math.nan, float(shares[0]), math.nan])


def _predictions(model: Any, states: Sequence[Tensor], parts: dict[str, range]) -> Panel:
    """The token that each part finds likeliest to come next, and how likely."""
    said = {name: states[members[-1]] for name, members in parts.items()}
    if len(parts) > 2 and not model.config.moderator:
        said["their mean"] = torch.stack(list(said.values())[1:]).mean(0)
    log_probs = torch.stack([model.head(model.norm(h))[0] for h in said.values()])  # (R, T, V)
    values, ids = log_probs.max(-1)
    title = "What is, what could be, what can be"
    return Panel(title, PREDICTED, values.exp().float().cpu(), list(said), tokens=ids.tolist())


def _contributions(model: Any, input_ids: Tensor, log_probs: Tensor, parts: dict[str, range]) -> Iterator[Panel]:
    """By how much predictions change, as total variation, without the prophet and without each critic, if any."""
    silenced: dict[str, Callable[[ExitStack], None]] = {}
    if model.prophet is not None:
        silenced["prophet"] = partial(_replace, module=model.prophet, make=torch.zeros_like)
    for name, members in list(parts.items())[1:]:
        silenced[name] = partial(_pass_on, levels=[model.blocks[i] for i in members])
    changes = []
    for silence in silenced.values():
        with ExitStack() as hooks:
            silence(hooks)
            without = model(input_ids)
        changes.append((without.exp() - log_probs.exp()).abs().sum(-1)[0] / 2)
    if changes:
        values = torch.stack(changes).float().cpu()
        yield Panel("Contribution to the prediction", CONTRIBUTIONS, values, list(silenced), is_live=True)


def _replace(hooks: ExitStack, module: nn.Module, make: Callable[[Any], Any]) -> None:
    hooks.callback(module.register_forward_hook(lambda _, inputs, output: make(output)).remove)


def _pass_on(hooks: ExitStack, levels: list[nn.Module]) -> None:
    """Make a critic return the state that its first level was given."""
    state: list[Tensor] = []
    hooks.callback(levels[0].register_forward_pre_hook(lambda _, inputs: state.append(inputs[1])).remove)
    _replace(hooks, levels[-1], lambda output: (state[-1], *output[1:]))
