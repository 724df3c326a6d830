import math
import tracemalloc

import numpy as np
import pytest
from scipy import stats

from twoclocks import intervals
from twoclocks.intervals import (
    Interval,
    difference,
    equivalent,
    estimate,
    least,
    paired_difference,
    paired_ratio,
    ratio,
)

SIGMA = 0.5
LATENCIES = stats.lognorm(SIGMA)
TRUE = {"mean": LATENCIES.mean(), "p50": 1.0, "p90": LATENCIES.ppf(0.9), "p95": LATENCIES.ppf(0.95)}
TRIALS = 300


def coverage(sample, interval_of, truth):
    """Share of seeded trials in which the interval holds the truth."""
    rng = np.random.default_rng(11)
    found = [interval_of(sample(rng)) for _ in range(TRIALS)]
    return np.mean([one.low <= truth <= one.high for one in found])


def by_prompt(rng, prompts=100, repeats=1, shift=0.08):
    """Two sides of the same prompts, which differ from each other far more than the sides do."""
    prompt = rng.normal(0, 0.5, prompts)
    return tuple(
        {str(key): np.exp(prompt[key] + by + rng.normal(0, 0.1, repeats)) for key in range(prompts)}
        for by in (0, shift)
    )


@pytest.mark.parametrize("statistic", TRUE)
def test_of_a_hundred_such_intervals_about_95_hold_the_truth(statistic):
    held = coverage(
        lambda rng: [rng.lognormal(0, SIGMA, 100)], lambda runs: estimate(runs, statistic, 400), TRUE[statistic]
    )

    assert 0.91 <= held <= 0.985


@pytest.mark.parametrize("statistic", ["mean", "p50", "p95"])
def test_a_planted_ratio_and_difference_are_held(statistic):
    def sides(rng):
        return [rng.lognormal(0, SIGMA, 100)], [rng.lognormal(0.08, SIGMA, 100)]

    assert 0.91 <= coverage(sides, lambda two: ratio(*two, statistic, 400), math.exp(0.08)) <= 0.985
    gained = TRUE[statistic] * (math.exp(0.08) - 1)
    assert 0.91 <= coverage(sides, lambda two: difference(*two, statistic, 400), gained) <= 0.985


@pytest.mark.parametrize(("repeats", "scatter"), [(3, 0.05), (5, 0.2)])
@pytest.mark.parametrize("statistic", ["mean", "p50"])
def test_what_repeats_scatter_is_in_the_interval(repeats, scatter, statistic):
    def runs(rng):
        return [rng.lognormal(rng.normal(0, scatter), SIGMA, 100) for _ in range(repeats)]

    truth = {"mean": stats.lognorm(np.hypot(SIGMA, scatter)).mean(), "p50": 1.0}[statistic]

    assert coverage(runs, lambda made: estimate(made, statistic, 400), truth) >= 0.91


def test_three_repeats_that_differ_are_less_sure_than_their_requests_alone():
    rng = np.random.default_rng(3)
    runs = [rng.lognormal(shift, 0.1, 200) for shift in (0, 0.3, 0.6)]

    together, alone = estimate(runs, "p50"), estimate([np.concatenate(runs)], "p50")

    assert together.estimate == alone.estimate
    assert together.high - together.low > 3 * (alone.high - alone.low)


@pytest.mark.parametrize(("statistic", "at_most"), [("mean", 0.35), ("p50", 0.7), ("p95", 0.8)])
def test_pairing_by_prompt_is_narrower_and_still_holds_the_truth(statistic, at_most):
    rng = np.random.default_rng(2)
    widths = []
    for _ in range(10):
        first, other = by_prompt(rng, repeats=2)
        paired = paired_difference(first, other, statistic)
        alone = difference(*([np.concatenate(list(side.values()))] for side in (first, other)), statistic)
        widths.append((paired.high - paired.low) / (alone.high - alone.low))

    assert np.mean(widths) < at_most
    assert coverage(by_prompt, lambda two: paired_ratio(*two, statistic, 400), math.exp(0.08)) >= 0.91


