import pytest

from nnx_cli.errors import DataError
from nnx_cli.experiments.rate_search import FACTORS, best_rate, next_factor, short_rate, training_text


def tried(*bits):
    return [
        {"factor": factor, "lr": factor / 100, "bits_per_byte": each}
        for factor, each in zip((*FACTORS, 4.0), bits, strict=False)
    ]


def test_every_competitor_tries_the_same_factors_first():
    assert [next_factor(tried(*[3.0] * n)) for n in range(3)] == [0.5, 1.0, 2.0]


@pytest.mark.parametrize(
    ("bits", "further"), [((3.0, 2.0, 2.5), None), ((2.0, 2.5, 3.0), 0.25), ((3.0, 2.5, 2.0), 4.0)]
)
def test_one_step_further_where_the_best_is_at_an_edge(bits, further):
    assert next_factor(tried(*bits)) == further
    assert next_factor([*tried(*bits), {"factor": further or 4.0, "lr": 1.0, "bits_per_byte": 1.0}]) is None


def test_a_rate_that_diverges_is_not_chosen():
    assert best_rate(tried(3.0, None, 2.9)) == 0.02 and next_factor(tried(2.0, None, None)) == 0.25
    assert next_factor(tried(None, None, None)) == 0.25 and best_rate(tried(None, None, None)) == 0.005
    assert best_rate(tried(2.0, 2.0, 3.0)) == 0.005  # of equals the lower


def test_the_search_sees_training_text_alone(tokens):
    text = training_text(tokens, 32)
    assert len(text.val) == int(0.05 * len(tokens.train))
    assert text.train.tolist() + text.val.tolist() == tokens.train.tolist()
    assert text.fingerprint != tokens.fingerprint  # nothing goes on with it by mistake


def test_a_text_too_short_to_search_on(tokens):
    with pytest.raises(DataError, match="one sequence needs"):
        training_text(tokens, len(tokens.train) // 2)


def test_short_runs_have_higher_rates():
    assert short_rate(0.01, 1000, 1000) == short_rate(0.01, 1000, 500) == 0.01
    assert short_rate(0.01, 1000, 4000) == 0.016  # 4 ** 0.32 = 1.56
    assert short_rate(0.02, 1000, 10_000) == 0.042
