"""Every tool's definitions on three requests that can be computed by hand; vLLM's own code: test_rosetta_vllm.py."""

import json
import subprocess
import sys

import numpy as np
import pytest
from make_run import record, write_folder

import twoclocks
from twoclocks import rosetta, rosetta_text, terminal
from twoclocks.rosetta import TOOLS
from twoclocks.summary import summarise

LIMITS = {"ttft": 0.45, "tpot": 0.2, "e2e": 1.15}
KINDS = [("role", 1), ("reasoning", 1), ("content", 2), ("finish", 1), ("usage", 1)]
"""Of the answer that thinks: at 0.1, 0.2, 0.5 and 0.9, 1.0, 1.1 s since it was sent at 10 s."""
SLO = "slo: {ttft_ms: 450, tpot_ms: 200, e2e_ms: 1150}\n"


def three():
    """It begins to connect at 9.9 and ends at 12 s; one answer has one token; one breaks."""
    return [
        record("a" * 32, connect_started_at=9.9, connected_at=9.95, sent_at=10.0, ended_at=12.0, chunk_kinds=KINDS,
               chunk_us=[100_000, 100_000, 300_000, 400_000, 100_000, 100_000], chunk_tokens=[0, 2, 1, 3, 0, 0],
               prompt_tokens=5, output_tokens=6),
        record("b" * 32, sent_at=10.0, ended_at=10.6, chunk_us=[300_000, 200_000],
               chunk_kinds=[("content", 1), ("usage", 1)], prompt_tokens=5, output_tokens=1),
        record("c" * 32, sent_at=11.0, ended_at=11.4, chunk_us=[200_000], chunk_kinds=[("content", 1)],
               status="error", error_kind="reset"),
        record("d" * 32, phase="warmup", sent_at=8.0, ended_at=9.0, chunk_us=[1], chunk_kinds=[("content", 1)]),
    ]  # fmt: skip


EXPECTED = {
    "vLLM bench serve": {
        "ttft": [0.2, 0.3],
        "itl": [0.1, 0.3, 0.4, 0.1],
        "tpot": [(1.1 - 0.2) / 5],
        "e2e": [1.1, 0.3],
        "rates": (2 / 2.1, 7 / 2.1, 2 / 2.1),
    },
    "SGLang bench": {
        "ttft": [0.3, 0.3],
        "itl": [0.3, 0.4],
        "tpot": [(2.1 - 0.3) / 5],
        "e2e": [2.1, 0.6],
        "rates": (2 / 2.1, 7 / 2.1, 1 / 2.1),
    },
    "guidellm": {
        "ttft": [0.2, 0.3],
        "itl": [(0.9 - 0.2) / 5],
        "tpot": [0.9 / 6] * 6 + [0.3],  # an answer weighs its tokens
        "e2e": [2.0, 0.6],
        "rates": (3 / 2.1, 8 / 2.1, 0.0),
    },
    "aiperf": {"ttft": [0.3, 0.3], "itl": [(1.0 - 0.3) / 5], "e2e": [1.0, 0.3], "rates": (2 / 1.0, 7 / 1.0, 1 / 1.0)},
    "genai-bench": {
        "ttft": [0.3, 0.3],
        "tpot": [(1.2 - 0.3) / 5],
        "e2e": [1.2, 0.5],
        "rates": (2 / 2.1, 7 / 2.1, None),
    },
    "inference-perf": {
        "ttft": [0.6, 0.3],
        "itl": [0.4, 0.0, 0.0],
        "tpot": [(1.0 - 0.6) / 5],
        "e2e": [2.1, 0.6],
        "rates": (2 / 2.1, 7 / 2.1, float("nan")),  # one answer has no TPOT, and its source does not say what then
    },
    "llmperf": {"ttft": [0.6, 0.3], "itl": [1.0 / 6, 0.3], "e2e": [2.1, 0.6], "rates": (2 / 2.1, 7 / 2.1, None)},
}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = write_folder(tmp_path_factory.mktemp("runs") / "r", three(), window={"started_at": 9.5, "ended_at": 12.5})
    (folder / "experiment.yaml").write_text(SLO)
    return twoclocks.load_run(folder)


@pytest.mark.parametrize("tool", EXPECTED)
def test_each_tool_by_hand(run, tool):
    expected, figures = EXPECTED[tool], TOOLS[tool](rosetta.arrivals(run), LIMITS)
    inverted = {"method": "inverted_cdf"} if tool == "guidellm" else {}

    assert set(figures) - {"request_throughput", "output_throughput", "goodput"} == set(expected) - {"rates"}
    for metric in set(expected) - {"rates"}:
        values = expected[metric]
        ranks = dict(zip(("p50", "p95", "p99"), np.percentile(values, [50, 95, 99], **inverted), strict=True))
        known = {"mean": np.mean(values), **ranks}
        assert {key: figures[metric][key] for key in known} == pytest.approx(known), metric
    for name, value in zip(("request_throughput", "output_throughput", "goodput"), expected["rates"], strict=True):
        assert (name in figures) == (value is not None), name
        if value is not None:
            assert figures[name]["value"] == pytest.approx(value, nan_ok=True), name


