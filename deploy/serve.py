"""Runs a server in its container, and keeps a copy of what it says where the tester can read it.

    python3 serve.py FOLDER KIND MODEL COMMAND [ARGUMENT ...]
    python3 serve.py --healthy URL      the container's health check: does the server answer there?

Output goes on to standard output (`docker compose logs`) and into FOLDER/KIND.log, of which at most two files of
MAX_BYTES are kept. FOLDER/about tells the tester the kind and the model, one a line. Signals are passed on to
the server, and its exit code is this one's. Only Python's own library, since it runs in images of others.
"""

import contextlib
import os
import selectors
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

MAX_BYTES = 64 * 1024 * 1024
LAST_WORDS_S = 2.0  # what children of the server still print after its end
PASSED_ON = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2)


class Copy:
    """A file that begins anew at MAX_BYTES; the one before is kept as NAME.1. A full disk costs the copy alone."""

    def __init__(self, path: Path, most: int) -> None:
        self.path, self.most, self.size = path, most, 0
        self.file = None
        self._begin()

    def write(self, data: bytes) -> None:
        if self.file is None:
            return
        try:
            if self.size + len(data) > self.most:
                self._begin()
            if self.file is not None:  # it may not have begun anew
                self.file.write(data)
                self.size += len(data)
        except OSError as error:
            self._give_up(error)

    def _begin(self) -> None:
        try:
            if self.file is not None:
                self.file.close()
            if self.path.exists():
                self.path.replace(f"{self.path}.1")
            self.file, self.size = self.path.open("wb", buffering=0), 0
        except OSError as error:
            self._give_up(error)

    def _give_up(self, error: OSError) -> None:
        self.file = None
        sys.stderr.write(f"serve.py: {self.path}: {error.strerror}; the tester will miss the server's log\n")


def tell(folder: Path, *lines: str) -> None:
    """Write FOLDER/about, whole or not at all."""
    new = folder / "about.new"
    try:
        new.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        new.replace(folder / "about")
    except OSError as error:
        sys.stderr.write(f"serve.py: {new}: {error.strerror}; the tester will not know its server\n")


def serve(copy: Copy, command: list[str]) -> int:
    """Run the command to its end; its exit code, 128 + N if signal N ended it."""
    reading, writing = os.pipe()
    # a session of its own: Ctrl-C of a terminal comes to this process alone, which passes it on once
    server = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=writing, stderr=writing, start_new_session=True)
    os.close(writing)
    for number in PASSED_ON:
        signal.signal(number, lambda number, _: server.send_signal(number))
    until = None
    with selectors.DefaultSelector() as selector:
        selector.register(reading, selectors.EVENT_READ)
        while until is None or time.monotonic() < until:
            if selector.select(0.2):
                data = os.read(reading, 65536)
                if not data:
                    break
                copy.write(data)
                show(data)
            if until is None and server.poll() is not None:
                until = time.monotonic() + LAST_WORDS_S
    code = server.wait()
    return 128 - code if code < 0 else code


def show(data: bytes) -> None:
    """Pass on to standard output; who reads it may be gone."""
    with contextlib.suppress(OSError):
        while data:
            data = data[os.write(1, data) :]


def is_healthy(url: str) -> bool:
    """Is there an answer of success? Asked without a proxy, since it is of this container."""
    try:
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(url, timeout=5):
            return True
    except (OSError, ValueError) as error:
        sys.stderr.write(f"serve.py: {url}: {error}\n")
        return False


def main() -> int:
    """Exit code of the server; 2 for bad usage, 127 where the command is not there. Of --healthy: 0 or 1."""
    if sys.argv[1:2] == ["--healthy"] and len(sys.argv) == 3:
        return 0 if is_healthy(sys.argv[2]) else 1
    if len(sys.argv) < 5:
        sys.stderr.write("usage: serve.py FOLDER KIND MODEL COMMAND [ARGUMENT ...], or serve.py --healthy URL\n")
        return 2
    folder, (kind, model) = Path(sys.argv[1]), sys.argv[2:4]
    copy = Copy(folder / f"{kind}.log", int(os.environ.get("SERVE_MAX_BYTES", MAX_BYTES)))
    tell(folder, kind, model)
    try:
        return serve(copy, sys.argv[4:])
    except OSError as error:
        sys.stderr.write(f"serve.py: {sys.argv[4]}: {error.strerror}\n")
        return 127


if __name__ == "__main__":
    sys.exit(main())
