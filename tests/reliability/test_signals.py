"""Promise 6: signals and terminals. A run is told to stop and saves, or it is not heard and goes on."""

from __future__ import annotations

import contextlib
import fcntl
import os
import random
import re
import signal
import struct
import termios
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from nnx_cli.runs.checkpoint import steps_in
from tests.reliability import Result
from tests.reliability.faults import SlowSave, SlowStep
from tests.reliability.processes import (
    PHASES,
    Command,
    Setting,
    assert_same,
    make_data,
    outcome,
    train_words,
    workplace,
)

pytestmark = pytest.mark.skipif(os.name != "posix", reason="signals are those of POSIX")

STEPS = 60
STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Place:
    """A folder with data and the outcome of a run that nobody disturbed."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.data, self.n_runs = folder, make_data(folder), 0
        whole = Command(folder, *train_words(self.data, "weights/whole", steps=STEPS))
        assert whole.wait() == 0, whole.output
        self.wanted = outcome(folder / "weights" / "whole")

    def start(self, setting: Setting | None = None) -> tuple[Command, Path]:
        self.n_runs += 1
        out = self.folder / "weights" / f"run-{self.n_runs}"
        return Command(self.folder, *train_words(self.data, out, steps=STEPS), setting=setting), out

    def resume(self, out: Path) -> None:
        """Go on to the end, and compare."""
        again = Command(self.folder, "train", "--resume", out)
        assert again.wait() == 0, again.output
        assert_same(outcome(out), self.wanted, f"{out.name} resumed")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return Place(tmp_path_factory.mktemp("signals"))


def stop_gently(place: Place, numbers: tuple[int, ...], phase: str, draw: random.Random) -> None:
    """Signals arrive in a phase, one right after the other; the run saves, says how to resume, exits 130."""
    command, out = place.start()
    command.wait_for(phase, times=draw.randint(1, 3))
    time.sleep(draw.random() * 0.002)
    began = command.phase
    for number in numbers:
        command.send(number)
    code = command.wait()
    if code == 0:  # it was at its end
        assert_same(outcome(out), place.wanted, out.name)
        return
    if began == "starting" and command.output == "" and code in [-number for number in numbers]:
        assert not (out / "run.json").exists()  # Python was not yet up
        return
    if (out / "run.json").exists() and b'"finished"' in (out / "run.json").read_bytes():
        assert_same(outcome(out), place.wanted, out.name)  # its last words were cut short
        return
    assert code == 130 and "Traceback" not in command.output, (code, began, command.output)
    if not (out / "run.json").exists():
        assert began in ("starting", "creating", "saving"), (began, command.output)
        assert not list((place.folder / "weights").glob(".*"))
        return
    found = re.search(
        r"nnx: interrupted at step (\d+); everything is saved\s+resume: nnx train --resume (\S+)",
        " ".join(command.output.split()),
    )
    if found:
        assert int(found[1]) == steps_in(out / "checkpoints")[-1] and out == Path(found[2]), command.output
    else:  # it had not begun to train
        assert steps_in(out / "checkpoints") == [0], (began, command.output)
    place.resume(out)


@pytest.mark.parametrize("numbers", [*((number,) for number in STOPPING), (signal.SIGTERM, signal.SIGHUP)])
def test_a_run_that_is_told_to_stop_saves(place, numbers):
    stop_gently(place, numbers, "stepping", random.Random(sum(numbers)))


def pending(command: Command, number: int) -> bool:
    """Whether a signal was sent that the process did not yet get (known on Linux)."""
    path = Path(f"/proc/{command.pid}/status")
    if not path.exists():
        return False
    [waiting] = [line.split()[1] for line in path.read_text().splitlines() if line.startswith("ShdPnd:")]
    return bool(int(waiting, 16) >> (number - 1) & 1)


def stop_at_once(place: Place, pause: float) -> None:
    """Two Ctrl-C during one long call into C: nothing more is saved."""
    with contextlib.suppress(FileNotFoundError):
        (place.folder / "slow").unlink()
    command, out = place.start(Setting(change=SlowStep(17)))
    while command.running() and not (place.folder / "slow").exists():
        time.sleep(0.005)
    before = steps_in(out / "checkpoints")
    command.send(signal.SIGINT)
    while pending(command, signal.SIGINT):
        time.sleep(0.001)  # two that the system has not yet delivered are one to it
    time.sleep(pause)
    command.send(signal.SIGINT)
    assert command.wait() == 130 and "saved" not in command.output, command.output
    assert steps_in(out / "checkpoints") == before and before[-1] == 15
    assert "Traceback" not in command.output
    place.resume(out)


def stop_while_saving(place: Place) -> None:
    """The second Ctrl-C comes while the first one's checkpoint is being written."""
    command, out = place.start(Setting(change=SlowSave()))
    assert command.wait_for("saving", times=2)
    command.send(signal.SIGINT)
    time.sleep(0.3)
    command.send(signal.SIGINT)
    started = steps_in(out / "checkpoints")
    assert command.wait() == 130 and "saved" not in command.output, command.output
    assert steps_in(out / "checkpoints") == started and not list(out.rglob(".tmp-*"))
    place.resume(out)


