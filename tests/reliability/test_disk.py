"""Promise 2: a disk that is full, or fails, costs no checkpoint that was there."""

from __future__ import annotations

import errno
import itertools
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nnx_cli.errors import OutputError
from nnx_cli.runs.checkpoint import load_checkpoint, steps_in
from nnx_cli.runs.load import ModelRef
from nnx_cli.runs.run import Run
from nnx_cli.system import files
from nnx_cli.training import session
from tests.reliability import Result
from tests.reliability.faults import watched
from tests.reliability.processes import (
    Command,
    Setting,
    Watching,
    assert_same,
    make_data,
    outcome,
    start_small,
    train_words,
    workplace,
)

HABITS = dict(max_steps=4, val_every=2, save_every=2, sample_every=3)


def check_intact(run: Path, least: int) -> None:
    """Every checkpoint is whole, one of them is at least of step `least`, and the best weights can be read."""
    steps = steps_in(run / "checkpoints")
    for step in steps:
        load_checkpoint(run / "checkpoints", step)
    assert steps and steps[-1] >= least, steps
    ModelRef(run).weights()
    assert not list(run.rglob(".tmp-*")), list(run.rglob(".*"))


def train_failing(folder: Path, data: Path, number: int, lasting: bool, code: int) -> tuple[int, str]:
    """Train while the n-th call that changes the disk fails with that error, and all later ones with `lasting`; check
    what is left, and go on; returns how many calls there were and how it ended."""
    out, calls, saved = folder / f"run-{number}-{lasting}-{code}", 0, [0]

    def ask(name: str, do: Callable[[], Any], half: Callable[[], None] | None) -> Any:
        nonlocal calls
        calls += 1
        if calls == number or (lasting and calls > number and name not in ("unlink", "rmdir", "truncate")):
            if half:
                half()
            raise OSError(code, os.strerror(code))
        return do()

    watching = Watching()
    watching.saved = saved.append
    run, trainer = start_small(data, out, watching, **HABITS)
    try:
        with run.lock(), watched(ask):
            ended = trainer.train(run, lambda: False)
    except OutputError as error:
        ended = "refused"
        assert "the newest checkpoint is of step" in str(error) and str(out) in error.fix
    check_intact(out, saved[-1])
    if calls >= number and ended == "finished":
        assert lasting or len(watching.notes) <= 2, watching.notes
    again = session.resume(session.plan_restart(Run(out), {}), Watching())[0]
    with run.lock():
        assert again.train(run, lambda: False) == "finished"
    run.set_status(status="finished")
    return calls, ended


def fail_every_call(folder: Path, lasting: bool, code: int, every: int = 1) -> dict[str, int]:
    """Let every call in turn fail; returns how many runs finished and how many were refused."""
    data = make_data(folder)
    ends = {"finished": 0, "refused": 0}
    run, trainer = start_small(data, folder / "whole", Watching(), **HABITS)
    with run.lock():
        trainer.train(run, lambda: False)
    run.set_status(status="finished")
    wanted = outcome(run.folder)
    for number in itertools.count(1, every):
        calls, ended = train_failing(folder, data, number, lasting, code)
        out = folder / f"run-{number}-{lasting}-{code}"
        assert_same(outcome(out), wanted, f"call {number} failed")
        shutil.rmtree(out)
        if calls < number:
            assert calls > 80, "there is more to write than that"
            return ends
        ends[ended] += 1


@pytest.mark.parametrize(("lasting", "code"), [(False, errno.EIO), (True, errno.ENOSPC)])
def test_every_failing_call(tmp_path, lasting, code):
    ends = fail_every_call(tmp_path, lasting, code, every=9)
    assert ends["finished" if not lasting else "refused"] > 0


def test_free_space_is_checked_before_a_save(tmp_path, monkeypatch):
    data = make_data(tmp_path)
    run, trainer = start_small(data, tmp_path / "run", Watching(), **HABITS)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(files.shutil, "disk_usage", lambda path: usage._replace(free=300_000))
    with run.lock(), pytest.raises(OutputError, match=r"disk full: .* needs .* MiB more, 0\.3 MiB are free"):
        trainer.train(run, lambda: False)
    assert any("training goes on" in note for note in trainer.observer.notes)
    check_intact(run.folder, 0)
    with pytest.raises(OutputError, match="disk full"):
        start_small(data, tmp_path / "other", Watching(), **HABITS)
    assert not (tmp_path / "other").exists() and not list(tmp_path.glob(".tmp-*"))


