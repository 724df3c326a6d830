"""The native reader: the same as http1 for the same bytes, clean under sanitizers, safe to fork and to cancel."""

import gc
import os
import shutil
import socket
import subprocess
import sys
import sysconfig
import time
import tracemalloc
from itertools import pairwise
from pathlib import Path

import pytest
from fake_server import HEAD, answer, chunked, delta, plain_answer, response, words
from hypothesis import example, given
from hypothesis import strategies as st

from twoclocks.client import Connection, Exchange, Failure, Received
from twoclocks.endpoint import Endpoint, make_endpoint
from twoclocks.experiment import Target, Timeouts
from twoclocks.http1 import ProtocolError, ResponseReader
from twoclocks.native import as_received
from twoclocks.workload import Plan, Prompt

SOURCE = Path(__file__).parent.parent / "twoclocks" / "_native.c"
HARNESS = Path(__file__).parent / "native_harness.c"
STRICT = ["-O1", "-g", "-std=gnu11", "-Wall", "-Wextra", "-Werror", "-pthread"]
FAR = 10**18  # ns: no timeout

compiled = pytest.mark.skipif(
    shutil.which("gcc") is None or not sys.platform.startswith("linux"), reason="needs gcc and Linux"
)
_native = pytest.importorskip("twoclocks._native", reason="the native reader was not built here")


@pytest.fixture
def reader():
    made = _native.Reader(False, 0)
    yield made
    made.close()


def read(pieces: list[bytes], end: bool = True) -> Received:
    """What the native reader makes of bytes that come in these pieces, each a read of its own."""
    reader = _native.Reader(False, 0)
    near, far = socket.socketpair()
    with near, far:
        token = reader.add(near.fileno(), FAR, FAR, FAR)
        ended = []
        for piece in pieces:
            far.sendall(piece)
            ended += reader.poll()
            if ended:
                break
        if end and not ended:
            far.shutdown(socket.SHUT_WR)
            ended += reader.poll()
        received = as_received(*reader.collect(token))
    reader.close()
    assert ended == ([token] if end or received.why != "cancelled" else [])
    return received


def exchanged(received: Received) -> Exchange:
    """The exchange of a client that was handed this, with the failure that it made of it."""
    endpoint = make_endpoint(Target(), Timeouts())
    exchange, near = Exchange(), socket.socket()
    with near:
        connection = Connection(endpoint, lambda *_: received)
        connection.sock, exchange.sent_ns = near, 1
        try:
            exchange._receive(connection, Plan("0" * 32, Prompt("p", {}), b"{}"))
        except Failure as failure:
            exchange.failure = failure
    return exchange


def bodies_of(received: Received | Exchange) -> list[bytes]:
    data, _, ends = received.body
    return [data[start:end] for start, end in pairwise([0, *ends])]


def expected(pieces: list[bytes]) -> tuple[ResponseReader, list[bytes], str | None]:
    """http1's view of the same pieces: the reader, the body bytes of each read, and what was wrong."""
    response, bodies = ResponseReader(), []
    try:
        for piece in pieces:
            if body := response.feed(piece):
                bodies.append(body)
            if response.complete:
                break
    except ProtocolError as error:
        return response, bodies + [error.body] * bool(error.body), str(error)
    response.end_of_input()
    return response, bodies, None if response.complete else "closed"


def split_at(data: bytes, cuts) -> list[bytes]:
    marks = [0, *sorted({cut % (len(data) + 1) for cut in cuts}), len(data)]
    return [data[start:end] for start, end in pairwise(marks) if end > start]


def assert_same(pieces: list[bytes]) -> None:
    response, bodies, wrong = expected(pieces)
    exchange = exchanged(read(pieces))

    assert bodies_of(exchange) == bodies
    assert (exchange.response.status, exchange.response.headers) == (response.status, response.headers)
    if wrong is None:
        assert exchange.failure is None
        assert (exchange.response.complete, exchange.response.reusable) == (True, response.reusable)
    elif wrong == "closed":
        assert exchange.failure is not None
        assert exchange.failure.kind == "closed"
    else:
        assert exchange.failure is not None
        assert (exchange.failure.kind, exchange.failure.message) == ("protocol", wrong)


