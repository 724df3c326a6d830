import json

import numpy as np
import pytest
from make_run import make_run, record, write_folder

import twoclocks
from twoclocks import headline, report, terminal, units, wording
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


def test_requests_that_failed_are_counted_apart(made):
    _, summary, _ = made

    assert (summary["join"]["not_ok"], summary["join"]["not_ok_joined"]) == (3, 0)
    assert summary["join"]["by_source"] == {"in-band": 50}


def test_checks_pass_on_a_sound_run(made):
    _, summary, _ = made

    assert [c["name"] for c in summary["checks"] if not c["passed"]] == []
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

    for name in (
        "joined", "client_after_server", "chunks_agree_with_usage", "output_tokens_agree_with_counter",
        "waterfall_not_negative", "queue_agrees_with_histogram",
    ):  # fmt: skip
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
        json.dumps(vllm_bench(run), allow_nan=False)
    assert "[bold]markup[/bold]" in text


def test_a_killed_run_tells_how_many_requests_were_in_flight(tmp_path):
    """In a closed loop one a user; in an open one a single user sends all, so that the last second of each tells."""
    seconds = [(1.0, 0, 3), (1.1, 1, 4), (2.0, 0, 17), (2.1, 1, 25)]
    rest = {"loop_lag_s": [], "cpu_s": 0.1, "wall_s": 1.0}
    lines = [json.dumps({"at": at, "worker": worker, "in_flight": count} | rest) for at, worker, count in seconds]
    records = [record(f"{number:032x}", user=number % 3) for number in range(9)]

    told = []
    for name, shape, samples in (("closed", "ramp", lines), ("open", "rate", lines), ("early", "rate", [])):
        folder = write_folder(tmp_path / name, records, status="running")
        (folder / "experiment.yaml").write_text(f"load: {{shape: {shape}}}\n")
        (folder / "self_samples.jsonl").write_text("".join(f"{line}\n" for line in samples))
        told.append(summarise(twoclocks.load_run(folder))["partial"].partition("; ")[2])

    assert [text.partition(" were in flight")[0] for text in told] == [
        "up to 3 requests, one a user,",
        "about 42 requests, as the load generator last told,",
        "an unknown number of requests",
    ]


def test_a_share_that_misses_the_slo_by_little_does_not_look_as_if_it_met_it(tmp_path):
    records = [
        record(f"{n:032x}", chunk_us=[100_000 if n else 300_000], chunk_kinds=[("content", 1)], output_tokens=1)
        for n in range(96)
    ]
    folder = write_folder(tmp_path / "r", records)
    (folder / "experiment.yaml").write_text("slo: {ttft_ms: 200, share: 0.99}\n")
    summary = report.complete(twoclocks.load_run(folder))
    text = terminal.to_text(terminal.render(summary))

    assert "(98.96 % of the requests)" in text
    assert "MISSED (99.00 % of the requests must meet it)" in text
    assert (headline.cards(summary)[-1]["value"], headline.cards(summary)[-1]["slo"]) == (
        "98.96 %",
        "✗ misses the 99.00 % asked for",
    )


@pytest.mark.parametrize(
    ("share", "required", "shown"),
    [
        (0.5, 0.99, ("50.0 %", "99.0 %")),
        (0.99, 0.99, ("99.0 %", "99.0 %")),
        (0.99995, 1, ("99.995 %", "100.000 %")),
        (1.0, 0.9995, ("100.00 %", "99.95 %")),
        (None, 0.9, ("–", "90.0 %")),
    ],
)
def test_shares_have_as_many_digits_as_tell_them_apart(share, required, shown):
    assert units.held_against(share, required) == shown


def test_answers_without_a_token_are_told(tmp_path):
    whole = {"chunk_us": [100_000], "chunk_kinds": [("content", 1)], "output_tokens": 1}
    empty = {"chunk_us": [100_000], "chunk_kinds": [("finish", 1)], "output_tokens": 1}
    records = [record(f"{number:032x}", **(empty if number < 2 else whole)) for number in range(6)]
    summary = summarise(twoclocks.load_run(write_folder(tmp_path / "r", records)))

    assert (summary["figures"]["ok"]["value"], summary["figures"]["ttft"]["n"]) == (6, 4)
    assert any(note.startswith("2 of 6 requests ended ok without a single token.") for note in summary["notes"])


