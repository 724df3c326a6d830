"""The known-schedule server: an OpenAI-compatible server on loopback that sends each token at a time known beforehand.

    python -m twoclocks.schedule_server --ttft-ms 100 --tpot-ms 20 --log sent.npz

What it is for: holding a client's figures against the truth. A request's schedule starts when its last byte reached the
kernel of this machine; the first token is due ttft_ms later, each next one tpot_ms after the one before. For each write
the log keeps when it was due and the clock right before and right after the system call, so that its own lateness is
known too and a client is compared with what was really sent. With --slots N, at most N streams run at a time, others
wait in the order in which they came, and a schedule starts when a slot is free: a server whose capacity is known. It is
N / (ttft + (writes - 1) * time between writes) requests/s. The clock is time.monotonic_ns(), which all processes of a
machine share. Standard library only, but for writing the log. Knows nothing of the client that it judges.
"""

import argparse
import array
import collections
import contextlib
import ctypes
import gc
import heapq
import json
import os
import select
import signal
import socket
import struct
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from twoclocks.schedule import HEAD, MODEL, Answer, Schedule, make_answer, make_end, make_event, make_tail

DEFAULT_TOKENS = 128
MAX_REQUEST_BYTES = 16 * 1024 * 1024
LOOK_NS = 1_000_000  # while behind, how long only to send before looking for new requests
SO_TIMESTAMPNS = 35  # asm-generic/socket.h
PR_SET_TIMERSLACK = 29  # linux/prctl.h
_TIMESPEC = struct.Struct("@ll")
_CONTROL_BYTES = socket.CMSG_SPACE(_TIMESPEC.size)


@dataclass(slots=True, eq=False)
class Stream:
    """One answer on its way, and afterwards its log. Times in ns of time.monotonic_ns()."""

    connection: "Connection"
    request_id: str
    arrived_ns: int  # the request's last byte
    tokens: int
    answer: Answer
    tail: bytes
    end: bytes
    due_ns: "array.array[int]"  # array.array cannot be subscripted before Python 3.12
    send: Callable[[bytes], int]
    before_ns: "array.array[int]" = field(default_factory=lambda: array.array("q"))
    after_ns: "array.array[int]" = field(default_factory=lambda: array.array("q"))
    role_ns: int = 0  # when a role chunk of its own was sent; 0: there was none
    cut_ns: int = 0  # when the client was seen to have gone before the end; 0: it stayed
    index: int = 0  # of the write that is due next
    rest: bytes = b""  # of a write that the socket took only in part


class Connection:
    """A client's connection: bytes that have come and are no whole request yet."""

    __slots__ = ("received", "sock", "stream", "wants_write")

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.received = b""
        self.stream: Stream | None = None
        self.wants_write = False


class BadRequest(Exception):
    """What this small server does not understand; becomes an answer with status 400."""


