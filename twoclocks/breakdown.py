"""Breakdown: a Run -> where the time of its requests went: client beside server, the waterfall, the stages between."""

import math
from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import numpy as np
import pandas as pd

from twoclocks import expositions, metrics
from twoclocks.clocks import CLOCKS
from twoclocks.expositions import Scrapes
from twoclocks.load import Run, stage_names, stage_urls
from twoclocks.metrics import definition, distribution
from twoclocks.scraped import SAME_TRAFFIC
from twoclocks.waterfall import (
    Decode,
    Waterfall,
    bar_rows,
    decodes,
    dominant,
    parting,
    stacks,
    waterfalls,
    window_waterfall,
)

UNSEEN = "Not seen from outside; part of the client's TTFT. Server: "
BESIDE = (
    "ttft", "tpot", "e2e", "tokenize", "validation", "queue", "prefill", "held", "inference", "time_per_token",
)  # fmt: skip
"""What is shown of single requests, in this order. Decode is the TPOT's numerator, and left to it."""


def cut_up(run: Run) -> tuple[list[Waterfall], list[Decode]]:
    """Where the time of the measured requests that ended ok went: until the first token, and a token after it.

    Where the server tells nothing of single requests, its means over the scraped window come first, if it has any.
    """
    if run.in_process:
        return [], []
    table = {str(name): column.to_numpy() for name, column in run.ok.items()}
    made = waterfalls(table, stage_names(run.experiment))
    if made and made[0].source is None and (window := _window_waterfall(run)) is not None:
        made.insert(0, window)
    return made, decodes(table)


def _window_waterfall(run: Run) -> Waterfall | None:
    """From the means of the server's histograms, if they tell of our requests and of nobody else's."""
    seen = run.scraped[run.scraped["got_token"]]
    told = {
        metric: gained
        for metric in ("ttft", "validation", "queue", "prefill")
        if (gained := expositions.histogram_delta(run.scrapes, run.first_scrapes, metric)) is not None
        and abs(gained.count - len(seen)) <= SAME_TRAFFIC * len(seen)
    }
    servers = {name.partition(":")[0].partition("_")[0] for gained in told.values() for name in gained.names}
    if len(servers) != 1 or not servers <= {"vllm", "sglang", "tgi"}:
        return None
    means = {metric: gained.mean for metric, gained in told.items()}
    texts = {metric: gained.definition for metric, gained in told.items()}
    if servers == {"vllm"} and {"ttft", "queue", "prefill"} <= means.keys():
        means["tokenize"] = means["ttft"] - means["queue"] - means["prefill"]
        texts["tokenize"] = CLOCKS["otlp", "vllm"]["tokenize"].text.replace("span TTFT", "mean TTFT")
    table = {str(name): column.to_numpy() for name, column in seen.items()}
    return window_waterfall(table, servers.pop(), means, texts)


def client_vs_server(ok: pd.DataFrame, error_bars: Mapping[str, float] | None = None) -> list[dict[str, Any]]:
    """Mean and median of what both clocks say of the very same requests; and what only the server can see.

    With the instrument's error bars (seconds) a row says whether its difference is larger: `resolved`.
    """
    bars = error_bars or {}
    rows: list[dict[str, Any]] = []
    for (source, server), told in ok.groupby(["server_source", "server_kind"]):
        clocks = CLOCKS[str(source), str(server)]
        for metric in (metric for metric in BESIDE if metric in clocks):
            clock = clocks[metric]
            on_server = told[f"server_{metric}"].to_numpy(dtype=np.float64)
            on_client = told[metric].to_numpy(dtype=np.float64) if clock.differs else None
            both = ~np.isnan(on_server) if on_client is None else ~(np.isnan(on_server) | np.isnan(on_client))
            if not both.any():
                continue
            for statistic, reduce in (("mean", np.mean), ("p50", np.median)):
                inside = float(reduce(on_server[both]))
                client = None if on_client is None else float(reduce(on_client[both]))
                rows.append(
                    {
                        "metric": metric,
                        "statistic": statistic,
                        "unit": "s",
                        "n": int(both.sum()),
                        "client": client,
                        "server": inside,
                        "difference": None if client is None else client - inside,
                        "resolved": None
                        if client is None or metric not in bars
                        else abs(client - inside) > bars[metric],
                        "source": source,
                        "told_by": server,
                        "what_differs": clock.differs or UNSEEN + clock.text,
                        "server_definition": clock.text,
                    }
                )
    return rows


