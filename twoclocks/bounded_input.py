"""What a client may send to a small HTTP server of ours: so many bytes a request, and in so much time.

The standard library's servers bound neither: a client that sends a byte now and then keeps a thread for hours, and a
head may be of a hundred lines of 64 kB.
"""

import io
import socket
import time

MAX_HEAD_BYTES = 64 * 1024


class BoundedInput(io.RawIOBase):
    """A connection's input. ``allow`` raises what a request may bring; `rest` ends one and awaits the next."""

    def __init__(self, connection: socket.socket, idle_s: float, request_s: float) -> None:
        self._connection, self._idle_s, self._request_s = connection, idle_s, request_s
        self.rest()

    def rest(self) -> None:
        """The next request may take its time to begin."""
        self._until: float | None = None
        self._left = MAX_HEAD_BYTES

    def allow(self, more: int) -> None:
        """So many bytes of a body may come, too."""
        self._left += more

    def readable(self) -> bool:
        """It is."""
        return True

    def readinto(self, buffer: bytearray | memoryview) -> int:  # type: ignore[override]
        """What is there. Raises TimeoutError when the request has had its time, or was to be longer than it may."""
        now = time.monotonic()
        waits = self._idle_s if self._until is None else self._until - now
        if waits <= 0 or self._left <= 0:
            raise TimeoutError("a request that is too long, or takes too long")
        self._connection.settimeout(waits)
        size = self._connection.recv_into(memoryview(buffer)[: self._left])
        self._left -= size
        if self._until is None:
            self._until = time.monotonic() + self._request_s
        return size
