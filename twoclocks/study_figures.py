"""Study figures: an arm -> its figures by name (ttft.p50, output_throughput, memory.kv_used_peak, ...), with intervals.

Pure. A figure keeps the values that it was made of, so that a ratio of any two has an interval too. Seconds; what is
not known is absent or None.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd

from twoclocks import expositions, intervals, metrics
from twoclocks.clocks import CLOCKS
from twoclocks.figures import batches_of
from twoclocks.load import Run
from twoclocks.metrics import Floats, Ints, definition
from twoclocks.record import LEFT
from twoclocks.samples import stretches
from twoclocks.study_arms import MOST, Arm, Pooled, blocks

PERCENTILES = (50, 95, 99)
LATENCIES = {
    "ttft": ("TTFT", metrics.ttft),
    "tpot": ("TPOT", metrics.tpot),
    "e2e": ("E2E", metrics.e2e),
}
RATES: dict[str, tuple[str, str, Callable[..., Any]]] = {
    "output_throughput": ("output tokens/s", "tokens/s", metrics.output_throughput),
    "request_throughput": ("requests/s", "requests/s", metrics.request_throughput),
}
MEMORY = {
    "weights": "weights",
    "weights_on_disk": "weights on disk",
    "kv_reserved": "KV cache reserved",
    "kv_used_peak": "KV cache used, peak",
    "process_rss_peak": "resident memory of the processes, peak",
    "process_pss_peak": "proportional memory of the processes, peak",
    "allocator_peak": "torch's allocator, peak",
    "gpu_used_peak": "GPU memory in use, peak",
}


@dataclass(frozen=True)
class Sample:
    """What a figure was made of: its values, a repeat each, and the request that each value is of."""

    statistic: str  # of intervals.STATISTICS
    values: list[Floats]
    units: list[Ints] | None = None  # where a request has many values


@dataclass(frozen=True)
class Figure:
    """One quantity of an arm."""

    value: float | None
    unit: str
    label: str
    definition: str
    n: int | None = None  # requests, gaps, batches or samples behind it
    by_repeat: list[float | None] = field(default_factory=list)  # in order of time
    sample: Sample | None = None  # None: it has no interval
    is_duration: bool = False  # more is slower; otherwise more is simply more

    @cached_property
    def interval(self) -> intervals.Interval | None:
        """95 %; None where too little is behind it."""
        if self.sample is None:
            return None
        return intervals.estimate(self.sample.values, self.sample.statistic, units=self.sample.units)

    def told(self) -> dict[str, Any]:
        """As summary.json holds it."""
        low, high = (self.interval.low, self.interval.high) if self.interval else (None, None)
        return {
            "value": self.value, "low": low, "high": high, "unit": self.unit, "n": self.n,
            "by_repeat": self.by_repeat, "label": self.label, "definition": self.definition,
        }  # fmt: skip


def ratio(first: Figure, other: Figure, level: float = 0.95) -> intervals.Interval | None:
    """other / first with its interval, each side by itself; None where one of them has none."""
    a, b = first.sample, other.sample
    if a is None or b is None:
        return None
    units = (a.units, b.units) if a.units is not None and b.units is not None else None
    return intervals.ratio(a.values, b.values, a.statistic, level=level, units=units)


def difference(first: Figure, other: Figure) -> intervals.Interval | None:
    """other - first, likewise."""
    a, b = first.sample, other.sample
    if a is None or b is None:
        return None
    units = (a.units, b.units) if a.units is not None and b.units is not None else None
    return intervals.difference(a.values, b.values, a.statistic, units=units)


def figures(arm: Arm, pool: Pooled) -> dict[str, Figure]:
    """Every figure of an arm that there is."""
    if arm.sweeps:
        return _sweeps(arm)
    if not arm.runs:
        return {}
    found = _requests(pool, len(arm.runs)) | _latencies(pool) | _throughputs(arm.runs)
    return found | _batches(arm) | _goodput(arm) | _server(pool) | _kv(arm) | _memory(arm)


def _requests(pool: Pooled, repeats: int) -> dict[str, Figure]:
    status, repeat = pool.measured["status"], pool.measured["repeat"]
    cut = (status == "cancelled") & ~pool.measured["error_kind"].isin(LEFT)
    kinds = {
        "requests": ("requests", "measured requests: sent in the measuring window, warm-up left out", status.notna()),
        "requests.ok": ("requests ok", "measured requests whose stream came to its proper end", status == "ok"),
        "requests.failed": ("failed", "measured requests that failed", ~status.isin(["ok", "cancelled"])),
        "requests.cancelled": ("cut off at the end", "requests that this tool cut off", cut),
    }  # fmt: skip
    return {
        name: Figure(
            int(mask.sum()), "requests", label, meaning,
            by_repeat=[int((mask & (repeat == number)).sum()) for number in range(repeats)],
        )
        for name, (label, meaning, mask) in kinds.items()
    }  # fmt: skip


def _latencies(pool: Pooled) -> dict[str, Figure]:
    found: dict[str, Figure] = {}
    repeat, drawn = (pool.measured[column].to_numpy() for column in ("repeat", "drawn_with"))
    for name, (label, function) in LATENCIES.items():
        found |= _of_requests(pool.ok, name, name, label, definition(function))
    gaps = pool.gaps
    found |= spread("itl", "ITL", "s", definition(metrics.chunk_gaps), gaps.seconds, gaps.request, repeat, drawn, True)
    ok = pool.ok
    rates = metrics.stream_throughput(ok["e2e"].to_numpy(), ok["output_tokens"].to_numpy())
    rows, meaning = np.arange(len(ok)), definition(metrics.stream_throughput)
    return found | spread(
        "stream_throughput", "tokens/s of one request", "tokens/s", meaning, rates, rows, ok["repeat"].to_numpy(),
        ok["drawn_with"].to_numpy(),
    )  # fmt: skip


def _of_requests(ok: pd.DataFrame, column: str, name: str, label: str, meaning: str) -> dict[str, Figure]:
    """Mean and percentiles of a column of seconds over requests."""
    values = ok[column].to_numpy(dtype=np.float64)
    repeat, drawn = ok["repeat"].to_numpy(), ok["drawn_with"].to_numpy()
    return spread(name, label, "s", meaning, values, np.arange(len(ok)), repeat, drawn, True)


def spread(
    name: str, label: str, unit: str, meaning: str, values: Floats, request: Any, repeats: Ints, drawn_with: Ints,
    is_duration: bool = False,
) -> dict[str, Figure]:  # fmt: skip
    """Mean and percentiles of values.

    ``request``: the row, in ``repeats`` and ``drawn_with``, of the request that each value belongs to.
    """
    known = ~np.isnan(values)
    values, rows = values[known], np.asarray(request)[known]
    if not len(values):
        return {}
    of_repeat = repeats[rows]
    places = [np.flatnonzero(of_repeat == one) for one in np.unique(of_repeat)]
    groups, units = [values[place] for place in places], [drawn_with[rows[place]] for place in places]
    # Requests of a batch end nearly alike, so that of percentiles each batch is one value, however many are in it.
    together = len(np.unique(drawn_with)) if len(np.unique(drawn_with)) < len(drawn_with) else len(values)
    found = {}
    for statistic in ("mean", *(f"p{p}" for p in PERCENTILES)):
        reduce = intervals.STATISTICS[statistic]
        enough = together >= intervals.least(statistic)
        found[f"{name}.{statistic}"] = Figure(
            float(reduce(values)), unit, f"{label} {statistic}", meaning, len(values),
            [float(reduce(group)) for group in groups], Sample(statistic, groups, units) if enough else None,
            is_duration,
        )  # fmt: skip
    return found


def _throughputs(runs: Sequence[Run]) -> dict[str, Figure]:
    """Tokens and requests per second of the measuring windows; every run weighs the same."""
    counts = [count for run in runs if (count := stretches(run))]
    parts = [of_run for run in runs if (of_run := blocks(run, min(counts, default=None)))]
    if not parts:
        return {}
    return {
        name: rate(label, unit, f"{definition(function).rstrip('.')}; mean of the repeats", [of[name] for of in parts])
        for name, (label, unit, function) in RATES.items()
    }


def rate(label: str, unit: str, meaning: str, parts: list[Floats]) -> Figure:
    """A throughput of runs, of which ``parts`` are the blocks; no interval where most blocks saw nothing."""
    each: list[float | None] = [float(part.mean()) for part in parts]
    enough = np.mean(np.concatenate(parts) > 0) > 0.5
    return Figure(
        float(np.mean([part.mean() for part in parts])),
        unit,
        label,
        meaning,
        None,
        each,
        Sample("mean", parts) if enough else None,
    )


def _batches(arm: Arm) -> dict[str, Figure]:
    """Latency of whole batches, in shape batch."""
    load = arm.experiment.get("load") or {}
    if load.get("shape") != "batch":
        return {}
    size = int(load.get("batch") or 16)
    made = [batches_of(run) for run in arm.runs]
    of_repeat = np.repeat(np.arange(len(made)), [len(one.seconds) for one in made])
    if not len(of_repeat):
        return {}
    seconds, tokens = np.concatenate([one.seconds for one in made]), np.concatenate([one.tokens for one in made])
    which = f"{definition(metrics.batches)} Batches whose requests all ended ok"
    units = np.arange(len(seconds))
    share = f"batch latency / requests of the batch; {which}"
    rates = f"output tokens of a batch / batch latency; {which}"
    found = spread("batch_latency", "batch latency", "s", which, seconds, units, of_repeat, units, True)
    found |= spread(
        "batch_latency_per_request",
        "batch latency / its requests,",
        "s",
        share,
        seconds / size,
        units,
        of_repeat,
        units,
        True,
    )
    return found | spread(
        "batch_throughput", "output tokens/s of a batch,", "tokens/s", rates, tokens / seconds, units, of_repeat, units
    )


def _goodput(arm: Arm) -> dict[str, Figure]:
    """Requests that met the SLO, of all repeats together."""
    told = [summary["figures"] for summary in arm.summaries]
    if not all("goodput" in one and one["goodput"]["value"] is not None for one in told):
        return {}
    seconds = np.array([one["duration"]["value"] for one in told])
    good = np.array([one["goodput"]["value"] for one in told]) * seconds
    judged = np.array([one["requests"]["value"] - one["hung_up"]["value"] for one in told])
    share = [one["goodput_share"]["value"] for one in told]
    found = {
        "goodput": Figure(
            float(good.sum() / seconds.sum()), "requests/s", "goodput, requests/s", told[0]["goodput"]["definition"],
            by_repeat=[one["goodput"]["value"] for one in told],
        )
    }  # fmt: skip
    if judged.sum():
        meaning = told[0]["goodput_share"]["definition"]
        found["goodput_share"] = Figure(
            float(good.sum() / judged.sum()), "share", "share that met the SLO", meaning, int(judged.sum()), share
        )
    return found


def clocks(ok: pd.DataFrame, metric: str) -> tuple[str, str] | None:
    """(source, server) of the clock by which the server told most of these requests' ``metric``; None if by none."""
    told = ok[ok[f"server_{metric}"].notna()]
    if told.empty:
        return None
    (source, server), *_ = told.groupby(["server_source", "server_kind"]).size().sort_values(ascending=False).index
    return str(source), str(server)


