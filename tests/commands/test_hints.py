"""What a command says to type next can be pasted, whatever things are called; a leading ~ is a home."""

import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
import typer

from nnx_cli import errors, models
from nnx_cli.cli import app
from nnx_cli.errors import nearest, pasteable, quoted
from nnx_cli.runs.load import ModelRef
from nnx_cli.training.recovery import retry_command

PACKAGE = Path(errors.__file__).parent

NAMES = ["plain", "it's  my a$HOME", "-dash;b&c", "--out", "小猫 a*b", '~ü"q']  # between them, all that needs quotes
SAMPLE = 'sample "$(x)"'
PATHS = {"data": "--data", "resume": "--resume", "out": "--out", "init_from": "--init-from"}

pytestmark = pytest.mark.skipif(os.name != "posix", reason="names that other systems do not have, quoted for sh")


def hints(result):
    """The command lines that a result says to type, as words."""
    lines = [line for line in (result.stdout + result.stderr).splitlines() if "nnx " in line and "nnx: " not in line]
    return [line[line.index("nnx ") :] for line in lines]


def parsed(hint):
    """The command of a hint and what its options become, as a shell and the command line read it."""
    typed = subprocess.run(["sh", "-c", f"printf '%s\\n' {hint}"], capture_output=True, text=True, check=True)
    words = typed.stdout.splitlines()
    assert words == shlex.split(hint) and words[0] == "nnx"
    group = typer.main.get_command(app)
    with group.make_context(words[0], words[1:]) as root:  # without it, a command learns for good that -h is no option
        return words[1], group.commands[words[1]].make_context(words[1], words[2:], parent=root).params


def leads_to(hint, folder):
    """Whether one of the options of a hint is that folder, or a name that begins with its path."""
    command, options = parsed(hint)
    named = [value for value in options.values() if isinstance(value, (str, Path))]
    return any(os.path.abspath(os.path.expanduser(value)) == os.path.abspath(folder) for value in named)


@pytest.mark.parametrize("name", NAMES)
def test_what_to_do_next_can_be_pasted(nnx, run, workspace, text_file, name):
    name = f"./{name}"  # as one has to type some of them
    shutil.copytree(run.folder, name)
    (workspace / "new").mkdir()
    model = models.build("nyx", dim=32, n_layers=1, n_heads=2)
    torch.save(models.reference_tensors(model), "seed.pth")
    for words, folder, n in (
        (["prepare", text_file, "--out", f"new/{name}"], f"new/{name}", 1),
        (["train", "--data", f"gone/{name}"], f"gone/{name}", 1),
        (["train", "--resume", name, "--max-steps", 41], name, 1),  # its data is gone
        (["train", "--resume", name, "--max-steps", 41, "--data", "data/words"], name, 3),
        (["quantize", name, "--out", f"{name}-small", "--max-drop", 9], f"{name}-small", 1),
        (["import", "seed.pth", "--model", "nyx", "--out", f"{name}-model"], f"{name}-model", 1),
        (
            ["train", "--init-from", name, "--lora-rank", 2, "--max-steps", 1, "--batch-size", 1, "--out", f"{name}-a"]
            + ["--data", "data/words", "--sample-every", 0],
            f"{name}-a",
            3,
        ),
        (["quantize", f"{name}-a"], f"{name}-a", 1),
        (["train", "--init-from", f"{name}-a"], f"{name}-a", 1),
        (["merge", f"{name}-a", "--out", f"{name}-b"], f"{name}-b", 1),
    ):
        result = nnx(*words)
        found = hints(result)
        assert len(found) == n, result.output
        assert all(leads_to(hint, folder) for hint in found), found


@pytest.mark.parametrize(("model", "option"), [({}, "--model"), ({"bank_file": "x.py"}, "--bank-file")])
def test_a_model_with_a_file_names_it(workspace, monkeypatch, model, option):
    monkeypatch.setattr(ModelRef, "config", {"model": model})
    ref = ModelRef(Path("my run"), "last", Path("-my file.py"))
    assert shlex.split(ref.as_argument) == ["my run@last", option, "./-my file.py"]


def test_blanks_of_a_name_stay(nnx, workspace):
    assert "nnx prepare FILE --out 'two  blanks'" in nnx("train", "--data", "two  blanks").stderr


@pytest.mark.parametrize(
    ("name", "typed"),
    [
        ("weights/run-2", "weights/run-2"),
        (r"C:\my runs\x", r'"C:\my runs\x"'),
        (r"weights\run", r"weights\run"),
        ("a&b", '"a&b"'),
        ("it's", '"it\'s"'),
        ("-x", r".\-x"),
    ],
)
def test_windows_takes_double_quotes(windows, name, typed):
    assert quoted(name) == typed


