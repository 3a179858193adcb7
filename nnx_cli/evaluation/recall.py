"""How well a model recalls what it has read: accuracy of the answers in generated text, by their distance."""

from __future__ import annotations

import numpy as np
import torch

from nnx_cli.data.loader import windows_at
from nnx_cli.data.recall import VALUE, find_queries
from nnx_cli.evaluation.losses import evaluating, window_starts
from nnx_cli.layers.loss import token_scores
from nnx_cli.models._base import LanguageModel

NEAREST = 3  # logarithm of the first distance


@torch.no_grad()
def recall_accuracy(model: LanguageModel, tokens: np.ndarray, batch_size: int) -> list[tuple[int, float]]:
    """Share of the answers that the model finds likeliest of all tokens, by the distance of their values: up to 8
    tokens before them, then 9 to 16, 17 to 32, …, each named by its end.

    `tokens` are text of `data.recall` that it was not trained on: the validation split of its folder. Every window is
    read from its own start, as everywhere; an answer whose binding begins before that does not count. By chance one in
    ten would be right; one that always says the newest value is right near by too, and no oftener than that beyond.
    """
    seq_len = model.config.seq_len
    places, behind = find_queries(tokens)
    known = np.zeros(len(tokens), np.int64)  # of every answer, how far before it the value stands; 0 is no answer
    known[places] = behind
    starts = window_starts(len(tokens), seq_len, None)
    found, right = [], []
    with evaluating(model):
        for i in range(0, len(starts), batch_size):
            begin = starts[i : i + batch_size]
            input_ids, targets = windows_at(tokens, begin, seq_len)
            _, ranks = token_scores(model, input_ids.to(model.device), targets.to(model.device))
            offsets = np.arange(1, seq_len + 1)
            distance = known[begin[:, None] + offsets]
            counts = (distance > 0) & (distance + VALUE <= offsets)  # key and value are in the window
            found.append(distance[counts])
            right.append(ranks.cpu().numpy()[counts] == 0)
    distances, hits = (np.concatenate(parts) if parts else np.empty(0, np.int64) for parts in (found, right))
    ends = 2 ** np.maximum(NEAREST, np.ceil(np.log2(distances))).astype(np.int64)
    return [(int(end), float(hits[ends == end].mean())) for end in np.unique(ends)]
