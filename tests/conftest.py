"""Shared fixtures: a text, its token folder, one small trained run, and ways to make more of them."""

import gc
import os
import random
import shutil
from pathlib import Path

import pytest
import torch
from chromium import PROGRAM, Chromium
from filelock import FileLock
from typer.testing import CliRunner

from nnx_cli import models
from nnx_cli.cli import app
from nnx_cli.config import PrepareConfig, TrainConfig
from nnx_cli.data.prepare import prepare
from nnx_cli.data.token_folder import open_token_folder
from nnx_cli.planning.plan import plan_run
from nnx_cli.runs.run import Run
from nnx_cli.training import sampling, session
from nnx_cli.training.observer import Silent

gc.disable()  # until all tests are collected: nothing of them is garbage
torch.set_num_threads(1)  # these models are too small to share
os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"  # its processes would have to import torch, each for itself
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # many tests start a process, and each would compile the package anew

TINY = dict(n_layers=2, dim=32, n_heads=2, seq_len=32)
OTHERWISE = {"tape": dict(n_layers=1)}  # as its nano: each of its critics has so many, besides two of its coda
SETTINGS = dict(
    max_steps=12,
    batch_size=4,
    grad_accum=2,
    val_every=4,
    val_batches=2,
    save_every=4,
    sample_every=0,
    lr=3e-3,
    compile="off",
    device="cpu",
    threads=1,
)


def pytest_addoption(parser):
    parser.addoption("--long", action="store_true", help="run the tests marked long too")


def pytest_configure(config):
    config.addinivalue_line("markers", "long: takes more than ten seconds, and another test or command looks there too")


def pytest_collection_modifyitems(config, items):
    if not config.getoption("--long"):
        skipped = pytest.mark.skip(reason="takes more than ten seconds: pytest --long")
        for item in items:
            if "long" in item.keywords:
                item.add_marker(skipped)


def pytest_collection_finish():
    """Look for garbage among what tests make only: modules and tests stay, and to look through them takes long."""
    gc.freeze()
    gc.enable()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_setupnodes():
    """Here, where workers are started, nothing is collected."""
    gc.enable()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers(config):
    """One more than cores: for a fifth of the time tests wait for processes, terminals and the disk."""
    return len(os.sched_getaffinity(0)) + 1 if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1) + 1


@pytest.fixture(autouse=True)
def one_thread():
    """What a command of a test has chosen is not for the tests behind it: where there are more threads than cores, they
    wait for each other twenty times as long as they work."""
    yield
    if torch.get_num_threads() != 1:
        torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def nothing_waits_for_the_disk():
    """No test cuts the power: what is written is there for every reader, whether or not it is on the disk."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", os.fstat)
        yield


@pytest.fixture(scope="session", autouse=True)
def samples_are_short():
    """What a run writes on its way has a tenth of its tokens: two of them take longer than a test's few steps."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sampling, "SAMPLE_LENGTH", 20)
        yield


@pytest.fixture(autouse=True)
def deterministic_meanwhile():
    """Commands that run in this process may ask torch for deterministic algorithms, for good; the next test did not."""
    yield
    if torch.are_deterministic_algorithms_enabled():
        torch.use_deterministic_algorithms(False)


@pytest.fixture
def tiny():
    """Builds a small model of an architecture, mostly of two layers: tiny(name, **fields)."""

    def build(name="nyx", **fields):
        torch.manual_seed(0)
        return models.build(name, **(dict(vocab_size=64) | TINY | OTHERWISE.get(name, {}) | fields))

    return build


@pytest.fixture(scope="session")
def text():
    """About 9,000 characters of lines made of a few words, some of them not ASCII."""
    words = "the a cat dog tree sees likes über naïve 小猫 and under river stone light 🙂 old small quickly".split()
    draw = random.Random(5)
    return "\n".join(" ".join(draw.choices(words, k=draw.randint(4, 9))) for _ in range(260)) + "\n"


