"""OTLP traces -> what servers told of single requests. Pure: bytes in, ServerRequest out.

Engines are known by the shape of their spans, whatever their service is called: vLLM's ``llm_request``, TGI's handler
span with its durations as text, SGLang's root span with its ``rid``. Any other server span counts only if its service
is a stage of the experiment, and then tells how long that stage had the request, and its time to first token where it
says so in the attribute that vLLM and SGLang use. What the fields mean with each server stands in clocks.CLOCKS.

Spans come from the network: a value that is no finite number, negative or beyond all reason is left out and counted.
"""

import base64
import json
import math
import re
import zlib
from collections.abc import Callable, Mapping
from itertools import islice
from typing import Any

import msgspec
from google.protobuf import json_format  # type: ignore[import-untyped]
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.common.v1.common_pb2 import AnyValue
from opentelemetry.proto.trace.v1.trace_pb2 import Span

from twoclocks.masks import SECRET
from twoclocks.server_requests import ServerRequest

MAX_SECONDS = 1e6
MAX_TOKENS = 2**53
MAX_SCOPES = 10_000  # of a message; an exporter has one or two
MAX_ATTRIBUTES = 128  # of a span or resource that are looked at
MAX_TOLD = 32  # attributes of a span that are kept verbatim
MAX_KEY = 100
MAX_TEXT = 200
MAX_LIST = 16

_GEN_AI: dict[str, str] = {
    "gen_ai.latency.time_to_first_token": "ttft",
    "gen_ai.latency.time_in_queue": "queue",
    "gen_ai.latency.time_in_model_prefill": "prefill",
    "gen_ai.latency.time_in_model_decode": "decode",
    "gen_ai.latency.time_in_model_inference": "inference",
    "gen_ai.latency.e2e": "e2e",
    "gen_ai.usage.prompt_tokens": "prompt_tokens",
    "gen_ai.usage.completion_tokens": "output_tokens",
    "gen_ai.usage.cached_tokens": "cached_tokens",
}
_TGI: dict[str, str] = {
    "total_time": "e2e",
    "validation_time": "validation",
    "queue_time": "queue",
    "inference_time": "inference",
    "time_per_token": "time_per_token",
}
_STAGE: dict[str, str] = {"gen_ai.latency.time_to_first_token": "ttft"}
_DURATION = re.compile(r"([0-9]{1,18}(?:\.[0-9]{1,18})?)(ns|us|µs|μs|ms|s)")  # both of Unicode's micro signs
_UNITS = {"ns": 1e-9, "us": 1e-6, "µs": 1e-6, "μs": 1e-6, "ms": 1e-3, "s": 1.0}
_OUR_ID = re.compile(r"(?:([0-9]{1,4})_)?(?:[a-z]+-)*([0-9a-f]{32})(?:-.*)?")


_OF_PARSE_DICT = (TypeError, AttributeError, OverflowError, SystemError)
"""What ParseDict makes of a list or a number where it expects an object, of an infinite enum, of half a surrogate."""


class SpanTold(msgspec.Struct, frozen=True):
    """What one span told."""

    request: ServerRequest
    ours: bool | None  # whether a run like this one sent the request; None where only the list of requests can say
    ended_at: float  # Unix time in seconds by the server's clock; 0 where the span does not say
    unusable: int  # values that were left out


def decode(body: bytes, *, as_json: bool = False) -> ExportTraceServiceRequest:
    """An ExportTraceServiceRequest from protobuf or OTLP's JSON. Raises ValueError."""
    message = ExportTraceServiceRequest()
    try:
        if as_json:
            document = json.loads(body)
            if not isinstance(document, dict):
                raise ValueError("the JSON is no object")
            json_format.ParseDict(document, message, ignore_unknown_fields=True)
        else:
            message.ParseFromString(body)
    except (DecodeError, json_format.ParseError, ValueError, RecursionError, *_OF_PARSE_DICT) as error:
        raise ValueError(f"no ExportTraceServiceRequest: {str(error)[:200]}") from None
    resources = message.resource_spans
    if len(resources) > MAX_SCOPES or sum(len(resource.scope_spans) for resource in resources) > MAX_SCOPES:
        raise ValueError(f"more than {MAX_SCOPES} resources or scopes in one message")
    return message


