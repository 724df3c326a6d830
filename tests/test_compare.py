import json

import numpy as np
import pytest
from make_run import make_run
from scipy import stats

import twoclocks
from twoclocks import compare
from twoclocks.errors import TwoclocksError


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("output")
    make_run(root / "slow", requests=60, slow=2.0)
    make_run(root / "quick", requests=60, seed=2)
    make_run(root / "quick-again", requests=60, seed=3)
    return root


def row(summary, metric, run):
    return next(r for r in summary["rows"] if r["metric"] == metric and r["run"] == run)


def test_a_planted_difference_is_found_and_an_absent_one_is_not(folders):
    runs = [twoclocks.load_run(folders / name) for name in ("quick", "quick-again", "slow")]
    summary = compare.differences(runs)

    slow, again = row(summary, "tpot", "slow"), row(summary, "tpot", "quick-again")

    assert slow["verdict"] == "slower"
    assert slow["low"] <= slow["difference"] <= slow["high"]
    assert slow["difference"] == pytest.approx(0.02, rel=0.2)
    assert again["verdict"] == "within chance"


def test_the_interval_is_scipys():
    rng = np.random.default_rng(0)
    first, other = rng.lognormal(0, 0.5, 80), rng.lognormal(0.3, 0.5, 60)

    def difference(a, b, axis=-1):
        return np.median(b, axis=axis) - np.median(a, axis=axis)

    expected = stats.bootstrap(
        (first, other), difference, method="percentile", n_resamples=9999, rng=rng
    ).confidence_interval
    found, low, high = compare.median_difference(first, other, resamples=9999)

    assert found == np.median(other) - np.median(first)
    assert (low, high) == pytest.approx((expected.low, expected.high), abs=0.03)


def test_the_same_seed_gives_the_same_interval():
    values = np.arange(50.0)

    assert compare.median_difference(values, values + 1) == compare.median_difference(values, values + 1)


def test_what_two_clocks_of_a_server_tell_stands_in_two_rows(folders, tmp_path):
    make_run(tmp_path / "spans", requests=60, spans=True)
    runs = [twoclocks.load_run(folders / "quick"), twoclocks.load_run(tmp_path / "spans")]

    rows = [r for r in compare.differences(runs)["rows"] if r["metric"] == "server_ttft"]

    assert [(r["run"], r["label"], r["n"], r["difference"]) for r in rows] == [
        ("quick", "TTFT, server (in-band, vllm)", 60, None),
        ("spans", "TTFT, server (otlp, vllm)", 60, None),
    ]
    assert rows[0]["definition"] != rows[1]["definition"]


def test_files_and_their_place(folders):
    built = compare.compare([folders / "quick", folders / "slow"])

    assert built.html == folders / "compare-quick-vs-slow" / "report.html"
    assert (folders / "compare-quick-vs-slow" / "plots" / "client_vs_server_violin.png").exists()
    assert json.loads((folders / "compare-quick-vs-slow" / "summary.json").read_text())["rows"][0]["run"] == "quick"
    assert "quick vs slow" in built.html.read_text()


def test_a_place_of_ones_own(folders, tmp_path):
    assert (
        compare.compare([folders / "quick", folders / "slow"], out=tmp_path / "deep" / "x").html
        == tmp_path / "deep" / "x" / "report.html"
    )


def test_unlike_work_is_called_unlike(folders, tmp_path):
    make_run(tmp_path / "other", requests=10, users=3)
    runs = [twoclocks.load_run(folders / "quick"), twoclocks.load_run(tmp_path / "other")]

    summary = compare.differences(runs)

    assert summary["load_differs"] == ["load.users"]
    assert summary["settings_differ"] == [{"key": "load.users", "values_shown": ["6", "3"]}]
    assert "did not do the same work: load.users" in compare.text(summary)


def test_too_few_requests_get_no_interval(folders, tmp_path):
    make_run(tmp_path / "tiny", requests=3)

    summary = compare.differences([twoclocks.load_run(folders / "quick"), twoclocks.load_run(tmp_path / "tiny")])

    found = row(summary, "ttft", "tiny")
    assert found["difference"] is not None
    assert found["low"] is None


def test_one_run_is_no_comparison(folders):
    with pytest.raises(TwoclocksError, match="two run folders"):
        compare.compare([folders / "quick"])
