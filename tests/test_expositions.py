"""The pages in data/: recorded_vllm_* from a running vLLM 0.32; vllm_0.33_* and sglang_0.5.23_* made by these servers'
own metrics code with invented times; tgi_3.3_* and llamacpp_* written from the sources of TGI 3.3.7 and llama.cpp.
The *_window_truth.json hold the true times between t0 and t1.
"""

import json
import math
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families

from twoclocks.buckets import Reason, StepDensity, step_density
from twoclocks.errors import RunFolderError
from twoclocks.expositions import (
    ALL_HISTOGRAMS,
    Scrapes,
    counter_delta,
    counter_gain,
    gauge,
    histogram_delta,
    histogram_deltas,
    per_engine,
    quiet_scrape,
    read_scrapes,
    restarted,
    side_effects,
)
from twoclocks.server_names import COUNTERS, GAUGES, HISTOGRAMS

DATA = Path(__file__).parent / "data"
TTFT = "vllm:time_to_first_token_seconds"


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
    name = HISTOGRAMS["ttft"][0][0].name
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
    assert restarted(scrapes[0])


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


# every server


def in_buckets(name, values, bounds, labels=None):
    """The samples by which a server tells these values: counted here one by one."""
    labels = labels or {}
    cumulative = [
        [
            f"{name}_bucket",
            labels | {"le": f"{bound:g}" if math.isfinite(bound) else "+Inf"},
            sum(bool(v <= bound) for v in values),
        ]
        for bound in [*bounds, math.inf]
    ]
    return [*cumulative, [f"{name}_sum", labels, float(sum(values))], [f"{name}_count", labels, len(values)]]


def truth_of(server, metric):
    truth = json.loads((DATA / f"{server}_window_truth.json").read_text())[metric]
    values = np.array(truth.get("values", []))
    return truth | {
        f"p{p}": float(np.percentile(values, p, method="inverted_cdf")) for p in (50, 90, 99) if len(values)
    }


@pytest.mark.parametrize(
    ("server", "metric", "of_truth"),
    [
        ("tgi_3.3", "e2e", "total"),
        ("tgi_3.3", "validation", "val"),
        ("tgi_3.3", "queue", "q"),
        ("tgi_3.3", "inference", "inf"),
        ("tgi_3.3", "time_per_token", "tpt"),
        ("sglang_0.5.23", "ttft", "ttft"),
        ("sglang_0.5.23", "itl", "itl_per_token"),
    ],
)
def test_windows_of_other_servers_against_the_true_values(tmp_path, server, metric, of_truth):
    scrapes = window(tmp_path, f"{server}_metrics_t0.prom", f"{server}_metrics_t1.prom")
    truth = truth_of(server, of_truth)

    gained = histogram_delta(scrapes, [0], metric)

    assert gained.count == truth["count"]
    assert gained.mean == pytest.approx(truth["mean"], rel=1e-6)
    assert gained.caveats == ()
    for p in (50, 90, 99):
        interval = gained.percentile(p / 100)
        assert interval.lower <= truth[f"p{p}"] <= interval.upper


def test_a_figure_says_under_which_name_and_definition_it_was_told(tmp_path):
    vllm = histogram_delta(window(tmp_path, "vllm_0.33_metrics_t0.prom", "vllm_0.33_metrics_t1.prom"), [0], "itl")
    sglang = histogram_delta(
        window(tmp_path, "sglang_0.5.23_metrics_t0.prom", "sglang_0.5.23_metrics_t1.prom"), [0], "itl"
    )

    assert vllm.names == ("vllm:inter_token_latency_seconds",)
    assert "One observation a step" in vllm.definition
    assert sglang.names == ("sglang:inter_token_latency_seconds",)
    assert "One observation a token" in sglang.definition
    assert (vllm.beside, sglang.beside) == ("itl", "itl_per_token")


