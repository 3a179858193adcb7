"""Snapshots of a model's insides: what a file keeps, how many there are, and files that are not whole."""

import errno
import json
import os
from itertools import pairwise

import pytest
import torch
from safetensors.torch import save_file

from nnx_cli.errors import OutputError
from nnx_cli.inference.insides import take_snapshot
from nnx_cli.layers.insides import Insides, Panel
from nnx_cli.runs import snapshots
from nnx_cli.runs.snapshots import MOST_BYTES, MOST_FILES, Snapshot, cut_snapshots, read_snapshots, save_snapshot

NAMES = {
    "llama": {},
    "nyx": {},
    "ngpt": {},
    "n4": {},
    "neon": {"decoder": "memory"},
    "tape": {},
}


def small(step=5, **changed):
    """A snapshot of two layers of two heads."""
    attention = torch.rand(2, 2, 3, 3, generator=torch.Generator().manual_seed(2)).softmax(-1)
    panels = [
        Panel("Gate", "About it.", torch.tensor([[0.5, -1.0, float("nan")]]), ["layer 1"], "signed"),
        Panel("Chosen", "About it.", torch.tensor([[3, 1, 70_000]]), ["layer 1"], "choice"),
        Panel("Steps", "About it.", torch.tensor([[1e9]]), ["layer 1"], "number", ["all"]),
    ]
    parts = {
        "step": step,
        "tokens": ["'a'", "' \ud800'", "</script>"],
        "insides": Insides(list(attention), ["layer 1", "layer 2"], panels, "About maps."),
        "norms": Panel("Norms", "About it.", torch.ones(2, 2), ["layer 1", "layer 2"], "number", ["weights", "states"]),
        "surprise": Panel(
            "Surprise", "About it.", torch.tensor([[float("nan"), 2.0]]), ["nats"], "share", ["a", "\x1b"]
        ),
    }
    return Snapshot(**(parts | changed))


def same(one, other):
    return (one.title, one.about, one.kind, list(one.rows), one.columns) == (
        other.title,
        other.about,
        other.kind,
        list(other.rows),
        other.columns,
    ) and torch.allclose(one.values.float(), other.values.float(), atol=1e-3, rtol=1e-3, equal_nan=True)


def test_what_is_saved_is_read(tmp_path):
    kept = small()
    save_snapshot(tmp_path, kept)
    (found,), damaged = read_snapshots(tmp_path)
    assert damaged == [] and found.step == 5 and list(found.tokens) == kept.tokens
    assert found.insides.layers == ["layer 1", "layer 2"] and found.insides.about == "About maps."
    assert all(
        torch.allclose(a, b, atol=1e-3) for a, b in zip(found.insides.attention, kept.insides.attention, strict=True)
    )
    assert all(map(same, found.insides.panels, kept.insides.panels)) and len(found.insides.panels) == 3
    assert same(found.norms, kept.norms) and same(found.surprise, kept.surprise)
    assert os.listdir(tmp_path) == ["insides"] and os.listdir(tmp_path / "insides") == ["step-00000005.safetensors"]


@pytest.mark.parametrize("name", NAMES)
def test_every_architecture_has_a_snapshot(tiny, tmp_path, name):
    model = tiny(name, **NAMES[name])
    save_snapshot(tmp_path, take_snapshot(model, None, [5, 9, 2, 2, 60, 17, 33] * 6, 3))
    (found,), damaged = read_snapshots(tmp_path)
    assert damaged == [] and len(found.tokens) == 32 and len(found.insides.attention) == len(model.blocks)
    assert found.norms.values.isfinite().all() and (found.norms.values > 0).all()
    assert len(found.surprise.columns) == 33 and found.surprise.values[0, 0].isnan()  # nothing comes before the first
    losses = found.surprise.values[0, 1:]
    assert 2 < losses.mean() < 7 and losses.min() >= 0  # about ln 64


