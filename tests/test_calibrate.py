"""The instrument's own error: the comparison on invented logs, and the whole way on a small load."""

import json
import math
from pathlib import Path

import msgspec
import numpy as np
import pytest
import yaml
from make_run import make_run

from twoclocks import load_run
from twoclocks.calibrate import (
    calibrate,
    judge,
    known_schedule,
    machine_shares,
    replay_like,
    replayed,
    run_locust,
)
from twoclocks.calibration import (
    Calibration,
    Replay,
    calibration_of,
    load_calibration,
    resolves,
    save,
    text,
)
from twoclocks.cli import main
from twoclocks.compare import compare
from twoclocks.errors import RunFolderError, TwoclocksError
from twoclocks.experiment import Experiment, Load, Search, Sweep, Target, Workload, load_experiment
from twoclocks.record import Record
from twoclocks.summary import summarise
from twoclocks.terminal import render, to_text
from twoclocks.truth import ErrorFigures, SentLog, differences, error_figures, mean_streams, read_log, seen

MS = 1_000_000
ROOT = Path(__file__).parent.parent


def make_log(requests, *, chunk_tokens=1):
    """A log of (request id, arrival in ms, tokens, [(events, sent at ms)])."""
    writes = [write for _, _, _, sent in requests for write in sent]
    at = np.array([round(ms * MS) for _, ms in writes], dtype=np.int64)
    return SentLog(
        meta={"schedule": {"chunk_tokens": chunk_tokens, "tpot_ms": 20.0}},
        request_id=[request_id for request_id, *_ in requests],
        arrived_ns=np.array([round(arrived * MS) for _, arrived, *_ in requests], dtype=np.int64),
        role_ns=np.zeros(len(requests), dtype=np.int64),
        cut_ns=np.zeros(len(requests), dtype=np.int64),
        tokens=np.array([tokens for _, _, tokens, _ in requests], dtype=np.int64),
        writes=np.array([len(sent) for *_, sent in requests], dtype=np.int64),
        events=np.array([events for events, _ in writes], dtype=np.int32),
        due_ns=at - MS,
        before_ns=at - MS // 10,
        after_ns=at,
    )


def client(request_id, *offsets_ms):
    return request_id, np.array([round(ms * MS) for ms in offsets_ms], dtype=np.int64)


def test_differences_are_client_minus_server_without_a_common_zero():
    log = make_log([("a", 1000, 3, [(1, 1100), (1, 1120), (1, 1140)]), ("b", 5, 1, [(1, 25)])])
    found = differences([client("b", 21), client("a", 101, 120, 145)], log)

    assert found.ttft == pytest.approx([0.001, 0.001])
    assert found.gap == pytest.approx([-0.001, 0.005])
    assert found.tpot == pytest.approx([0.002])  # (44 - 40) / 2; one token has none
    assert found.e2e == pytest.approx([0.001, 0.005])
    assert (found.compared, found.unknown) == (2, 0)


def test_events_of_one_write_make_no_gaps_of_their_own():
    """Eight of ten gaps would otherwise be a perfect 0 = 0, and hide the others in any percentile."""
    log = make_log([("a", 0, 6, [(2, 100), (2, 140), (2, 180)])])
    found = differences([client("a", 100, 100, 141, 141, 180, 180)], log)

    assert found.gap == pytest.approx([0.001, -0.001])
    assert found.tpot == pytest.approx([0.0])


def test_tokens_of_a_chunk_divide_tpot():
    log = make_log([("a", 0, 10, [(1, 100), (1, 200)])], chunk_tokens=5)

    assert differences([client("a", 100, 210)], log).tpot == pytest.approx([0.010 / 5])


def test_what_does_not_match_is_counted_and_not_compared():
    log = make_log([("a", 0, 2, [(1, 10), (1, 20)]), ("b", 0, 2, [(1, 10), (1, 20)])])
    found = differences([client("a", 10), client("stranger", 10, 20), client("b", 10, 20)], log)

    assert (found.compared, found.unknown) == (1, 2)


