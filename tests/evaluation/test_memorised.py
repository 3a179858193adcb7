import numpy as np
import pytest

from nnx_cli.evaluation import memorised
from nnx_cli.evaluation.memorised import find_copies, pieces_like, searched

draws = np.random.default_rng(7)


def by_hand(texts, training, gram):
    """Longest piece and share of pieces, by comparing everything."""
    data = bytes(training)
    pieces = [bytes(t[i : i + gram]) for t in texts for i in range(len(t) - gram + 1)]
    share = sum(piece in data for piece in pieces) / len(pieces) if pieces else None
    longest = 0
    for text in texts:
        for start in range(len(text)):
            while start + longest < len(text) and bytes(text[start : start + longest + 1]) in data:
                longest += 1
    return longest, share


@pytest.mark.parametrize("block", [1, 7, 64, 2**20])
@pytest.mark.parametrize("alphabet", [1, 2, 5, 250])
def test_as_comparing_everything_finds(monkeypatch, block, alphabet):
    monkeypatch.setattr(memorised, "BLOCK_TOKENS", block)
    monkeypatch.setattr(memorised, "GRAM", 6)
    for n in (3, 80, 400):
        training = draws.integers(0, alphabet, n).astype(np.uint8)
        texts = [draws.integers(0, alphabet, k).astype(np.uint8) for k in (0, 1, 5, 6, 40)]
        texts.append(np.concatenate((texts[-1][:9], training[n // 3 : n // 3 + 30])))
        found = find_copies(texts, training)
        assert (len(found.longest), found.share) == by_hand(texts, training, 6)
        assert bytes(found.longest) in bytes(training)


def test_words_that_any_polynomial_modulo_a_power_of_two_takes_for_each_other():
    word = np.array([n.bit_count() % 2 for n in range(2048)], np.uint8)  # Thue and Morse's
    assert memorised._hashes(word, 2048) == memorised._hashes(1 - word, 2048)
    found = find_copies([1 - word], word)
    assert 50 < len(found.longest) < 2048 and bytes(found.longest) in bytes(word)


def test_a_copy_in_16_bits_across_blocks(monkeypatch):
    monkeypatch.setattr(memorised, "BLOCK_TOKENS", 100)
    training = draws.integers(0, 50_000, 1000).astype("<u2")
    sample = draws.integers(0, 50_000, 300)
    sample[20:157] = training[190:327]
    found = find_copies([sample], training)
    assert found.longest.tolist() == training[190:327].tolist()
    assert found.share == pytest.approx((137 - 49) / (300 - 49))


def test_texts_without_a_piece_of_50():
    found = find_copies([np.arange(40), np.array([], int)], np.arange(60, dtype=np.uint8))
    assert found.share is None and len(found.longest) == 40
    assert len(find_copies([], np.arange(60, dtype=np.uint8)).longest) == 0


def test_the_part_that_is_searched(monkeypatch):
    monkeypatch.setattr(memorised, "SEARCHED_BYTES", 64)
    assert len(searched(np.zeros(100, np.uint8))) == 64 and len(searched(np.zeros(100, "<u2"))) == 32
    assert len(searched(np.zeros(10, "<u4"))) == 10


def test_pieces_of_a_text_as_long_as_the_samples():
    samples = [np.zeros(n, int) for n in (5, 9, 3)]
    pieces = pieces_like(samples, np.arange(100, dtype=np.uint8))
    assert [len(piece) for piece in pieces] == [5, 9, 3] and [piece[0] for piece in pieces] == [0, 45, 91]
    assert [len(piece) for piece in pieces_like(samples, np.arange(4, dtype=np.uint8))] == [4, 4, 3]
