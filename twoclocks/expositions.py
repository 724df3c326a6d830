"""Expositions: the scraped /metrics samples -> statistics of the window between two scrapes.

Reads server_samples.jsonl, in which a line holds only what changed, back into one matrix a URL. Histograms are read as
differences between two scrapes, series by series first and summed afterwards; a mean is exact, a percentile is an
interval. Bounds are read from the ``le`` labels and never assumed: vLLM lets its users choose them.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from twoclocks.errors import RunFolderError
from twoclocks.metrics import Bools, Floats

Labels = tuple[tuple[str, str], ...]
Series = tuple[str, Labels]

HISTOGRAMS: dict[str, tuple[tuple[str, ...], str]] = {
    "ttft": (
        ("vllm:time_to_first_token_seconds",),
        "arrival at the API server (since vLLM 0.17 before templating and tokenizing, until 0.16 after) -> first "
        "output taken from the engine; queue in; no detokenizing or delivery. One observation a request, "
        "aborted ones too",
    ),
    "itl": (
        ("vllm:inter_token_latency_seconds", "vllm:time_per_output_token_seconds"),
        "engine step -> next engine step of the request. One observation a step, however many tokens it gave",
    ),
    "tpot": (
        ("vllm:request_time_per_output_token_seconds",),
        "(last - first token in the engine) / (output tokens - 1). One observation a finished request; 0 for one token",
    ),
    "e2e": (
        ("vllm:e2e_request_latency_seconds",),
        "arrival at the API server -> last output taken from the engine. One observation a finished request",
    ),
    "queue": (("vllm:request_queue_time_seconds",), "scheduler has the request -> first scheduled"),
    "prefill": (("vllm:request_prefill_time_seconds",), "first scheduled -> first token in the engine"),
    "decode": (("vllm:request_decode_time_seconds",), "first -> last token in the engine"),
}
"""Metric -> its names in /metrics, newest first, and what starts and stops the server's clock."""

COUNTERS: dict[str, tuple[str, ...]] = {
    "generation_tokens": ("vllm:generation_tokens_total",),
    "prompt_tokens": ("vllm:prompt_tokens_total",),
}
GAUGES: dict[str, tuple[str, ...]] = {
    "running": ("vllm:num_requests_running",),
    "waiting": ("vllm:num_requests_waiting",),
    "kv_cache_usage": ("vllm:kv_cache_usage_perc", "vllm:gpu_cache_usage_perc"),
}


@dataclass(frozen=True)
class Scrapes:
    """The good scrapes of one URL. ``values``: a row a scrape, a column a series, NaN while a series was absent."""

    url: str
    types: dict[str, str]  # family -> counter, gauge, histogram, summary or untyped
    series: list[Series]
    at: Floats  # when the scrape was begun, seconds on the run's clock
    until: Floats  # when its answer had come
    values: Floats
    failed: list[tuple[float, str]]  # when, and why


@dataclass(frozen=True)
class Interval:
    """A percentile read from buckets: surely inside (lower, upper); estimate is None where a guess would mislead."""

    lower: float
    estimate: float | None
    upper: float


@dataclass(frozen=True)
class Distribution:
    """What a histogram gained between two scrapes."""

    count: float
    sum: float
    bounds: Floats  # upper bounds of the buckets, the last one infinite
    counts: Floats  # observations inside each bucket

    @property
    def mean(self) -> float:
        """Sum / count, exact; NaN without observations."""
        return self.sum / self.count if self.count else math.nan

    def percentile(self, p: float) -> Interval | None:
        """The bucket of rank p x count (p in 0..1), and the linear interpolation inside it.

        No estimate in the first bucket, which reaches from 0 and is often far wider than what lies in it (vLLM's queue
        and prefill: 0-0.3 s), nor in the last, which has no end. None without observations.
        """
        total = float(self.counts.sum())
        if total <= 0:
            return None
        cumulative = np.cumsum(self.counts)
        rank = p * total
        index = int(np.searchsorted(cumulative, rank))
        while self.counts[index] == 0:  # rank on the edge of an empty bucket
            index += 1
        lower = 0.0 if index == 0 else float(self.bounds[index - 1])
        upper = float(self.bounds[index])
        if index == 0 or math.isinf(upper):
            return Interval(lower, None, upper)
        below = float(cumulative[index] - self.counts[index])
        return Interval(lower, lower + (rank - below) / float(self.counts[index]) * (upper - lower), upper)