def test_lost_records_are_told(tmp_path):
    one = record(chunk_us=[1000], chunk_kinds=[("content", 1)], output_tokens=1)
    run = twoclocks.load_run(write_folder(tmp_path / "r", [one], lost_records=4, notes=["told to the user"]))

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
    assert units.number(value, unit) == shown


def test_vllm_layout(made):
    run = made[0]
    bench = vllm_bench(run)

    assert bench["completed"] == 50
    assert bench["failed"] == 3
    assert bench["total_output_tokens"] == run.ok["output_tokens"].sum()
    assert bench["median_ttft_ms"] == pytest.approx(run.ok["ttft"].median() * 1e3)
    assert bench["output_throughput"] == pytest.approx(bench["total_output_tokens"] / bench["duration"])
    assert len(bench["ttfts"]) == len(bench["itls"]) == len(bench["errors"]) == 53
    for row_number, request in enumerate(run.measured.index):
        assert sum(bench["itls"][row_number]) == pytest.approx(run.gaps.seconds[run.gaps.request == request].sum())


@pytest.fixture(scope="module")
def saturated(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "saturated"
    planted = make_run(folder, requests=40, queue=2.0, spans=True)
    return summarise(twoclocks.load_run(folder)), planted


def test_the_waterfall_is_the_planted_one_and_names_the_saturation(saturated):
    summary, planted = saturated
    (waterfall,) = summary["waterfall"]
    bars = {bar["name"]: bar for bar in waterfall["bars"]}
    inside = np.array(planted.ttft) - planted.queue - planted.prefill

    assert (waterfall["source"], waterfall["told_by"], waterfall["n"]) == ("otlp", "vllm", 40)
    assert list(bars) == ["late", "connect", "send", "http+delivery", "template+tokenize", "queue", "prefill", "total"]
    assert bars["late"]["mean"] == pytest.approx(0.0005)
    assert bars["send"]["mean"] == pytest.approx(0.0002)
    assert bars["http+delivery"]["mean"] == pytest.approx(0.004 - 0.0002)
    assert bars["template+tokenize"]["mean"] == pytest.approx(inside[2:].mean())
    assert bars["queue"]["mean"] == pytest.approx(np.mean(planted.queue[2:]))
    assert bars["prefill"]["mean"] == pytest.approx(np.mean(planted.prefill[2:]))
    text = terminal.to_text(terminal.render(summary))
    words = " ".join(text.split())
    assert "Requests waited in the server's queue for 2,0" in words
    assert "the server is saturated" in words
    assert max(map(len, text.splitlines())) <= terminal.WIDTH


def test_both_sources_agree_with_each_other_and_with_the_histograms(saturated):
    summary, _ = saturated
    names = {c["name"]: c["passed"] for c in summary["checks"]}

    assert names["sources_agree"] is names["server_rows_ours"] is True
    for metric in ("ttft", "queue", "prefill", "e2e"):
        assert names[f"{metric}_agrees_with_histogram"] is True, metric
    assert summary["join"]["by_source"] == {"otlp": 40}
    assert summary["join"]["rows"] == {"otlp": 42}
    assert summary["join"]["unmatched_rows"] == {}
    assert summary["join"]["not_ok"] == summary["join"]["not_ok_joined"] == 0
    assert summary["untold"] == []


def test_decode_by_both_clocks(saturated):
    summary, planted = saturated
    (decode,) = summary["decode"]
    expected = np.array(planted.decode[2:]) / (np.array(planted.tokens[2:]) - 1)

    assert decode["server"]["mean"] == pytest.approx(expected.mean())
    assert decode["difference"]["mean"] == pytest.approx(decode["client"]["mean"] - decode["server"]["mean"])
    assert decode["words"].startswith("Decode: ")


def test_in_band_alone_leaves_template_and_tokenizing_in_one_bar(made):
    _, summary, _ = made
    (waterfall,) = summary["waterfall"]

    assert waterfall["bars"][3]["label"] == "HTTP, template, tokenize and delivery"
    assert "--otlp-traces-endpoint" in summary["untold"][0]
    assert summary["stages"] == []


def test_spans_of_a_stage_tell_what_it_adds(tmp_path):
    planted = make_run(tmp_path / "r", requests=20, spans=True, gateway=0.05)
    inside = np.array(planted.ttft[2:]) + planted.decode[2:]

    summary = summarise(twoclocks.load_run(tmp_path / "r"))

    steps = {(step["metric"], step["outer"], step["inner"]): step for step in summary["stages"]}
    inner = steps["e2e", "gateway", "server"]
    assert inner["between"] == pytest.approx(0.05)
    assert inner["inner_mean"] == pytest.approx(inside.mean())
    assert (inner["how"], inner["n"]) == ("request by request", 20)
    assert ("e2e", "client", "gateway") in steps
    assert "E2E between gateway and server" in terminal.to_text(terminal.render(summary))


def test_a_stage_with_a_histogram_alone_is_compared_by_means_and_says_so(tmp_path):
    planted = make_run(tmp_path / "r", requests=20)
    folder = tmp_path / "r"
    with (folder / "experiment.yaml").open("a") as file:
        file.write("target: {server: vllm, stages: [{name: gw, metrics_url: 'http://gw/m', histogram: gw_seconds}]}\n")
    lines = []
    for at, count in ((1.8, 100), (40.0, 120)):
        samples = [["gw_seconds_sum", {}, 0.3 * count], ["gw_seconds_count", {}, count]]
        lines.append({"url": "http://gw/m", "at": at, "until": at, "samples": samples, "error": None})
    with (folder / "server_samples.jsonl").open("a") as file:
        file.write("".join(json.dumps(line) + "\n" for line in lines))

    run = twoclocks.load_run(folder)
    outer, inner = summarise(run)["stages"]

    assert outer["between"] == pytest.approx(run.ok["ttft"].mean() - 0.3)
    assert inner["between"] == pytest.approx(0.3 - np.mean(planted.ttft[2:]))
    assert inner["how"].startswith("means over the window")


def test_spans_of_strangers_are_told(tmp_path):
    make_run(tmp_path / "r", requests=20, spans=True)
    path = tmp_path / "r" / "server_requests.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    foreign = json.loads(lines[0]) | {"request_id": "f" * 32, "trace_id": "f" * 32}
    path.write_text("".join([*lines, json.dumps(foreign) + "\n"]))

    found = check(summarise(twoclocks.load_run(tmp_path / "r")), "server_rows_ours")

    assert found["passed"] is False
    assert "1 spans of requests that are not among this run's" in found["text"]


def test_a_server_that_tells_of_no_single_request_is_cut_up_by_its_means(tmp_path):
    planted = make_run(tmp_path / "r", requests=40)
    path = tmp_path / "r" / "requests.jsonl"
    lines = [json.loads(line) | {"server": None} for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))

    summary = summarise(twoclocks.load_run(tmp_path / "r"))

    window, single = summary["waterfall"]
    bars = {bar["name"]: bar for bar in window["bars"]}
    assert (window["source"], window["how"], window["n"]) == ("/metrics", "means over the scraped window", 40)
    assert bars["queue"]["mean"] == pytest.approx(np.mean(planted.queue[2:]))
    assert bars["prefill"]["mean"] == pytest.approx(np.mean(planted.prefill[2:]))
    assert bars["http+delivery"]["mean"] == pytest.approx(0.004 - 0.0002)
    assert bars["total"]["mean"] == pytest.approx(single["bars"][-1]["mean"])
    assert bars["queue"]["p99"] is None
    assert "One observation a finished request" in bars["queue"]["definition"]
    assert len(single["bars"]) == 5  # late, connect, send, all the rest, total
    assert any("--enable-per-request-metrics" in line for line in summary["untold"])
    assert "means over the scraped window" in terminal.to_text(terminal.render(summary))


