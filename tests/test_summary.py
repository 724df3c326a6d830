import json

import numpy as np
import pytest
from make_run import make_run, record, write_folder

import twoclocks
from twoclocks import terminal
from twoclocks.summary import summarise
from twoclocks.vllm_bench import vllm_bench


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "vllm"
    planted = make_run(folder, requests=50, failures=3)
    run = twoclocks.load_run(folder)
    return run, summarise(run), planted


def row(summary, table, metric, statistic="mean"):
    return next(r for r in summary[table] if r["metric"] == metric and r.get("statistic", "mean") == statistic)


def check(summary, name):
    return next(c for c in summary["checks"] if c["name"] == name)


def test_totals(made):
    run, summary, planted = made
    figures = summary["figures"]

    assert figures["requests"]["value"] == 53
    assert figures["ok"]["value"] == 50
    assert figures["failed"]["value"] == 3
    assert figures["warmup"]["value"] == 2
    assert figures["output_tokens"]["value"] == sum(planted.tokens[2:])
    assert figures["output_throughput"]["value"] == pytest.approx(sum(planted.tokens[2:]) / (run.window[1] - 2.0))
    assert summary["errors"][0]["kind"] == "refused"
    assert summary["errors"][0]["count"] == 3


def test_every_figure_has_unit_and_definition(made):
    _, summary, _ = made

    for name, figure in summary["figures"].items():
        assert figure["unit"], name
        assert len(figure["definition"]) > 15, name
    json.dumps(summary, allow_nan=False)


def test_percentiles_are_numpys(made):
    run, summary, _ = made

    assert summary["figures"]["ttft"]["p99"] == pytest.approx(np.percentile(run.ok["ttft"], 99))
    assert summary["figures"]["itl"]["n"] == len(run.gaps.seconds)


def test_server_figures_are_the_planted_ones(made):
    _, summary, planted = made
    measured = slice(2, None)
    inside = np.array(planted.queue)[measured] + np.array(planted.prefill)[measured]

    found = row(summary, "client_vs_server", "ttft")

    assert found["n"] == 50
    assert found["server"] == pytest.approx(inside.mean())
    assert found["difference"] == pytest.approx(summary["figures"]["ttft"]["mean"] - inside.mean())
    assert row(summary, "client_vs_server", "queue", "p50")["server"] == pytest.approx(np.median(planted.queue[2:]))
    assert row(summary, "client_vs_server", "queue")["client"] is None


def test_the_scraped_window_leaves_the_warm_up_out(made):
    _, summary, planted = made

    found = row(summary, "server_window", "ttft")

    assert found["server_n"] == found["client_n"] == 50
    assert found["server_mean"] == pytest.approx(np.mean(planted.ttft[2:]))
    assert found["difference"] == pytest.approx(0.004, abs=1e-5)
    assert row(summary, "server_window", "queue")["server_p50"]["estimate"] is None
    assert (summary["scraped"]["from"], summary["scraped"]["requests"], summary["scraped"]["warmup"]) == (1.75, 50, 0)


def test_without_a_quiet_scrape_the_warm_up_is_in_on_both_sides(tmp_path):
    planted = make_run(tmp_path / "r", requests=20)
    path = tmp_path / "r" / "server_samples.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    before_the_window = json.loads(lines[1]) | {"at": 1.0}  # begun amid the second request to warm up
    path.write_text("".join([lines[0], json.dumps(before_the_window) + "\n", *lines[2:]]))

    summary = summarise(twoclocks.load_run(tmp_path / "r"))

    assert (summary["scraped"]["from"], summary["scraped"]["requests"], summary["scraped"]["warmup"]) == (0.0, 22, 2)
    assert row(summary, "server_window", "ttft")["server_mean"] == pytest.approx(np.mean(planted.ttft))


def test_no_difference_between_unequal_numbers_of_observations(made):
    _, summary, _ = made

    found = row(summary, "server_window", "itl")

    assert found["server_n"] > found["client_n"] * 1.01
    assert found["difference"] is None


def test_checks_pass_on_a_sound_run(made):
    _, summary, _ = made

    assert [c["passed"] for c in summary["checks"]] == [True] * 7
    assert "All 50 requests" in check(summary, "joined")["text"]


def test_checks_fail_where_something_is_wrong(tmp_path):
    make_run(tmp_path / "r", requests=20)
    path = tmp_path / "r" / "requests.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    measured = [line for line in lines if line["phase"] == "measure"]
    measured[0]["server"]["queue_time_ms"] = 60_000.0  # longer than the client waited
    measured[1]["server"] = None
    measured[2]["output_tokens"] += 5
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))

    summary = summarise(twoclocks.load_run(tmp_path / "r"))

    for name in ("joined", "client_after_server", "chunks_agree_with_usage", "output_tokens_agree_with_counter"):
        assert check(summary, name)["passed"] is False, name
    assert check(summary, "prompt_tokens_agree_with_counter")["passed"] is True
    assert "19 of 20" in check(summary, "joined")["text"]


