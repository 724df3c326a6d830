"""What the events of a stream mean: JSON payload -> chunks, and a whole stream -> the stream fields of a record.

Covers the chat and completions streams of vLLM, TGI, transformers serve, SGLang, llama.cpp and OpenAI, and TGI's own
/generate_stream. They differ in: when a role-only chunk comes, on which chunk finish reason and usage ride, the name of
reasoning text, whether [DONE] is sent, and the shape of an error event. Pure; runs after the stream has ended, so that
nothing is parsed while others stream.
"""

from collections import Counter
from itertools import accumulate, compress, pairwise
from typing import Annotated, Any, NamedTuple

import msgspec
from msgspec import Meta

from twoclocks.record import TOKEN_KINDS, Kind, TokenSource
from twoclocks.sse import BOM, MAX_EVENT_BYTES, EventTooLong, SseDecoder

MAX_CHUNKS = 2**18
"""More than any model answers; a hostile stream must not hold the others up."""
MAX_TOKENS = 2**24
"""More than any context holds. A -1 that lost its sign would else be four billion tokens, each of which has an ITL."""
MAX_DEPTH = 8
"""Levels of objects and lists in a server's timings."""


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


class _Usage(msgspec.Struct, gc=False):
    completion_tokens: Any = None
    prompt_tokens: Any = None
    prompt_tokens_details: Any = None


class _Payload(msgspec.Struct, gc=False):
    choices: Annotated[list[_Choice], Meta(max_length=128)] | None = None
    usage: _Usage | None = None
    error: Any = None
    metrics: dict[str, Any] | None = None  # vLLM --enable-per-request-metrics
    timings: dict[str, Any] | None = None  # llama.cpp
    token: _TgiToken | None = None  # TGI's own /generate_stream, as the two below
    generated_text: str | None = None
    details: _TgiDetails | None = None


_decode = msgspec.json.Decoder(_Payload).decode
_NO_DELTA = _Delta()

Chunk = tuple[Kind, int, str, str | None]
"""What one event brought for one choice: kind, index of the choice, text, finish reason."""


def parse_event(data: bytes) -> tuple[list[Chunk], str | None]:
    """The chunks of one event's data (one a choice), and the text of the error that it is; never raises."""
    try:
        payload = _decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return [], None
    if payload.error is not None:
        return [], _error_message(payload.error)
    return _chunks(payload)[0], None


def _chunks(payload: _Payload) -> tuple[list[Chunk], _Usage | None]:
    """Chunks and usage of a payload that is no error."""
    if payload.token is not None:
        return _tgi_chunks(payload.token, payload)
    choices, usage = payload.choices, payload.usage
    if not choices:
        return [("usage" if usage is not None else "empty", 0, "", None)], usage
    if len(choices) == 1:  # without the call that a comprehension is: this is the path per token
        return [_chunk(choices[0], usage is not None)], usage
    return [_chunk(choice, usage is not None) for choice in choices], usage


def _chunk(choice: _Choice, has_usage: bool) -> Chunk:
    """Kinds in order of precedence: tool > reasoning > content > role > usage > finish > empty.

    Usage beside a choice makes a usage chunk only at the finish (transformers); before it, it is the running count that
    vLLM puts on every chunk.
    """
    delta, reason = choice.delta, choice.finish_reason
    if delta is None:
        delta, content = _NO_DELTA, choice.text
    else:
        content = delta.content
    kind: Kind
    if delta.tool_calls or delta.function_call:
        kind = "tool"
    elif delta.reasoning or delta.reasoning_content:
        kind = "reasoning"
    elif content:
        kind = "content"
    elif delta.role:
        kind = "role"
    elif reason is not None:
        kind = "usage" if has_usage else "finish"
    else:
        kind = "empty"
    return kind, choice.index, content if isinstance(content, str) else "", reason


