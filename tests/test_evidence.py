"""Does a server keep up? Queues worked out by hand, below and above a capacity that is known."""

import heapq

import numpy as np
import pytest
from make_run import record, write_folder

from twoclocks.evidence import dispersion, evidence, kept_up_with, mean_difference


def queue(rng, kind, load, slots, mean_s, length_s):
    """(arrivals, ends, rate) of `slots` servers at a share `load` of their capacity; kind as in Kendall's notation:
    M exponential, D the same for all, U evenly spread over half to one and a half of the mean.
    """
    rate = load * slots / mean_s
    count = int(rate * length_s)
    began = np.arange(count) / rate if kind[0] == "D" else np.sort(rng.uniform(0, length_s, rng.poisson(count)))
    draws = {"M": rng.exponential(1, len(began)), "D": np.ones(len(began)), "U": rng.uniform(0.5, 1.5, len(began))}
    free, ended = [0.0] * slots, []
    for at, takes in zip(began, draws[kind[1]] * mean_s, strict=True):
        ended.append(max(at, heapq.heappop(free)) + takes)
        heapq.heappush(free, ended[-1])
    return began, np.array(ended), rate


def share_that_fails(kind, load, *, slots=16, mean_s=1.6, length_s=20.0, times=50):
    rng = np.random.default_rng(7)
    runs = [queue(rng, kind, load, slots, mean_s, length_s) for _ in range(times)]
    arrivals = 1.0 if kind[0] == "M" else 0.0
    return np.mean([not kept_up_with(began, ended, (0.0, length_s), arrivals, rate) for began, ended, rate in runs])


@pytest.mark.parametrize("slots", [4, 16, 64])
def test_a_regular_server_is_seen_to_fall_behind_by_4_percent_within_20_s(slots):
    mean_s = slots / 20  # 20 requests/s, whatever the number of slots
    below, above = (share_that_fails("DD", load, slots=slots, mean_s=mean_s, times=1) for load in (0.99, 1.04))

    assert (below, above) == (0, 1)


@pytest.mark.parametrize(
    ("kind", "load", "slots", "mean_s", "length_s"),
    [
        ("MD", 0.7, 16, 1.6, 60),
        ("MD", 0.8, 16, 1.6, 20),
        ("MU", 0.8, 16, 1.6, 60),
        ("DU", 0.9, 16, 1.6, 60),
        ("MM", 0.7, 64, 3.2, 60),  # answers of many lengths: the server is still filling up when half of them are back
        ("MM", 0.7, 64, 3.2, 20),
        ("DM", 0.7, 64, 3.2, 60),
    ],
)
def test_a_server_well_below_its_capacity_hardly_ever_fails(kind, load, slots, mean_s, length_s):
    """At 1 %, three of fifty or more happen once in seventy times."""
    assert share_that_fails(kind, load, slots=slots, mean_s=mean_s, length_s=length_s) <= 0.04


@pytest.mark.parametrize(("kind", "least"), [("MD", 0.85), ("MU", 0.85), ("DU", 0.95), ("DM", 0.85), ("MM", 0.75)])
def test_a_server_a_tenth_above_its_capacity_fails_within_a_minute(kind, least):
    assert share_that_fails(kind, 1.1, length_s=60.0) >= least


def test_more_than_was_asked_for_is_no_failure_to_keep_up():
    """Chance sent 130 where 100 were due, and 110 of them are back."""
    began = np.linspace(0, 10, 130, endpoint=False)
    ended = began + np.linspace(0.01, 1.9, 130)

    assert not kept_up_with(began, ended, (0.0, 10.0), dispersion=0.0)
    assert not kept_up_with(began, ended, (0.0, 10.0), dispersion=0.0, rate=13)
    assert kept_up_with(began, ended, (0.0, 10.0), dispersion=0.0, rate=10)


def test_the_mean_difference_is_that_of_all_pairs():
    values = np.random.default_rng(1).exponential(2, 300)

    assert mean_difference(values) == pytest.approx(np.abs(values[:, None] - values[None]).mean())


@pytest.mark.parametrize("arrivals", [0.0, 1.0])
def test_the_number_in_flight_varies_as_is_said(arrivals):
    """Of a server that makes nobody wait, at an instant far from its start, over many tries."""
    rng, rate, counts = np.random.default_rng(2), 20, []
    for _ in range(4000):
        times = (
            np.arange(-5, 0, 1 / rate) + rng.uniform(0, 1 / rate)
            if not arrivals
            else rng.uniform(-5, 0, rng.poisson(100))
        )
        counts.append(int((times + rng.uniform(0.5, 1.5, len(times)) > 0).sum()))
    own = rate * mean_difference(rng.uniform(0.5, 1.5, 5000)) / 2

    assert np.mean(counts) == pytest.approx(rate, rel=0.02)
    assert np.var(counts) == pytest.approx(own + arrivals * (rate - own), rel=0.1)


@pytest.mark.parametrize(
    ("load", "expected"),
    [
        ({}, 1),
        ({"arrivals": "constant"}, 0),
        ({"arrivals": "gamma", "burstiness": 0.25}, 4),
        ({"arrivals": "gamma"}, 1),
    ],
)
def test_how_uneven_arrivals_are(load, expected):
    assert dispersion(load) == expected


@pytest.mark.parametrize(("took_s", "kept_up"), [(1.0, True), (6.0, None)])
def test_a_window_shorter_than_two_requests_does_not_show_that_a_server_keeps_up(tmp_path, took_s, kept_up):
    """Ten requests a second for 10 s that all take as long."""
    records = [record(f"{n:032x}", intended_at=n / 10, sent_at=n / 10, ended_at=n / 10 + took_s) for n in range(100)]
    folder = write_folder(tmp_path / "run", records)
    (folder / "experiment.yaml").write_text("load: {shape: rate, rate: 10, arrivals: poisson}\n")

    assert evidence(folder).kept_up is kept_up


@pytest.mark.parametrize(("rate", "kept_up"), [(10, True), (13, False), ("[[0, 13], [10, 13]]", False)])
def test_a_run_tells_what_was_asked_of_the_server(tmp_path, rate, kept_up):
    records = [
        record(f"{n:032x}", intended_at=n / 13, sent_at=n / 13, ended_at=n / 13 + 0.01 + 1.9 * n / 130)
        for n in range(130)
    ]
    folder = write_folder(tmp_path / "run", records)
    (folder / "experiment.yaml").write_text(f"load: {{shape: rate, rate: {rate}, arrivals: constant}}\n")

    assert evidence(folder).kept_up == kept_up