@pytest.fixture(scope="session")
def text_file(text, tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "words.txt"
    path.write_text(text, encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def once(tmp_path_factory):
    """For what takes long: once(name, make) lets the first process of the tests that asks make(folder), and returns the
    folder, which others are not to change."""
    root = tmp_path_factory.getbasetemp()
    root = root.parent if "PYTEST_XDIST_WORKER" in os.environ else root

    def shared(name, make):
        folder, done = root / name, root / f"{name}.done"
        with FileLock(root / f"{name}.lock"):
            if not done.exists():
                shutil.rmtree(folder, ignore_errors=True)
                folder.mkdir()
                make(folder)
                done.touch()
        return folder

    return shared


@pytest.fixture(scope="session")
def token_path(text_file, tmp_path_factory):
    """The text as bytes, in a token folder."""
    out = tmp_path_factory.mktemp("shared") / "data" / "words"
    prepare([text_file], out, PrepareConfig(workers=1))
    return out


@pytest.fixture(scope="session")
def tokens(token_path):
    return open_token_folder(token_path)


@pytest.fixture(scope="session")
def start(tokens):
    """Starts a run and returns it with its trainer: start(folder, model="nyx", fields={...}, **training settings)."""

    def start_run(out, model="nyx", fields=None, observer=None, device="cpu", **settings):
        train = TrainConfig(**(SETTINGS | settings))
        plan = plan_run(
            model,
            "nano",
            TINY | OTHERWISE.get(model, {}) | (fields or {}),
            train,
            vocab_size=tokens.vocab_size,
            train_tokens=len(tokens.train),
            val_tokens=len(tokens.val),
            device=torch.device(device),
            precision="fp32",
            sources={},
        )
        prompt = session.Sampling([10], 8)
        return session.start(plan, tokens, out, torch.device(device), observer or Silent(), prompt, "nnx train", None)

    return start_run


@pytest.fixture(scope="session")
def finished(start, token_path):
    """A finished run of 40 steps beside its data. Read only: `run` is a copy."""
    run, trainer = start(token_path.parents[1] / "weights" / "words", max_steps=40, val_every=10, save_every=20)
    with run.lock():
        ended = trainer.train(run, lambda: False)
    run.set_status(status=ended, step=trainer.state.step)
    return run.folder


@pytest.fixture
def workspace(tmp_path, monkeypatch):
    """An empty folder that is the current one."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def run(finished, token_path, workspace):
    """A copy of the finished run as weights/words, and its data as data/words."""
    shutil.copytree(token_path, workspace / "data" / "words")
    shutil.copytree(finished, workspace / "weights" / "words")
    return Run(Path("weights") / "words")


@pytest.fixture(scope="session")
def browser(tmp_path_factory):
    """Headless Chromium, where there is one."""
    if PROGRAM is None:
        pytest.skip("no Chromium in PATH that can be driven here (Debian's package is `chromium`)")
    chromium = Chromium(tmp_path_factory.mktemp("chromium"))
    yield chromium
    chromium.close()


@pytest.fixture
def nnx(workspace, monkeypatch):
    """Runs a command line: nnx("train", "--dim", 32, ...) returns its exit_code, stdout and stderr."""
    monkeypatch.delenv("COLUMNS", raising=False)  # as pytest-xdist sets it

    def invoke(*words, input=None):
        result = CliRunner().invoke(app, [str(word) for word in words], input=input)
        unexpected = result.exception and not isinstance(result.exception, SystemExit)
        if unexpected:
            raise result.exception
        return result

    return invoke


@pytest.fixture
def refused(nnx, workspace):
    """Runs a command line that must fail: checks the exit code, the words of its one line, and that no file
    changed."""

    def invoke(code, message, *words, input=None):
        before = listing(workspace)
        result = nnx(*words, input=input)
        lines = result.stderr.splitlines()
        assert result.exit_code == code, result.stderr
        problem = [line for line in lines if line.startswith("nnx: ")]
        assert len(problem) == 1 and message in problem[0] and len(problem[0]) <= 300, result.stderr
        after = lines[lines.index(problem[0]) + 1 :]
        assert len(after) <= 1 and all(line.startswith("     ") for line in after), result.stderr
        assert "Traceback" not in result.output and "\x1b" not in result.output
        assert listing(workspace) == before
        return result

    return invoke


def listing(folder):
    """Every file and folder below `folder` with its size and time."""
    found = {}
    for root, folders, files in os.walk(folder):
        for name in folders:
            found[os.path.join(root, name)] = None
        for name in files:
            path = os.path.join(root, name)
            if name != "lock":
                found[path] = (os.stat(path).st_size, os.stat(path).st_mtime_ns)
    return found
