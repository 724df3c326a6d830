"""The stream client: `send(plan)` -> Record. Never raises for what the server does.

Knows nothing of Locust. It uses plain sockets, which Locust's monkey-patching makes cooperative. What comes back is
received by one of two readers (reader.py, native.py), which stamp each arrival, with the kernel's stamps where there
are any; while a stream runs, its bytes are only kept, and they are read for meaning after the end.
"""

import contextlib
import errno
import math
import re
import resource
import socket
import ssl
import time
from collections.abc import Callable, Mapping
from email.utils import parsedate_to_datetime
from operator import sub
from typing import Any, NamedTuple

import msgspec
from greenlet import GreenletExit

from twoclocks.dialect import Body, Stream, parse_event, read_answer, read_stream
from twoclocks.endpoint import Endpoint
from twoclocks.experiment import Timeouts
from twoclocks.http1 import ResponseReader
from twoclocks.masks import redact
from twoclocks.proxy import ProxyRefused, open_tunnel
from twoclocks.record import (
    GAVE_UP,
    HUNG_UP,
    LEFT,
    NO_FILES,
    STOPPED,
    TOKEN_KINDS,
    TOO_LONG,
    Phase,
    Record,
    Status,
    run_lengths,
)
from twoclocks.workload import Plan

SPARE_FILES = 16
"""File handles that no connection takes: run.json is written anew, names are resolved, the report is started."""
MAX_BODY_BYTES = 64 * 1024 * 1024
NO_BODY = Body(b"", [], [])
TGI_HEADERS = {f"x-{name}-time" for name in ("total", "validation", "queue", "inference")} | {"x-time-per-token"}
REFUSES_LENGTH = re.compile(
    r"maximum (context|model) length|model's context length|context_length_exceeded|context size\b.*exceed"
    r"|exceeds? the available context size|`inputs` tokens \+ `max_new_tokens` must be|`inputs` must have less than",
    re.IGNORECASE,
)
"""How servers say that prompt and answer do not fit: vLLM and OpenAI, SGLang (model's), llama.cpp (size), TGI."""
LOOKED_AT_CHARS = 20_000
"""Of an answer that is no JSON, which may be of megabytes, while a message is made of it."""
MESSAGE_CHARS = 4_000
"""Of a message, while its meaning is looked for."""
SO_TIMESTAMPNS = 35  # asm-generic/socket.h; the socket module has no name for it


class Origin(msgspec.Struct, frozen=True):
    """Who sends, and the zero of the clock, in ns of time.monotonic_ns()."""

    zero_ns: int
    worker: int = 0
    user: int = 0
    keep_text: bool = False
    count_tokens: Callable[[str], int] | None = None  # for answers without usage


class Failure(Exception):
    """Why a request did not end well; becomes the record's status, error_kind and error_message."""

    def __init__(self, status: Status, kind: str, message: str) -> None:
        super().__init__(message)
        self.status, self.kind, self.message = status, kind, message


class Received(NamedTuple):
    """What a reader brings of one response; times in ns of time.monotonic_ns()."""

    why: str  # complete | closed | reset | protocol | too_large | no_memory | total | first_token | idle | cancelled
    detail: str  # the system's words of a reset, http1's of a fault
    response: ResponseReader
    body: Body
    first_byte_ns: int  # 0: none came
    ended_ns: int
    user_stamps: int  # reads that the kernel did not stamp


Receive = Callable[[socket.socket, int, int, int], Received]
"""(connected socket, total deadline, first token's deadline, longest silence), in ns. Blocks the caller alone."""


