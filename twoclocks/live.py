"""Live view: a few lines at the foot of a terminal that say how a run goes, while it goes.

Its figures come from the very lines that go to the run folder, of the last ten seconds; the report's come from the
files, afterwards. Where nobody looks (no terminal, or CI) nothing here runs. Knows nothing of Locust.
"""

import atexit
import contextlib
import logging
import os
import sys
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import msgspec
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from twoclocks.errors import plain
from twoclocks.experiment import Load
from twoclocks.gauges import ServerGauges
from twoclocks.record import LEFT, TOKEN_KINDS, Kind, token_span_s
from twoclocks.shapes import length_s

REFRESH_S = 1.0
LAST_S = 10.0
LONGEST = 4000
"""Ended requests that are kept for the figures; beyond 400 a second they reach back less than LAST_S."""


def is_shown() -> bool:
    """Is somebody looking: does standard output go to a terminal that can be drawn on, outside CI?"""
    return sys.stdout.isatty() and not os.environ.get("CI") and Console().is_interactive


class _Ended(msgspec.Struct):
    """What is read of a line of requests.jsonl."""

    phase: str
    status: str
    ended_at: float
    chunk_us: list[int] = []
    chunk_kinds: list[tuple[Kind, int]] = []
    chunk_tokens: list[int | None] | None = None
    chunk_choice: list[tuple[int, int]] | None = None
    output_tokens: int | None = None
    error_kind: str | None = None


class _Second(msgspec.Struct):
    """What is read of a line of self_samples.jsonl."""

    worker: int
    reader: str
    loop_lag_s: list[float]


_ended, _second = msgspec.json.Decoder(_Ended), msgspec.json.Decoder(_Second)


@dataclass(frozen=True)
class Recent:
    """Of the requests that ended in the last ten seconds. Seconds; None where there is none."""

    requests_per_s: float
    tokens_per_s: float
    ttft_p50: float | None
    ttft_p95: float | None
    tpot_p50: float | None


class Figures:
    """Counts of the whole run, and the newest requests; bounded, however long the run is."""

    def __init__(self) -> None:
        self.ok = self.failed = self.left = self.warmup = 0
        self.last_error: str | None = None
        self.readers: dict[int, str] = {}  # worker -> what it reads with
        self.lag_s: dict[int, float] = {}  # worker -> the latest tick of its last second
        self._newest: deque[tuple[float, float | None, float | None, int]] = deque(maxlen=LONGEST)

    def add(self, lines: bytes, name: str) -> None:
        """Lines of requests.jsonl or self_samples.jsonl, as they go to the file."""
        for line in lines.splitlines():
            if name == "requests.jsonl":
                self._add_request(_ended.decode(line))
            else:
                second = _second.decode(line)
                self.readers[second.worker] = second.reader
                self.lag_s[second.worker] = max(second.loop_lag_s, default=0.0)

    def _add_request(self, ended: _Ended) -> None:
        if ended.phase == "warmup":
            self.warmup += 1
            return
        if ended.status == "ok":
            self.ok += 1
        elif ended.error_kind in LEFT:
            self.left += 1
        else:
            self.failed += 1
            self.last_error = ended.error_kind or ended.status
        span = token_span_s(ended.chunk_us, ended.chunk_kinds)
        tokens = ended.output_tokens or 0
        ttft = tpot = None
        if span is not None and ended.status == "ok":
            ttft = span[0]
            choices = 1 + max((choice for choice, _ in ended.chunk_choice or ()), default=0)
            later = tokens - choices * _first_tokens(ended)
            tpot = choices * (span[1] - span[0]) / later if later > 0 else None  # as if all choices kept step
        self._newest.append((ended.ended_at, ttft, tpot, tokens))

    def recent(self, now: float, began: float) -> Recent:
        """The last LAST_S before ``now``, or as much of them as lies after ``began``; seconds of the run's clock."""
        start = max(now - LAST_S, began)
        if len(self._newest) == LONGEST:
            start = max(start, self._newest[0][0])
        kept = [row for row in self._newest if row[0] >= start]
        length = max(now - start, 1e-3)
        ttfts = sorted(ttft for _, ttft, _, _ in kept if ttft is not None)
        tpots = sorted(tpot for _, _, tpot, _ in kept if tpot is not None)
        return Recent(
            requests_per_s=len(kept) / length,
            tokens_per_s=sum(tokens for *_, tokens in kept) / length,
            ttft_p50=_quantile(ttfts, 0.5),
            ttft_p95=_quantile(ttfts, 0.95),
            tpot_p50=_quantile(tpots, 0.5),
        )


