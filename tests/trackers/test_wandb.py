import json
import struct
import sys
from pathlib import Path

import pytest

import nnx_cli

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


def told(folder):
    """Rows of all offline runs in a folder, as the library's own messages have them, what they are and how they
    ended."""
    from wandb.proto import wandb_internal_pb2

    rows, runs, ended = [], [], []
    for path in sorted(folder.glob("wandb/offline-run-*/run-*.wandb")):
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


@pytest.fixture
def history(twice):
    return told(twice)


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


def test_an_agent_of_a_sweep_runs_the_command_of_the_readme(token_path, workspace, monkeypatch):
    agents = pytest.importorskip("wandb.wandb_agent", reason="needs wandb")
    yaml = pytest.importorskip("yaml", reason="needs PyYAML")
    readme = Path(nnx_cli.__file__).parents[1] / "weights" / "README.md"
    sweep = yaml.safe_load(readme.read_text(encoding="utf-8").partition("```yaml\n")[2].partition("```")[0])
    assert sweep["command"][:2] == ["nnx", "train"] and sweep["metric"]["name"] == "eval/loss"
    replaced = {"nnx": sys.executable, "--filepath=book.txt": f"--data={token_path}", "--max-time=5m": "--max_steps=3"}
    agent = agents.Agent.__new__(agents.Agent)
    agent._sweep_command = [replaced.get(word, word) for word in sweep["command"]]
    agent._sweep_command[1:1] = ["-m", "nnx_cli"]
    agent._in_jupyter, agent._function, agent._forward_signals, agent._run_processes = False, None, False, {}
    for name, value in {"MODE": "offline", "SWEEP_ID": "sweep1", "PROJECT": "words", "SILENT": "true"}.items():
        monkeypatch.setenv(f"WANDB_{name}", value)
    for name in ("WANDB_RUN_ID", "WANDB_SWEEP_PARAM_PATH"):  # which the agent sets
        monkeypatch.setenv(name, "")
    chosen = {"lr": 0.003, "n_layers": 2, "dim": 32.0, "n_heads": 2, "seq_len": 32, "batch_size": 2, "grad_accum": 1}
    chosen |= {"sample_every": 0, "watch": False, "report": False, "compile": "off", "threads": 1, "patience": None}
    args = {name: {"value": value} for name, value in chosen.items()}
    agent._command_run({"run_id": "byagent1", "program": "train.py", "args": args})
    assert agent._run_processes["byagent1"].wait() == 0
    rows, (run, *_), ended = told(workspace / "weights" / "nyx-words")
    assert (run.run_id, run.project, run.sweep_id, ended) == ("byagent1", "words", "sweep1", [0])
    assert {row["train/global_step"] for row in rows if "eval/loss" in row} >= {3}
    settings = {item.key: json.loads(item.value_json) for item in run.config.update}
    assert settings["lr"] == 0.003 and settings["n_layers"] == 2 and settings["watch"] is False
