import math
import time

import numpy as np
import pytest

from twoclocks.clocks import CLOCKS, METRICS, SILENCES, silences
from twoclocks.join import (
    LINES_WITHOUT_ID,
    NO_ID,
    NO_ID_IN_LOG,
    NO_LINE,
    NO_SPAN,
    NO_STAGE,
    NO_TIMINGS,
    NOT_OURS,
    OTHER_LINES,
    REPEATED,
    SOURCES,
    TOLD_TWICE,
    Timing,
    Unmatched,
    in_band,
    join,
    reasons,
)  # fmt: skip
from twoclocks.server_requests import ServerRequest

# recorded from vLLM 0.32.0 with --enable-per-request-metrics and --otlp-traces-endpoint: one request, told twice
VLLM = {
    "time_to_first_token_ms": 35.32536400007302,
    "generation_time_ms": 154.0802539998367,
    "queue_time_ms": 0.22802600005888962,
    "mean_itl_ms": 10.272016933322448,
    "tokens_per_second": 84.47479102762213,
}
SPAN = {
    "ttft": 0.10587096214294434,
    "queue": 0.00022802600005888962,
    "prefill": 0.03532536400007302,
    "decode": 0.1540802539998367,
    "inference": 0.18940561799990974,
    "e2e": 0.25560832023620605,
    "output_tokens": 16,
}
# written from the sources of llama.cpp, TGI 3.3.7 and SGLang 0.5.23
LLAMACPP = {"cache_n": 236, "prompt_n": 40, "prompt_ms": 81.25, "predicted_n": 5, "predicted_ms": 80.0}
TGI = {
    "x-compute-time": "0.812345678", "x-total-time": "812", "x-validation-time": "1", "x-queue-time": "12",
    "x-inference-time": "799", "x-time-per-token": "40",
}  # fmt: skip
SGLANG = {
    "first_token_latency": 0.0861, "queue_time": 0.0012, "e2e_latency": 1.3482, "forward_entry_time": 1795230000.0042,
    "prefill_finished_time": 1795230000.0871, "decode_throughput": 100.0, "cached_tokens": 7,
}  # fmt: skip


def span(request_id: str | None = "a", **told) -> ServerRequest:
    return ServerRequest(**{"source": "otlp", "server": "vllm", "request_id": request_id, **SPAN} | told)


def log(request_id: str | None, **told) -> ServerRequest:
    given = {"source": "log", "server": "transformers", "queue": 0.002, "e2e": 1.48}
    return ServerRequest(request_id=request_id, **given | told)


def one(rows=(), in_band_timings=None, tokens=16.0, stages=()):
    """The columns of one request "a", as plain values."""
    return {name: column[0] for name, column in join(["a"], [in_band_timings], [tokens], rows, stages).columns.items()}


def test_vllm_leaves_the_queue_out_of_its_ttft_and_we_add_it():
    timing = in_band(VLLM, 16)

    assert isinstance(timing, Timing)
    assert timing.ttft == pytest.approx(0.0355533900)
    assert timing.prefill == pytest.approx(0.0353253640)
    assert timing.tpot == pytest.approx(timing.decode / 15)
    assert timing.e2e == pytest.approx(0.1896336440)
    assert math.isnan(timing.tokenize)


def test_one_token_has_no_server_tpot():
    assert math.isnan(in_band(VLLM | {"mean_itl_ms": 0.0}, 1).tpot)
    assert math.isnan(one([span(output_tokens=1, decode=0.0)])["server_tpot"])


def test_llamacpp_has_a_prefill_and_no_ttft_since_nobody_knows_its_queue():
    timing = in_band(LLAMACPP, 5)

    assert (timing.server, timing.prefill, timing.decode, timing.tpot) == ("llamacpp", 0.08125, 0.08, 0.02)
    assert timing.cached_tokens == 236
    assert math.isnan(timing.ttft)
    assert math.isnan(timing.queue)


def test_tgis_headers_hold_no_ttft_and_a_time_per_token_that_is_no_tpot():
    timing = in_band(TGI, 20)

    assert (timing.server, timing.validation, timing.queue, timing.inference) == ("tgi", 0.001, 0.012, 0.799)
    assert (timing.e2e, timing.time_per_token) == (0.812, 0.04)
    assert all(math.isnan(value) for value in (timing.ttft, timing.prefill, timing.tpot))


