"""Plain PyTorch and vLLM in process, and the static batching server, with the tiny random model."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
from real_servers import prepared, started
from test_real import run_against

import twoclocks

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.real

TOKENS = 24
BATCH = 4


@pytest.fixture(scope="module")
def model():
    return prepared("transformers", "tiny")["tiny"]


def engine_run(kind, model, folder, *settings):
    """The run folder of batches of four and of the same prompts one by one, as the command line makes it."""
    prepared(kind if kind == "vllm" else "transformers")
    text = f"""
target: {{server: {kind}, api: in-process, start: {{kind: {kind}, model: "{model}"}}}}
workload: {{requests: requests/demo.jsonl, order: in-order, max_tokens: {TOKENS}, ignore_eos: true}}
load: {{shape: batch, batch: {BATCH}, batches: 2, duration_s: 300}}
warmup: {{requests: 0}}
output_text: true
"""
    path = folder.with_suffix(".yaml")
    path.write_text(text)
    command = [sys.executable, "-m", "twoclocks.in_process", "--experiment", path, "--run-folder", folder]
    command += [word for setting in settings for word in ("--set", setting)]
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert process.returncode == 0, process.stdout + process.stderr
    return folder


@pytest.fixture(scope="module")
def pytorch_run(model, tmp_path_factory):
    return engine_run("pytorch", model, tmp_path_factory.mktemp("pytorch") / "batch")


@pytest.fixture(scope="module")
def single_run(model, tmp_path_factory):
    settings = ("load.batch=1", f"load.batches={2 * BATCH}")
    return engine_run("pytorch", model, tmp_path_factory.mktemp("single") / "single", *settings, "warmup.requests=0")


@pytest.fixture(scope="module")
def vllm_run(model, tmp_path_factory):
    flags = 'target.start.flags=[--max-model-len, "1024"]'
    return engine_run("vllm", model, tmp_path_factory.mktemp("vllm") / "batch", flags)


@pytest.mark.parametrize("which", ["pytorch_run", "vllm_run"])
def test_every_answer_has_the_tokens_that_were_asked_for_a_step_each(which, request):
    run = twoclocks.load_run(request.getfixturevalue(which))

    assert set(run.requests["status"]) == {"ok"}
    assert set(run.requests["output_tokens"]) == {TOKENS}
    assert set(run.requests["finish_reason"]) == {"length"}
    assert run.chunks.groupby("request_id", observed=True)["tokens"].sum().tolist() == [TOKENS] * len(run.requests)
    assert (run.requests["prompt_tokens"] > 4).all()
    assert [len(batch) for _, batch in run.measured.groupby("intended_at")] == [BATCH, BATCH]


def test_greedy_answers_of_a_padded_batch_are_those_of_single_prompts(pytorch_run, single_run):
    batch, single = (twoclocks.load_run(folder).measured.set_index("prompt_id") for folder in (pytorch_run, single_run))

    assert batch["prompt_tokens"].nunique() > 1  # so that there was padding
    assert batch["output_text"].to_dict() == single["output_text"].to_dict()
    assert batch["prompt_tokens"].to_dict() == single["prompt_tokens"].to_dict()


def test_both_engines_read_the_same_prompts_and_begin_alike(pytorch_run, vllm_run):
    """Other kernels round otherwise, so that a random model's answers part somewhere; not at once."""
    plain, paged = (twoclocks.load_run(folder).measured.set_index("prompt_id") for folder in (pytorch_run, vllm_run))

    assert plain["prompt_tokens"].to_dict() == paged["prompt_tokens"].to_dict()
    same = [plain["output_text"][one][:4] == paged["output_text"][one][:4] for one in plain.index]
    assert sum(same) > len(same) / 2


def test_a_static_batch_returns_as_a_whole_and_its_tokens_come_in_step(pytorch_run):
    run = twoclocks.load_run(pytorch_run)

    for _, batch in run.measured.groupby("intended_at"):
        assert batch["ended_at"].nunique() == 1
        steps = {tuple(round(float(gap), 6) for gap in chunk_us) for chunk_us in batch["chunk_us"]}
        assert len(steps) == 1


