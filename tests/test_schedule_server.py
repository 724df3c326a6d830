"""The known-schedule server, held to its word by its own log and by a plain client."""

import json
import socket
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from fake_server import chunked

from twoclocks.http1 import ResponseReader
from twoclocks.schedule import HEAD, Schedule, make_answer, make_end, make_tail
from twoclocks.schedule_server import ScheduleServer, main
from twoclocks.sse import SseDecoder
from twoclocks.truth import read_log


def post(port, body, *, request_id="a" * 32, path="/v1/chat/completions", pieces=1):
    """Send one request in so many pieces and return all that comes until the answer's end, as raw bytes."""
    raw = json.dumps(body).encode()
    message = f"POST {path} HTTP/1.1\r\nX-Request-Id: {request_id}\r\nContent-Length: {len(raw)}\r\n\r\n".encode() + raw
    with socket.create_connection(("127.0.0.1", port), 10) as sock:
        size = -(-len(message) // pieces)
        for start in range(0, len(message), size):
            sock.sendall(message[start : start + size])
        return read_answer(sock)


def read_answer(sock) -> bytes:
    reader, received = ResponseReader(), b""
    while not reader.complete:
        data = sock.recv(65536)
        assert data, "the server closed"
        received += data
        reader.feed(data)
    return received


def events_of(raw: bytes) -> list:
    """The payloads of an answer, read with the project's own readers; [DONE] as it stands."""
    payloads = SseDecoder().feed(ResponseReader().feed(raw))
    return [payload if payload == b"[DONE]" else json.loads(payload) for payload in payloads]


def asked(tokens, **fields):
    return {
        "model": "x",
        "stream": True,
        "max_tokens": tokens,
        "messages": [{"role": "user", "content": "hi"}],
        **fields,
    }


@pytest.fixture
def serve(tmp_path):
    """Start servers in threads; `stop` ends one and returns its log."""
    started = []

    def start(schedule=Schedule(ttft_ms=5, tpot_ms=2), **options):  # noqa: B008  (frozen)
        server = ScheduleServer(schedule, **options)
        ours, theirs = socket.socketpair()
        server.stop_when_readable(theirs.fileno())
        thread = threading.Thread(target=server.run)
        thread.start()

        def stop():
            ours.close()
            thread.join(10)
            assert not thread.is_alive()
            path = tmp_path / f"sent-{len(started)}.npz"
            server.write_log(path)
            server.close()
            theirs.close()
            return read_log(path)

        started.append((ours, thread, server, theirs))
        return int(server.url.rpartition(":")[2]), stop

    yield start
    for ours, thread, server, theirs in started:
        ours.close()
        thread.join(10)
        if not server.listener._closed:
            server.close()
        theirs.close()


def test_the_schedule_is_arithmetic():
    assert Schedule(ttft_ms=100, tpot_ms=20).due_ns(3, 0) == [100_000_000, 120_000_000, 140_000_000]
    assert Schedule(ttft_ms=1, tpot_ms=20, chunk_tokens=2, write_chunks=3).due_ns(13, 0) == [
        1_000_000,
        121_000_000,
        241_000_000,
    ]


def test_jitter_is_bounded_ordered_and_repeatable():
    schedule = Schedule(ttft_ms=10, tpot_ms=5, jitter_ms=4, seed=7)
    due = np.array(schedule.due_ns(500, 3))
    plain = np.array(Schedule(ttft_ms=10, tpot_ms=5).due_ns(500, 3))

    assert np.abs(due - plain).max() <= 4e6 + 1
    assert np.abs(due - plain).max() > 3e6
    assert (np.diff(due) >= 0).all()
    assert due.tolist() == schedule.due_ns(500, 3)
    assert due.tolist() != schedule.due_ns(500, 4)


@pytest.mark.parametrize("running", [False, True])
@pytest.mark.parametrize("role", ["with-first", "at-once", "none"])
@pytest.mark.parametrize(("chunk_tokens", "write_chunks", "tokens"), [(1, 1, 4), (3, 1, 7), (1, 4, 9), (2, 3, 1)])
def test_an_answer_is_valid_http_and_carries_what_was_asked(running, role, chunk_tokens, write_chunks, tokens):
    schedule = Schedule(chunk_tokens=chunk_tokens, write_chunks=write_chunks, role=role)
    answer, tail = make_answer("chat", tokens, running, schedule), make_tail(running, 1234)
    raw = b"".join(tail.join(write) for write in answer.writes) + make_end(True, tokens, 1234)
    reader = ResponseReader()
    reader.feed(raw if raw.startswith(HEAD) else HEAD + raw)
    *events, usage, done = events_of(raw if raw.startswith(HEAD) else HEAD + raw)
    texts = [event["choices"][0]["delta"].get("content") for event in events]

    assert reader.complete
    assert len(answer.writes) == len(schedule.due_ns(tokens, 0)) == len(answer.counts)
    assert sum(answer.counts) == -(-tokens // chunk_tokens) == len([text for text in texts if text])
    assert "".join(texts).split() == ["word"] * tokens
    assert [event["choices"][0]["finish_reason"] for event in events][-1] == "length"
    assert ("role" in events[0]["choices"][0]["delta"]) == (role == "with-first")
    assert usage["usage"] == {"prompt_tokens": 1234, "completion_tokens": tokens, "total_tokens": tokens + 1234}
    assert done == b"[DONE]"
    if running:
        assert events[-1]["usage"] == {"completion_tokens": tokens, "prompt_tokens": 1234}


def test_what_was_sent_is_what_the_log_says(serve):
    port, stop = serve(Schedule(ttft_ms=20, tpot_ms=3, chunk_tokens=2))
    before = time.monotonic_ns()
    raw = post(port, asked(9), request_id="b" * 32)
    received = time.monotonic_ns()
    log = stop()
    after = time.monotonic_ns()

    assert log.request_id == ["b" * 32]
    assert (log.tokens.tolist(), log.writes.tolist(), log.events.tolist()) == ([9], [5], [1] * 5)
    assert before < log.arrived_ns[0] < log.before_ns[0]
    assert (log.due_ns - log.arrived_ns[0]).tolist() == [20_000_000 + 6_000_000 * index for index in range(5)]
    assert (log.before_ns >= log.due_ns).all(), "nothing is sent before it is due"
    assert (log.after_ns >= log.before_ns).all()
    assert log.before_ns[-1] < received  # the stamp after the call may come later than the bytes
    assert log.after_ns[-1] < after
    assert log.sent_between(before, after) == 10  # whole chunks: the last one holds a single token
    assert len(events_of(raw)) == 1 + 5 + 1  # role, chunks, [DONE]; usage was not asked for


def test_the_role_chunk_alone_goes_out_at_once(serve):
    port, stop = serve(Schedule(ttft_ms=50, tpot_ms=1, role="at-once"))
    events = events_of(post(port, asked(2)))
    log = stop()

    assert log.arrived_ns[0] < log.role_ns[0] < log.after_ns[0]
    assert "role" in events[0]["choices"][0]["delta"]
    assert len(events) == 1 + 2 + 1


@pytest.mark.parametrize("pieces", [1, 2, 7])
def test_a_request_may_come_in_pieces_and_starts_with_its_last(serve, pieces):
    port, stop = serve()
    post(port, asked(3), pieces=pieces)

    assert stop().writes.tolist() == [3]


def test_a_connection_serves_one_request_after_the_other(serve):
    port, stop = serve()
    raw = json.dumps(asked(2)).encode()
    both = b"".join(
        f"POST /v1/chat/completions HTTP/1.1\r\nX-Request-Id: {name}\r\nContent-Length: {len(raw)}\r\n\r\n".encode()
        + raw
        for name in ("one", "two")
    )
    with socket.create_connection(("127.0.0.1", port), 10) as sock:
        sock.sendall(both)  # the second while the first is answered
        first = read_answer(sock)
        while first.count(b"[DONE]") < 2:
            first += sock.recv(65536)
    log = stop()

    assert log.request_id == ["one", "two"]
    assert log.writes.tolist() == [2, 2]


def test_completions_carry_text(serve):
    port, stop = serve()
    body = {"model": "x", "stream": True, "max_tokens": 2, "prompt": "hi", "stream_options": {"include_usage": True}}
    events = events_of(post(port, body, path="/v1/completions"))
    stop()

    assert "".join(event["choices"][0].get("text", "") for event in events[:-2]).split() == ["word", "word"]
    assert events[-2]["usage"]["completion_tokens"] == 2


def test_flat_out_sends_all_that_was_asked_through_a_full_socket(serve):
    """1.5 MB through a client that does not read for a while: writes block, are taken up again, and none is lost."""
    port, stop = serve(Schedule(ttft_ms=0, tpot_ms=0, write_chunks=100))
    raw = json.dumps(asked(6000)).encode()
    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sock.connect(("127.0.0.1", port))
        sock.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nContent-Length: %d\r\n\r\n" % len(raw) + raw)
        time.sleep(0.2)
        answer = read_answer(sock)
    log = stop()

    assert answer.count(b" word") == 6000
    assert log.events.sum() == 6000
    assert (np.diff(log.after_ns) > 0).all()


def test_a_client_that_leaves_ends_its_stream_only(serve):
    port, stop = serve(Schedule(ttft_ms=1, tpot_ms=5))
    raw = json.dumps(asked(1000)).encode()
    with socket.create_connection(("127.0.0.1", port), 10) as sock:
        sock.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nContent-Length: %d\r\n\r\n" % len(raw) + raw)
        assert sock.recv(100)
    post(port, asked(4))
    log = stop()

    assert 1 <= log.writes[0] < 1000
    assert log.writes[1] == 4
    assert len(log.after_ns) == log.writes.sum()


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b"{", "Expecting"),
        (b"[]", "stream: true"),
        (b'{"stream": false}', "stream: true"),
        (b'{"stream": true, "max_tokens": "many"}', "max_tokens"),
    ],
)
def test_what_it_does_not_understand_is_a_400_with_a_reason(serve, body, words):
    port, stop = serve()
    with socket.create_connection(("127.0.0.1", port), 10) as sock:
        sock.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
        answer = read_answer(sock)
    post(port, asked(1))
    stop()

    assert answer.startswith(b"HTTP/1.1 400 ")
    assert words.encode() in answer