def test_sglangs_meta_info():
    timing = in_band(SGLANG, 128)

    assert (timing.ttft, timing.queue, timing.e2e, timing.tpot) == (0.0861, 0.0012, 1.3482, 0.01)
    assert timing.prefill == pytest.approx(0.0829, abs=1e-6)
    assert timing.tokenize == pytest.approx(0.002, abs=1e-6)


def test_what_sglangs_span_calls_prefill_holds_the_queue():
    told = one([span(server="sglang", ttft=0.1, prefill=0.09, queue=0.03)])

    assert told["server_tokenize"] == pytest.approx(0.01)
    assert told["server_prefill"] == pytest.approx(0.06)
    alone = one([span(server="sglang", ttft=0.1, prefill=0.09, queue=None)])
    assert alone["server_tokenize"] == pytest.approx(0.01)
    assert math.isnan(alone["server_prefill"])


@pytest.mark.parametrize(
    "server",
    [
        None, {}, {"time_to_first_token_ms": 3.0}, {"queue_time_ms": "soon", "time_to_first_token_ms": None},
        {"x-queue-time": "-1"}, {"x-queue-time": "1e999", "x-total-time": "nan"}, {"prompt_ms": True},
        {"prompt_ms": 10**400}, {"queue_time_ms": [1], "time_to_first_token_ms": {}}, {"something": "else"},
    ],
)  # fmt: skip
def test_timings_that_are_not_there_are_not_invented(server):
    assert isinstance(in_band(server, 5), Unmatched)


def test_a_span_tells_template_and_tokenizing_apart():
    told = one([span()])

    assert told["server_source"] == "otlp"
    assert told["server_kind"] == "vllm"
    assert told["server_tokenize"] == pytest.approx(0.10587096214294434 - 0.00022802600005888962 - 0.03532536400007302)
    assert told["server_tpot"] == pytest.approx(0.1540802539998367 / 15)
    assert math.isnan(told["server_inference"])  # prefill and decode tell it apart


def test_spans_come_before_the_response_and_the_response_before_the_log():
    rows = [span("a"), log("a"), log("b"), log("c")]
    columns = join(["a", "b", "c", "d"], [VLLM, VLLM, None, None], [16] * 4, rows).columns

    assert columns["server_source"] == ["otlp", "in-band", "log", None]
    assert columns["server_unmatched"] == [None, None, None, NO_SPAN]
    assert reasons(columns["server_unmatched"]) == {NO_SPAN: 1}
    # each source stays apart, so that they can be held against each other
    assert columns["otlp_queue"][0] == pytest.approx(columns["in_band_queue"][0])
    assert columns["log_e2e"][0] == 1.48
    assert math.isnan(columns["otlp_queue"][1])


def test_one_source_has_no_columns_of_its_own():
    assert not [name for name in one([span()]) if name.startswith(("otlp_", "in_band_", "log_"))]


def test_why_a_request_is_not_joined():
    assert one()["server_unmatched"] == NO_TIMINGS
    assert one([log("b")])["server_unmatched"] == NO_LINE
    assert one([log(None, server="tgi")])["server_unmatched"] == NO_ID_IN_LOG
    assert one([span("b")])["server_unmatched"] == NO_SPAN
    assert one([span("a", queue=1.0), span("a", queue=2.0)])["server_unmatched"] == TOLD_TWICE


def test_the_trace_id_joins_where_a_server_knows_no_request_id():
    tgi = {"server": "tgi", "ttft": None, "queue": 0.012, "prefill": None, "decode": None}

    assert one([span(None, trace_id="a", **tgi)])["server_queue"] == 0.012
    assert one([span("of a proxy", trace_id="a")])["server_source"] == "otlp"
    assert one([span("a", trace_id="of a proxy")])["server_source"] == "otlp"


def test_rows_that_join_nothing_are_counted_with_the_reason():
    rows = [span("a"), span("stranger", trace_id="f"), span(None), span("a", server="envoy"), log("of yesterday")]
    rows += [log(None, server="tgi")]
    joined = join(["a"], [None], [16], rows)

    assert joined.rows == {"otlp": 4, "log": 2}
    assert joined.unmatched_rows == {NO_ID: 1, LINES_WITHOUT_ID: 1, NOT_OURS: 1, NO_STAGE: 1, OTHER_LINES: 1}


