"""What the events of a stream mean: JSON payload -> chunks, and a whole stream -> the stream fields of a record.

Covers the chat and completions streams of vLLM, TGI, transformers serve, SGLang, llama.cpp and OpenAI, and TGI's own
/generate_stream. They differ in: when a role-only chunk comes, on which chunk finish reason and usage ride, the name of
reasoning text, whether [DONE] is sent, and the shape of an error event. Pure; runs after the stream has ended, so that
nothing is parsed while others stream.
"""

from collections.abc import Iterable, Iterator
from itertools import accumulate
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from twoclocks.record import TOKEN_KINDS, Kind, TokenSource
from twoclocks.sse import MAX_EVENT_BYTES, EventTooLong, SseDecoder

MAX_CHUNKS = 2**18
"""More than any model answers; a hostile stream must not hold the others up."""


class _Delta(msgspec.Struct, gc=False):  # as its neighbours: what JSON makes has no cycles
    role: Any = None
    content: Any = None
    reasoning: Any = None  # vLLM from 0.16; before, and elsewhere, reasoning_content
    reasoning_content: Any = None
    tool_calls: Any = None
    function_call: Any = None


class _Choice(msgspec.Struct, gc=False):
    index: Annotated[int, Meta(ge=0, lt=2**15)] = 0
    delta: _Delta | None = None
    text: str | None = None
    finish_reason: str | None = None


class _TgiToken(msgspec.Struct, gc=False):
    text: str = ""
    special: bool = False


class _TgiDetails(msgspec.Struct, gc=False):
    finish_reason: str | None = None
    generated_tokens: Any = None
    input_length: Any = None


class _Payload(msgspec.Struct, gc=False):
    choices: Annotated[list[_Choice], Meta(max_length=128)] | None = None
    usage: dict[str, Any] | None = None
    error: Any = None
    metrics: dict[str, Any] | None = None  # vLLM --enable-per-request-metrics
    timings: dict[str, Any] | None = None  # llama.cpp
    token: _TgiToken | None = None  # TGI's own /generate_stream, as the two below
    generated_text: str | None = None
    details: _TgiDetails | None = None


_decode_payload = msgspec.json.Decoder(_Payload).decode


class Chunk(msgspec.Struct, frozen=True, gc=False):
    """What one event brought for one choice."""

    kind: Kind
    choice: int = 0
    text: str = ""
    finish_reason: str | None = None


class Event(msgspec.Struct, frozen=True, gc=False):
    """One event of the stream: its chunks (one a choice), and what it said of the request as a whole."""

    chunks: list[Chunk]
    usage: dict[str, Any] | None = None
    server: dict[str, Any] | None = None
    error: str | None = None
    malformed: str | None = None
    done: bool = False


