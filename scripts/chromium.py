"""A headless Chromium without a network: pages are opened from disk, asked about, and photographed.

Spoken to by its debugging protocol over two pipes (``--remote-debugging-pipe``: JSON, each message ended by a zero byte), so that
nothing but the browser itself is needed.
"""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
_FLAGS = (
    "--headless=new",
    "--no-sandbox",  # containers have no user namespaces; only pages made here are opened
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--hide-scrollbars",
    "--no-first-run",
    "--disable-extensions",
    "--disable-background-networking",
    "--disable-component-update",
    "--remote-debugging-pipe",
    # Every name leads nowhere, so that whatever asks for the network fails; but for this machine, which a page may be from.
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
    "--proxy-server=127.0.0.1:9",
)


def installed() -> str | None:
    """The Chromium of this machine, None where there is none."""
    return next((path for path in map(shutil.which, NAMES) if path), None)


@dataclass
class Page:
    """One open page: what it complained of, and which addresses it asked for."""

    call: Any
    complaints: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)

    def evaluate(self, expression: str) -> Any:
        """The value of a JavaScript expression in the page."""
        done = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in done, done
        return done["result"].get("value")

    def screenshot(self, *, height: int | None = None, top: int = 0) -> bytes:
        """A PNG of the whole page, or of `height` pixels of it from `top`."""
        width, whole = self.evaluate("[document.documentElement.clientWidth, document.documentElement.scrollHeight]")
        clip = {"x": 0, "y": top, "width": width, "height": min(height or whole, whole - top), "scale": 1}
        return base64.b64decode(self.call("Page.captureScreenshot", clip=clip, captureBeyondViewport=True)["data"])


class Chromium:
    """A running browser; made by `chromium`."""

    def __init__(self, to_browser: Any, from_browser: Any) -> None:
        self._to, self._from = to_browser, from_browser
        self._unread = b""
        self._number = 0
        self._page: Page | None = None

    def open(self, place: Path | str, *, width: int, scheme: str, pixel_ratio: float = 1.0) -> Page:
        """A page in a file, offline, or at an address of this machine; at a width and in a colour scheme ("light", "dark")."""
        target = self._call("Target.createTarget", url="about:blank")["targetId"]
        session = self._call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        page = self._page = Page(lambda method, **rest: self._call(method, session=session, **rest))
        for domain in ("Page", "Runtime", "Log", "Network"):
            page.call(f"{domain}.enable")
        page.call(
            "Network.emulateNetworkConditions",
            offline=isinstance(place, Path),
            latency=0,
            downloadThroughput=-1,
            uploadThroughput=-1,
        )
        size = {"width": width, "height": 800, "deviceScaleFactor": pixel_ratio, "mobile": width < 600}
        page.call("Emulation.setDeviceMetricsOverride", **size)
        page.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        page.call("Page.navigate", url=place.resolve().as_uri() if isinstance(place, Path) else place)
        self._read_until(lambda message: message.get("method") == "Page.loadEventFired")
        page.evaluate("document.readyState")  # what came before its answer has been read
        return page

    def _call(self, method: str, session: str | None = None, **parameters: Any) -> Any:
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        self._to.write(json.dumps(message | ({"sessionId": session} if session else {})).encode() + b"\0")
        self._to.flush()
        answer = self._read_until(lambda message, number=self._number: message.get("id") == number)
        if "error" in answer:
            raise RuntimeError(f"{method}: {answer['error']}")
        return answer["result"]

    def _read_until(self, wanted: Any) -> dict[str, Any]:
        for message in self._messages():
            self._note(message)
            if wanted(message):
                return message
        raise RuntimeError("Chromium ended")

    def _messages(self) -> Iterator[dict[str, Any]]:
        while True:
            while b"\0" not in self._unread:
                more = self._from.read1(1 << 16)
                if not more:
                    return
                self._unread += more
            message, _, self._unread = self._unread.partition(b"\0")
            yield json.loads(message)

    def _note(self, message: dict[str, Any]) -> None:
        method, parameters, page = message.get("method"), message.get("params", {}), self._page
        if page is None:
            return
        if method == "Network.requestWillBeSent":
            page.requests.append(parameters["request"]["url"])
        elif method in ("Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Log.entryAdded"):
            page.complaints.append(json.dumps(parameters))


@contextmanager
def chromium(program: str) -> Iterator[Chromium]:
    """A Chromium that runs for the length of the block, with a profile of its own."""
    (browser_reads, we_write), (we_read, browser_writes) = os.pipe(), os.pipe()
    with tempfile.TemporaryDirectory(prefix="chromium-", ignore_cleanup_errors=True) as profile:
        # The protocol wants descriptors 3 and 4; the shell moves them there, whatever they are here.
        script = f'exec "$@" 3<&{browser_reads} 4>&{browser_writes}'
        command = ["/bin/bash", "-c", script, "chromium", program, *_FLAGS, f"--user-data-dir={profile}", "about:blank"]
        process = subprocess.Popen(
            command, pass_fds=(browser_reads, browser_writes), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        os.close(browser_reads)
        os.close(browser_writes)
        with os.fdopen(we_write, "wb") as to_browser, os.fdopen(we_read, "rb") as from_browser:
            try:
                yield Chromium(to_browser, from_browser)
            finally:
                process.terminate()
                try:
                    process.wait(10)
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait(10)