@pytest.fixture
def windows(monkeypatch):
    class Windows:
        name, curdir = "nt", "."
        path = __import__("ntpath")

    monkeypatch.setattr(errors, "os", Windows)


@pytest.mark.parametrize("word", ["a b", 'say "hi" now', "C:\\my runs\\", 'a \\" b', "два слова", " \\\\", ""])
def test_windows_programs_get_the_words_that_were_meant(windows, word):
    assert pasteable([word]) == subprocess.list2cmdline([word])  # the inverse of how they read their command line


def test_a_command_of_several_words_is_quoted_for_the_system(windows, start, workspace):
    run, trainer = start(workspace / "a")
    run.set_status(
        command=shlex.join(["nnx", "train", "--filepath", "C:\\my texts\\a.txt", "--sample-prompt", "it's 5%"])
    )
    again = retry_command(run, trainer.model, trainer.config)
    assert again == r"""nnx train --filepath "C:\my texts\a.txt" --sample-prompt "it's 5%" --lr 0.00075"""


def test_one_place_quotes_for_the_shell():
    texts = {path.name: path.read_text(encoding="utf-8") for path in PACKAGE.rglob("*.py")}
    assert {name for name, text in texts.items() if re.search(r"shlex\.quote|list2cmdline", text)} <= {"errors.py"}


# homes


@pytest.fixture
def home(run, workspace, text_file, monkeypatch):
    """A home with text, a token folder, a run and settings, and nothing of that in the current folder."""
    home = workspace / "my home"
    home.mkdir()
    shutil.copy(text_file, home / "words.txt")
    for name in ("data", "weights"):
        (workspace / name).rename(home / name)
    (home / "my.toml").write_text('tokenizer = "~/data/words/tokenizer.json"\nmax_steps = 1\nbatch_size = 2\n')
    (home / "prompt.txt").write_text("the cat")
    (home / "my.py").write_text(Path(models.__file__).with_name("llama.py").read_text())
    torch.save(models.reference_tensors(models.build("nyx", dim=32, n_layers=1, n_heads=2)), home / "seed.pth")
    monkeypatch.setenv("HOME", str(home))
    return home


SMALL = ["--dim", 32, "--n-layers", 1, "--n-heads", 2, "--seq-len", 16, "--sample-every", 0]


@pytest.mark.parametrize(
    ("words", "made"),
    [
        (["prepare", "~/words.txt", "--out", "~/tokens"], "tokens/meta.json"),
        (["prepare", "--filepath", "~/words.txt", "--val", "~/prompt.txt", "--out", "~/tokens"], "tokens/meta.json"),
        (["prepare", "~/words.txt", "--tokenizer=~/data/words/tokenizer.json", "--out=~/tokens"], "tokens/meta.json"),
        (["prepare", "~/*.txt", "--out", "~/tokens"], "tokens/meta.json"),
        (["train", "--data", "~/data/words", "--config", "~/my.toml", *SMALL, "--out", "~/new"], "new/run.json"),
        (["train", "--filepath", "~/words.txt", "--config=~/my.toml", *SMALL, "--out=~/new"], "new/run.json"),
        (
            ["train", "--data=~/data/words", "--model", "~/my.py", *SMALL, "--max-steps", 1, "--n-kv-heads", 1]
            + ["--out", "~/new"],
            "new/run.json",
        ),
        (
            ["train", "--data", "~/data/words", "--init-from", "~/weights/words", "--max-steps", 1, "--out", "~/new"]
            + ["--sample-every", 0],
            "new/run.json",
        ),
        (["train", "--resume", "~/weights/words", "--max-steps", 41, "--data", "~/data/words"], ""),
        (["train", "--checkpoint_path", "~/weights/words", "--max-steps", 41], ""),
        (["sample", "~/weights/words", "--prompt-file", "~/prompt.txt", "--max-new-tokens", 2], ""),
        (["sample", "~/weights/words@last", "--max-new-tokens", 2], ""),
        (["eval", "~/weights/words", "--filepath", "~/words.txt"], ""),
        (["summarize", "~/weights/words", "--vram", "8GB"], ""),
        (["quantize", "~/weights/words", "--out", "~/small", "--max-drop", 9], "small/receipt.json"),
        (["import", "~/seed.pth", "--model", "nyx", "--out", "~/model"], "model/config.json"),
    ],
    ids=lambda words: " ".join(map(str, words))[:70],
)
def test_a_leading_tilde_is_a_home(nnx, home, words, made):
    result = nnx(*words)
    assert result.exit_code == 0, result.stderr
    assert (home / made).exists() and not list(Path().glob("~*"))


def test_text_keeps_its_tilde(nnx, home):
    result = nnx("sample", "~/weights/words", "--prompt", "~/x", "--max-new-tokens", 2, "--stop", "~")
    assert result.exit_code == 0 and result.stdout.startswith("~/x")
    assert "there is no run or model '~nobody-here/x'" in nnx("sample", "~nobody-here/x").stderr


