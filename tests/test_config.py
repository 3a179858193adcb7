import dataclasses
import math
from pathlib import Path

import pytest

from nnx_cli import config as config_module
from nnx_cli.commands._options import KINDS
from nnx_cli.config import (
    Field,
    PrepareConfig,
    RaceConfig,
    SampleConfig,
    TrainConfig,
    check_one_length,
    check_range,
    coerce,
    own_fields,
    parse_bytes,
    parse_count,
    parse_duration,
    parse_toml,
    read_fields,
    unescape,
)
from nnx_cli.errors import NnxError, UsageError

CONFIGS = [PrepareConfig, TrainConfig, SampleConfig, RaceConfig]


@pytest.mark.parametrize("config", CONFIGS)
def test_fields_are_read_as_they_are(config):
    read = own_fields(config)
    real = dataclasses.fields(config)
    assert [(f.name, f.default) for f in read] == [(f.name, f.default) for f in real]
    for field, true in zip(read, real, strict=True):
        assert true.type in (field.type, f"{field.type} | None") and field.type in KINDS
        assert field.help, field.name
    assert isinstance(config(), config), "defaults are in range"


def test_an_option_is_the_name_with_dashes():
    assert Field("max_steps", "int", None, "").option == "--max-steps"


def test_a_class_that_is_not_there():
    with pytest.raises(LookupError, match="no class Nothing"):
        read_fields(Path(config_module.__file__), "Nothing")


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("90s", 90), ("20m", 1200), ("20 min", 1200), ("8h", 28800), ("2d", 172800), ("45", 45), ("1.5h", 5400)],
)
def test_durations(text, seconds):
    assert parse_duration(text) == seconds


@pytest.mark.parametrize("text", ["", "h", "0", "0s", "-5m", "5 weeks", "1e3", "inf", "nan", "5m5", "9" * 400])
def test_what_is_no_duration(text):
    with pytest.raises(UsageError, match="is no length of time"):
        parse_duration(text)


@pytest.mark.parametrize(
    ("text", "n_bytes"),
    [("8GB", 8 * 2**30), ("7.5GiB", int(7.5 * 2**30)), ("512M", 2**29), ("512 mb", 2**29), ("1tb", 2**40)],
)
def test_amounts_of_memory(text, n_bytes):
    assert parse_bytes(text) == n_bytes


@pytest.mark.parametrize("text", ["", "GB", "0GB", "-8GB", "8XB", "8 gigabytes", "inf", "nan", "9" * 400, "8GBB"])
def test_what_is_no_amount_of_memory(text):
    with pytest.raises(UsageError, match="is no amount of memory"):
        parse_bytes(text)


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        (r"\n", "\n"),
        (r"a\tb", "a\tb"),
        (r"\\n", r"\n"),
        (r"\\\n", "\\\n"),
        (r"C:\dir\x", r"C:\dir\x"),
        ("\\", "\\"),
        ("\n", "\n"),
        ("小猫\\n", "小猫\n"),
        ("", ""),
    ],
)
def test_escapes_of_the_command_line(typed, meant):
    assert unescape(typed) == meant


@pytest.mark.parametrize(
    ("value", "low", "high", "said"),
    [
        (0, 1, 2**40, "--x is 0; it must be a number at least 1 and at most 1,099,511,627,776"),
        (2**70, 0, 2**63 - 1, "--x is 1180591620717411303424; it must be a number at least 0 and at most 9,223,372,"),
        (10**400, 0, 10, "--x is a number of 401 digits; it must be"),
        (-(10**400), 0, 10, "--x is a number of 401 digits; it must be"),
        (99, 256, 256, "--x is 99; it must be 256"),
        (1.25, 0.0, 1.0, "--x is 1.25; it must be a number at least 0 and at most 1"),
        (2e-9, 1e-8, 0.5, "--x is 2e-09; it must be a number at least 1e-08 and at most 0.5"),
        (1e9, 0.0, 1e3, "--x is 1000000000; it must be a number at least 0 and at most 1,000"),
        (math.inf, 0, 1e9, "--x is inf; it must be a number at least 0 and at most 1,000,000,000"),
        (math.nan, 0, 5, "--x is nan"),
    ],
)
def test_numbers_stand_as_people_write_them(value, low, high, said):
    with pytest.raises(UsageError) as error:
        check_range("x", value, low, high)
    assert str(error.value).startswith(said)


