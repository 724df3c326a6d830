import json
from pathlib import Path

import numpy as np
import pytest
from prometheus_client.parser import text_string_to_metric_families

from twoclocks.errors import RunFolderError
from twoclocks.expositions import (
    HISTOGRAMS,
    Distribution,
    counter_delta,
    gauge,
    histogram_delta,
    quiet_scrape,
    read_scrapes,
    restarted,
)

DATA = Path(__file__).parent / "data"


def line(at, samples, **more):
    return json.dumps({"url": "u", "at": at, "until": at + 0.1, "samples": samples, "error": None} | more) + "\n"


def write(tmp_path, *lines):
    path = tmp_path / "server_samples.jsonl"
    path.write_text("".join(lines))
    return read_scrapes(path)


def exposed(name):
    families = list(text_string_to_metric_families((DATA / name).read_text()))
    samples = [[s.name, s.labels, s.value] for family in families for s in family.samples]
    return samples, {family.name: family.type for family in families}


def window(tmp_path, before, after):
    first, types = exposed(before)
    return write(tmp_path, line(0, first, types=types), line(60, exposed(after)[0]))


@pytest.mark.parametrize("metric", ["ttft", "itl", "tpot", "e2e", "queue", "prefill"])
def test_a_window_of_vllm_against_the_true_values(tmp_path, metric):
    scrapes = window(tmp_path, "vllm_0.33_metrics_t0.prom", "vllm_0.33_metrics_t1.prom")
    truth = json.loads((DATA / "vllm_0.33_window_truth.json").read_text())[metric]

    gained = histogram_delta(scrapes, [0], metric)

    assert gained is not None
    assert gained.count == truth["count"]
    assert gained.mean == pytest.approx(truth["mean"], rel=1e-6)
    for p in (0.5, 0.9, 0.99):
        interval = gained.percentile(p)
        assert interval is not None
        assert interval.lower <= truth[f"p{p * 100:.0f}"] <= interval.upper


def test_no_estimate_from_the_wide_first_bucket_of_vllms_queue_time(tmp_path):
    scrapes = window(tmp_path, "vllm_0.33_metrics_t0.prom", "vllm_0.33_metrics_t1.prom")

    interval = histogram_delta(scrapes, [0], "queue").percentile(0.5)

    assert (interval.lower, interval.estimate, interval.upper) == (0.0, None, 0.3)


def test_a_window_recorded_from_a_real_vllm(tmp_path):
    scrapes = window(tmp_path, "recorded_vllm_0.32_metrics_before.prom", "recorded_vllm_0.32_metrics_after.prom")

    requests, steps = histogram_delta(scrapes, [0], "ttft"), histogram_delta(scrapes, [0], "itl")
    tokens = counter_delta(scrapes, [0], "generation_tokens")

    assert requests.count == 43
    assert requests.mean == pytest.approx((6.292177438735962 - 2.6826157569885254) / 43)
    assert tokens == 5504
    assert steps.count == tokens - requests.count  # every token but the first of each request ends one step
    assert not restarted(scrapes[0])


def test_percentiles_of_known_buckets():
    gained = Distribution(10, 10.0, np.array([1.0, 2.0, 4.0, np.inf]), np.array([2.0, 0.0, 6.0, 2.0]))

    assert gained.percentile(0.1).estimate is None  # first bucket
    middle = gained.percentile(0.5)
    assert (middle.lower, middle.estimate, middle.upper) == (2.0, 3.0, 4.0)
    assert gained.percentile(0.99).upper == np.inf
    assert gained.percentile(0.99).estimate is None


def test_unchanged_series_are_filled_in_and_gone_ones_are_not(tmp_path):
    (scrapes,) = write(
        tmp_path,
        line(0, [["vllm:num_requests_running", {"engine": "0"}, 1], ["b", {}, 5]]),
        line(1, [["vllm:num_requests_running", {"engine": "1"}, 2]]),
        line(2, [], gone=[["b", {}]]),
        line(3, [], error="refused"),
        '{"url": "u", "at": 4, "unt',
    )

    times, running = gauge(scrapes, "running")

    assert times.tolist() == [0, 1, 2]
    assert running.tolist() == [1, 3, 3]
    assert np.isnan(scrapes.values[2, scrapes.series.index(("b", ()))])
    assert scrapes.failed == [(3.0, "refused")]


def test_a_fallen_counter_is_a_restart_and_gives_no_difference(tmp_path):
    scrapes = write(
        tmp_path,
        line(0, [["vllm:generation_tokens_total", {}, 100]]),
        line(1, [["vllm:generation_tokens_total", {}, 3]]),
        line(2, [["vllm:generation_tokens_total", {}, 200]]),
    )

    assert restarted(scrapes[0])
    assert counter_delta(scrapes, [0], "generation_tokens") is None
    assert counter_delta(scrapes, [1], "generation_tokens") == 197


def test_a_new_process_is_a_restart_though_no_counter_fell(tmp_path):
    (scrapes,) = write(
        tmp_path, line(0, [["process_start_time_seconds", {}, 5]]), line(1, [["process_start_time_seconds", {}, 6]])
    )

    assert restarted(scrapes)


def test_a_gauge_may_fall(tmp_path):
    (scrapes,) = write(
        tmp_path, line(0, [["open_total", {}, 5]], types={"open_total": "gauge"}), line(1, [["open_total", {}, 1]])
    )

    assert not restarted(scrapes)


def test_deltas_are_taken_a_series_first_and_a_new_one_began_at_zero(tmp_path):
    name = "vllm:generation_tokens_total"
    scrapes = write(
        tmp_path,
        line(0, [[name, {"engine": "0"}, 10]]),
        line(1, [[name, {"engine": "0"}, 15], [name, {"engine": "1"}, 7]]),
    )

    assert counter_delta(scrapes, [0], "generation_tokens") == 12


def test_other_bounds_at_the_end_give_no_histogram(tmp_path):
    name = HISTOGRAMS["ttft"][0][0]
    before = [
        [name + "_bucket", {"le": "1.0"}, 1],
        [name + "_bucket", {"le": "+Inf"}, 1],
        [name + "_count", {}, 1],
        [name + "_sum", {}, 1],
    ]
    after = [
        [name + "_bucket", {"le": "2.0"}, 2],
        [name + "_bucket", {"le": "+Inf"}, 2],
        [name + "_count", {}, 2],
        [name + "_sum", {}, 2],
    ]

    scrapes = write(tmp_path, line(0, before), line(1, after))

    assert histogram_delta(scrapes, [0], "ttft") is None


def test_the_window_begins_at_the_last_scrape_before_it_that_saw_no_request_of_ours(tmp_path):
    (scrapes,) = write(tmp_path, *(line(at, []) for at in range(5)))

    # warm-up from 0.5 to 1.5, measured from 3.5 on
    assert quiet_scrape(scrapes, 3.2, np.array([0.5, 3.5]), np.array([1.5, 6.0])) == 3
    # warm-up still under way at the scrapes at 1, 2 and 3
    assert quiet_scrape(scrapes, 3.2, np.array([0.5, 3.5]), np.array([3.05, 6.0])) == 0


def test_a_line_that_is_no_scrape_is_named(tmp_path):
    with pytest.raises(RunFolderError, match="line 2 is no scrape"):
        write(tmp_path, line(0, []), "{}\n")


def test_no_file_no_scrapes(tmp_path):
    assert read_scrapes(tmp_path / "server_samples.jsonl") == []
