"""Runs against the real vLLM and the real `transformers serve`, with a tiny random model."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

import twoclocks

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.real


def run_against(server, tmp_path, **settings):
    """The run folder of four users for a few seconds, as the command line makes it."""
    settings = {
        "target.url": server.url,
        "target.model": server.model,
        "target.extra_body": "{temperature: 0}",
        "workload.max_tokens": 12,
        "collect.log": f"file:{server.log_path}",
        "output": tmp_path,
    } | settings
    command = [str(Path(sys.executable).with_name("locust")), "-f", "load_test.py", "--headless", "--only-summary"]
    command += ["-u", "4", "-r", "4", "-t", "5"]
    for key, value in settings.items():
        command += ["--set", f"{key}={value}"]
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert process.returncode == 0, process.stdout + process.stderr
    folder = Path(process.stdout.rstrip().rpartition("run folder: ")[2])
    assert (folder / "report.html").exists(), process.stdout + process.stderr
    return folder


@pytest.fixture(scope="module")
def vllm_run(real_vllm, tmp_path_factory):
    return run_against(real_vllm, tmp_path_factory.mktemp("vllm"))


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


def test_transformers_first_token_is_not_the_early_role_chunk(transformers_run):
    run = twoclocks.load_run(transformers_run)
    ok = run.requests[run.requests.status == "ok"]
    first = run.chunks.groupby("request_id").first()

    assert len(ok) == len(run.requests) > 4
    assert set(first.kind) == {"role"}
    said = ok[ok.ttft.notna()]  # the random model's tokens are not always text
    assert len(said) > 4
    assert (said.ttft > said.first_byte_at - said.sent_at).all()
    assert (ok.output_tokens <= 12).all()
    assert set(ok.token_source) == {"usage"}


def test_transformers_log_gives_queue_and_whole_time_of_each_request(transformers_run):
    ok = twoclocks.load_run(transformers_run).requests.query("status == 'ok'")

    assert (ok.server_source == "log").all()
    assert (ok.server_queue >= 0).all()
    said = ok[ok.e2e.notna()]
    assert (said.e2e >= said.server_queue).all()
    assert ok.server_ttft.isna().all()


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
