"""Each rule of the verdict, on runs in which the one thing that it looks for was planted, and on runs without it."""

import json

import numpy as np
import pytest
from make_run import make_run, record, write_folder

from twoclocks.load import load_run
from twoclocks.server_requests import ServerRequest, encode_server_request
from twoclocks.verdict import verdict

IN_BAND = {"queue_time_ms": 1, "time_to_first_token_ms": 9}
TOGETHER = [100_000, 20_000, 20_000, 20_000, 0, 40_000, 20_000, 20_000]


def plain(count=200, **fields):
    """Records of a flawless run: an answer every 50 ms, TTFT 100 ms, gaps of 20 ms, all stamped by the kernel."""
    return [
        record(
            f"{index:032x}",
            **{
                "intended_at": 0.05 * index,
                "sent_at": 0.05 * index,
                "ended_at": 0.05 * index + 0.3,
                "chunk_us": [100_000 + index % 7, *[20_000] * 7],
                "chunk_kinds": [("content", 8)],
                "timestamp_source": "kernel",
                "output_tokens": 8,
                "prompt_tokens": 10,
                "token_source": "usage",
                "finish_reason": "length",
            }
            | {name: value(index) if callable(value) else value for name, value in fields.items()},
        )
        for index in range(count)
    ]


def reasons(folder, records, samples=(), experiment="", **meta):
    write_folder(folder, records, **meta)
    (folder / "self_samples.jsonl").write_text("".join(json.dumps(sample) + "\n" for sample in samples))
    (folder / "experiment.yaml").write_text(experiment)
    told = verdict(load_run(folder))
    assert all(reason["reason"] and reason["remedy"] for reason in told["reasons"])
    return told["level"], {reason["name"]: reason for reason in told["reasons"]}


def second(at, lag=0.0002, cpu=0.2, open_file_limit=1024):
    lags = [0.0001] * 17 + [lag] * 3
    times = {"cpu_s": cpu, "wall_s": 1.0, "open_file_limit": open_file_limit}
    return {"at": at, "worker": 0, "loop_lag_s": lags} | times


def test_a_flawless_run_is_valid(tmp_path):
    assert reasons(tmp_path, plain(), [second(at) for at in range(1, 10)]) == ("VALID", {})


@pytest.mark.parametrize(
    ("name", "fields", "samples", "experiment", "level"),
    [
        ("loop_lag", {"timestamp_source": "user"}, {"lag": 0.015}, "", "SUSPECT"),
        ("loop_lag", {"chunk_us": TOGETHER}, {"lag": 0.04}, "", "SUSPECT"),
        ("cpu", {}, {"cpu": 0.97}, "", "SUSPECT"),
        ("file_limit", {"user": lambda i: i}, {"open_file_limit": 256}, "", "SUSPECT"),
        ("stall", {}, {"lag": 0.3}, "", "SUSPECT"),
        ("late_sends", {"intended_at": lambda i: 0.05 * i - 0.02}, {}, "", "SUSPECT"),
        ("nothing_ok", {"status": "error", "error_kind": "http_500"}, {}, "", "INVALID"),
        ("prefix_cache", {"cached_tokens": 6, "prompt_id": lambda i: f"p{i}"}, {}, "", "SUSPECT"),
        ("short_outputs", {"max_tokens": 9}, {}, "workload: {ignore_eos: true}", "SUSPECT"),
        ("short_outputs", {"expected_output_tokens": 9}, {}, "", "SUSPECT"),
        ("missing_workers", {}, {}, "", "INVALID"),
        ("tokens_disagree", {"output_tokens": 11}, {}, "", "SUSPECT"),
        ("drift", {"chunk_us": lambda i: [100_000 + 600 * i, *[20_000] * 7]}, {}, "", "SUSPECT"),
        ("before_server", {"server": {"queue_time_ms": 60, "time_to_first_token_ms": 90}}, {}, "", "INVALID"),
        ("unjoined", {"server": lambda i: IN_BAND if i % 2 else None}, {}, "", "SUSPECT"),
    ],
)  # fmt: skip
def test_what_is_planted_is_found_and_nothing_else(tmp_path, name, fields, samples, experiment, level):
    meta = {"missing_workers": 1, "workers": 2} if name == "missing_workers" else {}
    told, found = reasons(tmp_path, plain(**fields), [second(at, **samples) for at in range(1, 10)], experiment, **meta)

    assert (told, list(found)) == (level, [name])


