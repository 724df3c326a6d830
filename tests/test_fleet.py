"""Workers as other machines have them: real Locust processes with a clock of their own, a connection that breaks, ends
that nobody announces. What they leave is held against the log of the known-schedule server.
"""

import contextlib
import json
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from fake_server import FakeServer, plain_answer
from locust_runs import LOCUST, ROOT, free_port, only_run, read, wait_for

import twoclocks
from twoclocks.calibrate import known_schedule
from twoclocks.experiment import Load
from twoclocks.fleet_summary import worker_lines
from twoclocks.shapes import arrival_times, share_of
from twoclocks.truth import differences, read_log, seen
from twoclocks.verdict import verdict

AHEAD_S, DRIFT = 1234.5, 3e-4
ALONE = ["collect.otlp_port=none", "collect.otlp_grpc_port=none", "collect.gpu=none"]


@contextlib.contextmanager
def fleet(tmp_path, url, *settings, duration_s, expect, cwd=ROOT):
    """A master that waits for so many workers; (its process, a function that starts a worker)."""
    port = str(free_port())
    keys = [f"output={tmp_path / 'out'}", f"load.duration_s={duration_s}", *ALONE, *settings]
    common = [LOCUST, "-f", str(ROOT / "load_test.py"), "--headless", "--only-summary"]
    started = []

    def start(name, *more, **popen):
        with (tmp_path / f"{name}.txt").open("w") as output:
            files = {"stdout": output, "stderr": subprocess.STDOUT}
            process = subprocess.Popen([*common, *more], **{"cwd": ROOT} | popen | files, start_new_session=True)
        started.append(process)
        return process

    def worker(name, port_=port, *more, **popen):
        return start(name, "--worker", "--master-port", str(port_), *more, **popen)

    words = [word for key in keys for word in ("--set", key)]
    words += ["-H", url, "--master", "--master-bind-port", port, "--expect-workers", str(expect), "--no-report"]
    try:
        yield start("master", *words, cwd=cwd), worker, port
    finally:
        for process in started:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def said(tmp_path, name="master") -> str:
    return (tmp_path / f"{name}.txt").read_text()


def running(tmp_path):
    """Until the window has begun, and first records have come."""
    folders = tmp_path / "out"
    wait_for(lambda: "measuring for" in said(tmp_path), 60)
    wait_for(lambda: (only_run(folders) / "requests.jsonl").read_bytes().count(b"measure") > 4, 60)


def busy(folder, since, users):
    """Until so many users have each sent and ended a request after the file had ``since`` bytes: the second of two
    records that come later.
    """

    def are_there():
        lines = (folder / "requests.jsonl").read_bytes()[since:].rpartition(b"\n")[0].splitlines()
        seen = Counter((record["worker"], record["user"]) for record in map(json.loads, lines))
        return sum(count > 1 for count in seen.values()) >= users

    wait_for(are_there, 90)


class Cut:
    """A proxy before the master's port, whose connections can be cut."""

    def __init__(self, port) -> None:
        self.port, self.pairs, self.connections = int(port), [], 0
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.own_port = self.listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self):
        while True:
            try:
                near, _ = self.listener.accept()
            except OSError:
                return  # closed
            try:
                far = socket.create_connection(("127.0.0.1", self.port))
            except OSError:  # the master is not there yet; the worker tries again
                near.close()
                continue
            self.connections += 1
            self.pairs.append((near, far))
            threading.Thread(target=self._carry, args=(near, far), daemon=True).start()

    def _carry(self, near, far):
        with contextlib.suppress(OSError, ValueError):
            while True:
                for one in select.select([near, far], [], [])[0]:
                    data = one.recv(65536)
                    if not data:
                        return
                    (far if one is near else near).sendall(data)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.listener.shutdown(socket.SHUT_RDWR)
        self.listener.close()
        self.cut()

    def cut(self):
        pairs, self.pairs = self.pairs, []
        for pair in pairs:
            for one in pair:
                with contextlib.suppress(OSError):
                    one.shutdown(socket.SHUT_RDWR)
                one.close()


