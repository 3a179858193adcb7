"""The page around what it shows: its policy, its files, and that text stays text."""

import base64
import hashlib
import re
import tomllib
import zipfile
from html import unescape
from pathlib import Path

import pytest
from reporting.hostile import HOSTILE, OURS, tags

import nnx_cli
from nnx_cli.errors import OutputError
from nnx_cli.reporting import page as pages

ROOT = Path(nnx_cli.__file__).parents[1]
FILES = {"page.css", "page.html"}


def whole(text):
    parts = [pages.paragraph(text), pages.facts({text: text}), pages.table([text], [[text, text]], text)]
    return pages.page(text, [pages.section(text, *parts, pages.sample(text, text, text)), ""])


@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
def test_text_stays_text(text):
    page = whole(text)
    assert tags(page) <= OURS
    page.encode()  # no lone surrogate is left
    assert not re.search("[\0-\x08\x0b-\x1f\x7f\u202a-\u202e\u2066-\u2069]", page)
    if text.isprintable():
        assert unescape(page).count(text) > 8


def test_the_policy_allows_the_own_style_alone():
    page = whole("a title")
    (style,) = re.findall(r"<style>(.*?)</style>", page, re.DOTALL)
    policy = unescape(re.search('Content-Security-Policy" content="([^"]*)"', page)[1])
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    assert policy == f"default-src 'none'; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
    assert "url(" not in style and "@import" not in style


def test_every_class_that_is_written_has_a_style():
    source = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "nnx_cli" / "reporting").glob("*.py"))
    style = pages._file("page.css")
    named = {name for names in re.findall(r'class="([a-z ]+)["{ ]', source) for name in names.split()}
    named |= set(re.findall(r"class=([a-z]+)", source))
    assert {name for name in named if f".{name}" not in style} == set() and len(named) > 10


def test_an_empty_section_is_none():
    assert pages.section("Nothing", "", "") == "" and "<section>" not in pages.page("a", [""])


def test_a_page_that_cannot_be_written_leaves_nothing(tmp_path):
    with pytest.raises(OutputError, match="cannot write"):
        pages.write_page(tmp_path / "no folder" / "page.html", "x")
    assert list(tmp_path.iterdir()) == []


def test_the_files_of_pages_lie_beside_the_module():
    beside = {
        path.name for path in (ROOT / "nnx_cli" / "reporting").iterdir() if path.suffix in (".css", ".html", ".js")
    }
    assert beside == FILES


def test_the_package_is_built_whole():
    """Hatchling takes every file of the packages named here that git does not ignore."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["hatch"]["build"]
    assert settings == {"targets": {"wheel": {"packages": ["nnx_cli"]}}}
    ignored = (ROOT / ".gitignore").read_text(encoding="utf-8").split()
    assert not any(name.endswith((".css", ".html", ".js", "reporting", "reporting/", "nnx_cli")) for name in ignored)


def test_a_wheel_holds_the_files_of_pages(tmp_path):
    wheel = pytest.importorskip("hatchling.builders.wheel", reason="the build backend is not installed")
    if not (ROOT / "pyproject.toml").is_file():
        pytest.skip("an installed package")
    (built,) = wheel.WheelBuilder(str(ROOT)).build(directory=str(tmp_path), versions=["standard"])
    held = set(zipfile.ZipFile(built).namelist())
    texts = [p for p in (ROOT / "nnx_cli").rglob("*") if p.suffix in (".css", ".html", ".js", ".txt")]
    assert {path.relative_to(ROOT).as_posix() for path in texts} < held
    assert {path.name for path in texts} > FILES
