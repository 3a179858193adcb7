"""The real command in a process of its own, forked from one that has imported everything: half a second, not five."""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import io
import json
import mmap
import multiprocessing
import os
import random
import resource
import shutil
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PHASES = (
    "starting",
    "creating",
    "resuming",
    "stepping",
    "evaluating",
    "sampling",
    "saving",
    "rotating",
    "best",
)
PAUSED, RELEASED = 1, 2  # bytes of the page that both share, beside the phase's
TIMES = ("time_s", "tokens_per_s", "peak_memory_bytes", "mfu", "data_wait_share", "started")
SHAPE = (
    "--size",
    "nano",
    "--dim",
    32,
    "--n-layers",
    1,
    "--n-heads",
    2,
    "--seq-len",
    32,
    "--batch-size",
    4,
    "--grad-accum",
    1,
    "--device",
    "cpu",
    "--threads",
    1,
    "--compile",
    "off",
)
HABITS = (
    "--val-every",
    8,
    "--val-batches",
    1,
    "--sample-every",
    12,
    "--generate-length",
    6,
    "--save-every",
    5,
    "--lr",
    3e-3,
)

warm = multiprocessing.get_context("forkserver") if os.name == "posix" else None


@dataclass(frozen=True)
class Setting:
    """What is different about a process: where it speaks, what it may write, what happens to it."""

    stdout: str | None = None
    stderr: str | None = None
    terminal: str | None = None  # path of a pseudo-terminal to be the controlling one
    file_limit: int | None = None  # RLIMIT_FSIZE
    ignore: tuple[int, ...] = ()  # signals ignored from the start, as nohup does
    pause: tuple[str, int] | None = None  # the phase that it enters for the n-th time and waits in, until told to go on
    change: Callable[[], None] | None = None  # called before the command


@dataclass(frozen=True)
class Surroundings:
    """A change to a process: variables of its environment, those it has not, and modules that it does not find."""

    variables: dict[str, str]
    without: tuple[str, ...] = ()
    hidden: tuple[str, ...] = ()

    def __call__(self) -> None:
        from nnx_cli.console import line_input

        for name in self.without:
            os.environ.pop(name, None)
        os.environ.update(self.variables)
        sys.modules.update(dict.fromkeys(self.hidden))
        found = line_input.find_spec
        line_input.find_spec = lambda name: None if name in self.hidden else found(name)


class Command:
    """`nnx` with some arguments, running in `folder`."""

    def __init__(self, folder: Path, *words: Any, setting: Setting | None = None) -> None:
        self.log = folder / f"log-{random.getrandbits(48):x}"
        setting = setting or Setting()
        self._track = folder / f"{self.log.name}.phase"
        self._track.write_bytes(bytes(mmap.PAGESIZE))
        with open(self._track, "r+b") as file:
            self._phase = mmap.mmap(file.fileno(), mmap.PAGESIZE)
        preload()
        self.process = warm.Process(
            target=run_command, args=(folder, [str(word) for word in words], self.log, self._track, setting)
        )
        self.process.start()
        self.pid = self.process.pid

    @property
    def phase(self) -> str:
        """What the process is doing, or did when it ended."""
        return PHASES[self._phase[0]]

    @property
    def output(self) -> str:
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    def send(self, number: int) -> None:
        """Send it a signal; where it pauses it goes on after that."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, number)
        self.go_on()

    def go_on(self) -> None:
        """End its pause."""
        self._phase[RELEASED] = 1

    def running(self) -> bool:
        return self.process.exitcode is None

    def wait(self, timeout: float = 120) -> int:
        """The exit code, negative for a signal. A process that does not end in time is killed, and the test fails."""
        self.process.join(timeout)
        if self.process.exitcode is None:
            self.process.kill()
            self.process.join()
            raise AssertionError(f"still {self.phase} after {timeout} s: {self.output}")
        self._track.unlink(missing_ok=True)
        return self.process.exitcode

    def pauses(self, timeout: float = 60) -> bool:
        """Wait until it pauses where its setting says; False where it ends before."""
        until = time.monotonic() + timeout
        while self.running() and not self._phase[PAUSED] and time.monotonic() < until:
            time.sleep(0.001)
        return bool(self._phase[PAUSED])

    def wait_for(self, phase: str, timeout: float = 60, times: int = 1) -> bool:
        """Wait until it enters a phase, for the n-th time; False where it ends before."""
        until, inside = time.monotonic() + timeout, False
        while self.running() and time.monotonic() < until:
            now = self.phase == phase
            if now and not inside and (times := times - 1) == 0:
                return True
            inside = now
            time.sleep(0.0002)
        return False


def preload() -> None:
    """Have the process that all others are forked from import what the command needs."""
    os.environ["OMP_NUM_THREADS"] = "1"
    warm.set_forkserver_preload(["tests.reliability.warm", __name__])


def run_command(folder: Path, words: list[str], log: Path, track: Path, setting: Setting) -> None:
    """In the new process: become `nnx WORDS`."""
    die_with_parent()
    for name in ("SIGTERM", "SIGHUP", "SIGPIPE", "SIGTSTP"):
        number = getattr(signal, name)
        signal.signal(number, signal.SIG_IGN if name == "SIGPIPE" else signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number in setting.ignore:
        signal.signal(number, signal.SIG_IGN)
    os.chdir(folder)
    os.fsync = os.fstat  # a process may die, but the power stays: what it wrote is there for others, on the disk or not
    speak(setting, log)
    if setting.file_limit is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (setting.file_limit, setting.file_limit))
    with open(track, "r+b") as file:
        follow(mmap.mmap(file.fileno(), mmap.PAGESIZE), setting.pause)
    if setting.change is not None:
        setting.change()
    sys.argv = ["nnx", *words]
    from nnx_cli.__main__ import main

    main()


def die_with_parent() -> None:
    """Let no process outlive the tests (Linux only)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)


