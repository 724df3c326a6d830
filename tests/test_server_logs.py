import itertools
import json
import random
import time
from collections import defaultdict
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given
from hypothesis import strategies as st

from twoclocks.errors import RunFolderError
from twoclocks.log_files import add_log, read_log_files
from twoclocks.log_series import MEANING, LogSample, log_series, placed, zone_of
from twoclocks.log_tail import FileTail
from twoclocks.server_logs import log_requests
from twoclocks.server_requests import ServerRequest, encode_server_request

LOGS = Path(__file__).parent / "data" / "logs"
"""vllm_json.log: lines recorded from vLLM 0.32.0 on a CPU, started with --logging-config.formatter json.
vllm_text.log: the first two lines printed by vLLM 0.33.0's own logger, the others by the format strings of 0.33 to 0.8.
tgi_*.log, sglang_*, transformers.log, llamacpp.log: written from the source of TGI 3.3.7, SGLang 0.5.23, transformers
5.23.0 and llama.cpp (of llama-cpp-python 0.3.36), with invented figures."""
ALL = sorted(LOGS.iterdir())


def lines_of(name):
    return (LOGS / name).read_text().split("\n")


def series(lines):
    """(time, engine) -> {name: value}"""
    found = defaultdict(dict)
    for sample in log_series(lines):
        found[sample.time, sample.engine][sample.name.rpartition(":")[2]] = sample.value
    return dict(found)


# time series: expected values are read off the sample texts


def test_vllm_engine_lines_of_all_its_versions():
    found = series(lines_of("vllm_text.log"))

    assert list(found) == [
        ("11-21T03:04:51", "0"),  # two lines within one second: the second below
        ("11-21T03:10:05", "0"),
        ("11-21T03:10:05", None),  # speculation is not told by engine
        ("11-21T03:10:15", None),  # nor are aggregated engines
        ("06-02T08:41:07", "0"),
        ("04-28T12:00:10", "0"),
        ("01-15T09:00:00", None),  # V0
    ]
    assert found["11-21T03:04:51", "0"] == {
        "prompt_throughput": 568.7,
        "generation_throughput": 234.0,
        "requests_running": 4,
        "requests_waiting": 1,
        "kv_usage": 0.16,
        "prefix_hit_rate": 0.25,
    }
    assert found["11-21T03:10:05", "0"] == {
        "prompt_throughput": 0,
        "generation_throughput": 512.4,
        "requests_running": 12,
        "requests_waiting": 5,
        "requests_deferred": 2,
        "kv_usage": pytest.approx(0.713),
        "prefix_hit_rate": 0.41,
        "external_prefix_hit_rate": pytest.approx(0.032),
    }
    assert found["11-21T03:10:05", None] == {"acceptance_length": 2.2, "draft_acceptance_rate": 0.4}
    assert found["01-15T09:00:00", None] == {
        "prompt_throughput": 3.1,
        "generation_throughput": 27.4,
        "requests_running": 1,
        "requests_swapped": 0,
        "requests_waiting": 0,
        "kv_usage": 0.001,
    }


def test_vllm_json_lines_of_a_real_server_have_year_and_milliseconds():
    found = series(lines_of("vllm_json.log"))

    assert [(at, said["generation_throughput"], said["kv_usage"]) for (at, _), said in found.items()] == [
        ("2026-11-21T03:06:19.887000", 160.8, pytest.approx(0.348)),
        ("2026-11-21T03:06:20.887000", 671.8, pytest.approx(0.348)),
        ("2026-11-21T03:06:21.888000", 591.1, pytest.approx(0.696)),
        ("2026-11-21T03:06:22.889000", 611.5, pytest.approx(0.913)),
        ("2026-11-21T03:06:23.890000", 461.6, pytest.approx(0.913)),
        ("2026-11-21T03:06:24.890000", 413.0, pytest.approx(0.696)),
    ]


