import os
import re
import tracemalloc

import pytest

from nnx_cli.config import PrepareConfig
from nnx_cli.data import sources
from nnx_cli.data.find import find_sources, without
from nnx_cli.data.prepare import default_folder, prepare
from nnx_cli.errors import DataError, UsageError


@pytest.fixture
def tree(tmp_path, monkeypatch):
    """Three texts in two folders, in the current one."""
    monkeypatch.chdir(tmp_path)
    for name in ("t/a.txt", "t/b/c.txt", "t/b/d/e.txt", "t/b/d/f.log", "else/g.txt", "t/images/x.png", "t/.git/h.txt"):
        os.makedirs(os.path.dirname(name), exist_ok=True)
        (tmp_path / name).write_text(name)
    return tmp_path


def found(*paths):
    """The names of the files, with slashes, and the notes."""
    notes = []
    names = [source.name.replace(os.sep, "/") for source in find_sources(paths, notes.append)]
    return names, notes


THREE = ["t/a.txt", "t/b/c.txt", "t/b/d/e.txt"]


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


def test_a_link_to_nothing_is_told(tmp_path):
    os.symlink(tmp_path / "nothing", tmp_path / "gone.txt")
    with pytest.raises(DataError, match=r"cannot read .*gone\.txt: it is a link to what is not there"):
        find_sources([tmp_path / "gone.txt"], print)


# every file once


@pytest.mark.parametrize("path", ["t", "t/**/*.txt", "**/*.txt", "t/", "t/**/", "?/**/*.t?t", "t/*", "./t"])
@pytest.mark.parametrize(
    "links",
    [
        {},
        {"t/loop": "."},
        {"t/b/up": "..", "t/b/d/top": "../../.."},
        {"t/l": "b", "t/b/m": "d", "t/b/d/n": "../../b"},
    ],
)
def test_links_in_circles_change_nothing(tree, path, links):
    (tree / "else/g.txt").unlink()
    for name, target in links.items():
        os.symlink(target, name)
    names, notes = found(path)
    assert [os.path.normpath(name).replace(os.sep, "/") for name in names] == THREE
    assert bool(notes) == bool(links)
    for note in notes:
        assert "not followed" in note or "read once" in note


@pytest.mark.parametrize(
    "pattern", ["t/**/*.txt", "t/**", "t", "**/b/**/*.txt", "t/**/*", "*/*/*/*/*/*.txt", "t/l0/**/*.txt"]
)
def test_many_links_in_circles_end(tree, pattern):
    for n in range(6):
        os.symlink(os.pardir if n % 2 else ".", f"t/l{n}")
        os.symlink(os.path.abspath("t"), f"t/b/l{n}")
        os.symlink("../..", f"t/b/d/l{n}")
    tracemalloc.start()
    names, notes = found(pattern)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len({os.path.realpath(name) for name in names}) == len(names) <= 7
    assert notes and peak < 5e6


def test_links_elsewhere_are_followed_once(tree):
    os.symlink("../else", "t/linked")
    os.symlink(tree / "else", "t/b/linked")
    os.symlink("../else/g.txt", "t/0.txt")
    names, [again, circle] = found("t")
    assert names == [*THREE, "t/linked/g.txt"] or names == ["t/a.txt", "t/b/c.txt", "t/b/d/e.txt", "t/linked/g.txt"]
    assert (
        again == f"{os.path.join('t', '0.txt')} is the same file as {os.path.join('t', 'linked', 'g.txt')}: read once"
    )
    assert circle.endswith("leads to a folder that is read anyway: not followed")
    os.symlink("../t", "else/back")
    os.symlink("../..", "else/far")
    assert found("t")[0] == names


def test_a_folder_of_links_is_read_in_the_order_of_their_names(tree):
    os.mkdir("snapshot")
    for name, target in (("z.txt", "a.txt"), ("b.txt", "b/c.txt"), ("m.txt", "b/d/e.txt")):
        os.symlink(tree / "t" / target, f"snapshot/{name}")
    assert found("snapshot") == (["snapshot/b.txt", "snapshot/m.txt", "snapshot/z.txt"], [])


def test_hard_links_and_names_given_twice(tree):
    os.link("t/a.txt", "t/z.txt")
    names, [note] = found("t")
    assert names == THREE and note.endswith("is the same file as " + os.path.join("t", "a.txt") + ": read once")
    names, [note] = found("t/a.txt", "t/a.txt", "./t/a.txt", "t/*.txt", tree / "t" / "a.txt")
    assert names == ["t/a.txt"] and note == "t/a.txt is named twice: read once (4 more like it)"
    assert found("-", "-") == (["standard input"], ["standard input is named twice: read once"])


