"""Whole runs against emulated servers: what they tell is joined, and what goes wrong meanwhile is told.

The emulations know what each request lived through, and the joined figures are held against that; nothing is held
against the speed of the machine.
"""

import json
import re
import signal
import socket
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from emulated_servers import Emulation, Exporter, Gateway, LlamaCpp, SGLang, Tgi, over_grpc, over_http
from fake_server import HANG, response
from locust_runs import free_port, only_run, started, wait_for
from make_spans import export, span

import twoclocks
from twoclocks.breakdown import cut_up
from twoclocks.load import Run
from twoclocks.waterfall import ROUNDING_S

SECONDS, USERS = "2", "3"
TGI_SERVICE = "text-generation-inference.router"


@dataclass(frozen=True)
class Ended:
    """A run that is over, as its user finds it."""

    code: int
    output: str
    folder: Path
    summary: dict[str, Any]
    run: Run

    def check(self, name: str) -> dict[str, Any]:
        return next(check for check in self.summary["checks"] if check["name"] == name)

    def reasons(self) -> dict[str, str]:
        """Reason -> level, of the verdict."""
        return {reason["name"]: reason["level"] for reason in self.summary["verdict"]["reasons"]}


def run_against(url, output, *settings, meanwhile=lambda folder: None, seconds=SECONDS):
    """`locust -f load_test.py` against an address; ``meanwhile`` is called with the run folder once it is measuring."""
    words = ["-H", url, "-u", USERS, "-r", USERS, "-t", seconds]
    for setting in ("workload.max_tokens=6", "collect.metrics_interval_s=0.5", "timeouts.idle_s=5", *settings):
        words += ["--set", setting]
    with started(output, *words) as process:
        folder = None

        def is_measuring():
            nonlocal folder
            assert process.poll() is None, process.stdout.read()
            metas = list(output.glob("*/run.json"))
            folder = metas[0].parent if metas else None
            return folder is not None and json.loads(metas[0].read_text())["window"]["started_at"] is not None

        wait_for(is_measuring)
        meanwhile(folder)
        said, _ = process.communicate(timeout=100)
    folder = only_run(output)
    assert (folder / "report.html").exists(), said
    assert "Traceback" not in said
    assert "…" not in (folder / "summary.txt").read_text()  # no number is cut
    summary = json.loads((folder / "summary.json").read_text())
    return Ended(process.returncode, said, folder, summary, twoclocks.load_run(folder))


def assert_joined(ended: Ended, server: Emulation, source: str, *, names: tuple[str, ...], abs: float = 1e-9) -> None:
    """Every ok request is joined from the source, with the figures that the server told of it."""
    ok = ended.run.requests.query("status == 'ok'").set_index("request_id")

    assert len(ok) > 8
    assert set(ok.server_source) == {source}
    for name in names:
        told = [server.told[request_id][name] for request_id in ok.index]
        assert ok[f"server_{name}"].to_numpy() == pytest.approx(np.array(told), abs=abs), name
    assert ended.check("joined")["passed"], ended.check("joined")


def assert_fits_together(ended: Ended) -> None:
    """The run went well, and each request's waterfall sums to its client's TTFT."""
    assert ended.code == 0, ended.output
    assert ended.summary["verdict"]["level"] != "INVALID", ended.summary["verdict"]
    for name in ("client_after_server", "waterfall_not_negative", "server_rows_ours"):
        assert all(check["passed"] for check in ended.summary["checks"] if check["name"] == name), name
    assert_sums(ended)


def assert_sums(ended: Ended) -> None:
    ok = ended.run.ok
    cut, _ = cut_up(ended.run)
    assert sum(len(one.rows) for one in cut) == len(ok)
    for one in cut:
        parts = {bar.name: bar.seconds for bar in one.bars}
        assert sum(parts.values()) == pytest.approx(one.total, abs=1e-9)
        client = one.total - parts["late"] - parts["connect"]
        assert client == pytest.approx(ok["ttft"].to_numpy()[one.rows], abs=1e-9)


