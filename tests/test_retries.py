"""Retries: when there is another attempt, what its record says, and where the figures count it."""

import itertools
import json
from collections import defaultdict

import numpy as np
import pytest
from fake_server import FakeServer, plain_answer
from fault_proxy import PASSES, FaultProxy
from locust_runs import only_run, read, run
from make_run import record, write_folder

from twoclocks import report
from twoclocks.client import retry_after_s
from twoclocks.errors import ExperimentError
from twoclocks.experiment import Retries, load_experiment
from twoclocks.retries import JITTER, pause_s
from twoclocks.terminal import render, to_text
from twoclocks.workload import Plan, Prompt, repeated

REFUSED = {"status": "error", "error_kind": "refused", "sent_at": None}
BUSY = {"status": "error", "error_kind": "http_429", "http_status": 429}
CLOSED = {"status": "error", "error_kind": "closed"}


@pytest.mark.parametrize(
    ("retries", "fields", "expected"),
    [
        ({}, REFUSED, None),  # off by default
        ({"max": 1}, REFUSED, 0.5),
        ({"max": 1}, REFUSED | {"attempt": 2}, None),
        ({"max": 9}, REFUSED | {"attempt": 3}, 2.0),
        ({"max": 9, "longest_pause_s": 1.5}, REFUSED | {"attempt": 3}, 1.5),
        ({"max": 9, "after": [429]}, REFUSED, None),
        ({"max": 1}, REFUSED | {"status": "timeout", "error_kind": "connect_timeout"}, 0.5),
        ({"max": 1}, REFUSED | {"error_kind": "no_file_handle"}, None),
        ({"max": 1}, BUSY, 0.5),
        ({"max": 1}, BUSY | {"retry_after_s": 7.0}, 7.0),
        ({"max": 1}, BUSY | {"retry_after_s": 0.0}, 0.0),
        ({"max": 1}, BUSY | {"retry_after_s": 31.0}, None),
        ({"max": 1, "longest_pause_s": 60}, BUSY | {"retry_after_s": 31.0}, 31.0),
        ({"max": 1, "respect_retry_after": False}, BUSY | {"retry_after_s": 31.0}, 0.5),
        ({"max": 1}, {"status": "error", "error_kind": "http_500", "http_status": 500}, None),
        ({"max": 1, "after": [500]}, {"status": "error", "error_kind": "http_500", "http_status": 500}, 0.5),
        ({"max": 1, "after": [400]}, {"status": "error", "error_kind": "context_length", "http_status": 400}, None),
        ({"max": 1}, CLOSED, None),
        ({"max": 1, "after": ["closed"]}, CLOSED, 0.5),
        ({"max": 1, "after": ["closed"]}, {"status": "truncated", "error_kind": "closed", "http_status": 200}, None),
        ({"max": 1, "after": ["closed"]}, {"status": "timeout", "error_kind": "first_token_timeout"}, None),
        ({"max": 1}, {"status": "cancelled", "error_kind": "stopped", "sent_at": None}, None),
        ({"max": 1}, {}, None),
    ],
)
def test_when_the_next_attempt_is_due(retries, fields, expected):
    retries, one = Retries(**retries), record(**fields)

    assert pause_s(retries, one, 0.0) == expected
    if expected and "retry_after_s" not in fields:
        assert pause_s(retries, one, 0.5) == pytest.approx(expected * (1 - JITTER / 2))


NOON = "Sat, 21 Nov 2026 12:00:00 GMT"


