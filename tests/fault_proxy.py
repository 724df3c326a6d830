"""A proxy between the tester and a server that does to each request what a test says: nothing, or one of FAULTS.

It counts by itself: `dealt` tells what was done to which request, and how many events of its answer were passed on, so
that a test can hold the run's records against something that the tester did not count.
"""

import socket
import ssl
import struct
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from urllib.parse import urlsplit

from fake_server import END, HEAD, chunked, response

BEGUN = 4  # events that are passed on before a fault in mid-stream: a role and three tokens
BUSY = b'{"error": {"message": "busy"}}'
PAGE = b"<!doctype html><title>502</title><h1>Bad \x1b[31mGateway</h1>"
LOST = "lost"  # the connection, whatever the tester has still to say


@dataclass
class Dealt:
    """What became of one request here."""

    fault: str
    events: int = 0  # whole events of the server's answer that were passed on
    upstream: bool = False  # did the server see it?


class FaultProxy:
    """Answers GETs with the server's own answers; `deal(number)` names the fault of the POST of that number."""

    def __init__(self, upstream: str, deal: Callable[[int], str], tls: ssl.SSLContext | None = None) -> None:
        parts = urlsplit(upstream)
        self.upstream = (parts.hostname, parts.port)
        self.deal, self.tls = deal, tls
        self.keeps_alive = True  # else each answer is the last of its connection
        self.dealt: dict[str, Dealt] = {}  # request id -> what was done
        self.twice: list[str] = []  # ids that came again
        self.handshakes_failed = 0
        self.over = threading.Event()
        self.lock = threading.Lock()
        self.threads: list[threading.Thread] = []
        self.port = 0
        self.listen()

    @property
    def url(self) -> str:
        return f"{'https' if self.tls else 'http'}://localhost:{self.port}"

    def listen(self) -> None:
        """Take connections, at the same port as before."""
        self.listener = socket.create_server(("127.0.0.1", self.port))
        self.port = self.listener.getsockname()[1]
        self._start(self._accept, self.listener)

    def refuse(self) -> None:
        """From now on nobody listens."""
        self.listener.shutdown(socket.SHUT_RDWR)
        self.listener.close()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.over.set()
        if self.listener.fileno() >= 0:
            self.refuse()
        for thread in self.threads:
            thread.join(10)
            assert not thread.is_alive()

    def of(self, fault: str) -> dict[str, Dealt]:
        """The requests that this fault was dealt to, by their ids."""
        return {request_id: dealt for request_id, dealt in self.dealt.items() if dealt.fault == fault}

    def _start(self, task: Callable, *arguments) -> None:
        thread = threading.Thread(target=task, args=arguments)
        self.threads.append(thread)
        thread.start()

    def _accept(self, listener: socket.socket) -> None:
        while not self.over.is_set():
            try:
                client, _ = listener.accept()
            except OSError:
                return
            self._start(self._serve, client)

    def _serve(self, client: socket.socket) -> None:
        client.settimeout(0.1)
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if self.tls is not None:
            try:
                client.settimeout(10)
                client = self.tls.wrap_socket(client, server_side=True)
                client.settimeout(0.1)
            except OSError:
                self.handshakes_failed += 1
                client.close()
                return
        with client:
            while (request := self._request(client)) is not None:
                if self._answer(client, *request) == LOST:
                    return

    def _request(self, client: socket.socket) -> tuple[bytes, str | None] | None:
        """(the whole request, its id if it is a POST); None: the tester has gone."""
        data = b""
        while b"\r\n\r\n" not in data:
            piece = self._recv(client)
            if not piece:
                return None
            data += piece
        head = data.partition(b"\r\n\r\n")[0]
        headers = dict(line.lower().split(b": ", 1) for line in head.split(b"\r\n")[1:])
        size = len(head) + 4 + int(headers.get(b"content-length", 0))
        while len(data) < size:
            piece = self._recv(client)
            if not piece:
                return None
            data += piece
        return data, headers[b"x-request-id"].decode() if data.startswith(b"POST") else None

    def _recv(self, sock: socket.socket) -> bytes:
        """Some bytes; none: the other side has gone, or the test is over."""
        while not self.over.is_set():
            try:
                return sock.recv(65536)
            except TimeoutError:
                continue
            except OSError:
                return b""
        return b""

    def _answer(self, client: socket.socket, request: bytes, request_id: str | None) -> str | None:
        if request_id is None:
            return self.pass_on(client, request, Dealt(""))
        with self.lock:
            dealt = Dealt(self.deal(len(self.dealt)))
            self.twice += [request_id] if request_id in self.dealt else []
            self.dealt[request_id] = dealt
        return FAULTS[dealt.fault](self, client, request, dealt)

    def pass_on(self, client: socket.socket, request: bytes, dealt: Dealt, events: int | None = None) -> str | None:
        """Send the request to the server and its answer back, or so many events of it."""
        try:
            with socket.create_connection(self.upstream, 10) as server:
                server.settimeout(0.1)
                server.sendall(request)
                dealt.upstream = True
                for piece in self._pieces(server):
                    if dealt.events == events:
                        return None
                    if piece.startswith(b"HTTP/") and not self.keeps_alive:
                        piece = piece.replace(b"\r\n", b"\r\nconnection: close\r\n", 1)
                    if not self.send(client, piece):
                        return LOST
                    dealt.events += b"data: {" in piece
        except ConnectionError:
            return LOST
        return None if self.keeps_alive else LOST

    def _pieces(self, server: socket.socket) -> Iterator[bytes]:
        """The head of the server's answer, then each of its chunks. Raises ConnectionError where it ends too early."""
        data = b""

        def until(size: int) -> bytes:
            nonlocal data
            while len(data) < size:
                piece = self._recv(server)
                if not piece:
                    raise ConnectionError
                data += piece
            piece, data = data[:size], data[size:]
            return piece

        def line(end: bytes) -> bytes:
            nonlocal data
            while end not in data:
                piece = self._recv(server)
                if not piece:
                    raise ConnectionError
                data += piece
            return until(data.index(end) + len(end))

        head = line(b"\r\n\r\n")
        yield head
        length = [field.split(b":")[1] for field in head.lower().split(b"\r\n") if field.startswith(b"content-length")]
        if length:
            yield until(int(length[0]))
            return
        while True:
            size = line(b"\r\n")
            yield size + until(int(size, 16) + 2)
            if int(size, 16) == 0:
                return

    def send(self, client: socket.socket, *pieces: bytes) -> bool:
        """Whether the tester took them."""
        try:
            client.settimeout(10)
            for piece in pieces:
                client.sendall(piece)
            client.settimeout(0.1)
        except OSError:
            return False
        return True

    def begin(self, client: socket.socket, request: bytes, dealt: Dealt) -> None:
        """The beginning of the server's own answer: BEGUN events."""
        self.pass_on(client, request, dealt, BEGUN)

    def hold(self, client: socket.socket) -> str:
        """Say nothing until the tester has gone."""
        self._recv(client)
        return LOST


