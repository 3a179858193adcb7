import errno
import json
import os
import subprocess
import sys

import pytest

from nnx_cli.errors import CheckpointError, OutputError
from nnx_cli.system import files

pytestmark = pytest.mark.skipif(os.name != "posix", reason="processes are asked for by POSIX means")


@pytest.fixture
def dead_pid():
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def make(folder, *names, file="model.safetensors"):
    for name in names:
        (folder / name).mkdir()
        (folder / name / file).write_text("half")


def test_what_a_dead_process_left_is_swept(tmp_path, dead_pid):
    make(tmp_path, f".tmp-run-{dead_pid}", f".tmp-mine-{dead_pid}", f".tmp-run-{os.getppid()}", file="notes.txt")
    make(tmp_path, f".tmp-other-{dead_pid}", f".del-step-00000005-{dead_pid}", ".tmp-mine", f"run-{dead_pid}", "there")
    (tmp_path / f".tmp-link-{dead_pid}").symlink_to(tmp_path / "there")
    with files.new_folder(tmp_path / "run") as folder:
        (folder / "file").write_text("whole")
    left = {path.name for path in tmp_path.iterdir()}
    somebody_elses = {f".tmp-mine-{dead_pid}", f".tmp-run-{os.getppid()}", ".tmp-mine", f".tmp-link-{dead_pid}"}
    assert left == somebody_elses | {f"run-{dead_pid}", "there", "run"}
    assert (tmp_path / "there" / "model.safetensors").exists()


def test_what_somebody_holds_is_not_swept(tmp_path, dead_pid):
    """Process numbers of another container say nothing here: who makes a folder has its lock."""
    make(tmp_path, f".tmp-run-{dead_pid}")
    with files.locked_folder(tmp_path / f".tmp-run-{dead_pid}") as free:
        assert free
        files.sweep(tmp_path / "run")
        assert (tmp_path / f".tmp-run-{dead_pid}").exists()
    files.sweep(tmp_path / "run")
    assert not (tmp_path / f".tmp-run-{dead_pid}").exists()


def test_a_folder_in_the_making_has_its_lock(tmp_path):
    with (
        files.new_folder(tmp_path / "run") as folder,
        files.locked_folder(folder) as free,
    ):
        assert not free


def test_the_slower_of_two_is_told(tmp_path):
    with pytest.raises(OutputError, match="run exists already"), files.new_folder(tmp_path / "run"):
        make(tmp_path, "run")
    with pytest.raises(OutputError, match="exists already"), files.refused_output(tmp_path / "run"):
        raise OSError(errno.ENOTEMPTY, "Directory not empty")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


NAMES = ["data", "späte texte", "a\udcffb", "\udc80\udcfe", "%FF", "x\\0ff", "\udcc3\udcbc"]


@pytest.mark.parametrize("name", NAMES)
def test_a_way_that_json_can_hold_leads_back(tmp_path, name):
    """Names that are no UTF-8 among them: every program can read the file, and the folder is found again."""
    try:
        (tmp_path / name).mkdir()
    except (OSError, UnicodeError):
        pytest.skip("a name that this file system refuses")
    (tmp_path / "run").mkdir()
    way = json.loads(files.to_json({"folder": files.relative(tmp_path / name, tmp_path / "run")}).decode())["folder"]
    way.encode()
    assert files.follow(tmp_path / "run", way).samefile(tmp_path / name)
    assert files.follow(tmp_path / "run", f"../{name}").samefile(tmp_path / name), "as it was written before"


@pytest.mark.parametrize("text", ["\udcff", "a\ud800", "\udfffb", "\ud83d\ude42"])
def test_json_without_lone_surrogates(text):
    written = files.to_json({"command": text, text: [text]})
    shown = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    assert json.loads(written.decode()) == {"command": shown, shown: [shown]}


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999", "-1e400"])
def test_json_has_no_such_number(tmp_path, number):
    (tmp_path / "a.json").write_text(f'{{"x": [{number}]}}')
    with pytest.raises(CheckpointError, match="a.json is damaged"):
        files.read_json(tmp_path / "a.json")
    (tmp_path / "a.json").write_text('{"x": [1.5, 1e-400, -2]}')
    assert files.read_json(tmp_path / "a.json") == {"x": [1.5, 0.0, -2]}


def test_space_that_is_not_there(tmp_path):
    files.require_space(tmp_path, 1)
    with pytest.raises(OutputError, match=r"disk full: .* needs 1,048,576,000\.0 MiB more, .* MiB are free"):
        files.require_space(tmp_path, 1000 * 2**40)