def by_clock(ok: pd.DataFrame, metric: str, clock: tuple[str, str]) -> pd.DataFrame:
    """The requests of which this clock of the server told the metric."""
    source, server = clock
    return ok[(ok["server_source"] == source) & (ok["server_kind"] == server) & ok[f"server_{metric}"].notna()]


def _server(pool: Pooled) -> dict[str, Figure]:
    """What the server says of the same requests, one by one, by the clock that told of most."""
    found: dict[str, Figure] = {}
    for metric, label in (
        ("ttft", "TTFT"),
        ("queue", "queue"),
        ("prefill", "prefill"),
        ("tpot", "TPOT"),
        ("e2e", "E2E"),
    ):
        clock = clocks(pool.ok, metric)
        if clock is not None:
            told, meaning = by_clock(pool.ok, metric, clock), CLOCKS[clock][metric].text
            text = f"server ({', '.join(clock)}): {meaning}"
            found |= _of_requests(told, f"server_{metric}", f"server_{metric}", f"{label} by the server,", text)
    return found


def _kv(arm: Arm) -> dict[str, Figure]:
    """The fullest that the server's KV cache was in the measuring windows, by its gauge."""
    peaks, samples = [], 0
    for run in arm.runs:
        start, end = run.window
        seen = [gauge for one in run.scrapes if (gauge := expositions.gauge(one, "kv_cache_usage")) is not None]
        inside = [usage[(at >= start) & (at <= end)] for at, usage in seen]
        samples += sum(map(len, inside))
        peaks.append(max((float(usage.max()) for usage in inside if len(usage)), default=None))
    told = [peak for peak in peaks if peak is not None]
    if not any(told):  # 0 while requests ran: its scrapes fell between them
        return {}
    meaning = (
        "largest value of the server's gauge of KV cache usage in the measuring window, of all repeats; what lies "
        "between two scrapes is not seen"
    )
    return {"kv_usage_peak": Figure(max(told), "share", "KV cache used, peak share", meaning, samples, peaks)}