def test_tgi_steps_are_told_by_method(tmp_path):
    scrapes = window(tmp_path, "tgi_3.3_metrics_t0.prom", "tgi_3.3_metrics_t1.prom")
    prefill, decode = (histogram_delta(scrapes, [0], f"{method}_step") for method in ("prefill", "decode"))

    assert prefill.count == 40
    assert decode.count > prefill.count
    assert "prefill" in prefill.definition
    assert counter_delta(scrapes, [0], "requests") == 40


def test_llamacpp_tells_means_whose_six_digits_bound_them(tmp_path):
    scrapes = window(tmp_path, "llamacpp_metrics_t0.prom", "llamacpp_metrics_t1.prom")

    prompt, decode = (histogram_delta(scrapes, [0], f"{phase}_per_token") for phase in ("prefill", "decode"))
    tokens, prompts = counter_gain(scrapes, [0], "generation_tokens"), counter_gain(scrapes, [0], "prompt_tokens")

    # 2.566 s +- 0.001 for 5120 tokens +- 10: the printed values 612.346, 614.912, 1.23457e+06, 1.23969e+06
    assert prompt.mean == pytest.approx(2.566 / 5120)
    assert prompt.mean_error == pytest.approx((0.001 + 2.566 / 5120 * 10) / 5120, rel=1e-6)
    assert decode.mean == pytest.approx(51.35 / 2560)
    assert decode.mean_error == pytest.approx(0.01 / 2560)
    assert decode.percentile(0.5) is None
    assert isinstance(step_density(decode), Reason)
    assert (tokens.value, tokens.error) == (2560, 0)
    assert (prompts.value, prompts.error) == (5120, 10)


@pytest.mark.parametrize("digits", [999_999.0, 1_000_001.0, 12_345_678.0])
def test_what_llamacpp_prints_lies_within_the_error_of_what_it_counted(tmp_path, digits):
    begin, end = digits, digits + 4321.0
    name = "llamacpp:tokens_predicted_total"
    scrapes = write(tmp_path, *(line(at, [[name, {}, float(f"{v:.6g}")]]) for at, v in ((0, begin), (1, end))))

    gain = counter_gain(scrapes, [0], "generation_tokens")

    assert abs(gain.value - 4321.0) <= gain.error
    assert gain.error <= 100


def test_a_multiprocess_page_has_no_births_and_tells_its_engines(tmp_path):
    samples, types = exposed("vllm_0.33_metrics_multiproc.prom")
    later = [[name, labels, value * 3] for name, labels, value in samples]
    scrapes = write(tmp_path, line(0, samples, types=types), line(9, later))

    total = histogram_delta(scrapes, [0], "ttft")
    engines = {dict(e.labels)["engine"]: e.gained for e in per_engine(scrapes, [0], "ttft")}

    assert not restarted(scrapes[0])
    assert {name: gained.count for name, gained in engines.items()} == {"0": 132, "1": 88}
    assert total.count == 220
    assert total.mean == pytest.approx((7.52131724357605 + 5.658723831176758) / 110)
    assert total.counts.sum() == pytest.approx(220)
    assert counter_delta(scrapes, [0], "generation_tokens") == 2 * (2596 + 1846)


def test_trtllm_under_each_of_its_prefixes(tmp_path):
    for prefix in ("trtllm_", "trtllm:", ""):
        name = f"{prefix}time_per_output_token_seconds"
        scrapes = write(tmp_path, line(0, []), line(1, in_buckets(name, [0.02, 0.03], [0.025])))

        gained = histogram_delta(scrapes, [0], "tpot")

        assert gained.names == (name,)
        assert gained.mean == pytest.approx(0.025)


def test_sglang_requests_without_streaming_are_another_figure(tmp_path):
    name = "sglang:time_to_first_token_seconds"
    both = [
        *in_buckets(name, [0.2, 0.3], [0.25], {"is_streaming": "true"}),
        *in_buckets(name, [5.0], [0.25], {"is_streaming": "false"}),
    ]
    scrapes = write(tmp_path, line(0, []), line(1, both))

    told = histogram_deltas(scrapes, [0], "ttft")

    assert [gained.mean for gained in told] == pytest.approx([0.25, 5.0])
    assert told[0].definition != told[1].definition
    assert histogram_delta(scrapes, [0], "ttft").mean == pytest.approx(0.25)


