import pytest

from nnx_cli.data.tokenizers import bpe
from nnx_cli.data.tokenizers.build import build_tokenizer, settle_auto, suited_ids
from nnx_cli.errors import MissingFeature, UsageError

RUNGS = ((20_000, 300), (40_000, 400), (60_000, 500))
LINE = "the cat and the dog and the tree, über 小猫: x_1 = f(2) + 30\n"
N_BYTES = len(LINE.encode())


def pieces(n_bytes):
    """About so many bytes of text."""
    return iter([LINE * 10] * (n_bytes // (10 * N_BYTES)))


@pytest.mark.parametrize(
    ("n_bytes", "ids"), [(0, None), (19_999, None), (20_000, 300), (39_999, 300), (40_000, 400), (10**12, 500)]
)
def test_ids_follow_the_bytes_of_text(n_bytes, ids):
    assert suited_ids(n_bytes, RUNGS) == ids
    assert suited_ids(n_bytes, ()) is None


@pytest.mark.parametrize(
    ("kind", "n_bytes", "wanted"),
    [
        ("auto", 10_000, ("byte", 256)),
        ("auto", 30_000, ("bpe", 300)),
        ("auto", 50_000, ("bpe", 400)),
        ("bpe", 10_000, ("bpe", 300)),
        ("bpe", 50_000, ("bpe", 400)),
        ("byte", 50_000, ("byte", 256)),
    ],
)
def test_the_text_decides(kind, n_bytes, wanted):
    made = build_tokenizer(kind, sample=pieces(n_bytes), vocabularies=RUNGS)
    assert made.kind == wanted[0] and made.vocab_size <= wanted[1]
    if kind != "byte":
        named = build_tokenizer(wanted[0], vocab_size=wanted[1], sample=pieces(n_bytes))
        assert made.fingerprint == named.fingerprint


def test_bytes_are_counted_and_not_characters():
    text = "小" * 8_000  # 24,000 bytes
    assert build_tokenizer("auto", sample=iter([text]), vocabularies=RUNGS).kind == "bpe"


@pytest.mark.parametrize(
    ("vocab_size", "vocabularies", "kind"),
    [(None, RUNGS, "auto"), (None, (), "byte"), (256, RUNGS, "byte"), (256, (), "byte"), (999, RUNGS, "bpe")],
)
def test_what_is_settled_before_the_text_is_read(vocab_size, vocabularies, kind):
    assert settle_auto("auto", vocab_size, vocabularies) == kind
    for named in ("byte", "char", "bpe", "gpt2", "some.json"):
        assert settle_auto(named, vocab_size, vocabularies) == named


def test_a_size_that_is_asked_for_is_what_it_says():
    made = build_tokenizer("auto", vocab_size=280, sample=pieces(1_000), vocabularies=RUNGS)
    assert (made.kind, made.vocab_size) == ("bpe", 280)
    with pytest.raises(UsageError, match="--vocab-size is 100"):
        build_tokenizer("auto", vocab_size=100, sample=pieces(1_000), vocabularies=RUNGS)


def test_without_the_extra_auto_is_bytes_and_does_not_read(monkeypatch):
    monkeypatch.setattr(bpe, "is_installed", lambda: False)

    def unread():
        raise AssertionError
        yield ""

    assert build_tokenizer("auto", sample=unread(), vocabularies=RUNGS).kind == "byte"
    with pytest.raises(MissingFeature):
        build_tokenizer("auto", vocab_size=310, sample=pieces(1_000), vocabularies=RUNGS)