def run_other_host(tmp_path):
    """A run with a worker on the master's clock, and one whose clock is far off and drifts, behind a connection that is
    cut twice: (folder, the server's log, connections, the master's output).
    """
    library, log = tmp_path / "other_clock.so", tmp_path / "sent.npz"
    source = Path(__file__).with_name("other_clock.c")
    subprocess.run(
        [shutil.which("gcc"), "-O1", "-Wall", "-Werror", "-shared", "-fPIC", "-o", library, source], check=True
    )
    clock = {
        "LD_PRELOAD": str(library),
        "OTHER_CLOCK_AHEAD_S": str(AHEAD_S),
        "OTHER_CLOCK_DRIFT": str(DRIFT),
        "OTHER_CLOCK_SINCE_S": str(time.monotonic()),
    }
    with (
        known_schedule(["--ttft-ms", "20", "--tpot-ms", "5", "--log", str(log)]) as url,
        fleet(tmp_path, url, "load.users=6", "load.ramp_s=0", "workload.max_tokens=8", duration_s=600, expect=2) as run,
    ):
        master, worker, port = run
        with Cut(port) as proxy:
            worker("near")
            worker("far", proxy.own_port, env=os.environ | clock)
            running(tmp_path)
            folder = only_run(tmp_path / "out")
            for _ in range(2):
                before, size = proxy.connections, (folder / "requests.jsonl").stat().st_size
                proxy.cut()
                wait_for(lambda before=before: proxy.connections > before)
                time.sleep(1.5)  # the drift shows in time only
                busy(folder, size, 6)
            master.terminate()
            assert master.wait(90) == 0, said(tmp_path)
    return only_run(tmp_path / "out"), read_log(log), proxy.connections, said(tmp_path)


OPEN = {"shape": "rate", "rate": 30, "arrivals": "constant", "duration_s": 6, "drain_s": 2}


def run_open_loop(tmp_path):
    """An open loop in which a worker comes late and one is killed: (folder, pids of the three, output)."""
    settings = [f"load.{key}={value}" for key, value in OPEN.items() if key != "duration_s"]
    with (
        FakeServer(lambda body: plain_answer(2)) as server,
        fleet(tmp_path, server.url, *settings, duration_s=6, expect=2) as (master, worker, _),
    ):
        kept, killed = worker("kept"), worker("killed")
        running(tmp_path)
        late = worker("late")
        wait_for(lambda: "3 workers connected" in said(tmp_path))
        time.sleep(1)
        killed.kill()
        master.wait(90)
    return only_run(tmp_path / "out"), kept.pid, killed.pid, late.pid, said(tmp_path)


def run_last_ones(tmp_path):
    """One worker is told to end, then the other is killed: (folder, pids of both, output)."""
    settings = ("load.users=4", "load.ramp_s=0", "load.drain_s=2")
    with (
        FakeServer(lambda body: plain_answer(5, gap_s=0.02)) as server,
        fleet(tmp_path, server.url, *settings, duration_s=60, expect=2) as (master, worker, _),
    ):
        left, killed = worker("left"), worker("killed")
        running(tmp_path)
        left.terminate()
        left.wait(60)
        time.sleep(1)
        killed.kill()
        master.wait(60)
    return only_run(tmp_path / "out"), left.pid, killed.pid, said(tmp_path)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """All at the same time, since they mostly wait."""
    if shutil.which("gcc") is None or not sys.platform.startswith("linux"):
        pytest.skip("needs gcc and Linux, for a clock of its own in one process")
    with ThreadPoolExecutor() as pool:
        return [
            pool.submit(run, tmp_path_factory.mktemp(run.__name__))
            for run in (run_other_host, run_bad_day, run_open_loop, run_last_ones)
        ]


@pytest.fixture(scope="module")
def last_ones(runs):
    return runs[3].result()


@pytest.fixture(scope="module")
def other_host(runs):
    return runs[0].result()


@pytest.fixture(scope="module")
def bad_day(runs):
    return runs[1].result()


@pytest.fixture(scope="module")
def open_loop(runs):
    return runs[2].result()


def ids(records):
    return sorted(record.request_id for record in records)


def test_each_request_has_one_record_though_the_connection_broke(other_host):
    folder, log, connections, output = other_host
    records, meta = read(folder.parent)

    assert connections >= 3, output
    assert ids(records) == sorted(log.request_id)
    assert (meta["lost_records"], meta["missing_workers"], meta["in_flight"]) == (0, 0, 0)
    assert {record.worker for record in records} == {0, 1}
    for row in meta["fleet"]:
        mine = sum(record.worker == row["worker"] and record.phase != "warmup" for record in records)
        assert (row["records"], row["begun"], row["lost"]) == (mine, mine, 0)


def test_times_of_a_worker_with_another_clock_are_the_masters(other_host):
    """Against the server's own log, whose clock is the master's: within the error that is stated, early and late."""
    folder, log, _, output = other_host
    records, meta = read(folder.parent)
    arrived = dict(zip(log.request_id, log.arrived_ns / 1e9, strict=True))
    # the warm-up is sent by the master itself, and so tells where its zero lies on the server's clock
    zero = np.median([arrived[one.request_id] - one.sent_at for one in records if one.phase == "warmup"])
    (far,) = [row for row in meta["fleet"] if not row["clock"]["shared"]]
    (near,) = [row for row in meta["fleet"] if row["clock"]["shared"]]

    def off(row):
        mine = sorted((one.sent_at, arrived[one.request_id] - zero) for one in records if one.worker == row["worker"])
        return np.array([there - sent for sent, there in mine[4:]])  # the master's own are of worker 0, too

    assert near["clock"]["error_s"] == 0, output
    assert 0 < far["clock"]["error_s"] < 0.1
    assert far["clock"]["offset_s"] == pytest.approx(-AHEAD_S, abs=0.1)
    for part in np.array_split(off(far), 4):
        assert abs(np.median(part) - np.median(off(near))) <= far["clock"]["error_s"] + 5e-4


