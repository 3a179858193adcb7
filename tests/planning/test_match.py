import re
from pathlib import Path

import pytest

from nnx_cli import models
from nnx_cli.errors import UsageError
from nnx_cli.planning.flops import count_parameters, meta_model
from nnx_cli.planning.match import context_for, match_shape, parameters_without_tables, size_target

TARGETS = [400_000, "nano", 3_000_000, 10_700_000]


@pytest.mark.parametrize("target", TARGETS, ids=str)
@pytest.mark.parametrize("name", models.names())
def test_parameters_outside_the_tables_agree(name, target):
    target = size_target(target) if isinstance(target, str) else target
    match = match_shape(name, target, vocab_size=500, seq_len=64)
    config = match.config
    assert config.vocab_size == 500 and config.seq_len == 64
    assert config.dim // config.n_heads % 16 == 0 and config.dim % config.n_heads == 0
    model = meta_model(name, config)
    assert count_parameters(model)["total"] == match.parameters
    assert parameters_without_tables(model) == match.without_tables
    assert abs(match.without_tables / target - 1) <= 0.02


@pytest.mark.parametrize("name", models.names())
def test_the_vocabulary_changes_the_tables_alone(name):
    few, many = (match_shape(name, 3_000_000, vocab_size=n, seq_len=64) for n in (256, 4096))  # remembered by now
    assert many.parameters > few.parameters + 3840 * few.config.dim - 1
    assert abs(many.without_tables / few.without_tables - 1) < 0.02
    assert (many.config.dim, many.config.n_layers) == (few.config.dim, few.config.n_layers)


def test_tables_are_embedding_and_an_untied_head():
    tied = models.build("llama", size="nano")
    untied = models.build("llama", size="nano", tie_embeddings=False)
    assert count_parameters(untied)["total"] - count_parameters(tied)["total"] == 256 * tied.config.dim
    assert parameters_without_tables(tied) == parameters_without_tables(untied)
    assert parameters_without_tables(tied) == sum(p.numel() for p in tied.blocks.parameters()) + tied.config.dim


@pytest.mark.parametrize("name", ["llama", "ngpt", "nyx", "tape"])
def test_a_named_size_that_fits_stays_as_it_is(name):
    match = match_shape(name, size_target("tiny"), vocab_size=256, seq_len=256)
    assert match.size == "tiny" and match.config == models.make_config(name, size="tiny", vocab_size=256)
    assert match_shape(name, 3_000_000, vocab_size=256, seq_len=256).size is None


@pytest.mark.parametrize("target", [400_000, 787_584, 1_200_000, 6_000_000])
def test_a_file_of_one_width_for_all_is_matched_by_its_depth(workspace, target):
    source = re.search(r"```python\n(from dataclasses.*?)```", (models.FOLDER / "README.md").read_text(), re.DOTALL)[1]
    sized = "SIZES = {'nano': dict(dim=96, n_layers=3), 'tiny': dict(dim=256, n_layers=6)}"
    Path("mine.py").write_text(re.sub("SIZES = .*", sized, source))
    assert abs(match_shape("mine.py", target, vocab_size=256, seq_len=64).without_tables / target - 1) <= 0.02


def test_the_nearest_of_those_that_are_not_is_told():
    with pytest.raises(UsageError, match=r"no shape of neon .* the nearest has [\d,]+: --dim") as error:
        match_shape("neon", 17_000, vocab_size=256, seq_len=256)
    nearest = int(error.value.fix.removeprefix("take --parameters "))
    assert abs(match_shape("neon", nearest, vocab_size=256, seq_len=256).without_tables / nearest - 1) <= 0.02


@pytest.mark.parametrize("target", [1, 900, 17_000])
@pytest.mark.parametrize("name", ["neon", "tape"])
def test_a_size_that_cannot_be(name, target):
    with pytest.raises(UsageError, match="no shape of"):
        match_shape(name, target, vocab_size=256, seq_len=256)


def test_the_context_is_that_of_the_size():
    assert context_for(size_target("nano")) == context_for(11_000_000) == 256
    assert context_for(size_target("base")) == 1024