@pytest.mark.parametrize(
    ("headers", "expected"),
    [
        ({}, None),
        ({"retry-after": "12"}, 12.0),
        ({"retry-after": "0.25"}, 0.25),
        ({"retry-after": "Sat, 21 Nov 2026 12:00:30 GMT", "date": NOON}, 30.0),
        ({"retry-after": "Sat, 21 Nov 2026 11:00:00 GMT", "date": NOON}, 0.0),
        ({"retry-after": "Sat, 21 Nov 2026 12:00:30", "date": NOON}, None),  # of no zone
        ({"retry-after": "Sat, 21 Nov 2026 12:00:30 GMT"}, None),  # no clock to hold it against
        ({"retry-after": "-1"}, None),
        ({"retry-after": "9" * 400}, None),
        ({"retry-after": "soon", "date": NOON}, None),
        ({"retry-after": "1e9"}, None),
    ],
)
def test_how_long_a_server_asks_to_be_left_alone(headers, expected):
    assert retry_after_s(headers) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("retries: {max: -1}", "retries.max: expected `int` >= 0"),
        ("retries: {after: [sometimes]}", "retries.after"),
        ("retries: {after: [200]}", "retries.after"),
        ("retries: {max: 1, after: []}", "retries.after: says after what"),
        ("retries: {pause_s: 60}", "retries.pause_s: 60 s is longer than longest_pause_s = 30"),
        ("retries: {limit: 1}", "unknown key 'retries.limit'"),
    ],
)
def test_settings_that_cannot_be_are_one_line(tmp_path, text, message):
    (tmp_path / "x.yaml").write_text(text)
    with pytest.raises(ExperimentError, match=message.replace("[", r"\[")) as error:
        load_experiment(tmp_path / "x.yaml")

    assert "\n" not in str(error.value)


def test_a_repeated_plan_differs_in_its_id_alone():
    plan = Plan("a" * 32, Prompt("p", {}), b'{"prompt":"x","rid":"%b"}' % (b"a" * 32), 7, later=2)
    again = repeated(plan)

    assert again.request_id != plan.request_id
    assert again.body == plan.body.replace(b"a" * 32, again.request_id.encode())
    assert (again.prompt, again.max_tokens, again.later) == (plan.prompt, 7, 2)


PATTERN = [
    PASSES, "429 with Retry-After", PASSES, "503", "503", PASSES, "closes before the headers", PASSES, PASSES,
    "503", "429 with Retry-After", PASSES,
]  # fmt: skip
ASKS = [1, 2, 3, 2, 1, 3]  # attempts of each, if they come one after the other


@pytest.mark.parametrize("shape", ["closed", "open"])
def test_each_attempt_is_a_record_of_its_own_and_the_asks_are_counted_apart(tmp_path, shape):
    """The proxy deals out its answers in the order of PATTERN, whoever asks."""
    keys = {
        "warmup.requests": 0, "load.requests": len(ASKS), "load.duration_s": 60, "workload.max_tokens": 4,
        "retries.max": 5, "retries.after": "[connect, closed, 429, 503]", "retries.pause_s": 0.05,
    }  # fmt: skip
    keys |= {"load.users": 1} if shape == "closed" else {"load.shape": "rate", "load.rate": 20}
    words_ = [word for key, value in keys.items() for word in ("--set", f"{key}={value}")]
    with FakeServer(lambda body: plain_answer(4, gap_s=0.01)) as server:
        with FaultProxy(server.url, lambda number: PATTERN[number]) as proxy:
            code, output = run(tmp_path, "-H", proxy.url, *words_)
        bodies = {headers["x-request-id"]: body for headers, body in server.requests}
    records, meta = read(tmp_path)
    by_id = {one.request_id: one for one in records}
    asks = defaultdict(list)
    for one in sorted(records, key=lambda one: one.attempt):
        asks[one.first_attempt_id or one.request_id].append(one)
    summary = json.loads((only_run(tmp_path) / "summary.json").read_text())
    told, figures = summary["attempts"], summary["figures"]

    assert code == 0, output  # every ask was answered in the end
    assert len(records) == len(by_id) == len(PATTERN)
    assert by_id.keys() == proxy.dealt.keys()
    assert bodies.keys() == {request_id for request_id, one in proxy.dealt.items() if one.fault == PASSES}
    assert len(asks) == len(ASKS)
    if shape == "closed":
        assert [len(asks[first]) for first in asks] == [len(asks[first]) for first in sorted(asks, key=_sent(by_id))]
        assert [len(asks[first]) for first in sorted(asks, key=_sent(by_id))] == ASKS
    for first, made in asks.items():
        assert [one.attempt for one in made] == list(range(1, len(made) + 1))
        assert made[0].request_id == first
        assert len({one.prompt_id for one in made}) == 1
        assert [proxy.dealt[one.request_id].fault == PASSES for one in made] == [False] * (len(made) - 1) + [True]
        for before, after in itertools.pairwise(made):
            waited = after.intended_at - before.ended_at
            if before.http_status == 429:
                assert waited == pytest.approx(before.retry_after_s, abs=2e-6) == 1.0
            else:
                doubled = 0.05 * 2 ** (before.attempt - 1)
                assert (1 - JITTER) * doubled - 2e-6 <= waited <= doubled + 2e-6
            assert after.sent_at >= after.intended_at - 1e-6
    ttfts = np.array([made[-1].sent_at + made[-1].chunk_us[0] / 1e6 - made[0].intended_at for made in asks.values()])
    ttfts += np.array([made[-1].chunk_us[1] / 1e6 for made in asks.values()])  # the role's chunk is no token
    counts = np.array([len(made) for made in asks.values()])

    assert (told["asks"], told["attempts"], told["ok"]) == (len(ASKS), len(PATTERN), len(ASKS))
    assert told["retried_share"] == pytest.approx((counts > 1).mean())
    assert [row["attempts"] for row in told["rows"]] == [*sorted(set(counts.tolist())), None]
    for row in told["rows"]:
        mine = ttfts if row["attempts"] is None else ttfts[counts == row["attempts"]]
        assert (row["asks"], row["ok"]) == (len(mine), len(mine))
        assert row["ttft_from_first_intent"]["p50"] == pytest.approx(np.median(mine), abs=1e-5)
    assert [figures[name]["value"] for name in ("requests", "ok", "failed")] == [12, 6, 6]
    assert figures["ttft"]["max"] < 1.0 < told["rows"][-1]["ttft_from_first_intent"]["max"]  # a pause is in no TTFT
    assert "chat, retried" in output
    assert "6 asks took 12 attempts; 66.7 % took more than one, and 0 did not end ok." in " ".join(output.split())
    assert (meta["status"], meta["turns_not_sent"]) == ("finished", None)