def test_locust_by_hand(run):
    figures = TOOLS["Locust"](rosetta.arrivals(run), LIMITS)

    assert set(figures) == {"e2e", "request_throughput"}
    assert [figures["e2e"][key] for key in ("p50", "p95")] == [0.6, 2.1]
    assert figures["e2e"]["mean"] == pytest.approx((2.1 + 0.6 + 0.4) / 3)
    assert figures["request_throughput"]["value"] == pytest.approx(3 / 2.1)


def test_locusts_percentiles_are_those_of_its_own_statistics(tmp_path):
    seconds = np.random.default_rng(3).lognormal(0, 2, 400).round(6)
    program = (
        "import json, sys; from locust.stats import RequestStats; stats = RequestStats()\n"
        "for s in json.load(sys.stdin): stats.log_request('POST', 'x', s * 1e3, 0)\n"
        "print([stats.total.get_response_time_percentile(p) for p in (.5, .95, .99)], stats.total.avg_response_time)"
    )
    told = subprocess.run(
        [sys.executable, "-c", program], input=json.dumps(seconds.tolist()), capture_output=True, text=True, check=True
    ).stdout
    records = [record(f"{n:032x}", sent_at=0.0, ended_at=s) for n, s in enumerate(seconds.tolist())]
    figures = TOOLS["Locust"](rosetta.arrivals(twoclocks.load_run(write_folder(tmp_path / "r", records))), {})
    ranks, mean = told.rstrip().split("] ")

    assert [figures["e2e"][f"p{p}"] * 1e3 for p in (50, 95, 99)] == pytest.approx(json.loads(ranks + "]"))
    assert figures["e2e"]["mean"] * 1e3 == pytest.approx(float(mean))


def test_without_an_slo_nobody_has_a_goodput(run):
    assert not any("goodput" in tool(rosetta.arrivals(run), {}) for tool in TOOLS.values())


def test_usage_beside_the_finish_is_an_event_of_vllms_only_where_the_server_says_it_so(tmp_path):
    kinds = {"sent_at": 0.0, "ended_at": 2.0, "chunk_us": [100_000, 500_000], "output_tokens": 3}
    made = record(chunk_kinds=[("content", 1), ("usage", 1)], **kinds)
    e2e = {}
    for server in ("vllm", "transformers"):
        folder = write_folder(tmp_path / server, [made], target={"server": server})
        e2e[server] = TOOLS["vLLM bench serve"](rosetta.arrivals(twoclocks.load_run(folder)), {})["e2e"]["p50"]

    assert e2e == {"vllm": pytest.approx(0.1), "transformers": pytest.approx(0.6)}


def test_unknown_token_counts_make_rates_unknown_and_no_number(tmp_path):
    made = record(sent_at=0.0, ended_at=2.0, chunk_us=[100_000, 500_000], chunk_kinds=[("content", 2)])
    rows = summarise(twoclocks.load_run(write_folder(tmp_path / "r", [made])))["rosetta"]
    told = {row["tool"]: row["figures"] for row in rows}

    assert told["vLLM bench serve"]["output_throughput"]["value"] is None
    assert told["vLLM bench serve"]["tpot"]["n"] == 0
    assert told["vLLM bench serve"]["request_throughput"]["value"] == pytest.approx(0.5)
    assert "output_throughput" not in told["Locust"]


def test_the_table_says_why_each_differs(run):
    rows = summarise(run)["rosetta"]
    text = terminal.to_text(rosetta_text.render(rows))
    lines = [line for line in rosetta_text.markdown(rows).splitlines() if line.startswith("|")]

    assert [row["tool"] for row in rows] == ["twoclocks", *TOOLS]
    assert all(row["why"] and row["definition"] and row["source"].startswith("Source: ") for row in rows)
    assert max(map(len, text.splitlines())) <= terminal.WIDTH
    assert "…" not in text  # no number is cut
    assert len(lines) == len(rows) + 2
    assert len({line.count(" | ") for line in lines}) == 1
    vllm = next(line for line in lines if line.startswith("| vLLM"))
    assert "| 250.0 / 299.0 |" in vllm
    assert "empty, role-only" in vllm


@pytest.mark.parametrize("meta", [{}, {"target": {"api": "in-process"}}])
def test_a_run_without_answers_or_without_a_server_invents_nothing(tmp_path, meta):
    run = twoclocks.load_run(write_folder(tmp_path / "r", [], **meta))
    summary = summarise(run)

    assert bool(summary["rosetta"]) == (not meta)
    assert all(figure.get("p50") is None for row in summary["rosetta"] for figure in row["figures"].values())
    assert terminal.to_text(rosetta_text.render(summary["rosetta"]))
    assert rosetta_text.markdown(summary["rosetta"])
