"""Scraped: what the server's /metrics say of the window, beside the client's values of the requests in it.

Not the same requests one by one: whatever else the server answered is in its figures, so that no difference is given
where the numbers of observations disagree, nor where the two do not tell of the same quantity.
"""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from twoclocks import expositions, metrics
from twoclocks.buckets import Distribution, Reason, step_density
from twoclocks.expositions import ALL_HISTOGRAMS
from twoclocks.load import Run
from twoclocks.metrics import Floats, definition

PERCENTILES = (50, 95, 99)
SAME_TRAFFIC = 0.01
"""Largest share by which the numbers of observations may differ for a difference between two means to be shown."""


def client_values(run: Run) -> dict[str, tuple[Floats, str]]:
    """The client's values of the requests that the scrapes tell of, and their definition, by Source.beside."""
    seen = run.scraped
    finished = seen[seen["status"] == "ok"]
    gaps = metrics.chunk_gaps(run.arrivals)
    chosen = np.isin(gaps.request, seen.index)
    gaps = metrics.Gaps(gaps.request[chosen], gaps.seconds[chosen], gaps.tokens[chosen])
    return {
        "ttft": (seen["ttft"].to_numpy(dtype=np.float64), definition(metrics.ttft)),
        "itl": (gaps.seconds, definition(metrics.chunk_gaps)),
        "itl_per_token": (metrics.per_token_itl(gaps), definition(metrics.per_token_itl)),
        "tpot": (finished["tpot"].to_numpy(dtype=np.float64), definition(metrics.tpot)),
        "e2e": (finished["e2e"].to_numpy(dtype=np.float64), definition(metrics.e2e)),
    }


def told(run: Run) -> list[tuple[str, str, Distribution]]:
    """(metric, title, what it gained) of each histogram that gained anything, an entry a definition."""
    return [
        (metric, title, gained)
        for metric, (_, title) in ALL_HISTOGRAMS.items()
        for gained in expositions.histogram_deltas(run.scrapes, run.first_scrapes, metric)
        if gained.count
    ]


def beside(gained: Distribution, on_client: Mapping[str, tuple[Floats, str]]) -> tuple[Floats, str]:
    """The client's known values of the same quantity in the same window and their definition; none, and why."""
    if gained.since_restart:
        return np.array([]), "not compared: the server tells of a part of the window only"
    values, meaning = on_client.get(gained.beside, (np.array([]), "not seen from outside"))
    return values[~np.isnan(values)], meaning


def server_window(run: Run) -> list[dict[str, Any]]:
    """A row a histogram of the server over the scraped window, beside the client's mean of the same quantity."""
    on_client = client_values(run)
    rows: list[dict[str, Any]] = []
    for metric, title, gained in told(run):
        values, meaning = beside(gained, on_client)
        mean = float(values.mean()) if len(values) else None
        comparable = abs(gained.count - len(values)) <= SAME_TRAFFIC * len(values)
        shape = step_density(gained)
        row: dict[str, Any] = {
            "metric": metric,
            "title": title,
            "unit": "s",
            "client_n": len(values),
            "client_mean": mean,
            "server_n": int(gained.count),
            "server_mean": gained.mean,
            "server_mean_error": gained.mean_error,
            "difference": mean - gained.mean if mean is not None and comparable else None,
            "client_definition": meaning,
            "server_definition": gained.definition,
            "server_names": list(gained.names),
            "since_restart": gained.since_restart,
            "caveats": list(gained.caveats),
            "no_shape": shape.text if isinstance(shape, Reason) else None,
        }
        for p in PERCENTILES:
            row[f"server_p{p}"] = _interval(gained, p)
        rows.append(row | {"engines": _engines(run, metric, gained.definition)})
    return rows


def _engines(run: Run, metric: str, meaning: str) -> list[dict[str, Any]]:
    """The same, engine by engine, where there are several: percentiles are each one's own, never averaged."""
    engines = [
        engine
        for engine in expositions.per_engine(run.scrapes, run.first_scrapes, metric)
        if engine.gained.definition == meaning
    ]
    if len(engines) < 2:
        return []
    return [
        {
            "url": engine.url,
            "labels": dict(engine.labels),
            "n": int(engine.gained.count),
            "mean": engine.gained.mean,
            **{f"p{p}": _interval(engine.gained, p) for p in PERCENTILES},
        }
        for engine in engines
    ]


def _interval(gained: Distribution, p: int) -> dict[str, float | None] | None:
    interval = gained.percentile(p / 100)
    if interval is None:
        return None
    return {
        "lower": interval.lower,
        "estimate": interval.estimate,
        "upper": interval.upper if math.isfinite(interval.upper) else None,
    }