def test_a_file_system_without_inodes(tree, monkeypatch):
    def without_inode(look_up):
        def status(path, **options):
            mode, _, _, *others = look_up(path, **options)
            return os.stat_result([mode, 0, 0, *others])

        return status

    os.symlink(".", "t/loop")
    os.symlink("a.txt", "t/link.txt")
    for name in ("stat", "lstat"):
        monkeypatch.setattr(os, name, without_inode(getattr(os, name)))
    assert found("t")[0] == found("t/**/*.txt")[0] == THREE


def test_globs_pass_over_folders_without_text(tree):
    assert found("t/*")[0] == THREE
    assert found("t/b/d/*")[0] == ["t/b/d/e.txt", "t/b/d/f.log"]
    with pytest.raises(DataError, match="holds no"):
        find_sources(["t/im*"])
    with pytest.raises(DataError, match="holds no"):
        find_sources(["t/images"])


def test_a_name_with_marks_of_a_glob_is_a_name(tree):
    (tree / "t/[a].txt").write_text("text")
    os.mkdir("t/**")
    (tree / "t/**/*.txt").write_text("text")
    assert found("t/[a].txt") == (["t/[a].txt"], [])
    assert found("t/**") == (["t/**/*.txt"], [])


# validation text


def test_validation_text_is_not_trained_on(tree):
    notes = []
    held_out = find_sources(["t/b"])
    assert [source.name for source in without(find_sources(["t"]), held_out, notes.append)] == [
        os.path.join("t", "a.txt")
    ]
    assert len(notes) == 1 and "is validation text: left out of training (1 more like it)" in notes[0]
    os.link("t/a.txt", "hard.txt")
    os.symlink("t/b", "linked")
    for named in (["t/b/c.txt"], ["linked"], ["t/b/d", "t/b/c.txt"]):
        with pytest.raises(UsageError, match="both training and validation"):
            without(find_sources(named), held_out)
    with pytest.raises(UsageError):
        without(find_sources(["t/a.txt"]), find_sources(["hard.txt"]))
    assert without(find_sources(["else"]), held_out, notes.append) and len(notes) == 1


@pytest.mark.skipif(os.name != "posix", reason="pipes and devices")
@pytest.mark.parametrize("pattern", ["d/*.txt", "d/**/*.txt", "d/*", "d"])
def test_what_is_no_file_is_left_out_of_a_pattern(workspace, pattern):
    (workspace / "d").mkdir()
    (workspace / "d" / "a.txt").write_text("text\n")
    (workspace / "d" / "broken.txt").symlink_to("nowhere")
    (workspace / "d" / "circle.txt").symlink_to("circle.txt")
    os.mkfifo(workspace / "d" / "pipe.txt")
    told = []
    assert [source.name for source in find_sources([pattern], told.append)] == ["d/a.txt"]
    assert pattern == "d" or told == ["d/broken.txt is no file: left out (2 more like it)"]


@pytest.mark.skipif(os.name != "posix", reason="devices")
@pytest.mark.parametrize("device", ["/dev/zero", "/dev/urandom", "/dev/full"])
def test_a_device_without_end_is_not_begun(workspace, device):
    with pytest.raises(DataError, match=f"{device} is a device"):
        prepare([device], workspace / "made", PrepareConfig())


@pytest.mark.parametrize("strict", [False, True])
def test_one_of_many_that_cannot_be_opened(workspace, monkeypatch, strict):
    (workspace / "d").mkdir()
    for name in ("a.txt", "b.txt", "c.txt"):
        (workspace / "d" / name).write_text(f"some text of {name}\n")
    config = PrepareConfig(errors="strict" if strict else "replace")
    real, told = sources.Source.open, []

    def refuse(source):
        if source.name.endswith("b.txt"):
            raise DataError(f"cannot read {source.name}: Permission denied")
        return real(source)

    monkeypatch.setattr(sources.Source, "open", refuse)
    if strict:
        with pytest.raises(DataError, match="Permission denied"):
            prepare(["d"], workspace / "made", config)
        return
    assert default_folder(["d"], config) == default_folder(["d"], config)
    assert prepare(["d"], workspace / "made", config, on_progress=told.append)["documents"] == 2
    assert any("Permission denied; left out" in event.get("note", "") for event in told)