def test_sglang_batches_by_rank():
    found = series(lines_of("sglang_text.log"))

    assert found == {
        ("2026-09-14T09:15:01", None): {  # a prefill line, then a decode line
            "prefill_tokens": 131,
            "cached_tokens": 0,
            "kv_usage": 0.08,
            "requests_running": 17,
            "requests_waiting": 0,
            "prompt_throughput": 412.07,
            "generation_throughput": 1290.44,
        },
        ("2026-09-14T09:15:02", "TP0"): {
            "requests_running": 8,
            "kv_usage": 0.07,
            "acceptance_length": 2.4,
            "generation_throughput": 655.2,
            "requests_waiting": 3,
        },
        ("2026-09-14T09:15:02", "DP1 TP0"): {
            "prefill_tokens": 24576,
            "cached_tokens": 0,
            "kv_usage": 0.14,
            "requests_running": 1,
            "requests_waiting": 23,
            "prompt_throughput": 9120.33,
        },
        ("2025-03-04T08:20:11", "TP0"): {
            "requests_running": 8,
            "kv_usage": 0.13,
            "generation_throughput": 141.27,
            "requests_waiting": 0,
        },
    }


def test_llamacpp_timings_have_no_time_of_their_own():
    samples = list(log_series(lines_of("llamacpp.log")))

    assert [(s.name, s.engine, s.time, s.value, s.unit) for s in samples] == [
        ("log:llamacpp:prompt_time", "0", None, pytest.approx(0.08125), "s"),
        ("log:llamacpp:prompt_tokens", "0", None, 40, "tokens"),
        ("log:llamacpp:decode_time", "0", None, 0.08, "s"),
        ("log:llamacpp:decode_tokens", "0", None, 5, "tokens"),
    ]


@pytest.mark.parametrize("path", ALL, ids=lambda path: path.name)
def test_every_series_is_explained(path):
    assert {sample.name for sample in log_series(path.read_text().split("\n"))} <= set(MEANING)


# what stands around a line

ENGINE = (
    "INFO 11-21 03:04:51 [loggers.py:335] Engine 001: Avg prompt throughput: 57.5 tokens/s, Avg generation throughput: "
    "22.5 tokens/s, Running: 2 reqs, Waiting: 1 reqs, GPU KV cache usage: 12.0%, Prefix cache hit rate: 25.0%"
)


@pytest.mark.parametrize(
    ("line", "time_"),
    [
        (ENGINE + "\r\n", "11-21T03:04:51"),
        (f"\x1b[36m(APIServer pid=12)\x1b[0;0m \x1b[32m{ENGINE}\x1b[0m", "11-21T03:04:51"),
        (f"2026-11-21T03:04:51.123456789Z {ENGINE}", "2026-11-21T03:04:51.123456Z"),  # docker logs -t, kubectl
        (f"2026-11-21T05:04:51.12+02:00 stdout F {ENGINE}", "2026-11-21T05:04:51.120000+02:00"),  # CRI
        (f"Nov 21 03:04:52 host vllm[77]: (APIServer pid=77) {ENGINE}", "11-21T03:04:51"),  # journalctl
        (f"2026-11-21T03:04:52+0000 host vllm[77]: {ENGINE}", "2026-11-21T03:04:52+00:00"),  # -o short-iso
        (f"vllm-1  | {ENGINE}", "11-21T03:04:51"),  # docker compose logs
        (f"Loading: 10%|#  \rLoading: 100%|###\r{ENGINE}", "11-21T03:04:51"),
        ("\x00" * 5000 + ENGINE, "11-21T03:04:51"),  # a hole left by a truncation
        ("rest of a torn line, 7" + ENGINE, "11-21T03:04:51"),
        ("INFO 11-21 03:04:41 [loggers.py:335] Engine 001: Avg pro" + ENGINE, "11-21T03:04:51"),
        (
            json.dumps({"log": f"\x1b[36m{ENGINE}\n", "stream": "stderr", "time": "2026-11-21T03:04:51.5Z"}),
            "2026-11-21T03:04:51.500000Z",  # a file of Docker's json-file driver
        ),
        (
            json.dumps({"log": json.dumps({"asctime": "2026-11-21 03:04:51,143", "message": ENGINE[37:]}) + "\n"}),
            "2026-11-21T03:04:51.143000",
        ),
    ],
)
def test_what_stands_around_a_line_does_not_matter(line, time_):
    samples = list(log_series([line]))

    assert [sample.value for sample in samples] == [57.5, 22.5, 2, 1, 0.12, 0.25]
    assert {(sample.time, sample.engine) for sample in samples} == {(time_, "1")}


