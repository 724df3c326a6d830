"""The server logs of a run folder: server.log, copied while the run lasted, and logs that were added to it later."""

import filecmp
import itertools
import shutil
from collections import Counter
from pathlib import Path

from twoclocks.errors import RunFolderError

MAX_BYTES = 512 * 1024 * 1024
"""Read of all logs of a run: lines in memory take some times as much."""


def read_log_files(folder: Path) -> list[str]:
    """The lines of a run's server logs, without line ends; none if there is no log.

    A last line without its end is left out: it may be cut within a number. A line of an added log that server.log has
    too comes once, so that a copy of the whole log may be added to what was copied of it during the run. Raises
    RunFolderError for a file that cannot be read, or more than MAX_BYTES in all.
    """
    lines: list[str] = []
    paths = [path for path in [folder / "server.log", *_added(folder)] if path.exists()]
    size = 0
    for path in paths:
        had = Counter(lines)
        try:
            size += path.stat().st_size
            if size > MAX_BYTES:
                raise RunFolderError(f"{path}: the server's logs are more than {MAX_BYTES >> 20} MiB; move it away")
            with path.open("rb") as file:
                for raw in file:
                    line = raw.rstrip(b"\r\n").decode("utf-8", "replace")
                    if not raw.endswith(b"\n"):
                        break
                    if had[line]:
                        had[line] -= 1
                    else:
                        lines.append(line)
        except OSError as error:
            raise RunFolderError(f"{path}: cannot be read: {error.strerror}") from None
    return lines


def add_log(folder: Path, log: Path) -> Path:
    """Copy a log from the server's machine into a run folder; where it stands there.

    A copy that is there already is left alone, another log gets a number. Raises RunFolderError, in one line.
    """
    if not (folder / "run.json").is_file():
        raise RunFolderError(f"{folder}: is no run folder, it has no run.json")
    try:
        if log.exists() and not log.is_file():
            raise RunFolderError(f"{log}: is no regular file; give --server-log a file with the server's log")
        there = [path for path in [folder / "server.log", *_added(folder)] if path.exists()]
        for path in there:
            if filecmp.cmp(log, path, shallow=False):
                return path
        size = log.stat().st_size + sum(path.stat().st_size for path in there)
        if size > MAX_BYTES:
            raise RunFolderError(
                f"{log}: with it the run's logs are {size >> 20} MiB, at most {MAX_BYTES >> 20} MiB are read; "
                "cut it to the time of the run"
            )
        path = next(path for path in _names(folder) if not path.exists())
        new = path.with_name(path.name + ".new")
        shutil.copyfile(log, new)
        new.replace(path)
    except OSError as error:
        raise RunFolderError(f"{error.filename or log}: cannot be copied: {error.strerror}") from None
    return path


def _names(folder: Path) -> "itertools.chain[Path]":
    return itertools.chain(
        [folder / "server-added.log"], (folder / f"server-added-{number}.log" for number in itertools.count(2))
    )


def _added(folder: Path) -> list[Path]:
    return list(itertools.takewhile(Path.exists, _names(folder)))
