"""Garbage in: whatever the bytes and the words, no traceback, no foreign exit code, no file left behind."""

from __future__ import annotations

import bz2
import codecs
import gzip
import io
import json
import lzma
import os
import random
import shutil
import signal
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from hypothesis.configuration import storage_directory

from nnx_cli.commands._config_file import read_toml
from nnx_cli.config import TrainConfig, coerce, own_fields, parse_bytes, parse_duration
from nnx_cli.data.charset import TextReader
from nnx_cli.data.compression import Stream
from nnx_cli.data.formats import format_of
from nnx_cli.data.sources import Reader, Report, Source
from nnx_cli.data.token_folder import open_token_folder
from nnx_cli.data.tokenizers import hf_json as tokenizer_json
from nnx_cli.data.tokenizers.build import build_tokenizer
from nnx_cli.data.tokenizers.hf_json import load_tokenizer
from nnx_cli.errors import CheckpointError, DataError, MissingFeature, UsageError
from nnx_cli.runs.checkpoint import load_checkpoint
from nnx_cli.runs.logs import logged_step
from nnx_cli.runs.manifest import read_verified_config
from nnx_cli.runs.run import read_status
from nnx_cli.runs.tensors import read_tensors
from nnx_cli.system.files import read_json, sha256_file, to_json
from nnx_cli.system.text import well_formed
from tests.reliability import Result, damage
from tests.reliability.scene import (
    HABITS,
    SECONDS,
    SHAPE,
    Outcome,
    Tally,
    check,
    check_refusal,
    fresh,
    listing,
    nnx,
    remove,
    scene,
    watched,
)

ROOT = Path(__file__).parents[2]
RUN, BYTE, CHAR = "weights/run", "data/byte", "data/char"
EXAMPLES = 20, 5000  # of every parser: in pytest, in the long version
DEEP_JSON = b"[" * 20_000

pytestmark = pytest.mark.skipif(os.name != "posix", reason="names that other systems cannot have")

json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=12),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
texts = st.text(st.characters(codec=None), max_size=200)  # lone surrogates too
blobs = st.binary(max_size=400) | texts.map(lambda text: text.encode("utf-8", "surrogatepass"))


def near(content: bytes) -> st.SearchStrategy[bytes]:
    """Bytes that look much like `content`: a few places changed, cut, doubled."""

    def change(seeds: list[int]) -> bytes:
        data = content
        for seed in seeds:
            draw = random.Random(seed)
            kind = draw.choice(("flip", "truncate", "extend", "zeros", "ones", "move", "double", "burst"))
            data = damage.change_bytes(kind, data, draw)
        return data

    return st.lists(st.integers(0, 2**32), min_size=1, max_size=3).map(change)


def near_json(value: Any) -> st.SearchStrategy[bytes]:
    """A JSON value with a few of its parts replaced by any others."""

    def change(made: tuple[int, Any, Any]) -> bytes:
        seed, first, second = made
        copy, draw = json.loads(json.dumps(value)), random.Random(seed)
        for new in (first, second):
            places = list(damage.walk(copy))
            if places:
                holder, key = draw.choice(places)
                holder[key] = new
        return json.dumps(copy).encode()

    return st.tuples(st.integers(0, 2**32), json_values, json_values).map(change)


# parsers: a strategy of input, and what is done with it; another error than those named is a bug


def store(name: str, data: bytes) -> Path:
    path = Path(name)
    path.write_bytes(data)
    return path


def read_text(data: bytes, strict: bool) -> None:
    reader = TextReader(Stream(io.BytesIO(data), "input"), strict=strict)
    for piece in reader:
        piece.encode()  # what is read can be written
    assert reader.n_replaced >= 0


def read_rows(name: str, data: bytes, strict: bool, key: str = "text") -> None:
    report = Report()
    for piece in Reader(key, strict).pieces([Source(name, content=data)], report):
        piece.text.encode()
    assert report.n_skipped_rows >= 0


def parse_toml(data: bytes) -> None:
    fields = own_fields(TrainConfig)
    values = coerce(fields, read_toml(store("x.toml", data)), "x.toml")
    TrainConfig(**values)


def parse_length(text: str) -> None:
    seconds = parse_duration(text)
    assert 0 < seconds < 1e9


def parse_memory(text: str) -> None:
    assert 0 <= parse_bytes(text) < 2**60