def test_two_names_of_one_figure_are_not_added(tmp_path):
    """vLLM 0.10.2 to 0.11 tell their ITL under the old name and the new one."""
    names = ("vllm:time_per_output_token_seconds", "vllm:inter_token_latency_seconds")
    scrapes = write(tmp_path, line(0, []), line(1, [s for name in names for s in in_buckets(name, [0.02], [0.1])]))

    (gained,) = histogram_deltas(scrapes, [0], "itl")

    assert (gained.count, gained.names) == (1, ("vllm:inter_token_latency_seconds",))


def test_replicas_of_two_versions_are_one_figure(tmp_path):
    old, new = "vllm:time_per_output_token_seconds", "vllm:inter_token_latency_seconds"
    lines = [
        line(at, samples, url=url)
        for url, name, values in (("a", old, [0.02] * 3), ("b", new, [0.04]))
        for at, samples in ((0, []), (1, in_buckets(name, values, [0.01, 0.03])))
    ]
    scrapes = write(tmp_path, *lines)

    (gained,) = histogram_deltas(scrapes, [0, 0], "itl")

    assert gained.names == (new, old) or gained.names == (old, new)
    assert (gained.count, gained.mean) == (4, pytest.approx(0.025))
    assert [engine.url for engine in per_engine(scrapes, [0, 0], "itl")] == ["a", "b"]


def test_tables_hold_each_name_once_and_complete():
    for sources, title in ALL_HISTOGRAMS.values():
        keys = [(source.name, source.where) for source in sources]
        assert len(set(keys)) == len(keys)
        assert title
        assert all(source.start and source.stop and source.weight for source in sources)
    assert all(names for table in (COUNTERS, GAUGES) for names in table.values())


def test_gauges_of_other_servers(tmp_path):
    (tgi,) = window(tmp_path, "tgi_3.3_metrics_t0.prom", "tgi_3.3_metrics_t1.prom")
    (llama,) = window(tmp_path, "llamacpp_metrics_t0.prom", "llamacpp_metrics_t1.prom")

    assert gauge(tgi, "running")[1][0] == 4
    assert gauge(llama, "running")[1].tolist() == [2, 0]
    assert gauge(llama, "kv_cache_usage") is None


# restarts


def test_after_a_restart_only_what_came_since_is_told_and_marked(tmp_path):
    first, second = np.full(50, 0.2), np.array([0.02, 0.3, 0.3, 0.9])
    bounds = [0.1, 0.5, 1.0]
    scrapes = write(
        tmp_path,
        line(0, in_buckets(TTFT, first, bounds)),
        line(5, in_buckets(TTFT, second[:1], bounds)),
        line(9, in_buckets(TTFT, second, bounds)),
    )

    (gained,) = histogram_deltas(scrapes, [0], "ttft")

    assert histogram_delta(scrapes, [0], "ttft") is None
    assert gained.since_restart
    assert "restarted: counted from 5.0 s" in gained.caveats[0]
    assert gained.count == 3
    assert gained.mean == pytest.approx(0.5)
    assert gained.counts.tolist() == [0, 2, 1, 0]


def test_a_restart_of_one_replica_marks_the_sum_and_leaves_the_other_whole(tmp_path):
    lines = [
        line(at, in_buckets(TTFT, [0.2] * n, [1.0]), url=url)
        for url, counts in (("a", (5, 10, 20)), ("b", (9, 1, 4)))
        for at, n in enumerate(counts)
    ]
    scrapes = write(tmp_path, *lines)

    (gained,) = histogram_deltas(scrapes, [0, 0], "ttft")
    parts = {engine.url: engine.gained for engine in per_engine(scrapes, [0, 0], "ttft")}

    assert (gained.count, gained.since_restart) == (15 + 3, True)
    assert (parts["a"].count, parts["a"].since_restart) == (15, False)
    assert (parts["b"].count, parts["b"].since_restart) == (3, True)