def test_the_other_paths(serve):
    port, stop = serve(metrics=b"x 1\n" * 100_000)
    answers = []
    for path in ("/v1/models", "/metrics", "/nothing"):
        with socket.create_connection(("127.0.0.1", port), 10) as sock:
            sock.sendall(f"GET {path} HTTP/1.1\r\n\r\n".encode())
            answers.append(read_answer(sock))
    stop()

    assert b'"id": "known-schedule"' in answers[0]
    assert answers[1].endswith(b"\r\n\r\n" + b"x 1\n" * 100_000)
    assert answers[2].startswith(b"HTTP/1.1 404 ")


def test_its_own_counters_are_served_when_no_page_is_given(serve):
    port, stop = serve()
    post(port, asked(7))
    with socket.create_connection(("127.0.0.1", port), 10) as sock:
        sock.sendall(b"GET /metrics HTTP/1.1\r\n\r\n")
        page = read_answer(sock)
    stop()

    assert b"\nvllm:generation_tokens_total 7\n" in page
    assert b"\nvllm:num_requests_running 0\n" in page


def test_the_command_says_where_it_listens_and_leaves_its_log_at_the_end_of_input(tmp_path):
    log_path = tmp_path / "sent.npz"
    words = ["--until-eof", "--ttft-ms=1", "--tpot-ms=1", f"--log={log_path}"]
    process = subprocess.Popen(
        [sys.executable, "-m", "twoclocks.schedule_server", *words], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    with process:
        url = json.loads(process.stdout.readline())["url"]
        post(int(url.rpartition(":")[2]), asked(5))
        process.stdin.close()

        assert process.wait(20) == 0
    log = read_log(log_path)

    assert log.writes.tolist() == [5]
    assert log.meta["schedule"]["tpot_ms"] == 1
    assert log.meta["cpu_s"] > 0


def test_a_taken_port_is_one_line():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(SystemExit, match=f"127.0.0.1:{port} cannot be listened at .*; give another --port"):
            main([f"--port={port}"])


def test_chunk_sizes_are_those_of_http():
    """The event's size, written before its tail is known, against a plain encoder."""
    schedule = Schedule(role="none")
    answer, tail = make_answer("chat", 2, False, schedule), make_tail(False, 0)
    second = tail.join(answer.writes[1])
    body = second.partition(b"\r\n")[2].removesuffix(b"\r\n")

    assert second == chunked(body)


def test_with_slots_requests_wait_in_the_order_in_which_they_came(serve):
    port, stop = serve(Schedule(ttft_ms=20, tpot_ms=10), slots=2)
    body = json.dumps(asked(3)).encode()
    socks = []
    for number in range(6):
        sock = socket.create_connection(("127.0.0.1", port), 10)
        head = f"POST /v1/chat/completions HTTP/1.1\r\nX-Request-Id: r{number}\r\nContent-Length: {len(body)}\r\n\r\n"
        sock.sendall(head.encode() + body)
        socks.append(sock)
        time.sleep(0.002)
    socks[3].close()  # who goes while waiting takes no slot
    for number in (0, 1, 2, 4, 5):
        read_answer(socks[number])
        socks[number].close()
    log = stop()
    first = dict(zip(log.request_id, np.concatenate([[0], np.cumsum(log.writes)])[:-1], strict=True))
    begins = {number: log.due_ns[first[f"r{number}"]] / 1e6 - 20 for number in (0, 1, 2, 4, 5)}

    # each stream is 40 ms long, and the next one in a slot begins when the one before was due to end
    assert begins[2] == pytest.approx(begins[0] + 40, abs=1e-3)
    assert begins[4] == pytest.approx(begins[1] + 40, abs=1e-3)
    assert begins[5] == pytest.approx(begins[2] + 40, abs=1e-3)


def test_a_client_that_goes_in_mid_stream_gives_its_slot_back(serve):
    port, stop = serve(Schedule(ttft_ms=5, tpot_ms=20), slots=1)
    body = json.dumps(asked(500)).encode()
    with socket.create_connection(("127.0.0.1", port), 10) as sock:
        sock.sendall(f"POST /v1/chat/completions HTTP/1.1\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body)
        sock.recv(10)
    post(port, asked(2))

    assert sorted(stop().tokens) == [2, 500]
