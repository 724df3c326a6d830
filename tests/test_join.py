import math

import pytest

from twoclocks.join import ServerTiming, Unmatched, in_band, join, logged, reasons

# recorded from vLLM 0.32.0 with --enable-per-request-metrics
VLLM = {
    "time_to_first_token_ms": 35.32536400007302,
    "generation_time_ms": 154.0802539998367,
    "queue_time_ms": 0.22802600005888962,
    "mean_itl_ms": 10.272016933322448,
    "tokens_per_second": 84.47479102762213,
}
# written from the format in transformers 5.23.0's source
LINE = (
    "Request {} finished: prefill_len = 12 decode_len = 64 "
    "start_time = 0.0021409988403320312 end_time = 1.4821939468383789"
)


def test_vllm_leaves_the_queue_out_of_its_ttft_and_we_add_it():
    timing = in_band(VLLM, 16)

    assert isinstance(timing, ServerTiming)
    assert timing.server_ttft == pytest.approx(0.0355533900)
    assert timing.server_prefill == pytest.approx(0.0353253640)
    assert timing.server_tpot == pytest.approx(timing.server_decode / 15)
    assert timing.server_e2e == pytest.approx(0.1896336440)


def test_one_token_has_no_server_tpot():
    timing = in_band(VLLM | {"mean_itl_ms": 0.0}, 1)

    assert isinstance(timing, ServerTiming)
    assert math.isnan(timing.server_tpot)


@pytest.mark.parametrize(
    "server", [None, {}, {"time_to_first_token_ms": 3.0}, {"queue_time_ms": "soon", "time_to_first_token_ms": None}]
)
def test_timings_that_are_not_there_are_not_invented(server):
    assert isinstance(in_band(server, 5), Unmatched)


def test_log_lines_of_transformers():
    found = logged(
        [
            "INFO: noise",
            "2026-01-01 00:00:00,1 - DEBUG - " + LINE.format("abc"),
            LINE.format("twice"),
            LINE.format("twice"),
        ]
    )

    timing = found["abc"]
    assert isinstance(timing, ServerTiming)
    assert (timing.server_queue, timing.server_e2e) == (0.0021409988403320312, 1.4821939468383789)
    assert math.isnan(timing.server_ttft)
    assert isinstance(found["twice"], Unmatched)


def test_a_hostile_log_line_is_no_timing():
    assert logged([LINE.format("x").replace("0.0021409988403320312", "1.2.3")]) == {}


def test_join_prefers_the_response_and_says_why_not():
    columns = join(["a", "b", "c"], [VLLM, None, None], [16, 5, 5], [LINE.format("b")])

    assert columns["server_source"] == ["in-band", "log", None]
    assert columns["server_unmatched"] == [None, None, "the server's log has no line for this request"]
    assert reasons(columns["server_unmatched"]) == {"the server's log has no line for this request": 1}
