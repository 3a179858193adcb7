"""The README is short, its links lead somewhere, and its commands do what it says."""

import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
import typer

import nnx_cli
from nnx_cli.cli import app
from nnx_cli.runs.run import Run

ROOT = Path(nnx_cli.__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
PLACEHOLDERS = {"COMMAND"}  # of command lines: any of them


def paragraphs(text):
    """Prose: paragraphs and items of lists, without tables, code, comments and headings."""
    text = re.sub(r"```.*?```|<!--.*?-->", "", text, flags=re.S)
    for block in re.split(r"\n\s*\n|\n(?=- )", text):
        if block.strip() and block.lstrip()[0] not in "|#!":
            yield " ".join(block.split())


def plain(paragraph):
    """A paragraph as it is read: without code, and links by their text."""
    return re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", re.sub(r"`[^`]*`", "X", paragraph))


def anchors(path):
    """What can stand behind # of a link to a file, as GitHub makes it of headings."""
    headings = re.findall(r"^#+ (.+)$", path.read_text(encoding="utf-8"), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def commands():
    """Command lines of nnx in tables and prose, without those that stand for others, or have no command."""
    found = re.findall(r"`(nnx [a-z][^`]+)`", re.sub(r"```.*?```", "", README, flags=re.S))
    return sorted({line for line in found if not PLACEHOLDERS & {*line.split()}})


def follow_links(document):
    for target in LINK.findall(re.sub(r"```.*?```", "", document.read_text(encoding="utf-8"), flags=re.S)):
        if not re.match(r"[a-z]+:", target):
            name, _, anchor = target.partition("#")
            found = (document.parent / name) if name else document
            assert found.exists(), (document, target)
            assert not anchor or anchor in anchors(found), (document, target)


def test_it_is_short():
    assert len(README.splitlines()) <= 150
    for paragraph in paragraphs(README):
        assert len(plain(paragraph).split()) <= 60, paragraph
        for sentence in re.split(r"(?<=[.:;?!])\s", plain(paragraph)):
            assert len(re.findall(r"\d[\d,.]*", sentence)) <= 3, sentence


@pytest.mark.parametrize("folder", ["", "data", "weights", "nnx_cli/models", "tests/bench", "tests/reliability"])
def test_links_lead_somewhere(folder):
    for document in (ROOT / folder).glob("*.md"):
        follow_links(document)


def test_pictures_are_small_and_described():
    pictures = re.findall(r"!\[([^\]]+)\]\(([^)]+)\)", README)
    pictures += [pair[::-1] for pair in re.findall(r'<img src="([^"]+)" [^>]*alt="([^"]+)"', README)]
    assert {Path(path).name for _, path in pictures} == {"live_screen.svg", "race.svg", "report.png", "web_page.png"}
    for alt, path in pictures:
        assert len(alt.split()) >= 8 and (ROOT / path).stat().st_size <= 150_000, path


@pytest.mark.skipif(shutil.which("bash") is None, reason="the first command is for bash")
@pytest.mark.parametrize(("nvidia_smi", "backend"), [(0, "auto"), (9, "cpu"), (127, "cpu")])
def test_a_gpu_build_of_torch_is_for_an_nvidia_gpu_alone(tmp_path, nvidia_smi, backend):
    """README's first command, with stand-ins for Python, pip and uv: `nvidia-smi` works, fails, or is not there."""
    tools = {
        "python3": 'mkdir -p "$3/bin" && touch "$3/bin/activate"',
        "pip": "true",
        "uv": 'echo "$@" > asked',
        "nvidia-smi": f"echo GPU; exit {nvidia_smi}",
    }
    for name, body in tools.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{body}\n")
        (tmp_path / name).chmod(0o755)
    first = re.findall(r"```bash\n(.*?)```", README, re.S)[0]
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    subprocess.run(["bash", "-ec", first], cwd=tmp_path, env={**os.environ, "PATH": path}, check=True)
    assert (tmp_path / "asked").read_text().split() == ["pip", "install", f"--torch-backend={backend}", ".[bpe]"]


def test_commands_parse(workspace):
    Path("my.py").write_bytes((ROOT / "nnx_cli/models/llama.py").read_bytes())
    group = typer.main.get_command(app)
    lines = commands()
    assert len(lines) >= 12
    for line in lines:
        words = shlex.split(line)
        with group.make_context("nnx", words[1:]) as root:
            group.commands[words[1]].make_context(words[1], words[2:], parent=root)


@pytest.mark.parametrize(
    ("line", "made"),
    [
        ('nnx sample --prompt "AI is a power!"', None),
        ("nnx eval", None),
        ('nnx visualize --prompt "The cat"', None),
        ("nnx export --format html", "words.html"),
    ],
)
def test_commands_do_what_it_says(nnx, run, line, made):
    assert line in commands()
    done = nnx(*shlex.split(line)[1:])
    assert done.exit_code == 0, done.stderr
    assert Path(made).stat().st_size > 0 if made else done.stdout.strip()


def test_the_first_commands_train_and_go_on(nnx, text_file, workspace):
    """The README's own lines, cut to a step: what they read, where they write, and that the last one is continued."""
    short = "--max-steps 1 --dim 32 --n-layers 1 --n-heads 2 --seq-len 32 --val-batches 1".split()
    Path("book.txt").write_bytes(text_file.read_bytes())
    for line, out in {
        "nnx train --model nyx": "weights/nyx-python-docs",
        "nnx train --filepath book.txt --max-time 60s": "weights/nyx-book",
    }.items():
        assert line in commands()
        words = [word for word in shlex.split(line)[1:] if word not in ("--max-time", "60s")]
        done = nnx(*words, *short)
        assert done.exit_code == 0, done.stderr
        assert {"report.html", "model.safetensors"} <= {path.name for path in Path(out).iterdir()}
    assert "nnx train --resume last" in commands()
    Run(Path("weights/nyx-book")).set_status(status="interrupted")
    assert nnx("train", "--resume", "last", "--max-steps", 2).exit_code == 0