def parse_event(data: bytes) -> Event:
    """The meaning of one event's data; never raises."""
    if data == b"[DONE]":
        return Event([], done=True)
    try:
        payload = _decode_payload(data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        if data.lstrip().startswith(b'{"error"'):  # transformers puts messages into its error event unescaped
            return Event([], error=data.decode("utf-8", "replace"))
        return Event([], malformed=f"{error}: {data[:200].decode('utf-8', 'replace')}")
    if payload.error is not None:
        return Event([], error=_error_message(payload.error))
    if payload.token is not None:
        return _tgi_event(payload.token, payload)
    choices, usage = payload.choices, payload.usage
    if not choices:
        chunks = [Chunk("usage" if usage is not None else "empty")]
    elif len(choices) == 1:  # without the call that a comprehension is: this is the path per token
        chunks = [_chunk(choices[0], usage is not None)]
    else:
        chunks = [_chunk(choice, usage is not None) for choice in choices]
    return Event(chunks, usage, payload.metrics or payload.timings)


def _chunk(choice: _Choice, has_usage: bool) -> Chunk:
    """Kinds in order of precedence: tool > reasoning > content > role > usage > finish > empty.

    Usage beside a choice makes a usage chunk only at the finish (transformers); before it, it is the running count that
    vLLM puts on every chunk.
    """
    delta = choice.delta or _Delta()
    content = delta.content if choice.delta is not None else choice.text
    reasoning = delta.reasoning or delta.reasoning_content
    kind: Kind
    if delta.tool_calls or delta.function_call:
        kind = "tool"
    elif reasoning:
        kind = "reasoning"
    elif content:
        kind = "content"
    elif delta.role:
        kind = "role"
    elif choice.finish_reason is not None:
        kind = "usage" if has_usage else "finish"
    else:
        kind = "empty"
    text = content if isinstance(content, str) else ""
    return Chunk(kind, choice.index, text, choice.finish_reason)


def _tgi_event(token: _TgiToken, payload: _Payload) -> Event:
    """One token of TGI's /generate_stream; the last one brings the whole text, and details if asked for."""
    details = payload.details or _TgiDetails()
    finish_reason = (details.finish_reason or "stop") if payload.generated_text is not None else None
    kind: Kind = "content" if token.text and not token.special else "finish" if finish_reason else "empty"
    text = "" if token.special else token.text
    counts = {"completion_tokens": details.generated_tokens, "prompt_tokens": details.input_length}
    return Event([Chunk(kind, 0, text, finish_reason)], usage=counts if payload.details else None)


def _error_message(error: Any) -> str:
    """The text of an error event: {"error": {"message": ...}} or {"error": "..."}."""
    if isinstance(error, dict) and isinstance(error.get("message"), str):
        return str(error["message"])
    return error if isinstance(error, str) else msgspec.json.encode(error).decode()


class Stream(msgspec.Struct, frozen=True, kw_only=True):
    """A whole stream. Lists have one item a chunk; times are integer nanoseconds on the caller's clock."""

    arrived_ns: list[int]
    kinds: list[Kind]
    choices: list[int]
    tokens: list[int | None] | None  # None: every token chunk carries one, every other chunk none
    reads_merged: int
    prompt_tokens: int | None
    output_tokens: int | None
    cached_tokens: int | None
    token_source: TokenSource | None
    finish_reason: str | None
    text: str
    server: dict[str, Any] | None
    ended: bool  # [DONE] or a finish reason came: the answer is whole
    error: str | None  # text of an error event
    malformed: str | None  # the first event that was no JSON of the expected form, and why


def read_stream(reads: Iterable[tuple[int, bytes]]) -> Stream:
    """Digest the body of a stream, given as (time in ns, body bytes) of each read.

    An event has arrived with the read that brought its last byte. The result does not depend on how the bytes were
    split into reads, but for the times and `reads_merged`.
    """
    reads = list(reads)
    times = [at for at, _ in reads]
    times += times[-1:]  # of the event that the end of the stream completed
    arrived: list[int] = []
    chunks: list[Chunk] = []
    running: list[int | None] = []  # completion tokens so far, as told on each chunk
    usage: dict[str, Any] = {}
    server: dict[str, Any] | None = None
    error = malformed = None
    done = False
    merged = 0
    last_read, last_is_merged = -1, False  # of the last token event
    try:
        for data, read in _events(reads):
            event = parse_event(data)
            if not event.chunks:
                error = error or event.error
                malformed = malformed or event.malformed
                done = done or event.done
                continue
            if len(chunks) > MAX_CHUNKS:
                malformed = f"an answer of more than {MAX_CHUNKS} chunks"
                break
            count = _count(event.usage, "completion_tokens") if event.usage else None
            is_token = False
            for chunk in event.chunks:
                chunks.append(chunk)
                arrived.append(times[read])
                running.append(count)
                is_token = is_token or chunk.kind in TOKEN_KINDS
            if is_token:
                is_merged = read == last_read
                merged += is_merged and not last_is_merged
                last_read, last_is_merged = read, is_merged
            usage = event.usage or usage
            server = event.server or server
    except EventTooLong as too_long:
        malformed = malformed or str(too_long)

    finish_reasons = {chunk.choice: chunk.finish_reason for chunk in chunks if chunk.finish_reason is not None}
    tokens, output_tokens, token_source = _count_tokens(chunks, running, usage, set(finish_reasons.values()))
    details = usage.get("prompt_tokens_details")
    return Stream(
        arrived_ns=arrived,
        kinds=[chunk.kind for chunk in chunks],
        choices=[chunk.choice for chunk in chunks],
        tokens=tokens,
        reads_merged=merged,
        prompt_tokens=_count(usage, "prompt_tokens"),
        output_tokens=output_tokens,
        cached_tokens=_count(details if isinstance(details, dict) else {}, "cached_tokens"),
        token_source=token_source,
        finish_reason=next(iter(finish_reasons.values()), None),
        text="".join(chunk.text for chunk in chunks),
        server=server,
        ended=done or (bool(finish_reasons) and finish_reasons.keys() >= {c.choice for c in chunks if c.text}),
        error=error,
        malformed=malformed,
    )


def _events(reads: list[tuple[int, bytes]]) -> Iterator[tuple[bytes, int]]:
    """(data, index of the read that brought its last byte) of each event; index len(reads): the end of the stream did.

    The same as SseDecoder, in fewer steps for what every stream looks like. Raises EventTooLong.
    """
    body = b"".join([received for _, received in reads])
    if b"\r" in body or len(body) > MAX_EVENT_BYTES:
        decoder = SseDecoder()
        for read, (_, received) in enumerate(reads):
            for data in decoder.feed(received):
                yield data, read
        for data in decoder.flush():
            yield data, len(reads)
        return
    ends = [*accumulate(len(received) for _, received in reads), len(body) + 2]
    read = position = 0
    for block in body.split(b"\n\n"):
        position += len(block) + 2
        while ends[read] < position:
            read += 1
        if block.startswith(b"data: ") and b"\n" not in block:
            yield block[6:], read
        elif lines := [line[5:].removeprefix(b" ") for line in block.split(b"\n") if line.startswith(b"data:")]:
            yield b"\n".join(lines), read


def _count(usage: dict[str, Any] | None, key: str) -> int | None:
    """A token count that can be one: usage may lie, and a negative, fractional or absurd count is no count."""
    value = (usage or {}).get(key)
    return value if type(value) is int and 0 <= value < 2**53 else None


def _count_tokens(
    chunks: list[Chunk], running: list[int | None], usage: dict[str, Any], finish_reasons: set[str | None]
) -> tuple[list[int | None] | None, int | None, TokenSource | None]:
    """Tokens of each chunk, of the whole answer, and where the count comes from."""
    token_chunks = {index for index, chunk in enumerate(chunks) if chunk.kind in TOKEN_KINDS}
    last: dict[int, int] = {}  # running count of each choice
    per_chunk: list[int | None] = [0] * len(chunks)
    is_told = running.count(None) < len(running)
    for index, (chunk, count) in enumerate(zip(chunks, running, strict=True) if is_told else ()):
        if chunk.kind in TOKEN_KINDS or chunk.finish_reason is not None or chunk.kind == "empty":
            per_chunk[index] = None if count is None else max(0, count - last.get(chunk.choice, 0))
            if count is not None:
                last[chunk.choice] = count
    # usage at the end alone is no running count; and an answer may be tokens without text from beginning to end
    told = any(
        count is not None and chunk.finish_reason is None and chunk.kind != "usage"
        for chunk, count in zip(chunks, running, strict=True)
    )
    is_running = told and all(running[index] is not None for index in token_chunks)
    total = _count(usage, "completion_tokens")
    if is_running:
        plain = all(count == (index in token_chunks) for index, count in enumerate(per_chunk))
        whole = total if total is not None and total >= sum(last.values()) else sum(last.values())
        return (None if plain else per_chunk), whole, "per-chunk usage"
    if not token_chunks and total is None:
        return None, None, None
    if total is None:
        return None, len(token_chunks), "chunks"
    # the end token is counted in usage and has no text, so no chunk of its own
    silent_end = finish_reasons <= {"stop", "eos_token"} and total == len(token_chunks) + 1
    if total == len(token_chunks) or silent_end:
        return None, total, "usage"
    return [None if index in token_chunks else 0 for index in range(len(chunks))], total, "usage"
