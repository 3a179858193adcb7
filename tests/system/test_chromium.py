"""The driver of a headless browser: what it says of pages and of browsers that fail."""

import sys

import pytest

from nnx_cli.system import chromium


def test_a_page_tells_what_it_computes_logs_and_asks_for(browser, tmp_path):
    path = tmp_path / "page.html"
    path.write_text("<!doctype html><title>x</title><link rel=icon href='data:,'><img src=other.png>", encoding="utf-8")
    with browser.open(path) as page:
        assert page("1 + 1") == 2 and page("Promise.resolve([document.title])") == ["x"]
        with pytest.raises(chromium.ScriptError, match="Error: as said"):
            page("(() => { throw new Error('as said') })()")
        with pytest.raises(chromium.ScriptError, match="not defined"):
            page("Promise.resolve().then(() => nothing)")
        assert any("other.png" in url for url in page.requests)
        before = len(page.complaints)
        page("console.log(1)")
        assert len(page.complaints) == before + 1 > 1  # the picture is missing


def test_a_browser_that_ends_or_keeps_silent_is_told(tmp_path, monkeypatch):
    if sys.platform == "win32":
        pytest.skip("none is driven here")
    page = tmp_path / "page.html"
    for program, words in (("true", "ended"), ("no-such-program", "ended"), ("silent", "does not answer")):
        if program == "silent":
            program = tmp_path / program
            program.write_text(f"#!{sys.executable}\nimport time\ntime.sleep(60)\n", encoding="utf-8")
            program.chmod(0o755)
            monkeypatch.setattr(chromium, "PATIENCE_S", 0.2)
        else:
            program = f"/usr/bin/{program}"
        with pytest.raises(chromium.ChromiumError, match=words), chromium.opened_page(str(program), page):
            raise AssertionError("it was opened")


def test_no_browser_is_found_where_none_is(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert chromium.find_chromium() is None