def test_answers_that_the_experiment_itself_cuts_short_are_as_long_as_it_says(tmp_path):
    assert reasons(tmp_path, plain(expected_output_tokens=9, max_tokens=8))[0] == "VALID"


@pytest.mark.parametrize("name", ["prompt_id", "session"])
def test_what_the_run_itself_repeats_may_come_from_the_cache(tmp_path, name):
    fields = {"cached_tokens": lambda i: 6 if i >= 20 else 0, "prompt_id": lambda i: f"p{i}"}

    assert reasons(tmp_path, plain(**fields | {name: lambda i: f"r{i % 20}"}))[0] == "VALID"


def test_cache_hits_beyond_all_repeated_prompts_are_seen_in_the_counters(tmp_path):
    for number, (hits, level) in enumerate(((1000, "VALID"), (1500, "SUSPECT"))):
        folder = tmp_path / str(number)
        pages(folder, {"vllm:prefix_cache_hits_total": hits})
        told, found = reasons(folder, plain(prompt_id=lambda i: f"p{i % 100}"))  # 100 of 200 prompts of 10 tokens

        assert told == level
        if found:
            assert found["prefix_cache"]["figure"] == pytest.approx(500 / 2000)


def test_preemptions_are_seen_in_the_counter(tmp_path):
    pages(tmp_path, {"vllm:num_preemptions_total": 7})
    told, found = reasons(tmp_path, plain())

    assert (told, found["preemptions"]["figure"]) == ("SUSPECT", 7)


def spans(folder, count, **told):
    """A span of each of the requests 0 .. count - 1, in which the server has TTFT 90 ms."""
    folder.mkdir(exist_ok=True)
    given = {"queue": 0.02, "prefill": 0.05, "ttft": 0.09} | told
    rows = [
        ServerRequest(source="otlp", server="vllm", request_id=f"{number:032x}", **given) for number in range(count)
    ]
    (folder / "server_requests.jsonl").write_bytes(b"".join(map(encode_server_request, rows)))


@pytest.mark.parametrize(("count", "level"), [(200, "VALID"), (202, "VALID"), (206, "SUSPECT"), (260, "INVALID")])
def test_spans_of_others_are_seen(tmp_path, count, level):
    spans(tmp_path, count)
    told, found = reasons(tmp_path, plain())

    assert told == level
    if found:
        assert found["foreign_spans"]["figure"] == pytest.approx((count - 200) / count)


def test_spans_of_others_that_were_left_out_as_they_came_count(tmp_path):
    spans(tmp_path, 200)

    assert reasons(tmp_path, plain(), foreign_spans=50)[1]["foreign_spans"]["figure"] == pytest.approx(0.2)


def test_a_log_that_reaches_back_to_earlier_runs_tells_of_no_strangers(tmp_path):
    line = "Request {} finished: prefill_len = 1 decode_len = 8 start_time = 0.01 end_time = 0.2\n"
    (tmp_path / "server.log").write_text("".join(line.format(f"{number:032x}") for number in range(400)))

    assert reasons(tmp_path, plain())[0] == "VALID"


def test_spans_of_what_a_kill_cut_off_are_no_strangers(tmp_path):
    spans(tmp_path, 260)

    assert list(reasons(tmp_path, plain(), status="running")[1]) == ["killed"]


@pytest.mark.parametrize(("queue_ms", "found"), [(20.9, []), (22.0, ["sources_disagree"])])
def test_two_sources_that_tell_one_queue_differently(tmp_path, queue_ms, found):
    spans(tmp_path, 200)
    server = {"queue_time_ms": queue_ms, "time_to_first_token_ms": 50}

    assert list(reasons(tmp_path, plain(server=server))[1]) == found


def test_kernel_stamps_hide_a_late_loop_as_long_as_no_reads_merge(tmp_path):
    assert reasons(tmp_path, plain(), [second(at, lag=0.04) for at in range(1, 10)])[0] == "VALID"


