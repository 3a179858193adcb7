import gzip
import hashlib
import io
import json
import sys
import threading
import tracemalloc
from pathlib import Path

import pytest

from nnx_cli.config import PrepareConfig
from nnx_cli.data import compression
from nnx_cli.data import prepare as module
from nnx_cli.data import token_file as tokens
from nnx_cli.data.prepare import default_folder, prepare
from nnx_cli.data.separators import Piece
from nnx_cli.data.sources import Reader
from nnx_cli.data.split import SplitWriter
from nnx_cli.data.token_folder import open_token_folder
from nnx_cli.data.tokenizers import bpe
from nnx_cli.data.tokenizers.build import build_tokenizer
from nnx_cli.errors import DataError, MissingFeature, NnxError, OutputError, UsageError
from nnx_cli.system import files

LINE = "The quick brown fox, größer als 12 Füchse, 跳过了懒狗。\n"
FILES = ["meta.json", "tokenizer.json", "train.bin", "train.documents", "val.bin", "val.documents"]
KEYS = (
    "out, tokenizer, vocab_size, train_tokens, val_tokens, text_bytes, bytes_per_token, documents, "
    "conversations, val_documents_in_train, seconds, megabytes_per_s, peak_rss_bytes, sha256, xray"
).split(", ")


@pytest.fixture
def text_file(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes((LINE * 500).encode())
    return path


def write_rows(path, n, text="row {}"):
    path.write_text("".join(json.dumps({"text": text.format(i)}) + "\n" for i in range(n)))
    return path


def texts(folder) -> tuple[str, str]:
    data = open_token_folder(folder)
    return data.tokenizer.decode(data.train), data.tokenizer.decode(data.val)


def contents(folder) -> dict:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


@pytest.mark.parametrize("kind", ["byte", "char", "bpe", "gpt2"])
def test_summary_and_files(text_file, tmp_path, kind):
    events = []
    out = tmp_path / "new" / "made"
    summary = prepare([text_file], out, PrepareConfig(tokenizer=kind), on_progress=events.append)
    assert list(summary) == KEYS
    assert sorted(path.name for path in out.iterdir()) == FILES
    data = open_token_folder(out)
    assert (summary["train_tokens"], summary["val_tokens"]) == (len(data.train), len(data.val))
    assert summary["vocab_size"] == data.vocab_size and summary["tokenizer"] == kind and summary["documents"] == 1
    assert summary["text_bytes"] == data.text_bytes == len((LINE * 500).encode())
    for split, ids in (("train", data.train), ("val", data.val)):
        assert data.meta["text_bytes"][split] == data.tokenizer.token_bytes()[ids].sum()
        assert summary["sha256"][f"{split}.bin"] == hashlib.sha256(ids.tobytes()).hexdigest()
    assert "".join(texts(out)) == LINE * 500
    assert str(tmp_path) not in (out / "meta.json").read_text()
    assert not [event for event in events if "note" in event and kind != "bpe"]


# the split


@pytest.mark.parametrize(("fraction", "n_val"), [(0.1, 50), (0.002, 1), (0.5, 250)])
def test_few_documents_lose_the_end_cut_at_a_line(text_file, tmp_path, fraction, n_val):
    prepare([text_file], tmp_path / "made", PrepareConfig(val_fraction=fraction))
    assert texts(tmp_path / "made") == (LINE * (500 - n_val), LINE * n_val)


@pytest.mark.parametrize(("kind", "vocab_size"), [("byte", None), ("char", None), ("char", 257), ("bpe", 260)])
def test_text_without_lines_is_cut_between_characters(tmp_path, kind, vocab_size):
    (tmp_path / "a.txt").write_bytes(("我你好" * 3000).encode())
    prepare([tmp_path / "a.txt"], tmp_path / "made", PrepareConfig(tokenizer=kind, vocab_size=vocab_size))
    train, val = texts(tmp_path / "made")
    assert "\ufffd" not in train + val and len(val) == pytest.approx(900, abs=3)


@pytest.mark.parametrize("n", [99, 100, 101, 1234])
def test_many_documents_are_held_out_whole_and_evenly(tmp_path, n):
    prepare([write_rows(tmp_path / "a.jsonl", n)], tmp_path / "made", PrepareConfig())
    train, val = (text.splitlines() for text in texts(tmp_path / "made"))
    if n < 100:
        assert train + val == [f"row {i}" for i in range(n)]
    else:
        held_out = [int(line.split()[1]) for line in val]
        assert held_out == list(range(4, n, 10))
        assert sorted(train + val) == sorted(f"row {i}" for i in range(n))
        assert open_token_folder(tmp_path / "made").meta["documents"] == n


def test_a_tiny_fraction_of_many_documents_still_holds_something_out(tmp_path):
    summary = prepare([write_rows(tmp_path / "a.jsonl", 150)], tmp_path / "made", PrepareConfig(val_fraction=0.001))
    assert summary["val_tokens"] > 0


def test_named_validation_text(text_file, tmp_path):
    (tmp_path / "b.txt").write_text("held out")
    (tmp_path / "c.txt").write_text("too")
    summary = prepare(
        [text_file], tmp_path / "made", PrepareConfig(), val_paths=[tmp_path / "b.txt", tmp_path / "c.txt"]
    )
    assert texts(tmp_path / "made") == (LINE * 500, "held out\ntoo")
    assert summary["documents"] == 3 and summary["text_bytes"] == len((LINE * 500).encode()) + 12


# separators


@pytest.mark.parametrize("kind", ["byte", "char"])
def test_documents_are_joined_by_one_newline(tmp_path, kind):
    for name, text in {"a": "one", "b": "two\n", "c": "", "d": "three\n\n", "e": "four" * 30}.items():
        (tmp_path / f"{name}.txt").write_text(text)
    prepare([tmp_path], tmp_path / "made", PrepareConfig(tokenizer=kind))
    assert "".join(texts(tmp_path / "made")) == "one\ntwo\nthree\n\n" + "four" * 30


def test_documents_are_joined_by_end_of_text(tmp_path):
    prepare(
        [write_rows(tmp_path / "a.jsonl", 120, "x{}\n")],
        tmp_path / "made",
        PrepareConfig(tokenizer="bpe", vocab_size=300),
    )
    data = open_token_folder(tmp_path / "made")
    eot = data.tokenizer.eot_id
    for ids in (data.train, data.val):
        assert ids[0] != eot and ids[-1] != eot
    assert (data.train == eot).sum() + (data.val == eot).sum() == 118
    assert data.text_bytes == sum(len(f"x{i}\n") for i in range(120))


def test_text_cannot_inject_end_of_text(tmp_path):
    (tmp_path / "a.txt").write_text("one<|endoftext|>two\n" * 50)
    prepare([tmp_path / "a.txt"], tmp_path / "made", PrepareConfig(tokenizer="bpe", vocab_size=300))
    data = open_token_folder(tmp_path / "made")
    assert data.tokenizer.eot_id not in data.train
    assert "".join(texts(tmp_path / "made")) == "one<|endoftext|>two\n" * 50


STORIES = [f"Story {i}: größer.\nIt ends.\n" for i in range(130)]


@pytest.mark.parametrize("kind", ["bpe", "byte", "char", "gpt2"])
def test_lines_of_end_of_text_end_documents(tmp_path, kind):
    (tmp_path / "a.txt").write_bytes("<|endoftext|>\n".join(STORIES).encode())
    events = []
    config = PrepareConfig(tokenizer=kind, vocab_size=300 if kind == "bpe" else None)
    summary = prepare([tmp_path / "a.txt"], tmp_path / "made", config, on_progress=events.append)
    assert summary["documents"] == 130
    data = open_token_folder(tmp_path / "made")
    held_out = {i for i in range(130) if i % 10 == 4}
    for split, ids in (("train", data.train), ("val", data.val)):
        wanted = [story for i, story in enumerate(STORIES) if (i in held_out) is (split == "val")]
        starts = [*data.documents[split].tolist(), len(ids)]
        found = [data.tokenizer.decode(ids[a:b]) for a, b in zip(starts, starts[1:], strict=False)]
        assert [text.removesuffix("\n") for text in found] == [text.removesuffix("\n") for text in wanted]
        if data.tokenizer.eot_id is not None:
            assert (ids == data.tokenizer.eot_id).sum() == len(wanted) - 1
    assert "documents end at 129 lines <|endoftext|>" in str(events)


def test_a_separator_of_ones_own(tmp_path):
    (tmp_path / "a.txt").write_text("\n---\n".join(STORIES), encoding="utf-8", newline="\r\n")
    write_rows(tmp_path / "b.jsonl", 5, "one {}\n---\ntwo")
    for separator in ("\\n---\\n", "\n---\n"):
        summary = prepare([tmp_path], tmp_path / repr(len(separator)), PrepareConfig(separator=separator))
        assert summary["documents"] == 140
    assert prepare([tmp_path], tmp_path / "plain", PrepareConfig())["documents"] == 6
    events = []
    prepare([tmp_path / "a.txt"], tmp_path / "none", PrepareConfig(separator="@@"), on_progress=events.append)
    assert "no '@@' in it separates documents" in str(events)


# determinism, blocks, memory


@pytest.mark.parametrize("kind", ["byte", "char", "bpe"])
def test_workers_and_blocks_change_nothing(tmp_path, monkeypatch, kind):
    path = write_rows(tmp_path / "a.jsonl", 150, LINE * 3 + "{}")
    (tmp_path / "b.txt").write_bytes((LINE * 3000).encode())
    for name, workers, size in (("one", 1, 2**20), ("three", 3, 2**20), ("small", 2, 5000)):
        monkeypatch.setattr(module, "JOB_CHARS", size)
        prepare([path, tmp_path / "b.txt"], tmp_path / name, PrepareConfig(tokenizer=kind, workers=workers))
    assert contents(tmp_path / "one") == contents(tmp_path / "three") == contents(tmp_path / "small")


def test_a_document_of_many_blocks_encodes_as_a_whole(tmp_path, monkeypatch):
    monkeypatch.setattr("nnx_cli.data.charset.BLOCK_BYTES", 1000)
    monkeypatch.setattr(module, "JOB_CHARS", 3000)
    text = (LINE + "  don't\n\n   stop   now !!\n") * 300
    (tmp_path / "a.txt").write_bytes(text.encode())
    prepare([tmp_path / "a.txt"], tmp_path / "made", PrepareConfig(tokenizer="bpe"))
    data = open_token_folder(tmp_path / "made")
    assert [*data.train, *data.val] == data.tokenizer.encode(text).tolist()


@pytest.mark.parametrize(("kind", "small", "large"), [("byte", 8, 40), ("char", 8, 40), ("bpe", 4, 16)])
def test_memory_does_not_grow_with_the_input(tmp_path, monkeypatch, kind, small, large):
    monkeypatch.setattr(bpe, "SAMPLE_CHARS", 2**19)
    monkeypatch.setattr(bpe, "SAMPLE_CHARS_PER_TOKEN", 1)
    peaks = {}
    for n_mib in (small, large):
        path = tmp_path / f"{n_mib}.txt"
        path.write_bytes((LINE * (2**20 // len(LINE.encode()))).encode() * n_mib)
        build_tokenizer(kind, sample=iter([LINE]))
        tracemalloc.start()
        prepare([path], tmp_path / str(n_mib), PrepareConfig(tokenizer=kind, workers=1, xray=False))
        peaks[n_mib] = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peaks[large] - peaks[small] < (large - small) * 2**20 / 2


def test_standard_input_is_read_once(tmp_path, monkeypatch):
    for kind in ("byte", "char", "bpe"):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO((LINE * 100).encode())))
        prepare(["-"], tmp_path / kind, PrepareConfig(tokenizer=kind))
        assert "".join(texts(tmp_path / kind)) == LINE * 100
        assert sorted(path.name for path in (tmp_path / kind).iterdir()) == FILES
        source = open_token_folder(tmp_path / kind).meta["sources"][0]
        assert source["sha256"] == hashlib.sha256((LINE * 100).encode()).hexdigest()


def test_a_file_that_changes_between_two_readings_is_refused(text_file, tmp_path, monkeypatch):
    build = module._build

    def build_and_change(*arguments):
        tokenizer = build(*arguments)
        text_file.write_bytes((LINE[::-1] * 500).encode())
        return tokenizer

    monkeypatch.setattr(module, "_build", build_and_change)
    with pytest.raises(DataError, match="changed while it was read"):
        prepare([text_file], tmp_path / "made", PrepareConfig(tokenizer="char"))
    assert not (tmp_path / "made").exists()


# notes


def test_validation_text_inside_the_training_folder(tmp_path):
    for name in "abc":
        (tmp_path / f"{name}.txt").write_text(f"{name}\n" * 50)
    events = []
    options = {"val_paths": [tmp_path / "b.txt"], "on_progress": events.append}
    prepare([tmp_path], tmp_path / "made", PrepareConfig(), **options)
    assert texts(tmp_path / "made") == ("a\n" * 50 + "c\n" * 50, "b\n" * 50)
    assert [event["note"].split(": ")[-1] for event in events if "note" in event] == ["left out of training"]
    assert default_folder([tmp_path], PrepareConfig()) != default_folder(
        [tmp_path], PrepareConfig(), [tmp_path / "b.txt"]
    )
    with pytest.raises(UsageError, match="both training and validation"):
        prepare([tmp_path / "b.txt"], tmp_path / "other", PrepareConfig(), **options)
    assert not (tmp_path / "other").exists()


def test_notes_tell_what_was_replaced_and_skipped(tmp_path):
    (tmp_path / "a.txt").write_bytes("größer\n".encode() * 50 + b"\xff\n")
    (tmp_path / "b.jsonl").write_text('{"text": "x"}\nbroken\n')
    events = []
    prepare([tmp_path], tmp_path / "made", PrepareConfig(), on_progress=events.append)
    notes = [event["note"] for event in events if "note" in event]
    assert len(notes) == 2 and "1 invalid byte" in notes[0] and "1 row skipped, at" in notes[1]
    meta = open_token_folder(tmp_path / "made").meta
    assert (meta["replaced_bytes"], meta["skipped_rows"]) == (1, 1)


def test_progress_counts_the_bytes_of_the_files(tmp_path):
    (tmp_path / "a.txt").write_bytes((LINE * 40_000).encode())
    events = []
    prepare([tmp_path / "a.txt"], tmp_path / "made", PrepareConfig(tokenizer="char"), on_progress=events.append)
    phases = list(dict.fromkeys(event["phase"] for event in events))
    assert phases == ["train", "encode", "xray"]
    size = (tmp_path / "a.txt").stat().st_size
    reading, looking = ([e for e in events if (e["phase"] == "xray") == seen] for seen in (False, True))
    assert all(0 < event["bytes"] <= event["total_bytes"] == size for event in reading)
    assert all(0 < event["share"] <= 1 for event in looking) and looking[-1]["share"] == 1


# refusals


@pytest.mark.parametrize("content", [b"", b" \n\t\r\n", b"\xef\xbb\xbf", b"\x00" * 5000])
@pytest.mark.parametrize("kind", ["byte", "char", "bpe"])
def test_nothing_to_read_leaves_nothing_behind(tmp_path, content, kind):
    (tmp_path / "a.txt").write_bytes(content)
    with pytest.raises(DataError) as error:
        prepare([tmp_path / "a.txt"], tmp_path / "x" / "y" / "made", PrepareConfig(tokenizer=kind))
    assert error.value.exit_code == 3 and "a.txt" in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]


def test_one_byte_is_too_short(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"a")
    with pytest.raises(DataError, match="too short"):
        prepare([tmp_path / "a.txt"], tmp_path / "made", PrepareConfig())
    (tmp_path / "a.txt").write_bytes(b"ab")
    prepare([tmp_path / "a.txt"], tmp_path / "made", PrepareConfig())
    assert texts(tmp_path / "made") == ("a", "b")


def test_rows_without_the_field_say_so(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"body": "x"}\n' * 5)
    with pytest.raises(DataError, match="--text-key"):
        prepare([tmp_path / "a.jsonl"], tmp_path / "made", PrepareConfig())


def test_existing_output_is_refused_first(tmp_path, text_file):
    (tmp_path / "made").mkdir()
    for path in (text_file, tmp_path / "nothing"):
        with pytest.raises(OutputError) as error:
            prepare([path], tmp_path / "made", PrepareConfig())
        assert error.value.exit_code == 8


def test_output_below_a_file_is_refused(text_file):
    with pytest.raises(OutputError):
        prepare([text_file], text_file / "made", PrepareConfig())


FAILURES = {
    "write": (tokens.TokenFile, "write", OSError(28, "No space left on device"), OutputError),
    "close": (tokens.TokenFile, "close", OSError(28, "No space left on device"), OutputError),
    "meta": (files, "write_synced", OSError(13, "Permission denied"), OutputError),
    "read": (compression.Stream, "read", DataError("damaged"), DataError),
    "interrupt": (tokens.TokenFile, "write", KeyboardInterrupt(), KeyboardInterrupt),
}


@pytest.mark.parametrize("at", FAILURES)
def test_failures_leave_nothing_behind(text_file, tmp_path, monkeypatch, at):
    owner, name, failure, expected = FAILURES[at]

    def fail(*_, **__):
        raise failure

    monkeypatch.setattr(owner, name, fail)
    with pytest.raises(expected):
        prepare([text_file], tmp_path / "new" / "made", PrepareConfig())
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]