def test_durations_are_the_workers_own(other_host):
    folder, log, _, _ = other_host
    records, meta = read(folder.parent)
    (far,) = [row["worker"] for row in meta["fleet"] if not row["clock"]["shared"]]
    told = differences((seen(one) for one in records if one.worker == far), log)

    assert told.compared > 10
    assert np.median(np.abs(told.gap)) < 2e-3
    assert np.median(np.abs(told.e2e)) < 20e-3


def test_the_report_tells_the_clocks(other_host):
    folder, _, _, _ = other_host
    run = twoclocks.load_run(folder)
    first, *lines = worker_lines(run.meta["fleet"])

    assert first.startswith("2 workers on 1 host. 1 of them had a clock of their own, known against the master's to ± ")
    assert len(lines) == 1
    assert "clock -1,234." in lines[0]
    assert "drift " in lines[0]
    reasons = {reason["name"] for reason in verdict(run)["reasons"]}
    assert not reasons & {"missing_workers", "lost_records", "stalled_workers", "workers_changed", "held_back"}


def workers_of(folder) -> set[int]:
    lines = (folder / "requests.jsonl").read_bytes().rpartition(b"\n")[0].splitlines()
    return {json.loads(line)["worker"] for line in lines}


def run_bad_day(tmp_path):
    """A closed loop in which one worker is killed, one stands still for 6 s, and one comes late: (folder, ids that the
    server saw, the master's exit code and output, processes by name).
    """
    log = tmp_path / "sent.npz"
    settings = ("load.users=6", "load.ramp_s=0", "load.drain_s=2", "workload.max_tokens=20")
    with (
        known_schedule(["--ttft-ms", "50", "--tpot-ms", "20", "--log", str(log)]) as url,
        fleet(tmp_path, url, *settings, duration_s=600, expect=3) as (master, worker, _),
    ):
        processes = {name: worker(name) for name in ("steady", "killed", "stopped")}
        running(tmp_path)
        time.sleep(1.2)  # each has said what it is at
        processes["killed"].kill()
        processes["stopped"].send_signal(signal.SIGSTOP)
        processes["late"] = worker("late")
        time.sleep(6)
        processes["stopped"].send_signal(signal.SIGCONT)
        wait_for(lambda: "is heard again after" in said(tmp_path))
        running_folder = only_run(tmp_path / "out")
        busy(running_folder, (running_folder / "requests.jsonl").stat().st_size, 6)
        wait_for(lambda: 3 in workers_of(running_folder))  # the late one
        master.terminate()
        code = master.wait(90)
    pids = {process.pid: name for name, process in processes.items()}
    folder = only_run(tmp_path / "out")
    _, meta = read(folder.parent)
    rows = {pids[row["pid"]]: row for row in meta["fleet"]}
    return folder, read_log(log).request_id, rows, code, said(tmp_path)


def test_a_killed_worker_is_told_with_what_is_lost(bad_day):
    folder, on_server, rows, code, output = bad_day
    records, meta = read(folder.parent)
    reasons = {reason["name"]: reason for reason in verdict(twoclocks.load_run(folder))["reasons"]}
    missing = set(on_server) - {record.request_id for record in records}

    assert code in (0, 1), output  # of Locust alone; the report's 4 is tested elsewhere
    assert (meta["missing_workers"], meta["in_flight"]) == (1, None)
    assert len(records) == len({record.request_id for record in records})
    assert {record.request_id for record in records} <= set(on_server)
    # when it was heard last it had begun two more than it had ended; what it began later nobody knows of
    assert 1 <= rows["killed"]["lost"] <= len(missing)
    assert meta["lost_records"] == rows["killed"]["lost"]
    assert rows["killed"]["done_at"] is None
    assert reasons["missing_workers"]["level"] == "INVALID"
    assert f"process {rows['killed']['pid']}) was last heard at second" in reasons["missing_workers"]["reason"]


