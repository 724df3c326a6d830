"""A run that goes on, as far as its folder tells: its figures so far, and second by second.

What the tab in Locust's web UI shows. A process of its own, since reading records takes longer than the gap between two
tokens; nothing is read while nobody looks. Its standard input carries a Question a line, each of which is answered by a
line, and it ends with its input. The definitions are those of metrics, so that the figures of a run that is over are
those of its summary.json.
"""

import contextlib
import math
import os
import sys
import time
from array import array
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import yaml

from twoclocks import metrics
from twoclocks.arrivals import chunk_columns, floats
from twoclocks.errors import RunFolderError, TwoclocksError
from twoclocks.gauges import ServerGauges
from twoclocks.growing import STAND_BACK, Growing
from twoclocks.live import LAST_S
from twoclocks.metrics import PERCENTILES, Chunks, Floats, Ints, definition, distribution
from twoclocks.record import GAVE_UP, HUNG_UP, LEFT, Record, decode_records
from twoclocks.settings_yaml import load_yaml
from twoclocks.totals import GONE_S
from twoclocks.wording import GAUGE_LABELS, GOODPUT, LABELS, TOTALS

READ_S = 0.3
"""How long an answer may take to read what is new; of a long run that is opened late there is more to come."""
PART_BYTES = 256 * 1024
LATE_S = 2.0
"""After so long a second is taken to be told: a worker sends its lines every half a second."""
SHOWN_S = 3600
"""Seconds that are kept, the newest."""
KEPT = 100_000
"""Requests whose values are kept at least; of longer runs, the figures are those of the newest."""
LONGEST_US = 2**23
"""Longer gaps, over 8 s, are kept one by one."""

LATENCIES = ("ttft", "itl", "tpot", "e2e")
COUNTS = ("requests", "ok", "failed", "cancelled", "hung_up", "gave_up")
CHARTS: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    ("ttft", "s", tuple(f"ttft_p{p}" for p in PERCENTILES)),
    ("itl", "s", tuple(f"itl_p{p}" for p in PERCENTILES)),
    ("tpot", "s", tuple(f"tpot_p{p}" for p in PERCENTILES)),
    ("output_throughput", "tokens/s", ("output_throughput",)),
    ("request_throughput", "requests/s", ("request_throughput", "goodput")),
    ("load", "requests", ("users", "in_flight")),
    ("server_requests", "requests", ("running", "waiting")),
    ("kv_cache_usage", "share", ("kv_cache_usage",)),
)
"""Charts, in their order: what is drawn, its unit, and the columns of `seconds` that are its lines."""
COLUMNS = {column: index for index, column in enumerate(column for _, _, names in CHARTS for column in names)}
"""Of `seconds`, and their places in a row."""
_NOTHING = [math.nan] * len(COLUMNS)


class Question(msgspec.Struct, frozen=True, kw_only=True):
    """What the tab wants to know."""

    folder: str
    now: float  # seconds on the run's clock
    run: str | None = None  # of which the asker knows all ...
    since: int = 0  # ... that was told up to this answer


class _Meta(msgspec.Struct):
    """What is read of run.json."""

    status: str
    window: dict[str, float | None]
    started_at_unix: float | None = None
    target: dict[str, Any] = {}
    notes: list[str] = []


class _Self(msgspec.Struct):
    """What is read of a line of self_samples.jsonl: a second of one process of the load generator."""

    at: float
    worker: int
    users: int
    in_flight: int


_meta, _second = msgspec.json.Decoder(_Meta), msgspec.json.Decoder(_Self)


class Counted:
    """Durations in whole microseconds, counted: exact, and bounded by how long they are, not by how many."""

    def __init__(self) -> None:
        self._counts = np.zeros(2**17, dtype=np.int64)
        self._longer: Counter[int] = Counter()

    def add(self, micros: Ints) -> None:
        """Count these."""
        short = micros[micros < LONGEST_US]
        self._longer.update(micros[micros >= LONGEST_US].tolist())
        top = int(short.max(initial=0))
        if top >= len(self._counts):
            self._counts = np.concatenate([self._counts, np.zeros(2 * top - len(self._counts), dtype=np.int64)])
        np.add.at(self._counts, short, 1)

    def distribution(self) -> dict[str, Any]:
        """As metrics.distribution, in seconds."""
        short = np.flatnonzero(self._counts)
        longer = sorted(self._longer)
        values = np.concatenate([short, np.array(longer, dtype=np.int64)])
        counts = np.concatenate([self._counts[short], np.array([self._longer[us] for us in longer], dtype=np.int64)])
        n = int(counts.sum())
        if not n:
            return distribution(np.empty(0))
        ends = np.cumsum(counts)

        def ranked(rank: int) -> float:
            return float(values[np.searchsorted(ends, rank, side="right")])

        told: dict[str, Any] = {"n": n, "mean": float(values @ counts) / n / 1e6}
        for p in PERCENTILES:
            below, share = divmod(p / 100 * (n - 1), 1)
            low, high = ranked(int(below)), ranked(min(int(below) + 1, n - 1))
            told[f"p{p}"] = (low + (high - low) * share) / 1e6
        return told | {"min": float(values[0]) / 1e6, "max": float(values[-1]) / 1e6}


