import math

import numpy as np
import pytest
import torch

from nnx_cli.evaluation.by_document import ByDocument
from nnx_cli.evaluation.losses import evaluate, ratio_with_error
from nnx_cli.layers.loss import token_losses

T = 16


def measured(model, tokens, documents, token_bytes):
    found = ByDocument(documents, token_bytes)
    evaluate(model, tokens, seq_len=T, batch_size=3, token_bytes=token_bytes, watchers=[found.add])
    return found


def test_losses_and_bytes_belong_to_documents_whatever_windows_they_were_read_in(tiny):
    model, n = tiny(), 10 * T + 5
    tokens = np.random.default_rng(0).integers(0, 64, n).astype(np.uint8)
    lengths = (np.arange(64) % 4).astype(np.int32)
    documents = np.array([0, 1, 3, 9, 16, 17, 40, 41, 60, 80, 99, 120, 130, 150], np.uint64)
    found = measured(model, tokens, documents, lengths)
    ids, nats = torch.from_numpy(tokens.astype(np.int64)), np.zeros(n)
    for start in range(0, n - 1, T):
        end = min(start + T, n - 1)
        nats[start + 1 : end + 1] = token_losses(model, ids[None, start:end], ids[None, start + 1 : end + 1])[0]
    of = [slice(a, b) for a, b in zip(documents.astype(int), [*documents.astype(int)[1:], n], strict=True)]
    assert found.nats == pytest.approx([nats[each].sum() for each in of], rel=1e-5)
    assert found.n_bytes.tolist() == [lengths[tokens[each]][int(each.start == 0) :].sum() for each in of]
    seen = found.n_bytes > 0
    wanted = ratio_with_error(found.nats[seen] / math.log(2), found.n_bytes[seen])[1]
    assert found.n_documents == seen.sum() >= 10 and found.stderr() == wanted > 0


def test_few_documents_say_nothing(tiny):
    tokens = np.zeros(100, np.uint8)
    for n, known in ((1, False), (9, False), (10, True)):
        found = measured(tiny(), tokens, np.arange(n) * 8, np.ones(64, np.int32))
        assert (found.stderr() is not None) is known


def test_an_error_over_documents_covers_the_truth():
    """Losses that belong together within a document: windows believe to know more than they do."""
    draws, hits = np.random.default_rng(1), 0
    for _ in range(300):
        found = ByDocument(np.arange(20) * 50, np.ones(2, np.int32))
        found.nats = 50 * (2.0 + draws.normal(0, 0.3, 20)) * math.log(2)
        found.n_bytes = np.full(20, 50.0)
        hits += abs(found.nats.sum() / found.n_bytes.sum() / math.log(2) - 2.0) < 1.96 * found.stderr()
    assert 0.89 < hits / 300 < 0.98