def test_means_that_tell_of_others_too_are_not_cut_up(tmp_path):
    make_run(tmp_path / "r", requests=40)
    path = tmp_path / "r" / "requests.jsonl"
    lines = [json.loads(line) | {"server": None} for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines[:-5]))

    assert [one["source"] for one in summarise(twoclocks.load_run(tmp_path / "r"))["waterfall"]] == [None]


def test_a_page_that_failed_from_the_middle_on_is_held_against_the_requests_until_then(tmp_path):
    make_run(tmp_path / "r", requests=20)
    path = tmp_path / "r" / "server_samples.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    middle = len(lines) // 2
    failed = [{"url": line["url"], "at": line["at"], "until": line["at"], "error": "gone"} for line in lines[middle:]]
    path.write_text("".join(json.dumps(line) + "\n" for line in [*lines[:middle], *failed]))

    run = twoclocks.load_run(tmp_path / "r")
    summary = summarise(run)

    assert 0 < summary["scraped"]["requests"] < 20
    assert run.scraped["sent_at"].max() < lines[middle - 1]["at"]
    assert check(summary, "scrapes")["text"].endswith(f"up to second {lines[middle - 1]['at']:.1f}.")
    assert check(summary, "only_our_traffic")["passed"] is True
    assert "fewer_answers" not in {reason["name"] for reason in summary["verdict"]["reasons"]}


