"""Server logs: lines -> what they say of single requests.

Pure: lines in, rows out. A line is read by the words that the server prints around its figures, wherever they stand in
it, so that what a container runtime, a journal or a terminal adds does not matter. Any text is expected: what is cut,
torn or foreign gives no row, and the time to read a line grows with its length alone.
"""

import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

import msgspec

from twoclocks.log_lines import NUMBER, PREFIX_CHARS, Line, messages, time_before
from twoclocks.server_requests import ServerRequest

_FINISHED = re.compile(
    r"Request (?P<id>\S{1,256}) finished: prefill_len = (?P<prefill>[0-9]{1,12}) decode_len = (?P<decode>[0-9]{1,12}) "
    r"start_time = (?P<start>[0-9.eE+-]{1,40}) end_time = (?P<end>[0-9.eE+-]{1,40})\s*$"
)
_TGI_TIMES = re.compile(r'\b((?:total|validation|queue|inference)_time|time_per_token)="([^"]{1,40})"')
_TGI_SPAN = re.compile(r"([a-z_]{1,40})\{$")
_DURATION = re.compile(rf"({NUMBER})(ns|[µμu]s|ms|s)")
_DURATION_UNITS = {"ns": 1e-9, "µs": 1e-6, "μs": 1e-6, "us": 1e-6, "ms": 1e-3, "s": 1.0}
_TRACE_ID = re.compile(r"\btrace_?id[^0-9a-zA-Z]{1,4}([0-9a-f]{32})\b")
_STATS_ANCHOR = "ReqTimeStats("
_STATS_ITEM = re.compile(r"\b([a-z_]{1,40})=([^,() ]{1,256})")


def log_requests(lines: Iterable[str]) -> list[ServerRequest]:
    """What a log says of single requests, in the log's order; durations that no request could have are left out.

    transformers serve with continuous batching: its debug line. TGI: its `Success` lines, which carry no id of ours,
    and a trace id only where a span around them was printed with it: without one a row belongs to no known request.
    SGLang: the files of --export-metrics-to-file, --log-requests-format json, or --enable-request-time-stats-logging,
    the first of these that tells of a request. vLLM logs no timing of a request, and llama.cpp no id.

    A line that comes twice, as from two copies of a log, is one row; two lines that differ under one id are two.
    """
    rows: list[_Ranked] = []
    for line in messages(lines):
        found, text = _from_json(line), line.text
        if found is None and "finished: prefill_len" in text:
            found = _transformers(text)
        elif found is None and _STATS_ANCHOR in text:
            found = _sglang_stats(text)
        elif found is None and "total_time=" in text and text.rstrip().endswith(": Success"):
            found = _tgi_text(line)
        if found is not None:
            rows.append(found)
    best: dict[tuple[str, str | None], int] = {}
    for rank, row in rows:
        key = row.server, row.request_id
        best[key] = min(rank, best.get(key, rank))
    told = [row for rank, row in rows if row.request_id is None or rank == best[row.server, row.request_id]]
    return list({msgspec.json.encode(row): row for row in told}.values())


_Ranked = tuple[int, ServerRequest]  # of several kinds of line about one request that of the lowest rank is used


def _transformers(text: str) -> _Ranked | None:
    match = _FINISHED.search(text)
    if match is None:
        return None
    queue, e2e = _number(match["start"]), _number(match["end"])
    if queue is None or e2e is None:
        return None
    return 0, ServerRequest(
        source="log",
        server="transformers",
        request_id=match["id"],
        queue=queue,
        e2e=e2e,
        prompt_tokens=int(match["prefill"]),
        output_tokens=int(match["decode"]),
    )


def _tgi_text(line: Line) -> _Ranked | None:
    # the request's own parameters come first and may hold any text, also such as this: the last of each counts
    said = dict(_TGI_TIMES.findall(line.text))
    before = line.text[: max(0, line.text.find("parameters=", 0, 2000))]
    trace, span = _TRACE_ID.search(before), _TGI_SPAN.search(before)
    at = line.time or time_before(before, PREFIX_CHARS)
    return _tgi(said, at, span[1] if span else None, trace[1] if trace else None)


