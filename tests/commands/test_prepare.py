import json

import pytest

from nnx_cli.commands import prepare as prepare_command
from nnx_cli.data.token_folder import open_token_folder
from nnx_cli.data.tokenizers import bpe
from nnx_cli.planning.recipe import table

KEYS = [
    "out",
    "tokenizer",
    "vocab_size",
    "train_tokens",
    "val_tokens",
    "text_bytes",
    "bytes_per_token",
    "documents",
    "conversations",
    "val_documents_in_train",
    "seconds",
    "megabytes_per_s",
    "peak_rss_bytes",
    "sha256",
    "xray",
]


def test_json_has_the_promised_keys(nnx, text_file, text, workspace):
    result = nnx("prepare", text_file, "--out", "data/words", "--json")
    assert result.exit_code == 0, result.stderr
    product = json.loads(result.stdout)
    assert list(product) == KEYS
    assert product["out"].replace("\\", "/") == "data/words" and product["tokenizer"] == "byte"
    assert product["train_tokens"] + product["val_tokens"] == product["text_bytes"] == len(text.encode())
    folder = open_token_folder(workspace / "data" / "words")
    assert bytes(folder.train) + bytes(folder.val) == text.encode()
    assert product["sha256"].keys() == {"train.bin", "train.documents", "val.bin", "val.documents"}


def test_words_for_people(nnx, text_file):
    result = nnx("prepare", "--filepath", text_file)
    assert result.exit_code == 0
    assert "tokens to train on" in result.stdout and "next: nnx train --data data" in result.stdout
    assert "of text, 1 document, " in result.stdout


@pytest.mark.parametrize("size", ["nano", "tiny", "xl"])
def test_the_xray_says_what_a_large_size_needs(size):
    xray = dict.fromkeys(("duplicate_share", "overlap_share", "compared", "n_compared", "odd_characters"))
    xray |= {"documents": {"train": 1, "val": 1}, "odd_characters_named": {}, "vocabulary_used": 1.0}
    xray |= {"ngram_bits_per_byte": None, "suggested_size": size}
    name, value, remark = prepare_command._xray_rows(xray, 256)[-1]
    assert (name, value) == ("size", size) and ("given a GPU and time" in remark) is (size != "nano")


