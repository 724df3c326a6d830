import contextlib
import gzip
import http.client
import json
import socket
import time

import grpc
import pytest
from make_spans import OTHER, OURS, export, sglang_span, span, tgi_span, vllm_span
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest as Request
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceResponse as Response

from twoclocks import otlp_receiver
from twoclocks.otlp_receiver import EXPORT, Receiver, SpanStore
from twoclocks.server_requests import read_server_requests

PROTOBUF = {"Content-Type": "application/x-protobuf"}


@contextlib.contextmanager
def receiving(folder, stages=None, now=time.monotonic, http_port=0, grpc_port=0):
    receiver = Receiver(SpanStore(folder, stages or {}, now), "127.0.0.1", http_port, grpc_port)
    try:
        yield receiver
    finally:
        receiver.close()


def post(port, body, headers=PROTOBUF, path="/v1/traces", method="POST"):
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    with contextlib.closing(connection):
        connection.request(method, path, body, headers)
        response = connection.getresponse()
        return response.status, response.read()


def call(port, body):
    """The official gRPC client; raises grpc.RpcError."""
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        return Response.FromString(channel.unary_unary(EXPORT)(body, timeout=10))


def numbered(number):
    return f"{number:016x}" * 2


def rows(folder):
    return list(read_server_requests(folder / "server_requests.jsonl"))


def sent(folder, *request_ids):
    (folder / "requests.jsonl").write_text("".join(f'{{"request_id":"{one}","user":1}}\n' for one in request_ids))


def test_spans_come_over_http_and_grpc(tmp_path):
    first, second, third = (numbered(number) for number in (1, 2, 3))
    with receiving(tmp_path, now=lambda: 7.0) as receiver:
        status, body = post(receiver.http.port, export(vllm_span(first)).SerializeToString())
        zipped = gzip.compress(export(vllm_span(second)).SerializeToString())
        post(receiver.http.port, zipped, PROTOBUF | {"Content-Encoding": "gzip"})
        answer = call(receiver.grpc.port, export(tgi_span(third)).SerializeToString())
        written = rows(tmp_path)

    assert (status, Response.FromString(body), answer) == (200, Response(), Response())
    assert [(row.server, row.trace_id, row.at) for row in written] == [
        ("vllm", first, 7.0),
        ("vllm", second, 7.0),
        ("tgi", third, 7.0),
    ]


def test_json_is_answered_in_json(tmp_path):
    began = time.time_ns()
    document = {
        "resourceSpans": [
            {
                "resource": {"attributes": [{"key": "service.name", "value": {"stringValue": "envoy"}}]},
                "scopeSpans": [
                    {
                        "spans": [
                            {
                                "traceId": OURS.upper(),
                                "spanId": "eee19b7ec3c1b174",
                                "parentSpanId": OURS[:16],
                                "name": "ingress",
                                "kind": 2,
                                "startTimeUnixNano": str(began),
                                "endTimeUnixNano": str(began + 500_000_000),
                            }
                        ]
                    }
                ],
            }
        ]
    }
    json_type = {"Content-Type": "application/json; charset=utf-8"}
    with receiving(tmp_path, {"envoy": "gateway"}) as receiver:
        status, body = post(receiver.http.port, json.dumps(document), json_type)
        refused, why = post(receiver.http.port, "{", json_type)
        (row,) = rows(tmp_path)

    assert (status, json.loads(body)) == (200, {})
    assert refused == 400
    assert "no ExportTraceServiceRequest" in json.loads(why)["message"]
    assert (row.server, row.trace_id, row.e2e) == ("gateway", OURS, 0.5)


@pytest.mark.parametrize(
    ("change", "status"),
    [
        ({"body": b"garbage"}, 400),
        ({"body": b"garbage", "headers": PROTOBUF | {"Content-Encoding": "gzip"}}, 400),
        ({"headers": {"Content-Type": "text/plain"}}, 415),
        ({"headers": PROTOBUF | {"Content-Encoding": "br"}}, 415),
        ({"path": "/v1/metrics"}, 404),
        ({"method": "GET"}, 405),
        ({"body": b"", "headers": PROTOBUF | {"Content-Length": "x"}}, 411),
        ({"body": b"", "headers": PROTOBUF | {"Content-Length": "-1"}}, 413),
        ({"body": b"", "headers": PROTOBUF | {"Content-Length": "99999999999"}}, 413),
        ({"body": gzip.compress(b"\0" * 10_000_000), "headers": PROTOBUF | {"Content-Encoding": "gzip"}}, 413),
    ],
)
def test_what_is_no_otlp_is_refused_and_the_next_is_read(tmp_path, change, status):
    plain = {"body": export(vllm_span()).SerializeToString()}
    with receiving(tmp_path) as receiver:
        answered, body = post(receiver.http.port, **plain | change)
        post(receiver.http.port, **plain)
        notes = receiver.close()

    assert answered == status
    assert len(notes) == (status != 405)
    assert len(rows(tmp_path)) == 1
    if status != 405:  # a google.rpc.Status: field 2 is the message
        assert body[:1] == b"\x12"
        assert len(body) == 2 + body[1]


