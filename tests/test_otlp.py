import gzip
import json
import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from make_spans import OTHER, OURS, export, sglang_span, span, tgi_span, vllm_span
from opentelemetry.proto.trace.v1.trace_pb2 import Span

from twoclocks.otlp import attributes_of, decode, read_span, unzip
from twoclocks.server_requests import ServerRequest, encode_server_request

DATA = Path(__file__).parent / "data"


def told(one, stage=None):
    found = read_span(one, stage, at=2.0)
    assert found is not None
    return found.request


def test_vllm_tells_each_part_of_a_request():
    expected = ServerRequest(
        source="otlp",
        server="vllm",
        at=2.0,
        request_id=OURS,
        trace_id=OURS,
        ttft=0.25,
        queue=0.125,
        prefill=0.0625,
        decode=1.25,
        inference=1.3125,
        e2e=1.5,
        prompt_tokens=18,
        output_tokens=16,
        told={"gen_ai.request.max_tokens": 16},
    )

    assert told(vllm_span()) == expected


def recorded_spans():
    return [json.loads(line) for line in (DATA / "recorded" / "vllm_otlp_spans.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("recorded", recorded_spans(), ids=lambda one: one["attributes"]["gen_ai.request.id"])
def test_what_a_real_vllm_sent_is_read(recorded):
    one = span(recorded["name"], recorded["trace_id"], recorded["parent_span_id"], attributes=recorded["attributes"])
    request = told(one)
    attributes = recorded["attributes"]

    assert request.trace_id == recorded["trace_id"]
    assert request.ttft == attributes["gen_ai.latency.time_to_first_token"]
    assert request.queue == attributes["gen_ai.latency.time_in_queue"]
    assert request.prefill + request.decode == pytest.approx(request.inference)
    assert (request.prompt_tokens, request.output_tokens) == (
        attributes["gen_ai.usage.prompt_tokens"],
        attributes["gen_ai.usage.completion_tokens"],
    )
    assert request.told["gen_ai.request.id"] == attributes["gen_ai.request.id"]  # not an id of ours, so verbatim


def test_otlp_json_is_read_like_protobuf():
    message = decode((DATA / "vllm_0.33_otlp_span.json").read_bytes(), as_json=True)
    (resource,) = message.resource_spans
    request = told(resource.scope_spans[0].spans[0])

    assert attributes_of(resource.resource)["service.name"] == "vllm-server"
    assert request.trace_id == "5b8efff798038103d269b633813fc60c"
    assert (request.ttft, request.e2e, request.prompt_tokens, request.output_tokens) == (0.0761, 1.3482, 42, 128)


def test_tgi_tells_its_durations_as_text():
    request = told(tgi_span())

    assert request.server == "tgi"
    assert request.request_id is None
    assert request.trace_id == OURS
    assert (request.e2e, request.inference) == (1.5, 1.4)
    assert (request.validation, request.queue) == pytest.approx((250.5e-6, 12.25e-3))
    assert request.time_per_token == pytest.approx(900e-9)
    assert request.told == {"parameters": "GenerateParameters { best_of: None }", "seed": "None"}


@pytest.mark.parametrize("text", ["1.5", "-1ms", "1m", "ms", "1.5 ms", "1e3ms", "9" * 40 + "s", 1.5, ""])
def test_what_is_no_duration_of_tgi_is_left_out_and_counted(text):
    found = read_span(tgi_span(queue_time=text), None, 0.0)

    assert (found.request.queue, found.request.e2e, found.unusable) == (None, 1.5, 1)


def test_sglang_tells_on_its_root_span():
    request = told(sglang_span())

    assert (request.server, request.request_id, request.ttft, request.e2e) == ("sglang", OURS, 0.25, 1.5)
    assert (request.cached_tokens, request.finish_reason) == (4, "stop")


def test_a_stage_is_known_by_its_service_and_tells_its_duration():
    server = span("POST /v1/chat/completions", seconds=0.75, attributes={"http.status_code": 200})
    client = span("upstream", kind=Span.SPAN_KIND_CLIENT)
    request = told(server, stage="gateway")

    assert (request.server, request.e2e, request.told) == ("gateway", 0.75, {"http.status_code": 200})
    assert read_span(server, None, 0.0) is None
    assert read_span(client, "gateway", 0.0) is None


def test_a_stage_may_tell_its_first_token_as_engines_do():
    one = span("POST", seconds=0.75, attributes={"gen_ai.latency.time_to_first_token": 0.25, "model": "m"})
    request = told(one, stage="gateway")

    assert (request.ttft, request.e2e, request.told) == (0.25, 0.75, {"model": "m"})


def test_an_engine_is_known_by_its_spans_whatever_its_service_is_called():
    assert told(vllm_span(), stage="gateway").server == "vllm"


@pytest.mark.parametrize(
    ("sent", "expected"),
    [
        (f"chatcmpl-{OURS}", (OURS, None)),
        (f"cmpl-{OURS}-0", (OURS, None)),
        (f"cmpl-{OURS}-0-1a2b3c4d", (OURS, None)),
        (f"1_chatcmpl-{OURS}-1a2b3c4d", (OURS, 1)),
        (f"cmpl-{OURS}-bc7aaf298050bd6d-beam-0", (OURS, None)),
        (OURS, (OURS, None)),
        (f"chatcmpl-{OURS}0", (None, None)),
        ("chatcmpl-mine", (None, None)),
        ("", (None, None)),
        (7, (None, None)),
    ],
)
def test_the_request_id_is_what_was_sent(sent, expected):
    request = told(vllm_span(**{"gen_ai.request.id": sent}))

    assert (request.request_id, request.choice) == expected


@pytest.mark.parametrize(
    ("one", "ours"),
    [
        (vllm_span(), True),
        (vllm_span(parent_id="aaaaaaaaaaaaaaaa"), True),  # a gateway's span between, the id unchanged
        (tgi_span(), True),
        (vllm_span(trace_id=OTHER, parent_id=""), None),  # the trace was broken off on the way: the id may be ours
        (span("x", OTHER, "aaaaaaaaaaaaaaaa", attributes={"total_time": "1s", "inference_time": "1s"}), None),
        (vllm_span("mine", trace_id=OTHER, parent_id=""), False),
    ],
    ids=["vllm", "behind a gateway", "tgi", "other trace", "other parent", "root of another client"],
)
def test_whose_request_it_was(one, ours):
    assert read_span(one, None, 0.0).ours is ours


@pytest.mark.parametrize("value", [math.nan, math.inf, -0.001, 1e300, "0.1", True, [0.1], 10**18])
def test_a_duration_that_cannot_be_is_left_out_and_counted(value):
    found = read_span(vllm_span(**{"gen_ai.latency.time_in_queue": value}), None, 0.0)

    assert (found.request.queue, found.request.ttft, found.unusable) == (None, 0.25, 1)


@pytest.mark.parametrize("value", [-1, 1.5, "16", True, 2**60])
def test_a_count_that_cannot_be_is_left_out_and_counted(value):
    found = read_span(vllm_span(**{"gen_ai.usage.prompt_tokens": value}), None, 0.0)

    assert (found.request.prompt_tokens, found.request.output_tokens, found.unusable) == (None, 16, 1)


def test_a_stage_that_ends_before_it_begins_has_no_duration():
    found = read_span(span("x", seconds=-1.0), "gateway", 0.0)

    assert (found.request.e2e, found.unusable) == (None, 1)


def test_what_is_kept_verbatim_is_bounded_and_holds_no_secret():
    many = {f"key{number}": "x" * 1000 for number in range(1000)}
    odd = {"http.request.header.authorization": "Bearer s3cret", "blob": b"\0", "nan": math.nan, "list": ["a", 1, 0.5]}
    request = told(vllm_span(**odd))
    line = encode_server_request(told(vllm_span(**many)))

    assert request.told == {"gen_ai.request.max_tokens": 16, "list": ["a", 1, 0.5]}
    assert len(line) < 10_000


@pytest.mark.parametrize("size", [0, 1, 15, 17, 24, 32])
def test_a_trace_id_of_another_size_is_none(size):
    one = vllm_span()
    one.trace_id = b"\1" * size

    assert read_span(one, None, 0.0).request.trace_id is None


@pytest.mark.parametrize(
    "body", [b"\xff\xff\xff", b"hello", b"\x0a\xff\xff\xff\xff\x0f", b"\x0a\x02"], ids=["tag", "text", "long", "cut"]
)
def test_garbage_is_no_message(body):
    with pytest.raises(ValueError, match="no ExportTraceServiceRequest"):
        decode(body)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[1]",
        b"7",
        b'"x"',
        b"\xff",
        b'{"resourceSpans": 3}',
        b"[" * 100_000,
        b'{"resourceSpans": [{"scopeSpans": [{"spans": [{"kind": Infinity}]}]}]}',
        b'{"\\ud800": 1}',
    ],
)
def test_garbage_is_no_json_message(body):
    with pytest.raises(ValueError, match="no ExportTraceServiceRequest"):
        decode(body, as_json=True)


