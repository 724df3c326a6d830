"""Runs against the real vLLM and the real `transformers serve`, with a tiny random model."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

import twoclocks
from twoclocks.experiment import Target
from twoclocks.preflight import look_at_server
from twoclocks.waterfall import waterfalls

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.real


def run_against(server, tmp_path, load=("-u", "4", "-r", "4", "-t", "5"), **settings):
    """The run folder of four users for a few seconds, as the command line makes it."""
    settings = {
        "target.url": server.url,
        "target.model": server.model,
        "target.extra_body": "{temperature: 0}",
        "workload.max_tokens": 12,
        "collect.log": f"file:{server.log_path}",
        "collect.otlp_port": "none",
        "collect.otlp_grpc_port": "none",
        "output": tmp_path,
    } | settings
    command = [str(Path(sys.executable).with_name("locust")), "-f", "load_test.py", "--headless", "--only-summary"]
    command += load
    for key, value in settings.items():
        command += ["--set", f"{key}={value}"]
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert process.returncode == 0, process.stdout + process.stderr
    folder = Path(process.stdout.rstrip().rpartition("run folder: ")[2])
    assert (folder / "report.html").exists(), process.stdout + process.stderr
    return folder


@pytest.fixture(scope="module")
def vllm_run(exporting_vllm, otlp_port, tmp_path_factory):
    spans = {"collect.otlp_port": otlp_port, "collect.otlp_tail_s": 40}
    return run_against(exporting_vllm, tmp_path_factory.mktemp("vllm"), **spans)


@pytest.fixture(scope="module")
def saturated_run(exporting_vllm, otlp_port, tmp_path_factory):
    """Sixteen users whose long answers do not fit into the KV cache side by side."""
    long = {"workload.max_tokens": 120, "workload.ignore_eos": "true", "collect.otlp_port": otlp_port}
    long |= {"collect.otlp_tail_s": 40}
    return run_against(exporting_vllm, tmp_path_factory.mktemp("full"), ("-u", "16", "-r", "16", "-t", "8"), **long)


@pytest.fixture(scope="module")
def transformers_run(real_transformers, tmp_path_factory):
    return run_against(real_transformers, tmp_path_factory.mktemp("transformers"), **{"target.server": "transformers"})


def test_vllm_every_request_is_joined_with_the_servers_own_timing(vllm_run):
    requests = twoclocks.load_run(vllm_run).requests
    ok = requests[requests.status == "ok"]

    assert len(ok) == len(requests) > 8
    assert ok.server_source.notna().all()
    said = ok[ok.ttft.notna()]  # the random model's tokens are not always text
    assert len(said) > 8
    assert (said.ttft >= said.server_queue + said.server_prefill).all()


def test_vllm_tokens_are_those_of_the_servers_counter(vllm_run):
    """The client's count of each answer against the difference of the server's own counter over the whole run."""
    run = twoclocks.load_run(vllm_run)
    lines = [json.loads(line) for line in (vllm_run / "server_samples.jsonl").read_text().splitlines()]
    counter = [v for line in lines for name, _, v in line["samples"] if name == "vllm:generation_tokens_total"]

    assert run.requests.output_tokens.sum() == counter[-1] - counter[0]
    assert set(run.requests.token_source) == {"per-chunk usage"}


def test_vllm_chunks_carry_every_token(vllm_run):
    run = twoclocks.load_run(vllm_run)
    tokens = run.chunks.groupby("request_id").tokens.sum()

    assert (tokens == run.requests.set_index("request_id").output_tokens).all()


def test_vllm_says_its_version_and_stamps_are_the_kernels(vllm_run):
    run = twoclocks.load_run(vllm_run)

    assert run.meta["target"]["server_version"].startswith("0.")
    assert set(run.requests.timestamp_source) == {"kernel"}
    assert (vllm_run / "server.log").stat().st_size > 0


@pytest.mark.parametrize("which", ["vllm_run", "saturated_run"])
def test_vllm_spans_in_band_timings_and_histograms_tell_the_same(which, request):
    folder = request.getfixturevalue(which)
    run = twoclocks.load_run(folder)
    ok = run.requests.query("status == 'ok'")
    rows = [json.loads(line) for line in (folder / "server_requests.jsonl").read_text().splitlines()]

    assert (ok.server_source == "otlp").all()
    assert {row["request_id"] for row in rows} >= set(ok.request_id)
    # two ways out of the same server, and a third that sums over all requests
    for part in ("queue", "prefill", "decode"):
        assert (ok[f"otlp_{part}"] - ok[f"in_band_{part}"]).abs().max() < 1e-3
    window = {row["metric"]: row for row in json.loads((folder / "summary.json").read_text())["server_window"]}
    seen = run.scraped
    for metric in ("ttft", "queue", "prefill", "e2e"):
        told = seen[f"server_{metric}"]
        assert window[metric]["server_n"] == told.notna().sum() == len(seen)
        assert window[metric]["server_mean"] == pytest.approx(told.mean(), rel=0.01)


@pytest.mark.parametrize("which", ["vllm_run", "saturated_run"])
def test_vllm_parts_of_the_waterfall_sum_to_the_clients_ttft(which, request):
    ok = twoclocks.load_run(request.getfixturevalue(which)).ok
    ok = ok[ok.ttft.notna()]
    summed = sum(
        bar.seconds.sum() for one in waterfalls({name: ok[name].to_numpy() for name in ok}) for bar in one.bars
    )

    assert summed == pytest.approx((ok.ttft + ok.sent_at - ok.intended_at).sum(), abs=1e-3 * len(ok))
    assert (ok.ttft - ok.server_ttft).min() > -1e-3


def test_vllm_saturated_waits_in_its_queue_and_the_report_says_so(vllm_run, saturated_run):
    full, calm = twoclocks.load_run(saturated_run).ok, twoclocks.load_run(vllm_run).ok
    text = (saturated_run / "summary.txt").read_text()

    assert full.server_queue.mean() > 0.5 * full.ttft.mean() > calm.server_queue.mean()
    assert "the server is saturated" in " ".join(text.split())
    assert "the server is saturated" in (saturated_run / "report.html").read_text()
    assert "the server is saturated" not in " ".join((vllm_run / "summary.txt").read_text().split())


def test_what_transformers_does_not_tell_is_stated(transformers_run):
    told = json.loads((transformers_run / "summary.json").read_text())

    assert any("prefill" in sentence for sentence in told["untold"])
    assert told["untold"][0] in " ".join((transformers_run / "summary.txt").read_text().split())


def test_transformers_one_at_a_time_tells_nothing_and_the_report_says_so(one_at_a_time, tmp_path):
    folder = run_against(one_at_a_time, tmp_path, **{"target.server": "transformers"})
    told = json.loads((folder / "summary.json").read_text())
    ok = twoclocks.load_run(folder).ok

    assert len(ok) > 2
    assert ok.server_source.isna().all()
    assert told["join"]["joined"] == 0
    assert any("continuous" in sentence for sentence in told["untold"])
    assert told["untold"][0] in " ".join((folder / "summary.txt").read_text().split())
    assert [bar["name"] for bar in told["waterfall"][0]["bars"]][-2] == "http+template+tokenize+queue+prefill+delivery"


def test_transformers_first_token_is_not_the_early_role_chunk(transformers_run):
    run = twoclocks.load_run(transformers_run)
    ok = run.requests[run.requests.status == "ok"]
    first = run.chunks.groupby("request_id").first()

    assert len(ok) == len(run.requests) > 4
    assert set(first.kind) == {"role"}
    said = ok[ok.ttft.notna()]  # the random model's tokens are not always text
    assert len(said) > 4
    # a server that is short of time may send both at once, and then they arrive at once
    assert (said.ttft >= said.first_byte_at - said.sent_at - 2e-6).all()
    assert (said.ttft > said.first_byte_at - said.sent_at).any()
    assert (ok.output_tokens <= 12).all()
    assert set(ok.token_source) == {"usage"}


def test_transformers_log_gives_queue_and_whole_time_of_each_request(transformers_run):
    ok = twoclocks.load_run(transformers_run).requests.query("status == 'ok'")

    assert (ok.server_source == "log").all()
    assert (ok.server_queue >= 0).all()
    said = ok[ok.e2e.notna()]
    assert (said.e2e >= said.server_queue).all()
    assert ok.server_ttft.isna().all()


def test_the_doctor_sees_what_vllm_tells_of_itself(real_vllm):
    facts = look_at_server(Target(url=real_vllm.url, model=real_vllm.model))

    assert (facts.unreachable, facts.refused, facts.named) == (None, None, "vllm")
    assert facts.series > 100
    assert {"ttft", "queue", "prefill", "decode", "e2e"} <= set(facts.told)
    assert (facts.told_by, facts.has_usage) == ("vllm", True)


def test_the_doctor_sees_what_transformers_does_not_tell(real_transformers):
    facts = look_at_server(Target(url=real_transformers.url, model=real_transformers.model, server="transformers"))

    assert (facts.unreachable, facts.refused, facts.series, facts.told) == (None, None, None, [])
    assert facts.tokens


def test_the_two_compare(vllm_run, transformers_run, tmp_path):
    command = [
        sys.executable,
        "-m",
        "twoclocks",
        "compare",
        str(vllm_run),
        str(transformers_run),
        "--out",
        str(tmp_path),
    ]
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)

    assert process.returncode == 0, process.stdout + process.stderr
    assert f"comparison: {tmp_path}" in process.stdout
    assert (tmp_path / "report.html").exists()