def test_a_worker_that_stands_still_is_told_with_how_long(bad_day):
    folder, _, rows, _, output = bad_day
    reasons = {reason["name"]: reason for reason in verdict(twoclocks.load_run(folder))["reasons"]}
    ((since, until),) = rows["stopped"]["silences"]

    assert until - since > 5, output
    assert rows["stopped"]["done_at"] is not None
    assert rows["stopped"]["lost"] == 0
    assert "was not heard for" in reasons["stalled_workers"]["reason"]
    assert "is heard again after" in output


def test_a_late_worker_is_told_and_gets_users(bad_day):
    folder, _, rows, _, _ = bad_day
    records, _ = read(folder.parent)
    reasons = {reason["name"]: reason for reason in verdict(twoclocks.load_run(folder))["reasons"]}
    mine = [record for record in records if record.worker == rows["late"]["worker"]]

    assert rows["late"]["joined_at"] > 0
    assert mine
    assert min(record.sent_at for record in mine) >= rows["late"]["joined_at"] - 0.1
    assert "in the midst of the run" in reasons["workers_changed"]["reason"]


def test_users_of_a_worker_that_is_gone_move_to_the_others(bad_day):
    folder, _, rows, _, _ = bad_day
    records, _ = read(folder.parent)
    users = Counter()
    for worker, _ in {(record.worker, record.user) for record in records if record.phase == "measure"}:
        users[worker] += 1

    assert users[rows["steady"]["worker"]] > 2  # two of six were its own
    ((_, again),) = rows["stopped"]["silences"]
    late = [record for record in records if record.sent_at > again]
    assert len({(record.worker, record.user) for record in late}) >= 6


def test_arrivals_stay_where_they_were_dealt(open_loop):
    folder, kept, killed, late, output = open_loop
    records, meta = read(folder.parent)
    rows = {row["pid"]: row for row in meta["fleet"]}
    share, began = rows[kept]["worker"], meta["window"]["started_at"]
    due = np.array(list(share_of(arrival_times(Load(**OPEN)), share, 2)))
    sent = np.sort([one.intended_at for one in records if one.worker == share and one.phase == "measure"]) - began

    assert np.allclose(sent, due[: len(sent)], atol=2e-6), output  # a slow machine may have left the last ones unsent
    assert sent[-1] > rows[killed]["heard_until"] - began
    assert sent[-1] > rows[late]["joined_at"] - began
    assert rows[late]["records"] == 0
    gone = rows[killed]
    assert gone["due_not_sent"] == len(due) - gone["begun"]
    assert 0 < gone["due_not_sent"] < len(due)
    reasons = {reason["name"]: reason["reason"] for reason in verdict(twoclocks.load_run(folder))["reasons"]}
    assert f"and {gone['due_not_sent']} that were due there were not sent" in reasons["missing_workers"]


def test_a_worker_that_is_told_to_end_leaves_all_its_records(last_ones):
    folder, left, _, output = last_ones
    records, meta = read(folder.parent)
    row = next(row for row in meta["fleet"] if row["pid"] == left)
    mine = [record for record in records if record.worker == row["worker"] and record.phase != "warmup"]

    assert (len(mine), row["begun"], row["lost"]) == (row["records"], row["records"], 0), output
    assert row["done_at"] < meta["window"]["ended_at"]
    assert {record.status for record in mine} == {"ok"}
    reasons = {reason["name"]: reason for reason in verdict(twoclocks.load_run(folder))["reasons"]}
    assert f"process {left}) left at second" in reasons["workers_changed"]["reason"]


def test_a_run_ends_when_no_worker_is_left(last_ones):
    folder, _, killed, output = last_ones
    _, meta = read(folder.parent)

    assert meta["status"] == "interrupted", output
    assert meta["ended_at"] < 50
    assert [row["pid"] for row in meta["fleet"] if row["done_at"] is None] == [killed]


def test_a_worker_with_other_prompts_is_refused_before_any_load(tmp_path):
    (tmp_path / "there").mkdir()
    for folder, text in ((tmp_path, "one"), (tmp_path / "there", "another")):
        (folder / "prompts.jsonl").write_text(f'{{"id": "a", "prompt": "{text}"}}\n')
    with (
        FakeServer(lambda body: plain_answer(2)) as server,
        fleet(tmp_path, server.url, "workload.requests=prompts.jsonl", duration_s=60, expect=1, cwd=tmp_path) as run,
    ):
        master, worker, _ = run
        worker("there", cwd=tmp_path / "there")
        code = master.wait(60)
        sent = len(server.requests)
    lines = [line for line in said(tmp_path).splitlines() if line.startswith("twoclocks: ")]

    assert (code, sent) == (2, 0), said(tmp_path)
    assert len(lines) == 1
    assert "cannot take part: prompts.jsonl: is not the file that the master has (SHA-256 " in lines[0]
    assert "this worker cannot take part: prompts.jsonl" in said(tmp_path, "there")
    assert not (tmp_path / "out").exists()
