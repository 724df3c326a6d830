"""The edge that copies a server's log into the run folder while the run lasts: a growing file, or a command's output.

Used in the collecting process. Knows nothing of what the lines say. What it takes is bounded, whatever the server
writes, and what goes wrong is told in `failure`: a log that is missing never ends a run.
"""

import os
import re
import shlex
import stat
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from twoclocks import keeper
from twoclocks.errors import plain
from twoclocks.masks import masked_command, pattern

MAX_BYTES = 256 * 1024 * 1024
"""Copied of one log in all."""
MAX_TURN_BYTES = 16 * 1024 * 1024
"""Read in one turn, that is in a second."""
PIECE_BYTES = 64 * 1024
REMEMBERED_BYTES = 256
GRACE_S = 2.0
"""A command has this long to end after SIGTERM."""


class _Copy:
    """The copy in the run folder, which takes MAX_BYTES and counts the rest. It has *** for each of ``secrets``."""

    def __init__(self, path: Path, secrets: Sequence[str]) -> None:
        self.path = path
        self.out = path.open("ab", buffering=0)
        self.left = MAX_BYTES
        self.over = 0  # bytes that were not copied
        self.broken: str | None = None
        self.secrets = [secret.encode() for secret in secrets]
        self.held = b""  # what may be the beginning of a secret

    def write(self, data: bytes) -> None:
        """Append what still fits. A full disk is told, not raised: the run goes on."""
        data = self.hide(self.held + data)
        beginnings = (n for secret in self.secrets for n in range(1, len(secret)) if data.endswith(secret[:n]))
        held = max(beginnings, default=0)
        self.held = data[len(data) - held :]
        self._append(data[: len(data) - held])

    def hide(self, data: bytes) -> bytes:
        """With *** for each secret: a server may log the key that it was started with."""
        for secret in self.secrets:
            if secret in data:
                data = re.sub(pattern(secret.decode()).encode(), b"***", data)
        return data

    def close(self) -> None:
        """Nothing more will be written."""
        self._append(self.held)
        self.out.close()

    def _append(self, data: bytes) -> None:
        fits = data[: self.left]
        self.left -= len(fits)
        self.over += len(data) - len(fits)
        while fits:
            try:
                fits = fits[self.out.write(fits) :]
            except OSError as error:
                self.broken = f"{self.path.name} cannot be written: {error.strerror}"
                self.left = 0
                self.over += len(fits)
                return

    def failure(self) -> list[str]:
        """What is missing in the copy."""
        over = f"{self.path.name} lacks {self.over:,} bytes, beyond what is copied of a log"
        told = [self.broken] if self.broken else []
        return [*told, over] if self.over else told