def _memory(arm: Arm) -> dict[str, Figure]:
    """The rows of memory of all repeats: of each kind the largest."""
    told = [
        {str(row["name"]): row for row in summary.get("memory") or run.meta.get("memory") or []}
        for summary, run in zip(arm.summaries, arm.runs, strict=True)
    ]
    found = {}
    for name in dict.fromkeys(name for rows in told for name in rows):
        rows = [of.get(name) for of in told]
        known = [row for row in rows if row is not None and row.get("bytes")]  # 0 used: no scrape saw a request
        if known:
            label = MEMORY.get(name) or f"memory: {name}"
            meaning = f"{known[0].get('definition') or label}; {known[0].get('source') or 'source not told'}"
            meaning += "; largest of the repeats" if len(told) > 1 else ""
            each = [None if row is None else row.get("bytes") for row in rows]
            largest = max(float(row["bytes"]) for row in known)
            found[f"memory.{name}"] = Figure(largest, "bytes", label, meaning, None, each)
    return found


def _sweeps(arm: Arm) -> dict[str, Figure]:
    """Of sweeps: where they saturate, and the most that any level got through."""
    found: dict[str, Figure] = {}
    for name in MOST:
        label, unit, function = RATES[name]
        tops = [top[name] for top in arm.tops if name in top]
        if tops:
            meaning = f"{definition(function).rstrip('.')}; of the level of a sweep that has most; mean of the repeats"
            found[f"saturation.{name}"] = rate(f"most {label} of any level", unit, meaning, tops)
    rows = [[row for row in sweep["levels"] if row.get("achieved") is not None] for sweep in arm.sweeps]
    good = [[row["goodput"] for row in of if row["goodput"] is not None] for of in rows]
    if all(good):
        most: list[float | None] = [max(of) for of in good]
        meaning = "goodput of the level of a sweep that has most; mean of the repeats"
        value = float(np.mean([max(of) for of in good]))
        found["saturation.goodput"] = Figure(value, "requests/s", "most goodput of any level", meaning, None, most)
    points = [sweep["knee"] for sweep in arm.sweeps if sweep["knee"]["reached"]]
    if points:
        values = [point["value"] for point in points]
        unit, meaning = points[0]["unit"], points[0]["definition"]
        found["saturation"] = Figure(float(np.mean(values)), unit, "saturation point", meaning, len(values), values)
    for name, label, key in (("requests", "requests", "requests"), ("requests.failed", "failed", "failed")):
        each = [sum(row[key] for row in of) for of in rows]
        found[name] = Figure(sum(each), "requests", label, f"{label} of all levels", None, list(each))
    return found
