"""What _native.c offers; native.py says how it is used. All times are ns of time.monotonic_ns()."""

class Reader:
    """Receives the responses of many sockets. OSError where the system refuses a descriptor, ValueError once closed."""

    def __new__(cls, threaded: bool, pause_ns: int) -> Reader:
        """With a thread of its own, which rests pause_ns a running stream between two turns; or driven by poll()."""

    def fileno(self) -> int: ...
    def add(self, fd: int, total_ns: int, first_token_ns: int, idle_ns: int, /) -> int:
        """Read the answer to the request just written to `fd`: two deadlines, the longest silence. Returns a token."""

    def poll(self) -> list[int]:
        """Tokens of the responses that ended since the last call; without a thread, also reads what is there."""

    def collect(self, token: int, /) -> tuple[str, bytes, bytes, list[int], list[int], bytes, int, int, int, bool, int]:
        """The arguments of native.as_received; a stream that still runs is given up. KeyError: no such stream."""

    def progress(self) -> list[tuple[int, int, int, bool]]:
        """(token, reads so far, body bytes so far, has the first token come) of each running stream."""

    def close(self) -> None: ...
