import sys
from functools import cache
from types import SimpleNamespace

import numpy as np
import pytest

from nnx_cli.config import PrepareConfig
from nnx_cli.data.prepare import prepare
from nnx_cli.data.tokenizers import bpe, gigatoken
from nnx_cli.data.tokenizers.gigatoken import PROBE, FastEncoder

TEXT = "The quick brown fox, größer als 12 Füchse, 跳过了懒狗。 It's 2026!!\n\n   don't <|endoftext|>\n" * 3000


class PanicException(BaseException):
    """What a Rust panic looks like."""


@pytest.fixture
def install(monkeypatch):
    """Puts a gigatoken in place that encodes with `encode(text)`; returns the list of its instances."""
    made = []

    def put(encode):
        class Tokenizer:
            @classmethod
            def from_tiktoken(cls, path, scheme, specials):
                assert path.read_bytes().startswith(b"IQ== 0\n") and scheme == "gpt2" and specials == {}
                made.append(cls())
                return made[-1]

            def encode(self, text):
                return encode(text)

        monkeypatch.setitem(sys.modules, "gigatoken", SimpleNamespace(Tokenizer=Tokenizer))
        monkeypatch.setattr(gigatoken, "is_installed", lambda: True)
        return made

    return put


@cache
def gpt2():
    return bpe.published("gpt2")


def right(text):
    return gpt2()._encode_exactly(text)


def wrong_where(word):
    """An encoder that is right but for texts with a word in them."""
    return lambda text: right(text)[:-1] if word in text else right(text)


def panicking(text):
    if len(text) > 10_000:
        raise PanicException("index out of bounds")
    return right(text)


def test_it_takes_over_while_it_agrees(install):
    calls = []
    install(lambda text: calls.append(len(text)) or right(text))
    tokenizer = bpe.published("gpt2")
    assert len(tokenizer.encode(TEXT)) and not calls, "only after use_fast_encoder()"
    tokenizer.use_fast_encoder()
    assert np.array_equal(tokenizer.encode(TEXT), gpt2().encode(TEXT))
    assert calls[0] == len(PROBE) and sum(calls) > len(TEXT) and tokenizer.warning is None


@pytest.mark.parametrize(
    "encode", [wrong_where("TODO"), wrong_where("The quick"), panicking], ids=["probe", "text", "panic"]
)
def test_it_is_given_up_with_a_note(install, tmp_path, encode):
    install(encode)
    (tmp_path / "a.txt").write_text(TEXT, encoding="utf-8")
    events = []
    prepare([tmp_path / "a.txt"], tmp_path / "made", PrepareConfig(tokenizer="gpt2"), on_progress=events.append)
    ids = b"".join((tmp_path / "made" / f"{split}.bin").read_bytes() for split in ("train", "val"))
    assert ids == gpt2().encode(TEXT).tobytes()
    assert any("gigatoken" in event.get("note", "") for event in events)


def test_its_memory_is_bounded(install, monkeypatch):
    made = install(right)
    in_use = iter(range(0, 10**12, 10 * 2**20))
    monkeypatch.setattr(gigatoken, "rss_bytes", lambda: next(in_use))
    encoder = FastEncoder(gpt2().ranks, "gpt2", right)
    for _ in range(12):
        encoder.encode("words")
    assert len(made) == 1 + 12 // 4, "a new one whenever 32 MiB more are in use"
    monkeypatch.setattr(gigatoken, "rss_bytes", lambda: None)
    monkeypatch.setattr(gigatoken, "BLIND_CHARS", 50)
    encoder = FastEncoder(gpt2().ranks, "gpt2", right)
    made.clear()
    for _ in range(12):
        encoder.encode("ten chars ")
    assert len(made) == 2


@pytest.mark.parametrize("kind", gigatoken.SCHEMES)
def test_the_real_one_gives_the_same_ids(kind, monkeypatch):
    pytest.importorskip("gigatoken", reason="needs the extra nnx-cli[fast]")
    from tiktoken_ext import openai_public

    monkeypatch.setattr(openai_public, "load_tiktoken_bpe", lambda *_, **__: gpt2().ranks)
    monkeypatch.setattr(bpe, "_kind", lambda *_: kind)
    pattern = bpe.GPT2_PATTERN if kind == "gpt2" else openai_public.ENCODING_CONSTRUCTORS[kind]()["pat_str"]
    tokenizer = bpe.BpeTokenizer(gpt2().ranks, pattern, {}, None)
    plain = tokenizer.encode(TEXT)
    tokenizer.use_fast_encoder()
    assert tokenizer._fast is not None and np.array_equal(tokenizer.encode(TEXT), plain) and tokenizer.warning is None
