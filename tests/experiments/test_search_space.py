import itertools

import pytest

from nnx_cli.config import Field
from nnx_cli.errors import UsageError
from nnx_cli.experiments.samplers import check_grid, draws, grid
from nnx_cli.experiments.search_space import Choice, Range, choice, combinations, make_range, parse_setting

FIELDS = {
    "lr": Field("lr", "float", None, ""),
    "n_layers": Field("n_layers", "int", 4, ""),
    "compile": Field("compile", "str", "auto", ""),
    "optimizer_in_backward": Field("optimizer_in_backward", "bool", False, ""),
    "tokenizer": None,
}


@pytest.mark.parametrize(
    ("text", "name", "found"),
    [
        ("lr=1e-4..1e-2:log", "lr", Range(1e-4, 1e-2, log=True)),
        (" lr = .1 .. 0.3 ", "lr", Range(0.1, 0.3)),
        ("lr=-1..1", "lr", Range(-1.0, 1.0)),
        ("n-layers=2..6", "n_layers", Range(2, 6, whole=True)),
        ("--n_layers=2..8:2", "n_layers", Range(2, 8, step=2, whole=True)),
        ("lr=0..1:0.25", "lr", Range(0, 1, step=0.25)),
        ("n_layers=1e1, 12.0", "n_layers", Choice((10, 12))),
        ("lr=1,2e-3", "lr", Choice((1.0, 0.002))),
        ("compile=on,off", "compile", Choice(("on", "off"))),
        ("optimizer_in_backward=true,No", "optimizer_in_backward", Choice((True, False))),
    ],
)
def test_what_set_means(text, name, found):
    assert parse_setting(text, FIELDS) == (name, found)
    assert all(type(a) is type(b) for a, b in zip(parse_setting(text, FIELDS)[1].ends, found.ends, strict=True))


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("lr", "no NAME=VALUES"),
        ("=3", "no NAME=VALUES"),
        ("n_layer=2,3", "did you mean n_layers"),
        ("tokenizer=byte,bpe", "same for all trials"),
        ("lr=1e-2..1e-4:log", "upside down"),
        ("lr=3..3", "single value"),
        ("lr=0..1e-2:log", "above 0"),
        ("lr=-1..1:log", "above 0"),
        ("lr=1e-4..1e-2:lin", "log or a step"),
        ("lr=1..2:3", "does not fit"),
        ("lr=1..2:-0.1", "does not fit"),
        ("lr=", "no number"),
        ("lr=1,,2", "no number"),
        ("lr=1,nan", "no number"),
        ("lr=1,1.0", "twice"),
        ("n_layers=2.5,3", "no whole number"),
        ("n_layers=2..3.5", "no whole number"),
        ("n_layers=1e400", "no whole number"),
        ("optimizer_in_backward=maybe", "no yes or no"),
        ("compile=on,,off", "no value"),
    ],
)
def test_what_set_refuses(text, why):
    with pytest.raises(UsageError, match=why):
        parse_setting(text, FIELDS)


@pytest.mark.parametrize("value", [True, None, [1], {"a": 1}, float("inf"), "1 000", "0x10"])
def test_numbers_of_a_file_are_numbers(value):
    with pytest.raises(UsageError):
        choice("a file", [value], FIELDS["lr"])
    with pytest.raises(UsageError):
        make_range("a file", value, 3, FIELDS["n_layers"])


def test_what_yaml_makes_of_on_and_off():
    assert choice("a file", [True, False], FIELDS["compile"]) == Choice(("on", "off"))


SPACE = {
    "lr": Range(1e-4, 1e-2, log=True),
    "n_layers": Range(2, 6, whole=True),
    "batch_size": Range(1, 512, log=True, whole=True),
    "dropout": Range(0.0, 0.3, step=0.1),
    "optimizer": Choice(("adamw", "muon")),
}


def test_more_trials_begin_with_the_same_ones():
    many = [*itertools.islice(draws(SPACE, 5), 200)]
    assert [*itertools.islice(draws(SPACE, 5), 20)] == many[:20] != [*itertools.islice(draws(SPACE, 6), 20)]
    assert {name: many[3][name] for name in ("lr", "optimizer")} in [
        {name: each[name] for name in ("lr", "optimizer")}
        for each in itertools.islice(draws({n: SPACE[n] for n in ("optimizer", "lr")}, 5), 4)
    ]  # a setting more changes no other one


def test_draws_fill_their_ranges():
    many = [*itertools.islice(draws(SPACE, 5), 600)]
    assert {each["n_layers"] for each in many} == {2, 3, 4, 5, 6}
    assert {each["dropout"] for each in many} == {0.0, 0.1, 0.2, 0.3}
    assert {each["optimizer"] for each in many} == {"adamw", "muon"}
    rates = [each["lr"] for each in many]
    assert all(1e-4 <= rate <= 1e-2 and float(f"{rate:.4g}") == rate for rate in rates)
    assert 0.4 < sum(rate < 1e-3 for rate in rates) / 600 < 0.6  # as many in each decade
    sizes = [each["batch_size"] for each in many]
    assert all(type(size) is int and 1 <= size <= 512 for size in sizes)
    assert 0.2 < sum(size < 8 for size in sizes) / 600 < 0.5


def test_no_combination_is_drawn_twice():
    space = {"n_layers": Range(2, 6, whole=True), "dropout": Range(0, 0.2, step=0.1)}
    found = [*draws(space, 1)]
    assert len(found) == combinations(space) == 15
    assert sorted(map(str, found)) == sorted(map(str, grid(space)))
    assert combinations(SPACE) is None


def test_a_grid_is_all_combinations():
    space = {"optimizer": Choice(("adamw", "muon")), "n_layers": Range(1, 5, step=2, whole=True)}
    assert [tuple(each.values()) for each in grid(space)] == [
        *[("adamw", n) for n in (1, 3, 5)],
        *[("muon", n) for n in (1, 3, 5)],
    ]
    assert check_grid(space) == 6
    with pytest.raises(UsageError, match="any number from 0.0001 to 0.01"):
        check_grid(SPACE)
    with pytest.raises(UsageError, match="1,000,000 combinations"):
        check_grid({name: Range(1, 1000, whole=True) for name in "ab"})