class _Line(msgspec.Struct):
    url: str
    at: float
    until: float
    types: dict[str, str] | None = None
    samples: list[tuple[str, dict[str, str], float | None]] = []
    gone: list[tuple[str, dict[str, str]]] = []
    error: str | None = None


def read_scrapes(path: Path) -> list[Scrapes]:
    """The scrapes in a server_samples.jsonl, one entry a URL; an empty list if the file is not there.

    A last line without its newline was being written when the run was killed, and is left out.
    Raises RunFolderError for any other line that cannot be read.
    """
    if not path.exists():
        return []
    decoder = msgspec.json.Decoder(_Line)
    lines: dict[str, list[_Line]] = {}
    with path.open("rb") as file:
        for number, text in enumerate(file, 1):
            if not text.endswith(b"\n"):
                break
            try:
                line = decoder.decode(text)
            except (msgspec.DecodeError, UnicodeDecodeError) as error:
                raise RunFolderError(f"{path} line {number} is no scrape: {error}") from None
            lines.setdefault(line.url, []).append(line)
    return [_fill(url, of_url) for url, of_url in lines.items()]


def _fill(url: str, lines: list[_Line]) -> Scrapes:
    """Forward-fill: a series keeps its value until a line changes it or says that it is gone."""
    good = [line for line in lines if line.error is None]
    columns: dict[Series, int] = {}
    for line in good:
        for name, labels, _ in line.samples:
            columns.setdefault((name, _key(labels)), len(columns))
    values = np.full((len(good), len(columns)), np.nan)
    current = np.full(len(columns), np.nan)
    for row, line in enumerate(good):
        for name, labels in line.gone:
            if (column := columns.get((name, _key(labels)))) is not None:
                current[column] = np.nan
        for name, labels, value in line.samples:
            current[columns[name, _key(labels)]] = math.nan if value is None else value
        values[row] = current
    return Scrapes(
        url=url,
        types=next((line.types for line in lines if line.types), {}),
        series=list(columns),
        at=np.array([line.at for line in good]),
        until=np.array([line.until for line in good]),
        values=values,
        failed=[(line.at, line.error) for line in lines if line.error is not None],
    )


def quiet_scrape(scrapes: Scrapes, before: float, sent_at: Floats, ended_at: Floats) -> int:
    """Row of the last scrape done by ``before`` while no request of ours was under way, else of the first one.

    Counting from there leaves the warm-up out without cutting any request in two.
    """
    for row in range(len(scrapes.at) - 1, 0, -1):
        if scrapes.until[row] > before:
            continue
        if not ((sent_at <= scrapes.until[row]) & (ended_at >= scrapes.at[row])).any():
            return row
    return 0


def restarted(scrapes: Scrapes, first: int = 0) -> bool:
    """Whether the server restarted after row ``first``: a counter fell, or its process or a series was created anew."""
    if len(scrapes.at) - first < 2:
        return False
    monotone = np.array([_monotone(name, scrapes.types) for name, _ in scrapes.series], dtype=bool)
    births = np.array(
        [name.endswith("_created") or name == "process_start_time_seconds" for name, _ in scrapes.series], dtype=bool
    )
    with np.errstate(invalid="ignore"):
        steps = np.diff(scrapes.values[first:], axis=0)
        return bool((steps[:, monotone] < 0).any() or (steps[:, births] != 0)[~np.isnan(steps[:, births])].any())


def histogram_delta(scrapes: Sequence[Scrapes], firsts: Sequence[int], metric: str) -> Distribution | None:
    """What a histogram of HISTOGRAMS gained from row ``firsts[i]`` to the last row of each URL, over all its labels.

    None if no URL has it, if a server restarted, or if its bounds changed: then there is no true difference.
    """
    for name in HISTOGRAMS[metric][0]:
        gained = _histogram(scrapes, firsts, name)
        if gained is not None:
            return gained
    return None