class Connection:
    """One keep-alive connection; opened when needed, replaced when the server has closed it."""

    def __init__(self, endpoint: Endpoint, receive: Receive) -> None:
        self.endpoint = endpoint
        self.receive = receive
        self.sock: socket.socket | None = None

    def open(self) -> None:
        """Connect, if there is no usable connection. Raises Failure."""
        timeout = self.endpoint.timeouts.connect_s
        proxy = self.endpoint.proxy
        host, port = (proxy.host, proxy.port) if proxy else (self.endpoint.host, self.endpoint.port)
        try:
            # under TLS a read is no segment, and has no stamp of its own
            sock = _connected(host, port, timeout, stamped=self.endpoint.tls is None)
        except TimeoutError:
            raise Failure("timeout", "connect_timeout", f"no connection within {timeout:g} s") from None
        except ConnectionRefusedError:
            raise Failure("error", "refused", "connection refused") from None
        except socket.gaierror as error:
            raise Failure("error", "dns", f"{host}: {error.strerror}") from None
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE):
                raise _no_file_handle() from None
            raise Failure("error", "connect", error.strerror or str(error)) from None
        if sock.fileno() >= resource.getrlimit(resource.RLIMIT_NOFILE)[0] - SPARE_FILES:
            sock.close()
            raise _no_file_handle()
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if self.endpoint.tls is not None:
            try:
                if proxy:
                    open_tunnel(sock, proxy, self.endpoint.host, self.endpoint.port)
                sock = self.endpoint.tls.wrap_socket(sock, server_hostname=self.endpoint.host)
            except TimeoutError:
                sock.close()
                raise Failure("timeout", "connect_timeout", f"no TLS handshake within {timeout:g} s") from None
            except ProxyRefused as error:
                sock.close()
                raise Failure("error", "proxy", str(error)) from None
            except OSError as error:
                sock.close()
                raise Failure("error", "tls", error.strerror or str(error)) from None
        self.sock = sock

    def is_usable(self) -> bool:
        """Is it open, with nothing to read? Before a request, something to read can only be the server's goodbye."""
        if self.sock is None:
            return False
        self.sock.settimeout(0)
        try:
            leftover = self.sock.recv(1)
        except (BlockingIOError, ssl.SSLWantReadError):
            return True
        except OSError:
            leftover = b""
        del leftover
        self.close()
        return False

    def close(self) -> None:
        """Close the socket, which makes a server stop generating."""
        if self.sock is not None:
            self.sock.close()
            self.sock = None


def _connected(host: str, port: int, timeout_s: float, *, stamped: bool) -> socket.socket:
    """A socket that is connected. Raises OSError. ``stamped``: the kernel is to stamp what it receives.

    An address in digits needs no resolver: gevent's is a pool of threads, which wait for seconds while the loop is
    busy. The stamps are asked for as early as can be, since the kernel begins with them a little later.
    """
    for family in (socket.AF_INET, socket.AF_INET6):
        with contextlib.suppress(OSError):
            socket.inet_pton(family, host)
            break
    else:
        return _stamped(socket.create_connection((host, port), timeout_s), stamped=stamped)
    sock = _stamped(socket.socket(family, socket.SOCK_STREAM), stamped=stamped)
    try:
        sock.settimeout(timeout_s)
        sock.connect((host, port))
    except BaseException:  # also of a greenlet that is killed meanwhile
        sock.close()
        raise
    return sock


def _stamped(sock: socket.socket, *, stamped: bool) -> socket.socket:
    """The same socket, with the kernel's stamps where it has any."""
    if stamped:
        with contextlib.suppress(OSError):
            sock.setsockopt(socket.SOL_SOCKET, SO_TIMESTAMPNS, 1)
    return sock


def _no_file_handle() -> Failure:
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    told = f"no file handle left for a connection: this process may have {limit:,} (ulimit -n), and keeps {SPARE_FILES}"
    return Failure("error", NO_FILES, f"{told} for the run folder; raise the limit, or use more processes")


def _cancelled() -> Failure:
    return Failure("cancelled", STOPPED, "cut off when the run stopped")


