"""Validation documents that are in the training text as well, beside a count over the texts themselves."""

import json
import random
import tracemalloc

import numpy as np
import pytest

from nnx_cli.config import PrepareConfig
from nnx_cli.data import duplicates
from nnx_cli.data.duplicates import count_copies
from nnx_cli.data.prepare import prepare
from nnx_cli.data.token_folder import open_token_folder
from nnx_cli.data.tokenizers.byte import ByteTokenizer


def write_rows(path, texts):
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return path


def count(tmp_path, texts, **options):
    """What prepare counts, and the notes."""
    events = []
    name = f"made{len(list(tmp_path.iterdir()))}"
    path = write_rows(tmp_path / f"{name}.jsonl", texts)
    made = prepare([path], tmp_path / name, PrepareConfig(**options), on_progress=events.append)
    assert open_token_folder(tmp_path / name).meta["val_documents_in_train"] == made["val_documents_in_train"]
    return made["val_documents_in_train"], [event["note"] for event in events if "note" in event]


def some_texts(n, kinds, seed=0):
    draw = random.Random(seed)
    words = ["a", "Übergröße", "the cat", "12", "\n", "。"]
    pool = [" ".join(draw.choices(words, k=draw.randint(1, 12))) + "." for _ in range(kinds)]
    return draw.choices(pool, k=n)


def expected(texts):
    """By the texts: every tenth is held out, from the fifth on."""
    train = {text for i, text in enumerate(texts) if i % 10 != 4}
    return sum(text in train for text in texts[4::10])


@pytest.mark.parametrize(
    ("tokenizer", "kinds"), [("byte", 3), ("byte", 400), ("byte", 30_000), ("char", 400), ("bpe", 3), ("gpt2", 400)]
)
def test_copies_are_counted(tmp_path, tokenizer, kinds):
    texts = some_texts(1000, kinds)
    n, notes = count(tmp_path, texts, tokenizer=tokenizer)
    assert n == expected(texts)
    assert bool(notes) is bool(n)
    if n:
        assert notes == [f"in the training text too, word for word: {n:,} validation documents"]


@pytest.mark.parametrize(("batch", "tokens", "held"), [(1, 5, 8), (7, 40, 21), (64, 2**20, 2**21), (2000, 1, 2000)])
def test_batches_change_nothing(tmp_path, monkeypatch, batch, tokens, held):
    monkeypatch.setattr(duplicates, "BATCH_DOCUMENTS", batch)
    monkeypatch.setattr(duplicates, "BATCH_TOKENS", tokens)
    monkeypatch.setattr(duplicates, "HELD", held)
    monkeypatch.setattr(duplicates, "MIN_MARKS", 1)
    texts = some_texts(600, 280, seed=1)
    assert count(tmp_path, texts)[0] == expected(texts) > 20


def test_documents_that_are_only_a_line_break(tmp_path, monkeypatch):
    monkeypatch.setattr(duplicates, "BATCH_DOCUMENTS", 2)
    monkeypatch.setattr(duplicates, "HELD", 2)
    train = write_split(tmp_path, "train", ["\n", "a\n", "b"])
    val = write_split(tmp_path, "val", ["\n", "\n", "\n", "\n", "b\n", "\n"])
    assert count_copies(train, val, ByteTokenizer()) == 1


def test_nearly_the_same_is_not_the_same(tmp_path):
    texts = [f"{i:03} {'x' * 200} {i:03}" for i in range(200)]
    for i in range(4, 200, 10):  # one character differs where no sample looks
        texts[i] = texts[i - 1][:30] + "y" + texts[i - 1][31:]
    assert count(tmp_path, texts) == (0, [])
    texts[14], texts[24] = texts[13], texts[23] + "\n"
    assert count(tmp_path, texts)[0] == 2


def test_documents_named_for_validation_and_few_ones(tmp_path):
    for folder, names in (("a", "xyz"), ("b", "yw")):
        (tmp_path / folder).mkdir()
        for name in names:
            (tmp_path / folder / f"{name}.txt").write_text(f"the text {name}\n")
    made = prepare([tmp_path / "a"], tmp_path / "made", PrepareConfig(), val_paths=[tmp_path / "b"])
    assert made["val_documents_in_train"] == 1
    (tmp_path / "a" / "zz.txt").write_text("the text x\n")
    made = prepare([tmp_path / "a"], tmp_path / "few", PrepareConfig(val_fraction=0.4))
    assert made["documents"] == 4 and made["val_documents_in_train"] == 1  # the tail begins with "the text z"
    made = prepare([tmp_path / "a" / "x.txt"], tmp_path / "one", PrepareConfig())
    assert made["documents"] == 1 and made["val_documents_in_train"] == 0


def write_split(folder, name, texts):
    """A split of documents without separators."""
    (folder / f"{name}.bin").write_bytes("".join(texts).encode())
    starts = np.cumsum([0, *map(len, texts)])[:-1].astype("<u8")
    (folder / f"{name}.documents").write_bytes(starts.tobytes())
    return folder / f"{name}.bin"


def test_long_documents(tmp_path, monkeypatch):
    monkeypatch.setattr(duplicates, "BATCH_TOKENS", 1000)
    draw = random.Random(3)
    long = ["".join(draw.choices("abc", k=n)) for n in (999, 1000, 1001, 5000, 70_000)]
    changed = long[4][:40_000] + "d" + long[4][40_001:]
    train = write_split(tmp_path, "train", ["x", *long, "y"])
    val = write_split(tmp_path, "val", [*long, changed, "x" * 3000])
    assert count_copies(train, val, ByteTokenizer()) == 5


def test_memory_is_bounded(tmp_path):
    peaks = []
    for n in (150_000, 450_000):
        val = write_split(tmp_path, "val", [f"{i:x}" for i in range(n // 10)])
        train = write_split(tmp_path, "train", [f"{i:07}" for i in range(n)])
        tracemalloc.start()
        assert count_copies(train, val, ByteTokenizer()) == 0
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] - peaks[0] < 30_000 * 100  # by validation document


@pytest.mark.parametrize(("kinds", "batch"), [(3, 64), (400, 1), (400, 64), (400, 2000), (30_000, 64)])
def test_repeats_are_counted(tmp_path, monkeypatch, kinds, batch):
    monkeypatch.setattr(duplicates, "BATCH_DOCUMENTS", batch)
    texts = some_texts(1000, kinds)
    count(tmp_path, texts)
    train = [text for i, text in enumerate(texts) if i % 10 != 4]
    made = next(tmp_path.glob("made*/train.bin"))
    assert duplicates.count_repeats(made, ByteTokenizer()) == (len(train), len(train) - len(set(train)))


def test_of_many_documents_a_share_tells_of_all(tmp_path, monkeypatch):
    monkeypatch.setattr(duplicates, "REMEMBERED", 700)
    texts = [f"{number} is a number" for number in range(6000)] + ["0 is a number", "1 is a number"] * 1500
    random.Random(3).shuffle(texts)
    count(tmp_path, texts)
    texts = [text for i, text in enumerate(texts) if i % 10 != 4]
    found = duplicates.count_repeats(next(tmp_path.glob("made*/train.bin")), ByteTokenizer())
    assert found.n_documents < 3000  # or so: the two that are there again and again fall in or out together
    assert duplicates.count_repeats(next(tmp_path.glob("made*/train.bin")), ByteTokenizer(), 0.0).n_documents > 0
