import errno
import os
from pathlib import Path

import pytest
import torch

from nnx_cli.config import PrepareConfig, TrainConfig
from nnx_cli.errors import OutputError, UsageError
from nnx_cli.planning.recipe.tokenizer import vocabularies_for
from nnx_cli.training.inputs import Shape, model_vocabularies, open_and_plan, prepare_tokens, start_from, take_back


def test_text_is_prepared_once_and_taken_back(text_file, workspace):
    folder, made = prepare_tokens([str(text_file)], PrepareConfig(workers=1), None, print)
    assert made == [folder, Path("data")] and (folder / "meta.json").exists()
    assert prepare_tokens([str(text_file)], PrepareConfig(workers=1), None, print) == (folder, [])
    take_back([made])
    assert not Path("data").exists()


@pytest.mark.parametrize("code", [errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOENT])
def test_where_data_cannot_be_made_the_tokens_stand_beside_the_run(text_file, workspace, monkeypatch, code):
    """Here nothing may be written; the run goes elsewhere, and its text with it. Once made, it is used again."""
    paths, config, told = [str(text_file)], PrepareConfig(workers=1), []
    real = os.mkdir

    def refuse(path, *mode):
        if not Path(path).is_absolute():
            raise OSError(code, os.strerror(code), path)
        real(path, *mode)

    monkeypatch.setattr(os, "mkdir", refuse)
    with pytest.raises(OutputError, match="cannot write data/") as caught:
        prepare_tokens(paths, config, None, told.append)
    assert "--out" in caught.value.fix and told == []
    with pytest.raises(OutputError, match="cannot write data/"):  # beside the run is here too
        prepare_tokens(paths, config, None, told.append, Path("run"))
    out = workspace / "elsewhere" / "run"
    folder, made = prepare_tokens(paths, config, None, told.append, out)
    assert folder.parent == workspace / "elsewhere" / "data" and (folder / "meta.json").exists()
    notes = [each["note"] for each in told if "note" in each]
    assert made == [folder, folder.parent, out.parent] and str(folder) in notes[-1]
    assert prepare_tokens(paths, config, None, told.append, out) == (folder, [])
    take_back([made])
    assert list(workspace.iterdir()) == []


@pytest.mark.parametrize(
    ("shape", "n_parameters"),
    [
        (("nyx", "nano", {}), 787_072),
        (("llama", "base", {"vocab_size": 50_000}), 124_000_000),
        (("nyx", None, {"dim": 1024, "n_layers": 24}), 300_000_000),
        (("nyx", "auto", {}), 787_072),
    ],
)
def test_vocabularies_suit_the_model(shape, n_parameters):
    found = model_vocabularies(Shape(*shape), TrainConfig(max_time="5s"), torch.device("cpu"), "fp32")
    assert found == vocabularies_for(n_parameters)


def test_what_others_use_is_not_taken_back(workspace):
    (workspace / "data" / "mine").mkdir(parents=True)
    (workspace / "data" / "theirs").mkdir()
    take_back([[workspace / "data" / "mine", workspace / "data"]])
    assert [path.name for path in (workspace / "data").iterdir()] == ["theirs"]


def test_a_model_to_start_from_brings_its_shape(run):
    base, shape = start_from("words", None, "auto", {"seq_len": 16})
    assert base.label == "weights/words" and shape.model == "nyx" and shape.size is None
    assert shape.fields["dim"] == 32 and shape.fields["seq_len"] == 16
    with pytest.raises(UsageError, match="--dim 64 is not what words has"):
        start_from("words", None, "auto", {"dim": 64})
    with pytest.raises(UsageError, match="of its own size"):
        start_from("words", "llama", "auto", {})


def test_a_vocabulary_that_disagrees(token_path):
    with pytest.raises(UsageError, match="--vocab-size 99"):
        open_and_plan(
            token_path,
            Shape("nyx", "nano", {"vocab_size": 99}),
            TrainConfig(),
            device=torch.device("cpu"),
            precision="fp32",
            sources={},
            base=None,
            tokenizer=None,
        )
