import math

import numpy as np
import pytest
import torch

from nnx_cli import models
from nnx_cli.errors import DataError
from nnx_cli.evaluation.losses import Accuracy, Masked, evaluate, ratio_with_error, window_starts
from nnx_cli.layers.loss import _ranks, token_losses, token_scores
from nnx_cli.system.ranks import Ranks

T = 16


def stream(n, seed=0):
    return np.random.default_rng(seed).integers(0, 64, n).astype(np.uint8)


def by_hand(model, tokens, starts, lengths):
    """Losses of every window, one window at a time."""
    model.eval()
    found = []
    for start, length in zip(starts, lengths, strict=True):
        ids = torch.from_numpy(tokens[start : start + length + 1].astype(np.int64))[None]
        found.append(token_losses(model, ids[:, :-1], ids[:, 1:])[0].double().numpy())
    return found


@pytest.mark.parametrize("n", [2, 5, T, T + 1, T + 2, 2 * T + 1, 100, 129])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_every_token_but_the_first_is_a_target(tiny, n, batch_size):
    model, tokens = tiny("llama"), stream(n)
    starts = list(range(0, n - 1, T))
    losses = by_hand(model, tokens, starts, [min(T, n - 1 - start) for start in starts])
    result = evaluate(model, tokens, seq_len=T, batch_size=batch_size, token_bytes=None)
    assert result.tokens == n - 1 == sum(map(len, losses))
    assert result.loss == pytest.approx(np.concatenate(losses).mean(), rel=1e-6)
    assert result.perplexity == pytest.approx(math.exp(result.loss))
    assert (result.bits_per_byte, result.bits_per_byte_stderr, result.text_bytes) == (None, None, None)


def test_batch_size_does_not_matter(tiny):
    model, tokens = tiny(), stream(300)
    losses = {evaluate(model, tokens, seq_len=T, batch_size=b, token_bytes=None).loss for b in (1, 4, 7, 64)}
    assert max(losses) - min(losses) < 1e-6


def test_bits_per_byte_counts_the_bytes_of_the_targets(tiny):
    model, tokens = tiny(), stream(100)
    lengths = np.arange(64, dtype=np.int32) % 5  # some tokens stand for no byte at all
    result = evaluate(model, tokens, seq_len=T, batch_size=4, token_bytes=lengths)
    n_bytes = int(lengths[tokens[1:]].sum())
    assert result.text_bytes == n_bytes
    assert result.bits_per_byte == pytest.approx(result.loss * 99 / math.log(2) / n_bytes, rel=1e-6)


def test_bytes_as_tokens_make_bits_per_byte_the_loss_in_bits(tiny):
    result = evaluate(tiny(), stream(100), seq_len=T, batch_size=4, token_bytes=np.ones(64, np.int32))
    assert result.bits_per_byte == pytest.approx(result.loss / math.log(2), rel=1e-9)
    assert 0 < result.bits_per_byte_stderr < 0.2


def test_text_of_no_bytes_has_no_bits_per_byte(tiny):
    result = evaluate(tiny(), stream(40), seq_len=T, batch_size=4, token_bytes=np.zeros(64, np.int32))
    assert result.bits_per_byte is None and result.bits_per_byte_stderr is None and result.loss > 0


@pytest.mark.parametrize("n_windows", [1, 2, 5])
def test_a_part_of_the_windows_is_evenly_spread(tiny, n_windows):
    model, tokens = tiny(), stream(10 * T + 5)
    starts = window_starts(len(tokens), T, n_windows)
    assert len(starts) == n_windows and (starts % T == 0).all()
    if n_windows > 1:
        assert starts[0] == 0 and starts[-1] == 9 * T
    losses = by_hand(model, tokens, starts, [T] * n_windows)
    result = evaluate(model, tokens, seq_len=T, batch_size=2, token_bytes=None, n_windows=n_windows)
    assert result.tokens == n_windows * T
    assert result.loss == pytest.approx(np.concatenate(losses).mean(), rel=1e-6)


