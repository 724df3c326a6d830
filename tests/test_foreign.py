"""Result files of other load testers, as their sources lay them out, and beside a run by their definitions."""

import csv
import json
import subprocess
import sys

import pytest
from make_run import make_run

import twoclocks
from twoclocks import cli, foreign
from twoclocks.compare import compare
from twoclocks.compare_text import text
from twoclocks.errors import TwoclocksError
from twoclocks.vllm_bench import vllm_bench


def spread(mean, p50, p95, p99):
    return {"mean": mean, "percentiles": {"p50": p50, "p95": p95, "p99": p99, "p001": 0}, "median": p50, "count": 9}


GUIDELLM = {
    "benchmarks": [
        {
            "config": {"strategy": {"type_": "concurrent", "streams": 8}},
            "metrics": {
                "time_to_first_token_ms": {"successful": spread(120, 100, 180, 200), "total": spread(1, 1, 1, 1)},
                "inter_token_latency_ms": {"successful": spread(21, 20, 24, 25)},
                "time_per_output_token_ms": {"successful": spread(31, 30, 34, 35)},
                "request_latency": {"successful": spread(2.1, 2.0, 2.4, 2.5)},
                "requests_per_second": {"successful": {"mean": 3.0}, "total": {"mean": 4.0}},
                "output_tokens_per_second": {"total": {"mean": 400.0}},
            },
        },
        {"metrics": {"request_latency": {"successful": {"mean": 5.0}}}},
    ]
}
GENAI_BENCH = {
    "aggregated_metrics": {
        "stats": {
            "ttft": {"mean": 120, "p50": 100, "p95": 180, "p99": 200},
            "tpot": {"mean": 21, "p50": 20, "p95": 24, "p99": 25},
            "e2e_latency": {"mean": 2100, "p50": 2000, "p95": 2400, "p99": None},
        },
        "requests_per_second": 4.0,
        "mean_output_throughput_tokens_per_s": 400.0,
    },
    "individual_request_metrics": [],
    "_time_unit": "ms",
}


def aiperf_line(number, ttft, itl, latency, **more):
    values = {
        "time_to_first_token": (ttft, "ms"),
        "inter_token_latency": (itl, "ms"),
        "request_latency": (latency, "ms"),
    }
    values["output_sequence_length"] = (10, "tokens")
    metrics = {name: {"value": value, "unit": unit} for name, (value, unit) in values.items() if value is not None}
    metadata = {"request_start_ns": 1_790_000_000_000_000_000 + number * 10**9, "benchmark_phase": "profiling"}
    return {"metadata": metadata, "metrics": metrics, "error": None} | more


def write(path, *rows):
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return path


def test_guidellm(tmp_path):
    first, second = foreign.read(write(tmp_path / "benchmarks.json", GUIDELLM))

    assert (first.name, first.tool) == ("benchmarks.json [1 concurrent]", "guidellm")
    assert first.figures["ttft"] == {"unit": "s", "mean": 0.12, "p50": 0.1, "p95": pytest.approx(0.18), "p99": 0.2}
    assert first.figures["tpot"]["p50"] == 0.03
    assert first.figures["e2e"]["p99"] == 2.5
    assert first.figures["request_throughput"] == {"unit": "requests/s", "value": 4.0}  # the one that it prints
    assert second.figures["e2e"] == {"unit": "s", "mean": 5.0, "p50": None, "p95": None, "p99": None}
    assert second.figures["ttft"]["p50"] is second.figures["output_throughput"]["value"] is None


def test_genai_bench(tmp_path):
    (one,) = foreign.read(write(tmp_path / "x.json", GENAI_BENCH))
    (in_seconds,) = foreign.read(write(tmp_path / "s.json", {"aggregated_metrics": {"stats": {"ttft": {"p50": 0.1}}}}))

    assert (one.tool, set(one.figures) & {"itl", "goodput"}) == ("genai-bench", set())
    assert one.figures["e2e"] == {"unit": "s", "mean": 2.1, "p50": 2.0, "p95": pytest.approx(2.4), "p99": None}
    assert one.figures["output_throughput"]["value"] == 400.0
    assert in_seconds.figures["ttft"]["p50"] == 0.1


