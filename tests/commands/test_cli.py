"""What all commands share."""

import errno
import inspect
import json
import os
import re
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest
import torch

from nnx_cli import __version__, commands, models
from nnx_cli.cli import COMMANDS, ELSEWHERE, _load, app
from nnx_cli.commands._train_options import PANELS, PREPARING
from nnx_cli.config import TrainConfig, own_fields
from nnx_cli.errors import DataError, quoted


def test_version(nnx):
    assert nnx("--version").stdout.strip() == f"nnx {__version__}"


@pytest.mark.parametrize("words", [["--help"], ["-h"]])
def test_help_names_every_command(nnx, words):
    result = nnx(*words)
    assert result.exit_code == 0 and all(name in result.stdout for name in COMMANDS)


def test_nothing_is_a_question_for_help(nnx):
    result = nnx()
    assert all(f"│ {name} " in result.output for name in COMMANDS), result.output
    assert "nnx: Usage" not in result.output


def panels(text):
    """Options by the title of the panel of help that they stand in."""
    found, current = {}, None
    for line in text.splitlines():
        if line.startswith("╭─"):
            current = found.setdefault(line.strip("╭─╮ "), [])
        elif current is not None and (match := re.match(r"│ (?:[* ]  )?(--[\w-]+)", line)):
            current.append(match[1])
    return found


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_every_command(nnx, command):
    result = nnx(command, "--help")
    assert result.exit_code == 0 and result.stdout.lstrip().startswith("Usage: ")
    assert panels(result.stdout)["Output"] == ["--json", "--quiet", "--debug", "--help"]


MAIN = ["model", "size", "filepath", "data", "max-time", "max-steps", "vram", "out", "resume", "init-from", "config"]


def test_help_of_train_begins_with_what_people_use(nnx):
    found = panels(nnx("train", "--help").stdout)
    names = ["Main options", "Length and batch", "Optimizer", "Memory and speed", "Watching", "Data", "Model", "Output"]
    assert list(found) == names
    assert found["Main options"] == [f"--{name}" for name in [*MAIN, "dry-run"]]


def test_every_setting_of_training_has_a_panel():
    shown = [name for names in PANELS.values() for name in names] + ["max_time", "max_steps", "vram"]
    assert len(shown) == len(set(shown))
    assert {field.name for field in (*own_fields(TrainConfig), *PREPARING)} == set(shown)


@pytest.mark.parametrize("command", ["train", "summarize"])
def test_fields_of_some_architectures_are_shown_beside_their_name(nnx, command):
    shared = panels(nnx(command, "--help").stdout)["Model"]
    assert "--dim" in shared and not {"--n-kv-heads", "--qk-norm", "--xpos-scale-base", "--model-dim"} & set(shared)
    for name in models.names():
        fields = {field.option: field for field in models.config_fields(name)}
        for words in (["--model", name, "--help"], ["-h", f"--model={name}"])[: 2 if name == "nyx" else 1]:
            found = panels(nnx(command, *words).stdout)
            assert found["Model"] and set(found["Model"]) == set(fields), name
            assert set(found["Model"]) >= set(shared)
    for option in ("--seq-len", "--dim", "--n-layers"):
        assert f"{option} <int> of the size" in defaults(nnx(command, "--help").stdout)
    chosen = {"train": ("auto", "auto"), "summarize": ("256", "0.0")}[command]  # by the text, or the architecture's own
    for option, default in zip(("--vocab-size <int>", "--dropout <float>"), chosen, strict=True):
        assert f"{option} {default}" in defaults(nnx(command, "--help").stdout)
    assert "--n-critics <int> of the size" in defaults(nnx(command, "--model", "tape", "--help").stdout)
    assert "default: (tape)" in nnx(command, "--model", "tape", "--help").stdout
    assert "--no-qk-norm" in nnx(command, "--model", "ngpt", "--help").stdout
    assert panels(nnx(command, "--help", "--model", "nobody").stdout)["Model"] == shared


def defaults(shown):
    """The options of a help with what stands in their brackets."""
    text = " ".join(shown.replace("│", " ").split())
    return "; ".join(" ".join(found) for found in re.findall(r"(--[\w-]+) (<\w+>)[^<]*?\[default: \(([^)]*)\)\]", text))


@pytest.mark.parametrize("words", [[], *([name] for name in COMMANDS), ["train", "--model", "ngpt"]], ids=str)
def test_help_breaks_no_word(nnx, monkeypatch, words):
    """Every line ends with a whole word: put together, the help has all the words it has on a screen without end."""
    monkeypatch.setenv("COLUMNS", "500")
    wide = nnx(*words, "--help").stdout
    for width in (80, 120):
        monkeypatch.setenv("COLUMNS", str(width))
        narrow = nnx(*words, "--help").stdout
        assert max(map(len, narrow.splitlines())) <= width and "\x1b" not in narrow
        assert sorted(re.findall(r"[\w-]+", narrow)) == sorted(re.findall(r"[\w-]+", wide))


