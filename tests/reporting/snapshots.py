"""Snapshots of a run to draw."""

import torch

from nnx_cli.layers.insides import Insides, Panel
from nnx_cli.runs.snapshots import Snapshot

NAN = float("nan")


def course(n=5, n_layers=3, n_heads=2, tokens=("'a'", "' '", "'b'", "'\\n'"), slots=(6, 10), text=("a ", "b", "\n")):
    """`n` snapshots of a model that learns: of every kind of panel one, and memories."""
    return [snapshot(number, n_layers, n_heads, list(tokens), slots, list(text)) for number in range(1, n + 1)]


def snapshot(number, n_layers=3, n_heads=2, tokens=("'a'", "'b'"), slots=(6, 10), text=("a", "b")):
    draw, T = torch.Generator().manual_seed(number), len(tokens)
    layers = [f"layer {n + 1}" for n in range(n_layers)]
    scores = torch.rand(n_layers, n_heads, T, T, generator=draw) * number
    maps = scores.masked_fill(torch.ones(T, T, dtype=torch.bool).triu(1), -torch.inf).softmax(-1)
    rows, columns = slots
    slot_names, features = [f"slot {n + 1}" for n in range(rows)], [str(n + 1) for n in range(columns)]
    panels = [
        Panel("Read", "What is read. Normal: little.", maps[0].mean(0), [f"r {n}" for n in range(T)]),
        Panel("Chosen", "What is chosen.", torch.randint(1, 5, (n_layers, T), generator=draw), layers, "choice"),
        Panel(
            "Memories, shared",
            "What is held.",
            number * torch.randn(slots, generator=draw),
            slot_names,
            "signed",
            features,
        ),
        Panel("Steps", "How far.", torch.full((n_layers, 2), 0.1 * number), layers, "number", ["up", "down"]),
        Panel("Fixed", "What stays.", torch.full((n_layers, 1), 0.5), layers, "number", ["always"]),
    ]
    norms = torch.rand(n_layers, 2, generator=draw) + number
    surprise = torch.tensor([[NAN, *(torch.rand(len(text) - 1, generator=draw) * 5).tolist()]])
    return Snapshot(
        number * 100,
        list(tokens),
        Insides(list(maps), layers, panels),
        Panel("Norms by layer", "How large.", norms, layers, "number", ["weights", "activations"]),
        Panel("Surprise", "How surprised.", surprise, ["nats"], "share", list(text)),
    )
