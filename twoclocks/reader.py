"""Which reader receives, and the Python one: a gevent watcher a stream, whose callback reads and stamps.

The native reader (native.py) is used where the extension was built; TLS, and a platform without it, use the one here.
A reader belongs to one process and to the hub of the thread that made it, so it is made where it is first needed, never
at import: Locust's --processes forks.
"""

import contextlib
import itertools
import os
import socket
import ssl
import struct
import sys
import time
from collections import deque
from collections.abc import Callable
from typing import Any, Literal

import gevent
import gevent.monkey
from gevent.hub import Waiter
from greenlet import GreenletExit

from twoclocks import native
from twoclocks.client import MAX_BODY_BYTES, SO_TIMESTAMPNS, Connection, Received
from twoclocks.dialect import Body, parse_event
from twoclocks.endpoint import Endpoint
from twoclocks.http1 import ProtocolError, ResponseReader
from twoclocks.record import TOKEN_KINDS
from twoclocks.sse import EventTooLong, SseDecoder

READ_BYTES = 64 * 1024
SWEEP_S = 0.1  # how late a timeout may be told
STAMPS_S = 0.01  # how long the kernel takes to begin with its stamps: a work queue's next turn
READABLE = 1  # libev's EV_READ
MAX_STAMP_AGE_NS = 60 * 10**9
MAX_HELD_NS = 5 * 10**6  # as in _native.c
TCP_INFO_OOOPACK = 224  # where linux/tcp.h has tcpi_rcv_ooopack, from 5.5 on: packets that came out of order
SLEW_NS = 10**6  # and a thousandth of the time passed: what moves the wall clock by more has set it
_sleep = gevent.monkey.get_original("time", "sleep")
_TIMESPEC = struct.Struct("@ll")
_timespec, _wall_ns, _now_ns = _TIMESPEC.unpack_from, time.time_ns, time.monotonic_ns
_CONTROL_BYTES = socket.CMSG_SPACE(_TIMESPEC.size) if sys.platform == "linux" else 0


def reader_name(endpoint: Endpoint) -> Literal["native", "python"]:
    """Which reader this process uses for an endpoint; TWOCLOCKS_READER=python asks for the Python one."""
    asked = os.environ.get("TWOCLOCKS_READER", "native")
    return "native" if native.is_built and endpoint.tls is None and asked != "python" else "python"


def connect(endpoint: Endpoint) -> Connection:
    """A connection, not yet open, that uses this process's reader."""
    name = reader_name(endpoint)
    if not _readers:
        _begin_stamping()
    if name not in _readers:
        _readers[name] = native.NativeReader() if name == "native" else PythonReader()
    return Connection(endpoint, _readers[name].receive)


def _begin_stamping() -> None:
    """The kernel begins to stamp a moment after the first socket of the machine asks for it, and ends with the last:
    so one that is for nothing else asks now, and stays. Of an early answer arrivals would lack their stamps.
    """
    if _CONTROL_BYTES:
        with contextlib.suppress(OSError):
            sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
            sock.setsockopt(socket.SOL_SOCKET, SO_TIMESTAMPNS, 1)
            sock.detach()  # nobody closes it
            _sleep(STAMPS_S)


