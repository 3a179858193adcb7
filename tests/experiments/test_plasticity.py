"""A sequence of texts learned in turn: against fresh models, what is measured, and going on after a stop."""

import json
from pathlib import Path

import pytest
import torch

from nnx_cli.data.token_folder import open_token_folder
from nnx_cli.evaluation.losses import evaluate
from nnx_cli.experiments import rate_search
from nnx_cli.experiments.one_run import Stopped
from nnx_cli.experiments.plasticity import activity, effective_rank
from nnx_cli.experiments.race_file import read_race
from nnx_cli.experiments.race_run import Runner
from nnx_cli.runs.load import ModelRef, load_model
from nnx_cli.runs.manifest import read_verified_config

SHAPE = ["--parameters", "24K", "--seq-len", 32, "--tokens-per-step", 256, "--threads", 1, "--compile", "off"]
LINE = ["compare", "--task", "plasticity", *SHAPE, "--budget", "2600", "--seeds", 1]


@pytest.fixture
def texts(text, workspace, monkeypatch):
    """Three texts of one alphabet, as options."""
    monkeypatch.setattr(rate_search, "FACTORS", (1.0,))
    parts = {"first": text, "second": text.upper(), "third": "\n".join(reversed(text.split("\n")))}
    for name, written in parts.items():
        Path(f"{name}.txt").write_text(written, encoding="utf-8")
    return [word for name in parts for word in ("--filepath", f"{name}.txt")]


def test_texts_are_learned_in_turn_and_by_fresh_models(nnx, texts, monkeypatch):
    train, begun, dropped = Runner.train, [], []
    monkeypatch.setattr("nnx_cli.experiments.race.drop_weights", lambda folder, keep: dropped.append(folder.name))

    def stopped(runner, entrant, plan, data, folder, init_from=None):
        begun.append(folder.name)
        if len(begun) == 6:  # four of the first competitor's runs are over
            raise Stopped("enough")
        return train(runner, entrant, plan, data, folder, init_from)

    line = [*LINE, "--models", "llama+adamw,ngpt+muon", *texts]
    monkeypatch.setattr(Runner, "train", stopped)
    assert nnx(*line).exit_code == 130
    monkeypatch.setattr(Runner, "train", train)
    done = nnx(*line, "--json")
    assert done.exit_code == 0, done.stderr
    folder = Path("weights/race-plasticity")
    record = json.loads(done.stdout)
    assert record == read_race(folder / "race.json") and record["state"] == "finished"
    assert {each["model"]: each["optimizer"] for each in record["competitors"]} == {
        "llama+adamw": "adamw",
        "ngpt+muon": "muon",
    }
    for each in record["competitors"]:
        (run,) = each["runs"]
        first, second, third = run["plasticity"]
        assert [stage["text"].split("-")[0] for stage in run["plasticity"]] == ["first", "second", "third"]
        assert first["fresh"] is None and [len(x["earlier_bits_per_byte"]) for x in (first, second, third)] == [0, 1, 2]
        name = f"{each['model']}-1"
        places = [f"{name}.1", f"{name}.2", f"{name}.2-fresh", name, f"{name}.3-fresh"]
        before = [read_verified_config(folder / place)["init_from"] for place in places]
        assert before == [None, f"{folder / name}.1@last", None, f"{folder / name}.2@last", None]
        assert run["bits_per_byte"] == pytest.approx((second["bits_per_byte"] + third["bits_per_byte"]) / 2)
        assert run["tokens"] == 3 * 2560 and [x["tokens"] for x in run["curve"]][-1] == run["tokens"]
        assert [step for step, _ in third["curve"]] == [step for step, _ in third["fresh"]["curve"]]
        means, fresh = each["plasticity"], [second["fresh"], third["fresh"]]
        assert means["behind"] == pytest.approx(
            [x["bits_per_byte"] - y["bits_per_byte"] for x, y in zip((second, third), fresh, strict=True)]
        )
        old = third["earlier_bits_per_byte"]
        lost = (old[0] - first["bits_per_byte"] + old[1] - second["bits_per_byte"]) / 2
        assert means["lost"] == pytest.approx(lost)
        assert 1 <= third["effective_rank"] <= each["config"]["dim"] and 0 <= third["dead_units"] < 1
    shown = nnx(*line)
    assert "is finished" in shown.stderr and "behind, last" in shown.stdout and "→" in shown.stdout
    page = (folder / "race.html").read_text(encoding="utf-8")
    assert "Behind a fresh model" in page and "effective rank" in page
    assert {*places} < {*dropped}
    data = open_token_folder(next(Path("data").glob("first-*")))
    model = load_model(ModelRef(folder / name, "last"), torch.device("cpu"))
    found = evaluate(model, data.val, seq_len=32, batch_size=4, token_bytes=data.tokenizer.token_bytes())
    assert third["earlier_bits_per_byte"][0] == pytest.approx(found.bits_per_byte, rel=1e-5)
    assert nnx("sample", "race-plasticity/llama+adamw-1.2", "--max-new-tokens", 2).exit_code == 0


def test_effective_rank_counts_directions():
    directions = torch.linalg.qr(torch.randn(16, 16))[0]
    assert effective_rank(directions.view(4, 4, 16)) == pytest.approx(16)
    assert effective_rank(torch.randn(50, 1) * directions[:1]) == pytest.approx(1, abs=1e-4)
    assert effective_rank(torch.cat([directions[:3]] * 9)) == pytest.approx(3)


def test_dead_units_and_weights_are_counted(tiny, tokens):
    model = tiny("llama", vocab_size=tokens.vocab_size).eval()
    before = activity(model, tokens)
    F = model.config.ffn_dim
    with torch.no_grad():
        for block in model.blocks:
            block.mlp.gate_up.weight[: F // 2] = 0  # silu(0) * up is 0
    found = activity(model, tokens)
    assert before["dead_units"] < 0.1 and found["dead_units"] == pytest.approx(0.5, abs=0.1)
    matrices = torch.cat([p.flatten() for p in model.blocks.parameters() if p.dim() == 2])
    assert found["weight_rms"] == pytest.approx(matrices.square().mean().sqrt().item(), rel=1e-5)
    assert activity(tiny("nyx", vocab_size=tokens.vocab_size).eval(), tokens)["effective_rank"] > 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--filepath", "first.txt"], "several texts"),
        (["--filepath", "first.txt", "--filepath", "first.txt"], "a text twice"),
        (
            ["--filepath", "first.txt", "--filepath", "second.txt", "--tokenizer", "bpe"],
            "would differ from text to text",
        ),
        (["--filepath", "first.txt", "--filepath", "second.txt", "--equal", "flops"], "at equal steps"),
        (["--filepath", "first.txt", "--filepath", "second.txt", "--models", "llama,llama+sgd"], "no optimizer 'sgd'"),
        (["--filepath", "first.txt", "--filepath", "second.txt", "--models", "nyx+lion,nyx+lion"], "nyx+lion twice"),
        (["--filepath", "first.txt", "--filepath", "second.txt", "--data", "data/x"], "give one"),
    ],
    ids=range(7),
)
def test_what_is_no_sequence_is_refused(refused, texts, words, message):
    refused(2, message, "compare", "--task", "plasticity", *SHAPE, "--budget", "2600", *words)
    assert not Path("weights").exists()