def _sent(by_id):
    return lambda request_id: by_id[request_id].intended_at


def test_an_ask_that_fails_in_the_end_and_one_without_retries(tmp_path):
    def attempt(number, of, **fields):
        first = None if of == number else f"{of:032x}"
        return record(
            f"{number:032x}", attempt=1 if first is None else number - of + 1, first_attempt_id=first, **fields
        )

    chunks = {"chunk_us": [100_000, 10_000], "chunk_kinds": [("content", 2)], "output_tokens": 2}
    records = [
        attempt(0, 0, intended_at=1.0, sent_at=1.0, **chunks),
        attempt(1, 1, intended_at=1.0, sent_at=1.0, ended_at=1.1, **BUSY),
        attempt(2, 1, intended_at=3.0, sent_at=3.0, ended_at=3.1, **BUSY),
        attempt(3, 3, intended_at=2.0, sent_at=2.0, ended_at=2.1, **BUSY),
        attempt(4, 3, intended_at=4.0, sent_at=4.2, **chunks),
    ]
    folder = write_folder(tmp_path / "run", records)
    summary = report.build(folder).summary
    told = summary["attempts"]
    whole = told["rows"][-1]

    assert (told["asks"], told["attempts"], told["ok"], told["retried_share"]) == (3, 5, 2, pytest.approx(2 / 3))
    assert [(row["attempts"], row["asks"], row["ok"]) for row in told["rows"]] == [(1, 1, 1), (2, 2, 1), (None, 3, 2)]
    assert (whole["ttft_from_first_intent"]["min"], whole["ttft_from_first_intent"]["max"]) == (
        pytest.approx(0.1), pytest.approx(2.3),
    )  # fmt: skip
    assert whole["e2e_from_first_intent"]["max"] == pytest.approx(2.31)
    assert summary["figures"]["ttft"]["max"] == pytest.approx(0.1)
    for page in ((folder / "report.html").read_text(), to_text(render(summary))):
        assert "3 asks took 5 attempts; 66.7 % took more than one, and 1 did not end ok." in " ".join(page.split())
    alone = report.build(write_folder(tmp_path / "alone", records[:1])).summary
    assert alone["attempts"] is None
