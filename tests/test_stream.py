"""sse, http1 and dialect: from bytes to meaning, under any split of the bytes."""

import ast
import itertools
import json
from pathlib import Path

import pytest
from fake_server import DONE, chunked, delta, event, usage, words
from hypothesis import given
from hypothesis import strategies as st

from twoclocks.dialect import MAX_CHUNKS, Body, _events, parse_event
from twoclocks.dialect import read_stream as read_body
from twoclocks.http1 import ProtocolError, ResponseReader, request_head
from twoclocks.masks import redact
from twoclocks.record import expand, run_lengths
from twoclocks.sse import BOM, MAX_EVENT_BYTES, EventTooLong, SseDecoder

RECORDED = Path(__file__).parent / "data" / "recorded"
ROLE = delta(role="assistant", content="")


def split_at(data: bytes, cuts) -> list[bytes]:
    marks = [0, *sorted({cut % (len(data) + 1) for cut in cuts}), len(data)]
    return [data[start:end] for start, end in itertools.pairwise(marks)]


def decode(pieces) -> list[bytes]:
    decoder = SseDecoder()
    return [data for piece in pieces for data in decoder.feed(piece)] + list(decoder.flush())


def body_of(reads) -> Body:
    """A body as readers bring it, of (time in ns, bytes) of each read."""
    reads = [one for one in reads if one[1]]
    ends = itertools.accumulate(len(data) for _, data in reads)
    return Body(b"".join(data for _, data in reads), [at for at, _ in reads], [*ends])


def read_stream(reads):
    return read_body(body_of(reads))


def read(*events: bytes):
    return read_stream([(index, one) for index, one in enumerate(events)])


# server-sent events

HOSTILE = (
    "\ufeffdata: 日本🙂\n\n: comment\n\ndata:no space\r\n\r\nevent: x\nid: 1\ndata: two\ndata: lines\n\ndata\n\n"
    "retry: 5\n\ndata: a\u2028b\x0bc\x85d\rdata: after a lone CR\r\rdata:\n\ndata: last without its blank line"
).encode()
EXPECTED = [
    "日本🙂",
    "no space",
    "two\nlines",
    "a\u2028b\x0bc\x85d\nafter a lone CR",
    "",
    "last without its blank line",
]


@given(st.lists(st.integers(0, len(HOSTILE)), max_size=30))
def test_events_do_not_depend_on_the_split(cuts):
    assert [data.decode() for data in decode(split_at(HOSTILE, cuts))] == EXPECTED


def test_events_byte_by_byte():
    assert [data.decode() for data in decode(bytes([byte]) for byte in HOSTILE)] == EXPECTED


PIECES = [BOM, b"data: a", b"data:b", b"data:", b"data", b": c", b"event: x", b"\n", b"\n\n", b"\n\n\n", b" ", b"\r\n"]


@given(st.lists(st.sampled_from(PIECES), max_size=30), st.lists(st.integers(0, 300), max_size=10))
def test_events_of_a_whole_stream_are_those_of_the_decoder(pieces, cuts):
    """dialect reads most streams in fewer steps; which event a read completed must not depend on that."""
    for body in (b"".join(pieces), b"".join(pieces).replace(b"\r", b"")):
        reads, decoder = [piece for piece in split_at(body, cuts) if piece], SseDecoder()
        expected = [(data, index) for index, piece in enumerate(reads) for data in decoder.feed(piece)]
        expected += [(data, len(reads)) for data in decoder.flush()]

        events, last_reads, wrong = _events(body_of([(0, piece) for piece in reads]))
        assert (list(zip(events, last_reads, strict=True)), wrong) == (expected, None)


def test_neither_a_mark_at_the_beginning_nor_an_event_without_data_changes_an_answer():
    one, other = words(2)
    plain = read_stream([(0, one), (1, other), (2, DONE)])

    assert read_stream([(0, BOM + one), (1, b"data:\n\n" + other), (2, b"event: ping\ndata: \n\n" + DONE)]) == plain
    assert (plain.output_tokens, plain.ended, plain.malformed) == (2, True, None)