@pytest.mark.parametrize("failure", [KeyboardInterrupt(), DataError("damaged"), OSError(28, "No space left on device")])
def test_what_waits_for_a_thread_is_not_begun_after_a_failure(text_file, tmp_path, monkeypatch, failure):
    begun, release = [], threading.Event()

    def encode(tokenizer, job):
        begun.append(job)
        release.wait(10)
        return []

    def fail_at_last(*_):
        for number in range(6):
            yield Piece("word ", True)
            if number == 5:
                threading.Timer(0.2, release.set).start()
                raise failure

    monkeypatch.setattr(module, "JOB_PIECES", 1)
    monkeypatch.setattr(module, "_encode_job", encode)
    monkeypatch.setattr(Reader, "pieces", fail_at_last)
    with pytest.raises(type(failure) if not isinstance(failure, OSError) else OutputError):
        prepare([text_file], tmp_path / "made", PrepareConfig(workers=4))
    assert len(begun) == 4 and not (tmp_path / "made").exists()


def test_every_kind_of_refusal_has_one_line(tmp_path, text_file, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(b"text" * 100)[:-4])
    cases = [
        ("a.parquet", {}, MissingFeature),
        ("a.txt.gz", {}, DataError),
        ("none*", {}, DataError),
        ("a.txt", {"tokenizer": "word"}, UsageError),
        ("a.txt", {"tokenizer": "bpe", "vocab_size": 256}, UsageError),
        ("a.txt", {"tokenizer": "byte", "vocab_size": 257}, UsageError),
    ]
    for name, options, expected in cases:
        with pytest.raises(NnxError) as error:
            prepare([tmp_path / name], tmp_path / "made", PrepareConfig(**options))
        assert type(error.value) is expected and "\n" not in str(error.value)
        assert not (tmp_path / "made").exists()