def test_more_windows_than_there_are_is_all_of_them():
    assert window_starts(100, T, 50).tolist() == window_starts(100, T, None).tolist() == list(range(0, 84, T))


def test_a_stream_shorter_than_a_window_counts_in_any_case(tiny):
    result = evaluate(tiny(), stream(7), seq_len=T, batch_size=4, token_bytes=None, n_windows=3)
    assert result.tokens == 6


def test_fewer_than_two_tokens_are_refused(tiny):
    for n in (0, 1):
        with pytest.raises(DataError, match="fewer than two tokens"):
            evaluate(tiny(), stream(n), seq_len=T, batch_size=4, token_bytes=None)


def test_standard_error_of_a_ratio():
    ratio, error = ratio_with_error(np.array([2.0, 4.0, 6.0, 8.0]), np.array([1, 1, 1, 1]))
    assert ratio == 5.0
    assert error == pytest.approx(np.std([2, 4, 6, 8], ddof=1) / math.sqrt(4))
    assert ratio_with_error(np.array([3.0]), np.array([2])) == (1.5, None)
    assert ratio_with_error(np.array([1.0, 2.0, 3.0]), np.array([2, 4, 6])) == (0.5, 0.0)


def test_standard_error_covers_the_truth():
    draws = np.random.default_rng(0)
    hits = 0
    for _ in range(400):
        sizes = draws.integers(5, 15, 50)
        amounts = 2.0 * sizes + draws.normal(0, 3, 50)
        ratio, error = ratio_with_error(amounts, sizes)
        hits += abs(ratio - 2.0) < 1.96 * error
    assert 0.91 < hits / 400 < 0.98


@pytest.mark.parametrize("training", [True, False])
def test_evaluation_leaves_the_model_as_it_was(tiny, training):
    model = tiny(dropout=0.5).train(training)
    first, second = (evaluate(model, stream(60), seq_len=T, batch_size=2, token_bytes=None).loss for _ in range(2))
    assert first == second, "dropout is off"
    assert model.training is training
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("name", models.names())
def test_ranks_are_those_of_the_logits(tiny, name):
    model = tiny(name).eval()
    ids = torch.from_numpy(stream(3 * T + 3).reshape(3, T + 1).astype(np.int64))
    losses, ranks = token_scores(model, ids[:, :-1], ids[:, 1:])
    order = model(ids[:, :-1]).argsort(-1, descending=True)
    assert (ranks == (order == ids[:, 1:, None]).int().argmax(-1)).all()
    assert losses.equal(token_losses(model, ids[:, :-1], ids[:, 1:])), "to the last digit"


def test_equal_logits_rank_by_their_ids_and_what_is_no_number_comes_first():
    rows = torch.tensor([[1.0, 1.0, 1.0], [1.0, 1.0, 1.0], [0.0, 2.0, math.nan], [0.0, math.nan, 2.0]])
    assert _ranks(rows, torch.tensor([0, 2, 1, 1])).tolist() == [0, 2, 1, 3]


def test_accuracy_counts_every_target(tiny):
    model, tokens, accuracy = tiny(), stream(100), Accuracy()
    plain = evaluate(model, tokens, seq_len=T, batch_size=4, token_bytes=np.ones(64, np.int32))
    watched = evaluate(
        model, tokens, seq_len=T, batch_size=4, token_bytes=np.ones(64, np.int32), watchers=[accuracy.add]
    )
    assert (watched.loss, watched.bits_per_byte_stderr) == (plain.loss, plain.bits_per_byte_stderr)
    assert watched.window_losses == plain.window_losses
    first = fifth = 0
    for start in range(0, 99, T):
        ids = torch.from_numpy(tokens[start : start + T + 1].astype(np.int64))[None]
        likeliest = model(ids[:, :-1]).topk(5).indices == ids[:, 1:, None]
        first, fifth = first + likeliest[..., 0].sum().item(), fifth + likeliest.sum().item()
    assert accuracy.shares() == {"top1_accuracy": first / 99, "top5_accuracy": fifth / 99} and fifth > first


