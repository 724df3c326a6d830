"""The OTLP receiver: listens for the spans of servers while a run goes on, and writes what they tell of its requests.

HTTP (protobuf or JSON) and gRPC, each on a port of its own, inside the collecting process. Whatever comes is bounded:
size of a message, spans a second, spans in all, connections. What is left out is counted, told to the exporter as a
partial success, and told to the user at the end.

server_requests.jsonl holds requests of this run only. Where a span cannot say itself whether it is of such a request
(otlp.SpanTold.ours), it is held back until the run's end, when requests.jsonl lists all that were sent; if the run is
killed, such spans are lost. A span that proves itself may still be of another run on the same server; the join leaves
those unmatched. What an exporter saved up before this run began is told apart from what others sent during it.
"""

import contextlib
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import BufferedReader, FileIO
from pathlib import Path
from typing import Any

import grpc  # type: ignore[import-untyped]
import msgspec
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTracePartialSuccess,
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)

from twoclocks.bounded_input import BoundedInput
from twoclocks.masks import redact
from twoclocks.otlp import SpanTold, attributes_of, decode, read_span, service_name, unzip
from twoclocks.server_requests import ServerRequest, encode_server_request

MAX_BODY = 4 * 1024 * 1024  # also gRPC's own limit, for which exporters cut their batches
REQUEST_S = 10.0
IDLE_S = 60.0  # an exporter sends a batch every 5 s
MAX_CONNECTIONS = 64
SPANS_PER_S = 10_000
BURST_S = 5.0  # exporters save up their spans for as long
MAX_ROWS = 2_000_000
MAX_HELD = 200_000
EXPORT = "/opentelemetry.proto.collector.trace.v1.TraceService/Export"


class _Sent(msgspec.Struct):
    """Of a line of requests.jsonl, all that matters here."""

    request_id: str


