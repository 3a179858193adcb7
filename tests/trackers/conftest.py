"""A run that was told to every tracker that is installed, stopped and gone on with."""

import importlib.util
import json
import os

import pytest

from nnx_cli.config import module_names
from nnx_cli.reporting.live_report import LiveReport
from nnx_cli.runs.run import Run
from nnx_cli.trackers._process import Tracking
from nnx_cli.training import session
from nnx_cli.training.observer import Several

SECRET = "canary-5fe1c0"
INSTALLED = [name for name in module_names("trackers") if importlib.util.find_spec(name)]
ENVIRONMENT = {"WANDB_MODE": "offline", "WANDB_API_KEY": SECRET, "HF_TOKEN": SECRET, "MY_SECRET": SECRET}


def pytest_collection_modifyitems(items):
    """Skip what needs a library that is missing."""
    for item in items:
        for name in set(module_names("trackers")) - set(INSTALLED):
            if item.path.name == f"test_{name}.py" and "twice" in item.fixturenames:
                item.add_marker(pytest.mark.skip(reason=f"needs {name}: pip install 'nnx-cli[{name}]'"))


@pytest.fixture(scope="session")
def twice(start, tmp_path_factory):
    """The folder of a run of 8 steps that went on to 12, its settings, and what was said on the way."""
    home, said, warned = tmp_path_factory.mktemp("tracked"), [], []
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (ENVIRONMENT | {"TRACKIO_DIR": str(home / "trackio")}).items():
            patch.setenv(name, value)
        settings = dict(max_steps=8, val_every=4, sample_every=4, save_every=4, sample_prompt="/a/path")

        def train(run, trainer):
            modules = [f"nnx_cli.trackers.{name}" for name in INSTALLED]
            with (
                Tracking(run.folder, modules, trainer.state.step, said.append, warned.append) as tracking,
                LiveReport(run.folder, said.append) as report,
                run.lock(),
            ):
                trainer.observer = trainer.journal.observer = Several(tracking, report)
                run.set_status(status=trainer.train(run, lambda: False))

        run, trainer = start(home / "weights" / "words", **settings)
        train(run, trainer)
        run = Run(run.folder)
        trainer, _ = session.resume(session.plan_restart(run, {"max_steps": 12}), Several())
        train(run, trainer)
    assert not warned, warned
    return run.folder


@pytest.fixture(scope="session")
def records(twice):
    """The lines of the run's own log."""
    return [json.loads(line) for line in (twice / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture
def leaks():
    """Files below a folder that hold something private: an absolute path, this machine's name, a secret."""

    def find(folder, *private):
        marks = [str(each).encode() for each in (SECRET, os.path.expanduser("~"), *private) if len(str(each)) > 4]
        return [path for path in folder.rglob("*") if path.is_file() and any(m in path.read_bytes() for m in marks)]

    return find
