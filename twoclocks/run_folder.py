"""The run folder: what a run leaves on disk, and the only thing that the analysis reads.

Lines are appended as they come, so that a run that is killed at any instant leaves all that had arrived; run.json is
replaced as a whole. Raw files are never rewritten. Of a disk that is full a little was kept back, for a last run.json.
"""

import contextlib
import os
import platform
import re
import socket
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable
from datetime import datetime
from pathlib import Path
from typing import Any

import msgspec

from twoclocks import __version__
from twoclocks.errors import RunFolderError, TwoclocksError
from twoclocks.experiment import Experiment, to_yaml
from twoclocks.masks import masked_word

RESERVE_BYTES, LEAST_BYTES = 256 * 1024, 16 * 1024
"""Of the disk, given back by halves when it is full, and what is left at last: what run.json says then matters most."""


class RunFolder:
    """An open run folder. Not safe for several writers of one file: each file has one."""

    def __init__(self, path: Path) -> None:
        self.path = path
        names = ("requests.jsonl", "self_samples.jsonl")
        self._files = {name: os.open(path / name, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644) for name in names}
        self._reserve = tempfile.TemporaryFile(dir=path)  # noqa: SIM115 - without a name, so that no kill leaves it
        try:
            os.posix_fallocate(self._reserve.fileno(), 0, RESERVE_BYTES)
        except OSError:
            self.close()
            raise
        self._kept_bytes = RESERVE_BYTES
        self.meta: dict[str, Any] = {}
        self.unwritten = Counter[str]()  # lines that the disk did not take, of each file

    @classmethod
    def create(cls, experiment: Experiment, path: Path | None = None) -> "RunFolder":
        """A new folder: see make_folder. Raises RunFolderError."""
        path = make_folder(experiment, path)
        try:
            return cls(path)
        except OSError as error:
            raise RunFolderError(f"{path}: cannot be written: {error.strerror}") from None

    def append(self, lines: bytes, name: str = "requests.jsonl") -> None:
        """Append finished lines to a file, each whole or not at all.

        Raises TwoclocksError when the disk does not take them all; `unwritten` counts those that it did not.
        """
        file, left = self._files[name], lines
        try:
            while left:
                left = left[os.write(file, left) :]
        except OSError as error:
            written = lines[: len(lines) - len(left)]
            whole = written.rfind(b"\n") + 1
            with contextlib.suppress(OSError):  # a torn line would spoil the next one that finds room
                os.ftruncate(file, os.fstat(file).st_size - len(written) + whole)
            self.unwritten[name] += lines.count(b"\n", whole)
            raise TwoclocksError(f"{self.path / name}: cannot be written: {error.strerror}") from None

    def write_meta(self, **changes: Any) -> None:
        """Replace run.json by what is known so far. Raises TwoclocksError when the disk does not take it."""
        self.meta |= changes
        text = msgspec.json.format(msgspec.json.encode(self.meta), indent=2) + b"\n"
        while True:
            try:
                self._replace_meta(text)
                return
            except OSError as error:
                if not self._kept_bytes:
                    raise TwoclocksError(f"{self.path / 'run.json'}: cannot be written: {error.strerror}") from None
                # half of it, since this need not be the last, and until then records take what is free
                self._kept_bytes = self._kept_bytes // 2 if self._kept_bytes > LEAST_BYTES else 0
                self._reserve.truncate(self._kept_bytes)

    def _replace_meta(self, text: bytes) -> None:
        new = self.path / "run.json.new"
        new.write_bytes(text)
        new.replace(self.path / "run.json")

    def close(self) -> None:
        """No more lines will come."""
        self._reserve.close()
        for file in self._files.values():
            os.close(file)


def make_folder(experiment: Experiment, path: Path | None = None, now: datetime | None = None) -> Path:
    """A new folder at ``path``, else ``<output>/<time>-<name>``, with the experiment as resolved in it.

    Raises RunFolderError, also if there is something at ``path``.
    """
    for folder in [path] if path is not None else _folders(experiment, now):
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            continue
        except OSError as error:
            way = "--run-folder PATH" if path is not None else "--set output=DIR"
            raise RunFolderError(
                f"{folder}: the run folder cannot be made: {error.strerror}; name another place with {way}"
            ) from None
        try:
            (folder / "experiment.yaml").write_text(to_yaml(experiment), encoding="utf-8")
        except OSError as error:
            raise RunFolderError(f"{folder}: cannot be written: {error.strerror}") from None
        return folder
    if path is not None:
        refuse_existing(path)
    raise RunFolderError(f"{experiment.output}: holds a hundred runs of this second; wait a moment")


def free_folder(experiment: Experiment) -> Path:
    """Where make_folder would make one now, for who has to know before. Raises RunFolderError."""
    for folder in _folders(experiment):
        if not os.path.lexists(folder):
            return folder
    raise RunFolderError(f"{experiment.output}: holds a hundred runs of this second; wait a moment")


def _folders(experiment: Experiment, now: datetime | None = None) -> list[Path]:
    stamp = (now or datetime.now()).strftime("%Y%m%d-%H%M%S")  # a name people read: local time
    first = f"{stamp}-{file_name(experiment.name, 80)}"
    return [Path(experiment.output, name) for name in (first, *(f"{first}-{number}" for number in range(2, 101)))]


def file_name(text: str, most: int) -> str:
    """Text as a part of a file's name: of letters, digits, dots and dashes alone, and ``most`` bytes at most."""
    return re.sub(r"[^\w.-]+", "-", text).encode()[:most].decode("utf-8", "ignore")


def beside(file: Path, folders: Iterable[str]) -> None:
    """Raises RunFolderError unless all these names, which stand in ``file``, are of folders beside it."""
    for name in folders:
        if name in ("", ".", "..") or "/" in name or "\\" in name or "\0" in name:
            raise RunFolderError(f"{file}: names {name!r}, which is no folder beside it")


REPORT = ("plots", "summary.json", "summary.txt", "vllm_bench.json", "report.html", "report.md")
"""What is written into a folder that may be another's."""


def refuse_links(folder: Path) -> None:
    """Raises RunFolderError if what a report writes into this folder would lie elsewhere."""
    for path in [*(folder / name for name in REPORT), *(folder / "plots").glob("*")]:
        if path.is_symlink():
            raise RunFolderError(f"{path}: is a link, and where it leads would be overwritten; delete it")


def refuse_existing(path: Path) -> None:
    """Raises RunFolderError if there is something at the place that --run-folder names."""
    if os.path.lexists(path):
        raise RunFolderError(f"--run-folder {path}: exists already; name a folder that does not exist yet")


def this_clock() -> str:
    """Names time.monotonic() of this machine's boot, which all its processes and containers share."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return socket.gethostname()


def cpu_model() -> str | None:
    """What the processor calls itself; None where the system does not say."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return platform.processor() or None
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), None)


def first_meta(zero_ns: int) -> dict[str, Any]:
    """What run.json holds from the start, whatever the run becomes."""
    return {
        "twoclocks_version": __version__,
        "started_at_unix": time.time() - (time.monotonic_ns() - zero_ns) / 1e9,
        "host": {
            "hostname": socket.gethostname(),
            "cpu_count": os.cpu_count(),
            "platform": platform.platform(),
            "cpu_model": cpu_model(),
            "python": platform.python_version(),
        },
        "command_line": [masked_word(word) for word in sys.argv],
        "status": "running",
        "window": {"started_at": None, "ended_at": None},
        "ended_at": None,
        "in_flight": None,
        "lost_records": 0,
        "unwritten_records": 0,
        "notes": [],
    }
