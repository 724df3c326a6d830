"""`locust -f load_test.py` as a user types it, against the scriptable server."""

import itertools
import json
import re
import signal
from collections import Counter
from pathlib import Path

import httpx
import pytest
from fake_server import HANG, HEAD, FakeServer, chunked, delta, plain_answer, response, words
from locust_runs import ROOT, only_run, read, run, started, wait_for

from twoclocks.record import read_records


def test_a_headless_run_leaves_every_request_that_the_server_saw(tmp_path):
    with FakeServer(lambda body: plain_answer(5, gap_s=0.01)) as server:
        code, output = run(tmp_path, "-H", server.url, "-u", "3", "-r", "3", "-t", "3", "--no-report")
        seen = [headers["x-request-id"] for headers, _ in server.requests]
    records, meta = read(tmp_path)

    assert code == 0, output
    assert sorted(record.request_id for record in records) == sorted(seen)
    assert Counter(record.phase for record in records)["warmup"] == 4
    assert {record.user for record in records if record.phase == "measure"} == {0, 1, 2}
    assert {record.status for record in records} == {"ok"}
    assert meta["status"] == "finished"
    assert 3 <= meta["window"]["ended_at"] - meta["window"]["started_at"] < 60  # and not the file's 120
    assert meta["overrides"]["load.users"] == 3
    assert output.rstrip().endswith(f"run folder: {only_run(tmp_path)}")


def test_no_user_sends_before_its_last_answer_has_ended(tmp_path):
    with FakeServer(lambda body: plain_answer(5, gap_s=0.01)) as server:
        run(tmp_path, "-H", server.url, "-u", "2", "-r", "2", "-t", "2", "--no-report")
    records, _ = read(tmp_path)
    for user in (0, 1):
        mine = sorted((r.sent_at, r.ended_at) for r in records if r.user == user and r.phase == "measure")

        assert len(mine) > 3
        assert all(ended <= sent for (_, ended), (sent, _) in itertools.pairwise(mine))


def test_workers_lines_are_merged_without_loss(tmp_path):
    with FakeServer(lambda body: plain_answer(5, gap_s=0.01)) as server:
        code, output = run(
            tmp_path, "-H", server.url, "-u", "4", "-r", "4", "-t", "4", "--processes", "2", "--no-report"
        )
        seen = [headers["x-request-id"] for headers, _ in server.requests]
    records, meta = read(tmp_path)

    assert code == 0, output
    assert sorted(record.request_id for record in records) == sorted(seen)
    assert {record.worker for record in records if record.phase != "warmup"} == {0, 1}
    assert {record.user for record in records if record.phase != "warmup"} == {0, 1, 2, 3}
    assert (meta["lost_records"], meta["workers"], meta["notes"][1:]) == (0, 2, [])


@pytest.mark.parametrize("processes", [(), ("--processes", "2")])
@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM])
def test_stopping_lets_running_streams_finish(tmp_path, processes, stop):
    with FakeServer(lambda body: plain_answer(10, gap_s=0.05)) as server:
        words_ = ("-H", server.url, "-u", "2", "-r", "2", "-t", "60", "--no-report", *processes)
        with started(tmp_path, *words_) as process:
            wait_for(lambda: len(server.requests) > 8)
            process.send_signal(stop)
            output, _ = process.communicate(timeout=60)
        seen = [headers["x-request-id"] for headers, _ in server.requests]
    records, meta = read(tmp_path)

    assert sorted(record.request_id for record in records) == sorted(seen), output
    assert {record.status for record in records} == {"ok"}
    assert (meta["status"], meta["lost_records"]) == ("interrupted", 0)
    assert process.returncode == 0
    assert not re.search("Traceback|KeyboardInterrupt", output)


def test_what_the_drain_cuts_off_is_cancelled_with_its_chunks(tmp_path):
    def script(body):
        first = [HEAD, chunked(delta(role="assistant")), *map(chunked, words(3))]
        return plain_answer() if len(server.requests) <= 4 else [*first, HANG]

    with FakeServer(script) as server:
        words_ = ("-H", server.url, "-u", "2", "-r", "2", "-t", "2", "--set", "load.drain_s=1", "--no-report")
        code, output = run(tmp_path, *words_)
    records, _ = read(tmp_path)
    cut = [record for record in records if record.status != "ok"]

    assert len(cut) == 2, output
    assert {(record.status, record.error_kind, record.output_tokens) for record in cut} == {("cancelled", "stopped", 3)}
    assert code == 1  # Locust's own: there were failures


