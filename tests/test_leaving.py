"""Users who hang up or give up: the draw, what the server saw of it, and where the figures count it."""

import itertools
import json

import numpy as np
import pytest
from locust_runs import read, run
from make_run import record, write_folder

from twoclocks import report
from twoclocks.calibrate import known_schedule
from twoclocks.evidence import evidence
from twoclocks.experiment import Experiment, Workload
from twoclocks.live import Figures
from twoclocks.record import encode_record
from twoclocks.terminal import render, to_text
from twoclocks.truth import read_log
from twoclocks.workload import Prompt, hang_ups, plans

PROMPTS = [Prompt(str(number), {"prompt": "x"}) for number in range(7)]


def drawn(count=10_000, **keys):
    return list(itertools.islice(hang_ups(Workload(**keys)), count))


def test_the_draw_has_the_share_and_the_times_and_can_be_repeated():
    times = drawn(cancel_share=0.3, cancel_after_s=[1, 3], seed=4)
    chosen = np.array([at for at in times if at is not None])

    assert len(chosen) / len(times) == pytest.approx(0.3, abs=0.015)  # 3 standard errors
    assert (chosen.min() >= 1, chosen.max() <= 3) == (True, True)
    assert chosen.mean() == pytest.approx(2, abs=0.04)
    assert times == drawn(cancel_share=0.3, cancel_after_s=[1, 3], seed=4)
    assert times != drawn(cancel_share=0.3, cancel_after_s=[1, 3], seed=5)
    assert set(drawn(cancel_share=1, cancel_after_s=2)) == {2}
    assert set(drawn()) == {None}


def test_a_greater_share_only_adds_hang_ups():
    less, more = drawn(1000, cancel_share=0.2), drawn(1000, cancel_share=0.6)

    assert all(at == other for at, other in zip(less, more, strict=True) if at is not None)
    assert more.count(None) < less.count(None)


def test_processes_share_one_draw():
    experiment = Experiment(workload=Workload(cancel_share=0.5, cancel_after_s=[1, 2], patience_s=5, requests="x"))
    whole = list(itertools.islice(plans(experiment, PROMPTS, "m"), 20))
    halves = [list(itertools.islice(plans(experiment, PROMPTS, "m", share=n, shares=2), 10)) for n in (0, 1)]
    woven = [plan for pair in zip(*halves, strict=True) for plan in pair]

    assert [(plan.prompt.id, plan.hang_up_s) for plan in woven] == [(plan.prompt.id, plan.hang_up_s) for plan in whole]
    assert {plan.patience_s for plan in whole} == {5}


@pytest.mark.parametrize("processes", [(), ("--processes", "2")])
def test_the_server_sees_each_of_them_leave(tmp_path, processes):
    """Four slots of 0.41 s at 15 requests/s: a queue that outgrows the patience. Any hang-up comes before an answer's
    end, so that the draw alone says who hangs up.
    """
    keys = {
        "load.shape": "rate", "load.rate": 15, "load.arrivals": "constant", "load.duration_s": 4, "load.drain_s": 30,
        "workload.max_tokens": 40, "workload.cancel_share": 0.3, "workload.cancel_after_s": [0.1, 0.3],
        "workload.patience_s": 0.5, "warmup.requests": 0,
    }  # fmt: skip
    settings = [word for key, value in keys.items() for word in ("--set", f"{key}={value}")]
    log_path = tmp_path / "sent.npz"
    with known_schedule(["--ttft-ms=20", "--tpot-ms=10", "--slots=4", f"--log={log_path}"]) as url:
        code, output = run(tmp_path, "-H", url, *settings, "--no-report", *processes)
    records, meta = read(tmp_path)
    records.sort(key=lambda one: one.intended_at)
    kinds = [one.error_kind or one.status for one in records]
    log = read_log(log_path)
    cut = dict(zip(log.request_id, log.cut_ns / 1e9, strict=True))
    zero = np.median([log.arrived_ns[log.request_id.index(one.request_id)] / 1e9 - one.sent_at for one in records])
    plan = drawn(60, cancel_share=0.3, cancel_after_s=[0.1, 0.3])

    assert (code, meta["not_sent"], meta["lost_records"]) == (0, 0, 0), output  # no failure of Locust's
    assert len(records) == 60 == len(cut)
    assert len(records) == sum(kinds.count(kind) for kind in ("ok", "hung_up", "gave_up"))
    assert [kind == "hung_up" for kind in kinds] == [at is not None for at in plan]
    assert kinds.count("gave_up") > 0
    for one, kind, at in zip(records, kinds, plan, strict=True):
        assert one.phase == "measure"
        assert (cut[one.request_id] > 0) == (kind != "ok")
        if kind != "ok":
            left_after, seen_after = one.ended_at - one.sent_at, cut[one.request_id] - zero - one.sent_at
            assert left_after >= (at if kind == "hung_up" else 0.5)
            assert seen_after >= left_after - 0.005  # a clock read by two processes, half a request's way apart
    late = [one.ended_at - one.sent_at - at for one, at in zip(records, plan, strict=True) if at is not None]
    assert np.median(late) < 0.2
    assert output.count(", hung_up") >= 1  # a row of its own in Locust's table
    assert "hung_up:" not in output  # and none among its failures