def test_a_journal_is_all_the_time_that_llamacpp_has():
    line = f"Nov  1 03:04:52 host llama-server[7]: {lines_of('llamacpp.log')[0]}"

    assert {(sample.time, sample.engine) for sample in log_series([line])} == {("11-01T03:04:52", "0")}


@pytest.mark.parametrize("line", [ENGINE, lines_of("sglang_text.log")[0], lines_of("llamacpp.log")[0]])
def test_a_line_cut_anywhere_never_gives_another_number(line):
    whole = set(log_series([line]))
    for end in range(len(line)):
        cut = set(
            log_series([line[:end] + ENGINE[:10]])
        )  # as where the server died within a line and was started again

        assert {(s.name, s.value) for s in cut} <= {(s.name, s.value) for s in whole}


def test_a_figure_of_vllm_without_its_unit_is_none():
    whole = {(s.name, s.value) for s in log_series([ENGINE])}
    for end in range(len(ENGINE)):
        assert {(s.name, s.value) for s in log_series([ENGINE[:end]])} <= whole


# single requests


def test_transformers():
    assert log_requests(lines_of("transformers.log")) == [
        ServerRequest(
            source="log",
            server="transformers",
            request_id="lt-000001",
            queue=0.0021409988403320312,
            e2e=1.4821939468383789,
            prompt_tokens=12,
            output_tokens=64,
        )
    ]


TGI = ServerRequest(
    source="log",
    server="tgi",
    validation=pytest.approx(0.00072963),
    queue=pytest.approx(0.005992752),
    inference=pytest.approx(0.786288358),
    time_per_token=pytest.approx(0.01512093),
    e2e=pytest.approx(0.79301074),
    told={"time": "2026-01-08T14:03:10.123456Z", "span": "chat_completions"},
)


@pytest.mark.parametrize("name", ["tgi_text.log", "tgi_json.log"])
def test_tgi(name):
    assert log_requests(lines_of(name))[0] == TGI


def test_the_same_line_of_tgi_with_and_without_dockers_time_is_one_row():
    line = lines_of("tgi_text.log")[0]

    assert log_requests([line, f"2026-01-08T14:03:10.123999888Z {line}"]) == [TGI]


def test_tgi_durations_in_seconds():
    row = log_requests(lines_of("tgi_text.log"))[1]

    assert (row.e2e, row.validation) == pytest.approx((1.102828046, 0.000871062))
    assert row.told["span"] == "generate_stream"


@pytest.mark.parametrize(
    "line",
    [
        lines_of("tgi_text.log")[0].replace("INFO ", "INFO HTTP request{trace_id=0af7651916cd43dd8448eb211c80319c}:"),
        lines_of("tgi_json.log")[0].replace('"spans":[', '"spans":[{"trace_id":"0af7651916cd43dd8448eb211c80319c"},'),
        lines_of("tgi_text.log")[0].replace(
            "chat_", "\x1b[1mA{trace_id=0af7651916cd43dd8448eb211c80319c}:chat_\x1b[0m"
        ),
    ],
)
def test_tgi_with_a_trace_id(line):
    row = log_requests([line])[0]

    assert (row.trace_id, row.e2e) == ("0af7651916cd43dd8448eb211c80319c", TGI.e2e)


def test_a_prompt_of_tgi_cannot_speak_for_the_server():
    asked = r'stop: ["x" total_time="9s" queue_time="8s" }]'
    row = log_requests([lines_of("tgi_text.log")[0].replace("stop: []", asked)])[0]

    assert row == TGI


def test_sglang_export_file():
    assert log_requests(lines_of("sglang_export.jsonl")) == [
        ServerRequest(
            source="log",
            server="sglang",
            request_id="lt-000001",
            ttft=0.0761,
            queue=0.0012,
            prefill=pytest.approx(1795230000.0871 - 1795230000.0042),
            time_per_token=pytest.approx(1 / 102.26),
            e2e=1.3482,
            prompt_tokens=42,
            output_tokens=128,
            cached_tokens=0,
            finish_reason="length",
            told={
                "request_received_ts": 1795230000.0,
                "api_server_dispatch_finish_ts": 1795230000.0031,
                "forward_entry_time": 1795230000.0042,
                "prefill_finished_time": 1795230000.0871,
                "response_sent_to_client_ts": 1795230001.3405,
                "request_finished_ts": 1795230001.3482,
                "num_retractions": 0,
                "reasoning_tokens": 0,
            },
        )
    ]