def unzip(body: bytes, limit: int) -> bytes:
    """What gzip compressed. Raises ValueError if it is not whole, OverflowError if it is longer than ``limit``."""
    stream = zlib.decompressobj(wbits=31)
    try:
        plain = stream.decompress(body, limit + 1)
    except zlib.error as error:
        raise ValueError(f"no gzip: {error}") from None
    if len(plain) > limit:
        raise OverflowError(f"more than {limit} bytes when unpacked")
    if not stream.eof:
        raise ValueError("the gzip is not whole")
    return plain


def service_name(attributes: Mapping[str, Any]) -> str | None:
    """``service.name`` of a resource."""
    name = attributes.get("service.name")
    return name if isinstance(name, str) else None


def attributes_of(holder: Any) -> dict[str, Any]:
    """The attributes of a span or a resource that hold text, a number, a truth value, or a short list of these."""
    found: dict[str, Any] = {}
    for pair in islice(holder.attributes, MAX_ATTRIBUTES):
        value = _value(pair.value)
        if value is not None:
            found[pair.key] = value
    return found


def read_span(span: Span, stage: str | None, at: float) -> SpanTold | None:
    """What a span tells of a request, and None if it tells of none.

    ``stage`` is the stage that the span's service is, ``at`` the time of its arrival on the run's clock.
    """
    attributes = attributes_of(span)
    if span.name == "llm_request" and any(key.startswith("gen_ai.latency.") for key in attributes):
        server, fields, seconds, id_key = "vllm", _GEN_AI, _number, "gen_ai.request.id"
    elif isinstance(attributes.get("rid"), str) and str(attributes.get("module")).startswith("sglang"):
        server, fields, seconds, id_key = "sglang", _GEN_AI, _number, "rid"
    elif "total_time" in attributes and "inference_time" in attributes:
        server, fields, seconds, id_key = "tgi", _TGI, _text_seconds, ""
    elif stage is not None and span.kind == Span.SPAN_KIND_SERVER:
        server, fields, seconds, id_key = stage, _STAGE, _number, ""
    else:
        return None
    values, unusable = _take(attributes, fields, seconds)
    if server == stage:
        e2e = _bounded((span.end_time_unix_nano - span.start_time_unix_nano) / 1e9, MAX_SECONDS)
        unusable += e2e is None
        values["e2e"] = e2e
    request_id, choice = _our_id(attributes.get(id_key))
    if request_id is not None:
        del attributes[id_key]
    reason = _finish_reason(attributes.get("gen_ai.response.finish_reasons"))
    trace_id, parent_id = _hex(span.trace_id, 16), _hex(span.parent_span_id, 8)
    request = ServerRequest(
        source="otlp",
        server=server,
        at=at,
        request_id=request_id,
        trace_id=trace_id,
        choice=choice,
        finish_reason=reason,
        told=_told(attributes, fields),
        **values,
    )
    ours = _ours(trace_id, parent_id, request_id)
    return SpanTold(request=request, ours=ours, ended_at=span.end_time_unix_nano / 1e9, unusable=unusable)


def _ours(trace_id: str | None, parent_id: str | None, request_id: str | None) -> bool | None:
    """Whether this run sent the request.

    A request's id is also its trace id, and the span id that it names as parent is the first half of it: so either
    proves itself. Something between us and the server may have put its own span between, or have taken one of the two
    away; then the list of requests must decide. A span with neither a parent nor an id of our form is none of ours.
    """
    if trace_id is not None and (request_id == trace_id or parent_id == trace_id[:16]):
        return True
    return False if parent_id is None and request_id is None else None


