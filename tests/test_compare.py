import json

import msgspec
import numpy as np
import pytest
from make_run import make_run, run_of_ttfts
from scipy import stats

import twoclocks
from twoclocks import compare, compare_text
from twoclocks.errors import TwoclocksError
from twoclocks.study import Cell, Study


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
    same = compare.differences([runs[0], runs[0]])["rows"][-1]["differences"]
    assert {one["verdict"] for one in same} == {"within chance", None}  # no calibration, no error to hold it against


def test_every_figure_has_its_difference_and_ratio(folders):
    runs = [twoclocks.load_run(folders / name) for name in ("quick", "slow")]
    found = {one["statistic"]: one for one in row(compare.differences(runs), "e2e", "slow")["differences"]}

    assert list(found) == ["mean", "p50", "p95", "p99"]
    first, other = (run.ok["e2e"].to_numpy() for run in runs)
    assert found["mean"]["difference"] == pytest.approx(other.mean() - first.mean())
    assert found["mean"]["ratio"] == pytest.approx(other.mean() / first.mean())
    assert found["p99"]["difference"] == pytest.approx(np.percentile(other, 99) - np.percentile(first, 99))
    expected = stats.bootstrap(
        (first, other), lambda a, b, axis: b.mean(axis=axis) - a.mean(axis=axis), method="percentile", rng=1
    ).confidence_interval
    width = expected.high - expected.low
    assert (found["mean"]["low"], found["mean"]["high"]) == pytest.approx(
        (expected.low, expected.high), abs=0.12 * width
    )
    assert found["mean"]["ratio_low"] < found["mean"]["ratio"] < found["mean"]["ratio_high"]
    assert found["p95"]["low"] is None  # of 60 requests; it takes 72
    assert found["p50"]["verdict"] == "slower"


def test_runs_of_the_same_prompts_are_paired(tmp_path):
    rng = np.random.default_rng(1)
    prompt = rng.normal(0, 0.5, 40)
    runs = [
        twoclocks.load_run(run_of_ttfts(tmp_path / name, 0.1 * np.exp(prompt + shift + rng.normal(0, 0.05, 40))))
        for name, shift in (("a", 0.0), ("b", 0.1))
    ]
    one = row(compare.differences(runs), "ttft", "b")["differences"][0]

    assert (one["statistic"], one["paired"], one["verdict"]) == ("mean", True, "slower")
    assert one["ratio"] == pytest.approx(np.exp(0.1), rel=0.03)
    few = twoclocks.load_run(run_of_ttfts(tmp_path / "c", 0.1 * np.exp(prompt[:15])))
    assert not row(compare.differences([few, runs[0]]), "ttft", "a")["differences"][0]["paired"]


def test_repeats_of_a_side_stand_together(folders):
    built = compare.compare([folders / "quick", folders / "quick-again"], versus=[folders / "slow"])

    assert [side["name"] for side in built.summary["sides"]] == ["quick (2 repeats)", "slow"]
    assert row(built.summary, "ttft", "quick (2 repeats)")["n"] == 120
    assert [run["label"] for run in built.summary["runs"]] == ["quick", "quick-again", "slow"]
    assert built.html.parent.name == "compare-quick-and-1-more-vs-slow"


def test_a_study_is_its_targets_each_with_its_repeats(tmp_path):
    cells = []
    for number, (target, repeat) in enumerate([("a", 1), ("b", 1), ("b", 2), ("a", 2), ("a", 3)], 1):
        make_run(tmp_path / f"{number:02d}", requests=12, seed=number, slow=1.0 + (target == "b"))
        status = "failed" if repeat == 3 else "finished"
        cells.append(Cell(number=number, target=target, repeat=repeat, folder=f"{number:02d}", status=status))
    of_study = {"name": "s", "twoclocks_version": "1", "experiment_file": "x", "overrides": [], "order": "abba"}
    study = Study(**of_study, repeats=3, targets=["a", "b"], variants=[""], cells=cells)
    (tmp_path / "study.json").write_bytes(msgspec.json.encode(study))

    built = compare.compare([tmp_path])

    assert built.summary["sides"] == [
        {"name": "a (2 repeats)", "runs": ["01", "04"]},
        {"name": "b (2 repeats)", "runs": ["02", "03"]},
    ]
    assert row(built.summary, "tpot", "b (2 repeats)")["verdict"] == "slower"


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
    assert "did not do the same work: load.users" in compare_text.text(summary)


def test_too_few_requests_get_no_interval(folders, tmp_path):
    make_run(tmp_path / "tiny", requests=3)

    summary = compare.differences([twoclocks.load_run(folders / "quick"), twoclocks.load_run(tmp_path / "tiny")])

    found = row(summary, "ttft", "tiny")
    assert found["difference"] is not None
    assert found["low"] is None


def test_one_run_is_no_comparison(folders):
    with pytest.raises(TwoclocksError, match="two run folders"):
        compare.compare([folders / "quick"])