def test_sglang_time_stats_line():
    assert log_requests(lines_of("sglang_text.log")) == [
        ServerRequest(
            source="log",
            server="sglang",
            request_id="lt-000001",
            queue=pytest.approx(0.00123),
            inference=pytest.approx(1.3257),
            prompt_tokens=42,
            output_tokens=128,
            cached_tokens=0,
        )
    ]


def test_sglang_request_log_in_json():
    meta = {"e2e_latency": 2.5, "prompt_tokens": 7, "completion_tokens": 9, "finish_reason": {"type": "stop"}}
    line = json.dumps({"event": "request.finished", "rid": "r1", "out": {"meta_info": meta}})
    received = json.dumps({"event": "request.received", "rid": "r1", "obj": {"text": "hi"}})
    row = log_requests([received, f"[2026-09-14 09:15:03] {line}"])[0]

    assert (row.request_id, row.e2e, row.prompt_tokens, row.output_tokens) == ("r1", 2.5, 7, 9)
    assert row.finish_reason == "stop"


def test_of_several_lines_about_one_request_the_one_that_tells_most_is_used():
    rows = log_requests([*lines_of("sglang_text.log"), *lines_of("sglang_export.jsonl")])

    assert [(row.request_id, row.ttft) for row in rows] == [("lt-000001", 0.0761)]


def test_a_line_that_comes_twice_is_one_row_and_an_id_that_does_is_two():
    line = lines_of("transformers.log")[2]

    assert len(log_requests([line, f"2026-01-01T00:00:00Z {line}"])) == 1
    assert [row.e2e for row in log_requests([line, line.replace("end_time = 1", "end_time = 2")])] == [
        1.4821939468383789,
        2.4821939468383789,
    ]


def test_vllm_and_llamacpp_log_no_request():
    assert log_requests([*lines_of("vllm_text.log"), *lines_of("vllm_json.log"), *lines_of("llamacpp.log")]) == []


def test_durations_that_no_request_could_have_are_left_out():
    stats = "ReqTimeStats(rid=a, input_len=x, output_len=1): queue_duration={}, forward_duration=1ms, entry_time=1"
    line = lines_of("transformers.log")[2]

    assert log_requests([stats.format("-1ms"), stats.format("1"), stats.format("1e3ms")]) == []
    assert log_requests([line.replace("1.48", "-1.48"), line.replace("= 1.48", "= 1e999"), line + " s"]) == []
    assert log_requests([lines_of("tgi_text.log")[0].replace("793.01074ms", "soon")]) == []


def test_a_count_that_no_request_could_have_is_left_out():
    row = json.loads(lines_of("sglang_export.jsonl")[0])
    (found,) = log_requests(
        [json.dumps(row | {"prompt_tokens": 1e300, "cached_tokens": 1.5, "completion_tokens": "9"})]
    )

    assert (found.prompt_tokens, found.cached_tokens, found.output_tokens) == (None, None, 9)


# hostile text

FRAGMENTS = [
    "Avg prompt throughput: ", "Engine 000: ", "SpecDecoding metrics: ", " batch, ", "Decode batch, ", "eval time = ",
    "Request ", " finished: prefill_len = ", "ReqTimeStats(", "rid=a", 'total_time="', "parameters=", "{", "}", '"',
    "[", "trace_id=", ": Success", "11-21 ", "2026-11-21T", "\x1b[", "\x1b]", "9", "1.5 tokens/s, ", " ", "a",
    "Nov ", "\\",
    '{"span": ', '{"message": "Success"', '{"log": "', "id  0 | task 1 | ", "#queue-req: ",
]  # fmt: skip


BEFORE = [
    "",
    "Request ",
    ENGINE[:45],
    "ReqTimeStats(",
    'a{parameters=" total_time=',
    "Decode batch, ",
    '{"log": "',
    "id ",
]