@pytest.mark.parametrize(("layers", "heads", "tokens", "memories"), [(96, 64, 32, (64, 512)), (1, 1, 32, (4000, 9000))])
def test_files_stay_small(tmp_path, layers, heads, tokens, memories):
    attention = [torch.rand(heads, tokens, tokens)] * layers
    rows, columns = memories
    names = [f"layer {n + 1}" for n in range(layers)]
    memory = Panel("Memories", "About it.", torch.randn(memories), ["r"] * rows, "signed", ["c"] * columns)
    save_snapshot(tmp_path, small(tokens=["t"] * tokens, insides=Insides(attention, names, [memory])))
    assert (tmp_path / "insides" / "step-00000005.safetensors").stat().st_size <= MOST_BYTES
    (found,), damaged = read_snapshots(tmp_path)
    assert damaged == [] and len(found.insides.attention) >= 1 and names[0] == found.insides.layers[0]
    kept = found.insides.panels[0]
    assert kept.values.shape == (min(rows, 128), 128) and f"of {rows} x {columns} values" in kept.about


def test_a_description_that_fills_a_file_leaves_no_room_for_more(tmp_path):
    long = [Panel("x" * 10_000, "y" * 10_000, torch.ones(1, 3), ["r"]) for _ in range(90)]
    save_snapshot(tmp_path, small(insides=Insides([torch.ones(1, 3, 3)], ["layer 1"], long)))
    (found,), damaged = read_snapshots(tmp_path)
    assert damaged == [] and 0 < len(found.insides.panels) < 90
    assert (tmp_path / "insides" / "step-00000005.safetensors").stat().st_size <= MOST_BYTES


def test_a_model_that_diverges_is_kept_without_what_is_no_number(tmp_path):
    maps = torch.full((1, 3, 3), float("nan"))
    panel = Panel("Gate", "About it.", torch.tensor([[float("inf"), 1e30, float("nan")]]), ["layer 1"], "signed")
    save_snapshot(tmp_path, small(insides=Insides([maps], ["layer 1"], [panel])))
    (found,), damaged = read_snapshots(tmp_path)
    assert damaged == [] and found.insides.panels[0].values.isnan().tolist() == [[True, False, True]]


def test_of_many_the_first_the_last_and_an_even_choice_stay(tmp_path):
    for step in [*range(1, 11), *range(100, 3000, 100)]:
        save_snapshot(tmp_path, small(step))
        assert len(snapshots.steps_of(tmp_path)) <= MOST_FILES
    steps = snapshots.steps_of(tmp_path)
    assert steps[0] == 1 and steps[-1] == 2900 and len(steps) == MOST_FILES
    assert max(b - a for a, b in pairwise(steps)) <= 400


def test_a_step_that_comes_again_takes_the_place_of_the_old_one(tmp_path):
    for about in ("one", "two"):
        save_snapshot(tmp_path, small(insides=Insides([], [], [], about)))
    assert [each.insides.about for each in read_snapshots(tmp_path)[0]] == ["two"]


def test_what_comes_after_a_step_can_be_dropped(tmp_path):
    for step in (1, 20, 300):
        save_snapshot(tmp_path, small(step))
    cut_snapshots(tmp_path, 20)
    assert snapshots.steps_of(tmp_path) == [1, 20]
    cut_snapshots(tmp_path / "nowhere", 20)


def test_a_full_disk_leaves_no_trace(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OutputError, match="disk full"):
        save_snapshot(tmp_path, small())
    assert [path.name for path in tmp_path.rglob("*")] == ["insides"]


def described(**changed):
    words = {"title": "t", "about": "a", "kind": "number", "rows": ["r"], "columns": ["c"]}
    return {"format": 1, "step": 5, "tokens": ["a"], "about": "", "layers": [], "panels": [words, words]} | changed


WORDS = described()["panels"][0]