def test_a_batch_that_comes_twice_is_one():
    joined = join(["a"], [None], [16], [span(at=1.0), span(at=2.0)])

    assert joined.columns["server_source"] == ["otlp"]
    assert joined.unmatched_rows == {REPEATED: 1}


def test_rows_that_complete_each_other_are_one():
    first = span(ttft=0.1, queue=None, prefill=None, decode=None, e2e=None)
    other = span(ttft=None, queue=0.02, prefill=0.05, decode=None, e2e=1.0)

    told = one([first, other])
    assert (told["server_ttft"], told["server_queue"], told["server_e2e"]) == (0.1, 0.02, 1.0)


def test_where_spans_contradict_each_other_the_response_is_believed():
    assert one([span(queue=0.1), span(queue=0.3)], VLLM)["server_source"] == "in-band"


def test_the_children_of_n_make_one_request():
    children = [
        span(choice=0, ttft=0.30, queue=0.10, prefill=0.15, decode=1.5, e2e=1.9, output_tokens=16),
        span(choice=1, ttft=0.20, queue=0.05, prefill=0.12, decode=3.0, e2e=3.3, output_tokens=16),
    ]
    told = one(children, tokens=32)

    assert told["server_children"] == 2
    assert (told["server_ttft"], told["server_queue"], told["server_prefill"]) == (0.20, 0.05, 0.12)
    assert told["server_tokenize"] == pytest.approx(0.03)
    assert told["server_e2e"] == 3.3
    assert told["server_tpot"] == pytest.approx((0.1 + 0.2) / 2)


def test_stages_have_columns_of_their_own_and_their_longest_span_counts():
    rows = [span(), span(server="gateway", ttft=None, e2e=0.2), span(server="gateway", ttft=0.15, e2e=0.3)]
    told = one(rows, stages=["gateway", "router"])

    assert (told["stage_gateway_ttft"], told["stage_gateway_e2e"]) == (0.15, 0.3)
    assert math.isnan(told["stage_router_e2e"])
    assert told["server_e2e"] == SPAN["e2e"]


def test_order_duplicates_and_strangers_change_nothing():
    rng = np.random.default_rng(5)
    ids = [f"{number:032x}" for number in range(300)]
    queue = rng.random(300)
    rows = [span(name, queue=float(wait), trace_id=name) for name, wait in zip(ids, queue, strict=True)]
    rows += [rows[number] for number in rng.integers(0, 300, 60)]
    rows += [span(f"{number:032x}") for number in range(1000, 1100)]
    shuffled = [rows[number] for number in rng.permutation(len(rows))]
    asked = [int(number) for number in rng.permutation(300)]

    joined = join([ids[number] for number in asked], [None] * 300, [16] * 300, shuffled)

    assert joined.columns["server_queue"] == [queue[number] for number in asked]
    assert joined.unmatched_rows == {NOT_OURS: 100, REPEATED: 60}


def test_a_hundred_thousand_requests_are_joined_in_linear_time():
    count = 100_000
    rows = [span(f"{number:032x}") for number in reversed(range(count))]
    began = time.process_time()

    joined = join([f"{number:032x}" for number in range(count)], [VLLM] * count, [16] * count, rows)

    assert all(source == "otlp" for source in joined.columns["server_source"])
    assert time.process_time() - began < 60  # seconds where it is linear; hours where each is sought among all


def test_every_clock_says_start_and_stop_and_is_of_a_known_source():
    for (source, _), clocks in CLOCKS.items():
        assert source in SOURCES
        assert clocks.keys() <= set(METRICS)
        for metric, clock in clocks.items():
            assert " -> " in clock.text
            assert bool(clock.differs) == (metric in ("ttft", "tpot", "e2e")), (source, metric)


def test_what_a_server_does_not_tell_is_said_with_the_way_to_learn_it():
    assert "--otlp-traces-endpoint" in silences("vllm", {"ttft", "queue", "prefill", "e2e", "/metrics"})[0]
    assert silences("vllm", {"ttft", "queue", "prefill", "tokenize", "e2e", "/metrics"}) == []
    assert any("ContinuousBatchingLogger at DEBUG" in line for line in silences("transformers", set()))
    assert "however it is started" in silences("transformers", {"queue", "e2e"})[-1]
    assert all(silences(server, set()) for server in SILENCES)
