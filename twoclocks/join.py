"""Join: a request's client record with the server's own timing of the same request.

Takes record fields and log lines, returns columns. Two sources so far: the timings vLLM puts into the usage chunk
("in-band") and the line that transformers serve logs for each request ("log"). Seconds; NaN where the server says
nothing.
"""

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

NAN = math.nan


@dataclass(frozen=True, slots=True)
class ServerTiming:
    """What the server said of one request, in seconds."""

    server_ttft: float = NAN
    server_queue: float = NAN
    server_prefill: float = NAN
    server_decode: float = NAN
    server_tpot: float = NAN
    server_e2e: float = NAN
    server_source: str = ""


@dataclass(frozen=True, slots=True)
class Unmatched:
    """Why the server's timing of a request is not known."""

    reason: str


DEFINITIONS: dict[str, dict[str, str]] = {
    "in-band": {
        "ttft": "queue + prefill as the engine timed them: scheduler has the request -> first token sampled. "
        "No HTTP, template, tokenizing, detokenizing, delivery",
        "tpot": "(last - first token sampled in the engine) / (output tokens - 1)",
        "e2e": "queue + prefill + decode in the engine: scheduler has the request -> last token sampled",
        "queue": "scheduler has the request -> first scheduled",
        "prefill": "first scheduled -> first token sampled",
        "decode": "first -> last token sampled",
    },
    "log": {
        "e2e": "request handed to the continuous-batching engine -> finished there (debug log). "
        "No HTTP, template, tokenizing, delivery",
        "queue": "request handed to the engine -> first scheduled (debug log)",
    },
}
"""What starts and stops the server's clock, by source. vLLM: its per-request metrics, whose own TTFT leaves the queue
out, so that it is added here. transformers: ``start_time`` and ``end_time`` of its log line count from the request's
creation."""

_FINISHED = re.compile(
    r"Request (?P<id>\S+) finished: prefill_len = (?P<prefill>\d+) decode_len = (?P<decode>\d+) "
    r"start_time = (?P<start>[\d.eE+-]+) end_time = (?P<end>[\d.eE+-]+)"
)


def in_band(server: Mapping[str, Any] | None, output_tokens: float) -> ServerTiming | Unmatched:
    """vLLM's ``metrics`` object of the usage chunk (``--enable-per-request-metrics``), milliseconds there."""
    if server is None:
        return Unmatched("the response carried no timings of the server")
    prefill, queue, decode = (
        _seconds(server.get(key)) for key in ("time_to_first_token_ms", "queue_time_ms", "generation_time_ms")
    )
    if math.isnan(prefill) or math.isnan(queue):
        return Unmatched("the server's timings lack its time to first token or its queue time")
    return ServerTiming(
        server_ttft=queue + prefill,
        server_queue=queue,
        server_prefill=prefill,
        server_decode=decode,
        # of a one-token answer the server says 0, which is no time per token
        server_tpot=_seconds(server.get("mean_itl_ms")) if output_tokens > 1 else NAN,
        server_e2e=queue + prefill + decode,
        server_source="in-band",
    )


def logged(lines: Iterable[str]) -> dict[str, ServerTiming | Unmatched]:
    """Timings by request id, from the debug log of transformers serve with continuous batching (seen in 5.23.0)."""
    found: dict[str, ServerTiming | Unmatched] = {}
    for line in lines:
        match = _FINISHED.search(line)
        if not match:
            continue
        known = match["id"] in found
        try:
            timing = ServerTiming(
                server_queue=float(match["start"]), server_e2e=float(match["end"]), server_source="log"
            )
        except ValueError:
            continue
        found[match["id"]] = Unmatched("the server logged this request id more than once") if known else timing
    return found


def join(
    request_ids: Sequence[str],
    in_band_timings: Sequence[Mapping[str, Any] | None],
    output_tokens: Sequence[float],
    log_lines: Iterable[str] = (),
) -> dict[str, list[Any]]:
    """Columns server_* and server_unmatched (why not; None where joined), one entry a request.

    Timings in the response win over the log: they need no matching.
    """
    log = logged(log_lines)
    timings: list[ServerTiming | Unmatched] = []
    for request_id, server, tokens in zip(request_ids, in_band_timings, output_tokens, strict=True):
        timing = in_band(server, tokens)
        if isinstance(timing, Unmatched) and log:
            timing = log.get(request_id, Unmatched("the server's log has no line for this request"))
        timings.append(timing)
    rows = [asdict(timing if isinstance(timing, ServerTiming) else ServerTiming()) for timing in timings]
    columns: dict[str, list[Any]] = {name: [row[name] for row in rows] for name in ServerTiming.__slots__}
    columns["server_source"] = [source or None for source in columns["server_source"]]
    columns["server_unmatched"] = [timing.reason if isinstance(timing, Unmatched) else None for timing in timings]
    return columns


def reasons(unmatched: Iterable[str | None]) -> dict[str, int]:
    """How many requests were left unjoined, by reason, most frequent first."""
    return dict(Counter(reason for reason in unmatched if isinstance(reason, str)).most_common())


def _seconds(milliseconds: Any) -> float:
    return milliseconds / 1e3 if isinstance(milliseconds, int | float) else NAN