def test_the_servers_own_error_is_told_apart():
    log = make_log([("a", 0, 2, [(1, 10), (1, 20)])])

    assert log.lateness_s == pytest.approx([0.001, 0.001])
    assert log.bracket_s == pytest.approx([0.0001, 0.0001])


def test_error_figures_against_numpy():
    signed = np.random.default_rng(1).normal(0.001, 0.01, 5000)
    figures = error_figures(signed)
    ordered = np.sort(np.abs(signed))

    assert figures.p50 == pytest.approx(np.median(ordered))
    assert ordered[4948] <= figures.p99 <= ordered[4951]
    assert (figures.n, figures.max, figures.mean) == (5000, ordered[-1], pytest.approx(signed.mean()))
    assert error_figures(np.empty(0)) == ErrorFigures(0)


def test_mean_streams_by_hand():
    sent, ended = np.array([0.0, 5.0, 9.0, -4.0]), np.array([10.0, 10.0, 30.0, -1.0])

    assert mean_streams(sent, ended, (0.0, 10.0)) == pytest.approx((10 + 5 + 1 + 0) / 10)


def test_only_token_chunks_of_a_record_are_compared():
    record = Record(
        request_id="a", target="t", prompt_id="p", user=0, worker=0, phase="measure", intended_at=0.0, sent_at=0.0,
        ended_at=1.0, status="ok", chunk_us=[100, 0, 20, 30, 5],
        chunk_kinds=[("role", 1), ("content", 2), ("reasoning", 1), ("usage", 1)],
    )  # fmt: skip

    assert seen(record)[1].tolist() == [100_000, 120_000, 150_000]


def figures(p99):
    return ErrorFigures(10, p99 / 10, p99, p99 * 3, 0.0)


def calibration(**changes):
    plain = Calibration(
        twoclocks_version="0", made_at_unix=1.0, hostname="here", platform="p", reader="native", processes=1,
        replay=Replay(), streams=100.0, chunks_per_s=5000.0, requests=10, not_compared=0,
        errors={"ttft": figures(0.0005), "gap": figures(0.00005), "tpot": figures(0.00001), "e2e": figures(0.0004)},
        server_lateness=figures(0.001), server_bracket=figures(0.00001), timestamp_sources={"kernel": 10},
        reads_merged=0, chunks=1280, steal_share=0.0, busy_share=0.5, loop_lag=figures(0.002), loop_cores=0.25,
    )  # fmt: skip
    return msgspec.structs.replace(plain, **changes)


def test_a_difference_below_the_bar_is_not_resolved():
    assert resolves(0.0006, calibration())
    assert resolves(-0.0006, calibration())
    assert not resolves(0.0005, calibration())
    assert resolves(0.0005, calibration(), "gap")


def test_nothing_is_resolved_where_nothing_was_compared():
    empty = calibration(errors={"ttft": ErrorFigures(0)})

    assert not resolves(1e9, empty)


@pytest.mark.parametrize(
    ("load", "speaks"),
    [
        ((100, 5000), True),
        ((124, 6200), True),  # the calibration is at 0.81 of it
        ((126, 5000), False),  # at 0.79
        ((51, 2600), True),
        ((49, 5000), False),  # at 2.04
        ((100, 12_000), False),
        ((math.nan, 5000), False),
        ((0, 0), False),
    ],
)
def test_a_calibration_speaks_for_about_its_own_load(tmp_path, load, speaks):
    save(calibration(), tmp_path / "one.json")

    assert (load_calibration(*load, hostname="here", kept_in=tmp_path) is not None) == speaks


