"""The soak: a tiny one through the same code, and its arithmetic on invented looks. Nothing here is about speed."""

import json
from argparse import Namespace
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from twoclocks.record import read_records
from twoclocks.truth import SentLog

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture
def soak(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import soak

    return soak


def test_a_tiny_soak_accounts_for_every_request_and_looks_at_every_process(soak, tmp_path, monkeypatch):
    for name, seconds in (("LOOK_S", 0.1), ("TAB_S", 0.2), ("SCRAPE_S", 0.5)):
        monkeypatch.setattr(soak, name, seconds)
    words = ["--requests", "300", "--rate", "120", "--tokens", "5", "--ttft-ms", "20", "--tpot-ms", "4"]
    code = soak.main([*words, "--keep", str(tmp_path / "kept"), "--out", str(tmp_path)])

    (path,) = tmp_path.glob("*-soak.json")
    told = json.loads(path.read_text())
    records = list(read_records(tmp_path / "kept" / "run" / "requests.jsonl"))
    measured = sorted((r for r in records if r.phase != "warmup"), key=lambda r: r.intended_at)
    accounts = told["accounts"]
    assert accounts["server"] == accounts["records"] == len(records) == 300 + accounts["records"] - len(measured)
    assert accounts["tab"] == accounts["exporter"] == accounts["measured"] == len(measured) == 300
    assert accounts["tokens_server"] == accounts["tokens_records"] == 5 * len(records)
    assert {row["role"] for row in told["processes"]} == {"locust", "collector", "exporter", "live_run"}
    assert all(row["most_rss_mb"] > 1 and row["looks"] for row in told["processes"])
    assert [row["requests"] for row in told["stretches"]] == [30] * 10
    late = [(r.sent_at - r.intended_at) * 1e3 for r in measured[-30:]]
    assert told["stretches"][-1]["late_ms"]["p50"] == pytest.approx(np.median(late))
    assert told["disk"]["chunks"] == sum(len(r.chunk_us) for r in records)
    assert told["disk"]["requests_jsonl"] == (tmp_path / "kept" / "run" / "requests.jsonl").stat().st_size
    # whatever was slow or too short here, what is counted has to hold, and the exit code is that of the bounds
    held = {bound["name"]: bound["held"] for bound in told["bounds"]}
    assert all(held[name] for name in held if name.startswith(("requests:", "tokens:", "nothing failed")))
    assert code == (0 if all(held.values()) else 1)
    again = soak.main([*words, "--judge", str(tmp_path / "kept"), "--out", str(tmp_path / "again")])
    (path_again,) = (tmp_path / "again").glob("*-soak.json")
    assert (again, json.loads(path_again.read_text())) == (code, told)
    assert f"{len(held) - sum(held.values())} of {len(held)} bounds are BROKEN" in path.with_suffix(".md").read_text()


def looks_at(soak, mb, seconds=100):
    """A process that is looked at once a second; ``mb``: second -> its memory."""
    return [
        soak.Look(at=at, role="locust", pid=7, rss_mb=mb(at), files=9, sockets=3, threads=2, cpu_s=float(at))
        for at in range(seconds)
    ]


def test_memory_that_grows_is_told_in_mib_per_100_000_requests(soak):
    rng = np.random.default_rng(1)
    (row,) = soak.growth(looks_at(soak, lambda at: 60 + 0.5 * at + rng.normal(0, 0.2)), lambda at: 1000.0 * at)

    line = row["rss_mb"]
    assert line["low"] < 50 < line["high"]  # 0.5 MiB per 1,000 requests
    assert line["high"] - line["low"] < 5
    assert row["files"] == {"per_100k": 0.0, "low": 0.0, "high": 0.0, "first": 9.0, "last": 9.0}
    assert row["cpu_s"] == 99


def test_what_a_process_takes_at_its_beginning_is_no_growth(soak):
    (row,) = soak.growth(looks_at(soak, lambda at: 60 + min(at, 15) + 0.01 * (at % 3)), lambda at: 1000.0 * at)

    assert abs(row["rss_mb"]["per_100k"]) < 0.5


def test_too_few_looks_are_no_proof(soak):
    (row,) = soak.growth(looks_at(soak, lambda at: 60, seconds=5), lambda at: 1000.0 * at)

    assert row["rss_mb"] is None


def result(soak, rows, **changes):
    """All that `bounds` looks at, of a run in which nothing was wrong."""
    accounts = {
        "asked_for": 10, "measured": 10, "exporter": 10.0, "tab": 10, "records": 14, "server": 14, "only_in_records": 0,
        "only_at_server": 0, "twice": 0, "other_tokens": 0, "tokens_records": 70, "tokens_server": 70, "failed": {},
        "not_sent": 0, "lost_records": 0,
    }  # fmt: skip
    flat = {"ms": 0.0, "low": -0.01, "high": 0.01}
    told = {"processes": rows, "most_at_once": 3, "drift_ms": {"p50": flat, "p99": flat}, "answers": {"tab": 4}}
    return told | {"accounts": accounts | changes.pop("accounts", {})} | changes


def broken(soak, told):
    return [bound.name for bound in soak.bounds(told) if not bound.held]


def test_bounds_hold_where_nothing_is_wrong_and_break_by_what_is(soak):
    flat = soak.growth(looks_at(soak, lambda at: 60.0), lambda at: 1000.0 * at)
    leaky = soak.growth(looks_at(soak, lambda at: 60 + 0.1 * at), lambda at: 1000.0 * at)
    many = [flat[0] | {"most_sockets": 1000}]
    rising = {"ms": 4.5, "low": 3.5, "high": 5.5}

    assert broken(soak, result(soak, flat)) == []
    assert broken(soak, result(soak, leaky)) == ["locust: memory"]
    assert broken(soak, result(soak, many)) == ["locust: sockets"]
    assert broken(soak, result(soak, flat, drift_ms={"p50": rising})) == ["send lateness p50: drift"]
    assert broken(soak, result(soak, flat, drift_ms={"p50": None})) == ["send lateness p50: drift"]
    assert broken(soak, result(soak, flat, accounts={"tab": 9})) == [
        "requests: asked for = records = exporter = live tab"
    ]
    assert broken(soak, result(soak, flat, accounts={"only_at_server": 1})) == [
        "requests: records = server's log, by id"
    ]
    assert broken(soak, result(soak, flat, accounts={"other_tokens": 1})) == ["tokens: records = server's log, by id"]
    assert broken(soak, result(soak, flat, accounts={"not_sent": 1})) == ["nothing failed, held back or lost"]
    assert broken(soak, result(soak, flat, answers={"tab": 3, "tab failed": 1})) == ["live tab and exporter answered"]


def test_a_drift_of_lateness_is_found_and_a_few_bad_slices_are_none(soak):
    rng = np.random.default_rng(3)
    late = rng.exponential(1.0, 200_000)
    bad = late.copy()
    bad[150_000:160_000] += 100  # for a while
    late_of_rising = late + np.linspace(0, 5, len(late))
    calm = np.ones(len(late), dtype=bool)

    rose = soak.drift(late_of_rising, calm, 50.0)
    assert rose["low"] < 5 < rose["high"]
    assert rose["high"] - rose["low"] < 0.5
    for percentile in (50.0, 99.0):
        told = soak.drift(bad, calm, percentile)
        assert told["low"] < 0 < told["high"] < 1
    assert soak.drift(bad, calm & (bad < 50), 99.0)["slices"] < 40  # those of which too few are left
    assert soak.drift(late, np.arange(len(late)) < 100_000, 50.0) is None  # too little of the run is told


def test_what_the_host_disturbed_is_known_by_the_looks_at_the_machine(soak):
    def ticks(seconds, stolen):
        return [100 * seconds, 0, 0, 100 * seconds - stolen, 0, 0, 0, stolen]

    machine = [(1000.0 + at, ticks(at, 30 if at >= 6 else 0)) for at in range(0, 12, 2)]
    at = np.array([999.0, 1001.0, 1003.0, 1004.5, 1005.5, 1006.5, 1008.5, 1011.0])

    # nothing is known of the first look and beyond the last; the steal between 1004 and 1006 counts until 1008
    assert soak.undisturbed(at, machine).tolist() == [False, False, True, False, False, False, True, False]
    assert not soak.undisturbed(at, [(when, []) for when, _ in machine]).any()


def test_requests_at_once(soak):
    rng = np.random.default_rng(2)
    sent = rng.uniform(0, 10, 200)
    ended = sent + rng.uniform(0.1, 2, 200)
    by_hand = max(int(((sent <= at) & (ended > at)).sum()) for at in sent)

    assert soak.most_at_once(sent, ended) == by_hand
    assert soak.most_at_once(np.array([np.nan, 1.0]), np.array([1.0, 2.0])) == 1


def test_a_request_that_is_missing_twice_or_short_is_seen(soak):
    log = SentLog(
        meta={"schedule": {"chunk_tokens": 1, "write_chunks": 1}},
        request_id=["a", "b", "c"],
        arrived_ns=np.zeros(3, dtype=np.int64),
        role_ns=np.zeros(3, dtype=np.int64),
        cut_ns=np.zeros(3, dtype=np.int64),
        tokens=np.array([5, 5, 5]),
        writes=np.array([5, 5, 4]),  # the client of c left
        events=np.empty(0, np.int32),
        due_ns=np.empty(0, np.int64),
        before_ns=np.empty(0, np.int64),
        after_ns=np.empty(0, np.int64),
    )
    at = np.array([1.0, 2.0])
    requests = soak.Requests({"a": 5, "x": 5}, 3, Counter(), at, at, at + 1, chunks=10, bytes=99, sampled=[])
    page = 'twoclocks_requests_total{run="r",phase="measure",status="ok"} 2.0\n'
    told = soak.account(requests, log, {"not_sent": 0, "lost_records": 0}, soak.Seen(page=page), 2)

    assert (told["only_in_records"], told["only_at_server"], told["twice"]) == (1, 2, 1)
    assert (told["tokens_server"], told["tokens_records"], told["other_tokens"]) == (10, 10, 0)
    assert (told["exporter"], told["tab"]) == (2.0, None)


def test_a_folder_that_exists_is_not_overwritten(soak, tmp_path):
    with pytest.raises(SystemExit, match="exists already"):
        soak.main(["--keep", str(tmp_path), "--out", str(tmp_path)])


def test_the_load_is_an_open_loop_of_so_many_requests(soak, tmp_path):
    options = Namespace(requests=9, rate=3.0, tokens=7)
    told = soak.experiment(options, "http://127.0.0.1:1", tmp_path, 9)

    assert (told["load"]["shape"], told["load"]["requests"], told["workload"]["max_tokens"]) == ("rate", 9, 7)