@pytest.mark.parametrize("line", [b"data: ", b": ", b""])
def test_an_endless_event_is_refused(line):
    decoder = SseDecoder()
    with pytest.raises(EventTooLong):
        for piece in [line, *[b"x" * 65536] * (MAX_EVENT_BYTES // 65536 + 1)]:
            list(decoder.feed(piece))


def test_endless_data_lines_without_an_event_are_refused():
    decoder = SseDecoder()
    with pytest.raises(EventTooLong):
        for _ in range(MAX_EVENT_BYTES // 1000 + 1):
            list(decoder.feed(b"data: " + b"x" * 1000 + b"\n"))


def test_comments_for_ever_are_no_endless_event():
    decoder = SseDecoder()
    for _ in range(2 * MAX_EVENT_BYTES // 1000):
        assert list(decoder.feed(b": " + b"x" * 1000 + b"\n\n")) == []


# HTTP

RESPONSE = (
    b"HTTP/1.1 100 Continue\r\n\r\n"
    b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
    + b"5;ext=1\r\nhello\r\n"
    + chunked(b" world" * 50)
    + b"0\r\nX-Trailer: 1\r\n\r\n"
)


@given(st.lists(st.integers(0, len(RESPONSE)), max_size=30))
def test_a_body_does_not_depend_on_the_split(cuts):
    reader = ResponseReader()
    body = b"".join(reader.feed(piece) for piece in split_at(RESPONSE, cuts))

    assert body == b"hello" + b" world" * 50
    assert (reader.status, reader.complete, reader.reusable) == (200, True, True)
    assert reader.headers["content-type"] == "text/event-stream"


@pytest.mark.parametrize("filler", [22, 62, 18_000])
@pytest.mark.parametrize(
    "data",
    [
        b"%s\r\n\r\n",
        b"HTTP/1.1 200 OK\r\n%s\r\n\r\n",
        b"HTTP/1.1 200 OK\r\ncontent-encoding: %s\r\n\r\n",
        b"HTTP/1.1 200 OK\r\ncontent-length: %s\r\n\r\n",
        b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n%s\r\n",
        b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n1\r\nx%s\r\n",
    ],
)
def test_what_is_quoted_of_a_server_holds_no_part_of_a_key(data, filler):
    key = "sk-" + "0123456789" * 3
    with pytest.raises(ProtocolError) as caught:
        ResponseReader().feed(data % (b"x" * filler + key.encode() + b" and more"))

    assert "x" * 22 in str(caught.value)
    assert key[:8] not in redact(str(caught.value), [key])


@given(st.binary(max_size=300))
def test_no_bytes_crash_the_reader(data):
    reader = ResponseReader()
    try:
        reader.feed(data)
        reader.feed(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n" + data)
    except ProtocolError:
        return
    assert reader.status in (0, *range(100, 600))


@pytest.mark.parametrize(
    ("head", "complete_at_end", "reusable"),
    [
        (b"HTTP/1.1 200 OK\r\ncontent-length: 3\r\n\r\nabc", True, True),
        (b"HTTP/1.1 200 OK\r\ncontent-length: 3\r\nConnection: close\r\n\r\nabc", True, False),
        (b"HTTP/1.1 200 OK\r\ncontent-length: 3\r\n\r\nabcEXTRA", True, False),
        (b"HTTP/1.1 200 OK\r\n\r\nabc", True, False),
        (b"HTTP/1.0 200 OK\r\ncontent-length: 3\r\n\r\nabc", True, False),
        (b"HTTP/1.1 204 No\r\n\r\n", True, True),
        (b"HTTP/1.1 200 OK\r\ncontent-length: 4\r\n\r\nabc", False, True),
        (b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n3\r\nabc\r\n", False, True),
    ],
)
def test_where_a_response_ends(head, complete_at_end, reusable):
    reader = ResponseReader()
    reader.feed(head)
    reader.end_of_input()

    assert (reader.complete, reader.reusable) == (complete_at_end, reusable)


def test_a_request_head():
    assert request_head("h:1", "/p", {"A": "b"}) == b"POST /p HTTP/1.1\r\nHost: h:1\r\nA: b\r\n"


# dialects


def recorded(name):
    """A recording: (time in ns, bytes) of each read, as the real server sent them."""
    for line in (RECORDED / name).read_text().splitlines():
        if line.startswith("@"):
            at, text = line[1:].split(" ", 1)
            yield round(float(at) * 1e9), ast.literal_eval(text).encode()


@pytest.mark.parametrize(
    ("name", "kinds", "output_tokens", "token_source", "finish_reason"),
    [
        ("vllm_chat_usage", [("role", 1), ("content", 16), ("usage", 1)], 16, "usage", "length"),
        ("vllm_chat_contusage", [("role", 1), ("content", 8), ("usage", 1)], 8, "per-chunk usage", "length"),
        ("vllm_cmpl_usage", [("content", 12), ("usage", 1)], 12, "usage", "length"),
        ("vllm_chat_n3", [("role", 3), ("content", 18), ("usage", 1)], 18, "usage", "length"),
        ("tfplain_chat_usage", [("role", 1), ("content", 16), ("usage", 1)], 16, "usage", "length"),
        ("tfcb_chat_usage", [("role", 1), ("content", 16), ("usage", 1)], 16, "usage", "length"),
    ],
)
def test_recordings_of_real_servers(name, kinds, output_tokens, token_source, finish_reason):
    stream = read_stream(recorded(f"{name}.sse"))

    assert run_lengths(stream.kinds) == kinds
    assert (stream.output_tokens, stream.token_source, stream.finish_reason) == (
        output_tokens,
        token_source,
        finish_reason,
    )
    assert stream.ended
    assert stream.tokens is None
    assert stream.error is stream.malformed is None


WHOLE = b"".join(body for _, body in recorded("vllm_chat_contusage.sse"))


@given(st.lists(st.integers(0, len(WHOLE)), max_size=40))
def test_any_split_of_a_stream_gives_the_same_but_for_times(cuts):
    stream = read_stream((0, piece) for piece in split_at(WHOLE, cuts))
    whole = read_stream(recorded("vllm_chat_contusage.sse"))

    for field in ("kinds", "choices", "tokens", "output_tokens", "finish_reason", "text", "server", "ended"):
        assert getattr(stream, field) == getattr(whole, field)


@pytest.mark.parametrize(
    ("payload", "kind"),
    [
        (delta(role="assistant", content=""), "role"),
        (delta(role="assistant"), "role"),
        (delta(content="a"), "content"),
        (delta(role="assistant", content="a"), "content"),
        (delta(content="a", finish_reason="length"), "content"),
        (delta(reasoning="a"), "reasoning"),
        (delta(reasoning_content="a", content=None), "reasoning"),
        (delta(tool_calls=[{"index": 0, "function": {"arguments": "{"}}]), "tool"),
        (delta(tool_calls=[{"index": 0}], reasoning="a", content="b"), "tool"),
        (delta(content=""), "empty"),
        (delta(content="", usage={"completion_tokens": 3}), "empty"),
        (delta(finish_reason="stop"), "finish"),
        (delta(finish_reason="stop", usage={"completion_tokens": 3}), "usage"),
        (usage(3), "usage"),
        (event({"choices": [{"index": 0, "text": "a"}]}), "content"),
        (event({"choices": [{"index": 0, "text": "", "finish_reason": "stop"}]}), "finish"),
        (event({"choices": []}), "empty"),
    ],
)
def test_the_kind_of_a_chunk(payload, kind):
    (data,) = decode([payload])

    assert [chunk[0] for chunk in parse_event(data)[0]] == [kind]


def test_running_usage_counts_the_tokens_of_merged_chunks():
    stream = read(
        delta(role="assistant", content="", usage={"completion_tokens": 0}),
        delta(content="a", usage={"completion_tokens": 1}),
        delta(content="bcd", usage={"completion_tokens": 4}),
        delta(content="", usage={"completion_tokens": 5}),
        delta(content="e", finish_reason="length", usage={"completion_tokens": 6}),
        usage(6),
        DONE,
    )

    assert stream.tokens == [0, 1, 3, 1, 1, 0]
    assert (stream.output_tokens, stream.token_source) == (6, "per-chunk usage")


def test_running_usage_counts_tokens_without_any_text():
    empty = [delta(content="", usage={"completion_tokens": index + 1}) for index in range(3)]
    last = delta(content="", finish_reason="length", usage={"completion_tokens": 4})
    stream = read(delta(role="assistant", content="", usage={"completion_tokens": 0}), *empty, last, usage(4), DONE)

    assert (stream.tokens, stream.token_source) == ([0, 1, 1, 1, 1, 0], "per-chunk usage")


def test_usage_at_the_end_of_an_answer_without_text_is_no_running_count():
    finish = delta(finish_reason="length", usage={"completion_tokens": 4, "prompt_tokens": 2})
    stream = read(delta(role="assistant"), finish)

    assert (stream.tokens, stream.output_tokens, stream.token_source) == ([0, 0], 4, "usage")


def test_running_usage_of_a_cut_stream_is_its_count():
    stream = read(
        delta(content="ab", usage={"completion_tokens": 2}), delta(content="c", usage={"completion_tokens": 3})
    )

    assert (stream.output_tokens, stream.token_source, stream.ended) == (3, "per-chunk usage", False)


def test_running_usage_is_counted_for_each_choice():
    stream = read(
        delta(index=0, content="a", usage={"completion_tokens": 1}),
        delta(index=1, content="ab", usage={"completion_tokens": 2}),
        delta(index=0, content="c", finish_reason="length", usage={"completion_tokens": 2}),
        delta(index=1, content="c", finish_reason="length", usage={"completion_tokens": 3}),
        usage(5),
    )

    assert (stream.tokens, stream.output_tokens, stream.choices) == ([1, 2, 1, 1, 0], 5, [0, 1, 0, 1, 0])


def test_chunks_of_several_tokens_are_unknown_without_running_usage():
    stream = read(ROLE, *words(3), delta(finish_reason="length"), usage(7), DONE)

    assert (stream.tokens, stream.output_tokens, stream.token_source) == ([0, None, None, None, 0, 0], 7, "usage")


def test_the_silent_end_token_does_not_make_chunks_unknown():
    stream = read(ROLE, *words(3), delta(finish_reason="stop"), usage(4), DONE)

    assert (stream.tokens, stream.output_tokens) == (None, 4)


@pytest.mark.parametrize("lie", [-3, 2.5, "7", None, True, 2**32 - 1])
def test_usage_that_cannot_be_a_count_is_not_believed(lie):
    stream = read(*words(2), delta(finish_reason="stop"), usage(lie), DONE)

    assert (stream.output_tokens, stream.token_source) == (2, "chunks")


def test_a_running_count_that_no_context_holds_is_not_believed():
    """Each token has an ITL: of four billion of them in one chunk no report could be built."""
    running = [delta(content="a", usage={"completion_tokens": count}) for count in (1, 2**32 - 1, 3)]
    stream = read(*running, delta(finish_reason="stop"), DONE)

    assert (stream.tokens, stream.output_tokens) == (None, 3)


def test_cached_tokens():
    stream = read(
        *words(1),
        usage(1, prompt_tokens=9),
        event(
            {
                "choices": [],
                "usage": {"prompt_tokens": 9, "completion_tokens": 1, "prompt_tokens_details": {"cached_tokens": 8}},
            }
        ),
    )

    assert (stream.prompt_tokens, stream.cached_tokens) == (9, 8)


def test_a_choice_that_did_not_finish_leaves_the_answer_open():
    stream = read(delta(index=0, content="a", finish_reason="stop"), delta(index=1, content="b"))

    assert not stream.ended


def test_reads_that_carry_several_tokens_are_counted():
    one, two, three, four = words(4)
    stream = read_stream([(0, ROLE + one), (1, two + three), (2, four + DONE)])

    assert stream.reads_merged == 1
    assert stream.arrived_ns == [0, 0, 1, 1, 2]


@given(
    st.recursive(
        st.none() | st.booleans() | st.floats(allow_nan=False) | st.text(),
        lambda inner: (
            st.lists(inner)
            | st.dictionaries(
                st.sampled_from(["choices", "usage", "error", "delta", "content", "index", "completion_tokens"]), inner
            )
        ),
    )
)
def test_json_of_any_form_is_an_event_or_malformed(payload):
    stream = read(b"data: %b\n\n" % json.dumps(payload).encode())

    assert len(stream.kinds) == len(stream.choices)
    assert stream.output_tokens is None or stream.output_tokens >= 0


@given(st.binary(max_size=200))
def test_bytes_of_any_form_do_not_crash(data):
    stream = read_stream([(0, data), (1, b"data: " + data + b"\n\n")])

    assert len(stream.arrived_ns) == len(stream.kinds)


@given(st.lists(st.sampled_from("abc")))
def test_run_lengths_expand_again(values):
    assert expand(run_lengths(values)) == values


# TGI's own stream, written from its specification (no TGI runs in the tests)


def tgi_token(text, special=False, **last):
    token = {"id": 1, "text": text, "logprob": -0.5, "special": special}
    return event({"index": 1, "token": token, "generated_text": None, "details": None, **last})


def test_tgis_own_stream():
    details = {"finish_reason": "eos_token", "generated_tokens": 3, "input_length": 7, "seed": None}
    stream = read(tgi_token("He"), tgi_token("llo"), tgi_token("</s>", True, generated_text="Hello", details=details))

    assert stream.kinds == ["content", "content", "finish"]
    assert (stream.text, stream.output_tokens, stream.prompt_tokens) == ("Hello", 3, 7)
    assert (stream.tokens, stream.finish_reason, stream.ended) == (None, "eos_token", True)


def test_tgis_own_stream_ends_with_its_last_token():
    details = {"finish_reason": "length", "generated_tokens": 2}
    whole = read(tgi_token("a"), tgi_token("b", generated_text="ab", details=details))
    cut = read(tgi_token("a"), tgi_token("b"))

    assert (whole.ended, whole.output_tokens, whole.kinds) == (True, 2, ["content", "content"])
    assert (cut.ended, cut.output_tokens, cut.token_source) == (False, 2, "chunks")


def test_tgis_own_error_event():
    stream = read(tgi_token("a"), b'data:{"error":"out of memory","error_type":"generation"}\n\n')

    assert stream.error == "out of memory"


@pytest.mark.parametrize(
    "data",
    [
        b'{"x":' + b"[" * 5000 + b"]" * 5000 + b"}",
        b'{"choices": [{"index": 70000, "delta": {"content": "a"}}]}',
        b'{"choices": [' + b"{}," * 200 + b"{}]}",
    ],
)
def test_absurd_events_are_malformed(data):
    assert parse_event(data) == ([], None)
    assert read(b"data: " + data + b"\n\n").malformed


def test_a_count_beyond_every_integer_that_a_float_holds_is_not_believed():
    stream = read(*words(2), b'data: {"choices": [], "usage": {"completion_tokens": %s}}\n\n' % (b"9" * 330), DONE)

    assert (stream.output_tokens, stream.token_source) == (2, "chunks")


def test_chunks_without_end_are_cut_off():
    stream = read_stream([(0, b"data: {}\n\n" * (MAX_CHUNKS + 10))])

    assert stream.malformed == f"an answer of more than {MAX_CHUNKS} chunks"
    assert len(stream.kinds) <= MAX_CHUNKS + 1
