"""Shapes as a user runs them: what was due, what left, what could not, on one process and on several."""

import json
import os
import signal

import numpy as np
import pytest
from fake_server import HANG, HEAD, FakeServer, chunked, delta, plain_answer
from locust_runs import read, run, started, wait_for

from twoclocks.experiment import Load
from twoclocks.shapes import arrival_times


def shape(**keys) -> list[str]:
    return [word for key, value in keys.items() for word in ("--set", f"load.{key}={value}")]


def measured(records):
    return [record for record in records if record.phase == "measure"]


def due(records, meta) -> np.ndarray:
    return np.sort([record.intended_at for record in measured(records)]) - meta["window"]["started_at"]


@pytest.mark.parametrize("processes", [(), ("--processes", "2")])
def test_an_open_loop_sends_what_is_due_on_one_process_and_on_several(tmp_path, processes):
    load = {"shape": "rate", "rate": 30, "duration_s": 3, "seed": 5}
    with FakeServer(lambda body: plain_answer(2)) as server:
        code, output = run(tmp_path, "-H", server.url, *shape(**load), "--no-report", *processes)
        seen = [headers["x-request-id"] for headers, _ in server.requests]
    records, meta = read(tmp_path)
    expected = list(arrival_times(Load(**load)))

    assert code == 0, output
    assert np.allclose(due(records, meta), expected, atol=2e-6)
    assert sorted(record.request_id for record in records) == sorted(seen)
    assert {record.worker for record in measured(records)} == ({0, 1} if processes else {0})
    assert (meta["status"], meta["not_sent"], meta["lost_records"]) == ("finished", 0, 0)


def test_the_window_of_a_rate_is_as_long_as_was_asked_for_whenever_the_last_answer_came(tmp_path):
    load = {"shape": "rate", "rate": 1, "arrivals": "constant", "duration_s": 2.5}
    with FakeServer(lambda body: plain_answer(2)) as server:
        code, output = run(tmp_path, "-H", server.url, *shape(**load), "--no-report")
    records, meta = read(tmp_path)

    assert (code, len(measured(records))) == (0, 3), output
    assert meta["window"]["ended_at"] - meta["window"]["started_at"] >= 2.499
    assert meta["status"] == "finished"


def test_a_slow_server_holds_no_request_back(tmp_path):
    """Nothing comes back before the end, and still all leave: their delay is the server's, not hidden in the load."""
    load = {"shape": "rate", "rate": 20, "arrivals": "constant", "duration_s": 2, "drain_s": 0.2}
    with FakeServer(lambda body: [HEAD, chunked(delta(role="assistant")), HANG]) as server:
        _, output = run(tmp_path, "-H", server.url, *shape(**load), "--set", "warmup.requests=0", "--no-report")
    records, meta = read(tmp_path)

    assert np.allclose(due(records, meta), np.arange(40) / 20, atol=2e-6), output
    assert {record.status for record in records} == {"cancelled"}


@pytest.mark.parametrize("processes", [(), ("--processes", "2")])
def test_what_cannot_leave_is_counted(tmp_path, processes):
    load = {"shape": "rate", "rate": 20, "arrivals": "constant", "duration_s": 2, "drain_s": 0.2, "max_in_flight": 3}
    with FakeServer(lambda body: [HEAD, HANG]) as server:
        run(tmp_path, "-H", server.url, *shape(**load), "--set", "warmup.requests=0", "--no-report", *processes)
    records, meta = read(tmp_path)

    assert (len(records), meta["not_sent"]) == ((6, 34) if processes else (3, 37))


def test_a_trace_keeps_its_times_and_prompts(tmp_path):
    lines = [{"id": f"t{n}", "prompt": "hello", "at": 10 + 0.1 * n} for n in (3, 0, 1, 2, 9, 30)]
    path = tmp_path / "trace.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    load = {"shape": "trace", "trace_window_s": "[10, 11]", "trace_scale": 2, "duration_s": 20}
    with FakeServer(lambda body: plain_answer(2)) as server:
        code, output = run(
            tmp_path / "out", "-H", server.url, *shape(**load), "--set", f"workload.requests={path}", "--no-report"
        )
    records, meta = read(tmp_path / "out")
    sent = sorted(measured(records), key=lambda record: record.intended_at)

    assert code == 0, output
    assert [record.prompt_id for record in sent] == ["t0", "t1", "t2", "t3", "t9"]
    assert np.allclose(due(records, meta), [0, 0.2, 0.4, 0.6, 1.8], atol=2e-6)
    assert meta["window"]["ended_at"] - meta["window"]["started_at"] < 10  # it ends when all has been sent


