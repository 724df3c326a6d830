"""Memory of a process and of all that it started -> rows of process_samples.jsonl. Linux: it reads /proc.

RSS counts a page that several processes share once for each of them; PSS counts it once in all, which is what the
machine really gives. The kernel has to walk a process's pages to tell PSS, and holds its address space meanwhile: so
RSS is read each time, PSS only as often as its reading takes a hundredth of the time.
"""

import contextlib
import os
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

PROC = Path("/proc")
TREE_S = 1.0  # a process that is younger may be missing from a row
PSS_COST = 0.01  # share of the time that reading PSS may take
PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")


class ProcessMemory:
    """Samples the tree of one process. ``now`` is a clock in seconds, of which only differences count."""

    def __init__(self, pid: int, proc: Path = PROC, now: Callable[[], float] = time.monotonic) -> None:
        self.pid, self.proc, self.now = pid, proc, now
        self._pids: list[int] = []
        self._tree_due = self._pss_due = -float("inf")

    def sample(self, at: float) -> dict[str, Any]:
        """One row, stamped with ``at`` (seconds on the run's clock).

        at, pid, processes, rss_bytes, pss_bytes (None where it was not read, or may not be). With error in place of
        them once the process is gone.
        """
        if self.now() >= self._tree_due:
            self._pids = tree(self.pid, self.proc)
            self._tree_due = self.now() + TREE_S
        sizes = [size for size in (rss_bytes(self.proc / str(pid)) for pid in self._pids) if size is not None]
        if not sizes:
            return {"at": at, "pid": self.pid, "error": f"there is no process {self.pid} on this machine"}
        pss = None
        if (began := self.now()) >= self._pss_due:
            pss = _sum(pss_bytes(self.proc / str(pid)) for pid in self._pids)
            ended = self.now()
            self._pss_due = ended + (ended - began) / PSS_COST
        return {"at": at, "pid": self.pid, "processes": len(sizes), "rss_bytes": sum(sizes), "pss_bytes": pss}


def tree(pid: int, proc: Path = PROC) -> list[int]:
    """A process and all its descendants; empty if it is not there."""
    children: dict[int, list[int]] = {}
    there = False
    for stat in proc.glob("[0-9]*/stat"):
        try:
            # "pid (name) state ppid ...": the name may hold anything, so count from its closing parenthesis.
            parent = int(stat.read_text(errors="replace").rpartition(")")[2].split()[1])
        except (OSError, IndexError, ValueError):
            continue  # it ended between the listing and the reading
        child = int(stat.parent.name)
        there |= child == pid
        children.setdefault(parent, []).append(child)
    found = [pid] if there else []
    for one in found:  # grows while it is walked
        found += children.get(one, [])
    return found


def rss_bytes(folder: Path) -> int | None:
    """Resident memory of the process of a folder of /proc; None if it is gone, or a zombie, which holds none."""
    try:
        return int((folder / "statm").read_text().split()[1]) * PAGE_BYTES or None
    except (OSError, IndexError, ValueError):
        return None


def pss_bytes(folder: Path) -> int | None:
    """Its proportional share; None if it is gone, or this user may not know, or the kernel does not tell."""
    with contextlib.suppress(OSError, ValueError):
        for line in (folder / "smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1]) * 1024
    return None


def _sum(sizes: Iterable[int | None]) -> int | None:
    """None if one of them is not known: a part of the tree is not the tree."""
    known = list(sizes)
    return sum(size for size in known if size is not None) if None not in known else None