def test_a_refused_message_leaves_the_connection_usable_or_closed(tmp_path):
    with receiving(tmp_path) as receiver:
        connection = http.client.HTTPConnection("127.0.0.1", receiver.http.port, timeout=10)
        with contextlib.closing(connection):
            for body in (b"garbage", export(vllm_span()).SerializeToString()):
                connection.request("POST", "/v1/traces", body, PROTOBUF)
                connection.getresponse().read()

    assert len(rows(tmp_path)) == 1


@pytest.mark.parametrize(
    ("body", "code"),
    [
        (b"garbage", grpc.StatusCode.INVALID_ARGUMENT),
        (b"\x0a\x00" * 10_001, grpc.StatusCode.INVALID_ARGUMENT),
        (b"\0" * (otlp_receiver.MAX_BODY + 1), grpc.StatusCode.RESOURCE_EXHAUSTED),
    ],
)
def test_garbage_over_grpc_is_refused_and_the_next_is_read(tmp_path, body, code):
    with receiving(tmp_path) as receiver:
        with pytest.raises(grpc.RpcError) as refused:
            call(receiver.grpc.port, body)
        call(receiver.grpc.port, export(vllm_span()).SerializeToString())

    assert refused.value.code() == code
    assert len(rows(tmp_path)) == 1


def test_a_message_that_unpacks_to_too_much_is_refused_over_grpc(tmp_path):
    with receiving(tmp_path) as receiver:
        channel = grpc.insecure_channel(f"127.0.0.1:{receiver.grpc.port}", compression=grpc.Compression.Gzip)
        with channel, pytest.raises(grpc.RpcError) as refused:
            channel.unary_unary(EXPORT)(b"\0" * 50_000_000, timeout=20)
        call(receiver.grpc.port, export(vllm_span()).SerializeToString())

    assert refused.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED


def test_grpc_that_comes_to_the_port_of_http_is_told(tmp_path):
    with receiving(tmp_path) as receiver:
        with pytest.raises(grpc.RpcError):
            call(receiver.http.port, export(vllm_span()).SerializeToString())
        notes = receiver.close()

    assert "speaks gRPC, for which there is collect.otlp_grpc_port" in notes[0]


def test_a_flood_is_cut_and_told(tmp_path, monkeypatch):
    monkeypatch.setattr(otlp_receiver, "SPANS_PER_S", 100)
    monkeypatch.setattr(otlp_receiver, "BURST_S", 1.0)
    clock = [0.0]
    flood = export(*(vllm_span(numbered(number)) for number in range(1, 251))).SerializeToString()
    with receiving(tmp_path, now=lambda: clock[0]) as receiver:
        first = call(receiver.grpc.port, flood).partial_success.rejected_spans
        _, body = post(receiver.http.port, flood)
        second = Response.FromString(body).partial_success
        clock[0] = 0.5
        third = call(receiver.grpc.port, flood).partial_success.rejected_spans
        clock[0] = 100.0  # the budget does not grow without end
        fourth = call(receiver.grpc.port, flood).partial_success.rejected_spans
        notes = receiver.close()

    assert [first, second.rejected_spans, third, fourth] == [150, 250, 200, 150]
    assert "100 spans a second" in second.error_message
    assert len(rows(tmp_path)) == 250
    assert "750 spans were dropped" in notes[0]


def test_spans_in_all_are_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr(otlp_receiver, "MAX_ROWS", 3)
    monkeypatch.setattr(otlp_receiver, "MAX_HELD", 2)
    ours = [vllm_span(numbered(number)) for number in range(1, 6)]
    unsure = [vllm_span(OURS, trace_id=OTHER, parent_id="") for _ in range(5)]
    store = SpanStore(tmp_path, {}, lambda: 0.0)
    rejected = [
        store.take(export(*spans).SerializeToString()).partial_success.rejected_spans for spans in (ours, unsure)
    ]
    notes = store.close()

    assert (rejected, len(rows(tmp_path))) == ([2, 3], 3)
    assert "2 spans were of requests that this run did not send" in notes[0]
    assert "5 spans were dropped" in notes[1]


