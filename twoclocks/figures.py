"""Figures: a Run -> what its client measured, each figure with its unit and its definition; its levels and its SLO."""

from typing import Any

import numpy as np
import pandas as pd

from twoclocks import metrics
from twoclocks.load import Run
from twoclocks.metrics import Bools, Floats, definition, distribution, slo_limits
from twoclocks.record import GAVE_UP, HUNG_UP, LEFT

WHOLE_RUN = "(last token chunk - first request sent), the drain in it and the warm-up left out"
LEFT_OUT = (
    "their tokens count to the throughput, their latencies to no distribution: who leaves after x s has no TTFT above x"
)
SLO_SHARE = 0.99
"""Share of the measured requests that must meet the SLO where an experiment does not say."""


def good_requests(run: Run) -> Bools:
    """Which of the requests that the SLO judges (Run.judged) met all of its limits."""
    judged, limits = run.judged, slo_limits(run.experiment)
    values = {name: judged[name].to_numpy(dtype=np.float64) for name in limits}
    return metrics.meets_slo((judged["status"] == "ok").to_numpy(), values, limits)


def client_figures(run: Run) -> dict[str, Any]:
    """Every figure by its name. Latencies are of the measured requests that ended ok."""
    measured, ok, window, whole = run.measured, run.ok, run.window, _whole(run)
    kinds = measured["error_kind"]
    ended = measured["ended_at"].to_numpy()[(measured["status"] == "ok").to_numpy()]
    gaps = run.gaps
    e2e, tokens = ok["e2e"].to_numpy(), ok["output_tokens"].to_numpy()
    figures = {
        "requests": _one(
            len(measured), "requests", "measured requests: sent in the measuring window, warm-up left out"
        ),
        "ok": _one(len(ok), "requests", "measured requests whose stream came to its proper end"),
        "failed": _one(
            int((~measured["status"].isin(["ok", "cancelled"])).sum()), "requests", "measured requests that failed"
        ),
        "cancelled": _one(
            int(((measured["status"] == "cancelled") & ~kinds.isin(LEFT)).sum()),
            "requests",
            "measured requests that this tool itself cut off at the end of the run",
        ),
        "hung_up": _one(
            int((kinds == HUNG_UP).sum()),
            "requests",
            "measured requests that were hung up on as workload.cancel_share drew; no failures, and not judged by the "
            f"SLO; {LEFT_OUT}",
        ),
        "gave_up": _one(
            int((kinds == GAVE_UP).sum()),
            "requests",
            "measured requests without a first token within workload.patience_s, given up by their user; no failures, "
            f"but misses of the SLO; {LEFT_OUT}",
        ),
        "warmup": _one(int((run.requests["phase"] == "warmup").sum()), "requests", "sent before the measuring window"),
        "drain": _one(
            int((run.requests["phase"] != "warmup").sum()) - len(measured),
            "requests",
            "begun before the end of the measuring window and sent after it; in no other figure but the throughput "
            "of the whole run. requests + warmup + drain = all of requests.jsonl",
        ),
        "duration": _one(window[1] - window[0], "s", "length of the measuring window"),
        "request_throughput": _one(
            metrics.request_throughput(ended, window), "requests/s", definition(metrics.request_throughput)
        ),
        "output_throughput": _one(output_throughput(run), "tokens/s", definition(metrics.output_throughput)),
        "request_throughput_run": _one(
            len(ended) / (whole[1] - whole[0]) if whole[1] > whole[0] else None,
            "requests/s",
            f"measured requests that ended ok / {WHOLE_RUN}",
        ),
        "output_throughput_run": _one(
            output_throughput(run, whole),
            "tokens/s",
            f"tokens that arrived over the whole run / {WHOLE_RUN}; tokens of cut-off requests count",
        ),
        "output_tokens": _one(_total(ok["output_tokens"]), "tokens", "output tokens of the requests that ended ok"),
        "prompt_tokens": _one(_total(ok["prompt_tokens"]), "tokens", "prompt tokens of the requests that ended ok"),
        "ttft": _many(ok["ttft"].to_numpy(), "s", definition(metrics.ttft)),
        "first_event": _many(ok["first_event"].to_numpy(), "s", definition(metrics.first_event)),
        "stream_throughput": _many(
            metrics.stream_throughput(e2e, tokens), "tokens/s", definition(metrics.stream_throughput)
        ),
        "itl": _many(gaps.seconds, "s", definition(metrics.chunk_gaps)),
        "itl_per_token": _many(metrics.per_token_itl(gaps), "s", definition(metrics.per_token_itl)),
        "tpot": _many(ok["tpot"].to_numpy(), "s", definition(metrics.tpot)),
        "e2e": _many(e2e, "s", definition(metrics.e2e)),
        "e2e_per_token": _many(ok["e2e_per_token"].to_numpy(), "s", definition(metrics.e2e_per_token)),
    }
    if is_open(run) and not run.in_process:  # there a batch is handed over as soon as it is due
        figures |= _open_loop(run)
    if shape_of(run) == "batch":
        figures |= _of_batches(run)
    if limits := slo_limits(run.experiment):
        rate, share = metrics.goodput(good_requests(run), window)
        in_slo = ", ".join(f"{name.upper()} <= {limit * 1e3:g} ms" for name, limit in limits.items())
        figures["goodput"] = _one(rate, "requests/s", f"{definition(metrics.goodput)} SLO: {in_slo}")
        figures["goodput_share"] = _one(share, "share", f"{definition(metrics.meets_slo)} SLO: {in_slo}")
    return figures


