"""Expositions: the scraped /metrics samples -> statistics of the window between two scrapes.

Reads server_samples.jsonl, in which a line holds only what changed, back into one matrix a URL. Histograms are read as
differences between two scrapes, series by series first and summed afterwards; a mean is exact, a percentile is an
interval. Bounds are read from the ``le`` labels and never assumed: vLLM lets its users choose them. What a page may
hold is not in our hands: a histogram that cannot be one gives no buckets and says why.
"""

import json
import math
from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from twoclocks.buckets import Distribution
from twoclocks.errors import RunFolderError
from twoclocks.metrics import Bools, Floats
from twoclocks.server_names import COUNTERS, GAUGES, HISTOGRAMS, INNER_HISTOGRAMS, Labels, Source

Series = tuple[str, Labels]
ALL_HISTOGRAMS = HISTOGRAMS | INNER_HISTOGRAMS
LARGEST = 1e30
"""No server tells more, in whatever unit: a value beyond it is taken for absent, so that sums of values stay finite."""
LARGEST_COUNT = 2.0**53
"""No histogram observed more."""


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

    @cached_property
    def columns(self) -> dict[str, list[int]]:
        """Sample name -> the columns of its series."""
        found: dict[str, list[int]] = {}
        for column, (name, _) in enumerate(self.series):
            found.setdefault(name, []).append(column)
        return found

    @cached_property
    def restarts(self) -> list[int]:
        """Rows that are the first of a new life of the server, in order.

        A counter fell, a process or series was created anew, a histogram came back with other buckets, or under the
        name of another version.
        """
        monotone = [column for name, of in self.columns.items() if _monotone(name, self.types) for column in of]
        births = [column for name, of in self.columns.items() if _birth(name, self.columns) for column in of]
        rows = self._rebuilt() | self._renamed()
        for step in self._steps(monotone):
            rows |= set((np.flatnonzero((step < 0).any(axis=1)) + 1).tolist())
        for step in self._steps(births):
            rows |= set((np.flatnonzero((np.abs(step) > 0).any(axis=1)) + 1).tolist())
        return sorted(rows)

    def _steps(self, columns: list[int]) -> Iterator[Floats]:
        """Differences from row to row of these columns, some at a time: all at once a long run would not fit twice."""
        for begin in range(0, len(columns), 256):
            with np.errstate(invalid="ignore", over="ignore"):
                yield np.diff(_filled(self.values[:, columns[begin : begin + 256]]), axis=0)

    def _rebuilt(self) -> set[int]:
        """Rows in which a histogram that had been there has other buckets than before."""
        buckets = [column for name, of in self.columns.items() if name.endswith("_bucket") for column in of]
        present: Bools = ~np.isnan(self.values[:, buckets])
        rows, changed = np.nonzero(present[1:] != present[:-1])
        if not len(rows):
            return set()
        groups: dict[Series, list[int]] = {}
        for index, column in enumerate(buckets):
            groups.setdefault(_without_le(self.series[column]), []).append(index)
        suspects = {(int(row), _without_le(self.series[buckets[i]])) for row, i in zip(rows, changed, strict=True)}
        # a whole histogram may appear or vanish; it is another one if both rows hold some of its buckets
        return {
            row + 1 for row, key in suspects if present[row, groups[key]].any() and present[row + 1, groups[key]].any()
        }

    def _renamed(self) -> set[int]:
        """Rows in which a metric appears under one of its names after it has vanished under another for good."""
        rows: set[int] = set()
        for sources, _ in ALL_HISTOGRAMS.values():
            columns = [self.columns.get(f"{name}_count", []) for name in dict.fromkeys(s.name for s in sources)]
            known = [np.asarray(~np.isnan(self.values[:, c]).all(axis=1)) for c in columns if c]
            if len(known) < 2:
                continue
            gone = [seen for seen in known if seen.any() and not seen[-1]]
            came = [int(np.argmax(seen)) for seen in known if seen[-1] and not seen[0]]
            rows |= {row for row in came if any(seen[:row].any() for seen in gone)}
        return rows


@dataclass(frozen=True)
class Engine:
    """One labelled series of a histogram at one URL: an engine, a rank or a replica."""

    url: str
    labels: Labels
    gained: Distribution


