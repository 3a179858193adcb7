"""Promise 12: whatever its streams and its screen are, a command says all it has to say, or that it cannot."""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import shutil
import signal
import struct
import subprocess
import sys
import termios
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

import pytest

from nnx_cli.cli import COMMANDS
from tests.reliability import Result
from tests.reliability.processes import Command, Setting, preload
from tests.reliability.scene import HABITS, SHAPE, Tally, check, fresh, pristine, remove, scene
from tests.reliability.test_disk import Mount
from tests.reliability.test_signals import terminal

pytestmark = pytest.mark.skipif(os.name != "posix", reason="processes are forked")

RUN, BYTE, ADAPTED, RIVAL = "weights/run", "data/byte", "weights/adapted", "weights/rival"
TRAIN = ("train", "--data", BYTE, *SHAPE, *HABITS, "--max-steps", 4)
LINES: dict[str, tuple[Any, ...]] = {  # every command; what it makes is called "made"
    "prepare": ("prepare", "words.txt", "--out", "made"),
    "train": (*TRAIN, "--out", "made"),
    "train --dry-run": (*TRAIN, "--dry-run"),
    "sample": ("sample", RUN, "--max-new-tokens", 4, "--greedy"),
    "eval": ("eval", RUN),
    "summarize": ("summarize", RUN),
    "quantize": ("quantize", RUN, "--max-drop", 100, "--out", "made"),
    "merge": ("merge", ADAPTED, "--out", "made"),
    "import": ("import", "foreign/seed.pth", "--model", "nyx", "--out", "made"),
    "export": ("export", RUN, "--format", "html", "--out", "made"),
    "report": ("report", RUN),
    "visualize": ("visualize", RUN, "--prompt", "the"),
    "compare": ("compare", "--runs", RUN, RIVAL, "--device", "cpu"),
    "sweep": (
        *("sweep", "--data", BYTE, *SHAPE, "--set", "batch_size=2,4", "--max-steps", 10, "--out", "made"),
        *("--device", "cpu", "--threads", 1, "--compile", "off"),
    ),
    "list": ("list",),
    "doctor": ("doctor",),
    "bench": ("bench", "--seconds", 0.01, "--batch-size", 1, "--seq-len", 16),
    "help": ("--help",),
    "help of a command": ("quantize", "--help"),
    "version": ("--version",),
}
SOME = ("prepare", "train", "sample", "list", "help")
CONVERSING = {"chat", "serve"}  # end when whoever they talk with does: their own tests try that
assert {words[0] for words in LINES.values()} >= COMMANDS.keys() - CONVERSING


@contextlib.contextmanager
def furnished() -> Iterator[Path]:
    """A scene with all that the lines above read."""
    preload()
    forkserver.ensure_running()  # its socket must not lie in what the scene takes away
    with scene() as folder:
        for name in ("words.txt", BYTE, RUN, "foreign/seed.pth"):
            fresh(name)
        begin = ("train", "--data", BYTE, *HABITS, "--max-steps", 2)
        for words in (("--init-from", RUN, "--lora-rank", 2, "--out", ADAPTED), (*SHAPE, "--seed", 2, "--out", RIVAL)):
            if (pristine() / words[-1]).exists():
                fresh(words[-1])
                continue
            command = Command(folder, *begin, *words)
            assert command.wait() == 0, command.output
            shutil.copytree(words[-1], pristine() / words[-1])
        yield folder


@dataclass(frozen=True)
class Closed:
    """A change to a process: these of its streams were closed before it began."""

    numbers: tuple[int, ...]

    def __call__(self) -> None:
        for number in self.numbers:
            os.close(number)
            setattr(sys, ("stdin", "stdout", "stderr")[number], None)


@dataclass(frozen=True)
class Variable:
    """A change to a process: a variable of its environment."""

    name: str
    value: str

    def __call__(self) -> None:
        os.environ[self.name] = self.value


@dataclass(frozen=True)
class Standing:
    """A change to a process: the folder that it stands in."""

    folder: Path

    def __call__(self) -> None:
        os.chdir(self.folder)


# streams


def check_made(words: tuple[Any, ...]) -> None:
    """What a command that makes something left behind is whole, and can be used."""
    if "made" in words:
        made = Path("made")
        assert made.is_file() or any((made / f"{name}.json").exists() for name in ("config", "meta", "sweep"))
        if words[0] == "train":
            assert b'"finished"' in Path("made", "run.json").read_bytes()
    assert not list(Path().rglob(".tmp-*"))