@dataclass(frozen=True)
class Moment:
    """Where the run is. Seconds on the run's clock."""

    at: float
    began: float | None  # of the measuring window; None: still warming up
    ended: float | None  # of the window; what still runs is drained
    users: int
    in_flight: int | None  # None: the workers know


def lines(title: str, load: Load, moment: Moment, figures: Figures, server: dict[str, float]) -> RenderableType:
    """What is drawn: a row a subject, the progress bar above."""
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True, style="dim")
    table.add_column(no_wrap=True, overflow="ellipsis")
    done, words = progress(load, moment, figures)
    bar = Table.grid(padding=(0, 2, 0, 0))
    bar.add_row(ProgressBar(total=1.0, completed=done, width=32), Text(words, no_wrap=True, overflow="ellipsis"))
    table.add_row("load", Text(load_words(load, moment)))
    if moment.began is not None:
        recent = figures.recent(moment.at, moment.began)
        table.add_row("last 10 s", Text(recent_words(recent)))
    failed = f", {figures.failed:,} failed" if figures.failed else ""
    failed += f" (last: {plain(figures.last_error)[:60]})" if figures.last_error else ""
    left = f", {figures.left:,} left by their users" if figures.left else ""
    warmup = f", {figures.warmup:,} to warm up" if figures.warmup else ""
    table.add_row(
        "requests", Text(f"{figures.ok:,} ok{failed}{left}{warmup}", style="yellow" if figures.failed else "")
    )
    if server:
        table.add_row("server", Text(server_words(server)))
    if figures.readers:
        readers = "/".join(sorted(set(figures.readers.values())))
        lag = max(figures.lag_s.values())
        table.add_row("load generator", Text(f"{readers} reader, loop at most {_ms(lag)} ms late in the last second"))
    return Group(Text(plain(title), style="bold", no_wrap=True, overflow="ellipsis"), bar, table)


def progress(load: Load, moment: Moment, figures: Figures) -> tuple[float, str]:
    """The share that is done, and how to say it."""
    if moment.began is None:
        return 0.0, "warming up"
    if moment.ended is not None:
        left = max(0.0, moment.ended + load.drain_s - moment.at)
        return 1.0, f"running streams may go on for {left:.0f} s; Ctrl-C cuts them off"
    passed, length = max(0.0, moment.at - moment.began), length_s(load)
    by_time = min(1.0, passed / length)
    left = max(0.0, length - passed)
    if load.requests == "none":
        return by_time, f"{passed:.0f} of {length:g} s, {left:.0f} s left"
    ended = figures.ok + figures.failed + figures.left
    words = f"{ended:,} of {load.requests:,} requests, {passed:.0f} of at most {length:g} s"
    return max(by_time, min(1.0, ended / load.requests)), words


def load_words(load: Load, moment: Moment) -> str:
    """What is asked of the server just now."""
    passed = max(0.0, moment.at - moment.began) if moment.began is not None else 0.0
    words = f"{moment.users:,} users"
    if load.shape == "steps":
        ends = list(accumulate(hold for _, hold in load.steps))
        level = min(sum(end <= passed for end in ends), len(ends) - 1)
        words = f"level {level + 1} of {len(ends)}, {words}"
    elif load.shape == "rate":
        words = f"{due_rate(load.rate, passed):.4g} requests/s due"
    elif load.shape == "batch":
        words = f"batches of {load.batch:,}"
    elif load.shape == "trace":
        words = "as in the trace"
    return words + (f", {moment.in_flight:,} in flight" if moment.in_flight is not None else "")