def assert_histograms(ended: Ended, server: Emulation, names: dict[str, str]) -> None:
    """Each histogram gained one observation a request, with the mean of what the server told of just these."""
    seen = ended.run.scraped["request_id"]
    rows = {row["metric"]: row for row in ended.summary["server_window"]}
    for metric, name in names.items():
        told = [server.told[request_id][name] for request_id in seen]
        assert (rows[metric]["server_n"], rows[metric]["since_restart"]) == (len(told), False), metric
        assert rows[metric]["server_mean"] == pytest.approx(np.mean(told), rel=1e-6), metric


@pytest.fixture(scope="module")
def tgi_run(tmp_path_factory):
    port = free_port()
    with Tgi(Exporter(over_grpc(port), TGI_SERVICE)) as server:
        settings = ("target.server=tgi", f"collect.otlp_grpc_port={port}")
        yield run_against(server.url, tmp_path_factory.mktemp("tgi"), *settings), server


def test_tgi_spans_tell_of_each_streamed_request(tgi_run):
    ended, server = tgi_run

    assert_joined(ended, server, "otlp", names=("validation", "queue", "inference", "time_per_token", "e2e"))
    assert_fits_together(ended)
    phases = ("validation", "queue", "inference", "e2e", "time_per_token")
    assert_histograms(ended, server, {name: name for name in phases})
    assert [check["passed"] for check in ended.summary["checks"] if "with_counter" in check["name"]] == [True, True]


def test_tgi_does_not_tell_prefill_and_that_is_said(tgi_run):
    ended, _ = tgi_run
    (waterfall,) = ended.summary["waterfall"]

    assert ended.run.requests[["server_ttft", "server_prefill", "server_tpot"]].isna().all(axis=None)
    assert [text for text in ended.summary["untold"] if "prefill" in text]
    assert "prefill" in next(bar["label"] for bar in waterfall["bars"] if "delivery" in bar["name"])


def test_tgi_without_streaming_tells_in_headers_and_a_taken_port_is_said(tmp_path):
    with listening() as http, listening() as grpc, Tgi() as server:
        ports = [listener.getsockname()[1] for listener in (http, grpc)]
        ended = run_against(
            server.url, tmp_path, "target.server=tgi", "target.stream=false",
            f"collect.otlp_port={ports[0]}", f"collect.otlp_grpc_port={ports[1]}",
        )  # fmt: skip

    # whole ms, cut off: never above the truth, and less than one below
    assert_joined(ended, server, "in-band", names=("validation", "queue", "inference", "e2e"), abs=1e-3)
    ok = ended.run.ok
    assert all(ok.server_queue <= [server.told[request_id]["queue"] for request_id in ok.request_id])
    assert_fits_together(ended)
    for port, key in zip(ports, ("otlp_port", "otlp_grpc_port"), strict=True):
        (note,) = [note for note in ended.summary["notes"] if f"port {port} cannot be listened on" in note]
        assert f"--set collect.{key}=PORT" in note
        assert note in (ended.folder / "report.html").read_text()
        assert note in ended.output


def listening():
    return socket.create_server(("127.0.0.1", 0))


@pytest.fixture(scope="module")
def sglang_run(tmp_path_factory):
    """With spans, and the export file as its log, which is rotated in mid-run."""
    folder, port = tmp_path_factory.mktemp("sglang"), free_port()
    log = folder / "sglang-request-metrics.log"
    (folder / "runs").mkdir()
    with SGLang(Exporter(over_http(port), "sglang"), log) as server:

        def rotate(_):
            wait_for(lambda: len(server.told) > 20)
            log.rename(f"{log}.1")

        settings = ("target.server=sglang", f"collect.otlp_port={port}", f"collect.log=file:{log}")
        yield run_against(server.url, folder / "runs", *settings, meanwhile=rotate), server


