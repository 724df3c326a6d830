import numpy as np
import pytest
from make_run import make_run, run_of_ttfts

import twoclocks
from twoclocks import intervals, spread


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "r"
    make_run(folder, requests=60)
    return twoclocks.load_run(folder)


def test_percentiles_by_both_clocks(run):
    rows = {(row["metric"], row["side"]): row for row in spread.spread(run)}

    for (metric, side), column in {
        ("ttft", "client"): "ttft", ("ttft", "server"): "server_ttft", ("e2e", "client"): "e2e",
        ("tpot", "server"): "server_tpot",
    }.items():  # fmt: skip
        values, row = run.ok[column].dropna().to_numpy(), rows[metric, side]
        assert row["n"] == len(values)
        assert [row[f"p{p}"] for p in (10, 50, 95)] == pytest.approx(np.percentile(values, [10, 50, 95]))
        assert row["p99"] is None  # of 60 values none lies beyond it
        assert row["definition"]
    assert rows["ttft", "client"]["within_slo"] == pytest.approx((run.ok["ttft"] <= 0.25).mean())
    assert rows["ttft", "server"]["slo"] is None
    assert rows["ttft", "server"]["source"] == "in-band"
    assert ("itl", "server") not in rows


def test_far_percentiles_take_many_values(tmp_path):
    rng = np.random.default_rng(1)
    values = rng.lognormal(-2, 0.5, 1000)
    many = twoclocks.load_run(run_of_ttfts(tmp_path / "many", values))
    fewer = twoclocks.load_run(run_of_ttfts(tmp_path / "fewer", values[:999]))

    assert spread.spread(many)[0]["p99.9"] == pytest.approx(np.percentile(values.round(6), 99.9))
    assert spread.spread(fewer)[0]["p99.9"] is None


def test_a_curve_goes_through_values_that_occurred(tmp_path):
    values = np.random.default_rng(2).exponential(0.2, 5000)
    (curve,) = [one for one in spread.curves(twoclocks.load_run(run_of_ttfts(tmp_path / "r", values))) if
                one.metric == "ttft"]  # fmt: skip
    known = np.sort(values)

    assert len(curve.seconds) <= spread.POINTS
    assert (curve.shares[-1], curve.seconds[-1]) == (1.0, pytest.approx(known[-1], abs=1e-6))
    for seconds, share in zip(curve.seconds, curve.shares, strict=True):
        assert (known <= seconds + 1e-6).mean() == pytest.approx(share, abs=2e-3)
    assert (curve.shares > 0.999).sum() >= 4  # the tail is drawn closely


def test_figures_have_the_intervals_that_comparisons_have(run):
    told = spread.figure_intervals(run)
    expected = intervals.estimate([run.ok["ttft"].to_numpy()], "p50")

    assert told["ttft"]["p50"] == {"low": expected.low, "high": expected.high, "level": 0.95}
    assert "p99" not in told["ttft"]  # it takes 368 requests
    assert told["itl"]["p95"]["low"] < np.percentile(run.gaps.seconds, 95) < told["itl"]["p95"]["high"]
    assert 0 < told["goodput_share"]["mean"]["low"] < told["goodput_share"]["mean"]["high"] <= 1
    assert set(told) == set(spread.INTERVALS)