class PythonReader:
    """Receives on many connections, in the hub, between its other work."""

    def __init__(self) -> None:
        self._loop = gevent.get_hub().loop
        self._streams: set[_Stream] = set()
        self._ended: deque[_Stream] = deque()
        self._unstamped = 0  # streams whose reads the kernel does not stamp
        self._wake = self._loop.timer(0)
        self._sweep = self._loop.timer(SWEEP_S, SWEEP_S)
        self._before_polling = self._loop.prepare()

    def receive(self, sock: socket.socket, total_ns: int, first_token_ns: int, idle_ns: int) -> Received:
        """A client.Receive, for TLS too. A greenlet that is killed gets what had come, as "cancelled"."""
        sock.settimeout(0)
        watcher = self._loop.io(sock.fileno(), READABLE)

        def over(stream: _Stream) -> None:
            watcher.stop()
            self._ended.append(stream)
            if not self._wake.active:
                self._wake.start(self._wake_next)

        stream = _Stream(sock, total_ns, first_token_ns, idle_ns, over)
        self._unstamped += not stream.is_stamped
        if not self._streams:
            self._sweep.start(self._end_overdue)
            self._before_polling.start(self._rest)
        self._streams.add(stream)
        watcher.start(stream.read)
        try:
            stream.read()  # under TLS the first bytes may lie in the library already
            while not stream.why:
                stream.waiter.get()
        except GreenletExit:
            stream.why = "cancelled"
        finally:
            watcher.stop()
            watcher.close()
            self._unstamped -= not stream.is_stamped
            self._streams.discard(stream)
            if not self._streams:
                self._sweep.stop()
                self._before_polling.stop()
        return stream.received()

    def close(self) -> None:
        """Give up the timers. No greenlet may be waiting."""
        for watcher in (self._wake, self._sweep, self._before_polling):
            watcher.stop()
            watcher.close()

    def _rest(self) -> None:
        """Hold the whole loop a little, while the kernel stamps: one wake-up then serves many reads, as native.PAUSE_NS
        says. Never while a response is to be handed over, or where an arrival is stamped by the read itself.
        """
        if not self._ended and not self._unstamped:
            _sleep(min(native.PAUSE_NS * len(self._streams), native.MAX_PAUSE_NS) / 1e9)

    def _wake_next(self) -> None:
        """Wake one whose response has ended. The loop looks after the sockets before the next: when a wave of streams
        ends, what is done for each takes less than a gap, but for all of them many gaps, and others stream.
        """
        stream = self._ended.popleft()
        if self._ended:
            self._wake.start(self._wake_next)
        stream.waiter.switch(None)

    def _end_overdue(self) -> None:
        now = time.monotonic_ns()
        for stream in [one for one in self._streams if one.deadline() <= now]:
            if not stream.why:
                stream.read()  # it is overdue only if nothing of it is waiting to be read
                if not stream.why and stream.deadline() <= now:
                    stream.give_up()


