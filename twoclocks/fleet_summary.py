"""What run.json says of the workers of a run, in lines for people, and what the verdict is made of."""

import math
from collections.abc import Sequence
from typing import Any

from twoclocks.errors import plain

CLOCK_ERROR_S = 0.005
"""Beyond it, when a request left is known less well than the verdict asks of a send (5 ms late)."""
DRIFT = 5e-4
"""Beyond it, a clock runs apart faster than Linux lets a corrected one do. Durations are off by as much."""
SAME_END_S = 1.0  # a Ctrl-C in a terminal reaches master and workers in any order
MOST_LINES = 12


def worker_lines(rows: Sequence[dict[str, Any]]) -> list[str]:
    """How many there were and how well their clocks are known; a line for each that has something to tell."""
    others, odd = _others(rows), [row for row in rows if _is_odd(row)]
    if not others and not odd:
        return []
    hosts = len({row["host"] for row in rows})
    lines = [f"{len(rows)} workers on {hosts} host{'s' * (hosts > 1)}."]
    if others:
        worst, drift = max(map(_error_s, others)), max(abs(row["clock"]["drift"]) for row in others)
        lines[0] += (
            f" {len(others)} of them had a clock of their own, known against the master's to ± {worst * 1e3:.2f} ms or "
            f"better, which ran apart by up to {drift * 1e6:.1f} µs a second. Times of different workers, the edges of "
            "the window and tokens/s may be off by as much; durations of one request are its worker's own."
        )
    shown = [row for row in rows if row in others or row in odd]
    lines += [_line(row) for row in shown[:MOST_LINES]]
    if len(shown) > MOST_LINES:
        lines.append(f"{len(shown) - MOST_LINES} more workers, in run.json.")
    return lines


def name_of(row: dict[str, Any]) -> str:
    """How a worker is called."""
    return f"worker {row['worker']} ({plain(str(row['host']))}, process {row['pid']})"


def named(rows: Sequence[dict[str, Any]]) -> str:
    """The first of them by name, and how many others there are."""
    return name_of(rows[0]) + (f" and {len(rows) - 1} others" if len(rows) > 1 else "")


def gone(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Who never sent its last lines."""
    return [row for row in rows if row["done_at"] is None]


def joined_late(rows: Sequence[dict[str, Any]], started_at: float) -> list[dict[str, Any]]:
    """Who came after the window had begun."""
    return [row for row in rows if row["late"] and row["joined_at"] is not None and row["joined_at"] > started_at]


def left_early(rows: Sequence[dict[str, Any]], ended_at: float) -> list[dict[str, Any]]:
    """Who came to its own end before the window's, with all of its records."""
    return [row for row in rows if row["done_at"] is not None and row["done_at"] < ended_at - SAME_END_S]


def was_silent(rows: Sequence[dict[str, Any]], window: tuple[float, float]) -> list[tuple[dict[str, Any], float]]:
    """Who was silent in the window and came back, and how long of it in all, seconds."""
    began, ended = window
    told = [
        (
            row,
            sum(
                max(0.0, min(until, ended) - max(since, began)) for since, until in row["silences"] if until is not None
            ),
        )
        for row in rows
    ]
    return [(row, seconds) for row, seconds in told if seconds]


def badly_known(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Whose clock is known less well than CLOCK_ERROR_S, or not at all, or drifts more than DRIFT; the worst first."""
    bad = [row for row in _others(rows) if _error_s(row) > CLOCK_ERROR_S or abs(row["clock"]["drift"]) > DRIFT]
    return sorted(bad, key=_error_s, reverse=True)


def _others(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    return [row for row in rows if row["clock"] and not row["clock"]["shared"]]


def _error_s(row: dict[str, Any]) -> float:
    error = row["clock"]["error_s"]
    return float(error) if error is not None else math.inf


def _is_odd(row: dict[str, Any]) -> bool:
    return bool(row["late"] or row["silences"] or row["lost"] or row["held_s"] or row["done_at"] is None)


def _line(row: dict[str, Any]) -> str:
    parts = [f"{row['records']:,} records"]
    clock = row["clock"]
    if clock and not clock["shared"]:
        parts.append(
            f"clock {clock['offset_s']:+,.6f} s to the master's, ± {_error_s(row) * 1e3:.2f} ms, drift "
            f"{clock['drift'] * 1e6:+.1f} µs/s, from {clock['exchanges']:,} exchanges"
        )
    if row["late"] and row["joined_at"] is not None:
        parts.append(f"joined at second {row['joined_at']:.1f}")
    for since, until in row["silences"]:
        parts.append(f"silent from second {since:.1f}" + (f" to {until:.1f}" if until is not None else " on"))
    if row["lost"]:
        parts.append(f"{row['lost']:,} requests that it had begun have no record")
    if row["due_not_sent"]:
        parts.append(f"{row['due_not_sent']:,} requests of its share were not sent")
    if row["held_s"]:
        parts.append(f"held requests back for {row['held_s']:.1f} s")
    if row["frames_repeated"]:
        parts.append(f"{row['frames_repeated']:,} frames sent again")
    return f"{name_of(row)}: {'; '.join(parts)}."