def _tgi_chunks(token: _TgiToken, payload: _Payload) -> tuple[list[Chunk], _Usage | None]:
    """One token of TGI's /generate_stream; the last one brings the whole text, and details if asked for."""
    details = payload.details or _TgiDetails()
    finish_reason = (details.finish_reason or "stop") if payload.generated_text is not None else None
    kind: Kind = "content" if token.text and not token.special else "finish" if finish_reason else "empty"
    usage = _Usage(details.generated_tokens, details.input_length) if payload.details else None
    return [(kind, 0, "" if token.special else token.text, finish_reason)], usage


def _error_message(error: Any) -> str:
    """The text of an error event: {"error": {"message": ...}} or {"error": "..."}."""
    if isinstance(error, dict) and isinstance(error.get("message"), str):
        return str(error["message"])
    return error if isinstance(error, str) else msgspec.json.encode(error).decode()


class _Message(msgspec.Struct, gc=False):
    content: Any = None
    reasoning: Any = None
    reasoning_content: Any = None
    tool_calls: Any = None


class _WholeChoice(msgspec.Struct, gc=False):
    index: Annotated[int, Meta(ge=0, lt=2**15)] = 0
    message: _Message | None = None
    text: str | None = None
    finish_reason: str | None = None
    meta_info: dict[str, Any] | None = None  # SGLang, return_meta_info


class _Whole(msgspec.Struct, gc=False):
    choices: Annotated[list[_WholeChoice], Meta(max_length=128)] = []
    usage: _Usage | None = None
    error: Any = None
    metrics: dict[str, Any] | None = None
    timings: dict[str, Any] | None = None
    meta_info: dict[str, Any] | None = None
    generated_text: str | None = None  # TGI's own /generate
    details: _TgiDetails | None = None


_decode_whole = msgspec.json.Decoder(_Whole).decode


class Body(NamedTuple):
    """The body of a response and when it came: an entry a read that brought some of it."""

    data: bytes
    times: list[int]  # ns on the caller's clock
    ends: list[int]  # bytes of the body that had come by then


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


def read_stream(body: Body) -> Stream:
    """Digest the body of a stream.

    An event has arrived with the read that brought its last byte. The result does not depend on how the bytes were
    split into reads, but for the times and `reads_merged`.
    """
    times = [*body.times, *body.times[-1:]]  # the last of the event that the end of the stream completed
    chunks: list[Chunk] = []
    reads: list[int] = []  # the read that brought each chunk
    token_reads: list[int] = []  # the read that brought each event with a token
    told: list[Any] = []  # completion tokens so far, as told on each chunk
    usage = _Usage()
    server: dict[str, Any] | None = None
    error = malformed = None
    done = False
    events, last_reads, too_long = _events(body)
    for data, read in zip(events, last_reads, strict=True):
        try:
            payload = _decode(data)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as wrong:
            if data == b"[DONE]":
                done = True
            elif data.lstrip().startswith(b'{"error"'):  # transformers puts messages into its error event unescaped
                error = error or data.decode("utf-8", "replace")
            elif data:  # an event without data is none, by the standard
                malformed = malformed or f"{wrong}: {data[:200].decode('utf-8', 'replace')}"
            continue
        if payload.error is not None:
            error = error or _error_message(payload.error)
            continue
        in_event, counts = _chunks(payload)
        count = None
        if counts is not None:
            count = counts.completion_tokens
            if count is not None or counts.prompt_tokens is not None:
                usage = counts
        for chunk in in_event:
            chunks.append(chunk)
            reads.append(read)
            told.append(count)
        if in_event[0][0] in TOKEN_KINDS or (len(in_event) > 1 and any(c[0] in TOKEN_KINDS for c in in_event)):
            token_reads.append(read)
        server = payload.metrics or payload.timings or server
        if len(chunks) > MAX_CHUNKS:
            malformed = malformed or f"an answer of more than {MAX_CHUNKS} chunks"
            break
    malformed = malformed or too_long

    kinds = [chunk[0] for chunk in chunks]
    choices = [chunk[1] for chunk in chunks]
    reasons = [chunk[3] for chunk in chunks]
    tokens, output_tokens, token_source = _count_tokens(kinds, choices, reasons, told, usage)
    finish_reasons = {choice: reason for choice, reason in zip(choices, reasons, strict=True) if reason is not None}
    details = usage.prompt_tokens_details
    merged = 0
    if len(set(token_reads)) < len(token_reads):
        merged = sum(count > 1 for count in Counter(token_reads).values())
    return Stream(
        arrived_ns=[times[read] for read in reads],
        kinds=kinds,
        choices=choices,
        tokens=tokens,
        reads_merged=merged,
        prompt_tokens=_count(usage.prompt_tokens),
        output_tokens=output_tokens,
        cached_tokens=_count(details.get("cached_tokens")) if isinstance(details, dict) else None,
        token_source=token_source,
        finish_reason=next(iter(finish_reasons.values()), None),
        text="".join([chunk[2] for chunk in chunks]),
        server=_shallow(server),
        ended=done or (bool(finish_reasons) and finish_reasons.keys() >= {chunk[1] for chunk in chunks if chunk[2]}),
        error=error,
        malformed=malformed,
    )


