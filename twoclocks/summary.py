"""Summary: a Run -> every figure of its report, as one plain dictionary that summary.json holds as it is.

Seconds inside; NaN never leaves this module: what is not known is None. Each figure carries its unit and its
definition, and each of the server's figures says what starts and stops its clock.
"""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd

from twoclocks import __version__, expositions, metrics
from twoclocks.calibration import Calibration, calibration_of, error_bars
from twoclocks.checks import checks, joined
from twoclocks.expositions import HISTOGRAMS
from twoclocks.join import DEFINITIONS
from twoclocks.load import Run
from twoclocks.metrics import Floats, definition
from twoclocks.verdict import verdict

PERCENTILES = (50, 95, 99)
UNSEEN = "Not seen from outside; part of the client's TTFT. Server: "

WHAT_DIFFERS: dict[tuple[str, str], str] = {
    ("in-band", "ttft"): "Both hold queue and prefill; the client's also HTTP, chat template, tokenizing before them "
    "and detokenizing and delivery after",
    ("in-band", "tpot"): "The same formula: the client stamps a chunk's arrival, the server the sampling of a token",
    ("in-band", "e2e"): "The client's also holds HTTP, template and tokenizing before the queue, and delivery",
    ("in-band", "queue"): UNSEEN + DEFINITIONS["in-band"]["queue"],
    ("in-band", "prefill"): UNSEEN + DEFINITIONS["in-band"]["prefill"],
    ("log", "e2e"): "The client's also holds HTTP, template and tokenizing before the engine, and delivery after it",
    ("log", "queue"): UNSEEN + DEFINITIONS["log"]["queue"],
}
SLO_SHARE = 0.99
"""Share of the measured requests that must meet the SLO where an experiment does not say."""
SAME_TRAFFIC = 0.01
"""Largest share by which the numbers of observations may differ for a difference between two means to be shown."""


def summarise(run: Run) -> dict[str, Any]:
    """Every figure of a run; the keys are those of summary.json."""
    calibration = calibration_of(run)
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
        "figures": _figures(run),
        "errors": _errors(run.measured),
        "join": joined(run.ok),
        "instrument": _instrument(calibration),
        "client_vs_server": client_vs_server(run.ok, error_bars(calibration) if calibration else {}),
        "scraped": _scraped(run),
        "server_window": server_window(run),
        "checks": checks(run),
    }
    cleaned: dict[str, Any] = _clean(summary)
    return cleaned


def distribution(values: Floats) -> dict[str, Any]:
    """n, mean, p50, p95, p99, min, max of the values that are known. Percentiles interpolate linearly."""
    known = values[~np.isnan(values)]
    if not len(known):
        return {"n": 0} | dict.fromkeys(("mean", *(f"p{p}" for p in PERCENTILES), "min", "max"))
    quantiles = {f"p{p}": float(q) for p, q in zip(PERCENTILES, np.percentile(known, PERCENTILES), strict=True)}
    extremes = {"min": float(known.min()), "max": float(known.max())}
    return {"n": len(known), "mean": float(known.mean()), **quantiles, **extremes}


def client_vs_server(ok: pd.DataFrame, error_bars: Mapping[str, float] | None = None) -> list[dict[str, Any]]:
    """Mean and median of what both clocks say of the very same requests; and what only the server can see.

    With the instrument's error bars (seconds) a row says whether its difference is larger: `resolved`.
    """
    bars = error_bars or {}
    rows: list[dict[str, Any]] = []
    for source, told in ok[ok["server_source"].notna()].groupby("server_source"):
        for metric, meaning in DEFINITIONS[str(source)].items():
            what_differs = WHAT_DIFFERS.get((str(source), metric))
            if what_differs is None:
                continue
            on_server = told[f"server_{metric}"].to_numpy(dtype=np.float64)
            on_client = told[metric].to_numpy(dtype=np.float64) if metric in told else None
            both = ~np.isnan(on_server) if on_client is None else ~(np.isnan(on_server) | np.isnan(on_client))
            if not both.any():
                continue
            for statistic, reduce in (("mean", np.mean), ("p50", np.median)):
                server = float(reduce(on_server[both]))
                client = None if on_client is None else float(reduce(on_client[both]))
                rows.append(
                    {
                        "metric": metric,
                        "statistic": statistic,
                        "unit": "s",
                        "n": int(both.sum()),
                        "client": client,
                        "server": server,
                        "difference": None if client is None else client - server,
                        "resolved": None
                        if client is None or metric not in bars
                        else abs(client - server) > bars[metric],
                        "source": source,
                        "what_differs": what_differs,
                        "server_definition": meaning,
                    }
                )
    return rows


