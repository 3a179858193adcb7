import itertools
import math

import pytest

from nnx_cli.commands._options import ALIASES, model_fields
from nnx_cli.commands._wandb_sweep import read_wandb_sweep
from nnx_cli.config import TrainConfig, own_fields
from nnx_cli.errors import UsageError
from nnx_cli.experiments.search_space import Choice, Range

pytest.importorskip("yaml", reason="PyYAML is an extra: pip install 'nnx-cli[sweep]'")

FIELDS = {**model_fields(), **{field.name: field for field in own_fields(TrainConfig)}}
FIELDS |= {alias: FIELDS[name] for alias, name in ALIASES.items()}


def read(folder, content):
    """The sweep of a file with that content."""
    (folder / "s.yaml").write_text(content)
    return read_wandb_sweep(folder / "s.yaml", FIELDS)


@pytest.mark.parametrize(
    ("described", "found"),
    [
        ("n_layers: {values: [2, 4]}", Choice((2, 4))),
        ("n_layers: {value: 2}", Choice((2,))),
        ("n_layers: {distribution: constant, value: 2.0}", Choice((2,))),
        ("n_layers: {min: 2, max: 6}", Range(2, 6, whole=True)),
        ("n_layers: {distribution: int_uniform, min: 2, max: 6}", Range(2, 6, whole=True)),
        ("n_layers: {distribution: q_uniform, min: 2, max: 8, q: 2}", Range(2, 8, step=2, whole=True)),
        ("lr: {min: 0.001, max: 0.1}", Range(0.001, 0.1)),
        ("lr: {min: 1e-3, max: 1e-1, distribution: log_uniform_values}", Range(0.001, 0.1, log=True)),  # text in YAML
        ("lr: {distribution: log_uniform, min: -7, max: 0}", Range(float(f"{math.exp(-7):.12g}"), 1.0, log=True)),
        ("dropout: {distribution: q_uniform, min: 0, max: 0.4, q: 0.1}", Range(0.0, 0.4, step=0.1)),
        ("compile: {values: [on, off]}", Choice(("on", "off"))),
        ("optimizer-in-backward: {values: [true, false]}", Choice((True, False))),
        ("model_dim: {values: [32]}", Choice((32,))),
    ],
)
def test_parameters(tmp_path, described, found):
    read_space = read(tmp_path, f"parameters:\n  {described}").space
    assert [*read_space.values()] == [found]
    (name,) = read_space
    assert name in {"n_layers", "lr", "dropout", "compile", "optimizer_in_backward", "dim"}


@pytest.mark.parametrize(
    ("content", "settings", "told"),
    [
        ("", {"sampler": "random"}, []),
        ("method: grid", {"sampler": "grid"}, []),
        ("method: bayes\nrun_cap: 7", {"sampler": "tpe", "trials": 7}, ["bayes is done by Optuna's TPE"]),
        ("metric: {name: val_bits_per_byte}", {"sampler": "random"}, []),
        (
            "early_terminate: {type: hyperband, eta: 2, min_iter: 3, s: 2}",
            {"sampler": "halving", "eta": 2},
            ["hyperband is done by successive halving; s, min_iter not read"],
        ),
        ("name: a\nprogram: b.py\nproject: c", {"sampler": "random"}, ["not read, for they are for agents: program,"]),
    ],
)
def test_how_it_is_searched(tmp_path, content, settings, told):
    found = read(tmp_path, f"{content}\nparameters: {{lr: {{values: [1, 2]}}}}")
    assert found.settings == settings and len(found.notes) == len(told)
    assert all(words in note for words, note in zip(told, found.notes, strict=True))