@pytest.mark.parametrize(
    "changed",
    [
        {"format": 2},
        {"step": 6},
        {"tokens": "a"},
        {"tokens": [3]},
        {"layers": ["layer 1"]},
        {"panels": []},
        {"panels": [WORDS]},
        {"panels": [WORDS, WORDS | {"kind": "script"}]},
        {"panels": [WORDS, WORDS | {"kind": []}]},
        {"panels": [WORDS, WORDS | {"kind": "choice"}]},
        {"panels": [WORDS, WORDS | {"rows": ["r", "s"]}]},
        {"panels": [WORDS, WORDS | {"columns": None}]},
        {"tokens": ["a", "b"], "panels": [WORDS, WORDS, WORDS | {"columns": None}]},
        {"panels": [WORDS, {"title": "t"}]},
        {"panels": "no"},
    ],
)
def test_files_of_another_kind_are_damaged(tmp_path, changed):
    (tmp_path / "insides").mkdir()
    tensors = {"panel.0": torch.ones(1, 1), "panel.1": torch.ones(1, 1)}
    path = tmp_path / "insides" / "step-00000005.safetensors"
    save_file(tensors, path, {"insides": json.dumps(described())})
    assert [each.step for each in read_snapshots(tmp_path)[0]] == [5]
    save_file(tensors, path, {"insides": json.dumps(described(**changed))})
    found, (damaged,) = read_snapshots(tmp_path)
    assert found == [] and "is damaged" in damaged


def test_panels_without_values_are_not_kept(tmp_path):
    for step, shape in enumerate([(0, 3), (1, 0), (0, 0)], start=1):
        rows, columns = (["x"] * n for n in shape)
        panels = [Panel("None", "Nothing.", torch.ones(shape), rows, "number", columns)]
        save_snapshot(tmp_path, small(step, insides=Insides([torch.ones(1, 3, 3)], ["layer 1"], panels)))
    found, damaged = read_snapshots(tmp_path)
    assert damaged == [] and [each.insides.panels for each in found] == [[], [], []]
    path = tmp_path / "insides" / "step-00000005.safetensors"
    empty = WORDS | {"rows": [], "columns": []}
    tensors = {"panel.0": torch.ones(0, 0), "panel.1": torch.ones(1, 1), "panel.2": torch.ones(1, 1)}
    save_file(tensors, path, {"insides": json.dumps(described(panels=[empty, WORDS, WORDS]))})
    assert len(read_snapshots(tmp_path)[1]) == 1


@pytest.mark.parametrize("content", [b"", b"\0" * 100, b"x" * 3_000_000, (2**62).to_bytes(8, "little") + b"{}"])
def test_garbage_is_left_out_and_said(tmp_path, content):
    save_snapshot(tmp_path, small(4))
    (tmp_path / "insides" / "step-00000005.safetensors").write_bytes(content)
    (tmp_path / "insides" / "step-x.safetensors").write_bytes(b"not ours")
    found, damaged = read_snapshots(tmp_path)
    assert [each.step for each in found] == [4] and len(damaged) == 1


def test_half_a_file_is_left_out(tmp_path):
    save_snapshot(tmp_path, small())
    path = tmp_path / "insides" / "step-00000005.safetensors"
    whole = path.read_bytes()
    for n in range(0, len(whole), 97):
        path.write_bytes(whole[:n])
        found, damaged = read_snapshots(tmp_path)
        assert found == [] and len(damaged) == 1


@pytest.mark.skipif(os.name == "nt", reason="links need rights there")
def test_links_are_not_followed(tmp_path):
    (tmp_path / "other").mkdir()
    save_snapshot(tmp_path / "other", small())
    run = tmp_path / "run"
    run.mkdir()
    (run / "insides").symlink_to(tmp_path / "other" / "insides")
    assert read_snapshots(run) == ([], [])
    cut_snapshots(run, 0)
    assert snapshots.steps_of(tmp_path / "other") == [5]
    (run / "insides").unlink()
    (run / "insides").mkdir()
    (run / "insides" / "step-00000005.safetensors").symlink_to(tmp_path / "other/insides/step-00000005.safetensors")
    assert read_snapshots(run)[0] == []
