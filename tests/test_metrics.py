import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from twoclocks import metrics
from twoclocks.metrics import Chunks


def chunks(*rows):
    """(request, at, tokens, is_token, choice) rows as arrays."""
    request, at, tokens, is_token, choice = zip(*rows, strict=True)
    return Chunks(
        np.array(request), np.array(at, float), np.array(tokens, float), np.zeros(len(request), np.int8),
        np.array(is_token), np.array(choice, np.int16),
    )  # fmt: skip


# one request sent at 10: role at 10.1, tokens at 10.5 (1), 10.6 (1), 10.9 (3), usage at 11
ONE = chunks(
    (0, 10.1, 0, False, 0), (0, 10.5, 1, True, 0), (0, 10.6, 1, True, 0), (0, 10.9, 3, True, 0), (0, 11.0, 0, False, 0)
)


def test_role_and_usage_chunks_are_no_tokens():
    assert metrics.first_event(ONE, np.array([10.0])) == pytest.approx([0.1])
    assert metrics.ttft(ONE, np.array([10.0])) == pytest.approx([0.5])
    assert metrics.e2e(ONE, np.array([10.0])) == pytest.approx([0.9])


def test_a_chunk_of_three_tokens_counts_once_as_gap_and_thrice_per_token():
    gaps = metrics.chunk_gaps(ONE)

    assert gaps.seconds == pytest.approx([0.1, 0.3])
    assert metrics.per_token_itl(gaps) == pytest.approx([0.1, 0.1, 0.1, 0.1])


def test_tpot_divides_by_the_tokens_after_the_first_chunk():
    value, estimated = metrics.tpot(ONE, np.array([5.0]))

    assert value == pytest.approx([0.4 / 4])
    assert not estimated[0]


def test_tpot_of_a_first_chunk_of_two_tokens():
    value, _ = metrics.tpot(chunks((0, 1.0, 2, True, 0), (0, 1.6, 3, True, 0)), np.array([5.0]))

    assert value == pytest.approx([0.6 / 3])


def test_tpot_takes_an_unknown_first_chunk_as_one_token_and_says_so():
    value, estimated = metrics.tpot(chunks((0, 1.0, np.nan, True, 0), (0, 1.6, np.nan, True, 0)), np.array([4.0]))

    assert value == pytest.approx([0.6 / 3])
    assert estimated[0]


def test_one_token_or_none_has_no_tpot():
    value, _ = metrics.tpot(chunks((0, 1.0, 1, True, 0), (1, 2.0, 0, False, 0)), np.array([1.0, np.nan]))

    assert np.isnan(value).all()


def test_a_request_without_a_token_has_no_latency():
    role_only = chunks((1, 5.0, 0, False, 0))

    assert np.isnan(metrics.ttft(role_only, np.array([4.0, 4.0]))).all()
    assert metrics.first_event(role_only, np.array([4.0, 4.0])) == pytest.approx([np.nan, 1.0], nan_ok=True)


def test_gaps_are_between_chunks_of_one_choice():
    # choices 0 and 1 arrive in turn, 0.1 apart, so that each choice has gaps of 0.2
    interleaved = chunks(*((0, 1 + 0.1 * i, 1, True, i % 2) for i in range(6)))

    assert metrics.chunk_gaps(interleaved).seconds == pytest.approx([0.2] * 4)
    value, _ = metrics.tpot(interleaved, np.array([6.0]))
    assert value == pytest.approx([0.2])


def test_no_gap_between_two_requests():
    assert len(metrics.chunk_gaps(chunks((0, 1.0, 1, True, 0), (1, 2.0, 1, True, 0))).seconds) == 0


def test_throughput_counts_tokens_inside_the_window_only():
    at, tokens = np.array([0.5, 1.0, 2.0, 3.5]), np.array([7.0, 1.0, 3.0, 9.0])

    assert metrics.output_throughput(at, tokens, (1.0, 3.0)) == pytest.approx(4 / 2)


def test_unknown_token_counts_share_what_usage_leaves_over():
    some = chunks((0, 1.0, 2, True, 0), (0, 2.0, np.nan, True, 0), (0, 3.0, np.nan, True, 0), (1, 1.0, np.nan, True, 0))

    assert metrics.arrived_tokens(some, np.array([8.0, np.nan])) == pytest.approx([2, 3, 3, 1])


def test_goodput_counts_failures_as_misses_and_forgives_an_undefined_tpot():
    good = metrics.meets_slo(
        np.array([True, True, True, False]),
        {"ttft": np.array([0.1, 0.6, 0.2, 0.1]), "tpot": np.array([0.01, 0.01, np.nan, 0.01])},
        {"ttft": 0.5, "tpot": 0.05},
    )

    assert good.tolist() == [True, False, True, False]
    assert metrics.goodput(good, (0.0, 4.0)) == (0.5, 0.5)


def test_the_first_paragraph_of_a_docstring_is_the_definition():
    assert metrics.definition(metrics.e2e) == "E2E = last token chunk - sent_at."
    assert "unknown" not in metrics.definition(metrics.tpot)


@given(st.lists(st.lists(st.floats(0, 5), min_size=2, max_size=8), min_size=1, max_size=5))
def test_gaps_of_a_stream_add_up_to_its_span(streams):
    rows = [(i, at, 1, True, 0) for i, gaps in enumerate(streams) for at in np.cumsum(gaps)]
    found = metrics.chunk_gaps(chunks(*rows))

    expected = [sum(gaps[1:]) for gaps in streams]

    assert np.bincount(found.request, weights=found.seconds, minlength=len(streams)) == pytest.approx(expected)
    value, _ = metrics.tpot(chunks(*rows), np.array([float(len(gaps)) for gaps in streams]))
    assert value == pytest.approx([np.mean(gaps[1:]) for gaps in streams])


def test_the_latency_of_a_batch_is_from_its_first_send_to_its_last_end():
    batch = np.array([7, 3, 7, 3, 9, 9])
    sent, ended = np.array([1.1, 10.0, 1.0, 10.2, 20.0, 20.0]), np.array([3.0, 12.0, 4.5, 11.0, 21.0, 22.0])
    whole = np.array([True, True, True, True, True, False])
    made = metrics.batches(batch, sent, ended, np.array([5.0, 6.0, 7.0, 8.0, 9.0, np.nan]), whole)

    # by hand: batch 3 from 10.0 to 12.0 with 6 + 8 tokens, batch 7 from 1.0 to 4.5 with 5 + 7; batch 9 is not whole
    assert made.seconds == pytest.approx([2.0, 3.5])
    assert list(made.requests) == [2, 2]
    assert made.tokens == pytest.approx([14.0, 12.0])
    assert len(metrics.batches(*np.empty((4, 0)), np.empty(0, bool)).seconds) == 0