def test_the_servers_pages_are_sampled_before_during_and_after(tmp_path):
    page = '# TYPE vllm:generation_tokens_total counter\nvllm:generation_tokens_total{{engine="0"}} {}\n'
    with FakeServer(lambda body: plain_answer(5, gap_s=0.01)) as server:
        server.metrics = lambda: response(200, page.format(5 * len(server.requests)).encode(), "text/plain")
        words_ = ("-H", server.url, "-u", "1", "-t", "3", "--no-report", "--set", "collect.metrics_interval_s=0.5")
        run(tmp_path, *words_)
        final = 5 * len(server.requests)
    lines = [json.loads(line) for line in (only_run(tmp_path) / "server_samples.jsonl").read_text().splitlines()]
    values = [value for line in lines for _, _, value in line["samples"]]

    assert len(lines) >= 5
    assert values[0] == 0
    assert values[-1] == final
    assert lines[0]["types"] == {"vllm:generation_tokens": "counter"}
    assert all(line["at"] <= line["until"] and line["error"] is None for line in lines)


def test_a_page_that_fails_is_told_and_the_run_goes_on(tmp_path):
    with FakeServer(lambda body: plain_answer(5)) as server:
        server.metrics = lambda: response(500, b"", "text/plain")
        code, output = run(tmp_path, "-H", server.url, "-t", "1", "--no-report")
    _, meta = read(tmp_path)

    assert code == 0
    assert any("could not be read" in note for note in meta["notes"]), output


@pytest.mark.parametrize("processes", [(), ("--processes", "1")])
def test_an_unreachable_target_is_one_line_and_exit_code_3(tmp_path, processes):
    code, output = run(tmp_path, "-H", "http://127.0.0.1:9", *processes)

    assert code == 3
    expected = r"^twoclocks: http://127.0.0.1:9: not reachable .* with --url http://HOST:PORT \(Locust: -H\)$"
    assert len(re.findall(expected, output, re.M)) == 1
    assert "Traceback" not in output
    assert "Aggregated" not in output  # Locust's tables, of nothing
    assert "No run time limit" not in output
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("words_", "message"),
    [
        (("--experiment", "nope.yaml"), "nope.yaml: no such experiment file"),
        (("--set", "load.usrs=3"), "unknown key 'load.usrs'"),
        (
            ("--set", "workload.requests=gone.jsonl"),
            f"{ROOT}/gone.jsonl: request file cannot be read: No such file or directory; requests/README.md",
        ),
    ],
)
def test_a_bad_experiment_is_one_line_and_exit_code_2(tmp_path, words_, message):
    code, output = run(tmp_path, *words_)

    assert code == 2
    assert next(line for line in output.splitlines() if line.startswith("twoclocks: ")).count(message) == 1
    assert "Traceback" not in output


