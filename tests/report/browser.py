"""A headless Chromium, spoken to through its DevTools pipe: no driver, no port."""

from __future__ import annotations

import base64
import functools
import io
import json
import os
import select
import shutil
import subprocess
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

_NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
_OPTIONS = (
    *("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"),
    *("--no-first-run", "--disable-background-networking", "--disable-component-update"),
    *("--hide-scrollbars", "--force-color-profile=srgb", "--remote-debugging-pipe"),
)
_TIMEOUT_S = 60.0
_LAYOUT = """({
  width: document.documentElement.scrollWidth,
  height: document.documentElement.scrollHeight,
  text: document.body.innerText,
  wide: [...document.querySelectorAll('body *')].filter(e => !e.closest('.scroll')
    && e.getBoundingClientRect().right > document.documentElement.clientWidth + 1)
    .map(e => e.tagName),
  svgs: [...document.querySelectorAll('svg')].map(e => {
    const box = e.getBoundingClientRect(); return [box.width, box.height]; }),
})"""


@dataclass(frozen=True)
class Rendering:
    """A page as the browser shows it.

    Attributes:
        screenshot: PNG of the whole page.
        complaints: Console messages, exceptions and refusals.
        requests: Addresses that the page asked for, itself left out; data: addresses too.
        width: Of the content, in pixels.
        height: Of the content, in pixels.
        text: What can be read.
        wide: Elements that stand out on the right, other than in boxes that scroll.
        svgs: Width and height of every drawing.
    """

    screenshot: bytes
    complaints: list[str]
    requests: list[str]
    width: int
    height: int
    text: str
    wide: list[str]
    svgs: list[tuple[float, float]]

    def share_of(self, greys: Iterable[int]) -> float:
        """The share of the screenshot's pixels that have one of these grey levels."""
        from PIL import Image

        counts = Image.open(io.BytesIO(self.screenshot)).convert("L").histogram()
        return sum(counts[grey] for grey in greys) / sum(counts)


@functools.cache
def find_browser() -> str | None:
    """The path of an installed Chromium."""
    return next((path for name in _NAMES if (path := shutil.which(name))), None)


class Browser:
    """A running browser."""

    def __init__(self, process: subprocess.Popen[bytes], to: int, back: int) -> None:
        self._process, self._to, self._back = process, to, back
        self._number = 0
        self._buffer = b""
        self._events: list[dict[str, Any]] = []

    def render(self, page: Path, width: int, *, dark: bool = False) -> Rendering:
        """Opens a page in a window of some width, and looks at it."""
        target = self._call("Target.createTarget", url="about:blank")["targetId"]
        session = self._call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]

        def call(method: str, **parameters: Any) -> dict[str, Any]:
            return self._call(method, session=session, **parameters)

        for domain in ("Page", "Runtime", "Log", "Network"):
            call(f"{domain}.enable")
        call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=900,
            deviceScaleFactor=1,
            mobile=width < 600,
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        call("Emulation.setEmulatedMedia", features=[scheme])
        self._events.clear()
        address = page.resolve().as_uri()
        call("Page.navigate", url=address)
        self._wait_for("Page.loadEventFired")
        layout = call("Runtime.evaluate", expression=_LAYOUT, returnByValue=True)
        found = layout["result"]["value"]
        clip = {"x": 0, "y": 0, "width": width, "height": found["height"], "scale": 1}
        picture = call("Page.captureScreenshot", captureBeyondViewport=True, clip=clip)["data"]
        requests = [e["params"]["request"]["url"] for e in self._of("Network.requestWillBeSent")]
        complaints = [
            json.dumps(event["params"])
            for kind in ("Log.entryAdded", "Runtime.consoleAPICalled", "Runtime.exceptionThrown")
            for event in self._of(kind)
        ]
        self._call("Target.closeTarget", targetId=target)
        requests.remove(address)
        return Rendering(base64.b64decode(picture), complaints, requests, **found)

    def _call(self, method: str, session: str | None = None, **parameters: Any) -> dict[str, Any]:
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method, "params": parameters}
        if session is not None:
            message["sessionId"] = session
        os.write(self._to, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._read()
            if answer.get("id") == self._number:
                assert "error" not in answer, answer
                return answer["result"]
            self._events.append(answer)

    def _wait_for(self, method: str) -> None:
        while not self._of(method):
            self._events.append(self._read())

    def _of(self, method: str) -> list[dict[str, Any]]:
        return [event for event in self._events if event.get("method") == method]

    def _read(self) -> dict[str, Any]:
        deadline = time.monotonic() + _TIMEOUT_S
        while b"\0" not in self._buffer:
            ready, _, _ = select.select([self._back], [], [], max(0, deadline - time.monotonic()))
            assert ready, "the browser does not answer"
            chunk = os.read(self._back, 1 << 20)
            assert chunk, f"the browser ended with status {self._process.wait()}"
            self._buffer += chunk
        message, _, self._buffer = self._buffer.partition(b"\0")
        return json.loads(message)


@contextmanager
def running_browser(profile: Path) -> Iterator[Browser]:
    """Starts a browser with a profile folder of its own; skips the test where none is installed."""
    path = find_browser()
    if path is None:
        pytest.skip("needs Chromium (Debian: apt-get install chromium)")
    to_read, to_write = os.pipe()
    back_read, back_write = os.pipe()

    # The browser reads its descriptor 3 and writes to 4; a shell puts the pipes there.
    script = f'exec "$0" "$@" 3<&{to_read} 4>&{back_write}'
    process = subprocess.Popen(
        ["/bin/bash", "-c", script, path, *_OPTIONS, f"--user-data-dir={profile}", "about:blank"],
        pass_fds=(to_read, back_write),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    os.close(to_read)
    os.close(back_write)
    try:
        yield Browser(process, to_write, back_read)
    finally:
        os.close(to_write)
        os.close(back_read)
        process.terminate()
        try:
            process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