def counter_delta(scrapes: Sequence[Scrapes], firsts: Sequence[int], counter: str) -> float | None:
    """How far a counter of COUNTERS rose between the two rows, summed over URLs and labels; None if unknown."""
    for name in COUNTERS[counter]:
        total, found = 0.0, False
        for one, first in zip(scrapes, firsts, strict=True):
            columns = [i for i, (series, _) in enumerate(one.series) if series == name]
            if not columns or len(one.at) - first < 2:
                continue
            if restarted(one, first):
                return None
            found = True
            total += float(_delta(one, first, columns).sum())
        if found:
            return total
    return None


def gauge(scrapes: Scrapes, name: str) -> tuple[Floats, Floats] | None:
    """(times, values) of a gauge of GAUGES: the sum over engines, for KV usage their mean; None if absent."""
    for candidate in GAUGES[name]:
        columns = [i for i, (series, _) in enumerate(scrapes.series) if series == candidate]
        if columns:
            values = scrapes.values[:, columns]
            seen = ~np.isnan(values).all(axis=1)
            combine = np.nanmean if name == "kv_cache_usage" else np.nansum
            return scrapes.at[seen], combine(values[seen], axis=1)
    return None


def _histogram(scrapes: Sequence[Scrapes], firsts: Sequence[int], name: str) -> Distribution | None:
    buckets: dict[float, float] = {}
    count = total = 0.0
    found = False
    for one, first in zip(scrapes, firsts, strict=True):
        columns = {suffix: _columns(one, name + suffix) for suffix in ("_bucket", "_count", "_sum")}
        if not columns["_count"] or len(one.at) - first < 2:
            continue
        if restarted(one, first) or _bounds_changed(one, first, columns["_bucket"]):
            return None
        found = True
        count += float(_delta(one, first, columns["_count"]).sum())
        total += float(_delta(one, first, columns["_sum"]).sum())
        for column, gained in zip(columns["_bucket"], _delta(one, first, columns["_bucket"]), strict=True):
            bound = float(dict(one.series[column][1])["le"])
            buckets[bound] = buckets.get(bound, 0.0) + float(gained)
    if not found:
        return None
    bounds = np.array(sorted(buckets))
    cumulative = np.array([buckets[bound] for bound in bounds])
    return Distribution(count, total, bounds, np.diff(cumulative, prepend=0.0))


def _columns(scrapes: Scrapes, name: str) -> list[int]:
    return [i for i, (series, _) in enumerate(scrapes.series) if series == name]


def _delta(scrapes: Scrapes, first: int, columns: list[int]) -> Floats:
    """Last row - row ``first``, a series at a time; one that was absent began at 0."""
    return np.asarray(np.nan_to_num(scrapes.values[-1, columns]) - np.nan_to_num(scrapes.values[first, columns]))


def _bounds_changed(scrapes: Scrapes, first: int, columns: list[int]) -> bool:
    """Whether a histogram that was there at ``first`` has other buckets at the end."""
    absent: Bools = np.isnan(scrapes.values[:, columns])
    was_there = {_without_le(scrapes.series[c]) for c, gone in zip(columns, absent[first], strict=True) if not gone}
    return any(
        now != before and _without_le(scrapes.series[column]) in was_there
        for column, before, now in zip(columns, absent[first], absent[-1], strict=True)
    )


def _without_le(series: Series) -> Labels:
    return tuple(label for label in series[1] if label[0] != "le")


def _monotone(name: str, types: dict[str, str]) -> bool:
    """Whether a series may never fall. Sums are left out: a float sum may lose a last digit."""
    for suffix in ("_total", "_count", "_bucket"):
        if name.endswith(suffix):
            kind = types.get(name) or types.get(name.removesuffix(suffix))
            return kind in ("counter", "histogram", "summary", None)
    return False


def _key(labels: dict[str, Any]) -> Labels:
    return tuple(sorted(labels.items()))


def label_text(labels: Labels) -> str:
    """Labels as an exposition writes them: ``engine="0",le="0.1"``."""
    return ",".join(f"{name}={json.dumps(value, ensure_ascii=False)}" for name, value in labels)
