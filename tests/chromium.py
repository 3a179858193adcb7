"""Headless Chromium over its DevTools pipe: what a page logs, requests and shows, without a further dependency."""

import base64
import itertools
import json
import os
import select
import shutil
import subprocess
import sys
import time

PROGRAM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
SWITCHES = [
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-dev-shm-usage",
    "--remote-debugging-pipe",
]
START = (
    "import os, sys; r, w = map(int, sys.argv[1:3]); os.dup2(r, 3); os.dup2(w, 4); os.execv(sys.argv[3], sys.argv[3:])"
)
PATIENCE = 60  # seconds: machines that run tests may be busy


class Chromium:
    """One browser; `open` loads a page in a tab of its own."""

    def __init__(self, profile):
        import fcntl

        ours = []
        theirs = []
        for kept, given in (os.pipe()[::-1], os.pipe()):  # what it reads, what it writes
            ours.append(kept)
            theirs.append(fcntl.fcntl(given, fcntl.F_DUPFD, 10))
            os.close(given)
        self.to, self.of = ours
        command = [sys.executable, "-c", START, *map(str, theirs), PROGRAM, *SWITCHES, f"--user-data-dir={profile}"]
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        self.process = subprocess.Popen(command, pass_fds=theirs, **quiet)
        for descriptor in theirs:
            os.close(descriptor)
        self.numbers = itertools.count(1)
        self.rest = b""
        self.events = []

    def close(self):
        self.send("Browser.close")
        self.process.wait(PATIENCE)
        os.close(self.to)
        os.close(self.of)

    def read(self, seconds):
        """The next message, or None where none comes in time."""
        deadline = time.monotonic() + seconds
        while b"\0" not in self.rest:
            if not select.select([self.of], [], [], max(0, deadline - time.monotonic()))[0]:
                return None
            piece = os.read(self.of, 2**20)
            assert piece, "Chromium is gone"
            self.rest += piece
        message, _, self.rest = self.rest.partition(b"\0")
        return json.loads(message)

    def send(self, method, session=None, **parameters):
        """Send a command; returns the number of its answer."""
        number = next(self.numbers)
        message = {"id": number, "method": method, "params": parameters} | ({"sessionId": session} if session else {})
        data = json.dumps(message).encode() + b"\0"
        while data:
            data = data[os.write(self.to, data) :]
        return number

    def call(self, method, session=None, **parameters):
        """The answer to a command; events that come meanwhile are kept."""
        number = self.send(method, session, **parameters)
        while answer := self.read(PATIENCE):
            if answer.get("id") == number:
                assert "error" not in answer, answer
                return answer["result"]
            self.events.append(answer)
        raise AssertionError(f"Chromium does not answer {method}")

    def wait_for(self, name, session):
        while not any(event["method"] == name and event.get("sessionId") == session for event in self.events):
            event = self.read(PATIENCE)
            assert event, f"no {name}"
            self.events.append(event)

    def open(self, path, width=1400, height=900, scheme="light", media="screen", motion="no-preference"):
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        page = Page(self, session, target, path if isinstance(path, str) else path.resolve().as_uri())
        for domain in ("Page", "Runtime", "Log", "Network"):
            page.call(f"{domain}.enable")
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        page.call("Emulation.setDeviceMetricsOverride", **size)
        wishes = {"prefers-color-scheme": scheme, "prefers-reduced-motion": motion}
        features = [{"name": name, "value": value} for name, value in wishes.items()]
        page.call("Emulation.setEmulatedMedia", media=media, features=features)
        page.call("Page.navigate", url=page.url)
        self.wait_for("Page.loadEventFired", session)
        return page


class Page:
    """A page that is loaded."""

    def __init__(self, browser, session, target, url):
        self.browser, self.session, self.target, self.url = browser, session, target, url

    def call(self, method, **parameters):
        return self.browser.call(method, self.session, **parameters)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.browser.call("Target.closeTarget", targetId=self.target)

    def __call__(self, expression):
        """The value of a JavaScript expression."""
        found = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def _events(self, name):
        return [e["params"] for e in self.browser.events if e["method"] == name and e.get("sessionId") == self.session]

    @property
    def complaints(self):
        """Everything on the console, and what was refused or failed."""
        self("0")  # what came before this answer is there
        names = ("Log.entryAdded", "Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Network.loadingFailed")
        return [event for name in names for event in self._events(name)]

    @property
    def requests(self):
        """Every address that was asked for but the page's own."""
        urls = [event["request"]["url"] for event in self._events("Network.requestWillBeSent")]
        return [url for url in urls if url != self.url]

    def key(self, name):
        """Press a key."""
        text = {"Enter": "\r", "Space": " "}.get(name)
        code = {"Enter": 13, "Space": 32, "Tab": 9, "ArrowRight": 39}[name]
        kind = {
            "type": "keyDown" if text else "rawKeyDown",
            "windowsVirtualKeyCode": code,
            "key": " " if name == "Space" else name,
            "code": name,
        }
        self.call("Input.dispatchKeyEvent", **kind, **({"text": text} if text else {}))
        self.call("Input.dispatchKeyEvent", **(kind | {"type": "keyUp"}))

    def screenshot(self, path):
        """A picture of the whole page."""
        data = self.call("Page.captureScreenshot", captureBeyondViewport=True, format="png", **self._clip())["data"]
        path.write_bytes(base64.b64decode(data))

    def _clip(self):
        size = self.call("Page.getLayoutMetrics")["cssContentSize"]
        return {"clip": {"x": 0, "y": 0, "width": size["width"], "height": size["height"], "scale": 1}}