def read_tokenizer(data: bytes) -> None:
    found = load_tokenizer(store("tokenizer.json", data))
    text = "naïve 小猫 <x>\n 12"
    assert found.decode(found.encode(text)) == text
    assert (
        tokenizer_json.from_json(json.loads(json.dumps(tokenizer_json.to_json(found)))).fingerprint == found.fingerprint
    )


def tokenizer_of(value: Any) -> None:
    read_tokenizer(json.dumps(value).encode())


def open_tokens(data: bytes) -> None:
    store(f"{BYTE}/meta.json", data)
    open_token_folder(BYTE)


def open_foreign_tokens(data: bytes) -> None:
    """A nanoGPT folder: two files and nothing else."""
    Path("nano").mkdir(exist_ok=True)
    store("nano/train.bin", data), store("nano/val.bin", data[::-1])
    open_token_folder("nano")


def read_config(data: bytes) -> None:
    path = store(f"{RUN}/config.json", data)
    manifest = {"format": 1, "files": {"config.json": sha256_file(path)}}
    store(f"{RUN}/manifest.json", to_json(manifest))
    read_verified_config(Path(RUN))


def read_state(data: bytes) -> None:
    folder = next(Path(RUN, "checkpoints").glob("step-*12"))
    store(str(folder / "state.json"), data)
    damage.sign(folder)
    load_checkpoint(folder.parent, 12)


def read_manifest(data: bytes) -> None:
    store(str(next(Path(RUN, "checkpoints").glob("step-*12")) / "manifest.json"), data)
    load_checkpoint(Path(RUN, "checkpoints"), 12)


def write_json(value: Any) -> None:
    """What can be written can be read again, whatever it is."""
    try:
        data = to_json({"x": value})
    except ValueError:  # not a number
        return
    wanted = json.loads(well_formed(json.dumps({"x": value}, ensure_ascii=False)))
    assert read_json(store("x.json", data)) == wanted


def tensors(data: bytes) -> None:
    path = store("x.safetensors", data)
    read_tensors(path, sha256_file(path))


def parsers() -> Iterator[tuple[str, st.SearchStrategy, Callable[[Any], None], tuple[type[Exception], ...]]]:
    """(name, input, what reads it, the errors it may raise), in the current scene."""
    data, damaged = (DataError, MissingFeature), (CheckpointError,)
    prose = "Übergröße, naïve 小猫 🙂\n".encode() * 5
    for strict in (False, True):
        plain = blobs | near(prose) | near(prose.decode().encode("utf-16")) | near(codecs.BOM_UTF32_BE + prose)
        yield f"text, strict {strict}", plain, lambda raw, s=strict: read_text(raw, s), data
    row = {"text": "some text", "n": 1}
    lines = (json.dumps(row) + "\n").encode() * 3
    table = b'id,text\n1,"a ""quoted"" text"\n2,plain\n3,"two\nlines"\n'
    kinds = {"x.txt": prose, "x.jsonl": lines, "x.csv": table, "x.md": prose, "x.parquet": parquet()}
    packers = {
        "": bytes,
        ".gz": gzip.compress,
        ".bz2": bz2.compress,
        ".xz": lzma.compress,
        ".zip": zipped,
        ".zst": zstd,
        ".tar": tarred,
    }
    for name, content in kinds.items():
        for suffix, pack in packers.items():
            raw = pack(content)
            inputs = near(raw) if suffix else near(raw) | blobs
            yield name + suffix, inputs, lambda d, n=name + suffix: read_rows(n, d, False), data
    yield "strict rows", near(lines) | near(table), lambda d: read_rows("x.jsonl", d, True), data
    yield "rows of JSON", near_json(row).map(lambda d: d + b"\n"), lambda d: read_rows("x.jsonl", d, False), data
    yield (
        "csv with any header",
        texts.map(lambda t: f"{t}\n1,2\n".encode("utf-8", "surrogatepass")),
        (lambda d: read_rows("x.csv", d, False, "a")),
        data,
    )
    yield "names of formats", texts, format_of, ()
    usage = (UsageError, DataError)
    good = b"lr = 1e-3\nmax-steps = 5\n[train]\nseed = 1\nmax_time = '5m'\n"
    yield "TOML", near(good) | blobs, parse_toml, usage
    keyed = st.dictionaries(st.sampled_from([field.name for field in own_fields(TrainConfig)]), json_values, max_size=3)
    yield "TOML values", keyed.map(toml), parse_toml, usage
    amounts = st.text("0123456789.kKMGTBbi smhdin٣²K-+e", max_size=12) | texts
    yield "lengths of time", amounts, parse_length, (UsageError,)
    yield "amounts of memory", amounts, parse_memory, (UsageError,)
    for folder in (BYTE, CHAR):
        content = (fresh(folder) / "tokenizer.json").read_bytes()
        yield f"tokenizer.json of {folder}", near(content) | near_json(json.loads(content)), read_tokenizer, data
    bpe = small_bpe()
    yield "tokenizer.json, bpe", near(json.dumps(bpe).encode()) | near_json(bpe), read_tokenizer, data
    yield "tokenizer.json, any", json_values, tokenizer_of, data
    meta = json.loads((fresh(BYTE) / "meta.json").read_bytes())
    yield "meta.json", near(json.dumps(meta).encode()) | near_json(meta) | blobs, open_tokens, data
    yield "nanoGPT folder", st.binary(max_size=300), open_foreign_tokens, data
    config = json.loads((fresh(RUN) / "config.json").read_bytes())
    yield "config.json", near_json(config) | near(json.dumps(config).encode()) | blobs, read_config, damaged
    status = json.loads((Path(RUN) / "run.json").read_bytes())
    statuses = near_json(status) | near(json.dumps(status).encode()) | blobs
    yield "run.json", statuses, lambda d: read_status(store(f"{RUN}/run.json", d).parent), damaged
    folder = next(Path(RUN, "checkpoints").glob("step-*12"))
    manifest = json.loads((folder / "manifest.json").read_bytes())
    yield "manifest.json", near_json(manifest) | near(json.dumps(manifest).encode()) | blobs, read_manifest, damaged
    state = json.loads((folder / "state.json").read_bytes())
    fresh(RUN)
    yield "state.json", near_json(state) | near(json.dumps(state).encode()) | blobs, read_state, damaged
    weights = (Path(RUN) / "model.safetensors").read_bytes()
    yield "safetensors", near(weights[:4000]) | blobs, tensors, damaged
    yield "lines of logs", blobs | json_values.map(lambda v: json.dumps(v).encode() + b"\n"), logged_step, ()
    yield "JSON written", json_values | texts, write_json, ()


