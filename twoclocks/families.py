"""Families: Totals -> metric families of Prometheus. Names, units and meaning of all that a run exports stand here.

Names are those of summary.json with the prefix twoclocks_ and the unit behind; a help text begins with the definition
that summary.json has. Pure.
"""

from collections.abc import Iterator, Mapping

import numpy as np
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    InfoMetricFamily,
    Metric,
)

from twoclocks import metrics
from twoclocks.metrics import definition
from twoclocks.totals import BOUNDS, Histogram, Totals

_OK = "Of the measured requests that ended ok, counted when each has ended."
HISTOGRAMS = {
    "ttft": f"{definition(metrics.ttft)} {_OK}",
    "itl": f"{definition(metrics.chunk_gaps)} {_OK}",
    "tpot": f"{definition(metrics.tpot)} {_OK}",
    "e2e": f"{definition(metrics.e2e)} {_OK}",
    "send_lateness": "send lateness = sent_at - intended_at, of the measured requests; connecting is in it.",
    "loop_lag": "How late the load generator's event loop came back, twenty times a second in each process, while "
    "measuring.",
}
"""Name -> meaning. Seconds."""
COUNTERS = {
    "output_tokens": f"Output tokens. {_OK}",
    "prompt_tokens": f"Prompt tokens. {_OK}",
    "user_stamped_requests": f"Requests with arrivals that the kernel did not stamp. {_OK}",
    "merged_reads": f"Reads that carried several token chunks, whose own times are lost. {_OK}",
}
"""Key of Totals.counts -> meaning."""
CACHED = f"Prompt tokens that the server says it had in its prefix cache. {_OK}"


def families(totals: Totals, about: Mapping[str, str], *, ended: bool) -> Iterator[Metric]:
    """All that a run exports; ``about``: what names the run, ``ended``: whether nothing will change any more."""
    yield InfoMetricFamily("twoclocks_run", "Which run this is.", value=dict(about))
    yield _gauge("run_ended", "1 once the run is over and all of it is counted here.", float(ended))
    for name, histogram in totals.histograms.items():
        yield HistogramMetricFamily(
            f"twoclocks_{name}_seconds", HISTOGRAMS[name], buckets=_buckets(histogram), sum_value=histogram.sum
        )
    yield _requests(totals)
    for name, meaning in COUNTERS.items():
        yield _counter(name, meaning, totals.counts[name])
    if "cached_tokens" in totals.counts:  # else no answer has told, which is not 0
        yield _counter("cached_tokens", CACHED, totals.counts["cached_tokens"])
    if totals.limits:
        limits = ", ".join(f"{name.upper()} <= {limit * 1e3:g} ms" for name, limit in totals.limits.items())
        yield _counter(
            "good_requests", f"{definition(metrics.meets_slo)} SLO: {limits}", totals.counts["good_requests"]
        )
        yield _counter(
            "judged_requests", "Measured requests that the SLO judges, good or not.", totals.counts["judged_requests"]
        )
    if totals.is_open:
        yield _counter(
            "not_sent",
            "Requests that were due while load.max_in_flight others were under way, and were not sent.",
            totals.not_sent,
        )
    users = sum(second.users for second in totals.present)
    yield _gauge("users", "Users of Locust; in an open loop one a process, which sends all that is due.", users)
    in_flight = sum(second.in_flight for second in totals.present)
    yield _gauge("in_flight", "Requests in flight, as the load generator sees them.", in_flight)
    yield _gauge("processes", "Processes of the load generator that tell of themselves.", len(totals.present))
    cpu = CounterMetricFamily(
        "twoclocks_loop_cpu_seconds",
        "CPU time of the event loop of a process of the load generator, while measuring.",
        labels=["worker"],
    )
    for worker, seconds in sorted(totals.cpu_s.items()):
        cpu.add_metric([str(worker)], seconds)
    yield cpu
    yield _gauge(
        "lost_records", "Records of workers that did not reach the master; known at the end.", totals.meta.lost_records
    )
    yield _gauge(
        "missing_workers", "Workers that ended before the run did; known at the end.", totals.meta.missing_workers
    )


def _requests(totals: Totals) -> Metric:
    family = CounterMetricFamily(
        "twoclocks_requests",
        "Requests that have ended. Phase: warmup; measure, those that count; drain, sent after the measuring window. "
        "Status and error kind as in requests.jsonl.",
        labels=["phase", "status", "error_kind"],
    )
    rows = dict(totals.requests)
    rows.setdefault(("measure", "ok", "none"), 0)  # so that a rate has where to begin
    for labels, count in sorted(rows.items()):
        family.add_metric(labels, count)
    return family


def _buckets(histogram: Histogram) -> list[tuple[str, float]]:
    """(upper bound, how many up to it)."""
    bounds = [*map(repr, BOUNDS), "+Inf"]
    return list(zip(bounds, np.cumsum(histogram.counts).tolist(), strict=True))


def _counter(name: str, meaning: str, value: float) -> Metric:
    return CounterMetricFamily(f"twoclocks_{name}", meaning, value=value)


def _gauge(name: str, meaning: str, value: float) -> Metric:
    return GaugeMetricFamily(f"twoclocks_{name}", meaning, value=value)
