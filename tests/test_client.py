import itertools
import json
import math
import socket
import struct
import subprocess
import sys
import threading
import time
from itertools import pairwise
from pathlib import Path

import msgspec
import pytest
from fake_server import (
    CLOSE,
    DONE,
    END,
    HANG,
    HEAD,
    RESET,
    FakeServer,
    answer,
    chunked,
    delta,
    event,
    plain_answer,
    response,
    usage,
    words,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from twoclocks import native, reader
from twoclocks.client import Origin, _gaps_us, send
from twoclocks.endpoint import make_endpoint
from twoclocks.errors import ExperimentError
from twoclocks.experiment import Target, Timeouts
from twoclocks.reader import connect
from twoclocks.record import expand
from twoclocks.workload import Plan, Prompt

PATIENT = Timeouts(connect_s=30, first_token_s=30, idle_s=30, total_s=60)
SHORT = Timeouts(connect_s=30, first_token_s=0.4, idle_s=0.3, total_s=60)  # for those who never answer
ROLE = delta(role="assistant", content="")
FINISH = delta(finish_reason="stop")


@pytest.fixture(autouse=True, params=["python", "native"])
def each_reader(request, monkeypatch):
    """Every test holds for both readers."""
    if request.param == "native" and not native.is_built:
        pytest.skip("the native reader was not built here")
    monkeypatch.setenv("TWOCLOCKS_READER", request.param)
    return request.param


def ask(server_or_url, timeouts=PATIENT, count=1, target=None, keep_text=True):
    url = server_or_url.url if isinstance(server_or_url, FakeServer) else server_or_url
    connection = connect(make_endpoint(target or Target(url=url), timeouts))
    origin = Origin(zero_ns=time.monotonic_ns(), keep_text=keep_text)
    plans = [Plan(f"{index:032x}", Prompt("p", {}), b'{"messages": []}') for index in range(count)]
    records = [send(connection, plan, origin, "measure") for plan in plans]
    connection.close()
    return records[0] if count == 1 else records


def answered(*steps, **options):
    with FakeServer(lambda body: list(steps)) as server:
        return ask(server, **options)


def test_a_plain_answer_is_ok_with_every_chunk():
    record = answered(*plain_answer(4))

    assert (record.status, record.error_kind, record.http_status) == ("ok", None, 200)
    assert record.chunk_kinds == [("role", 1), ("content", 4), ("usage", 1)]
    assert (record.prompt_tokens, record.output_tokens, record.token_source) == (5, 4, "usage")
    assert (record.chunk_tokens, record.chunk_choice, record.finish_reason) == (None, None, "length")
    assert record.output_text == "w0 w1 w2 end"


def test_a_key_that_the_server_says_back_is_in_no_record(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret-1")
    refusal = b'{"error": {"message": "wrong key: Bearer sk-secret-1, or sk-other"}}'
    head = b"HTTP/1.1 401 Unauthorized\r\ncontent-length: %d\r\n\r\n" % len(refusal)
    record = answered(head + refusal)

    assert (record.error_kind, record.error_message) == ("http_401", "wrong key: Bearer ***, or sk-other")


def test_times_are_in_order_and_the_first_request_opens_the_connection():
    first, second = answered(*plain_answer(), count=2)

    times = [first.intended_at, first.connect_started_at, first.connected_at, first.sent_at, first.written_at]
    assert times == sorted(times)
    assert first.sent_at < first.first_byte_at <= first.ended_at
    assert (second.connect_started_at, second.connected_at) == (None, None)


def test_arrivals_are_those_of_the_servers_schedule():
    """The server's own log of when it wrote each chunk is the independent clock: same machine, same monotonic clock."""
    with FakeServer(lambda body: plain_answer(20, gap_s=0.01)) as server:
        zero = time.monotonic_ns()
        connection = connect(make_endpoint(Target(url=server.url), PATIENT))
        record = send(connection, Plan("0" * 32, Prompt("p", {}), b"{}"), Origin(zero), "measure")
        connection.close()
    written = [(at - zero) / 1e9 for at in server.sent_ns[0][1:]]
    arrived, at = [], record.sent_at
    for gap in record.chunk_us:
        at += gap / 1e6
        arrived.append(at)
    errors = sorted(abs(a - w) for a, w in zip(arrived, written, strict=False))

    assert len(arrived) == 22
    assert errors[len(errors) // 2] < 0.005  # half of a gap: a stamp of the wrong chunk would be off by a whole one
    assert record.timestamp_source == "kernel"


def test_kernel_stamps_survive_a_client_that_is_busy():
    """Bytes that lay in the socket for 0.3 s while Python was away still carry the time at which they came."""
    with FakeServer(lambda body: answer(ROLE, *words(2), FINISH, DONE)) as server:
        connection = connect(make_endpoint(Target(url=server.url), PATIENT))
        receive = connection.receive

        def late(*arguments):
            while not server.sent_ns or len(server.sent_ns[0]) < 7:  # until all of the answer lies in the socket
                time.sleep(0.01)
            time.sleep(0.3)
            return receive(*arguments)

        connection.receive = late
        origin = Origin(time.monotonic_ns())
        record = send(connection, Plan("0" * 32, Prompt("p", {}), b"{}"), origin, "measure")
        connection.close()

    assert record.status == "ok"
    assert record.timestamp_source == "kernel"
    assert record.ended_at - (record.sent_at + sum(record.chunk_us) / 1e6) >= 0.3
    assert record.reads_merged == 1


def test_a_wall_clock_that_is_set_enters_no_arrival(monkeypatch, each_reader):
    """Stamped before, read after: once its age says five seconds. The native reader has a test of its own."""
    if each_reader == "native":
        pytest.skip("reads the clock in C")
    readings = itertools.count()
    monkeypatch.setattr(reader, "_wall_ns", lambda: time.time_ns() + 5 * 10**9 * (next(readings) == 4))
    record = answered(*plain_answer(8, gap_s=0.02))

    assert record.status == "ok"
    assert record.timestamp_source == "user"
    assert all(gap >= 0 for gap in record.chunk_us)
    assert record.first_byte_at <= record.sent_at + sum(record.chunk_us) / 1e6 <= record.ended_at + 1e-5


def test_what_waited_for_a_lost_segment_arrived_with_that(each_reader):
    """The kernel stamps a segment when it comes, though what it holds can be read once all before it has come."""
    program = Path(__file__).parent / "lost_segments.py"
    alone = ["unshare", "--map-root-user", "--net"]
    try:
        subprocess.run([*alone, "sh", "-c", "ip tuntap add dev x mode tun"], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("no tunnel device can be had here")
    printed = subprocess.run([*alone, sys.executable, program], capture_output=True, text=True, check=True).stdout
    told = [json.loads(line) for line in printed.splitlines()]

    assert [one["order"] for one in told] == ["none is late", "the head is late", "a token is late", "two are late"]
    assert all(late_s > -1e-3 for one in told for late_s in one["late_s"])


def test_arrivals_never_go_back():
    """After a read whose time is the reader's own, what came during that read is stamped before it."""

    class Reordered:
        def __init__(self):
            self.ages_ns = [10**9, 4 * 10**6]

        def recvmsg(self, *_):
            stamp = time.time_ns() - self.ages_ns.pop(0)
            control = struct.pack("@ll", *divmod(stamp, 10**9))
            return b"HTTP/1.1 200 OK\r\n\r\nx", [(socket.SOL_SOCKET, reader.SO_TIMESTAMPNS, control)], 0, None

        def getsockopt(self, *_):
            return b"\1" * (reader.TCP_INFO_OOOPACK + 4)

    stream = reader._Stream(Reordered(), 10**18, 10**18, 10**18, lambda _: None)
    before = time.monotonic_ns()
    stream.read()
    stream.read()
    first, second = stream.received().body.times

    assert before <= first <= second


def test_request_id_and_trace_are_sent():
    with FakeServer() as server:
        record = ask(server, target=Target(url=server.url, headers={"X-Mine": "yes"}))
        headers, _ = server.requests[0]

    assert headers["x-request-id"] == record.request_id
    assert headers["traceparent"] == f"00-{record.request_id}-{record.request_id[:16]}-01"
    assert headers["x-mine"] == "yes"


def test_the_key_of_the_environment_is_sent(monkeypatch):
    monkeypatch.setenv("MY_KEY", "secret-1")
    with FakeServer() as server:
        ask(server, target=Target(url=server.url, api_key_env="MY_KEY"))

        assert server.requests[0][0]["authorization"] == "Bearer secret-1"


@pytest.mark.parametrize(
    ("name", "steps", "status", "error_kind"),
    [
        (
            "error event under 200",
            answer(ROLE, *words(2), event({"error": {"message": "engine died"}}), DONE),
            "error",
            "error_event",
        ),
        ("error event of transformers", answer(ROLE, event({"error": "boom"})), "error", "error_event"),
        ("unescaped error event", answer(b'data: {"error": "a "quoted" word"}\n\n'), "error", "error_event"),
        ("no end at all", answer(ROLE, *words(2)), "truncated", "no_end"),
        ("cut in mid-stream", [HEAD, chunked(ROLE), *map(chunked, words(2)), CLOSE], "truncated", "closed"),
        ("reset in mid-stream", [HEAD, chunked(ROLE), 0.05, RESET], "truncated", "reset"),
        ("closed without an answer", [CLOSE], "error", "closed"),
        ("http 500", response(500, b'{"error": {"message": "no memory"}}'), "error", "http_500"),
        ("http 429", response(429, b"", headers="retry-after: 1\r\n"), "error", "http_429"),
        ("html", response(503, b"<html>busy</html>", "text/html"), "error", "http_503"),
        ("json under 200", response(200, b'{"choices": []}'), "error", "not_a_stream"),
        ("malformed event", answer(ROLE, b"data: {oops\n\n", *words(1), FINISH, DONE), "error", "malformed"),
        ("event of another type", answer(b"data: [1, 2]\n\n", FINISH, DONE), "error", "malformed"),
        ("not http", [b"SSH-2.0-OpenSSH\r\n\r\n", CLOSE], "error", "protocol"),
        ("absurd chunk size", [HEAD, b"zz\r\n", CLOSE], "error", "protocol"),
        ("negative chunk size", [HEAD, b"-5\r\n", CLOSE], "error", "protocol"),
        (
            "compressed",
            [b"HTTP/1.1 200 OK\r\ncontent-encoding: gzip\r\ncontent-length: 1\r\n\r\nx"],
            "error",
            "protocol",
        ),
        ("endless head", [b"HTTP/1.1 200 OK\r\n" + b"x" * 70_000, HANG], "error", "protocol"),
        ("silence before the first token", [HEAD, chunked(ROLE), HANG], "timeout", "first_token_timeout"),
        ("silence in mid-stream", [HEAD, chunked(ROLE), *map(chunked, words(2)), HANG], "timeout", "idle_timeout"),
        ("no answer", [HANG], "timeout", "first_token_timeout"),
    ],
)
def test_each_failure_is_a_record_with_its_kind(name, steps, status, error_kind):
    record = answered(*steps, timeouts=SHORT if status == "timeout" else PATIENT)

    assert (record.status, record.error_kind) == (status, error_kind)
    assert record.error_message


def test_a_request_that_is_refused_before_it_has_come_whole_is_told_why():
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def refuse():
            connection, _ = listener.accept()
            with connection:  # what it has not read makes of its end a reset
                connection.recv(1000)
                connection.sendall(response(413, b'{"error": "no more than 2 MB"}')[0])

        thread = threading.Thread(target=refuse)
        thread.start()
        endpoint = make_endpoint(Target(url=f"http://127.0.0.1:{listener.getsockname()[1]}"), PATIENT)
        plan = Plan("0" * 32, Prompt("p", {}), b"x" * 50_000_000)
        record = send(connect(endpoint), plan, Origin(time.monotonic_ns()), "measure")
        thread.join()

    assert (record.status, record.error_kind, record.error_message) == ("error", "http_413", "no more than 2 MB")
    assert record.written_at is None


def test_a_failed_stream_keeps_the_chunks_that_came():
    record = answered(HEAD, chunked(ROLE), *map(chunked, words(3)), CLOSE)

    assert record.chunk_kinds == [("role", 1), ("content", 3)]
    assert (record.output_tokens, record.token_source) == (3, "chunks")


def test_the_servers_words_reach_the_record():
    record = answered(*response(500, b'{"error": {"message": "no memory"}}'))

    assert (record.error_message, record.http_status) == ("no memory", 500)


def test_total_timeout_ends_a_server_of_one_byte_at_a_time():
    drip = [
        HEAD,
        *(step for byte in ROLE + words(1)[0] for step in (0.02, b"1\r\n%c\r\n" % byte)),
        *[0.1, chunked(b": still\n")] * 50,
    ]
    record = answered(*drip, timeouts=Timeouts(connect_s=1, first_token_s=10, idle_s=10, total_s=0.5))

    assert (record.status, record.error_kind) == ("timeout", "total_timeout")


@pytest.mark.parametrize(
    "words",
    [
        "This model's maximum context length is 2048 tokens. However, your prompt contains at least 2049 input tokens",
        "The decoder prompt (length 10127) is longer than the maximum model length of 8192.",
        "The input (61709 tokens) is longer than the model's context length (40960 tokens).",
        "request (4390 tokens) exceeds the available context size (4096 tokens), try increasing it",
        "Context size has been exceeded.",
        "Input validation error: `inputs` tokens + `max_new_tokens` must be <= 1512. Given: 1000",
        "Input validation error: `inputs` must have less than 2048 tokens. Given: 2222",
    ],
)
def test_a_prompt_longer_than_the_context_is_a_kind_of_its_own(words):
    refused = {"error": {"message": words, "type": "BadRequestError"}}
    whole = answered(*response(400, json.dumps(refused).encode()))
    begun = answered(HEAD, chunked(event(refused)), END)

    assert {(one.status, one.error_kind, one.error_message) for one in (whole, begun)} == {
        ("error", "context_length", words)
    }


def test_another_refusal_keeps_its_status():
    record = answered(*response(400, b'{"error": {"message": "max_tokens must be at least 1; context: chat"}}'))

    assert record.error_kind == "http_400"


def leaving(server, **times):
    connection = connect(make_endpoint(Target(url=server.url), PATIENT))
    plan = Plan("0" * 32, Prompt("p", {}), b"{}", **times)
    record = send(connection, plan, Origin(0), "measure")
    closed = connection.sock is None
    connection.close()
    return record, closed


@pytest.mark.parametrize(
    ("steps", "times", "kind", "chunks"),
    [
        ([HEAD, *map(chunked, words(3)), HANG], {"hang_up_s": 0.3}, "hung_up", [("content", 3)]),
        ([HEAD, *map(chunked, words(3)), HANG], {"hang_up_s": 0.3, "patience_s": 0.2}, "hung_up", [("content", 3)]),
        ([HEAD, chunked(ROLE), HANG], {"patience_s": 0.3}, "gave_up", [("role", 1)]),
        ([HANG], {"patience_s": 0.3, "hang_up_s": 9}, "gave_up", []),
        ([HANG], {"patience_s": 9, "hang_up_s": 0.3}, "hung_up", []),
    ],
)
def test_a_user_who_leaves_closes_the_connection_at_the_time(steps, times, kind, chunks):
    with FakeServer(lambda body: steps) as server:
        record, closed = leaving(server, **times)

    assert (record.status, record.error_kind, record.chunk_kinds) == ("cancelled", kind, chunks)
    assert record.ended_at - record.sent_at >= 0.3
    assert closed


def test_a_user_who_leaves_after_the_end_or_after_an_error_has_changed_nothing():
    whole = [HEAD, *map(chunked, words(2)), chunked(FINISH), HANG]
    refused = [b"HTTP/1.1 503 X\r\ncontent-length: 9\r\n\r\nbusy", HANG]
    for steps, expected in ((whole, ("ok", None)), (refused, ("error", "http_503"))):
        with FakeServer(lambda body, steps=steps: steps) as server:
            record, closed = leaving(server, hang_up_s=0.3)

        assert closed
        assert (record.status, record.error_kind) == expected


def test_nobody_leaves_during_the_warm_up():
    with FakeServer(lambda body: plain_answer(3, gap_s=0.1)) as server:
        plan = Plan("0" * 32, Prompt("p", {}), b"{}", hang_up_s=0.05, patience_s=0.05)
        connection = connect(make_endpoint(Target(url=server.url), PATIENT))
        record = send(connection, plan, Origin(0), "warmup")
        connection.close()

    assert record.status == "ok"


def test_refused():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    record = ask(url)

    assert (record.status, record.error_kind, record.sent_at) == ("error", "refused", None)


def test_an_address_in_digits_asks_no_resolver(monkeypatch):
    """gevent's is a pool of threads: of 50,000 requests in a busy loop some waited 50 s for a new connection."""
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_: pytest.fail("asked the resolver"))

    assert answered(*plain_answer(2)).status == "ok"


def test_a_name_that_does_not_exist_is_a_record():
    assert ask("http://no-such-host.invalid:1").error_kind == "dns"


def test_a_server_that_does_not_speak_tls_is_a_record():
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def answer_in_plain():
            connection, _ = listener.accept()
            with connection:
                connection.recv(65536)
                connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")

        thread = threading.Thread(target=answer_in_plain)
        thread.start()
        record = ask(f"https://127.0.0.1:{listener.getsockname()[1]}")
        thread.join()

    assert (record.status, record.error_kind) == ("error", "tls")


@pytest.mark.parametrize(
    ("name", "steps"),
    [
        (
            "utf-8 split between writes",
            [HEAD, *(chunked(bytes([byte])) for byte in delta(content="日本🙂")), chunked(FINISH + DONE), END],
        ),
        ("crlf", answer(delta(content="日本🙂").replace(b"\n", b"\r\n"), FINISH, DONE)),
        ("no space after data:", answer(delta(content="日本🙂").replace(b"data: ", b"data:"), FINISH, DONE)),
        (
            "comments and other fields",
            answer(b": keep-alive\n\n", b"event: x\nid: 3\n" + delta(content="日本🙂"), b":\n", FINISH, DONE),
        ),
        ("no [DONE]", answer(delta(content="日本🙂"), FINISH)),
        ("no blank line at the end", answer(delta(content="日本🙂"), FINISH.rstrip(b"\n"))),
        ("separators raw inside a token", answer(delta(content="日本🙂"), FINISH)),
        ("several events in one write", [HEAD, chunked(delta(content="日本🙂") + FINISH + DONE), END]),
        (
            "body until close",
            [b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n\r\n", delta(content="日本🙂") + FINISH, CLOSE],
        ),
        (
            "interim response first",
            [b"HTTP/1.1 103 Early Hints\r\nlink: x\r\n\r\n", *answer(delta(content="日本🙂"), FINISH)],
        ),
        ("trailers", [HEAD, chunked(delta(content="日本🙂") + FINISH), b"0\r\nx-took: 3\r\n\r\n"]),
        ("finish seen, terminator lost", [HEAD, chunked(delta(content="日本🙂") + FINISH), CLOSE]),
    ],
)
def test_every_form_of_the_same_answer_reads_the_same(name, steps):
    record = answered(*steps)

    assert (record.status, record.error_kind, record.output_text) == ("ok", None, "日本🙂")
    assert list(expand(record.chunk_kinds)) == ["content", "finish"]


def test_line_separators_inside_a_token_do_not_split_it():
    record = answered(*answer(delta(content="a\u2028b\u0085c\x0b"), FINISH, DONE))

    assert record.output_text == "a\u2028b\u0085c\x0b"


def test_the_connection_is_kept_and_replaced_when_the_server_closed_it():
    answers = iter([plain_answer(), [*plain_answer(), CLOSE], plain_answer()])
    with FakeServer(lambda body: next(answers)) as server:
        connection = connect(make_endpoint(Target(url=server.url), PATIENT))
        records = []
        for index in range(3):
            records.append(send(connection, Plan(f"{index:032x}", Prompt("p", {}), b"{}"), Origin(0), "measure"))
            time.sleep(0.1)
        connection.close()

        assert [record.status for record in records] == ["ok"] * 3
        assert [record.connected_at is None for record in records] == [False, True, False]
        assert server.connections == 2


def test_in_band_timings_are_kept_verbatim():
    timings = {"queue_time_ms": 1.25, "time_to_first_token_ms": 30.5}
    record = answered(*answer(ROLE, *words(1), FINISH, usage(2, metrics=timings), DONE))

    assert record.server == timings


def test_chunk_times_do_not_drift():
    """Rounded gaps must add up to the rounded whole, however many there are."""
    arrived = [1_000_000 + 1_333_400 * (index + 1) for index in range(3000)]
    gaps = _gaps_us(1_000_000, arrived)

    assert sum(gaps) == round(1_333_400 * 3000 / 1000)
    assert math.isclose(min(gaps), 1333, abs_tol=1)


@pytest.mark.parametrize("headers", [{"X": "a\r\nEvil: 1"}, {"X\n": "a"}])
def test_a_header_cannot_smuggle_another(headers):
    with pytest.raises(ExperimentError, match="line break"):
        make_endpoint(Target(headers=headers), PATIENT)


def test_a_cancelled_request_is_a_record_with_its_chunks():
    program = """
import gevent.monkey; gevent.monkey.patch_all()
import gevent, sys
from twoclocks.client import *
from twoclocks.endpoint import make_endpoint
from twoclocks.reader import connect
from twoclocks.experiment import Timeouts, Target
from twoclocks.workload import Plan, Prompt
connection = connect(make_endpoint(Target(url=sys.argv[1]), Timeouts()))
stream = gevent.spawn(send, connection, Plan("0" * 32, Prompt("p", {}), b"{}"), Origin(0), "measure")
gevent.sleep(0.5)
stream.kill()
record = stream.value
print(record.status, record.error_kind, record.chunk_kinds, connection.sock)
"""
    with FakeServer(lambda body: [HEAD, chunked(ROLE), *map(chunked, words(3)), HANG]) as server:
        printed = subprocess.run(
            [sys.executable, "-c", program, server.url], capture_output=True, text=True, check=True
        )

    assert printed.stdout.strip() == "cancelled stopped [('role', 1), ('content', 3)] None"


def test_no_thread_is_left_behind():
    before = threading.active_count()
    answered(*plain_answer())

    assert threading.active_count() == before


def test_a_page_under_200_is_no_cut_stream():
    record = answered(*response(200, b"<html>login</html>", "text/html"))

    assert (record.status, record.error_kind) == ("error", "not_a_stream")
    assert "<html>login</html>" in record.error_message


WHOLE_CHAT = {
    "choices": [{"index": 0, "message": {"role": "assistant", "content": "日本🙂"}, "finish_reason": "stop"}],
    "usage": {"prompt_tokens": 5, "completion_tokens": 3, "prompt_tokens_details": {"cached_tokens": 2}},
}
TGI_TIMES = "x-total-time: 120\r\nx-queue-time: 7\r\nx-other: 1\r\n"


def whole(payload, headers="", status=200, **target):
    steps = response(status, json.dumps(payload, ensure_ascii=False).encode(), headers=headers)
    with FakeServer(lambda body: steps) as server:
        return ask(server, target=Target(url=server.url, stream=False, **target))


def test_a_whole_answer_is_one_chunk_with_all_its_tokens():
    record = whole(WHOLE_CHAT | {"metrics": {"queue_time_ms": 1.5}})

    assert (record.status, record.output_text, record.finish_reason) == ("ok", "日本🙂", "stop")
    assert (record.chunk_kinds, record.chunk_tokens, record.token_source) == ([("content", 1)], [3], "usage")
    assert (record.prompt_tokens, record.output_tokens, record.cached_tokens) == (5, 3, 2)
    assert record.server == {"queue_time_ms": 1.5}
    assert 0 < record.chunk_us[0] <= 1e6 * (record.ended_at - record.sent_at) + 1


def test_timings_in_the_headers_of_tgi_are_kept():
    details = {"finish_reason": "length", "generated_tokens": 4, "input_length": 9}
    record = whole({"generated_text": "abcd", "details": details}, TGI_TIMES, server="tgi", api="tgi-generate")

    assert record.server == {"x-total-time": "120", "x-queue-time": "7"}
    assert (record.output_text, record.output_tokens, record.prompt_tokens) == ("abcd", 4, 9)


def test_several_choices_of_a_whole_answer():
    choices = [{"index": i, "text": "a" * i, "finish_reason": "stop"} for i in range(3)]
    record = whole({"choices": choices, "usage": {"completion_tokens": 9}}, api="completions")

    assert record.chunk_kinds == [("empty", 1), ("content", 2)]
    assert (record.chunk_tokens, record.output_tokens) == ([None] * 3, 9)
    assert expand(record.chunk_choice) == [0, 1, 2]


@pytest.mark.parametrize(
    ("payload", "status", "kind"),
    [
        ({"error": {"message": "no memory"}}, 200, "error_event"),
        ({"error": {"message": "no memory"}}, 500, "http_500"),
        ({}, 200, "not_an_answer"),
        ([1], 200, "malformed"),
        ({"choices": [{"index": -1}]}, 200, "malformed"),
    ],
)
def test_a_whole_answer_that_is_none_says_why(payload, status, kind):
    record = whole(payload, status=status)

    assert (record.status, record.error_kind) == ("error", kind)
    assert record.error_message


def test_a_whole_answer_may_take_longer_than_a_first_token():
    steps = [b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 14\r\n\r\n", 0.3]
    with FakeServer(lambda body: [*steps, b'{"choices":[]}']) as server:
        target = Target(url=server.url, stream=False)
        record = ask(server, target=target, timeouts=Timeouts(first_token_s=0.1, idle_s=0.1, total_s=30))

    assert (record.error_kind, record.http_status) == ("not_an_answer", 200)


ANSWERS = [
    b"".join(plain_answer(6)),
    b"".join(answer(delta(content="日本🙂").replace(b"\n", b"\r\n"), b": comment\n\n", FINISH, DONE)),
    b"".join(answer(*(delta(content=f"a{i}", index=i % 3) for i in range(6)), usage(9), DONE)),
    b"".join(answer(delta(reasoning="hm"), delta(tool_calls=[{"index": 0}]), event({"error": {"message": "no"}}))),
    b"HTTP/1.1 100 Continue\r\n\r\n" + b"".join(response(429, b'{"error": {"message": "busy"}}')),
    b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n5\r\nhello\r\nzz\r\n",
]


@settings(max_examples=15)
@given(st.sampled_from(ANSWERS), st.lists(st.integers(0, 3000), max_size=12))
def test_any_split_on_the_wire_gives_the_same_record(whole, cuts):
    """Through a real socket: each piece is a write of its own, with a rest, so that most are a read of their own."""
    marks = sorted({0, len(whole), *(cut % len(whole) for cut in cuts)})
    pieces = [step for start, end in pairwise(marks) for step in (whole[start:end], 0.001)]
    records = [answered(*steps) for steps in ([whole, CLOSE], [*pieces, CLOSE])]
    moving = {name for name in records[0].__struct_fields__ if name.endswith("_at")}
    moving |= {"chunk_us", "reads_merged", "request_id"}
    one, other = ({k: v for k, v in msgspec.structs.asdict(r).items() if k not in moving} for r in records)

    assert one == other
    assert [len(record.chunk_us) for record in records] == [sum(n for _, n in one["chunk_kinds"])] * 2


@pytest.mark.parametrize("depth", [30, 600])
def test_timings_nested_beyond_reason_are_left_out_of_the_record(depth):
    """What can just be read cannot be written a few calls further down."""
    nested = b'{"a":' * depth + b"1" + b"}" * depth
    choice = b'"choices": [{"delta": {"content": "a"}, "finish_reason": "stop"}]'
    event = b'data: {%b, "metrics": {"queue_time_ms": 3, "x": %b}}\n\n' % (choice, nested)
    record = answered(*response(200, event, "text/event-stream"))

    assert (record.status, record.server) == ("ok", {"queue_time_ms": 3})