def test_the_nearest_load_of_the_same_host_and_reader_is_found(tmp_path):
    for index, changes in enumerate(
        [
            {"streams": 90.0, "notes": ["near"]},
            {"streams": 180.0},
            {"hostname": "elsewhere"},
            {"reader": "python", "streams": 101.0},
        ]
    ):
        save(calibration(**changes), tmp_path / f"{index}.json")
    (tmp_path / "broken.json").write_text("{")
    found = load_calibration(100, 5000, hostname="here", reader="native", kept_in=tmp_path)

    assert found is not None
    assert found.notes == ["near"]
    assert load_calibration(100, 5000, hostname="nowhere", kept_in=tmp_path) is None
    assert load_calibration(100, 5000, hostname="here", kept_in=tmp_path / "empty") is None


def test_a_calibration_beside_the_run_comes_first(tmp_path):
    save(calibration(notes=["beside"]), tmp_path / "run" / "calibration.json")
    found = load_calibration(1, 1, run=tmp_path / "run", kept_in=tmp_path)

    assert found is not None
    assert found == calibration(notes=["beside"])


def test_it_is_kept_in_the_users_cache_by_default(tmp_path, monkeypatch):
    monkeypatch.setenv("TWOCLOCKS_CACHE", str(tmp_path))
    path = save(calibration(hostname="a/b"))

    assert path == tmp_path / "calibration" / "a_b-100x5000-native.json"
    assert load_calibration(100, 5000, hostname="a/b") is not None


def test_the_text_shows_errors_in_ms_and_what_disturbed_it():
    shown = text(calibration(notes=["the machine stalled: x"], errors=calibration().errors | {"tpot": ErrorFigures(0)}))
    lines = {line.split()[0]: line.split() for line in shown.splitlines() if line.startswith("  ")}

    assert lines["TTFT"] == ["TTFT", "10", "0.050", "0.500", "1.500", "0.000"]
    assert lines["TPOT"] == ["TPOT", "0", "–", "–", "–", "–"]
    assert "note: the machine stalled: x" in shown


def test_the_replayed_experiment_sends_no_secret_and_sets_no_goal():
    target = Target(url="https://real", headers={"Authorization": "secret"}, extra_body={"temperature": 0})
    experiment = Experiment(target=target, load=Load(users=7, ramp_s=100, duration_s=900))
    raw = replayed(experiment, Replay(seconds=5, output_tokens=9), "http://127.0.0.1:1", Path("out"))

    assert "secret" not in json.dumps(raw)
    assert raw["target"]["url"] == "http://127.0.0.1:1"
    assert raw["target"]["extra_body"] == {"temperature": 0, "max_tokens": 9}
    assert (raw["load"]["users"], raw["load"]["ramp_s"], raw["load"]["duration_s"]) == (7, 5, 10)
    assert experiment.target.extra_body == {"temperature": 0}


@pytest.mark.parametrize(
    ("load", "expected"),
    [
        ({"shape": "steps", "steps": [(2, 600), (9, 600), (4, 600)]}, {"shape": "ramp", "users": 9, "duration_s": 5}),
        ({"shape": "rate", "rate": [(0, 5), (60, 80), (90, 1)]}, {"shape": "rate", "rate": 80, "duration_s": 5}),
        ({"shape": "batch", "batch": 7, "batches": 2}, {"shape": "batch", "batch": 7, "batches": "none"}),
        ({"shape": "sweep", "sweep": Sweep(over="rate", levels=[3, 30, 9])}, {"shape": "rate", "rate": 30}),
        ({"shape": "search", "search": Search(over="users", high=64)}, {"shape": "ramp", "users": 64}),
        ({"requests": 5, "users": 3}, {"requests": "none", "users": 3}),
    ],
)
def test_a_load_is_replayed_at_its_heaviest(load, expected):
    raw = replayed(Experiment(load=Load(**load)), Replay(seconds=5), "http://127.0.0.1:1", Path("out"))

    assert {key: raw["load"][key] for key in expected} == expected


def test_shares_of_the_machines_time():
    before = [0, 0, 0, 0, 0, 0, 0, 0]

    assert machine_shares(before, [10, 0, 20, 60, 5, 0, 0, 5]) == (0.05, pytest.approx(0.35))
    assert machine_shares(None, before) is None