@pytest.mark.parametrize("fragment", FRAGMENTS)
def test_hostile_lines_are_read_in_time_that_grows_with_their_length(fragment):
    def cost(size):
        hostile = fragment * (size // len(fragment))
        lines = [before + hostile + after for before in BEFORE for after in ("", ": Success", "}")]
        began = time.process_time()
        log_requests(lines)
        list(log_series(lines))
        return time.process_time() - began

    small, large = cost(50_000), cost(1_000_000)

    # twenty times the text; a search that backtracks would take four hundred times as long
    assert large < 100 * max(small, 0.01)


def test_a_line_of_a_megabyte_still_tells():
    assert [s.value for s in log_series(["x" * 1_000_000 + " " + ENGINE])] == [57.5, 22.5, 2, 1, 0.12, 0.25]


@pytest.mark.parametrize(
    "line",
    [
        '{"a":' * 100_000 + "}",
        '{"event": "request.finished", "rid": "\\ud800", "out": {"meta_info": {"e2e_latency": 1}}}',
        '{"event": "request.finished", "rid": 3, "out": {"meta_info": []}}',
        '{"event": "request.finished", "rid": "a", "out": {"meta_info": {"e2e_latency": 1, "prompt_tokens": 1e300}}}',
        '{"request_parameters": 1, "id": "a", "e2e_latency": 1, "decode_throughput": 1e-320, "num_retractions": 1e30}',
        '{"request_parameters": 1, "id": "a", "e2e_latency": 99999999999999999999999999999999}',
        '{"message": "Success", "span": {"total_time": 3}, "spans": [3, null]}',
        '{"message": "Success", "timestamp": 3, "span": {"total_time": "1s", "name": []}, "spans": {}}',
        '{"log": 3}',
        '{"message": {"Avg prompt throughput: ": 1}}',
        "13-99 99:99:99 " + ENGINE,
    ],
)
def test_json_of_another_shape_never_raises(line):
    for row in log_requests([line]):
        encode_server_request(row)
    placed(log_series([line]), 1.8e9, UTC)


PIECES = st.lists(
    st.one_of(
        st.binary(max_size=60),
        st.sampled_from([fragment.encode() for fragment in FRAGMENTS]),
        st.sampled_from([line for path in ALL for line in path.read_bytes().splitlines(keepends=True)]),
        st.just(b"\n"),
    ),
    max_size=12,
).map(b"".join)


@given(PIECES)
def test_any_bytes_are_read(data):
    lines = data.decode("utf-8", "replace").split("\n")
    for row in log_requests(lines):
        encode_server_request(row)
    for _, sample in placed(log_series(lines), 1.8e9, UTC):
        assert sample.value >= 0
        assert sample.name in MEANING


@given(st.integers(0, 2**32))
def test_however_the_log_is_copied_the_rows_are_the_same(tmp_path_factory, seed):
    rng = random.Random(seed)
    folder = tmp_path_factory.mktemp("run")
    whole = b"".join(path.read_bytes() for path in ALL)
    cuts = [0, *sorted(rng.randrange(len(whole)) for _ in range(rng.randrange(12))), len(whole)]
    source = folder / "source.log"
    source.touch()
    tail = FileTail(source, folder / "server.log")
    with source.open("ab", buffering=0) as file:
        for start, end in itertools.pairwise(cuts):
            file.write(whole[start:end])
            if rng.random() < 0.8:
                tail.copy()
    tail.copy()
    tail.close()
    lines, expected = read_log_files(folder), whole.decode().split("\n")

    assert log_requests(lines) == log_requests(expected)
    assert list(log_series(lines)) == list(log_series(expected))
    assert [row.server for row in log_requests(lines)] == ["sglang", "tgi", "tgi", "transformers"]


# the run's clock


def sample(text):
    return LogSample(text, "log:vllm:requests_running", "0", 1.0, "requests")


def seconds(texts, start, zone):
    return [at for at, _ in placed([sample(text) for text in texts], start.timestamp(), zone)]


def test_a_time_is_placed_by_its_own_zone_or_else_the_servers():
    start = datetime(2026, 11, 21, 3, 4, 50, tzinfo=UTC)
    texts = ["2026-11-21T03:04:51.250000Z", "2026-11-21T05:04:51+02:00", "2026-11-21T11:04:51", "11-21T11:04:52", None]

    assert seconds(texts, start, timezone(timedelta(hours=8))) == [1.25, 1, 1, 2]


@pytest.mark.parametrize(
    "start", [datetime(2026, 12, 31, 23, 59, 50, tzinfo=UTC), datetime(2027, 1, 1, 0, 0, 5, tzinfo=UTC)]
)
def test_a_log_may_cross_a_new_year(start):
    found = seconds(["12-31T23:59:59", "01-01T00:00:01"], start, UTC)

    assert found[1] - found[0] == 2
    assert abs(found[0]) < 10


def test_the_hour_that_comes_twice_is_told_by_the_order():
    zone = ZoneInfo("Europe/Berlin")  # on 2026-10-25 at 01:00 UTC clocks went from 03:00 back to 02:00
    start = datetime(2026, 10, 24, 23, 0, tzinfo=UTC)
    times = [start + timedelta(minutes=minutes) for minutes in range(0, 240, 7)]
    texts = [when.astimezone(zone).strftime("%m-%dT%H:%M:%S") for when in times]

    assert seconds(texts, start, zone) == [(when - start).total_seconds() for when in times]


def test_a_run_that_begins_in_the_second_of_these_hours():
    start = datetime(2026, 10, 25, 1, 20, tzinfo=UTC)

    assert seconds(["10-25T02:20:05", "10-25T02:20:04"], start, ZoneInfo("Europe/Berlin")) == [5, 4]


def test_times_that_are_none_are_left_out():
    start = datetime(2026, 11, 21, tzinfo=UTC)

    assert seconds(["02-29T00:00:00", "11-31T00:00:00", "2026-11-21T24:61:61"], start, UTC) == []


@pytest.mark.parametrize("hours", [0, 1, 8, -9.5, 5.75, 14])
def test_the_zone_of_a_server_is_found(hours):
    zone, start = timezone(timedelta(hours=hours)), datetime(2026, 11, 21, 3, 4, 50, tzinfo=UTC)
    local = ZoneInfo("America/New_York")
    texts = [(start + timedelta(seconds=s)).astimezone(zone).strftime("%m-%dT%H:%M:%S") for s in range(0, 120, 10)]
    others = [sample("2026-01-01T00:00:00Z"), sample(None)]
    found = zone_of([*map(sample, texts), *others], start.timestamp(), 120, local)

    assert found.utcoffset(None) == timedelta(hours=hours)
    assert zone_of([sample("11-20T22:05:00")], start.timestamp(), 120, local) is local
    assert zone_of([], start.timestamp(), 120, local) is local


# files


def test_the_logs_of_a_run_are_read_together_and_common_lines_once(tmp_path):
    (tmp_path / "server.log").write_bytes(b"b\nb\nc\r\n\xff\ntor")
    (tmp_path / "server-added.log").write_bytes(b"a\nb\nb\nb\nc\n\xff\nd\n")
    (tmp_path / "server-added-2.log").write_bytes(b"e\n")

    assert read_log_files(tmp_path) == ["b", "b", "c", "\N{REPLACEMENT CHARACTER}", "a", "b", "d", "e"]
    assert read_log_files(tmp_path / "nowhere") == []


def test_an_added_log_is_copied_once_and_another_gets_a_number(tmp_path):
    run, log = tmp_path / "run", tmp_path / "x.log"
    run.mkdir()
    (run / "run.json").touch()
    log.write_text("one\n")

    assert [add_log(run, log), add_log(run, log)] == [run / "server-added.log"] * 2
    log.write_text("two\n")
    assert add_log(run, log) == run / "server-added-2.log"
    assert (run / "server-added.log").read_text() == "one\n"
    assert sorted(path.name for path in run.iterdir()) == ["run.json", "server-added-2.log", "server-added.log"]


def test_logs_have_a_bound(tmp_path, monkeypatch):
    monkeypatch.setattr("twoclocks.log_files.MAX_BYTES", 1 << 20)
    run = tmp_path / "run"
    run.mkdir()
    (run / "run.json").touch()
    (run / "server.log").write_bytes(b"x\n" * 400_000)
    (tmp_path / "x.log").write_bytes(b"y\n" * 400_000)

    with pytest.raises(RunFolderError, match="at most 1 MiB are read; cut it"):
        add_log(run, tmp_path / "x.log")
    (run / "server-added.log").write_bytes(b"y\n" * 400_000)
    with pytest.raises(RunFolderError, match="logs are more than 1 MiB"):
        read_log_files(run)
