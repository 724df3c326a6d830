"""The gevent side of the native reader: a greenlet waits for its own response, and Python runs for it only at the end.

client.Connection takes `NativeReader.receive` where the extension was built; TLS, and a platform without it, keep the
Python reader. A reader belongs to one process and to the hub of the thread that made it, so it is made where it is
first needed, never at import: Locust's --processes forks.
"""

import os
from types import ModuleType
from typing import Literal

import gevent
from gevent.hub import Waiter
from greenlet import GreenletExit

from twoclocks.client import Connection, Received
from twoclocks.endpoint import Endpoint

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
READABLE = 1  # libev's EV_READ


def reader_name(endpoint: Endpoint) -> Literal["native", "python"]:
    """Which reader this process uses for an endpoint; TWOCLOCKS_READER=python asks for the Python one."""
    asked = os.environ.get("TWOCLOCKS_READER", "native")
    return "native" if _native is not None and endpoint.tls is None and asked != "python" else "python"


def connect(endpoint: Endpoint) -> Connection:
    """A connection, not yet open, that uses this process's reader."""
    global _reader
    if reader_name(endpoint) == "python":
        return Connection(endpoint)
    _reader = _reader or NativeReader()
    return Connection(endpoint, _reader.receive)


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

    def receive(self, fd: int, total_ns: int, first_token_ns: int, idle_ns: int) -> Received:
        """The response to the request just written to a plain socket; blocks the calling greenlet alone.

        Two deadlines on time.monotonic_ns() and the longest silence, in ns. A greenlet that is killed gets what had
        come, as "cancelled". Raises OSError if the descriptor cannot be watched.
        """
        token = self._reader.add(fd, total_ns, first_token_ns, idle_ns)
        waiter = self._waiting[token] = Waiter()
        killed = False
        try:
            waiter.get()
        except GreenletExit:
            killed = True
        finally:
            del self._waiting[token]
            received = Received(*self._reader.collect(token))
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


_reader: NativeReader | None = None


def _forget_reader() -> None:
    """In a forked child, which has no such thread, and must not take what its parent waits for."""
    global _reader
    if _reader is not None:
        _reader.close()
        _reader = None


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_reader)
