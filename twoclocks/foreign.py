"""Foreign: a result file of another load tester -> its figures, by the names of rosetta.

Read are what `vllm bench serve --save-result` writes (JSON, or JSON Lines with --append-result), guidellm's
benchmarks.json, aiperf's profile_export.jsonl, an experiment's JSON of genai-bench, and Locust's *_stats.csv. What a
file does not hold is None; nothing is computed that it does not tell, but for aiperf, whose file holds one record a
request. Pure but for reading the file.
"""

import csv
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from twoclocks.errors import TwoclocksError, plain
from twoclocks.metrics import Floats, distribution
from twoclocks.rosetta import LATENCIES, RATES, Figures

STATISTICS = ("mean", "p50", "p95", "p99")
READABLE = (
    "a result of vllm bench serve (--save-result), guidellm's benchmarks.json, aiperf's profile_export.jsonl, an "
    "experiment's JSON of genai-bench, or Locust's *_stats.csv"
)
SECONDS = {"s": 1.0, "ms": 1e-3, "us": 1e-6, "ns": 1e-9}


@dataclass(frozen=True, slots=True)
class Result:
    """One benchmark of another tool."""

    name: str
    tool: str  # a name of rosetta.TOOLS
    figures: Figures  # seconds; None for what the file does not hold


