"""The X-ray of a text: known texts, and what it finds in them."""

import json
import random
import tracemalloc

import numpy as np
import pytest

from nnx_cli.config import PrepareConfig
from nnx_cli.data import duplicates, sample, xray
from nnx_cli.data.prepare import prepare
from nnx_cli.data.token_folder import open_token_folder
from nnx_cli.data.tokenizers.build import build_tokenizer

WORDS = ["the", "cat", "sees", "a", "river", "小猫", "größer", "tree", "12", "and", "climbs", "old"]


def sentences(n, seed=0):
    draw = random.Random(seed)
    return [f"{number}: " + " ".join(draw.choices(WORDS, k=14)) + "." for number in range(n)]


@pytest.fixture
def found(tmp_path):
    """What the X-ray of documents, or of one text, says."""

    def prepared(text, **options):
        name = f"made{len(list(tmp_path.iterdir()))}"
        if isinstance(text, list):
            path = tmp_path / f"{name}.jsonl"
            path.write_text("".join(json.dumps({"text": row}) + "\n" for row in text))
        else:
            path = tmp_path / f"{name}.txt"
            path.write_text(text, encoding="utf-8", newline="")
        product = prepare([path], tmp_path / name, PrepareConfig(**options))
        folder = open_token_folder(tmp_path / name)
        assert folder.meta["xray"] | {"first_lines": product["xray"]["first_lines"]} == product["xray"]
        return product["xray"], folder

    return prepared


@pytest.mark.parametrize("tokenizer", ["byte", "char", "bpe"])
def test_documents_that_are_there_twice(found, tokenizer):
    texts = sentences(300)
    clean, _ = found(texts, tokenizer=tokenizer)
    assert (clean["duplicate_share"], clean["overlap_share"], clean["compared"]) == (0, 0, "documents")
    assert clean["documents"] == {"train": 270, "val": 30} and clean["n_compared"] == 270
    mixed, folder = found(texts + texts[:100] * 2, tokenizer=tokenizer)
    held_out = set(range(4, 500, 10))
    train = [text for place, text in enumerate(texts + texts[:100] * 2) if place not in held_out]
    val = [text for place, text in enumerate(texts + texts[:100] * 2) if place in held_out]
    assert mixed["duplicate_share"] == pytest.approx(1 - len(set(train)) / len(train))
    assert mixed["overlap_share"] == pytest.approx(sum(text in set(train) for text in val) / len(val))
    assert mixed["overlap_share"] == folder.meta["val_documents_in_train"] / len(folder.documents["val"])


def test_lines_are_compared_where_there_are_few_documents(found):
    lines = sentences(400)
    once, _ = found("\n".join(lines))
    assert (once["duplicate_share"], once["overlap_share"], once["compared"]) == (0, 0, "lines")
    again, _ = found("\n".join(lines * 3))
    assert again["duplicate_share"] == pytest.approx(0.63, abs=0.02) and again["overlap_share"] == 1
    shown, _ = found("yes\nno\n" * 900)
    assert shown["compared"] is shown["duplicate_share"] is shown["overlap_share"] is None


def test_a_text_of_one_line(found):
    only, _ = found("the cat sees a river " * 300)
    assert only["documents"] == {"train": 1, "val": 1} and only["ngram_bits_per_byte"] < 0.5
    assert len(only["first_lines"]) == 1 and len(only["first_lines"][0]) == 32
    assert only["compared"] is only["duplicate_share"] is None


def test_odd_characters_are_counted_and_named(found):
    odd = "ab\x07 \ufeffc\ue000 d\u200b\ufffd \U0010ffff\n"
    clean, _ = found("tabs\tand\r\nÜbergröße 小猫 👩‍🚀 naïve\u00a0x\n" * 99)
    assert clean["odd_characters"] == 0 and clean["odd_characters_named"] == {}
    dirty, _ = found((odd + "plain words in a line\n" * 9) * 40, val_fraction=0.5)
    assert dirty["odd_characters"] == 6 * 20 and len(dirty["odd_characters_named"]) == 5
    assert set(dirty["odd_characters_named"].values()) == {20}


