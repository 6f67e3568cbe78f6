"""A headless Chromium, spoken to over a pipe in its own protocol: no driver, no port."""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
WAIT_S = 20.0


def executable() -> str | None:
    """Where there is one."""
    return next((found for name in NAMES if (found := shutil.which(name))), None)


class Page:
    """One tab."""

    def __init__(self, send: int, receive: int) -> None:
        self._send, self._receive = send, receive
        self._rest = b""
        self._count = 0
        self._session: str | None = None
        self.events: list[dict[str, Any]] = []
        """What happened: errors of scripts, messages of the console, refusals of the content policy."""
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **params: Any) -> Any:
        """The result of a command; events that come meanwhile are kept."""
        self._count += 1
        message = {"id": self._count, "method": method, "params": params}
        if self._session is not None:
            message["sessionId"] = self._session
        os.write(self._send, json.dumps(message).encode() + b"\0")
        while True:
            got = self._read()
            if got.get("id") == self._count:
                assert "error" not in got, f"{method}: {got}"
                return got["result"]
            self.events.append(got)

    def _read(self) -> dict[str, Any]:
        while b"\0" not in self._rest:
            part = os.read(self._receive, 1 << 20)
            assert part, "Chromium has ended"
            self._rest += part
        message, _, self._rest = self._rest.partition(b"\0")
        return json.loads(message)

    def open(self, url: str) -> None:
        self.call("Page.navigate", url=url)
        self.wait(f"document.readyState === 'complete' && location.href.startsWith({url!r})")

    def run(self, script: str) -> Any:
        """The value of an expression, or what its promise gives."""
        found = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def wait(self, condition: str, seconds: float = WAIT_S) -> None:
        """Until an expression is true."""
        deadline = time.monotonic() + seconds
        while not self.run(f"Boolean({condition})"):
            assert time.monotonic() < deadline, f"{condition}\n{self.run('document.body.innerText')}"
            time.sleep(0.05)

    def key(self, key: str, *, control: bool = False) -> None:
        """Press one, as a person does."""
        text = {} if control or len(key) > 1 else {"text": key}
        codes = {"Enter": 13, "Escape": 27, "ArrowRight": 39, "Tab": 9}
        about = {"key": key, "modifiers": 2 * control, "windowsVirtualKeyCode": codes.get(key, ord(key[0].upper()))}
        self.call("Input.dispatchKeyEvent", type="keyDown", **about, **text)
        self.call("Input.dispatchKeyEvent", type="keyUp", **about)

    def resize(self, width: int, height: int, dark: bool = False) -> None:
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self.call("Emulation.setDeviceMetricsOverride", **metrics)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])

    def screenshot(self, path: Path) -> None:
        """What is to be seen, as a PNG of few colours."""
        import io

        from PIL import Image

        content = base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"])
        image = Image.open(io.BytesIO(content)).convert("RGB").quantize(128)
        image.save(path, optimize=True)

    @property
    def problems(self) -> list[str]:
        """Errors so far."""
        self.run("0")  # what has happened is heard
        found = [event["params"] for event in self.events if event.get("method") == "Runtime.exceptionThrown"]
        logged = [event["params"]["entry"] for event in self.events if event.get("method") == "Log.entryAdded"]
        return [str(each) for each in found] + [str(each) for each in logged if each["level"] == "error"]

    @property
    def requested(self) -> set[str]:
        """Addresses that were asked for."""
        sent = [event["params"] for event in self.events if event.get("method") == "Network.requestWillBeSent"]
        return {each["request"]["url"] for each in sent}


@contextmanager
def browser(folder: Path) -> Iterator[Page]:
    """A Chromium with a profile of its own."""
    program = executable()
    assert program is not None
    to_read, to_send = os.pipe()
    to_receive, to_write = os.pipe()
    flags = ["--headless=new", "--remote-debugging-pipe", f"--user-data-dir={folder}", "--no-first-run"]
    flags += ["--disable-gpu", "--disable-dev-shm-usage", "--no-proxy-server", "--disable-background-networking"]
    # It reads from 3 and writes to 4; a shell places them, since Python's own way would fork beside gRPC's threads.
    place = ["bash", "-c", f'exec "$0" "$@" 3<&{to_read} 4>&{to_write}', program, *flags, "--no-sandbox"]
    quiet = subprocess.DEVNULL
    process = subprocess.Popen(place, pass_fds=(to_read, to_write), stdout=quiet, stderr=quiet)
    os.close(to_read)
    os.close(to_write)
    try:
        yield Page(to_send, to_receive)
    finally:
        process.terminate()
        process.wait(20)
        os.close(to_send)
        os.close(to_receive)
