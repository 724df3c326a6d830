"""Keeps a child process no longer than its parent, however either of them ends.

`start` runs a command under a small process of this file's own, the keeper, which looks after what the command starts:

    parent -> keeper -> command -> whatever the command starts (vLLM's engine is such a grandchild)

The keeper ends the command's whole process group, and any descendant that left the group, when the command has ended,
when it is told to stop (SIGTERM), and when the parent is gone, killed or not. Standard library only: scripts/prepare.py
uses this file from a Python that has nothing installed.
"""

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

POLL_S = 0.1
ORPHANS_S = 5.0

# linux/prctl.h
_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36


@dataclass(frozen=True)
class Kept:
    """A command that runs under a keeper. `keeper` ends with the command's own exit code (128 + n for signal n)."""

    keeper: subprocess.Popen[Any]
    pid: int  # of the command itself
    grace_s: float

    def running(self) -> bool:
        return self.keeper.poll() is None

    def stop(self) -> None:
        """Ends the command and all that it started: SIGTERM, after grace_s SIGKILL. Returns when nothing is left."""
        if self.running():
            self.keeper.terminate()
            try:
                self.keeper.wait(self.grace_s + ORPHANS_S + 5)
            except subprocess.TimeoutExpired:
                self.keeper.kill()
                self.keeper.wait()
        if self.keeper.returncode < 0:
            # Killed before it could clean up: the command died with it (PR_SET_PDEATHSIG), its children did not.
            _signal_group(self.pid, signal.SIGKILL)


def start(argv: Sequence[str | Path], *, grace_s: float = 10.0, **popen: Any) -> Kept:
    """Starts argv under a keeper, in a session of its own: a terminal's Ctrl-C does not reach it.

    popen: further arguments of subprocess.Popen (cwd, env, stdout, stderr). Raises OSError when argv cannot be started.
    """
    reading, writing = os.pipe()
    try:
        keeper = subprocess.Popen(
            # -I -S: the keeper needs nothing but the standard library, and starts in 20 ms without the rest.
            [sys.executable, "-I", "-S", __file__, str(os.getpid()), str(grace_s), str(writing), *map(str, argv)],
            stdin=subprocess.DEVNULL,
            start_new_session=True,
            pass_fds=(writing,),
            **popen,
        )
    finally:
        os.close(writing)
    # One read, not until the end of the file: where gevent has patched os.close, the end comes only later. The keeper
    # writes less than a pipe passes on whole.
    said = os.read(reading, 4096).decode()
    os.close(reading)
    if not said.isdigit():
        keeper.wait()
        raise OSError(said or f"cannot start {argv[0]}")
    return Kept(keeper, int(said), grace_s)


def _prctl(option: int, value: int) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(option, value, 0, 0, 0)


def _children() -> list[int]:
    """Process ids of this process's children, those that it has adopted included. Empty where there is no /proc."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            # "pid (name) state ppid ...": the name may hold anything, so count from its closing parenthesis.
            fields = stat.read_text(errors="replace").rpartition(")")[2].split()
        except OSError:
            continue  # it ended between the listing and the reading
        if int(fields[1]) == os.getpid():
            found.append(int(stat.parent.name))
    return found


def _kill_orphans() -> None:
    """Kills and reaps what is left under this process; each kill may hand it grandchildren, so until none is left."""
    deadline = time.monotonic() + ORPHANS_S
    while time.monotonic() < deadline:
        try:
            reaped, _ = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return
        if reaped == 0:
            for pid in _children():
                os.kill(pid, signal.SIGKILL)
            time.sleep(0.01)


def _signal_group(group: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):  # the whole group has ended already
        os.killpg(group, number)


def keep(parent: int, grace_s: float, report: int, argv: Sequence[str]) -> int:
    """Runs argv to its end, or until the parent is gone or this process is told to stop; returns argv's exit code.

    report: a file descriptor that gets argv's process id, or why it could not be started.
    """
    stopping = False

    def stop(_number: int, _frame: FrameType | None) -> None:
        nonlocal stopping
        stopping = True

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, stop)
    # Orphans of the command come to the keeper instead of to init, so that those in other sessions are found too.
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)
    with os.fdopen(report, "w") as answer:
        try:
            command = subprocess.Popen(
                argv,
                process_group=0,
                # For the day when the keeper itself is killed. This process has one thread, so the hook is safe.
                preexec_fn=lambda: _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL),
            )
        except OSError as error:
            answer.write(f"cannot start {argv[0]}: {error.strerror}")
            return 127
        answer.write(str(command.pid))
    deadline = None
    while command.poll() is None and os.getppid() == parent:
        if stopping and deadline is None:
            _signal_group(command.pid, signal.SIGTERM)
            deadline = time.monotonic() + grace_s
        if deadline is not None and time.monotonic() > deadline:
            break
        time.sleep(POLL_S)
    _signal_group(command.pid, signal.SIGKILL)
    code = command.wait()
    _kill_orphans()
    return code if code >= 0 else 128 - code


if __name__ == "__main__":
    sys.exit(keep(int(sys.argv[1]), float(sys.argv[2]), int(sys.argv[3]), sys.argv[4:]))