def waterfall_row(waterfall: Waterfall) -> dict[str, Any]:
    """Where the time until the first token went, of the requests that ended ok."""
    return {
        "source": waterfall.source,
        "told_by": waterfall.server,
        "n": len(waterfall.rows),
        "how": "means over the scraped window" if waterfall.is_window else "request by request",
        "unit": "s",
        "bars": bar_rows(waterfall),
        "stacks": stacks(waterfall),
        "words": dominant(waterfall),
    }


def decode_row(decode: Decode) -> dict[str, Any]:
    """Time per output token by both clocks, of the same requests."""
    return {
        "source": decode.source,
        "told_by": decode.server,
        "unit": "s",
        "client": distribution(decode.client),
        "server": distribution(decode.on_server),
        "difference": distribution(decode.client - decode.on_server),
        "client_definition": definition(metrics.tpot),
        "server_definition": decode.definition,
        "words": parting(decode),
    }


def stage_rows(run: Run) -> list[dict[str, Any]]:
    """The time between neighbours on the way from the client to the server, the outermost first.

    Request by request where both tell of single requests; else the difference of their means over the window.
    """
    names = stage_names(run.experiment)
    if not names:
        return []
    ok = run.ok
    means = {stage["name"]: _stage_mean(run, stage) for stage in run.experiment["target"]["stages"]}
    server = expositions.histogram_delta(run.scrapes, run.first_scrapes, "ttft")
    means["server"] = server.mean if server is not None and server.count else None
    rows: list[dict[str, Any]] = []
    places = ["client", *names, "server"]
    for measure in ("ttft", "e2e"):
        columns = [measure, *(f"stage_{name}_{measure}" for name in names), f"server_{measure}"]
        for (outer, outer_column), (inner, inner_column) in pairwise(zip(places, columns, strict=True)):
            pair = ok[[outer_column, inner_column]].dropna().to_numpy(dtype=np.float64)
            one: float | None
            other: float | None
            if len(pair):
                how, count, (one, other) = "request by request", len(pair), pair.mean(axis=0)
            elif measure == "ttft":
                how, count = "means over the window, not the same requests one by one", None
                one = float(ok["ttft"].mean()) if outer == "client" else means[outer]
                other = means[inner]
            else:
                continue
            if one is None or other is None or math.isnan(one):
                continue
            rows.append(
                {
                    "outer": outer, "inner": inner, "metric": measure, "unit": "s", "n": count,
                    "outer_mean": one, "inner_mean": other, "between": one - other, "how": how,
                    "outer_definition": _stage_definition(run, outer, measure, bool(len(pair))),
                    "inner_definition": _stage_definition(run, inner, measure, bool(len(pair))),
                }
            )  # fmt: skip
    return rows


def _stage_definition(run: Run, place: str, measure: str, single: bool) -> str:
    """What starts and stops the clock of one place on the way, and the weight of one observation."""
    if place == "client":
        return definition(getattr(metrics, measure))
    if place == "server" and single:
        return " | ".join(CLOCKS[pair][measure].text for pair in run.told_by if measure in CLOCKS[pair])
    if place == "server":
        server = expositions.histogram_delta(run.scrapes, run.first_scrapes, measure)
        return server.definition if server is not None else ""
    if single:
        return f"span of {place}: its start -> its {'end' if measure == 'e2e' else 'first token'}. One value a request"
    stage = next(stage for stage in run.experiment["target"]["stages"] if stage["name"] == place)
    return f"{stage['histogram']}: {place} has the request -> its first byte or token. One observation a request"


def _stage_mean(run: Run, stage: Mapping[str, Any]) -> float | None:
    """Mean of a stage's histogram over the window, seconds; None if it was not read or the stage restarted."""
    urls, name = stage_urls(run.experiment)[stage["name"]], stage.get("histogram")
    total = count = 0.0
    for scrapes in run.all_scrapes:
        first = run.first_scrape(scrapes)
        if scrapes.url in urls and name and len(scrapes.at) > first:
            if expositions.restarted(scrapes, first):
                return None
            total += _risen(scrapes, first, f"{name}_sum")
            count += _risen(scrapes, first, f"{name}_count")
    return total / count if count else None


def _risen(scrapes: Scrapes, first: int, name: str) -> float:
    columns = scrapes.columns.get(name, [])
    ends = np.nan_to_num(scrapes.values[[first, -1]][:, columns])
    return float((ends[1] - ends[0]).sum())