def speak(setting: Setting, log: Path) -> None:
    """Connect standard output and error to a terminal, to named pipes or to the log."""
    if setting.terminal is not None:
        os.setsid()
        terminal = os.open(setting.terminal, os.O_RDWR)  # a session leader's first terminal controls it
        for number in (0, 1, 2):
            os.dup2(terminal, number)
        sys.stdin = open(0, closefd=False)
    else:
        for number, path in ((1, setting.stdout), (2, setting.stderr)):
            if path is None:
                os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
            else:
                os.dup2(os.open(path, os.O_WRONLY), number)
        os.setpgid(0, 0)  # a group of its own, that no key of a terminal reaches and that can be suspended
    sys.stdout = io.TextIOWrapper(open(1, "wb", closefd=False), encoding="utf-8", line_buffering=os.isatty(1))
    sys.stderr = io.TextIOWrapper(open(2, "wb", closefd=False), encoding="utf-8", line_buffering=True)


def follow(shared: mmap.mmap, pause: tuple[str, int] | None) -> None:
    """Keep the first byte of `shared` at the phase that this process is in, and pause where asked to."""
    from nnx_cli.runs import checkpoint
    from nnx_cli.runs.run import Run
    from nnx_cli.training import session
    from nnx_cli.training.trainer import Trainer

    entered = Counter()

    def mark(owner: Any, name: str, phase: str) -> None:
        real = getattr(owner, name)
        number = PHASES.index(phase)

        def call(*args: Any, **options: Any) -> Any:
            before, shared[0] = shared[0], number
            entered[phase] += 1
            if (phase, entered[phase]) == pause:
                shared[PAUSED] = 1
                while not shared[RELEASED]:
                    time.sleep(0.001)
            result = real(*args, **options)
            shared[0] = before
            return result

        setattr(owner, name, call)

    mark(session, "start", "creating")
    mark(session, "resume", "resuming")
    mark(Trainer, "train", "stepping")
    mark(Trainer, "validate", "evaluating")
    mark(Trainer, "sample", "sampling")
    mark(checkpoint, "save_checkpoint", "saving")
    mark(checkpoint, "prune_checkpoints", "rotating")
    mark(Run, "save_best", "best")