class ScheduleServer:
    """The event loop: one process, one thread, epoll and a heap of what is due next."""

    def __init__(
        self,
        schedule: Schedule,
        *,
        host: str = "127.0.0.1",
        port: int = 0,
        metrics: bytes = b"",
        slots: int | None = None,
    ) -> None:
        self.schedule = schedule
        self.free_slots = slots  # None: no limit
        self.waiting: collections.deque[Stream] = collections.deque()
        self.metrics = metrics
        self.epoll = select.epoll()  # made first: its small number is what select.select can take
        self.listener = socket.create_server((host, port), backlog=4096)
        self.listener.setblocking(False)
        self.epoll.register(self.listener, select.EPOLLIN)
        self.url = f"http://{host}:{self.listener.getsockname()[1]}"
        self.connections: dict[int, Connection] = {}
        self.heap: list[tuple[int, int, Stream]] = []
        self.streams: list[Stream] = []
        self.finished_tokens = 0
        self.running = True
        self.stop_fds: set[int] = set()
        self.began_ns, self.began_cpu_s = time.monotonic_ns(), time.process_time()

    def stop_when_readable(self, fd: int) -> None:
        """End when this file descriptor, such as a pipe from the parent, ends or can be read."""
        self.epoll.register(fd, select.EPOLLIN)
        self.stop_fds.add(fd)

    def run(self) -> None:
        """Serve until `running` is False."""
        while self.running:
            self._send_due()
            self._wait()
            for fd, events in self.epoll.poll(0):
                if fd == self.listener.fileno():
                    self._accept()
                elif fd in self.stop_fds:
                    self.running = False
                elif fd in self.connections:
                    self._serve(self.connections[fd], events)

    def _wait(self) -> None:
        """Until something can be read or the next write is due; select's clock is finer than epoll's milliseconds."""
        wait_s = (self.heap[0][0] - time.monotonic_ns()) / 1e9 if self.heap else 1.0
        if wait_s > 0:
            select.select([self.epoll], [], [], min(wait_s, 1.0))

    def _send_due(self) -> None:
        """The hot path: a few microseconds a write beside the system call."""
        heap, clock, replace, flat = self.heap, time.monotonic_ns, heapq.heapreplace, not self.schedule.tpot_ms
        now = clock()
        until = now + LOOK_NS
        while heap and heap[0][0] <= now < until:
            _, number, stream = heap[0]
            index = stream.index
            data = stream.rest or stream.tail.join(stream.answer.writes[index])
            is_last = index + 1 == len(stream.due_ns)
            if is_last and not stream.rest:
                data += stream.end
            before = clock()
            try:
                sent = stream.send(data)
            except BlockingIOError:
                sent = 0
            except OSError:
                heapq.heappop(heap)
                self._close(stream.connection)
                now = clock()
                continue
            now = clock()
            if not stream.rest:
                stream.before_ns.append(before)
            if sent < len(data):
                stream.rest = data[sent:]
                heapq.heappop(heap)
                self._await_room(stream.connection)
                continue
            stream.rest = b""
            stream.after_ns.append(now)
            stream.index = index + 1
            if is_last:
                heapq.heappop(heap)
                self._finish(stream)
            else:
                replace(heap, (now if flat else stream.due_ns[index + 1], number, stream))

    def _await_room(self, connection: Connection) -> None:
        connection.wants_write = True
        self.epoll.modify(connection.sock, select.EPOLLIN | select.EPOLLOUT)

    def _accept(self) -> None:
        with contextlib.suppress(BlockingIOError):
            while True:
                sock, _ = self.listener.accept()
                sock.setblocking(False)
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                with contextlib.suppress(OSError):  # without kernel stamps a request arrives when it is read
                    sock.setsockopt(socket.SOL_SOCKET, SO_TIMESTAMPNS, 1)
                self.connections[sock.fileno()] = Connection(sock)
                self.epoll.register(sock, select.EPOLLIN)

    def _serve(self, connection: Connection, events: int) -> None:
        if events & select.EPOLLOUT and connection.wants_write:
            connection.wants_write = False
            self.epoll.modify(connection.sock, select.EPOLLIN)
            if connection.stream is not None:
                self._push(connection.stream, time.monotonic_ns())
        if events & ~select.EPOLLOUT:
            self._read(connection)

    def _read(self, connection: Connection) -> None:
        try:
            data, arrived_ns = _receive(connection.sock)
        except BlockingIOError:
            return
        except OSError:
            data, arrived_ns = b"", 0
        if not data or len(connection.received) + len(data) > MAX_REQUEST_BYTES:
            self._close(connection)
            return
        connection.received += data
        if connection.stream is None:
            self._next_request(connection, arrived_ns)

    def _next_request(self, connection: Connection, arrived_ns: int) -> None:
        """Answer the request that has come, if it is whole."""
        try:
            request = _take_request(connection)
            if request is None:
                return
            path, headers, body = request
            if path in ("POST /v1/chat/completions", "POST /v1/completions"):
                api = "chat" if path.startswith("POST /v1/chat") else "completions"
                self._start(connection, headers.get("x-request-id", ""), body, api, arrived_ns)
            elif path == "GET /v1/models":
                self._answer(connection, 200, json.dumps({"object": "list", "data": [{"id": MODEL}]}).encode())
            elif path == "GET /metrics":
                self._answer(connection, 200, self.metrics or self._counters(), "text/plain; version=0.0.4")
            else:
                self._answer(connection, 404, b'{"error":{"message":"no such path"}}')
        except (BadRequest, ValueError) as error:
            self._answer(connection, 400, json.dumps({"error": {"message": str(error)}}).encode(), close=True)

    def _start(self, connection: Connection, request_id: str, body: bytes, api: str, arrived_ns: int) -> None:
        asked = json.loads(body)
        if not isinstance(asked, dict) or not asked.get("stream"):
            raise BadRequest("only requests with stream: true are answered")
        tokens = asked.get("max_completion_tokens") or asked.get("max_tokens") or DEFAULT_TOKENS
        if not isinstance(tokens, int) or tokens < 1:
            raise BadRequest("max_tokens: expected a whole number above 0")
        options = asked.get("stream_options") or {}
        running = bool(options.get("continuous_usage_stats"))
        prompt_tokens = len(body) // 4  # a stated guess: there is no tokenizer here
        stream = Stream(
            connection=connection,
            request_id=request_id,
            arrived_ns=arrived_ns,
            tokens=tokens,
            answer=make_answer(api, tokens, running, self.schedule),
            tail=make_tail(running, prompt_tokens),
            end=make_end(bool(options.get("include_usage")), tokens, prompt_tokens),
            due_ns=array.array("q", self.schedule.due_ns(tokens, len(self.streams))),
            send=connection.sock.send,
        )
        connection.stream = stream
        self.streams.append(stream)
        if self.schedule.role == "at-once":
            role = HEAD + make_event(api, b'"role":"assistant","content":""', b"null", running, 0) + stream.tail
            with contextlib.suppress(OSError):  # a client that has gone is noticed at the next write
                connection.sock.send(role)
            stream.role_ns = time.monotonic_ns()
        if self.free_slots == 0:
            self.waiting.append(stream)
        else:
            self._begin(stream, arrived_ns)

    def _begin(self, stream: Stream, at_ns: int) -> None:
        """The schedule of a stream starts, in a slot of its own."""
        if self.free_slots is not None:
            self.free_slots -= 1
        stream.due_ns = array.array("q", [at_ns + due for due in stream.due_ns])
        self._push(stream, stream.due_ns[0])

    def _leave(self, stream: Stream, at_ns: int) -> None:
        """A stream gives its slot, or its place among those who wait for one."""
        if stream in self.waiting:
            self.waiting.remove(stream)
        elif self.free_slots is not None:
            self.free_slots += 1
            if self.waiting:
                following = self.waiting.popleft()
                self._begin(following, max(at_ns, following.arrived_ns))

    def _push(self, stream: Stream, due_ns: int) -> None:
        heapq.heappush(self.heap, (due_ns, id(stream), stream))

    def _finish(self, stream: Stream) -> None:
        connection = stream.connection
        connection.stream = None
        self.finished_tokens += stream.tokens
        # a slot is free from when its last token was due, so that being late does not add up to a smaller capacity
        self._leave(stream, stream.due_ns[-1] if self.schedule.tpot_ms else time.monotonic_ns())
        if connection.received:  # the next request came while this one was answered
            self._next_request(connection, time.monotonic_ns())

    def _close(self, connection: Connection) -> None:
        if self.connections.pop(connection.sock.fileno(), None) is None:
            return
        self.epoll.unregister(connection.sock)
        connection.sock.close()  # its stream leaves the heap when its next write fails
        if connection.stream is not None:
            connection.stream.cut_ns = time.monotonic_ns()
            self._leave(connection.stream, connection.stream.cut_ns)

    def _answer(
        self, connection: Connection, status: int, body: bytes, kind: str = "application/json", *, close: bool = False
    ) -> None:
        head = f"HTTP/1.1 {status} {'OK' if status == 200 else 'Error'}\r\ncontent-type: {kind}\r\n"
        head += f"content-length: {len(body)}\r\n" + ("connection: close\r\n" if close else "") + "\r\n"
        try:
            # a page of metrics is larger than a fresh socket may take at once; loopback takes it in microseconds
            connection.sock.setblocking(True)
            connection.sock.settimeout(1.0)
            connection.sock.sendall(head.encode() + body)
            connection.sock.setblocking(False)
        except OSError:
            close = True
        if close:
            self._close(connection)

    def _counters(self) -> bytes:
        """A few of vLLM's series, so that what reads them has something to read."""
        running = sum(1 for connection in self.connections.values() if connection.stream is not None)
        waiting = len(self.waiting)
        lines = [
            "# TYPE vllm:num_requests_running gauge",
            f"vllm:num_requests_running {running - waiting}",
            "# TYPE vllm:num_requests_waiting gauge",
            f"vllm:num_requests_waiting {waiting}",
            "# TYPE vllm:generation_tokens_total counter",
            f"vllm:generation_tokens_total {self.finished_tokens}",
        ]
        return ("\n".join(lines) + "\n").encode()

    def close(self) -> None:
        """Close all sockets."""
        for connection in list(self.connections.values()):
            self._close(connection)
        self.listener.close()
        self.epoll.close()

    def write_log(self, path: Path) -> None:
        """All writes of token events as one .npz; its arrays are described at `truth.SentLog`."""
        import numpy as np

        def joined(name: str) -> Any:
            arrays = [np.frombuffer(getattr(stream, name), dtype=np.int64)[: len(stream.after_ns)] for stream in kept]
            return np.concatenate(arrays) if arrays else np.empty(0, np.int64)

        kept = self.streams
        counts = [np.array(stream.answer.counts[: len(stream.after_ns)], dtype=np.int32) for stream in kept]
        meta = {
            "schedule": asdict(self.schedule),
            "cpu_s": time.process_time() - self.began_cpu_s,
            "elapsed_s": (time.monotonic_ns() - self.began_ns) / 1e9,
        }
        new = path.with_name(path.name + ".new")
        with new.open("wb") as file:
            np.savez(
                file,
                meta=np.array(json.dumps(meta)),
                request_id=np.array([stream.request_id for stream in kept], dtype=np.str_),
                arrived_ns=np.array([stream.arrived_ns for stream in kept], dtype=np.int64),
                role_ns=np.array([stream.role_ns for stream in kept], dtype=np.int64),
                cut_ns=np.array([stream.cut_ns for stream in kept], dtype=np.int64),
                tokens=np.array([stream.tokens for stream in kept], dtype=np.int64),
                writes=np.array([len(stream.after_ns) for stream in kept], dtype=np.int64),
                events=np.concatenate(counts) if counts else np.empty(0, np.int32),
                due_ns=joined("due_ns"),
                before_ns=joined("before_ns"),
                after_ns=joined("after_ns"),
            )
        new.replace(path)


