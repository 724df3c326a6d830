"""Join: a request's client record with the server's own timing of the same request.

Takes record fields and what servers told, returns columns. Three sources: spans ("otlp"), the timings inside a response
("in-band"), and log lines ("log"). Matched by request id, else by trace id; only durations are compared, never the
times of two hosts. Seconds; NaN where the server says nothing. What each figure means stands in clocks.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from twoclocks.clocks import CLOCKS, METRICS, TTFT_IS_A_SUM
from twoclocks.server_requests import ServerRequest

NAN = math.nan
SOURCES = ("otlp", "in-band", "log")
"""Which source is believed first where several tell of a request. Spans tell most; a log is the least exact."""
LARGEST = 1e12
"""No server counts or times further than this, in whatever unit: milliseconds, Unix seconds, tokens."""
TEXT_COLUMNS = ("server_source", "server_kind", "server_unmatched")

NO_TIMINGS = "the response carried no timings of the server"
NO_SPAN = "no span for this request came from the server"
NO_LINE = "the server's log has no line for this request"
NO_ID_IN_LOG = "the server's log has no id"
TOLD_TWICE = "the server told of this request more than once, with different figures (was it sent again on the way?)"
NO_ID = "rows that carry no id of a request"
LINES_WITHOUT_ID = f"log lines, since {NO_ID_IN_LOG}"
NOT_OURS = "spans of requests that are not among this run's"
OTHER_LINES = "log lines of requests that are not among this run's (a log may reach further back)"
NO_STAGE = "rows of something that target.stages does not name"
REPEATED = "rows that tell of a request once more"


@dataclass(frozen=True, slots=True)
class Timing:
    """What a server said of one request, in seconds; NaN where it does not say. The names are those of METRICS."""

    source: str
    server: str
    ttft: float = NAN
    tokenize: float = NAN
    validation: float = NAN
    queue: float = NAN
    prefill: float = NAN
    held: float = NAN
    decode: float = NAN
    inference: float = NAN
    tpot: float = NAN
    time_per_token: float = NAN
    e2e: float = NAN
    cached_tokens: float = NAN
    children: int = 1  # requests that the server made of this one: n


@dataclass(frozen=True, slots=True)
class Unmatched:
    """Why the server's timing of a request is not known."""

    reason: str


@dataclass(frozen=True)
class Joined:
    """One table, and what was left over on the server's side."""

    columns: dict[str, list[Any]]  # server_*, one entry a request; text in TEXT_COLUMNS, else floats
    rows: dict[str, int] = field(default_factory=dict)  # source -> rows that it told
    unmatched_rows: dict[str, int] = field(default_factory=dict)  # why a row has no request -> rows


def in_band(server: Mapping[str, Any] | None, output_tokens: float) -> Timing | Unmatched:
    """The timings inside a response, told apart by their keys."""
    if server is None:
        return Unmatched(NO_TIMINGS)
    for keys, read in _DIALECTS:
        if keys & server.keys():
            return read(server, output_tokens)
    return Unmatched("the timings in the response are of no server that is known here")


def _vllm(told: Mapping[str, Any], output_tokens: float) -> Timing | Unmatched:
    """``metrics`` of the usage chunk (--enable-per-request-metrics), ms; its TTFT is the prefill, without the queue."""
    prefill, queue, decode = (
        _ms(told, key) for key in ("time_to_first_token_ms", "queue_time_ms", "generation_time_ms")
    )
    if math.isnan(prefill) or math.isnan(queue):
        return Unmatched("the server's timings lack its time to first token or its queue time")
    return Timing(
        "in-band", "vllm", ttft=queue + prefill, queue=queue, prefill=prefill, decode=decode,
        # of a one-token answer the server says 0, which is no time per token
        tpot=_ms(told, "mean_itl_ms") if output_tokens > 1 else NAN,
        e2e=queue + prefill + decode,
    )  # fmt: skip


