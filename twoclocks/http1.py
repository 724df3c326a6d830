"""HTTP/1.1 responses from bytes: where the head ends, which bytes are body, when the response is over.

A plain feed object without socket or clock, because this is on the path per token: h11 costs more for each chunk than
reading it does. Requests are made here too. RFC 9112, sections 6 and 7; what is not needed to read a stream (trailers,
chunk extensions) is skipped, and every size is bounded, since the server may be hostile.
"""

import re

MAX_HEAD_BYTES = 64 * 1024
MAX_CHUNK_LINE_BYTES = 1024
MAX_TRAILER_BYTES = 64 * 1024

QUOTED = 20_000
"""What a message quotes of a server: so much that no key is cut in what is kept of it, once keys are hidden."""

_CHUNK_SIZE = re.compile(rb"[ \t]*([0-9a-fA-F]{1,15})[ \t]*(?:;.*)?\r?$", re.DOTALL)
_STATUS_LINE = re.compile(rb"HTTP/1\.[01] ([1-5]\d\d)(?: |$)")


class ProtocolError(ValueError):
    """The server sent what is no HTTP/1.1 response; `body` is what came of it in the same bytes, before the fault."""

    body = b""


class ResponseReader:
    """Feed received bytes, get body bytes; then `complete` tells whether the response is over.

    `status` is 0 until the head is there; header names are lower case. A body without length ends with the connection:
    tell it by `end_of_input`.
    """

    __slots__ = ("_left", "_mode", "_pending", "_trailer_bytes", "complete", "headers", "reusable", "status")

    def __init__(self) -> None:
        self.status = 0
        self.headers: dict[str, str] = {}
        self.complete = False
        self.reusable = False  # may the connection carry another request once this response is complete?
        self._mode = "head"  # head | length | close | size | chunk | chunk-end | trailer
        self._left = 0  # bytes of body, or of the current chunk, still to come
        self._pending = b""  # an unfinished head or chunk-size line
        self._trailer_bytes = 0

    def feed(self, received: bytes) -> bytes:
        """The body bytes among these. Raises ProtocolError. Bytes after the end of the response forbid reuse."""
        if self._mode == "size" and not self._pending:
            # the path per token: one whole chunk and nothing else
            start = received.find(b"\r\n", 0, 16)
            line = received[:start]
            if start > 0 and line.isalnum() and received[-2:] == b"\r\n":
                try:
                    size = int(line, 16)
                except ValueError:
                    size = -1
                if 0 < size == len(received) - start - 4:
                    return received[start + 2 : -2]
        body: list[bytes] = []
        try:
            self._feed(received, body)
        except ProtocolError as error:
            error.body = b"".join(body)
            raise
        return body[0] if len(body) == 1 else b"".join(body)

    def _feed(self, received: bytes, body: list[bytes]) -> None:
        data = self._pending + received if self._pending else received
        self._pending = b""
        position = 0
        while position < len(data) and not self.complete:
            if self._mode == "chunk" or self._mode == "length":
                piece = data[position : position + self._left]
                position += len(piece)
                self._left -= len(piece)
                body.append(piece)
                if not self._left:
                    if self._mode == "chunk":
                        self._mode = "chunk-end"
                    else:
                        self.complete = True
            elif self._mode == "close":
                body.append(data[position:])
                position = len(data)
            elif self._mode == "head":
                position = self._head(data, position)
            else:
                position = self._chunk_line(data, position)
            if self._pending:
                break
        if self.complete and position < len(data):
            self.reusable = False

    def end_of_input(self) -> None:
        """The server closed the connection. Completes a body without length; any other was cut."""
        if self._mode == "close":
            self.complete = True

    def _head(self, data: bytes, position: int) -> int:
        match = re.compile(rb"\r?\n\r?\n").search(data, position)
        if match is None or match.end() - position > MAX_HEAD_BYTES:
            if len(data) - position > MAX_HEAD_BYTES:
                raise ProtocolError(f"response head of more than {MAX_HEAD_BYTES} bytes")
            self._pending = data[position:]
            return len(data)
        status_line, *lines = re.split(rb"\r?\n", data[position : match.start()])
        found = _STATUS_LINE.match(status_line)
        if found is None:
            raise ProtocolError(f"not an HTTP/1.1 status line: {_quoted(status_line)}")
        status = int(found[1])
        if status < 200 and status != 101:
            return match.end()  # an interim response; the real one follows
        self.status = status
        for line in lines:
            name, colon, value = line.partition(b":")
            if not colon or not name or name != name.strip():
                raise ProtocolError(f"not a header line: {_quoted(line)}")
            self.headers[name.decode("latin-1").lower()] = value.strip().decode("latin-1")
        self._start_body(http_1_0=status_line.startswith(b"HTTP/1.0"))
        return match.end()

    def _start_body(self, *, http_1_0: bool) -> None:
        connection = self.headers.get("connection", "").lower()
        self.reusable = "close" not in connection and not (http_1_0 and "keep-alive" not in connection)
        coding = self.headers.get("transfer-encoding")
        length = self.headers.get("content-length")
        if self.headers.get("content-encoding", "identity").lower() != "identity":
            raise ProtocolError(
                f"a compressed body ({self.headers['content-encoding'][:QUOTED]}), which was not asked for"
            )
        if self.status in (101, 204, 304):
            self.complete = True
        elif coding is not None:
            if coding.lower() != "chunked":
                raise ProtocolError(f"transfer coding {coding[:QUOTED]!r}, which was not asked for")
            self._mode = "size"
        elif length is not None:
            if not re.fullmatch(r"\d{1,15}", length):
                raise ProtocolError(f"content-length {length[:QUOTED]!r}")
            self._mode, self._left = "length", int(length)
            self.complete = self._left == 0
        else:
            self._mode, self.reusable = "close", False

    def _chunk_line(self, data: bytes, position: int) -> int:
        """One line of the chunked coding: a size, the empty line after a chunk, or a trailer."""
        end = data.find(b"\n", position)
        if end < 0:
            if len(data) - position > MAX_CHUNK_LINE_BYTES:
                raise ProtocolError(f"a chunk-size line of more than {MAX_CHUNK_LINE_BYTES} bytes")
            self._pending = data[position:]
            return len(data)
        line = data[position:end]
        if self._mode == "size":
            found = _CHUNK_SIZE.match(line)
            if found is None:
                raise ProtocolError(f"not a chunk size: {_begun(line)}")
            self._left = int(found[1], 16)
            self._mode = "chunk" if self._left else "trailer"
        elif self._mode == "chunk-end":
            if line.rstrip(b"\r"):
                raise ProtocolError(f"a chunk longer than its size: {_begun(line)}")
            self._mode = "size"
        else:
            self._trailer_bytes += len(line)
            if self._trailer_bytes > MAX_TRAILER_BYTES:
                raise ProtocolError(f"trailers of more than {MAX_TRAILER_BYTES} bytes")
            self.complete = not line.rstrip(b"\r")
        return end + 1


def _quoted(line: bytes) -> str:
    return repr(line[:QUOTED])


def _begun(line: bytes) -> str:
    """As much as the native reader keeps of a line. A message ends with it, where a cut key is known as one."""
    return repr(line[:40])[2:-1]


def request_head(host: str, path: str, headers: dict[str, str]) -> bytes:
    """The head of a POST without its Content-Length and final blank line.

    Raises ValueError, which names no value since it may be a secret, for what no header can hold.
    """
    lines = [f"POST {path} HTTP/1.1", f"Host: {host}", *(f"{name}: {value}" for name, value in headers.items())]
    if any(re.search(r"[\r\n\0]", line) for line in lines):
        raise ValueError("a line break or NUL in a request header")
    if any(value != value.strip() for value in headers.values()):
        raise ValueError("blanks around the value of a request header")
    try:
        return "".join(f"{line}\r\n" for line in lines).encode("latin-1")
    except UnicodeEncodeError:
        raise ValueError("a letter beyond latin-1 in a request header") from None