@pytest.mark.parametrize("variables", [{"NO_COLOR": "1"}, {"TERM": "dumb"}], ids=str)
@pytest.mark.skipif(sys.platform == "win32", reason="no pseudoterminals")
def test_help_on_a_terminal_without_colours(variables):
    coloured, plain = on_a_terminal({"TERM": "xterm"}), on_a_terminal({"TERM": "xterm"} | variables)
    assert b"\x1b[" in coloured and b"\x1b" not in plain and b"Usage" in plain


def on_a_terminal(variables):
    """What `nnx list --help` writes to a terminal."""
    import pty

    ours, theirs = pty.openpty()
    kept = {name: value for name, value in os.environ.items() if name not in ("NO_COLOR", "FORCE_COLOR")}
    command = [sys.executable, "-m", "nnx_cli", "list", "--help"]
    with subprocess.Popen(command, stdout=theirs, env=kept | variables) as process:
        os.close(theirs)
        text = b""
        with suppress(OSError):  # what Linux raises at the end
            while part := os.read(ours, 4096):
                text += part
    os.close(ours)
    assert process.returncode == 0
    return text


def test_a_command_is_one_file_and_one_line(nnx, tmp_path, monkeypatch):
    (tmp_path / "greet.py").write_text(
        "from nnx_cli.commands._options import command\n\n\n"
        "@command()\n"
        "def run(output, name: str = 'you'):\n"
        '    """Greet somebody."""\n'
        "    output.show(f'hello {name}')\n"
        "    output.show_json({'name': name})\n"
    )
    monkeypatch.setattr(commands, "__path__", [*commands.__path__, str(tmp_path)])
    monkeypatch.setitem(COMMANDS, "greet", ("greet", "Greet somebody."))
    assert "│ greet " in nnx("--help").stdout and "--name" in nnx("greet", "--help").stdout
    assert nnx("greet", "--name", "Ada").stdout == "hello Ada\n"
    assert json.loads(nnx("greet", "--json").stdout) == {"name": "you"}
    assert "--name" in nnx("greet", "--nam", "Ada").stderr


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["trian"], "train"),
        (["trian", "--lr", 3], "train"),
        (["prepare", "--ot", "x"], "--out"),
        (["sample", "--top_q", 1], "--top-p"),
        (["train", "--model"], "--model"),
        (["train", "--max-steps", "many"], "--max-steps"),
        (["train", "surplus"], "surplus"),
        (["--lr", 3], "--lr"),
        (["train", "-lr", 3], "option: -lr; did you mean --lr?"),
        (["train", "--size", "nano", "-lr=3"], "option: -lr; did you mean --lr?"),
        (["train", "-max_steps", 5], "option: -max-steps; did you mean --max-steps?"),
        (["sample", "-prompt", "-x"], "option: -prompt; did you mean --prompt?"),
        (["quantize", "-bits", 4], "option: -bits; did you mean --bits?"),
        (["prepare", "a.txt", "-vocab_sze=300"], "option: -vocab-sze; did you mean --vocab-size?"),
        (["list", "-jsn"], "option: -jsn; did you mean --json?"),
        (["train", "-help"], "option: -help; did you mean --help?"),
        (["-version"], "option: -version; did you mean --version?"),
        (["-lr", 3], "option: -lr; it belongs to train"),
        (["-json", "list"], "option: -json; it stands behind a command"),
    ],
    ids=str,
)
def test_words_that_mean_nothing(refused, words, message):
    result = refused(2, message, *words)
    assert result.stdout == ""


@pytest.mark.parametrize("name", COMMANDS)
def test_what_is_no_number_is_told_in_our_words(nnx, name):
    command = _load(name)
    kinds = inspect.unwrap(command.callback).__annotations__
    for param in command.params:
        kind = next((each for each in (int, float) if str(each.__name__) in str(kinds[param.name])), None)
        if kind is not None and param.param_type_name == "option":
            result = nnx(name, f"{param.opts[-1]}=hot")
            wanted = "a whole number" if kind is int else "a number"
            assert result.exit_code == 2 and f"{param.opts[-1]} is 'hot'; it must be {wanted}\n" in result.stderr
            assert result.stderr.endswith(f"see: nnx {name} --help\n")


