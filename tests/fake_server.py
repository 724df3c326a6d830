"""A scriptable server on a loopback port: each answer is a list of steps, so that a test says what is sent when.

Steps: bytes are sent in one write; a number is a pause in seconds; CLOSE ends the connection, RESET ends it with a TCP
reset, HANG keeps it open and silent until the test is over.
"""

import json
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterable

CLOSE, RESET, HANG = "close", "reset", "hang"
HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
END = b"0\r\n\r\n"


def chunked(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


def event(payload) -> bytes:
    return b"data: %b\n\n" % json.dumps(payload, ensure_ascii=False).encode()


def delta(finish_reason=None, index=0, usage=None, **fields) -> bytes:
    payload = {"id": "x", "choices": [{"index": index, "delta": fields, "finish_reason": finish_reason}]}
    return event(payload | ({"usage": usage} if usage else {}))


def usage(completion_tokens: int, prompt_tokens: int = 5, **fields) -> bytes:
    counts = {"prompt_tokens": prompt_tokens, "completion_tokens": completion_tokens}
    return event({"id": "x", "choices": [], "usage": counts, **fields})


DONE = b"data: [DONE]\n\n"


def answer(*events: bytes, gap_s: float = 0.0) -> list:
    """A complete chunked answer: each event in a write of its own, with a pause before each."""
    steps: list = [HEAD]
    for one in events:
        steps += [gap_s, chunked(one)] if gap_s else [chunked(one)]
    return [*steps, END]


def words(count: int) -> list[bytes]:
    return [delta(content=f"w{index} ") for index in range(count)]


def plain_answer(count: int = 4, gap_s: float = 0.0) -> list:
    """What vLLM sends: role, tokens with the finish reason on the last, usage, [DONE]."""
    *first, _ = words(count)
    last = delta(content="end", finish_reason="length")
    return answer(delta(role="assistant", content=""), *first, last, usage(count), DONE, gap_s=gap_s)


def response(status: int, body: bytes, content_type: str = "application/json", headers: str = "") -> list:
    head = f"HTTP/1.1 {status} X\r\ncontent-type: {content_type}\r\ncontent-length: {len(body)}\r\n{headers}\r\n"
    return [head.encode() + body]


class FakeServer:
    """Answers /v1/models and /metrics by itself, and every POST with what `script` returns for its parsed body."""

    def __init__(self, script: Callable[[dict], Iterable] | None = None, port: int = 0) -> None:
        self.script = script or (lambda body: plain_answer())
        self.metrics: Callable[[], list] = lambda: response(200, b"", "text/plain")
        self.pages: dict[str, list] = {}  # "GET /path" -> its answer, where it is another than usual
        self.on_get: Callable[[dict[str, str]], object] = lambda headers: None
        self.requests: list[tuple[dict[str, str], dict]] = []
        self.sent_ns: list[list[int]] = []
        self.connections = 0
        self.over = threading.Event()
        self.listener = socket.create_server(("127.0.0.1", port))
        self.url = f"http://127.0.0.1:{self.listener.getsockname()[1]}"
        self.threads = [threading.Thread(target=self._accept)]
        self.threads[0].start()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.over.set()
        self.listener.shutdown(socket.SHUT_RDWR)
        self.listener.close()
        for thread in self.threads:
            thread.join(5)
            assert not thread.is_alive()

    def answer(self, headers: dict[str, str], body: dict) -> Iterable:
        """The steps of one answer."""
        return self.script(body)

    def _accept(self) -> None:
        while not self.over.is_set():
            try:
                connection, _ = self.listener.accept()
            except OSError:
                return
            self.connections += 1
            self.threads.append(threading.Thread(target=self._serve, args=(connection,)))
            self.threads[-1].start()

    def _serve(self, connection: socket.socket) -> None:
        connection.settimeout(0.05)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        with connection:
            while (request := self._request(connection)) is not None:
                method_path, headers, body = request
                if method_path.startswith("GET"):
                    self.on_get(headers)
                if method_path in self.pages:
                    steps = self.pages[method_path]
                elif method_path == "GET /v1/models":
                    steps = response(200, json.dumps({"data": [{"id": "fake-model"}]}).encode())
                elif method_path == "GET /metrics":
                    steps = self.metrics()
                elif method_path.startswith("GET"):
                    steps = response(404, b"{}")
                else:
                    self.requests.append((headers, body))
                    steps = self.answer(headers, body)
                if not self._play(connection, steps):
                    return

    def _request(self, connection: socket.socket):
        data = b""
        while b"\r\n\r\n" not in data:
            piece = self._recv(connection)
            if not piece:
                return None
            data += piece
        head, _, body = data.partition(b"\r\n\r\n")
        first, *lines = head.decode("latin-1").split("\r\n")
        headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines)}
        while len(body) < int(headers.get("content-length", 0)):
            body += self._recv(connection)
        method, path, _ = first.split(" ")
        return f"{method} {path}", headers, json.loads(body) if body else {}

    def _recv(self, connection: socket.socket) -> bytes:
        while not self.over.is_set():
            try:
                return connection.recv(65536)
            except TimeoutError:
                continue
            except OSError:
                return b""
        return b""

    def _play(self, connection: socket.socket, steps: Iterable) -> bool:
        sent: list[int] = []
        self.sent_ns.append(sent)
        for step in steps:
            if step == CLOSE:
                return False
            if step == RESET:
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                return False
            if step == HANG:
                self.over.wait()
                return False
            if isinstance(step, bytes):
                try:
                    connection.settimeout(5)
                    connection.sendall(step)
                    connection.settimeout(0.05)
                except OSError:
                    return False
                sent.append(time.monotonic_ns())
            elif self.over.wait(step):
                return False
        return True