class _Stream:
    """One response while it comes."""

    __slots__ = (
        "_compared",
        "_idle",
        "_is_token",
        "_last",
        "_over",
        "_pieces",
        "_recvmsg",
        "_size",
        "_sock",
        "_times",
        "_token_due",
        "_total_due",
        "_wall_ahead",
        "detail",
        "ended",
        "first_byte",
        "is_stamped",
        "response",
        "user_stamps",
        "waiter",
        "why",
    )  # fmt: skip

    def __init__(self, sock: Any, total: int, first_token: int, idle: int, over: Callable[["_Stream"], None]) -> None:
        self._sock, self._over = sock, over
        self.is_stamped = _CONTROL_BYTES > 0 and not isinstance(sock, ssl.SSLSocket)
        # gevent's own method, which waits where there is nothing, costs a tenth of a read
        self._recvmsg = getattr(sock, "_sock", sock).recvmsg if self.is_stamped else None
        self._total_due, self._idle = total, idle
        self._token_due: int | None = first_token
        self._is_token = _first_token_watch()
        self._last = self._size = 0
        self._compared = _now_ns()
        self._wall_ahead = _wall_ns() - self._compared
        self._pieces: list[bytes] = []
        self._times: list[int] = []
        self.response = ResponseReader()
        self.first_byte = self.ended = self.user_stamps = 0
        self.why = self.detail = ""
        self.waiter = Waiter()

    def read(self) -> None:
        """Take what is there. The path per token: a call more would cost a hundredth of it."""
        try:
            if self._recvmsg is None:
                self._take(self._sock.recv(READ_BYTES), None)
                # what the TLS library holds makes no socket readable
                while not self.why and isinstance(self._sock, ssl.SSLSocket) and self._sock.pending():
                    self._take(self._sock.recv(READ_BYTES), None)
            else:
                data, control, _, _ = self._recvmsg(READ_BYTES, _CONTROL_BYTES)
                at = None
                if control and control[0][1] == SO_TIMESTAMPNS and control[0][0] == socket.SOL_SOCKET:
                    seconds, nanoseconds = _timespec(control[0][2])
                    # the stamp is on the wall clock, of which only its age enters; none is believed while that clock
                    # was just set: what waited may have been stamped before or after it
                    wall, now = _wall_ns(), _now_ns()
                    age, ahead = wall - seconds * 1_000_000_000 - nanoseconds, wall - now
                    is_set = abs(ahead - self._wall_ahead) > SLEW_NS + (now - self._compared) // 1000
                    self._wall_ahead, self._compared = ahead, now
                    if 0 <= age < MAX_STAMP_AGE_NS and not is_set:
                        # what came behind a lost segment had its stamp long before anybody could read it
                        at = now - age if age <= MAX_HELD_NS or not _is_reordered(self._sock) else None
                self._take(data, at)
        except (BlockingIOError, InterruptedError, ssl.SSLWantReadError):
            return
        except OSError as error:
            self.end("reset", error.strerror or str(error))
        if self.why:
            self._over(self)

    def _take(self, data: bytes, at: int | None) -> None:
        response = self.response
        if not data:
            response.end_of_input()
            self.end("complete" if response.complete else "closed")
            return
        if at is None:
            at = _now_ns()
            self.user_stamps += 1
        elif at < self._last:  # a stamp may be of a moment before the read whose time is our own
            at = self._last
        self._last = at
        try:
            body = response.feed(data)
        except ProtocolError as error:
            body = error.body
            self.end("protocol", str(error))
        if body:
            self._size += len(body)
            self._pieces.append(body)
            self._times.append(at)
            if self._token_due is not None and self._is_token(body):
                self._token_due = None
            if self._size > MAX_BODY_BYTES and not self.why:
                self.end("too_large")
        if not self.first_byte:
            self.first_byte = at
        if response.complete:
            self.end("complete")

    def end(self, why: str, detail: str = "") -> None:
        """It is over."""
        self.why, self.detail, self.ended = why, detail, time.monotonic_ns()

    def deadline(self) -> int:
        """When it is overdue if nothing comes, in ns."""
        return min(self._total_due, self._last + self._idle if self._token_due is None else self._token_due)

    def give_up(self) -> None:
        """End it for the timeout that the deadline is."""
        self.end(
            "total" if self.deadline() == self._total_due else "idle" if self._token_due is None else "first_token"
        )
        self._over(self)

    def received(self) -> Received:
        """All that has come."""
        ends = [*itertools.accumulate([len(piece) for piece in self._pieces])]
        body = Body(b"".join(self._pieces), self._times, ends)
        ended = self.ended or time.monotonic_ns()
        return Received(self.why, self.detail, self.response, body, self.first_byte, ended, self.user_stamps)


def _is_reordered(sock: socket.socket) -> bool:
    """Has anything come out of order on this connection?"""
    with contextlib.suppress(OSError):
        return any(sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, TCP_INFO_OOOPACK + 4)[TCP_INFO_OOOPACK:])
    return False


def _first_token_watch() -> Callable[[bytes], bool]:
    """A function that is fed the body until it says that the first token has come; only those few events are read."""
    decoder = SseDecoder()

    def is_token(body: bytes) -> bool:
        try:
            events = [parse_event(data) for data in decoder.feed(body)]
        except EventTooLong:
            return True  # told at the end; until then the other timeouts hold
        return any(kind in TOKEN_KINDS for chunks, _ in events for kind, *_ in chunks)

    return is_token


_readers: dict[str, native.NativeReader | PythonReader] = {}


def _forget_readers() -> None:
    """In a forked child, which has no such thread, and must not take what its parent waits for."""
    for reader in _readers.values():
        reader.close()
    _readers.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_readers)