GOOD = [
    b"".join(step for step in plain_answer() if isinstance(step, bytes)),
    b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\nTransfer-Encoding: CHUNKED\n\n"
    b"5;x=y\r\nhello\r\n000\r\nT: 1\r\n\r\nmore",
    *(step for step in response(503, b'{"error": "busy"}')),
    b"HTTP/1.0 200 OK\r\nConnection: Keep-Alive\r\nContent-Length: 3\r\n\r\nabcEXTRA",
    b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\nuntil the end",
    b"HTTP/1.1 204 No Content\r\n\r\n",
    b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\ncontent-encoding:identity\r\n\r\n",
]
PARTS = [
    b"HTTP/1.1 ",
    b"200",
    b" OK",
    b"\r\n",
    b"\n",
    b"\r",
    b"\r\n\r\n",
    b"content-length:",
    b"transfer-encoding: chunked",
]
PARTS += [
    b"connection: ",
    b"close",
    b"content-encoding: ",
    b"gzip",
    b"3",
    b"f",
    b"0",
    b"abc",
    b" ",
    b";",
    b":",
    b"\xff",
    b"-",
]


@given(st.sampled_from(GOOD), st.lists(st.integers(0, 600), max_size=25))
def test_the_same_as_http1_under_any_split(data, cuts):
    assert_same(split_at(data, cuts))


@given(
    st.sampled_from(GOOD), st.integers(0, 600), st.integers(0, 3), st.sampled_from(PARTS), st.lists(st.integers(0, 600))
)
def test_the_same_as_http1_for_damaged_bytes(data, at, gone, put, cuts):
    at %= len(data)
    assert_same(split_at(data[:at] + put + data[at + gone :], cuts))


@given(st.lists(st.sampled_from(PARTS), max_size=20), st.lists(st.integers(0, 100), max_size=5))
@example([b"HTTP/1.1 200\r\ntransfer-encoding: chunked\r\n\r\n", b"0" * 60, b" " * 60, b"zz\n"], [])
@example([b"HTTP/1.1 200\r\ntransfer-encoding: chunked\r\n\r\n", b"1\r\na", b"b" * 60, b"\n"], [])
@example([b"HTTP/1.1 200\r\ntransfer-encoding: chunked\r\n\r\n", b"0\r\n", b"t: x\r\n" * 20_000], [])
@example([b"HTTP/1.1 200\r\ntransfer-encoding: chunked\r\n\r\n", b"1;", b"x" * 2000], [60])
@example([b"HTTP/1.1 200\r\ntransfer-encoding: chunked\r\n\r\n", b"fffffffffffffff\r\n", b"x" * 2000], [])
@example([b"HTTP/1.1 200 OK\r\n", b"x: y\r\n" * 12_000, b"\r\n"], [40_000])
def test_the_same_as_http1_for_any_parts(parts, cuts):
    assert_same(split_at(b"".join(parts), cuts))


def test_an_answer_byte_by_byte():
    data = GOOD[0]
    received = read([bytes([byte]) for byte in data])

    assert received.why == "complete"
    assert received.body.data == b"".join(expected([data])[1])
    assert received.response.status == 200


def test_what_had_come_of_a_cancelled_stream(reader):
    near, far = socket.socketpair()
    with near, far:
        token = reader.add(near.fileno(), FAR, FAR, FAR)
        far.sendall(HEAD + chunked(b"abc") + b"5\r\nde")
        assert reader.poll() == []
        assert reader.progress() == [(token, 1, 5, False)]
        received = as_received(*reader.collect(token))
        far.sendall(b"more")

        assert (received.why, received.response.status) == ("cancelled", 200)
        assert bodies_of(received) == [b"abcde"]
        assert reader.poll() == reader.progress() == []
        assert near.recv(4) == b"more"  # nothing is read for a stream that is gone
        with pytest.raises(KeyError, match="no stream has the token"):
            reader.collect(token)


@pytest.mark.parametrize(
    ("first", "is_token"),
    [
        (delta(role="assistant", content=""), False),
        (delta(content=None, tool_calls=[]), False),
        (b": keep-alive\n\n", False),
        (delta(content="a").rstrip(b"\n"), False),  # not a whole event yet
        (delta(content="a"), True),
        (delta(reasoning="a"), True),
        (delta(reasoning_content="a"), True),
        (delta(tool_calls=[{"index": 0}]), True),
        (b'data:{"choices":[{"text":"a"}]}\r\n\r\n', True),
        (b'data: {"choices":[{"text" : "a"}]}\r\r', True),
    ],
)
@pytest.mark.parametrize("cut", [None, 10, -4])
def test_the_first_token_exchanges_its_deadline_for_the_idle_one(reader, first, is_token, cut):
    near, far = socket.socketpair()
    with near, far:
        token = reader.add(near.fileno(), FAR, FAR, FAR)
        far.sendall(HEAD)
        for piece in [first] if cut is None else [first[:cut], first[cut:]]:
            far.sendall(chunked(piece))
            reader.poll()

        assert reader.progress()[0][3] == is_token
        reader.collect(token)


