"""Command lines as the agents of sweeps write them."""

import pytest

from nnx_cli.cli import COMMANDS, _load
from nnx_cli.commands._agent_words import plain_words


def plain(*words, command="train"):
    return [*plain_words(_load(command), words)]


@pytest.mark.parametrize(
    ("given", "plainly"),
    [
        ("--lr=0.001 --n_layers=4", "--lr=0.001 --n-layers=4"),
        ("--watch=True --report=False", "--watch --no-report"),
        ("--no_watch=False --no-report=true", "--watch --no-report"),
        ("--watch True --deterministic False --lr 1", "--watch --no-deterministic --lr=1"),
        ("--dry_run=True --json=False", "--dry-run"),
        ("--patience=None --lr=None --watch=None", ""),
        ("--patience None --lr None", ""),
        ("--sample_prompt=None --max_time=20m", "--sample-prompt=None --max-time=20m"),
        ("--dim=128.0 --max_steps 1e4", "--dim=128 --max-steps=10000"),
        ("--lr=128.0 --min-lr=inf --beta2 nan", "--lr=128.0 --min-lr=inf --beta2=nan"),
        ("--filepath=a=b.txt --out=", "--filepath=a=b.txt --out="),
        ("--out --watch=True --watch", "--out=--watch=True --watch"),  # the first is a name
        ("--wach=True -- --watch=True", "--wach=True -- --watch=True"),
        ("--out", "--out"),
    ],
)
def test_words_of_an_agent_are_words_of_people(given, plainly):
    assert " ".join(plain(*given.split())) == plainly


def test_an_argument_may_be_called_true():
    assert plain("--greedy", "True", command="sample") == ["--greedy", "True"]


@pytest.mark.parametrize("name", COMMANDS)
def test_a_run_may_be_called_as_the_argument_that_takes_it(name):
    words = [word for param in _load(name).params for word in (param.name, *param.opts) if word[0] != "-"]
    assert plain(*words, command=name) == words


@pytest.mark.parametrize("name", COMMANDS)
def test_what_people_write_stays(name):
    words = [option.opts[0] for option in _load(name).params if option.param_type_name == "option" and option.is_flag]
    assert words and plain(*words, command=name) == words


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("--watch=maybe", "--watch is 'maybe'; it must be true or false"),
        ("--no_report=2", "--no-report is '2'"),
        ("--dry_run=", "--dry-run is ''"),
        ("--wach=True", "No such option: --wach; did you mean --watch?"),
        ("--n_layer=4", "did you mean --n-layers?"),
        ("--n_layers=2.5", "--n-layers is '2.5'; it must be a whole number"),
    ],
)
def test_what_an_agent_got_wrong(refused, word, message):
    refused(2, message, "train", "--lr=0.001", word)


@pytest.mark.parametrize("form", ["args", "args_no_equals", "args_no_boolean_flags"])
def test_the_library_writes_the_command_line_of_a_sweep(nnx, token_path, form):
    sweeps = pytest.importorskip("wandb.sdk.launch.sweeps.utils", reason="needs wandb")
    chosen = {"lr": 0.003, "n_layers": 2.0, "dim": 32, "report": True, "deterministic": False, "patience": None}
    words = sweeps.create_sweep_command_args({"args": {name: {"value": value} for name, value in chosen.items()}})[form]
    result = nnx("train", f"--data={token_path}", *words, "--dry_run")
    assert result.exit_code == 0, result.stderr
    rows = {
        row.split()[0]: row.split()[1] for row in result.stdout.splitlines() if row.split()[2:] == ["command", "line"]
    }
    del rows["data"]
    as_said = {"lr": "0.003", "n_layers": "2", "dim": "32", "report": "True", "deterministic": "False"}
    assert {"deterministic": "False"} | rows == as_said