@pytest.mark.parametrize("statistic", ["mean", "p50"])
def test_pairing_does_not_hide_what_repeats_scatter(statistic):
    """Runs that are as a whole faster or slower: prompts tell nothing of it, three repeats do."""

    def sides(rng):
        prompt = rng.normal(0, 0.5, 60)
        return tuple(
            [
                {str(key): np.exp(prompt[key] + by + run + rng.normal(0, 0.1, 1)) for key in range(60)}
                for run in rng.normal(0, 0.1, 3)
            ]
            for by in (0, 0.08)
        )

    assert coverage(sides, lambda two: paired_ratio(*two, statistic, 400), math.exp(0.08)) >= 0.91
    first, other = sides(np.random.default_rng(1))
    pooled = [{key: np.concatenate([run[key] for run in side]) for key in side[0]} for side in (first, other)]
    together, apart = paired_ratio(*pooled, statistic), paired_ratio(first, other, statistic)
    assert apart.estimate == pytest.approx(together.estimate)
    assert apart.high - apart.low > 2 * (together.high - together.low)


def test_many_prompts_are_paired_as_few_are(monkeypatch):
    first, other = by_prompt(np.random.default_rng(1), prompts=1000)
    for statistic in ("mean", "p50", "p95"):
        direct = paired_difference(first, other, statistic)
        with monkeypatch.context() as patch:
            patch.setattr(intervals, "MANY", 10)
            as_normals = paired_difference(first, other, statistic)

        width = direct.high - direct.low
        assert as_normals.estimate == direct.estimate
        assert as_normals.low == pytest.approx(direct.low, abs=0.35 * width)
        assert as_normals.high == pytest.approx(direct.high, abs=0.35 * width)


def test_only_prompts_of_both_sides_are_paired():
    first = {str(key): np.array([1.0, np.nan]) for key in range(10)}
    other = {str(key): np.array([3.0]) for key in range(4, 20)} | {"9": np.array([np.nan])}

    assert paired_difference(first, other, "mean") == Interval(2.0, 2.0, 2.0, 5, same=0.0)
    assert paired_difference(first, dict(list(other.items())[:3]), "mean") is None


@pytest.mark.parametrize("statistic", ["mean", "p50", "p95"])
def test_of_one_run_the_interval_is_scipys_bootstrap(statistic):
    values = np.random.default_rng(0).lognormal(0, SIGMA, 400)
    expected = stats.bootstrap(
        (values,), intervals.STATISTICS[statistic], method="percentile", n_resamples=5000, rng=np.random.default_rng(1)
    ).confidence_interval

    found = estimate([values], statistic, resamples=20_000)

    assert found.estimate == intervals.STATISTICS[statistic](values)
    width = expected.high - expected.low
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high), abs=0.1 * width)


def test_gaps_of_one_request_are_not_taken_for_many_requests():
    rng = np.random.default_rng(4)
    requests = np.repeat(np.arange(100), 50)
    gaps = np.exp(rng.normal(0, 0.4, 100)[requests] + rng.normal(0, 0.1, 5000))
    for statistic in ("mean", "p50"):
        by_request = estimate([gaps], statistic, units=[requests])
        alone = estimate([gaps], statistic)

        assert by_request.high - by_request.low > 4 * (alone.high - alone.low)
    drawn = [np.exp(rng.normal(0, 0.4, 100)[requests] + rng.normal(0, 0.1, 5000)) for _ in range(100)]
    held = [(one := estimate([made], "p50", 400, units=[requests])).low <= 1 <= one.high for made in drawn]
    assert np.mean(held) >= 0.88


@pytest.mark.parametrize(("statistic", "count"), [("mean", 5), ("p50", 6), ("p90", 36), ("p95", 72), ("p99", 368)])
def test_too_few_values_have_no_interval(statistic, count):
    values = np.random.default_rng(0).normal(10, 1, count)

    assert least(statistic) == count
    assert estimate([values], statistic).n == count
    assert estimate([values[1:]], statistic) is None
    assert estimate([np.append(values[1:], np.nan)], statistic) is None
    assert estimate([], statistic) is None
    assert ratio([values], [values[1:]], statistic) is None