def test_a_message_of_very_many_resources_is_refused():
    with pytest.raises(ValueError, match="more than 10000 resources"):
        decode(b"\x0a\x00" * 10_001)


@given(st.binary(max_size=200))
def test_no_bytes_crash_it(tail):
    for body in (tail, export(vllm_span()).SerializeToString()[: -1 - len(tail)] + tail):
        try:
            message = decode(body)
        except ValueError:
            continue
        for resource in message.resource_spans:
            for scope in resource.scope_spans:
                for one in scope.spans:
                    found = read_span(one, "stage", 0.0)
                    assert found is None or encode_server_request(found.request)


@given(st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8), st.lists))
def test_no_json_crashes_it(leaf):
    attribute = {"key": "gen_ai.latency.e2e", "value": {"doubleValue": leaf}}
    for where in (
        {"attributes": [attribute]},
        {"traceId": leaf},
        {"attributes": leaf},
        {"startTimeUnixNano": leaf, "name": leaf, "kind": leaf},
    ):
        body = {"resourceSpans": [{"scopeSpans": [{"spans": [{"name": "llm_request"} | where]}]}]}
        try:
            message = decode(json.dumps(body).encode(), as_json=True)
        except ValueError:
            continue
        found = read_span(message.resource_spans[0].scope_spans[0].spans[0], "stage", 0.0)
        assert found is None or encode_server_request(found.request)


def test_what_unpacks_to_too_much_is_refused():
    bomb = gzip.compress(b"\0" * 10_000_000)

    assert unzip(gzip.compress(b"abc"), 3) == b"abc"
    with pytest.raises(OverflowError):
        unzip(bomb, 1_000_000)
    with pytest.raises(ValueError, match="no gzip"):
        unzip(b"abc", 3)
    with pytest.raises(ValueError, match="not whole"):
        unzip(gzip.compress(b"abc")[:-4], 3)