def test_the_pages_of_a_stage_are_no_traffic_of_the_server(tmp_path):
    make_run(tmp_path / "r", requests=20)
    folder = tmp_path / "r"
    lines = [json.loads(line) for line in (folder / "server_samples.jsonl").read_text().splitlines()]
    copies = [json.dumps(line | {"url": "http://gw/m"}) + "\n" for line in lines]
    with (folder / "server_samples.jsonl").open("a") as file:
        file.write("".join(copies))
    with (folder / "experiment.yaml").open("a") as file:
        file.write("target: {server: vllm, stages: [{name: gw, metrics_url: ['http://gw/m']}]}\n")

    summary = summarise(twoclocks.load_run(folder))

    assert check(summary, "only_our_traffic")["passed"] is True
    assert row(summary, "server_window", "ttft")["server_n"] == 20


@pytest.mark.parametrize(
    ("told", "metrics"),
    [
        ({"prompt_ms": 20.0, "predicted_n": 10, "predicted_ms": 90.0}, {"prefill", "tpot"}),
        ({"x-total-time": "500", "x-validation-time": "1", "x-queue-time": "2", "x-inference-time": "497",
          "x-time-per-token": "40"}, {"e2e", "validation", "queue", "inference", "time_per_token"}),
        ({"first_token_latency": 0.03, "queue_time": 0.001, "e2e_latency": 0.5, "forward_entry_time": 100.0,
          "prefill_finished_time": 100.02, "decode_throughput": 50.0},
         {"ttft", "tpot", "e2e", "tokenize", "queue", "prefill"}),
    ],
)  # fmt: skip
def test_what_other_servers_tell_in_their_answers_is_shown_with_its_definition(tmp_path, told, metrics):
    make_run(tmp_path / "r", requests=10, server="silent")
    path = tmp_path / "r" / "requests.jsonl"
    lines = [json.loads(line) | {"server": told} for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))

    summary = summarise(twoclocks.load_run(tmp_path / "r"))
    text = terminal.to_text(terminal.render(summary))

    assert {r["metric"] for r in summary["client_vs_server"]} == metrics
    assert all("One value a request" in r["server_definition"] for r in summary["client_vs_server"])
    assert "…" not in text
    json.dumps(summary, allow_nan=False)


def test_absurd_times_of_a_server_break_nothing(tmp_path):
    make_run(tmp_path / "r", requests=12)
    path = tmp_path / "r" / "requests.jsonl"
    hostile = [
        {"queue_time_ms": 1e300, "time_to_first_token_ms": 1},
        {"queue_time_ms": 9e11, "time_to_first_token_ms": 1},
    ]
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps(line | {"server": hostile[n % 2]}) + "\n" for n, line in enumerate(lines)))

    report.build(tmp_path / "r")

    summary = json.loads((tmp_path / "r" / "summary.json").read_text())
    assert summary["verdict"]["level"] == "INVALID"
    assert check(summary, "waterfall_not_negative")["passed"] is False


