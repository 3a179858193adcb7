"""One browser for all pages."""

import sys

import pytest
from chromium import PROGRAM, Chromium


@pytest.fixture(scope="session")
def browser(tmp_path_factory):
    """Headless Chromium, where there is one."""
    if PROGRAM is None or sys.platform == "win32":
        pytest.skip("no Chromium in PATH (Debian's package is `chromium`)")
    chromium = Chromium(tmp_path_factory.mktemp("chromium"))
    yield chromium
    chromium.close()