@pytest.mark.parametrize("word", ["", "2.5", "1e30", "10k", "nan", "inf", "-", "0x10"])
def test_what_is_no_whole_number(refused, word):
    refused(2, f"--max-steps is {word!r}; it must be a whole number", "train", f"--max_steps={word}")


@pytest.mark.parametrize(
    ("words", "here"),
    [
        (["compare", "--max-time", "15s"], "--equal time --budget 15s"),
        (["compare", "--models", "nyx,llama", "--max_time=2m"], "--equal time --budget 2m"),
        (["compare", "--max-time"], "--equal time --budget 10m"),
        (["compare", "--max-time", "--json"], "--equal time --budget 10m"),
        (["compare", "--epochs", 2], "--budget 2M, a number of tokens"),
        (["train", "--budget", "3m"], "--max-time 3m"),
        (["train", "--max-new-tokens=50"], "--generate-length 50"),
        (["bench", "--max-time", "15s"], "--seconds 30"),
    ],
    ids=str,
)
def test_an_option_that_is_called_otherwise_here(refused, words, here):
    option = next(word for word in words if word.startswith("--") and word != "--models").partition("=")[0]
    refused(2, f"No such option: {option.replace('_', '-')}; in nnx {words[0]} it is {here}", *words)


def test_what_is_called_otherwise_is_no_option_and_what_it_is_called_is_one():
    for name, options in ELSEWHERE.items():
        known = {spelling for param in _load(name).params for spelling in param.opts}
        for option, here in options.items():
            assert f"--{option}" not in known and {word for word in here.split() if word[0] == "-"} <= known


@pytest.mark.parametrize(
    ("words", "near"),
    [
        (["prepare", "mybok.txt"], "there is no mybok.txt; did you mean mybook.txt?"),
        (["train", "--filepath", "texts/lettrs.txt"], f"did you mean {os.path.join('texts', 'letters.txt')}?"),
        (["prepare", "mybook.txt", "--val", "mybook.tx"], "did you mean mybook.txt?"),
        (["train", "--data", "text"], "there is no token folder text; did you mean texts?"),
        (["train", "--config", "setings.toml"], "did you mean settings.toml?"),
        (["train", "--model", "setting.py"], "did you mean settings.toml?"),
        (["train", "--tokenizer", "gpt3"], "did you mean gpt2?"),
        (["train", "--tokenizer", "./tokeniser.json"], f"did you mean {os.path.join('.', 'tokenizer.json')}?"),
        (["compare", "--show", "rase.json"], "did you mean race.json?"),
        (["import", "--model", "nyx", "nyx.ptt"], "did you mean nyx.pth?"),
    ],
    ids=str,
)
def test_a_missing_file_that_has_a_neighbour_of_almost_its_name(nnx, workspace, words, near):
    Path("texts").mkdir()
    files = (
        "mybook.txt",
        "texts/letters.txt",
        "settings.toml",
        "tokenizer.json",
        "race.json",
        "nyx.pth",
        ".mybok.txt~",
    )
    for name in files:
        Path(name).write_text("a\n")
    result = nnx(*words)
    assert result.exit_code in (2, 3, 5) and near in result.stderr
    assert "did you mean" not in nnx("prepare", "nothing/mybook.txt").stderr + nnx("prepare", "zebra").stderr


@pytest.mark.parametrize(
    ("words", "fix"),
    [
        (["prepare", "-o", "x"], "see: nnx prepare --help"),
        (["-x"], "see: nnx --help"),
        (["train", "my book.txt"], f"nnx train --filepath {quoted('my book.txt')}"),
        (["eval", "run", "book.txt"], "nnx eval --filepath book.txt"),
        (["sample", "run", "Once", "upon"], 'in quotes: "AI is a power!"'),
    ],
    ids=str,
)
def test_words_that_mean_nothing_come_with_what_helps(refused, words, fix):
    assert refused(2, "", *words).stderr.endswith(f"{fix}\n")


def test_debug_shows_the_traceback(workspace, nnx):
    result = nnx("sample", "nobody", "--debug")
    assert result.exit_code == 5 and "Traceback" in result.stderr and "nnx: there is no run or model" in result.stderr


def test_an_internal_error_is_one_line(refused, workspace, monkeypatch):
    def crash(*_):
        raise RuntimeError("first\nsecond \x1b[2J")

    monkeypatch.setattr("nnx_cli.runs.find.find_model", crash)
    result = refused(1, "internal error: RuntimeError: first second", "sample", "words")
    assert "--debug" in result.stderr


def test_a_gpu_that_fails_is_told_from_an_error_of_ours(refused, monkeypatch):
    def crash(*_):
        raise torch.AcceleratorError("CUDA error: unspecified launch failure\nSearch for it in the manual")

    monkeypatch.setattr("nnx_cli.runs.find.find_model", crash)
    result = refused(1, "the GPU failed: CUDA error: unspecified launch failure", "sample", "words")
    assert "Search" not in result.stderr and "nnx train --resume last" in result.stderr