def streamed(number, sent_at, late=0.0, ttft_us=100_000, **fields):
    """A request of four tokens, 100 ms apart."""
    chunks = {"chunk_us": [ttft_us, *[100_000] * 3], "chunk_kinds": [("content", 4)], "output_tokens": 4}
    ended_at = sent_at + ttft_us / 1e6 + 0.3
    times = {"intended_at": sent_at - late, "sent_at": sent_at, "ended_at": ended_at}
    return record(f"{number:032x}", **times | chunks | fields)


def test_both_throughputs_of_window_and_of_whole_run(tmp_path):
    """From second 1 to the last token at 12.4 are 11.4 s; two tokens of the ninth answer come inside the window."""
    records = [
        streamed(0, -3.0, phase="warmup"),
        *(streamed(1 + n, 1.0 + n) for n in range(8)),
        streamed(20, 9.8),
        streamed(21, 12.0, phase="drain"),
    ]
    write_folder(tmp_path / "r", records)

    summary = summarise(twoclocks.load_run(tmp_path / "r"))
    figures = summary["figures"]
    text = terminal.to_text(terminal.render(summary))

    assert figures["output_throughput"]["value"] == pytest.approx((8 * 4 + 2) / 10, abs=0.11)
    assert figures["output_throughput_run"]["value"] == pytest.approx(10 * 4 / 11.4)
    assert figures["request_throughput_run"]["value"] == pytest.approx(9 / 11.4)
    assert "in the measuring window; 3.51 from the first request to the last token" in text
    assert "due" not in figures


def test_an_open_loop_tells_what_was_due_how_late_it_left_and_latency_from_then(tmp_path):
    records = [streamed(n, 1.0 + 0.1 * n, late=0.001 * n) for n in range(50)]
    write_folder(tmp_path / "r", records, not_sent=10)
    (tmp_path / "r" / "experiment.yaml").write_text("load: {shape: rate, rate: 10}\n")

    report.build(tmp_path / "r")
    summary = json.loads((tmp_path / "r" / "summary.json").read_text())
    figures = summary["figures"]
    late = 0.001 * np.arange(50)
    text, html = ((tmp_path / "r" / name).read_text() for name in ("summary.txt", "report.html"))

    assert (figures["due"]["value"], figures["not_sent"]["value"]) == (60, 10)
    assert figures["offered_rate"]["value"] == pytest.approx(6.0)
    assert figures["send_lateness"]["p99"] == pytest.approx(np.percentile(late, 99))
    assert figures["send_lateness"]["max"] == pytest.approx(0.049)
    assert figures["ttft_from_intended"]["p50"] == pytest.approx(0.1 + np.median(late))
    assert figures["e2e_from_intended"]["max"] == pytest.approx(0.4 + 0.049)
    for shown in (text, html):
        assert "60 due (6.00 requests/s offered), 10 not sent" in shown
        assert "TTFT from when it was due" in shown
    assert [reason["name"] for reason in summary["verdict"]["reasons"] if reason["name"] == "not_sent"]


def test_levels_are_summed_up_one_by_one(tmp_path):
    """Three requests to level one, the last of which streams into level two, and five to level two, one of them bad."""
    records = [streamed(n, at, ttft_us=100_000) for n, at in enumerate((1.0, 2.0, 3.85))]
    records += [streamed(10 + n, 5.0 + n, ttft_us=300_000) for n in range(4)]
    records += [record("f" * 32, sent_at=9.5, ended_at=9.6, status="error", error_kind="http_500")]
    levels = [{"users": 1, "started_at": 0.0}, {"users": 4, "started_at": 4.0}]
    write_folder(tmp_path / "r", records, levels=levels)

    report.build(tmp_path / "r")
    summary = json.loads((tmp_path / "r" / "summary.json").read_text())
    one, two = summary["levels"]
    text, html = ((tmp_path / "r" / name).read_text() for name in ("summary.txt", "report.html"))

    assert [(level["users"], level["from"], level["until"]) for level in (one, two)] == [(1, 0, 4), (4, 4, 10)]
    assert [(level["requests"], level["ok"]) for level in (one, two)] == [(3, 3), (5, 4)]
    assert one["output_throughput"] == pytest.approx(9 / 4)  # of the last answer one token comes in time
    assert two["output_throughput"] == pytest.approx((3 + 16) / 6)
    assert (one["ttft"]["p50"], two["ttft"]["p95"]) == (pytest.approx(0.1), pytest.approx(0.3))
    assert two["tpot"]["p50"] == pytest.approx(0.1)
    assert "Level by level" in text
    assert "Level by level" in html
    assert "2.25" in html


