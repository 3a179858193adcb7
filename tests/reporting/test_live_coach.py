"""The coach while a run goes on."""

import pytest

from nnx_cli.errors import CheckpointError
from nnx_cli.reporting import live_coach
from nnx_cli.reporting.coach import Finding
from nnx_cli.reporting.live_coach import SHARE, LiveCoach


@pytest.fixture
def clock(monkeypatch):
    """Time that passes when it is told to."""
    now = [1000.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    return now


@pytest.fixture
def looks(monkeypatch, clock):
    """When the coach looked, each of which takes 20 ms; what it finds is looks.found."""

    class Looks(list):
        found = ()

    made = Looks()

    def look(record, named):
        clock[0] += 0.02
        made.append(clock[0])
        return [Finding(rule, f"{rule} {len(made)}", f"nnx train --for {rule}{named}") for rule in made.found]

    monkeypatch.setattr(live_coach, "read_run", lambda folder: folder)
    monkeypatch.setattr(live_coach, "findings", look)
    return made


def test_each_thing_is_told_once(tmp_path, clock, looks):
    told = []
    coach = LiveCoach(tmp_path, " --model my.py", told.append)
    for second in range(300):
        looks.found = ("a", "b") if second > 200 else ("a",) if second > 100 else ()
        clock[0] += 1
        coach.step({}, second / 300)
    words = [line.split() for line in told]
    assert [line[:2] for line in words] == [["coach:", "a"], ["coach:", "b"]]
    assert told[0].endswith(":\n  nnx train --for a --model my.py")
    assert len(looks) > 10 and 0.02 * len(looks) <= 1.1 * SHARE * 300


def test_the_last_step_is_left_to_the_verdict(tmp_path, clock, looks):
    coach = LiveCoach(tmp_path, "", pytest.fail)
    looks.found = ("a",)
    clock[0] += 100
    coach.step({}, 1.0)
    assert looks == []


def test_a_folder_that_cannot_be_read_now_is_looked_at_again(tmp_path, clock, looks, monkeypatch):
    def refuse(folder):
        raise CheckpointError("damaged")

    coach = LiveCoach(tmp_path, "", pytest.fail)
    with monkeypatch.context() as patch:
        patch.setattr(live_coach, "read_run", refuse)
        clock[0] += 100
        coach.step({}, 0.5)
    assert looks == []
    clock[0] += 100
    coach.step({}, 0.5)
    assert len(looks) == 1