def test_a_series_created_anew_is_a_restart_and_a_count_of_things_created_is_none(tmp_path):
    births = [[f"{TTFT}_count", {}, 5], [f"{TTFT}_created", {}, 100.0]]
    (reborn,) = write(tmp_path, line(0, births), line(1, [[f"{TTFT}_created", {}, 101.0]]))
    (things,) = write(tmp_path, line(0, [["files_created", {}, 5]]), line(1, [["files_created", {}, 6]]))

    assert restarted(reborn)
    assert not restarted(things)


def test_a_server_that_comes_back_lower_after_it_was_gone_restarted(tmp_path):
    name = "vllm:generation_tokens_total"
    (scrapes,) = write(tmp_path, line(0, [[name, {}, 9]]), line(1, [], gone=[[name, {}]]), line(2, [[name, {}, 3]]))

    assert scrapes.restarts == [2]


def test_another_version_under_another_name_is_a_restart(tmp_path):
    old, new = "vllm:time_per_output_token_seconds", "vllm:inter_token_latency_seconds"
    was = in_buckets(old, [0.02] * 9, [0.1])
    scrapes = write(
        tmp_path,
        line(0, was),
        line(1, in_buckets(new, [0.03], [0.1]), gone=[[name, labels] for name, labels, _ in was]),
        line(2, in_buckets(new, [0.03] * 4, [0.1])),
    )

    told = histogram_deltas(scrapes, [0], "itl")

    assert [(gained.count, gained.names, gained.since_restart) for gained in told] == [(3, (new,), True)]
    assert histogram_delta(scrapes, [0], "itl") is None


def test_a_series_that_vanished_is_counted_up_to_its_last_scrape(tmp_path):
    engines = [in_buckets(TTFT, [0.2] * n, [1.0], {"engine": e}) for e, n in (("0", 2), ("1", 3))]
    scrapes = write(
        tmp_path,
        line(0, []),
        line(1, [*engines[0], *engines[1]]),
        line(2, [], gone=[[name, labels] for name, labels, _ in engines[1]]),
    )

    gained = histogram_delta(scrapes, [0], "ttft")

    assert gained.count == 5
    assert "vanished" in gained.caveats[0]


def test_a_replica_that_was_never_read_is_named(tmp_path):
    scrapes = write(
        tmp_path,
        line(0, [], url="a"),
        line(0, [], url="b", error="refused"),
        line(1, in_buckets(TTFT, [0.2], [1.0]), url="a"),
    )

    assert histogram_delta(scrapes, [0, 0], "ttft").caveats == (
        "b is not in it: fewer than two good scrapes of one life of the server",
    )


def test_replicas_with_other_bounds_are_summed_on_those_that_both_have(tmp_path):
    rng = np.random.default_rng(1)
    one, other = rng.exponential(0.4, 200), rng.exponential(0.4, 300)
    lines = [
        line(at, samples, url=url)
        for url, values, bounds in (("a", one, [0.1, 0.2, 0.5, 1.0]), ("b", other, [0.2, 0.3, 1.0]))
        for at, samples in ((0, []), (1, in_buckets(TTFT, values, bounds)))
    ]
    scrapes = write(tmp_path, *lines)

    gained = histogram_delta(scrapes, [0, 0], "ttft")

    both = np.concatenate([one, other])
    assert gained.bounds.tolist() == [0.2, 1.0, math.inf]
    assert gained.counts.tolist() == np.histogram(both, [0, 0.2, 1.0, np.inf])[0].tolist()
    assert gained.mean == pytest.approx(both.mean())


# what the user is told