def test_no_character_is_odd_where_a_sample_cuts_it(found, monkeypatch):
    monkeypatch.setattr(xray, "BLOCK_BYTES", 100)
    monkeypatch.setattr(xray, "TRAIN_BYTES", 1000)
    seen, _ = found("小猫看见一条河。\n" * 3000)
    assert seen["odd_characters"] == 0 and 900 < seen["sampled_bytes"] <= 1000


def test_the_vocabulary_and_the_first_lines(found):
    text = "ab\n\n\nb a\n" + "abba\n" * 100
    seen, folder = found(text, tokenizer="char")
    assert seen["vocabulary_used"] == pytest.approx(4 / folder.vocab_size)
    assert seen["first_lines"] == [["a", "b"], ["b", " ", "a"]] + [["a", "b", "b", "a"]] * 3
    seen, _ = found("小\n" * 100)
    assert seen["first_lines"][0] == ["\\xe5", "\\xb0", "\\x8f"]


def test_it_can_be_left_out(tmp_path):
    (tmp_path / "a.txt").write_text("\n".join(sentences(200)))
    product = prepare([tmp_path / "a.txt"], tmp_path / "made", PrepareConfig(xray=False))
    assert product["xray"] is None and "xray" not in open_token_folder(tmp_path / "made").meta


def test_what_it_has_no_time_for_is_left_out(found, monkeypatch):
    monkeypatch.setattr(xray, "LEAST_SECONDS", -1)
    late, _ = found("\n".join(sentences(300)))
    assert late["duplicate_share"] is late["overlap_share"] is late["odd_characters"] is None
    monkeypatch.setattr(duplicates, "BATCH_DOCUMENTS", 50)
    late, _ = found(sentences(200) * 2)
    assert late["n_compared"] == 50 and late["duplicate_share"] == 0  # of the first ones


def test_long_ids_are_spread_evenly():
    ids = np.arange(10_000)
    for most in (0, 1, 63, 64, 65, 4999, 9999):
        part = sample.spread(ids, most)
        assert len(part) <= most and len(part) > most - 64 and (np.diff(part) > 0).all()
        if most >= 64:
            assert part[0] == 0 and part[-1] == 9999
    assert sample.spread(ids, 10_000).tolist() == sample.spread(ids, 10**9).tolist() == ids.tolist()


def test_the_sample_has_as_many_bytes_whatever_a_token_has():
    text = "小猫看见一条河。" * 5000
    for tokenizer in (build_tokenizer("byte"), build_tokenizer("char", sample=iter([text]))):
        part = sample.spread_text(tokenizer.encode(text), tokenizer, 20_000)
        assert 19_000 < len(part) <= 20_000


def test_ids_are_counted_a_block_at_a_time(monkeypatch):
    monkeypatch.setattr(sample, "BLOCK_TOKENS", 100)
    ids = np.random.default_rng(0).integers(0, 50, 999).astype(np.uint8)
    assert sample.histogram(ids, 60).tolist() == np.bincount(ids, minlength=60).tolist()


@pytest.mark.parametrize("rows", [False, True])
def test_memory_does_not_grow_with_the_text(tmp_path, monkeypatch, rows):
    monkeypatch.setattr(xray, "TRAIN_BYTES", 2**18)
    monkeypatch.setattr(xray, "VAL_BYTES", 2**14)
    monkeypatch.setattr(duplicates, "REMEMBERED", 1000)
    monkeypatch.setattr(duplicates, "BATCH_TOKENS", 2**15)
    lines, peaks = sentences(3000), []
    for times in (4, 24):
        path = tmp_path / ("a.jsonl" if rows else "a.txt")
        path.write_text("".join(json.dumps({"text": line}) + "\n" if rows else line + "\n" for line in lines * times))
        prepare([path], tmp_path / str(times), PrepareConfig(workers=1, xray=False))
        folder = open_token_folder(tmp_path / str(times))
        tracemalloc.start()
        found = xray.xray(folder.path, folder.tokenizer, folder.meta, 0.0)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert found["duplicate_share"] > 0.7 if rows else found["sampled_bytes"] < 2**18 + 1
    assert peaks[1] < 1.2 * peaks[0] + 2**18