@pytest.mark.parametrize("pause", [0.0, 0.1])
def test_a_second_interrupt_stops_at_once(place, pause):
    if pause:
        stop_at_once(place, pause)
    else:
        stop_while_saving(place)


@contextlib.contextmanager
def terminal() -> Iterator[tuple[int, str, list[bytes]]]:
    """A pseudo-terminal somebody reads: its master's descriptor, the slave's path, and what was shown."""
    master, slave = os.openpty()
    path, shown = os.ttyname(slave), []
    reading = threading.Event()

    def read() -> None:
        with contextlib.suppress(OSError):
            while not reading.is_set():
                shown.append(os.read(master, 65536))

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    try:
        yield master, path, shown
    finally:
        reading.set()
        for descriptor in (slave, master):
            with contextlib.suppress(OSError):
                os.close(descriptor)
        reader.join(5)


def typed_interrupt(place: Place) -> None:
    """Ctrl-C typed at a terminal while the window changes its size."""
    with terminal() as (master, path, shown):
        command, out = place.start(Setting(terminal=path, pause=("saving", 3)))
        assert command.pauses()
        for columns in (40, 1, 200):
            fcntl.ioctl(master, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
        os.write(master, b"\x03")
        command.go_on()
        assert command.wait() == 130
        time.sleep(0.1)
        text = b"".join(shown).decode(errors="replace")
    assert "everything is saved" in text and "Traceback" not in text, text
    assert text.count("\x1b[?25l") == text.count("\x1b[?25h"), "the cursor is there again"
    place.resume(out)


def resized(place: Place) -> None:
    with terminal() as (master, path, _):
        command, out = place.start(Setting(terminal=path))
        while command.running():
            fcntl.ioctl(master, termios.TIOCSWINSZ, struct.pack("HHHH", 24, random.randint(1, 300), 0, 0))
            time.sleep(0.01)
        assert command.wait() == 0
    assert_same(outcome(out), place.wanted, "a window that changed")


def closed_terminal(place: Place, nohup: bool) -> None:
    """A terminal that goes away hangs up: the run saves and ends; one that was told not to mind goes on."""
    master, slave = os.openpty()
    path = os.ttyname(slave)
    ignore = (signal.SIGHUP,) if nohup else ()
    command, out = place.start(Setting(terminal=path, ignore=ignore, pause=("saving", 3)))
    assert command.pauses()
    os.close(slave)
    os.close(master)
    command.go_on()
    assert command.wait() == (0 if nohup else 130)
    if nohup:
        assert_same(outcome(out), place.wanted, "without its terminal")
    else:
        assert b'"interrupted"' in (out / "run.json").read_bytes()
        place.resume(out)


def broken_pipe(place: Place, name: str) -> None:
    """Whoever read what the run says went away."""
    pipe = place.folder / f"pipe-{place.n_runs}-{name}"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    command, out = place.start(Setting(**{name: str(pipe)}, pause=("saving", 2)))
    assert command.pauses(), command.output
    os.close(reader)
    command.go_on()
    assert command.wait() == 0, command.output
    assert "Traceback" not in command.output and "Exception" not in command.output
    assert_same(outcome(out), place.wanted, f"{name} broken")


def suspended(place: Place) -> None:
    """Ctrl-Z, a while later fg."""
    command, out = place.start()
    for _ in range(3):
        if not command.wait_for("stepping", times=2):
            break
        command.send(signal.SIGTSTP)
        state = ""
        until = time.monotonic() + 10
        while state != "T" and time.monotonic() < until:
            state = Path(f"/proc/{command.pid}/stat").read_text().rpartition(")")[2].split()[0]
        assert state == "T"
        time.sleep(0.1)
        command.send(signal.SIGCONT)
    assert command.wait() == 0, command.output
    assert_same(outcome(out), place.wanted, "suspended")


def ignored(place: Place) -> None:
    """What was started in the background of a script does not hear Ctrl-C."""
    command, out = place.start(Setting(ignore=(signal.SIGINT,), pause=("saving", 3)))
    assert command.pauses(), command.output
    command.send(signal.SIGINT)
    assert command.wait() == 0, command.output
    assert_same(outcome(out), place.wanted, "SIGINT ignored")


needs_proc = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="reads the state of a process in /proc")


