"""OTLP messages for tests, made with the official classes.

In the shapes of vLLM (as recorded from 0.32), and of TGI 3.3.7 and SGLang 0.5.23 (written from their sources).
"""

import time

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.common.v1.common_pb2 import AnyValue, KeyValue
from opentelemetry.proto.resource.v1.resource_pb2 import Resource
from opentelemetry.proto.trace.v1.trace_pb2 import ResourceSpans, ScopeSpans, Span

OURS = "0123456789abcdef0123456789abcdef"
OTHER = "fedcba9876543210fedcba9876543210"


def any_value(value):
    if isinstance(value, bool):
        return AnyValue(bool_value=value)
    if isinstance(value, int):
        return AnyValue(int_value=value)
    if isinstance(value, float):
        return AnyValue(double_value=value)
    if isinstance(value, bytes):
        return AnyValue(bytes_value=value)
    if isinstance(value, list):
        return AnyValue(array_value={"values": [any_value(item) for item in value]})
    return AnyValue(string_value=value)


def key_values(attributes):
    return [KeyValue(key=key, value=any_value(value)) for key, value in attributes.items()]


def span(name, trace_id=OURS, parent_id="sent", kind=Span.SPAN_KIND_SERVER, seconds=1.0, ago=0.0, **attributes):
    """A span; parent_id "sent": the one that the client names for this trace. ago: it began so many seconds ago."""
    start = time.time_ns() - round(ago * 1e9)
    return Span(
        name=name,
        trace_id=bytes.fromhex(trace_id),
        span_id=b"12345678",
        parent_span_id=bytes.fromhex(trace_id[:16] if parent_id == "sent" else parent_id),
        kind=kind,
        start_time_unix_nano=start,
        end_time_unix_nano=start + round(seconds * 1e9),
        attributes=key_values(attributes.get("attributes", {})),
    )


def vllm_span(request_id=OURS, trace_id=None, parent_id="sent", ago=0.0, **changes):
    attributes = {
        "gen_ai.latency.time_to_first_token": 0.25,
        "gen_ai.latency.e2e": 1.5,
        "gen_ai.latency.time_in_queue": 0.125,
        "gen_ai.latency.time_in_model_prefill": 0.0625,
        "gen_ai.latency.time_in_model_decode": 1.25,
        "gen_ai.latency.time_in_model_inference": 1.3125,
        "gen_ai.usage.prompt_tokens": 18,
        "gen_ai.usage.completion_tokens": 16,
        "gen_ai.request.id": f"chatcmpl-{request_id}",
        "gen_ai.request.max_tokens": 16,
    }
    return span("llm_request", trace_id or request_id, parent_id, ago=ago, attributes=attributes | changes)


def tgi_span(trace_id=OURS, **changes):
    attributes = {
        "parameters": "GenerateParameters { best_of: None }",
        "total_time": "1.5s",
        "validation_time": "250.5µs",
        "queue_time": "12.25ms",
        "inference_time": "1.4s",
        "time_per_token": "900ns",
        "seed": "None",
    }
    return span("chat_completions", trace_id, attributes=attributes | changes)


def sglang_span(trace_id=OURS, **changes):
    attributes = {
        "rid": trace_id,
        "module": "sglang::request",
        "gen_ai.latency.time_to_first_token": 0.25,
        "gen_ai.latency.e2e": 1.5,
        "gen_ai.usage.cached_tokens": 4,
        "gen_ai.response.finish_reasons": '["stop"]',
    }
    return span(f" Req {trace_id[:8]}", trace_id, kind=Span.SPAN_KIND_INTERNAL, attributes=attributes | changes)


def export(*spans, service="vllm"):
    return ExportTraceServiceRequest(
        resource_spans=[
            ResourceSpans(
                resource=Resource(attributes=key_values({"service.name": service})),
                scope_spans=[ScopeSpans(spans=spans)],
            )
        ]
    )
