"""The figures of a run that goes on: against summary.json of the same run, and against numpy by hand."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
from make_run import make_run, record, write_folder
from test_live import ended

from twoclocks import live_run
from twoclocks.live_run import Counted, LiveRun, Question
from twoclocks.load import load_run
from twoclocks.metrics import distribution
from twoclocks.record import HUNG_UP
from twoclocks.summary import summarise

STATISTICS = ("value", "n", "mean", "p50", "p95", "p99", "min", "max")


def read_all(run: LiveRun, now: float) -> dict:
    run.read(now, seconds=60)
    return run.answer(now, since=0)


def same_figures(told, expected):
    for name, figure in told["figures"].items():
        for statistic in STATISTICS:
            if (value := figure.get(statistic)) is None:
                assert expected[name].get(statistic) is None
            else:
                assert value == pytest.approx(expected[name][statistic], rel=1e-9), (name, statistic)
        if "definition" in figure:
            assert expected[name]["definition"].startswith(figure["definition"])
        assert figure["unit"] == expected[name]["unit"]


@pytest.mark.parametrize("part", [1, 5000, 10**7])
def test_the_figures_of_a_run_that_is_over_are_those_of_its_summary(tmp_path, monkeypatch, part):
    make_run(tmp_path / "run", requests=80, failures=3)
    middle_ms = load_run(tmp_path / "run").ok["ttft"].median() * 1e3
    (tmp_path / "run" / "experiment.yaml").write_text(f"slo: {{ttft_ms: {middle_ms}, e2e_ms: 9000}}\n")
    expected = json.loads(json.dumps(summarise(load_run(tmp_path / "run"))))["figures"]
    monkeypatch.setattr(live_run, "PART_BYTES", part)
    told = read_all(LiveRun(tmp_path / "run"), now=1000.0)

    assert told["bytes_behind"] == 0
    assert 0 < told["figures"]["goodput_share"]["value"] < 1
    assert {"goodput", "output_throughput", "itl", "tpot", "ok", "failed"} <= told["figures"].keys()
    same_figures(told, expected)
    assert told["errors"][0]["count"] == 3


def test_requests_after_the_window_and_those_hung_up_on_are_counted_as_in_the_summary(tmp_path):
    chunks = {"chunk_kinds": [("content", 2)], "output_tokens": 2}
    cut, left = {"status": "cancelled", "error_kind": "stopped"}, {"status": "cancelled", "error_kind": HUNG_UP}
    made = [
        record(f"{n:032x}", sent_at=n, ended_at=n + 1.5, chunk_us=[400_000, 600_000 + n], **chunks, **fields)
        for n, fields in enumerate([{}, left, {}, cut, {}])
    ]
    folder = write_folder(tmp_path / "run", made, window={"started_at": 0.0, "ended_at": 3.5})
    (folder / "experiment.yaml").write_text("slo: {ttft_ms: 500}\n")
    told = read_all(LiveRun(folder), now=99.0)

    same_figures(told, summarise(load_run(folder))["figures"])
    assert (told["figures"]["requests"]["value"], told["figures"]["ok"]["value"]) == (4, 2)


def test_seconds_are_percentiles_of_the_last_ten(tmp_path):
    rng = np.random.default_rng(1)
    times = np.sort(rng.uniform(2, 40, 300)).tolist()
    made = [ended(at, ttft_ms=int(ttft)) for at, ttft in zip(times, rng.integers(50, 900, 300), strict=True)]
    folder = write_folder(tmp_path / "run", [], status="running", window={"started_at": 2.0, "ended_at": None})
    (folder / "experiment.yaml").write_text("slo: {ttft_ms: 500}\n")
    ttfts = np.array([json.loads(line)["chunk_us"][0] / 1e6 for line in made])
    run = LiveRun(folder)
    for begin in range(0, 300, 7):  # as they come
        with (folder / "requests.jsonl").open("ab") as file:
            file.write(b"".join(made[begin : begin + 7]))
        run.read(times[min(begin + 6, 299)])
    told = read_all(run, now=45.0)["seconds"]
    rows = dict(zip(told["at"], range(len(told["at"])), strict=True))

    for second in range(2, 40):
        inside = (np.array(times) >= second - 9) & (np.array(times) < second + 1)
        expected = np.percentile(ttfts[inside], (50, 95, 99))
        assert [told[f"ttft_p{p}"][rows[second]] for p in (50, 95, 99)] == pytest.approx(expected), second
        length = min(10, second + 1 - 2)
        assert told["request_throughput"][rows[second]] == pytest.approx(inside.sum() / length)
        assert told["goodput"][rows[second]] == pytest.approx((inside & (ttfts <= 0.5)).sum() / length)
        assert told["tpot_p50"][rows[second]] == pytest.approx(0.02)


def test_tokens_stand_in_the_second_in_which_they_arrived(tmp_path):
    chunks = {"chunk_us": [100_000, 1_000_000, 1_000_000], "chunk_kinds": [("content", 3)]}
    made = [record(sent_at=3.5, ended_at=9.0, **chunks, chunk_tokens=[3, None, None], output_tokens=9)]
    told = read_all(LiveRun(write_folder(tmp_path / "run", made)), now=99.0)["seconds"]
    tokens = {at: count for at, count in zip(told["at"], told["output_throughput"], strict=True) if count}

    assert tokens == {3: 3, 4: 3, 5: 3}


def test_a_run_that_is_over_does_not_go_on(tmp_path):
    folder = write_folder(tmp_path / "run", [], window={"started_at": 0.0, "ended_at": 4.5})
    (folder / "requests.jsonl").write_bytes(b"".join(ended(at) for at in (1, 2, 3, 4, 5)))
    told = read_all(LiveRun(folder), now=99.0)

    assert told["at"] == 4.5
    assert max(told["seconds"]["at"]) == 5  # of the drain
    assert told["seconds"]["ttft_p50"][-1] is not None


def test_only_what_has_changed_is_told_again(tmp_path):
    folder = write_folder(tmp_path / "run", [], status="running", window={"started_at": 0.0, "ended_at": None})
    run = LiveRun(folder)
    with (folder / "requests.jsonl").open("ab") as file:
        file.write(b"".join(ended(at) for at in range(1, 30)) + b'{"cut')
        file.flush()
        run.read(31.0)
        first = run.answer(31.0, since=0)
        run.read(32.0)
        second = run.answer(32.0, since=first["seq"])
    assert len(first["seconds"]["at"]) >= 29
    assert len(second["seconds"]["at"]) <= 2
    assert second["bytes_behind"] == len(b'{"cut')
    assert second["figures"]["ok"]["value"] == 29


def test_gauges_and_load_stand_on_the_same_seconds_and_a_failed_scrape_leaves_a_gap(tmp_path):
    folder = write_folder(tmp_path / "run", [])
    running, waiting, kv = "vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc"
    pages = [
        {"url": "u", "at": 1.2, "samples": [[running, {}, 3], [kv, {}, 0.5]]},
        {"url": "g", "at": 1.3, "samples": [[running, {}, 99]], "stage": "gateway"},
        {"url": "u", "at": 2.2, "samples": [], "error": "refused"},
        {"url": "u", "at": 3.2, "samples": [[waiting, {}, 7]]},
    ]
    (folder / "server_samples.jsonl").write_text("".join(json.dumps(page) + "\n" for page in pages))
    selves = [(1.0, 0, 2, 1), (1.5, 1, 3, 3), (3.5, 1, 4, 4), (9.0, 0, 1, 0)]
    lines = [json.dumps(dict(zip(("at", "worker", "users", "in_flight"), one, strict=True))) for one in selves]
    (folder / "self_samples.jsonl").write_text("".join(f"{line}\n" for line in lines))
    told = read_all(LiveRun(folder), now=99.0)["seconds"]

    assert told["at"] == [1, 2, 3, 9]
    assert told["running"] == [3, None, 3, None]
    assert told["waiting"] == [None, None, 7, None]
    assert told["kv_cache_usage"] == [0.5, None, 0.5, None]
    assert told["users"] == [5, None, 6, 1]  # of all workers; one that was silent for long is gone
    assert told["in_flight"] == [4, None, 5, 0]


def test_memory_is_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr(live_run, "KEPT", 50)
    monkeypatch.setattr(live_run, "SHOWN_S", 20)
    folder = write_folder(tmp_path / "run", [], status="running", window={"started_at": 0.0, "ended_at": None})
    (folder / "requests.jsonl").write_bytes(b"".join(ended(at) for at in range(500)))
    run = LiveRun(folder)
    told = read_all(run, now=600.0)

    assert len(told["seconds"]["at"]) <= 20
    assert len(run._ended) <= 10
    assert 50 <= told["figures"]["ttft"]["n"] <= 100
    assert told["figures"]["ttft"]["label"].endswith(", of the newest")
    assert (told["figures"]["itl"]["n"], told["figures"]["ok"]["value"]) == (1000, 500)


def test_of_too_many_values_the_newest_are_kept(monkeypatch):
    monkeypatch.setattr(live_run, "KEPT", 50)
    newest, told = live_run._Newest(), np.empty(0)
    for size in (30, 70, 1, 60, 20, 300, 0, 10):
        values = np.arange(len(told), len(told) + size, dtype=np.float64)
        newest.add(values)
        told = np.concatenate([told, values])
        n = newest.distribution()["n"]

        assert 50 <= n <= 100 or n == len(told)
        assert newest.distribution() == distribution(told[-n:])
        assert newest.lost == (n < len(told))


def test_who_reads_a_run_stands_back_behind_who_sends():
    kept_open = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-m", "twoclocks.live_run"], **kept_open) as reader:
        reader.stdin.write(live_run.msgspec.json.encode(Question(folder="/none", now=1.0)) + b"\n")
        reader.stdin.flush()
        assert b"error" in reader.stdout.readline()
        priority = os.getpriority(os.PRIO_PROCESS, reader.pid)
        reader.stdin.close()

    assert priority == min(19, os.getpriority(os.PRIO_PROCESS, 0) + live_run.STAND_BACK)


def test_counted_durations_have_exact_percentiles():
    rng = np.random.default_rng(2)
    assert Counted().distribution() == distribution(np.empty(0))
    for n in (1, 2, 5000):
        micros = rng.lognormal(10, 2, n).astype(np.int64)
        counted = Counted()
        for part in np.array_split(micros, 7):
            counted.add(part)

        assert counted.distribution() == pytest.approx(distribution(micros / 1e6), rel=1e-12)
    assert micros.max() > live_run.LONGEST_US


def test_it_answers_until_its_input_ends(tmp_path):
    make_run(tmp_path / "a")
    questions = [Question(folder=str(tmp_path / name), now=99.0, run="a", since=0) for name in ("a", "gone")]
    lines = b"".join(live_run.msgspec.json.encode(question) + b"\n" for question in questions)
    command = [sys.executable, "-m", "twoclocks.live_run"]
    done = subprocess.run(command, input=lines, capture_output=True, check=True, timeout=60)
    told, gone = map(json.loads, done.stdout.splitlines())

    assert told["run"] == "a"
    assert "gone" in gone["error"]
    assert done.stderr == b""