@pytest.mark.parametrize(
    ("total", "first_token", "idle", "why"),
    [(2, 100, 100, "total"), (100, 2, 100, "first_token"), (100, 100, 2, "idle")],
)
def test_timeouts(reader, total, first_token, idle, why):
    near, far = socket.socketpair()
    with near, far:
        now = time.monotonic_ns()
        token = reader.add(near.fileno(), now + total * 10**7, now + first_token * 10**7, idle * 10**7)
        if why == "idle":
            far.sendall(HEAD + chunked(words(1)[0]))
        ended, deadline = [], time.monotonic() + 5
        while not ended and time.monotonic() < deadline:
            ended = reader.poll()
        received = as_received(*reader.collect(token))

    assert (ended, received.why) == ([token], why)
    assert received.ended_ns - now >= 2 * 10**7


def test_a_reset_carries_the_systems_error():
    reader = _native.Reader(False, 0)
    with socket.create_server(("127.0.0.1", 0)) as listener, socket.create_connection(listener.getsockname()) as near:
        far, _ = listener.accept()
        token = reader.add(near.fileno(), FAR, FAR, FAR)
        far.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        far.close()
        ended = reader.poll()
        received = as_received(*reader.collect(token))
    reader.close()

    assert (ended, received.why, received.detail) == ([token], "reset", "Connection reset by peer")


def test_misuse_is_an_exception(reader):
    with pytest.raises(OSError, match="Bad file descriptor"):
        reader.add(10**6, FAR, FAR, FAR)
    with pytest.raises(KeyError):
        reader.collect(-1)
    with pytest.raises(KeyError):
        reader.collect(1 << 40)
    reader.close()
    reader.close()
    with pytest.raises(ValueError, match="closed"):
        reader.poll()


def entries(of: str) -> list[str]:
    return sorted(path.name for path in Path("/proc/self", of).iterdir())


@pytest.mark.parametrize("threaded", [False, True])
def test_nothing_is_left_behind(threaded):
    def use() -> None:
        reader = _native.Reader(threaded, 0)
        pairs = [socket.socketpair() for _ in range(20)]
        tokens = [reader.add(near.fileno(), FAR, FAR, FAR) for near, _ in pairs]
        for _, far in pairs:
            far.sendall(GOOD[0])
        waiting, deadline = set(tokens[:10]), time.monotonic() + 5
        while waiting and time.monotonic() < deadline:
            waiting -= set(reader.poll())
            reader.progress()
        assert not waiting
        whole = [reader.collect(token)[2] for token in tokens[:10]]
        assert len(set(whole)) == 1
        del reader  # ten streams are still held
        for near, far in pairs:
            near.close()
            far.close()

    use()
    gc.collect()
    tracemalloc.start()
    before, files, threads = (
        tracemalloc.get_traced_memory()[0],
        entries("fd"),
        entries("task"),
    )
    for _ in range(50):
        use()
    gc.collect()
    grown = tracemalloc.get_traced_memory()[0] - before
    tracemalloc.stop()

    assert grown < 50 * 100  # a leaked object in each round would be more
    assert entries("fd") == files
    assert entries("task") == threads


def resident_kb() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") // 1024


def test_an_idle_stream_costs_little(reader):
    pairs = [socket.socketpair() for _ in range(500)]
    before = resident_kb()
    for near, far in pairs:
        reader.add(near.fileno(), FAR, FAR, FAR)
        far.sendall(HEAD + chunked(words(1)[0]))
    while any(reads == 0 for _, reads, _, _ in reader.progress()):
        reader.poll()
    cost = (resident_kb() - before) / len(pairs)
    for near, far in pairs:
        near.close()
        far.close()

    assert cost < 6  # kB, of the 60 that a stream may cost in the whole tool


FORK = """
import gevent.monkey; gevent.monkey.patch_all()
import os, sys
import gevent
from twoclocks import reader
from twoclocks.client import Origin, send
from twoclocks.endpoint import make_endpoint
from twoclocks.experiment import Target, Timeouts
from twoclocks.workload import Plan, Prompt

def ask():
    connection = reader.connect(make_endpoint(Target(url=sys.argv[1]), Timeouts()))
    record = send(connection, Plan("0" * 32, Prompt("p", {}), b"{}"), Origin(0), "measure")
    connection.close()
    return record.status, record.timestamp_source, bool(reader._readers)

before = gevent.spawn(ask)  # still streams when the process forks
gevent.sleep(0.1)
pid = os.fork()
if pid == 0:
    assert not reader._readers
    os._exit(0 if ask() == ("ok", "kernel", True) else 1)
print(before.get(), ask(), os.waitpid(pid, 0)[1])
"""