class Exchange:
    """The raw course of one request, filled while it runs. All times are ns of time.monotonic_ns()."""

    def __init__(self) -> None:
        self.connect_started_ns: int | None = None
        self.connected_ns: int | None = None
        self.sent_ns: int | None = None
        self.written_ns: int | None = None
        self.first_byte_ns: int | None = None
        self.ended_ns = 0
        self.body = NO_BODY
        self.user_stamps = 0
        self.response = ResponseReader()
        self.failure: Failure | None = None

    def run(self, connection: Connection, plan: Plan) -> None:
        """Send the plan and keep what comes back. What goes wrong is kept as `failure`."""
        try:
            if not connection.is_usable():
                self.connect_started_ns = time.monotonic_ns()
                connection.open()
                self.connected_ns = time.monotonic_ns()
            try:
                self._write(connection, plan)
            except ConnectionError:  # whoever refuses a request that is still coming may have said why
                with contextlib.suppress(Failure):
                    self._receive(connection, plan)
                if not self.response.complete:
                    raise
                self.response.reusable = False
            else:
                self._receive(connection, plan)
        except Failure as failure:
            self.failure = failure
        except GreenletExit:
            self.failure = _cancelled()
        except OSError as error:
            self.failure = Failure("error", "reset", error.strerror or str(error))
        self.ended_ns = self.ended_ns or time.monotonic_ns()
        if self.failure is not None or not self.response.reusable:
            connection.close()

    def _write(self, connection: Connection, plan: Plan) -> None:
        sock = connection.sock
        assert sock is not None
        message = b"%bX-Request-Id: %b\r\ntraceparent: 00-%b-%b-01\r\nContent-Length: %d\r\n\r\n%b" % (
            connection.endpoint.head,
            plan.request_id.encode(),
            plan.request_id.encode(),
            plan.request_id[:16].encode(),
            len(plan.body),
            plan.body,
        )
        sock.settimeout(connection.endpoint.timeouts.first_token_s)
        self.sent_ns = time.monotonic_ns()
        try:
            sock.sendall(message)
        except TimeoutError:
            raise Failure("timeout", "send_timeout", "the server did not take the request") from None
        self.written_ns = time.monotonic_ns()

    def _receive(self, connection: Connection, plan: Plan) -> None:
        assert connection.sock is not None
        assert self.sent_ns is not None
        timeouts = connection.endpoint.timeouts
        # of an answer that comes whole, the first token is the last
        first_token_s = timeouts.first_token_s if connection.endpoint.stream else timeouts.total_s
        hang_up_s = math.inf if plan.hang_up_s is None else plan.hang_up_s
        patience_s = math.inf if plan.patience_s is None else plan.patience_s
        received = connection.receive(
            connection.sock,
            self.sent_ns + round(min(timeouts.total_s, hang_up_s) * 1e9),
            self.sent_ns + round(min(first_token_s, patience_s) * 1e9),
            round(timeouts.idle_s * 1e9),
        )
        why = received.why
        self.first_byte_ns = received.first_byte_ns or None
        self.ended_ns = received.ended_ns
        self.response, self.body, self.user_stamps = received.response, received.body, received.user_stamps
        if why == "cancelled":
            raise _cancelled()
        if why == "closed":
            raise Failure("error", "closed", "the server closed the connection before the end of its answer")
        if why in ("reset", "protocol"):
            raise Failure("error", why, received.detail)
        if why == "too_large":
            raise Failure("error", "too_large", f"an answer of more than {MAX_BODY_BYTES} bytes")
        if why == "total" and hang_up_s < timeouts.total_s:
            raise Failure("cancelled", HUNG_UP, f"the user hung up {hang_up_s:.3f} s after the send, as was drawn")
        if why == "first_token" and patience_s < first_token_s:
            raise Failure("cancelled", GAVE_UP, f"no token within workload.patience_s = {patience_s:g} s")
        if why in ("total", "first_token", "idle"):
            raise self._timeout(timeouts, total=why == "total", token=why == "first_token")
        if why != "complete":
            raise Failure("error", why, "the reader gave the response up")

    def _timeout(self, timeouts: Timeouts, *, total: bool, token: bool) -> Failure:
        if total:
            return Failure("timeout", "total_timeout", f"not over after timeouts.total_s = {timeouts.total_s:g} s")
        if token:
            return Failure(
                "timeout", "first_token_timeout", f"no token after first_token_s = {timeouts.first_token_s:g} s"
            )
        return Failure("timeout", "idle_timeout", f"silence of more than timeouts.idle_s = {timeouts.idle_s:g} s")


