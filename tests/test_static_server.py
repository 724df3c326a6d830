"""The static batching server with an engine that takes one step at a time, when a test lets it."""

import contextlib
import json
import socket
import threading
import time
from http.client import HTTPConnection

import pytest
from asks import Answer, Ask, Sampling, encode
from prometheus_client.parser import text_string_to_metric_families
from static_server import Batcher, Job, Line, Server, Spoken
from test_asks import Words

from twoclocks.dialect import Body, read_stream
from twoclocks.join import in_band


class Letters(Words):
    """Token n of an answer is the letter n; token 1000 + k is byte k of a letter that takes three."""

    def decode(self, ids, skip_special_tokens=True):
        return b"".join(bytes([one - 1000]) if one >= 1000 else chr(97 + one % 26).encode() for one in ids).decode(
            errors="replace"
        )


class Steps:
    """An engine whose every row makes tokens 0, 1, 2, ... until its max_tokens; a step waits until it is let."""

    ends = frozenset([999])
    context = 100

    def __init__(self, *, free=True):
        self.tokenizer, self.let, self.failing = Letters(), threading.Semaphore(0), False
        self.free, self.batches = free, []

    def encode(self, ask):
        return encode(self.tokenizer, ask, self.context)

    def told(self):
        return {"server_version": "7"}

    def generate(self, asks, prompts, on_token):
        self.batches.append([ask.id for ask in asks])
        answers = [Answer(ask.id, prompt_tokens=len(ids)) for ask, ids in zip(asks, prompts, strict=True)]
        ended = [False] * len(asks)
        while not all(ended):
            if not self.free:
                assert self.let.acquire(timeout=30)
            if self.failing:
                raise RuntimeError("CUDA out of memory")
            now = time.monotonic_ns()
            for row, (ask, answer) in enumerate(zip(asks, answers, strict=True)):
                if not ended[row]:
                    answer.token_ids.append(len(answer.token_ids))
                    answer.steps.append((now, 1))
                    wanted = on_token(row, answer.token_ids[-1], now)
                    ended[row] = not wanted or len(answer.token_ids) == ask.max_tokens
        for answer in answers:
            answer.text, answer.finish_reason = self.tokenizer.decode(answer.token_ids), "length"
            answer.ended_ns = time.monotonic_ns()
        return answers


