import os

import pytest
import torch

from nnx_cli.errors import CheckpointError, UsageError
from nnx_cli.runs import checkpoint as ckpt
from nnx_cli.runs.find import find_folder, find_model, find_runs, list_models
from nnx_cli.runs.load import ModelRef, load_model
from nnx_cli.runs.manifest import read_verified_config, write_model_folder

CPU = torch.device("cpu")


def test_a_model_is_found_by_path_and_by_name(run, workspace):
    by_name, by_path, newest = find_model("words"), find_model(str(workspace / "weights" / "words")), find_model(None)
    assert by_name.folder.resolve() == by_path.folder.resolve() == newest.folder.resolve()
    assert by_name.which == "best" and by_name.label == os.path.join("weights", "words")
    assert by_name.weights()[0].name == "model.safetensors"


def test_the_checkpoints_of_a_run_are_models(run):
    steps = ckpt.steps_in(run.checkpoints)
    for spec, folder in {"last": steps[-1], str(steps[0]): steps[0], str(steps[1]): steps[1]}.items():
        path, state = find_model(f"words@{spec}").weights()
        assert path.parent.name == f"step-{folder:08d}"
        assert torch.equal(state["norm.weight"], ckpt.load_checkpoint(run.checkpoints, folder).model["norm.weight"])
    assert find_model("words@best").weights()[0].parent.name == "words"
    assert find_model("words@last").label.endswith("words@last")


@pytest.mark.parametrize("spec", ["nothing", "weights", "", ".", "words/checkpoints", "@last", "no@500", "a\x00b"])
def test_what_is_no_model_is_refused(run, spec):
    with pytest.raises(CheckpointError, match="there is no run or model"):
        find_model(spec).weights()


def test_a_step_without_a_checkpoint_names_those_there_are(run):
    with pytest.raises(CheckpointError, match="no checkpoint 7; it has 20, 40"):
        find_model("words@7").weights()


@pytest.mark.parametrize("spec", ["words@", "words@newest", "words@-1", "words@1.5"])
def test_other_words_after_the_at_sign_are_usage_errors(run, spec):
    with pytest.raises(UsageError, match="best, last or a step"):
        find_model(spec)


def test_an_unknown_name_tells_the_newest(run):
    with pytest.raises(CheckpointError, match="the newest are words") as error:
        find_folder("zebra")
    assert "nnx list" in error.value.fix


@pytest.mark.parametrize("name", ["words", os.path.join("weights", "words")])
def test_a_run_without_its_config_is_called_damaged(run, name):
    (run.folder / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"weights.words is damaged: it has no config\.json"):
        find_folder(name)


@pytest.mark.parametrize(
    ("name", "near"), [("word", "words"), ("wrods", "words"), (os.path.join("weights", "wordz"), "weights.words")]
)
def test_an_unknown_name_tells_the_nearest(run, name, near):
    with pytest.raises(CheckpointError, match=f"did you mean {near}\\?"):
        find_folder(name)


def test_no_runs_at_all(workspace):
    assert find_runs() == [] and list_models() == []
    with pytest.raises(CheckpointError, match="no run in weights/ yet"):
        find_model(None)


def test_runs_are_listed_newest_first(run, workspace):
    os.utime(run.folder / "run.json", (1, 1))
    other = workspace / "weights" / "other"
    os.makedirs(other)
    (other / "run.json").write_text("{}")
    (workspace / "weights" / ".tmp-x-1").mkdir()
    (workspace / "weights" / ".tmp-x-1" / "run.json").write_text("{}")
    damaged, good = list_models()
    assert (damaged["name"], damaged["status"]) == ("other", "damaged")
    assert good["name"] == "words" and good["model"] == "nyx" and good["status"] == "finished" and good["steps"] == 40
    assert good["best_val_bits_per_byte"] > 0 and good["age_s"] > 10**6


MADE = {
    "merged": {"merged_from": "weights/words"},
    "imported": {"imported_from": "old.pth"},
    "quantized": {"merged_from": "weights/words", "quantized_from": "weights/merged"},
}


def test_every_model_is_listed_with_its_kind(run, workspace):
    for kind, origin in MADE.items():
        (workspace / "weights" / kind).mkdir()
        write_model_folder(workspace / "weights" / kind, run.config | origin, None, ModelRef(run.folder).weights()[1])
    rows = {row["name"]: row for row in list_models()}
    assert {name: row["kind"] for name, row in rows.items()} == {"words": "run"} | {kind: kind for kind in MADE}
    for kind in MADE:
        assert rows[kind].keys() == rows["words"].keys()
        assert rows[kind]["model"] == "nyx" and rows[kind]["status"] is None and rows[kind]["steps"] is None
    assert find_model(None).folder.name == "words", "the newest run, not the newest model"
    (workspace / "weights" / "merged" / "manifest.json").write_text("{}")
    damaged = {row["name"]: row for row in list_models()}["merged"]
    assert damaged["status"] == "damaged" and "config.json is damaged" in damaged["error"]


def test_a_moved_run_still_loads(run, workspace):
    run.folder.rename(workspace / "elsewhere")
    ref = find_model(str(workspace / "elsewhere"))
    load_model(ref, CPU)
    assert isinstance(ref, ModelRef) and ref.tokenizer.kind == "byte"
    assert read_verified_config(workspace / "elsewhere")["model"]["name"] == "nyx"


def test_a_model_without_training_settings_loads(run, workspace):
    folder = workspace / "weights" / "bare"
    folder.mkdir()
    write_model_folder(folder, run.config | {"training": None}, None, ModelRef(run.folder).weights()[1])
    load_model(ModelRef(folder), CPU)


@pytest.mark.parametrize("which", ["best", "last", "12", "first"])
def test_a_run_goes_on_from_no_named_checkpoint(run, which):
    for spec in (f"words@{which}", f"weights/words@{which}"):
        with pytest.raises(CheckpointError, match="resumes from its newest") as error:
            find_folder(spec)
        assert error.value.fix == f"nnx train --resume {spec.partition('@')[0]}"