class Attempt(msgspec.Struct, frozen=True):
    """Which attempt at an ask this is."""

    number: int = 1
    first_id: str | None = None  # request_id of the first one; None on that one itself


FIRST = Attempt()


def send(
    connection: Connection,
    plan: Plan,
    origin: Origin,
    phase: Phase,
    intended_ns: int | None = None,
    attempt: Attempt = FIRST,
) -> Record:
    """Send one request and return its record, whatever happens. Of kind STOPPED it means: the caller has to stop.

    Nobody hangs up on a warm-up.
    """
    if phase == "warmup":
        plan = msgspec.structs.replace(plan, hang_up_s=None, patience_s=None)
    intended_ns = time.monotonic_ns() if intended_ns is None else intended_ns
    exchange = Exchange()
    exchange.run(connection, plan)
    return _record(exchange, connection, plan, origin, phase, intended_ns, attempt)


def _record(
    exchange: Exchange,
    connection: Connection,
    plan: Plan,
    origin: Origin,
    phase: Phase,
    intended_ns: int,
    attempt: Attempt,
) -> Record:
    streams, secrets = connection.endpoint.stream, connection.endpoint.secrets
    if streams:
        stream = read_stream(exchange.body if _is_stream(exchange.response) else NO_BODY)
    else:
        stream = read_answer(exchange.body if exchange.response.status == 200 else NO_BODY)
    failure = _failure(exchange, stream, streams=streams)
    tokens, output_tokens, token_source = stream.tokens, stream.output_tokens, stream.token_source
    if token_source == "chunks" and origin.count_tokens is not None:
        token_source = "tokenizer"
        chunks, output_tokens = output_tokens, origin.count_tokens(stream.text)
        if output_tokens != chunks:  # so a chunk is not a token here, and nobody knows how many each carried
            tokens = [None if kind in TOKEN_KINDS else 0 for kind in stream.kinds]

    def at(ns: int | None) -> float | None:
        return None if ns is None else round((ns - origin.zero_ns) / 1e9, 6)

    return Record(
        request_id=plan.request_id,
        target=connection.endpoint.target,
        prompt_id=plan.prompt.id,
        session=plan.prompt.session,
        turn=plan.prompt.turn,
        user=origin.user,
        worker=origin.worker,
        phase=phase,
        intended_at=round((intended_ns - origin.zero_ns) / 1e9, 6),
        connect_started_at=at(exchange.connect_started_ns),
        connected_at=at(exchange.connected_ns),
        sent_at=at(exchange.sent_ns),
        written_at=at(exchange.written_ns),
        first_byte_at=at(exchange.first_byte_ns),
        ended_at=round((exchange.ended_ns - origin.zero_ns) / 1e9, 6),
        attempt=attempt.number,
        first_attempt_id=attempt.first_id,
        retry_after_s=None if exchange.response.status == 200 else retry_after_s(exchange.response.headers),
        chunk_us=_gaps_us(exchange.sent_ns or 0, stream.arrived_ns),
        chunk_tokens=tokens,
        chunk_kinds=run_lengths(stream.kinds),
        chunk_choice=run_lengths(stream.choices) if any(stream.choices) else None,
        timestamp_source="user" if exchange.user_stamps or not exchange.body.times else "kernel",
        reads_merged=stream.reads_merged,
        max_tokens=plan.max_tokens,
        expected_output_tokens=plan.prompt.expected_output_tokens,
        prompt_tokens=stream.prompt_tokens,
        output_tokens=output_tokens,
        cached_tokens=stream.cached_tokens,
        token_source=token_source,
        finish_reason=redact(stream.finish_reason, secrets),
        http_status=exchange.response.status or None,
        status=failure.status if failure else "ok",
        error_kind=failure.kind if failure else None,
        error_message=redact(failure.message, secrets)[:1000] if failure else None,
        output_text=stream.text if origin.keep_text else None,
        server=redact(stream.server or _timings_in_headers(exchange.response), secrets),
    )