def test_ctrl_c_at_a_terminal(place):
    typed_interrupt(place)


def test_a_window_of_changing_size(place):
    resized(place)


@pytest.mark.parametrize("nohup", [False, True])
def test_a_closed_terminal(place, nohup):
    closed_terminal(place, nohup)


@pytest.mark.parametrize("name", ["stdout", "stderr"])
def test_a_broken_pipe(place, name):
    broken_pipe(place, name)


@needs_proc
def test_a_suspended_process(place):
    suspended(place)


def test_an_ignored_signal_stays_ignored(place):
    ignored(place)


def gentle(full: bool) -> Result:
    times, draw = 100 if full else 6, random.Random(int(time.time()))
    with workplace() as folder:
        place = Place(folder)
        for number in range(times):
            numbers = draw.choice([*((one,) for one in STOPPING), (signal.SIGTERM, signal.SIGHUP)])
            phase = PHASES[number % len(PHASES)]
            stop_gently(place, numbers, phase, draw)
    return Result(
        6, "SIGINT, SIGTERM, SIGHUP at random moments: saved, exit 130, resumed to the same bits", times, times
    )


def second(full: bool) -> Result:
    times = 10 if full else 1
    with workplace() as folder:
        place = Place(folder)
        for number in range(times):
            stop_at_once(place, 0.01 * number)
            stop_while_saving(place)
    return Result(6, "a second Ctrl-C, in a step or a save: nothing more is saved", 2 * times, 2 * times)


def terminals(full: bool) -> Result:
    rounds, cases = 5 if full else 1, 0
    with workplace() as folder:
        place = Place(folder)
        for _ in range(rounds):
            for case, *arguments in (
                (typed_interrupt,),
                (resized,),
                (closed_terminal, False),
                (closed_terminal, True),
                (broken_pipe, "stdout"),
                (broken_pipe, "stderr"),
                (suspended,),
                (ignored,),
            ):
                case(place, *arguments)
                cases += 1
    what = "Ctrl-C at a terminal, resized, closed with and without nohup, broken pipes, suspended, ignored signals"
    return Result(6, what, cases, cases)


PARTS = {"signal-stop": gentle, "signal-second": second, "signal-terminal": terminals}