def _our_id(value: Any) -> tuple[str | None, int | None]:
    """(the 32 hex digits that we sent, the child's index if told) of chatcmpl-ID, cmpl-ID-0, 1_chatcmpl-ID-1a2b3c4d."""
    match = _OUR_ID.fullmatch(value) if isinstance(value, str) else None
    if match is None:
        return None, None
    return match[2], None if match[1] is None else int(match[1])


def _take(
    attributes: dict[str, Any], fields: Mapping[str, str], seconds: Callable[[Any], float | None]
) -> tuple[dict[str, Any], int]:
    """(value of each field that the attributes give, how many gave none that can be used)."""
    values: dict[str, Any] = {}
    unusable = 0
    for key, field in fields.items():
        if key not in attributes:
            continue
        value = _tokens(attributes[key]) if field.endswith("_tokens") else seconds(attributes[key])
        if value is None:
            unusable += 1
        else:
            values[field] = value
    return values, unusable


def _number(value: Any) -> float | None:
    return _bounded(value, MAX_SECONDS) if isinstance(value, int | float) and not isinstance(value, bool) else None


def _text_seconds(value: Any) -> float | None:
    """Rust's Debug text of a Duration, such as 1.5ms, in seconds."""
    match = _DURATION.fullmatch(value) if isinstance(value, str) else None
    return None if match is None else _bounded(float(match[1]) * _UNITS[match[2]], MAX_SECONDS)


def _tokens(value: Any) -> int | None:
    is_count = isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= MAX_TOKENS
    return value if is_count else None


def _bounded(value: float, limit: float) -> float | None:
    return float(value) if math.isfinite(value) and 0 <= value <= limit else None


def _finish_reason(value: Any) -> str | None:
    """The one reason in SGLang's JSON list of them, or of a list as the semantic conventions have it."""
    if isinstance(value, str) and value.startswith("["):
        try:
            value = msgspec.json.decode(value, type=list[str])
        except (msgspec.DecodeError, RecursionError):
            return None
    if isinstance(value, list) and len(value) == 1 and isinstance(value[0], str):
        return value[0]
    return None


def _told(attributes: Mapping[str, Any], fields: Mapping[str, str]) -> dict[str, Any]:
    """The attributes without a field, bounded, and none whose name says that it holds a secret."""
    rest: dict[str, Any] = {}
    for key, value in attributes.items():
        if len(rest) == MAX_TOLD:
            break
        if key not in fields and len(key) <= MAX_KEY and not SECRET.search(key) and _is_finite(value):
            rest[key] = value
    return rest


def _is_finite(value: Any) -> bool:
    """JSON knows no other numbers."""
    return (
        all(map(_is_finite, value)) if isinstance(value, list) else not isinstance(value, float) or math.isfinite(value)
    )


def _value(value: AnyValue) -> Any:
    """A value as JSON can hold it; None for what it cannot, and for nested lists and bytes."""
    kind = value.WhichOneof("value")
    if kind == "array_value":
        items = [_value(item) for item in value.array_value.values[:MAX_LIST] if item.WhichOneof("value") in _PLAIN]
        return [item for item in items if item is not None]
    if kind not in _PLAIN:
        return None
    plain = getattr(value, kind)
    return plain[:MAX_TEXT] if isinstance(plain, str) else plain


_PLAIN = ("string_value", "bool_value", "int_value", "double_value")


def _hex(identity: bytes, size: int) -> str | None:
    """An id of ``size`` bytes as hex digits; None for any other length, and for the zeros that mean "none".

    OTLP's JSON carries ids as hex digits, which protobuf's own JSON reads as base64; encoding brings them back.
    """
    text = base64.b64encode(identity).decode().lower() if len(identity) * 4 == size * 6 else identity.hex()
    is_id = re.fullmatch(f"[0-9a-f]{{{2 * size}}}", text) is not None and text.strip("0") != ""
    return text if is_id else None
