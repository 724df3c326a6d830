"""vllm_bench.json: a run in the layout and by the definitions of `vllm bench serve`, for scripts that read that."""

import datetime
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from twoclocks.load import Run
from twoclocks.metrics import Bools, Floats, Ints, slo_limits
from twoclocks.record import LEFT
from twoclocks.rosetta import Arrivals, VllmAnswers, arrivals, vllm, vllm_answers, whole
from twoclocks.summary import clean

NOTE = "by vLLM's definitions, from the arrivals of a twoclocks run; output tokens as the server counted them"
PERCENTILES = (50, 95, 99)
PART = 5000
"""Requests whose gaps are written at once."""


def vllm_bench(run: Run) -> dict[str, Any]:
    """The result as `vllm bench serve --save-detailed` would write it; None where this run has no such figure.

    The lists have one entry a measured request, and there, as in vLLM's own files, 0 stands for what a failed request
    does not have. Seconds, and milliseconds where a name ends in _ms.
    """
    result, gaps, edges = _without_gaps(run)
    return result | {"itls": clean(_lists(gaps, edges))}


def write_vllm_bench(run: Run, path: Path) -> None:
    """The same as a file, on one line as vLLM writes its own. Raises OSError.

    The gaps part by part: those of a million requests would take gigabytes as lists, and as much again as text.
    """
    result, gaps, edges = _without_gaps(run)
    # no text can hold this place, since a quotation mark inside a text has a backslash before it
    before, place, after = msgspec.json.encode(result).partition(b'"itls":[]')
    with path.open("wb") as file:
        file.write(before + place[:-1])
        for first in range(0, len(edges) - 1, PART):
            part = msgspec.json.encode(_lists(gaps, edges[first : first + PART + 1]))
            file.write((b"," if first else b"") + part[1:-1])
        file.write(b"]" + after)


def _lists(gaps: Floats, edges: Ints) -> list[list[float]]:
    return [gaps[begin:end].tolist() for begin, end in pairwise(edges.tolist())]


def _without_gaps(run: Run) -> tuple[dict[str, Any], Floats, Ints]:
    """The result without its itls; all gaps, and the edges between those of the requests."""
    measured, target = run.measured, run.meta.get("target") or {}
    a, limits = arrivals(run), slo_limits(run.experiment)
    one, figures = vllm_answers(a), vllm(a, limits)
    ok, duration = a.ok & ~np.isnan(one.ttft), whole(a)
    started = run.meta.get("started_at_unix")
    date = datetime.datetime.fromtimestamp(started, datetime.UTC).strftime("%Y%m%d-%H%M%S") if started else None
    left = int(measured["error_kind"].isin(LEFT).sum())
    seen = one.seen
    gaps = seen.gaps(np.ones_like(ok))
    edges = np.cumsum([0, *np.maximum(seen.end - seen.begin - 1, 0)])
    prompt, output = a.prompt_tokens[ok].sum(), a.output_tokens[ok].sum()
    result: dict[str, Any] = {
        "date": date,
        "label": run.name,
        "endpoint_type": target.get("api"),
        "backend": target.get("server"),
        "model_id": target.get("model"),
        "tokenizer_id": None,
        "num_prompts": len(ok),
        **_traffic(run.experiment.get("load") or {}),
        "duration": duration,
        "completed": int(ok.sum()),
        "failed": int((~ok).sum()) - left,
        "total_input_tokens": prompt,
        "total_output_tokens": output,
        "request_throughput": figures["request_throughput"]["value"],
        "request_goodput": figures["goodput"]["value"] if limits else None,
        "output_throughput": figures["output_throughput"]["value"],
        "total_token_throughput": (prompt + output) / duration if duration > 0 else None,
        "input_lens": _counts(a.prompt_tokens),
        "output_lens": _counts(np.where(ok, a.output_tokens, 0)),
        "ttfts": np.nan_to_num(one.ttft).tolist(),
        "itls": [],
        "latencies": np.where(ok, one.e2e, 0).tolist(),
        "start_times": a.began_at.tolist(),
        "errors": [message or "" for message in measured["error_message"]],
        **_peaks(a, one, ok),
    }
    if measured["output_text"].notna().any():
        result["generated_texts"] = [text or "" for text in measured["output_text"]]
    latencies = {
        "ttft": one.ttft[ok],
        "tpot": one.tpot[ok & (a.output_tokens > 1)],
        "itl": seen.gaps(ok),
        "e2el": one.e2e[ok],
    }
    for name, values in latencies.items():
        result |= _statistics(name, values)
    result["twoclocks"] = NOTE
    if left:
        result["twoclocks"] += f"; {left} requests that their users left are neither completed nor failed"
    cleaned: dict[str, Any] = clean(result)
    return cleaned, gaps, edges


def _traffic(load: dict[str, Any]) -> dict[str, Any]:
    """The load in vLLM's words: "inf" is no limit of rate beside max_concurrency, or arrivals without any chance."""
    if load.get("shape") not in ("rate", "trace", "batch"):
        return {"request_rate": "inf", "burstiness": 1.0, "max_concurrency": load.get("users")}
    rate = load.get("rate") if load["shape"] == "rate" else None
    burstiness = {"constant": "inf", "poisson": 1.0}.get(str(load.get("arrivals")), load.get("burstiness"))
    scalar = isinstance(rate, int | float)
    return {"request_rate": rate if scalar else None, "burstiness": burstiness, "max_concurrency": None}


def _peaks(a: Arrivals, one: VllmAnswers, ok: Bools) -> dict[str, float]:
    """Largest number of events, and of requests under way, in any second since the first start: vLLM counts events
    under the name of tokens.
    """
    if not ok.any():
        return {"max_output_tokens_per_s": 0.0, "max_concurrent_requests": 0}
    zero = a.began_at[ok].min()
    begin, end = (a.began_at[ok] - zero).astype(np.int64), (a.began_at[ok] + one.e2e[ok] - zero).astype(np.int64)
    events = np.concatenate([one.seen.first()[ok], one.seen.at[1:][one.seen.later(ok)]]) - zero
    under_way = np.cumsum(np.bincount(begin, minlength=end.max() + 2) - np.bincount(end + 1, minlength=end.max() + 2))
    busiest = np.bincount(events.astype(np.int64)).max()
    return {"max_output_tokens_per_s": float(busiest), "max_concurrent_requests": int(under_way.max())}


def _statistics(name: str, values: Floats) -> dict[str, float | None]:
    ms = values[~np.isnan(values)] * 1e3
    of: dict[str, Callable[[Floats], Any]] = {"mean": np.mean, "median": np.median, "std": np.std}
    found = {f"{word}_{name}_ms": float(reduce(ms)) if len(ms) else None for word, reduce in of.items()}
    for p in PERCENTILES:
        found[f"p{p}_{name}_ms"] = float(np.percentile(ms, p)) if len(ms) else None
    return found


def _counts(values: Floats) -> list[int]:
    return [int(value) for value in np.nan_to_num(values)]
