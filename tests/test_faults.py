"""What goes wrong at the server, on the way and in the tester itself: the rows of docs/faults.md.

After each fault no request is unaccounted for, no chunk that was written is lost, the report builds, the exit code is
right and no process is left behind. One run meets several faults where it can, one after the other or dealt out in
turn; what the proxy and the server counted says which record is whose.
"""

import contextlib
import json
import os
import re
import resource
import shutil
import signal
import ssl
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import pytest
from fake_server import HANG, FakeServer, plain_answer
from fault_proxy import FAULTS, PASSES, Dealt, FaultProxy
from locust_runs import ROOT, left_behind, only_run, run, started, wait_for

from twoclocks import report
from twoclocks.record import read_records
from twoclocks.truth import read_log

TOKENS = 8
OPENSSL, MOUNT, UMOUNT = (shutil.which(name) or name for name in ("openssl", "mount", "umount"))
INJECTED = Path(__file__).parent / "injected"


@dataclass(frozen=True)
class Outcome:
    """A run that met faults, and what others counted of it."""

    output: Path
    code: int
    terminal: str
    seen: dict[str, Dealt]  # by the proxy, or by the server's own log: request id -> what became of it there
    counted: dict[str, int] = field(default_factory=dict)  # faults that meet a request before anybody sees its id

    @cached_property
    def folder(self):
        return only_run(self.output)

    @cached_property
    def records(self):
        return list(read_records(self.folder / "requests.jsonl"))

    @cached_property
    def meta(self):
        return json.loads((self.folder / "run.json").read_text())

    @cached_property
    def summary(self):
        return json.loads((self.folder / "summary.json").read_text())

    @property
    def reasons(self):
        return {reason["name"] for reason in self.summary["verdict"]["reasons"]}


def settings(**keys):
    keys = {"load__ramp_s": 0} | keys
    return [word for key, value in keys.items() for word in ("--set", f"{key.replace('__', '.')}={value}")]


def answers_of_all_kinds(tmp_path):
    """A batch of requests, each fault dealt twice."""
    kinds = list(FAULTS)
    words_ = settings(
        load__shape="batch", load__batch=2 * len(kinds), load__batches=1, load__duration_s=60, warmup__requests=0,
        timeouts__first_token_s=4, timeouts__idle_s=4, timeouts__total_s=7, workload__max_tokens=TOKENS,
    )  # fmt: skip
    with FakeServer(lambda body: plain_answer(TOKENS)) as server:
        with FaultProxy(server.url, lambda number: kinds[number % len(kinds)]) as proxy:
            code, terminal = run(tmp_path, "-H", proxy.url, *words_, "--no-report")
        reached = {headers["x-request-id"] for headers, _ in server.requests}
    assert reached == {request_id for request_id, one in proxy.dealt.items() if one.upstream}
    report.build(only_run(tmp_path))
    return Outcome(tmp_path, code, terminal, proxy.dealt)


@contextlib.contextmanager
def watched(tmp_path, *words_, **options):
    """A run under way: its process, and a function that waits until the file holds so many records of a kind."""
    with started(tmp_path, *words_, **options) as process:

        def until(kind, count):
            def there():
                assert process.poll() is None, process.communicate()[0]
                files = list(tmp_path.glob("*/requests.jsonl"))
                return files and sum(record.error_kind == kind for record in read_records(files[0])) >= count

            wait_for(there)

        yield process, until


