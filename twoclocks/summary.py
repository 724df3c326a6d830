"""Summary: a Run -> every figure of its report, as one plain dictionary that summary.json holds as it is.

Seconds inside; NaN never leaves this module: what is not known is None. Each figure carries its unit and its
definition, and each of the server's figures says what starts and stops its clock.
"""

import math
from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import numpy as np
import pandas as pd

from twoclocks import __version__, expositions, metrics
from twoclocks.attempts import attempts
from twoclocks.calibration import Calibration, calibration_of, error_bars
from twoclocks.checks import checks, joined
from twoclocks.clocks import CLOCKS, METRICS, PAGE, SILENCES, silences
from twoclocks.expositions import Scrapes
from twoclocks.fleet_summary import worker_lines
from twoclocks.gpu_summary import DEFINITIONS as GPU_DEFINITIONS
from twoclocks.gpu_summary import gpu_figures
from twoclocks.load import LogSeries, Run, stage_names, stage_urls
from twoclocks.log_series import MEANING
from twoclocks.memory_summary import memory_rows
from twoclocks.metrics import Bools, Floats, definition, distribution, slo_limits
from twoclocks.prefix_cache import prefix_cache
from twoclocks.record import GAVE_UP, HUNG_UP, LEFT, TOO_LONG
from twoclocks.rosetta import rosetta
from twoclocks.scraped import SAME_TRAFFIC, server_window
from twoclocks.turns import by_turn, sessions
from twoclocks.verdict import verdict
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
WHOLE_RUN = "(last token chunk - first request sent), the drain in it and the warm-up left out"
LEFT_OUT = (
    "their tokens count to the throughput, their latencies to no distribution: who leaves after x s has no TTFT above x"
)
SLO_SHARE = 0.99
"""Share of the measured requests that must meet the SLO where an experiment does not say."""


def summarise(run: Run) -> dict[str, Any]:
    """Every figure of a run; the keys are those of summary.json."""
    calibration = calibration_of(run)
    cut, tpots = cut_up(run)
    figures = _figures(run)
    summary = {
        "twoclocks_version": __version__,
        "run": run.name,
        "label": run.shown_name,
        "status": run.meta.get("status"),
        "partial": _partial(run),
        "verdict": verdict(run),
        "slo": _slo(run),
        "notes": _notes(run),
        "target": run.meta.get("target") or {},
        "window": {"started_at": run.window[0], "ended_at": run.window[1], "unit": "s", "definition": "run's clock"},
        "figures": figures,
        "rosetta": rosetta(run, figures, slo_limits(run.experiment)),
        "warmup": run.meta.get("warmup"),
        "attempts": attempts(run),
        "levels": _levels(run),
        "prefix_cache": prefix_cache(run),
        "sessions": sessions(run),
        "turns": by_turn(run),
        "errors": _errors(run.measured),
        "join": joined(run.ok) | _left_over(run),
        "instrument": _instrument(calibration),
        "client_vs_server": client_vs_server(run.ok, error_bars(calibration) if calibration else {}),
        "waterfall": [_waterfall(one) for one in cut],
        "decode": [_decode(one) for one in tpots],
        "stages": _stages(run),
        "untold": _untold(run),
        "scraped": _scraped(run),
        "server_window": server_window(run),
        "log_series": _log_series(run),
        "gpu": _gpu(run),
        "gpu_definitions": GPU_DEFINITIONS,
        "memory": memory_rows(run),
        "side_effects": expositions.side_effects(run.all_scrapes),
        "checks": [check | {"definition": _check_definition(run, check["name"])} for check in checks(run, cut)],
    }
    cleaned: dict[str, Any] = clean(summary)
    return cleaned


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


def good_requests(run: Run) -> Bools:
    """Which of the requests that the SLO judges (Run.judged) met all of its limits."""
    judged, limits = run.judged, slo_limits(run.experiment)
    values = {name: judged[name].to_numpy(dtype=np.float64) for name in limits}
    return metrics.meets_slo((judged["status"] == "ok").to_numpy(), values, limits)