@contextlib.contextmanager
def serving(engine, *, size=4, wait_s=0.0, stream_steps=False):
    batcher = Batcher(engine, size=size, wait_s=wait_s)
    server = Server(0, batcher, names=["m", "/models/m"], stream_steps=stream_steps)
    for work in (batcher.run, server.serve_forever):
        threading.Thread(target=work, daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()


def post(server, body, path="/v1/completions", **headers):
    """Status, headers, and body of one request."""
    connection = HTTPConnection(*server.server_address, timeout=30)
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    connection.request("POST", path, raw, headers)
    answer = connection.getresponse()
    read = answer.status, dict(answer.getheaders()), answer.read()
    connection.close()
    return read


def get(server, path):
    connection = HTTPConnection(*server.server_address, timeout=30)
    connection.request("GET", path)
    answer = connection.getresponse()
    read = answer.status, answer.read().decode()
    connection.close()
    return read


def in_background(server, *bodies):
    """Each posted in a thread; a list that gets (when it ended, status, body), by the order of the bodies."""
    ended = [None] * len(bodies)

    def one(number, body):
        status, _, read = post(server, body)
        ended[number] = time.monotonic(), status, json.loads(read)

    threads = [threading.Thread(target=one, args=pair, daemon=True) for pair in enumerate(bodies)]
    for thread in threads:
        thread.start()
    return ended, threads


def until(condition):
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def prompt(max_tokens, **more):
    return {"prompt": "one two", "max_tokens": max_tokens, **more}


def stream_of(read):
    return read_stream(Body(read, [1], [len(read)]))


def test_a_short_answer_is_sent_when_the_longest_of_its_batch_has_ended():
    engine = Steps(free=False)
    with serving(engine, size=2, wait_s=30) as server:
        ended, threads = in_background(server, prompt(1), prompt(5))
        until(lambda: engine.batches)
        for _ in range(4):
            engine.let.release()
        until(lambda: engine.let._value == 0)
        time.sleep(0.3)
        assert ended == [None, None]  # the short one ended three steps ago

        engine.let.release()
        for thread in threads:
            thread.join(30)
    assert sorted(body["usage"]["completion_tokens"] for _, _, body in ended) == [1, 5]
    assert sorted(body["choices"][0]["text"] for _, _, body in ended) == ["a", "abcde"]
    metrics = {body["usage"]["completion_tokens"]: body["metrics"] for _, _, body in ended}
    assert metrics[1]["batch_size"] == 2
    assert metrics[1]["batch_held_ms"] >= 300 > metrics[5]["batch_held_ms"]
    assert metrics[1]["batch_decode_ms"] == 0 < metrics[5]["batch_decode_ms"]


def test_what_comes_while_a_batch_runs_waits_for_the_next_one():
    engine = Steps(free=False)
    with serving(engine, size=4) as server:
        first, threads = in_background(server, prompt(2))
        until(lambda: engine.batches)
        later, more = in_background(server, prompt(1), prompt(1))
        until(lambda: "pytorch:num_requests_waiting 2" in get(server, "/metrics")[1])
        assert len(engine.batches) == 1

        for _ in range(3):
            engine.let.release()
        for thread in [*threads, *more]:
            thread.join(30)
    assert [len(batch) for batch in engine.batches] == [1, 2]
    assert [status for _, status, _ in first + later] == [200, 200, 200]


def test_a_batch_is_full_or_its_first_has_waited():
    line = Line()
    now = time.monotonic_ns()
    for number in range(5):
        line.add(Job(Ask(str(number), None, "x", 4), [1], now))

    assert [job.ask.id for job in line.next_batch(4, 1e9)] == ["0", "1", "2", "3"]
    began = time.monotonic()
    assert [job.ask.id for job in line.next_batch(4, 0.2)] == ["4"]
    assert time.monotonic() - now / 1e9 >= 0.2
    assert time.monotonic() - began < 30


def test_a_batch_has_one_sampling_and_leaves_out_who_hung_up():
    line = Line()
    hot = Sampling(temperature=1.0)
    jobs = [
        Job(Ask(str(number), None, "x", 4, sampling=kind), [1], 0)
        for number, kind in enumerate([Sampling(), hot, Sampling(), hot])
    ]
    for job in jobs:
        line.add(job)
    jobs[2].gone = True

    assert [job.ask.id for job in line.next_batch(4, 0)] == ["0"]
    assert [job.ask.id for job in line.next_batch(4, 0)] == ["1", "3"]


def test_a_stream_is_one_chunk_with_all_its_tokens_and_then_timings():
    with serving(Steps()) as server:
        asked = prompt(3, stream=True, stream_options={"include_usage": True, "continuous_usage_stats": True})
        status, headers, read = post(server, asked, **{"X-Request-Id": "abc"})
    stream = stream_of(read)

    assert (status, headers["X-Request-Id"]) == (200, "abc")
    assert (stream.kinds, stream.text, stream.finish_reason) == (["content", "usage", "usage"], "abc", "length")
    assert (stream.prompt_tokens, stream.output_tokens, stream.tokens) == (3, 3, [3, 0, 0])
    assert (stream.ended, stream.error, stream.malformed) == (True, None, None)
    timing = in_band(stream.server, 3)
    assert timing.server == "pytorch"
    assert timing.ttft == pytest.approx(timing.queue + timing.prefill + timing.held, abs=3e-6)
    assert timing.e2e == pytest.approx(timing.ttft, abs=2e-6)  # the first token is sent with the last; told in whole us


@pytest.mark.parametrize("api", ["chat", "completions"])
def test_with_stream_steps_each_token_is_sent_as_it_is_made(api):
    engine = Steps(free=False)
    body = prompt(3) if api == "completions" else {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 3}
    body |= {"stream": True, "stream_options": {"include_usage": True}}
    path = "/v1/completions" if api == "completions" else "/v1/chat/completions"
    with serving(engine, size=2, wait_s=30, stream_steps=True) as server:
        _, threads = in_background(server, prompt(9))
        with socket.create_connection(server.server_address, timeout=30) as sock:
            raw = json.dumps(body).encode()
            sock.sendall(b"POST %b HTTP/1.1\r\nContent-Length: %d\r\n\r\n%b" % (path.encode(), len(raw), raw))
            read = b""
            for letter in (b"a", b"b", b"c"):
                engine.let.release()
                while b'"%b"' % letter not in read:
                    read += sock.recv(65536)
            while b"[DONE]" not in read:  # its own end, six steps before the batch's
                read += sock.recv(65536)
        for _ in range(6):
            engine.let.release()
        threads[0].join(30)
    stream = stream_of(b"".join(line + b"\n\n" for line in read.split(b"\n") if line.startswith(b"data: ")))

    assert stream.kinds == ["content"] * 3 + ["usage"]
    assert (stream.text, stream.output_tokens, stream.finish_reason) == ("abc", 3, "length")
    timing = in_band(stream.server, 3)
    assert timing.held < timing.decode
    assert timing.e2e >= timing.queue + timing.prefill + timing.decode


def test_an_unfinished_letter_is_held_back():
    spoken = Spoken(Letters())
    parts = [spoken.add(token) for token in (0, *(1000 + byte for byte in "€".encode()), 1, 1000 + "€".encode()[0])]

    assert parts == ["a", "", "", "€", "b", ""]
    assert spoken.rest() == "\N{REPLACEMENT CHARACTER}"
    assert spoken.rest() == ""


@pytest.mark.parametrize(
    ("path", "body", "status", "said"),
    [
        ("/v1/completions", b"{", 400, "is not JSON"),
        ("/v1/completions", b"[" * 100_000, 400, "is not JSON"),
        ("/v1/completions", b"\xff", 400, "is not JSON"),
        ("/v1/completions", [], 400, "no JSON object"),
        ("/v1/completions", {"messages": [{"role": "user", "content": "x"}]}, 400, "prompt: this path needs it"),
        ("/v1/chat/completions", {"prompt": "x"}, 400, "messages: this path needs it"),
        ("/v1/completions", {"prompt": "x", "max_tokens": 99}, 400, "context holds 100"),
        ("/v1/completions", {"prompt": "x", "stop": "."}, 400, "'stop' is not known"),
        ("/v1/completions", {"prompt": "x", "model": "other"}, 404, "'other' is not served here; 'm' is"),
        ("/v1/embeddings", {"input": "x"}, 404, "/v1/embeddings"),
    ],
)
def test_what_it_refuses(path, body, status, said):
    engine = Steps()
    with serving(engine) as server:
        got, _, read = post(server, body, path)
        assert post(server, prompt(1, model="/models/m"))[0] == 200  # and goes on

    assert (got, said in json.loads(read)["error"]["message"]) == (status, True)
    assert len(engine.batches) == 1


def test_other_paths_and_methods():
    with serving(Steps()) as server:
        assert get(server, "/health") == (200, "")
        assert json.loads(get(server, "/v1/models?x=1")[1])["data"][0]["id"] == "m"
        assert json.loads(get(server, "/version")[1]) == {"version": "7"}
        assert get(server, "/v1/completions")[0] == 405
        assert get(server, "/x")[0] == 404


def test_a_body_without_length_or_beyond_all_measure_is_refused_and_the_connection_closed():
    for head, status in (("Transfer-Encoding: chunked", b"411"), ("Content-Length: 99999999999", b"413")):
        with serving(Steps()) as server, socket.create_connection(server.server_address, timeout=30) as sock:
            sock.sendall(f"POST /v1/completions HTTP/1.1\r\n{head}\r\n\r\n".encode())
            read = b""
            while data := sock.recv(65536):  # until it closes
                read += data
        assert status in read.split(b"\r\n")[0]


def test_who_hangs_up_while_waiting_is_not_generated_and_while_running_holds_nobody():
    engine = Steps(free=False)
    with serving(engine, size=2) as server:
        _, threads = in_background(server, prompt(3))
        until(lambda: engine.batches)
        waiting = socket.create_connection(server.server_address)
        raw = json.dumps(prompt(50)).encode()
        waiting.sendall(b"POST /v1/completions HTTP/1.1\r\nContent-Length: %d\r\n\r\n%b" % (len(raw), raw))
        until(lambda: "pytorch:num_requests_waiting 1" in get(server, "/metrics")[1])
        waiting.close()
        until(lambda: "pytorch:num_requests_waiting 0" in get(server, "/metrics")[1])
        for _ in range(3):
            engine.let.release()
        threads[0].join(30)
        assert len(engine.batches) == 1

        running = socket.create_connection(server.server_address)
        running.sendall(b"POST /v1/completions HTTP/1.1\r\nContent-Length: %d\r\n\r\n%b" % (len(raw), raw))
        until(lambda: len(engine.batches) == 2)
        running.close()
        time.sleep(0.5)  # until it has been noticed
        engine.let.release()
        until(lambda: "pytorch:num_requests_running 0" in get(server, "/metrics")[1])  # after one step of fifty


def test_a_batch_that_fails_is_told_to_each_and_the_next_one_runs():
    engine = Steps()
    engine.failing = True
    with serving(engine) as server:
        status, _, read = post(server, prompt(2))
        streamed = post(server, prompt(2, stream=True))
        engine.failing = False
        assert post(server, prompt(2))[0] == 200
        page = get(server, "/metrics")[1]

    assert (status, streamed[0]) == (500, 500)
    assert "CUDA out of memory" in json.loads(read)["error"]["message"]
    assert "pytorch:failed_requests_total 2" in page


def test_the_counters_are_those_of_what_was_answered():
    engine = Steps(free=False)
    with serving(engine, size=2, wait_s=30) as server:
        _, threads = in_background(server, prompt(1), prompt(5))
        for _ in range(5):
            engine.let.release()
        for thread in threads:
            thread.join(30)
        page = get(server, "/metrics")[1]
    values = {
        (sample.name, sample.labels.get("le")): sample.value
        for family in text_string_to_metric_families(page)
        for sample in family.samples
    }

    assert values["pytorch:generation_tokens_total", None] == 6
    assert values["pytorch:discarded_tokens_total", None] == 4  # the short row went on for four steps
    assert values["pytorch:prompt_tokens_total", None] == 6
    assert values["pytorch:requests_total", None] == 2
    assert [values["pytorch:batch_size_bucket", le] for le in ("1", "2", "+Inf")] == [0, 1, 1]
    assert (values["pytorch:batch_size_sum", None], values["pytorch:batch_size_count", None]) == (2, 1)