def _llamacpp(told: Mapping[str, Any], output_tokens: float) -> Timing | Unmatched:
    """``timings`` of the final chunk, ms. The time per token is computed anew: older builds divide by one more."""
    prefill, decode = _ms(told, "prompt_ms"), _ms(told, "predicted_ms")
    if math.isnan(prefill):
        return Unmatched("the server's timings lack prompt_ms")
    tokens = _number(told.get("predicted_n"))
    return Timing(
        "in-band", "llamacpp", prefill=prefill, decode=decode,
        tpot=decode / (tokens - 1) if tokens > 1 else NAN,
        cached_tokens=_number(told.get("cache_n")),
    )  # fmt: skip


def _tgi(told: Mapping[str, Any], output_tokens: float) -> Timing | Unmatched:
    """Headers of an answer that was not streamed: whole ms, cut off."""
    queue, e2e = _ms(told, "x-queue-time"), _ms(told, "x-total-time")
    if math.isnan(queue) and math.isnan(e2e):
        return Unmatched("the server's headers lack x-queue-time and x-total-time")
    return Timing(
        "in-band", "tgi", validation=_ms(told, "x-validation-time"), queue=queue,
        inference=_ms(told, "x-inference-time"), time_per_token=_ms(told, "x-time-per-token"), e2e=e2e,
    )  # fmt: skip


def _sglang(told: Mapping[str, Any], output_tokens: float) -> Timing | Unmatched:
    """``meta_info``, seconds; there is more in it where the server runs with --enable-metrics."""
    names = ("first_token_latency", "queue_time", "e2e_latency", "forward_entry_time", "prefill_finished_time")
    ttft, queue, e2e, forward, prefilled = (_number(told.get(name)) for name in names)
    throughput = _number(told.get("decode_throughput"))
    prefill = prefilled - forward if prefilled >= forward else NAN
    return Timing(
        "in-band", "sglang", ttft=ttft, tokenize=ttft - queue - prefill, queue=queue, prefill=prefill,
        tpot=1 / throughput if throughput > 0 and output_tokens > 1 else NAN, e2e=e2e,
        cached_tokens=_number(told.get("cached_tokens")),
    )  # fmt: skip


def _pytorch(told: Mapping[str, Any], output_tokens: float) -> Timing | Unmatched:
    """``metrics`` of the static batching server (engines/static_server.py), ms."""
    names = ("batch_wait_ms", "batch_prefill_ms", "batch_first_held_ms", "batch_decode_ms", "batch_held_ms")
    queue, prefill, first_held, decode, held = (_ms(told, name) for name in names)
    if math.isnan(prefill):
        return Unmatched("the server's timings lack batch_prefill_ms")
    return Timing(
        "in-band", "pytorch", ttft=queue + prefill + first_held, queue=queue, prefill=prefill, held=first_held,
        decode=decode, tpot=decode / (output_tokens - 1) if output_tokens > 1 else NAN,
        e2e=queue + prefill + decode + held,
    )  # fmt: skip


_DIALECTS: tuple[tuple[set[str], Callable[[Mapping[str, Any], float], Timing | Unmatched]], ...] = (
    ({"time_to_first_token_ms", "queue_time_ms"}, _vllm),
    ({"prompt_ms", "predicted_ms"}, _llamacpp),
    ({"x-queue-time", "x-total-time"}, _tgi),
    ({"e2e_latency", "queue_time"}, _sglang),
    ({"batch_wait_ms", "batch_prefill_ms"}, _pytorch),
)
"""Keys of which one is there -> who speaks so."""


