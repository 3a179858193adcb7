import os
import re

import pytest

from nnx_cli.data.find import find_sources
from nnx_cli.errors import DataError, UsageError


def test_folder_is_read_whole_and_sorted(tmp_path):
    for name in (
        "b/c.md",
        "a.txt",
        "B.TXT",
        "z.txt.gz",
        "skip.py",
        ".hidden.txt",
        ".git/x.txt",
        "b/a.jsonl.zst",
        "pack.zip",
    ):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"x")
    os.symlink(tmp_path, tmp_path / "b/loop")
    os.symlink(tmp_path / "nothing", tmp_path / "broken.txt")
    names = [os.path.relpath(source.name, tmp_path) for source in find_sources([tmp_path])]
    assert names == ["B.TXT", "a.txt", "pack.zip", "z.txt.gz", "b/a.jsonl.zst", "b/c.md"]


def test_globs_repeats_and_any_suffix(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a.log", "b.log", "c.txt"):
        (tmp_path / name).write_text(name)
    assert [source.name for source in find_sources(["*.log", "a.log", "./b.log", "c.txt"])] == [
        "a.log",
        "b.log",
        "c.txt",
    ]
    assert find_sources([tmp_path / "a.log"])[0].label == "a.log"


@pytest.mark.parametrize("name", ["nothing.txt", "*.nothing", "empty"])
def test_what_is_not_there_is_named(tmp_path, name):
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=re.escape(name)):
        find_sources([tmp_path / name])
    with pytest.raises(UsageError):
        find_sources([])
