import pytest

from nnx_cli.experiments.statistics import mean_and_error, paired_difference, t_probability, t_quantile, ties

# of the table in any textbook, two-sided
QUANTILES = {1: 12.7062, 2: 4.30265, 3: 3.18245, 4: 2.77645, 5: 2.57058, 9: 2.26216, 10: 2.22814, 30: 2.04227}


@pytest.mark.parametrize(("df", "expected"), QUANTILES.items())
def test_quantiles_are_those_of_the_tables(df, expected):
    assert t_quantile(df) == pytest.approx(expected, abs=5e-5)
    assert t_probability(t_quantile(df), df) == pytest.approx(0.95, abs=1e-12)


def test_other_confidences_and_many_degrees_of_freedom():
    assert t_quantile(2, 0.99) == pytest.approx(9.92484, abs=5e-5)
    assert t_quantile(7, 0.90) == pytest.approx(1.89458, abs=5e-5)
    assert t_quantile(999) == pytest.approx(1.96234, abs=5e-5)  # nearly the normal one


def test_mean_and_its_error():
    assert mean_and_error([2.0]) == (2.0, None)
    mean, error = mean_and_error([1.0, 2.0, 3.0, 4.0])
    assert mean == 2.5 and error == pytest.approx(0.645497)  # stdev 1.290994 / 2


def test_differences_are_paired_by_seed():
    first, second = {1: 2.0, 2: 3.0, 3: 4.0, 9: 0.0}, {3: 3.9, 2: 2.9, 1: 1.8, 7: 9.0}
    difference = paired_difference(first, second)
    # 0.2, 0.1, 0.1: mean 0.13333, standard error 0.033333, t 4.30265
    assert difference.mean == pytest.approx(0.133333, abs=1e-6)
    assert (difference.low, difference.high) == pytest.approx((-0.010088, 0.276755), abs=1e-6)
    assert difference.is_tie  # though every seed says the same
    assert not paired_difference(first, {1: 1.0, 2: 2.01, 3: 2.99}).is_tie


def test_no_verdict_without_two_seeds():
    assert paired_difference({1: 2.0}, {1: 1.0}) is None
    assert paired_difference({1: 2.0, 2: 2.0}, {3: 1.0, 2: 1.0}) is None
    assert ties({"a": {1: 2.0}, "b": {1: 1.0}}) == ({"a": None, "b": None}, 0)


def test_equal_numbers_tie_and_equal_differences_do_not():
    assert paired_difference({1: 2.0, 2: 3.0}, {1: 2.0, 2: 3.0}).is_tie
    assert not paired_difference({1: 2.0, 2: 3.0}, {1: 1.0, 2: 2.0}).is_tie


def test_every_pair_is_compared_once():
    results = {
        "a": {1: 1.00, 2: 1.10, 3: 1.05},
        "b": {1: 1.01, 2: 1.09, 3: 1.05},
        "c": {1: 2.00, 2: 2.10, 3: 2.06},
        "d": {},
    }
    tied, n_comparisons = ties(results)
    assert n_comparisons == 3  # d finished no run
    assert tied == {"a": ["b"], "b": ["a"], "c": [], "d": None}