def test_aiperf(tmp_path):
    warmup = aiperf_line(0, 900, 900, 900)
    warmup["metadata"]["benchmark_phase"] = "warmup"
    lines = [
        warmup,
        aiperf_line(10, 100, 20, 1000),
        aiperf_line(11, 300, None, 2000),
        aiperf_line(12, 1, 1, 1, error={}),
    ]
    (one,) = foreign.read(write(tmp_path / "profile_export.jsonl", *lines))

    assert one.tool == "aiperf"
    assert one.figures["ttft"]["p50"] == pytest.approx(0.2)
    assert one.figures["itl"]["p99"] == pytest.approx(0.02)
    assert one.figures["e2e"]["mean"] == pytest.approx(1.5)
    assert one.figures["request_throughput"]["value"] == pytest.approx(2 / 3, rel=1e-6)  # 10 s .. 11 s + 2 s
    assert one.figures["output_throughput"]["value"] == pytest.approx(20 / 3, rel=1e-6)
    assert "tpot" not in one.figures


def test_locusts_csv_as_locust_writes_it(tmp_path):
    program = (
        "import csv, sys, types; from locust.stats import *; stats = RequestStats()\n"
        "for n in range(100): stats.log_request('POST', 'chat', 10 * n + 5, 0)\n"
        "stats.log_request('GET', 'models', 3, 0)\n"
        "StatsCSV(types.SimpleNamespace(stats=stats), PERCENTILES_TO_REPORT).requests_csv(csv.writer(sys.stdout))"
    )
    told = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    (tmp_path / "out_stats.csv").write_text(told)
    (one,) = foreign.read(tmp_path / "out_stats.csv")
    row = list(csv.DictReader(told.splitlines()))[-1]

    assert (one.tool, row["Name"]) == ("Locust", "Aggregated")
    assert one.figures["e2e"]["p95"] == pytest.approx(float(row["95%"]) / 1e3)
    assert one.figures["e2e"]["mean"] == pytest.approx(float(row["Average Response Time"]) / 1e3)
    assert set(one.figures) == {"e2e", "request_throughput"}


@pytest.mark.parametrize(
    ("name", "content"),
    [("a.json", "{"), ("a.json", "[1]"), ("a.json", ""), ("a.json", '{"ti\\u001btle": 1}'), ("a.csv", "x,y\n1,2\n"),
     ("a.csv", "\xff"), ("a.json", '{"benchmarks": 3}'),
     ("a.json", '{"aggregated_metrics": {}, "_time_unit": "days"}'), ("a.json", "[" * 5000),
     ("a.csv", "Type,Name\rx,y\r"), ("a.csv", "Type,Name\n" + "x" * 200_000)],
)  # fmt: skip
def test_what_is_no_result_is_one_line(tmp_path, name, content):
    (tmp_path / name).write_bytes(content.encode("latin-1"))

    with pytest.raises(TwoclocksError) as raised:
        foreign.read(tmp_path / name)

    assert str(raised.value).startswith(f"{tmp_path / name}: is no result file that can be read: ")
    assert "\n" not in str(raised.value)
    assert "\x1b" not in str(raised.value)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    make_run(folder / "ours", requests=30)
    return folder / "ours"


def test_vllms_own_layout_comes_back_as_what_the_run_says(run, tmp_path):
    write(tmp_path / "v.json", vllm_bench(twoclocks.load_run(run)))
    summary = compare([run, tmp_path / "v.json"], tmp_path / "out").summary
    (other,) = summary["others"]

    assert (other["tool"], other["runs"]) == ("vLLM bench serve", ["invented"])
    assert len(other["rows"]) == 4 * 4 + 2
    for row in other["rows"]:
        assert row["ours"] == pytest.approx([row["theirs"]]), row


def test_a_run_beside_files_of_other_tools(run, tmp_path, capsys):
    files = [write(tmp_path / "benchmarks.json", GUIDELLM), write(tmp_path / "genai<b>.json", GENAI_BENCH)]

    assert cli.main(["compare", str(run), *map(str, files), "--out", str(tmp_path / "out")]) == 0

    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    page, shown = (tmp_path / "out" / "report.html").read_text(), capsys.readouterr().out
    assert [other["tool"] for other in summary["others"]] == ["guidellm", "guidellm", "genai-bench"]
    assert "By the definitions of genai-bench" in shown
    assert "Differences" not in shown
    assert shown == text(summary) + shown[len(text(summary)) :]
    assert "genai<b>" not in page
    lacking = [row for row in summary["others"][1]["rows"] if row["theirs"] is None]
    assert len(lacking) == 4 * 4 + 2 - 1  # shown as lacking, beside what the run has
    assert all(row["ours"][0] is not None for row in lacking)


def test_a_file_alone_is_no_comparison_and_has_no_gate(run, tmp_path):
    file = write(tmp_path / "benchmarks.json", GUIDELLM)

    for folders, gates in (([file], ()), ([run, file], ("ttft.p95 <= 5 ms",))):
        with pytest.raises(TwoclocksError, match="of which no gate can be asked"):
            compare(folders, tmp_path / "out", gates=gates)
