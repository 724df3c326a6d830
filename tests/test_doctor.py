"""The doctor: each finding from facts that say so, the facts against what the kernel and a scripted server do."""

import json
import sys

import pytest
from fake_server import DONE, END, HEAD, FakeServer, chunked, delta, event, plain_answer, response
from locust_runs import free_port
from msgspec.structs import replace

from twoclocks import cli, machine
from twoclocks.doctor import Told, findings, ports
from twoclocks.errors import ExperimentError
from twoclocks.experiment import Experiment, Target
from twoclocks.machine import Facts, Stamps
from twoclocks.preflight import ServerFacts, look_at_server

WELL = Facts(
    twoclocks="0.1.0",
    python=(3, 12, 1),
    system="Linux",
    release="6.1",
    pins={"locust": "2.47.0"},
    installed={"locust": "2.47.0", "rich": "14.0"},
    cores=8,
    usable_cores=8,
    memory_bytes=16 * 2**30,
    disk_bytes=100 * 2**30,
    files_soft=1024,
    files_hard=65536,
    native_reader=True,
    stamps=Stamps(50, 50, 2e-5),
    clock_source="tsc",
    clock_read_s=5e-8,
    governors=["performance"],
    stolen=0.0,
    busy=0.05,
    woken_late_s=0.0002,
    gpus=["NVIDIA L4"],
    engines={"vllm": "/v/bin/python"},
)
SERVER = ServerFacts(url="http://h", server="vllm", model="m", series=300, tokens=4, has_usage=True, told=["queue"])
PORTS = ports(Experiment())


def judged(facts):
    return {finding.name: finding for finding in findings(facts, PORTS)}


def test_a_machine_without_fault_has_none():
    told = Told(list(findings(WELL, PORTS)), WELL)

    assert {finding.level for finding in told.findings} == {"ok"}
    assert all(finding.remedy is None for finding in told.findings)
    assert told.exit_code == 0
    assert told.as_text().endswith("0 problems, 0 notes.")


@pytest.mark.parametrize(
    ("changes", "name", "level", "says", "remedy"),
    [
        ({"python": (3, 10, 4)}, "python", "problem", "3.10.4", "make install"),
        ({"system": "Darwin"}, "system", "note", "Darwin", "Linux"),
        ({"installed": {"locust": None}}, "packages", "problem", "locust", "rm -rf .venv && make install"),
        ({"installed": {}}, "packages", "note", "not installed", "make install"),
        ({"installed": {"locust": "2.48"}}, "packages", "note", "locust 2.48 (pinned: 2.47.0)", "pinned"),
        ({"native_reader": False}, "native reader", "note", "not built", "compiler"),
        ({"stamps": Stamps(50, 0)}, "kernel stamps", "problem", "0 of 50", "Linux"),
        ({"stamps": Stamps(0, 0)}, "kernel stamps", "note", "Linux has none", "from Linux"),
        ({"stamps": Stamps(50, 50, -0.5)}, "kernel stamps", "note", "-500,000 us", "time service"),
        ({"files_hard": 1024}, "open files", "note", "at most 1024", "ulimit"),
        ({"usable_cores": 0.5}, "cores", "note", "0.5 may be used of 8", "another machine"),
        ({"busy": 0.6}, "other work", "note", "60%", "end what else"),
        ({"busy": None}, "other work", "note", "does not tell", None),
        ({"stolen": 0.08}, "stolen time", "note", "8.0%", "dedicated"),
        ({"stolen": None}, "stolen time", "note", "does not tell", None),
        ({"woken_late_s": 0.02}, "wake-ups", "note", "20.0 ms", "late"),
        ({"woken_late_s": None}, "wake-ups", "note", "could not", None),
        ({"clock_source": "hpet"}, "clock", "note", "hpet", "tsc"),
        ({"clock_read_s": 3e-6}, "clock", "note", "3,000 ns", "tsc"),
        ({"governors": ["performance", "powersave"]}, "CPU frequency", "note", "powersave", "performance"),
        ({"memory_bytes": 2**29}, "memory", "note", "0.5 GiB", "elsewhere"),
        ({"memory_bytes": None}, "memory", "note", "does not tell", None),
        ({"disk_bytes": 2**30}, "disk", "problem", "1.0 GiB", "--set output=DIR"),
        ({"disk_bytes": None}, "disk", "note", "not told", None),
        ({"gpus": [], "no_gpu": "no driver; more"}, "GPU", "note", "no driver", "DCGM"),
        ({"engines": {"pytorch": None}}, "engines", "note", "none", "prepare.py transformers smollm2"),
        ({"ports": {8089: False}}, "port 8089", "note", "taken", "--web-port"),
        ({"ports": {4318: False}}, "port 4318", "note", "taken", "collect.otlp_port"),
    ],
)
def test_each_fault_is_found_with_what_to_do(changes, name, level, says, remedy):
    well, found = judged(WELL), judged(replace(WELL, **changes))

    assert {name for name in found if found[name] != well[name]} == {name}
    assert (found[name].level, says in found[name].found) == (level, True)
    assert (found[name].remedy is None) if remedy is None else (remedy in found[name].remedy)
    assert Told(list(found.values()), WELL).exit_code == (1 if level == "problem" else 0)