def read_answer(body: Body) -> Stream:
    """Digest a whole answer that was not streamed: one chunk a choice, which arrived with the last bytes."""
    error = malformed = None
    whole = _Whole()
    try:
        whole = _decode_whole(body.data)
        error = None if whole.error is None else _error_message(whole.error)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as wrong:
        malformed = f"{wrong}: {body.data[:200].decode('utf-8', 'replace')}"
    choices, usage = whole.choices, whole.usage or _Usage()
    if whole.generated_text is not None:
        details = whole.details or _TgiDetails()
        choices = [_WholeChoice(text=whole.generated_text, finish_reason=details.finish_reason or "stop")]
        usage = _Usage(details.generated_tokens, details.input_length)
    kinds, texts = [], []
    for choice in choices:
        message = choice.message or _Message(content=choice.text)
        reasoning = message.reasoning or message.reasoning_content
        kinds.append(_whole_kind(message.tool_calls, reasoning, message.content))
        texts.append(message.content if isinstance(message.content, str) else "")
    total, prompt = _count(usage.completion_tokens), _count(usage.prompt_tokens)
    details_of_prompt = usage.prompt_tokens_details
    in_choice = next((choice.meta_info for choice in choices if choice.meta_info), None)
    return Stream(
        arrived_ns=body.times[-1:] * len(choices),
        kinds=kinds,
        choices=[choice.index for choice in choices],
        # one answer holds all tokens; of several nobody says how many each holds
        tokens=[total] if len(choices) == 1 else [None] * len(choices),
        reads_merged=0,
        prompt_tokens=prompt,
        output_tokens=total,
        cached_tokens=_count(details_of_prompt.get("cached_tokens")) if isinstance(details_of_prompt, dict) else None,
        token_source=None if total is None else "usage",
        finish_reason=next((choice.finish_reason for choice in choices if choice.finish_reason), None),
        text="".join(texts),
        server=_shallow(whole.metrics or whole.timings or whole.meta_info or in_choice),
        ended=malformed is None and bool(choices),
        error=error,
        malformed=malformed,
    )


def _shallow(told: dict[str, Any] | None) -> dict[str, Any] | None:
    """A server's timings without what is nested deeper than any server does, which could be read but not written."""
    return told and {key: value for key, value in told.items() if _depth_within(value, MAX_DEPTH)}


def _depth_within(value: Any, levels: int) -> bool:
    inside = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return levels > 0 and all(_depth_within(one, levels - 1) for one in inside)


def _whole_kind(tool_calls: Any, reasoning: Any, content: Any) -> Kind:
    return "tool" if tool_calls else "content" if content else "reasoning" if reasoning else "empty"


