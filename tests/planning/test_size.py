"""The size that a text suits, beside the parameters that models have."""

import pytest

from nnx_cli import models
from nnx_cli.planning.flops import count_parameters, meta_model
from nnx_cli.planning.recipe.size import suited_size
from nnx_cli.planning.recipe.table import PARAMETERS_PER_BYTE, SIZES_BY_BYTES


def test_every_size_begins_where_it_has_enough_text():
    assert [size for _, size in SIZES_BY_BYTES] == list(models.sizes("llama"))
    for least, size in SIZES_BY_BYTES[1:]:
        n = count_parameters(meta_model("llama", models.make_config("llama", size=size)))["total"]
        assert n / PARAMETERS_PER_BYTE == pytest.approx(least, rel=0.05), size


def test_more_text_suits_a_larger_model():
    assert suited_size(0) == suited_size(100_000) == "nano"
    assert suited_size(5e5) == "tiny" and suited_size(1e12) == "xl"
