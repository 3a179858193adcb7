import subprocess
import sys

import pytest

from nnx_cli import models
from nnx_cli.planning.flops import count_parameters, meta_model
from nnx_cli.planning.recipe.table import BPE_FROM_BYTES, BPE_FROM_BYTES_SMALL
from nnx_cli.planning.recipe.tokenizer import vocabularies_for


def test_more_text_never_has_fewer_ids_and_a_model_only_bounds_them():
    by_text = vocabularies_for()
    assert [ids for _, ids in by_text] == [4096, 8192, 16_384, 32_768]
    assert by_text[0][0] == BPE_FROM_BYTES and list(by_text) == sorted(by_text)
    for n_parameters in (10_700_000, 30e6, 124e6, 350e6, 1e9):
        bounded = vocabularies_for(n_parameters)
        assert bounded == by_text[: len(bounded)] and bounded


@pytest.mark.parametrize("n_parameters", [0, 300_000, 787_072, 1_300_000])
def test_a_small_model_wants_byte_pairs_for_less_text(n_parameters):
    assert vocabularies_for(n_parameters) == ((BPE_FROM_BYTES_SMALL, 4096),)


@pytest.mark.parametrize(
    ("size", "most"),
    [("nano", 4096), ("tiny", 4096), ("small", 8192), ("base", 8192), ("large", 16_384), ("xl", 32_768)],
)
@pytest.mark.parametrize("model", ["nyx", "tape", "llama"])
def test_a_narrow_model_has_a_small_vocabulary(model, size, most):
    n_parameters = count_parameters(meta_model(model, models.make_config(model, size=size)))["total"]
    assert vocabularies_for(n_parameters)[-1][1] == most


def test_choosing_needs_no_torch():
    code = "import sys, nnx_cli.planning.recipe.tokenizer; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