@pytest.mark.parametrize("phase", ["encode", "xray"])
@pytest.mark.parametrize("command", ["prepare", "train"])
def test_ctrl_c_says_that_nothing_was_kept(nnx, text_file, workspace, monkeypatch, command, phase):
    def stop(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(f"nnx_cli.data.prepare.{'_encode' if phase == 'encode' else 'xray'}", stop)
    before = sorted(workspace.rglob("*"))
    result = nnx(command, "--filepath", text_file)
    assert result.exit_code == 130 and sorted(workspace.rglob("*")) == before
    assert "nnx: stopped; nothing was kept\n     the same command starts over\n" in result.stderr


def test_it_ends_with_an_xray(nnx, text_file, workspace):
    result = nnx("prepare", text_file, "--out", "seen", "--json")
    found = json.loads(result.stdout)["xray"]
    promised = {"duplicate_share", "overlap_share", "odd_characters", "vocabulary_used", "ngram_bits_per_byte"}
    assert promised | {"suggested_size"} <= set(found) and found["suggested_size"] == "nano"
    result = nnx("prepare", text_file, "--out", "again")
    product, _, seen = result.stdout.partition("next: nnx train --data again\n")
    assert "tokens to train on" in product and "X-ray of the training text (all " in seen
    for name in ("documents", "duplicates", "overlap", "odd characters", "vocabulary used", "5-gram", "size"):
        assert f"\n{name} " in seen, name
    assert f" {found['ngram_bits_per_byte']:.2f} " in seen
    assert seen[seen.index("\nas tokens  ") :].count("\n") == 6 and "·" in seen and "\x1b" not in result.stdout
    assert "X-ray" not in nnx("prepare", text_file, "--out", "quick", "--no-xray").stdout
    assert json.loads(nnx("prepare", text_file, "--out", "left", "--no-xray", "--json").stdout)["xray"] is None


def test_hostile_text_does_nothing_in_the_xray(nnx, workspace):
    (workspace / "bad.txt").write_text("\x1b[2J\x1b]0;title\x07 \u202egnorw [bold]x[/bold]\n" * 50, encoding="utf-8")
    for kind in ("byte", "char"):
        seen = nnx("prepare", "bad.txt", "--out", kind, "--tokenizer", kind).stdout.partition("X-ray")[2]
        assert "odd characters" in seen and "U+001B" in seen and not set("\x1b\x07\u202e") & set(seen)


def test_paths_options_and_standard_input(nnx, text_file, text, workspace):
    (workspace / "val.txt").write_text("held out\n" * 9)
    result = nnx(
        "prepare",
        text_file,
        "-",
        "--val",
        "val.txt",
        "--out",
        "both",
        "--tokenizer",
        "char",
        "--json",
        input=b"from outside\n",
    )
    assert result.exit_code == 0, result.stderr
    folder = open_token_folder("both")
    assert folder.tokenizer.decode(folder.train).rstrip() == (text + "from outside\n").rstrip()
    assert folder.tokenizer.decode(folder.val) == "held out\n" * 9


def test_documents_in_one_text(nnx, workspace):
    (workspace / "stories.txt").write_text("One.\n<|endoftext|>\nTwo.\n<|endoftext|>\n\nThree <|endoftext|> of it.\n")
    result = nnx("prepare", "stories.txt", "--tokenizer", "gpt2", "--out", "marked", "--json")
    assert json.loads(result.stdout)["documents"] == 3, result.stderr
    data = open_token_folder("marked")
    ids = [*data.train, *data.val]
    assert ids.count(data.tokenizer.eot_id) == 2 and "Three <|endoftext|> of" in data.tokenizer.decode(ids)
    result = nnx("prepare", "stories.txt", "--out", "said")
    assert "documents end at 2 lines <|endoftext|>; --separator TEXT" in result.stderr
    assert "<|endoftext|> beside other words stays text, 1 time; --separator '<|endoftext|>' lets it" in result.stderr
    result = nnx("prepare", "stories.txt", "--separator", "<|endoftext|>", "--out", "all", "--json")
    assert json.loads(result.stdout)["documents"] == 4
    result = nnx("prepare", "stories.txt", "--separator", r".\n", "--out", "lines", "--json")
    assert json.loads(result.stdout)["documents"] == 3


def test_the_encoding_is_said_and_may_be_chosen(nnx, workspace):
    text = "Жила-была кошка, и жила она у реки.\n" * 50
    (workspace / "ru.txt").write_bytes(text.encode("koi8-r"))
    result = nnx("prepare", "ru.txt", "--out", "guessed")
    assert result.exit_code == 0 and "ru.txt: read as KOI8-R (confidence 9" in result.stderr
    assert "--encoding NAME chooses another" in result.stderr
    result = nnx("prepare", "ru.txt", "--encoding", "KOI8-R", "--errors", "strict", "--out", "named")
    assert result.exit_code == 0 and "read as" not in result.stderr
    for name in ("guessed", "named"):
        folder = open_token_folder(name)
        assert folder.tokenizer.decode(folder.train) + folder.tokenizer.decode(folder.val) == text


@pytest.fixture
def short_rungs(monkeypatch):
    """Byte pairs for texts that a test can write."""
    monkeypatch.setattr(table, "BPE_FROM_BYTES", 5_000)
    monkeypatch.setattr(table, "IDS_BY_BYTES", ((0, 300), (100_000, 400)))


def test_auto_takes_what_suits_the_text(nnx, text_file, workspace, short_rungs):
    def tokens(*words, **given):
        product = json.loads(nnx("prepare", *words, "--json", **given).stdout)
        return product["tokenizer"], product["vocab_size"]

    (workspace / "short.txt").write_text("good text\n" * 99)
    (workspace / "long.txt").write_text(text_file.read_text(encoding="utf-8") * 14, encoding="utf-8")
    assert tokens("short.txt") == ("byte", 256)
    assert tokens(text_file) == ("bpe", 300)
    kind, ids = tokens("long.txt")
    assert kind == "bpe" and 300 < ids <= 400
    assert tokens("long.txt", "--tokenizer", "byte") == ("byte", 256)
    assert tokens("-", "--out", "data/in", input=text_file.read_bytes()) == ("bpe", 300)
    assert "--tokenizer auto" in nnx("prepare", text_file, "--out", "data/again").stderr
    assert "--tokenizer auto" not in nnx("prepare", "short.txt", "--out", "data/short").stderr


def test_without_the_extra_one_line_says_what_would_be_better(nnx, text_file, monkeypatch, short_rungs):
    monkeypatch.setattr(bpe, "is_installed", lambda: False)
    result = nnx("prepare", text_file, "--out", "data/words")
    assert "(byte, vocabulary 256" in result.stdout
    assert len([line for line in result.stderr.splitlines() if "nnx-cli[bpe]" in line]) == 1
    assert "nnx-cli" not in nnx("prepare", text_file, "--out", "data/bytes", "--tokenizer", "byte").stderr
    monkeypatch.undo()
    assert "nnx-cli" not in nnx("prepare", text_file, "--out", "data/short").stderr


@pytest.mark.parametrize(
    ("code", "message", "words"),
    [
        (2, "nothing to prepare", []),
        (3, "nowhere.txt", ["nowhere.txt"]),
        (3, "empty.txt", ["empty.txt"]),
        (3, "binary.txt", ["binary.txt"]),
        (3, "nothing", ["nothing"]),
        (3, "broken.txt", ["broken.txt", "--errors", "strict"]),
        (3, "too short", ["one.txt"]),
        (2, "--val-fraction is 0.9", ["good.txt", "--val-fraction", 0.9]),
        (2, "--val-fraction is nan", ["good.txt", "--val-fraction", "nan"]),
        (2, "--errors has no choice 'ignore'", ["good.txt", "--errors", "ignore"]),
        (2, "--tokenizer is 'word'", ["good.txt", "--tokenizer", "word"]),
        (2, "--vocab-size", ["good.txt", "--tokenizer", "char", "--vocab-size", 3]),
        (2, "is no amount of memory", ["good.txt", "--max-memory", "much"]),
        (2, "--workers is 0", ["good.txt", "--workers", 0]),
        (2, "--tokenizer", ["good.txt", "--tokeniser", "byte"]),
        (2, "--encoding 'gbkk' is no encoding of text; did you mean gbk?", ["good.txt", "--encoding", "gbkk"]),
        (2, "--encoding 'hex' is no encoding of text", ["good.txt", "--encoding", "hex"]),
        (2, "--separator is empty", ["good.txt", "--separator", ""]),
        (3, "its encoding cannot be told: at best", ["ebcdic.txt"]),
        (3, "it reads like cp1251 (confidence 9", ["cp1251.txt", "--errors", "strict"]),
        (3, "is not ASCII", ["cp1251.txt", "--errors", "strict", "--encoding", "ascii"]),
        (8, "exists already", ["good.txt", "--out", "nothing"]),
        (8, "good.txt", ["good.txt", "--out", "good.txt/tokens"]),
        (2, "standard input", ["-"]),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, list) else "",
)
def test_what_it_refuses(refused, workspace, code, message, words):
    (workspace / "good.txt").write_text("good text\n" * 99)
    (workspace / "empty.txt").write_text("")
    (workspace / "one.txt").write_text("x")
    (workspace / "binary.txt").write_bytes(b"\x7fELF\x00\x01" * 99)
    (workspace / "broken.txt").write_bytes(
        "good 小猫\n".encode() * 99 + b"\xe5\xb0 bad\n" + "good 小猫\n".encode() * 99
    )
    (workspace / "ebcdic.txt").write_bytes(("Der alte Fluß.\n" * 99).encode("cp500"))
    (workspace / "cp1251.txt").write_bytes(("Жила-была кошка.\n" * 99).encode("cp1251"))
    (workspace / "nothing").mkdir()
    refused(code, message, "prepare", *words)