def _events(body: Body) -> tuple[list[bytes], list[int], str | None]:
    """The data of each event, the read that brought its last byte (of those that the end of the stream completed, the
    number of reads), and what was wrong with the one at which reading ended.

    The same as SseDecoder, in fewer steps for what every stream looks like: lines of data with a blank one after each.
    """
    lines = body.data.split(b"\n")
    if b"\r" in body.data or len(body.data) > MAX_EVENT_BYTES or any(lines[1::2]) or body.data.startswith(BOM):
        return _decoded(body)
    events, reads = [], []
    ends = [*body.ends, len(body.data) + 2]
    read = position = 0
    for line in lines[::2]:
        position += len(line) + 2
        while ends[read] < position:
            read += 1
        if line.startswith(b"data: "):
            events.append(line[6:])
            reads.append(read)
        elif line.startswith(b"data:"):
            events.append(line[5:])
            reads.append(read)
    return events, reads, None


def _decoded(body: Body) -> tuple[list[bytes], list[int], str | None]:
    """The same by SseDecoder."""
    decoder, events, reads = SseDecoder(), [], []
    try:
        for read, (start, end) in enumerate(pairwise([0, *body.ends])):
            for event in decoder.feed(body.data[start:end]):
                events.append(event)
                reads.append(read)
        for event in decoder.flush():
            events.append(event)
            reads.append(len(body.ends))
    except EventTooLong as too_long:
        return events, reads, str(too_long)
    return events, reads, None


def _count(value: Any) -> int | None:
    """A token count that can be one: usage may lie, and a negative, fractional or absurd count is no count."""
    return value if type(value) is int and 0 <= value <= MAX_TOKENS else None


def _count_tokens(
    kinds: list[Kind],
    choices: list[int],
    reasons: list[str | None],
    told: list[Any],
    usage: _Usage,
) -> tuple[list[int | None] | None, int | None, TokenSource | None]:
    """Tokens of each chunk, of the whole answer, and where the count comes from.

    `told`: the completion tokens so far that the server told on each chunk, not yet believed.
    """
    is_token = [kind in TOKEN_KINDS for kind in kinds]
    token_chunks = sum(is_token)
    total = _count(usage.completion_tokens)
    one_each = not any(choices) and told == [*accumulate(is_token)]
    running = told if one_each else [_count(count) for count in told]
    # usage at the end alone is no running count; and an answer may be tokens without text from beginning to end
    before_the_end = zip(running, kinds, reasons, strict=True)
    if any(count is not None and reason is None and kind != "usage" for count, kind, reason in before_the_end):
        if one_each:
            return None, max(token_chunks, total or 0), "per-chunk usage"
        if None not in compress(running, is_token):
            per_chunk, last = _running_tokens(kinds, choices, reasons, running)
            plain = all(count == expected for count, expected in zip(per_chunk, is_token, strict=True))
            return (None if plain else per_chunk), max(last, total or 0), "per-chunk usage"
    if not token_chunks and total is None:
        return None, None, None
    if total is None:
        return None, token_chunks, "chunks"
    # the end token is counted in usage and has no text, so no chunk of its own
    silent_end = {*reasons} <= {None, "stop", "eos_token"} and total == token_chunks + 1
    if total == token_chunks or silent_end:
        return None, total, "usage"
    return [None if token else 0 for token in is_token], total, "usage"


def _running_tokens(
    kinds: list[Kind], choices: list[int], reasons: list[str | None], running: list[int | None]
) -> tuple[list[int | None], int]:
    """By how much each chunk raised the running count of its choice, and the last counts of all choices."""
    last: dict[int, int] = {}
    per_chunk: list[int | None] = [0] * len(kinds)
    for index, (kind, choice, reason, count) in enumerate(zip(kinds, choices, reasons, running, strict=True)):
        if kind in TOKEN_KINDS or reason is not None or kind == "empty":
            per_chunk[index] = None if count is None else max(0, count - last.get(choice, 0))
            if count is not None:
                last[choice] = count
    return per_chunk, sum(last.values())
