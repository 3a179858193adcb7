"""An architecture in a file of the user's: named by its path, recorded by its SHA-256, run only where it is named."""

import hashlib
import json
from pathlib import Path

import pytest

from nnx_cli import models
from nnx_cli.errors import UsageError
from nnx_cli.runs.manifest import read_verified_config

SHAPE = ["--dim", 32, "--n-layers", 2, "--n-heads", 2, "--seq-len", 32]
BATCH = ["--batch-size", 2, "--grad-accum", 1, "--threads", 1]


@pytest.fixture
def mine(workspace):
    """my.py: the control with a field of its own, which leaves a line in ran.txt whenever it is run."""
    source = (models.FOLDER / "llama.py").read_text(encoding="utf-8")
    source = source.replace(
        "    tie_embeddings: bool", "    my_field: int = 2  # a number of my own\n    tie_embeddings: bool", 1
    )
    source += f"\n# {workspace}: a text of its own, for a text is run once"
    source += "\nwith open('ran.txt', 'a') as log:\n    log.write('ran\\n')\n"
    Path("my.py").write_text(source, encoding="utf-8")
    return Path("my.py")


@pytest.fixture
def trained(nnx, mine, text_file):
    done = nnx(
        "train",
        "--model",
        mine,
        "--my-field",
        3,
        "--filepath",
        text_file,
        "--max-steps",
        4,
        *SHAPE,
        *BATCH,
        "--json",
    )
    assert done.exit_code == 0, done.stderr
    return Path(json.loads(done.stdout)["out"])


def test_a_run_records_the_file_and_its_text(trained, mine):
    described = read_verified_config(trained)["model"]
    assert trained.name.startswith("my-")
    assert (described["name"], described["file"], described["my_field"]) == ("my", "my.py", 3)
    assert described["sha256"] == hashlib.sha256(mine.read_bytes()).hexdigest()
    assert (trained / "model.py.txt").read_bytes() == mine.read_bytes()
    assert "model.py.txt" in json.loads((trained / "manifest.json").read_text())["files"]


def test_every_verb_knows_a_file_that_is_named(nnx, trained, mine):
    lines = [
        ["train", "--resume", trained, "--max-steps", 6],
        ["sample", trained, "--max-new-tokens", 3],
        ["sample", "--max-new-tokens", 3],
        ["eval", trained],
        ["quantize", trained, "--max-drop", 9, "--out", "weights/small"],
        ["sample", "weights/small", "--max-new-tokens", 3],
        ["summarize", trained],
        ["summarize", "--size", "nano", "--my-field", 4],
        ["train", "--init-from", trained, "--max-steps", 2, "--out", "weights/again", *BATCH],
        ["train", "--init-from", trained, "--lora-rank", 2, "--max-steps", 2, "--out", "weights/adapted", *BATCH],
        ["merge", "weights/adapted", "--out", "weights/merged"],
        ["eval", "weights/merged"],
    ]
    for line in lines:
        done = nnx(*line, "--model", mine, "--json")
        assert done.exit_code == 0, (line, done.stderr)
    assert {"my"} == {read_verified_config(path)["model"]["name"] for path in Path("weights").iterdir()}
    assert all((path / "model.py.txt").is_file() for path in Path("weights").iterdir())
    shown = nnx("train", "--model", mine, "--help").stdout
    assert "--my-field" in shown and "A number of my own." in shown


def test_opening_a_folder_runs_no_code(nnx, refused, trained, mine):
    for path in trained.rglob("*"):  # nor is a text in the folder a module
        assert path.suffix != ".py"
    Path("ran.txt").unlink()
    for line in (["sample"], ["eval"], ["quantize"], ["summarize"], ["train", "--max-steps", 9, "--resume"]):
        assert "--model my.py" in refused(5, "in my.py", *line, trained).stderr
    refused(5, "in my.py", "train", "--init-from", trained)
    assert nnx("list").exit_code == 0 and not Path("ran.txt").exists()
    mine.write_text(mine.read_text() + "# another text\n")
    refused(5, "SHA-256 differs", "sample", trained, "--model", mine)
    refused(2, "No such file", "sample", trained, "--model", "your.py")
    assert not Path("ran.txt").exists()


@pytest.mark.parametrize(
    "source, message",
    [
        ("import torch\n", "no Config of plain fields"),
        ("class Config:\n    n: int = 1\n", "no SIZES"),
        ("class Config:\n    n: int = len('x')\n", "plain fields"),
        ("class Config:\n    n: list = None\n", "cannot be an option"),
        ("class Config:\n    sha256: str = ''\n", "cannot be an option"),
        ("class Config(\n", "no class Config"),
    ],
    ids=str,
)
def test_a_file_that_is_no_architecture_is_refused_unread(refused, workspace, source, message):
    Path("odd.py").write_text(source + "raise SystemExit\n")
    result = refused(2, message, "train", "--model", "odd.py")
    assert ("see a whole example" in result.stderr) == (message != "cannot be an option")


@pytest.mark.parametrize("words", [["train", "--model"], ["compare", "--models"], ["summarize", "--model"]], ids=str)
@pytest.mark.parametrize("name", ["my", "conv", "nyx2"])
def test_a_file_beside_it_is_what_a_bare_name_may_mean(refused, workspace, words, name):
    Path(f"{name}.py").write_text("class Config:\n    n: int = 1\nSIZES = {'nano': {}}\n")
    refused(
        2,
        f"there is no model '{name}'; did you mean {name}.py?",
        *words,
        f"{name},llama" if "--models" in words else name,
    )


def test_what_belongs_to_the_class_is_no_option(workspace):
    Path("my.py").write_text("class Config:\n    KINDS: ClassVar[tuple[str, ...]] = ('a', 'b')\n    n: int = DERIVED\n")
    (field,) = [field for field in models.config_fields("my.py") if field.name in ("KINDS", "n")]
    assert (field.name, field.type, field.default) == ("n", "int", None)


def test_a_file_that_fails_is_refused_by_what_it_says(workspace):
    Path("odd.py").write_text("class Config:\n    n: int = 1\nSIZES = {'nano': {}}\n1 / 0\n")
    with pytest.raises(UsageError, match="odd.py fails: ZeroDivisionError"):
        models.build("odd.py")


def test_a_model_that_needs_no_file_takes_none(refused, run, mine):
    refused(2, "needs no file", "sample", run.folder, "--model", mine)
    assert not Path("ran.txt").exists()


def test_a_toml_file_names_it_too(nnx, mine, text_file):
    Path("my.toml").write_text('model = "my.py"\nmy_field = 3\nsize = "nano"\n')

    def value(*words):
        done = nnx("train", "--config", "my.toml", "--filepath", text_file, *words, "--dry-run", "--json")
        assert done.exit_code == 0, done.stderr
        return next((row["value"], row["source"]) for row in json.loads(done.stdout) if row["setting"] == "my_field")

    assert value() == (3, "file: my.toml")
    assert value("--my-field", 4) == (4, "command line")
    assert "--my-field" in nnx("train", "--config", "my.toml", "--help").stdout