def full_and_closed(full: bool) -> Result:
    """Standard output or error on a full disk, or closed, for every command."""
    tally = Tally()
    with furnished() as folder:
        for name in LINES if full else SOME:
            words = LINES[name]
            for json in ((), ("--json",)) if full and not name.startswith(("help", "version")) else ((),):
                with tally.case(f"{name} {json} on a full disk"):
                    command = Command(folder, *words, *json, setting=Setting(stdout="/dev/full"))
                    assert command.wait() == 8, command.output
                    said = " ".join(line for line in command.output.splitlines() if line.startswith("nnx: "))
                    complete = "made is complete" if "made" in words else "left on device"
                    assert "cannot write to standard output: No space" in said and said.endswith(complete), said
                    assert "Traceback" not in command.output and "Exception" not in command.output
                    check_made(words)
                remove(Path("made"))
            with tally.case(f"{name} with errors on a full disk"):
                command = Command(folder, *words, setting=Setting(stderr="/dev/full"))
                assert command.wait() == 0 and command.output
                check_made(words)
            remove(Path("made"))
            for numbers in ((0,), (1,), (2,), (0, 1, 2)) if full else ((0, 1, 2),):
                with tally.case(f"{name} without streams {numbers}"):
                    command = Command(folder, *words, setting=Setting(change=Closed(numbers)))
                    assert command.wait() == 0, command.output
                    check_made(words)
                    assert (command.output == "") == (1 in numbers and 2 in numbers) or 1 in numbers, command.output
                remove(Path("made"))
            remove(Path("made"))
    return tally.result(12, "every command with a full disk or nothing behind its streams")


def left_by_its_reader(full: bool) -> Result:
    """Somebody reads the first byte and goes: quiet, and exit 0."""
    tally = Tally()
    with furnished() as folder:
        for name in LINES if full else SOME:
            for json in ((), ("--json",)) if full and not name.startswith(("help", "version")) else ((),):
                with tally.case(f"{name} {json}"):
                    pipe = folder / "pipe"
                    os.mkfifo(pipe)
                    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
                    command = Command(folder, *LINES[name], *json, setting=Setting(stdout=str(pipe)))
                    until = time.monotonic() + 100
                    os.set_blocking(reader, True)
                    while command.running() and time.monotonic() < until and not os.read(reader, 1):
                        time.sleep(0.01)
                    os.close(reader)
                    pipe.unlink()
                    assert command.wait() == 0, command.output
                    assert "Traceback" not in command.output and "Exception" not in command.output, command.output
                    check_made(LINES[name])
                remove(Path("made"))
    return tally.result(12, "every command with a reader that leaves")


# screens


TOLD = {  # words that stand in what a command shows, whatever the screen
    "list": ["run", "adapted"],
    "summarize": ["embedding", "ffn_out", "head", "parameters"],
    "train --dry-run": ["batch_size", "warmup_steps", "schedule", "derived"],
    "help": list(COMMANDS),
    "help of a command": ["--max-drop", "--group-size", "--keep", "Bits", "--json"],
    "doctor": ["Python", "torch"],
    "eval": ["perplexity"],
    "version": ["nnx"],
}


def screens(full: bool) -> Result:
    """A terminal of every width, and every value of COLUMNS that is none."""
    tally = Tally()
    with furnished() as folder:
        for name in TOLD if full else ("list", "help", "summarize"):
            for columns in (0, 1, 2, 5, 20, 39, 80, 500) if full else (0, 5):
                with tally.case(f"{name} on a terminal of {columns} columns"), terminal() as (master, path, shown):
                    fcntl.ioctl(master, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
                    command = Command(
                        folder, *LINES[name], setting=Setting(terminal=path, change=Variable("TERM", "xterm"))
                    )
                    assert command.wait() == 0
                    time.sleep(0.1)
                    check_told(name, b"".join(shown).decode(errors="replace"))
            for value in ("0", "1", "-5", "abc", "", "9" * 30, "²", "7", "100000") if full else ("0", "abc"):
                with tally.case(f"{name} with COLUMNS={value}"):
                    command = Command(folder, *LINES[name], setting=Setting(change=Variable("COLUMNS", value)))
                    assert command.wait() == 0, command.output
                    check_told(name, command.output)
    return tally.result(12, "screens of every width")


def check_told(name: str, shown: str) -> None:
    words = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown)
    missing = [word for word in TOLD[name] if word not in words]
    assert not missing and "Traceback" not in words, (missing, words[-2000:])