def _receive(sock: socket.socket) -> tuple[bytes, int]:
    """(bytes, when the last of them reached the kernel). Only the stamp's age enters, never its wall clock."""
    data, control, _, _ = sock.recvmsg(256 * 1024, _CONTROL_BYTES)
    now = time.monotonic_ns()
    for level, kind, value in control:
        if level == socket.SOL_SOCKET and kind == SO_TIMESTAMPNS:
            seconds, nanoseconds = _TIMESPEC.unpack_from(value)
            age = time.time_ns() - (seconds * 10**9 + nanoseconds)
            return data, now - age if 0 <= age < 10**10 else now
    return data, now


def _take_request(connection: Connection) -> tuple[str, dict[str, str], bytes] | None:
    """Take the first request off: ("METHOD /path", headers by lower-case name, body); None while it is not whole."""
    head, found, after = connection.received.partition(b"\r\n\r\n")
    if not found:
        return None
    first, *lines = head.decode("latin-1").split("\r\n")
    headers = {name.strip().lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    if "transfer-encoding" in headers:
        raise BadRequest("a request needs a content-length here")
    length = int(headers.get("content-length") or 0)
    if not 0 <= length <= MAX_REQUEST_BYTES:
        raise BadRequest("content-length: out of range")
    if len(after) < length:
        return None
    connection.received = after[length:]
    method, _, target = first.partition(" ")
    return f"{method} {target.partition(' ')[0].partition('?')[0]}", headers, after[:length]


def main(arguments: Sequence[str] | None = None) -> None:
    """Serve until SIGTERM, SIGINT or, with --until-eof, the end of standard input; then write the log."""
    options = _parser().parse_args(arguments)
    if not hasattr(select, "epoll"):
        sys.exit("schedule_server: needs Linux (epoll, kernel time stamps)")
    if options.core is not None:
        os.sched_setaffinity(0, {options.core})
    with contextlib.suppress(OSError, AttributeError):  # by default the kernel may wake a sleeper 50 us late
        ctypes.CDLL(None).prctl(PR_SET_TIMERSLACK, 1000, 0, 0, 0)
    schedule = Schedule(
        ttft_ms=options.ttft_ms,
        tpot_ms=0.0 if options.flat_out else options.tpot_ms,
        chunk_tokens=options.chunk_tokens,
        write_chunks=options.write_chunks,
        role=options.role,
        jitter_ms=options.jitter_ms,
        seed=options.seed,
    )
    metrics = options.metrics.read_bytes() if options.metrics else b""
    try:
        server = ScheduleServer(schedule, host=options.host, port=options.port, metrics=metrics, slots=options.slots)
    except (OSError, OverflowError) as error:
        sys.exit(f"schedule_server: {options.host}:{options.port} cannot be listened at ({error}); give another --port")
    stop = _stopper(server)
    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)
    if options.until_eof:
        server.stop_when_readable(sys.stdin.fileno())
    sys.stdout.write(json.dumps({"url": server.url, "pid": os.getpid()}) + "\n")
    sys.stdout.flush()
    gc.disable()  # nothing here makes cycles, and a collection in mid-run would be a stall
    server.run()
    if options.log:
        server.write_log(options.log)
    server.close()


