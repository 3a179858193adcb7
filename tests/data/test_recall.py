import hashlib

import numpy as np
import pytest

from nnx_cli.data.recall import KEYS, LONGEST_LINE, find_queries, make_recall_folder, recall_text
from nnx_cli.errors import OutputError, UsageError


def by_hand(text):
    """Places of answers, how far behind them the values stand, and the text between, line by line."""
    bound, found, place = {}, [], 0
    for line in text.splitlines(keepends=True):
        key, kind, value = line[:1], line[1:2], line[2:3]
        if kind == "=" and value:
            assert key not in bound, "a key that waits is not bound again"
            bound[key] = (place + 2, value)
        elif kind == "?" and value:
            where, wanted = bound.pop(key)
            assert value == wanted
            found.append((place + 2, place + 2 - where))
        place += len(line)
    return found


@pytest.mark.parametrize("seq_len", [32, 100, 256, 1024])
def test_every_query_has_its_answer_at_its_distance(seq_len):
    text = recall_text("x", 60_000, seq_len)
    assert len(text) == 60_000 and text.isascii()
    wanted = by_hand(text[: text.rindex("\n") + 1])
    places, behind = find_queries(np.frombuffer(text.encode(), np.uint8))
    assert list(zip(places.tolist(), behind.tolist(), strict=True))[: len(wanted)] == wanted
    assert len(wanted) > 60_000 // LONGEST_LINE * 0.3, "a third of the lines ask"
    assert behind.min() >= 4 and seq_len / 4 < behind.max() <= seq_len // 2
    octaves = np.bincount(np.log2(behind).astype(int))[2:]
    assert (octaves[:-1] > len(places) / 50).all(), "near and far"


def test_answers_are_no_likelier_than_any_other():
    text = recall_text("x", 200_000, 256)
    places, _ = find_queries(np.frombuffer(text.encode(), np.uint8))
    counts = np.bincount([int(text[place]) for place in places], minlength=10)
    assert len(counts) == 10 and abs(counts / len(places) - 0.1).max() < 0.02
    assert {text[place - 2] for place in places} == set(KEYS)


def test_the_text_of_a_seed_is_that_text():
    """On every machine and Python: folders made before go on being those of their seed."""
    assert hashlib.sha256(recall_text("train 0", 5000, 128).encode()).hexdigest()[:16] == "6f5a33849e457794"
    assert recall_text("a", 999, 64) == recall_text("a", 999, 64) != recall_text("b", 999, 64)
    assert recall_text("a", 2000, 64).startswith(recall_text("a", 999, 64))


@pytest.mark.parametrize("seq_len", [1, 31])
def test_a_context_too_short(tmp_path, seq_len):
    with pytest.raises(UsageError, match="a context of at least 32"):
        make_recall_folder(tmp_path / "r", 0, 5000, seq_len)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_is_ordinary_and_made_once(tmp_path):
    folder = make_recall_folder(tmp_path / "r", 3, 20_000, 64)
    assert (len(folder.train), folder.vocab_size, folder.tokenizer.kind) == (20_000, 256, "byte")
    assert bytes(folder.train) == recall_text("train 3", 20_000, 64).encode()
    assert bytes(folder.val) == recall_text("val 3", len(folder.val), 64).encode()
    assert len(folder.val) == 64 * 64, "so many windows at least"
    assert len(find_queries(folder.val)[0]) > 200
    before = (tmp_path / "r" / "meta.json").stat().st_mtime_ns
    assert make_recall_folder(tmp_path / "r", 3, 20_000, 64).fingerprint == folder.fingerprint
    assert (tmp_path / "r" / "meta.json").stat().st_mtime_ns == before
    assert make_recall_folder(tmp_path / "s", 4, 20_000, 64).fingerprint != folder.fingerprint
    for seed, tokens, seq_len in ((4, 20_000, 64), (3, 20_001, 64), (3, 20_000, 128)):
        with pytest.raises(OutputError, match="another text"):
            make_recall_folder(tmp_path / "r", seed, tokens, seq_len)
