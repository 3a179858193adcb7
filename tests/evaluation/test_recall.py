from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from nnx_cli import models
from nnx_cli.data.loader import Loader
from nnx_cli.data.recall import find_queries, recall_text
from nnx_cli.evaluation.recall import recall_accuracy
from nnx_cli.layers.loss import LossModule

T = 64


def text(seed, n, seq_len=T):
    return np.frombuffer(recall_text(seed, n, seq_len).encode(), np.uint8)


class Reader(nn.Module):
    """Answers from the last `memory` tokens, or with the newest value."""

    ignore_index = -100

    def __init__(self, memory=None):
        super().__init__()
        self.memory, self.device, self.head = memory, torch.device("cpu"), nn.Identity()
        self.config = SimpleNamespace(vocab_size=128, seq_len=T)

    def trunk(self, input_ids):
        logits = torch.zeros(*input_ids.shape, 128)
        for row, ids in enumerate(input_ids.tolist()):
            line = bytes(ids).decode()
            for place in (place for place, char in enumerate(line) if char == "?"):
                seen = line[: place - 1]
                values = [i for i in range(2, len(seen)) if seen[i].isdigit()]
                if self.memory is not None:
                    values = [
                        i for i in values if seen[i - 2 : i] == line[place - 1] + "=" and place + 1 - i <= self.memory
                    ]
                if values:
                    logits[row, place, ids[values[-1]]] = 1.0
        return logits


@pytest.mark.parametrize("batch_size", [1, 5, 100])
def test_a_model_that_recalls_all(batch_size):
    tokens = text("val", 5000)
    found = recall_accuracy(Reader(T), tokens, batch_size)
    assert found == [(8, 1.0), (16, 1.0), (32, 1.0)]


def test_a_model_that_recalls_what_is_near():
    assert recall_accuracy(Reader(16), text("val", 5000), 50) == [(8, 1.0), (16, 1.0), (32, 0.0)]


def test_the_newest_value_is_no_recall():
    near, middle, far = recall_accuracy(Reader(), text("val", 20_000), 50)
    assert near[1] > 0.8 and middle[1] < 0.25 and far[1] < 0.2


def test_without_a_query_there_is_nothing_to_say():
    assert recall_accuracy(Reader(), np.frombuffer(b"the cat sees a dog\n" * 20, np.uint8), 4) == []
    assert recall_accuracy(Reader(), text("val", T - 1), 4) == []


def test_a_small_model_learns_it():
    """Three seconds of a CPU bring it well above one in ten, which it does not leave without looking back."""
    torch.manual_seed(0)
    model = models.build("ngpt", vocab_size=128, dim=32, n_layers=2, n_heads=2, seq_len=32)
    module, loader, val = LossModule(model), Loader(text("train 0", 400_000, 32), 32, 0), text("val 0", 20_000, 32)
    before = recall_accuracy(model, val, 64)
    optimizer = torch.optim.AdamW(model.parameters(), lr=6e-3, betas=(0.9, 0.98), weight_decay=0.0)
    for step in range(220):
        loss, n = module(*loader.batch(32 * step, 32))
        (loss / n).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = 6e-3 * min(1, (step + 1) / 50)
        optimizer.step()
        optimizer.zero_grad()
    after = recall_accuracy(model, val, 64)
    assert [d for d, _ in after] == [8, 16] and all(a < 0.25 for _, a in before)
    assert sum(a for _, a in after) / 2 > 0.4 and min(a for _, a in after) > 0.2
    assert len(find_queries(val)[0]) > 1000