def make_data(folder: Path) -> Path:
    """A small token folder in `folder`."""
    from nnx_cli.config import PrepareConfig
    from nnx_cli.data.prepare import prepare

    draw = random.Random(5)
    words = "the a cat dog tree sees likes over naïve 小猫 and under river stone light old small quickly".split()
    text = folder / "words.txt"
    text.write_text("\n".join(" ".join(draw.choices(words, k=7)) for _ in range(300)) + "\n", encoding="utf-8")
    prepare([text], folder / "data" / "words", PrepareConfig(workers=1))
    return folder / "data" / "words"


def train_words(data: Path, out: Path, model: str = "nyx", steps: int = 40, **changes: Any) -> list[Any]:
    """The command line of a small run; changes replace or add options by their names."""
    options = dict(zip((SHAPE + HABITS)[::2], (SHAPE + HABITS)[1::2], strict=True)) | {"--max-steps": steps}
    options |= {"--" + name.replace("_", "-"): value for name, value in changes.items()}
    given = [word for name, value in options.items() if value is not None for word in (name, value)]
    return ["train", "--model", model, "--data", data, "--out", out, *given]


class Watching:
    """An observer that remembers what it is told."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)

    def step(self, record: dict[str, Any], progress: float) -> None:
        """Not of interest here."""

    def moved(self, progress: float) -> None:
        """Not of interest here."""

    def sampled(self, step: int, text: str) -> None:
        """Not of interest here."""

    def saved(self, step: int) -> None:
        """Not of interest here."""


def start_small(data: Path, out: Path, observer: Any, model: str = "nyx", **changes: Any) -> tuple[Any, Any]:
    """A run like that of `train_words` in this process: the run and its trainer."""
    import torch

    from nnx_cli.config import TrainConfig
    from nnx_cli.data.token_folder import open_token_folder
    from nnx_cli.planning.plan import plan_run
    from nnx_cli.training import session

    settings = dict(
        max_steps=8,
        batch_size=4,
        grad_accum=1,
        val_every=4,
        val_batches=1,
        save_every=4,
        lr=3e-3,
        sample_every=0,
        compile="off",
        device="cpu",
        threads=1,
    )
    tokens, shape = open_token_folder(data), dict(n_layers=1, dim=32, n_heads=2, seq_len=32)
    plan = plan_run(
        model,
        "nano",
        shape,
        TrainConfig(**(settings | changes)),
        vocab_size=tokens.vocab_size,
        train_tokens=len(tokens.train),
        val_tokens=len(tokens.val),
        device=torch.device("cpu"),
        precision="fp32",
        sources={},
    )
    prompt = session.Sampling([10], 4)
    return session.start(plan, tokens, out, torch.device("cpu"), observer, prompt, "nnx train", None)


def outcome(run: Path) -> dict[str, Any]:
    """All that a run leaves behind, as comparable values, less what a clock says."""
    found: dict[str, Any] = {}
    newest = sorted((run / "checkpoints").glob("step-*"))[-1]
    for path in (run / "model.safetensors", newest / "model.safetensors", newest / "optimizer.safetensors"):
        found[str(path.relative_to(run))] = hashlib.sha256(path.read_bytes()).hexdigest()
    found["state"] = timeless(json.loads((newest / "state.json").read_bytes()))
    for name in ("metrics.jsonl", "samples.jsonl"):
        found[name] = [timeless(json.loads(line)) for line in (run / name).read_text().splitlines()]
    status = json.loads((run / "run.json").read_bytes())
    found["status"] = timeless({key: value for key, value in status.items() if key not in ("command", "run_id")})
    found["leftovers"] = [str(path.relative_to(run)) for path in run.rglob(".*")]
    return found


def timeless(record: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in record.items() if key not in TIMES}


def assert_same(ours: dict[str, Any], theirs: dict[str, Any], what: str) -> None:
    """Compare two outcomes; says which parts differ."""
    odd = [key for key in theirs if ours.get(key) != theirs[key]]
    assert not odd, f"{what}: {odd[0]} differs: {str(ours.get(odd[0]))[:300]} instead of {str(theirs[odd[0]])[:300]}"


@contextlib.contextmanager
def workplace() -> Iterator[Path]:
    """An empty folder for a part run by hand, removed afterwards."""
    import tempfile

    folder = Path(tempfile.mkdtemp(prefix="nnx-reliability-"))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
