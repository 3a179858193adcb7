"""The process of a tracker: it reads the logs of a run as they grow, and hands them on.

It is begun by `_process`, which closes its standard input when the run has ended, says on standard output how far it
is, a JSON object a line, and changes nothing of the run. Whatever the tracker does, the run does not notice.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import secrets
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from nnx_cli.runs.logs import parse_line
from nnx_cli.system.files import read_json, replace_file, to_json
from nnx_cli.trackers._tracker import TrackedRun, Tracker, scalars_of, settings_of

LOOK_SECONDS = 1.0
END_SECONDS = 45.0  # that a tracker has left when nobody waits for it any more
BEAT = 100  # lines, after which it says that it is alive
NICER = 10  # than the run
FIGURES_SPACING = 1.5  # figures are sent when the run is so many times as old as it was the last time
FIGURES_SECONDS = 60.0
EXIT_CODES = {"finished": 0, "diverged": 6, "interrupted": 130}  # of nnx train, by how the run stands
Say = Callable[..., None]


class Log:
    """A log that grows. Where its end was cut off, as a run that goes back does, the lines after that are new again."""

    def __init__(self, path: Path, told: int) -> None:
        self.path = path
        self.last_step = told  # of the lines that were told, now or by a process before this one
        self.lines: list[tuple[int, int]] = []  # a hash and the step of each
        self.offset = 0
        self.file = -1

    def look(self) -> tuple[int | None, list[dict[str, Any]]]:
        """The lines that came since the last look, and where lines that were told before are gone the last step of
        those that are left."""
        lines, goes_on = self._read()
        found = [(hash(line), record) for line in lines if (record := parse_line(line)) is not None]
        kept, cut = len(self.lines), None
        if not goes_on:
            pairs = enumerate(zip(found, self.lines, strict=False))
            kept = next((n for n, ((key, _), (old, _)) in pairs if key != old), min(len(found), len(self.lines)))
            found = found[kept:]
        if kept < len(self.lines):
            cut = self.last_step = self.lines[kept - 1][1] if kept else 0
        self.lines[kept:] = [(key, record["step"]) for key, record in found]
        new = [record for _, record in found if record["step"] > self.last_step]
        self.last_step = max([self.last_step, *(record["step"] for record in new)])
        return cut, new

    def _read(self) -> tuple[list[bytes], bool]:
        """Whole lines from where the last look ended, or, where this is not the file of that look, all of them."""
        try:
            with open(self.path, "rb") as file:
                status = os.fstat(file.fileno())
                goes_on = status.st_ino == self.file and status.st_size >= self.offset
                begin = file.seek(self.offset if goes_on else 0)
                data = file.read()
        except FileNotFoundError:
            return [], True
        whole = data[: data.rfind(b"\n") + 1]
        self.file, self.offset = status.st_ino, begin + len(whole)
        return whole.splitlines(keepends=True), goes_on


class Follower:
    """Hands what a run writes to a tracker, from `begin` on, the step where the run goes on, or from its first step
    where the tracker is new to it."""

    def __init__(self, folder: Path, name: str, begin: int, say: Say) -> None:
        self.folder = folder
        self.say = say
        self.kept = folder / "trackers" / f"{name}.json"
        state = read_json(self.kept) if self.kept.is_file() else {}
        self.id = str(state.get("id") or secrets.token_hex(4))
        told = int(state.get("metrics", -1)), int(state.get("samples", -1))
        self.metrics = Log(folder / "metrics.jsonl", min(told[0], begin))
        self.samples = Log(folder / "samples.jsonl", min(told[1], begin))
        self.config = read_json(folder / "config.json")
        self.begun = time.monotonic()
        self.figures_at = 0.0  # seconds after the beginning
        self.figures_of = -1  # when the page was written that they are of

    @property
    def run(self) -> TrackedRun:
        """The run, as trackers see it."""
        return TrackedRun(self.folder.resolve().name, self.folder, self.id, settings_of(self.config))

    def save(self) -> None:
        """Remember how far it is, for a process that goes on."""
        self.kept.parent.mkdir(exist_ok=True)
        told = {"id": self.id, "metrics": self.metrics.last_step, "samples": self.samples.last_step}
        replace_file(self.kept, to_json(told))

    def tell(self, tracker: Tracker) -> bool:
        """Hand on what is new. Returns whether anything was."""
        cut, records = self.metrics.look()
        if cut is not None:
            tracker.rewind(cut)
        epoch_tokens = (self.config.get("data") or {}).get("train_tokens")
        for number, record in enumerate(records):
            tracker.scalars(record["step"], scalars_of(record, epoch_tokens))
            if number % BEAT == BEAT - 1:  # a tracker that is new to a long run has much to be told
                self.say(step=record["step"])
        _, samples = self.samples.look()
        for sample in samples:
            tracker.sample(sample["step"], str(sample.get("prompt", "")), str(sample.get("text", "")))
        age = time.monotonic() - self.begun
        if samples and age >= max(FIGURES_SECONDS, FIGURES_SPACING * self.figures_at):
            self.tell_figures(tracker)
            self.figures_at = age
        return bool(records or samples)

    def tell_figures(self, tracker: Tracker) -> None:
        """Hand on the figures of the run's page, where it was written since the last time."""
        path = self.folder / "report.html"
        if not path.is_file() or path.stat().st_mtime_ns == self.figures_of:
            return
        self.figures_of = path.stat().st_mtime_ns
        figures = re.findall(r"<figure.*?</figure>", path.read_text(encoding="utf-8"), re.DOTALL)
        tracker.figures(max(0, self.metrics.last_step), figures)

    def exit_code(self) -> int:
        """With which code the run has ended; 1 where it was killed."""
        return EXIT_CODES.get(str(read_json(self.folder / "run.json").get("status")), 1)


def follow(module: str, folder: Path, begin: int, parent: int, say: Say, ended: threading.Event) -> None:
    """Follow a run until it has ended."""
    follower = Follower(folder, module.rpartition(".")[2], begin, say)
    tracker = importlib.import_module(module).start(follower.run)
    follower.id = getattr(tracker, "id", follower.id)  # where the environment names another run
    tracker.rewind(max(0, follower.metrics.last_step))  # the process before may have told more, or left no word of it
    follower.save()
    say(place=tracker.place)
    is_last = False
    while not is_last:
        is_last = ended.wait(LOOK_SECONDS) or (os.name == "posix" and os.getppid() != parent)
        if follower.tell(tracker):
            follower.save()
        say(step=follower.metrics.last_step)
    follower.tell_figures(tracker)
    tracker.finish(follower.exit_code())
    say(done=True)


def main() -> None:
    """Follow the run that the command line names, quietly: what a library prints is nobody's."""
    module, folder, begin, parent = sys.argv[-4:]
    out = os.dup(1)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)
    if hasattr(os, "nice"):
        os.nice(NICER)
    ended = threading.Event()

    def listen() -> None:
        os.read(0, 1)  # returns when the other end is closed
        timer = threading.Timer(END_SECONDS, os._exit, [1])
        timer.daemon = True
        timer.start()
        ended.set()

    def say(**message: Any) -> None:
        with suppress(BrokenPipeError):  # nobody listens to what follows a run that was killed
            os.write(out, (json.dumps(message) + "\n").encode())

    threading.Thread(target=listen, daemon=True).start()
    code = 0
    try:
        follow(module, Path(folder), int(begin), int(parent), say, ended)
    except Exception as error:
        say(error=f"{type(error).__name__}: {error}".partition("\n")[0][:300])
        code = 1
    os._exit(code)  # what a library wants to do at the end may hang, too
