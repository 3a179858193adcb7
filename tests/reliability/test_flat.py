"""Promise 11: a long run takes no more memory, files or threads than a short one."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from tests.reliability import Result
from tests.reliability.processes import Command, make_data, train_words, workplace

pytestmark = pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="reads /proc")

MARGIN = 0.02


def usage(pid: int) -> dict[str, int]:
    """Memory of a process that is its own (bytes), its open files and threads."""
    private = 0
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith(("Rss:", "Swap:")):
            private += int(line.split()[1]) * 1024
    return {
        "memory": private,
        "files": len(os.listdir(f"/proc/{pid}/fd")),
        "threads": len(os.listdir(f"/proc/{pid}/task")),
    }


def step_of(out: Path) -> int:
    """The newest step that the run has logged."""
    path = out / "metrics.jsonl"
    lines = path.read_bytes().splitlines() if path.exists() else []
    return int(lines[-1].split(b'"step": ')[1].split(b",")[0]) if lines else 0


def typical(pid: int) -> dict[str, int]:
    """The least of some looks: a checkpoint being written, or a sample drawn, takes room for a moment."""
    looks = []
    for _ in range(20):
        looks.append(usage(pid))
        time.sleep(0.02)
    return {key: min(look[key] for look in looks) for key in looks[0]}


def run_long(folder: Path, model: str, early: int, late: int) -> tuple[dict[str, int], dict[str, int]]:
    """What a run takes after `early` and after `late` steps, both with validations, samples and checkpoints between."""
    data, out = make_data(folder), folder / "weights" / "long"
    command = Command(
        folder, *train_words(data, out, model, late + 10_000, val_every=50, sample_every=100, save_every=100)
    )
    seen = []
    for step in (early, late):
        while command.running() and step_of(out) < step:
            time.sleep(0.05)
        assert command.running(), command.output
        seen.append(typical(command.pid))
    command.send(9)
    command.wait()
    return seen[0], seen[1]


def check_flat(before: dict[str, int], after: dict[str, int]) -> None:
    assert after["memory"] <= (1 + MARGIN) * before["memory"], (before, after)
    assert after["files"] == before["files"] and after["threads"] == before["threads"], (before, after)


def test_memory_stays_flat(tmp_path):
    check_flat(*run_long(tmp_path, "nyx", 200, 800))


def flat(full: bool) -> Result:
    models, late = (("nyx",), 20_000) if full else (("nyx",), 800)
    notes = []
    for model in models:
        with workplace() as folder:
            before, after = run_long(folder, model, 200, late)
        check_flat(before, after)
        notes.append(
            f"{model}: {before['memory'] / 2**20:.1f} MiB, {before['files']} files, {before['threads']} threads after "
            f"200 steps; {after['memory'] / 2**20:.1f} MiB, {after['files']}, {after['threads']} after {late}"
        )
    return Result(11, f"memory, open files and threads after 200 and {late} steps", len(models), len(models), notes)


PARTS = {"flat": flat}
