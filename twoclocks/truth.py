"""Truth: the log of the known-schedule server, held against what a client says it saw of the same streams.

Pure functions over numpy arrays. Both sides share one clock (time.monotonic_ns() of one machine), and every figure is a
difference of two times of the same side, so that no clock zero enters. Seconds, unless a name says ns.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from twoclocks.record import TOKEN_KINDS, Record, expand

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class SentLog:
    """What `schedule_server` sent, and when. Rows of the first group are requests, of the second writes, in order."""

    meta: dict[str, Any]  # schedule, cpu_s, elapsed_s
    request_id: list[str]
    arrived_ns: Ints  # the request's last byte reached the server's kernel
    role_ns: Ints  # a role chunk was sent alone; 0 if there was none
    cut_ns: Ints  # the client was seen to have gone before the end; 0 if it stayed
    tokens: Ints  # asked for
    writes: Ints  # done; fewer than asked for when the client left

    events: Ints  # token events in each write
    due_ns: Ints
    before_ns: Ints  # right before the system call
    after_ns: Ints  # right after it returned: what "sent" means here

    @property
    def lateness_s(self) -> Floats:
        """How late each write was against its schedule: the server's own error."""
        return (self.after_ns - self.due_ns) / 1e9

    @property
    def bracket_s(self) -> Floats:
        """How long each system call took: the true instant of sending lies within it."""
        return (self.after_ns - self.before_ns) / 1e9

    def sent_between(self, start_ns: int, end_ns: int) -> int:
        """Tokens sent from one instant to another; an answer's last chunk, which may hold fewer, counts as full."""
        inside = (self.after_ns >= start_ns) & (self.after_ns < end_ns)
        return int(self.events[inside].sum()) * int(self.meta["schedule"]["chunk_tokens"])


def read_log(path: Path) -> SentLog:
    """The log that `schedule_server --log` wrote."""
    with np.load(path) as arrays:
        named = {name: arrays[name] for name in arrays.files}
    meta, ids = json.loads(str(named.pop("meta"))), [str(text) for text in named.pop("request_id")]
    return SentLog(meta=meta, request_id=ids, **named)


def seen(record: Record) -> tuple[str, Ints]:
    """(request id, offset of each token chunk from sent_at in ns) of a record."""
    is_token = np.array([kind in TOKEN_KINDS for kind in expand(record.chunk_kinds)], dtype=bool)
    return record.request_id, np.cumsum(np.array(record.chunk_us, dtype=np.int64))[is_token] * 1000


@dataclass(frozen=True)
class Differences:
    """Client minus server, signed, in seconds."""

    ttft: Floats  # (first token - sent_at) - (first token sent - request arrived)
    gap: Floats  # between successive writes; of events in one write the first counts
    tpot: Floats
    e2e: Floats
    compared: int  # requests
    unknown: int  # requests that the server never saw, or whose number of token events differs from what it sent


def differences(clients: Iterable[tuple[str, Ints]], log: SentLog) -> Differences:
    """Hold each stream that a client saw (`seen`) against the log, token chunk by token chunk."""
    rows = {request_id: row for row, request_id in enumerate(log.request_id)}
    first = np.cumsum(log.writes) - log.writes
    chunk_tokens = int(log.meta["schedule"]["chunk_tokens"])
    ttft, tpot, e2e, gap = [], [], [], [np.empty(0, dtype=np.int64)]
    unknown = 0
    for request_id, client in clients:
        row = rows.get(request_id)
        if row is None:
            unknown += 1
            continue
        writes = slice(first[row], first[row] + log.writes[row])
        events, sent = log.events[writes], log.after_ns[writes]
        if not len(client) or len(client) != events.sum():
            unknown += 1
            continue
        starts = client[np.cumsum(events) - events]
        ttft.append(client[0] - (sent[0] - log.arrived_ns[row]))
        e2e.append(client[-1] - (sent[-1] - log.arrived_ns[row]))
        gap.append(np.diff(starts) - np.diff(sent))
        later = log.tokens[row] - chunk_tokens
        if later > 0:
            tpot.append(((client[-1] - client[0]) - (sent[-1] - sent[0])) / later)

    def seconds(values: list[Any] | Ints) -> Floats:
        return np.array(values, dtype=np.float64) / 1e9

    return Differences(seconds(ttft), seconds(np.concatenate(gap)), seconds(tpot), seconds(e2e), len(ttft), unknown)


class ErrorFigures(msgspec.Struct, frozen=True):
    """The size of an error: percentiles of |client - server|, and its mean with the sign. Seconds; None without any."""

    n: int
    p50: float | None = None
    p99: float | None = None
    max: float | None = None
    mean: float | None = None


def error_figures(signed: Floats) -> ErrorFigures:
    """Percentiles of the absolute value (linear interpolation), and the signed mean."""
    if not len(signed):
        return ErrorFigures(0)
    p50, p99, largest = (float(value) for value in np.percentile(np.abs(signed), [50, 99, 100]))
    return ErrorFigures(len(signed), p50, p99, largest, float(signed.mean()))


def mean_streams(sent_at: Floats, ended_at: Floats, window: tuple[float, float]) -> float:
    """Mean number of streams open at once = time that requests spent inside the window / its length."""
    start, end = window
    inside = np.clip(ended_at, start, end) - np.clip(sent_at, start, end)
    return float(np.nansum(inside) / (end - start)) if end > start else float("nan")