def join(
    request_ids: Sequence[str],
    in_band_timings: Sequence[Mapping[str, Any] | None],
    output_tokens: Sequence[float],
    rows: Iterable[ServerRequest] = (),
    stages: Sequence[str] = (),
) -> Joined:
    """The columns of the joined table, one entry a request, in the order given; and the rows that joined nothing.

    server_NAME for each of METRICS, server_cached_tokens, server_children, server_source, server_kind (whose words) and
    server_unmatched (why not; None where joined), all of one request from one source. Where several sources tell,
    SOURCE_NAME too, so that they can be held against each other. stage_NAME_ttft and stage_NAME_e2e for each stage.
    """
    index = {request_id: number for number, request_id in enumerate(request_ids)}
    told: dict[str, dict[int, list[ServerRequest]]] = {source: {} for source in (*SOURCES, *map(_stage, stages))}
    seen: Counter[str] = Counter()
    left: Counter[str] = Counter()
    for row in rows:
        seen[row.source] += 1
        is_stage = row.server in stages
        number = index.get(row.request_id or "", index.get(row.trace_id or ""))
        if not is_stage and (row.source, row.server) not in CLOCKS:
            left[NO_STAGE] += 1
        elif number is None:
            left[_why_not(row)] += 1
        else:
            told[_stage(row.server) if is_stage else row.source].setdefault(number, []).append(row)
    by_source: dict[str, dict[int, Timing | Unmatched]] = {
        source: {number: _combined(group, output_tokens[number], left) for number, group in told[source].items()}
        for source in ("otlp", "log")
    }
    by_source["in-band"] = {
        number: in_band(server, tokens)
        for number, (server, tokens) in enumerate(zip(in_band_timings, output_tokens, strict=True))
        if server is not None
    }
    no_line = NO_ID_IN_LOG if seen["log"] == left[LINES_WITHOUT_ID] else NO_LINE
    silence = NO_SPAN if seen["otlp"] else no_line if seen["log"] else NO_TIMINGS
    chosen = [_chosen(by_source, number, silence) for number in range(len(request_ids))]
    columns = _columns("server", chosen)
    columns["server_source"] = [timing.source if isinstance(timing, Timing) else None for timing in chosen]
    columns["server_kind"] = [timing.server if isinstance(timing, Timing) else None for timing in chosen]
    columns["server_unmatched"] = [timing.reason if isinstance(timing, Unmatched) else None for timing in chosen]
    columns["server_children"] = [timing.children if isinstance(timing, Timing) else NAN for timing in chosen]
    if sum(bool(timings) for timings in by_source.values()) > 1:
        for source, timings in by_source.items():
            if timings:
                all_timings = [timings.get(number) for number in range(len(request_ids))]
                columns |= _columns(source.replace("-", "_"), all_timings)
    for stage in map(_stage, stages):
        # of several spans of one stage the longest holds the others
        longest = [max(told[stage].get(n, ()), key=_length, default=None) for n in range(len(request_ids))]
        for name in ("ttft", "e2e"):
            columns[f"{stage}_{name}"] = [_number(getattr(row, name)) if row else NAN for row in longest]
    return Joined(columns, dict(seen), dict(left.most_common()))


def reasons(unmatched: Iterable[str | None]) -> dict[str, int]:
    """How many requests were left unjoined, by reason, most frequent first."""
    return dict(Counter(reason for reason in unmatched if isinstance(reason, str)).most_common())


def _why_not(row: ServerRequest) -> str:
    """Why a row is of none of the requests."""
    if not row.request_id and not row.trace_id:
        return LINES_WITHOUT_ID if row.source == "log" else NO_ID
    return OTHER_LINES if row.source == "log" else NOT_OURS


def _stage(name: str) -> str:
    """How the columns of a stage begin."""
    return f"stage_{name}"


def _length(row: ServerRequest) -> float:
    return row.e2e or row.ttft or 0.0


def _chosen(by_source: Mapping[str, Mapping[int, Timing | Unmatched]], number: int, silence: str) -> Timing | Unmatched:
    """The first source that tells; else why the first that tried did not."""
    found = [by_source[source][number] for source in SOURCES if number in by_source[source]]
    return next((one for one in found if isinstance(one, Timing)), found[0] if found else Unmatched(silence))