@pytest.mark.parametrize(("stable", "words"), [(None, "in 3.2 s)"), (True, "had settled)"), (False, "NOT settled)")])
def test_what_the_warm_up_came_to_is_told(tmp_path, stable, words):
    warmup = {"requests": 1, "rounds": 1, "seconds": 3.2, "failed": 0, "stable": stable}
    write_folder(tmp_path / "r", [streamed(0, -4.0, phase="warmup"), streamed(1, 1.0)], warmup=warmup)

    summary = summarise(twoclocks.load_run(tmp_path / "r"))

    assert summary["warmup"]["seconds"] == 3.2
    assert wording.warmup_words(summary).endswith(words)


def batch_run(folder, *records, **meta):
    """A run of shape batch, three at once."""
    write_folder(folder, list(records), **meta)
    (folder / "experiment.yaml").write_text("load: {shape: batch, batch: 3}\n")
    return twoclocks.load_run(folder)


def test_batches_are_told_apart_by_worker_and_by_when_they_were_due(tmp_path):
    """Two workers' batches at the same second; one batch with a failure, one too small, one to warm up: left out."""

    def three(first, due, durations, **fields):
        return [
            streamed(first + n, due + 0.1 * n, late=0.1 * n, **({"ended_at": due + 0.1 * n + took} | fields))
            for n, took in enumerate(durations)
        ]

    run = batch_run(
        tmp_path / "r",
        *three(0, -4.0, [1, 1, 1], phase="warmup"),
        *three(10, 1.0, [0.5, 0.5, 1.0]),  # 1.2 s: the last is sent at 1.2 and ends at 2.2
        *three(20, 1.0, [3.0, 0.5, 0.5], worker=1),  # 3 s
        *three(30, 5.0, [1, 1]),
        *three(40, 6.0, [1, 1, 1])[:2],
        streamed(42, 6.2, late=0.2, status="error", error_kind="reset"),
    )
    summary = summarise(run)
    figures = summary["figures"]
    text = terminal.to_text(terminal.render(summary))

    assert figures["batches"]["value"] == 2
    assert figures["batch_latency"]["mean"] == pytest.approx((1.2 + 3) / 2)
    assert figures["batch_latency"]["max"] == pytest.approx(3)
    assert figures["batch_latency_per_request"]["mean"] == pytest.approx((1.2 + 3) / 2 / 3)
    assert figures["batch_throughput"]["mean"] == pytest.approx((12 / 1.2 + 12 / 3) / 2)
    assert "Batch latency: first sent, last ended" in text
    assert "Batch latency / requests of the batch" in text
    assert (
        "batch_latency"
        not in summarise(twoclocks.load_run(write_folder(tmp_path / "s", [streamed(1, 1.0)])))["figures"]
    )


def test_a_run_without_a_server_speaks_of_none(tmp_path):
    target = {"name": "pytorch", "server": "pytorch", "api": "in-process", "model": "m"}
    run = batch_run(
        tmp_path / "r", *(streamed(n, 1.0, token_source="usage", prompt_tokens=9) for n in range(3)), target=target
    )
    summary = summarise(run)
    text = " ".join(terminal.to_text(terminal.render(summary)).split())
    page = report.build(tmp_path / "r").html.read_text()

    assert summary["untold"] == summary["waterfall"] == summary["checks"] == []
    assert "due" not in summary["figures"]
    assert "As the engine's process stamped it" in text
    for word in ("As the client saw it", "calibrate", "HTTP", "joined", "/metrics", "offered"):
        assert word not in text
        assert word not in page.partition("<h2>Over time")[0].partition("<body>")[2]