def test_a_gpu_that_this_torch_has_no_kernels_for(refused, monkeypatch):
    def crash(*_):
        raise torch.AcceleratorError("CUDA error: no kernel image is available for execution on the device\nSearch")

    monkeypatch.setattr("nnx_cli.runs.find.find_model", crash)
    assert "nnx doctor" in refused(7, "this torch has no kernels for this GPU", "sample", "words").stderr


def os_error(number, *rest):
    return OSError(number, os.strerror(number), *rest)


def refused_for(cause):
    """An error of ours that another one led to."""
    error = DataError("cannot read book.txt")
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (MemoryError(), 4, "out of memory"),
        (os_error(errno.ENOMEM), 4, "out of memory"),
        (RuntimeError("std::bad_alloc"), 4, "out of memory"),
        (RuntimeError("can't start new thread"), 4, "no more threads"),
        (os_error(errno.ENOSPC), 8, "No space left on device"),
        (os_error(errno.EMFILE), 8, "too many open files"),
        (os_error(errno.ENFILE, "book.txt"), 8, "too many open files"),
        (ImportError("lib.so: cannot open shared object file: Too many open files"), 8, "too many open files"),
        (refused_for(os_error(errno.EMFILE, "book.txt")), 8, "cannot read book.txt"),
        (refused_for(os_error(errno.EIO, "book.txt")), 3, "cannot read book.txt"),
        (os_error(errno.EIO, "book.txt"), 3, "cannot use book.txt: Input/output error"),
        (os_error(errno.ESTALE, b"book.txt"), 3, "cannot use book.txt"),
        (os_error(errno.EACCES, "book.txt"), 3, "cannot use book.txt: Permission denied"),
    ],
    ids=repr,
)
@pytest.mark.skipif(sys.platform == "win32", reason="it has other words")
def test_what_the_system_refuses_has_its_code(refused, monkeypatch, error, code, message):
    def crash(*_):
        raise error

    monkeypatch.setattr("nnx_cli.runs.find.find_model", crash)
    assert "internal" not in refused(code, message, "sample", "words").stderr


def test_ctrl_c_is_code_130(nnx, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("nnx_cli.runs.find.find_model", stop)
    result = nnx("sample", "words")
    assert result.exit_code == 130 and "Traceback" not in result.stderr


@pytest.mark.parametrize(
    "words",
    [
        "train --filepath nofile --tokenizer nosuch",
        "train --init-from nofile --tokenizer nosuch",
        "train --init-from nofile --device nosuch",
        "train --resume nofile --device cuda:x",
        "train --resume nofile --max-steps 0",
        "train --checkpoint_path nofile.pth --tokenizer nosuch",
        "prepare nofile --tokenizer nosuch",
        "prepare nofile --tokenizer byte --vocab-size 300",
        "prepare nofile --tokenizer char --vocab-size 255",
        "prepare nofile --tokenizer bpe --vocab-size 256",
        "sample nofile --device nosuch",
        "sample nofile --top-p 0",
        "eval nofile --filepath nofile --batch-size 0",
        "quantize nofile --bits 3",
        "merge nofile --into x",
        "summarize nofile --lora-rank 0",
        "import nofile.pth --model nyx --tokenizer nosuch",
        "bench --device nosuch",
    ],
)
def test_usage_is_checked_before_files(refused, words):
    assert "nofile" not in refused(2, "", *words.split()).stderr


@pytest.mark.parametrize(
    ("typed", "completed"),
    [
        ("nnx sample b", ["book", "book-int8"]),
        ("nnx report book race", ["race-book/llama-1"]),
        ("nnx train --resume ", ["book", "book-int8", "last", "race-book/llama-1"]),
        ("nnx train --init-from race-book/", ["race-book/llama-1"]),
        ("nnx compare --runs book-", ["book-int8"]),
        ("nnx exp", ["export"]),
    ],
)
def test_shells_complete_names_of_runs(workspace, typed, completed, monkeypatch, capsys):
    for name in ("book", "book-int8", "race-book/llama-1", "race-book/search/deep"):
        (workspace / "weights" / name).mkdir(parents=True)
        (workspace / "weights" / name / "config.json").touch()
    words = typed.split(" ")
    monkeypatch.setenv("_NNX_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", typed)
    monkeypatch.setenv("COMP_CWORD", str(len(words) - 1))
    with pytest.raises(SystemExit):
        app()
    assert sorted(capsys.readouterr().out.split()) == completed