POSITIVE = [
    "max_steps",
    "batch_size",
    "grad_accum",
    "tokens_per_step",
    "val_every",
    "val_batches",
    "save_every",
    "keep",
    "patience",
    "threads",
]


@pytest.mark.parametrize("name", POSITIVE)
@pytest.mark.parametrize("value", [0, -1, 2**63])
def test_counts_out_of_range_are_refused(name, value):
    with pytest.raises(UsageError, match="--" + name.replace("_", "-")):
        TrainConfig(**{name: value})


@pytest.mark.parametrize("name", ["lr", "min_lr", "weight_decay", "grad_clip", "epochs"])
@pytest.mark.parametrize("value", [-1.0, math.nan, math.inf, -math.inf, 1e10])
def test_numbers_out_of_range_are_refused(name, value):
    with pytest.raises(UsageError, match="--" + name.replace("_", "-")):
        TrainConfig(**{name: value})


@pytest.mark.parametrize(
    "bad",
    [
        {"lr": 0.0},
        {"optimizer": "sgd"},
        {"schedule": "step"},
        {"precision": "fp8"},
        {"compile": "maybe"},
        {"seed": -1},
        {"seed": 2**63},
        {"lr": 0.1, "min_lr": 0.2},
        {"max_steps": 5, "warmup_steps": 6},
        {"max_time": "soon"},
        {"vram": "much"},
        {"sample_every": -1},
        {"warmup_steps": -1},
    ],
    ids=str,
)
def test_settings_that_cannot_be_are_refused(bad):
    with pytest.raises(UsageError):
        TrainConfig(**bad)


def test_a_choice_names_the_nearest():
    with pytest.raises(UsageError, match="did you mean adamw"):
        TrainConfig(optimizer="adam")


@pytest.mark.parametrize(
    "bad",
    [
        {"val_fraction": 0.0},
        {"val_fraction": 0.6},
        {"val_fraction": math.nan},
        {"errors": "ignore"},
        {"vocab_size": 0},
        {"workers": 0},
        {"max_memory_bytes": 1},
    ],
    ids=str,
)
def test_settings_of_prepare_out_of_range_are_refused(bad):
    with pytest.raises(UsageError):
        PrepareConfig(**bad)


def test_one_length_at_most():
    check_one_length({"max_steps": 5, "max_time": None})
    with pytest.raises(UsageError, match="two lengths: --max-steps and --epochs"):
        check_one_length({"max_steps": 5, "epochs": 1.0})


def test_toml_is_one_level_with_underscores():
    text = 'model = "nyx"\n[train]\nmax-steps = 5\nlr = 1e-3\n[model_shape]\ndim = 64\n'
    assert parse_toml(text, "x.toml") == {"model": "nyx", "max_steps": 5, "lr": 1e-3, "dim": 64}


def test_an_unknown_key_gives_the_nearest():
    with pytest.raises(UsageError, match="no setting 'max_step'; did you mean max_steps"):
        coerce(FIELDS, parse_toml("max_step = 5", "x.toml"), "x.toml")
    with pytest.raises(UsageError, match="__class__"):
        coerce(FIELDS, parse_toml("__class__ = 5", "x.toml"), "x.toml")


@pytest.mark.parametrize("name", ["gbkk", "utf8x", "rot13", "hex", "zlib", "undefined", "", "a\0b"])
def test_what_is_no_encoding_of_text_is_refused(name):
    with pytest.raises(UsageError, match="--encoding"):
        PrepareConfig(encoding=name)


def test_encodings_have_many_names():
    for name in ("cp1251", "Windows-1251", "GBK", "latin1", "UTF-16", "shift_jis", "KOI8-R", "mac-roman", "cp037"):
        assert PrepareConfig(encoding=name).encoding == name
    with pytest.raises(UsageError, match=r"did you mean \w*1251"):
        PrepareConfig(encoding="win1251x")