def documents_with_answers(seed=0, n=60):
    """A stream of documents, where each begins, and which tokens count: the end of each."""
    draw = np.random.default_rng(seed)
    lengths = draw.integers(2, 40, n)
    documents = np.concatenate(([0], np.cumsum(lengths)[:-1]))
    counts = np.zeros(lengths.sum(), bool)
    for start, length in zip(documents, lengths, strict=True):
        counts[start + max(1, length // 2) : start + length - 1] = True  # the last token separates
    return stream(lengths.sum(), seed), documents, counts


@pytest.mark.parametrize("batch_size", [1, 7])
@pytest.mark.parametrize("seed", range(4))
def test_where_a_mask_says_so_each_of_its_tokens_counts_once(tiny, batch_size, seed):
    tokens, documents, counts = documents_with_answers(seed)
    masked = Masked(np.packbits(counts, bitorder="little"), documents)
    lengths = np.arange(64, dtype=np.int32) % 5
    seen = []
    result = evaluate(
        tiny(),
        tokens,
        seq_len=T,
        batch_size=batch_size,
        token_bytes=lengths,
        losses_of=lambda model, ids, targets: targets.float(),
        masked=masked,
    )
    wanted = tokens[counts]
    assert result.tokens == len(wanted) and result.loss == pytest.approx(wanted.mean())
    assert result.text_bytes == lengths[wanted].sum()
    accuracy = Accuracy()
    watchers = [accuracy.add, lambda scores: seen.extend(places_of(scores))]
    evaluate(tiny(), tokens, seq_len=T, batch_size=batch_size, token_bytes=None, masked=masked, watchers=watchers)
    assert sorted(seen) == np.flatnonzero(counts).tolist() and accuracy.n_tokens == len(wanted)


def places_of(scores):
    return (scores.starts[:, None] + 1 + np.arange(scores.targets.shape[1]))[scores.counts].tolist()


def test_what_counts_is_read_with_its_document_before_it(tiny):
    """Whole documents, alone or behind others, give the losses that the windows do."""
    model, (tokens, documents, counts) = tiny("llama"), documents_with_answers(3)
    found = {}

    def watch(scores):
        for row, start in enumerate(scores.starts):
            for at in np.flatnonzero(scores.counts[row]):
                found[int(start + 1 + at)] = int(start)

    masked = Masked(np.packbits(counts, bitorder="little"), documents)
    evaluate(model, tokens, seq_len=T, batch_size=4, token_bytes=None, masked=masked, watchers=[watch])
    for place, start in found.items():
        own = documents[np.searchsorted(documents, place, side="right") - 1]
        assert start < own or place - own > T - 2 or start == own == 0, "the separator before it and all of it"


def test_a_text_of_which_nothing_counts_is_refused(tiny):
    masked = Masked(np.zeros(13, np.uint8), np.array([0, 50]))
    with pytest.raises(DataError, match="no token that counts"):
        evaluate(tiny(), stream(100), seq_len=T, batch_size=4, token_bytes=None, masked=masked)


class Reader(Ranks):
    """One of several ranks, of whom the others are not there; one of them takes more passes."""

    def __init__(self, rank, count):
        self.rank, self.count = rank, count

    def most(self, number):
        return number + 2


@pytest.mark.parametrize(("count", "n_windows"), [(2, None), (3, 7), (5, 3), (2, 1)])
def test_ranks_read_the_windows_of_one(tiny, count, n_windows):
    """Each once, in their order; to the digit where a batch has as many windows."""
    model, tokens = tiny("llama"), stream(11 * T + 5)
    options = dict(seq_len=T, batch_size=1, token_bytes=np.ones(64, dtype=np.int64), n_windows=n_windows)
    alone, parts, tails = evaluate(model, tokens, **options), [], 0
    for rank in range(count):
        try:
            part = evaluate(model, tokens, **options, group=Reader(rank, count))
        except DataError:  # a rank with no window: the others have some
            continue
        parts += part.window_losses
        tails += part.tokens
    assert tuple(parts) == alone.window_losses and tails == alone.tokens
