"""Timeline: a Run -> what changed over it, panel by panel, as lines that a picture and the report's page draw alike.

Seconds on the run's clock; the values' unit stands with each panel. The server by its /metrics as lines; by its log as
points, which are joined to a line where /metrics has nothing of the kind.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import pandas as pd

from twoclocks import expositions, metrics
from twoclocks.load import LogSeries, Run
from twoclocks.metrics import Floats
from twoclocks.server_names import COUNTERS

BINS = 300
"""Parts of a run at most in which what the client saw is put together; a whole number of seconds each."""

Look = Literal["area", "steps", "line", "points"]


@dataclass(frozen=True)
class Line:
    """One quantity over time. Of steps, ``at`` holds the edges: one more than there are values."""

    label: str
    side: Literal["users", "client", "server"]
    look: Look
    at: Floats
    values: Floats
    dashed: bool = False
    named: bool = True  # in the legend; of several alike only the first is


@dataclass(frozen=True)
class Panel:
    """Lines of one unit."""

    title: str
    unit: str
    lines: list[Line]
    whole: bool = False  # values are counts


def timeline_of(run: Run) -> list[Panel]:
    """Requests, tokens a second, TTFT, and KV cache usage where the server tells it; a panel each, without time."""
    panels = [
        Panel("Users and requests", "requests", _concurrency(run), whole=True),
        Panel("Output tokens", "tokens/s", _throughput(run)),
        Panel("TTFT, by when the request was sent", "s", _ttft(run)),
    ]
    kv = _gauge(run, "kv_cache_usage", "server, /metrics") + _log(run, "kv_usage", "server, log")
    return panels + ([Panel("KV cache used", "share", kv)] if kv else [])


def bins(run: Run) -> Floats:
    """Edges of whole seconds over the run, of more seconds each in a long run: some BINS at most."""
    end = float(run.requests["ended_at"].max()) if len(run.requests) else 1.0
    step = max(1, int(np.ceil(end / BINS)))
    return np.arange(0.0, end + step, step)


def open_spans(begin: Floats, end: Floats) -> tuple[Floats, Floats]:
    """How many of the spans [begin, end) are open, from each time on at which this changes."""
    times = np.concatenate([begin, end])
    steps = np.concatenate([np.ones(len(begin)), -np.ones(len(end))])
    order = np.lexsort((steps, times))
    return times[order], np.cumsum(steps[order])


def _concurrency(run: Run) -> list[Line]:
    rows = run.requests[run.requests["sent_at"].notna()]
    lines = []
    if len(rows):
        measured = rows[rows["phase"] != "warmup"]
        if len(measured):  # a run may end in its warm-up
            by_user = measured.groupby(["worker", "user"])
            users = open_spans(by_user["intended_at"].min().to_numpy(), by_user["ended_at"].max().to_numpy())
            lines.append(Line("users active", "users", "area", *users))
        edges = bins(run)
        times, flying = open_spans(rows["sent_at"].to_numpy(), rows["ended_at"].to_numpy())
        integral = np.interp(edges, times, np.concatenate([[0.0], np.cumsum(flying[:-1] * np.diff(times))]))
        mean = np.diff(integral) / np.diff(edges)
        lines.append(Line("requests in flight, client (mean)", "client", "steps", edges, mean))
    for name, dashed in (("running", False), ("waiting", True)):
        lines += _gauge(run, name, f"{name}, server, /metrics", dashed)
        lines += _log(run, f"requests_{name}", f"{name}, server, log", dashed, gauge=name)
    return lines


def _throughput(run: Run) -> list[Line]:
    """The client's by arrival, the server's as its counter rose between scrapes."""
    lines = []
    if len(run.arrivals.at):
        arrived = metrics.arrived_tokens(run.arrivals, run.requests["output_tokens"].to_numpy())
        edges = bins(run)
        total, _ = np.histogram(run.arrivals.at, bins=edges, weights=arrived)
        lines.append(Line("client, by arrival", "client", "steps", edges, total / np.diff(edges)))
    counted = False
    for scrapes in run.scrapes:
        columns = [i for i, (name, _) in enumerate(scrapes.series) if name in COUNTERS["generation_tokens"]]
        if columns and len(scrapes.at) > 1:
            counts = np.nan_to_num(scrapes.values[:, columns])
            rises = np.diff(counts, axis=0)
            rises = np.where(rises < 0, counts[1:], rises)  # after a restart a counter begins at 0
            rate = rises.sum(axis=1) / np.diff(scrapes.at)
            label = "server, /metrics (rise of a counter)"
            lines.append(Line(label, "server", "steps", scrapes.at, rate, named=not counted))
            counted = True
    return lines + _log(run, "generation_throughput", "server, log (since its line before)", beside=counted)


def _ttft(run: Run) -> list[Line]:
    """Median and largest of the requests that were sent within each part of the run; none where none was."""
    rows = run.requests.loc[run.requests["ttft"].notna(), ["sent_at", "ttft"]]
    if not len(rows):
        return []
    edges = bins(run)
    part = pd.cut(rows["sent_at"], list(edges), right=False, labels=False)
    grouped = rows["ttft"].groupby(part)
    middle = (edges[:-1] + edges[1:]) / 2
    found = [grouped.median(), grouped.max()]
    at = middle[found[0].index.to_numpy().astype(int)]
    names = ("median, client", "largest, client")
    return [
        Line(name, "client", "line", at, values.to_numpy(dtype=np.float64), dashed=number > 0)
        for number, (name, values) in enumerate(zip(names, found, strict=True))
    ]


def _gauge(run: Run, name: str, label: str, dashed: bool = False) -> list[Line]:
    found = [one for one in (expositions.gauge(scrapes, name) for scrapes in run.scrapes) if one]
    return [Line(label, "server", "line", *one, dashed, named=number == 0) for number, one in enumerate(found)]


def _log(
    run: Run, name: str, label: str, dashed: bool = False, gauge: str | None = None, beside: bool | None = None
) -> list[Line]:
    """What the server's log says of it, engine by engine; points alone where /metrics tells the same."""
    if beside is None:
        beside = bool(_gauge(run, gauge or "kv_cache_usage", ""))
    told: list[LogSeries] = [series for series in run.log_series if series.name.rpartition(":")[2] == name]
    return [
        Line(label, "server", "points" if beside else "line", series.at, series.values, dashed, named=number == 0)
        for number, series in enumerate(told)
    ]