def left(number, kind=None, ttft=0.1, tokens=4, **fields):
    chunks = {"chunk_us": [round(ttft * 1e6), *[10_000] * (tokens - 1)], "chunk_kinds": [("content", tokens)]}
    given = chunks if tokens else {}
    if kind:
        given |= {"status": "error" if kind == "reset" else "cancelled", "error_kind": kind, "error_message": "why"}
    sent = number / 100
    return record(
        f"{number:032x}", intended_at=sent, sent_at=sent, ended_at=sent + 1, output_tokens=tokens, **(given | fields)
    )


def test_they_are_counted_apart_everywhere(tmp_path):
    records = [
        *(left(number) for number in range(50)),
        *(left(number, ttft=0.3) for number in range(50, 60)),  # misses the SLO
        *(left(number, "hung_up", ttft=0.001, tokens=2) for number in range(60, 90)),
        *(left(number, "gave_up", tokens=0) for number in range(90, 100)),
        *(left(number, "reset", tokens=0) for number in range(100, 104)),
        left(104, "stopped", tokens=1),
    ]
    folder = write_folder(tmp_path / "run", records)
    (folder / "experiment.yaml").write_text("slo: {ttft_ms: 200, share: 0.6}\n")
    summary = report.build(folder).summary
    figures = summary["figures"]
    values = {name: figures[name]["value"] for name in ("requests", "ok", "failed", "cancelled", "hung_up", "gave_up")}
    text = " ".join(to_text(render(summary)).split())
    page = (folder / "report.html").read_text()
    bench = json.loads((folder / "vllm_bench.json").read_text())
    said = evidence(folder)

    assert values == {"requests": 105, "ok": 60, "failed": 4, "cancelled": 1, "hung_up": 30, "gave_up": 10}
    assert values["requests"] == sum(values.values()) - values["requests"]
    # 50 good of 105 - 30 hung up on as drawn, over ten seconds
    assert figures["goodput_share"]["value"] == summary["slo"]["share"] == pytest.approx(50 / 75)
    assert (figures["goodput"]["value"], summary["slo"]["met"]) == (pytest.approx(5), True)
    assert (said.good, said.requests) == (50, 75)
    assert (figures["ttft"]["n"], figures["ttft"]["min"]) == (60, pytest.approx(0.1))
    assert figures["output_throughput"]["value"] == pytest.approx((60 * 4 + 30 * 2 + 1) / 10)
    assert [(row["kind"], row["count"]) for row in summary["errors"]] == [("reset", 4), ("stopped", 1)]
    assert "Failed or cut off 5: 4 reset" in text
    assert "Left by their users 30 hung up on, as drawn; 10 given up for want of a first token" in text
    # 10 of the 70 who got a first token or gave up waiting for it: of the 5 that failed nobody knows
    assert "10 of 75 requests (13.3%) gave up" in text
    assert "TTFT is that of 60 others; of these together, p85.7 and above lie beyond workload.patience_s" in text
    assert "4 failed, 1 cut off, 40 left by their users" in page
    assert (bench["completed"], bench["failed"]) == (60, 5)
    assert bench["request_goodput"] * bench["duration"] == pytest.approx(50)


def test_prompts_that_do_not_fit_are_told_of_in_a_note(tmp_path):
    records = [*(left(number) for number in range(8)), left(8, "context_length", tokens=0, status="error")]
    summary = report.build(write_folder(tmp_path / "run", records)).summary

    assert summary["errors"][0]["kind"] == "context_length"
    assert any("1 of 9 requests were refused, since prompt and answer do not fit" in note for note in summary["notes"])


def test_the_live_view_counts_them_apart():
    figures = Figures()
    for one in (left(0), left(1, "hung_up"), left(2, "gave_up", tokens=0), left(3, "reset", tokens=0)):
        figures.add(encode_record(one), "requests.jsonl")

    assert (figures.ok, figures.left, figures.failed, figures.last_error) == (1, 2, 1, "reset")
