"""The page while its run goes on."""

import pytest

from nnx_cli.errors import OutputError
from nnx_cli.reporting import live_report
from nnx_cli.reporting.live_report import SHARE, LiveReport
from nnx_cli.training.observer import Several, Silent


@pytest.fixture
def clock(monkeypatch):
    """Time that passes when it is told to."""
    now = [1000.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    return now


@pytest.fixture
def pages(monkeypatch, clock):
    """When pages were written; each takes two seconds."""
    written = []

    def write(folder):
        clock[0] += 2
        written.append(clock[0])

    monkeypatch.setattr(live_report, "write_run_page", write)
    return written


def test_pages_take_a_small_share_of_the_time(tmp_path, clock, pages):
    report = LiveReport(tmp_path, pytest.fail)
    for _ in range(10_000):
        clock[0] += 1
        report.step({}, 0.5)
    assert 2 * len(pages) <= SHARE * 10_000 * 1.1 and len(pages) > 30


def test_the_first_step_brings_a_page(tmp_path, pages):
    LiveReport(tmp_path, pytest.fail).step({}, 0.0)
    assert len(pages) == 1


def test_the_end_always_writes_a_page(tmp_path, pages):
    with pytest.raises(RuntimeError), LiveReport(tmp_path, pytest.fail):
        raise RuntimeError
    assert len(pages) == 1


def test_a_page_that_cannot_be_written_is_said_once_and_ends_nothing(tmp_path, monkeypatch):
    def refuse(folder):
        raise OutputError("disk full")

    monkeypatch.setattr(live_report, "write_run_page", refuse)
    notes = []
    with LiveReport(tmp_path, notes.append) as report:
        report.write()
    assert notes == ["no report: disk full"]


def test_a_run_writes_its_page_as_it_goes(start, tmp_path, monkeypatch):
    monkeypatch.setattr(live_report, "LEAST_SECONDS", 0)
    monkeypatch.setattr(live_report, "SHARE", 1e9)
    seen = []

    class Look(Silent):
        def step(self, record, progress):
            page = (run.folder / "report.html").read_text(encoding="utf-8")
            seen.append(f"running after {record['step']} step" in page)

    observers = Several()
    run, trainer = start(tmp_path / "run", observer=observers)
    with run.lock(), LiveReport(run.folder, pytest.fail) as report:
        observers.observers += [report, Look()]
        trainer.train(run, lambda: False)
    assert len(seen) > 2 and all(seen)