class _Newest:
    """The newest values: all, as long as they are not more than 2 x KEPT. In one place, which never grows or moves."""

    def __init__(self) -> None:
        self._values = np.empty(2 * KEPT)
        self._count = 0
        self.lost = False

    def add(self, values: Floats) -> None:
        if self._count + len(values) > len(self._values):
            self.lost = True
            values = values[-KEPT:]
            kept = min(self._count, KEPT - len(values))
            self._values[:kept] = self._values[self._count - kept : self._count].copy()
            self._count = kept
        self._values[self._count : self._count + len(values)] = values
        self._count += len(values)

    def distribution(self) -> dict[str, Any]:
        return distribution(self._values[: self._count])


class _Second(msgspec.Struct):
    """What ended in one second; kept until no window reaches back to it."""

    ok: int = 0
    good: int = 0
    longest: float = 0.0  # from its being sent to its end
    values: dict[str, list[Floats]] = {}


class LiveRun:
    """Reads a run folder as it grows. Bounded memory, however long the run is."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.limits = metrics.slo_limits(_experiment(folder))
        self.seq = 0  # of the answers
        self.counts = Counter[str]()
        self.errors = Counter[str]()
        self.examples: dict[str, str] = {}
        self.meta = _Meta("running", {})
        self._requests, self._self = Growing(folder / "requests.jsonl"), Growing(folder / "self_samples.jsonl")
        self._gauges = ServerGauges(folder / "server_samples.jsonl")
        self._processes: dict[int, _Self] = {}  # worker -> its newest second
        self._gaps = Counted()
        self._newest = {name: _Newest() for name in LATENCIES if name != "itl"}
        self._tokens = 0.0  # that arrived in the window
        self._rows: dict[int, array[float]] = {}  # second -> a value for each of COLUMNS, NaN where there is none
        self._changed: dict[int, int] = {}  # second -> the answer from which on it is as it is
        self._ended: dict[int, _Second] = {}
        self._closed: int | None = None  # the seconds before this one are told

    # reading

    def read(self, now: float, seconds: float = READ_S) -> None:
        """Take over what has been written, as much as can be read in so many seconds."""
        self.seq += 1
        deadline = time.monotonic() + seconds
        while True:
            lines = self._requests.read(PART_BYTES)
            # after the lines: the end of the window is written before any line that lies beyond it
            before, self.meta = self.meta, _meta.decode((self.folder / "run.json").read_bytes())
            if before.started_at_unix not in (None, self.meta.started_at_unix):
                raise RunFolderError("another run stands there now")  # and the next question begins with it
            if lines:
                self._add(decode_records(lines))
            samples = self._self.read(PART_BYTES)
            self._add_load(samples)
            scrapes = list(self._gauges.new(PART_BYTES))
            for at, gauges in scrapes:
                self._put(int(at), **gauges)
            if not lines and not samples and not scrapes:
                is_over = self.meta.status != "running"
                self._close(max(self._ended, default=0) + 1 if is_over else now - LATE_S)
                break
            if time.monotonic() > deadline:
                break
        oldest = max(self._rows, default=0) - SHOWN_S
        for second in [second for second in self._rows if second <= oldest]:
            del self._rows[second], self._changed[second]

    @property
    def behind(self) -> int:
        """Bytes that have been written and not read."""
        return self._requests.behind + self._self.behind + self._gauges.behind

    @property
    def _end(self) -> float | None:
        return self.meta.window.get("ended_at")

    def _add(self, records: Sequence[Record]) -> None:
        records = [record for record in records if record.phase != "warmup"]
        if not records:
            return
        *columns, _, _ = chunk_columns(records, self._requests.path, 0)
        chunks = Chunks(*columns)
        sent_at = floats([record.sent_at for record in records])
        output_tokens = floats([record.output_tokens for record in records])
        self._add_tokens(chunks.at, metrics.arrived_tokens(chunks, output_tokens))
        gaps = metrics.chunk_gaps(chunks)
        values = {
            "ttft": metrics.ttft(chunks, sent_at),
            "tpot": metrics.tpot(chunks, output_tokens)[0],
            "e2e": metrics.e2e(chunks, sent_at),
        }
        ok = np.array([record.status == "ok" for record in records])
        good = metrics.meets_slo(ok, {name: values[name] for name in self.limits}, self.limits)
        measured = ~(sent_at > (np.inf if self._end is None else self._end))
        for name, newest in self._newest.items():
            newest.add(values[name][ok & measured])
        self._gaps.add(np.rint(gaps.seconds[(ok & measured)[gaps.request]] * 1e6).astype(np.int64))
        starts = np.searchsorted(gaps.request, np.arange(len(records) + 1))
        for row in np.flatnonzero(measured).tolist():
            record = records[row]
            self._count(record, good=bool(good[row]))
            second = self._second(record)
            if ok[row] and second is not None:
                second.ok += 1
                for name in ("ttft", "tpot"):
                    second.values.setdefault(name, []).append(values[name][row : row + 1])
                second.values.setdefault("itl", []).append(gaps.seconds[starts[row] : starts[row + 1]])
                second.good += bool(good[row])
        self._close(max(record.ended_at for record in records) - LATE_S)

    def _count(self, record: Record, *, good: bool) -> None:
        counts, kind = self.counts, record.error_kind
        counts["requests"] += 1
        counts["judged"] += kind != HUNG_UP
        counts["good"] += good
        counts["hung_up"] += kind == HUNG_UP
        counts["gave_up"] += kind == GAVE_UP
        if record.status == "ok":
            counts["ok"] += 1
            counts["ended"] += self._end is None or record.ended_at <= self._end  # inside the window
        elif record.status != "cancelled":
            counts["failed"] += 1
        elif kind not in LEFT:
            counts["cancelled"] += 1
        if record.status != "ok" and kind not in LEFT:
            named = kind or record.status
            self.errors[named] += 1
            self.examples.setdefault(named, (record.error_message or "")[:200])

    def _second(self, record: Record) -> _Second | None:
        """Where a record belongs by its end; None if that is long told."""
        at = int(record.ended_at)
        if self._closed is None:
            self._closed = at
        if at < self._closed - LAST_S:
            return None
        second = self._ended.setdefault(at, _Second())
        second.longest = max(second.longest, record.ended_at - (record.sent_at or record.ended_at))
        return second

    def _add_load(self, lines: bytes) -> None:
        for one in _second.decode_lines(lines):
            self._processes[one.worker] = one
            there = [other for other in self._processes.values() if other.at > one.at - GONE_S]
            users, in_flight = sum(other.users for other in there), sum(other.in_flight for other in there)
            self._put(int(one.at), users=users, in_flight=in_flight)

    def _add_tokens(self, at: Floats, tokens: Floats) -> None:
        begin, end = self.meta.window.get("started_at"), self._end
        if begin is not None:
            self._tokens += float(tokens[(at >= begin) & (at <= (np.inf if end is None else end))].sum())
        if len(at):
            seconds = at.astype(np.int64)
            first = int(seconds.min())
            for offset, count in enumerate(np.bincount(seconds - first, weights=tokens).tolist()):
                if count:
                    row = self._rows.get(first + offset)
                    before = math.nan if row is None else row[COLUMNS["output_throughput"]]
                    self._put(first + offset, output_throughput=count if math.isnan(before) else before + count)

    def _put(self, second: int, **values: float | None) -> None:
        row = self._rows.setdefault(second, array("d", _NOTHING))
        for column, value in values.items():
            if column in COLUMNS:
                row[COLUMNS[column]] = math.nan if value is None else value
        self._changed[second] = self.seq

    def _close(self, until: float) -> None:
        """Tell the seconds before ``until``: percentiles and rates of the LAST_S that end with each."""
        begin = self.meta.window.get("started_at")
        if self._closed is None or begin is None:
            return
        while self._closed + 1 <= until:
            second, self._closed = self._closed, self._closed + 1
            kept = [one for at, one in self._ended.items() if second - LAST_S < at <= second]
            if kept:
                length = min(LAST_S, second + 1 - begin)
                told: dict[str, float | None] = {}
                if length >= 1 and (self._end is None or second <= self._end):
                    told["request_throughput"] = sum(one.ok for one in kept) / length
                    told["goodput"] = sum(one.good for one in kept) / length if self.limits else None
                for name in ("ttft", "itl", "tpot"):
                    arrays = [values for one in kept for values in one.values.get(name, [])]
                    figures = distribution(np.concatenate(arrays) if arrays else np.empty(0))
                    told |= {f"{name}_p{p}": figures[f"p{p}"] for p in PERCENTILES}
                self._put(second, **told)
            else:
                self._closed = max(self._closed, min([int(until), *self._ended]))  # nothing ended for long
            self._ended = {at: one for at, one in self._ended.items() if at > self._closed - LAST_S}

    # telling

    def answer(self, now: float, since: int) -> dict[str, Any]:
        """What live.json holds: all figures, and the seconds that have changed since the answer ``since``."""
        begin, status = self.meta.window.get("started_at"), self.meta.status
        running = "warming up" if begin is None else "measuring" if self._end is None else "draining"
        changed = sorted(second for second, seq in self._changed.items() if seq > since)
        longest = max((one.longest for one in self._ended.values()), default=0.0)
        return {
            "run": self.folder.name,
            "seq": self.seq,
            "state": running if status == "running" else status,
            "at": now if status == "running" or self._end is None else self._end,
            "window": {"started_at": begin, "ended_at": self._end},
            "target": self.meta.target,
            "notes": self.meta.notes,
            "bytes_behind": self.behind,
            "errors": [{"kind": k, "count": n, "example": self.examples[k]} for k, n in self.errors.most_common(5)],
            "figures": self.figures(now),
            "charts": [_chart(*chart) for chart in CHARTS],
            "filling_from": now - longest if status == "running" else None,
            "seconds": {"at": changed}
            | {column: [_known(self._rows[second][index]) for second in changed] for column, index in COLUMNS.items()},
        }

    def figures(self, now: float) -> dict[str, Any]:
        """Of the measuring window so far: as `figures` in summary.json, each with the label that readers see."""
        begin, end = self.meta.window.get("started_at"), now if self._end is None else self._end
        length = end - begin if begin is not None and end > begin else float("nan")
        counts = self.counts
        figures: dict[str, Any] = {
            "ttft": self._newest["ttft"].distribution() | {"definition": definition(metrics.ttft)},
            "itl": self._gaps.distribution() | {"definition": definition(metrics.chunk_gaps)},
            "tpot": self._newest["tpot"].distribution() | {"definition": definition(metrics.tpot)},
            "e2e": self._newest["e2e"].distribution() | {"definition": definition(metrics.e2e)},
        }
        for name, figure in figures.items():
            lost = name in self._newest and self._newest[name].lost
            figure |= {"label": LABELS[name] + (", of the newest" if lost else ""), "unit": "s"}
        for name in COUNTS:
            figures[name] = {"label": TOTALS[name], "unit": "requests", "value": counts[name]}
        rates: dict[str, tuple[float, str, Callable[..., Any]]] = {
            "output_throughput": (self._tokens / length, "tokens/s", metrics.output_throughput),
            "request_throughput": (counts["ended"] / length, "requests/s", metrics.request_throughput),
        }
        if self.limits:
            rates["goodput"] = (counts["good"] / length, "requests/s", metrics.goodput)
            share = counts["good"] / counts["judged"] if counts["judged"] else float("nan")
            rates["goodput_share"] = (share, "share", metrics.meets_slo)
        for name, (value, unit, function) in rates.items():
            figures[name] = {
                "label": (TOTALS | GOODPUT)[name],
                "unit": unit,
                "definition": definition(function),
                "value": value,
            }
        if self.meta.status == "running":
            figures["output_throughput"]["label"] += ", of answers that have ended"
        return figures


def _known(value: float) -> float | None:
    return None if math.isnan(value) else value


def _chart(name: str, unit: str, columns: Sequence[str]) -> dict[str, Any]:
    named = LABELS | TOTALS | GOODPUT | GAUGE_LABELS
    lines = [{"column": column, "label": named.get(column) or column.rpartition("_")[2]} for column in columns]
    return {"title": named[name], "unit": unit, "lines": lines}


def _experiment(folder: Path) -> dict[str, Any]:
    with contextlib.suppress(OSError, UnicodeDecodeError, yaml.YAMLError):
        told = load_yaml((folder / "experiment.yaml").read_text(encoding="utf-8"))
        return told if isinstance(told, dict) else {}
    return {}


def answers(questions: Iterator[bytes]) -> Iterator[bytes]:
    """A line of JSON for each question; {"error": ...} where the folder cannot be read."""
    run: LiveRun | None = None
    for line in questions:
        question = msgspec.json.decode(line, type=Question)
        try:
            if run is None or str(run.folder) != question.folder:
                run = LiveRun(Path(question.folder))
            knows = question.run == run.folder.name and question.since <= run.seq  # else told by a process before this
            run.read(question.now)
            told = run.answer(question.now, question.since if knows else 0)
        except (OSError, msgspec.MsgspecError, TwoclocksError) as error:
            run, told = None, {"error": f"{question.folder}: cannot be read: {error}"}
        yield msgspec.json.encode(told) + b"\n"


def main() -> None:
    """Answer until standard input ends."""
    os.nice(STAND_BACK)
    for answer in answers(iter(sys.stdin.buffer.readline, b"")):
        sys.stdout.buffer.write(answer)
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    main()
