"""The record: one line of requests.jsonl, the boundary between running and analysing.

The stream client makes records, the run folder stores them, the analysis reads them. Times are seconds since the run's
start on the master's monotonic clock; run.json anchors that clock to wall time. Nothing that can be computed is stored.
"""

from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

import msgspec

T = TypeVar("T")

Phase = Literal["warmup", "measure", "drain"]
Status = Literal["ok", "error", "timeout", "cancelled", "truncated"]
Kind = Literal["role", "content", "reasoning", "tool", "empty", "finish", "usage"]
TokenSource = Literal["usage", "per-chunk usage", "tokenizer", "chunks"]

KINDS: tuple[Kind, ...] = get_args(Kind)

TOKEN_KINDS: tuple[Kind, ...] = ("content", "reasoning", "tool")
"""Kinds of chunk that carry tokens a reader sees. A role-only, empty, finish or usage chunk never counts as a token."""

STOPPED, HUNG_UP, GAVE_UP = "stopped", "hung_up", "gave_up"
"""error_kind of status cancelled: cut off by the run's end, or left by its user as the workload asks: as drawn by
workload.cancel_share, or for want of a first token within workload.patience_s."""
TOO_LONG = "context_length"
"""error_kind of a request that the server refused since prompt and answer do not fit the model's context."""
NO_FILES = "no_file_handle"
"""error_kind of a request for which the tester itself had no file handle left; the server never saw it."""
LEFT = (HUNG_UP, GAVE_UP)
"""Left by their user: no failures of the server, and counted apart everywhere."""


class Record(msgspec.Struct, frozen=True, kw_only=True):
    """What happened to one request. Seconds on the run's clock unless the name says otherwise; None where unknown."""

    request_id: str  # 32 hex digits, sent as X-Request-Id and used as the trace id; unique per attempt
    target: str  # the target's name, else its kind
    prompt_id: str  # of the request file; with a mix NAME/ID
    session: str | None = None  # which conversation, another one each time that it is played
    turn: int | None = None  # which of its turns, from 0
    user: int  # which of the worker's users sent it
    worker: int  # which process sent it; 0 without workers
    phase: Phase  # by when it was sent; drain: after the measuring window
    intended_at: float  # when it was due; in a closed loop, when its user was ready
    connect_started_at: float | None = None  # None on a reused connection
    connected_at: float | None = None  # TLS handshake included
    sent_at: float | None = None  # just before the first byte was written; None if that point was never reached
    written_at: float | None = None  # the last byte was handed to the kernel
    first_byte_at: float | None = None  # of the answer, its head included
    ended_at: float  # the answer was whole, or given up
    attempt: int = 1  # at what its user asks for: 2 is the first retry
    first_attempt_id: str | None = None  # request_id of the first attempt; None on that one itself
    retry_after_s: float | None = None  # how long a server that refused asked to be left alone
    chunk_us: list[int] = []  # first chunk's offset from sent_at, then the gap to each next one; microseconds
    chunk_tokens: list[int | None] | None = None  # None: every token chunk carries one, every other chunk none
    chunk_kinds: list[tuple[Kind, int]] = []  # run lengths
    chunk_choice: list[tuple[int, int]] | None = None  # run lengths of the choice index; None with one choice
    timestamp_source: Literal["kernel", "user"] = "user"  # kernel: every read, or it waited for a lost segment
    reads_merged: int = 0  # reads that carried several token chunks, whose own times are therefore lost
    max_tokens: int | None = None  # what the request allowed
    expected_output_tokens: int | None = None  # what the request file said of the answer
    prompt_tokens: int | None = None  # by the server's count
    output_tokens: int | None = None  # by token_source
    cached_tokens: int | None = None  # prompt tokens that the server says it had in its prefix cache
    token_source: TokenSource | None = None  # where output_tokens is from; chunks: a chunk was taken for a token
    finish_reason: str | None = None  # as the server told it, of the first choice
    http_status: int | None = None  # None if no head came
    status: Status  # truncated: the stream ended without its end; cancelled: by us, or by its user
    error_kind: str | None = None  # set whenever status is not ok
    error_message: str | None = None  # what the server or the system said, keys masked
    output_text: str | None = None  # only when asked for
    server: dict[str, Any] | None = None  # the in-band timings, verbatim


_encoder = msgspec.json.Encoder()
_decoder = msgspec.json.Decoder(Record)


def encode_record(record: Record) -> bytes:
    """The record as one line of JSON, newline included."""
    return _encoder.encode(record) + b"\n"


def decode_records(lines: bytes) -> list[Record]:
    """The records in whole lines of a requests.jsonl. Raises msgspec.MsgspecError."""
    return _decoder.decode_lines(lines)


def read_records(path: Path) -> Iterator[Record]:
    """The records of a requests.jsonl, in file order.

    A last line without its newline was being written when the run was killed; it is left out. Any other line that is no
    record raises msgspec.ValidationError or msgspec.DecodeError.
    """
    with path.open("rb") as file:
        for line in file:
            if line.endswith(b"\n"):
                yield _decoder.decode(line)


def run_lengths(values: Iterable[T]) -> list[tuple[T, int]]:
    """[a, a, b] -> [(a, 2), (b, 1)]."""
    return [(value, len(list(run))) for value, run in groupby(values)]


def expand(runs: Iterable[tuple[T, int]]) -> list[T]:
    """[(a, 2), (b, 1)] -> [a, a, b]."""
    return [value for value, count in runs for _ in range(count)]


def token_span_s(chunk_us: Sequence[int], chunk_kinds: Iterable[tuple[Kind, int]]) -> tuple[float, float] | None:
    """First and last token chunk, in seconds since sent_at; None if no token came."""
    first = until = chunks = 0
    for kind, run in chunk_kinds:
        if kind in TOKEN_KINDS:
            first = first or chunks + 1
            until = chunks + run
        chunks += run
    return (sum(chunk_us[:first]) / 1e6, sum(chunk_us[:until]) / 1e6) if first else None