def certificates(folder):
    """Two of localhost, each with its key: one that holds, one that has expired; and both, to be believed in."""
    (folder / "index.txt").touch()
    (folder / "ca.cnf").write_text(CA)
    pairs = []
    for name, last_year in (("holds", 2099), ("expired", 2021)):
        key, request, crt = (folder / f"{name}.{ending}" for ending in ("key", "csr", "crt"))
        make = ["req", "-batch", "-new", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
        sign = [
            "ca",
            "-batch",
            "-config",
            "ca.cnf",
            "-selfsign",
            "-notext",
            "-keyfile",
            key,
            "-in",
            request,
            "-out",
            crt,
        ]
        for words_ in (
            [*make, "-subj", f"/O={name}/CN=localhost", "-keyout", key, "-out", request],
            [*sign, "-startdate", "20200101000000Z", "-enddate", f"{last_year}0101000000Z"],
        ):
            subprocess.run([OPENSSL, *words_], cwd=folder, check=True, capture_output=True)
        pairs.append((crt, key))
    bundle = folder / "bundle.crt"
    bundle.write_text("".join(crt.read_text() for crt, _ in pairs))
    return *pairs, bundle


CA = """
[ca]
default_ca = own
[own]
database = index.txt
new_certs_dir = .
rand_serial = yes
default_md = sha256
policy = any
x509_extensions = extensions
[any]
organizationName = supplied
commonName = supplied
[extensions]
subjectAltName = DNS:localhost
basicConstraints = critical,CA:TRUE
"""


def a_network_that_fails(tmp_path):
    """Names are not resolved, the certificate expires, nobody listens: one after the other, with answers in between."""
    holds, expired, bundle = certificates(tmp_path)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*holds)
    unresolved, output = tmp_path / "unresolved", tmp_path / "output"
    words_ = settings(
        load__users=3, load__duration_s=300, warmup__requests=0, workload__max_tokens=TOKENS,
        target__tls_verify=bundle, collect__metrics_url="none",
    )  # fmt: skip
    environ = {"PYTHONPATH": f"{INJECTED}:{ROOT}", "FAULT_DNS": str(unresolved)}
    output.mkdir()
    with (
        FakeServer(lambda body: plain_answer(TOKENS)) as server,
        FaultProxy(server.url, lambda _: PASSES, context) as proxy,
    ):
        proxy.keeps_alive = False
        with watched(output, "-H", proxy.url, *words_, "--no-report", environ=environ) as (process, until):
            until(None, 5)
            unresolved.touch()
            until("dns", 3)
            asked = unresolved.rename(tmp_path / "asked")
            until(None, 15)
            context.load_cert_chain(*expired)
            until("tls", 3)
            context.load_cert_chain(*holds)
            until(None, 25)
            proxy.refuse()
            until("refused", 3)
            proxy.listen()
            until(None, 35)
            process.send_signal(signal.SIGINT)
            terminal = process.communicate(timeout=100)[0]
    report.build(only_run(output))
    counted = {
        "DNS fails": len(asked.read_text().splitlines()),
        "the TLS certificate has expired": proxy.handshakes_failed,
    }
    return Outcome(output, process.returncode, terminal, proxy.dealt, counted)


def schedule_server(log, port=0):
    """A real server process and its address."""
    argv = [sys.executable, "-m", "twoclocks.schedule_server", "--ttft-ms=40", "--tpot-ms=40", f"--port={port}"]
    argv += [f"--log={log}", "--until-eof", "--role=at-once"]  # so that an answer has begun as soon as it is asked for
    process = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    return process, json.loads(process.stdout.readline())["url"]


def a_server_that_dies(tmp_path):
    """The server's process is killed in mid-stream and another is started in its place."""
    words_ = settings(load__users=3, load__duration_s=300, warmup__requests=0, workload__max_tokens=20)
    words_ += settings(collect__metrics_interval_s=0.2)
    log, output = tmp_path / "log.npz", tmp_path / "output"
    output.mkdir()
    server, url = schedule_server(log)
    try:
        with watched(output, "-H", url, *words_) as (process, until):
            until(None, 6)
            server.kill()
            server.communicate()
            until("refused", 3)
            server, _ = schedule_server(log, url.rpartition(":")[2])
            until(None, 14)
            seen = len(samples(output).splitlines())
            wait_for(lambda: len(samples(output).splitlines()) > seen + 1)  # a page of the new one
            process.send_signal(signal.SIGINT)
            terminal = process.communicate(timeout=100)[0]
        server.communicate()  # the end of its input, upon which it writes its log
    finally:
        server.kill()
    seen = {request_id: Dealt("it comes back later") for request_id in read_log(log).request_id}
    return Outcome(output, process.returncode, terminal, seen)


def samples(output):
    """What was scraped so far."""
    return "".join(path.read_text() for path in output.glob("*/server_samples.jsonl"))


def a_page_that_hangs_and_a_clock_that_is_set(tmp_path):
    """/metrics never answers; then the wall clock jumps an hour ahead; then SIGTERM."""
    clock, output = tmp_path / "set", tmp_path / "output"
    words_ = settings(load__users=3, load__duration_s=300, warmup__requests=0, collect__metrics_interval_s=0.2)
    environ = {"PYTHONPATH": f"{INJECTED}:{ROOT}", "FAULT_CLOCK": str(clock)}
    output.mkdir()
    with FakeServer(lambda body: plain_answer(TOKENS, gap_s=0.01)) as server:
        server.metrics = lambda: [HANG]
        with FaultProxy(server.url, lambda _: PASSES) as proxy:
            with watched(output, "-H", proxy.url, *words_, environ=environ) as (process, until):
                until(None, 10)
                clock.touch()
                until(None, 20)
                process.send_signal(signal.SIGTERM)
                terminal = process.communicate(timeout=100)[0]
    return Outcome(output, process.returncode, terminal, proxy.dealt)


