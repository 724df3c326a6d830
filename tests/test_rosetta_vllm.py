"""The column for vLLM and vllm_bench.json against vLLM's own client and calculate_metrics, of the same arrivals."""

import json
import subprocess
from pathlib import Path

import numpy as np
import pytest
from make_run import make_run, record, write_folder
from real_servers import prepared

import twoclocks
from twoclocks.record import KINDS, expand, read_records
from twoclocks.rosetta import TOOLS, arrivals
from twoclocks.vllm_bench import vllm_bench

pytestmark = pytest.mark.real
REPLAY = Path(__file__).parent / "vllm_replay.py"
SLO = {"ttft": 0.12, "tpot": 0.024, "e2e": 0.9}
DELTAS = {
    "role": {"role": "assistant", "content": ""},
    "content": {"content": "word"},
    "reasoning": {"reasoning": "hm"},
    "tool": {"tool_calls": [{"index": 0, "function": {"arguments": "{"}}]},
    "empty": {"content": ""},
    "finish": {"content": ""},
}


def event(kind, made, at):
    usage = {"prompt_tokens": made.prompt_tokens, "completion_tokens": made.output_tokens}
    if kind == "usage":
        return [at, {"choices": [], "usage": usage}]
    return [at, {"choices": [{"index": 0, "delta": DELTAS[kind], "finish_reason": None}]}]


def odd_records():
    """Answers of all kinds of chunks: thinking, a tool call, one token, a new connection, a break in the middle."""
    kinds = [("role", 1), ("reasoning", 2), ("content", 2), ("empty", 1), ("finish", 1), ("usage", 1)]
    common = {"prompt_tokens": 9, "http_status": 200}
    return [
        record("a" * 32, sent_at=2.5, ended_at=3.9, chunk_us=[40_000, 60_000, 25_000, 70_000, 5_000, 30_000, 1, 400],
               chunk_tokens=[0, 3, 1, 2, 1, 0, 0, 0], output_tokens=7, chunk_kinds=kinds, **common),
        record("b" * 32, sent_at=2.7, ended_at=3.1, connect_started_at=2.61, connected_at=2.65,
               chunk_us=[90_000, 11_000, 600], chunk_kinds=[("tool", 2), ("usage", 1)], output_tokens=8, **common),
        record("c" * 32, sent_at=3.3, ended_at=3.5, chunk_us=[100_000, 300], chunk_kinds=[("content", 1), ("usage", 1)],
               output_tokens=1, **common),
        record("d" * 32, sent_at=3.6, ended_at=4.5, chunk_us=[80_000, 20_000], chunk_kinds=[("content", 2)],
               status="truncated", error_kind="reset", error_message="it broke"),
    ]  # fmt: skip


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """(run, what vLLM made of its records)."""
    folder = tmp_path_factory.mktemp("rosetta")
    make_run(folder / "plain", requests=50, failures=3)
    made = [*read_records(folder / "plain" / "requests.jsonl"), *odd_records()]
    window = {"started_at": 2.0, "ended_at": max(one.ended_at for one in made)}
    write_folder(folder / "run", made, window=window, target={"server": "vllm", "api": "chat", "model": "tiny"})
    slo = ", ".join(f"{name}_ms: {limit * 1e3:g}" for name, limit in SLO.items())
    (folder / "run" / "experiment.yaml").write_text(f"slo: {{{slo}}}\n")
    run = twoclocks.load_run(folder / "run")
    measured = [one for one in made if one.phase != "warmup"]
    requests = [
        {
            "began_at": next((at for at in (one.connect_started_at, one.sent_at) if at is not None), one.intended_at),
            "prompt_tokens": one.prompt_tokens,
            "output_tokens": one.output_tokens,
            "ok": one.status == "ok",
            "events": [
                event(kind, one, one.sent_at + at / 1e6)
                for kind, at in zip(expand(one.chunk_kinds), np.cumsum(one.chunk_us).tolist(), strict=True)
            ],
        }
        for one in measured
    ]
    began = min(request["began_at"] for request, one in zip(requests, measured, strict=True) if one.sent_at is not None)
    given = {
        "requests": requests,
        "seconds": max(one.ended_at for one in measured) - began,
        "goodput": {"ttft": SLO["ttft"] * 1e3, "tpot": SLO["tpot"] * 1e3, "e2el": SLO["e2e"] * 1e3},
        "bench": vllm_bench(run),
    }
    (folder / "given.json").write_text(json.dumps(given))
    command = [prepared("vllm")["vllm"], str(REPLAY), str(folder / "given.json"), str(folder / "told.json")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return run, json.loads((folder / "told.json").read_text())


def test_the_column_is_what_vllm_computes(both):
    run, told = both
    metrics, figures = told["metrics"], TOOLS["vLLM bench serve"](arrivals(run), SLO)

    assert set(run.arrivals.kind) == set(range(len(KINDS)))  # every kind of chunk is among them
    assert (metrics["completed"], metrics["failed"]) == (53, 4)
    for ours, theirs in {"ttft": "ttft", "itl": "itl", "tpot": "tpot", "e2e": "e2el"}.items():
        expected = {"mean": metrics[f"mean_{theirs}_ms"] / 1e3, "p50": metrics[f"median_{theirs}_ms"] / 1e3}
        expected |= {f"p{int(p)}": value / 1e3 for p, value in metrics[f"percentiles_{theirs}_ms"]}
        assert {key: figures[ours][key] for key in expected} == pytest.approx(expected, rel=1e-9), ours
    rates = {
        "request_throughput": metrics["request_throughput"],
        "output_throughput": metrics["output_throughput"],
        "goodput": metrics["request_goodput"],
    }
    assert {name: figures[name]["value"] for name in rates} == pytest.approx(rates, rel=1e-9)
    assert 0 < metrics["request_goodput"] < metrics["request_throughput"]  # some met the SLO, some did not


def test_the_result_file_is_what_vllm_would_write(both):
    run, told = both
    metrics, bench = told["metrics"], vllm_bench(run)
    same = (
        "completed",
        "failed",
        "request_throughput",
        "request_goodput",
        "output_throughput",
        "total_token_throughput",
    )
    same += ("max_output_tokens_per_s", "max_concurrent_requests")
    same += tuple(f"{word}_{name}_ms" for word in ("mean", "median", "std") for name in ("ttft", "tpot", "itl", "e2el"))
    ok = (run.measured["status"] == "ok").to_list()

    assert {key: bench[key] for key in same} == pytest.approx({key: metrics[key] for key in same}, rel=1e-9)
    assert (bench["total_input_tokens"], bench["total_output_tokens"]) == (
        metrics["total_input"],
        metrics["total_output"],
    )
    assert bench["output_lens"] == told["output_lens"]
    for name in ("ttft", "tpot", "itl", "e2el"):
        for p, value in metrics[f"percentiles_{name}_ms"]:
            assert bench[f"p{int(p)}_{name}_ms"] == pytest.approx(value, rel=1e-9)
    for ttft, gaps, latency, start, theirs, fine in zip(
        bench["ttfts"], bench["itls"], bench["latencies"], bench["start_times"], told["outputs"], ok, strict=True
    ):
        if fine:
            assert (ttft, latency, start) == pytest.approx((theirs["ttft"], theirs["latency"], theirs["start_time"]))
            assert gaps == pytest.approx(theirs["itl"], abs=1e-9)
    assert told["timeline"] > len(bench["ttfts"])  # its own plotting code took the file