def _figures(run: Run) -> dict[str, Any]:
    measured, ok, window, whole = run.measured, run.ok, run.window, _whole(run)
    limits = slo_limits(run.experiment)
    rate, share = metrics.goodput(good_requests(run), window)
    kinds = measured["error_kind"]
    ended = measured["ended_at"].to_numpy()[(measured["status"] == "ok").to_numpy()]
    gaps = run.gaps
    e2e, tokens = ok["e2e"].to_numpy(), ok["output_tokens"].to_numpy()

    def one(value: float | int | None, unit: str, meaning: str) -> dict[str, Any]:
        return {"value": value, "unit": unit, "definition": meaning}

    def many(values: Floats, unit: str, meaning: str) -> dict[str, Any]:
        return {"unit": unit, "definition": meaning, **distribution(values)}

    in_slo = ", ".join(f"{name.upper()} <= {limit * 1e3:g} ms" for name, limit in limits.items())
    figures = {
        "requests": one(len(measured), "requests", "measured requests: sent in the measuring window, warm-up left out"),
        "ok": one(len(ok), "requests", "measured requests whose stream came to its proper end"),
        "failed": one(
            int((~measured["status"].isin(["ok", "cancelled"])).sum()), "requests", "measured requests that failed"
        ),
        "cancelled": one(
            int(((measured["status"] == "cancelled") & ~kinds.isin(LEFT)).sum()),
            "requests",
            "measured requests that this tool itself cut off at the end of the run",
        ),
        "hung_up": one(
            int((kinds == HUNG_UP).sum()),
            "requests",
            "measured requests that were hung up on as workload.cancel_share drew; no failures, and not judged by the "
            f"SLO; {LEFT_OUT}",
        ),
        "gave_up": one(
            int((kinds == GAVE_UP).sum()),
            "requests",
            "measured requests without a first token within workload.patience_s, given up by their user; no failures, "
            f"but misses of the SLO; {LEFT_OUT}",
        ),
        "warmup": one(int((run.requests["phase"] == "warmup").sum()), "requests", "sent before the measuring window"),
        "drain": one(
            int((run.requests["phase"] != "warmup").sum()) - len(measured),
            "requests",
            "begun before the end of the measuring window and sent after it; in no other figure but the throughput "
            "of the whole run. requests + warmup + drain = all of requests.jsonl",
        ),
        "duration": one(window[1] - window[0], "s", "length of the measuring window"),
        "request_throughput": one(
            metrics.request_throughput(ended, window), "requests/s", definition(metrics.request_throughput)
        ),
        "output_throughput": one(_output_throughput(run), "tokens/s", definition(metrics.output_throughput)),
        "request_throughput_run": one(
            len(ended) / (whole[1] - whole[0]) if whole[1] > whole[0] else None,
            "requests/s",
            f"measured requests that ended ok / {WHOLE_RUN}",
        ),
        "output_throughput_run": one(
            _output_throughput(run, whole),
            "tokens/s",
            f"tokens that arrived over the whole run / {WHOLE_RUN}; tokens of cut-off requests count",
        ),
        "output_tokens": one(_total(ok["output_tokens"]), "tokens", "output tokens of the requests that ended ok"),
        "prompt_tokens": one(_total(ok["prompt_tokens"]), "tokens", "prompt tokens of the requests that ended ok"),
        "ttft": many(ok["ttft"].to_numpy(), "s", definition(metrics.ttft)),
        "first_event": many(ok["first_event"].to_numpy(), "s", definition(metrics.first_event)),
        "stream_throughput": many(
            metrics.stream_throughput(e2e, tokens), "tokens/s", definition(metrics.stream_throughput)
        ),
        "itl": many(gaps.seconds, "s", definition(metrics.chunk_gaps)),
        "itl_per_token": many(metrics.per_token_itl(gaps), "s", definition(metrics.per_token_itl)),
        "tpot": many(ok["tpot"].to_numpy(), "s", definition(metrics.tpot)),
        "e2e": many(e2e, "s", definition(metrics.e2e)),
        "e2e_per_token": many(ok["e2e_per_token"].to_numpy(), "s", definition(metrics.e2e_per_token)),
    }
    if is_open(run) and not run.in_process:  # there a batch is handed over as soon as it is due
        unsent = run.meta.get("not_sent")
        due = None if unsent is None else len(measured) + unsent
        length = window[1] - window[0]
        figures |= {
            "due": one(due, "requests", "requests that were due in the measuring window: sent + not sent"),
            "not_sent": one(
                unsent,
                "requests",
                "requests that were due while load.max_in_flight others were under way, and were not sent",
            ),
            "offered_rate": one(
                None if due is None or length <= 0 else due / length,
                "requests/s",
                "offered rate = requests due / length of the measuring window",
            ),
            "send_lateness": many(
                (measured["sent_at"] - measured["intended_at"]).to_numpy(),
                "s",
                "send lateness = sent_at - intended_at, of the measured requests; connecting is in it",
            ),
            "ttft_from_intended": many(
                ok["ttft_from_intended"].to_numpy(),
                "s",
                "TTFT from intended = first chunk with content, reasoning or a tool call - intended_at, when the "
                "request was due",
            ),
            "e2e_from_intended": many(
                ok["latency_from_intended"].to_numpy(),
                "s",
                "E2E from intended = last token chunk - intended_at, when the request was due",
            ),
        }
    if shape_of(run) == "batch":
        made = batches_of(run)
        which = "batches of load.batch requests that all ended ok"
        figures |= {
            "batches": one(len(made.seconds), "requests", f"measured {which}"),
            "batch_latency": many(made.seconds, "s", f"{definition(metrics.batches)} One value a batch, {which}"),
            "batch_latency_per_request": many(
                made.seconds / made.requests, "s", f"batch latency / requests of the batch. One value a batch, {which}"
            ),
            "batch_throughput": many(
                made.tokens / made.seconds,
                "tokens/s",
                f"output tokens of a batch / batch latency; pauses between batches are not in it. One value a batch, "
                f"{which}",
            ),
        }
    if limits:
        figures["goodput"] = one(rate, "requests/s", f"{definition(metrics.goodput)} SLO: {in_slo}")
        figures["goodput_share"] = one(share, "share", f"{definition(metrics.meets_slo)} SLO: {in_slo}")
    return figures


