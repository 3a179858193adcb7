"""Promise 4: one process at a time has a run folder."""

from __future__ import annotations

import os
import re
import signal
from pathlib import Path

import pytest

from tests.reliability import Result
from tests.reliability.processes import Command, Setting, assert_same, make_data, outcome, train_words, workplace

pytestmark = pytest.mark.skipif(os.name != "posix", reason="signals are those of POSIX")

STEPS = 60


def refused_and_taken_over(folder: Path) -> None:
    """A second process is refused by name of the first, changes nothing, and takes over when the first is killed."""
    data, out = make_data(folder), folder / "weights" / "run"
    whole = Command(folder, *train_words(data, "weights/whole", steps=STEPS))
    assert whole.wait() == 0, whole.output
    first = Command(folder, *train_words(data, out, steps=STEPS), setting=Setting(pause=("saving", 3)))
    assert first.pauses(), first.output
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    second = Command(folder, "train", "--resume", out)
    assert second.wait() == 8, second.output
    assert re.search(rf"nnx: .* in use by process {first.pid}\b", second.output), second.output
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before
    first.send(signal.SIGKILL)
    assert first.wait() == -signal.SIGKILL
    assert (out / "lock").read_text() == str(first.pid), "it had no time to clear its name"
    third = Command(folder, "train", "--resume", out)
    assert third.wait() == 0, third.output
    assert_same(outcome(out), outcome(folder / "weights" / "whole"), "after a takeover")


def race(folder: Path, n: int, rounds: int) -> None:
    """Several processes want one run at once: to make it, then to resume it. One gets it, the others exit with 8."""
    data = make_data(folder)
    for number in range(rounds):
        out = folder / "weights" / f"race-{number}"
        makers = [Command(folder, *train_words(data, out, steps=20)) for _ in range(n)]
        codes = sorted(command.wait() for command in makers)
        assert codes == [0] + [8] * (n - 1), [command.output for command in makers]
        refused = [command.output for command in makers if command.process.exitcode == 8]
        assert all("exists already" in text and "Traceback" not in text for text in refused), refused
        assert not list((folder / "weights").glob(".*"))
        longer = ["train", "--resume", out, "--max-steps", 20_000]
        resumers = [Command(folder, *longer) for _ in range(n)]
        refused = []
        while len(refused) < n - 1:
            refused = [command for command in resumers if not command.running()]
            assert len(refused) < n, [command.output for command in resumers]
        [winner] = [command for command in resumers if command not in refused]
        winner.wait_for("stepping")
        assert {command.wait() for command in refused} == {8}, [command.output for command in refused]
        assert all(f"in use by process {winner.pid}" in command.output for command in refused)
        winner.send(signal.SIGTERM)
        assert winner.wait() == 130, winner.output


def unnamed(folder: Path, n: int) -> None:
    """Several processes begin runs of their own on one text at once: each gets a folder, the tokens are shared."""
    make_data(folder)
    words = [str(word) for word in train_words(Path("x"), Path("y"), steps=8)]
    for option in ("--data", "--out"):
        del words[words.index(option) : words.index(option) + 2]
    commands = [Command(folder, *words, "--filepath", "words.txt") for _ in range(n)]
    assert [command.wait() for command in commands] == [0] * n, [command.output for command in commands]
    names = [f"nyx-words-{number}" for number in range(2, n + 1)]
    assert sorted(path.name for path in (folder / "weights").iterdir()) == ["nyx-words", *names]
    assert len(list((folder / "data").iterdir())) == 2


def test_runs_without_a_name(tmp_path):
    unnamed(tmp_path, 3)


def test_the_second_process_is_refused(tmp_path):
    refused_and_taken_over(tmp_path)


def test_a_race(tmp_path):
    race(tmp_path, n=4, rounds=1)


def takeover(full: bool) -> Result:
    rounds = 10 if full else 1
    for _ in range(rounds):
        with workplace() as folder:
            refused_and_taken_over(folder)
    return Result(4, "a second process while the first lives, and after it was killed", rounds, rounds)


def races(full: bool) -> Result:
    n, rounds = (8, 25) if full else (4, 1)
    with workplace() as folder:
        race(folder, n, rounds)
    with workplace() as folder:
        unnamed(folder, n)
    return Result(
        4, f"{n} processes make one run at once, and {n} resume it, or begin one each", 2 * rounds + 1, 2 * rounds + 1
    )


PARTS = {"lock-takeover": takeover, "lock-race": races}