@pytest.fixture
def request_file(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"id": str(n), "prompt": "word " * 10 * n}) + "\n" for n in range(1, 6)))
    return path


def small(request_file, **load):
    settings = Load(**({"users": 3, "ramp_s": 0, "duration_s": 2, "drain_s": 10} | load))
    return Experiment(workload=Workload(requests=str(request_file), max_tokens=20), load=settings)


def test_the_error_of_a_small_load_is_what_numpy_says(tmp_path, request_file):
    """The whole way: server, Locust, records. Then the errors once more, from load_run's tables and plain loops."""
    replay = Replay(ttft_ms=20, tpot_ms=5, seconds=2)
    log_path = tmp_path / "sent.npz"
    with known_schedule([f"--log={log_path}", "--ttft-ms=20", "--tpot-ms=5"]) as url:
        folder = run_locust(replayed(small(request_file), replay, url, tmp_path / "out"), tmp_path, set(), 1)
    log = read_log(log_path)
    result = judge(folder, log, replay, None, [])
    run = load_run(folder)
    ok = run.requests[(run.requests["phase"] == "measure") & (run.requests["status"] == "ok")]
    ttft, gaps = [], []
    for request in ok.itertuples():
        row = log.request_id.index(request.request_id)
        first = int(log.writes[:row].sum())
        sent = log.after_ns[first : first + int(log.writes[row])]
        chunks = run.chunks[(run.chunks["request_id"] == request.request_id) & (run.chunks["kind"] == "content")]
        ttft.append(request.ttft - (sent[0] - log.arrived_ns[row]) / 1e9)
        gaps += [abs(g - s / 1e9) for g, s in zip(np.diff(chunks["at"]), np.diff(sent), strict=True)]

    assert result.requests == len(ok) >= 3
    assert result.not_compared == 0
    assert result.errors["ttft"].n == len(ok)
    assert result.errors["ttft"].max == pytest.approx(np.abs(ttft).max(), abs=2e-6)  # records round to microseconds
    assert result.errors["gap"].n == len(gaps) == 19 * len(ok)
    assert result.errors["gap"].p99 == pytest.approx(np.percentile(gaps, 99), abs=2e-6)
    assert result.streams == pytest.approx(3, rel=0.35)
    assert result.timestamp_sources.keys() == {"kernel"}
    assert sum(result.timestamp_sources.values()) == len(ok)
    assert (log.lateness_s > 0).all()
    rows = run.self_samples[run.self_samples["at"].between(*run.window)]
    assert result.loop_lag.n == sum(map(len, rows["loop_lag_s"]))
    if len(rows):
        assert result.loop_cores == pytest.approx((rows["cpu_s"] / rows["wall_s"]).mean())

    save(result, tmp_path / "kept" / "one.json")

    assert calibration_of(run, kept_in=tmp_path / "kept") == result
    assert calibration_of(run, kept_in=tmp_path / "none") is None

    like = replay_like(folder)

    assert (like.chunk_tokens, like.output_tokens) == (1, 20)
    assert like.ttft_ms >= 20 - 1
    assert like.tpot_ms >= 4


