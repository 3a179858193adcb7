from dataclasses import replace

import pytest

from nnx_cli import models
from nnx_cli.config import TrainConfig
from nnx_cli.planning.fit import Predictor, advice, first_that_fits, largest_batch, savings
from nnx_cli.planning.memory import ANY_GPU, CPU

GIB = 2**30


def predictor(name="llama", size="large", lora_rank=None):
    return Predictor(name, models.make_config(name, size=size), lora_rank, ANY_GPU)


def train(**settings):
    return TrainConfig(**(dict(precision="bf16") | settings))


def chosen(train):
    return train.activation_checkpointing, train.optimizer, train.weight_precision


def test_exact_measures_come_first():
    steps = [(chosen(settings), len(taken)) for settings, taken in savings(train())]
    assert steps == [
        (("off", "adamw", "fp32"), 0),
        (("half", "adamw", "fp32"), 1),
        (("on", "adamw", "fp32"), 1),
        (("on", "adamw8bit", "fp32"), 2),
        (("on", "adamw8bit", "bf16"), 3),
    ]


def test_what_was_asked_for_stays():
    asked = train(optimizer="lion", activation_checkpointing="off")
    assert [chosen(settings) for settings, _ in savings(asked)] == [("off", "lion", "fp32"), ("off", "lion", "bf16")]
    assert len(list(savings(train(optimizer="muon", activation_checkpointing="half", weight_precision="fp32")))) == 1


@pytest.mark.parametrize("name", models.names())
def test_every_saver_saves_memory(name):
    found = predictor(name, "base")
    peaks = [found.peak(settings, 1) for settings, _ in savings(train())]
    assert peaks == sorted(peaks, reverse=True) and peaks[-1] < 0.6 * peaks[0]


@pytest.mark.parametrize("name", models.names())
def test_a_billion_parameters_fit_in_eight_gigabytes(name):
    settings, taken, fits = first_that_fits(predictor(name, "xl"), train(), 1, 7 * GIB)
    assert fits and len(taken) == 3 and chosen(settings) == ("on", "adamw8bit", "bf16")


def test_the_largest_batch_is_the_largest():
    found = predictor()
    settings, _, fits = first_that_fits(found, train(), 1, 7 * GIB)
    n = found.largest(settings, 7 * GIB, 64)
    assert fits and 1 <= n < 64
    assert found.peak(settings, n) <= 7 * GIB < found.peak(settings, n + 1)


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("hardware", [CPU, ANY_GPU, replace(ANY_GPU, triton=False)], ids=["cpu", "card", "no-triton"])
@pytest.mark.parametrize("name", models.names())
def test_nothing_takes_more_than_the_upper_bound(name, hardware, dropout):
    found = Predictor(name, models.make_config(name, size="nano", dropout=dropout), None, hardware)
    for optimizer, precision in (("muon", "fp32"), ("adamw", "bf16")):
        settings = next(savings(train(optimizer=optimizer, precision=precision)))[0]
        for rows in (8, 256):
            assert 1.2 * found.peak(settings, rows) < found.upper_bound(settings, rows)


@pytest.mark.parametrize("lora_rank", [None, 4])
@pytest.mark.parametrize("name", models.names())
def test_nothing_takes_less_than_the_lower_bound(name, lora_rank):
    found = predictor(name, "nano", lora_rank)
    for settings, _ in savings(train(optimizer_in_backward=lora_rank is None, grad_accum=1)):
        assert found.lower_bound(settings) < found.peak(settings, 1)
    assert not found.fits(settings, 1, found.lower_bound(settings) - 1)


def test_what_clearly_fits_is_not_simulated(monkeypatch):
    found = predictor(size="nano")
    monkeypatch.setattr(found, "peak", None)
    settings = next(savings(train()))[0]
    assert first_that_fits(found, train(), 8, 7 * GIB) == (settings, (), True)
    assert found.largest(settings, 7 * GIB, 8) == 8


@pytest.mark.parametrize(("budget", "wanted"), [(99, 0), (100, 1), (249, 3), (250, 4), (10**6, 50)])
def test_the_largest_batch_within_a_budget(budget, wanted):
    assert largest_batch(lambda rows: 50 + 50 * rows, budget, 50) == wanted
    assert largest_batch(lambda rows: 50 + 50 * rows, budget, 50, fitting=wanted) == wanted


PEAKS = {  # of batches of some rows
    "line": lambda rows: 70 + 9 * rows,
    "flat at first": lambda rows: max(400, 20 * rows),
    "flat from some rows on": lambda rows: min(40 * rows, 800) + rows // 50,
    "steps": lambda rows: 30 * (rows // 7) + 40,
    "less for more rows here and there": lambda rows: 100 + 10 * rows + 15 * (rows % 2),
}


@pytest.mark.parametrize("shape", PEAKS)
@pytest.mark.parametrize("least", [0, 40])
def test_the_largest_batch_is_found_on_any_curve(shape, least):
    peak = PEAKS[shape]
    for budget in (30, 41, 95, 400, 401, 640, 1000, 10**5):
        for most in (1, 2, 20, 300):
            found = largest_batch(peak, budget, most, least=least)
            assert 0 <= found <= most and (found == 0 or peak(found) <= budget)
            assert found == most or peak(found + 1) > budget


def test_a_line_is_searched_in_few_steps():
    asked = []

    def peak(rows):
        asked.append(rows)
        return 1000 + 64 * rows

    assert largest_batch(peak, 1000 + 64 * 500 + 3, 10**6, least=900) == 500
    assert len(asked) <= 5 and asked[-1] == 501
    asked.clear()
    assert largest_batch(peak, 10**9, 4096, least=1000) == 4096 and asked == [1, 4096]


@pytest.mark.parametrize("first", range(6))
def test_the_first_settings_that_fit_are_found(first):
    steps = [settings for settings, _ in savings(train(), "muon")]

    class Fitting:
        n_gpus = 1

        def fits(self, settings, rows, budget):
            return steps.index(settings) >= first

    settings, taken, fits = first_that_fits(Fitting(), train(), 1, 0, "muon")
    assert (settings, fits) == (steps[min(first, 4)], first < 5)
    assert len(taken) == (0, 1, 1, 2, 3, 3)[first]


def test_a_batch_too_large_to_simulate_lies_on_a_line():
    found = predictor(size="nano")
    settings = next(savings(train()))[0]
    most = 2**18 // 256
    half, whole = found.peak(settings, most // 2), found.peak(settings, most)
    assert found.peak(settings, 3 * most) == pytest.approx(whole + 4 * (whole - half), rel=1e-6)


def test_advice_names_what_would_help():
    xl = predictor(size="xl")
    assert advice(xl, train(), 7 * GIB, 5) == "take --batch-size 5"
    assert advice(xl, train(optimizer="adamw"), 7 * GIB, 0) == "leave out --optimizer"
    assert "--optimizer-in-backward" in advice(xl, train(), 5 * GIB, 0)
    assert "smaller --size" in advice(xl, train(), 2 * GIB, 0)


def test_adapters_take_less_than_half_of_full_training():
    full, adapters = predictor(size="base"), predictor(size="base", lora_rank=8)
    settings = next(savings(train()))[0]
    assert adapters.memory(settings, 4).gradients_bytes < 0.05 * full.memory(settings, 4).gradients_bytes
    on = train(activation_checkpointing="on", optimizer="adamw", weight_precision="fp32")
    assert adapters.peak(on, 4) < 0.45 * full.peak(settings, 4)