def limited_file_size(folder: Path) -> int:
    """A real process that may write no file larger than so many bytes, for several sizes; then resume it without the
    limit. Returns how many sizes."""
    data = make_data(folder)
    limits = (1_000, 90_000, 150_000)
    for number, limit in enumerate(limits):
        out = folder / "weights" / f"limited-{number}"
        begin = Command(folder, *train_words(data, out, steps=20, optimizer="adamw"), setting=Setting(file_limit=limit))
        assert begin.wait() == 8 and "disk full" in begin.output and "Traceback" not in begin.output, begin.output
        assert not list((folder / "weights").glob(".*"))
        if out.exists():
            check_intact(out, 0)
        else:
            command = Command(folder, *train_words(data, out, steps=20, max_steps=3, optimizer="adamw"))
            assert command.wait() == 0, command.output
        longer = ["train", "--resume", out, "--max-steps", 20]
        limited = Command(folder, *longer, setting=Setting(file_limit=limit))
        assert limited.wait() == 8 and "Traceback" not in limited.output, limited.output
        check_intact(out, 0)
        last = Command(folder, *longer)
        assert last.wait() == 0, last.output
    return len(limits)


@pytest.mark.skipif(os.name != "posix", reason="limits of file sizes are those of POSIX")
def test_a_process_that_may_write_no_large_file(tmp_path):
    assert limited_file_size(tmp_path) == 3


class Mount:
    """A small file system in memory; `made` is false where this user may not mount one."""

    def __init__(self, folder: Path, size: str) -> None:
        self.folder = folder
        folder.mkdir()
        call = ["mount", "-t", "tmpfs", "-o", f"size={size}", "nnx-test", str(folder)]
        self.made = bool(shutil.which("mount")) and subprocess.run(call, capture_output=True).returncode == 0

    def __enter__(self) -> Mount:
        return self

    def __exit__(self, *_: object) -> None:
        if self.made:
            subprocess.run(["umount", "-l", str(self.folder)], check=True)


def fill(folder: Path, leave: int) -> Path:
    """Leave no more than that many bytes of a small file system free."""
    ballast = folder / "ballast"
    with open(ballast, "wb") as file:
        file.write(bytes(max(0, shutil.disk_usage(folder).free - leave)))
    return ballast


def full_file_system(folder: Path, leaves: tuple[int, ...]) -> int:
    """Real processes on a file system that fills up before the start, or while they train; returns how many."""
    data = make_data(folder)
    for number, leave in enumerate(leaves):
        with Mount(folder / f"small-{number}", "8m") as small:
            if not small.made:
                pytest.skip("mounting needs root")
            out = small.folder / "run"
            words = train_words(data, out, steps=100, save_every=5)
            command = Command(folder, *words, setting=Setting(pause=("evaluating", 4)))
            assert command.pauses(), command.output
            ballast = fill(small.folder, leave)
            command.go_on()
            assert command.wait() == 8, command.output
            assert "training goes on" in command.output and "the newest checkpoint is of step" in command.output
            check_intact(out, 0)
            early = Command(folder, "train", "--resume", out)
            assert early.wait() == 8 and "disk full" in early.output, early.output
            check_intact(out, 0)
            ballast.unlink()
            again = Command(folder, "train", "--resume", out)
            assert again.wait() == 0, again.output
            full = outcome(out)
            roomy = Command(folder, *train_words(data, f"weights/roomy-{number}", steps=100, save_every=5))
            assert roomy.wait() == 0, roomy.output
            assert_same(full, outcome(folder / f"weights/roomy-{number}"), "after a full disk")
            fill(small.folder, leave)
            refused = Command(folder, *train_words(data, small.folder / "new", steps=5))
            assert refused.wait() == 8 and "disk full" in refused.output, refused.output
            assert sorted(path.name for path in small.folder.iterdir()) == ["ballast", "run"]
    return len(leaves)


@pytest.mark.skipif(os.name != "posix", reason="mounts are those of POSIX")
def test_a_file_system_that_is_full(tmp_path):
    assert full_file_system(tmp_path, (10_000,)) == 1


def every_call(full: bool) -> Result:
    kinds = [(False, errno.EIO), (True, errno.ENOSPC)] + [(False, errno.ENOSPC), (True, errno.EIO)] * full
    ends = {"finished": 0, "refused": 0}
    for lasting, code in kinds:
        with workplace() as folder:
            for end, count in fail_every_call(folder, lasting, code, every=1 if full else 9).items():
                ends[end] += count
    times = sum(ends.values())
    return Result(
        2,
        "an error at each open, write, fsync, rename, mkdir and unlink of a run",
        times,
        times,
        [f"{ends['finished']} runs went on to the end, {ends['refused']} ended with exit 8; all were resumed"],
    )


def limited(full: bool) -> Result:
    with workplace() as folder:
        times = limited_file_size(folder)
    return Result(2, "a real process under RLIMIT_FSIZE", times, times)


def mounted(full: bool) -> Result:
    leaves = (0, 4096, 10_000, 50_000, 200_000, 600_000, 1_000_000) if full else (10_000,)
    with workplace() as folder:
        times = full_file_system(folder, leaves)
    return Result(2, "a real process on a tmpfs of 8 MB that fills up", times, times)


PARTS = {"disk-every-call": every_call, "disk-limit": limited, "disk-tmpfs": mounted}
