"""A headless Chromium, driven through its debugging pipe: a page's layout, console and image, without a driver.

    python tests/support/chromium.py demo/report.html report.png

takes an image of the report's first part, after `make demo` and `hgad-fast report demo`.
"""

from __future__ import annotations

import base64
import contextlib
import fcntl
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
_OPTIONS = (
    "--headless",
    "--no-sandbox",  # the page is our own, and in a container Chromium cannot make its sandbox
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
    "--hide-scrollbars",
    "--remote-debugging-pipe",  # commands come in at file descriptor 3, answers go out at 4
)


def executable() -> str | None:
    """Path of a Chromium, or None."""
    return next((path for name in NAMES if (path := shutil.which(name))), None)


@contextlib.contextmanager
def open_browser() -> Iterator[Browser]:
    """A fresh Chromium with a profile of its own; gone when the block ends."""
    command = executable()
    if command is None:
        raise FileNotFoundError(f"there is none of {', '.join(NAMES)} on PATH")
    folder = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)  # its helpers may write a moment longer
    with folder as profile, contextlib.ExitStack() as stack:
        ends = [fcntl.fcntl(end, fcntl.F_DUPFD, 10) for pipe in (os.pipe(), os.pipe()) for end in _closing(stack, pipe)]
        their_input, our_output, our_input, their_output = _closing(stack, ends)
        process = subprocess.Popen(
            ["bash", "-c", f'exec "$@" 3<&{their_input} 4>&{their_output}', "bash", command, *_OPTIONS]
            + [f"--user-data-dir={profile}", "about:blank"],
            pass_fds=(their_input, their_output),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(their_output)  # so that a Chromium that ends is seen to end
        try:
            yield Browser(our_input, our_output)
        finally:
            process.terminate()
            process.wait(timeout=30)


def _closing(stack: contextlib.ExitStack, ends: tuple[int, ...] | list[int]) -> tuple[int, ...] | list[int]:
    for end in ends:
        stack.callback(_close, end)
    return ends


def _close(end: int) -> None:
    with contextlib.suppress(OSError):
        os.close(end)


class Browser:
    """One tab.

    Attributes:
        messages: what came to its console, the browser's own warnings and errors about the page included.
        requests: the addresses it asked for.
    """

    def __init__(self, answers: int, commands: int) -> None:
        self._answers, self._commands = answers, commands
        self._read, self._number = b"", 0
        self._session: str | None = None
        self.messages: list[str] = []
        self.requests: list[str] = []
        target = self._call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self._call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self._call(f"{domain}.enable")

    def open(self, page: Path, *, width: int, height: int = 900, dark: bool = False) -> None:
        """Load a file in a window of that size, with that colour scheme preferred."""
        self._call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self._call("Emulation.setEmulatedMedia", features=[scheme])
        self._call("Page.navigate", url=page.resolve().as_uri())
        while self._next().get("method") != "Page.loadEventFired":
            pass

    def evaluate(self, script: str) -> Any:
        """Return the value of a JavaScript expression, as JSON gives it."""
        answer = self._call("Runtime.evaluate", expression=script, returnByValue=True)
        if "exceptionDetails" in answer:
            raise ValueError(answer["exceptionDetails"]["exception"]["description"])
        return answer["result"].get("value")

    def screenshot(self, path: Path) -> None:
        """Write what the window shows as PNG."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(base64.b64decode(self._call("Page.captureScreenshot", format="png")["data"]))

    def _call(self, method: str, **parameters: Any) -> dict[str, Any]:
        self._number += 1
        number = self._number
        message = {"id": number, "method": method, "params": parameters}
        if self._session is not None:
            message["sessionId"] = self._session
        os.write(self._commands, json.dumps(message).encode() + b"\0")
        while (answer := self._next()).get("id") != number:
            pass
        if "error" in answer:
            raise RuntimeError(f"{method}: {answer['error']['message']}")
        return answer["result"]

    def _next(self) -> dict[str, Any]:
        """Return the next message of Chromium; what the page says on the console is kept."""
        while b"\0" not in self._read:
            more = os.read(self._answers, 1 << 16)
            if not more:
                raise RuntimeError("Chromium ended; start it by hand to see why")
            self._read += more
        text, _, self._read = self._read.partition(b"\0")
        message = json.loads(text)
        parameters = message.get("params", {})
        if message.get("method") == "Runtime.consoleAPICalled":
            self.messages.append(" ".join(str(part.get("value")) for part in parameters["args"]))
        elif message.get("method") == "Runtime.exceptionThrown":
            details = parameters["exceptionDetails"]
            self.messages.append(details.get("exception", {}).get("description", details["text"]))
        elif message.get("method") == "Log.entryAdded":
            self.messages.append(parameters["entry"]["text"])
        elif message.get("method") == "Network.requestWillBeSent":
            self.requests.append(parameters["request"]["url"])
        return message


if __name__ == "__main__":
    report, image = map(Path, sys.argv[1:])
    with open_browser() as browser:
        browser.open(report, width=1280, height=1720)
        browser.screenshot(image)