class SpanStore:
    """Takes what exporters send, keeps what concerns this run, counts the rest. Safe to be called by many threads."""

    def __init__(
        self, folder: Path, stages: Mapping[str, str], now: Callable[[], float], secrets: Sequence[str] = ()
    ) -> None:
        self.folder, self.stages, self.now = folder, stages, now  # stages: service.name -> name of the stage
        self.secrets = secrets  # what the file may not show, though a server may say it
        self.lock = threading.RLock()
        self.out: FileIO | None = None  # opened for the first row, so that a run without spans has no such file
        self.held: list[SpanTold] = []
        self.told_of: dict[str, set[str]] = {}  # server -> trace ids of requests that prove themselves
        self.sent_ids: set[str | None] | None = None
        self.rows = 0
        self.last_at: float | None = None  # when the last span came that is or may be of this run
        self.foreign = self.earlier = self.dropped = self.refused = self.unusable = 0
        self.began = time.time() - now()  # of the run, as the wall clock here has it
        self.closed = False
        self.why_refused = self.why_unwritten = ""
        self.budget, self.filled_at = SPANS_PER_S * BURST_S, now()

    def take(self, body: bytes, *, as_json: bool = False) -> ExportTraceServiceResponse:
        """Read one message. Raises ValueError if it is none."""
        with self.lock:  # one message at a time also bounds the memory that decoding takes
            if self.closed:
                raise ValueError("the run has ended")
            try:
                message = decode(body, as_json=as_json)
            except ValueError as error:
                self.refuse(str(error))
                raise
            dropped = self._take(message)
            self.dropped += dropped
        if not dropped:
            return ExportTraceServiceResponse()
        why = f"no more than {SPANS_PER_S} spans a second and {MAX_ROWS} in all are kept"
        return ExportTraceServiceResponse(
            partial_success=ExportTracePartialSuccess(rejected_spans=dropped, error_message=why)
        )

    def refuse(self, why: str) -> None:
        """Count a message that was not read."""
        with self.lock:
            self.refused += 1
        self.why_refused = self.why_refused or why

    def has_all(self, sent: int) -> bool:
        """Whether each server that told of any request has told of as many as were sent. Asked when all have ended."""
        with self.lock:
            told_of = list(self.told_of.values())
            if not told_of or any(len(requests) < sent for requests in told_of):
                return False
            return all(len(requests & self._sent_ids()) >= sent for requests in told_of)

    def close(self) -> list[str]:
        """Sort out what was held back, close the file; what the user should know."""
        with self.lock:
            for told in self.held:
                if not self._sent_ids().isdisjoint((told.request.request_id, told.request.trace_id)):
                    self.dropped += not self._write(told.request)
                else:
                    self._leave_out(told)
            self.held, self.closed = [], True
            if self.out is not None:
                self.out.close()
        return list(self._notes())

    def _sent_ids(self) -> set[str | None]:
        """The ids of all requests that were sent."""
        if self.sent_ids is None:
            self.sent_ids = set(_requests_in(self.folder / "requests.jsonl"))
        return self.sent_ids

    def _is_earlier(self, told: SpanTold) -> bool:
        """Whether its request had ended before the run began, by the server's own clock."""
        return 0 < told.ended_at < self.began

    def _leave_out(self, told: SpanTold) -> None:
        if self._is_earlier(told):
            self.earlier += 1
        else:
            self.foreign += 1

    def _notes(self) -> Iterator[str]:
        if self.foreign:
            yield f"OTLP: {self.foreign} spans were of requests that this run did not send; they were left out"
        if self.earlier:
            yield f"OTLP: {self.earlier} spans were of requests that had ended before this run; they were left out"
        if self.dropped:
            yield (
                f"OTLP: {self.dropped} spans were dropped: no more than {SPANS_PER_S} a second and {MAX_ROWS} in all "
                "are kept; let the server sample, or export fewer kinds of spans"
            )
        if self.why_unwritten:
            yield f"server_requests.jsonl could not be written ({self.why_unwritten}); spans after that are lost"
        if self.unusable:
            yield f"OTLP: {self.unusable} values of spans were left out: no number, negative, or beyond all reason"
        if self.refused:
            yield f"OTLP: {self.refused} messages could not be read; the first: {self.why_refused}"

    def _take(self, message: ExportTraceServiceRequest) -> int:
        """Keep what concerns the run; how many spans were dropped unread."""
        at = self.now()
        self.budget = min(SPANS_PER_S * BURST_S, self.budget + (at - self.filled_at) * SPANS_PER_S)
        self.filled_at = at
        dropped = 0
        for resource in message.resource_spans:
            stage = self.stages.get(service_name(attributes_of(resource.resource)) or "")
            for scope in resource.scope_spans:
                room = max(0, min(len(scope.spans), int(self.budget)))
                self.budget -= room
                dropped += len(scope.spans) - room
                for span in scope.spans[:room]:
                    told = read_span(span, stage, at)
                    if told is not None:
                        self.unusable += told.unusable
                        dropped += not self._keep(told)
        return dropped

    def _keep(self, told: SpanTold) -> bool:
        """Whether there was room."""
        if told.ours is False:
            self._leave_out(told)
            return True
        request = told.request
        self.last_at = request.at
        # An earlier one is of another run, unless the server's clock is behind ours.
        if told.ours is None or self._is_earlier(told):
            if len(self.held) >= MAX_HELD:
                return False
            self.held.append(told)
            return True
        assert request.trace_id is not None
        self.told_of.setdefault(request.server, set()).add(request.trace_id)
        return self._write(request)

    def _write(self, request: ServerRequest) -> bool:
        """Whether it stands in the file."""
        if self.rows >= MAX_ROWS or self.why_unwritten:
            return False
        try:
            if self.out is None:
                self.out = (self.folder / "server_requests.jsonl").open("ab", buffering=0)
            reason, told = redact(request.finish_reason, self.secrets), redact(request.told, self.secrets)
            line = encode_server_request(msgspec.structs.replace(request, finish_reason=reason, told=told))
            while line:
                line = line[self.out.write(line) :]
        except OSError as error:
            self.why_unwritten = error.strerror or str(error)
            return False
        self.rows += 1
        return True


def _requests_in(path: Path) -> Iterator[str]:
    """The request ids in a requests.jsonl as far as it is written."""
    decoder = msgspec.json.Decoder(_Sent)
    if path.exists():
        with path.open("rb") as file:
            yield from (decoder.decode(line).request_id for line in file if line.endswith(b"\n"))


