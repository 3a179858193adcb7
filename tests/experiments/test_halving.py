import pytest

from nnx_cli.experiments.halving import is_over, lengths, open_trials, rungs, stop_losers
from nnx_cli.experiments.sweep_file import new_trial, rank


def test_rungs():
    assert rungs(1, 3) == rungs(2, 3) == [1.0]
    assert rungs(9, 3) == rungs(26, 3) == pytest.approx([1 / 9, 1 / 3, 1])
    assert rungs(8, 2) == [0.125, 0.25, 0.5, 1.0]
    assert lengths(9, rungs(9, 3), 3) == pytest.approx(9 / 9 + 3 * 2 / 9 + 2 / 3)
    assert lengths(7, [1.0], 3) == 7


def halve(n, bits, eta=3, fails=()):
    """Run trials whose result is a function of number and rung; returns them, and in what order they were run."""
    trials, shares, order = [new_trial(number, {}) for number in range(1, n + 1)], rungs(n, eta), []
    record = {"trials": trials, "eta": eta}
    while waiting := open_trials(trials):
        trial = waiting[-1]  # any of them may come first
        rung = len(trial["rungs_reached"])
        order.append((rung, trial["number"]))
        if (trial["number"], rung) in fails:
            trial |= {"status": "diverged", "bits_per_byte": None}
        else:
            found = bits(trial["number"], rung)
            trial |= {"bits_per_byte": found, "status": "finished" if rung + 1 == len(shares) else "paused"}
            trial["rungs_reached"].append(found)
        rank(record)
    return trials, order


def test_the_best_go_on():
    trials, order = halve(9, lambda number, rung: number / 10)
    assert [trial["number"] for trial in trials] == [*range(1, 10)]
    assert [trial["status"] for trial in trials] == ["finished", *["stopped"] * 8]
    assert [len(trial["rungs_reached"]) for trial in trials] == [3, 2, 2, *[1] * 6]
    assert [rung for rung, _ in order] == [0] * 9 + [1] * 3 + [2]


def test_a_short_run_is_not_better_than_a_longer_one():
    trials, _ = halve(9, lambda number, rung: 1.0 + rung + number / 100)  # worse, the longer it goes on
    assert [trial["number"] for trial in trials] == [*range(1, 10)]


def test_failed_trials_give_their_place_to_others():
    trials, _ = halve(9, lambda number, rung: number / 10, fails={(1, 0), (2, 0), (3, 1)})
    by_number = {trial["number"]: trial for trial in trials}
    assert [by_number[number]["status"] for number in (1, 2, 3, 4, 5)] == [*["diverged"] * 3, "finished", "stopped"]
    assert [trial["number"] for trial in trials[-3:]] == [3, 1, 2]  # behind all that have a result
    assert all(is_over(trial) for trial in trials)
    trials, _ = halve(4, lambda number, rung: 1.0, fails={(number, 0) for number in range(1, 5)})
    assert {trial["status"] for trial in trials} == {"diverged"}


def test_nobody_is_stopped_before_all_are_there():
    at_rung = [{"status": "paused", "rungs_reached": [number], "bits_per_byte": number} for number in (1, 2, 3)]
    trials = [new_trial(each["bits_per_byte"], {}) | each for each in at_rung]
    trials.append(new_trial(4, {}))
    stop_losers(trials, 2)
    assert [trial["status"] for trial in trials] == ["paused", "paused", "paused", "waiting"]
    assert [trial["number"] for trial in open_trials(trials)] == [4]