def test_the_command_prints_and_stores(tmp_path, request_file, monkeypatch, capsys):
    monkeypatch.setenv("TWOCLOCKS_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "x.yaml"
    path.write_text(yaml.safe_dump({"load": {"users": 2}, "workload": {"requests": str(request_file)}}))
    (tmp_path / "run").mkdir()
    words = ["--seconds", "1", "--ttft-ms", "5", "--tpot-ms", "2", "--output-tokens", "6", "--chunk-tokens", "2"]
    code = main(["calibrate", str(path), "--set", "load.users=3", *words, "--into", str(tmp_path / "run")])
    printed = capsys.readouterr().out
    (kept,) = (tmp_path / "cache" / "calibration").glob("*.json")
    stored = msgspec.json.decode(kept.read_bytes(), type=Calibration)

    assert code == 0
    assert "Instrument error at " in printed
    assert f"calibration: {kept}" in printed
    assert stored.replay == Replay(ttft_ms=5, tpot_ms=2, output_tokens=6, chunk_tokens=2, seconds=1)
    assert stored.errors["gap"].n == 2 * stored.requests  # three chunks of two tokens
    assert load_calibration(1, 1, run=tmp_path / "run") == stored


def test_several_workers_are_calibrated_too(request_file):
    result = calibrate(small(request_file, users=4), Replay(ttft_ms=5, tpot_ms=2, seconds=1, processes=2))

    assert result.requests > 4
    assert result.errors["ttft"].n == result.requests


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--seconds", "0"], "--seconds: expected a number above 0"),
        (["--chunk-tokens", "-1"], "--chunk-tokens: expected"),
        (["--like", "gone"], "gone: is no run folder"),
        (["gone.yaml"], "gone.yaml: no such experiment file"),
        (["--set", "workload.requests=gone.jsonl"], "gone.jsonl: request file cannot be read"),
    ],
)
def test_what_cannot_be_calibrated_is_one_line(words, message, capsys):
    code = main(["calibrate", *words])
    (line,) = [line for line in capsys.readouterr().err.splitlines() if not line.endswith(" ...")]

    assert code == 2
    assert line.startswith("twoclocks: ")
    assert message in line


def test_a_run_without_answers_cannot_be_replayed(tmp_path):
    (tmp_path / "requests.jsonl").write_text("")
    with pytest.raises(RunFolderError, match="no answer of two tokens"):
        replay_like(tmp_path)


def test_a_load_in_which_nothing_ended_is_an_error(tmp_path, request_file):
    log_path = tmp_path / "sent.npz"
    experiment = load_experiment(
        Path("configs/default.yaml"), [f"workload.requests={request_file}", "warmup.requests=0"]
    )
    raw = replayed(experiment, Replay(seconds=1), "x", tmp_path / "out")
    raw["load"] |= {"users": 1, "ramp_s": 0, "duration_s": 1, "drain_s": 0.1}
    with known_schedule([f"--log={log_path}", "--ttft-ms=20000"]) as url:
        raw["target"]["url"] = url
        folder = run_locust(raw, tmp_path, set(), 1)
    with pytest.raises(TwoclocksError, match="no request could be compared"):
        judge(folder, read_log(log_path), Replay(), None, [])


def test_reports_mark_what_is_smaller_than_the_instruments_error(tmp_path):
    """The planted server's TPOT differs from the client's by less than a huge bar, and by more than a tiny one."""
    for name, slow in (("a", 1.0), ("b", 1.02)):
        make_run(tmp_path / name, requests=40, slow=slow)
    told = {}
    for p99 in (1e-9, 1e3):
        for name in ("a", "b"):
            save(
                calibration(errors=dict.fromkeys(("ttft", "gap", "tpot", "e2e"), figures(p99))),
                tmp_path / name / "calibration.json",
            )
        summary = summarise(load_run(tmp_path / "a"))
        rows = {row["resolved"] for row in summary["client_vs_server"] if row["difference"] is not None}
        compared = compare([tmp_path / "a", tmp_path / "b"], tmp_path / "out").summary["rows"]
        verdicts = {row["verdict"] for row in compared if not row["first"] and row["n"]}
        shown = to_text(render(summary))
        told[p99] = (rows, "not resolved" in verdicts, "(not resolved)" in shown, "The instrument's own error" in shown)

    assert told == {1e-9: ({True}, False, False, True), 1e3: ({False}, True, True, True)}


def test_a_run_without_a_calibration_says_how_to_make_one(tmp_path):
    make_run(tmp_path / "a", requests=10)

    assert "twoclocks calibrate --like RUN" in to_text(render(summarise(load_run(tmp_path / "a"))))