def _stopper(server: ScheduleServer) -> Callable[[int, object], None]:
    def stop(_signal: int, _frame: object) -> None:
        server.running = False

    return stop


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m twoclocks.schedule_server",
        description="An OpenAI-compatible server that sends tokens at known times and logs when it really did.",
        epilog="Example: python -m twoclocks.schedule_server --port 8009 --ttft-ms 100 --tpot-ms 20 --log sent.npz",
    )
    default = Schedule()
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=0, help="0, the default: a free one; it is printed as JSON")
    parser.add_argument("--ttft-ms", type=float, default=default.ttft_ms, help="request to first token (%(default)g)")
    parser.add_argument("--tpot-ms", type=float, default=default.tpot_ms, help="time a token (%(default)g)")
    parser.add_argument("--flat-out", action="store_true", help="after the first token as fast as the sockets take it")
    parser.add_argument("--chunk-tokens", type=_count, default=1, help="tokens in one event (%(default)d)")
    parser.add_argument("--write-chunks", type=_count, default=1, help="events in one write (%(default)d)")
    parser.add_argument("--slots", type=_count, help="at most so many streams at a time; others wait (no limit)")
    parser.add_argument("--role", choices=["with-first", "at-once", "none"], default=default.role)
    parser.add_argument("--jitter-ms", type=float, default=0.0, help="each write up to so much earlier or later")
    parser.add_argument("--seed", type=int, default=default.seed, help="of the jitter")
    parser.add_argument("--metrics", type=Path, help="a page to serve as /metrics, as it stands")
    parser.add_argument("--core", type=int, help="pin to this CPU")
    parser.add_argument("--log", type=Path, help="where to write what was sent when, at the end (.npz)")
    parser.add_argument("--until-eof", action="store_true", help="end when standard input ends (the parent is gone)")
    return parser


def _count(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError("expected a whole number above 0")
    return value


if __name__ == "__main__":
    main()