def a_tester_that_is_killed(tmp_path):
    """SIGKILL, while answers stream."""
    words_ = settings(load__users=3, load__duration_s=300, warmup__requests=0)
    with FakeServer(lambda body: plain_answer(TOKENS, gap_s=0.01)) as server:
        with (
            FaultProxy(server.url, lambda _: PASSES) as proxy,
            watched(tmp_path, "-H", proxy.url, *words_) as (process, until),
        ):
            until(None, 10)
            before = (only_run(tmp_path) / "requests.jsonl").read_bytes()
            process.kill()
            terminal = process.communicate(timeout=100)[0]
    assert (only_run(tmp_path) / "requests.jsonl").read_bytes().startswith(before)
    report.build(only_run(tmp_path))
    return Outcome(tmp_path, process.returncode, terminal, proxy.dealt)


def a_disk_that_is_full(tmp_path):
    """A file system of 700 kB; where none may be mounted, files that may not grow beyond 300 kB."""
    output = tmp_path / "output"
    output.mkdir()
    mounted = not subprocess.run(
        [MOUNT, "-t", "tmpfs", "-o", "size=700k", "twoclocks", output], check=False, capture_output=True
    ).returncode
    words_ = settings(load__users=8, load__duration_s=300, warmup__requests=0, collect__metrics_interval_s=0.2)
    limits = {} if mounted else {resource.RLIMIT_FSIZE: 300_000}
    try:
        with FakeServer(lambda body: plain_answer(TOKENS)) as server, FaultProxy(server.url, lambda _: PASSES) as proxy:
            code, terminal = run(output, "-H", proxy.url, *words_, limits=limits)
        shutil.copytree(only_run(output), tmp_path / "kept")
    finally:
        if mounted:
            subprocess.run([UMOUNT, output], check=True)
    shutil.rmtree(output)
    shutil.copytree(tmp_path / "kept", output / "run")  # where there is room
    report.build(output / "run")
    return Outcome(output, code, terminal, proxy.dealt)


def no_file_handles(tmp_path):
    """An open loop whose streams stay, until this process has no file handle left for another."""
    words_ = settings(
        load__shape="rate", load__rate=100, load__arrivals="constant", load__duration_s=2, warmup__requests=0,
        timeouts__first_token_s=30, workload__max_tokens=TOKENS,
    )  # fmt: skip
    limits = {resource.RLIMIT_NOFILE: 128}
    with FakeServer(lambda body: plain_answer(TOKENS, gap_s=0.3)) as server:
        with FaultProxy(server.url, lambda _: PASSES) as proxy:
            code, terminal = run(tmp_path, "-H", proxy.url, *words_, limits=limits)
    return Outcome(tmp_path, code, terminal, proxy.dealt)


def a_worker_that_is_killed(tmp_path):
    """One of two, while answers stream."""
    words_ = settings(load__users=2, load__duration_s=6, load__drain_s=1, warmup__requests=0)
    with FakeServer(lambda body: plain_answer(TOKENS, gap_s=0.01)) as server:
        with FaultProxy(server.url, lambda _: PASSES) as proxy:
            with watched(tmp_path, "-H", proxy.url, *words_, "--processes", "2") as (process, until):
                until(None, 12)
                children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
                worker = next(pid for pid in children if b"--processes" in Path(f"/proc/{pid}/cmdline").read_bytes())
                os.kill(int(worker), signal.SIGKILL)
                terminal = process.communicate(timeout=100)[0]
    return Outcome(tmp_path, process.returncode, terminal, proxy.dealt)


SCENARIOS = {
    answers_of_all_kinds: [fault for fault in FAULTS if fault != PASSES],
    a_network_that_fails: ["DNS fails", "the TLS certificate has expired", "nobody listens"],
    a_server_that_dies: ["the server dies in mid-stream", "it comes back later"],
    a_page_that_hangs_and_a_clock_that_is_set: ["/metrics hangs", "the wall clock is set", "SIGINT, SIGTERM"],
    a_tester_that_is_killed: ["SIGKILL"],
    a_disk_that_is_full: ["no room on the disk"],
    no_file_handles: ["no file handle left"],
    a_worker_that_is_killed: ["a worker is killed"],
}
ROWS = re.findall(r"^\| (.+?) \| (.+?) \| (.+?) \| (.+?) \|$", (ROOT / "docs" / "faults.md").read_text(), re.M)[2:]


@pytest.fixture(scope="module")
def outcome(tmp_path_factory):
    """What became of a scenario, which is played once."""
    played = {}

    def of(scenario):
        if scenario not in played:
            played[scenario] = scenario(tmp_path_factory.mktemp("run"))
        return played[scenario]

    return of


def test_the_documentation_has_a_row_for_each_fault():
    assert [fault for fault, *_ in ROWS] == [fault for faults in SCENARIOS.values() for fault in faults]


