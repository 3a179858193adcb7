"""The trackers of a run, each in a process that follows its logs: nothing that one does slows the run or ends it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import nnx_cli
from nnx_cli.training.observer import Silent

START = "import sys; sys.path.append(sys.argv[1]); from nnx_cli.trackers._follow import main; main()"
PACKAGES = Path(nnx_cli.__file__).parents[1]
PATIENCE_SECONDS = 120.0  # without an answer, after which a tracker is dropped
END_SECONDS, STOP_SECONDS = 30.0, 5.0  # that trackers have when the run has ended, and when it was stopped
SILENT_SECONDS = 10.0  # without an answer at the run's end, after which one that had begun gets nothing of these
KILLED_SECONDS = 5.0  # that the system may take to end a process
WORTH_A_NOTE = 2.0  # seconds of waiting at the end
KEPT = "metrics.jsonl has all of its numbers"


class TrackerProcess:
    """A process that follows a run for one tracker. `module` has its `start`."""

    def __init__(self, module: str, folder: Path, begin: int) -> None:
        self.name = module.rpartition(".")[2]
        self.heard: dict[str, Any] = {}  # what it said last, by kind
        self.heard_at = time.monotonic()
        self.is_placed = False  # whether it was told where the run is to be seen
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-c", START, *map(str, (PACKAGES, module, folder, begin, os.getpid()))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            encoding="utf-8",
            start_new_session=True,  # Ctrl-C is for the run alone
            creationflags=getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0),  # the same on Windows
        )
        self.listener = threading.Thread(target=self._listen, args=[self.process.stdout], daemon=True)
        self.listener.start()

    def _listen(self, lines: IO[str]) -> None:
        for line in lines:
            with suppress(ValueError):
                self.heard |= json.loads(line)
            self.heard_at = time.monotonic()

    def trouble(self) -> str | None:
        """Why it is of no use any more, or None."""
        if "error" in self.heard:
            return str(self.heard["error"])
        if self.process.poll() is not None and "done" not in self.heard:
            self.listener.join(1.0)
            return str(self.heard.get("error", f"its process ended with code {self.process.returncode}"))
        return self.silence(PATIENCE_SECONDS)

    def silence(self, patience: float) -> str | None:
        """That it was silent for longer than so many seconds, or None."""
        silent = time.monotonic() - self.heard_at
        return f"no answer for {silent:.0f} s" if silent > patience else None

    def end(self) -> None:
        """Let it tell the rest."""
        with suppress(OSError):
            if self.process.stdin:
                self.process.stdin.close()

    def kill(self) -> None:
        """End it now, and what it has begun."""
        if self.process.poll() is None:  # else its number may be another's
            with suppress(OSError):
                os.killpg(self.process.pid, signal.SIGKILL) if os.name == "posix" else self.process.kill()
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(KILLED_SECONDS)


class Tracking(Silent):
    """Observes a run that trackers follow from step `begin` on: says where it is to be seen, and drops those that fail
    or hang.

    As a context it begins them, and at the end lets them tell the rest. `note` shows a line, `warn` a warning.
    """

    def __init__(
        self,
        folder: Path,
        modules: Iterable[str],
        begin: int,
        note: Callable[[str], None],
        warn: Callable[[str], None],
    ) -> None:
        self.folder = folder
        self.begin = begin
        self.modules = [*modules]
        self.show_note = note
        self.warn = warn
        self.processes: list[TrackerProcess] = []

    def __enter__(self) -> Tracking:
        for module in self.modules:
            try:
                self.processes.append(TrackerProcess(module, self.folder, self.begin))
            except OSError as error:
                self.warn(f"{module.rpartition('.')[2]} is dropped: {error}; {KEPT}")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for process in [*self.processes]:
            if process.heard and (trouble := process.silence(SILENT_SECONDS)) is not None:
                self._drop(process, trouble)
            else:
                process.end()
        if kind is KeyboardInterrupt:  # they have all that there is, and end by themselves
            return
        began, noted, patience = time.monotonic(), False, END_SECONDS if error is None else STOP_SECONDS
        try:
            while self.look():
                waited = time.monotonic() - began
                if waited > patience:
                    self._drop_all(f"not done {patience:.0f} s after the run")
                elif waited > WORTH_A_NOTE and not noted:
                    names = ", ".join(process.name for process in self.processes)
                    self.show_note(f"waiting up to {patience:.0f} s for {names}; the run is saved")
                    noted = True
                time.sleep(0.05)
        except BaseException:
            self._drop_all("not waited for")
            raise

    def step(self, record: Mapping[str, Any], progress: float) -> None:
        """As in Observer. The numbers are read from the log: here it only looks after the processes."""
        self.look()

    def look(self) -> bool:
        """Drop what fails, and say what is worth it. Returns whether any process is left."""
        for process in [*self.processes]:
            if not process.is_placed and "place" in process.heard:
                process.is_placed = True
                self.show_note(f"{process.name}: {process.heard['place']}")
            if (trouble := process.trouble()) is not None:
                self._drop(process, trouble)
            elif process.process.poll() is not None:
                self.processes.remove(process)
        return bool(self.processes)

    def _drop(self, process: TrackerProcess, why: str) -> None:
        self.processes.remove(process)
        process.kill()
        self.warn(f"{process.name} is dropped: {why}; {KEPT}")

    def _drop_all(self, why: str) -> None:
        for process in [*self.processes]:
            self._drop(process, why)
