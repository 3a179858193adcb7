"""The n-gram reference beside one that is written out with dictionaries."""

import math
import random
from collections import Counter, defaultdict

import numpy as np
import pytest

from nnx_cli.data import ngram
from nnx_cli.data.ngram import bits_per_byte, ngram_reference
from nnx_cli.data.tokenizers.build import build_tokenizer

STORY = b"The old cat sees a tree. The cat climbs the old tree and sees a river; the river sees the cat.\n" * 3
DICE = bytes(random.Random(5).choices(b"abc \n", k=700))
NOISE = bytes(random.Random(6).choices(range(256), k=700))
CHINESE = "小猫看见一条河，河里有小鱼。老猫也看见小鱼。\n".encode() * 5


def array(text):
    return np.frombuffer(text, np.uint8)


def plain(train, val, order=5):
    """Interpolated Witten-Bell, one byte after the other."""
    followers = defaultdict(Counter)
    for n in range(order):
        for place in range(n, len(train)):
            followers[train[place - n : place]][train[place]] += 1

    def chance(context, byte):
        shorter = chance(context[1:], byte) if context else 1 / 256
        seen = followers[context]
        total = sum(seen.values())
        return (seen[byte] + len(seen) * shorter) / (total + len(seen)) if total else shorter

    bits = [-math.log2(chance(val[max(0, place - order + 1) : place], val[place])) for place in range(len(val))]
    return sum(bits) / len(bits)


@pytest.mark.parametrize("train", [STORY, DICE, NOISE, CHINESE, b"", b"a", b"ab", b"abcd", b"abcde", b"aaaaaaaaaaaa"])
@pytest.mark.parametrize("val", [STORY[40:200], DICE[:90], NOISE[-90:], b"a", b"abc", b"abcdefg", "小鱼。".encode()])
@pytest.mark.parametrize("at_once", [2**21, 64, 1])
def test_it_is_that_of_dictionaries(train, val, at_once, monkeypatch):
    monkeypatch.setattr(ngram, "RANGE_GRAMS", at_once)
    assert bits_per_byte(array(train), array(val)) == pytest.approx(plain(train, val), rel=0, abs=1e-9)


def test_what_is_known_costs_little_and_what_is_not_at_most_a_little_more_than_8_bits():
    assert bits_per_byte(array(STORY), array(STORY)) < 0.8
    assert bits_per_byte(array(b""), array(STORY)) == 8
    assert 8 < bits_per_byte(array(b"a" * 100), array(b"xyz" * 9)) < 16
    assert bits_per_byte(array(STORY), array(b"")) is None


def test_it_is_the_same_whatever_the_tokenizer():
    text = (STORY + CHINESE).decode()
    cut = len(STORY)
    found = set()
    for tokenizer in (build_tokenizer("byte"), build_tokenizer("char", sample=iter([text[:90]]))):
        train, val = tokenizer.encode(text[:cut]), tokenizer.encode(text[cut:])
        found.add(ngram_reference(train, val, tokenizer))
    assert len(found) == 1 and found.pop() == bits_per_byte(array(STORY), array(CHINESE))


def test_long_texts_are_sampled_evenly(monkeypatch):
    monkeypatch.setattr(ngram, "TRAIN_BYTES", 6400)
    tokenizer = build_tokenizer("byte")
    text = array(b"first half " * 6400 + b"SECOND HALF" * 6400)
    both = ngram_reference(text, array(b"first SECOND half HALF"), tokenizer)
    assert both < ngram_reference(text[: len(text) // 2], array(b"first SECOND half HALF"), tokenizer)
    assert ngram_reference(text, array(b"first half " * 90), tokenizer) < 0.2
