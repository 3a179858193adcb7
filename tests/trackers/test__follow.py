"""What a tracker is told of logs that grow, are cut off and grow again."""

import json
import os
import random

import pytest

from nnx_cli.runs.logs import append_line, cut_log
from nnx_cli.trackers._follow import FIGURES_SPACING, Follower, Log


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("seed", range(20))
def test_what_was_told_is_what_the_log_says(tmp_path, seed):
    """Lines come, a run goes back to an earlier step and logs other numbers; looks fall anywhere between."""
    draw, path = random.Random(seed), tmp_path / "metrics.jsonl"
    log, told, step = Log(path, -1), [], 0
    for number in range(60):
        if draw.random() < 0.15 and path.exists():
            step = draw.randrange(step + 1)
            cut_log(path, step)
        else:
            step += draw.randint(1, 3)
            append_line(path, {"step": step, "train_loss": number / 7})
        if draw.random() < 0.4 or number == 59:
            cut, new = log.look()
            told = [record for record in told if cut is None or record["step"] <= cut] + new
    assert told == lines(path) and log.look() == (None, [])


def test_a_line_that_is_not_whole_yet_is_left_for_later(tmp_path):
    path = tmp_path / "metrics.jsonl"
    log = Log(path, 4)
    assert log.look() == (None, [])
    path.write_text('{"step": 4}\n{"step": 5}\nnonsense\n{"step"')
    assert log.look() == (None, [{"step": 5}])
    with open(path, "a") as file:
        file.write(": 6}\n")
    assert log.look() == (None, [{"step": 6}])


class Told(list):
    """Notes the names of calls."""

    def __getattr__(self, name):
        return lambda *values: self.append((name, *values))


@pytest.fixture
def follower(run):
    (run.folder / "samples.jsonl").write_text('{"step": 10, "prompt": "a", "text": "b"}\n')
    (run.folder / "report.html").write_text("<figure>1</figure>")
    said = []
    follower = Follower(run.folder, "fake", 0, lambda **message: said.append(message))
    follower.said = said
    return follower


def test_figures_come_with_samples_ever_more_seldom(follower):
    def sampled(age):
        append_line(follower.folder / "samples.jsonl", {"step": follower.samples.last_step + 1, "text": "c"})
        path, told = follower.folder / "report.html", Told()
        os.utime(path, ns=(0, path.stat().st_mtime_ns + 1))
        follower.begun -= age
        follower.tell(told)
        follower.begun += age
        return [call[2] for call in told if call[0] == "figures"]

    ages = [10, 61, 80, 61 * FIGURES_SPACING + 1, 100, 150]
    assert [bool(sampled(age)) for age in ages] == [False, True, False, True, False, True]
    told = Told()
    follower.tell_figures(told)
    assert not told, "the page is the same"


def test_each_line_of_the_log_is_one_call(follower):
    told = Told()
    assert follower.tell(told) and not follower.tell(told)
    metrics, samples = (lines(follower.folder / name) for name in ("metrics.jsonl", "samples.jsonl"))
    assert [call[0] for call in told] == ["scalars"] * len(metrics) + ["sample"] * len(samples)
    (last,) = (call[2] for call in told if call[:2] == ("scalars", metrics[-1]["step"]))
    assert last["train/loss"] == metrics[-1]["train_loss"] and last["eval/loss"] == metrics[-1]["val_loss"]
    epochs = metrics[-1]["tokens"] / follower.config["data"]["train_tokens"]
    assert last["train/epoch"] == pytest.approx(epochs) and last["train/global_step"] == metrics[-1]["step"]


def test_while_much_is_told_it_says_that_it_is_alive(follower):
    path = follower.folder / "metrics.jsonl"
    path.write_text("".join(f'{{"step": {step}, "train_loss": 1.0}}\n' for step in range(1, 1001)))
    follower.tell(Told())
    assert follower.said == [{"step": step} for step in range(100, 1001, 100)]


@pytest.mark.parametrize(("status", "code"), [("finished", 0), ("diverged", 6), ("interrupted", 130), ("running", 1)])
def test_a_tracker_learns_how_the_run_ended(follower, run, status, code):
    run.set_status(status=status)
    assert follower.exit_code() == code