def _gaps_us(sent_ns: int, arrived_ns: list[int]) -> list[int]:
    """Offset of the first from sent, then gaps; differences of rounded absolute times, so errors do not add up."""
    marks = [(at - sent_ns + 500) // 1000 for at in arrived_ns]
    return [*map(sub, marks, [0, *marks])]


def _timings_in_headers(response: ResponseReader) -> dict[str, Any] | None:
    """TGI's x-queue-time and the like, as they came: only answers that are not streamed bring them."""
    told = {name: value for name, value in response.headers.items() if name in TGI_HEADERS}
    return told or None


def retry_after_s(headers: Mapping[str, str]) -> float | None:
    """Seconds of a Retry-After, RFC 9110 section 10.2.3; a date there is held against the server's own Date.

    None without one, and for what is none.
    """
    told = headers.get("retry-after", "")
    if re.fullmatch(r"\d{1,9}(\.\d{1,9})?", told):
        return float(told)
    try:
        later, now = (parsedate_to_datetime(headers[name]) for name in ("retry-after", "date"))
        return max(0.0, (later - now).total_seconds())
    except (KeyError, ValueError, TypeError):  # the last: one with a zone, the other without
        return None


def _is_stream(response: ResponseReader) -> bool:
    return response.status == 200 and "json" not in response.headers.get("content-type", "")


def _failure(exchange: Exchange, stream: Stream, *, streams: bool) -> Failure | None:
    """Why the request is not ok, or None. What the server says of an error tells more than how its connection ended."""
    response, failure = exchange.response, exchange.failure
    body = exchange.body.data
    if failure is not None and failure.kind == STOPPED:
        return failure  # whatever the server had said: the caller has to know that it was told to stop
    if response.status not in (0, 200):
        told = _error_text(body) or f"HTTP status {response.status}"
        if 300 <= response.status < 400 and "location" in response.headers:
            told = (
                f"leads to {response.headers['location']}, where nothing is sent; if it is meant, name it in target.url"
            )
        return Failure("error", TOO_LONG if _refuses_length(told) else f"http_{response.status}", told)
    if stream.error is not None:
        return Failure("error", TOO_LONG if _refuses_length(stream.error) else "error_event", stream.error)
    if failure is not None and failure.kind in ("closed", "reset") and response.status:
        # a connection lost after the finish reason has taken nothing from the answer
        return None if stream.ended else Failure("truncated", failure.kind, failure.message)
    if failure is not None and failure.kind in LEFT and stream.ended:
        return None  # the answer was whole before its user left
    if failure is not None:
        return failure
    if streams and not _is_stream(response):
        return Failure("error", "not_a_stream", f"answered without streaming: {_error_text(body) or 'nothing'}")
    if stream.malformed is not None:
        return Failure("error", "malformed", stream.malformed)
    if not stream.ended and not stream.kinds:
        kind, what = ("not_a_stream", "any event") if streams else ("not_an_answer", "any choice")
        return Failure("error", kind, f"status 200 without {what}: {_error_text(body)[:200] or 'nothing'}")
    if not stream.ended:
        return Failure("truncated", "no_end", "the stream ended without a finish reason or [DONE]")
    return None


def _refuses_length(told: str) -> bool:
    return REFUSES_LENGTH.search(told[:MESSAGE_CHARS]) is not None


def _error_text(body: bytes) -> str:
    """What an answer says of an error, on one line; more than is kept, so that a key to be taken out of it is whole."""
    return " ".join((parse_event(body)[1] or body[:LOOKED_AT_CHARS].decode("utf-8", "replace")).split())
