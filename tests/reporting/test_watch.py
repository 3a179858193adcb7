"""What a run keeps of its model's insides: that it changes nothing of the run, comes once, and never ends one."""

import errno
import os
from dataclasses import replace

import pytest
import torch

from nnx_cli.inference.insides import take_snapshot
from nnx_cli.reporting import watch
from nnx_cli.reporting.watch import Watch
from nnx_cli.runs.run import Run
from nnx_cli.runs.snapshots import read_snapshots, steps_of
from nnx_cli.training import session
from nnx_cli.training.observer import Several, Silent

CASES = [
    ("llama", {"dropout": 0.1}),
    ("nyx", {}),
    ("ngpt", {}),
    ("n4", {"dropout": 0.1}),
    ("neon", {"decoder": "memory"}),
    ("neon", {"decoder": "function", "function_anneal_steps": 5, "function_balance": 0.01}),
    ("neon", {"decoder": "function", "variant": "original"}),
    ("tape", {"dropout": 0.1}),
]
SETTINGS = dict(max_steps=12, val_every=3, save_every=4, batch_size=2, grad_accum=2)


@pytest.fixture(autouse=True)
def there_is_always_time(monkeypatch):
    monkeypatch.setattr(watch, "SHARE", 1e9)


def train(run, trainer, observers, note=pytest.fail, stop_at=None):
    """Train with a watch among the observers; returns the watch."""
    watching = Watch(run.folder, trainer, note)
    observers.observers.append(watching)
    with run.lock():
        trainer.train(run, lambda: stop_at is not None and trainer.state.step >= stop_at)
    return watching


RUNS = [(*case, {}) for case in CASES]
RUNS += [(*case, {"activation_checkpointing": "on"}) for case in (CASES[n] for n in (0, 3, 5, 7))]  # where most is kept


@pytest.mark.parametrize(("name", "fields", "settings"), [*RUNS, ("nyx", {}, {"compile": "graph"})], ids=str)
def test_looking_changes_not_a_bit(start, tmp_path, name, fields, settings):
    settings, ends = SETTINGS | dict(max_steps=8, val_every=2) | settings, []
    for folder in ("plain", "watched"):
        observers = Several()
        run, trainer = start(tmp_path / folder, name, fields, observer=observers, **settings)
        if folder == "watched":
            train(run, trainer, observers)
            assert steps_of(run.folder)[0] == 1 and steps_of(run.folder)[-1] == 8 and len(steps_of(run.folder)) > 3
        else:
            with run.lock():
                trainer.train(run, lambda: False)
        ends.append((run.newest_checkpoint()[0], torch.get_rng_state(), (run.folder / "metrics.jsonl").read_text()))
    (one, random, _), (other, other_random, _) = ends
    for kind in ("model", "optimizer"):
        assert all(torch.equal(value, getattr(other, kind)[key]) for key, value in getattr(one, kind).items())
    assert torch.equal(random, other_random)
    losses = [[line.split('"train_loss": ')[1].split(",")[0] for line in text.splitlines()] for *_, text in ends]
    assert losses[0] == losses[1] and len(losses[0]) > 3


def test_compiled_blocks_run_as_before(start, tmp_path, monkeypatch):
    """Blocks that are compiled are looked into eagerly, and go on with the code that they have."""
    compiled = []

    def count(graph, inputs):
        compiled.append(graph)
        return graph.forward

    observers = Several()
    run, trainer = start(tmp_path / "run", "llama", observer=observers, **SETTINGS)
    for block in trainer.model.blocks:
        block.compile(backend=count, dynamic=False)
    trainer.stepper.execution = type(trainer.stepper.execution)(compiled=True)
    seen = []

    class Count(Silent):
        def step(self, record, progress):
            seen.append(len(compiled))

    observers.observers.append(Count())
    train(run, trainer, observers)
    assert len(steps_of(run.folder)) > 3 and seen[0] > 0
    assert seen[-1] == seen[0]


def test_a_resumed_run_has_every_milestone_once(start, tmp_path):
    settings = SETTINGS | {"max_steps": 40, "val_every": 4}
    observers = Several()
    whole, trainer = start(tmp_path / "whole", observer=observers, **settings)
    train(whole, trainer, observers)
    observers = Several()
    run, trainer = start(tmp_path / "parts", observer=observers, **settings)
    train(run, trainer, observers, stop_at=18)
    stale = run.folder / "insides" / "step-00000019.safetensors"  # written after the last checkpoint, before a crash
    stale.write_bytes(b"half")
    (run.folder / ".tmp-insides-1").write_bytes(b"half")
    observers = Several()
    run = Run(run.folder)
    trainer, _ = session.resume(session.plan_restart(run, {}), observers)
    assert not stale.exists()
    train(run, trainer, observers)
    assert steps_of(run.folder) == steps_of(whole.folder) and not list(run.folder.glob(".tmp-*"))
    one, other = (read_snapshots(each.folder)[0] for each in (whole, run))
    for a, b in zip(one, other, strict=True):
        assert torch.equal(a.norms.values, b.norms.values)
        assert all(map(torch.equal, a.insides.attention, b.insides.attention))


