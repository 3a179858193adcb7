"""Headless Chromium as the tests drive it: the package's own driver, with a screen, keys and pictures."""

import base64

from nnx_cli.system import chromium

PROGRAM = chromium.find_chromium()
KEYS = {"Enter": 13, "Escape": 27, "Space": 32, "Tab": 9, "End": 35, "Home": 36, "ArrowLeft": 37, "ArrowRight": 39}


class Chromium(chromium.Chromium):
    """One browser; `open` loads a page in a tab of its own."""

    def __init__(self, profile):
        super().__init__(PROGRAM, profile)

    def open(self, path, width=1400, height=900, scheme="light", media="screen", motion="no-preference"):
        page = self.new_page()
        page.__class__ = Page
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        page.call("Emulation.setDeviceMetricsOverride", **size)
        wishes = {"prefers-color-scheme": scheme, "prefers-reduced-motion": motion}
        features = [{"name": name, "value": value} for name, value in wishes.items()]
        page.call("Emulation.setEmulatedMedia", media=media, features=features)
        page.go_to(path if isinstance(path, str) else path.resolve().as_uri())
        return page


class Page(chromium.Page):
    """A page that is loaded."""

    def key(self, name):
        """Press a key."""
        text = {"Enter": "\r", "Space": " "}.get(name)
        code = KEYS[name]
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
