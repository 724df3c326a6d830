"""Frames over a connection that loses, doubles, delays and reorders: each line arrives once, in order."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from twoclocks.frames import CREDIT, FRAME_BYTES, Frame, Inbox, Outbox


def deliver(lines, rng, *, lose, double):
    """Put the lines in over time, carry frames and answers over a bad connection; (received, said, inbox, outbox)."""
    outbox, inbox = Outbox("r"), Inbox()
    received, said, on_the_way, replies = [], {}, [], []
    todo, now, closed = list(lines), 0.0, False
    while not (closed and outbox.is_empty):
        now += 0.1
        assert now < 10_000, "it never ended"
        for _ in range(rng.randrange(4)):
            if todo:
                outbox.put(todo.pop(0))
        if not todo and not closed:
            closed = True
            outbox.say(done=outbox.lines)
        on_the_way += [frame for frame in outbox.due(now) for _ in range(1 + (rng.random() < double))]
        rng.shuffle(on_the_way)
        for _ in range(rng.randrange(6)):
            if on_the_way:
                frame = on_the_way.pop()
                if rng.random() < lose:
                    continue
                if inbox.take(frame):
                    received.append(frame.lines)
                    said |= frame.said
                replies.append(inbox.number)
        while replies:
            number = replies.pop(rng.randrange(len(replies)))
            if rng.random() >= lose:
                outbox.acknowledge(number, now)
    return b"".join(received), said, inbox, outbox


@given(st.lists(st.binary(min_size=1, max_size=40), max_size=60), st.integers(0, 10**6))
def test_nothing_is_lost_or_doubled(payloads, seed):
    lines = [payload.replace(b"\n", b"") + b"\n" for payload in payloads]
    received, said, inbox, outbox = deliver(lines, random.Random(seed), lose=0.4, double=0.4)

    assert received == b"".join(lines)
    assert said == {"done": len(lines)}
    assert (inbox.lines, outbox.lines, outbox.held_bytes) == (len(lines), len(lines), 0)


def test_a_frame_that_comes_twice_is_counted_and_left_out():
    inbox, frame = Inbox(), Frame(run="r", number=1, lines=b"a\n")

    assert [inbox.take(frame), inbox.take(frame)] == [True, False]
    assert (inbox.lines, inbox.repeated, inbox.number) == (1, 1, 1)


def test_a_frame_after_a_missing_one_waits_for_it():
    inbox = Inbox()

    assert not inbox.take(Frame(run="r", number=2, lines=b"b\n"))
    assert (inbox.number, inbox.repeated) == (0, 0)


def test_no_more_is_under_way_than_the_credit_and_the_rest_is_held():
    outbox, line = Outbox("r"), b"x" * (FRAME_BYTES // 2) + b"\n"
    for _ in range(100):
        outbox.put(line)
    sent = list(outbox.due(0.0))

    assert len(sent) == CREDIT
    assert all(len(frame.lines) <= FRAME_BYTES for frame in sent)
    assert list(outbox.due(0.1)) == []
    assert outbox.held_bytes == 100 * len(line)
    outbox.acknowledge(3, 0.2)
    assert [frame.number for frame in outbox.due(0.2)] == [CREDIT + 1, CREDIT + 2, CREDIT + 3]
    assert outbox.held_bytes == 97 * len(line)


def test_a_line_larger_than_a_frame_goes_alone():
    outbox, large = Outbox("r"), b"x" * (3 * FRAME_BYTES) + b"\n"
    for line in (b"a\n", large, b"b\n"):
        outbox.put(line)

    assert [frame.lines for frame in outbox.due(0.0)] == [b"a\n", large, b"b\n"]


def test_what_is_not_acknowledged_is_sent_again_ever_more_seldom():
    outbox = Outbox("r")
    outbox.put(b"a\n")
    times = [at / 10 for at in range(600) if [*outbox.due(at / 10)]]

    assert times == pytest.approx([0, 2, 6, 14, 30, 46], abs=0.11)
    assert outbox.repeated == 5
    outbox.acknowledge(1, 60.0)
    assert outbox.is_empty