def _tgi(said: Mapping[str, Any], at: str | None, span: Any, trace_id: str | None) -> _Ranked | None:
    times = {name: _duration(said.get(f"{name}_time")) for name in ("total", "validation", "queue", "inference")}
    if times["total"] is None:
        return None
    told = {"time": at, "span": span if isinstance(span, str) else None}
    return 0, ServerRequest(
        source="log",
        server="tgi",
        trace_id=trace_id,
        validation=times["validation"],
        queue=times["queue"],
        inference=times["inference"],
        time_per_token=_duration(said.get("time_per_token")),
        e2e=times["total"],
        told={key: value for key, value in told.items() if value is not None},
    )


def _from_json(line: Line) -> _Ranked | None:
    """A row from a line of JSON that is about one request; None if it is about something else, or no JSON."""
    said = line.json or {}
    span = said.get("span")
    if isinstance(span, dict) and said.get("message") == "Success":
        spans = said.get("spans")
        outer = [each for each in (spans if isinstance(spans, list) else []) if isinstance(each, dict)]
        ids = [each.get("trace_id") for each in (said, span, *outer)]
        trace_id = next((each for each in ids if isinstance(each, str) and re.fullmatch("[0-9a-f]{32}", each)), None)
        return _tgi(span, line.time, span.get("name"), trace_id)
    if said.get("event") == "request.finished" and isinstance(out := said.get("out"), dict):
        meta = out.get("meta_info")
        row = _sglang_row(meta, said.get("rid")) if isinstance(meta, dict) else None
        return (1, row) if row else None
    if "e2e_latency" in said and "request_parameters" in said:
        row = _sglang_row(said, said.get("id"))
        return (0, row) if row else None
    return None


_SGLANG_TOLD = (
    "request_received_ts", "api_server_dispatch_finish_ts", "forward_entry_time", "prefill_finished_time",
    "response_sent_to_client_ts", "request_finished_ts", "num_retractions", "reasoning_tokens",
)  # fmt: skip


def _sglang_row(said: Mapping[str, Any], rid: Any) -> ServerRequest | None:
    e2e = _number(said.get("e2e_latency"))
    if not isinstance(rid, str) or e2e is None:
        return None
    entered, prefilled = _number(said.get("forward_entry_time")), _number(said.get("prefill_finished_time"))
    per_second = _number(said.get("decode_throughput"))
    reason = said.get("finish_reason")
    if isinstance(reason, dict):
        reason = reason.get("type")
    return ServerRequest(
        source="log",
        server="sglang",
        request_id=rid,
        ttft=_number(said.get("first_token_latency")),
        queue=_number(said.get("queue_time")),
        prefill=_number(prefilled - entered) if prefilled and entered else None,
        time_per_token=_number(1 / per_second) if per_second else None,
        e2e=e2e,
        prompt_tokens=_count(said.get("prompt_tokens")),
        output_tokens=_count(said.get("completion_tokens")),
        cached_tokens=_count(said.get("cached_tokens")),
        finish_reason=reason if isinstance(reason, str) else None,
        told={key: number for key in _SGLANG_TOLD if (number := _number(said.get(key))) is not None},
    )


def _sglang_stats(text: str) -> _Ranked | None:
    said = dict(_STATS_ITEM.findall(text[text.find(_STATS_ANCHOR) :]))
    queue, forward = _duration(said.get("queue_duration")), _duration(said.get("forward_duration"))
    if "rid" not in said or queue is None or forward is None:
        return None
    return 2, ServerRequest(
        source="log",
        server="sglang",
        request_id=said["rid"],
        queue=queue,
        inference=forward,
        prompt_tokens=_count(said.get("input_len")),
        output_tokens=_count(said.get("output_len")),
        cached_tokens=_count(said.get("cached_input_len")),
    )


def _number(said: Any) -> float | None:
    """A finite number that is not negative, told as a number or as text."""
    if isinstance(said, bool) or not isinstance(said, int | float | str):
        return None
    try:
        number = float(said)
    except (ValueError, OverflowError):
        return None
    return number if math.isfinite(number) and number >= 0 else None


def _count(said: Any) -> int | None:
    number = _number(said)
    return int(number) if number is not None and number == int(number) and number < 2**53 else None


def _duration(said: Any) -> float | None:
    """Seconds of a duration as Rust and SGLang print it: 729.63µs, 1.102828046s."""
    match = _DURATION.fullmatch(said) if isinstance(said, str) else None
    return float(match[1]) * _DURATION_UNITS[match[2]] if match else None