def test_no_secret_enters_the_run_folder_or_the_output(tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret-1")
    with FakeServer(lambda body: plain_answer()) as server:
        header = "target.headers={X-Other: secret-2}"
        _code, output = run(tmp_path, "-H", server.url, "-t", "1", "--set", header, "--no-report")
        sent = server.requests[-1][0]
    texts = [path.read_text() for path in only_run(tmp_path).iterdir()]

    assert (sent["authorization"], sent["x-other"]) == ("Bearer sk-secret-1", "secret-2"), output
    assert not any("secret-" in text for text in [*texts, output])


def test_the_web_ui_listens_on_loopback_and_each_start_is_a_run(tmp_path):
    with FakeServer(lambda body: plain_answer(5, gap_s=0.01)) as server:
        words_ = ("-H", server.url, "--web-port", "0", "--no-report")
        with started(tmp_path, *words_, headless=False) as process:
            line = ""
            while "Starting web interface" not in line:
                line = process.stdout.readline()
                assert line, "Locust ended early"
            assert "http://127.0.0.1:" in line
            wait_for(lambda: listening_port(process.pid))
            url = f"http://127.0.0.1:{listening_port(process.pid)}"
            wait_for(lambda: reachable(url))
            for users in (1, 2):
                form = {"user_count": users, "spawn_rate": 2, "host": server.url, "run_time": "2s"}
                assert httpx.post(f"{url}/swarm", data=form).json()["success"]
                wait_for(lambda done=users: finished(tmp_path) == done)
            process.terminate()
            process.communicate(timeout=60)
    runs = sorted(path for path in tmp_path.iterdir())
    users = [{r.user for r in read_records(path / "requests.jsonl") if r.phase == "measure"} for path in runs]

    assert users == [{0}, {0, 1}]
    for path in runs:
        meta = json.loads((path / "run.json").read_text())
        assert meta["status"] == "finished"
        assert 2 <= meta["window"]["ended_at"] - meta["window"]["started_at"] < 60  # and not the file's 120


def finished(tmp_path) -> int:
    metas = [path / "run.json" for path in tmp_path.iterdir()]
    return sum(meta.exists() and json.loads(meta.read_text())["status"] == "finished" for meta in metas)


def reachable(url) -> bool:
    try:
        return httpx.get(url).is_success
    except httpx.HTTPError:
        return False


def listening_port(pid) -> int | None:
    inodes = {
        match[1]
        for fd in Path(f"/proc/{pid}/fd").iterdir()
        if (match := re.match(r"socket:\[(\d+)\]", str(fd.readlink())))
    }
    for line in Path("/proc/net/tcp").read_text().splitlines()[1:]:
        _, local, _, state, *rest = line.split()
        if state == "0A" and rest[5] in inodes:
            return int(local.split(":")[1], 16)
    return None


DEEP = b'data: {"x":' + b"[" * 5000 + b"]" * 5000 + b"}\n\n"


def test_a_hostile_answer_is_a_record_and_the_run_ends(tmp_path):
    with FakeServer(lambda body: [HEAD, chunked(DEEP), b"0\r\n\r\n"]) as server:
        code, output = run(tmp_path, "-H", server.url, "-t", "2", "--no-report")
    records, meta = read(tmp_path)

    assert {record.error_kind for record in records} == {"malformed"}, output
    assert (code, meta["status"]) == (1, "finished")


def test_a_run_that_cannot_begin_says_so_and_ends(tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret-\N{SNOWMAN}")
    with FakeServer() as server:
        code, output = run(tmp_path, "-H", server.url, "-t", "60", "--no-report")

    assert code == 2, output
    assert len(re.findall(r"^twoclocks: .+", output, re.M)) == 1
    assert "Traceback" not in output
    assert "secret" not in output


@pytest.mark.parametrize("processes", [(), ("--processes", "2")])
def test_a_stop_during_the_warm_up_ends_the_run(tmp_path, processes):
    with FakeServer(lambda body: [HEAD, chunked(delta(role="assistant")), HANG]) as server:
        with started(tmp_path, "-H", server.url, "-t", "60", "--no-report", *processes) as process:
            wait_for(lambda: len(server.requests) == 4)
            process.send_signal(signal.SIGINT)
            output, _ = process.communicate(timeout=60)
    records, meta = read(tmp_path)

    assert [record.status for record in records] == ["cancelled"] * 4, output
    assert (meta["status"], meta["window"]["started_at"]) == ("interrupted", None)
    assert "measuring for" not in output


def test_secrets_of_any_place_stay_out_of_files_and_output(tmp_path):
    with FakeServer(lambda body: plain_answer()) as server:
        target = f"target={{url: '{server.url}', headers: {{Authorization: Bearer secret-1}}}}"
        words_ = ("--set", target, "--set", "target.extra_body.api_key=secret-2")
        _, output = run(tmp_path, *words_, "-t", "1", "--no-report")
        headers, body = server.requests[-1]
    texts = [path.read_text() for path in only_run(tmp_path).iterdir()]

    assert (headers["authorization"], body["api_key"]) == ("Bearer secret-1", "secret-2")
    assert not any("secret-" in text for text in [*texts, output])


def test_the_key_goes_to_the_target_alone(tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret-1")
    seen = {}
    with FakeServer(lambda body: plain_answer()) as server, FakeServer() as other:
        for name, one in (("target", server), ("other", other)):
            one.on_get = lambda headers, name=name: seen.setdefault(name, []).append(headers.get("authorization"))
        pages = f"[{server.url}/metrics, {other.url}/metrics]"
        run(tmp_path, "-H", server.url, "-t", "1", "--no-report", "--set", f"collect.metrics_url={pages}")

    assert set(seen["target"]) == {"Bearer sk-secret-1"}
    assert set(seen["other"]) == {None}
