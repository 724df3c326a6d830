"""A run as a child process: its command line, the signals that reach it, and what became of it.

`twoclocks run` makes every run so, one or many: Locust, or the driver of an engine that is no server.
"""

import contextlib
import fcntl
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from twoclocks import keeper
from twoclocks.errors import RunFolderError, TwoclocksError
from twoclocks.experiment import Api, Experiment, to_yaml

ROOT = Path(__file__).resolve().parent.parent
BUNDLED = Path(__file__).parent / "templates" / "load_test.py"
INTERRUPTED = 130

Progress = Callable[[str], None]


@dataclass
class Child:
    """Passes the signals of this process on to the one that runs; a terminal's Ctrl-C reaches that by no other way."""

    pid: int | None = None
    stopped: threading.Event = field(default_factory=threading.Event)

    def on_signal(self, number: int, _frame: object) -> None:
        self.stopped.set()
        if self.pid is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def run(self, argv: Sequence[str | Path]) -> int:
        """Run to its end; its exit code."""
        kept = keeper.start(argv)
        self.pid = kept.pid
        if self.stopped.is_set():  # between two children
            os.kill(kept.pid, signal.SIGINT)
        try:
            return kept.keeper.wait()
        finally:
            self.pid = None
            kept.stop()


@contextlib.contextmanager
def passing_signals_on() -> Iterator[Child]:
    """While this lasts, SIGINT and SIGTERM go to the child."""
    child = Child()
    before = {number: signal.signal(number, child.on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield child
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def default_experiment() -> Path:
    """configs/default.yaml where there is one; else an empty file, whose keys have their defaults."""
    path = ROOT / "configs" / "default.yaml"
    return path if path.exists() else Path(os.devnull)


def run_command(
    path: Path,
    overrides: Sequence[str],
    *,
    target: str | None = None,
    variant: str | None = None,
    processes: int = 1,
    api: Api = "chat",
    tables: bool = True,
) -> list[str | Path]:
    """Locust, headless, on the locustfile beside the package, in the current folder, or inside the package.

    Without a server (api in-process) the driver of engines, which takes the same options. tables: Locust's at the end.
    """
    found = [file for file in (ROOT / "load_test.py", Path("load_test.py"), BUNDLED) if file.exists()]
    argv: list[str | Path] = [sys.executable, "-m", "locust", "-f", found[0], "--headless", "--only-summary"]
    argv += ["--processes", str(processes)] if processes != 1 else []
    argv += [] if tables else ["--without-tables"]
    if api == "in-process":
        argv = [sys.executable, "-m", "twoclocks.in_process"]
    argv += ["--experiment", path]
    for option, value in (("--target", target), ("--variant", variant)):
        argv += [] if value is None else [option, value]
    return argv + [word for override in overrides for word in ("--set", override)]


def refuse_another(folder: Path, experiment: Experiment) -> None:
    """Raises TwoclocksError if what was begun in this folder was another experiment."""
    try:
        same = (folder / "experiment.yaml").read_text(encoding="utf-8") == to_yaml(experiment)
    except OSError as error:
        raise RunFolderError(f"{folder / 'experiment.yaml'}: cannot be read: {error.strerror}") from None
    if not same:
        raise TwoclocksError(
            f"--resume {folder}: was begun with another experiment; give the same file and --set as then"
        )


def outcome(folder: Path, *, stopped: bool) -> tuple[str, str | None]:
    """What became of the run, sweep or search in this folder: (status, why it is not finished)."""
    file = next((folder / name for name in ("sweep.json", "run.json") if (folder / name).exists()), None)
    if not folder.exists():
        return "failed", "the run could not begin; see above"
    try:
        status = msgspec.json.decode((file or folder / "run.json").read_bytes())["status"]
    except (OSError, msgspec.MsgspecError, KeyError, TypeError):
        return "failed", f"{(file or folder / 'run.json').name} cannot be read"
    if status == "finished":
        return "finished", None
    return ("interrupted" if stopped else "failed"), f"the run is {status}"


def save_json(path: Path, what: Any) -> None:
    """Replace the file as a whole. Raises RunFolderError."""
    new = path.with_name(path.name + ".new")
    try:
        new.write_bytes(msgspec.json.format(msgspec.json.encode(what), indent=1) + b"\n")
        new.replace(path)
    except OSError as error:
        raise RunFolderError(f"{path}: cannot be written: {error.strerror}") from None


@contextlib.contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """While this lasts, nobody else goes on with the sweep, search or study of this folder. Raises TwoclocksError."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise TwoclocksError(
            f"{folder}: another `twoclocks run` is at work here; wait for its end, or end it"
        ) from None
    except OSError:
        pass  # a file system without locks
    try:
        yield
    finally:
        os.close(descriptor)


def put_aside(folder: Path) -> None:
    """Keep what an earlier, broken run left where a new one is to stand."""
    number = 1
    while folder.exists():
        aside = folder.with_name(f"{folder.name}-broken-{number}")
        if not aside.exists():
            folder.rename(aside)
        number += 1
