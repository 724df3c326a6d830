"""When requests are due: the asked process, held against its distribution, not against what the code gave before."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from twoclocks.experiment import Load
from twoclocks.shapes import arrival_times, count_of, due_within, length_s, share_of


def times(**keys) -> np.ndarray:
    return np.array(list(arrival_times(Load(**{"shape": "rate", **keys}))))


def test_a_constant_rate_has_equal_gaps():
    at = times(rate=200, arrivals="constant", duration_s=60)

    assert len(at) == 12_000
    assert at[0] == 0
    assert np.allclose(np.diff(at), 0.005)


def test_poisson_arrivals_pass_a_kolmogorov_smirnov_test():
    at = times(rate=200, duration_s=60)
    gaps = np.diff(at)

    assert stats.kstest(gaps, "expon", args=(0, 1 / 200)).pvalue > 0.01
    # independent of each other, and the count of an interval has the mean as its variance
    assert abs(np.corrcoef(gaps[:-1], gaps[1:])[0, 1]) < 0.03
    counts = np.histogram(at, bins=np.arange(0, 61))[0]
    assert counts.mean() == pytest.approx(200, rel=0.03)
    assert 0.6 < counts.var() / counts.mean() < 1.6


@pytest.mark.parametrize("burstiness", [0.25, 1, 4])
def test_gamma_gaps_have_the_asked_mean_and_burstiness(burstiness):
    gaps = np.diff(times(rate=100, arrivals="gamma", burstiness=burstiness, duration_s=100))

    assert stats.kstest(gaps, "gamma", args=(burstiness, 0, 1 / (100 * burstiness))).pvalue > 0.01


def test_a_rate_in_straight_lines_between_points():
    """0 to 100/s in 10 s, kept for 10 s, then at once to 10/s: the counts are the integrals."""
    at = times(rate=[[0, 0], [10, 100], [20, 100], [20, 10]], arrivals="constant", duration_s=30)
    counts = [int(((at >= start) & (at < start + 10)).sum()) for start in (0, 10, 20)]

    assert counts == pytest.approx([500, 1000, 100], abs=1)
    # in the ramp the n-th is due when t^2 / 2 * 10 = n
    assert at[100] == pytest.approx(math.sqrt(100 / 5), rel=1e-9)


def test_a_bent_poisson_process_stays_one():
    """Mapped back through the integral of its rate, a varying process has exponential gaps of mean 1."""
    at = times(rate=[[0, 20], [60, 120], [120, 5]], duration_s=120)
    ramp_up, ramp_down = np.minimum(at, 60), np.clip(at - 60, 0, 60)
    units = 20 * ramp_up + 100 / 60 * ramp_up**2 / 2 + 120 * ramp_down - 115 / 60 * ramp_down**2 / 2

    assert stats.kstest(np.diff(units), "expon").pvalue > 0.01


@pytest.mark.parametrize("rate", [0, [[0, 0]], [[0, 0], [5, 0]]])
def test_no_rate_is_no_arrival(rate):
    assert times(rate=rate, duration_s=30).size == 0


def test_a_rate_that_falls_to_zero_ends():
    at = times(rate=[[0, 10], [10, 0]], arrivals="constant", duration_s=1000)

    assert len(at) == pytest.approx(50, abs=1)
    assert at[-1] <= 10


points = st.lists(st.tuples(st.floats(0, 50), st.floats(0, 50)), min_size=1, max_size=6).map(
    lambda found: sorted(found, key=lambda point: point[0])
)


@given(points, st.sampled_from(["constant", "poisson", "gamma"]), st.integers(0, 9))
def test_any_rate_gives_ascending_times_inside_the_window(rate, arrivals, seed):
    at = list(arrival_times(Load(shape="rate", rate=rate, arrivals=arrivals, seed=seed, duration_s=60)))

    assert all(0 <= one < 60 for one in at)
    assert all(one <= other + 1e-9 for one, other in itertools.pairwise(at))


@given(st.integers(1, 7), st.integers(0, 9))
def test_shares_together_are_the_whole(shares, seed):
    load = Load(shape="rate", rate=30, seed=seed, duration_s=5)
    whole = list(arrival_times(load))
    dealt = [list(share_of(arrival_times(load), share, shares)) for share in range(shares + 2)]

    assert sorted(itertools.chain(*dealt)) == whole
    assert dealt[shares] == []  # one that came late
    assert sum(count_of(100, share, shares) for share in range(shares + 2)) == 100


def test_a_window_of_a_trace_slower_and_cut():
    load = Load(shape="trace", trace_window_s=(10, 30), trace_scale=2, duration_s=35)

    assert list(arrival_times(load, [0, 10, 12.5, 27, 29, 30, None])) == [0, 5, 34]


def test_the_length_of_steps_is_the_sum_of_their_holds():
    assert length_s(Load(shape="steps", steps=[(2, 10), (4, 5)], duration_s=60)) == 15
    assert length_s(Load(duration_s=60)) == 60


@pytest.mark.parametrize(("requests", "expected"), [("none", [15, 15]), (40, [15, 15]), (21, [11, 10])])
def test_no_more_is_due_than_was_dealt(requests, expected):
    load = Load(shape="rate", rate=10, arrivals="constant", duration_s=60, requests=requests)

    assert [due_within(load, [], 3.0, share, 2) for share in range(2)] == expected