# from the start


def interrupted_early(full: bool) -> Result:
    """A signal so many milliseconds after a real process was started: none of our lines in a traceback, exit 130."""
    tally, ends = Tally(), Counter()
    moments = [*range(0, 200, 2), *range(200, 1600, 40)] if full else [*range(20, 200, 20), 500, 1000]
    with furnished():
        for number in (signal.SIGINT, signal.SIGTERM):
            for moment in moments:
                with tally.case(f"{number.name} after {moment} ms"):
                    ends[signalled(number, moment / 1000)] += 1
                remove(Path("made"))
    result = tally.result(12, "a signal in the first seconds of a process")
    return replace(result, notes=[*result.notes, f"exit codes: {dict(ends)}"])


def signalled(number: int, seconds: float) -> int:
    """The exit code of a process that makes a token folder and is told to stop after so long; nothing is half made."""
    words = [sys.executable, "-m", "nnx_cli", "prepare", "words.txt", "--tokenizer", "char", "--out", "made"]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        time.sleep(seconds)
        process.send_signal(number)
        _, said = process.communicate(timeout=100)
    assert b"nnx_cli" not in said or b"Traceback" not in said, said
    pythons_own = process.returncode == 1 and (b"Fatal Python" in said or b"Could not import runpy" in said)
    assert process.returncode in (0, 130, -number) or pythons_own, said
    assert not list(Path().glob(".tmp-*"))
    assert Path("made").exists() <= Path("made", "meta.json").exists()
    return process.returncode


# a folder that cannot be written to


def read_only(full: bool) -> Result:
    """Every command where nothing may be written: it works, elsewhere if need be, or ends with exit 8 and says how."""
    tally = Tally()
    with furnished() as folder, Mount(folder / "small", "64m") as small:
        if not small.made:
            pytest.skip("mounting needs root")
        for name in ("words.txt", "data", "weights", "foreign"):
            here, there = folder / name, small.folder / name
            shutil.copytree(here, there) if here.is_dir() else shutil.copyfile(here, there)
        subprocess.run(["mount", "-o", "remount,ro", str(small.folder)], check=True)
        for name in LINES if full else ("train", "list", "prepare"):
            words = [str(folder / "made") if word == "made" else word for word in LINES[name]]
            with tally.case(f"{name}, what it makes elsewhere"):
                assert run_in(small.folder, folder, *words) == (7 if name == "doctor" else 0)  # which says so
                check_made(tuple(LINES[name]))
            remove(Path("made"))
            if "made" in LINES[name]:
                with tally.case(f"{name}, what it makes here"):
                    assert run_in(small.folder, folder, *LINES[name]) == 8
        text = ("train", "--filepath", "words.txt", *SHAPE, *HABITS, "--max-steps", 2)
        with tally.case("text without a place to prepare it"):
            assert run_in(small.folder, folder, *text) == 8
        with tally.case("text that is prepared beside the run"):
            out = folder / "elsewhere" / "run"
            assert run_in(small.folder, folder, *text, "--out", out) == 0
            assert run_in(small.folder, folder, "eval", out) == 0
            assert run_in(small.folder, folder, "train", "--resume", out, "--max-steps", 4) == 0
            assert len(list((folder / "elsewhere" / "data").iterdir())) == 1
    return tally.result(12, "a folder that cannot be written to")


def run_in(place: Path, logs: Path, *words: Any) -> int:
    """The exit code of a command in another folder; one line says what was wrong."""
    command = Command(logs, *words, setting=Setting(change=Standing(place)))
    code = command.wait()
    assert (command.output.count("nnx: ") == 1) == (code != 0) and "Traceback" not in command.output, command.output
    return code


PARTS = {
    "streams-full": full_and_closed,
    "streams-left": left_by_its_reader,
    "screens": screens,
    "signal-start": interrupted_early,
    "read-only": read_only,
}


@pytest.mark.parametrize("name", PARTS)
def test_streams(name):
    check(PARTS[name](False))
