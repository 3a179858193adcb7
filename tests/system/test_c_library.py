import os
import shutil
import subprocess

import pytest

from nnx_cli.system import c_library
from nnx_cli.system.c_library import load_c

SEVEN = "int number(void) { return 7; }"


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    """An empty cache folder."""
    if os.name != "posix" or not any(map(shutil.which, c_library.COMPILERS)):
        pytest.skip("no C compiler here, or none that is used")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "nnx"


def no_compiler(*args, **kwargs):
    raise AssertionError("a compiler was called")


def test_it_is_compiled_once(cache, monkeypatch):
    assert load_c(SEVEN, []).number() == 7
    assert load_c("int number(void) { return N; }", ["-DN=8"]).number() == 8
    assert len(list(cache.iterdir())) == 2
    monkeypatch.setattr(subprocess, "run", no_compiler)
    assert load_c(SEVEN, []).number() == 7


@pytest.mark.parametrize("content", [b"", b"\x7fELF", b"no library"])
def test_a_damaged_file_is_made_again(cache, content, monkeypatch, tmp_path):
    load_c(SEVEN, [])
    (file,) = cache.iterdir()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))  # elsewhere, for this process has loaded that one
    damaged = tmp_path / "nnx" / file.name
    damaged.parent.mkdir()
    damaged.write_bytes(content)
    assert load_c(SEVEN, []).number() == 7
    assert damaged.stat().st_size > 1000


@pytest.mark.parametrize("source", ["this is no C", "int number(void) { return missing_function(", '#include "none.h"'])
def test_what_does_not_compile_is_none_and_leaves_nothing(cache, source):
    assert load_c(source, []) is None
    assert not list(cache.iterdir())


def test_a_compiler_that_hangs_is_given_up(cache, monkeypatch):
    def hang(*args, timeout, **kwargs):
        raise subprocess.TimeoutExpired("cc", timeout)

    monkeypatch.setattr(subprocess, "run", hang)
    assert load_c(SEVEN, []) is None and not list(cache.iterdir())


def test_without_a_home_nothing_is_left_in_this_folder(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.setattr(c_library.os.path, "expanduser", lambda path: path)
    assert load_c(SEVEN, []).number() == 7
    assert not list(tmp_path.iterdir())


def test_without_a_folder_it_is_compiled_every_time(cache):
    cache.parent.write_text("a file")
    assert load_c(SEVEN, []).number() == 7
    assert cache.parent.read_text() == "a file"