class Receiver:
    """The open ports of a run, and the store behind them."""

    def __init__(self, store: SpanStore, host: str, http_port: int | None, grpc_port: int | None) -> None:
        self.store = store
        self.notes: list[str] = []
        """Ports that could not be had, and what to do."""
        self.http = self._open(_HttpServer, host, http_port, "collect.otlp_port")
        self.grpc = self._open(_GrpcServer, host, grpc_port, "collect.otlp_grpc_port")

    def _open(self, kind: Any, host: str, port: int | None, key: str) -> Any:
        if port is None:
            return None
        try:
            return kind(self.store, host, port)
        except (OSError, OverflowError, UnicodeError) as error:  # the last two: a port or a name that cannot be
            code = getattr(error, "errno", None) or 0  # a resolver's codes are negative, and no words of the system
            reason = os.strerror(code) if code > 0 else str(error)
            self.notes.append(
                f"OTLP: {host} port {port} cannot be listened on ({reason}), so no spans come in there; take another "
                f"with --set {key}=PORT (and tell the server), or none"
            )
            return None

    def close(self) -> list[str]:
        """Listen no more; what the user should know."""
        for server in (self.http, self.grpc):
            if server is not None:
                server.close()
        return self.store.close()


def _address(host: str, port: int) -> tuple[socket.AddressFamily, tuple[Any, ...]]:
    """Family and address to bind. Raises OSError."""
    family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
    return family, address


class _GrpcServer:
    """TraceService.Export over gRPC."""

    def __init__(self, store: SpanStore, host: str, port: int) -> None:
        """Raises OSError if the port cannot be had."""
        family, address = _address(host, port)
        with socket.create_server(address, family=family) as probe:  # gRPC itself does not say why it cannot bind
            name = f"[{address[0]}]" if family == socket.AF_INET6 else address[0]
            port = probe.getsockname()[1]
        self.store = store
        self.server = grpc.server(
            ThreadPoolExecutor(max_workers=4),
            handlers=[
                grpc.method_handlers_generic_handler(
                    EXPORT.split("/")[1], {"Export": grpc.unary_unary_rpc_method_handler(self._export)}
                )
            ],
            # without the first option two runs would share the port, and each get some of the other's spans
            options=[
                ("grpc.so_reuseport", 0),
                ("grpc.max_receive_message_length", MAX_BODY),
                ("grpc.max_concurrent_streams", MAX_CONNECTIONS),  # of each connection; of all: below
                ("grpc.server_handshake_timeout_ms", round(REQUEST_S * 1e3)),
                ("grpc.max_connection_idle_ms", round(IDLE_S * 1e3)),
            ],
            maximum_concurrent_rpcs=MAX_CONNECTIONS,
        )
        try:
            self.port = self.server.add_insecure_port(f"{name}:{port}")
        except RuntimeError as error:
            raise OSError(str(error)) from None
        self.server.start()

    def _export(self, body: bytes, context: grpc.ServicerContext) -> bytes:
        try:
            answer = self.store.take(body)
        except ValueError as error:
            context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(error))
        return bytes(answer.SerializeToString())

    def close(self) -> None:
        self.server.stop(None)


class _HttpServer(ThreadingHTTPServer):
    """OTLP over HTTP: POST /v1/traces."""

    daemon_threads = True

    def __init__(self, store: SpanStore, host: str, port: int) -> None:
        """Raises OSError if the port cannot be had."""
        family, address = _address(host, port)
        super().__init__(address, _HttpHandler, bind_and_activate=False)
        self.socket.close()
        self.socket = socket.create_server(address, family=family, backlog=MAX_CONNECTIONS)
        self.port = self.socket.getsockname()[1]
        self.store = store
        self.free = threading.BoundedSemaphore(MAX_CONNECTIONS)
        self.connections: set[socket.socket] = set()
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def process_request(self, request: Any, client_address: Any) -> None:
        if self.free.acquire(blocking=False):
            super().process_request(request, client_address)
        else:
            self.shutdown_request(request)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        self.connections.add(request)
        try:
            super().process_request_thread(request, client_address)
        finally:
            self.connections.discard(request)
            self.free.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exception(), OSError):  # that is an exporter which went away
            super().handle_error(request, client_address)

    def close(self) -> None:
        self.shutdown()
        self.server_close()
        for connection in list(
            self.connections
        ):  # an exporter keeps its own, and would go on sending to a closed store
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)