def test_a_run_that_goes_back_drops_what_came_after(start, tmp_path):
    observers = Several()
    run, trainer = start(tmp_path / "run", observer=observers, **SETTINGS)
    train(run, trainer, observers, stop_at=8)
    before = steps_of(run.folder)
    trainer.journal.cut(run, 4)
    assert before[-1] > 4 and steps_of(run.folder) == [step for step in before if step <= 4]


def test_looking_takes_a_small_share_of_the_time(start, tmp_path, monkeypatch):
    monkeypatch.setattr(watch, "SHARE", 0.02)
    now = [1000.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    run, trainer = start(tmp_path / "run")
    watching = Watch(run.folder, trainer, pytest.fail)
    looks = []

    def look(step):
        with watching.budget.timed():
            now[0] += 2
        watching.has_looked = True
        looks.append(step)

    monkeypatch.setattr(watching, "look", look)
    for step in range(1, 1001):
        now[0] += 1
        watching.step({"step": step}, step / 1000)
    assert looks[0] == 1 and looks[-1] == 1000 and 2 * len(looks) <= 0.02 * 1000 + 3 * 2


@pytest.mark.parametrize("why", ["disk", "memory", "own"])
def test_what_goes_wrong_is_said_once_and_ends_nothing(start, tmp_path, monkeypatch, why):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    def fail(*_):
        raise {"memory": torch.OutOfMemoryError("out of memory"), "own": KeyError("mine")}[why]

    observers = Several()
    run, trainer = start(tmp_path / "run", observer=observers, **SETTINGS)
    if why == "disk":
        monkeypatch.setattr("nnx_cli.runs.snapshots.write_tensors", full)
    else:
        monkeypatch.setattr(trainer.model, "insides", fail)
    notes = []
    train(run, trainer, observers, notes.append)
    expected = {"disk": "disk full while writing", "memory": "out of memory", "own": "raised KeyError: 'mine'"}[why]
    assert len(notes) == 1 and notes[0].startswith("not watched: ") and expected in notes[0]
    assert trainer.state.step == 12 and steps_of(run.folder) == [] and trainer.model.training
    assert not [name for name in os.listdir(run.folder) if name.startswith(".tmp")]


def test_the_text_is_the_beginning_of_the_validation_text(start, tmp_path, tokens):
    observers = Several()
    run, trainer = start(tmp_path / "run", observer=observers, **SETTINGS)
    train(run, trainer, observers)
    last = read_snapshots(run.folder)[0][-1]
    text = tokens.tokenizer.decode(tokens.val[:40]).lstrip().encode()[:33].decode(errors="replace")
    assert "".join(last.surprise.columns) == text.rstrip("\ufffd") and last.step == 12
    assert "".join(map(eval, last.tokens[:3])) == text[:3]


@pytest.mark.parametrize(("name", "shown"), [("tape", ["Contribution to the prediction"]), ("nyx", [])])
def test_what_is_worth_it_is_shown_at_once(start, tmp_path, name, shown):
    seen = []
    observers = Several()
    run, trainer = start(tmp_path / "run", name, observer=observers, **SETTINGS)
    observers.observers.append(
        Watch(run.folder, trainer, pytest.fail, lambda step, tokens, panel: seen.append((step, tokens, panel)))
    )
    with run.lock():
        trainer.train(run, lambda: False)
    assert {panel.title for _, _, panel in seen} == set(shown)
    assert [step for step, _, _ in seen] == (steps_of(run.folder) if shown else [])
    assert all(panel.values.shape == (len(panel.rows), len(tokens)) for _, tokens, panel in seen)


def test_blanks_in_front_are_passed_over(tokens):
    for text, expected in (("  \n\t a b", "a b"), ("   ", "   "), ("a", "a"), ("\n" * 600, "\n" * 257), ("é à", "é à")):
        ids = tokens.tokenizer.encode(text + "\n")
        begun = watch._beginning(replace(tokens, val=ids))
        assert tokens.tokenizer.decode(begun) == (expected + "\n")[:257], text
    assert watch._beginning(replace(tokens, val=ids[:0], tokenizer=None)) == tokens.train[:257].tolist()


def test_special_tokens_go_by_their_names(tiny, tokens):
    tokenizer = tokens.tokenizer.with_specials(["<|user|>"])
    special = tokenizer.specials["<|user|>"]
    ids = [special, *tokenizer.encode("hé").tolist(), special]
    snapshot = take_snapshot(tiny(vocab_size=tokenizer.vocab_size), tokenizer, ids, 1)
    assert snapshot.tokens == ["<|user|>", "'h'", r"'\xc3'", r"'\xa9'", "<|user|>"]
    assert list(snapshot.surprise.columns) == ["<|user|>", "h", "é", "<|user|>"]
