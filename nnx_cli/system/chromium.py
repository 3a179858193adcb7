"""A headless Chromium, driven over its DevTools pipe: opens pages of ours and says what they compute, log and ask
for."""

from __future__ import annotations

import itertools
import json
import os
import select
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

PROGRAMS = "chromium", "chromium-browser", "google-chrome", "chrome"
SWITCHES = [
    "--headless=new",
    "--no-sandbox",  # which containers often forbid; the pages are ours
    "--disable-gpu",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-dev-shm-usage",
    "--remote-debugging-pipe",
]
START = (  # it reads from descriptor 3 and writes to 4
    "import os, sys; r, w = map(int, sys.argv[1:3]); os.dup2(r, 3); os.dup2(w, 4); os.execv(sys.argv[3], sys.argv[3:])"
)
PATIENCE_S = 60  # for an answer: a machine may be busy


class ChromiumError(Exception):
    """It does not start or answer."""


class ScriptError(Exception):
    """A script of the page failed."""


def find_chromium() -> str | None:
    """The program, where there is one that can be driven here."""
    return None if sys.platform == "win32" else next(filter(None, map(shutil.which, PROGRAMS)), None)


class Chromium:
    """One browser, with a folder for its profile."""

    def __init__(self, program: str, profile: Path) -> None:
        import fcntl

        ours, theirs = [], []
        for kept, given in (os.pipe()[::-1], os.pipe()):  # what it reads, what it writes
            ours.append(kept)
            theirs.append(fcntl.fcntl(given, fcntl.F_DUPFD, 10))
            os.close(given)
        self.to, self.of = ours
        command = [sys.executable, "-c", START, *map(str, theirs), program, *SWITCHES, f"--user-data-dir={profile}"]
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        self.process = subprocess.Popen(command, pass_fds=theirs, **quiet)  # type: ignore[call-overload]  # of what ** is
        for descriptor in theirs:
            os.close(descriptor)
        self.numbers = itertools.count(1)
        self.rest = b""
        self.events: list[dict[str, Any]] = []

    def close(self) -> None:
        """End the browser."""
        try:
            self.send("Browser.close")
            self.process.wait(PATIENCE_S)
        except (ChromiumError, subprocess.TimeoutExpired):
            self.process.kill()
            self.process.wait()
        os.close(self.to)
        os.close(self.of)

    def read(self, seconds: float) -> dict[str, Any] | None:
        """The next message, or None where none comes in time."""
        deadline = time.monotonic() + seconds
        pieces = [self.rest]
        while b"\0" not in pieces[-1]:
            if not select.select([self.of], [], [], max(0, deadline - time.monotonic()))[0]:
                self.rest = b"".join(pieces)
                return None
            pieces.append(os.read(self.of, 2**20))
            if not pieces[-1]:
                raise ChromiumError("Chromium ended")
        message, _, self.rest = b"".join(pieces).partition(b"\0")
        return json.loads(message)

    def send(self, method: str, session: str | None = None, **parameters: Any) -> int:
        """Send a command; returns the number of its answer."""
        number = next(self.numbers)
        message = {"id": number, "method": method, "params": parameters} | ({"sessionId": session} if session else {})
        data = json.dumps(message).encode() + b"\0"
        try:
            while data:
                data = data[os.write(self.to, data) :]
        except BrokenPipeError as error:
            raise ChromiumError("Chromium ended") from error
        return number

    def call(self, method: str, session: str | None = None, patience_s: float | None = None, **parameters: Any) -> Any:
        """The answer to a command; events that come meanwhile are kept."""
        number = self.send(method, session, **parameters)
        while answer := self.read(patience_s or PATIENCE_S):
            if answer.get("id") == number:
                if "error" in answer:
                    raise ChromiumError(f"{method}: {answer['error'].get('message')}")
                return answer["result"]
            self.events.append(answer)
        raise ChromiumError(f"Chromium does not answer {method}")

    def wait_for(self, name: str, session: str) -> None:
        """Until an event of a page has come."""
        while not any(event["method"] == name and event.get("sessionId") == session for event in self.events):
            event = self.read(PATIENCE_S)
            if event is None:
                raise ChromiumError(f"Chromium sends no {name}")
            self.events.append(event)

    def new_page(self) -> Page:
        """An empty page in a tab of its own."""
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        page = Page(self, self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"], target)
        for domain in ("Page", "Runtime", "Log", "Network"):
            page.call(f"{domain}.enable")
        return page


class Page:
    """A tab. Called with a JavaScript expression it gives its value, of a promise what that becomes."""

    def __init__(self, browser: Chromium, session: str, target: str) -> None:
        self.browser, self.session, self.target, self.url = browser, session, target, "about:blank"

    def call(self, method: str, **parameters: Any) -> Any:
        """The answer to a command for this page."""
        return self.browser.call(method, self.session, **parameters)

    def go_to(self, url: str) -> None:
        """Load an address."""
        self.url = url
        self.call("Page.navigate", url=url)
        self.browser.wait_for("Page.loadEventFired", self.session)

    def __call__(self, expression: str, patience_s: float | None = None) -> Any:
        """The value of an expression. Raises ScriptError where it throws."""
        how = dict(returnByValue=True, awaitPromise=True, patience_s=patience_s)
        found = self.call("Runtime.evaluate", expression=expression, **how)
        if "exceptionDetails" in found:
            details = found["exceptionDetails"]
            raise ScriptError(str(details.get("exception", {}).get("description") or details.get("text")))
        return found["result"].get("value")

    def __enter__(self) -> Page:
        return self

    def __exit__(self, *_: object) -> None:
        self.browser.call("Target.closeTarget", targetId=self.target)

    def _events(self, name: str) -> list[dict[str, Any]]:
        return [e["params"] for e in self.browser.events if e["method"] == name and e.get("sessionId") == self.session]

    @property
    def complaints(self) -> list[dict[str, Any]]:
        """Everything on the console, and what was refused or failed."""
        self("0")  # what came before this answer is there
        names = ("Log.entryAdded", "Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Network.loadingFailed")
        return [event for name in names for event in self._events(name)]

    @property
    def requests(self) -> list[str]:
        """Every address that was asked for but the page's own."""
        urls = [event["request"]["url"] for event in self._events("Network.requestWillBeSent")]
        return [url for url in urls if url != self.url]


@contextmanager
def opened_page(program: str, path: Path) -> Iterator[Page]:
    """A file in a browser of its own. Raises ChromiumError where that does not work."""
    with tempfile.TemporaryDirectory(prefix="nnx-", ignore_cleanup_errors=True) as profile:
        browser = Chromium(program, Path(profile))
        try:
            page = browser.new_page()
            page.go_to(path.resolve().as_uri())
            yield page
        finally:
            browser.close()