# names and the built-in corpus


def test_default_folder_follows_content_and_settings(text_file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = default_folder([text_file], PrepareConfig())
    assert folder.parent.name == "data" and folder.name.startswith("a-") and len(folder.name) == 10
    (tmp_path / "b.txt").write_bytes(text_file.read_bytes())
    assert default_folder(["b.txt"], PrepareConfig()).name[2:] == folder.name[2:]
    others = [
        PrepareConfig(tokenizer="char"),
        PrepareConfig(tokenizer="bpe", vocab_size=300),
        PrepareConfig(val_fraction=0.2),
        PrepareConfig(encoding="cp1251"),
        PrepareConfig(separator="---"),
    ]
    assert len({folder.name, *(default_folder([text_file], config).name for config in others)}) == 6
    assert default_folder([text_file], PrepareConfig(workers=3)) == folder
    text_file.write_bytes(b"changed")
    assert default_folder([text_file], PrepareConfig()) != folder
    assert default_folder([], PrepareConfig()).name.startswith("python-docs-")
    with pytest.raises(UsageError):
        default_folder(["-"], PrepareConfig())


RUNGS = ((20_000, 300), (40_000, 400))


def test_a_text_that_is_short_for_certain_is_bytes_whoever_asks(tmp_path, monkeypatch):
    """So it is not read to choose, and all share one folder: with and without `auto`, whatever the model's size."""
    monkeypatch.chdir(tmp_path)
    Path("short.txt").write_text("short line\n" * 500)  # 5,500 bytes: the first rung is out of reach
    Path("long.txt").write_text("a long text\n" * 2000)
    Path("short.txt.gz").write_bytes(gzip.compress(Path("short.txt").read_bytes()))
    auto, byte = PrepareConfig(), PrepareConfig(tokenizer="byte")
    assert default_folder(["short.txt"], auto, None, RUNGS) == default_folder(["short.txt"], byte)
    assert default_folder(["short.txt.gz"], auto, None, RUNGS) != default_folder(["short.txt.gz"], byte)
    assert default_folder(["long.txt"], auto, None, RUNGS) != default_folder(["long.txt"], byte)
    assert default_folder(["long.txt"], auto, None, RUNGS) != default_folder(["long.txt"], auto, None, RUNGS[:1])
    for name, kind in (("short.txt", "byte"), ("short.txt.gz", "byte"), ("long.txt", "bpe")):
        events = []
        made = prepare([name], tmp_path / f"{name}-made", auto, None, events.append, RUNGS)
        assert made["tokenizer"] == kind
        assert ("suit" in str([event for event in events if "note" in event])) == (kind == "bpe")


def test_default_folder_has_a_plain_name(tmp_path):
    path = tmp_path / "what is\x1b[2J this.tar.txt.gz"
    path.write_bytes(b"x")
    assert default_folder([path], PrepareConfig()).name.startswith("what-is--2J-this.tar-")


def test_builtin(tmp_path):
    summary = prepare([], tmp_path / "made", PrepareConfig())
    assert summary["documents"] == 1 and summary["text_bytes"] > 300_000
    assert open_token_folder(tmp_path / "made").meta["sources"][0]["name"] == "python-docs"


def test_a_preparation_that_fails_leaves_no_file_open(tmp_path, monkeypatch):
    writers = []

    class Remembered(SplitWriter):
        def __init__(self, *arguments, **options):
            super().__init__(*arguments, **options)
            writers.append(self)

    monkeypatch.setattr(module, "SplitWriter", Remembered)
    (tmp_path / "bad.txt").write_bytes(b"some text\n" * 300_000 + b"\xff\xfe\xff\n")  # behind the first block
    with pytest.raises(DataError):
        prepare([tmp_path / "bad.txt"], tmp_path / "out", PrepareConfig(errors="strict", workers=1))
    [writer] = writers
    assert writer.train._file.closed and writer.val._file.closed
    assert not (tmp_path / "out").exists()