def test_a_forked_child_makes_its_own(serve):
    printed = serve(FORK, plain_answer(10, gap_s=0.03))

    assert printed == f"{('ok', 'kernel', True)} {('ok', 'kernel', True)} 0"


BUSY = """
import gevent.monkey; gevent.monkey.patch_all()
import sys, time
import gevent
from twoclocks.client import Connection, Origin, send
from twoclocks.endpoint import make_endpoint
from twoclocks.experiment import Target, Timeouts
from twoclocks.native import NativeReader
from twoclocks.workload import Plan, Prompt

reader = NativeReader(threaded=sys.argv[2] == "thread")
connection = Connection(make_endpoint(Target(url=sys.argv[1]), Timeouts()), reader.receive)
stream = gevent.spawn(send, connection, Plan("0" * 32, Prompt("p", {}), b"{}"), Origin(time.monotonic_ns()), "measure")
while not reader.progress():
    gevent.sleep(0.01)
end = time.monotonic() + float(sys.argv[3])
while reader.progress() and time.monotonic() < end:  # Python keeps the processor, the hub never runs
    pass
print("still open" if reader.progress() else "over", stream.get().status)
"""


def test_a_thread_reads_while_python_is_busy_and_the_hub_cannot(serve):
    steps = answer(*words(4), delta(finish_reason="stop"), gap_s=0.02)

    assert serve(BUSY, steps, "thread", "20") == "over ok"
    assert serve(BUSY, steps, "hub", "0.5") == "still open ok"


@pytest.fixture
def serve():
    """Run a program against a fake server that gives these steps as its answer, and return what it prints."""
    from fake_server import FakeServer

    def run(program: str, steps: list, *arguments: str) -> str:
        with FakeServer(lambda body: steps) as server:
            command = [sys.executable, "-c", program, server.url, *arguments]
            done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=30)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    return run


# the build


@compiled
def test_the_extension_builds_without_a_warning(tmp_path):
    include = sysconfig.get_paths()["include"]
    command = ["gcc", *STRICT, "-O2", "-fPIC", "-shared", f"-I{include}", SOURCE, "-o", tmp_path / "x.so"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)

    assert (done.returncode, done.stderr) == (0, "")


@pytest.fixture(scope="module")
def harness(tmp_path_factory):
    """Build the harness under a sanitizer once, and run a part of it."""
    folder = tmp_path_factory.mktemp("harness")

    def run(sanitizers: str, *arguments: str) -> str:
        program = folder / sanitizers.replace(",", "-")
        if not program.exists():
            command = ["gcc", *STRICT, "-fno-sanitize-recover=all", f"-fsanitize={sanitizers}", HARNESS, "-o", program]
            built = subprocess.run(command, capture_output=True, text=True, check=False)
            if "cannot find" in built.stderr:
                pytest.skip(f"no library for -fsanitize={sanitizers} here")
            assert built.returncode == 0, built.stderr
        done = subprocess.run([program, *arguments], capture_output=True, text=True, check=False, timeout=60)
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run


@compiled
@pytest.mark.parametrize("seed", ["1", "2"])
def test_fuzz(harness, seed):
    assert "complete" in harness("address,undefined", "fuzz", seed, "60000")


@compiled
@pytest.mark.parametrize(
    ("sanitizers", "driver"), [("address,undefined", "turn"), ("address,undefined", "thread"), ("thread", "thread")]
)
def test_streams_under_sanitizers(harness, sanitizers, driver):
    assert "done" in harness(sanitizers, "streams", "1", "4000", driver)


@compiled
def test_a_step_of_the_wall_clock_enters_no_arrival(harness):
    assert harness("address,undefined", "clock") == "steps kept out\n"


def test_tls_and_the_users_wish_take_the_python_reader(monkeypatch):
    from twoclocks.reader import reader_name

    def endpoint(url: str) -> Endpoint:
        return make_endpoint(Target(url=url), Timeouts())

    monkeypatch.delenv("TWOCLOCKS_READER", raising=False)
    assert reader_name(endpoint("http://h")) == "native"
    assert reader_name(endpoint("https://h")) == "python"
    monkeypatch.setenv("TWOCLOCKS_READER", "python")
    assert reader_name(endpoint("http://h")) == "python"
