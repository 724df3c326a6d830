"""vllm_bench.json: a run in the layout of vLLM's own benchmark result, for scripts that already read that.

Totals follow vLLM's definitions (requests that ended ok, over first send -> last token); latencies follow ours, which
the file says of itself.
"""

import datetime
from collections.abc import Callable
from typing import Any

import numpy as np

from twoclocks.load import Run
from twoclocks.metrics import Floats
from twoclocks.record import LEFT


def vllm_bench(run: Run, summary: dict[str, Any]) -> dict[str, Any]:
    """The result as vLLM's benchmark would lay it out; None where this run has no such figure.

    The lists have one entry a measured request.
    """
    measured, ok, target = run.measured, run.ok, run.meta.get("target") or {}
    begin = float(measured["sent_at"].min()) if len(measured) else float("nan")
    duration = float((ok["sent_at"] + ok["e2e"]).max()) - begin if len(ok) else float("nan")
    prompt, output = ok["prompt_tokens"].sum(), ok["output_tokens"].sum()
    started = run.meta.get("started_at_unix")
    date = datetime.datetime.fromtimestamp(started, datetime.UTC).strftime("%Y%m%d-%H%M%S") if started else None
    load = run.experiment.get("load") or {}
    good = summary["figures"].get("goodput_share", {}).get("value")  # there only if the experiment has an SLO
    left = int(measured["error_kind"].isin(LEFT).sum())
    gaps, rows = run.gaps, measured.index.to_numpy()
    edges = np.searchsorted(gaps.request, [rows, rows + 1])
    result: dict[str, Any] = {
        "date": date,
        "label": run.name,
        "endpoint_type": target.get("api"),
        "backend": target.get("server"),
        "model_id": target.get("model"),
        "num_prompts": len(measured),
        "request_rate": "inf",  # closed loop: vLLM's word for no rate limit beside max_concurrency
        "max_concurrency": load.get("users"),
        "duration": duration,
        "completed": len(ok),
        "failed": len(measured) - len(ok) - left,
        "total_input_tokens": int(prompt),
        "total_output_tokens": int(output),
        "request_throughput": len(ok) / duration if duration > 0 else None,
        "request_goodput": None if good is None or not duration > 0 else good * len(run.judged) / duration,
        "output_throughput": output / duration if duration > 0 else None,
        "total_token_throughput": (prompt + output) / duration if duration > 0 else None,
        "input_lens": _list(measured["prompt_tokens"].to_numpy()),
        "output_lens": _list(measured["output_tokens"].to_numpy()),
        "ttfts": _list(measured["ttft"].to_numpy()),
        "itls": [gaps.seconds[a:b].tolist() for a, b in zip(*edges, strict=True)],
        "start_times": _list(measured["sent_at"].to_numpy()),
        "errors": [message or "" for message in measured["error_message"]],
    }
    if measured["output_text"].notna().any():
        result["generated_texts"] = [text or "" for text in measured["output_text"]]
    latencies = {"ttft": ok["ttft"], "tpot": ok["tpot"], "e2el": ok["e2e"]}
    for name, values in (*((k, v.to_numpy()) for k, v in latencies.items()), ("itl", gaps.seconds)):
        result |= _statistics(name, values)
    result["twoclocks"] = "latencies as defined in summary.json (TTFT: first chunk with a token; ITL: chunk gaps)"
    if left:
        result["twoclocks"] += f"; {left} requests that their users left are neither completed nor failed"
    return {
        key: None if isinstance(value, float) and not np.isfinite(value) else value for key, value in result.items()
    }


def _statistics(name: str, values: Floats) -> dict[str, float | None]:
    known = values[~np.isnan(values)] * 1e3
    of: dict[str, Callable[[Floats], Any]] = {"mean": np.mean, "median": np.median, "std": np.std}
    found = {f"{word}_{name}_ms": float(reduce(known)) if len(known) else None for word, reduce in of.items()}
    for p in (95, 99):
        found[f"p{p}_{name}_ms"] = float(np.percentile(known, p)) if len(known) else None
    return found


def _list(values: Floats) -> list[float | int | None]:
    return [None if np.isnan(v) else int(v) if float(v).is_integer() else float(v) for v in values]
