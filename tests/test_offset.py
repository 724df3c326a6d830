"""The offset between two clocks, held against clocks whose offset is known."""

import random

import pytest

from twoclocks.offset import Exchange, estimate, same_clock


def exchanges(count, *, offset_s, drift=0.0, every_s=1.0, way_s=1e-4, jitter_s=0.0, late_share=0.0, seed=1):
    """Exchanges with a master whose clock is offset_s + drift * t ahead; the ways take random times of their own."""
    rng = random.Random(seed)
    made = []
    for number in range(count):
        sent = 1000.0 + number * every_s
        there, back = (way_s + rng.expovariate(1) * jitter_s for _ in range(2))
        if rng.random() < late_share:
            back += rng.random() * 0.2  # the answer waited behind something else
        made.append(Exchange(sent, sent + there + offset_s + drift * (sent + there - 1000), sent + there + back))
    return made


@pytest.mark.parametrize("drift", [0.0, 2e-5, -1e-4, 5e-4])
@pytest.mark.parametrize("offset_s", [-86400.0, 0.0, 3.25])
def test_a_known_offset_and_drift_are_found_within_the_stated_error(offset_s, drift):
    seen = exchanges(60, offset_s=offset_s, drift=drift, jitter_s=2e-4, late_share=0.3)
    found = estimate(seen, 1060.0)

    assert found.error_s < 1e-3
    assert abs(found.offset_s - offset_s - drift * 60) <= found.error_s
    assert abs(found.drift - drift) < 2e-5
    assert abs(found.offset_s + found.drift * (1030.0 - found.at) - offset_s - drift * 30) <= found.error_s


def test_exchanges_of_a_moment_make_no_drift_up():
    found = estimate(exchanges(16, offset_s=5.0, every_s=0.02, jitter_s=3e-4), 1000.4)

    assert abs(found.offset_s - 5.0) <= found.error_s
    assert abs(found.drift) < 1e-4


def test_a_drift_that_cannot_be_seen_yet_widens_the_error():
    """Fast exchanges at first, then slow ones, while the clock drifts as much as clocks may."""
    early = exchanges(16, offset_s=0.0, every_s=0.02)
    late = exchanges(20, offset_s=0.0, drift=3e-4, way_s=0.04)[1:]
    found = estimate([*early, *late], 1020.0)

    assert abs(found.offset_s - 3e-4 * 20) <= found.error_s


def test_the_error_is_half_the_least_round_trip_where_the_ways_differ():
    """One way takes 4 ms, the other none: nobody can see that, and the error has to cover it."""
    seen = [Exchange(t, t + 0.004 + 7.0, t + 0.004) for t in range(10)]
    found = estimate([Exchange(*map(float, one)) for one in seen], 10.0)

    assert found.offset_s == pytest.approx(7.002)
    assert 0.002 <= found.error_s < 0.004
    assert found.round_trip_s == pytest.approx(0.004)


def test_a_clock_that_jumps_is_told_by_the_error():
    """A virtual machine that was paused for 2 s."""
    before, after = exchanges(10, offset_s=0.0), exchanges(20, offset_s=2.0)[10:]

    assert estimate(before, 1010.0).error_s < 1e-3
    assert estimate([*before, *after], 1020.0).error_s > 0.5


def test_one_clock_is_told_from_two():
    assert same_clock(exchanges(20, offset_s=0.0, jitter_s=1e-3))
    assert not same_clock(exchanges(20, offset_s=-0.02, jitter_s=1e-3))
