"""Frames: how finished lines get from a worker to the master, each once, in order, whatever the connection does. Pure.

A worker keeps each frame until the master has said that it has it, and sends it again if that word does not come. The
master takes the next number only: a frame that comes twice, or before one that is missing, is left out. At most CREDIT
frames are under way, so that neither side holds more. What a worker cannot send waits in it, up to HELD_BYTES; beyond
that it has to hold its requests back.
"""

from collections import deque
from collections.abc import Iterator
from typing import Any

import msgspec

FRAME_BYTES = 256 * 1024
CREDIT = 8
HELD_BYTES = 64 * 1024 * 1024
RESEND_S, LONGEST_RESEND_S = 2.0, 16.0


class Frame(msgspec.Struct, frozen=True, kw_only=True):
    """What a worker sends of its run: lines of requests.jsonl and of self_samples.jsonl, and what it says of itself."""

    run: str
    number: int
    lines: bytes = b""
    self_lines: bytes = b""
    said: dict[str, Any] = {}
    begun: int = 0  # requests that the worker had begun when this was sent


class Outbox:
    """A worker's lines on their way to the master."""

    def __init__(self, run: str) -> None:
        self.run = run
        self.lines = self.repeated = 0  # lines put in so far; frames that were sent again
        self.held_bytes = 0  # of lines that the master has not yet said to have
        self._waiting: deque[tuple[bytes, bool]] = deque()  # line, is it of self_samples.jsonl?
        self._said: dict[str, Any] = {}
        self._under_way: deque[Frame] = deque()
        self._number = 0
        self._resend_at, self._resend_s = 0.0, RESEND_S

    def put(self, line: bytes) -> None:
        """A finished line of requests.jsonl."""
        self.lines += 1
        self._wait(line, of_self=False)

    def put_self(self, line: bytes) -> None:
        """A finished line of self_samples.jsonl."""
        self._wait(line, of_self=True)

    def say(self, **said: Any) -> None:
        """Something that must not be lost: it comes after all lines that were put before it."""
        self._said |= said

    def _wait(self, line: bytes, *, of_self: bool) -> None:
        self._waiting.append((line, of_self))
        self.held_bytes += len(line)

    @property
    def is_empty(self) -> bool:
        """Has the master all?"""
        return not (self._waiting or self._said or self._under_way)

    def due(self, now: float) -> Iterator[Frame]:
        """The frames to be sent now (seconds, any clock): all under way again if the master's word is overdue, and new
        ones as far as the credit goes.
        """
        if self._under_way and now >= self._resend_at:
            self._resend_s = min(2 * self._resend_s, LONGEST_RESEND_S)
            self._resend_at = now + self._resend_s
            self.repeated += len(self._under_way)
            yield from list(self._under_way)
        while (self._waiting or self._said) and len(self._under_way) < CREDIT:
            if not self._under_way:
                self._resend_at = now + self._resend_s
            frame = self._next()
            self._under_way.append(frame)
            yield frame

    def _next(self) -> Frame:
        pieces: tuple[list[bytes], list[bytes]] = [], []
        size = 0
        while self._waiting and (not size or size + len(self._waiting[0][0]) <= FRAME_BYTES):
            line, of_self = self._waiting.popleft()
            pieces[of_self].append(line)
            size += len(line)
        said = {} if self._waiting else self._said
        if said:
            self._said = {}
        self._number += 1
        lines, self_lines = map(b"".join, pieces)
        return Frame(run=self.run, number=self._number, lines=lines, self_lines=self_lines, said=said)

    def acknowledge(self, number: int, now: float) -> None:
        """The master has all frames up to this number."""
        while self._under_way and self._under_way[0].number <= number:
            frame = self._under_way.popleft()
            self.held_bytes -= len(frame.lines) + len(frame.self_lines)
            self._resend_s = RESEND_S
            self._resend_at = now + RESEND_S


class Inbox:
    """What the master has of one worker."""

    def __init__(self) -> None:
        self.number = 0  # of the last frame that was taken: what the worker is told
        self.lines = self.repeated = 0

    def is_next(self, frame: Frame) -> bool:
        """If not, it came twice, or one before it is missing and all will come again."""
        return frame.number == self.number + 1

    def take(self, frame: Frame) -> bool:
        """Count it, if it is the next one."""
        if not self.is_next(frame):
            self.repeated += frame.number <= self.number
            return False
        self.number += 1
        self.lines += frame.lines.count(b"\n")
        return True