# suggestions


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["train", "--lrr", 3], "; did you mean --lr?"),
        (["train", "--no-qk-nor"], "; did you mean --no-qk-norm?"),
        (["quantize", "--bitz", 4], "; did you mean --bits?"),
        (["train", "--k", 5], "--k"),
        (["train", "--zzz", 5], "--zzz"),
        (["list", "--max-steps", 3], "; it belongs to train"),
        (["eval", "--top-k", 3], "; it belongs to sample"),
        (["train", "--model", "llama", "--n-critic", 3], "--n-critic"),
        (["train", "--model", "tape", "--n-critic", 3], "; did you mean --n-critics?"),
        (["train", "--model", "x"], "there is no model 'x'"),
        (["train", "--schedule", "c"], "--schedule has no choice 'c': "),
    ],
    ids=str,
)
def test_a_suggestion_is_made_where_it_could_be_meant(refused, words, said):
    result = refused(2, said, *words)
    assert said.startswith(";") or "did you mean" not in result.stderr


@pytest.mark.parametrize(
    ("code", "words", "said", "fix"),
    [
        (2, ["sample", "--temp", "0.5"], "--temp; did you mean --temperature?", None),
        (2, ["train", "--filepath"], "requires an argument", "see: nnx train --help"),
        (2, ["export"], "Missing option '--format'", "for example: nnx export "),
        (2, ["import"], "Missing", "for example: nnx import "),
        (2, ["list", "weights"], "extra argument", "see: nnx list --help"),
        (2, ["doctor", "now"], "extra argument", "see: nnx doctor --help"),
        (2, ["sample", "a", "b"], "extra argument", "words of one text stand in quotes"),
        (2, ["generate"], "No such command 'generate'", "see: nnx --help"),
        (2, ["smaple"], "Did you mean 'sample'?", None),
        (3, ["train", "--data", "text.txt"], "text.txt is a file, not a token folder", "--filepath text.txt"),
        (3, ["compare", "--data", "text.txt", "--budget", "10M"], "is a file, not a", "--filepath text.txt"),
        (5, ["sample", "data/mine"], "data/mine is a token folder, not a model", "nnx train --data data/mine"),
        (5, ["report", "data/mine"], "is a token folder", "nnx train --data data/mine"),
        (5, ["train", "--init-from", "data/mine"], "is a token folder", "nnx train --data data/mine"),
        (5, ["sample", "weights"], "there is no run or model 'weights'", "nnx list"),
        (2, ["train", "--block_size", "64"], "in nnx train it is --seq-len 64", None),
        (2, ["train", "--n_embd=64"], "in nnx train it is --dim 64", None),
        (2, ["train", "--log-to", "tensorbord"], "did you mean tensorboard?", "choose from tensorboard, "),
        (2, ["train", "--size", "tny"], "no size 'tny'; did you mean tiny?", "choose from nano, "),
        (2, ["train", "--model", "tape", "--size", "smal"], "did you mean small?", "choose from nano, "),
        (2, ["train", "--lr", "0,01"], "--lr is '0,01'", "write its point as a point: --lr 0.01"),
        (2, ["sample", "--top-p", "0,9"], "--top-p is '0,9'", "--top-p 0.9"),
        (2, ["train", "--batch-size", "auto"], "--batch-size is 'auto'", "leave it out"),
        (3, ["prepare", "https://example.org/a.txt"], "nnx downloads no text", "save it as a file"),
        (3, ["train", "--filepath", "s3://bucket/x", "--size", "nano"], "nnx downloads no text", "save it as a file"),
    ],
    ids=str,
)
def test_a_mistake_is_answered_with_what_to_type(refused, workspace, code, words, said, fix):
    Path("text.txt").write_text("To be, or not to be\n")
    for folder in ("data/mine", "weights"):
        Path(folder).mkdir(parents=True)
    Path("data/mine/train.bin").write_bytes(b"")
    lines = refused(code, said, *words).stderr.rstrip().splitlines()
    assert "weights?" not in lines[0]
    assert len(lines) == 1 + (fix is not None) and (fix is None or fix in lines[1])


def test_the_nearest_word():
    assert nearest("--temprature", ["--temperature", "--top-k"]) == "; did you mean --temperature?"
    assert nearest("cosin", ["linear", "cosine"]) == "; did you mean cosine?"
    assert nearest("--temp", ["--temperature", "--top-k"]) == "; did you mean --temperature?"
    assert nearest("--val", ["--val-every", "--val-batches"]) == "", "it may be either"
    for word in ("x", "", "--", "--q", "zebra"):
        assert nearest(word, ["--quiet", "nyx", "--top-q", "zoo"]) == ""