def test_sglang_spans_tell_of_each_request(sglang_run):
    ended, server = sglang_run

    assert_joined(ended, server, "otlp", names=("ttft", "tokenize", "queue", "prefill", "decode", "tpot", "e2e"))
    assert_fits_together(ended)
    assert_histograms(ended, server, {"ttft": "ttft", "queue": "queue", "tpot": "tpot", "e2e": "e2e"})
    assert ended.check("only_our_traffic")["passed"]
    assert ended.summary["untold"] == []


def test_sglangs_export_file_tells_the_same_though_it_was_rotated(sglang_run):
    ended, server = sglang_run
    ok = ended.run.requests.query("status == 'ok'")

    for name in ("ttft", "queue", "tpot", "e2e"):
        told = [server.told[request_id][name] for request_id in ok.request_id]
        assert ok[f"log_{name}"].to_numpy() == pytest.approx(np.array(told), abs=1e-9), name
    assert ended.check("sources_agree")["passed"]
    assert ended.summary["join"]["rows"]["log"] == len(ok)


@pytest.fixture(scope="module")
def llamacpp_run(tmp_path_factory):
    with LlamaCpp() as server:
        yield run_against(server.url, tmp_path_factory.mktemp("llamacpp"), "target.server=llamacpp"), server


def test_llamacpp_tells_in_its_last_chunk(llamacpp_run):
    ended, server = llamacpp_run

    assert_joined(ended, server, "in-band", names=("prefill", "decode", "tpot"))
    assert_fits_together(ended)
    assert [text for text in ended.summary["untold"] if "wait for a slot" in text]
    assert ended.run.requests[["server_ttft", "server_queue", "server_e2e"]].isna().all(axis=None)


def test_llamacpps_six_digits_are_no_disagreement(llamacpp_run):
    ended, _ = llamacpp_run
    check = ended.check("prompt_tokens_agree_with_counter")

    assert check["passed"], check
    assert "±" in check["text"]
    rows = {row["metric"]: row for row in ended.summary["server_window"]}
    assert rows["decode_per_token"]["server_n"] == ended.run.scraped["output_tokens"].sum()


def test_a_gateways_bar_holds_what_it_adds(tmp_path):
    port = free_port()
    with (
        Tgi(Exporter(over_grpc(port), TGI_SERVICE)) as server,
        Gateway(server.url, Exporter(over_grpc(port), "gateway"), holds_s=0.05) as gateway,
    ):
        ended = run_against(
            gateway.url, tmp_path, "target.server=tgi", "target.stages=[{name: gw, service: gateway}]",
            f"collect.otlp_grpc_port={port}", f"collect.metrics_url=['{server.url}/metrics']",
        )  # fmt: skip

    assert_joined(ended, server, "otlp", names=("validation", "queue", "inference", "e2e"))
    assert_fits_together(ended)
    cut, _ = cut_up(ended.run)
    bars = {bar.name: bar for one in cut for bar in one.bars}
    (inner,) = [bar for bar in bars.values() if bar.label.startswith("gw to server")]
    assert inner.seconds.min() >= 0.05
    assert bars["to gw"].seconds.min() > -ROUNDING_S
    added = next(row for row in ended.summary["stages"] if (row["outer"], row["metric"]) == ("gw", "e2e"))
    assert (added["inner"], added["n"]) == ("server", len(ended.run.ok))
    assert added["between"] >= 0.05


def test_a_server_that_is_killed_and_comes_back_makes_the_run_invalid(tmp_path):
    port = free_port()
    command = [sys.executable, str(Path(__file__).with_name("emulated_servers.py")), "tgi", str(port)]
    url = f"http://127.0.0.1:{port}"
    servers = []

    def start():
        servers.append(subprocess.Popen(command))
        wait_for(lambda: answers(url))

    def kill_and_restart(folder):
        requests = folder / "requests.jsonl"
        wait_for(lambda: requests.read_bytes().count(b"\n") > 150)  # more than come between two scrapes
        servers[0].send_signal(signal.SIGKILL)
        servers[0].wait()
        start()

    try:
        start()
        often = "collect.metrics_interval_s=0.2"
        ended = run_against(url, tmp_path, "target.server=tgi", often, meanwhile=kill_and_restart, seconds="5")
    finally:
        for server in servers:
            server.kill()
            server.wait()

    assert ended.code == 4, ended.output
    assert ended.reasons()["server_restarted"] == "INVALID"
    assert not ended.check("scrapes")["passed"]
    assert {row["since_restart"] for row in ended.summary["server_window"]} == {True}
    statuses = ended.run.measured["status"]
    assert statuses.iloc[-1] == "ok"
    assert (statuses != "ok").any()
    assert "restart" in (ended.folder / "report.html").read_text()