def test_scrapes_that_change_what_they_read_are_told(tmp_path):
    llama = window(tmp_path, "llamacpp_metrics_t0.prom", "llamacpp_metrics_t1.prom")
    failures = []
    for page in ('[{"iter": 1, "iterLatencyMS": 2.5}]', "[]", '{"a": 1}'):
        with pytest.raises(ValueError, match=r".") as told:
            list(text_string_to_metric_families(page))
        failures += write(tmp_path, line(0, [], error=f"ValueError: {told.value}"))
    quiet = write(tmp_path, line(0, [["a", {}, 1]]), line(1, [], error="ConnectError: refused"))

    assert ["reset" in text for text in side_effects(llama)] == [True]
    assert ["/prometheus/metrics" in text for text in side_effects(failures)] == [True] * 3
    assert side_effects(quiet) == []


def test_an_address_behind_which_replicas_take_turns_is_told(tmp_path):
    started = [5.0, 6.0, 5.0, 6.0]
    balanced = write(tmp_path, *(line(at, [["process_start_time_seconds", {}, v]]) for at, v in enumerate(started)))
    restart = write(tmp_path, *(line(at, [["process_start_time_seconds", {}, v]]) for at, v in enumerate([5.0, 6.0])))

    assert ["balanced" in text for text in side_effects(balanced)] == [True]
    assert side_effects(restart) == []


def test_vllms_own_itl_buckets_show_no_shape(tmp_path):
    scrapes = window(tmp_path, "recorded_vllm_0.32_metrics_before.prom", "recorded_vllm_0.32_metrics_after.prom")

    assert isinstance(step_density(histogram_delta(scrapes, [0], "itl")), Reason)


# hostile pages


numbers = st.one_of(
    st.none(), st.floats(allow_nan=False, allow_infinity=False), st.integers(-5, 50).map(float), st.just(1e308)
)
labels = st.dictionaries(
    st.sampled_from(["le", "engine", "method", "is_streaming", "x"]),
    st.sampled_from(["0", "1", "+Inf", "-Inf", "NaN", "0.1", "0.10", "true", "prefill", "", "x" * 300, "\x00é"]),
    max_size=3,
)
sample_names = st.sampled_from(
    [f"{family}{suffix}" for family in (TTFT, "tgi_batch_inference_duration", "sglang:time_to_first_token_seconds")
     for suffix in ("_bucket", "_count", "_sum", "_created")]
    + ["llamacpp:prompt_seconds_total", "llamacpp:prompt_tokens_total", "vllm:generation_tokens_total",
       "process_start_time_seconds", "vllm:kv_cache_usage_perc", "a_total"]
)  # fmt: skip
pages = st.lists(st.tuples(sample_names, labels, numbers).map(list), max_size=25)