def test_batches_leave_together_and_wait_for_the_last(tmp_path):
    load = {"shape": "batch", "batch": 5, "batches": 3, "batch_pause_s": 0.1, "duration_s": 30}
    with FakeServer(lambda body: plain_answer(3, gap_s=0.02)) as server:
        code, output = run(tmp_path, "-H", server.url, *shape(**load), "--no-report")
    records, _ = read(tmp_path)
    batches: dict[float, list] = {}
    for record in measured(records):
        batches.setdefault(record.intended_at, []).append(record)

    assert code == 0, output
    assert [len(batch) for batch in batches.values()] == [5, 5, 5]
    ends = [max(record.ended_at for record in batch) for _, batch in sorted(batches.items())]
    assert all(begin - end >= 0.1 - 2e-6 for begin, end in zip(sorted(batches)[1:], ends[:-1], strict=True))


@pytest.mark.parametrize("processes", [(), ("--processes", "2")])
def test_so_many_requests_and_no_more(tmp_path, processes):
    with FakeServer(lambda body: plain_answer(2)) as server:
        words = ("-H", server.url, "-u", "4", "-t", "60", *shape(requests=21))
        code, output = run(tmp_path, *words, "--no-report", *processes)
    records, meta = read(tmp_path)

    assert code == 0, output
    assert len(measured(records)) == 21
    assert (meta["status"], meta["lost_records"]) == ("finished", 0)


def test_steps_change_the_number_of_users(tmp_path):
    with FakeServer(lambda body: plain_answer(2, gap_s=0.02)) as server:
        code, output = run(tmp_path, "-H", server.url, *shape(shape="steps", steps="[[1, 2], [4, 2]]"), "--no-report")
    records, meta = read(tmp_path)
    second = meta["levels"][1]["started_at"]

    assert code == 0, output
    assert [level["users"] for level in meta["levels"]] == [1, 4]
    assert {record.user for record in measured(records) if record.ended_at < second} == {0}
    assert len({record.user for record in measured(records) if record.sent_at > second}) == 4


def test_ctrl_c_in_an_open_loop_drains(tmp_path):
    load = {"shape": "rate", "rate": 20, "duration_s": 60}
    with FakeServer(lambda body: plain_answer(3, gap_s=0.1)) as server:
        with started(tmp_path, "-H", server.url, *shape(**load), "--no-report") as process:
            wait_for(lambda: len(server.requests) > 12)
            os.kill(process.pid, signal.SIGINT)
            output, _ = process.communicate(timeout=60)
        seen = [headers["x-request-id"] for headers, _ in server.requests]
    records, meta = read(tmp_path)

    assert meta["status"] == "interrupted", output
    assert {record.status for record in records} == {"ok"}
    assert sorted(record.request_id for record in records) == sorted(seen)


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"shape": "rate", "rate": 0}, "load.rate: sends nothing"),
        ({"shape": "rate", "rate": "[[5, 1], [2, 1]]"}, "go back"),
        ({"shape": "steps"}, "load.steps"),
        ({"shape": "trace"}, "no request has an 'at'"),
        ({"shape": "trace", "trace_window_s": "[5, 2]"}, "load.trace_window_s"),
    ],
)
def test_what_cannot_be_sent_is_told_before(tmp_path, keys, words):
    code, output = run(tmp_path, "-H", "http://127.0.0.1:1", *shape(**keys))

    assert code == 2
    assert words in output
    assert len([line for line in output.splitlines() if "Starting Locust" not in line]) == 1


def test_a_salt_of_the_run_is_one_for_warm_up_and_workers(tmp_path):
    load = shape(requests=8)
    with FakeServer(lambda body: plain_answer(2)) as server:
        code, output = run(
            tmp_path,
            "-H",
            server.url,
            "-u",
            "2",
            *load,
            "--set",
            "workload.salt=run",
            "--processes",
            "2",
            "--no-report",
        )
        first_lines = {body["messages"][0]["content"].split("\n")[0] for _, body in server.requests}
        count = len(server.requests)

    assert code == 0, output
    assert (len(first_lines), count) == (1, 12)
