"""Which level comes next, and how sure a judgement is, without a server."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest

from twoclocks.errors import ExperimentError
from twoclocks.experiment import Experiment, LevelRange, Load, Search, Sweep, load_experiment
from twoclocks.levels import (
    Evidence,
    Found,
    judge,
    keeps_up,
    next_probe,
    one_run_only,
    sweep_levels,
    wilson,
)


def search_with(search, evidence, share=0.99):
    """Run a search against evidence(value, longer) -> Evidence; (what it found, its probes)."""
    probes, seen = [], []
    while not isinstance(step := next_probe(search, probes), Found):
        seen = [*(seen if step.longer else []), evidence(step.value, step.longer)]
        probes[-1 if step.longer else len(probes) :] = [judge(step.value, seen, share)]
        assert len(probes) < 100
    return step, probes


def sharp(limit, requests=1000):
    """A server that meets the SLO up to a limit, and never above."""
    return lambda value, longer: Evidence(requests, requests if value <= limit else 0)


@settings(max_examples=300, deadline=None)
@given(low=st.floats(0.01, 1000), ratio=st.floats(1, 127))
def test_a_planted_rate_is_found_within_five_percent_in_twelve_probes(low, ratio):
    limit = low * ratio
    found, probes = search_with(Search(low=low), sharp(limit))

    assert sum(probe.runs for probe in probes) <= 12
    assert found.value <= limit * (1 + 1e-5) <= found.failed * (1 + 2e-5)
    assert found.value >= limit / 1.05 * (1 - 1e-5)


@settings(max_examples=200, deadline=None)
@given(limit=st.integers(1, 120))
def test_a_planted_number_of_users_is_found_within_five_percent_or_exactly(limit):
    found, probes = search_with(Search(over="users", low=1), sharp(limit))

    assert sum(probe.runs for probe in probes) <= 12
    assert found.value <= limit < found.failed
    assert found.value * 1.05 >= limit


@settings(max_examples=100, deadline=None)
@given(limit=st.floats(1, 1e6), probes=st.integers(1, 20), requests=st.integers(0, 500), share=st.floats(0.5, 1))
def test_no_search_takes_more_probes_than_it_may(limit, probes, requests, share):
    found, made = search_with(Search(low=1, probes=probes), sharp(limit, requests), share)

    assert sum(probe.runs for probe in made) <= probes
    if found.value is not None and found.failed is not None:
        assert found.value < found.failed


def test_a_server_that_never_meets_the_slo_ends_the_search_at_once():
    found, probes = search_with(Search(low=5), sharp(4))

    assert (found.value, found.failed, len(probes)) == (None, 5, 1)
    assert "not met at load.search.low = 5" in found.why


def test_nothing_is_tried_above_high():
    found, probes = search_with(Search(low=1, high=10), sharp(1000))

    assert [probe.value for probe in probes] == [1, 2, 4, 8, 10]
    assert (found.value, found.failed) == (10, None)


def test_an_undecided_probe_is_repeated_once_for_longer():
    asked = []

    def evidence(value, longer):
        asked.append((value, longer))
        return Evidence(40, 40) if value <= 2 else Evidence(40, 0)

    found, probes = search_with(Search(low=2, tolerance=1), evidence)  # 40 of 40 cannot show 99 %

    assert asked == [(2, False), (2, True), (4, False)]
    assert (probes[0].judgement, probes[0].passed, probes[0].runs, probes[0].requests) == ("undecided", True, 2, 80)
    assert (found.value, found.failed) == (2, 4)


def test_a_server_that_falls_behind_fails_however_good_the_answers_are():
    assert judge(10, [Evidence(1000, 1000, kept_up=False)], 0.9).judgement == "fail"
    assert judge(10, [Evidence(1000, 1000, kept_up=True)], 0.9).judgement == "pass"
    assert judge(10, [Evidence(0, 0)], 0.9).judgement == "fail"


@pytest.mark.parametrize(("good", "requests"), [(0, 1), (1, 1), (9, 10), (99, 100), (995, 1000), (3, 700)])
def test_the_interval_is_wilsons(good, requests):
    expected = binomtest(good, requests).proportion_ci(0.95, method="wilson")

    assert wilson(good, requests) == pytest.approx((expected.low, expected.high), abs=2e-5)


def test_where_all_or_none_are_good_the_interval_ends_there():
    """However the floats round: an SLO that all must meet is not failed by a probe in which all did."""
    for requests in range(1, 300):
        (none, _), (_, every) = wilson(0, requests), wilson(requests, requests)
        assert (none, every) == (0.0, 1.0)
        assert judge(10, [Evidence(requests, requests)], 1.0).passed


def test_piling_up_is_more_than_chance():
    assert keeps_up(1000, 985, variance=20)  # 1 + 2.33 * sqrt(40) = 15.7
    assert not keeps_up(1000, 984, variance=20)
    assert keeps_up(0, 0, variance=0)


@pytest.mark.parametrize(
    ("sweep", "expected"),
    [
        (Sweep(levels=[1, 4, 2, 4]), [1, 4, 2]),
        (Sweep(levels=LevelRange(first=1, to=64, count=7, scale="log")), [1, 2, 4, 8, 16, 32, 64]),
        (Sweep(over="rate", levels=LevelRange(first=1, to=2, count=3)), [1, 1.5, 2]),
        (Sweep(levels=LevelRange(first=1, to=3, count=9)), [1, 2, 3]),
    ],
)
def test_levels_of_a_sweep(sweep, expected):
    assert sweep_levels(sweep) == expected


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["load.shape=sweep"], "load.sweep.levels: expected values"),
        (["load.shape=sweep", "load.sweep.levels=[1.5]"], "users are whole numbers, found 1.5"),
        (["load.shape=sweep", "load.sweep.levels=[1]", "load.sweep.reset=x"], "reset: expected none or a path"),
        (["load.shape=sweep", "load.sweep.level=[1]"], "unknown key 'load.sweep.level'"),
        (["load.shape=search"], "slo: a search needs what to meet"),
        (["load.shape=search", "slo.ttft_ms=1", "load.search.high=1"], "load.search.high: expected a value above low"),
        (["load.shape=search", "slo.ttft_ms=1", "load.search.low=0"], "load.search.low"),
    ],
)  # fmt: skip
def test_what_cannot_be_run_is_told_before_any_load(tmp_path, settings, message):
    path = tmp_path / "x.yaml"
    path.write_text("name: x\n")

    with pytest.raises(ExperimentError, match=r"^[^\n]*$") as raised:
        load_experiment(path, settings)

    assert message in str(raised.value)


def test_locust_alone_says_who_runs_several_runs():
    one_run_only(Experiment(load=Load(shape="rate")))
    with pytest.raises(ExperimentError, match="twoclocks run"):
        one_run_only(Experiment(load=Load(shape="sweep")))
    with pytest.raises(ExperimentError, match=r"twoclocks run .* --target NAME \(there: A, B\)"):
        one_run_only(Experiment(targets=[{"name": "A"}, {"name": "B"}]))


def test_the_factor_of_a_bracket_is_what_tolerance_says():
    found, _ = search_with(Search(low=1, tolerance=0.2), sharp(math.pi))

    assert 1 < found.failed / found.value <= 1.2
