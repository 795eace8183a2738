"""Controls a headless Chromium through two pipes, without a driver, a package or a port."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
"""Path of the program; None if it is not installed."""


class Page:
    """One page of the browser."""

    def __init__(self, commands: int, answers: int) -> None:
        self._commands = commands
        self._answers = os.fdopen(answers, "rb", buffering=0)
        self._left = b""
        self._number = 0
        self._session = ""
        self.errors: list[str] = []
        """Errors of the page's scripts, and its refused requests."""
        target = self._send("Target.createTarget", url="about:blank")["targetId"]
        self._session = self._send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self._send(f"{domain}.enable")

    def open(self, path: Path, *, width: int = 1240, height: int = 1500, look: str = "light") -> None:
        """Open a file, and wait until it is shown."""
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self._send("Emulation.setDeviceMetricsOverride", **size)
        self._send("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": look}])
        self._send("Page.navigate", url=path.as_uri())
        while self.run("document.readyState + (document.getElementById('rows') ? '!' : '')") != "complete!":
            pass

    def run(self, script: str) -> Any:
        """Run a script and return its result."""
        result = self._send("Runtime.evaluate", expression=script, returnByValue=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def point(self, selector: str, *, click: bool = False) -> None:
        """Move the pointer to the middle of the first such element, and click if asked."""
        node = f"document.querySelector({json.dumps(selector)})"
        self.run(f"{node}.scrollIntoView({{block: 'center'}})")
        box = self.run(
            f"(({{x, y, width, height}}) => [x + width / 2, y + height / 2])({node}.getBoundingClientRect())"
        )
        kinds = ("mouseMoved", *(("mousePressed", "mouseReleased") if click else ()))
        for kind in kinds:
            button = {} if kind == "mouseMoved" else {"button": "left", "clickCount": 1}
            self._send("Input.dispatchMouseEvent", type=kind, x=box[0], y=box[1], **button)

    def screenshot(self) -> bytes:
        """Return the visible part as a PNG."""
        return base64.b64decode(self._send("Page.captureScreenshot")["data"])

    def close(self) -> None:
        """Close the pipe."""
        self._answers.close()

    def _send(self, method: str, **params: Any) -> Any:
        self._number += 1
        message = {"id": self._number, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._commands, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._next()
            if answer.get("id") == self._number:
                assert "error" not in answer, answer
                return answer["result"]
            self._note(answer)

    def _next(self) -> Any:
        while b"\0" not in self._left:
            chunk = self._answers.read(1 << 16)
            assert chunk, "Chromium is gone"
            self._left += chunk
        text, _, self._left = self._left.partition(b"\0")
        return json.loads(text)

    def _note(self, event: Any) -> None:
        params = event.get("params", {})
        if event.get("method") == "Runtime.exceptionThrown":
            self.errors.append(str(params["exceptionDetails"]))
        elif event.get("method") == "Log.entryAdded":
            self.errors.append(params["entry"]["text"])
        elif event.get("method") == "Network.requestWillBeSent":
            url = params["request"]["url"]
            if not url.startswith(("file:", "about:", "data:")):
                self.errors.append(f"requested {url} from the network")


@contextlib.contextmanager
def browser(folder: Path) -> Iterator[Page]:
    """Start Chromium with an empty profile in a folder."""
    assert CHROMIUM is not None, "the test has checked it"
    into, commands = os.pipe()
    answers, out = os.pipe()
    for number in (into, out):
        os.set_inheritable(number, True)
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--remote-debugging-pipe", f"--user-data-dir={folder}"]
    # It reads file 3 and writes to file 4.
    shell = f'exec 3<&{into} 4>&{out}; exec "$0" "$@"'
    process = subprocess.Popen(
        ["bash", "-c", shell, CHROMIUM, *flags, "about:blank"], pass_fds=(into, out), stderr=subprocess.DEVNULL
    )
    os.close(into)
    os.close(out)
    try:
        with contextlib.closing(Page(commands, answers)) as page:
            yield page
    finally:
        os.close(commands)
        process.terminate()
        process.wait(30)
