"""The known schedule: when a stream sends what, and its bytes. Pure; clock and sockets are `schedule_server`'s."""

import functools
import json
import random
from dataclasses import dataclass
from typing import Literal

MODEL = "known-schedule"
USAGE_WIDTH = 9  # digits, padded with blanks, so that an event is as long whatever it counts
HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\ntransfer-encoding: chunked\r\n\r\n"

RolePlace = Literal["with-first", "at-once", "none"]


@dataclass(frozen=True)
class Schedule:
    """When a stream sends what."""

    ttft_ms: float = 100.0  # from the request's arrival to the first write
    tpot_ms: float = 20.0  # a token; 0: flat out, each write as soon as the socket takes it
    chunk_tokens: int = 1  # tokens in one event
    write_chunks: int = 1  # events in one write
    role: RolePlace = "with-first"  # the role chunk: in the first write, as soon as the request is read, or never
    jitter_ms: float = 0.0  # each write is due up to so much earlier or later, evenly drawn
    seed: int = 1

    def due_ns(self, tokens: int, request: int) -> list[int]:
        """When each write is due, in ns from the request's arrival. Ascending; the same for the same seed and request.

        due[k] = ttft + k * tpot * chunk_tokens * write_chunks + jitter
        """
        per_write = self.chunk_tokens * self.write_chunks
        gap = self.tpot_ms * per_write
        times = [self.ttft_ms + index * gap for index in range(-(-tokens // per_write))]
        if self.jitter_ms:
            rng = random.Random(f"{self.seed}/{request}")
            times = sorted(max(0.0, at + rng.uniform(-self.jitter_ms, self.jitter_ms)) for at in times)
        return [round(at * 1e6) for at in times]


@dataclass(frozen=True)
class Answer:
    """The bytes of a stream: write k is ``tail.join(writes[k])``, each piece followed by the tail.

    The pieces are shared by all requests of a kind; the tail, of fixed length, is what differs between them.
    """

    writes: list[tuple[bytes, ...]]
    counts: list[int]  # token events in each write


@functools.lru_cache(maxsize=64)
def make_answer(api: str, tokens: int, running_usage: bool, schedule: Schedule) -> Answer:
    """The pieces of the answer; the head and role chunk are in the first write, usage and end in no write."""
    events, left = [], tokens
    while left > 0:
        count = min(schedule.chunk_tokens, left)
        left -= count
        reason = b"null" if left else b'"length"'
        events.append(make_event(api, b'"content":"%b"' % (b" word" * count), reason, running_usage, tokens - left))
    size = schedule.write_chunks
    groups = [tuple(events[index : index + size]) for index in range(0, len(events), size)]
    counts = [len(group) for group in groups]
    if schedule.role == "with-first":
        groups[0] = (HEAD + make_event(api, b'"role":"assistant","content":""', b"null", running_usage, 0), *groups[0])
    elif schedule.role == "none":
        groups[0] = (HEAD + groups[0][0], *groups[0][1:])
    return Answer([(*group, b"") for group in groups], counts)


def make_event(api: str, delta: bytes, reason: bytes, running_usage: bool, tokens: int) -> bytes:
    """One event as an HTTP chunk, up to where its tail begins."""
    text = b'"delta":{%b}' % delta if api == "chat" else b'"text":"%b"' % delta.rpartition(b":")[2].strip(b'"')
    body = (
        b'data: {"id":"cmpl-0123456789abcdef0123456789abcdef","object":"chat.completion.chunk","created":1700000000,'
        b'"model":"%b","choices":[{"index":0,%b,"logprobs":null,"finish_reason":%b,"token_ids":null}]'
    ) % (MODEL.encode(), text, reason)
    if running_usage:
        body += b',"usage":{"completion_tokens":%d,"prompt_tokens":' % tokens
    return b"%x\r\n%b" % (len(body) + len(make_tail(running_usage, 0)) - 2, body)


def make_tail(running_usage: bool, prompt_tokens: int) -> bytes:
    """What ends each event of a stream; as long for any prompt."""
    return (b"%*d}}\n\n\r\n" % (USAGE_WIDTH, prompt_tokens)) if running_usage else b"}\n\n\r\n"


def make_end(usage: bool, tokens: int, prompt_tokens: int) -> bytes:
    """The usage chunk, if it was asked for, [DONE], and the end of the HTTP body."""
    body = b"data: [DONE]\n\n"
    end = b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body)
    if not usage:
        return end
    counts = {"prompt_tokens": prompt_tokens, "completion_tokens": tokens, "total_tokens": prompt_tokens + tokens}
    body = b"data: %b\n\n" % json.dumps({"id": "cmpl-0", "model": MODEL, "choices": [], "usage": counts}).encode()
    return b"%x\r\n%b\r\n%b" % (len(body), body, end)
