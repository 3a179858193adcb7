import json
import struct

import pytest

BLOCK, BEGINNING = 32_768, 7  # bytes: of what a file is made of, and before the first record


def messages(data):
    """The records of a .wandb file, which is a log as LevelDB writes them: blocks of pieces with a header each."""
    at, whole = BEGINNING, b""
    while at < len(data):
        if BLOCK - at % BLOCK < 7:
            at += BLOCK - at % BLOCK
            continue
        _, length, kind = struct.unpack("<IHB", data[at : at + 7])
        whole += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last piece
            yield whole
            whole = b""


@pytest.fixture
def history(twice):
    """Rows of both offline runs, as the library's own messages have them, what they are called and how they ended."""
    from wandb.proto import wandb_internal_pb2

    rows, runs, ended = [], [], []
    for path in sorted(twice.glob("wandb/offline-run-*/run-*.wandb")):
        for message in messages(path.read_bytes()):
            record = wandb_internal_pb2.Record.FromString(message)
            kind = record.WhichOneof("record_type")
            if kind == "run":
                runs.append(record.run)
            elif kind == "exit":
                ended.append(record.exit.exit_code)
            elif kind == "history":
                rows.append({i.key or ".".join(i.nested_key): json.loads(i.value_json) for i in record.history.item})
    return rows, runs, ended


def test_its_messages_have_every_number(history, records):
    rows, runs, ended = history
    assert len({run.run_id for run in runs}) == 1 and ended == [0, 0]
    losses = {row["train/global_step"]: row["train/loss"] for row in rows if "train/loss" in row}
    assert losses == {record["step"]: record["train_loss"] for record in records}
    assert {row["train/global_step"] for row in rows if "eval/loss" in row} == {4, 8, 12}


def test_samples_and_figures_are_html(history, twice):
    rows, *_ = history
    assert [row["train/global_step"] for row in rows if "samples._type" in row] == [4, 8, 12]
    pages = sorted(twice.glob("wandb/*/files/media/html/report*.html"))
    assert len(pages) == 2 and "<h3>Loss</h3>" in pages[0].read_text(encoding="utf-8")


def test_nothing_private_is_in_it(history, twice, leaks):
    _, (run, *_), _ = history
    settings = {item.key: json.loads(item.value_json) for item in run.config.update}
    assert settings["dim"] == 32 and settings["model"] == "nyx" and "sample_prompt" not in settings
    assert not run.host and not leaks(twice / "wandb", twice.parent, "/a/path")