def reset(client: socket.socket) -> str:
    """The connection ends with a TCP reset."""
    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    return LOST


def passes(proxy: FaultProxy, client: socket.socket, request: bytes, dealt: Dealt) -> str | None:
    return proxy.pass_on(client, request, dealt)


def resets_before_headers(proxy: FaultProxy, client: socket.socket, request: bytes, dealt: Dealt) -> str:
    return reset(client)


def closes_before_headers(proxy: FaultProxy, client: socket.socket, request: bytes, dealt: Dealt) -> str:
    return LOST


def resets_in_mid_stream(proxy: FaultProxy, client: socket.socket, request: bytes, dealt: Dealt) -> str:
    proxy.begin(client, request, dealt)
    return reset(client)


def closes_in_mid_chunk(proxy: FaultProxy, client: socket.socket, request: bytes, dealt: Dealt) -> str:
    proxy.begin(client, request, dealt)
    proxy.send(client, b'80\r\ndata: {"id":"x","choi')
    return LOST


def stalls_before_the_first_byte(proxy: FaultProxy, client: socket.socket, request: bytes, dealt: Dealt) -> str:
    return proxy.hold(client)


def stalls_in_mid_stream(proxy: FaultProxy, client: socket.socket, request: bytes, dealt: Dealt) -> str:
    proxy.begin(client, request, dealt)
    return proxy.hold(client)


def slows_to_a_byte_a_second(proxy: FaultProxy, client: socket.socket, request: bytes, dealt: Dealt) -> str:
    proxy.begin(client, request, dealt)
    for byte in chunked(b'data: {"id":"x","choices":[]}\n\n'):
        if not proxy.send(client, bytes([byte])) or proxy.over.wait(1):
            break
    return LOST


def answers(*steps: bytes, then: str | None = None) -> Callable[..., str | None]:
    """Always the same, in place of the server."""

    def answer(proxy: FaultProxy, client: socket.socket, request: bytes, dealt: Dealt) -> str | None:
        return then if proxy.send(client, *steps) else LOST

    return answer


def sends_half_an_event(proxy: FaultProxy, client: socket.socket, request: bytes, dealt: Dealt) -> None:
    """The rest of the answer is in order: a buffer on the way has cut one line."""
    proxy.begin(client, request, dealt)
    proxy.send(client, chunked(b'data: {"id":"x","choices":[{"index":0,"del\n\n'), chunked(b"data: [DONE]\n\n"), END)


PASSES = "none"
FAULTS: dict[str, Callable[[FaultProxy, socket.socket, bytes, Dealt], str | None]] = {
    PASSES: passes,
    "resets before the headers": resets_before_headers,
    "closes before the headers": closes_before_headers,
    "resets in mid-stream": resets_in_mid_stream,
    "truncated chunked encoding": closes_in_mid_chunk,
    "stalls before the first byte": stalls_before_the_first_byte,
    "stalls in mid-stream": stalls_in_mid_stream,
    "a byte a second": slows_to_a_byte_a_second,
    "429 with Retry-After": answers(*response(429, BUSY, headers="retry-after: 1\r\n")),
    "500": answers(*response(500, b'{"error": {"message": "no memory"}}')),
    "503": answers(*response(503, BUSY)),
    "HTML under 502": answers(*response(502, PAGE, "text/html")),
    "HTML under 200": answers(*response(200, PAGE, "text/html")),
    "truncated JSON": answers(*response(200, b'{"id":"x","choices":[{"index":0,"mess')),
    "truncated JSON in an event": sends_half_an_event,
    "an empty stream": answers(HEAD, END),
}
"""What can be done to a request. Each returns LOST where the connection ends with it."""
