import json
import re
from datetime import UTC, datetime, timedelta
from html import unescape
from html.parser import HTMLParser
from pathlib import Path

import pytest
from make_run import make_run, record, write_folder

from twoclocks import log_files, report
from twoclocks.errors import RunFolderError
from twoclocks.load import load_run


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "vllm"
    make_run(folder, requests=30, failures=2)
    return folder, report.build(folder)


def test_all_files_are_written(built):
    folder, made = built

    for name in (
        "summary.json",
        "summary.txt",
        "vllm_bench.json",
        "report.html",
        "plots/client_vs_server_violin.png",
        "plots/timeline.png",
        "plots/waterfall.png",
        "plots/server_histograms.png",
    ):
        assert (folder / name).stat().st_size > 100, name
    assert made.html == folder / "report.html"
    assert made.violin == folder / "plots" / "client_vs_server_violin.png"
    assert json.loads((folder / "summary.json").read_text()) == made.summary


def test_the_page_is_self_contained_and_well_formed(built):
    folder, _ = built
    html = (folder / "report.html").read_text()
    opened, problems = [], []

    class Checker(HTMLParser):
        def handle_starttag(self, tag, attrs):
            for name, value in attrs:
                if name in ("src", "href") and not value.startswith(("data:", "#")):
                    problems.append((tag, value))
            if tag not in ("meta", "img", "br", "link"):
                opened.append(tag)

        def handle_endtag(self, tag):
            if not opened or opened.pop() != tag:
                problems.append(("end", tag))

    Checker().feed(html)

    assert problems == []
    assert opened == []
    assert html.count("data:image/png;base64,") == 1


def test_the_servers_text_is_escaped(built):
    folder, _ = built
    html = (folder / "report.html").read_text()

    assert "&lt;script&gt;" in html
    assert len(re.findall(r"<script", html)) == 3  # the numbers, and our two scripts
    assert "script-src 'sha256-" in unescape(html)


def test_the_page_shows_the_figures_of_the_summary(built):
    folder, made = built
    html = (folder / "report.html").read_text()

    assert f"{made.summary['figures']['ttft']['p50'] * 1e3:,.1f}" in html
    assert "Both hold queue and prefill" in html
    assert "shape: ramp" in html


def test_each_part_of_the_waterfall_stands_there_with_its_definition(built):
    folder, made = built
    html = (folder / "report.html").read_text()
    (waterfall,) = made.summary["waterfall"]

    assert "The largest part of the time to the first token is" in html
    for bar in waterfall["bars"]:
        assert bar["label"] in html
        assert html.count(bar["definition"].replace(">", "&gt;").replace("'", "&#39;")) >= 2, bar["name"]


def test_every_server_figure_stands_with_its_definition(built):
    folder, made = built
    html, text = (folder / "report.html").read_text(), (folder / "summary.txt").read_text()
    unwrapped = " ".join(text.split())

    for row in [*made.summary["client_vs_server"], *made.summary["server_window"]]:
        shown = row["server_definition"].replace(">", "&gt;").replace("'", "&#39;")
        assert f'title="{shown}' in html
        assert html.count(shown) >= 2
        if row.get("client") is not None or "server_names" in row:
            assert row["server_definition"] in unwrapped
    for check in made.summary["checks"]:
        if "histogram" in check["name"] or "counter" in check["name"]:
            assert check["definition"]
            assert f'<li title="{check["definition"].replace(">", "&gt;")}">' in html
    assert re.findall(r'<td class="n server">(?!–)', html) == []  # none without a hover


def test_gpus_and_what_could_not_be_read(tmp_path):
    make_run(tmp_path / "r", requests=20)
    row = {"source": "nvml", "host": None, "gpu": 0, "uuid": "GPU-0", "name": "H200 <b>", "utilisation": 0.5,
           "memory_used_bytes": 2**30, "memory_total_bytes": 4 * 2**30, "power_w": 300.0, "sm_clock_hz": 1.98e9,
           "temperature_c": 60.0, "throttle": ["sw_power_cap"]}  # fmt: skip
    rows = [row | {"at": float(at), "energy_j": 1000 + 300.0 * at} for at in range(60)]
    rows.append({"at": 3.0, "source": "dcgm", "host": "far", "error": "timed out"})
    (tmp_path / "r" / "gpu_samples.jsonl").write_text("".join(json.dumps(one) + "\n" for one in rows))

    made = report.build(tmp_path / "r")
    gpu, whole = made.summary["gpu"]
    html, text = ((tmp_path / "r" / name).read_text() for name in ("report.html", "summary.txt"))
    run = load_run(tmp_path / "r")
    length = run.window[1] - run.window[0]
    tokens = made.summary["figures"]["output_throughput"]["value"] * length

    assert gpu["power_mean_w"] == pytest.approx(300.0)
    assert whole["joules_per_output_token"] == pytest.approx(300.0 * length / tokens)
    for page in (html, text):
        assert f"{300.0 * length / tokens:,.3g} J an output token" in page
        assert "1.00 of 4.00" in page
        assert "sw_power_cap" in page
        assert "The GPUs of far could not be read 1 times, lastly: timed out" in page
    assert "H200 &lt;b&gt;" in html
    assert made.summary["gpu_definitions"]["joules_per_output_token"] in html


