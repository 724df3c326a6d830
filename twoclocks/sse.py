"""Server-sent events from bytes: the line protocol alone, no JSON and no clock.

WHATWG HTML, section 9.2.6, with two liberties that real servers need: a stream may end without the blank line after its
last event, and events other than the data lines' text are ignored. Lines end at LF, CRLF or CR and nowhere else:
U+2028, U+0085, VT and FF may stand raw inside a JSON token.
"""

from collections.abc import Iterator

BOM = b"\xef\xbb\xbf"
"""What a stream may begin with."""
MAX_EVENT_BYTES = 4 * 1024 * 1024
"""No token needs more; a line without an end must not fill the memory."""


class EventTooLong(ValueError):
    """An event grew beyond MAX_EVENT_BYTES."""


class SseDecoder:
    """Feed bytes as they arrive, get the data of each event that they complete.

    >>> decoder = SseDecoder()
    >>> list(decoder.feed(b"data: a\\n\\ndata:b\\n")), list(decoder.flush())
    ([b'a'], [b'b'])
    """

    __slots__ = ("_after_cr", "_data", "_held_bytes", "_is_first", "_partial")

    def __init__(self) -> None:
        self._partial: list[bytes] = []  # pieces of a line whose end has not come yet
        self._data: list[bytes] = []  # data lines of an event whose end has not come yet
        self._held_bytes = 0
        self._after_cr = False
        self._is_first = True  # line

    def feed(self, received: bytes) -> Iterator[bytes]:
        """Yield the data of each event completed by these bytes. Raises EventTooLong."""
        if self._after_cr and received.startswith(b"\n"):  # the LF of a CRLF that was split between two reads
            received = received[1:]
            self._after_cr = False
        if received:
            self._after_cr = received.endswith(b"\r")
        if b"\r" in received:
            received = received.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
        first, *rest = received.split(b"\n")
        self._hold(first)
        for piece in rest:
            event = self._end_line()
            if event is not None:
                yield event
            self._hold(piece)

    def flush(self) -> Iterator[bytes]:
        """Yield the event that the end of the stream left without its blank line, if there is one."""
        for _ in range(2):
            event = self._end_line()
            if event is not None:
                yield event

    def _hold(self, piece: bytes) -> None:
        if piece:
            self._partial.append(piece)
            self._held_bytes += len(piece)
            if self._held_bytes > MAX_EVENT_BYTES:
                raise EventTooLong(f"an event of more than {MAX_EVENT_BYTES} bytes")

    def _end_line(self) -> bytes | None:
        """Take the line that has just ended; at a blank one, return the event that it completes."""
        if self._partial:
            line = self._partial[0] if len(self._partial) == 1 else b"".join(self._partial)
            self._partial.clear()
            if self._is_first:
                line, self._is_first = line.removeprefix(BOM), False
            if line.startswith(b"data:"):
                self._data.append(line[5:].removeprefix(b" "))
            else:
                self._held_bytes -= len(line)
            return None
        self._is_first = False
        if not self._data:
            return None
        event = self._data[0] if len(self._data) == 1 else b"\n".join(self._data)
        self._data.clear()
        self._held_bytes = 0
        return event