def test_reads_merged_by_the_server_are_not_ours_to_blame(tmp_path):
    few = [100_000, 0, 0, 20_000, 20_000, 20_000, 20_000, 20_000]
    most = [100_000, 0, 0, 0, 20_000, 0, 0, 0]  # as with speculation: the median gap is none
    whole = [100_000, *[0] * 7]

    for number, together in enumerate((few, most, whole)):
        told = reasons(tmp_path / str(number), plain(chunk_us=together), [second(at) for at in range(1, 10)])
        assert told == ("VALID", {})


def test_a_late_loop_is_seen_where_a_server_sends_most_tokens_together(tmp_path):
    together = [100_000, 0, 0, 0, 20_000, 0, 0, 0]
    kernel = reasons(tmp_path / "k", plain(chunk_us=together), [second(at, lag=0.04) for at in range(1, 10)])[1]
    fields = {"chunk_us": together, "timestamp_source": "user"}
    user = reasons(tmp_path / "u", plain(**fields), [second(at, lag=0.015) for at in range(1, 10)])[1]

    assert (list(kernel), list(user)) == (["loop_lag"], ["loop_lag"])


def test_answers_may_be_short_where_nobody_said_how_long_they_are(tmp_path):
    assert reasons(tmp_path, plain(max_tokens=99))[0] == "VALID"


def test_one_stamp_that_is_not_the_kernels_does_not_judge_the_run(tmp_path):
    fields = {"timestamp_source": lambda i: "user" if i == 7 else "kernel"}

    assert reasons(tmp_path, plain(**fields), [second(at, lag=0.015) for at in range(1, 10)])[0] == "VALID"


def test_the_cpu_of_the_native_readers_thread_is_not_the_loops(tmp_path):
    samples = [second(at, cpu=1.2) | {"loop_cpu_s": 0.5} for at in range(1, 10)]

    assert reasons(tmp_path, plain(), samples)[0] == "VALID"


def test_connecting_is_no_late_send(tmp_path):
    fields = {
        "intended_at": lambda i: 0.05 * i - 0.02,
        "connect_started_at": lambda i: 0.05 * i - 0.02,
        "connected_at": lambda i: 0.05 * i,
    }
    assert reasons(tmp_path, plain(**fields))[0] == "VALID"


@pytest.mark.parametrize(("count", "level"), [(99, "SUSPECT"), (100, "VALID")])
def test_a_p99_needs_a_hundred(tmp_path, count, level):
    assert reasons(tmp_path, plain(count))[0] == level


@pytest.mark.parametrize(
    ("with_tokens", "told"),
    [(0, "none of the 200 requests that ended ok brought a token"), (99, "99 requests are too few"), (100, None)],
)
def test_only_answers_with_a_token_make_a_p99(tmp_path, with_tokens, told):
    def has_tokens(index):
        return index >= 200 - with_tokens

    fields = {
        "chunk_kinds": lambda index: [("content" if has_tokens(index) else "finish", 8)],
        "output_tokens": lambda index: 8 * has_tokens(index),
    }
    level, found = reasons(tmp_path, plain(**fields))

    assert (level, list(found)) == (("SUSPECT", ["too_few"]) if told else ("VALID", []))
    assert all(found["too_few"]["reason"].startswith(text) for text in filter(None, [told]))


def test_lost_records_and_a_kill_are_told(tmp_path):
    level, found = reasons(tmp_path, plain(), lost_records=3, status="running")

    assert (level, list(found)) == ("INVALID", ["lost_records", "killed"])
    assert found["lost_records"]["figure"] == 3