def test_only_requests_of_this_run_stand_in_the_file(tmp_path):
    broken_off = vllm_span(OURS, trace_id=OTHER, parent_id="")  # a proxy took the traceparent away
    between = span("x", OURS, "aaaaaaaaaaaaaaaa", attributes={"total_time": "1s", "inference_time": "1s"})
    foreign = [
        vllm_span("mine", trace_id=OTHER, parent_id=""),
        vllm_span(OTHER, trace_id="ab" * 16, parent_id=""),
        vllm_span("mine", trace_id=OTHER, parent_id="aaaaaaaaaaaaaaaa"),
    ]
    sent(tmp_path, OURS)
    with (tmp_path / "requests.jsonl").open("a") as file:
        file.write(f'{{"request_id":"{OTHER}"')  # being written
    store = SpanStore(tmp_path, {}, lambda: 0.0)
    store.take(export(broken_off, between, *foreign, span("GET /health")).SerializeToString())
    before = rows(tmp_path)
    notes = store.close()

    assert before == []
    assert [(row.server, row.request_id, row.trace_id) for row in rows(tmp_path)] == [
        ("vllm", OURS, OTHER),
        ("tgi", None, OURS),
    ]
    assert notes == ["OTLP: 3 spans were of requests that this run did not send; they were left out"]


def test_what_an_exporter_had_saved_up_before_the_run_is_no_traffic_of_others(tmp_path):
    sent(tmp_path, OURS)
    store = SpanStore(tmp_path, {}, lambda: 0.0)
    ours_by_a_late_clock = vllm_span(ago=3600)
    before = [vllm_span(OTHER, ago=60), vllm_span("mine", trace_id=OTHER, parent_id="", ago=60)]
    meanwhile = vllm_span("mine", trace_id=OTHER, parent_id="")
    store.take(export(ours_by_a_late_clock, *before, meanwhile).SerializeToString())
    notes = store.close()

    assert [row.request_id for row in rows(tmp_path)] == [OURS]
    assert (store.earlier, store.foreign) == (2, 1)
    assert notes[1] == "OTLP: 2 spans were of requests that had ended before this run; they were left out"


def test_what_comes_after_the_end_is_refused(tmp_path):
    store = SpanStore(tmp_path, {}, lambda: 0.0)
    store.take(export(vllm_span()).SerializeToString())
    store.close()
    with pytest.raises(ValueError, match="the run has ended"):
        store.take(export(vllm_span()).SerializeToString())

    assert len(rows(tmp_path)) == 1


def test_an_exporters_open_connection_ends_with_the_receiver(tmp_path):
    with receiving(tmp_path) as receiver:
        kept = http.client.HTTPConnection("127.0.0.1", receiver.http.port, timeout=10)
        kept.request("POST", "/v1/traces", export(vllm_span()).SerializeToString(), PROTOBUF)
        first = kept.getresponse()
        first.read()
    with contextlib.closing(kept), pytest.raises((ConnectionError, http.client.RemoteDisconnected)):
        kept.request("POST", "/v1/traces", export(vllm_span()).SerializeToString(), PROTOBUF)
        kept.getresponse()

    assert first.status == 200


def test_without_spans_there_is_no_file(tmp_path):
    with receiving(tmp_path) as receiver:
        post(receiver.http.port, export(span("GET /health")).SerializeToString())
        last_at = receiver.store.last_at

    assert last_at is None
    assert list(tmp_path.iterdir()) == []


def test_all_have_told_when_each_server_told_of_each_request(tmp_path):
    store = SpanStore(tmp_path, {"envoy": "gateway"}, lambda: 0.0)
    ids = [numbered(number) for number in (1, 2)]
    sent(tmp_path, *ids)
    found = [store.has_all(2)]
    for service, spans in [
        ("envoy", [span("in", one) for one in ids]),
        ("vllm", [vllm_span(ids[0]), vllm_span(ids[0])]),  # two children of one request
        ("vllm", [vllm_span(numbered(3))]),  # of the run before
        ("vllm", [vllm_span(ids[1])]),
    ]:
        store.take(export(*spans, service=service).SerializeToString())
        found.append(store.has_all(2))
    store.close()

    assert found == [False, True, False, False, True]


@pytest.mark.parametrize("key", ["collect.otlp_port", "collect.otlp_grpc_port"])
def test_a_port_in_use_is_a_note_that_says_how_to_go_on(tmp_path, key):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        ports = (
            {"http_port": port, "grpc_port": 0} if key == "collect.otlp_port" else {"http_port": 0, "grpc_port": port}
        )
        with receiving(tmp_path, **ports) as receiver:
            notes = receiver.notes
            other = receiver.grpc if key == "collect.otlp_port" else receiver.http

    assert other is not None
    (note,) = notes
    assert f"127.0.0.1 port {port} cannot be listened on (Address already in use)" in note
    assert f"--set {key}=PORT" in note