def test_strangers_on_the_server_are_noticed(tmp_path):
    make_run(tmp_path / "r", requests=20)
    path = tmp_path / "r" / "requests.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-4]))

    summary = summarise(twoclocks.load_run(tmp_path / "r"))

    assert check(summary, "only_our_traffic")["passed"] is False
    assert row(summary, "server_window", "ttft")["difference"] is None


def test_a_silent_server_is_not_invented(tmp_path):
    make_run(tmp_path / "r", requests=10, server="silent")

    summary = summarise(twoclocks.load_run(tmp_path / "r"))

    assert summary["client_vs_server"] == summary["server_window"] == []
    assert check(summary, "client_after_server")["passed"] is None


def test_transformers_tells_queue_and_duration_only(tmp_path):
    planted = make_run(tmp_path / "r", requests=10, server="transformers")

    summary = summarise(twoclocks.load_run(tmp_path / "r"))

    assert {r["metric"] for r in summary["client_vs_server"]} == {"queue", "e2e"}
    expected = np.mean(np.array(planted.queue[2:]) + planted.prefill[2:] + planted.decode[2:])
    assert row(summary, "client_vs_server", "e2e")["server"] == pytest.approx(expected)


def test_slo(made):
    run, summary, _ = made
    good = (run.ok["ttft"] <= 0.25) & (run.ok["tpot"] <= 0.05)

    assert summary["figures"]["goodput_share"]["value"] == pytest.approx(good.sum() / 53)


def test_an_empty_run_and_a_failed_run_still_have_a_summary(tmp_path):
    failed = record(
        status="error", error_kind="refused", error_message="no\x1b[31m colour [bold]markup[/bold]", sent_at=None
    )
    for name, records in (("empty", []), ("failed", [failed])):
        run = twoclocks.load_run(write_folder(tmp_path / name, records, status="interrupted", in_flight=3))
        summary = summarise(run)
        text = terminal.to_text(terminal.render(summary))

        json.dumps(summary, allow_nan=False)
        assert "Stopped before its time" in text
        assert "\x1b" not in text
        json.dumps(vllm_bench(run, summary), allow_nan=False)
    assert "[bold]markup[/bold]" in text


def test_lost_records_are_told(tmp_path):
    run = twoclocks.load_run(write_folder(tmp_path / "r", [record()], lost_records=4, notes=["told to the user"]))

    assert summarise(run)["notes"] == [
        "told to the user",
        "4 records were lost on their way from the workers; they are in no figure.",
    ]


def test_the_text_shows_milliseconds_and_says_what_it_checked(made):
    _, summary, _ = made
    text = terminal.to_text(terminal.render(summary))

    assert "Load test results" in text
    assert f"{summary['figures']['ttft']['p50'] * 1e3:,.1f}" in text
    assert "what differs in definition" in text
    assert "yes  Output tokens: the client counted" in text
    assert max(map(len, text.splitlines())) <= terminal.WIDTH
    assert "…" not in text  # no number is cut


@pytest.mark.parametrize(
    ("value", "unit", "shown"),
    [(0.1384, "s", "138.4"), (0.00123, "s", "1.23"), (12.3456, "s", "12,346"), (None, "s", "–"),
     (float("nan"), "s", "–"), (0.967, "share", "96.7 %"), (2772, "tokens", "2,772"), (-0.0123, "s", "-12.30")],
)  # fmt: skip
def test_numbers_as_shown(value, unit, shown):
    assert terminal.number(value, unit) == shown


def test_vllm_layout(made):
    run, summary, _ = made
    bench = vllm_bench(run, summary)

    assert bench["completed"] == 50
    assert bench["failed"] == 3
    assert bench["total_output_tokens"] == run.ok["output_tokens"].sum()
    assert bench["median_ttft_ms"] == pytest.approx(run.ok["ttft"].median() * 1e3)
    assert bench["output_throughput"] == pytest.approx(bench["total_output_tokens"] / bench["duration"])
    assert len(bench["ttfts"]) == len(bench["itls"]) == len(bench["errors"]) == 53
    for row_number, request in enumerate(run.measured.index):
        assert sum(bench["itls"][row_number]) == pytest.approx(run.gaps.seconds[run.gaps.request == request].sum())
