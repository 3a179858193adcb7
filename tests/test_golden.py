"""Numbers of small runs, as they were recorded: to the last digit on the same kind of CPU and torch."""

import json
from pathlib import Path

import golden
import pytest

from nnx_cli.kernels import attention_c

RECORDED = json.loads(Path(__file__).with_name("golden.json").read_text())


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return golden.prepare(golden.run_here, tmp_path_factory.mktemp("golden"))


@pytest.fixture(autouse=True)
def torchs_attention(monkeypatch):
    """Not every machine has a compiler for ours, which draws other masks of dropout."""
    monkeypatch.setattr(attention_c, "takes", lambda q, k, v: False)


@pytest.mark.parametrize("run", golden.SMALL_RUNS, ids=" ".join)
def test_numbers_are_those_recorded(data, run):
    exact = all(RECORDED[key] == value for key, value in golden.capability().items())
    found = golden.measure_small(golden.run_here, data, run)
    assert golden.unlike(RECORDED["runs"][" ".join(run)], found, exact) == []