VLLM_LINE = (
    "INFO {time} [loggers.py:127] Engine 000: Avg prompt throughput: 20.0 tokens/s, Avg generation throughput: "
    "{tokens} tokens/s, Running: {running} reqs, Waiting: 1 reqs, GPU KV cache usage: 20.0%, "
    "Prefix cache hit rate: 0.0%\n"
)


def test_a_log_that_is_added_later_is_told_and_drawn(tmp_path):
    make_run(tmp_path / "r", server="silent", requests=60)
    before = (report.build(tmp_path / "r"), (tmp_path / "r" / "plots" / "timeline.png").read_bytes())
    start = datetime.fromtimestamp(1_790_000_000, UTC)
    lines = [
        VLLM_LINE.format(time=f"{start + timedelta(seconds=at):%m-%d %H:%M:%S}", tokens=tokens, running=running)
        for at, tokens, running in ((-30, 900.0, 9), (1, 800.0, 8), (4, 100.0, 2), (6, 200.0, 5), (90, 700.0, 7))
    ]
    log_files.add_log(tmp_path / "r", write(tmp_path / "vllm.log", "".join(lines)))

    made = report.build(tmp_path / "r")
    told = {row["name"]: row for row in made.summary["log_series"]}
    tokens = told["log:vllm:generation_throughput"]
    html = (tmp_path / "r" / "report.html").read_text()

    assert before[0].summary["log_series"] == []
    assert (tmp_path / "r" / "plots" / "timeline.png").read_bytes() != before[1]
    assert (tokens["n"], tokens["mean"], tokens["max"], tokens["engine"]) == (2, 150.0, 200.0, "0")
    assert told["log:vllm:requests_running"]["mean"] == 3.5
    assert "vllm, requests running (engine 0)" in html
    assert "3.50" in html
    assert tokens["definition"] in html
    assert any("no zone were read as UTC" in note for note in made.summary["notes"])


def write(path, text):
    path.write_text(text)
    return path


def test_a_restart_and_engines_are_told_in_their_rows(tmp_path):
    folder = tmp_path / "r"
    make_run(folder, requests=30)
    lines = [json.loads(line) for line in (folder / "server_samples.jsonl").read_text().splitlines()]
    other = [line | {"url": "http://127.0.0.1:2/metrics"} for line in lines]
    other[-3]["samples"] = [*other[-3]["samples"], ["process_start_time_seconds", {}, 1.8e9]]
    (folder / "server_samples.jsonl").write_text("".join(json.dumps(line) + "\n" for line in [*lines, *other]))

    made = report.build(folder)
    row = next(row for row in made.summary["server_window"] if row["metric"] == "ttft")
    html, text = (folder / "report.html").read_text(), (folder / "summary.txt").read_text()

    assert row["since_restart"]
    for page in (html, text):
        assert "TTFT since the restart" in page
        assert "The server at http://127.0.0.1:2/metrics restarted: counted from" in " ".join(page.split())
    assert "<summary>TTFT since the restart, engine by engine</summary>" in html
    assert "engine 0 at http://127.0.0.1:1/metrics" in html
    assert "engine by engine" not in text


def test_what_scraping_did_is_among_the_notes(tmp_path):
    folder = tmp_path / "r"
    make_run(folder, server="silent", requests=5)
    line = {"url": "http://127.0.0.1:1/metrics", "at": 0.0, "until": 0.01, "error": None,
            "samples": [["llamacpp:prompt_tokens_seconds", {}, 1.0]]}  # fmt: skip
    (folder / "server_samples.jsonl").write_text(json.dumps(line) + "\n")

    made = report.build(folder)

    (told,) = made.summary["side_effects"]
    assert "ours reset them for others" in told
    assert "ours reset them for others" in (folder / "report.html").read_text()
    assert "reset them for others" in (folder / "summary.txt").read_text()


def test_a_report_can_be_made_again(built):
    folder, made = built

    assert report.build(folder).summary == made.summary


def test_a_partial_run_says_so_in_page_and_text(tmp_path):
    folder = write_folder(
        tmp_path / "r", [record()], status="running", in_flight=None, window={"started_at": None, "ended_at": None}
    )

    report.build(folder)

    for name in ("report.html", "summary.txt"):
        assert "Partial: the run was killed" in (folder / name).read_text()


def test_raw_files_stay_as_they_are(tmp_path):
    make_run(tmp_path / "r", requests=5)
    raw = {path: path.read_bytes() for path in (tmp_path / "r").iterdir()}

    report.build(tmp_path / "r")

    assert {path: path.read_bytes() for path in raw} == raw


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path):
    folder = write_folder(tmp_path / "r", [record()])
    (folder / "plots").write_text("in the way")

    with pytest.raises(RunFolderError, match="cannot be written"):
        report.build(folder)


def test_a_log_without_ids_is_not_called_foreign(tmp_path):
    make_run(tmp_path / "r", server="silent", requests=5)
    log_files.add_log(tmp_path / "r", Path(__file__).parent / "data" / "logs" / "tgi_text.log")

    summary = report.build(tmp_path / "r").summary

    assert summary["join"]["unjoined"] == {"the server's log has no id": 5}
    (left,) = summary["join"]["unmatched_rows"].items()
    assert left == ("log lines, since the server's log has no id", summary["join"]["rows"]["log"])
    assert next(check for check in summary["checks"] if check["name"] == "server_rows_ours")["passed"]