def is_open(run: Run) -> bool:
    """Was this an open loop, in which requests leave when they are due?"""
    return shape_of(run) in ("rate", "trace", "batch")


def shape_of(run: Run) -> str | None:
    """The shape of the load; None where no experiment tells it."""
    shape: str | None = (run.experiment.get("load") or {}).get("shape")
    return shape


def batches_of(run: Run) -> metrics.Batches:
    """The measured batches of shape batch: requests of one worker that were due at the same moment.

    Those that are not of full size (the last one of load.requests) are left out.
    """
    rows = run.measured
    batch = rows.groupby(["worker", "intended_at"]).ngroup().to_numpy().astype(np.int64)
    full = np.bincount(batch)[batch] == run.experiment["load"]["batch"] if len(batch) else np.empty(0, dtype=bool)
    return metrics.batches(
        batch,
        rows["sent_at"].to_numpy(),
        rows["ended_at"].to_numpy(),
        rows["output_tokens"].to_numpy(),
        full & (rows["status"] == "ok").to_numpy() & rows["output_tokens"].notna().to_numpy(),
    )


def _whole(run: Run) -> tuple[float, float]:
    """First request sent and last token of all but the warm-up; NaN where there is none."""
    rows = run.requests[run.requests["phase"] != "warmup"]
    ends = rows["sent_at"] + rows["e2e"]
    return float(rows["sent_at"].min()), float(ends.max())


def _levels(run: Run) -> list[dict[str, Any]]:
    """Each level of shape steps: its requests are those sent while it lasted, its tokens those that arrived then."""
    told = run.meta.get("levels") or []
    begins = [level["started_at"] for level in told]
    rows: list[dict[str, Any]] = []
    for level, end in zip(told, [*begins[1:], run.window[1]], strict=False):  # there are none in most runs
        span = (float(level["started_at"]), float(end))
        sent = run.measured[(run.measured["sent_at"] >= span[0]) & (run.measured["sent_at"] < span[1])]
        ok = sent[sent["status"] == "ok"]
        rows.append(
            {
                "users": level["users"],
                "from": span[0],
                "until": span[1],
                "requests": len(sent),
                "ok": len(ok),
                "output_throughput": _output_throughput(run, span),
                "ttft": distribution(ok["ttft"].to_numpy()),
                "tpot": distribution(ok["tpot"].to_numpy()),
                "unit": "s; tokens/s",
                "definition": "requests sent while the level lasted, their TTFT and TPOT; tokens that arrived while it "
                "lasted / its length",
            }
        )
    return rows


