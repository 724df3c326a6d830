"""Headless Chromium for tests of pages: spoken to by its own debugging protocol over two pipes.

It takes no further package. A page is opened, asked in JavaScript, pressed keys on, looked at. Tests that need it are
skipped where there is no Chromium.
"""

import base64
import contextlib
import json
import os
import select
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
PATIENCE_S = 120.0  # a busy machine is no failure


class Browser:
    """A running browser with one page at a time."""

    def __init__(self, pipes, session=None):
        self._from, self._to = pipes
        self._session, self._count, self._left = session, 0, b""
        self.problems = []  # what the page wrote to its console as an error, and exceptions

    def call(self, method, **params):
        """The result of one command; events that come in between are looked at."""
        self._count += 1
        command = {"id": self._count, "method": method, "params": params}
        if self._session:
            command["sessionId"] = self._session
        os.write(self._to, json.dumps(command).encode() + b"\0")
        while True:
            message = self._next(f"the answer to {method}")
            if message.get("id") == self._count:
                assert "error" not in message, message
                return message["result"]
            self._event(message)

    def open(self, path, width=1280, height=900, dark=False):
        """Open a file, of this size, and wait until it has loaded and its charts are drawn."""
        self.problems.clear()
        self.size(width, height, dark)
        self.call("Page.navigate", url=Path(path).resolve().as_uri())
        self.wait("document.readyState === 'complete' && location.protocol === 'file:'")

    def size(self, width, height=900, dark=False):
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600
        )
        features = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        self.call("Emulation.setEmulatedMedia", media="", features=features)

    def ask(self, expression):
        """The value of a JavaScript expression, awaited if it is a promise."""
        told = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in told, told
        return told["result"].get("value")

    def wait(self, expression):
        """Until a JavaScript expression is true: what is drawn is there with the next frame. Gives its value."""
        deadline = time.monotonic() + PATIENCE_S
        while not (value := self.ask(expression)):
            assert time.monotonic() < deadline, f"never true: {expression}"
            time.sleep(0.02)
        return value

    def press(self, key, code=0):
        """A key, to whatever has the focus."""
        text = {"Enter": "\r"}.get(key, key if len(key) == 1 else "")
        for kind in ("keyDown", "keyUp"):
            more = {"text": text} if text and kind == "keyDown" else {}
            self.call("Input.dispatchKeyEvent", type=kind, key=key, windowsVirtualKeyCode=code, **more)

    def shot(self, path, clip=None):
        """What the window shows as a PNG, or the part [x, y, width, height] of it."""
        more = {"clip": dict(zip(("x", "y", "width", "height"), clip, strict=True)) | {"scale": 1}} if clip else {}
        told = self.call("Page.captureScreenshot", format="png", **more)
        Path(path).write_bytes(base64.b64decode(told["data"]))

    def _next(self, what):
        deadline = time.monotonic() + PATIENCE_S
        while b"\0" not in self._left:
            ready, _, _ = select.select([self._from], [], [], max(0.0, deadline - time.monotonic()))
            assert ready, f"the browser did not send {what}"
            part = os.read(self._from, 1 << 20)
            assert part, "the browser ended"
            self._left += part
        line, _, self._left = self._left.partition(b"\0")
        return json.loads(line)

    def _event(self, message):
        method, params = message.get("method"), message.get("params", {})
        if method == "Runtime.exceptionThrown":
            self.problems.append(params["exceptionDetails"].get("exception", {}).get("description") or str(params))
        elif method == "Runtime.consoleAPICalled" and params["type"] in ("error", "warning"):
            self.problems.append(str([one.get("value") for one in params["args"]]))
        elif method == "Log.entryAdded" and params["entry"]["level"] == "error":
            self.problems.append(params["entry"]["text"])


@contextlib.contextmanager
def browser():
    """A browser for a while."""
    commands_read, commands_write = os.pipe()
    answers_read, answers_write = os.pipe()
    with tempfile.TemporaryDirectory() as profile:
        options = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={profile}", "about:blank"]
        at_3_and_4 = f'exec "$0" "$@" 3<&{commands_read} 4>&{answers_write}'
        process = subprocess.Popen(
            ["/bin/bash", "-c", at_3_and_4, CHROMIUM, "--remote-debugging-pipe", *options],
            pass_fds=(commands_read, answers_write),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(commands_read)
        os.close(answers_write)
        try:
            pipes = (answers_read, commands_write)
            root = Browser(pipes)
            target = root.call("Target.createTarget", url="about:blank")["targetId"]
            session = root.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
            page = Browser(pipes, session)
            for domain in ("Page", "Runtime", "Log"):
                page.call(f"{domain}.enable")
            yield page
        finally:
            process.kill()
            process.wait()
            os.close(commands_write)
            os.close(answers_read)
            time.sleep(0.1)  # its children write to the profile for a moment more