def due_rate(rate: float | Sequence[tuple[float, float]], passed: float) -> float:
    """Requests/s due so many seconds after the window began: straight lines through the points, level beyond them."""
    points = [(0.0, rate)] if isinstance(rate, int | float) else list(rate)
    for (before, low), (after, high) in pairwise(points):
        if before <= passed < after:
            return low + (high - low) * (passed - before) / (after - before)
    return points[0][1] if passed < points[0][0] else points[-1][1]


def recent_words(recent: Recent) -> str:
    """The figures of the requests that have just ended."""
    ttft = f"TTFT p50 {_ms(recent.ttft_p50)}, p95 {_ms(recent.ttft_p95)} ms"
    rates = f"{recent.tokens_per_s:,.0f} tokens/s, {recent.requests_per_s:,.1f} requests/s"
    return f"{rates}, {ttft}, TPOT p50 {_ms(recent.tpot_p50)} ms"


def server_words(gauges: dict[str, float]) -> str:
    """What the server's page said last."""
    parts = [f"{gauges[gauge]:,.0f} {gauge}" for gauge in ("running", "waiting") if gauge in gauges]
    if "kv_cache_usage" in gauges:
        parts.append(f"KV cache {gauges['kv_cache_usage']:.0%}")
    return ", ".join(parts)


class LiveView:
    """Draws at the foot of the terminal; log lines go above it. To be stopped before anything else is printed."""

    def __init__(self, title: str, load: Load, samples: Path) -> None:
        self.title, self.load = title, load
        self.figures, self.gauges = Figures(), ServerGauges(samples)
        self._live = Live(auto_refresh=False, transient=True, redirect_stderr=sys.stderr.isatty())
        self._live.start()
        # Locust's handlers hold on to the stream that was there when they were made
        self._streams: list[tuple[logging.StreamHandler[Any], Any]] = [
            (handler, handler.setStream(sys.stdout)) for handler in _terminal_handlers()
        ]
        atexit.register(self.stop)  # the cursor must come back

    def refresh(self, moment: Moment) -> None:
        """Draw anew."""
        self._live.update(lines(self.title, self.load, moment, self.figures, self.gauges.read()), refresh=True)

    def stop(self) -> None:
        """Take it off the terminal. A second time does nothing."""
        for handler, stream in self._streams:
            handler.setStream(stream)
        self._streams = []
        with contextlib.suppress(OSError):  # a terminal that is gone needs no cursor
            self._live.stop()
        atexit.unregister(self.stop)


def _terminal_handlers() -> Iterator["logging.StreamHandler[Any]"]:
    """Those that write to a terminal, of all loggers, each once."""
    named = [logger for logger in logging.root.manager.loggerDict.values() if isinstance(logger, logging.Logger)]
    handlers = dict.fromkeys(handler for logger in (logging.root, *named) for handler in logger.handlers)
    for handler in handlers:
        if type(handler) is logging.StreamHandler and handler.stream.isatty():
            yield handler


def _first_tokens(ended: _Ended) -> int:
    """Tokens of the first token chunk, one where nobody says."""
    place = 0
    for kind, run in ended.chunk_kinds:
        if kind in TOKEN_KINDS:
            break
        place += run
    return (ended.chunk_tokens[place] if ended.chunk_tokens else None) or 1


def _quantile(ordered: Sequence[float], q: float) -> float | None:
    return ordered[min(len(ordered) - 1, round(q * (len(ordered) - 1)))] if ordered else None


def _ms(seconds: float | None) -> str:
    if seconds is None:
        return "–"
    return f"{seconds * 1e3:,.0f}" if seconds >= 0.1 else f"{seconds * 1e3:.1f}"