def _instrument(calibration: Calibration | None) -> dict[str, Any] | None:
    """The instrument's own error at about this load, if it was calibrated."""
    if calibration is None:
        return None
    return {
        "error_bars": error_bars(calibration),
        "unit": "s",
        "definition": "p99 of |client - known schedule| in a calibration at about this load, by `twoclocks calibrate`",
        "streams": calibration.streams,
        "chunks_per_s": calibration.chunks_per_s,
        "reader": calibration.reader,
        "made_at_unix": calibration.made_at_unix,
    }


def _left_over(run: Run) -> dict[str, Any]:
    """What servers told in spans and logs, what of it joined nothing, and the requests that did not end ok."""
    rest = run.measured[run.measured["status"] != "ok"]
    told = {"not_ok": len(rest), "not_ok_joined": int(rest["server_source"].notna().sum())}
    return told | {"rows": run.rows, "unmatched_rows": run.unmatched_rows}


def _waterfall(waterfall: Waterfall) -> dict[str, Any]:
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


def _decode(decode: Decode) -> dict[str, Any]:
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


def _stages(run: Run) -> list[dict[str, Any]]:
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


def _check_definition(run: Run, name: str) -> str:
    """What the server's figures in a check mean; empty where it holds none."""
    metric, _, other = name.partition("_agree")
    if other.startswith("_with_counter"):
        gain = expositions.counter_gain(run.scrapes, run.first_scrapes, _COUNTED[metric])
        return f"{' and '.join(gain.names)}: counted {gain.definition}" if gain else ""
    told = {"client_after_server": ("ttft", "queue", "prefill")}.get(name, (metric,))
    texts = [
        f"{measure} ({source}, {server}): {CLOCKS[source, server][measure].text}"
        for source, server in run.told_by for measure in told if measure in CLOCKS[source, server]
    ]  # fmt: skip
    histogram = "ttft" if name == "only_our_traffic" else metric if other == "s_with_histogram" else None
    gained = expositions.histogram_delta(run.scrapes, run.first_scrapes, histogram) if histogram else None
    return ". ".join([*texts, *([f"{' and '.join(gained.names)}: {gained.definition}"] if gained else [])])


_COUNTED = {"output_tokens": "generation_tokens", "prompt_tokens": "prompt_tokens"}


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


def _untold(run: Run) -> list[str]:
    """What this server does not tell, and how to start it so that it does."""
    kind = (run.experiment.get("target") or run.meta.get("target") or {}).get("server")
    if kind not in SILENCES or run.ok.empty or run.in_process:
        return []
    told = {metric for metric in METRICS if run.ok[f"server_{metric}"].notna().any()}
    return silences(kind, told | ({PAGE} if any(len(scrapes.at) for scrapes in run.scrapes) else set()))


def _log_series(run: Run) -> list[dict[str, Any]]:
    """Mean and maximum of what the server's log said of the engine in the measuring window, a row a series."""

    def row(series: LogSeries) -> dict[str, Any]:
        values = series.values[(series.at >= run.window[0]) & (series.at <= run.window[1])]
        return {
            "name": series.name,
            "engine": series.engine,
            "unit": series.unit,
            "n": len(values),
            "mean": float(values.mean()) if len(values) else None,
            "max": float(values.max()) if len(values) else None,
            "definition": MEANING[series.name],
            "zone": series.zone,
        }

    return [row(series) for series in run.log_series]


def _gpu(run: Run) -> list[dict[str, Any]]:
    """What each GPU did in the measuring window, and all of them together; energy per token that arrived in it."""
    throughput, length = _output_throughput(run), run.window[1] - run.window[0]
    return gpu_figures(run.gpu_samples, run.window, throughput * length if math.isfinite(throughput) else None)


def _output_throughput(run: Run, span: tuple[float, float] | None = None) -> float:
    """Of all phases but the warm-up, tokens/s; in the measuring window, or in another span of the run."""
    return metrics.output_throughput(*arrived(run), span or run.window)


def arrived(run: Run) -> tuple[Floats, Floats]:
    """(arrival on the run's clock, tokens) of every chunk of all requests but those to warm up."""
    tokens = metrics.arrived_tokens(run.arrivals, run.requests["output_tokens"].to_numpy())
    counted = np.isin(run.arrivals.request, run.requests.index[run.requests["phase"] != "warmup"])
    return run.arrivals.at[counted], tokens[counted]