def _open_loop(run: Run) -> dict[str, Any]:
    """Where requests leave when they are due: what was due, and how late."""
    measured, ok, window = run.measured, run.ok, run.window
    unsent = run.meta.get("not_sent")
    due = None if unsent is None else len(measured) + unsent
    length = window[1] - window[0]
    return {
        "due": _one(due, "requests", "requests that were due in the measuring window: sent + not sent"),
        "not_sent": _one(
            unsent,
            "requests",
            "requests that were due while load.max_in_flight others were under way, and were not sent",
        ),
        "offered_rate": _one(
            None if due is None or length <= 0 else due / length,
            "requests/s",
            "offered rate = requests due / length of the measuring window",
        ),
        "send_lateness": _many(
            (measured["sent_at"] - measured["intended_at"]).to_numpy(),
            "s",
            "send lateness = sent_at - intended_at, of the measured requests; connecting is in it",
        ),
        "ttft_from_intended": _many(
            ok["ttft_from_intended"].to_numpy(),
            "s",
            "TTFT from intended = first chunk with content, reasoning or a tool call - intended_at, when the "
            "request was due",
        ),
        "e2e_from_intended": _many(
            ok["latency_from_intended"].to_numpy(),
            "s",
            "E2E from intended = last token chunk - intended_at, when the request was due",
        ),
    }


def _of_batches(run: Run) -> dict[str, Any]:
    """Of shape batch: one value a batch."""
    made = batches_of(run)
    which = "batches of load.batch requests that all ended ok"
    return {
        "batches": _one(len(made.seconds), "requests", f"measured {which}"),
        "batch_latency": _many(made.seconds, "s", f"{definition(metrics.batches)} One value a batch, {which}"),
        "batch_latency_per_request": _many(
            made.seconds / made.requests, "s", f"batch latency / requests of the batch. One value a batch, {which}"
        ),
        "batch_throughput": _many(
            made.tokens / made.seconds,
            "tokens/s",
            f"output tokens of a batch / batch latency; pauses between batches are not in it. One value a batch, "
            f"{which}",
        ),
    }


def _one(value: float | int | None, unit: str, meaning: str) -> dict[str, Any]:
    return {"value": value, "unit": unit, "definition": meaning}


def _many(values: Floats, unit: str, meaning: str) -> dict[str, Any]:
    return {"unit": unit, "definition": meaning, **distribution(values)}


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


def level_figures(run: Run) -> list[dict[str, Any]]:
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
                "output_throughput": output_throughput(run, span),
                "ttft": distribution(ok["ttft"].to_numpy()),
                "tpot": distribution(ok["tpot"].to_numpy()),
                "unit": "s; tokens/s",
                "definition": "requests sent while the level lasted, their TTFT and TPOT; tokens that arrived while it "
                "lasted / its length",
            }
        )
    return rows


def output_throughput(run: Run, span: tuple[float, float] | None = None) -> float:
    """Of all phases but the warm-up, tokens/s; in the measuring window, or in another span of the run."""
    return metrics.output_throughput(*arrived(run), span or run.window)


def arrived(run: Run) -> tuple[Floats, Floats]:
    """(arrival on the run's clock, tokens) of every chunk of all requests but those to warm up."""
    tokens = metrics.arrived_tokens(run.arrivals, run.requests["output_tokens"].to_numpy())
    counted = np.isin(run.arrivals.request, run.requests.index[run.requests["phase"] != "warmup"])
    return run.arrivals.at[counted], tokens[counted]


def slo(run: Run) -> dict[str, Any] | None:
    """Whether enough requests met the SLO: ``slo.share`` of those that it judges must. None without an SLO."""
    share = (run.experiment.get("slo") or {}).get("share")
    limits = slo_limits(run.experiment)
    if not limits:
        return None
    good = good_requests(run)
    met = float(good.mean()) if len(good) else 0.0
    required = float(share) if isinstance(share, int | float) else SLO_SHARE
    return {"limits": limits, "unit": "s", "required_share": required, "share": met, "met": met >= required}


def _total(values: pd.Series) -> int | None:
    known = values.dropna()
    return int(known.sum()) if len(known) else None