@dataclass(frozen=True)
class Gain:
    """How far a counter rose between two scrapes."""

    value: float
    error: float  # the value is known to within this: 0, but for counters that are printed with six digits
    names: tuple[str, ...]
    definition: str  # what or when it counts
    since_restart: bool


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
            is_possible = value is not None and abs(value) < LARGEST
            current[columns[name, _key(labels)]] = value if is_possible else math.nan
        values[row] = current
    return Scrapes(
        url=url,
        types={family: kind for line in lines for family, kind in (line.types or {}).items()},
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
    """Whether the server restarted after row ``first``; what counts as a restart: Scrapes.restarts."""
    return any(row > first for row in scrapes.restarts)


def histogram_delta(scrapes: Sequence[Scrapes], firsts: Sequence[int], metric: str) -> Distribution | None:
    """What a histogram gained from row ``firsts[i]`` to the last row of each URL, over all its labels: whole or none.

    Of several definitions the preferred one that gained anything. None if no URL has it, or if a server restarted:
    then there is no true difference over the window.
    """
    told = histogram_deltas(scrapes, firsts, metric)
    if any(gained.since_restart for gained in told):
        return None
    return next((gained for gained in told if gained.count), told[0] if told else None)


def histogram_deltas(scrapes: Sequence[Scrapes], firsts: Sequence[int], metric: str) -> list[Distribution]:
    """What a histogram of ALL_HISTOGRAMS gained, one entry a definition under which it was told.

    Of a server that restarted, what it gained from the first scrape after that on, marked ``since_restart``.
    """
    by_definition: dict[str, list[Distribution]] = {}
    for engine in per_engine(scrapes, firsts, metric):
        by_definition.setdefault(engine.gained.definition, []).append(engine.gained)
    missing = _missing(scrapes, firsts) if by_definition else ()
    summed = [_sum(parts) for parts in by_definition.values()]
    return [replace(gained, caveats=gained.caveats + missing) for gained in summed]


def per_engine(scrapes: Sequence[Scrapes], firsts: Sequence[int], metric: str) -> list[Engine]:
    """What each labelled series of a histogram gained, URL by URL: engines, ranks and replicas apart.

    A name of another version that tells the same at the same URL is left out; vLLM 0.11 tells its ITL twice.
    """
    engines: list[Engine] = []
    for one, first in zip(scrapes, firsts, strict=True):
        start = _start(one, first)
        if len(one.at) - start < 2:
            continue
        by_definition: dict[str, list[Engine]] = {}
        for source in ALL_HISTOGRAMS[metric][0]:
            told = _read(one, start, source)
            before = by_definition.get(source.definition, [])
            if told and not any(engine.gained.count for engine in before):
                by_definition[source.definition] = told
        after = f"the server at {one.url} restarted: counted from {one.at[start]:.1f} s of the run on"
        for engine in (engine for told in by_definition.values() for engine in told):
            if start > first:
                caveats = (after, *engine.gained.caveats)
                engine = replace(engine, gained=replace(engine.gained, since_restart=True, caveats=caveats))
            engines.append(engine)
    return engines


def counter_delta(scrapes: Sequence[Scrapes], firsts: Sequence[int], counter: str) -> float | None:
    """How far a counter of COUNTERS rose between the two rows, summed over URLs and labels; None if unknown."""
    gain = counter_gain(scrapes, firsts, counter)
    return None if gain is None or gain.since_restart else gain.value


def counter_gain(scrapes: Sequence[Scrapes], firsts: Sequence[int], counter: str) -> Gain | None:
    """As counter_delta, with its error and its names; of a server that restarted, since then. None if no URL has it."""
    value = error = 0.0
    names: dict[str, str] = {}
    since_restart = False
    for one, first in zip(scrapes, firsts, strict=True):
        start = _start(one, first)
        name = next((name for name in COUNTERS[counter] if name in one.columns), None)
        if name is None or len(one.at) - first < 2:
            continue
        columns = one.columns[name]
        begin, end = _ends(one, start, columns)
        value += float((end - begin).sum())
        error += float(_rounding(name, begin).sum() + _rounding(name, end).sum())
        names[name] = COUNTERS[counter][name]
        since_restart |= start > first
    return Gain(value, error, tuple(names), "; ".join(dict.fromkeys(names.values())), since_restart) if names else None


def gauge(scrapes: Scrapes, name: str) -> tuple[Floats, Floats] | None:
    """(times, values) of a gauge of GAUGES: the sum over engines, for KV usage their mean; None if absent."""
    for candidate in GAUGES[name]:
        if columns := scrapes.columns.get(candidate):
            values = scrapes.values[:, columns]
            seen = ~np.isnan(values).all(axis=1)
            combine = np.nanmean if name == "kv_cache_usage" else np.nansum
            return scrapes.at[seen], combine(values[seen], axis=1)
    return None


def side_effects(scrapes: Sequence[Scrapes]) -> list[str]:
    """Where our scraping changed what it read, or what others read, or read now one server and now another."""
    told = []
    for one in scrapes:
        if {"llamacpp:prompt_tokens_seconds", "llamacpp:predicted_tokens_seconds"} & one.columns.keys():
            told.append(
                f"llama.cpp at {one.url}: its gauges prompt_tokens_seconds and predicted_tokens_seconds tell of the "
                "time since the last scrape, whoever made it: ours reset them for others, and those of others for us."
            )
        if any(_is_json(why) for _, why in one.failed):
            told.append(
                f"{one.url} answers JSON and no Prometheus text. If it is TensorRT-LLM's /metrics, that is a queue "
                "which reading empties: our scrapes took from whoever else reads it. Give its /prometheus/metrics in "
                "collect.metrics_url."
            )
        if _alternates(one):
            told.append(
                f"{one.url} was answered now by one server process and now by another: it is a balanced address, whose "
                "counters cannot be subtracted. Give the address of each replica in collect.metrics_url."
            )
    return told


def _is_json(why: str) -> bool:
    """Whether a page that failed to parse was JSON: the parser's words for [] and for a list of objects."""
    return "invalid metric name:[" in why or 'Invalid labels: "' in why


def _alternates(one: Scrapes) -> bool:
    """Whether a process whose place another had taken is back again."""
    for column in one.columns.get("process_start_time_seconds", []):
        starts = one.values[:, column]
        starts = starts[~np.isnan(starts)]
        changes = starts[np.concatenate([[True], np.diff(starts) != 0])] if len(starts) else starts
        if len(changes) > len(np.unique(changes)):
            return True
    return False


def _start(one: Scrapes, first: int) -> int:
    """The row from which differences are true: ``first``, or the first one after the last restart."""
    return max([first, *one.restarts])


def _missing(scrapes: Sequence[Scrapes], firsts: Sequence[int]) -> tuple[str, ...]:
    """The URLs of which there are no two scrapes to tell apart."""
    return tuple(
        f"{one.url} is not in it: fewer than two good scrapes of one life of the server"
        for one, first in zip(scrapes, firsts, strict=True)
        if len(one.at) - _start(one, first) < 2
    )


def _read(one: Scrapes, start: int, source: Source) -> list[Engine]:
    """What each series of a source gained from row ``start`` on."""
    counts = _chosen(one, source.per or f"{source.name}_count", source.where)
    sums = _chosen(one, source.name if source.per else f"{source.name}_sum", source.where)
    buckets: dict[Labels, list[int]] = {}
    for column in [] if source.per else one.columns.get(f"{source.name}_bucket", []):
        buckets.setdefault(_without_le(one.series[column])[1], []).append(column)
    engines = []
    for labels, column in counts.items():
        columns = [column, *([sums[labels]] if labels in sums else [])]
        if np.isnan(one.values[start:, column]).all():
            continue
        begin, end = _ends(one, start, columns)
        gains = end - begin
        count, total = float(gains[0]), float(gains[1]) if len(gains) > 1 else math.nan
        caveats = []
        if np.isnan(one.values[-1, column]):
            caveats.append(f"a series of {source.name} vanished from {one.url}: counted up to its last scrape")
        if not 0 <= count < LARGEST_COUNT:
            caveats.append(f"{source.name} at {one.url} counts what cannot be ({count:g}), so that it tells nothing")
            count, total = 0.0, math.nan
        bounds, inside = np.array([]), np.array([])
        if count and labels in buckets:
            bounds, inside, wrong = _buckets(one, start, buckets[labels], count)
            caveats += [f"the buckets of {source.name} at {one.url} are left out: {wrong}"] if wrong else []
        error = 0.0
        if source.per and count:
            off_count = _rounding(source.per, begin[:1]) + _rounding(source.per, end[:1])
            off_sum = _rounding(source.name, begin[1:]) + _rounding(source.name, end[1:])
            error = float((off_sum.sum() + abs(total / count) * off_count.sum()) / count)
        gained = Distribution(
            count, total, bounds, inside, (source.name,), source.definition, source.beside, False, tuple(caveats), error
        )
        engines.append(Engine(one.url, labels, gained))
    return engines


def _buckets(one: Scrapes, start: int, columns: list[int], count: float) -> tuple[Floats, Floats, str]:
    """(bounds, observations inside each, what is wrong with them): nothing but the last where it is no histogram."""
    bounds = np.array([_bound(one.series[column]) for column in columns])
    order = np.argsort(bounds)
    bounds = bounds[order]
    begin, end = _ends(one, start, [columns[i] for i in order])
    cumulative = end - begin
    nothing = np.array([])
    if np.isnan(bounds).any():
        return nothing, nothing, "a bound is no number"
    if (np.diff(bounds) == 0).any() or math.isinf(bounds[0]):
        return nothing, nothing, "a bound stands twice" if len(bounds) > 1 else "there is only one, without an end"
    if not math.isinf(bounds[-1]):
        bounds, cumulative = np.append(bounds, math.inf), np.append(cumulative, count)
    inside = np.diff(cumulative, prepend=0.0)
    if not np.isfinite(inside).all() or (inside < 0).any():
        return nothing, nothing, "a bucket holds less than the one inside it"
    if abs(float(cumulative[-1]) - count) > max(1.0, 0.01 * count):
        return nothing, nothing, f"they hold {cumulative[-1]:g} observations, the histogram counts {count:g}"
    return bounds, inside, ""


def _sum(parts: Sequence[Distribution]) -> Distribution:
    """All of these, which have one definition, as one; on the bounds that all have, where a sum of buckets is exact."""
    telling = [part for part in parts if part.count] or list(parts[:1])
    bounds = telling[0].bounds
    for part in telling[1:]:
        bounds = bounds[np.isin(bounds, part.bounds)]
    cumulative = np.zeros(len(bounds))
    for part in telling:
        cumulative += np.cumsum(part.counts)[np.searchsorted(part.bounds, bounds)] if len(bounds) else 0.0
    count = sum(part.count for part in telling)
    return Distribution(
        count=count,
        sum=sum(part.sum for part in telling),
        bounds=bounds,
        counts=np.diff(cumulative, prepend=0.0),
        names=tuple(dict.fromkeys(name for part in parts for name in part.names)),
        definition=parts[0].definition,
        beside=parts[0].beside,
        since_restart=any(part.since_restart for part in parts),
        caveats=tuple(dict.fromkeys(caveat for part in parts for caveat in part.caveats)),
        mean_error=sum(part.mean_error * part.count for part in telling) / count if count else 0.0,
    )


def _chosen(one: Scrapes, name: str, where: Labels) -> dict[Labels, int]:
    """Labels -> column of the series of this name that carry the wanted labels."""
    wanted = set(where)
    return {one.series[c][1]: c for c in one.columns.get(name, []) if wanted <= set(one.series[c][1])}


def _ends(one: Scrapes, start: int, columns: Sequence[int]) -> tuple[Floats, Floats]:
    """(values in row ``start``, last known values): a series that was absent began at 0, one that vanished stopped."""
    rows = one.values[start:][:, columns]
    return np.nan_to_num(rows[0]), np.nan_to_num(_filled(rows)[-1])


def _filled(values: Floats) -> Floats:
    """With each column's last known value where it is NaN."""
    rows = np.where(np.isnan(values), 0, np.arange(len(values))[:, np.newaxis])
    return np.asarray(np.take_along_axis(values, np.maximum.accumulate(rows, axis=0), axis=0))


def _rounding(name: str, values: Floats) -> Floats:
    """How far a value may be off as it was printed: llama.cpp prints six digits, so whole counts below 1e6 in full."""
    if not name.startswith("llamacpp:"):
        return np.zeros(len(values))
    digits = np.floor(np.log10(np.maximum(np.abs(values), 1e-6))) - 5
    return np.where((digits < 1) & ("seconds" not in name) | (values == 0), 0.0, 0.5 * 10.0**digits)


def _without_le(series: Series) -> Series:
    return series[0], tuple(label for label in series[1] if label[0] != "le")


def _bound(series: Series) -> float:
    """The bucket's upper bound; NaN where its label is no number."""
    try:
        return float(dict(series[1])["le"])
    except (KeyError, ValueError):
        return math.nan


_MONOTONE = frozenset(name for names in COUNTERS.values() for name in names if not name.endswith("_sum"))


def _monotone(name: str, types: dict[str, str]) -> bool:
    """Whether a series may never fall. Sums are left out: a float sum may lose a last digit."""
    if name in _MONOTONE:
        return True
    for suffix in ("_total", "_count", "_bucket"):
        if name.endswith(suffix):
            kind = types.get(name) or types.get(name.removesuffix(suffix))
            return kind in ("counter", "histogram", "summary", None)
    return False


def _birth(name: str, names: Container[str]) -> bool:
    """Whether a series tells when a process or another series was created; a count of things created is no birth."""
    family = name.removesuffix("_created")
    return name == "process_start_time_seconds" or (
        family != name and any(family + suffix in names for suffix in ("_total", "_count"))
    )


def _key(labels: dict[str, Any]) -> Labels:
    return tuple(sorted(labels.items()))


def label_text(labels: Labels) -> str:
    """Labels as an exposition writes them: ``engine="0",le="0.1"``."""
    return ",".join(f"{name}={json.dumps(value, ensure_ascii=False)}" for name, value in labels)