@given(rounds=st.lists(st.tuples(pages, pages), min_size=1, max_size=4), first=st.integers(0, 1))
def test_whatever_a_page_holds_a_figure_is_possible_or_none(tmp_path_factory, rounds, first):
    lines = [line(at, samples, gone=[sample[:2] for sample in gone]) for at, (samples, gone) in enumerate(rounds)]
    scrapes = write(tmp_path_factory.getbasetemp(), *lines)
    firsts = [min(first, len(rounds) - 1)]

    with np.errstate(over="ignore", invalid="ignore"):
        for metric in ALL_HISTOGRAMS:
            for gained in histogram_deltas(scrapes, firsts, metric):
                assert gained.count >= 0
                assert (gained.counts >= 0).all()
                assert len(gained.counts) == len(gained.bounds)
                assert (np.diff(gained.bounds) > 0).all()
                assert isinstance(step_density(gained), StepDensity | Reason)
                for p in (0, 0.5, 1):
                    interval = gained.percentile(p)
                    assert interval is None or interval.lower <= interval.upper
        for counter in COUNTERS:
            counter_gain(scrapes, firsts, counter)
        for name in GAUGES:
            gauge(scrapes[0], name)
        side_effects(scrapes)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda s: [x for x in s if x[1].get("le") != "+Inf"] , None),  # its count says what lies beyond
        (lambda s: [[n, {"le": "NaN"}, v] if lb.get("le") == "0.5" else [n, lb, v] for n, lb, v in s], "no number"),
        (lambda s: [[n, {"le": "half"}, v] if lb.get("le") == "0.5" else [n, lb, v] for n, lb, v in s], "no number"),
        (lambda s: [*s, [f"{TTFT}_bucket", {"le": "0.50"}, 4]], "stands twice"),
        (lambda s: [[n, lb, 0] if lb.get("le") == "1" else [n, lb, v] for n, lb, v in s], "less than the one inside"),
        (lambda s: [[n, lb, v * 9] if n.endswith("_count") else [n, lb, v] for n, lb, v in s], "counts 90"),
    ],
)  # fmt: skip
def test_buckets_that_cannot_be_are_left_out_and_the_mean_stays(tmp_path, change, why):
    values = [0.2, 0.3, 0.7, 0.8, 0.9, 1.5, 2.0, 3.0, 0.1, 0.4]
    samples = change(in_buckets(TTFT, values, [0.5, 1.0]))
    scrapes = write(tmp_path, line(0, []), line(1, samples))

    gained = histogram_delta(scrapes, [0], "ttft")

    assert gained.sum == pytest.approx(sum(values))
    if why is None:
        assert gained.counts.tolist() == [4, 3, 3]
    else:
        assert why in gained.caveats[0]
        assert gained.percentile(0.5) is None
        assert why in step_density(gained).text


def test_negative_counts_tell_nothing(tmp_path):
    samples = [[name, labels, -abs(value)] for name, labels, value in in_buckets(TTFT, [0.2, 0.3], [0.25])]
    scrapes = write(tmp_path, line(0, []), line(1, samples))

    (gained,) = histogram_deltas(scrapes, [0], "ttft")

    assert gained.count == 0
    assert math.isnan(gained.mean)
    assert "what cannot be" in gained.caveats[0]


@pytest.mark.parametrize("count", [1e308, 1e29, 2.0**60])
def test_impossible_counts_tell_nothing(tmp_path, count):
    samples = [[f"{TTFT}_{part}", {"engine": engine}, count] for part in ("count", "sum") for engine in ("0", "1")] + [
        ["vllm:generation_tokens_total", {"engine": engine}, count] for engine in ("0", "1")
    ]
    scrapes = write(tmp_path, line(0, []), line(1, samples))

    assert sum(gained.count for gained in histogram_deltas(scrapes, [0], "ttft")) == 0
    assert math.isfinite(counter_delta(scrapes, [0], "generation_tokens"))


def test_huge_label_values_do_no_harm(tmp_path):
    many = {"model_name": "m" * 1_000_000}
    scrapes = write(tmp_path, line(0, []), line(1, in_buckets(TTFT, [0.2], [1.0], many)))

    assert histogram_delta(scrapes, [0], "ttft").count == 1


def test_time_is_linear_in_the_number_of_series():
    def took(series):
        names = [(f"{TTFT}_{part}", (("engine", str(n)),)) for n in range(series) for part in ("count", "sum")]
        names += [
            (f"{TTFT}_bucket", (("engine", str(n)), ("le", le))) for n in range(series) for le in ("0.1", "1", "+Inf")
        ]
        values = np.arange(3.0)[:, np.newaxis] * np.ones(len(names))
        best = math.inf
        for _ in range(3):
            scrapes = Scrapes("u", {}, names, np.arange(3.0), np.arange(3.0), values, [])
            begun = time.process_time()
            assert histogram_delta([scrapes], [0], "ttft").count == 2 * series
            best = min(best, time.process_time() - begun)
        return best

    took(100)
    small, large = took(500), took(4000)

    assert large / small < 3 * 8  # 64 if it were quadratic