def _combined(group: list[ServerRequest], output_tokens: float, left: Counter[str]) -> Timing | Unmatched:
    """One timing of all rows of one source that tell of one request.

    Rows that do not contradict each other are one (a batch that was sent twice, two lines on one request). With n > 1
    a server makes a child of each choice: the first token is that of the fastest child, with its queue and prefill;
    the request ends with the last one; times per token weigh the children equally.
    """
    choices: dict[int | None, list[ServerRequest]] = {}
    for row in group:
        choices.setdefault(row.choice, []).append(row)
    merged = [_merged(rows) for rows in choices.values()]
    whole = [row for row in merged if row is not None]
    if len(whole) < len(merged) or (len(whole) > 1 and None in choices):
        left[REPEATED] += len(group)
        return Unmatched(TOLD_TWICE)
    if len(group) > len(whole):
        left[REPEATED] += len(group) - len(whole)
    timings = [_timing(row, output_tokens if len(whole) == 1 else NAN) for row in whole]
    if len(timings) == 1:
        return timings[0]
    first = min(timings, key=lambda timing: _or(timing.ttft, timing.e2e))
    return Timing(
        first.source, first.server, first.ttft, first.tokenize, first.validation, first.queue, first.prefill,
        held=first.held,
        decode=_mean(timing.decode for timing in timings),
        inference=_mean(timing.inference for timing in timings),
        tpot=_mean(timing.tpot for timing in timings),
        time_per_token=_mean(timing.time_per_token for timing in timings),
        e2e=max((timing.e2e for timing in timings), key=lambda e2e: _or(e2e, -1.0)),
        cached_tokens=first.cached_tokens,
        children=len(timings),
    )  # fmt: skip


_TOLD = ("ttft", "validation", "queue", "prefill", "decode", "inference", "time_per_token", "e2e")


def _merged(rows: list[ServerRequest]) -> ServerRequest | None:
    """All that rows on one request say together; None if they contradict each other by more than 1 % and 0.1 ms."""
    whole = rows[0]
    for row in rows[1:]:
        gained = {}
        for name in (*_TOLD, "output_tokens", "cached_tokens"):
            before, now = getattr(whole, name), getattr(row, name)
            if before is None:
                gained[name] = now
            elif now is not None and not math.isclose(before, now, rel_tol=0.01, abs_tol=1e-4):
                return None
        whole = _with(whole, gained)
    return whole


def _with(row: ServerRequest, values: dict[str, Any]) -> ServerRequest:
    return ServerRequest(**({name: getattr(row, name) for name in ServerRequest.__struct_fields__} | values))


def _timing(row: ServerRequest, output_tokens: float) -> Timing:
    """One row in the terms of METRICS."""
    ttft, validation, queue, prefill, decode, inference, per_token, e2e = (
        _number(getattr(row, name)) for name in _TOLD
    )
    tokenize = ttft - queue - prefill
    if (row.source, row.server) == ("otlp", "sglang"):  # this span's prefill begins before the queue
        tokenize, prefill = ttft - prefill, prefill - queue
    tokens = _or(_number(row.output_tokens), output_tokens)
    tpot = decode / (tokens - 1) if tokens > 1 else NAN
    if (row.source, row.server) == ("log", "sglang"):  # its decode throughput is 1 / TPOT
        tpot, per_token = (per_token if tokens > 1 else NAN), NAN
    return Timing(
        row.source, row.server, ttft=ttft,
        tokenize=NAN if (row.source, row.server) in TTFT_IS_A_SUM else tokenize,
        validation=validation, queue=queue, prefill=prefill, decode=decode,
        inference=inference if math.isnan(prefill) or math.isnan(decode) else NAN,
        tpot=tpot, time_per_token=per_token, e2e=e2e, cached_tokens=_number(row.cached_tokens),
    )  # fmt: skip


def _columns(prefix: str, timings: Sequence[Timing | Unmatched | None]) -> dict[str, list[Any]]:
    return {
        f"{prefix}_{name}": [getattr(timing, name) if isinstance(timing, Timing) else NAN for timing in timings]
        for name in (*METRICS, "cached_tokens")
    }


def _ms(told: Mapping[str, Any], key: str) -> float:
    """Milliseconds under a key, as seconds."""
    return _number(told.get(key)) / 1e3


def _number(value: Any) -> float:
    """A number, or text that is one (headers); NaN for anything else, for a negative or an impossible one."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return NAN
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return NAN
    return number if 0 <= number < LARGEST else NAN


def _or(value: float, other: float) -> float:
    return other if math.isnan(value) else value


def _mean(values: Iterable[float]) -> float:
    known = [value for value in values if not math.isnan(value)]
    return sum(known) / len(known) if known else NAN
