"""A headless Chromium that tests can drive over its DevTools protocol."""

import base64
import itertools
import json
import shutil
import subprocess
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path

import httpx
from websockets.sync.client import connect

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
QUIET = ("networking", "timer-throttling")
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--no-first-run", "--disable-sync"),
    *("--disable-component-update", *(f"--disable-background-{what}" for what in QUIET), "--remote-debugging-port=0"),
)


class Tab:
    """One open page."""

    def __init__(self, socket):
        self.socket = socket
        self.numbers = itertools.count(1)

    def call(self, method, **params):
        number = next(self.numbers)
        self.socket.send(json.dumps({"id": number, "method": method, "params": params}))
        while (answer := json.loads(self.socket.recv(timeout=30))).get("id") != number:
            pass
        assert "error" not in answer, answer
        return answer["result"]

    def evaluate(self, expression):
        result = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def until(self, condition):
        for _ in range(300):
            if self.evaluate(condition):
                return
            time.sleep(0.05)
        raise AssertionError(f"never: {condition}; the page says: {self.evaluate('document.body.innerText')}")

    def picture(self, *, width=1100, height=800, dark=False):
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self.call("Emulation.setDeviceMetricsOverride", **size)
        return base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"])


@contextmanager
def browse(address):
    """A tab that shows the address."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        command = [str(CHROMIUM), *FLAGS, f"--user-data-dir={profile}", "about:blank"]
        with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
            try:
                port = _port(Path(profile) / "DevToolsActivePort")
                tabs = httpx.get(f"http://127.0.0.1:{port}/json/list").json()
                url = next(tab["webSocketDebuggerUrl"] for tab in tabs if tab["type"] == "page")
                with connect(url, max_size=None) as socket:
                    tab = Tab(socket)
                    tab.call("Page.navigate", url=address)
                    yield tab
            finally:
                process.terminate()


def _port(path):
    for _ in range(300):
        if path.exists() and path.read_text().count("\n"):
            return int(path.read_text().splitlines()[0])
        time.sleep(0.1)
    raise AssertionError("the browser does not come up")