def test_the_least_number_is_that_of_which_all_may_lie_on_one_side():
    assert 0.95 ** least("p95") <= 0.025 < 0.95 ** (least("p95") - 1)


def test_values_that_are_all_alike_have_a_width_of_nothing():
    same = [np.full(100, 2.0)]

    for statistic in ("mean", "p50", "p95"):
        assert estimate(same, statistic) == Interval(2.0, 2.0, 2.0, 100)
        assert difference(same, same, statistic) == Interval(0.0, 0.0, 0.0, 100, same=0.0)
    assert ratio([np.zeros(100)], same, "mean") is None


def test_no_interval_of_durations_goes_below_zero():
    """A run whose cache was cold and two whose cache was warm: what repeats scatter has two degrees of freedom."""
    cold, warm = np.linspace(0.5, 0.6, 6), np.linspace(0.01, 0.02, 6)
    held = estimate([cold, warm, warm], "mean")
    signed = estimate([cold - 0.2, warm - 0.2, warm - 0.2], "mean")  # the same, of a quantity that may be negative

    assert (held.low, held.high) == (0, pytest.approx(signed.high + 0.2))
    assert signed.low < -0.2


def test_the_same_seed_gives_the_same_interval_and_another_nearly_so():
    runs = [np.random.default_rng(0).lognormal(0, SIGMA, 200)]

    assert estimate(runs, "mean") == estimate(runs, "mean") != estimate(runs, "mean", seed=2)
    assert estimate(runs, "p95", seed=2).high == pytest.approx(estimate(runs, "p95").high, rel=0.05)


def test_a_ratio_turned_round_says_the_same():
    rng = np.random.default_rng(0)
    one, two = [rng.lognormal(0, 0.3, 300)], [rng.lognormal(0.2, 0.3, 300)]
    there, back = ratio(one, two, "mean", 20_000), ratio(two, one, "mean", 20_000)

    assert there.low == pytest.approx(1 / back.high, rel=0.01)


def test_equivalence_is_the_two_one_sided_tests():
    """Against the t tests themselves, for means of equal variances, at their border."""
    rng = np.random.default_rng(9)
    first, other = rng.normal(10, 1, 200), rng.normal(10.05, 1, 200)
    found = difference([first], [other], "mean", 20_000, level=0.9)

    def p_of(margin):
        below = stats.ttest_ind(other, first - margin, alternative="greater").pvalue
        above = stats.ttest_ind(other, first + margin, alternative="less").pvalue
        return max(below, above)

    border = max(-found.low, found.high)
    assert equivalent(found, border * 1.05) == "equivalent"
    assert p_of(border * 1.05) < 0.05
    assert equivalent(found, border * 0.95) == "undecided"
    assert p_of(border * 0.95) > 0.05


def test_equivalence_of_ratios_and_its_other_outcomes():
    def of(low, high, same=1.0):
        return Interval((low + high) / 2, low, high, 9, level=0.9, same=same)

    assert equivalent(of(0.98, 1.03), 0.05) == "equivalent"
    assert equivalent(of(0.951, 1.03), 0.05) == "undecided"  # 1 / 1.05 is 0.952
    assert equivalent(of(1.06, 1.2), 0.05) == "different"
    assert equivalent(of(0.5, 2), 0.05) == "undecided"
    assert equivalent(of(-2, -1, same=0.0), 0.5) == "different"
    with pytest.raises(ValueError, match=r"level=0.9"):
        equivalent(Interval(1, 0.9, 1.1, 9, same=1.0), 0.05)


def test_many_requests_need_little_memory():
    values = np.random.default_rng(0).lognormal(0, SIGMA, 100_000)
    tracemalloc.start()
    for statistic in intervals.STATISTICS:
        found = difference([values], [values * 1.2], statistic)
        assert found.low > 0.1 * intervals.STATISTICS[statistic](values)
    assert tracemalloc.get_traced_memory()[1] < 100e6
    tracemalloc.stop()