class FileTail:
    """Copies what is appended to a file from now on; follows rotation, truncation, deletion and a late creation.

    Renamed and made anew: the old file is read to its end once the new one has content. Truncated in place
    (copytruncate): what the server wrote between the last copy and the truncation is gone, and that is told.
    """

    def __init__(self, source: Path, copy: Path, secrets: Sequence[str] = ()) -> None:
        self.source = source
        self.out = _Copy(copy, secrets)
        self.file: int | None = None
        self.position = 0
        self.last = b""  # of what was read from this file: what stands there unless the file was truncated and refilled
        self.trouble: str | None = None
        self.truncations = 0
        self._open()
        if self.file is not None:
            self.position = os.fstat(self.file).st_size
            from_ = max(0, self.position - REMEMBERED_BYTES)
            self.last = os.pread(self.file, self.position - from_, from_)

    @property
    def failure(self) -> str | None:
        """What is missing in the copy and why, in one line."""
        told = [self.trouble] if self.trouble else []
        if self.truncations:
            told.append(
                f"{self.source} was truncated {self.truncations} times; lines of up to a second before may be missing"
            )
        return "; ".join(told + self.out.failure()) or None

    def copy(self) -> None:
        """Copy what is new, at most MAX_TURN_BYTES; the rest waits for the next turn."""
        try:
            self._copy()
        except OSError as error:
            self.trouble = f"{self.source} cannot be read: {error.strerror}"

    def close(self) -> None:
        """Nothing more will be copied."""
        if self.file is not None:
            self.out.over += max(0, os.fstat(self.file).st_size - self.position)
            os.close(self.file)
            self.file = None
        self.out.close()

    def _copy(self) -> None:
        left = MAX_TURN_BYTES
        if self.file is not None:
            replaced = self._replaced()  # asked first: what was written before it was replaced is then all there
            self._rewind_if_truncated()
            left -= self._read(left)
            if not replaced or not left:
                return
            os.close(self.file)
            self.file = None
        self._open()
        if self.file is not None:
            self._read(left)

    def _open(self) -> None:
        try:
            # a pipe or a device by that name must not make this process wait
            file = os.open(self.source, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError as error:
            self.trouble = f"{self.source} cannot be read: {error.strerror}"
            return
        if not stat.S_ISREG(os.fstat(file).st_mode):
            self.trouble = f"{self.source} is no regular file"
            os.close(file)
            return
        self.file, self.position, self.last, self.trouble = file, 0, b"", None

    def _replaced(self) -> bool:
        """Does another file stand at the path, and has the server begun to write there?"""
        assert self.file is not None
        try:
            now = self.source.stat()
        except OSError:
            return False  # deleted, or between two steps of a rotation: what is written still comes to this file
        mine = os.fstat(self.file)
        return (now.st_dev, now.st_ino) != (mine.st_dev, mine.st_ino) and now.st_size > 0

    def _rewind_if_truncated(self) -> None:
        assert self.file is not None
        size = os.fstat(self.file).st_size
        if size >= self.position and os.pread(self.file, len(self.last), self.position - len(self.last)) == self.last:
            return
        self.truncations += 1
        self.position, self.last = 0, b""
        if size and hasattr(os, "SEEK_DATA"):
            # a server that does not append (`> server.log`) writes on behind a hole as long as the file was
            self.position = os.lseek(self.file, 0, os.SEEK_DATA)

    def _read(self, most: int) -> int:
        """Copy up to ``most`` bytes of the open file; how many there were."""
        assert self.file is not None
        read = 0
        while read < most:
            data = os.pread(self.file, min(PIECE_BYTES, most - read), self.position)
            if not data:
                break
            self.out.write(data)
            self.position += len(data)
            self.last = (self.last + data)[-REMEMBERED_BYTES:]
            read += len(data)
        return read


class CommandTail:
    """Copies what a command prints, stdout and stderr in the order in which they come, until it is closed.

    The command runs under a keeper, in a session of its own, and ends with this process, however that ends. A thread
    reads it, since between two turns more may come than a pipe holds; a command that prints more in a turn than may be
    read has to wait.
    """

    def __init__(self, command: str, copy: Path, secrets: Sequence[str] = ()) -> None:
        self.command = command
        self.out = _Copy(copy, secrets)
        self.taken = 0  # bytes in this turn
        self.last = b""
        self.closing = False
        self.trouble: str | None = None
        self.kept: keeper.Kept | None = None
        self.reader: threading.Thread | None = None
        reading, writing = os.pipe()
        try:
            self.kept = keeper.start(shlex.split(command), grace_s=GRACE_S, stdout=writing, stderr=writing)
        except OSError as error:
            self.trouble = str(error)
            os.close(reading)
            return
        finally:
            os.close(writing)
        self.reader = threading.Thread(target=self._read, args=(self.kept, reading), name="server log", daemon=True)
        self.reader.start()

    @property
    def failure(self) -> str | None:
        """What is missing in the copy and why, in one line."""
        return "; ".join(([self.trouble] if self.trouble else []) + self.out.failure()) or None

    def copy(self) -> None:
        """Begin a new turn: the thread may read on."""
        self.taken = 0

    def close(self) -> None:
        """End the command, by its group; what it had printed until then is copied."""
        self.closing = True
        if self.kept is not None and self.reader is not None:
            self.copy()
            self.kept.stop()
            self.copy()  # for what still stands in the pipe
            self.reader.join(GRACE_S)
        if self.reader is None or not self.reader.is_alive():
            self.out.close()

    def _read(self, kept: keeper.Kept, pipe: int) -> None:
        while data := os.read(pipe, PIECE_BYTES):
            self.out.write(data)
            self.taken += len(data)
            self.last = (self.last + data)[-4096:]
            while self.taken >= MAX_TURN_BYTES:
                time.sleep(0.05)
        os.close(pipe)
        status = kept.keeper.wait()
        if not self.closing:
            lines = [
                line.strip()
                for line in self.out.hide(self.last).decode("utf-8", "replace").splitlines()
                if line.strip()
            ]
            said = f": {plain(lines[-1])[:300]}" if lines else ""
            self.trouble = f"the command {masked_command(self.command)!r} ended with status {status}{said}"


Tail = FileTail | CommandTail
"""copy() once a second and at the end, never waiting; close(); failure: what is missing and why, None if nothing is."""


def open_tail(setting: str, copy: Path, secrets: Sequence[str] = ()) -> Tail | None:
    """Begin to copy the log that ``collect.log`` names (none | file:PATH | command:ARGV), without ``secrets``; None
    for none.
    """
    kind, _, rest = setting.partition(":")
    if kind == "file":
        return FileTail(Path(rest), copy, secrets)
    return CommandTail(rest, copy, secrets) if kind == "command" else None