@pytest.mark.parametrize(
    ("changes", "name", "level", "says", "code"),
    [
        ({}, "server kind", "ok", "http://h: vllm, model m", 0),
        ({}, "/metrics", "ok", "300 series", 0),
        ({"unreachable": "http://h: not reachable; start it"}, "server", "problem", "http://h: not reachable", 3),
        ({"named": "sglang"}, "server kind", "problem", "calls itself sglang", 1),
        ({"series": None, "page": "status 401"}, "/metrics", "note", "status 401", 0),
        ({"refused": "status 404"}, "answer", "problem", "404", 1),
        ({"has_usage": False}, "answer", "note", "without a usage count", 0),
    ],
)
def test_a_server_is_judged_too(changes, name, level, says, code):
    told = Told(list(findings(replace(WELL, server=replace(SERVER, **changes)), PORTS)), WELL)
    (found,) = [finding for finding in told.findings if finding.name == name]

    assert (found.level, says in found.found, told.exit_code) == (level, True, code)


def test_what_a_server_keeps_to_itself_comes_with_the_flags_that_make_it_tell():
    facts = replace(WELL, server=replace(SERVER, told=[], series=None))
    remedies = [one.remedy for one in findings(facts, PORTS) if one.name == "server's clock"]

    assert any("--enable-per-request-metrics" in remedy for remedy in remedies)
    assert any("--disable-log-stats" in remedy for remedy in remedies)


def test_ports_are_those_of_the_experiment():
    none = replace(Experiment().collect, otlp_port="none", otlp_grpc_port=4999)
    asked = ports(replace(Experiment(), collect=none))

    assert 4318 not in asked
    assert 4317 not in asked
    assert "collect.otlp_grpc_port" in asked[4999]


# the facts


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="Linux has the stamps")
def test_the_kernel_stamps_what_comes_over_the_loopback():
    stamps = machine.kernel_stamps(20)

    assert (stamps.sent, stamps.stamped) == (20, 20)
    assert stamps.before_read_s < 60  # of this minute, and no other clock's


def test_a_port_is_free_until_somebody_listens():
    port = free_port()
    assert machine.is_free(port)
    with machine.socket.create_server(("127.0.0.1", port)):
        assert not machine.is_free(port)


def test_pins_are_read_with_and_without_hashes(tmp_path):
    path = tmp_path / "requirements.lock"
    path.write_text("# a comment\nFlask_Login==0.6.3\nlocust==2.47.0 \\\n    --hash=sha256:0\ngit+https://x\n")

    assert machine.pins(path) == {"flask-login": "0.6.3", "locust": "2.47.0"}
    assert machine.pins(tmp_path / "none") == {}


def test_a_containers_quota_counts(tmp_path):
    (tmp_path / "sys/fs/cgroup").mkdir(parents=True)
    assert machine.usable_cores(tmp_path) >= 1  # those of its affinity
    (tmp_path / "sys/fs/cgroup/cpu.max").write_text("50000 100000\n")

    assert machine.usable_cores(tmp_path) == 0.5


# the server


def telling(body):
    timings = {"time_to_first_token_ms": 5.0, "queue_time_ms": 1.0, "generation_time_ms": 9.0, "mean_itl_ms": 3.0}
    tail = event({"choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": 2}, "metrics": timings})
    events = [delta(content="a"), delta(content="b", finish_reason="stop"), tail, DONE]
    return [HEAD, *(chunked(one) for one in events), END]


def test_a_server_is_asked_for_what_it_shows():
    with FakeServer(telling) as server:
        server.metrics = lambda: response(200, b"# TYPE a counter\na_total 1\nb 2\n", "text/plain")
        facts = look_at_server(Target(url=server.url))
        (_, body), *rest = server.requests

    assert (facts.model, facts.series, facts.tokens, facts.has_usage) == ("fake-model", 2, 2, True)
    assert facts.told == ["ttft", "queue", "prefill", "decode", "tpot", "e2e"]
    assert facts.told_by == "vllm"
    assert (body["max_tokens"], rest) == (4, [])


def test_a_refusal_is_told_without_the_key(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-planted-key-123")
    said = b'{"error": {"message": "no such key: sk-planted-key-123"}}'
    with FakeServer(lambda body: response(401, said)) as server:
        facts = look_at_server(Target(url=server.url))

    assert facts.refused.startswith("status 401 for /v1/chat/completions")
    assert "planted" not in facts.refused


def test_an_answer_of_something_else_is_a_refusal():
    with FakeServer(lambda body: response(200, b"<html>hello</html>", "text/html")) as server:
        assert look_at_server(Target(url=server.url)).refused

    with pytest.raises(ExperimentError, match=r"target\.url"):
        look_at_server(Target(url="nowhere"))


# the command


def test_the_command_says_all_of_it_and_its_exit_code(capsys):
    with FakeServer(lambda body: plain_answer()) as server:
        code = cli.main(["doctor", "--url", server.url, "--json"])
    page = json.loads(capsys.readouterr().out)

    assert page["exit_code"] == code
    assert page["facts"]["server"]["model"] == "fake-model"
    assert {"python", "kernel stamps", "answer"} <= {finding["name"] for finding in page["findings"]}

    assert cli.main(["doctor", "--url", f"http://127.0.0.1:{free_port()}"]) == 3
    assert "not reachable" in capsys.readouterr().out