def test_two_runs_do_not_share_a_port(tmp_path):
    with receiving(tmp_path) as first:
        with receiving(tmp_path, http_port=first.http.port, grpc_port=first.grpc.port) as second:
            notes = second.notes

    assert len(notes) == 2


@pytest.mark.parametrize("host", ["203.0.113.1", "no.such.host.invalid", "bad\0host", "x" * 300])
def test_a_host_that_cannot_be_bound_is_a_note(tmp_path, host):
    receiver = Receiver(SpanStore(tmp_path, {}, time.monotonic), host, 0, 0)
    receiver.close()

    assert [note.split(" port ")[0] for note in receiver.notes] == [f"OTLP: {host}"] * 2


def test_an_exporter_that_goes_away_or_drips_harms_no_one(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(otlp_receiver, "REQUEST_S", 0.2)
    head = b"POST /v1/traces HTTP/1.1\r\ncontent-type: application/x-protobuf\r\ncontent-length: 1000\r\n\r\n"
    with receiving(tmp_path) as receiver:
        with socket.create_connection(("127.0.0.1", receiver.http.port)) as gone:
            gone.sendall(head)
        with socket.create_connection(("127.0.0.1", receiver.http.port), timeout=10) as dripping:
            dripping.sendall(head)
            answer = b""
            while not answer:
                dripping.sendall(b"\0")
                dripping.settimeout(0.05)
                with contextlib.suppress(TimeoutError):
                    answer = dripping.recv(1000)
        post(receiver.http.port, export(vllm_span()).SerializeToString())

    assert answer.startswith(b"HTTP/1.1 408")
    assert len(rows(tmp_path)) == 1
    assert capfd.readouterr().err == ""


def test_connections_are_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr(otlp_receiver, "MAX_CONNECTIONS", 2)
    with receiving(tmp_path) as receiver, contextlib.ExitStack() as stack:
        for _ in range(2):
            stack.enter_context(socket.create_connection(("127.0.0.1", receiver.http.port)))
        with pytest.raises((http.client.RemoteDisconnected, ConnectionError)):
            post(receiver.http.port, b"")
        stack.close()
        deadline = time.monotonic() + 10
        while time.monotonic() < deadline:
            with contextlib.suppress(http.client.RemoteDisconnected, ConnectionError):
                post(receiver.http.port, export(sglang_span()).SerializeToString())
                break

    assert len(rows(tmp_path)) == 1


def test_a_full_disk_is_told(tmp_path):
    (tmp_path / "server_requests.jsonl").symlink_to("/dev/full")
    store = SpanStore(tmp_path, {}, lambda: 0.0)
    answer = store.take(export(vllm_span(), vllm_span()).SerializeToString())

    assert answer.partial_success.rejected_spans == 2
    assert "No space left on device" in store.close()[1]


def test_values_that_cannot_be_and_messages_that_are_none_are_counted(tmp_path):
    store = SpanStore(tmp_path, {}, lambda: 0.0)
    store.take(
        export(vllm_span(**{"gen_ai.latency.e2e": -1.0, "gen_ai.latency.time_in_queue": "x"})).SerializeToString()
    )
    with pytest.raises(ValueError, match="no Export"):
        store.take(b"garbage")
    notes = store.close()

    assert "2 values of spans were left out" in notes[0]
    assert "1 messages could not be read; the first: no ExportTraceServiceRequest" in notes[1]


def test_what_comes_after_the_end_is_refused_though_something_else_was_unreadable(tmp_path):
    store = SpanStore(tmp_path, {}, lambda: 0.0)
    store.take(export(vllm_span()).SerializeToString())
    store.close()
    store.refuse("a body without a length")

    with pytest.raises(ValueError, match="the run has ended"):
        store.take(export(vllm_span()).SerializeToString())
    assert len(rows(tmp_path)) == 1


def test_millions_of_empty_spans_are_dropped_unread(tmp_path):
    message = Request()
    message.resource_spans.add().scope_spans.add().ParseFromString(b"\x12\x00" * 1_000_000)
    store = SpanStore(tmp_path, {}, lambda: 0.0)
    rejected = store.take(message.SerializeToString()).partial_success.rejected_spans

    assert rejected == 1_000_000 - otlp_receiver.SPANS_PER_S * otlp_receiver.BURST_S
