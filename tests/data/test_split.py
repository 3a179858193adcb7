"""Where documents begin in a token folder, recomputed from their texts."""

import csv
import json
import tracemalloc

import numpy as np
import pytest

from nnx_cli.config import PrepareConfig
from nnx_cli.data import prepare as module
from nnx_cli.data.prepare import prepare
from nnx_cli.data.token_folder import open_token_folder

TEXTS = [f"Zeile {i}: größer\n" * (i % 7 + 1) + "and its end" * (i % 2) for i in range(130)]
READ_BACK = {"few files": 5, "rows": 130, "99 rows": 99, "table": 110, "parquet": 120, "one": 1}


def write(folder, kind):
    """The first texts as a source of that kind, and the texts."""
    texts = TEXTS[: READ_BACK[kind]]
    if kind in ("few files", "one"):
        for i, text in enumerate(texts):
            (folder / f"{i:03}.txt").write_bytes(text.encode())
        return folder, texts
    path = folder / {"table": "a.csv", "parquet": "a.parquet"}.get(kind, "a.jsonl")
    if kind == "table":
        with open(path, "w", encoding="utf-8", newline="") as file:
            csv.writer(file).writerows([["id", "text"], *enumerate(texts)])
    elif kind == "parquet":
        pyarrow = pytest.importorskip("pyarrow", reason="needs the extra nnx-cli[parquet]")
        pytest.importorskip("pyarrow.parquet").write_table(pyarrow.table({"text": texts}), path)
    else:
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return path, texts


def starts_of(texts, tokenizer):
    """The first token of each text where they are joined, and the number of tokens."""
    starts, ids = [], np.empty(0, tokenizer.dtype)
    for text in texts:
        if len(ids) and (tokenizer.eot_id is not None or ids[-1] != tokenizer.separator[-1]):
            ids = np.concatenate([ids, tokenizer.separator])
        starts.append(len(ids))
        ids = np.concatenate([ids, tokenizer.encode(text)])
    return starts, len(ids)


def expected(texts, data):
    """By split, where documents begin."""
    if len(texts) >= 100:
        parts = {"train": [t for i, t in enumerate(texts) if i % 10 != 4], "val": texts[4::10]}
        return {split: starts_of(part, data.tokenizer)[0] for split, part in parts.items()}
    starts, n_tokens = starts_of(texts, data.tokenizer)
    cut = len(data.train)
    assert cut + len(data.val) == n_tokens
    return {
        "train": [start for start in starts if start < cut],
        "val": [0, *(start - cut for start in starts if start > cut)],
    }


@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize("tokenizer", ["byte", "char", "bpe"])
@pytest.mark.parametrize("kind", READ_BACK)
def test_documents_begin_where_their_texts_do(tmp_path, monkeypatch, kind, tokenizer, workers):
    monkeypatch.setattr(module, "JOB_CHARS", 300)
    (tmp_path / "in").mkdir()
    source, texts = write(tmp_path / "in", kind)
    prepare([source], tmp_path / "made", PrepareConfig(tokenizer=tokenizer, workers=workers))
    data = open_token_folder(tmp_path / "made")
    found = {split: starts.tolist() for split, starts in data.documents.items()}
    assert found == expected(texts, data)
    assert all(starts.dtype == np.uint64 for starts in data.documents.values())


def test_documents_of_named_validation_text(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for i in range(3):
            (tmp_path / name / f"{i}.txt").write_text(f"{name}{i}" * (i + 2))
    prepare([tmp_path / "a"], tmp_path / "made", PrepareConfig(), val_paths=[tmp_path / "b"])
    documents = open_token_folder(tmp_path / "made").documents
    assert documents["train"].tolist() == documents["val"].tolist() == [0, 5, 12]


def test_a_tail_cut_off_many_documents_takes_their_beginnings(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": str(i % 10)}) + "\n" for i in range(1000)))
    prepare([path], tmp_path / "made", PrepareConfig(val_fraction=1e-7))
    data = open_token_folder(tmp_path / "made")
    assert data.val.tolist() == [ord("9")] and data.documents["val"].tolist() == [0]
    assert data.documents["train"].tolist() == list(range(0, 2 * 999, 2))


def test_memory_does_not_grow_with_the_number_of_documents(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "JOB_PIECES", 64)
    for name in ("charset.BLOCK_BYTES", "token_file.BLOCK_BYTES", "token_file.WRITE_BYTES", "duplicates.BATCH_TOKENS"):
        monkeypatch.setattr(f"nnx_cli.data.{name}", 2**12)
    peaks = []
    for n in (6_000, 15_000):
        path = tmp_path / f"{n}.jsonl"
        path.write_text('{"text": "x"}\n' * n)
        tracemalloc.start()
        prepare([path], tmp_path / str(n), PrepareConfig(workers=1, xray=False))
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        documents = open_token_folder(tmp_path / str(n)).documents
        assert sum(map(len, documents.values())) == n
    assert peaks[1] - peaks[0] < 9_000 * 8