def server_window(run: Run) -> list[dict[str, Any]]:
    """The server's histograms over the scraped window, beside the client's mean of the same window.

    Not the same requests one by one: whatever else the server answered is in its figures, so that no difference is
    given where the numbers of observations disagree by more than SAME_TRAFFIC.
    """
    seen = run.scraped
    finished = seen[seen["status"] == "ok"]
    gaps = metrics.chunk_gaps(run.arrivals)
    on_client: dict[str, tuple[Floats, str]] = {
        "ttft": (seen["ttft"].to_numpy(), definition(metrics.ttft)),
        "itl": (gaps.seconds[np.isin(gaps.request, seen.index)], definition(metrics.chunk_gaps)),
        "tpot": (finished["tpot"].to_numpy(), definition(metrics.tpot)),
        "e2e": (finished["e2e"].to_numpy(), definition(metrics.e2e)),
    }
    rows: list[dict[str, Any]] = []
    for metric, (_, meaning) in HISTOGRAMS.items():
        gained = expositions.histogram_delta(run.scrapes, run.first_scrapes, metric)
        if gained is None or not gained.count:
            continue
        values, client_meaning = on_client.get(metric, (np.array([]), "not seen from outside"))
        client = distribution(values)
        comparable = client["n"] > 0 and abs(gained.count - client["n"]) <= SAME_TRAFFIC * client["n"]
        row = {
            "metric": metric,
            "unit": "s",
            "client_n": client["n"],
            "client_mean": client.get("mean"),
            "server_n": int(gained.count),
            "server_mean": gained.mean,
            "difference": client["mean"] - gained.mean if comparable else None,
            "client_definition": client_meaning,
            "server_definition": meaning,
        }
        for p in PERCENTILES:
            interval = gained.percentile(p / 100)
            row[f"server_p{p}"] = interval and {
                "lower": interval.lower,
                "estimate": interval.estimate,
                "upper": interval.upper if math.isfinite(interval.upper) else None,
            }
        rows.append(row)
    return rows


def slo_limits(experiment: Mapping[str, Any]) -> dict[str, float]:
    """The limits set in an experiment, in seconds: {"ttft": 0.5, ...}."""
    slo = experiment.get("slo") or {}
    names = ("ttft", "tpot", "e2e")
    return {name: slo[f"{name}_ms"] / 1e3 for name in names if isinstance(slo.get(f"{name}_ms"), int | float)}


def _figures(run: Run) -> dict[str, Any]:
    measured, ok, window = run.measured, run.ok, run.window
    output_tokens = run.requests["output_tokens"].to_numpy()
    arrived = metrics.arrived_tokens(run.arrivals, output_tokens)
    counted = np.isin(run.arrivals.request, run.requests.index[run.requests["phase"] != "warmup"])
    limits = slo_limits(run.experiment)
    good = metrics.meets_slo(
        (measured["status"] == "ok").to_numpy(), {name: measured[name].to_numpy() for name in limits}, limits
    )
    rate, share = metrics.goodput(good, window)
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
            int((measured["status"] == "cancelled").sum()),
            "requests",
            "measured requests that this tool itself cut off",
        ),
        "warmup": one(int((run.requests["phase"] == "warmup").sum()), "requests", "sent before the measuring window"),
        "duration": one(window[1] - window[0], "s", "length of the measuring window"),
        "request_throughput": one(
            metrics.request_throughput(ended, window), "requests/s", definition(metrics.request_throughput)
        ),
        "output_throughput": one(
            metrics.output_throughput(run.arrivals.at[counted], arrived[counted], window),
            "tokens/s",
            definition(metrics.output_throughput),
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
    if limits:
        figures["goodput"] = one(rate, "requests/s", f"{definition(metrics.goodput)} SLO: {in_slo}")
        figures["goodput_share"] = one(share, "share", f"{definition(metrics.meets_slo)} SLO: {in_slo}")
    return figures


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


def _slo(run: Run) -> dict[str, Any] | None:
    """Whether enough requests met the SLO: ``slo.share`` of the measured ones must. None without an SLO."""
    share = (run.experiment.get("slo") or {}).get("share")
    limits = slo_limits(run.experiment)
    if not limits:
        return None
    ok = (run.measured["status"] == "ok").to_numpy()
    good = metrics.meets_slo(ok, {name: run.measured[name].to_numpy(dtype=np.float64) for name in limits}, limits)
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
    if run.meta.get("status") == "interrupted":
        return "Stopped before its time; every request that it had sent is in these figures."
    users = run.requests.loc[run.requests["phase"] != "warmup", "user"].nunique()
    flying = f"up to {users} requests, one a user," if users else "an unknown number of requests"
    return f"Partial: the run was killed or is still going on; {flying} were in flight and are not in these figures."


def _notes(run: Run) -> list[str]:
    lost = run.meta.get("lost_records")
    told = [f"{lost} records were lost on their way from the workers; they are in no figure."] if lost else []
    return [str(note) for note in run.meta.get("notes") or []] + told


def _errors(measured: pd.DataFrame) -> list[dict[str, Any]]:
    bad = measured[measured["status"] != "ok"]
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


def _clean(value: Any) -> Any:
    """Without NaN and numpy numbers, which JSON does not have."""
    if isinstance(value, Mapping):
        return {str(key): _clean(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_clean(item) for item in value]
    if isinstance(value, np.generic):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value