@pytest.mark.parametrize(
    ("why", "content"),
    [
        (
            "is not YAML: while parsing a flow node, expected the node content, but found '<stream end>' (line 1,",
            "parameters: [",
        ),
        ("is not YAML: found undefined alias 'y' (line 1, column 4)", "x: *y"),
        ("s.yaml is empty; it must have names and values", ""),
        ("s.yaml is not text but a PDF", "%PDF-1.7\n%\x00\x01"),
        ("must have names and values", "- a\n- b"),
        ("has no parameters", "method: grid\nparameters: {}"),
        ("must have names and values", "method: grid"),
        ("'methode' is not known here; did you mean method?", "methode: grid\nparameters: {lr: {value: 1}}"),
        ("the method 'annealing' is not known", "method: annealing\nparameters: {lr: {value: 1}}"),
        ("the method ['random'] is not known here", "method: [random]\nparameters: {lr: {value: 1}}"),
        ("no setting 'lrr'; did you mean lr?", "parameters: {lrr: {value: 1}}"),
        ("lr is there twice", "parameters: {lr: {value: 1}, learning_rate: {value: 2}}"),
        ("the distribution 'normal' is not known", "parameters: {lr: {distribution: normal, mu: 1, sigma: 1}}"),
        ("'parameters' is not known here", "parameters: {lr: {parameters: {a: {value: 1}}}}"),
        ("needs max", "parameters: {lr: {distribution: uniform, min: 1}}"),
        ("needs q", "parameters: {lr: {distribution: q_uniform, min: 1, max: 2}}"),
        ("neither value, values nor min and max", "parameters: {lr: {min: 1}}"),
        ("q does nothing with", "parameters: {lr: {min: 1.0, max: 2, q: 1}}"),
        ("upside down", "parameters: {lr: {min: 2.0, max: 1.0}}"),
        ("above 0", "parameters: {lr: {distribution: log_uniform_values, min: 0, max: 1.0}}"),
        ("no exponent of e", "parameters: {lr: {distribution: log_uniform, min: -9, max: 1000}}"),
        ("is no number", "parameters: {lr: {values: [1, null]}}"),
        ("has no values", "parameters: {lr: {values: []}}"),
        (
            "the metric (name 'accuracy', goal 'maximize') is not ours",
            "metric: {name: accuracy, goal: maximize}\nparameters: {lr: {value: 1}}",
        ),
        ("run_cap is 'many'", "run_cap: many\nparameters: {lr: {value: 1}}"),
        ("early_terminate: the type 'envelope'", "early_terminate: {type: envelope}\nparameters: {lr: {value: 1}}"),
        (
            "goes with the method random alone",
            "method: bayes\nearly_terminate: {type: hyperband}\nparameters: {lr: {value: 1}}",
        ),
    ],
)
def test_what_a_file_may_not_have(tmp_path, why, content):
    check_refused(tmp_path, why, content)


def check_refused(tmp_path, why, content):
    with pytest.raises(UsageError) as refused:
        read(tmp_path, content)
    assert why in str(refused.value) and len(str(refused.value)) < 400
    assert str(refused.value).count("s.yaml") == 1


BOMB = [f"&{level} [{', '.join(['*' + below] * 10)}]" for below, level in itertools.pairwise("abcdefghijklm")]


@pytest.mark.parametrize(
    "place",
    [
        "parameters: {lr: {values: *m}}",
        "parameters: {lr: {value: *m}}",
        "parameters: {n_layers: {min: *m, max: *m}}",
        "parameters: {lr: {distribution: log_uniform, min: *m, max: 2}}",
        "parameters: {lr: {distribution: *m, min: 1, max: 2}}",
        "parameters: {lr: *m}",
        "parameters: *m",
        "method: *m\nparameters: {lr: {value: 1}}",
        "metric: {name: *m}\nparameters: {lr: {value: 1}}",
        "run_cap: *m\nparameters: {lr: {value: 1}}",
        "early_terminate: {type: *m}\nparameters: {lr: {value: 1}}",
        "early_terminate: {type: hyperband, eta: *m}\nparameters: {lr: {value: 1}}",
    ],
)
def test_what_is_endless_when_written_out_is_not_written_out(tmp_path, place):
    """Lists of ten lists of ten lists: a trillion words in half a kilobyte."""
    check_refused(tmp_path, "--wandb-yaml", f"description: [{', '.join(['&a [x]', *BOMB])}]\n{place}")


def test_many_values_take_no_longer_than_reading_them(tmp_path):
    found = read(tmp_path, f"parameters: {{lr: {{values: {[n / 10_000 for n in range(1, 20_000)]}}}}}")
    assert found.space["lr"].count == 19_999