class _HttpHandler(BaseHTTPRequestHandler):
    server: _HttpServer
    protocol_version = "HTTP/1.1"

    def setup(self) -> None:
        super().setup()
        self.rfile.close()
        self.input = BoundedInput(self.connection, IDLE_S, REQUEST_S)
        self.rfile = BufferedReader(self.input)

    def handle_one_request(self) -> None:
        self.input.rest()
        super().handle_one_request()

    def do_POST(self) -> None:
        kind = (self.headers.get("content-type") or "").partition(";")[0].strip().lower()
        as_json = kind == "application/json"
        try:
            if self.path.partition("?")[0] != "/v1/traces":
                raise _Refusal(HTTPStatus.NOT_FOUND, "only /v1/traces is read here")
            if not as_json and kind != "application/x-protobuf":
                raise _Refusal(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, "send application/x-protobuf or application/json")
            answer = self.server.store.take(self._body(), as_json=as_json)
        except _Refusal as refusal:
            self.server.store.refuse(str(refusal))
            self.close_connection = True  # what was not read of the body would be taken for the next request
            self._answer(refusal.status, kind, _status(str(refusal), as_json=as_json))
        except ValueError as error:
            self._answer(HTTPStatus.BAD_REQUEST, kind, _status(str(error), as_json=as_json))
        else:
            self._answer(HTTPStatus.OK, kind, _encoded(answer, as_json=as_json))

    def do_GET(self) -> None:
        self.close_connection = True
        self._answer(HTTPStatus.METHOD_NOT_ALLOWED, "text/plain", b"POST spans to /v1/traces\n")

    do_PUT = do_HEAD = do_DELETE = do_GET

    def _body(self) -> bytes:
        try:
            length = int(self.headers.get("content-length", ""))
        except ValueError:
            raise _Refusal(HTTPStatus.LENGTH_REQUIRED, "send a content-length") from None
        if not 0 <= length <= MAX_BODY:
            raise _Refusal(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"no more than {MAX_BODY} bytes, please")
        self.input.allow(length)
        try:
            body = self.rfile.read(length)
        except TimeoutError:
            body = b""
        if len(body) < length:
            raise _Refusal(HTTPStatus.REQUEST_TIMEOUT, "the body is not whole")
        encoding = (self.headers.get("content-encoding") or "identity").strip().lower()
        if encoding == "gzip":
            try:
                return unzip(body, MAX_BODY)
            except OverflowError as error:
                raise _Refusal(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, str(error)) from None
            except ValueError as error:
                raise _Refusal(HTTPStatus.BAD_REQUEST, str(error)) from None
        if encoding != "identity":
            raise _Refusal(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, "send the body plain or gzipped")
        return body

    def _answer(self, status: HTTPStatus, kind: str, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """What is not even HTTP, or of a version that is not spoken here."""
        is_grpc = self.requestline.startswith("PRI * HTTP/2")
        why = "the exporter speaks gRPC, for which there is collect.otlp_grpc_port" if is_grpc else message
        self.server.store.refuse(why or f"status {code}")
        super().send_error(code, message, explain)

    def log_message(self, format: str, *args: Any) -> None:
        """No access log: it would stand in the terminal between the lines of the run."""


class _Refusal(Exception):
    """A request that is not read, and the status that says why."""

    def __init__(self, status: HTTPStatus, why: str) -> None:
        super().__init__(why)
        self.status = status


def _encoded(answer: ExportTraceServiceResponse, *, as_json: bool) -> bytes:
    if not as_json:
        return bytes(answer.SerializeToString())
    partial = answer.partial_success
    told = {"rejectedSpans": str(partial.rejected_spans), "errorMessage": partial.error_message}
    return msgspec.json.encode({"partialSuccess": told} if partial.rejected_spans else {})


def _status(message: str, *, as_json: bool) -> bytes:
    """A google.rpc.Status with this message, as OTLP asks for; protobuf's field 2 is written by hand."""
    if as_json:
        return msgspec.json.encode({"message": message})
    text = message.encode("ascii", "replace")[:127]  # so that its length is one byte
    return b"\x12" + bytes([len(text)]) + text