def answers(url):
    try:
        return httpx.get(f"{url}/v1/models").is_success
    except httpx.HTTPError:
        return False


def test_a_page_that_hangs_is_told_and_the_rest_is_joined(tmp_path):
    with LlamaCpp() as server:

        def hang(_):
            server.metrics = lambda: [HANG]

        ended = run_against(server.url, tmp_path, "target.server=llamacpp", meanwhile=hang)

    assert ended.code == 0, ended.output
    assert_joined(ended, server, "in-band", names=("prefill", "decode"))
    check = ended.check("scrapes")
    assert not check["passed"]
    assert "Timeout" in check["text"]
    assert check["text"] in (ended.folder / "summary.txt").read_text().replace("\n", " ")


GARBAGE = bytes(range(256)) * 512
LONG_LINES = b'llamacpp:prompt_tokens_total{a="' + b"x" * 2_000_000 + b'"} 1\n' + b"y" * 2_000_000


def test_hostile_pages_are_told_and_the_rest_is_joined(tmp_path):
    served = []

    def hostile(server):
        page = server.page()
        pages = {
            "garbage": GARBAGE,
            "long lines": LONG_LINES,
            "NaN": re.sub(r" [0-9.e+]+$", " NaN", page, flags=re.M).encode(),
            "twice": (page + page).encode(),
        }
        name = list(pages)[len(served) % len(pages)]
        served.append(name)
        return response(200, pages[name], "text/plain")

    with LlamaCpp() as server:

        def turn(_):
            server.metrics = lambda: hostile(server)

        ended = run_against(
            server.url, tmp_path, "target.server=llamacpp", "collect.metrics_interval_s=0.2", meanwhile=turn
        )

    assert set(served) == {"garbage", "long lines", "NaN", "twice"}
    assert ended.code == 0, ended.output
    assert_joined(ended, server, "in-band", names=("prefill", "decode"))
    assert not ended.check("scrapes")["passed"]
    assert (ended.folder / "server_samples.jsonl").stat().st_size < 20_000_000


def test_a_flood_of_spans_is_counted_and_the_run_goes_on(tmp_path):
    port, foreign = free_port(), 100_000
    attributes = {"total_time": "1.5s", "inference_time": "1.4s", "queue_time": "9ms"}
    others = [span("chat_completions", f"{number + 1:032x}", "ab" * 8, attributes=attributes) for number in range(1000)]
    body = export(*others, service=TGI_SERVICE).SerializeToString()
    accepted = []

    with Tgi(Exporter(over_grpc(port), TGI_SERVICE)) as server:

        def flood(_):
            send = over_grpc(port)
            for _ in range(foreign // len(others)):
                send(body)
                accepted.append(len(others))

        ended = run_against(
            server.url, tmp_path, "target.server=tgi", f"collect.otlp_grpc_port={port}", "collect.otlp_tail_s=1",
            meanwhile=flood, seconds="4",
        )  # fmt: skip
        told = len(server.told)

    assert sum(accepted) == foreign
    notes = " ".join(ended.summary["notes"])
    left_out = sum(map(int, re.findall(r"(\d+) spans were (?:of requests|dropped)", notes)))
    kept = len((ended.folder / "server_requests.jsonl").read_bytes().splitlines())
    assert left_out + kept == foreign + told
    assert ended.code == 4, ended.output
    assert ended.reasons()["foreign_spans"] == "INVALID"
    assert not ended.check("server_rows_ours")["passed"]
    assert len(ended.run.ok) > 8