FIELDS = [
    Field("max_steps", "int", None, ""),
    Field("lr", "float", None, ""),
    Field("qk_norm", "bool", False, ""),
    Field("max_time", "str", None, ""),
]


def test_values_take_the_type_of_their_field():
    values = coerce(FIELDS, {"lr": 1, "max_steps": 3, "qk_norm": True, "max_time": 90}, "file")
    assert values == {"lr": 1.0, "max_steps": 3, "qk_norm": True, "max_time": "90"}
    assert type(values["lr"]) is float
    several = Field("log_to", "list[str]", None, "")
    assert [coerce([several], {"log_to": given}, "file")["log_to"] for given in ("a", ["a", "b"])] == [
        ["a"],
        ["a", "b"],
    ]


@pytest.mark.parametrize(
    "bad",
    [
        {"max_steps": 1.5},
        {"max_steps": "5"},
        {"max_steps": True},
        {"lr": "x"},
        {"lr": True},
        {"qk_norm": 1},
        {"max_time": [1]},
        {"lr": {}},
        {"log_to": 1},
        {"log_to": ["a", 1]},
        {"log_to": {"a": 1}},
    ],
    ids=str,
)
def test_values_of_another_type_are_refused(bad):
    with pytest.raises(
        UsageError, match="must be (a whole number|a number|text|text, or a list of texts|true or false)$"
    ):
        coerce([*FIELDS, Field("log_to", "list[str]", None, "")], bad, "file")


def test_every_kind_of_error_has_its_exit_code():
    codes = {kind.__name__: kind.exit_code for kind in NnxError.__subclasses__()}
    assert codes == {
        "UsageError": 2,
        "DataError": 3,
        "DoesNotFit": 4,
        "CheckpointError": 5,
        "QualityError": 6,
        "MissingFeature": 7,
        "OutputError": 8,
        "Interrupted": 130,
    }
    assert NnxError("x").exit_code == 1


@pytest.mark.parametrize(
    ("text", "count"), [("10.7M", 10_700_000), ("800k", 800_000), ("1B", 10**9), ("2 G", 2 * 10**9), ("77", 77)]
)
def test_counts(text, count):
    assert parse_count("parameters", text) == count


@pytest.mark.parametrize("text", ["", "0", "-1M", "1e6", "10m", "M", "1.5.2M", "٣M", "9" * 50, "10.7MB"])
def test_what_is_no_count(text):
    with pytest.raises(UsageError, match="--parameters is"):
        parse_count("parameters", text)
    assert parse_count("parameters", text, silent=True) is None


@pytest.mark.parametrize(
    ("equal", "budget", "amount"),
    [
        ("tokens", "20M", 20_000_000),
        ("tokens", "500k", 500_000),
        ("tokens", "1000", 1000),
        ("time", "10m", 600.0),
        ("time", "30s", 30.0),
        ("time", "1.5h", 5400.0),
        ("flops", "1e15", 1e15),
        ("flops", "2.5e+14", 2.5e14),
        ("flops", "1000000000000", 1e12),
    ],
)
def test_budgets_in_the_unit_of_what_is_equal(equal, budget, amount):
    assert RaceConfig(equal=equal, budget=budget).amount() == amount
    for other in {"tokens", "time", "flops"} - {equal}:
        if not budget.isdecimal():  # a number alone may be one of tokens or of FLOPs
            with pytest.raises(UsageError, match=f"--equal {other} needs"):
                RaceConfig(equal=other, budget=budget)


@pytest.mark.parametrize("equal", ["tokens", "time", "flops"])
@pytest.mark.parametrize("budget", ["", "0", "0s", "-1", "nan", "inf", "1e", "ten", "1e40", "1e999", "10 parsecs"])
def test_what_is_no_budget(equal, budget):
    with pytest.raises(UsageError, match="--budget|length of time"):
        RaceConfig(equal=equal, budget=budget)
