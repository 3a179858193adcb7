"""A recipe for --bank-file: a smaller model of yours, finished and frozen, that a token may ask in the forward pass.

    nnx train --model llama --size nano --data data/book --out weights/small
    nnx train --model neon --decoder function --bank-file frozen_model.py --data data/book

Copy this file and change SMALLER: a run with the same tokenizer. It reads the last `context` ids of each token, and one
learned matrix turns what it has for its head into the width of the larger model. Its own weights get no gradient; they
are saved with the run. A function computes for every token in training, and `context` tokens for each: keep both small.
"""

import torch
from torch import Tensor, nn

from nnx_cli.runs.find import find_model
from nnx_cli.runs.load import load_model

SMALLER = "weights/small"


class FrozenModel(nn.Module):
    """What a smaller model has for its head at each token."""

    context = 16

    def __init__(self, dim: int, vocab_size: int) -> None:
        super().__init__()
        self.smaller = load_model(find_model(SMALLER), torch.device("cpu")).requires_grad_(False)
        assert self.smaller.config.vocab_size == vocab_size, f"{SMALLER} has another vocabulary"
        self.out = nn.Linear(self.smaller.config.dim, dim, bias=False)

    def train(self, mode: bool = True) -> "FrozenModel":
        """The smaller model stays in evaluation mode: without dropout and noise."""
        super().train(mode)
        self.smaller.eval()
        return self

    def forward(self, x: Tensor, input_ids: Tensor) -> Tensor:
        """x (N, dim), which it does not read, and input_ids (N, context) to (N, dim)."""
        with torch.no_grad():
            state = self.smaller.trunk(input_ids.clamp(min=0))[:, -1]
        return self.out(state)
