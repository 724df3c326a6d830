"""Spread: a Run -> how its latencies spread: percentiles by both clocks, points of their ECDFs, intervals of figures.

Pure numpy over what load made; seconds.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from twoclocks import metrics, samples
from twoclocks.load import Run
from twoclocks.metrics import Floats, definition, slo_limits
from twoclocks.plots import violin_panels

PERCENTILES = (10, 25, 50, 75, 90, 95, 99, 99.9)
ENOUGH = 1.0
"""Values that must lie beyond a percentile, on its thinner side, for it to be shown: p99.9 takes 1,000 of them."""
INTERVALS = {
    "ttft": ("mean", "p50", "p95", "p99"),
    "tpot": ("mean", "p50", "p95", "p99"),
    "itl": ("mean", "p50", "p95", "p99"),
    "e2e": ("mean", "p50", "p95", "p99"),
    "request_throughput": ("mean",),
    "output_throughput": ("mean",),
    "goodput_share": ("mean",),
}
"""Figure -> the statistics of which an interval is told; the mean of a throughput or a share is its value."""
INTERVAL = (
    "95 % interval: how far chance among these requests may have moved a figure (of a percentile, by its rank; of ITL, "
    "answers are drawn with all their gaps; of a throughput, stretches of time; of a share, Wilson's). It tells "
    "nothing of what another run would bring: for that, repeat the run and compare. None is given of too few values."
)
POINTS = 240
"""Points of a curve of an ECDF at most."""


@dataclass(frozen=True)
class Curve:
    """Values of one metric by one clock, sorted out of a run; at most of POINTS of them, each a value that occurred."""

    metric: str
    side: str  # client or server
    told_by: tuple[str, str] | None
    seconds: Floats
    shares: Floats  # of all values, those that are not larger


def spread(run: Run) -> list[dict[str, Any]]:
    """A row a metric and clock: n, percentiles, and the share within the SLO where it has a limit."""
    limits = slo_limits(run.experiment)
    return [
        {
            "metric": metric,
            "side": side,
            "source": told_by[0] if told_by else None,
            "told_by": told_by[1] if told_by else None,
            "unit": "s",
            "n": len(values),
            **{f"p{p:g}": _percentile(values, p) for p in PERCENTILES},
            "slo": limits.get(metric) if side == "client" else None,
            "within_slo": float((values <= limits[metric]).mean()) if side == "client" and metric in limits else None,
            "definition": meaning,
        }
        for metric, side, told_by, values, meaning in _values(run)
    ]


def curves(run: Run) -> list[Curve]:
    """The ECDF of each metric by each clock."""
    return [Curve(metric, side, told_by, *_ecdf(values)) for metric, side, told_by, values, _ in _values(run)]


def figure_intervals(run: Run) -> dict[str, dict[str, dict[str, Any]]]:
    """Figure -> statistic -> {low, high, level}, in the figure's own unit; nothing where values are too few."""
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for metric, statistics in INTERVALS.items():
        sample = samples.sample([run], metric)
        if sample.missing:
            continue
        for statistic in statistics:
            if (interval := samples.measured(sample, statistic)) is not None:
                told = {"low": interval.low, "high": interval.high, "level": interval.level}
                found.setdefault(metric, {})[statistic] = told
    return found


def _values(run: Run) -> list[tuple[str, str, tuple[str, str] | None, Floats, str]]:
    """(metric, side, clock, values, definition), sorted values, of what has any."""
    functions: dict[str, Callable[..., Any]] = {
        "ttft": metrics.ttft, "tpot": metrics.tpot, "e2e": metrics.e2e, "itl": metrics.chunk_gaps,
    }  # fmt: skip
    found: list[tuple[str, str, tuple[str, str] | None, Floats, str]] = []
    for (metric, function), panel in zip(functions.items(), violin_panels([run]), strict=True):
        ((client, server),) = panel.pairs
        if len(client.values):
            found.append((metric, "client", None, np.sort(client.values), definition(function)))
        if len(server.values):
            found.append((metric, "server", server.told_by, np.sort(server.values), server.meaning))
    return found


def _percentile(values: Floats, p: float) -> float | None:
    """Interpolated; None where too few values lie beyond it."""
    if p != 50 and round(len(values) * min(p, 100 - p) / 100, 6) < ENOUGH:
        return None
    return float(np.percentile(values, p))


def _ecdf(values: Floats) -> tuple[Floats, Floats]:
    """(seconds, share of values not larger) at evenly spaced ranks, closer to each other towards the largest."""
    count = len(values)
    shares = np.concatenate([np.linspace(0, 1, POINTS // 2), 1 - np.geomspace(0.1, max(1 / count, 1e-6), POINTS // 2)])
    ranks = np.unique(np.clip(np.ceil(shares * count).astype(np.int64), 1, count))
    return values[ranks - 1], ranks / count