def toml(values: dict[str, Any]) -> bytes:
    """A TOML document, as far as TOML has a word for the values."""
    return "\n".join(f"{key} = {json.dumps(value)}" for key, value in values.items()).encode()


def zipped(content: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.txt", content)
        archive.writestr("b.jsonl", b'{"text": "x"}\n')
    return buffer.getvalue()


def tarred(content: bytes) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, data in (("a.txt", content), ("ä" * 120 + ".jsonl", b'{"text": "x"}\n')):
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return buffer.getvalue()


def zstd(content: bytes) -> bytes:
    if sys.version_info >= (3, 14):
        from compression import zstd as library
    else:
        library = pytest.importorskip("backports.zstd")
    return library.compress(content)


def parquet() -> bytes:
    arrow = pytest.importorskip("pyarrow")
    import pyarrow.parquet

    buffer = io.BytesIO()
    pyarrow.parquet.write_table(arrow.table({"text": ["one", "two", None], "n": [1, 2, 3]}), buffer)
    return buffer.getvalue()


def small_bpe() -> dict[str, Any]:
    pytest.importorskip("rustbpe")
    trained = build_tokenizer("bpe", vocab_size=300, sample=iter(["the cat and the dog and the tree\n" * 50]))
    return tokenizer_json.to_json(trained)


def try_parser(
    strategy: st.SearchStrategy, read: Callable[[Any], None], expected: tuple[type[Exception], ...], n: int, fixed: bool
) -> int:
    """Give a parser n inputs; it reads them or raises one of `expected`, in words. Returns how many it got."""
    tried = 0

    @settings(
        max_examples=n,
        deadline=None,
        database=None,
        derandomize=fixed,
        phases=[Phase.explicit, Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(strategy)
    def attempt(value: Any) -> None:
        nonlocal tried
        tried += 1
        signal.alarm(SECONDS)  # for each of them
        try:
            read(value)
        except expected as error:
            assert 0 < len(str(error)) < 5000

    attempt()
    return tried


def fuzz(full: bool) -> Result:
    """Every parser on inputs that hypothesis makes."""
    tally = Tally()
    own = Path(str(storage_directory())), Path(".hypothesis").resolve()  # what hypothesis keeps for itself
    with scene() as folder:
        for name, strategy, read, expected in parsers():
            with tally.case(name), watched(folder, *own):
                tally.times += try_parser(strategy, read, expected, EXAMPLES[full], fixed=not full) - 1
    return tally.result(10, "inputs of parsers")


# command lines

NO, MISSING = "nowhere", "nowhere/at/all.txt"
USAGE: tuple[tuple[int | set[int], tuple[Any, ...]], ...] = (
    # any command
    (2, ("frobnicate",)),
    (2, ("--frobnicate",)),
    (2, ("trian",)),
    (2, ("",)),
    (2, ("-",)),
    (2, ("--",)),
    (2, ("train", "--frob")),
    (2, ("sample", "--promt", "x")),
    (2, ("list", "extra")),
    (2, ("doctor", "extra")),
    (2, ("train", "--lr")),
    (2, ("train", "extra")),
    (2, ("sample", RUN, "extra")),
    (2, ("import",)),
    (2, ("merge", RUN, "x")),
    (2, ("--json",)),
    (2, ("train", "--json=maybe")),
    (2, ("list", "--quiet", "--quite")),
    (2, ("train", "--", "--lr")),
    (2, ("x" * 3000,)),
    (2, ("train", "--" + "x" * 3000)),
    # numbers
    *(
        (2, ("train", "--data", BYTE, option, value))
        for option, value in (
            ("--lr", "0"),
            ("--lr", "-1"),
            ("--lr", "nan"),
            ("--lr", "inf"),
            ("--lr", "x"),
            ("--lr", "1e10"),
            ("--lr", ""),
            ("--max-steps", "0"),
            ("--max-steps", "-1"),
            ("--max-steps", str(2**63)),
            ("--max-steps", "1.5"),
            ("--max-steps", "1" + "0" * 400),
            ("--max-steps", "1" * 5000),
            ("--batch-size", "0"),
            ("--batch-size", "-1"),
            ("--grad-accum", "0"),
            ("--dim", "0"),
            ("--dim", "-64"),
            ("--dim", str(2**40)),
            ("--dim", "1" + "0" * 400),
            ("--n-layers", "0"),
            ("--n-layers", "100000"),
            ("--n-heads", "0"),
            ("--n-heads", "7"),
            ("--seq-len", "0"),
            ("--dropout", "1"),
            ("--dropout", "-0.1"),
            ("--dropout", "nan"),
            ("--epochs", "0"),
            ("--epochs", "inf"),
            ("--max-time", "0s"),
            ("--max-time", "soon"),
            ("--max-time", "-5m"),
            ("--max-time", ""),
            ("--max-time", "٣ months"),
            ("--vram", "0"),
            ("--vram", "much"),
            ("--vram", "-8GB"),
            ("--threads", "0"),
            ("--seed", "-1"),
            ("--seed", str(2**64)),
            ("--keep", "0"),
            ("--save-every", "0"),
            ("--val-every", "-1"),
            ("--patience", "0"),
            ("--min-lr", "-1"),
            ("--grad-clip", "-1"),
            ("--weight-decay", "inf"),
            ("--warmup-steps", "-1"),
            ("--val-fraction", "0"),
            ("--val-fraction", "0.9"),
            ("--lora-rank", "0"),
            ("--lora-rank", "4"),
            ("--vocab-size", "7"),
            ("--vocab-size", "0"),
            ("--sample-every", "-1"),
            # words
            ("--model", "gpt5"),
            ("--model", "../nyx"),
            ("--model", "_base"),
            ("--model", "os"),
            ("--size", "huge"),
            ("--optimizer", "sgd"),
            ("--schedule", "square"),
            ("--precision", "fp8"),
            ("--compile", "maybe"),
            ("--variant", "other"),
            ("--device", "gpu"),
            ("--device", "cuda:x"),
            ("--device", "cpu:-1"),
            ("--errors", "ignore"),
            ("--tokenizer", "word"),
        )
    ),
    # settings that disagree
    (2, ("train", "--data", BYTE, "--max-steps", 5, "--epochs", 1)),
    (2, ("train", "--data", BYTE, "--max-steps", 5, "--max-time", "1m")),
    (2, ("train", "--data", BYTE, "--filepath", "words.txt")),
    (2, ("train", "--data", BYTE, "--lr", 1e-4, "--min-lr", 1e-3)),
    (2, ("train", "--data", BYTE, "--max-steps", 5, "--warmup-steps", 6)),
    (2, ("train", "--data", BYTE, "--batch-size", 3, "--grad-accum", 2, "--tokens-per-step", 100)),
    (2, ("train", "--data", BYTE, "--model", "llama", "--n-critics", 2)),
    (2, ("train", "--data", BYTE, "--lr", 1, "--learning_rate", 1)),
    (2, ("train", "--data", BYTE, "--dim", 100, "--n-heads", 8)),
    (2, ("train", "--resume", RUN, "--lr", 1)),
    (2, ("train", "--resume", RUN, "--model", "nyx")),
    (2, ("train", "--resume", RUN, "--dim", 64)),
    (2, ("train", "--resume", RUN, "--max-steps", 5, "--epochs", 5)),
    (2, ("train", "--init-from", RUN, "--data", BYTE, "--dim", 64)),
    # options without effect
    (2, ("train", "--init-from", RUN, "--data", BYTE, "--tokenizer", "char")),
    (2, ("train", "--data", BYTE, "--val-fraction", 0.3)),
    (2, ("train", "--data", BYTE, "--encoding", "cp1251")),
    (2, ("prepare", "words.txt", "--val", "words.txt", "--val-fraction", 0.3, "--out", "x")),
    (2, ("prepare", "words.txt", "--text-key", "body", "--out", "x")),
    (2, ("prepare", "words.txt", "--encoding", "rot13", "--out", "x")),
    (2, ("quantize", RUN, "--bits", 8, "--group-size", 64)),
    (2, ("sample", RUN, "--model_dim", 4096)),
    (2, ("sample", RUN, "--greedy", "--top-k", 5)),
    (2, ("eval", RUN, "--errors", "strict")),
    (2, ("train", "--init-from", RUN, "--size", "tiny")),
    (2, ("train", "--filepath", "-")),
    (2, ("sample", RUN, "--prompt", "x", "--prompt-file", "words.txt")),
    (2, ("summarize", RUN, "--model", "nyx")),
    (2, ("summarize", RUN, "--all")),
    # sampling
    *(
        (2, ("sample", RUN, option, value))
        for option, value in (
            ("--temperature", "-1"),
            ("--temperature", "nan"),
            ("--temperature", "inf"),
            ("--top-k", "0"),
            ("--top-k", "-1"),
            ("--top-p", "0"),
            ("--top-p", "1.1"),
            ("--top-p", "nan"),
            ("--min-p", "2"),
            ("--max-new-tokens", "0"),
            ("--max-new-tokens", str(10**9)),
            ("--num-samples", "0"),
            ("--num-samples", str(10**6)),
            ("--seed", str(2**64)),
            ("--repetition-penalty", "0"),
            ("--device", "gpu"),
            ("--precision", "fp1"),
        )
    ),
    (2, ("sample", f"{RUN}@first")),
    (2, ("sample", f"{RUN}@")),
    (2, ("sample", f"{RUN}@{'9' * 5000}")),
    (2, ("sample", "@")),
    # other commands
    (2, ("prepare",)),
    (2, ("prepare", "words.txt", "--vocab-size", 0)),
    (2, ("prepare", "words.txt", "--vocab-size", 2**31)),
    (2, ("prepare", "words.txt", "--tokenizer", "byte", "--vocab-size", 300)),
    (2, ("prepare", "-")),
    (2, ("prepare", "words.txt", "--tokenizer", "bpe", "--vocab-size", 255)),
    (2, ("prepare", "words.txt", "--workers", 0)),
    (2, ("prepare", "words.txt", "--max-memory", "1KB")),
    (2, ("prepare", "words.txt", "--max-memory", "lots")),
    (2, ("quantize", RUN, "--bits", 3)),
    (2, ("quantize", RUN, "--group-size", 0)),
    (2, ("quantize", RUN, "--max-drop", "nan")),
    (2, ("quantize", RUN, "--keep", "nothing")),
    (2, ("quantize", "weights/small")),
    (2, ("merge", RUN)),
    (2, ("eval", RUN, "--batch-size", 0)),
    (2, ("eval", RUN, "--errors", "x")),
    (2, ("import", "words.txt", "--model", "gpt5")),
    ({2, 5}, ("import", "words.txt", "--model", "llama")),
    (2, ("summarize", "--model", "gpt5")),
    (2, ("summarize", "--size", "x")),
    (2, ("summarize", "--vram", "x")),
    (2, ("summarize", "--batch-size", 0)),
    (2, ("summarize", "--precision", "x")),
    (2, ("bench", "--size", "x")),
    (2, ("bench", "--device", "gpu")),
)
FILES: tuple[tuple[int | set[int], tuple[Any, ...]], ...] = (
    # input
    *(
        (3, ("prepare", name, "--out", "data/x"))
        for name in (
            MISSING,
            "empty.txt",
            "spaces.txt",
            "newlines.txt",
            "nul.txt",
            "one.txt",
            "elf.txt",
            "png.txt",
            "zip.txt",
            "folder",
            "loop",
            "dangling",
            "*.nothing",
            "bad.jsonl",
            "bad.csv",
            "bad.parquet",
            "cut.gz",
            "bomb.gz",
            "bad.bz2",
            "bad.xz",
            "bad.zst",
            "bad.zip",
            "no.zip",
            "nested.gz",
            "x" * 300,
            "x/" * 3000,
            "/dev/null",
            "a\nb",
            "deep.jsonl",
        )
    ),
    (3, ("prepare", "latin.txt", "--errors", "strict", "--out", "data/x")),
    (3, ("prepare", "words.txt", "--val", MISSING, "--out", "data/x")),
    (3, ("prepare", "words.txt", "--val", "empty.txt", "--out", "data/x")),
    (3, ("prepare", "words.jsonl", "--text-key", "no", "--out", "data/x")),
    (3, ("prepare", "words.csv", "--text-key", "no", "--out", "data/x")),
    (3, ("prepare", "words.txt", "--tokenizer", "empty.txt", "--out", "data/x")),
    (3, ("prepare", "words.txt", "--tokenizer", "deep.json", "--out", "data/x")),
    ({2, 3}, ("prepare", "words.txt", "--tokenizer", "folder")),
    (3, ("train", "--filepath", MISSING)),
    (3, ("train", "--filepath", "one.txt")),
    (3, ("train", "--data", NO)),
    (3, ("train", "--data", "folder")),
    (3, ("train", "--data", "words.txt")),
    (3, ("train", "--data", "/dev/null")),
    (3, ("train", "--data", "x" * 300)),
    (3, ("train", "--data", BYTE, "--config", MISSING)),
    (3, ("train", "--config", "folder")),
    (2, ("train", "--config", "words.txt")),
    (2, ("train", "--config", "/dev/zero")),
    (3, ("train", "--config", "x" * 300)),
    (3, ("train", "--data", BYTE, "--tokenizer", "empty.txt")),
    (3, ("train", "--data", BYTE, "--seq-len", 2**20, "--dim", 32, "--no-xpos")),
    (3, ("train", "--resume", RUN, "--max-steps", 20, "--data", CHAR)),
    (3, ("train", "--init-from", RUN, "--data", CHAR)),
    (3, ("eval", RUN, "--filepath", MISSING)),
    (3, ("eval", RUN, "--filepath", "empty.txt")),
    (3, ("eval", RUN, "--filepath", "png.txt")),
    (3, ("sample", RUN, "--prompt-file", MISSING)),
    (3, ("sample", RUN, "--prompt-file", "folder")),
    (3, ("sample", RUN, "--prompt-file", "/dev/zero")),
    (3, ("quantize", RUN, "--filepath", "empty.txt")),
    # memory
    (4, ("summarize", "--model", "nyx", "--size", "xl", "--vram", "2GB")),
    (4, ("summarize", "--model", "nyx", "--batch-size", 2**20, "--vram", "4GB")),
    # models
    *(
        (5, (verb, name))
        for verb in ("sample", "eval", "summarize", "quantize", "merge")
        for name in (NO, "folder", "words.txt", "x" * 300)
    ),
    (5, ("sample", f"{RUN}@7")),
    (5, ("eval", f"{NO}@best")),
    (5, ("train", "--resume", NO)),
    (5, ("train", "--resume", "last")),
    (5, ("train", "--resume", "folder")),
    (5, ("train", "--resume", "weights/small")),
    (5, ("train", "--init-from", NO, "--data", BYTE)),
    (5, ("train", "--init-from", "weights/small", "--data", BYTE)),
    (5, ("import", MISSING, "--model", "nyx")),
    (5, ("import", "words.txt", "--model", "nyx")),
    (5, ("import", "folder", "--model", "nyx")),
    (5, ("import", "empty.txt", "--model", "neon")),
    (5, ("sample", "--model_dim", 5)),
    (5, ("train", "--checkpoint_path", "nothing.pth", "--data", BYTE)),
    (5, ("import", "/dev/zero", "--model", "nyx")),
    (5, ("sample", "")),
    # the machine
    (7, ("sample", RUN, "--device", "cuda:9")),
    (7, ("train", "--data", BYTE, "--device", "mps")),
    (7, ("sample", RUN, "--precision", "bf16", "--device", "cpu")),
    # output
    (8, ("prepare", "words.txt", "--out", "folder")),
    (8, ("prepare", "words.txt", "--out", "words.txt")),
    (8, ("prepare", "words.txt", "--out", "words.txt/inside")),
    (8, ("prepare", "words.txt", "--out", "dangling")),
    (8, ("prepare", "words.txt", "--out", "x" * 300)),
    (8, ("prepare", "words.txt", "--out", "/proc/x")),
    (8, ("train", "--data", BYTE, "--out", RUN, *SHAPE)),
    (8, ("train", "--data", BYTE, "--out", "words.txt/x", *SHAPE, *HABITS, "--max-steps", 1)),
    (8, ("train", "--data", BYTE, "--out", "/proc/x", *SHAPE, *HABITS, "--max-steps", 1)),
    (8, ("quantize", RUN, "--out", "folder")),
    (8, ("import", "seed.pth", "--model", "nyx", "--out", "folder")),
    (8, ("quantize", RUN, "--max-drop", 100, "--out", "words.txt/x")),
    (8, ("train", "--data", BYTE, "--out", "dangling", *SHAPE)),
)


def make_files() -> None:
    """What the command lines name."""
    words = b"the cat sees the dog\n" * 200
    contents = {
        "words.txt": words,
        "empty.txt": b"",
        "spaces.txt": b"  \t \n " * 50,
        "newlines.txt": b"\n" * 1000,
        "nul.txt": bytes(5000),
        "one.txt": b"x",
        "elf.txt": b"\x7fELF" + bytes(100),
        "png.txt": b"\x89PNG\r\n\x1a\n" + bytes(50),
        "zip.txt": b"PK\x03\x04" + bytes(50),
        "latin.txt": b"na\xefve caf\xe9\n" * 50,
        "bad.jsonl": b"{no\n" * 5,
        "bad.csv": b"a,b\n1,2\n",
        "bad.parquet": b"PAR1" + bytes(30),
        "cut.gz": gzip.compress(words)[:-9],
        "bomb.gz": gzip.compress(bytes(2**27), 9),
        "bad.bz2": b"BZh9" + bytes(40),
        "bad.xz": b"\xfd7zXZ\x00" + bytes(40),
        "bad.zst": b"\x28\xb5\x2f\xfd" + bytes(40),
        "bad.zip": b"PK\x03\x04" + bytes(40),
        "no.zip": zipped_nothing(),
        "nested.gz": gzip.compress(gzip.compress(gzip.compress(gzip.compress(words)))),
        "words.jsonl": b'{"text": "x"}\n' * 99,
        "words.csv": b"text\nx\ny\n" * 50,
        "deep.json": DEEP_JSON,
        "deep.jsonl": DEEP_JSON + b"\n",
    }
    for name, content in contents.items():
        Path(name).write_bytes(content)
    Path("folder").mkdir()
    Path("folder/other").write_text("x")
    Path("loop").symlink_to("loop")
    Path("dangling").symlink_to("nothing-there")
    shutil.copyfile(fresh("foreign/seed.pth"), "seed.pth")


def zipped_nothing() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("picture.png", b"x")
    return buffer.getvalue()


def command_lines(full: bool) -> Result:
    """Command lines that must be refused: the exit code of the contract, one line, nothing new on the disk."""
    tally = Tally()
    with scene() as folder:
        for name in (RUN, "weights/small", BYTE, CHAR):
            fresh(name)
        make_files()
        before = listing(folder)
        for code, words in (*USAGE, *FILES):
            shown = " ".join(str(word)[:40] for word in words)
            with tally.case(shown) as case, watched(folder, Path("/proc"), limit=False):
                check_refusal(nnx(*words), code, case)
                after = listing(folder)
                new = {path for path in after.keys() ^ before.keys() if not path.endswith("/lock")}
                changed = {path for path in after.keys() & before.keys() if after[path] != before[path]}
                for path in new:
                    remove(Path(path))
                assert not new | changed, f"{case} left {sorted(new | changed)[:3]}"
    return tally.result(10, "bad command lines")


def garbled_lines(full: bool) -> Result:
    """Command lines put together at random of real and unreal words: no code of its own, never a traceback."""
    tally, draw = Tally(), random.Random(10)
    verbs = ["prepare", "sample", "eval", "summarize", "quantize", "merge", "import", "list", "train"]
    options = [
        "--json",
        "--quiet",
        "--out",
        "--model",
        "--size",
        "--bits",
        "--device",
        "--prompt",
        "--config",
        "--data",
        "--lr",
        "--max-steps",
        "--filepath",
        "--resume",
        "--dim",
        "--keep",
        "--stop",
        "--top-k",
        "--val",
        "--dry-run",
        "--max-new-tokens",
        "--tokenizer",
        "--greedy",
        "--vram",
        "--all",
        "--",
        "-",
        "-h",
        "--debugg",
    ]
    values = [
        "",
        "0",
        "-1",
        "1",
        "nyx",
        "nano",
        "nan",
        RUN,
        BYTE,
        "words.txt",
        "folder",
        NO,
        "x" * 300,
        "\x1b[2J",
        "[/x]",
        "\udcff",
        "1e999",
        "8",
        "cpu",
        "byte",
        "../..",
        "%s",
        "*",
        "~",
        "NUL",
        "con",
    ]
    with scene() as folder:
        for name in (RUN, BYTE):
            fresh(name)
        make_files()
        for _ in range(2000 if full else 80):
            words = [draw.choice(verbs), *(draw.choice(options + values * 2) for _ in range(draw.randint(0, 5)))]
            if words[0] == "train":
                words.append("--dry-run")
            with tally.case(" ".join(words)[:200]) as case, watched(folder, limit=False):
                before = set(listing(folder))
                outcome = nnx(*words)
                check_refusal(outcome, {0, 2, 3, 4, 5, 6, 7, 8}, case)
                new = set(listing(folder)) - before
                assert not any("/.tmp-" in path or "/.del-" in path for path in new), new
                for path in new:
                    remove(Path(path))
                assert outcome.code == 0 or not new, f"{case} left {sorted(new)[:3]}"
    return tally.result(10, "command lines put together at random")


def real_processes(full: bool) -> Result:
    """Some of them in processes of their own, with odd surroundings: closed streams, a strange terminal, no home."""
    tally = Tally()
    surroundings = [
        {"TERM": "dumb"},
        {"COLUMNS": "1"},
        {"LC_ALL": "C"},
        {"HOME": ""},
        {"NO_COLOR": "1", "TERM": "xterm"},
        {"PYTHONIOENCODING": "ascii"},
        {"FORCE_COLOR": "1"},
    ]
    lines = [
        (2, ("frobnicate",)),
        (5, ("sample", NO)),
        (2, ("train", "--lr", "nan")),
        (3, ("prepare", "empty.txt", "--out", "x")),
    ]
    lines += list(FILES[::12]) if full else []
    with scene() as folder:
        for name in (RUN, BYTE, CHAR, "weights/small"):
            fresh(name)
        make_files()
        before = listing(folder)
        for number, (code, words) in enumerate(lines if full else lines[:3]):
            environment = {**os.environ, "PYTHONPATH": str(ROOT), **surroundings[number % len(surroundings)]}
            with tally.case(f"{' '.join(map(str, words))[:80]} {number}") as case:
                done = subprocess.run(
                    [sys.executable, "-m", "nnx_cli", *map(str, words)],
                    capture_output=True,
                    stdin=subprocess.DEVNULL,
                    env=environment,
                    timeout=200,
                )
                err = done.stderr.replace(b"\x1b[0m", b"") if "FORCE_COLOR" in environment else done.stderr
                check_refusal(Outcome(done.returncode, done.stdout, err), code, case)
                assert set(listing(folder)) <= set(before) | {f"{folder}/{RUN}/lock"}, case
        for closed in ("stdin", "stdout", "stderr") if full else ("stdout",):
            with tally.case(f"{closed} is closed") as case:
                redirect = {"stdin": "<&-", "stdout": ">&-", "stderr": "2>&-"}[closed]
                command = f"{sys.executable} -m nnx_cli list {redirect}"
                own = {**os.environ, "PYTHONPATH": str(ROOT)}
                done = subprocess.run(["sh", "-c", command], capture_output=True, env=own, timeout=200)
                assert done.returncode in (0, 8) and b"Traceback" not in done.stderr, done.stderr
    return tally.result(10, "bad command lines in real processes")


PARTS = {
    "fuzzed parsers": fuzz,
    "bad command lines": command_lines,
    "garbled command lines": garbled_lines,
    "bad command lines, real": real_processes,
}


def test_there_are_120_bad_command_lines():
    assert len({words for _, words in (*USAGE, *FILES)}) >= 120
    assert {words[0] for _, words in (*USAGE, *FILES)} >= {
        "prepare",
        "train",
        "sample",
        "summarize",
        "quantize",
        "eval",
        "merge",
        "import",
    }


@pytest.mark.parametrize("name", PARTS)
def test_garbage(name):
    check(PARTS[name](False))