def test_the_memory_told_is_plausible(pytorch_run, vllm_run, model):
    on_disk = (model / "model.safetensors").stat().st_size  # float32, as it is loaded
    for folder in (pytorch_run, vllm_run):
        rows = {row["name"]: row["bytes"] for row in twoclocks.load_run(folder).meta["memory"]}
        assert rows["weights"] == pytest.approx(on_disk, rel=0.01)
        assert rows["weights"] < rows["process_rss_peak"] < 16 * 2**30
    assert rows["kv_used_peak"] < rows["kv_reserved"] == pytest.approx(2**30, rel=0.01)  # VLLM_CPU_KVCACHE_SPACE


def test_the_kv_cache_in_use_at_the_fullest_step_is_that_of_the_longest_batch(vllm_run):
    """By hand: blocks of 128 tokens on a CPU, and the last token of an answer is never computed with."""
    run = twoclocks.load_run(vllm_run)
    rows = {row["name"]: row for row in run.meta["memory"]}
    blocks = [
        sum(math.ceil((tokens + TOKENS - 1) / 128) for tokens in batch["prompt_tokens"])
        for _, batch in run.measured.groupby("intended_at")
    ]
    size = 2 * 4 * 4 * 64 * 4 * 128  # K and V, layers, heads, head size, bytes, tokens

    assert rows["kv_used_peak"]["bytes"] == max(blocks) * size


@pytest.mark.parametrize("which", ["pytorch_run", "vllm_run"])
def test_the_report_has_the_batches_and_speaks_of_no_server(which, request):
    folder = request.getfixturevalue(which)
    run, text = twoclocks.load_run(folder), " ".join((folder / "summary.txt").read_text().split())
    figures = json.loads((folder / "summary.json").read_text())["figures"]
    walls = [group["ended_at"].max() - group["sent_at"].min() for _, group in run.measured.groupby("intended_at")]

    assert figures["batch_latency"]["mean"] == pytest.approx(sum(walls) / 2)
    assert figures["batch_throughput"]["max"] == pytest.approx(BATCH * TOKENS / min(walls))
    assert "Batch latency: first sent, last ended" in text
    assert "weights, in memory" in text
    assert "joined" not in text


@pytest.mark.parametrize("steps", [False, True])
def test_the_static_server_holds_short_answers_until_the_longest_has_ended(steps, tmp_path):
    lengths = {"a": 4, "b": 40, "c": 8, "d": 16}
    requests = tmp_path / "requests.jsonl"
    lines = [{"id": name, "prompt": f"say {name}", "max_tokens": count} for name, count in lengths.items()]
    requests.write_text("".join(json.dumps(line) + "\n" for line in lines))
    flags = ("--batch-size", "4", "--max-wait-ms", "20000", *(["--stream-steps"] if steps else []))
    settings = {"target.server": "pytorch", "workload.requests": requests, "workload.order": "in-order"}
    settings |= {"workload.ignore_eos": "true", "load.shape": "batch", "load.batch": 4, "load.batches": 3}
    settings |= {"warmup.requests": 4, "target.extra_body": "{}"}
    for server in started("pytorch", tmp_path, *flags):
        folder = run_against(server, tmp_path, ("-t", "120"), **settings)
    run = twoclocks.load_run(folder)
    told = json.loads((folder / "summary.json").read_text())

    assert (run.ok["output_tokens"] == run.ok["prompt_id"].map(lengths)).all()
    assert (run.ok["server_kind"] == "pytorch").all()
    assert len(run.ok) == 12
    for _, batch in run.ok.groupby("intended_at"):
        rows = batch.set_index("prompt_id")
        assert set(rows["server"].map(lambda one: one["batch_size"])) == {4}
        short, long = rows.loc["a"], rows.loc["b"]
        assert short["server_decode"] < 0.5 * long["server_decode"]
        if steps:
            assert short["server_e2e"] < long["server_e2e"]
            assert short["server_held"] < short["server_decode"]
        else:
            assert short["server_held"] > 0.9 * long["server_decode"]
            assert short["ended_at"] > long["ended_at"] - 0.5 * long["server_decode"]
            assert math.isnan(long["tpot"])  # all of it came as one chunk
    checks = {check["name"]: check["passed"] for check in told["checks"]}
    assert checks["joined"] is True
    assert checks["output_tokens_agree_with_counter"] is True
    assert checks["client_after_server"] is True
    assert checks["waterfall_not_negative"] is True
    assert ("held until it is sent" in (folder / "summary.txt").read_text()) is True
