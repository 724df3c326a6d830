"""Totals: the lines of a run folder, as they come -> fine-bucketed histograms and counters of the run so far.

Pure, and bounded however long the run is. What is counted, and by which definition, is what summary.json says of the
whole run in the end: the same requests, and the same functions of metrics. Knows nothing of HTTP or Prometheus.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
import numpy as np

from twoclocks import metrics
from twoclocks.arrivals import chunk_columns, floats
from twoclocks.metrics import Chunks, Floats, Ints
from twoclocks.record import HUNG_UP, Record, decode_records

BOUNDS = tuple(2.0 ** (step / 8) for step in range(-13 * 8, 10 * 8 + 1))
"""Upper bounds of the buckets in seconds, 0.12 ms to 1024 s, each 9 % above the one before: those of Prometheus' native
histograms of schema 3."""
MAX_KINDS = 64
"""Kinds of error that are told apart; a server may choose among hundreds of HTTP statuses."""
GONE_S = 5.0
"""A process of the load generator that has not told of itself for so long is not there any more."""
_KIND = re.compile(r"[a-z0-9_]{1,40}")


class Process(msgspec.Struct, frozen=True):
    """What is read of a line of self_samples.jsonl: a second of one process of the load generator."""

    at: float
    worker: int
    loop_lag_s: list[float]
    cpu_s: float
    loop_cpu_s: float
    users: int = 0
    in_flight: int = 0
    not_sent: int = 0


class Window(msgspec.Struct, frozen=True):
    """Seconds on the run's clock; None: not yet."""

    started_at: float | None = None
    ended_at: float | None = None


class Meta(msgspec.Struct, frozen=True):
    """What is read of run.json."""

    status: str = "running"
    window: Window = Window()
    not_sent: int | None = None
    lost_records: int = 0
    missing_workers: int = 0


_process = msgspec.json.Decoder(Process)


@dataclass
class Histogram:
    """Counts of observations in seconds."""

    counts: Ints = field(default_factory=lambda: np.zeros(len(BOUNDS) + 1, dtype=np.int64))  # the last: above all
    sum: float = 0.0

    def add(self, seconds: Floats) -> None:
        """Those that are known; NaN is left out."""
        known = seconds[~np.isnan(seconds)]
        # a bound belongs to the bucket that it ends, as Prometheus has it (le)
        self.counts += np.bincount(np.searchsorted(BOUNDS, known, side="left"), minlength=len(self.counts))
        self.sum += float(known.sum())


class Totals:
    """Of one run. ``limits``: its SLO in seconds, such as {"ttft": 0.5}; ``is_open``: is it an open loop?"""

    def __init__(self, limits: Mapping[str, float], *, is_open: bool) -> None:
        self.limits, self.is_open = limits, is_open
        names = ("ttft", "itl", "tpot", "e2e", "loop_lag", *(("send_lateness",) if is_open else ()))
        self.histograms = {name: Histogram() for name in names}
        self.requests: Counter[tuple[str, str, str]] = Counter()  # (phase, status, error kind)
        self.counts: Counter[str] = Counter()
        self.cpu_s: defaultdict[int, float] = defaultdict(float)  # worker -> its event loop's
        self.processes: dict[int, Process] = {}  # worker -> its latest second
        self.meta = Meta()
        self._kinds: set[str] = set()

    def add_requests(self, lines: bytes) -> None:
        """Whole lines of requests.jsonl. Raises msgspec.MsgspecError and RunFolderError for what is none."""
        records = decode_records(lines)
        measured = [record for record in records if self._phase(record) == "measure"]
        for record in records:
            self.requests[self._phase(record), record.status, self._kind(record)] += 1
        if measured:
            self._add_measured(measured)

    def add_self(self, lines: bytes) -> None:
        """Whole lines of self_samples.jsonl. Raises msgspec.MsgspecError."""
        for second in _process.decode_lines(lines):
            self.processes[second.worker] = second
            if self._in_window(second.at):
                self.cpu_s[second.worker] += second.loop_cpu_s
                self.histograms["loop_lag"].add(floats(second.loop_lag_s))

    @property
    def present(self) -> list[Process]:
        """The processes of the load generator that are at it."""
        if self.meta.status != "running":
            return []
        latest = max((second.at for second in self.processes.values()), default=0.0)
        return [second for second in self.processes.values() if second.at > latest - GONE_S]

    @property
    def not_sent(self) -> int:
        """Requests that were due while load.max_in_flight others were under way."""
        told = self.meta.not_sent  # at the end
        return sum(second.not_sent for second in self.processes.values()) if told is None else told

    def _phase(self, record: Record) -> str:
        """As summary.json has it: what was sent after the window's end is not measured."""
        if record.phase == "warmup":
            return "warmup"
        end = self.meta.window.ended_at
        return "drain" if end is not None and record.sent_at is not None and record.sent_at > end else "measure"

    def _kind(self, record: Record) -> str:
        """A name out of a bounded set; never a text of the server's."""
        kind = record.error_kind or "none"
        if kind not in self._kinds:
            if len(self._kinds) >= MAX_KINDS or not _KIND.fullmatch(kind):
                return "other"
            self._kinds.add(kind)
        return kind

    def _in_window(self, at: float) -> bool:
        window = self.meta.window
        return window.started_at is not None and window.started_at <= at <= (window.ended_at or at)

    def _add_measured(self, records: list[Record]) -> None:
        ok = np.array([record.status == "ok" for record in records])
        sent_at = floats([record.sent_at for record in records])
        output_tokens = floats([record.output_tokens for record in records])
        chunks = Chunks(*chunk_columns(records, Path("requests.jsonl"), 0)[:6])
        values = {
            "ttft": metrics.ttft(chunks, sent_at),
            "tpot": metrics.tpot(chunks, output_tokens)[0],
            "e2e": metrics.e2e(chunks, sent_at),
        }
        for name, of_all in values.items():
            self.histograms[name].add(of_all[ok])
        gaps = metrics.chunk_gaps(chunks)
        self.histograms["itl"].add(gaps.seconds[ok[gaps.request]])
        if self.is_open:
            self.histograms["send_lateness"].add(sent_at - floats([record.intended_at for record in records]))
        judged = np.array([record.error_kind != HUNG_UP for record in records])
        self.counts["judged_requests"] += int(judged.sum())
        self.counts["good_requests"] += int((metrics.meets_slo(ok, values, dict(self.limits)) & judged).sum())
        for record in records:
            if record.status == "ok":
                self.counts["output_tokens"] += record.output_tokens or 0
                self.counts["prompt_tokens"] += record.prompt_tokens or 0
                if record.cached_tokens is not None:
                    self.counts["cached_tokens"] += record.cached_tokens
                self.counts["user_stamped_requests"] += record.timestamp_source == "user"
                self.counts["merged_reads"] += record.reads_merged
