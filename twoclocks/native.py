"""The gevent side of the native reader: a greenlet waits for its own response, and Python runs for it only at the end.

A reader belongs to one process and to the hub of the thread that made it; reader.py makes it where it is first needed.
"""

import os
import socket
from types import ModuleType

import gevent
from gevent.hub import Waiter
from greenlet import GreenletExit

from twoclocks.client import Received
from twoclocks.dialect import Body
from twoclocks.http1 import MAX_CHUNK_LINE_BYTES, MAX_TRAILER_BYTES, ProtocolError, ResponseReader

_native: ModuleType | None
try:
    from twoclocks import _native
except ImportError:  # no compiler at installation, or a platform without epoll
    _native = None

PAUSE_NS = 5000
"""The thread's rest between two turns, for each stream that runs, up to 2 ms. The kernel stamps meanwhile, and one
wake-up serves many reads: at 500 streams of 50 tokens/s the reader's CPU fell from 8.3 to 3.6 us a token. Reads of
evenly paced streams merge only beyond 200,000 tokens a second in all. The cost: chunks that a server writes in a burst
shorter than the rest share the burst's last stamp, and the word that a response has ended comes that much later."""
MAX_PAUSE_NS = 2_000_000  # as in _native.c
READABLE = 1  # libev's EV_READ


is_built = _native is not None

_BAD_CODING = {
    "bad_size": b"%(line)b\n",
    "bad_end": b"1\r\nx%(line)b\n",
    "bad_line": b"0" * (MAX_CHUNK_LINE_BYTES + 1),
    "bad_trailer": b"0\r\n" + b"x" * (MAX_TRAILER_BYTES + 1) + b"\n",
}
"""Bytes after a head in which http1 finds the fault that the native reader found."""


class NativeReader:
    """Receives on many connections: `threaded` in a thread without Python, else in the hub between its other work."""

    def __init__(self, *, threaded: bool = True) -> None:
        if _native is None:
            raise ImportError("twoclocks._native was not built; reinstall with a C compiler: pip install -e .")
        self._reader = _native.Reader(threaded, PAUSE_NS)
        self._threaded = threaded
        self._waiting: dict[int, Waiter] = {}
        self._loop = gevent.get_hub().loop
        self._watcher = self._loop.io(self._reader.fileno(), READABLE)
        self._watcher.start(self._tell)

    def receive(self, sock: socket.socket, total_ns: int, first_token_ns: int, idle_ns: int) -> Received:
        """A client.Receive for plain sockets. A greenlet that is killed gets what had come, as "cancelled".

        Raises OSError if the descriptor cannot be watched.
        """
        token = self._reader.add(sock.fileno(), total_ns, first_token_ns, idle_ns)
        waiter = self._waiting[token] = Waiter()
        killed = False
        try:
            waiter.get()
        except GreenletExit:
            killed = True
        finally:
            del self._waiting[token]
            received = as_received(*self._reader.collect(token))
        if not self._threaded:
            self._tell()  # what this greenlet does next may take longer than a gap, and others stream
        return received._replace(why="cancelled") if killed else received

    def progress(self) -> list[tuple[int, int, int, bool]]:
        """(token, reads so far, body bytes so far, has the first token come) of each running stream."""
        rows: list[tuple[int, int, int, bool]] = self._reader.progress()
        return rows

    def close(self) -> None:
        """Give up thread and descriptors. No greenlet may be waiting."""
        self._watcher.stop()
        self._watcher.close()
        self._reader.close()

    def _tell(self) -> None:
        """Wake those whose response has ended, one callback each, so that the hub can look after others in between."""
        for token in self._reader.poll():
            if token in self._waiting:
                self._loop.run_callback(self._waiting[token].switch, None)


def as_received(
    why: str,
    head: bytes,
    data: bytes,
    times: list[int],
    ends: list[int],
    line: bytes,
    first_byte_ns: int,
    ended_ns: int,
    user_stamps: int,
    reusable: bool,
    errno: int,
) -> Received:
    """What Reader.collect tells, in the words of http1; `line` is the beginning of a line that is no chunked coding."""
    response, detail = ResponseReader(), os.strerror(errno) if errno else ""
    try:
        response.feed(head)
        if why in _BAD_CODING:
            response.feed(_BAD_CODING[why] % {b"line": line})
    except ProtocolError as error:
        why, detail = "protocol", str(error)
    response.complete, response.reusable = why == "complete", reusable
    return Received(why, detail, response, Body(data, times, ends), first_byte_ns, ended_ns, user_stamps)