@pytest.mark.parametrize(("fault", "says", "verdict", "code"), ROWS)
def test_a_run_says_of_each_fault_what_the_documentation_says(outcome, fault, says, verdict, code):
    met = outcome(next(scenario for scenario, faults in SCENARIOS.items() if fault in faults))
    told = re.findall(r"`(\w+)`", says)[:2]
    mine = [record for record in met.records if [record.status, record.error_kind] == told]
    dealt = {request_id: one for request_id, one in met.seen.items() if one.fault == fault}

    assert bool(mine) == bool(told)
    if fault in FAULTS:
        assert {record.request_id for record in mine} >= set(dealt)
        assert all(bool(dealt[r.request_id].events) == ("chunks" in says) for r in mine if r.request_id in dealt)
    if fault in met.counted:
        # a listener that is closed resets those that waited to be taken, at most one a user
        assert 0 <= len(mine) - met.counted[fault] <= (3 if fault.startswith("the TLS") else 0)
        assert met.counted[fault] > 0
    if "retry_after_s" in says:
        assert {record.retry_after_s for record in mine} == {1.0}
    assert all(record.error_message for record in mine)
    assert set(re.findall(r"`(\w+)`", verdict)) <= met.reasons
    assert met.code == int(code), met.terminal


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_no_request_is_unaccounted_for(outcome, scenario):
    met = outcome(scenario)
    ids = [record.request_id for record in met.records]
    missing = len(met.seen.keys() - set(ids))
    figures = {name: figure["value"] for name, figure in met.summary["figures"].items() if "value" in figure}
    kinds = Counter(record.error_kind for record in met.records if record.error_kind)

    assert len(ids) == len(set(ids))
    if scenario is a_tester_that_is_killed:
        assert missing <= 3  # one a user, which had not ended
        assert "up to 3 requests, one a user, were in flight" in met.summary["partial"]
    elif scenario is a_worker_that_is_killed:
        assert (met.meta["missing_workers"], met.meta["in_flight"]) == (1, None)
    else:
        assert missing == met.meta["unwritten_records"]
        assert len(ids) + missing == locusts_own_count(met.terminal)
    if scenario is not a_server_that_dies:
        assert all(record.request_id in met.seen for record in met.records if record.sent_at is not None)
    assert len(ids) == sum(figures[name] for name in ("requests", "warmup", "drain"))
    assert figures["requests"] == sum(figures[name] for name in ("ok", "failed", "cancelled", "hung_up", "gave_up"))
    assert figures["requests"] - figures["ok"] == sum(row["count"] for row in met.summary["errors"])
    assert 0 <= sum(kinds.values()) - (figures["requests"] - figures["ok"]) <= figures["drain"] <= 8


def locusts_own_count(terminal):
    return int(re.search(r"^ *Aggregated +(\d+)", terminal, re.M)[1])


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_no_chunk_is_lost(outcome, scenario):
    """Every event that the proxy passed on is in the record, however the request ended."""
    met = outcome(scenario)
    wrong = [
        (record.error_kind, one.events, record.chunk_kinds)
        for record in met.records
        if (one := met.seen.get(record.request_id)) and one.fault in FAULTS and record.status != "cancelled"
        if len(record.chunk_us) != one.events
    ]

    assert not wrong


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_the_report_is_built_and_nothing_is_left_behind(outcome, scenario):
    met = outcome(scenario)

    assert (met.folder / "report.html").stat().st_size > 10_000
    assert not [path.name for path in met.folder.iterdir() if path.name.endswith((".new", ".tmp"))]
    wait_for(lambda: not left_behind(met.output), timeout_s=20)


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_each_message_is_a_line_that_can_be_read(outcome, scenario):
    met = outcome(scenario)

    assert not re.search(r"Traceback|Exception|KeyboardInterrupt|Errno", met.terminal), met.terminal
    assert "\x1b[31mGateway" not in met.terminal
    for said in SAID.get(scenario, []):
        assert len(re.findall(said, met.terminal, re.M)) == 1, (said, met.terminal)


SAID = {
    a_network_that_fails: ["stopping; running streams may go on for load.drain_s = 30 s, Ctrl-C again cuts them off$"],
    a_page_that_hangs_and_a_clock_that_is_set: [
        r"WARNING.*/metrics could not be read \(.*\); the server's own totals will be"
    ],
    a_disk_that_is_full: [
        r"requests\.jsonl: cannot be written: (No space left on device|File too large); stopping$",
        r"what was written is kept; once there is room: twoclocks report /\S+$",
    ],
}


def test_a_run_that_needs_more_file_handles_than_there_are_is_refused_before_the_load(tmp_path):
    with FakeServer() as server:
        code, terminal = run(
            tmp_path, "-H", server.url, *settings(load__users=500), limits={resource.RLIMIT_NOFILE: 256}
        )

    assert code == 2, terminal
    assert re.search(r"^twoclocks: load.users: 500 streams .* 256; raise .*ulimit -n", terminal, re.M), terminal
    assert (server.requests, list(tmp_path.iterdir())) == ([], [])