def counters(folder, first_tokens, falls=False):
    """Two scrapes of a vLLM that gave so many first tokens between them."""
    names = ("vllm:time_to_first_token_seconds_bucket", "vllm:time_to_first_token_seconds_count")
    lines = []
    for at, count in ((-1.0, 50), (11.0, 10 if falls else 50 + first_tokens)):
        samples = [[names[0], {"le": "+Inf"}, count], [names[1], {}, count], [names[1][:-5] + "sum", {}, 0.1 * count]]
        lines.append({"url": "u", "at": at, "until": at, "samples": samples, "error": None})
    lines[0]["types"] = {"vllm:time_to_first_token_seconds": "histogram"}
    folder.mkdir(exist_ok=True)
    (folder / "server_samples.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def pages(folder, risen):
    """Two scrapes between which each of these counters rose by so much."""
    lines = []
    for at, share in ((-1.0, 0), (11.0, 1)):
        samples = [[name, {}, 30 + share * rise] for name, rise in risen.items()]
        lines.append({"url": "u", "at": at, "until": at, "samples": samples, "error": None})
    lines[0]["types"] = {name.removesuffix("_total"): "counter" for name in risen}
    folder.mkdir(exist_ok=True)
    (folder / "server_samples.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.mark.parametrize(("finished", "level"), [(200, "VALID"), (210, "SUSPECT"), (400, "INVALID")])
def test_without_a_histogram_of_first_tokens_whole_answers_are_counted(tmp_path, finished, level):
    pages(tmp_path, {"tgi_request_success_total": finished})

    assert reasons(tmp_path, plain())[0] == level


@pytest.mark.parametrize(
    ("first_tokens", "level"), [(200, "VALID"), (201, "VALID"), (210, "SUSPECT"), (400, "INVALID")]
)
def test_others_on_the_server_are_seen_in_its_counters(tmp_path, first_tokens, level):
    counters(tmp_path, first_tokens)
    told, found = reasons(tmp_path, plain())

    assert told == level
    if found:
        assert found["foreign_traffic"]["figure"] == pytest.approx((first_tokens - 200) / first_tokens)


def test_several_choices_that_a_request_file_asks_for_are_no_strangers(tmp_path):
    counters(tmp_path, 400)

    assert reasons(tmp_path, plain(chunk_choice=[[0, 4], [1, 4]])) == ("VALID", {})


@pytest.mark.parametrize(("finished", "level"), [(199, "VALID"), (150, "SUSPECT")])
def test_a_server_that_counts_fewer_answers_than_came_is_not_all_that_answered(tmp_path, finished, level):
    pages(tmp_path, {"tgi_request_success_total": finished})
    told, found = reasons(tmp_path, plain())

    assert told == level
    if found:
        assert found["fewer_answers"]["figure"] == pytest.approx((200 - finished) / 200)


def test_a_restart_is_seen_in_counters_that_fell(tmp_path):
    counters(tmp_path, 0, falls=True)

    assert reasons(tmp_path, plain())[0] == "INVALID"


def test_a_short_change_by_chance_is_no_drift(tmp_path):
    rng = np.random.default_rng(1)
    jitter = rng.lognormal(0, 0.5, 400)

    assert reasons(tmp_path, plain(200, chunk_us=lambda i: [round(1e5 * jitter[i]), *[20_000] * 7]))[0] == "VALID"


def slowing(index):
    """When request number `index` goes out: every 50 ms up to second 5, then every 100 ms."""
    return 0.05 * index if index < 100 else 5 + 0.1 * (index - 100)


SLOWING = dict.fromkeys(("intended_at", "sent_at"), slowing) | {"ended_at": lambda i: slowing(i) + 0.3}


@pytest.mark.parametrize("rising", [False, True])
@pytest.mark.parametrize(
    ("experiment", "found"),
    [
        ("load: {shape: ramp}", True),
        ("load: {shape: ramp, ramp_s: 6}", False),
        ("load: {shape: steps, steps: [[8, 5], [4, 5]]}", False),
        ("load: {shape: rate, rate: [[0, 20], [5, 20], [5, 10]]}", False),
        ("load: {shape: trace}", False),
    ],
)
def test_a_change_that_was_asked_for_is_no_drift(tmp_path, experiment, found, rising):
    """Half the tokens from the middle on; with `rising`, TTFT is twice as long from there on, too."""
    chunks = {"chunk_us": lambda i: [200_000 if rising and i >= 100 else 100_000, *[20_000] * 7]}
    _, told = reasons(tmp_path, plain(150, **SLOWING | chunks), experiment=experiment)

    assert list(told) == (["drift"] if found else [])
    if found:
        assert ("TTFT" if rising else "tokens/s") in told["drift"]["reason"]
        assert told["drift"]["figure"] == pytest.approx(1.0 if rising else -0.5, abs=0.05)


def test_tokens_of_an_open_loop_may_change_as_its_arrivals_do_and_its_ttft_may_not(tmp_path):
    experiment = "load: {shape: rate, rate: 20}"

    assert reasons(tmp_path / "a", plain(150, **SLOWING), experiment=experiment)[0] == "VALID"
    rising = {"chunk_us": lambda i: [100_000 + 600 * i, *[20_000] * 7]}
    assert list(reasons(tmp_path / "b", plain(200, **rising), experiment=experiment)[1]) == ["drift"]


def test_the_end_of_so_many_requests_is_no_drift(tmp_path):
    """Nothing is sent in the last half of the window, where the last answers come in."""
    assert reasons(tmp_path, plain(200), window={"started_at": 0.0, "ended_at": 20.0})[0] == "VALID"


def test_users_in_step_make_waves_and_no_drift(tmp_path):
    """Twenty answers at once, and then for a second nothing."""
    waves = {name: lambda i: 1.0 * (i // 20) for name in ("intended_at", "sent_at")}
    chunks = {"chunk_us": [500_000, *[60_000] * 7]}
    records = plain(400, **waves | chunks | {"ended_at": lambda i: i // 20 + 0.92})

    assert reasons(tmp_path, records, window={"started_at": 0.0, "ended_at": 20.0})[0] == "VALID"


@pytest.mark.parametrize(("unsent", "names"), [(0, []), (50, ["not_sent"])])
def test_what_was_due_and_could_not_leave_is_told(tmp_path, unsent, names):
    _, told = reasons(tmp_path, plain(), experiment="load: {shape: rate, rate: 20}", not_sent=unsent)

    assert list(told) == names
    if names:
        assert told["not_sent"]["figure"] == pytest.approx(50 / 250)
        assert "50 of 250 requests that were due (20.0%)" in told["not_sent"]["reason"]


def test_the_synthetic_runs_of_the_other_tests_are_whole(tmp_path):
    make_run(tmp_path / "run", requests=120)

    assert verdict(load_run(tmp_path / "run"))["level"] in ("VALID", "SUSPECT")


def worker(**changes):
    clock = {"shared": False, "offset_s": -3.5, "error_s": 2e-4, "drift": 1e-5, "round_trip_s": 4e-4, "exchanges": 99}
    row = {
        "worker": 0, "host": "a", "pid": 7, "late": False, "joined_at": None, "heard_until": 10.2, "done_at": 10.2,
        "begun": 200, "records": 200, "lost": 0, "due_not_sent": None, "silences": [], "held_s": 0.0, "frames": 20,
        "frames_repeated": 0, "clock": clock,
    }  # fmt: skip
    return row | {key: clock | value if key == "clock" else value for key, value in changes.items()}


@pytest.mark.parametrize(
    ("changes", "name", "figure", "told"),
    [
        ({"clock": {"error_s": 0.02}}, "clock_offset", 0.02, "worker 0 (a, process 7) is known to ± 20.0 ms"),
        ({"clock": {"drift": -8e-4}}, "clock_offset", 2e-4, "drifts by -800 µs/s"),
        ({"held_s": 2.5}, "held_back", 2.5, "held requests back for 2.5 s, as the master took no records"),
        ({"silences": [[3.0, 8.5], [9.0, None]]}, "stalled_workers", 5.5, "was not heard for 5.5 s"),
        ({"late": True, "joined_at": 4.25}, "workers_changed", 1, "joined at second 4.2"),
        ({"done_at": 6.0}, "workers_changed", 1, "left at second 6.0, before its end"),
    ],
)
def test_what_a_worker_did_to_the_run_is_told(tmp_path, changes, name, figure, told):
    rows = [worker(worker=1, clock={"shared": True}), worker(**changes)]
    level, found = reasons(tmp_path, plain(), fleet=rows, missing_workers=0)

    assert (level, list(found)) == ("SUSPECT", [name])
    assert found[name]["figure"] == figure
    assert told in found[name]["reason"]


def test_workers_that_did_as_they_should_make_no_reason(tmp_path):
    late = worker(late=True, joined_at=-1.0)  # while the run began
    outside = worker(silences=[[-6.0, 0.0], [10.0, 15.0]])  # in the warm-up and in the drain
    assert reasons(tmp_path, plain(), fleet=[worker(), late, outside], missing_workers=0) == ("VALID", {})
