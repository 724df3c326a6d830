"""Warm-up: how many rounds there are, by a clock and a server that the test invents; and one as a user runs it."""

import pytest
from fake_server import FakeServer, plain_answer
from locust_runs import read, run
from make_run import record

from twoclocks.errors import ExperimentError
from twoclocks.experiment import Warmup, load_experiment
from twoclocks.record import token_span_s
from twoclocks.warmup import in_words, median_ttft, warm_up


def answer(ttft_ms=100.0, **fields):
    chunks = {"chunk_us": [1000, round(ttft_ms * 1e3) - 1000, 20_000], "chunk_kinds": [("role", 1), ("content", 2)]}
    return record(**chunks | fields)


def warmed(settings, ttfts_ms, seconds_a_round=1.0, **fields):
    """The outcome with a server whose n-th round has the n-th of these TTFTs (the last one for ever)."""
    now, rounds = 0.0, []

    def send_round(count):
        nonlocal now
        now += seconds_a_round
        rounds.append(count)
        return [answer(ttfts_ms[min(len(rounds), len(ttfts_ms)) - 1], **fields) for _ in range(count)]

    done = warm_up(settings, send_round, lambda: now)
    assert sum(rounds) == done.requests
    return done


def test_one_round_of_so_many_requests_is_the_default():
    done = warmed(Warmup(requests=3), [100])

    assert (done.requests, done.rounds, done.stable, done.failed, done.tells) == (3, 1, None, 0, False)


def test_rounds_for_so_long():
    done = warmed(Warmup(requests=2, duration_s=10), [100], seconds_a_round=3)

    assert (done.rounds, done.requests, done.seconds) == (4, 8, 12)


@pytest.mark.parametrize(
    ("ttfts_ms", "rounds", "stable"),
    [
        ([900, 300, 150, 120, 115, 100], 5, True),  # 120 -> 115 is the first step of less than a tenth
        ([100, 109], 2, True),
        ([100, 111, 124, 138, 154, 171, 190, 211, 235, 261, 290, 322, 358, 398, 442, 491, 545], 16, False),
    ],
)
def test_until_two_rounds_are_alike_or_there_were_too_many(ttfts_ms, rounds, stable):
    done = warmed(Warmup(until_stable=True), ttfts_ms)

    assert (done.rounds, done.requests, done.stable) == (rounds, 4 * rounds, stable)


def test_it_gives_up_after_a_minute():
    done = warmed(Warmup(until_stable=True, max_requests=10_000), [100, 200] * 500, seconds_a_round=7)

    assert (done.rounds, done.stable) == (9, False)


def test_both_must_be_reached():
    assert warmed(Warmup(until_stable=True, duration_s=5), [100]).rounds == 5
    assert warmed(Warmup(until_stable=True, duration_s=2), [900, 500, 200, 100]).rounds == 5
    long = warmed(Warmup(until_stable=True, duration_s=90), [100, 200] * 50)
    assert (long.rounds, long.stable) == (90, False)


def test_a_server_that_refuses_a_whole_round_does_not_warm():
    fields = {"status": "error", "error_kind": "http_503", "error_message": "loading"}
    done = warmed(Warmup(duration_s=100), [100], **fields)

    assert (done.rounds, done.failed, done.first_failure) == (1, 4, "loading")


def test_a_failure_is_not_in_the_median():
    assert median_ttft([answer(100), answer(5, status="error"), answer(300)]) == pytest.approx(0.2)
    assert median_ttft([record(chunk_us=[5], chunk_kinds=[("role", 1)])]) is None
    assert token_span_s([1, 2, 3, 4], [("role", 1), ("content", 2), ("usage", 1)]) == pytest.approx((3e-6, 6e-6))


def test_what_will_be_sent_in_words():
    assert in_words(Warmup()) == "4 requests"
    assert in_words(Warmup(duration_s=30)) == "rounds of 4 requests for 30 s"
    assert in_words(Warmup(until_stable=True)) == "rounds of 4 requests until TTFT has settled"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{requests: 0, duration_s: 5}", "warmup.requests: a round of 0"),
        ("{requests: 0, until_stable: true}", "warmup.requests: a round of 0"),
        ("{requests: 40, until_stable: true}", "warmup.max_requests: two rounds to compare are 80"),
        ("{duration_s: 0}", "warmup.duration_s: expected `float` > 0"),
        ("{stable: true}", "unknown key 'warmup.stable'"),
    ],
)
def test_what_cannot_be_is_told(tmp_path, text, words):
    (tmp_path / "x.yaml").write_text(f"warmup: {text}\n")

    with pytest.raises(ExperimentError) as error:
        load_experiment(tmp_path / "x.yaml")
    assert words in str(error.value)


def test_a_run_warms_up_until_its_server_has_settled(tmp_path):
    """The first eight answers come late, all others at one pace: four rounds or more."""
    answers = []

    def respond(body):
        answers.append(body)
        return plain_answer(2, gap_s=0.4 if len(answers) <= 4 else 0.25 if len(answers) <= 8 else 0.1)

    with FakeServer(respond) as server:
        words = ("-H", server.url, "-u", "1", "-t", "1", "--no-report", "--set", "warmup.until_stable=true")
        code, output = run(tmp_path, *words)
    records, meta = read(tmp_path)
    warm = [one for one in records if one.phase == "warmup"]

    assert code == 0, output
    assert meta["warmup"]["requests"] == len(warm) >= 16
    assert meta["warmup"]["rounds"] * 4 == len(warm)
    assert max(one.ended_at for one in warm) <= meta["window"]["started_at"]
    settled = [note for note in meta["notes"] if "had not settled" in note]
    assert bool(settled) is (meta["warmup"]["stable"] is False)
