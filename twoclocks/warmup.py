"""Warm-up: rounds of requests before the clock starts, until there were enough. Knows nothing of sockets or Locust.

A round is `warmup.requests` requests at once. One is the default; `duration_s` asks for rounds for so long, and
`until_stable` for rounds until the server has settled: until two in a row have nearly the same median TTFT.
"""

import statistics
import time
from collections.abc import Callable

import msgspec

from twoclocks.experiment import Warmup
from twoclocks.record import Record, token_span_s

STABLE_SHARE = 0.1
"""Two rounds are alike if their median TTFTs differ by less than this share of the earlier one."""
STABLE_S = 60.0
"""At which until_stable gives up."""


class WarmedUp(msgspec.Struct, frozen=True):
    """What the warm-up came to; run.json holds it as `warmup`."""

    requests: int
    rounds: int
    seconds: float
    failed: int
    stable: bool | None  # None: nobody asked
    first_failure: str | None
    tells: bool  # did any answer bring the server's own timings?


def warm_up(
    settings: Warmup, send_round: Callable[[int], list[Record]], clock: Callable[[], float] = time.monotonic
) -> WarmedUp:
    """Call ``send_round`` with a number of requests until there were enough rounds.

    A round in which no request ended ok is the last: a server that refuses them all does not warm.
    """
    began = clock()
    requests = rounds = failed = 0
    stable = False if settings.until_stable else None
    first_failure, tells = None, False
    before: float | None = None  # median TTFT of the last round
    while True:
        records = send_round(settings.requests)
        requests, rounds = requests + len(records), rounds + 1
        bad = [record for record in records if record.status != "ok"]
        failed += len(bad)
        if bad and first_failure is None:
            first_failure = bad[0].error_message
        tells = tells or any(record.server for record in records)
        now = median_ttft(records)
        if settings.until_stable and before is not None and now is not None:
            stable = stable or abs(now - before) < STABLE_SHARE * before
        before = now
        if len(bad) == len(records) or _enough(settings, stable, requests, clock() - began):
            return WarmedUp(requests, rounds, clock() - began, failed, stable, first_failure, tells)


def _enough(settings: Warmup, stable: bool | None, requests: int, seconds: float) -> bool:
    if settings.duration_s != "none" and seconds < settings.duration_s:
        return False
    return stable is not False or requests + settings.requests > settings.max_requests or seconds >= STABLE_S


def median_ttft(records: list[Record]) -> float | None:
    """Of the requests that ended ok, seconds; None if none of them has a token."""
    spans = [token_span_s(record.chunk_us, record.chunk_kinds) for record in records if record.status == "ok"]
    firsts = [span[0] for span in spans if span is not None]
    return statistics.median(firsts) if firsts else None


def in_words(settings: Warmup) -> str:
    """What will be sent: ``4 requests``, or ``rounds of 4 requests for 30 s until TTFT has settled``."""
    if settings.duration_s == "none" and not settings.until_stable:
        return f"{settings.requests} requests"
    words = [f"rounds of {settings.requests} requests"]
    words += [] if settings.duration_s == "none" else [f"for {settings.duration_s:g} s"]
    return " ".join([*words, *(["until TTFT has settled"] if settings.until_stable else [])])