def read(path: Path) -> list[Result]:
    """What a file tells: several benchmarks where it holds several. Raises TwoclocksError, in one line."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise TwoclocksError(f"{path}: cannot be read: {error.strerror}") from None
    try:
        found = _locust(data) if path.suffix.lower() == ".csv" else _json(data)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError, csv.Error, _Strange) as error:
        raise TwoclocksError(f"{path}: is no result file that can be read: {error}; expected {READABLE}") from None
    names = [path.name + (f" [{told}]" if told else "") for told, _, _ in found]
    return [Result(name, tool, figures) for name, (_, tool, figures) in zip(names, found, strict=True)]


class _Strange(Exception):
    """What was found in place of a result."""


_Found = tuple[str, str, Figures]  # what tells it from others in the file, tool, figures


def _json(data: bytes) -> list[_Found]:
    try:
        rows = [msgspec.json.decode(data)]
    except msgspec.DecodeError:
        rows = [msgspec.json.decode(line) for line in data.splitlines() if line.strip()]
    if not rows or not all(isinstance(row, dict) for row in rows):
        raise _Strange("it holds no JSON object" if rows else "it is empty")
    first = rows[0]
    if "benchmarks" in first:
        return _guidellm(first)
    if "aggregated_metrics" in first:
        return [("", "genai-bench", _genai_bench(first))]
    if {"metadata", "metrics"} <= first.keys():
        return [("", "aiperf", _aiperf(rows))]
    if {"completed", "request_throughput"} <= first.keys():
        return [(str(n) if len(rows) > 1 else "", "vLLM bench serve", _vllm(row)) for n, row in enumerate(rows, 1)]
    raise _Strange(f"it holds {', '.join(plain(key)[:20] for key in list(first)[:4]) or 'nothing'}")


def _vllm(told: Mapping[str, Any]) -> Figures:
    def times(name: str) -> dict[str, Any]:
        keys = {"mean": f"mean_{name}_ms", "p50": f"median_{name}_ms", "p95": f"p95_{name}_ms", "p99": f"p99_{name}_ms"}
        return _times({key: told.get(word) for key, word in keys.items()}, 1e-3)

    names = {"ttft": "ttft", "itl": "itl", "tpot": "tpot", "e2e": "e2el"}
    return {metric: times(name) for metric, name in names.items()} | _rates(told, *list(RATES)[:2])


def _guidellm(told: Mapping[str, Any]) -> list[_Found]:
    names = {
        "ttft": ("time_to_first_token_ms", 1e-3),
        "itl": ("inter_token_latency_ms", 1e-3),
        "tpot": ("time_per_output_token_ms", 1e-3),
        "e2e": ("request_latency", 1.0),
    }
    found: list[_Found] = []
    for number, one in enumerate(_list(told["benchmarks"]), 1):
        metrics, figures = _dict(_dict(one).get("metrics")), {}
        for metric, (name, unit) in names.items():
            answered = _dict(_dict(metrics.get(name)).get("successful"))
            figures[metric] = _times({"mean": answered.get("mean"), **_dict(answered.get("percentiles"))}, unit)
        rates = {name: _dict(_dict(metrics.get(name)).get("total")).get("mean") for name in metrics}
        figures |= _rates(rates, "requests_per_second", "output_tokens_per_second")
        strategy = _dict(_dict(_dict(one).get("config")).get("strategy")).get("type_")
        found.append((" ".join(filter(None, [str(number), plain(strategy or "")[:40]])), "guidellm", figures))
    if not found:
        raise _Strange("it holds no benchmark")
    return found


def _genai_bench(told: Mapping[str, Any]) -> Figures:
    whole, unit = _dict(told["aggregated_metrics"]), told.get("_time_unit", "s")
    stats = _dict(whole.get("stats"))
    names = {"ttft": "ttft", "tpot": "tpot", "e2e": "e2e_latency"}
    figures = {metric: _times(_dict(stats.get(name)), _unit(unit)) for metric, name in names.items()}
    return figures | _rates(whole, "requests_per_second", "mean_output_throughput_tokens_per_s")


def _aiperf(rows: Sequence[Mapping[str, Any]]) -> Figures:
    kept = [
        row
        for row in rows
        if row.get("error") is None and _dict(row.get("metadata")).get("benchmark_phase", "profiling") == "profiling"
    ]

    def column(name: str, in_seconds: bool = True) -> Floats:
        cells = [_dict(_dict(row.get("metrics")).get(name)) for row in kept]
        found = [
            (_number(cell.get("value")), _unit(cell.get("unit")) if in_seconds and cell else 1.0) for cell in cells
        ]
        return np.array([np.nan if value is None else value * unit for value, unit in found])

    names = {"ttft": "time_to_first_token", "itl": "inter_token_latency", "e2e": "request_latency"}
    values = {metric: column(name) for metric, name in names.items()}
    began = (
        np.array([_number(_dict(row.get("metadata")).get("request_start_ns")) for row in kept], dtype=np.float64) / 1e9
    )
    tokens, known = column("output_sequence_length", in_seconds=False), ~np.isnan(began + values["e2e"])
    seconds = float((began + values["e2e"])[known].max() - began[known].min()) if known.any() else 0.0
    amounts = {"request_throughput": float(len(kept)), "output_throughput": float(tokens.sum())}
    rates = {name: amount / seconds if seconds > 0 else None for name, amount in amounts.items()}
    return {metric: _times(distribution(found), 1.0) for metric, found in values.items()} | _rates(rates, *rates)


def _locust(data: bytes) -> list[_Found]:
    rows = list(csv.DictReader(io.StringIO(data.decode("utf-8"))))
    if not rows or not {"Name", "Request Count", "Average Response Time"} <= rows[0].keys():
        raise _Strange("its first line names no columns of Locust's statistics")
    told = next((row for row in rows if row["Name"] == "Aggregated"), rows[-1])
    keys = {"mean": "Average Response Time", "p50": "50%", "p95": "95%", "p99": "99%"}
    figures = {"e2e": _times({key: _text_number(told.get(word)) for key, word in keys.items()}, 1e-3)}
    rate = {"request_throughput": _text_number(told.get("Requests/s"))}
    return [("", "Locust", figures | _rates(rate, *rate))]


def _times(told: Mapping[str, Any], unit: float) -> dict[str, Any]:
    """mean, p50, p95 and p99 in seconds; None for what is not there."""
    values = {key: _number(told.get(key)) for key in STATISTICS}
    return {"unit": "s", **{key: None if value is None else value * unit for key, value in values.items()}}


def _rates(told: Mapping[str, Any], *keys: str) -> Figures:
    """request_throughput, and output_throughput where a second key is given."""
    return {
        name: {"unit": unit, "value": _number(told.get(key))}
        for (name, unit), key in zip(RATES.items(), keys, strict=False)
    }


def _unit(name: Any) -> float:
    if not isinstance(name, str) or name not in SECONDS:
        raise _Strange(f"its unit of time is {plain(name)[:20]}, not one of {', '.join(SECONDS)}")
    return SECONDS[name]


def _number(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        number = float(value)
    except OverflowError:  # JSON's integers have no end
        return None
    return number if math.isfinite(number) else None


def _text_number(text: str | None) -> float | None:
    try:
        return _number(float(text or ""))
    except ValueError:  # N/A
        return None


def _dict(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}


def _list(value: Any) -> Sequence[Any]:
    return value if isinstance(value, list) else []


METRICS = (*LATENCIES, "request_throughput", "output_throughput")
"""What is held side by side. No goodput: these files do not name the limits that theirs is of."""


def beside(result: Result, ours: Sequence[tuple[str, Figures]]) -> dict[str, Any]:
    """A result and our runs by the definitions of its tool: a row a figure that either has.

    ``ours``: the name of each run, and its figures by rosetta.TOOLS[result.tool].
    """
    rows = []
    for metric in METRICS:
        unit, statistics = ("s", STATISTICS) if metric in LATENCIES else (RATES[metric], ("value",))
        for statistic in statistics:
            theirs = result.figures.get(metric, {}).get(statistic)
            values = [figures.get(metric, {}).get(statistic) for _, figures in ours]
            if theirs is not None or any(metric in figures for _, figures in ours):
                rows.append({"metric": metric, "statistic": statistic, "unit": unit, "theirs": theirs, "ours": values})
    return {"name": result.name, "tool": result.tool, "runs": [name for name, _ in ours], "rows": rows}