def _slo(run: Run) -> dict[str, Any] | None:
    """Whether enough requests met the SLO: ``slo.share`` of those that it judges must. None without an SLO."""
    share = (run.experiment.get("slo") or {}).get("share")
    limits = slo_limits(run.experiment)
    if not limits:
        return None
    good = good_requests(run)
    met = float(good.mean()) if len(good) else 0.0
    required = float(share) if isinstance(share, int | float) else SLO_SHARE
    return {"limits": limits, "unit": "s", "required_share": required, "share": met, "met": met >= required}


def _scraped(run: Run) -> dict[str, Any] | None:
    """From when to when the server's counters were read, and which of our requests lie in that time."""
    good = [(s, first) for s, first in zip(run.scrapes, run.first_scrapes, strict=True) if len(s.at)]
    if not good:
        return None
    return {
        "from": min(float(s.at[first]) for s, first in good),
        "until": max(float(s.until[-1]) for s, _ in good),
        "unit": "s",
        "requests": len(run.scraped),
        "warmup": int((run.scraped["phase"] == "warmup").sum()),
        "definition": "run's clock; from the last scrape before the measuring window that found none of our requests "
        "under way, else from the first",
    }


def _partial(run: Run) -> str | None:
    if not run.partial:
        return None
    if run.meta.get("status") in ("interrupted", "failed"):
        return "Stopped before its time; every request that it had sent is in these figures."
    users = run.requests.loc[run.requests["phase"] != "warmup", "user"].nunique()
    flying = f"up to {users} requests, one a user," if users else "an unknown number of requests"
    return f"Partial: the run was killed or is still going on; {flying} were in flight and are not in these figures."


def _notes(run: Run) -> list[str]:
    lost = run.meta.get("lost_records")
    told = [f"{lost} records were lost on their way from the workers; they are in no figure."] if lost else []
    errors = [row for row in run.gpu_samples if "error" in row]
    for where in dict.fromkeys(row.get("host") for row in errors):
        of_host = [row for row in errors if row.get("host") == where]
        told.append(f"The GPUs of {where} could not be read {len(of_host)} times, lastly: {of_host[-1]['error']}")
    if too_long := int((run.measured["error_kind"] == TOO_LONG).sum()):
        told.append(
            f"{too_long:,} of {len(run.measured):,} requests were refused, since prompt and answer do not fit the "
            "model's context. They are failures in these figures; leave them out of the request file, or start the "
            "server with a longer context."
        )
    gave_up, judged = int((run.judged["error_kind"] == GAVE_UP).sum()), len(run.judged)
    if gave_up:
        told.append(
            f"The users of {gave_up:,} of {judged:,} requests ({gave_up / judged:.1%}) gave up waiting for a first "
            f"token. TTFT is that of the others; of all, p{100 * (1 - gave_up / judged):.3g} and above lie beyond "
            "workload.patience_s."
        )
    if run.log_series:
        told.append(f"Times in the server's log that name no zone were read as {run.log_series[0].zone}.")
    return [str(note) for note in run.meta.get("notes") or []] + told + worker_lines(run.meta.get("fleet") or [])


def _errors(measured: pd.DataFrame) -> list[dict[str, Any]]:
    bad = measured[(measured["status"] != "ok") & ~measured["error_kind"].isin(LEFT)]
    kinds = bad["error_kind"].fillna(bad["status"])
    rows = []
    for (status, kind), group in bad.groupby([bad["status"], kinds]):
        messages = group["error_message"].dropna()
        example = str(messages.iloc[0]) if len(messages) else None
        rows.append({"status": status, "kind": kind, "count": len(group), "example": example})
    return sorted(rows, key=lambda row: -row["count"])


def _total(values: pd.Series) -> int | None:
    known = values.dropna()
    return int(known.sum()) if len(known) else None


def clean(value: Any) -> Any:
    """Without NaN and numpy numbers, which JSON does not have."""
    if isinstance(value, Mapping):
        return {str(key): clean(item) for key, item in value.items()}
    if isinstance(value, list) and set(map(type, value)) == {float} and math.isfinite(sum(value)):
        return value  # the gaps of a long run are millions, seldom NaN
    if isinstance(value, list | tuple):
        return [clean(item) for item in value]
    if isinstance(value, np.generic):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value
